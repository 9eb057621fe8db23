"""The teacher's own words: refusals, placeholders, and what it says about its rewrite before and behind it.

An answer may begin with "Here is", hope that it helps, or regret. Only words that call the text an answer (an
instruction) and new or better, or decline to write one, are the teacher's own.
"""

import re
from collections.abc import Iterator
from functools import cache

from .reply import Blocks, strip

# ---- in place of a rewrite

_HELP = (
    r"(?:(?:share|give|process|fulfill?|meet)(?= (?:that|this|such|your|you (?:that|this|such|a (?:better|new)))\b)|"
    r"help(?! but)|assist|answer|provid(?:e|ing)|comply|fulfill?|complete|do that|do this|generat(?:e|ing)|"
    r"creat(?:e|ing)|writ(?:e|ing)|rewrit(?:e|ing)|continue|discuss|engage|support|produce|conscience)\b"
)
_REFUSAL = re.compile(
    r"(?i)[\"'“*_]{0,3}(?:(?:(?:i['’]m|i am) (?:very |so |truly |really )?sorry|sorry|(?:i|my) apologi[sz]es?|"
    r"my apologies|unfortunately|no|i understand your request)?[,.!]? ?(?:but )?"
    r"(?:(?:as|i['’]m|i am) (?:just )?an ai[^.\n]{0,60}?,? ?)?"
    r"(?:i(?:['’]m| am) (?:unable to|not able to|not comfortable(?: with)?)|i (?:don['’]t|do not) feel comfortable|"
    r"i (?:can(?:['’]t|not| not)|won['’]t|will not)(?: and (?:will not|won['’]t))?(?: be able to)?|"
    r"i (?:don['’]t|do not) think i can|i(?:['’]m| am) not going to|"
    r"i (?:must|have to|need to) (?:\w+ly )?(?:decline|refuse) to) "
    rf"(?:\w+ ){{0,2}}?{_HELP}|"
    r"i (?:must|have to|need to) (?:\w+ly )?(?:decline|refuse)(?: (?:this|that|your) (?:request|task)\b|[.!])|"
    r"this (?:request|prompt) (?:violates|goes against)\b)"
    r"|(?i:(?:es )?tut mir leid[^.\n]{0,40} nicht (?:(?:weiter)?helfen|beantworten)|"
    r"lo siento[^.\n]{0,20} no puedo (?:ayudar|cumplir)|"
    r"(?:je suis )?désolée?[^.\n]{0,20} je ne (?:peux|suis)[^.\n]{0,20} aider)"
    r"|(?:(?:很抱歉|抱歉|对不起)[，,]?(?:但)?(?:作为[^，\n]{0,20}[，,])?|作为[^，\n]{0,9}(?:AI|人工智能)[^，\n]{0,9}[，,])"
    r"我(?:无法|不能)[^。\n]{0,6}(?:回答|提供|帮|协助|满足|生成)"
    r"|申し訳(?:ありません|ございません)が、[^。\n]{0,30}(?:お答え|お応え|お手伝い|対応|提供)(?:でき|いたしかね)"
)
# the prompt's format filled in with itself, "your answer", or with nothing, "N/A"
_PLACEHOLDER = re.compile(
    r"(?i)[\s.…*_–—()\[\]<>{}\"'`:-]*(?:(?:(?:insert|write|put|provide|add) )?(?:the|a|an|your|my)? ?"
    r"(?:(?:new|better|own|improved|complete|detailed|full|rewritten) ){0,3}(?:instruction|answer|response)"
    r"(?: (?:goes|here|text|above|below)){0,2}|n/?a|none|tbd|todo|same as (?:above|before)|not applicable)?"
    r"[\s.…*_–—()\[\]<>{}\"'`:!-]*"
)


# what is declined: this task, and not whatever the speaker of a letter or a question cannot do
_TASK = re.compile(r"(?i)\b(?:this|that|such|your|an ai)\b")
# what follows words of regret in an answer that does answer
_ALL_THE_SAME = re.compile(r"(?i)[^.!?\n]{0,80}(?:: \w|\bbut here(?:['’]s| is| are)\b)|[^`]{0,200}```")


def is_refusal(text: str, part: str = "response") -> bool:
    """Whether a text begins by declining the task; an instruction may well say what its writer cannot do."""
    if (refusal := _REFUSAL.match(text)) is None:
        return False
    if part == "instruction" and refusal[0].isascii():
        sentence = re.split(r"[.!?\n]", text[refusal.start() : refusal.end() + 120], maxsplit=1)[0]
        return bool(_TASK.search(sentence)) and "?" not in text[refusal.end() :]
    return _ALL_THE_SAME.match(text, refusal.end()) is None


def is_placeholder(section: str, samples: frozenset[str]) -> bool:
    """Whether nothing but a placeholder stands in a section; `samples` are those of its prompt, folded."""
    if len(section) >= 100:
        return False
    return bool(_PLACEHOLDER.fullmatch(section)) or (bool(section) and folded(section) in samples)


def folded(text: str) -> str:
    """The words of a text, whatever their case and what stands between them."""
    return re.sub(r"\W+", " ", text).strip().casefold()


# ---- about the rewrite

_NEW = (
    r"(?:new(?:ly[ -]generated)?|better|best|improved|revised|updated|rewritten|enhanced|refined|expanded|reworked|"
    r"reformulated|corrected)"
)
_QUALITY = (
    rf"(?:and|much|very|more|{_NEW}|detailed|complete|complex|challenging|comprehensive|thorough|accurate|helpful|"
    r"possible|precise|nuanced|in-depth|informative|specific|difficult|elaborate|sophisticated|full|relevant|clearer|"
    r"clear|longer|richer|(?:well-)?structured)"
)


_FOREIGN_PREAMBLE = (
    r"以下是(?:改进|改善|更好|修改|优化|重写)[^：:\n]{0,8}(?:回答|答案|指令)|"
    r"hier ist (?:eine|die) (?:verbesserte|bessere|überarbeitete)[^:\n]{0,40} (?:antwort|anweisung)|"
    r"aquí (?:tienes|está) (?:una|la) (?:nueva )?(?:respuesta|instrucción) (?:mejorada|mejor|revisada)[^:\n]{0,40}|"
    r"voici (?:une|la) (?:meilleure (?:réponse|instruction)|(?:réponse|instruction) (?:améliorée|révisée))[^:\n]{0,40}"
)


@cache
def _preamble(part: str) -> re.Pattern[str]:
    """What the teacher says before it begins: "Here is a new and more detailed answer:".

    It must speak of an answer (an instruction) as new or better; "Here is a polite response to the customer:" is not.
    """
    noun = "(?:instruction|question|prompt|task)" if part == "instruction" else "(?:answer|response|instruction)"
    named = "(?:(?:given|original|new|above|revised) ){0,2}(?:instruction|question|prompt)"
    target = rf"(?: (?:to|for) (?:the|your|this) {named})?"
    version = "(?:version of the (?:(?:given|original|previous) )?)?"
    based = r"(?:based on [^\n:,]{0,60}, )?"
    here_is = r"(?:here(?: is|['’]s)|below is|this is|the following is) (?:(?:a|an|the|my|your) )?"
    rewrite = rf"(?:{_QUALITY},? ){{1,8}}{version}{noun}{target}"
    more = (
        r",? (?:that|which|with|based on|as requested|as detailed as|for you|new and complete|addressing|"
        r"incorporating|written)\b[^.\n:]{0,100}"
    )
    return re.compile(
        rf"(?i)[*_]{{0,3}}(?:(?:sure|certainly|of course|absolutely|okay|ok)(?: thing)?[,.!:]? )?{based}[*_]{{0,3}}"
        rf"(?:{here_is}(?:{rewrite}|(?=(?:[\w-]+,? ){{0,6}}?(?:{_NEW}|more)\b){rewrite}{more})"
        rf"|here(?: is|['’]s) my (?:attempt at|take on) (?:a|an|the) (?:{_QUALITY},? ){{1,8}}{noun}{target}"
        rf"|{_FOREIGN_PREAMBLE}"
        rf"|(?:a|the|my) (?:{_QUALITY},? ){{1,6}}{noun}{target} "
        r"(?:(?:would|could|might) be(?: as follows)?|is as follows)"
        rf"|{_NEW} {noun})[*_]{{0,3}}[:：][*_]{{0,3}}(?:\s++|\Z)"
        rf"|#{{1,4}} (?:the )?{_NEW} {noun}:?\s*\n"
    )


# what the teacher calls the text that it wrote
_ANSWERS = ("answer", "response", "instruction")
_SPOKEN_OF = {
    "response": _ANSWERS,
    "instruction": (*_ANSWERS, "question", "prompt", "task", "version", "rewrite"),
}


@cache
def _talk(part: str) -> re.Pattern[str]:
    """A sentence in which the teacher speaks of its rewrite, such as "I hope this improved answer is more helpful!".

    An answer may well hope that it helps. Only one that calls itself rewritten, or offers to be, is spoken about.
    """
    noun = f"(?:{'|'.join(_SPOKEN_OF[part])})"
    gap, this = r"[^.!?\n]", r"(?:this|the|my|our|above)"
    new = rf"(?:{_NEW}|more [\w-]+(?:,? and (?:more )?[\w-]+)?)"
    itself = rf"\b{this} (?:{new},? (?:and )?){{1,3}}{noun}\b"
    gains = rf"\b(?:this|the|my) {noun} (?:is|feels|seems|will be) (?:now |much |far )?(?:more|better|clearer)\b"
    work = r"(?:revis|refin|improv|rewrit|rewrot|chang|adjust|edit|modif|tweak|expand|enhanc|rework)\w*"
    worked = rf"\b{work} (?:\w+ ){{0,3}}?{this} (?:(?:original|given|previous|initial|{new}) )?{noun}\b"
    verb = (
        r"(?:is|has|was|provides|includes|offers|gives|covers|addresses|explains|adds|requires|asks|challenges|ensures|"
        r"aims|meets|goes|delves|contains|focuses|builds|improves|presents|takes|should|would|will|can|i|we|maintains)"
    )
    strong = r"(?:revised|improved|rewritten|enhanced|refined|expanded|reworked|newly[ -]generated)"
    if part == "instruction":  # which may ask for an answer that does
        verb = verb.replace("|should", "")
    evidence = (
        r"\b(?:more|better|original|previous|detail\w*|comprehensive|complete|helpful\w*|accura\w+|relevan\w+|clear\w*|"
        r"thorough|in-depth|complex\w*|challeng\w+|independent|address\w*|improv\w+|shortcomings|weaknesses|critique|"
        r"feedback)\b"
    )
    original = rf"than the (?:original|given|previous)(?: (?:{noun}|one|version))?\b"
    return re.compile(
        r"(?i)[*_#(>\[ -]{0,6}(?:(?:note|overall|finally|in summary|p\.s\.|explanation"
        r"(?: of (?:the )?(?:changes|improvements))?|improvements)(?: that)?[:,]?[*_]{0,3}[ \n]{1,2})?(?:"
        rf"(?:(?:i|we) )?(?:really |do )?(?:hope|trust|believe|think|feel)\b{gap}{{0,80}}?(?:{itself}|{gains})"
        r"|(?:please )?(?:let me know|tell me|feel free|do not hesitate|don['’]t hesitate|if you(?:['’]d| would| want|"
        r" need)|would you like|do you want|is there anything|should you)"
        rf"\b{gap}{{0,120}}?(?:{itself}|{worked})"
        rf"|(?:in |with |by )?(?:(?:this|my) (?:{new},? (?:and )?){{1,3}}|the {strong} ){noun},? "
        rf"(?:(?:now|also|thus|therefore) )?{verb}\b[^\n]{{0,200}}?{evidence}"
        rf"|(?:by [^.,\n]{{1,60}}, )?(?:(?:this|my) (?:{new},? (?:and )?){{0,3}}|the (?:{new},? (?:and )?){{1,3}})"
        rf"{noun} [^.\n]{{1,120}}?{original}"
        rf"|the above {noun} is (?:better|more)\b"
        rf"|(?:i|we)(?:['’]ve| have)?(?: also| now| tried to| aimed to)? {worked}"
        rf"|(?:why|how) (?:this|the) (?:{new} )?{noun} (?:is|was|improves)\b{gap}{{0,40}}(?:better|improv|more)"
        rf"|(?:the |these |key |main )*(?:changes|improvements)\b{gap}{{0,40}}\b{this} (?:\w+ )?{noun}\b)"
    )


# what may stand between the teacher's words about its rewrite, but does not make them such
_FRIENDLY = re.compile(
    r"(?i)[*_( ]{0,4}(?:i(?:['’]m| am)? (?:hope|trust|happy|glad)|hope|(?:please )?(?:let me know|feel free)|"
    r"if you|thank|enjoy|good luck|happy|best|i['’]d be|is there)"
)
# what else may: a list of what was changed
_BEHIND_TALK = re.compile(rf"{_FRIENDLY.pattern}|[ \t]*+(?:[-*•+] |\d{{1,2}}[.)] |\*\*|-{{3,}}|\*{{3,}})")
_SIGNATURE = re.compile(
    r"(?i)\n[ \t]*(?:(?:best|kind|warm|with|many|yours)\b[^\n,]{0,30}|sincerely|regards|respectfully|cheers|thanks|"
    r"thank you|love)[^\n,]{0,20},\s+\S[^\n]{0,60}\s*\Z"
)
_PARAGRAPH = re.compile(r"\n[ \t]*+\n[ \t]*+(?=[^\s])")
# ends where the last sentence or line begins; the group stands behind what ended the one before it
_LAST_SENTENCE = re.compile(r"(?s).*[\n.!?…。！？]()(?:(?<=\n)\s*|[\"”’)*_\]]*\s+)")
RULE = re.compile(r"\n[ \t]*(?:-{3,}|\*{3,}|_{3,}|={3,})\s*\Z")  # a line across, as the last one


def speaks_of(part: str, text: str) -> bool:
    """Whether a text begins with the teacher's words about the instruction or the response that it wrote."""
    return _talk(part).match(text) is not None


def without_preamble(section: str, part: str) -> str:
    """The text without what the teacher says before it begins."""
    preamble = _preamble(part).match(section)
    return strip(section[preamble.end() :] if preamble else section)


def without_sign_off(section: str, part: str) -> str:
    """The text without the teacher's last words about it: a whole paragraph, or the last sentences of one."""
    talk, begin = _talk(part), max(0, len(section) - 3000)
    line = section.find("\n", begin)
    # nothing is looked at before the first of these lines, or the last sentences
    last_words = section[max(0, min(line, len(section) - 800)) if line >= 0 else -800 :].casefold()
    for noun in _SPOKEN_OF[part]:
        if noun in last_words:
            break
    else:
        return section
    if _SIGNATURE.search(section, max(0, len(section) - 200)):
        return section  # of a letter, which may speak of another answer
    paragraphs, blocks = list(_PARAGRAPH.finditer(section, begin)), Blocks(section)
    first = len(section)
    for paragraph in reversed(paragraphs):  # from the first of the last that are all the teacher's words
        if talk.match(section, paragraph.end()) and not blocks.hold(paragraph.end()):
            first = paragraph.start()
        elif not _BEHIND_TALK.match(section, paragraph.end()):
            break
    if first < len(section):
        return strip(RULE.sub("", section[:first]))
    cut = len(section)
    for start in _last_sentences(section):
        if talk.match(section, start):
            cut = start
        elif not _FRIENDLY.match(section, start):
            break
    return section if cut == len(section) else strip(RULE.sub("", section[:cut].rstrip()))


def _last_sentences(section: str) -> Iterator[int]:
    """Where the last six sentences and lines begin, from the last on; in the last 800 characters."""
    begin, stop = max(0, len(section) - 800), len(section)
    for _ in range(6):
        match = _LAST_SENTENCE.match(section, begin, stop)
        if match is None:
            return
        yield match.end()
        stop = match.start(1) - 1
        if section[stop] == "\n":  # perhaps not the first of several, or of the white space that it ends
            stop = begin + len(section[begin:stop].rstrip())

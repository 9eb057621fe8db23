"""How a teacher's reply is read: what a careful reader would take of it, to the character, or nothing with a reason.

Two forms: sections behind tags (`[Better Answer] … [End]`) and a JSON object. Both take linear time on any text: what
is searched for again and again is bounded, and quantifiers that could fight over the same characters are possessive.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from typing import Any, NamedTuple


class Rewrite(NamedTuple):
    """A reply, read. Where `error` is set nothing else is, but perhaps the critique."""

    instruction: str | None = None
    response: str | None = None
    critique: str | None = None
    error: str | None = None


class Unreadable(Exception):
    """Why a reply cannot be used; never leaves `read_tagged` and `read_json`."""


def withheld(finish_reason: str | None) -> str | None:
    """The error of a reply that is not whole, whatever its text; None where it is."""
    reason = (finish_reason or "").casefold()
    if reason in ("length", "max_tokens"):
        return "truncated: the reply was cut off at the token limit"
    if reason in ("content_filter", "safety", "refusal"):
        return "refused: the endpoint's content filter withheld the reply"
    return None


def read_tagged(text: str, tags: tuple[str, ...], end: str = "End", asked: str = "") -> Rewrite:
    """Read `[tag] text [end]` for one tag (the response) or two (instruction, response).

    `asked` is the prompt's own text: what stands in its tags is a placeholder where it comes back.
    """
    text = _spoken(
        text,
        lambda rest: all(_bracketed(tag).search(rest) or _bare(tag).search(rest) for tag in tags),
        lambda before: any(_bracketed(tag).search(before) for tag in tags),
    )
    blocks = _Blocks(text)
    openings = [_openings(text, blocks, role, tag) for role, tag in enumerate(tags)]
    if not all(openings):
        if _REFUSAL.match(text.strip()):
            return Rewrite(error=f"refused: {_shortened(text)}")
        found = " and ".join(f"[{tag}]" for tag, places in zip(tags, openings, strict=True) if not places)
        return Rewrite(error=f"unparsed: no {found} in the reply: {_shortened(text) or 'it is empty'}")
    places = sorted((place for one_tag in openings for place in one_tag), key=lambda place: place.start)
    critique = _strip(text[: places[0].start]) or None
    try:
        if repeated := next((tags[one[0].role] for one in openings if len(one) > MOST_OPENINGS), None):
            raise Unreadable(f"unparsed: [{repeated}] opens more than one section")
        stops = [place.start for place in places[1:]] + [len(text)]
        sections = [_section(text, place, stop, tags, end) for place, stop in zip(places, stops, strict=True)]
        chosen = []
        for role, tag in enumerate(tags):
            chosen.append(_the_one(tag, [one for one in sections if one.role == role], _samples(asked, tag, end)))
        if chosen != sorted(chosen, key=lambda one: one.start) and not all(one.closed for one in chosen):
            raise Unreadable(f"unparsed: [{tags[1]}] comes before [{tags[0]}], and one of them has no [{end}]")
        critique = _strip(text[: min(one.start for one in chosen)]) or None
        texts = [
            _checked(one.text, f"[{tag}]", role, len(tags), _samples(asked, tag, end))
            for role, (tag, one) in enumerate(zip(tags, chosen, strict=True))
        ]
    except Unreadable as unreadable:
        return Rewrite(critique=critique, error=str(unreadable))
    return Rewrite(texts[0] if len(texts) > 1 else None, texts[-1], critique)


def read_json(text: str, keys: tuple[str, ...]) -> Rewrite:
    """Read a JSON object with these keys, ("response",) or ("instruction", "response"), and perhaps "critique"."""
    text = _spoken(
        text,
        lambda rest: all(f'"{key}"' in rest for key in keys),
        lambda before: any(f'"{key}"' in before for key in keys),
        lambda text: text.lstrip(_WHITE + "`json[").startswith("{"),
    )
    found: dict[str, Any] | None = None
    for candidate in _json_objects(text, keys):
        named = {key.casefold(): value for key, value in candidate.items()}
        if isinstance(named.get("refusal"), str) and named["refusal"].strip() and not named.get(keys[-1]):
            return Rewrite(error=f"refused: {_shortened(named['refusal'])}")
        if any(key in named for key in keys):
            if found is not None and any(found.get(key) != named.get(key) for key in keys):
                return Rewrite(error="unparsed: more than one JSON object in the reply")
            found = named
    if found is None:
        if _REFUSAL.match(text.strip()):
            return Rewrite(error=f"refused: {_shortened(text)}")
        wanted = " and ".join(f"`{key}`" for key in keys)
        return Rewrite(
            error=f"unparsed: no JSON object with {wanted} in the reply: {_shortened(text) or 'it is empty'}"
        )
    critique = _strip(found["critique"]) or None if isinstance(found.get("critique"), str) else None
    texts = []
    try:
        for role, key in enumerate(keys):
            if key not in found:
                raise Unreadable(f"unparsed: the JSON object has no `{key}`")
            if not isinstance(found[key], str):
                raise Unreadable(f"unparsed: `{key}` is of type {type(found[key]).__name__}, not text")
            value = _strip(found[key].replace("\r\n", "\n"))
            texts.append(_checked(value, f"`{key}`", role, len(keys), frozenset()))
    except Unreadable as unreadable:
        return Rewrite(critique=critique, error=str(unreadable))
    return Rewrite(texts[0] if len(texts) > 1 else None, texts[-1], critique)


def is_end_tag(tag: str) -> bool:
    """Whether `[tag]` would be read as the end of a section under any prompt."""
    return _end("End", ()).fullmatch(f"[{tag}]") is not None


# ---- the reply without what is not said in it

# no-break, zero-width and ideographic spaces stand in for ordinary ones within and around tags
_GAP = r"[ \t\xa0\u2000-\u200d\u202f\u2060\u3000\ufeff]"
_WHITE = "".join(chr(code) for code in range(0x3001) if chr(code).isspace()) + "\u200b\u2060\ufeff"
_THINKING = re.compile(
    r"(?is)\A(?:[\s\ufeff]*+[<◁](think(?:ing)?|thought|reasoning|reflection)[>▷].*?(?:[<◁]/\1[>▷]|\Z))++"
)
_THINKING_END = re.compile(r"(?i)</think(?:ing)?>")
_SPECIAL_TOKENS = re.compile(
    r"(?:\s*+(?:<\|(?:im_end|eot_id|end|endoftext|end_of_text|eom_id)\|>|<｜end▁of▁sentence｜>|<end_of_turn>|</s>))++\s*\Z"
)


def _strip(text: str) -> str:
    return text.strip(_WHITE)


def _spoken(
    text: str,
    has_reply: Callable[[str], bool],
    has_begun: Callable[[str], bool],
    is_reply: Callable[[str], bool] = lambda text: False,
) -> str:
    """The reply with plain line ends, without thinking and without the tokens that should have ended it.

    Thinking stands first, or on lines of its own before anything of the reply: where it closes (without an opening
    tag too, which a chat template may have kept), the whole reply is still to come.
    """
    text = _THINKING.sub("", text.replace("\r\n", "\n"), count=1)
    closing = None if is_reply(text) else _THINKING_END.search(text)
    if closing and has_reply(text[closing.end() :]):
        opening = re.search("(?i)<think", text[: closing.start()])
        begin = opening.start() if opening else 0
        opens_a_line = not text[max(text.rfind("\n", 0, begin), 0) : begin].strip()
        if opens_a_line and not has_begun(text[:begin]):
            text = text[:begin] + text[closing.end() :]
    tokens = _SPECIAL_TOKENS.search(text, max(0, len(text) - 200))
    if tokens and not ("</s>" in tokens.group() and "<s>" in text):
        text = text[: tokens.start()]
    return text


# ---- where sections open

# the look ahead makes runs of brackets cheap
_OPEN = rf"[\[【［](?=[^\[\]【】［］\n]{{2,90}}+[\]】］]){_GAP}*+"
_CLOSE = rf"{_GAP}*+\\?[\]】］]{{1,2}}"

MOST_OPENINGS = 20  # of one tag; nobody can tell which of more was meant
_MARKS = r"[^\w\n\[\]【】［］\"'`“”‘’«»(){}]{0,20}+"
_LINE_OPENER = re.compile(rf"(?i){_MARKS}(?:(?:(?:step|part|task) ?)?\(?\w{{1,4}}[^\w\s\"'`\[]{_MARKS})?")
_SPEECH_END = re.compile(r"[.:!?…。：！？\])】］>*_|-][*_\s\u200b\ufeff]*\Z")
_TAIL = re.compile(rf"[:：]?(?:{_GAP}*+[:：](?=\s|\Z))?(?: ?#{{1,6}}(?=\n))?")
_BOLD_TAIL = re.compile(rf"[*_`:：]{{0,6}}(?:{_GAP}*+[:：](?=\s|\Z))?(?: ?#{{1,6}}(?=\n))?")
_TITLE_END = re.compile(rf"[*_]{{0,3}}{_GAP}{{0,4}}(?:[:：>][*_:：]{{0,4}}|(?=\n|\Z))|[*_]{{2,3}}")


class _Opening(NamedTuple):
    """A tag behind which a section begins; `start` is that of its line where it opens one."""

    role: int
    start: int
    stop: int
    marks: str  # what stands between its start and its tag
    left_bold: bool  # `**[tag] text**`: the bold that opened before the tag closes behind the text


def _words(tag: str) -> str:
    return rf"(?:{_GAP}|[-_]){{1,9}}".join(map(re.escape, tag.split()))


@cache
def _bracketed(tag: str) -> re.Pattern[str]:
    start_of = rf"(?:(?:the{_GAP}{{1,9}})?start{_GAP}{{1,9}}of{_GAP}{{1,9}})?"
    return re.compile(rf"{_OPEN}[*_]{{0,3}}(?i:{start_of}{_words(tag)})[:：]?[*_]{{0,3}}{_CLOSE}")


class _Tag(NamedTuple):
    start: int
    stop: int


def _found(pattern: re.Pattern[str], text: str) -> Iterator[_Tag]:
    """The tags of this pattern, with a second bracket, a backslash, and what makes them bold."""
    for match in pattern.finditer(text):
        start, stop = match.span()
        start -= text[max(0, start - 1) : start] in ("[", "【")
        start -= text[max(0, start - 1) : start] == "\\"
        yield _Tag(start, stop)


@cache
def _bare(tag: str) -> re.Pattern[str]:
    return re.compile(rf"(?i){_words(tag)}(?!\w)")


def _openings(text: str, blocks: "_Blocks", role: int, tag: str) -> list[_Opening]:
    """The places where sections of this tag open, all of the best kind that there is; one more than the most at most.

    A tag that opens a line is a section's, one amid a sentence is talked about, and one in a code block is quoted: the
    latter count only where there is no better one.
    """
    places = [
        (place, _before(text, place.start)) for place in islice(_found(_bracketed(tag), text), 25 * MOST_OPENINGS)
    ]

    def opens_line(before: str) -> bool:
        # perhaps behind its own name: "2. **Better Answer**: [Better Answer] …"
        return _LINE_OPENER.fullmatch(_bare(tag).sub("", before, count=1)) is not None

    def opening(place: _Tag, before: str, tail: re.Pattern[str] | None = None) -> _Opening:
        marks = before if opens_line(before) else before[len(before.rstrip("*_`")) :]
        bold = re.search("[*_`]", marks) is not None
        closing = (tail or (_BOLD_TAIL if bold else _TAIL)).match(text, place.stop)
        stop = closing.end() if closing else place.stop
        left_bold = "**" in marks and not set("*_") & set(text[place.stop : stop])
        return _Opening(role, place.start - len(marks), stop, marks, left_bold)

    def take(found: Iterable[_Opening]) -> list[_Opening]:
        return list(islice(found, MOST_OPENINGS + 1))

    def lines(fenced: bool) -> Iterator[_Opening]:
        for place, before in places:
            if opens_line(before) and (fenced or not blocks.hold(place.start)):
                yield opening(place, before)

    def titles(fenced: bool) -> Iterator[_Opening]:
        for match in _bare(tag).finditer(text):
            if not _TITLE_END.match(text, match.end()) or (not fenced and blocks.hold(match.start())):
                continue
            before = _before(text, match.start())
            opens = _LINE_OPENER.fullmatch(before) and not before[-1:].isalnum()
            if opens and ("<" in before) == (text[match.end() : match.end() + 1] == ">"):
                yield opening(_Tag(*match.span()), before, _TITLE_END)

    def sentences() -> Iterator[_Opening]:
        for place, before in places:
            if _SPEECH_END.search(before) and not blocks.hold(place.start):
                yield opening(place, before)

    kinds = [lines(False), titles(False), sentences()] + ([lines(True), titles(True)] if blocks.starts else [])
    for kind in kinds:
        if found := take(kind):
            return found
    return [opening(*places[-1])] if places else []


def _before(text: str, place: int) -> str:
    """What stands before this place in its line; of a long line the last 60 characters."""
    return text[max(text.rfind("\n", max(0, place - 60), place) + 1, place - 60) : place]


# ---- where they end

_FENCE = re.compile(rf"(?m)^(?:{_GAP}|>)*+(`{{3,}}+|~{{3,}}+)(.*)")
_MOST_ENDS = 50
_BLANK_LINE = re.compile(rf"\s*\Z|{_GAP}*+\n{_GAP}*+(?:\n|\Z)")
_FOREIGN = re.compile(
    r"[#>*_\s]{0,20}\[[^\W\d_][^\]\n]{0,40}\]|\s{0,9}#{1,6} ?(?:instruction|critique|question)\b", re.I
)
_PROMPTS_BLOCK = re.compile(r"(?im)^\[(?:Instruction|The Start of (?:Answer|Input|Conversation))\][ \t]*$")
_PROMPTS_END = re.compile(r"(?i)[*_#\s]{0,9}\[the end of ")
_RULE = re.compile(r"\n[ \t]*(?:-{3,}|\*{3,}|_{3,}|={3,})\s*\Z")
_TITLE = re.compile(
    r"(?i)\n[ \t]*(?:#{1,6}[ \t]|\*\*|\d{1,2}[.)])[ \t*_#\d.)]*(?:(?:step|part|task) \d{1,2}[ .:–-]*)?"
    r"(?:(?:(?:the|my|your) )?(?:(?:new|better|improved|detailed|complete) ){0,2}(?:answer|response)"
    r"(?: to [^\n]{0,60})?|"
    r"answer(?:ing)? (?:to )?the new[^\n]{0,80})?[*_:：. \t]*\s*\Z"
)


class _Section(NamedTuple):
    role: int
    start: int
    text: str
    closed: bool
    ends: int  # groups of end tags seen; above one where the text quotes its end


class _Blocks:
    """Where fenced code stands. A last fence without a partner opens none."""

    def __init__(self, text: str):
        self.starts: list[int] = []
        self.stops: list[int] = []
        self.unpaired: int | None = None  # where a last bare fence stands
        opened: tuple[int, str] | None = None
        for fence in _FENCE.finditer(text):
            mark, info = fence.groups()
            if opened is None:
                opened = (fence.start(), mark)
                self.unpaired = fence.start() if not info.strip() else None
            elif mark.startswith(opened[1]) and not info.strip():
                self.starts.append(opened[0])
                self.stops.append(fence.end())
                opened = self.unpaired = None

    def hold(self, place: int) -> bool:
        block = bisect_right(self.starts, place) - 1
        return block >= 0 and place < self.stops[block]


@cache
def _end(end: str, tags: tuple[str, ...]) -> re.Pattern[str]:
    """`[End]`, `[/End]`, `[The End of Answer]`, `[/Better Answer]`, bold or not; and the prompt's own."""
    ends = "|".join({"end": "", _words(end): ""})
    names = "|".join([*map(_words, tags), r"(?:\w+[ ]){0,2}(?:answer|response|instruction|section|text|reply|output)"])
    of = rf"(?:{_GAP}{{1,9}}(?:of{_GAP}{{1,9}})?(?:the{_GAP}{{1,9}})?(?:{names}))?"
    slashed = rf"|/{_GAP}*+(?:{names})" if tags else ""
    inner = rf"(?:/?{_GAP}*+(?:the{_GAP}{{1,9}})?(?:{ends}){of}{slashed})"
    angled = "|".join(map(_words, tags))
    return re.compile(
        rf"{_OPEN}(?i:{inner}){_GAP}*+[.:]?{_CLOSE}" + (rf"|</{_GAP}*+(?i:{angled}){_GAP}*+>" if tags else "")
    )


def _ends(text: str, end: str, tags: tuple[str, ...], marks: str) -> Iterator[_Tag]:
    for start, stop in _found(_end(end, tags), text):
        before = text[max(0, start - 3) : start]
        bold = before[len(before.rstrip(marks)) :]
        if bold and text.startswith(bold, stop):
            start, stop = start - len(bold), stop + len(bold)
        yield _Tag(start, stop)


@cache
def _cut_end(end: str) -> re.Pattern[str]:
    """An end tag whose bracket a stop sequence ate, or one on a line of its own without brackets but marked."""
    name = rf"(?:{_words(end)}|end)"
    return re.compile(rf"(?i)(?:\\?[\[【［]{_GAP}{{0,9}}/?{name}|\n(?:\*\*|#{{1,6}} ){name}[*:]*|\n\({name}\))\s*\Z")


def _section(text: str, place: _Opening, stop: int, tags: tuple[str, ...], end: str) -> _Section:
    """The text behind a tag up to its end tag, or to where the next section opens."""
    body = text[place.stop : stop]
    blocks = _Blocks(body)
    marks = "*_`" if "`" in place.marks else "*_"
    ends = (tag for tag in _ends(body, end, tags, marks) if not blocks.hold(tag.start))
    cut, groups = _where_it_ends(body, list(islice(ends, _MOST_ENDS + 1)))
    next_pair = _PROMPTS_BLOCK.search(body)  # the teacher went on to another pair, of which nobody asked
    if next_pair and cut is not None and cut > next_pair.start() and _PROMPTS_END.match(body, cut):
        cut = None
    if cut is not None:
        section = body[:cut]
    else:
        section = body[: next_pair.start()] if next_pair else body
        if eaten := _cut_end(end).search(section, max(0, len(section) - 60)):
            section = section[: eaten.start()]
        if blocks.unpaired is not None and not _strip(section[blocks.unpaired :]).strip("`~"):
            section = section[: blocks.unpaired]  # the reply as a whole stood in a code block
        for _ in range(4):
            tail = max(0, len(section) - 200)
            title = _RULE.search(section, tail) or (_TITLE.search(section, tail) if stop < len(text) else None)
            if title is None:
                break
            section = section[: title.start()].rstrip()
    section = _strip(section)
    if place.left_bold and section.endswith("**") and section.count("**") % 2:
        section = section[:-2].rstrip()
    return _Section(place.role, place.start, section, cut is not None, groups)


def _where_it_ends(body: str, ends: list[_Tag]) -> tuple[int | None, int]:
    """Where the section's text ends, None if no end tag closes it, and how many groups of end tags there are.

    An end tag closes the section where nothing follows it in its line, or where a sentence ended before it; one amid a
    sentence or in quotation marks is talked about. Behind the first that closes only the teacher's own words may
    stand: where there are more, and what lies between could be the answer's, nobody can tell.
    """
    closing = [tag for tag in ends[:_MOST_ENDS] if _closes(body, tag)]
    if len(ends) > _MOST_ENDS:
        raise Unreadable("unparsed: too many end tags in one section")
    groups = 0
    for position, tag in enumerate(closing):
        following = closing[position + 1 : position + 2]
        between = body[tag.stop : following[0].start if following else len(body)]
        if following and not _strip(between).strip("*_#> "):
            continue  # ends in a row
        groups += 1
    cut: int | None = None
    for position, tag in enumerate(closing):
        later = [other for other in closing[position + 1 :] if _strip(body[tag.stop : other.start])]
        between = body[tag.stop : later[0].start] if later else ""
        if not later or _FOREIGN.match(between) or _talk(1, 2).match(_strip(between)):
            cut = tag.start
            break
        if _BLANK_LINE.match(body, tag.stop):
            raise Unreadable("unparsed: more than one end tag could close the section")
    if cut is None:
        return None, groups
    line = body.rfind("\n", max(0, cut - 20), cut) + 1
    return (line if line and not body[line:cut].strip("#>*_-• \t") else cut), groups


def _closes(body: str, tag: _Tag) -> bool:
    before, after = body[max(0, tag.start - 40) : tag.start], body[tag.stop : tag.stop + 40]
    if before[-1:] in tuple("`\"'“‘«") or after[:1] in tuple("`\"'”’»,;"):
        return False
    if body.startswith("[end", tag.start) and before[-1:].isascii() and (before[-1:].isalnum() or before[-1:] == "_"):
        return False  # arr[end]
    said, goes_on = before.rstrip()[-1:], after.lstrip("*_ \t\n")[:1]
    amid = (said.isalnum() or said == ",") and goes_on.islower()
    ends_line = not after.split("\n", 1)[0].strip(" \t*_.") or "\n" in before[len(before.rstrip()) :]
    if ends_line:
        return not (amid and "\n\n" not in after[: len(after) - len(after.lstrip())])
    return not amid and (not said.isalnum() or goes_on.isupper() or goes_on in tuple("[【"))


# ---- which of several, and whether it can be used


@cache
def _samples(asked: str, tag: str, end: str) -> frozenset[str]:
    """The words that the prompt itself shows in this tag, folded: `[Better Answer] your answer [End]`."""
    shown = re.findall(rf"{_bracketed(tag).pattern}(.{{1,80}}?)\[{re.escape(end)}\]", asked[:20_000])
    return frozenset(_folded(words) for words in shown)


def _folded(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().casefold()


def _is_placeholder(section: str, samples: frozenset[str]) -> bool:
    if len(section) >= 100:
        return False
    return bool(_PLACEHOLDER.fullmatch(section)) or (bool(section) and _folded(section) in samples)


def _the_one(tag: str, sections: list[_Section], samples: frozenset[str]) -> _Section:
    """The section that was meant: not the format repeated, and a closed one before what has no end."""
    told = [one for one in sections if one.text and not _is_placeholder(one.text, samples)] or sections[:1]
    if len({one.text for one in told}) == 1:
        return told[0]
    closed = [one for one in told if one.closed]
    if len(closed) != 1 or closed[0].ends > 1:
        raise Unreadable(f"unparsed: [{tag}] opens more than one section")
    return closed[0]


def _checked(section: str, name: str, role: int, roles: int, samples: frozenset[str]) -> str:
    """The section without what the teacher says about it; Unreadable where nothing usable is left."""
    section = _strip(_preamble(role, roles).sub("", section, count=1))
    section = _strip(_without_sign_off(section, _talk(role, roles)))
    if not section:
        raise Unreadable(f"unparsed: nothing stands behind {name}")
    if _is_placeholder(section, samples):
        raise Unreadable(f"placeholder: {name} holds only {section!r}")
    if len(section) < 400 and _REFUSAL.match(section):
        raise Unreadable(f"refused: {_shortened(section)}")
    return section


_HELP = (
    r"(?:help(?! but)|assist|answer|provid(?:e|ing)|comply|fulfill?|complete|do that|do this|generat(?:e|ing)|"
    r"creat(?:e|ing)|writ(?:e|ing)|rewrit(?:e|ing)|continue|discuss|engage|support|produce|conscience)\b"
)
_REFUSAL = re.compile(
    r"(?i)[\"'“*_]{0,3}(?:(?:(?:i['’]m|i am) (?:very |so |truly |really )?sorry|sorry|(?:i|my) apologi[sz]es?|"
    r"unfortunately)?[,.!]? ?(?:but )?(?:(?:as|i['’]m|i am) (?:just )?an ai[^.\n]{0,60}?, ?)?"
    r"(?:i(?:['’]m| am) (?:unable to|not able to|not comfortable(?: with)?)|i (?:don['’]t|do not) feel comfortable|"
    r"i (?:can(?:['’]t|not| not)|won['’]t|will not)(?: be able to)?|"
    r"i (?:must|have to) (?:\w+ly )?(?:decline|refuse) to) "
    rf"(?:\w+ ){{0,2}}?{_HELP}|i (?:must|have to) (?:\w+ly )?(?:decline|refuse) (?:this|that|your) (?:request|task)\b|"
    r"this (?:request|prompt) (?:violates|goes against)\b)"
    r"|(?i:(?:es )?tut mir leid[^.\n]{0,40} nicht (?:weiter)?helfen|lo siento[^.\n]{0,20} no puedo (?:ayudar|cumplir)|"
    r"(?:je suis )?désolée?[^.\n]{0,20} je ne (?:peux|suis)[^.\n]{0,20} aider)"
    r"|(?:很抱歉|抱歉|对不起)[，,]?(?:但)?我(?:无法|不能)[^。\n]{0,6}(?:回答|提供|帮|协助|满足|生成)"
    r"|申し訳(?:ありません|ございません)が、[^。\n]{0,30}(?:お答え|お手伝い|対応|提供)(?:でき|いたしかね)"
)
_PLACEHOLDER = re.compile(
    r"(?i)[\s.…*_–—()\[\]<>{}\"'`:-]*(?:(?:(?:insert|write|put|provide|add) )?(?:the|a|an|your|my)? ?"
    r"(?:(?:new|better|own|improved|complete|detailed|full|rewritten) ){0,3}(?:instruction|answer|response)"
    r"(?: (?:goes|here|text|above|below)){0,2}|n/?a|none|tbd|todo|same as (?:above|before)|not applicable)?"
    r"[\s.…*_–—()\[\]<>{}\"'`:!-]*"
)

# ---- the teacher's own words about its rewrite

_NEW = (
    r"(?:new(?:ly[ -]generated)?|better|best|improved|revised|updated|rewritten|enhanced|refined|expanded|reworked|"
    r"reformulated|corrected)"
)
_QUALITY = (
    rf"(?:and|much|very|more|{_NEW}|detailed|complete|complex|challenging|comprehensive|thorough|accurate|helpful|"
    r"possible|precise|nuanced|in-depth|informative|specific|difficult|elaborate|sophisticated|full)"
)


@cache
def _preamble(role: int, roles: int) -> re.Pattern[str]:
    """What the teacher says before it begins: "Here is a new and more detailed answer:".

    It must speak of an answer (an instruction) as new or better; "Here is a polite response to the customer:" is not.
    """
    noun = "(?:instruction|question|prompt|task)" if role < roles - 1 else "(?:answer|response|instruction)"
    named = "(?:(?:given|original|new|above|revised) ){0,2}(?:instruction|question|prompt)"
    target = rf"(?: (?:to|for) (?:the|your|this) {named})?"
    version = "(?:version of the (?:(?:given|original|previous) )?)?"
    based = r"(?:based on [^\n:,]{0,60}, )?"
    return re.compile(
        rf"(?i)\A[*_]{{0,3}}(?:(?:sure|certainly|of course|absolutely|okay|ok)(?: thing)?[,.!:]? )?{based}[*_]{{0,3}}"
        r"(?:(?:here(?: is|['’]s)|below is|this is|the following is) (?:(?:a|an|the|my|your) )?"
        rf"(?:{_QUALITY},? ){{1,8}}{version}{noun}{target}"
        rf"|(?:a|the|my) (?:{_QUALITY},? ){{1,6}}{noun}{target} (?:would be|could be|might be|is as follows)"
        rf"|{_NEW} {noun})[*_]{{0,3}}:[*_]{{0,3}}(?:\s++|\Z)"
    )


@cache
def _talk(role: int, roles: int) -> re.Pattern[str]:
    """A sentence in which the teacher speaks of its rewrite, such as "I hope this improved answer is more helpful!".

    An answer may well hope that it helps. Only one that calls itself rewritten, or offers to be, is spoken about.
    """
    noun = "(?:answer|response|instruction" + ("|question|prompt|task|version|rewrite)" if role < roles - 1 else ")")
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
    evidence = (
        r"\b(?:more|better|original|previous|detail\w*|comprehensive|complete|helpful\w*|accura\w+|relevan\w+|clear\w*|"
        r"thorough|in-depth|complex\w*|challeng\w+|independent|address\w*|improv\w+)\b"
    )
    return re.compile(
        r"(?i)[*_#(>\[ -]{0,6}(?:(?:note|overall|finally|in summary|p\.s\.)(?: that)?[:,]?[*_]{0,3} )?(?:"
        rf"(?:(?:i|we) )?(?:really |do )?(?:hope|trust|believe|think|feel)\b{gap}{{0,80}}?(?:{itself}|{gains})"
        r"|(?:please )?(?:let me know|tell me|feel free|do not hesitate|don['’]t hesitate|if you(?:['’]d| would| want|"
        r" need)|would you like|do you want|is there anything|should you)"
        rf"\b{gap}{{0,120}}?(?:{itself}|{worked})"
        rf"|(?:in |with |by )?(?:(?:this|my) (?:{new},? (?:and )?){{1,3}}|the {strong} ){noun},? "
        rf"(?:(?:now|also|thus|therefore) )?{verb}\b[^\n]{{0,200}}?{evidence}"
        rf"|(?:i|we)(?:['’]ve| have)?(?: also| now| tried to| aimed to)? {worked}"
        rf"|(?:why|how) (?:this|the) (?:{new} )?{noun} (?:is|was|improves)\b{gap}{{0,40}}(?:better|improv|more)"
        rf"|(?:the |these |key |main )*(?:changes|improvements)\b{gap}{{0,40}}\b{this} (?:\w+ )?{noun}\b)"
    )


_SENTENCE = re.compile(r"\n\s*|[.!?…。！？][\"”’)*_\]]*\s+")
_FRIENDLY = re.compile(
    r"(?i)[*_( ]{0,4}(?:i(?:['’]m| am)? (?:hope|trust|happy|glad)|hope|(?:please )?(?:let me know|feel free)|"
    r"if you|thank|enjoy|good luck|happy|best|i['’]d be|is there)"
)
_PARAGRAPH = re.compile(r"\n[ \t]*+\n[ \t]*+(?=[^\s])")


def _without_sign_off(section: str, talk: re.Pattern[str]) -> str:
    """The text without the teacher's last words about it: a whole paragraph, or the last sentences of one."""
    tail_start = max(0, len(section) - 3000)
    for paragraph in _PARAGRAPH.finditer(section, tail_start):
        if talk.match(section, paragraph.end()) and not _Blocks(section).hold(paragraph.end()):
            return _RULE.sub("", section[: paragraph.start()])
    starts = [match.end() for match in _SENTENCE.finditer(section, max(0, len(section) - 800))]
    cut = len(section)
    for start in reversed(starts[-6:]):
        if talk.match(section, start):
            cut = start
        elif not _FRIENDLY.match(section, start):
            break
    return section if cut == len(section) else _RULE.sub("", section[:cut].rstrip())


def _shortened(text: str, length: int = 100) -> str:
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else line[: length - 1] + "…"


# ---- JSON

_OBJECT = re.compile(r"\{\s*+[\"}]")
_MOST_FAILURES = 50


def _json_objects(text: str, keys: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The objects in a text, outermost first; inner ones only where the outer has none of the keys (`{"result": …}`).

    Attempts are numbered and what they read is summed up, so that no text is read more than a few times.
    """
    decoder = json.JSONDecoder(strict=False)  # weak endpoints leave line ends in strings as they are
    place, failures, read = 0, 0, 0
    while failures < _MOST_FAILURES and read <= 3 * len(text) and (found := _OBJECT.search(text, place)):
        place = found.start() + 1
        try:
            value, stop = decoder.raw_decode(text, found.start())
        except json.JSONDecodeError as error:
            failures, read = failures + 1, read + error.pos - found.start()
            continue
        except RecursionError:
            return
        read += stop - found.start()
        yield value
        if any(key.casefold() in keys for key in value):
            place = stop

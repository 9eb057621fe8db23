"""What a judge's review says: two scores, read as a careful reader would, or not at all."""

import re
from itertools import product

from .reply import spoken, strip

Scores = tuple[float, float]  # of the first answer and of the second, as they were shown
HIGHEST = 10  # of the scale that the judge is given

# of each line: what dresses scores up, and tags such as <score>
_MARKUP = re.compile(r"""(?i)</?(?:answer|output|rating|result|score)s?>|\\boxed\b|[*_#`\[\](){}>"$]""")
_NUMBER = r"(?<![\d./+-])(\d{1,2}(?:\.\d{1,3})?)(?: ?/ ?10| out of 10)?(?![\d/]|\.\d)"
_BETWEEN = r"(?: ?[,;|&] ?| and | )"
# two scores in a line, a label before them and the rest behind; "5 10 minute steps" and "8 7, 9" are no scores
_PAIR = re.compile(
    rf"(?i)(?:(.*?(?:[:=]|\b(?:are|would be))) ?)??{_NUMBER}{_BETWEEN}{_NUMBER}"
    r"(?-i:( ?\.?| ?[.,;:!|–—-]+ (?!\d).*| [^\W\d_a-z].*))"
)
# A label has one of the first words, and no word that is in neither: "Accuracy ratings" and "Points lost" are none.
_NAMES_SCORES = frozenset("score scores rating ratings grade grades".split())
_NAMES_ANY = _NAMES_SCORES | set("answer assistant assistants evaluation output overall points result verdict".split())
_BESIDE = frozenset(
    "a all an and answers are as assign based be below both each final following follows for give given here i in is "
    "judge judgement judgment ll m my of on our output s the their these this to total two would respectively "
    "respective responses d re".split()
)
_SCALE = re.compile(r"(?i)(?:on a scale )?(?:out of|/|(?:(?:of|from) )?\b[01] ?(?:[-–—]|to) ?)(?: ?10)\b(?: scale)?")
# what is numbered or graded by itself, so that scores under such a heading are not those of the answer
_ASPECT = re.compile(
    r"(?i)\b(?:accura|clarity|coheren|complet|concis|correct|count|creativ|criteri|depth|detail|error|example|factual"
    r"|fluen|format|grammar|harmless|helpful|honest|length|level|mistake|number|range|relevan|safety|scale|steps?\b"
    r"|structure|style|tone\b|words?\b)"
)
# One assistant's score. No more than what a score is followed by may follow it: "2 paragraphs" and a list's "1. The …"
# are none.
_ONE = re.compile(
    r"(?i)\bassistant ?#?([12])\b(?:'s|’s)?(?:"
    r"\s?[:=|–—-]|(?: overall| final| answer| response){0,3} (?:score|rating)(?: ?[:=|–—-]| is| of)?"
    r"|(?: answer| response)? (?:gets|receives|received|scores|scored|deserves|earns)"
    r"| an?\b| (?=[\d.]{1,5} ?(?:/|out of) ?10\b))"
    r"(?:\san?\b)?(?:\s(?:overall )?(?:score|rating)(?: of|:)?)?\s?"
    rf"(?!1\.\s\S){_NUMBER}"
    r"(?=\s*\Z|\n| ?[.,;:!|–—-]+(?:\s(?!\d)|\Z)| (?:(?:and|while|whereas|but|vs\.?) )?(?:to )?assistant\b"
    r"| (?:because|since)\b)"
)
# a list's "1." ends no sentence, and "Assistant 1:" no line
_SENTENCE_ENDS = re.compile(r"(?<=[.!?;])(?<!\d\.) |(?<!:)\n")
_WIDE = str.maketrans("，、：／（）", ",,:/()")
_COMMA = re.compile(r"\d+(?:,\d+)?")
_OPEN_THINKING = re.compile(r"(?im)^[ \t]*<think(?:ing)?>")


def read_scores(review: str) -> Scores | None:
    """The two scores in a judge's review, for the first and the second answer as they were shown; None without them.

    Read as "8 7", "8/10 7/10", "8.5, 7", "Scores: 8 7", "Assistant 1: 8" with "Assistant 2: 7" (in either order), or a
    number on each of two lines, also behind thinking or a sentence. What could be read in two ways is not read: three
    numbers, one, two different pairs, scores of a single criterion, counts, scores that are not from 0 to 10.
    """
    begins = _pair(_lines(review)[:1]) is not None  # then a tag further down may be one that the review speaks of
    text = spoken(review, lambda rest: not begins or _read_text(rest) is not None, lambda t: _read_text(t) is not None)
    scores = _read_text(_OPEN_THINKING.split(text, maxsplit=1)[0])
    return scores if scores and max(scores) <= HIGHEST else None


def _read_text(text: str) -> Scores | None:
    lines = _lines(text)
    if first := _pair(lines[:1]):
        if _COMMA.fullmatch(lines[0]) and len(lines) > 1 and _COMMA.fullmatch(lines[1]):
            return None  # 8,5 above 7,5: one score a line, with a comma for the point
        return first  # as asked for; what the explanation says later is no score
    lines = [line for above, line in zip(["", *lines], lines, strict=False) if not _is_aspect(above)]
    is_headed = bool(lines) and lines[0].endswith(":") and _names_both(lines[0])
    found = {pair for line in lines if (pair := _pair([line]))} | _stacked(lines[is_headed:])
    if begun := _pair(lines[:1], whole_line=False):  # the explanation follows on the same line
        found.add(begun)
    ours, theirs = _labelled(lines)
    found = found or set(product(ours[:2], theirs[:2]))
    if len(found) != 1:
        return None
    scores = found.pop()
    return scores if {*ours} <= {scores[0]} and {*theirs} <= {scores[1]} else None


def _lines(text: str) -> list[str]:
    """Without markup, rules, and the edges of tables; any white space is one space."""
    # what stands in parentheses behind a score explains it
    text = re.sub(r"(?<=\d) ?\((?=[^\W\d_])(?!out of|of )", " – ", text.translate(_WIDE))
    lines = [" ".join(strip(_MARKUP.sub("", line)).split()).strip("| ") for line in text.splitlines()]
    return [line for line in lines if line.strip("|-:= ")]


def _pair(lines: list[str], whole_line: bool = True) -> Scores | None:
    """Two scores on this line, perhaps a label before them; and nothing else, unless the line may go on."""
    match = _PAIR.fullmatch(lines[0]) if lines else None
    if not match or (whole_line and match[4].strip(" .")) or not _names_both(match[1] or ""):
        return None
    return float(match[2]), float(match[3])


def _names_both(label: str) -> bool:
    """Whether a label says that the scores of both assistants follow, first the first's."""
    label = _SCALE.sub("", label.lower())
    words = set(re.findall(r"[^\W\d_]+", label))
    if re.sub(r"\D", "", label) not in ("", "12") or not words <= _NAMES_ANY | _BESIDE:
        return False
    # "The results are 8 and 7" may be what a sum comes to
    return not label or bool(words & (_NAMES_ANY if label[-1] in ":=" else _NAMES_SCORES))


def _is_aspect(above: str) -> bool:
    """Whether a line is the heading of something other than the scores of the first and the second."""
    digits = re.sub(r"\D", "", above)
    is_heading = above[-1:] not in (*".!?",) and digits in ("", "1", "2", "12", "21")
    return is_heading and bool(digits == "21" or _ASPECT.search(above))


def _labelled(lines: list[str]) -> tuple[list[float], list[float]]:
    """The different scores that are given by the assistants' names, in sentences that name no aspect before."""
    given: dict[str, dict[float, None]] = {"1": {}, "2": {}}
    for sentence in _SENTENCE_ENDS.split("\n".join(lines)):
        aspect = _ASPECT.search(sentence)
        for match in _ONE.finditer(sentence):
            if not aspect or match.start() < aspect.start():
                given[match[1]][float(match[2])] = None
    return [*given["1"]], [*given["2"]]


def _stacked(lines: list[str]) -> set[Scores]:
    """One number on each of the first two lines, and none on the third."""
    alone = [re.fullmatch(rf"(?i){_NUMBER}", line.rstrip(" .")) for line in lines[:3]]
    if len(alone) < 2 or not (alone[0] and alone[1]) or (len(alone) > 2 and alone[2]):
        return set()
    return {(float(alone[0][1]), float(alone[1][1]))}

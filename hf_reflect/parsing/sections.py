"""Where the sections of a reply open and end, and which of several was meant.

A tag that opens a line opens a section, perhaps behind a number, a bullet, marks, or its own name. Where none does, a
title without brackets counts, then a tag behind the end of a sentence; what stands in code is quoted, and comes last.
A section ends at an end tag that ends its line or stands behind a sentence, else where the next one opens.
"""

import re
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from .reply import Blocks, Unreadable, strip
from .tags import GAP, Tag, bare, cut_ending, end_tags, opening_tags
from .words import RULE, is_placeholder, speaks_of

MOST_OPENINGS = 20  # of one tag; nobody can tell which of more was meant
_MOST_ENDS = 50  # in one section


class Opening(NamedTuple):
    """A tag behind which a section begins; `start` is that of its line where it opens one."""

    tag: str
    start: int
    stop: int
    marks: str  # what stands between its start and its tag
    left_bold: bool  # `**[tag] text**`: the bold that opened before the tag closes behind the text


class Section(NamedTuple):
    """The text behind an opening; `closed` where an end tag ended it."""

    tag: str
    start: int
    text: str
    closed: bool
    ends: int  # groups of end tags seen; above one where the text quotes its end


# ---- where they open

_MARKS = r"[^\w\n\[\]【】［］\"'`“”‘’«»(){}]{0,20}+"
# "- ", "## ", "2. **", "(a) ", "Step 2: "
_LINE_OPENER = re.compile(rf"(?i){_MARKS}(?:(?:(?:step|part|task) ?)?\(?\w{{1,4}}[^\w\s\"'`\[]{_MARKS})?")
_SPEECH_END = re.compile(r"[.:!?…。：！？\])】］>*_|-][*_\s\u200b\ufeff]*\Z")
# what belongs to a tag behind it: a colon, the hashes that close a heading, the marks that close what is bold
_COLON = rf"(?:{GAP}*+[:：](?=\s|\Z))?(?: ?#{{1,6}}(?=\n))?"
_TAIL, _BOLD_TAIL = re.compile(rf"[:：]?{_COLON}"), re.compile(rf"[*_`:：]{{0,6}}{_COLON}")
_BOLD = frozenset("*_`")
# what makes a title of a name without brackets: a colon, its line's end, the end of bold
_TITLE_END = re.compile(rf"[*_]{{0,3}}{GAP}{{0,4}}(?:[:：>][*_:：]{{0,4}}|(?=\n|\Z))|[*_]{{2,3}}")


class _Place(NamedTuple):
    """Where a tag stands, or its name as a title, what stands before it in its line, and whether it opens that."""

    start: int
    stop: int
    before: str
    opens_line: bool
    title: bool = False


def openings(text: str, blocks: Blocks, tag: str) -> list[Opening]:
    """The places where sections of this tag open, all of the best kind that there is; one more than the most at most.

    `blocks` are those of the whole text.
    """
    places = [_place(text, *at, tag) for at in islice(opening_tags(text, tag), 25 * MOST_OPENINGS)]
    spoken = [place for place in places if not blocks.hold(place.start)]
    behind_speech = [place for place in spoken if _SPEECH_END.search(place.before)]
    best = (
        [place for place in spoken if place.opens_line]
        or [title for title in _titles(text, tag, blocks) if not any(title.start < one.start for one in behind_speech)]
        or behind_speech
        or (blocks.starts and [place for place in places if place.opens_line])
        or (blocks.starts and _titles(text, tag))
        or places[-1:]
    )
    return [_opening(text, place, tag) for place in best[: MOST_OPENINGS + 1]]


def _place(text: str, start: int, stop: int, tag: str, title: bool = False) -> _Place:
    # of a long line the last 60 characters
    before = text[max(text.rfind("\n", max(0, start - 60), start) + 1, start - 60) : start]
    # perhaps behind its own name: "2. **Better Answer**: [Better Answer] …"
    opens_line = not before or _LINE_OPENER.fullmatch(bare(tag).sub("", before, count=1)) is not None
    return _Place(start, stop, before, opens_line, title)


def _titles(text: str, tag: str, blocks: Blocks | None = None) -> list[_Place]:
    """Where the tag's name stands as a title of its own, outside of these blocks."""

    def found() -> Iterator[_Place]:
        for match in bare(tag).finditer(text):
            if not _TITLE_END.match(text, match.end()) or (blocks and blocks.hold(match.start())):
                continue
            place = _place(text, *match.span(), tag, title=True)
            opens = _LINE_OPENER.fullmatch(place.before) and not place.before[-1:].isalnum()
            if opens and ("<" in place.before) == (text[place.stop : place.stop + 1] == ">"):
                yield place

    return list(islice(found(), MOST_OPENINGS + 1))


def _opening(text: str, place: _Place, tag: str) -> Opening:
    before = place.before
    marks = before if place.opens_line else before[len(before.rstrip("*_`")) :]
    tail = _TITLE_END if place.title else _TAIL if _BOLD.isdisjoint(marks) else _BOLD_TAIL
    closing = tail.match(text, place.stop)
    stop = closing.end() if closing else place.stop
    left_bold = "**" in marks and not set("*_").intersection(text[place.stop : stop])
    return Opening(tag, place.start - len(marks), stop, marks, left_bold)


# ---- where they end

_BLANK_LINE = re.compile(rf"\s*\Z|{GAP}*+\n{GAP}*+(?:\n|\Z)")
# the beginning of something that is no part of the section: "[Explanation]", "## Critique"
_FOREIGN = re.compile(
    r"[#>*_\s]{0,20}\[[^\W\d_][^\]\n]{0,40}\]|\s{0,9}#{1,6} ?(?:instruction|critique|question)\b", re.I
)
# another pair, as the prompt shows it, on a line of its own (`(?m)^` before the bracket would be tried at every place)
_PROMPTS_BLOCK = re.compile(r"(?im)\[(?<!.\[)(?:Instruction|The Start of (?:Answer|Input|Conversation))\][ \t]*$")
_PROMPTS_END = re.compile(r"(?i)[*_#\s]{0,9}\[the end of ")
# a title of the next section, left above its tag: "3. Answer to the new instruction:"
_TITLE = re.compile(
    r"(?i)\n[ \t]*(?:#{1,6}[ \t]|\*\*|\d{1,2}[.)])[ \t*_#\d.)]*(?:(?:step|part|task) \d{1,2}[ .:–-]*)?"
    r"(?:(?:(?:the|my|your) )?(?:(?:new|better|improved|detailed|complete) ){0,2}(?:answer|response)"
    r"(?: to [^\n]{0,60})?|"
    r"answer(?:ing)? (?:to )?the new[^\n]{0,80})?[*_:：. \t]*\s*\Z"
)

# or what the teacher says instead: "Now, let me answer the new instruction:"
_LEAD_IN = re.compile(
    r"(?i)\n[ \t]*(?:\d{1,2}[.)] )?[*_#]{0,4} ?(?:(?:now|and|finally),? )?(?:let me |i will |i['’]ll )?"
    r"(?:here(?: is|['’]s) (?:the|my) (?:new |detailed |complete )?answer|(?:here(?: is|['’]s) )?(?:the |my )?"
    r"(?:(?:new|detailed|complete|full) ){0,2}answer(?:ing)? (?:to )?the new(?:ly[ -]generated)? "
    r"(?:instruction|question))"
    r"(?: to the new(?:ly[ -]generated)? (?:instruction|question))?[:.*_ \t]*\s*\Z"
)


def section(text: str, opening: Opening, stop: int, tags: tuple[str, ...], end: str) -> Section:
    """The text behind a tag up to its end tag, or to where the next section opens, at `stop`."""
    body = text[opening.stop : stop]
    blocks = Blocks(body)
    marks = "*_`" if "`" in opening.marks else "*_"
    ends = list(islice(end_tags(body, end, tags, marks), 25 * _MOST_ENDS))
    if len(ends) == 25 * _MOST_ENDS:
        raise Unreadable("unparsed: too many end tags in one section")
    cut, groups = _where_it_ends(body, [tag for tag in ends if not blocks.hold(tag.start)])
    next_pair = _PROMPTS_BLOCK.search(body)  # the teacher went on to another pair, of which nobody asked
    if next_pair and cut is not None and cut > next_pair.start() and _PROMPTS_END.match(body, cut):
        cut = None
    if cut is not None:
        kept = body[:cut]
    else:
        kept = body[: next_pair.start()] if next_pair else body
        if eaten := cut_ending(end).search(kept, max(0, len(kept) - 60)):
            kept = kept[: eaten.start()]
        if blocks.unpaired is not None and not strip(kept[blocks.unpaired :]).strip("`~"):
            kept = kept[: blocks.unpaired]  # the reply as a whole stood in a code block
        for _ in range(4):  # rules and titles that lead over to the next section
            tail = max(0, len(kept) - 200)
            title = RULE.search(kept, tail)
            if title is None and stop < len(text):
                title = _TITLE.search(kept, tail) or _LEAD_IN.search(kept, tail)
            if title is None:
                break
            kept = kept[: title.start()].rstrip()
    kept = strip(kept)
    if opening.left_bold and kept.endswith("**") and kept.count("**") % 2:
        kept = kept[:-2].rstrip()
    return Section(opening.tag, opening.start, kept, cut is not None, groups)


def _where_it_ends(body: str, ends: list[Tag]) -> tuple[int | None, int]:
    """Where the section's text ends, None if no end tag closes it, and how many groups of end tags there are.

    Behind the first end tag that closes only the teacher's own words may stand: where there are more, and what lies
    between could be the answer's, nobody can tell.
    """
    closing = [tag for tag in ends[:_MOST_ENDS] if _closes(body, tag)]
    if len(ends) == 1 and not closing and _may_close(body, ends[0]):
        closing = ends
    if len(ends) > _MOST_ENDS:
        raise Unreadable("unparsed: too many end tags in one section")
    groups = 0
    for position, tag in enumerate(closing):
        following = closing[position + 1 : position + 2]
        between = body[tag.stop : following[0].start] if following else ""
        groups += not following or bool(strip(between).strip("*_#> "))  # ends in a row are one group
    cut: int | None = None
    for position, tag in enumerate(closing):
        later = [other for other in closing[position + 1 :] if strip(body[tag.stop : other.start])]
        between = body[tag.stop : later[0].start] if later else ""
        if not later or _FOREIGN.match(between) or speaks_of("response", strip(between)):
            cut = tag.start
            break
        if _BLANK_LINE.match(body, tag.stop):
            raise Unreadable("unparsed: more than one end tag could close the section")
    if cut is None:
        return None, groups
    line = body.rfind("\n", max(0, cut - 20), cut) + 1
    return (line if line and not body[line:cut].strip("#>*_-• \t") else cut), groups


_QUOTES, _UNQUOTES = frozenset("`\"'“‘«"), frozenset("`\"'”’»,;")
_QUOTED_ENDS = frozenset(".!?…。！？)]}%`")  # what a quotation may end with, besides letters


def _around(body: str, tag: Tag) -> tuple[str, str]:
    return body[max(0, tag.start - 40) : tag.start], body[tag.stop : tag.stop + 40]


def _is_quoted(body: str, tag: Tag) -> bool:
    """Whether a tag stands in quotation marks, and not only behind what does, or is an index: `arr[end]`."""
    before, after = _around(body, tag)
    last, one_before = before[-1:], before[-2:-1]
    if body.startswith("[end", tag.start) and last.isascii() and (last.isalnum() or last == "_"):
        return True
    if after[:1] in _UNQUOTES:
        return True
    if last not in _QUOTES:
        return False
    return last in "‘«" or not (one_before.isalnum() or one_before in _QUOTED_ENDS)


def _may_close(body: str, tag: Tag) -> bool:
    """Whether an end tag without another beside it closes the section, though what follows is no new sentence."""
    before, after = _around(body, tag)
    if _is_quoted(body, tag) or not before.rstrip()[-1:].isalnum():
        return False
    alone = "\n" in before[len(before.rstrip()) :] and after.lstrip(" \t")[:1] == "\n"
    return alone or not after.lstrip("*_ \t\n")[:1].islower()


def _closes(body: str, tag: Tag) -> bool:
    """Whether this end tag closes the section: one amid a sentence or in quotation marks is talked about."""
    if _is_quoted(body, tag):
        return False
    before, after = _around(body, tag)
    said, goes_on = before.rstrip()[-1:], after.lstrip("*_ \t\n")[:1]
    amid = (said.isalnum() or said == ",") and goes_on.islower()
    ends_line = not after.split("\n", 1)[0].strip(" \t*_.") or "\n" in before[len(before.rstrip()) :]
    if ends_line:
        return not (amid and "\n\n" not in after[: len(after) - len(after.lstrip())])
    return not amid and (not said.isalnum() or goes_on.isupper() or goes_on in ("[", "【"))


# ---- which was meant


def the_one(tag: str, sections: list[Section], samples: frozenset[str]) -> Section:
    """The section that was meant: not the format repeated, and a closed one before what has no end."""
    told = [one for one in sections if one.text and not is_placeholder(one.text, samples)] or sections[:1]
    if all(one.text == told[0].text for one in told):
        return told[0]
    closed = [one for one in told if one.closed]
    if len(closed) != 1 or closed[0].ends > 1:
        raise Unreadable(f"unparsed: [{tag}] opens more than one section")
    return closed[0]

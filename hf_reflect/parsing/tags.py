"""How tags are written: `[Better Answer]`, `[better answer:]`, `【Better_Answer】`; `[End]`, `[/End]`."""

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from .reply import GAPS

GAP = f"[{GAPS}]"
# an opening bracket whose partner is near, which makes runs of brackets cheap
_OPEN = rf"[\[【［](?=[^\[\]【】［］\n]{{2,90}}+[\]】］]){GAP}*+"
_CLOSE = rf"{GAP}*+\\?[\]】］]{{1,2}}"


class Tag(NamedTuple):
    """Where a tag stands, with a second bracket, a backslash, and what makes it bold."""

    start: int
    stop: int


def words(name: str) -> str:
    """A tag's name as it may be written; `(?i:…)` is up to the caller."""
    return rf"(?:{GAP}|[-_]){{1,9}}".join(map(re.escape, name.split()))


@cache
def bare(name: str) -> re.Pattern[str]:
    """The tag's name without brackets."""
    return re.compile(rf"(?i){words(name)}(?!\w)")


@cache
def bracketed(name: str) -> re.Pattern[str]:
    """`[Better Answer]`, `[Better Answer:]`, `[**Better Answer**]`, `[The Start of Better Answer]`."""
    start_of = rf"(?:(?:the{GAP}{{1,9}})?start{GAP}{{1,9}}of{GAP}{{1,9}})?"
    return re.compile(rf"{_OPEN}[*_]{{0,3}}(?i:{start_of}{words(name)})[:：]?[*_]{{0,3}}{_CLOSE}")


@cache
def ending(end: str, tags: tuple[str, ...]) -> re.Pattern[str]:
    """`[End]`, `[/End]`, `[The End of Answer]`, `[/Better Answer]`, `</Better Answer>`; and the prompt's own end."""
    ends = "|".join({"end": "", words(end): ""})
    names = "|".join([*map(words, tags), r"(?:\w+[ ]){0,2}(?:answer|response|instruction|section|text|reply|output)"])
    of = rf"(?:{GAP}{{1,9}}(?:of{GAP}{{1,9}})?(?:the{GAP}{{1,9}})?(?:{names}))?"
    slashed = rf"|/{GAP}*+(?:{names})" if tags else ""
    inner = rf"(?:/?{GAP}*+(?:the{GAP}{{1,9}})?(?:{ends}){of}{slashed})"
    angled = rf"|</{GAP}*+(?i:{'|'.join(map(words, tags))}){GAP}*+>" if tags else ""
    return re.compile(rf"{_OPEN}[*_]{{0,3}}(?i:{inner}){GAP}*+[.:]?[*_]{{0,3}}{_CLOSE}{angled}")


@cache
def cut_ending(end: str) -> re.Pattern[str]:
    """An end tag whose bracket a stop sequence ate, or one on a line of its own without brackets but marked."""
    name = rf"(?:{words(end)}|end)"
    return re.compile(rf"(?i)(?:\\?[\[【［]{GAP}{{0,9}}/?{name}|\n(?:\*\*|#{{1,6}} ){name}[*:]*|\n\({name}\))\s*\Z")


def opening_tags(text: str, name: str) -> Iterator[Tag]:
    """The tags of this name in a text."""
    return (_whole(text, match) for match in _matches(bracketed(name), text))


def end_tags(text: str, end: str, tags: tuple[str, ...], marks: str) -> Iterator[Tag]:
    """The end tags in a text; what stands on both sides of one alike, of these `marks`, is part of it."""
    for match in _matches(ending(end, tags), text, angled="<" in text and "</" in text):
        start, stop = _whole(text, match)
        before = text[max(0, start - 3) : start]
        bold = before[len(before.rstrip(marks)) :]
        if bold and text.startswith(bold, stop):
            start, stop = start - len(bold), stop + len(bold)
        yield Tag(start, stop)


def _whole(text: str, match: re.Match[str]) -> Tag:
    start, stop = match.span()
    if start and text[start - 1] in "[【":
        start -= 1
    if start and text[start - 1] == "\\":
        start -= 1
    return Tag(start, stop)


def _matches(pattern: re.Pattern[str], text: str, angled: bool = False) -> Iterator[re.Match[str]]:
    """What `pattern.finditer` finds. Most replies have few brackets: going from one to the next takes a tenth."""
    place = 0
    if not (angled or "【" in text or "［" in text):
        for _ in range(50):
            place = text.find("[", place)
            if place < 0:
                return
            if match := pattern.match(text, place):
                yield match
            place = match.end() if match else place + 1
    yield from pattern.finditer(text, place)

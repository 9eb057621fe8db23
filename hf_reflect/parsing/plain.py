"""A short cut for replies in just the form that was asked for, as most are."""

import re
from functools import cache

from .reply import strip
from .sections import Section
from .tags import bracketed, ending


def as_asked(text: str, tags: tuple[str, ...], end: str) -> list[Section] | None:
    """The sections of a reply whose only brackets are those of its tags, in order and each in its place; else None.

    They are the ones that `sections` would give, at a third of the cost.
    """
    if "【" in text or "［" in text:
        return None
    if ("`" in text and "```" in text) or ("~" in text and "~~~" in text) or ("<" in text and "</" in text):
        return None
    match = _form(tags, end).fullmatch(text)
    if match is None or not _is_plain(tags, end):
        return None
    sections = []
    for n, tag in enumerate(tags):
        start, kept = match.start(2 * n + 1), match[2 * n + 2].rstrip(" \n")
        if kept[-1] in "#>*_•-" or kept[-1].isspace():
            return None  # could belong to the end tag
        if start and text[start - 1] != "\n":
            start -= len("2. ")
        sections.append(Section(tag, start, strip(kept), True, 1))
    return sections


@cache
def _form(tags: tuple[str, ...], end: str) -> re.Pattern[str]:
    """`[Better Answer] text [End]`, where a text begins with a letter or digit; nothing in it is tried twice."""
    opens_line = r"(?:(?<![^\n])|(?<=\n\d\. ))()"
    pairs = [
        rf"{opens_line}\[{re.escape(tag)}\][ \n]++(?=[^\W_])([^\[]*+)(?<=[ \n])\[{re.escape(end)}\]" for tag in tags
    ]
    return re.compile(r"[^\[]*+" + r"[ \n]*+(?:\d\. )?+".join(pairs) + r"[ \n]*+")


@cache
def _is_plain(tags: tuple[str, ...], end: str) -> bool:
    """Whether these tags, written so, are found by the rules, and each as itself only."""
    brackets = [f"[{name}]" for name in (*tags, end)]
    read = [[bracketed(tag).fullmatch(one) is not None for one in brackets] for tag in tags]
    own = [[other == place for other in range(len(brackets))] for place in range(len(tags))]
    return read == own and ending(end, tags).fullmatch(brackets[-1]) is not None

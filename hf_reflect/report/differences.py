"""What a rewrite took out and put in, word by word, for the page on which people compare versions."""

import re
from collections import Counter
from difflib import SequenceMatcher
from itertools import groupby

KEPT, CUT, NEW = "=", "-", "+"
Segments = list[tuple[str, str]]  # (KEPT | CUT | NEW, text)

# difflib compares every word with every equal one: texts of few different words would take it minutes
_MOST_WORDS = 4_000
_MOST_COMPARISONS = 20_000  # beyond, a match begins with a word that is rare in the new text
_RARE = 16
_LONG = 200  # characters
_HARDLY = 0.15  # the share of a text
_WORD = re.compile(r"\w+|[^\w\s]")


def differences(old: str, new: str) -> Segments | None:
    """How `old` became `new`: what both have, what is only in `old`, what is only in `new`, in reading order.

    KEPT and CUT together are `old`, KEPT and NEW together are `new`, to the character. None where one of them is too
    long to be compared in a moment.
    """
    if old == new:
        return [(KEPT, old)] if old else []
    words = [_words(text) for text in (old, new)]
    keys = [[word.strip() for word in each] for each in words]
    if max(map(len, keys)) > _MOST_WORDS:
        return None
    matcher = SequenceMatcher(None, keys[0], keys[1], autojunk=False)
    anchors: dict[str, list[int]] = matcher.b2j  # type: ignore[attr-defined]  # documented, but not in the stubs
    if sum(len(anchors.get(word, ())) for word in keys[0]) > _MOST_COMPARISONS:
        for word in [word for word, places in anchors.items() if len(places) > _RARE]:
            del anchors[word]
    found: Segments = []
    for kind, start, end, new_start, new_end in matcher.get_opcodes():
        if kind == "equal":
            for before, after in zip(words[0][start:end], words[1][new_start:new_end], strict=True):
                found += _space(before, after)
        else:
            found += [(CUT, "".join(words[0][start:end])), (NEW, "".join(words[1][new_start:new_end]))]
    return _merged(_without_crumbs(_merged(found)))


def is_rewritten(segments: Segments) -> bool:
    """Whether so little of two long texts is common that marking it would only disturb."""
    size = Counter[str]()
    for kind, text in segments:
        size[kind] += len(text)
    longest = size[KEPT] + max(size[CUT], size[NEW])
    return size[KEPT] + min(size[CUT], size[NEW]) > _LONG and size[KEPT] < _HARDLY * longest


def packed(segments: Segments) -> list[int | str]:
    """For the page, which has the old text: n > 0 characters stay, n < 0 go, a string comes in.

    Counted as JavaScript counts: a character beyond the first 65,536 is two.
    """
    sizes = {KEPT: 1, CUT: -1}
    return [text if kind == NEW else sizes[kind] * _utf16(text) for kind, text in segments]


def _utf16(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _words(text: str) -> list[str]:
    """Words and signs, each with the white space behind it; the first also with what stands before."""
    starts = [found.start() for found in _WORD.finditer(text)]
    if not starts:
        return [text] if text else []
    starts[0] = 0
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _space(before: str, after: str) -> Segments:
    """The same word in both, with perhaps other white space around it."""
    if before == after:
        return [(KEPT, before)]
    word = before.strip()
    (old_left, old_right), (new_left, new_right) = (
        text.split(word, 1) if word else (text, "") for text in (before, after)
    )
    return [(CUT, old_left), (NEW, new_left), (KEPT, word), (CUT, old_right), (NEW, new_right)]


def _without_crumbs(segments: Segments) -> Segments:
    """A few common words between larger changes belong to the change: else a new text reads as a mosaic."""
    changed = [0] * (len(segments) + 2)  # characters changed right before each segment; and, reversed, right after it
    after = changed[:]
    for n, (kind, text) in enumerate(segments):
        changed[n + 1] = 0 if kind == KEPT else changed[n] + len(text)
    for n in range(len(segments) - 1, -1, -1):
        after[n] = 0 if segments[n][0] == KEPT else after[n + 1] + len(segments[n][1])
    found: Segments = []
    for n, (kind, text) in enumerate(segments):
        if kind == KEPT and 2 * len(text) <= min(changed[n], after[n + 1]) and len(text.split()) <= 3:
            found += [(CUT, text), (NEW, text)]
        else:
            found.append((kind, text))
    return found


def _merged(segments: Segments) -> Segments:
    """One CUT and one NEW at most between what is common, nothing empty."""
    found: Segments = []
    there = [each for each in segments if each[1]]
    for is_kept, run in groupby(there, key=lambda each: each[0] == KEPT):
        some = list(run)
        for kind in (KEPT,) if is_kept else (CUT, NEW):
            if text := "".join(each for its_kind, each in some if its_kind == kind):
                found.append((kind, text))
    return found

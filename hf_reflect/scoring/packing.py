"""Several sequences in one forward pass, without padding, and what they share at their beginnings only once.

sequences  b s s x x|y y     b s s x x|z z z     b|y y          context | target
tokens     b s s x x y y z z z b y y                            a pack
positions  0 1 2 3 4 5 6 5 6 7 0 1 2                            of each token in its own sequence
segments   [-----------)[----)[----)                            each attends to itself, causally, and to the
sees                    0..5  -                                 ranges of the pack that begin its sequence

Sorted, sequences that share a beginning are neighbours: the pack is their prefix tree, in depth-first order.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Beginnings shorter than this are not worth a mask of their own: BOS, a word.
_WORTH_SHARING = 4


class Passage(NamedTuple):
    """A context and its target, to be scored in one go; equal ones are equal, and they sort by their tokens."""

    ids: bytes  # big-endian uint32, so that bytes sort as the ids do
    start: int  # where the target begins, at least 1

    @classmethod
    def of(cls, context: Sequence[int], target: Sequence[int]) -> "Passage":
        """From two lists of ids."""
        return cls(np.array([*context, *target], dtype=">u4").tobytes(), len(context))

    def __len__(self) -> int:
        return len(self.ids) // 4

    @property
    def tokens(self) -> np.ndarray:
        """The ids, context and target."""  # (tokens,)
        return np.frombuffer(self.ids, dtype=">u4").astype(np.int64)

    @property
    def targets(self) -> int:
        """How many tokens are scored."""
        return len(self) - self.start


class Segment(NamedTuple):
    """Tokens of a pack that attend to each other, causally, and to all of the ranges before."""

    start: int
    end: int
    before: tuple[tuple[int, int], ...]  # ranges of the pack

    @property
    def reach(self) -> int:
        """How many tokens the last one sees, itself included."""
        return self.end - self.start + sum(end - start for start, end in self.before)


class Pack(NamedTuple):
    """One forward pass."""

    ids: np.ndarray  # (tokens,)
    positions: np.ndarray  # (tokens,) each token's place in its own sequence
    visible_to: np.ndarray  # (tokens,) the tokens from this one up to there see it
    segments: list[Segment]
    where: np.ndarray  # (targets,) the token whose hidden state predicts the target
    targets: np.ndarray  # (targets,) ids; those of a passage stand together
    passages: list[Passage]  # in the order of their targets


def pack(passages: Iterable[Passage]) -> Pack:
    """The prefix tree of the passages, which come in any order."""
    ordered = sorted(passages)
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    where: list[np.ndarray] = []
    closed: list[tuple[int, int, int]] = []  # a range, and the token from which on nobody sees it
    path: list[tuple[int, int]] = []  # ranges of the pack that make up the last passage
    cursor = 0
    last: Passage | None = None
    for passage in ordered:
        shared = _shared(last, passage)
        before, gone = _cut(path, shared)
        closed += [(start, end, cursor) for start, end in gone]
        path = before
        if new := len(passage) - shared:
            segments.append(Segment(cursor, cursor + new, tuple(before)))
            ids.append(passage.tokens[shared:])
            positions.append(np.arange(shared, len(passage)))
            path = joined(before, (cursor, cursor + new))
            cursor += new
        places = np.concatenate([np.arange(start, end) for start, end in path])
        where.append(places[passage.start - 1 : -1])
        last = passage
    visible_to = np.full(cursor, cursor)
    for start, end, until in closed:
        visible_to[start:end] = until
    targets = np.concatenate([passage.tokens[passage.start :] for passage in ordered])
    return Pack(
        np.concatenate(ids), np.concatenate(positions), visible_to, segments, np.concatenate(where), targets, ordered
    )


def size(passages: Iterable[Passage]) -> int:
    """Tokens of the pack of these passages."""
    total, last = 0, None
    for passage in sorted(passages):
        total += len(passage) - _shared(last, passage)
        last = passage
    return total


def packs_within(passages: Iterable[Passage], limit: int) -> Iterator[list[Passage]]:
    """Packs of at most `limit` tokens, a single longer passage excepted; sharing ones stay together."""
    some: list[Passage] = []
    total = 0
    for passage in sorted(passages):
        more = len(passage) - _shared(some[-1] if some else None, passage)
        if some and total + more > limit:
            yield some
            some, total, more = [], 0, len(passage)
        some.append(passage)
        total += more
    if some:
        yield some


def deal(sizes: np.ndarray, shares: int) -> list[list[int]]:
    """Numbers of the things of these sizes in `shares` lots of about the same sum: the largest first, to the least."""
    sums = [(0, share) for share in range(shares)]
    lots: list[list[int]] = [[] for _ in range(shares)]
    for number in np.argsort(-sizes, kind="stable").tolist():
        total, share = sums[0]
        lots[share].append(number)
        heapq.heapreplace(sums, (total + int(sizes[number]), share))
    return lots


def _shared(one: Passage | None, other: Passage) -> int:
    """How many tokens both begin with; 0 where it is not worth sharing."""
    if one is None:
        return 0
    length = min(len(one.ids), len(other.ids))
    a, b = (np.frombuffer(passage.ids, dtype=np.uint32, count=length // 4) for passage in (one, other))
    differing = a != b
    shared = int(differing.argmax()) if differing.any() else length // 4
    return shared if shared >= min(_WORTH_SHARING, len(other)) else 0


def joined(path: Sequence[tuple[int, int]], last: tuple[int, int]) -> list[tuple[int, int]]:
    """The path of ranges with another range; one range where they touch, for that needs no copy where it is sliced."""
    if path and path[-1][1] == last[0]:
        return [*path[:-1], (path[-1][0], last[1])]
    return [*path, last]


def _cut(path: list[tuple[int, int]], length: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The path's first `length` tokens, and what is left of it, as ranges."""
    head: list[tuple[int, int]] = []
    tail: list[tuple[int, int]] = []
    for start, end in path:
        taken = min(end - start, length)
        length -= taken
        if taken:
            head.append((start, start + taken))
        if start + taken < end:
            tail.append((start + taken, end))
    return head, tail

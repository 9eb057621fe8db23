"""Which rows are scored together, and by which process.

Rows with the same instruction are one group: their versions share ppl(x), and the prompt before y. Groups are dealt to
the processes by their tokens, and each process packs its own, longest sequence first, so that the first pack is the
worst one.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ..columns import is_usable
from ..templates import StudentTemplate
from .packing import Passage, deal

_MOST_VERSIONS = 16  # of one group: "Summarize the text." may stand in a thousand rows


class Version(NamedTuple):
    """What is to be scored of one row, in the order of LOSS_COLUMNS; None where there is no target."""

    row: int
    passages: tuple[Passage | None, Passage | None, Passage | None, Passage | None]
    cut: bool


class Bin(NamedTuple):
    """The rows of one pack."""

    share: int
    number: int
    rows: tuple[int, ...]
    tokens: int


class Work(NamedTuple):
    """What one process has to do, and what there is in all."""

    mine: list[Bin]
    loaded: list[int]  # rows that were scored before
    rows: int  # in all, those included
    tokens: int  # left for all processes


def groups_of(rows: Iterable[tuple[int, dict[str, Any]]]) -> list[list[int]]:
    """The numbers of the usable rows, those with the same instruction, input and history together."""
    groups: dict[tuple, list[int]] = {}
    full: list[list[int]] = []
    for number, row in rows:
        if not is_usable(row["instruction"], row["response"]):
            continue
        # a hash: a million instructions need not stay in memory; two that collide are only not shared
        key = (hash(row["instruction"]), hash(row["input"]), hash(str(row.get("history") or "")))
        group = groups.setdefault(key, [])
        group.append(number)
        if len(group) == _MOST_VERSIONS:
            full.append(groups.pop(key))
    return sorted([*full, *groups.values()])


def versions_of(template: StudentTemplate, numbers: Iterable[int], rows: list[dict[str, Any]]) -> list[Version]:
    """The four sequences of each row."""
    versions = []
    for number, (forward, reverse) in zip(numbers, template.encode(rows), strict=True):
        x, y = (Passage.of(template.alone, some.target) if some.target else None for some in (reverse, forward))
        x_given_y, y_given_x = (
            Passage.of(some.context, some.target) if some.target else None for some in (reverse, forward)
        )
        versions.append(Version(number, (x, y, x_given_y, y_given_x), forward.cut or reverse.cut))
    return versions


def passages_of(versions: Iterable[Version]) -> set[Passage]:
    """What these versions need, each once."""
    return {passage for version in versions for passage in version.passages if passage is not None}


def bins_of(
    groups: list[list[int]], tokens: np.ndarray, longest: np.ndarray, limit: int, shares: int
) -> list[list[Bin]]:
    """For each share its bins, of at most `limit` tokens, a single larger group excepted."""
    plan = []
    for share, lot in enumerate(deal(tokens, shares)):
        bins: list[Bin] = []
        rows: list[int] = []
        total = 0
        for number in [*sorted(lot, key=lambda group: (-longest[group], group)), None]:
            if rows and (number is None or total + tokens[number] > limit):
                bins.append(Bin(share, len(bins), tuple(rows), total))
                rows, total = [], 0
            if number is not None and tokens[number]:
                rows += groups[number]
                total += int(tokens[number])
        plan.append(bins)
    return plan


def work_of(plan: list[list[Bin]], done: set[tuple[int, int]], rank: int, processes: int) -> Work:
    """The bins that are left for a process: its share, or of a plan for another number of processes its part."""
    every = [each for bins in plan for each in bins]
    left = [each for each in every if (each.share, each.number) not in done]
    if len(plan) == processes:
        mine = [each for each in left if each.share == rank]
    else:
        lot = deal(np.array([each.tokens for each in left], dtype=np.int64), processes)[rank]
        mine = [left[number] for number in sorted(lot)]
    loaded = [row for each in every if (each.share, each.number) in done for row in each.rows]
    return Work(mine, loaded, sum(len(each.rows) for each in every), sum(each.tokens for each in left))

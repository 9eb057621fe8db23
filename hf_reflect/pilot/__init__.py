"""What a careful person sees before a full recycling: a sample, several teachers, one student, one page.

    ask          a teacher rewrites the sample; where it cannot, why, and what came before
    measure      of one teacher: usable, kept, shifts, price and hours
    shifts       what choosing by the student's scores brings, and whether chance brings as much
    examples     the same rows by all teachers, side by side
    write_pilot  the numbers as JSON, and all of it as one HTML page

Here is what asks and measures. `tables` has the rows of the sample, `cost` what a teacher took and what the full run
will take, `choosing` the shifts, `page` what people see, and `chance` the intervals, which hold 95 % of the samples
that come of drawing the source rows again, each with all its versions.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from ..errors import TeacherError
from ..ledger import Ledger
from ..reflection import ReflectionTransform
from ..selection import decide
from ..teacher import Teacher
from ..templates import StudentTemplate
from .choosing import COINS, COMPARED, ENOUGH, SCORES, Shift, in_words, shifts
from .cost import calls_of, cost_per_kept, of_the_full_run, of_the_sample, took_by
from .page import examples, lasting, percent, priced, shifted, write_pilot
from .tables import Asked, all_versions, answered, by_row, code_of, of_teacher, some_of

__all__ = [
    "COINS",
    "COMPARED",
    "ENOUGH",
    "SCORES",
    "Asked",
    "Shift",
    "all_versions",
    "answered",
    "ask",
    "examples",
    "in_words",
    "lasting",
    "measure",
    "of_teacher",
    "percent",
    "priced",
    "shifted",
    "shifts",
    "student_numbers",
    "write_pilot",
]

PRESELECTED = 0.05  # the share of the rows that the authors advise to recycle
_ROWS_AT_ONCE = 25  # at least
_MADE_BY = {"instruction": ("instruction",), "response": ("response", "instruction+response")}
_NOT_ASKED = ("budget", "parent")


def ask(pairs: Dataset, teacher: Teacher, name: str) -> Asked:
    """Let a teacher rewrite the instructions and then the responses of a sample.

    In:  the table of `to_pairs`                                         (N rows)
    Out: that and the rewrites, with `name` as their `source`            (4N rows)

    A TeacherError ends the asking, not the program: it is in `failed`, and the table has what came before.
    """

    def transforms(may_ask: bool) -> list[ReflectionTransform]:
        both = [ReflectionTransform(teacher, part, source=name) for part in _MADE_BY]
        for transform in both:
            transform._may_ask = may_ask
        return both

    def reflected(table: Dataset, transform: ReflectionTransform) -> Dataset:  # as one batch, so in one stream
        words = f"{name}: {transform.part}"
        return table.map(transform, batched=True, batch_size=None, load_from_cache_file=False, desc=words)

    # some rows to their end, then the next: where money ends, most of what was begun is complete
    at_once = len(pairs) if teacher.mode == "batch" else max(teacher.max_concurrency, _ROWS_AT_ONCE)
    before, failed, parts = _requests(teacher), None, []
    try:
        teacher.check_ready()
        both = transforms(may_ask=True)
        for start in range(0, len(pairs), at_once):
            some = pairs.select(range(start, min(start + at_once, len(pairs))))
            parts.append(reduce(reflected, both, some))
    except TeacherError as error:
        failed, parts = str(error), [reduce(reflected, transforms(may_ask=False), pairs)]
    return Asked(name, teacher, concatenate_datasets(parts), failed, _requests(teacher) - before)


def _requests(teacher: Teacher) -> int:
    with Ledger(teacher.ledger) as ledger:
        return int(ledger.spent()["requests"])


def student_numbers(scored: Dataset, template: StudentTemplate) -> dict[str, Any]:
    """What the student makes of the sample: scores of the originals, and how many versions are cut to fit."""
    rows = [row for row in scored.to_list() if not code_of(row)]
    found: dict[str, Any] = {
        "versions": len(rows),
        "cut": sum(one.cut or two.cut for one, two in template.encode(rows)),
    }
    for name in SCORES:
        values = np.array([row[name] for row in rows if row["variant"] == "original" and row[name] is not None])
        median, high = (float(np.median(values)), float((values >= 1).mean())) if len(values) else (None, None)
        found[name] = {"median": median, "share_from_1_on": high}
    return found


def measure(asked: Asked, scored: Dataset, rows: int, seed: int = 0, **selection: Any) -> dict[str, Any]:
    """All numbers of one teacher, ready for JSON; what cannot be known is None.

    Usable shares are over the rewrites that were asked for; all else is over answered rows, see `answered`.

    Args:
        asked: what `ask` gave.
        scored: the same table with the student's scores.
        rows: of the whole dataset, for the price of the full run.
        seed: of what is drawn.
        selection: ifd_gate, r_ifd_gate and keep, as for `select`.
    """
    teacher, versions, there = asked.teacher, by_row(scored), answered(scored)
    table = some_of(scored, lambda row: row["row_id"] in there)
    every = [row for some in versions.values() for row in some]
    with Ledger(teacher.ledger) as ledger:
        known = ledger.get({key for key, _ in calls_of(teacher, every)})
    took = took_by(teacher, {row_id: some for row_id, some in versions.items() if row_id in there}, known)
    result: dict[str, Any] = {
        "name": asked.name,
        "model": teacher.model,
        "endpoint": teacher.shown_endpoint,
        "failed": asked.failed,
        "rows": len(versions),
        "answered": len(there),
        "usable": {part: _usable(row for row in every if row["variant"] in some) for part, some in _MADE_BY.items()},
        "pilot": of_the_sample(asked, known, took.cost is not None),
        "kept": None,
        "shifts": None,
        "full": None,
        "preselected": None,
    }
    parts = list(result["usable"].values())
    count, usable = (sum(part[name] for part in parts) for name in ("asked", "usable"))
    result["usable_share"] = usable / count if count else None
    if not there:
        return result

    with_gates, without = (
        {each.row_id for each in decide(table, **selection | gates) if each.kept}
        for gates in ({}, {"ifd_gate": None, "r_ifd_gate": None})
    )
    result["kept"] = {
        "rows": len(with_gates),
        "share": len(with_gates) / len(there),
        "rows_without_gates": len(without),
        "share_without_gates": len(without) / len(there),
        "dropped_by_gates": len(without) - len(with_gates),
        **cost_per_kept(took, [row_id in with_gates for row_id in took.rows], seed),
    }
    result["shifts"] = shifts(table, seed=seed, **selection)
    result["full"] = of_the_full_run(took, rows, teacher, seed)
    result["preselected"] = of_the_full_run(took, max(round(PRESELECTED * rows), 1), teacher, seed)
    return result


def _usable(rewrites: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """asked, usable, share, codes (of what was asked, and `parent`: not asked, for want of an instruction)."""
    codes = Counter(code_of(row) for row in rewrites)
    usable = codes.pop("", 0)
    count = usable + sum(number for code, number in codes.items() if code not in _NOT_ASKED)
    return {
        "asked": count,
        "usable": usable,
        "share": usable / count if count else None,
        "codes": dict(codes.most_common()),
    }

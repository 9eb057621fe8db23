"""The rows of the sample: those of one teacher, of one source row, those that were answered."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset, concatenate_datasets

from ..columns import KEY_COLUMNS, is_usable
from ..pairs import error_code
from ..teacher import Teacher


class Asked(NamedTuple):
    """What one teacher made of the sample."""

    name: str  # the `source` of its rewrites
    teacher: Teacher
    table: Dataset  # originals and rewrites; what was not asked for has an error `budget: …`
    failed: str | None  # why asking stopped before its end
    requests: int  # HTTP requests of this run, repeated ones included


def all_versions(every: Sequence[Asked]) -> Dataset:
    """Originals once and the rewrites of all teachers, the table to be scored."""
    rewrites = [some_of(asked.table, lambda row: row["source"] != "") for asked in every[1:]]
    return concatenate_datasets([every[0].table, *rewrites])


def of_teacher(scored: Dataset, name: str) -> Dataset:
    """Originals and the rewrites of one teacher, out of the table of all."""
    return some_of(scored, lambda row: row["source"] in ("", name))


def answered(table: Dataset) -> set[str]:
    """The rows of which no version waits for money, or for an endpoint that stopped."""
    return {row_id for row_id, some in by_row(table).items() if not any(code_of(row) == "budget" for row in some)}


def some_of(table: Dataset, wanted: Callable[[Mapping[str, Any]], bool]) -> Dataset:
    """The rows that are wanted, by their key columns."""
    keys = table.select_columns(list(KEY_COLUMNS))
    return table.select([number for number, row in enumerate(keys) if wanted(row)])


def by_row(table: Dataset) -> dict[str, list[dict[str, Any]]]:
    """The versions of each source row."""
    found = defaultdict(list)
    for row in table.to_list():
        found[row["row_id"]].append(row)
    return dict(found)


def code_of(row: Mapping[str, Any]) -> str:
    """Of a version that is not usable; `budget` also where its parent was not asked for."""
    if is_usable(row["instruction"], row["response"]):
        return ""
    code = error_code(row["error"]) or "unknown"
    return "budget" if code == "parent" and "(budget:" in row["error"] else code

"""Whether the paper rule keeps as many rows of a published table as its authors published, in numbers and in words."""

from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from ..columns import require_columns
from ..errors import DataError
from ..selection import VARIANTS, decide
from .tables import RATIO_COLUMNS, Published, load_published


def check_published(table: Dataset, expected: int | None) -> dict[str, Any]:
    """Whether the paper rule, with its gates, keeps as many rows of a published table as its authors published.

    In:  the table of `load_published(texts, scores)`, whole and in its order
    Out: kept; expected; agrees (None where expected is); failed: versions with both texts and without ifd or r_ifd;
         kept_with_failed_as_zero: what the authors' script would keep, which takes a failed score for 0

    Raises:
        DataError: columns are missing, or the versions are in another order.
    """
    needed = ("row_id", "variant", "ifd", "r_ifd", *RATIO_COLUMNS)
    hint = "Make the table with `load_published(texts, scores)`."
    require_columns(table.column_names, needed, "`check_published`", hint)
    columns = table.select_columns([*needed, "instruction", "response"]).with_format("arrow")[:]
    names = columns["row_id"].combine_chunks().dictionary_encode().indices.to_numpy(False)
    in_order = columns["variant"].to_pylist() == list(VARIANTS) * (len(table) // len(VARIANTS))
    if not in_order or (names.reshape(-1, len(VARIANTS)) != names[:: len(VARIANTS), None]).any():
        raise DataError(
            f"`check_published` needs the whole table, each row's versions together: {', '.join(VARIANTS)}. " + hint
        )
    usable = pc.and_(columns["instruction"].is_valid(), columns["response"].is_valid())
    scored = pc.and_(columns["ifd"].is_valid(), columns["r_ifd"].is_valid())
    ifd, r_ifd = (columns[name].to_numpy().reshape(-1, len(VARIANTS)) for name in RATIO_COLUMNS)
    kept = sum(decision.kept for decision in decide(table, rule="paper"))
    return {
        "kept": kept,
        "expected": expected,
        "agrees": None if expected is None else kept == expected,
        "failed": pc.sum(pc.and_not(usable, scored)).as_py() or 0,
        "kept_with_failed_as_zero": int(_authors_keep(ifd, r_ifd).sum()),
    }


def load_checked(published: Published) -> tuple[Dataset, str]:
    """The candidates of a published selection, with their authors' scores; and what `check_published` finds, in words.

    Where the scores cannot be had the table is without them, and the words say that the check was not run.

    Raises:
        DataError: the texts cannot be had, or are no such table.
    """
    try:
        table = load_published(published.texts, published.scores)
    except DataError as error:
        return load_published(published.texts), f"not checked: {' '.join(str(error).split())}"
    return table.remove_columns(RATIO_COLUMNS), f"the paper rule keeps {told(check_published(table, published.rows))}"


def told(found: dict[str, Any]) -> str:
    """What `check_published` found, in words."""
    kept, expected = f"{found['kept']:,} rows", found["expected"]
    if found["agrees"]:
        return f"{kept}, as published"
    words = f"{kept}, " + (f"{expected:,} are published" if expected is not None else "no number is published")
    if found["failed"]:
        as_zero = found["kept_with_failed_as_zero"]
        words += f" ({found['failed']:,} versions have a failed score; counted as 0, as by the authors: {as_zero:,})"
    return words


def _authors_keep(ifd: np.ndarray, r_ifd: np.ndarray) -> np.ndarray:
    """The rows that the authors' get_select_data.py keeps, (rows,), of ratios (rows, variants); NaN is never less."""
    original, instruction, response, both = range(len(VARIANTS))
    is_new = ifd[:, instruction] > ifd[:, original]
    rows, parent = np.arange(len(ifd)), np.where(is_new, instruction, original)
    answer = np.where(is_new, both, response)
    better = r_ifd[rows, answer] < r_ifd[rows, parent]
    return better & (r_ifd[rows, answer] < 1) & (ifd[rows, answer] < 1)

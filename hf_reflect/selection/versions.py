"""The table as arrays: its usable versions, checked, sorted by row, variant and source; texts are not read."""

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..errors import DataError

VARIANTS = ("original", "instruction", "response", "instruction+response")
TEXT_LENGTH = "length of response"  # a column that is computed, characters


class Versions(NamedTuple):
    """The usable versions in order; behind them stands a null version, which the index -1 finds."""

    ids: pa.Array  # (rows,) distinct, in the order of their first versions, usable or not
    place: np.ndarray  # (versions + 1,) in the table
    key: np.ndarray  # (versions + 1,) row, variant and source as one number; ascending, but -1 for the null version
    variant: np.ndarray  # (versions + 1,) number in VARIANTS
    sources: int
    first: np.ndarray  # (rows, variants) index of the first by source, -1 where there is none
    counts: np.ndarray  # (rows, variants)
    scores: dict[str, np.ndarray]  # (versions + 1,) float64, NaN is null

    @property
    def row(self) -> np.ndarray:
        """(versions,) number in `ids`."""
        return self.key[:-1] // (len(VARIANTS) * self.sources)

    @property
    def cell(self) -> np.ndarray:
        """(versions,) row and variant as one number: the place in `first`, flattened."""
        return self.key[:-1] // self.sources

    def at(self, row: np.ndarray, variant: int, source: np.ndarray) -> np.ndarray:
        """The indices of these versions, -1 where there is none."""
        wanted = (row * len(VARIANTS) + variant) * self.sources + source
        index = np.searchsorted(self.key[:-1], wanted)
        return np.where(self.key[index] == wanted, index, -1)


def read_versions(dataset: Dataset, scores: Iterable[str]) -> Versions:
    """The usable versions of a table with these scores, of which `TEXT_LENGTH` may be one.

    In:  row_id, variant, the scores (optionally source, instruction, response)
    Raises a DataError where row_id or variant is null, a variant unknown, or a version there twice.
    """
    row, ids = read_rows(dataset)
    codes, names = _distinct(dataset, _cast(dataset, "variant", pa.large_string()))
    known = {name: number for number, name in enumerate(VARIANTS)}
    variant = np.array([*(known.get(name, -1) for name in names.to_pylist()), -1])[codes]  # the last -1 is for null
    if len(unknown := np.flatnonzero(variant < 0)):
        found = _key(dataset, unknown[0])
        raise DataError(
            f"{len(unknown)} of {len(row)} versions are of no known variant, first that of row {found['row_id']!r} "
            f"with the variant {found['variant']!r}; there are {', '.join(VARIANTS)}. Rename them, or leave them out."
        )
    source, sources = np.zeros(len(row), np.int64), 1
    if "source" in dataset.column_names:
        codes, names = _distinct(dataset, _cast(dataset, "source", pa.large_string()).fill_null(""))
        rank = np.empty(len(names), np.int64)
        rank[pc.sort_indices(names).to_numpy()] = np.arange(len(names))  # by name, so that no row's place decides
        source, sources = rank[codes], max(len(names), 1)
    key = (row * len(VARIANTS) + variant) * sources + source
    place = np.argsort(key, kind="stable")
    if len(again := np.flatnonzero(np.diff(key[place]) == 0)):
        again = np.sort(place[again + 1])
        examples = ", ".join(f"{tuple(_key(dataset, n).values())} in place {n}" for n in again[:3])
        raise DataError(
            f"{len(again)} of {len(row)} versions repeat the row_id, variant and source of another: {examples}"
            f"{', …' * (len(again) > 3)}. Nothing but the order of the rows would say which of them plays. Give every "
            "teacher and every sample a `source` of its own (`ReflectionTransform(..., source=...)`), or drop those "
            "that repeat."
        )

    usable = np.ones(len(row), bool)  # a table without its texts holds what was scored: all of it
    for name in ("instruction", "response"):
        if name in dataset.column_names:
            usable &= _ordered(dataset, dataset.data.column(name).is_valid())
    place = place[usable[place]]
    key = key[place]
    count = np.bincount(key // sources, minlength=len(ids) * len(VARIANTS)).reshape(-1, len(VARIANTS))
    return Versions(
        ids=ids,
        place=np.append(place, -1),
        key=np.append(key, -1),
        variant=np.append(variant[place], -1),
        sources=sources,
        first=np.where(count > 0, np.cumsum(count).reshape(count.shape) - count, -1),
        counts=count,
        scores={name: np.append(read_numbers(dataset, name)[place], np.nan) for name in scores},
    )


def read_rows(dataset: Dataset) -> tuple[np.ndarray, pa.Array]:
    """Each version's row by number, (versions,), counted in the order of first versions; and the row_ids, (rows,)."""
    column = dataset.data.column("row_id")
    codes, ids = _distinct(
        dataset, column if pa.types.is_integer(column.type) else _cast(dataset, "row_id", pa.large_string())
    )
    if len(nulls := np.flatnonzero(codes < 0)):
        raise DataError(
            f"{len(nulls)} of {len(codes)} versions have no row_id, first that in place {nulls[0]}: nobody can tell "
            "which others they compete with. Give them one, or leave them out."
        )
    first = np.full(len(ids), len(codes))
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # of equal ones the last assignment stays
    order = np.argsort(first)[: np.count_nonzero(first < len(codes))]  # without ids that only left-out rows have
    number = np.empty(len(ids), np.int64)
    number[order] = np.arange(len(order))
    return number[codes], ids.take(pa.array(order))


def read_numbers(dataset: Dataset, name: str) -> np.ndarray:
    """A column of scores, or `TEXT_LENGTH`, (versions,), float64; null is NaN."""
    if name == TEXT_LENGTH:
        return _ordered(dataset, pc.utf8_length(_cast(dataset, "response", pa.large_string())).cast(pa.float64()))
    return _ordered(dataset, _cast(dataset, name, pa.float64()))


def hashes(ids: pa.Array, rows: np.ndarray, seed: int, *purpose: Any) -> np.ndarray:
    """64 bits for the row_id of each of these rows, uint64: the same on every machine and in every order of rows."""
    parts = [f", {part!r}" for part in purpose]
    start, end = f"({seed!r}, ", f"{''.join(parts)})"
    some = ids.take(pa.array(rows)).to_pylist()
    digests = (hashlib.sha256(f"{start}{row_id!r}{end}".encode()).digest()[:8] for row_id in some)
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def _distinct(dataset: Dataset, column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Of each value its number among the distinct ones, -1 for null, (versions,); and these."""
    if not len(column):
        return np.empty(0, np.int64), pa.array([], column.type)
    encoded = column.dictionary_encode().combine_chunks()
    return _ordered(dataset, encoded.indices.fill_null(-1)).astype(np.int64), encoded.dictionary


def _cast(dataset: Dataset, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    """A column as it is stored, in this type."""
    column = dataset.data.column(name)
    try:
        return column.cast(kind, safe=False)
    except pa.ArrowException as error:
        raise DataError(
            f"The column {name!r} holds {column.type}, which cannot be read as {kind}: {error}. Convert it before, "
            f"for instance with `dataset.cast_column`."
        ) from error


def _ordered(dataset: Dataset, stored: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """What was computed from a stored column, as the dataset's rows have it: shuffled, filtered, sorted."""
    values = stored.to_numpy(zero_copy_only=False)
    mapping = dataset._indices  # not public, but through what is, a million rows are gathered one by one: 6 seconds
    return values if mapping is None else values[mapping.column(0).to_numpy()]


def _key(dataset: Dataset, place: int) -> dict[str, Any]:
    names = [name for name in ("row_id", "variant", "source") if name in dataset.column_names]
    return dataset.select_columns(names).with_format(None)[int(place)]

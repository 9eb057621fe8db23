"""What a table says, as short numbers: one for each row, and one for all of it; however the table is stored."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

NOT_COUNTED = ("input_ids", "labels")  # of one tokenizer and one template; they are not published
_AT_ONCE = 1_000  # rows
_NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


def row_digests(dataset: Dataset) -> list[str]:
    """16 hex digits for each row, of the names and the values of all its cells but input_ids and labels.

    Equal cells give equal digits whatever the order of the columns, the chunks, an indices mapping, or the width of
    a type: string and large_string, int32 and int64, the kinds of lists, units of time. A float counts as the float64
    of its value, exactly; NaN is null, as in every stage, and -0.0 is 0.0, which it equals. A null, an empty text and
    an empty list differ, and so do the numbers 1 and 1.0. Bytes and images count as they are stored.
    """
    names = counted_columns(dataset)
    header = json.dumps(names).encode()
    digests = []
    for row in _rows(dataset, names):
        digests.append(hashlib.sha256(header + _JSON(row).encode()).hexdigest()[:16])
    return digests


def table_digest(dataset: Dataset, rows: Iterable[str] | None = None) -> str:
    """64 hex digits: SHA-256 of the sorted column names, what labels mean, and the rows' digests, in order.

    Args:
        dataset: the table.
        rows: its `row_digests`, where they are known.
    """
    features = dataset.features or {}
    labels = {name: getattr(features[name], "names", None) for name in counted_columns(dataset)}
    digest = hashlib.sha256(json.dumps(labels).encode())
    for row in row_digests(dataset) if rows is None else rows:
        digest.update(row.encode())
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """64 hex digits: SHA-256 of a text in UTF-8, as `write_whole` writes it."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def cells(dataset: Dataset, column: str) -> list[Any]:
    """A column's values as `row_digests` sees them, which JSON can hold; equal where the digests are."""
    return [row[0] for row in _rows(dataset, [column])]


def counted_columns(dataset: Dataset) -> list[str]:
    """The columns that a digest is of, by name."""
    return sorted(name for name in dataset.column_names if name not in NOT_COUNTED)


_JSON = json.JSONEncoder(separators=(",", ":")).encode


def _rows(dataset: Dataset, names: list[str]) -> Iterator[tuple]:
    """The values of these columns, row by row."""
    if not names:
        yield from ((),) * len(dataset)
        return
    for batch in dataset.select_columns(names).with_format("arrow").iter(_AT_ONCE):
        yield from zip(*(_values(batch[name].combine_chunks()) for name in names), strict=True)


def _values(array: Any) -> list[Any]:
    """What JSON can hold of an Arrow array, the same for all types that can hold the same."""
    if isinstance(array, pa.ChunkedArray):  # too long for one array of its type
        return [value for chunk in array.chunks for value in _values(chunk)]
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _values(array.dictionary_decode())
    if pa.types.is_floating(kind):
        numbers = pc.add(array.cast(pa.float64()), 0.0)  # -0.0 + 0.0 is 0.0
        return pc.if_else(pc.is_nan(numbers), pa.scalar(None, pa.float64()), numbers).to_pylist()
    if pa.types.is_struct(kind):
        fields = sorted(zip(kind.names, array.flatten(), strict=True), key=lambda field: field[0])
        names, columns = [name for name, _ in fields], [_values(column) for _, column in fields]
        rows: Iterable[tuple] = zip(*columns, strict=True) if columns else iter([()] * len(array))
        valid = array.is_valid().to_pylist()
        return [dict(zip(names, row, strict=True)) if there else None for row, there in zip(rows, valid, strict=True)]
    if _is_list(kind):
        lengths = pc.list_value_length(array).to_pylist()
        items = iter(_values(pc.list_flatten(array)))
        return [
            None if not there else list(islice(items, length))
            for length, there in zip(lengths, array.is_valid().to_pylist(), strict=True)
        ]
    if pa.types.is_temporal(kind):
        if pa.types.is_date(kind):
            array, factor = array.cast(pa.timestamp("s")), _NANOSECONDS["s"]
        else:
            factor = _NANOSECONDS[kind.unit]
        wide = pa.int32() if array.type.bit_width == 32 else pa.int64()
        return [None if value is None else ["ns", value * factor] for value in array.view(wide).to_pylist()]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return [None if value is None else ["bytes", value.hex()] for value in array.to_pylist()]
    if pa.types.is_decimal(kind):
        return [None if value is None else ["decimal", str(value)] for value in array.to_pylist()]
    return array.to_pylist()


def _is_list(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in tests)

"""The files of a published repository, written into a folder: the same that is pushed can be read and verified here.

README.md            the card
statistics.json      what `statistics` says
provenance.json      where the tables come from
checksums.parquet    row_id, variant, source, digest of each row of candidates/, in their order
data/                config `default`: the selected rows, with `messages`
candidates/          config `candidates`: all versions with their scores
"""

import io
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from ..columns import KEY_COLUMNS
from ..errors import DataError, ReflectError
from ..files import write_whole
from ..report.statistics import statistics
from .card import dataset_card, read_card
from .digests import row_digests, text_digest
from .merging import section_of
from .metadata import Before
from .provenance import complete
from .refusals import disk_errors
from .tables import published_tables, quietly

FOLDERS = {"default": "data", "candidates": "candidates"}  # of the configs
SHARD = r"(data|candidates)/train-\d{5}-of-\d{5}\.parquet"  # what we call our files
_SHARD_BYTES = 500_000_000  # in memory; about a third of it on the disk
_ROWS_AT_ONCE = 5_000  # a row group: what a reader must load at least
_NO_TYPE = (pa.ArrowException, TypeError, ValueError, KeyError)  # of a column that cannot be stored or read again


def write_contents(
    folder: str | PathLike,
    candidates: Dataset,
    selected: Dataset,
    provenance: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    encoder: Any = None,
    card_text: str | None = None,
    repo_id: str | None = None,
) -> dict[str, Any]:
    """Write everything that `push_recycled` publishes; returns what `provenance.json` says.

    Arguments as for `push_recycled`.

    Args:
        folder: made where it is not there. What is in it stays, but for the files of this name: those are written
            anew, and of our older tables no file is left.
        candidates: all versions.
        selected: the rows that were kept.
        provenance: where they come from.
        tokenizer: for lengths in tokens.
        encoder: for coherence, where candidates have no such column.
        card_text: the README whose words and metadata stay; the folder's own where it is not given.
        repo_id: what the card calls the dataset; the folder's name where it is not known.

    Raises:
        DataError: tables that do not belong together or cannot be stored, a broken card or one with another licence,
            a folder that cannot be written to.
    """
    folder, before = Path(folder), None
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file, and what is published is a folder of files. Give another name.")
    with disk_errors():
        if card_text is None and (folder / "README.md").exists():
            card_text, before = read_card((folder / "README.md").read_bytes()), pushed_before(folder)
        tables = published_tables(candidates, selected)
        return write_tables(folder, tables, provenance, tokenizer, encoder, card_text, repo_id, before)


def pushed_before(folder: Path) -> Before | None:
    """Provenance and statistics of an earlier push, where these files are there and ours."""
    found = []
    for name in ("provenance", "statistics"):
        try:
            found.append(json.loads((folder / f"{name}.json").read_bytes()))
        except (OSError, ValueError):
            found.append({})
    provenance, numbers = found
    return (provenance, numbers if isinstance(numbers, dict) else {}) if is_ours(provenance) else None


def is_ours(provenance: Any) -> bool:
    """Whether a provenance.json is one of ours; other tools write files of this name too."""
    if not isinstance(provenance, dict):
        return False
    return type(provenance.get("format")) is int and isinstance(provenance.get("hashes"), dict)


def write_tables(
    folder: Path,
    tables: tuple[Dataset, Dataset],
    provenance: Mapping[str, Any] | None,
    tokenizer: Any,
    encoder: Any,
    card_text: str | None,
    repo_id: str | None,
    before: Before | None = None,
) -> dict[str, Any]:
    """What `write_contents` writes, of tables that `published_tables` made."""
    candidates, default = tables
    with quietly(), _storable(*tables):
        everything = complete(dict(provenance or {}), candidates, default)
        costs = everything.get("costs")
        numbers = statistics(candidates, default, tokenizer, encoder, costs if isinstance(costs, Mapping) else None)
        columns = {"default": default.column_names, "candidates": candidates.column_names}
        card = dataset_card(card_text, repo_id or folder.resolve().name, everything, numbers, columns, before)
        _write_shards(folder / FOLDERS["default"], default)
        _write_shards(folder / FOLDERS["candidates"], candidates)
        keys = candidates.select_columns(list(KEY_COLUMNS))
        digests = Dataset.from_dict({"digest": row_digests(candidates)})
        concatenate_datasets([keys, digests], axis=1).to_parquet(folder / "checksums.parquet")
    written = json.dumps(numbers, indent=2, ensure_ascii=False)
    everything["hashes"] |= {"statistics": text_digest(written), "card": text_digest(section_of(card))}
    write_whole(folder / "statistics.json", written)
    write_whole(folder / "provenance.json", json.dumps(everything, indent=2, ensure_ascii=False))
    write_whole(folder / "README.md", card)
    return everything


@contextmanager
def _storable(*tables: Dataset) -> Iterator[None]:
    """Raise a DataError that names the column, where a column cannot be stored as Parquet and read again."""
    try:
        yield
    except ReflectError:
        raise
    except _NO_TYPE:
        for table in tables:
            for name in table.column_names:
                column = table.select_columns([name])
                try:
                    row_digests(column)
                    column.to_parquet(io.BytesIO())
                except _NO_TYPE as error:
                    kind = table.data.schema.field(name).type
                    words = " ".join(str(error).split())
                    raise DataError(
                        f"The column `{name}` holds {kind}, which cannot be published as Parquet ({words}). Cast it "
                        f"(`table.cast_column({name!r}, …)`), or remove it."
                    ) from error
        raise


def _write_shards(folder: Path, table: Dataset) -> None:
    """The table as Parquet files that keep its types; older shards of ours go."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("train-*-of-*.parquet"):
        old.unlink()
    stored = table.data
    size = stored.nbytes * len(table) / max(stored.num_rows, 1)  # of a selection only its part
    number = min(max(math.ceil(size / _SHARD_BYTES), 1), len(table))
    for index in range(number):
        shard = table.shard(number, index, contiguous=True)
        shard.to_parquet(folder / f"train-{index:05d}-of-{number:05d}.parquet", batch_size=_ROWS_AT_ONCE)

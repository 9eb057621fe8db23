"""The files of a published repository, written into a folder: the same that is pushed can be read and verified here.

README.md            the card
statistics.json      what `statistics` says
provenance.json      where the tables come from
checksums.parquet    row_id, variant, source, digest of each row of candidates/, in their order
data/                config `default`: the selected rows, with `messages`
candidates/          config `candidates`: all versions with their scores
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, concatenate_datasets

from ..columns import KEY_COLUMNS, is_usable, require_columns
from ..errors import DataError
from ..files import write_whole
from ..report.statistics import selected_places, statistics
from ..templates import to_messages
from .card import dataset_card, read_card
from .digests import NOT_COUNTED, row_digests
from .provenance import complete, with_source

FOLDERS = {"default": "data", "candidates": "candidates"}  # of the configs
SHARD = r"(data|candidates)/train-\d{5}-of-\d{5}\.parquet"  # what we call our files
_SHARD_BYTES = 500_000_000  # in memory; about a third of it on the disk
_ROWS_AT_ONCE = 5_000  # a row group: what a reader must load at least
_TEXTS = ("instruction", "input", "response", "history")


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
        folder: made where it is not there; what is in it stays, of older tables everything but our own shards.
        candidates: all versions.
        selected: the rows that were kept.
        provenance: where they come from.
        tokenizer: for lengths in tokens.
        encoder: for coherence, where candidates have no such column.
        card_text: the README whose words and metadata stay; the folder's own where it is not given.
        repo_id: what the card calls the dataset; the folder's name where it is not known.
    """
    if card_text is None and (readme := Path(folder) / "README.md").exists():
        card_text = read_card(readme.read_bytes())
    tables = published_tables(candidates, selected)
    return write_tables(Path(folder), tables, provenance, tokenizer, encoder, card_text, repo_id)


def write_tables(
    folder: Path,
    tables: tuple[Dataset, Dataset],
    provenance: Mapping[str, Any] | None,
    tokenizer: Any,
    encoder: Any,
    card_text: str | None,
    repo_id: str | None,
) -> dict[str, Any]:
    """What `write_contents` writes, of tables that `published_tables` made."""
    candidates, default = tables
    everything = complete(dict(provenance or {}), candidates, default)
    costs = everything.get("costs")
    numbers = statistics(candidates, default, tokenizer, encoder, costs if isinstance(costs, Mapping) else None)
    columns = {"default": default.column_names, "candidates": candidates.column_names}
    card = dataset_card(card_text, repo_id or folder.resolve().name, everything, numbers, columns)
    with _no_caches():
        _write_shards(folder / FOLDERS["default"], default)
        _write_shards(folder / FOLDERS["candidates"], candidates)
        keys = candidates.select_columns(list(KEY_COLUMNS))
        digests = Dataset.from_dict({"digest": row_digests(candidates)})
        concatenate_datasets([keys, digests], axis=1).to_parquet(folder / "checksums.parquet")
    write_whole(folder / "statistics.json", json.dumps(numbers, indent=2, ensure_ascii=False))
    write_whole(folder / "provenance.json", json.dumps(everything, indent=2, ensure_ascii=False))
    write_whole(folder / "README.md", card)
    return everything


def published_tables(candidates: Dataset, selected: Dataset) -> tuple[Dataset, Dataset]:
    """The rows of the configs `candidates` and `default`.

    The first are the candidates as they are, without token ids. The second are those of them that were selected, in
    the order of `selected`, each with the scores that the candidates have; columns that only `selected` has; and
    `messages`.

    Raises:
        DataError: a column is missing or in the way; a selected row is not among the candidates, has another text
            there, or cannot be used.
    """
    for name, table in {"candidates": candidates, "selected": selected}.items():
        require_columns(table.column_names, ("row_id", "variant", "instruction", "input", "response"), f"`{name}`")
        if "messages" in table.column_names:
            raise DataError(
                f"The table `{name}` has a column 'messages', which is what the selected rows get for SFTTrainer. "
                "Rename yours before: `table.rename_column('messages', 'original_messages')`."
            )
        if not len(table):
            raise DataError(f"The table `{name}` has no rows, so there is nothing to publish.")
    with _no_caches():  # a run's folders are not ours to write into
        everything, kept = (with_source(_plain(table)) for table in (candidates, selected))
        chosen = everything.select(selected_places(everything, kept))
        _check_texts(chosen, kept)
        if more := [name for name in kept.column_names if name not in chosen.column_names]:
            chosen = concatenate_datasets([chosen, kept.select_columns(more)], axis=1)
        return everything, to_messages(chosen, keep_texts=True)


def _plain(table: Dataset) -> Dataset:
    return table.with_format(None).remove_columns([name for name in NOT_COUNTED if name in table.column_names])


def _check_texts(chosen: Dataset, kept: Dataset) -> None:
    """Raise a DataError unless these are the same versions, and all of them can be trained on."""
    there = [name for name in _TEXTS if name in chosen.column_names and name in kept.column_names]
    columns = [table[name][:] for table in (chosen, kept) for name in there]
    for place, row in enumerate(zip(*columns, strict=True)):
        before, after = (dict(zip(there, values, strict=True)) for values in (row[: len(there)], row[len(there) :]))
        if before != after:
            name = next(name for name in there if before[name] != after[name])
            raise DataError(
                f"The selected row {_called(kept, place)} has another `{name}` than the candidates: "
                f"{str(after[name])[:60]!r} instead of {str(before[name])[:60]!r}. Give the candidates that these "
                "rows were selected from, unedited."
            )
        if not is_usable(before["instruction"], before["response"]):
            raise DataError(
                f"The selected row {_called(kept, place)} has no instruction or no response, so nobody can train on "
                "it. Select with `select`, which takes usable versions only."
            )


def _called(table: Dataset, place: int) -> str:
    row = table.select_columns(["row_id", "variant", "source"])[place]
    return f"{row['row_id']!r} ({row['variant']}{row['source'] and ', '}{row['source']})"


def _write_shards(folder: Path, table: Dataset) -> None:
    """The table as Parquet files that keep its types; older shards of ours go."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("train-*-of-*.parquet"):
        old.unlink()
    stored = table.data
    size = stored.nbytes * len(table) / max(stored.num_rows, 1)  # of a selection only its part
    number = max(math.ceil(size / _SHARD_BYTES), 1)
    for index in range(number):
        shard = table.shard(number, index, contiguous=True)
        shard.to_parquet(folder / f"train-{index:05d}-of-{number:05d}.parquet", batch_size=_ROWS_AT_ONCE)


@contextmanager
def _no_caches() -> Iterator[None]:
    """What `map` writes here goes into a temporary folder, not beside the table."""
    before = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if before:
            datasets.enable_caching()

"""The rows that are published: all versions as they are, and of them the selected ones, ready for SFTTrainer."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from datasets.features.features import require_storage_embed
from datasets.table import embed_table_storage

from ..columns import is_usable, require_columns
from ..errors import DataError
from ..report.statistics import selected_places
from ..templates import to_messages
from .digests import NOT_COUNTED

_TEXTS = ("instruction", "input", "response", "history")
_FILES_AT_ONCE = 100  # pictures and sounds, in memory


def published_tables(candidates: Dataset, selected: Dataset) -> tuple[Dataset, Dataset]:
    """The rows of the configs `candidates` and `default`.

    The first are the candidates as they are, without token ids. The second are those of them that were selected, in
    the order of `selected`, each with the scores that the candidates have; columns that only `selected` has; and
    `messages`. Pictures, sounds and other files that a table names by their paths are read into it, so that nobody
    needs the files; of a path its last part is left.

    Raises:
        DataError: a column is missing, in the way, or of a type that no text has; a file that a table names is not
            there; a selected row is not among the candidates, has another text there, or cannot be used.
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
        _check_types(name, table)
    with quietly():
        everything, kept = (_with_source(_plain(table)) for table in (candidates, selected))
        everything = _with_files(everything)
        chosen = everything.select(selected_places(everything, kept))
        _check_texts(chosen, kept)
        if more := [name for name in kept.column_names if name not in chosen.column_names]:
            chosen = concatenate_datasets([chosen, _with_files(kept.select_columns(more))], axis=1)
        return everything, to_messages(chosen, keep_texts=True)


def _plain(table: Dataset) -> Dataset:
    return table.with_format(None).remove_columns([name for name in NOT_COUNTED if name in table.column_names])


def _with_source(table: Dataset) -> Dataset:
    """The table with the column `source`: without it there is one, the empty one."""
    return table if "source" in table.column_names else table.add_column("source", [""] * len(table))


def _check_types(name: str, table: Dataset) -> None:
    """Raise a DataError where a column that holds texts for us holds something else for somebody."""
    for column in ("instruction", "input", "response", "error"):
        if column in table.column_names:
            kind = table.data.schema.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not any(test(kind) for test in _STRINGS):
                raise DataError(
                    f"The column `{column}` of the table `{name}` holds {kind}, where text or null is needed"
                    f"{': why a version cannot be used' if column == 'error' else ''}. Rename yours, or cast it."
                )


_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)


def _with_files(table: Dataset) -> Dataset:
    """The table with the content of the files that it names, as `push_to_hub` has it."""
    there = [name for name, feature in table.features.items() if require_storage_embed(feature)]
    if not there:
        return table
    try:
        made = table.with_format("arrow").map(embed_table_storage, batched=True, batch_size=_FILES_AT_ONCE)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(
            f"A file that the table names in {' or '.join(f'`{name}`' for name in there)} cannot be read: {error}. It "
            "would be published within the table. Bring it back, or remove the column."
        ) from error
    return made.with_format(None)


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


@contextmanager
def quietly() -> Iterator[None]:
    """What `map` writes goes into a temporary folder, for a run's folder is not ours to write into; no bars."""
    cached, shown = datasets.is_caching_enabled(), not datasets.are_progress_bars_disabled()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if cached:
            datasets.enable_caching()
        if shown:
            datasets.enable_progress_bars()

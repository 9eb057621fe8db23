"""What was chosen, on disk: `selection.json`, in the output folder and with every checkpoint."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..errors import DataError, SettingsError
from ..files import write_whole
from ..pairs import keys_of

SELECTION = "selection.json"
STATE = (
    "hf_reflect"  # in the `stateful_callbacks` of trainer_state.json: there with every checkpoint, however it is made
)
Key = tuple[str, str, str]  # row_id, variant, source


def checksum(keys: Iterable[Key]) -> str:
    """Of a choice: equal on all processes, and in a checkpoint and what belongs to it."""
    return hashlib.sha256(json.dumps(list(keys)).encode()).hexdigest()[:16]


def describe(candidates: Dataset) -> dict[str, Any]:
    """How many rows and versions, and a digest of their keys and of the ids that are trained on."""
    keys, digest = keys_of(candidates), hashlib.sha256()
    digest.update(json.dumps(keys).encode())
    names = [name for name in ("input_ids", "labels") if name in candidates.column_names]
    for batch in candidates.select_columns(names).with_format("arrow").iter(10_000):
        for name in names:
            ids = batch[name].combine_chunks()
            for numbers in (pc.list_value_length(ids), pc.list_flatten(ids)):
                digest.update(numbers.cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes())
    return {"rows": len({key[0] for key in keys}), "versions": len(keys), "digest": digest.hexdigest()[:16]}


def rows_of(keys: Iterable[Key]) -> dict[str, list[str]]:
    """row_id → variant, source: as written."""
    return {row_id: [variant, source] for row_id, variant, source in keys}


def places_of(rows: dict[str, list[str]], table: Dataset) -> list[int]:
    """Where the versions that were written are in a table.

    Raises:
        DataError: one is not.
    """
    places = {key: place for place, key in enumerate(keys_of(table))}
    try:
        return [places[(row_id, *version)] for row_id, version in rows.items()]  # type: ignore[index]
    except KeyError as error:
        raise DataError(
            f"The checkpoint was trained on the version {error.args[0]}, which the candidates do not have. Resume "
            "with the same candidates, or train anew."
        ) from error


def write(folder: Path, selection: dict[str, Any]) -> None:
    """Whole or not at all."""
    write_whole(folder / SELECTION, json.dumps(selection))


def read(checkpoint: Path, output_dir: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The choice that a checkpoint was trained on, if it is written; and the checksum that it must have, if known.

    A checkpoint that was saved without its callbacks being called has no `selection.json`; the one in the output
    folder serves where the checkpoint's trainer state knows it by its checksum.

    Raises:
        DataError: there is no such checkpoint, or its files contradict each other or cannot be read.
    """
    if not checkpoint.is_dir():
        raise DataError(f"There is no checkpoint at {checkpoint}. Give `resume_from_checkpoint` a folder that exists.")
    known = None
    if (state := checkpoint / "trainer_state.json").exists():
        known = (_json(state).get("stateful_callbacks") or {}).get(STATE, {}).get("choice")
    for folder in (checkpoint, output_dir):
        if not (path := folder / SELECTION).exists():
            continue
        written = _json(path)
        rows: Any = written.get("rows")
        first: Any = written.get("first", {})
        if not (_is_choice(rows) and _is_choice(first) and (not first or list(first) == list(rows))):
            raise DataError(f"{path} does not say which rows were chosen. Resume from another checkpoint.")
        found = checksum((row_id, *version) for some in (first, rows) for row_id, version in some.items())
        if found == known or (folder is checkpoint and known is None):
            return written, known
        if folder is checkpoint:
            raise DataError(
                f"{path} holds another choice ({found}) than the checkpoint was trained on ({known}). Put the file "
                "back that was saved with it, or resume from another checkpoint."
            )
    return None, known


def _is_choice(rows: Any) -> bool:
    return isinstance(rows, dict) and all(
        isinstance(version, list) and len(version) == 2 and all(isinstance(part, str) for part in version)
        for version in rows.values()
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Resume from another checkpoint.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}, not what was saved. Resume from another checkpoint.")
    return found


def compare(written: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    """Raise where a checkpoint was trained on a choice that was made otherwise, naming the first difference."""
    for name, value in now.items():
        before = written.get(name)
        if before == value:
            continue
        if name == "candidates" and isinstance(before, dict):
            sizes = [f"{some.get('versions')} versions of {some.get('rows')} rows" for some in (before, value)]
            if sizes[0] == sizes[1]:
                sizes = [sizes[0], "as many with other texts, ids or order"]
            raise DataError(
                f"{checkpoint} was trained on other candidates: {sizes[0]} then, {sizes[1]} now. Resume with the same "
                "candidates, or train anew."
            )
        raise SettingsError(
            f"{checkpoint} was trained on a choice with {name}={before!r}, and this callback has {value!r}. Resume "
            "with the same settings, or train anew."
        )

"""The files of a published dataset: which there must be, and how each is read, or said to be unreadable."""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..columns import require_columns
from ..errors import DataError
from ..files import read_object
from ..launch import first_line
from .checks import Key, check_digests, some
from .contents import FOLDERS, SHARD
from .merging import BEGIN, END
from .provenance import FORMAT, KEYS

FILES = ("README.md", "statistics.json", "provenance.json", "checksums.parquet")
_DATA = (".parquet", ".arrow", ".jsonl", ".csv")  # what the Hub's viewer and `load_dataset` may take for data
_NEEDED = ("row_id", "variant", "instruction", "input", "response")


def why(error: BaseException) -> str:
    """What an error says first, to be put into a sentence."""
    return first_line(error).rstrip(".")


def shards_of(config: str, names: list[str]) -> list[str]:
    """The files of a config, in order."""
    return sorted(name for name in names if re.fullmatch(SHARD, name) and name.startswith(f"{FOLDERS[config]}/"))


def check_layout(names: list[str]) -> list[str]:
    """Files that are not there, and tables that should not be."""
    found = [f"{name} is missing." for name in FILES if name not in names]
    for config, folder in FOLDERS.items():
        shards = shards_of(config, names)
        numbers = [tuple(map(int, re.findall(r"\d{5}", name))) for name in shards]
        expected = max((of for _, of in numbers), default=1)
        missing = [n for n in range(expected) if (n, expected) not in numbers]
        found += some(
            (f"{folder}/train-{n:05d}-of-{expected:05d}.parquet of config `{config}` is missing." for n in missing),
            "files that are missing",
        )
        found += [
            f"{name} is none of the {expected} files of config `{config}`."
            for name, (n, of) in zip(shards, numbers, strict=True)
            if of != expected or n >= of
        ]
    known = (name for name in names if name in FILES or re.fullmatch(SHARD, name))
    more = {name for name in names if name.endswith(_DATA) and not name.startswith(".")} - set(known)
    return found + [f"{name} is there, and nothing of it was published with the rest." for name in sorted(more)]


def check_card(folder: Path, names: list[str]) -> list[str]:
    """The configs of README.md read the tables; our part of it is there."""
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(folder / "README.md") or {}
        text = (folder / "README.md").read_text(encoding="utf-8")
    except Exception as error:  # of YAML, whose parser is not ours
        return [f"README.md cannot be read: {why(error)}."]
    found = [] if BEGIN in text and END in text else ["README.md has lost the part that hf_reflect wrote."]
    configs = metadata.get("configs")
    given = {each.get("config_name"): each.get("data_files") for each in configs or [] if isinstance(each, dict)}
    for config, ours in FOLDERS.items():
        files = given.get(config)
        parts = files if isinstance(files, list) else [files]
        patterns = [part.get("path") if isinstance(part, dict) else part for part in parts]
        patterns = [one for each in patterns for one in (each if isinstance(each, list) else [each])]
        read = {name for name in names for pattern in patterns if pattern and fnmatch(name, str(pattern))}
        if read != set(shards_of(config, names)):
            found.append(f"README.md: the config `{config}` reads {files}, and its table is {ours}/train-*.parquet.")
    return found


def object_in(path: Path, names: list[str], found: list[str]) -> dict[str, Any] | None:
    """What a JSON file holds; None where it is not there, or cannot be read, which is said in `found`."""
    if path.name not in names:
        return None
    try:
        return read_object(path)
    except DataError as error:
        found.append(f"{path.name} cannot be read: {why(error)}.")
        return None


def check_provenance(provenance: dict[str, Any]) -> list[str]:
    """It has its keys, in a format that is known."""
    found = [f"provenance.json lacks `{name}`." for name in KEYS if name not in provenance]
    if "format" in provenance and provenance["format"] != FORMAT:
        found.append(
            f"provenance.json has the format {provenance['format']!r}; this hf_reflect knows {FORMAT}. Update it."
        )
    if (reflect := provenance.get("reflect", "all")) not in ("all", "selective"):
        found.append(f'provenance.json has `reflect` {reflect!r}; it is "all" or "selective".')
    return found


def table_in(folder: Path, config: str, names: list[str], cache: str, found: list[str]) -> Dataset | None:
    """A config's rows, memory-mapped; None where they cannot be read."""
    shards = [folder / name for name in shards_of(config, names)]
    broken, rows = [], 0
    for path in shards:
        try:
            rows += pq.read_metadata(path).num_rows
        except (OSError, pa.ArrowException) as error:
            broken.append(f"{path.relative_to(folder)} is no whole Parquet file: {why(error)}.")
    if shards and not broken and not rows:
        broken = [f"{FOLDERS[config]}/ has no rows."]
    found += broken
    if broken or not shards:
        return None
    try:
        table = Dataset.from_parquet([str(path) for path in shards], cache_dir=cache)
        require_columns(table.column_names, _NEEDED, f"The config `{config}`", "It was not published by hf_reflect.")
        return table
    except DataError as error:
        found.append(str(error))
    except (OSError, ValueError, RuntimeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        found.append(f"{FOLDERS[config]}/ cannot be read as one table: {why(error)}.")
    return None


def check_checksums(path: Path, keys: list[Key], digests: list[str]) -> list[str]:
    """The candidates' rows, by their keys and digests, are those that were published."""
    try:
        table = pq.read_table(path, columns=["row_id", "variant", "source", "digest"])
    except (OSError, pa.ArrowException) as error:
        return [f"checksums.parquet cannot be read: {why(error)}."]
    rows = [tuple(str(part) for part in row) for row in zip(*(column.to_pylist() for column in table), strict=True)]
    known = {row[:3]: row[3] for row in rows}
    return check_digests(keys, digests, known)

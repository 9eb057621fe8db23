"""The files of a published dataset: which there must be, and how each is read, or said to be unreadable."""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

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
from .digests import text_digest
from .merging import section_of
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


class Card(NamedTuple):
    """What a README.md says: of each config the patterns of its files; its text; why it cannot be read."""

    configs: dict[str, list[str]]
    text: str = ""
    problem: str = ""


def card_in(folder: Path, names: list[str]) -> Card:
    """The card, empty where there is none."""
    from huggingface_hub import metadata_load

    if "README.md" not in names:
        return Card({})
    try:
        metadata = metadata_load(folder / "README.md") or {}
        text = (folder / "README.md").read_text(encoding="utf-8")
    except Exception as error:  # of YAML, whose parser is not ours
        return Card({}, problem=f"README.md cannot be read: {why(error)}.")
    configs = [each for each in metadata.get("configs") or [] if isinstance(each, dict)]
    return Card({str(each.get("config_name")): _patterns(each.get("data_files")) for each in configs}, text)


def _patterns(files: Any) -> list[str]:
    """The paths in a card's `data_files`, however they are written."""
    parts = files if isinstance(files, list) else [files]
    paths = [part.get("path") if isinstance(part, dict) else part for part in parts]
    return [str(one) for each in paths for one in (each if isinstance(each, list) else [each]) if one]


def _read_by(patterns: list[str], names: list[str]) -> set[str]:
    return {name for name in names for pattern in patterns if fnmatch(name, pattern)}


def check_layout(names: list[str], card: Card) -> list[str]:
    """Files that are not there, and tables that no config of the card reads."""
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
    for config, patterns in card.configs.items():
        more -= set() if config in FOLDERS else _read_by(patterns, names)  # the user's own
    return found + [f"{name} is there, and nothing of it was published with the rest." for name in sorted(more)]


def check_card(card: Card, names: list[str], digest: str | None) -> list[str]:
    """The configs of README.md read the tables; our part of it is there, with the digest that was published."""
    if "README.md" not in names or card.problem:
        return [card.problem] if card.problem else []
    found = []
    if not (section := section_of(card.text)):
        found.append("README.md has lost the part that hf_reflect wrote.")
    elif digest is not None and text_digest(section) != digest:
        found.append("README.md: the part between the markers is not what was published: push again to write it anew.")
    for config, ours in FOLDERS.items():
        patterns = card.configs.get(config, [])
        if _read_by(patterns, names) != set(shards_of(config, names)):
            given = ", ".join(patterns) or "nothing"
            found.append(f"README.md: the config `{config}` reads {given}, and its table is {ours}/train-*.parquet.")
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
    hashes = provenance.get("hashes")
    found += [
        f"provenance.json lacks the hash of the config `{config}`."
        for config in FOLDERS
        if "hashes" in provenance and not (isinstance(hashes, dict) and hashes.get(config))
    ]
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
    rows = zip(*(column.to_pylist() for column in table), strict=True)
    known = {(str(row_id), variant, source or ""): digest for row_id, variant, source, digest in rows}
    return check_digests(keys, digests, known)

"""Does a published dataset, or a run's folder, agree with itself? Everything that can be computed again, is."""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset

from ..errors import DataError, ReflectError
from ..launch import saved_table
from ..pairs import keys_of
from ..run import content_digest
from ..selection import DEFAULTS
from .checks import (
    Key,
    check_keys,
    check_numbers,
    check_scores,
    check_statistics,
    check_unusable,
)
from .choices import check_copies, check_messages, check_selection
from .contents import SHARD
from .digests import row_digests, table_digest, text_digest
from .provenance import counts
from .reading import (
    FILES,
    card_in,
    check_card,
    check_checksums,
    check_layout,
    check_provenance,
    object_in,
    table_in,
    why,
)


def verify(repo_id_or_path: str | Path) -> list[str]:
    """What does not agree, in plain sentences that name the row; empty when all does.

    A published dataset: its files are there and can be read; counts, hashes and checksums are those of its tables;
    each version is there once; `ifd` and `r_ifd` are what the losses give; the rows of `default` are those that the
    stated rule takes from the candidates, unchanged; statistics.json, and the card's configs. A run's folder: what of
    this it holds. Of one kind of mistake at most five examples are given, and how many more there are.

    Args:
        repo_id_or_path: the id of a dataset on the Hub, whose latest commit is downloaded; a folder with the same
            files; or the `output_dir` of a recipe.

    Raises:
        DataError: nothing is there, or the folder is neither.
        HubError: the Hub does not let us read it, or cannot be reached.
    """
    return examine(repo_id_or_path)[0]


def examine(repo_id_or_path: str | Path) -> tuple[list[str], dict[str, Any]]:
    """What `verify` returns, and the counts that were found."""
    folder = Path(repo_id_or_path).expanduser()
    text = str(repo_id_or_path)
    if not folder.exists():
        if isinstance(repo_id_or_path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
            raise DataError(f"The folder {text} does not exist (seen from {Path.cwd()}). Check the path.")
        from .refusals import downloaded

        folder, names = downloaded(text)
    elif folder.is_dir():
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    else:
        raise DataError(f"{text} is a file. Give the folder that holds the tables.")
    with _quietly() as cache:
        if "summary.json" in names or "candidates/dataset_info.json" in names:
            found, numbers = _examine_run(folder)
            return [re.sub("^default: ", "selected: ", each) for each in dict.fromkeys(found)], numbers
        if not any(name in FILES or re.fullmatch(SHARD, name) for name in names):
            raise DataError(
                f"{text} is neither what `push_recycled` publishes (README.md, provenance.json, data/, candidates/) "
                "nor a run's folder (summary.json, candidates/, selected/). Check the path or the id."
            )
        found, numbers = _examine_published(folder, names, cache)
        return list(dict.fromkeys(found)), numbers  # several checks may miss the same column


@contextmanager
def _quietly() -> Iterator[str]:
    """A folder for Arrow files; no progress bars, and no errors that `datasets` logs before it raises them."""
    shown, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="hf_reflect_verify_", ignore_cleanup_errors=True) as cache:
            yield cache
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _said(check: Callable[..., list[str]], *arguments: Any) -> list[str]:
    """What a check finds; where the table is of no use for it, that."""
    try:
        return check(*arguments)
    except ReflectError as error:
        return [" ".join(str(error).split())]
    except (TypeError, ValueError, KeyError, AttributeError, pa.ArrowException) as error:
        return [f"{check.__name__.removeprefix('check_')} could not be checked: {why(error)}."]


# ---- what was published


def _examine_published(folder: Path, names: list[str], cache: str) -> tuple[list[str], dict[str, Any]]:
    card = card_in(folder, names)
    found = check_layout(names, card)
    provenance, stated = (object_in(folder / name, names, found) for name in ("provenance.json", "statistics.json"))
    tables = {config: table_in(folder, config, names, cache, found) for config in ("candidates", "default")}
    if provenance is not None:
        found += check_provenance(provenance)
    hashes = _mapping(provenance, "hashes")
    found += check_card(card, names, hashes.get("card"))
    candidates, selected = tables["candidates"], tables["default"]
    digests = {config: row_digests(table) for config, table in tables.items() if table is not None}
    changed = [
        config
        for config, rows in digests.items()
        if config in hashes and hashes[config] != table_digest(tables[config], rows)
    ]
    found += [
        f"{config}: the table is not the one that was published: its rows, their order or its columns give another "
        "hash than provenance.json states."
        for config in changed
    ]
    if candidates is None:
        return found, {}
    keys = keys_of(candidates)
    if "checksums.parquet" in names:
        found += _said(check_checksums, folder / "checksums.parquet", keys, digests["candidates"])
    ambiguous = _of_candidates(candidates, keys, found)
    if selected is None:
        return found, {}
    kept = keys_of(selected)
    if "messages" in selected.column_names:
        found += _said(check_messages, selected, kept)
    else:
        found.append("default: the column `messages` is missing.")
    found += _said(check_copies, candidates, selected, keys, kept, True)
    numbers = _counts(candidates, selected, found)
    if provenance is not None:
        found += _said(check_numbers, "counts in provenance.json", provenance.get("counts"), numbers)
    if provenance is not None and not ambiguous:
        ordered = "default" in changed  # rows that were published in an order of their own may have it
        found += _said(check_selection, candidates, kept, provenance.get("reflect"), _choice(provenance), ordered)
    if stated is not None and not ambiguous:
        unequal = _said(check_statistics, stated, candidates, selected)
        if not unequal and text_digest((folder / "statistics.json").read_text("utf-8")) != hashes.get("statistics"):
            unequal = ["statistics.json: lengths, costs or coherence are not those that were published."]
        found += unequal
    return found, numbers


def _of_candidates(candidates: Dataset, keys: list[Key], found: list[str]) -> bool:
    """What a table of candidates must be by itself; whether versions cannot be told apart."""
    ambiguous = _said(check_keys, candidates)
    found += [*ambiguous, *_said(check_scores, candidates, keys), *_said(check_unusable, candidates, keys)]
    return bool(ambiguous)


def _counts(candidates: Dataset, selected: Dataset | None, found: list[str]) -> dict[str, Any]:
    try:
        return counts(candidates, selected)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        found.append(f"The rows cannot be counted: {why(error)}.")
        return {}


def _choice(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings.get(name, default) for name, default in DEFAULTS.items()}


def _mapping(some: dict[str, Any] | None, name: str) -> dict[str, Any]:
    """What an object has under a name, if that is a mapping."""
    value = (some or {}).get(name)
    return value if isinstance(value, dict) else {}


# ---- a run's folder


def _examine_run(folder: Path) -> tuple[list[str], dict[str, Any]]:
    found: list[str] = []
    tables: dict[str, Dataset | None] = {}
    for name in ("candidates", "selected"):
        try:
            tables[name] = saved_table(folder / name)
        except DataError as error:
            found.append(str(error))
    candidates, selected = tables.get("candidates"), tables.get("selected")
    there = [name for name in ("summary.json", "statistics.json") if (folder / name).exists()]
    summary, stated = (object_in(folder / name, there, found) for name in ("summary.json", "statistics.json"))
    if "summary.json" not in there:
        found.append("summary.json is missing: the run was stopped before its end.")
    if candidates is None:
        return [*found, *(["candidates/ is missing."] if "candidates" in tables else [])], {}
    keys = keys_of(candidates)
    ambiguous = _of_candidates(candidates, keys, found)
    numbers = _counts(candidates, selected, found)
    for name, now in numbers.items():
        if before := _mapping(summary, name):
            before = {key: value for key, value in before.items() if key != "cut"}  # of the tokens, which are not kept
            found += check_numbers(f"`{name}` in summary.json", before, now)
    if selected is None:
        return found, numbers
    kept = keys_of(selected)
    found += _said(check_copies, candidates, selected, keys, kept, False)
    settings = _mapping(summary, "settings")
    selection = _mapping(settings, "selection")
    if "candidates" in selection and selection["candidates"] != content_digest(candidates):
        found.append("candidates: ids, texts, history or errors have changed since the student chose.")
    if selection and not ambiguous:
        reflect = "selective" if settings.get("reflect") else "all"
        found += _said(check_selection, candidates, kept, reflect, _choice(selection), True)
    if stated is not None and not ambiguous:
        found += _said(check_statistics, stated, candidates, selected)
    return found, numbers

"""A run's folder, published: its tables with what it knows of their origin."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..errors import DataError
from ..files import read_object
from ..launch import local_tokenizer
from .provenance import provenance_of

Published = tuple[Dataset, Dataset, dict[str, Any], Any]  # as `push_recycled` and `write_contents` take them


def push_run(
    run_dir: str | Path,
    repo_id: str,
    provenance: Mapping[str, Any] | None = None,
    private: bool = True,
    token: str | None = None,
    tokenizer: Any = None,
) -> str:
    """Publish what a run made as a dataset of the Hub; returns the URL of the commit.

    Args:
        run_dir: the `output_dir` of a recipe.
        repo_id: "namespace/name", or "name" for one's own.
        provenance: what the folder does not tell: `license`, `teacher_terms`.
        private: who may see a new repository.
        token: of the Hub.
        tokenizer: for lengths in tokens; that of the run's model where the folder has one.

    Raises as `provenance_of` and `push_recycled` do; a DataError where a table is not there.
    """
    from .pushing import push_recycled

    candidates, selected, known, tokenizer = published_of(run_dir, provenance, tokenizer)
    return push_recycled(repo_id, candidates, selected, known, private, token, tokenizer)


def write_run(run_dir: str | Path, folder: str | Path, provenance: Mapping[str, Any], tokenizer: Any = None) -> None:
    """Write what `push_run` would publish into a folder."""
    from .contents import write_contents

    candidates, selected, known, tokenizer = published_of(run_dir, provenance, tokenizer)
    write_contents(folder, candidates, selected, known, tokenizer)


def published_of(run_dir: str | Path, provenance: Mapping[str, Any] | None, tokenizer: Any) -> Published:
    """candidates, selected, where they come from, and the student's tokenizer if one is known."""
    run = Path(run_dir).expanduser()
    known = provenance_of(run) | {name: value for name, value in (provenance or {}).items() if value is not None}
    candidates, selected = (_table(run, name) for name in ("candidates", "selected"))
    made_with = read_object(run / "selected" / "made_with.json", absent={})
    student = made_with.get("student", {}).get("model")
    return candidates, selected, known, tokenizer or local_tokenizer(run, student)


def _table(run: Path, name: str) -> Dataset:
    if not (run / name).exists():
        raise DataError(f"{run} has no {name}/, so there is nothing to publish: run the stage that makes it first.")
    return Dataset.load_from_disk(str(run / name))

"""A run's folder, published: its tables with what it knows of their origin."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..errors import DataError
from ..files import read_object
from ..launch import local_tokenizer, saved_table
from .provenance import provenance_of

_OF_CANDIDATES = (
    *("teacher", "teacher_models", "teacher_replies", "teacher_terms", "prompts", "license"),
    *("source_dataset", "source_split", "source_revision"),
)
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
    """Write what `push_run` would publish into a folder; a DataError where a key or token is in it."""
    from .contents import write_contents
    from .secrets import known_secrets, refuse_secrets

    candidates, selected, known, tokenizer = published_of(run_dir, provenance, tokenizer)
    name = f"you/{Path(folder).resolve().name}"  # where it might be pushed to
    told = write_contents(folder, candidates, selected, known, tokenizer, repo_id=name)
    refuse_secrets(Path(folder), known_secrets(told))


def published_of(run_dir: str | Path, provenance: Mapping[str, Any] | None, tokenizer: Any) -> Published:
    """candidates, selected, where they come from, and the student's tokenizer if one is known."""
    run = Path(run_dir).expanduser()
    known = provenance_of(run)
    known |= _told_by_origin(known)
    known |= {name: value for name, value in (provenance or {}).items() if value is not None}
    candidates, selected = (_table(run, name) for name in ("candidates", "selected"))
    made_with = read_object(run / "selected" / "made_with.json", absent={})
    student = made_with.get("student", {}).get("model")
    return candidates, selected, known, tokenizer or local_tokenizer(run, student)


def _told_by_origin(known: Mapping[str, Any]) -> dict[str, Any]:
    """What the dataset that the candidates were taken from, if it is one of `push_recycled`, says of their making."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not (name := known.get("candidates_from")):
        return {}
    try:
        told = read_object(Path(hf_hub_download(name, "provenance.json", repo_type="dataset")))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, DataError):
        return {}  # a folder, or somebody's table that does not say
    return {key: told[key] for key in _OF_CANDIDATES if told.get(key)}


def _table(run: Path, name: str) -> Dataset:
    table = saved_table(run / name)
    if table is None:
        raise DataError(f"{run} has no {name}/, so there is nothing to publish: run the stage that makes it first.")
    return table

"""Where a table comes from, as one JSON object: who made it, with which words and settings, from what."""

import hashlib
import json
import platform
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
from datasets import Dataset

from ..errors import DataError, SettingsError
from ..files import read_object
from ..prompts import PROMPTS
from ..run import describe_candidates, describe_selected
from ..selection import DEFAULTS, check_settings
from .digests import table_digest

FORMAT = 1
_PACKAGES = ("hf_reflect", "torch", "transformers", "trl", "datasets", "accelerate", "openai")
_UNKNOWN = ("teacher", "teacher_terms", "student", "source_dataset", "source_split", "source_revision", "license")
KEYS = (
    *("format", "created", "versions", "teacher_models", "prompts", *DEFAULTS, "reflect", "counts", "hashes"),
    *_UNKNOWN,
)
_SYNONYMS = {"licence": "license", "terms": "teacher_terms"}
_SECRET = re.compile(r"(^|_)(api_?keys?|token|secret|password|authorization|bearer|credentials)$")
_SPOKEN = re.compile(r"(^|_)(bos|eos|pad|unk|sep|cls|mask|stop|start|end)_token$")  # a tokenizer's: no secret
_NAMED = ("source_dataset", "source_scores", "student", "teacher")
# saved with the candidates
_NOTES = ("source", "api_key_env", "teacher_models", "teacher_replies", "candidates_revision")
_TABLES = (".json", ".jsonl", ".csv", ".parquet")
_LOCAL = re.compile(r"(file:)?([/~]|\.\.?/|[A-Za-z]:[\\/])\S*")


def complete(provenance: dict[str, Any] | None, candidates: Dataset, selected: Dataset) -> dict[str, Any]:
    """What `provenance.json` says: what its user knows, and what can be seen here.

    Added where absent: format, created, versions, the prompts' hashes, `select`'s defaults, `reflect: all`, and null
    for what nobody said. Counts and hashes are always those of these tables. Other keys stay. Of local paths the last
    component is left: a machine's folders are nobody else's business.

    Args:
        provenance: what is known, as from `provenance_of(run_dir)`. `licence` is read as `license`, `terms` as
            `teacher_terms`. A ReflectionPrompt among `prompts` counts by its hash.
        candidates: all versions, as they will be published.
        selected: the kept ones, likewise, as config `default` has them.

    Raises:
        SettingsError: a value that JSON cannot hold, a key that is there twice, one that names a secret, or settings
            of a choice that cannot be used.
    """
    given = dict(provenance or {})
    for other, name in _SYNONYMS.items():
        if other in given:
            value = given.pop(other)
            if given.setdefault(name, value) != value:
                raise SettingsError(f"The provenance has `{name}` and `{other}`, which differ: leave one of them out.")
    teacher = given.get("teacher")
    known = {} if "teacher" in given and not teacher else prompt_digests(isinstance(teacher, dict) and teacher)
    given["prompts"] = known | {name: _digest_of(prompt) for name, prompt in (given.get("prompts") or {}).items()}
    given["versions"] = versions() | (given.get("versions") or {})
    given = {name: _plain(name, value) for name, value in given.items()}

    choice = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    choice |= check_settings(**choice)
    if (reflect := given.get("reflect", "all")) not in ("all", "selective"):
        raise SettingsError(f'The provenance has `reflect` {reflect!r}; it is "all" or "selective".')
    first = {"format": FORMAT, "created": given.get("created") or datetime.now(UTC).isoformat(timespec="seconds")}
    return {
        **first,
        **{name: given.get(name) for name in _UNKNOWN},
        "teacher_models": given.get("teacher_models") or [],
        **{name: value for name, value in given.items() if name not in first},
        **choice,
        "reflect": reflect,
        "counts": counts(candidates, selected),
        "hashes": {"candidates": table_digest(candidates), "default": table_digest(selected)},
    }


def counts(candidates: Dataset, selected: Dataset | None) -> dict[str, Any]:
    """Rows, versions, unusable ones by error, selected ones by variant: as a run's summary has them."""
    if "error" not in candidates.column_names:
        candidates = candidates.add_column("error", pa.nulls(len(candidates), pa.string()))
    found = {"candidates": describe_candidates(candidates)}
    return found | ({} if selected is None else {"selected": describe_selected(selected)})


def versions() -> dict[str, str]:
    """Of Python and of the packages that made the tables, those that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def prompt_digests(teacher: dict[str, Any] | bool) -> dict[str, str]:
    """SHA-256 of the texts of each prompt of hf_reflect that a teacher with these settings is asked with."""
    kind = "-json" if isinstance(teacher, dict) and teacher.get("structured") else ""
    return {name: _digest_of(PROMPTS[name]) for name in (f"instruction{kind}", f"response{kind}")}


def _digest_of(prompt: Any) -> Any:
    """Of a prompt: every character that the teacher may see; what is no prompt is the user's own words."""
    if not is_dataclass(prompt) or isinstance(prompt, type):
        return prompt
    texts = {name: value for name, value in asdict(prompt).items() if name != "example"}
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


def _plain(name: str, value: Any) -> Any:
    """A value of the provenance as JSON has it, without local folders; SettingsError where it cannot be published."""
    key = re.sub(r"(?<=[a-z])(?=[A-Z])|-", "_", name.rpartition(".")[2]).lower()
    if isinstance(value, str | dict | list) and _SECRET.search(key) and not _SPOKEN.search(key):
        raise SettingsError(
            f"The provenance has the key `{name}`, which names a secret. Leave it out: everybody may read what is "
            "published, and the key of the endpoint is read from the environment."
        )
    if isinstance(value, dict):
        return {str(inner): _plain(f"{name}.{inner}", some) for inner, some in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, some) for some in value]
    if isinstance(value, PurePath) or (isinstance(value, str) and _is_local(name, value)):
        return PurePath(str(value).replace("\\", "/")).name
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"The provenance has {value!r} under `{name}`, which JSON cannot hold: give a text, a finite number, "
            "true, false, null, or lists and mappings of these."
        ) from error
    return value


def _is_local(name: str, value: str) -> bool:
    """Whether a text is the path of a file or folder; a dataset or model of the Hub has at most one slash."""
    if _LOCAL.fullmatch(value):
        return True
    if "://" in value or not (name in _NAMED or name.endswith(".model")):
        return False
    some = value.startswith(("/", "~", ".")) or value.count("/") > 1 or Path(value).suffix in _TABLES
    return some or ("/" in value and Path(value).exists())


# ---- a run's folder


def provenance_of(run_dir: str | Path) -> dict[str, Any]:
    """What a run's folder tells of its tables' origin, for `push_recycled(..., provenance=...)`.

    From summary.json, the tables' made_with.json, the ledger in the folder, and the local cache of the Hub; nothing is
    asked of a network. `license` and `teacher_terms` are for its user to add.

    Raises:
        DataError: the folder is no run's, or its files cannot be read.
    """
    folder = Path(run_dir).expanduser()
    summary = read_object(folder / "summary.json", absent={})
    made_with = [folder / table / "made_with.json" for table in ("candidates", "selected")]
    settings: dict[str, Any] = dict(summary.get("settings") or {})
    for path in made_with:  # newer than the summary while a run goes on
        settings |= read_object(path, absent={})
    if not settings:
        raise DataError(
            f"{folder} is no folder of a run: it has neither summary.json nor candidates/made_with.json. Give the "
            "`output_dir` of a recipe."
        )
    settings = _of_its_candidates(settings)
    data, teacher, student = (settings.get(name) or {} for name in ("data", "teacher", "student"))
    found: dict[str, Any] = {"teacher": teacher or None, "student": student or None}
    if student.get("model"):
        found["student"] = student | _commit(student["model"], student.get("revision"))
    if data:
        found |= {"source_dataset": data.get("dataset"), "source_split": data.get("split")}
        found |= {} if teacher else {"candidates_from": data.get("dataset")}
        names = {"scores": "source_scores", "preselect_share": "preselect_share", "preselect_by": "preselect_by"}
        found |= {ours: data[theirs] for theirs, ours in names.items() if theirs in data}
    selection = settings.get("selection") or {}
    found |= {name: selection[name] for name in DEFAULTS if name in selection}
    found |= {"rescore": selection["rescore"]} if "rescore" in selection else {}
    found["reflect"] = "selective" if settings.get("reflect") else "all"
    found |= _replies(folder / "ledger.sqlite", teacher.get("model"))
    chosen = read_object(folder / "model" / "selection.json", absent={})
    found |= {"schedule": chosen["schedule"]} if "schedule" in chosen else {}
    found |= {name: settings[name] for name in _NOTES if name in settings}
    found |= {"source_revision": revision} if (revision := found.get("source", {}).get("revision")) else {}
    found |= {name: summary[name] for name in ("note", "costs") if name in summary}
    return {name: _plain(name, value) for name, value in found.items()}


def _of_its_candidates(settings: dict[str, Any]) -> dict[str, Any]:
    """A run that chose from another run's candidates: who made those, and from what."""
    path = Path((settings.get("data") or {}).get("dataset") or "") / "made_with.json"
    parents = read_object(path, absent={})
    return settings | {name: parents[name] for name in ("data", "teacher", *_NOTES) if name in parents}


def _replies(ledger: Path, model: str | None) -> dict[str, Any]:
    """The names that the endpoint returned for the teacher, and for how many replies each."""
    if model is None or not ledger.exists():
        return {}
    from ..ledger import Ledger

    replies = Counter[str]()
    with Ledger(ledger) as opened:
        for group in opened.summary():
            if group["model"] == model:
                replies[group["returned"] or "not named"] += group["replies"]
    names = [name for name, _ in replies.most_common() if name != "not named"]
    return {"teacher_models": names, "teacher_replies": dict(replies.most_common())}


def _commit(repo: Any, revision: str | None) -> dict[str, str]:
    """The commit of a model of the Hub that was used, if the local cache has one only or knows it."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if not isinstance(repo, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo) or Path(repo).exists():
        return {}
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    commits: Iterator[Path] = cache.glob("snapshots/*")
    try:
        found = (cache / "refs" / (revision or "main")).read_text().strip()
    except OSError:
        only = [path.name for path in commits]
        found = only[0] if len(only) == 1 else ""
    return {"commit": found} if found else {}

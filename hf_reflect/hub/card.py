"""The cards: what a published dataset, and a model trained on it, say of themselves to people and to the Hub."""

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..columns import SCORE_COLUMNS
from ..errors import DataError
from ..files import write_whole
from ..report.statistics import MEASURES, SETS, means_of
from ..selection import RULES
from .markdown import ON_HUB, dataset_link, model_link, plain, template
from .merging import merged_card
from .metadata import Before, check_license, dataset_metadata

CONFIGS: list[dict[str, Any]] = [
    {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}], "default": True},
    {"config_name": "candidates", "data_files": [{"split": "train", "path": "candidates/train-*.parquet"}]},
]
_TAGS = ["hf_reflect", "reflection-tuning", "synthetic", "sft", "trl"]
_MODEL_TAGS = ["hf_reflect", "reflection-tuning", "sft", "trl"]
_MEANINGS = {
    "messages": "the conversation, role and content: what SFTTrainer takes",
    "row_id": "the source row, which all its versions share",
    "variant": "which parts were rewritten: original, instruction, response, instruction+response",
    "source": "who wrote it; empty for originals",
    "instruction": "what is asked",
    "input": "its context, where there is one; a new instruction is complete in itself",
    "response": "the answer",
    "history": "turns before this one",
    "critique": "what the teacher said before it rewrote",
    "error": "why a version cannot be used, a code and a detail; beside text only a remark",
    "loss_instruction": "mean negative log-likelihood of a token, natural log: of the instruction alone",
    "loss_response": "of the response alone",
    "loss_instruction_given_response": "of the instruction, given the response",
    "loss_response_given_instruction": "of the response, given the instruction",
    "ifd": "exp(loss_response_given_instruction − loss_response): how little the instruction helps the student",
    "r_ifd": "exp(loss_instruction_given_response − loss_instruction): how little the response tells of it",
    "coherence": "cosine of the Sentence-BERT embeddings of instruction and response",
}
_CHOICE = ("ifd_gate", "r_ifd_gate", "keep", "seed")
_CONFIGS_OF = {(True, True): "both", (True, False): "default", (False, True): "candidates"}


def dataset_card(
    existing: str | None,
    repo_id: str,
    provenance: Mapping[str, Any],
    statistics: Mapping[str, Any],
    columns: Mapping[str, list[str]],
    before: Before | None = None,
) -> str:
    """The README of a published dataset, merged with the one that is there.

    Args:
        existing: that one, or None.
        repo_id: where it is published.
        provenance: as `provenance.json` has it.
        statistics: as `statistics.json` has it.
        columns: the names of the columns, by config.
        before: provenance and statistics of the push before, where there was one: of the metadata of that card, what
            it said goes with it, and what somebody changed since stays.

    Raises:
        DataError: broken markers or metadata in the card that is there, or another licence than the provenance's.
    """
    check_license(existing, provenance, before)
    sets = statistics["sets"]
    kept = statistics["rewritten"] or {}
    total = max(sum(kept.values()), 1)
    section = template("card_section.md").render(
        repo_id=repo_id,
        rows=f"{statistics['rows']:,}",
        versions=f"{statistics['versions']:,}",
        selected=f"{sets['selected']['rows']:,}",
        source=dataset_link(provenance.get("source_dataset")),
        teacher=_name(provenance.get("teacher")),
        student=_name(provenance.get("student")),
        rule=provenance.get("rule"),
        chosen_by=_chosen_by(provenance),
        scored=any(name in columns["candidates"] for name in (*SCORE_COLUMNS, "coherence")),
        lengths=_measured(sets, "tokens"),
        perplexities=_measured(sets, "ppl_"),
        note=_sentence(provenance.get("note")),
        sets=[SETS.get(name, name) for name in sets],
        measures=means_of(sets),
        rewritten=[(name, f"{number:,}", f"{number / total:.0%}") for name, number in kept.items()],
        errors=[(code, f"{number:,}") for code, number in statistics["errors"].items()],
        remarks=[(code, f"{number:,}") for code, number in statistics["remarks"].items()],
        columns=_columns(columns),
        facts=_facts(provenance),
    )
    absent, written = dataset_metadata(provenance, statistics), dataset_metadata(*before) if before else {}
    return merged_card(existing, plain(repo_id.split("/")[-1]), section, absent, {"tags": _TAGS}, CONFIGS, written)


def write_model_card(
    folder: str | PathLike,
    provenance: Mapping[str, Any],
    base_model: str,
    dataset: str | None = None,
    recipe: str | None = None,
) -> Path:
    """Write README.md into the folder of a trained model, merged with the one that is there, such as TRL's.

    Args:
        folder: of the trained model.
        provenance: of the data, as from `provenance_of(run_dir)`.
        base_model: the student's Hub id or folder; a folder is called by its name.
        dataset: what it was trained on, where that is published.
        recipe: the file of the recipe's settings.

    Raises:
        DataError: the markers or the metadata of the README are broken.
    """
    path = Path(folder) / "README.md"
    existing = read_card(path.read_bytes()) if path.exists() else None
    local = Path(base_model).expanduser().exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base_model)
    name = Path(base_model).expanduser().resolve().name if local else base_model
    published = dataset if dataset and ON_HUB.fullmatch(dataset) and not Path(dataset).exists() else None
    trained_on = dataset_link(dataset and (published or Path(dataset).name))
    counts = provenance.get("counts") or {}
    rows = (counts.get("selected") or {}).get("rows")
    facts = [("base model", name if local else model_link(name)), ("dataset", trained_on)]
    facts += [("recipe", Path(recipe).name if recipe else None), ("rows trained on", rows), *_facts(provenance)]
    section = template("model_section.md").render(
        base_model=name,
        dataset=trained_on,
        teacher=_name(provenance.get("teacher")),
        source=dataset_link(provenance.get("source_dataset")),
        rule=provenance.get("rule"),
        chosen_by=_chosen_by(provenance),
        facts=[(label, value) for label, value in facts if value not in (None, "")],
    )
    absent = {"base_model": None if local else name, "library_name": "transformers", "pipeline_tag": "text-generation"}
    joined = {"tags": _MODEL_TAGS, **({"datasets": [published]} if published else {})}
    write_whole(path, merged_card(existing, plain(Path(folder).resolve().name), section, absent, joined))
    return path


def read_card(content: bytes) -> str:
    """A README as text, its line ends as they are. DataError where it is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"README.md is not UTF-8: {error}. Save it as UTF-8, or delete it.") from error


def _name(maker: Any) -> Any:
    """What a teacher or a student is called; None where nobody knows."""
    return maker.get("model") if isinstance(maker, Mapping) else maker


def _chosen_by(provenance: Mapping[str, Any]) -> str:
    """Whose scores the rule went by: "student", "came" (with the candidates), "coherence", or "" where by none."""
    rule = RULES.get(str(provenance.get("rule")))
    needs = set(rule.needs) - {"response"} if rule else set()
    if not needs:
        return ""
    if provenance.get("rescore") is False:
        return "came"
    return "student" if needs & set(SCORE_COLUMNS) else "coherence"


def _measured(sets: Mapping[str, Any], word: str) -> bool:
    return any(some[name]["n"] for some in sets.values() for name in MEASURES if word in name)


def _sentence(note: Any) -> str | None:
    return str(note).strip().rstrip(".") or None if note else None


def _columns(columns: Mapping[str, list[str]]) -> list[tuple[str, str, str]]:
    """Name, in which configs, meaning; in the order of the tables."""
    names = dict.fromkeys([*columns["default"], *columns["candidates"]])
    return [
        (
            name,
            _CONFIGS_OF[name in columns["default"], name in columns["candidates"]],
            _MEANINGS.get(name, "of the source data"),
        )
        for name in names
    ]


def _facts(provenance: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What is known of the origin, for a table: label and value."""
    rule = provenance.get("rule")
    settings = [f"{name} {_value(provenance[name])}" for name in _CHOICE if name in provenance]
    hashes = provenance.get("hashes") or {}
    facts = {
        "source data": dataset_link(provenance.get("source_dataset")),
        "split": provenance.get("source_split"),
        "revision": provenance.get("source_revision"),
        "licence": dataset_link(provenance.get("license")),
        "teacher": _described(provenance.get("teacher")),
        "the endpoint called it": ", ".join(map(str, provenance.get("teacher_models") or [])),
        "teacher's terms": dataset_link(provenance.get("teacher_terms")),
        "student": _described(provenance.get("student")),
        "rule": ", ".join([str(rule), *settings]) if rule else None,
        "order of asking": provenance.get("reflect"),
        "made": provenance.get("created"),
        "with": ", ".join(f"{name} {number}" for name, number in (provenance.get("versions") or {}).items()),
        **{f"digest of `{config}`": digest for config, digest in hashes.items()},
    }
    return [(Markup(name) if "`" in name else name, value) for name, value in facts.items() if value not in (None, "")]


def _described(maker: Any) -> str | None:
    """A teacher or a student with its settings."""
    if not isinstance(maker, Mapping):
        return maker
    settings = [
        f"{name} {_value(value)}" for name, value in maker.items() if name != "model" and value not in (None, False)
    ]
    return ", ".join([str(maker.get("model") or "?"), *settings])


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return str(value) if not isinstance(value, bool) else "yes" if value else "no"

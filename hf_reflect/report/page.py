"""One HTML page of a run, for people who would rather look than read: numbers, figures, and a reader of its rows."""

import base64
import hashlib
import os
from collections.abc import Mapping
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SettingsError
from ..files import write_whole
from ..launch import local_tokenizer
from .drawing import Figure
from .folder import Record, is_number
from .lengths import characters, lengths_of, remembering
from .plots import curve, density, histogram
from .reading import Reading, read_run
from .rows import as_json, has_every_kind, numbers_of, texts_of
from .statistics import selected_places, statistics
from .tables import cost_rows, funnel, kept_by_variant, statistics_rows, teacher_total, versions
from .words import MEASURES, NAMES, RULES, outcome_name, percent

_MOST_BYTES = 4_500_000
_LEAST_TEXTS = 1_500_000  # bytes, also where the numbers of all rows leave less
_HERE = Path(__file__).parent
# how rows can be sorted in the reader: the column, and whether the highest comes first
_ORDERS = {
    "row": "Order of the table",
    "-ifd": "IFD, highest first",
    "ifd": "IFD, lowest first",
    "-r_ifd": "r-IFD, highest first",
    "r_ifd": "r-IFD, lowest first",
    "-change": "IFD rose most",
    "change": "IFD fell most",
    "-length": "Longest response",
    "length": "Shortest response",
}


def build_report(run_dir: str | PathLike, output: str | PathLike | None = None, tokenizer: Any = None) -> Path:
    """Write what happened in a run as one HTML file that needs no network: look first, then read row by row.

    All counts are over all rows. Of the texts as many rows are in the file as fit into 4.5 MB, of every kind some; but
    1.5 MB are theirs, also where the numbers of more than some 100,000 rows leave less. What the run has not made yet
    is left out: candidates/ are enough.

    Args:
        run_dir: a run's `output_dir`.
        output: the file; `report.html` in the run's folder unless given.
        tokenizer: the student's, for lengths; the run's own, where this machine has it, unless given.

    Returns the file's path.

    Raises:
        DataError: there are no candidates, or what is there cannot be read.
        SettingsError: matplotlib is not installed (the extra `report`); `output` is a folder.
    """
    path = Path(run_dir) / "report.html" if output is None else Path(output)
    if path.is_dir():
        raise SettingsError(f"The page cannot be written to {path}, which is a folder. Name a file in it.")
    reading = read_run(Path(run_dir))
    context = _context(reading, tokenizer)
    empty = _rendered(context | {"texts": "[]", "readable": 0, "every_kind": False})
    rest = _MOST_BYTES - len(empty.encode("utf-8", "replace"))
    texts = texts_of(reading, max(rest, _LEAST_TEXTS))
    shown = {"texts": f"[{','.join(texts.values())}]", "readable": len(texts)}
    write_whole(path, _rendered(context | shown | {"every_kind": has_every_kind(reading, list(texts))}))
    return path


def _context(reading: Reading, tokenizer: Any) -> dict[str, Any]:
    """All that the template shows, but the texts."""
    record = reading.record
    student = record.student.get("model")
    tokenizer = remembering(
        tokenizer or local_tokenizer(reading.folder, student if isinstance(student, str) else None)
    )
    kept = reading.kept
    chosen = reading.selected if reading.selected is not None else reading.candidates.select(kept)
    if reading.selected is not None:
        places = selected_places(reading.candidates, reading.selected)
        chosen = chosen.select(np.flatnonzero(reading.usable[places]))
    found = statistics(
        reading.candidates, chosen if reading.decided or reading.selected is not None else None, tokenizer
    )
    lengths = characters(reading, "response")
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    rule = record.selection["rule"]
    return {
        "title": _name(record.data.get("dataset")) or reading.folder.resolve().name,
        "run": reading.folder.resolve().name,
        "about": _about(record),
        "notes": reading.notes,
        "tiles": _tiles(reading, found),
        "funnel": funnel(reading),
        "by_variant": kept_by_variant(reading),
        "is_saved": reading.selected is not None,
        "kept": len(kept),
        "figures": _figures(reading, kept, tokenizer),
        "has_gates": any(
            record.selection[f"{name}_gate"] is not None for name in ("ifd", "r_ifd") if name in reading.scores
        ),
        "has_scores": any(np.isfinite(values).any() for values in reading.scores.values()),
        "unit": "characters" if tokenizer is None else "tokens",
        "loss": curve(record.history),
        "versions": versions(reading),
        "statistics": statistics_rows(found),
        "costs": cost_rows(reading),
        "rule": rule,
        "rule_in_words": RULES.get(rule, ""),
        "orders": _ORDERS,
        "outcomes": [outcome_name(name) for name in reading.outcomes],
        "codes": reading.codes,
        "variants": [NAMES[name] for name in NAMES],
        "numbers": as_json(
            {
                **numbers_of(reading, lengths),
                "outcomes": [outcome_name(name) for name in reading.outcomes],
                "kept": "kept" in reading.outcomes and reading.outcomes.index("kept"),
                "codes": reading.codes,
                "variants": list(NAMES.values()),
                "scores": [MEASURES[name] for name in reading.scores],
            }
        ),
        "total": len(reading.ids),
        "css": (_HERE / "report.css").read_text(encoding="utf-8"),
        "js": script,
        "js_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def _rendered(context: Mapping[str, Any]) -> str:
    return _template().render(context)


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"n": _number, "percent": percent}
    return environment.get_template("report.html")


def _about(record: Record) -> list[tuple[str, str]]:
    """What made this run, in a few names."""
    chosen, rule = record.selection, record.selection["rule"]
    gates = [
        f"{MEASURES[name]} below {chosen[f'{name}_gate']:g}"
        for name in ("ifd", "r_ifd")
        if chosen[f"{name}_gate"] is not None
    ]
    found = [
        ("Dataset", f"{_name(record.data.get('dataset'))} {record.data.get('split') or ''}".strip()),
        ("Teacher", _name(record.teacher.get("model"))),
        ("Student", _name(record.student.get("model"))),
        ("Rule", f"{rule}: {RULES[rule]}" if rule in RULES else rule),
        ("Gates", " and ".join(gates) or "none"),
        ("Filter", "only rewritten responses" if chosen["keep"] == "reflected" else "every winner"),
    ]
    return [(label, text) for label, text in found if text]


def _name(value: Any) -> str:
    """Of a local folder or file its last name; of what lies on the Hub all."""
    text = str(value or "")
    # unlike Path.exists, this says no to what is too long, or too odd, for a path
    return Path(text).name if os.path.isabs(text) or os.path.exists(text) else text


def _tiles(reading: Reading, found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The few numbers that everybody asks for: label, number, what it stands beside."""
    total, kept, sets = len(reading.ids), len(reading.kept), found["sets"]
    tiles = [("Rows", f"{total:,}", f"{len(reading.row):,} versions, {int(reading.usable.sum()):,} usable")]
    if "selected" in sets:
        tiles.append(
            (
                "Kept" if reading.selected is not None else "Would be kept",
                f"{kept:,}",
                f"{percent(kept, total)} of the rows",
            )
        )
        for measure, label in (("ifd", "Mean IFD"), ("r_ifd", "Mean r-IFD")):
            before, after = sets["original"][measure]["mean"], sets["selected"][measure]["mean"]
            if before is not None and after is not None:
                tiles.append(
                    (
                        label,
                        f"{before:.3f} → {after:.3f}",
                        f"originals → kept, {after - before:+.3f}".replace("-", "−"),
                    )
                )
    logged = [entry["loss"] for entry in reading.record.history if "loss" in entry]
    if losses := [loss for loss in logged if is_number(loss)]:
        odd = len(logged) - len(losses)
        beside = f"first → last of those that are numbers; {odd:,} of {len(logged):,} are none"
        tiles.append(
            ("Training loss", f"{losses[0]:.3f} → {losses[-1]:.3f}", beside if odd else "first → last logged")
        )
    teacher = teacher_total(reading)
    if teacher["tokens"]:
        beside = f"{teacher['replies']:,} replies"
        tokens = (
            f"{teacher['tokens'] / 1e6:,.1f} million tokens"
            if teacher["tokens"] >= 1e6
            else f"{teacher['tokens']:,} tokens"
        )
        if teacher["cost"]:
            tiles.append(("The teacher cost", f"{teacher['cost']:,.2f}", f"{beside}, {tokens}"))
        else:
            tiles.append(("The teacher took", tokens, f"{beside}; no prices were set"))
    return tiles


def _figures(reading: Reading, kept: np.ndarray, tokenizer: Any) -> list[Figure]:
    """Of originals and kept rows: IFD, r-IFD, one against the other, and lengths; three beside each other fit."""
    original = reading.original[reading.original >= 0]
    labels = ("originals", "kept" if reading.selected is not None else "would be kept")
    gates = reading.record.selection
    found: dict[str, Figure | None] = {}
    sides = {}
    for name in ("ifd", "r_ifd"):
        if name in reading.scores:
            values, gate = reading.scores[name], gates[f"{name}_gate"]
            sides[name] = values[original], values[kept]
            found[name] = histogram(name, MEASURES[name], MEASURES[name], *sides[name], labels, gate)
    if len(sides) == 2:
        pairs = dict(zip(("before", "after"), zip(*sides.values(), strict=True), strict=True))
        titles = tuple(f"IFD against r-IFD: {label}" for label in labels)
        both = gates["ifd_gate"], gates["r_ifd_gate"]
        found |= {figure.name: figure for figure in density("density", titles, pairs, both)}
    usable = original[reading.usable[original]]
    unit = "characters" if tokenizer is None else "tokens"
    for part, lengths in lengths_of(reading, np.concatenate((usable, kept)), tokenizer).items():
        title = f"Length of the {part}"
        found[part] = histogram(
            f"length-{part}", title, unit, lengths[usable], lengths[kept], labels, logarithmic=True
        )
    order = ("ifd", "r_ifd", "instruction", "density-before", "density-after", "response")
    return [figure for name in order if (figure := found.get(name)) is not None]


def _number(value: float | int | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"

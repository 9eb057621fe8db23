"""What people see: numbers in words, the same rows side by side, one page."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..files import write_whole
from ..selection import VARIANTS, Decision, decide, select_top
from .choosing import COINS, COMPARED, DEALS, SCORES, in_words
from .tables import by_row, some_of


def examples(
    tables: Mapping[str, Dataset | None], count: int = 20, seed: int = 0, **selection: Any
) -> list[dict[str, Any]]:
    """The same source rows by all teachers: original, critique, versions, scores, and why one won; failures too.

    Args:
        tables: of each teacher its scored table; None where there is no reply of it.
        count: rows, drawn by the seed.
        seed: of the draw.
        selection: as for `measure`.
    """
    known = {name: table for name, table in tables.items() if table is not None}
    if not known:
        return []
    versions = {name: by_row(table) for name, table in known.items()}
    decisions = {name: {each.row_id: each for each in decide(table, **selection)} for name, table in known.items()}
    first = next(iter(known.values()))
    originals = some_of(first, lambda row: row["variant"] == "original")
    drawn = select_top(originals, count=min(count, len(originals)), by="random", seed=seed + 1)
    return [
        {
            "original": original,
            "teachers": [
                {"name": name, "versions": None}
                if name not in known
                else _example(
                    name, versions[name][original["row_id"]], decisions[name][original["row_id"]], known[name]
                )
                for name in tables
            ],
        }
        for original in drawn.to_list()
    ]


def _example(name: str, versions: list[dict[str, Any]], decision: Decision, table: Dataset) -> dict[str, Any]:
    winner = None if decision.position is None else table[decision.position]["variant"]
    rewrites = sorted((row for row in versions if row["source"]), key=lambda row: VARIANTS.index(row["variant"]))
    return {"name": name, "versions": rewrites, "kept": decision.kept, "winner": winner, "why": decision.why}


def percent(share: float | None) -> str:
    """A share for people."""
    return "–" if share is None else f"{100 * share:.0f} %"


def amount(value: float) -> str:
    """Money, tokens or a time, to three digits that count."""
    for least, factor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return amount(value / factor) + unit
    if value >= 100 or value < 1e-9:  # what a ledger reserved and gave back may leave as much
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(value))}f}"


def estimated(estimate: Mapping[str, Any] | None, factor: float = 1.0) -> str:
    """A value with its interval."""
    if estimate is None:
        return "–"
    value, low, high = (amount(factor * each) for each in (estimate["value"], *estimate["interval"]))
    return f"{value} [{low}, {high}]"


def lasting(hours: Mapping[str, Any] | None) -> str:
    """A time with its interval, in the unit that fits."""
    if hours is None:
        return "–"
    factor, unit = next((f, u) for f, u in ((1, "h"), (60, "min"), (3600, "s")) if hours["value"] * f >= 1 or u == "s")
    return f"{estimated(hours, factor)} {unit}"


def priced(found: Mapping[str, Any], name: str = "") -> str:
    """The money of a run, or of `cost_per_kept`, with its interval; its tokens where there are no prices."""
    cost, tokens = found[f"cost{name}"], found[f"tokens{name}"]
    return estimated(cost) if cost or not tokens else f"{estimated(tokens)} tok"


def shifted(shift: Mapping[str, Any] | None) -> str:
    """A shift with its interval; * where it is distinguishable."""
    if shift is None:
        return "–"
    low, high = shift["interval"]
    return f"{shift['value']:+.3f} [{low:+.3f}, {high:+.3f}]{'*' * shift['distinguishable']}"


def write_pilot(folder: Path, pilot: Mapping[str, Any], side_by_side: list[dict[str, Any]]) -> None:
    """`pilot.json`, all numbers, and `pilot.html`, one file without network or script.

    Args:
        folder: where both go.
        pilot: data (dataset, split, rows, sampled, seed), student (model, template, originals), selection (ifd_gate,
            r_ifd_gate, keep), teachers (what `measure` gave), ledger (spent, and its limits), note (or None).
        side_by_side: what `examples` gave.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {each.__name__: each for each in (percent, amount, estimated, lasting, priced, shifted)}
    more = {"in_words": in_words, "scales": _scales(pilot)}
    page = environment.get_template("page.html").render(
        **pilot, examples=side_by_side, scores=SCORES, compared=COMPARED, coins=COINS, deals=DEALS, **more
    )
    write_whole(folder / "pilot.json", json.dumps(_finite(pilot), indent=1, ensure_ascii=False))
    write_whole(folder / "pilot.html", page)


def _scales(pilot: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """For each score the ends of the axis on which all teachers' shifts are drawn."""
    ends: dict[str, list[float]] = {name: [0.0] for name in SCORES}
    for teacher in pilot["teachers"]:
        for name in SCORES if teacher["shifts"] else ():
            for shift in filter(None, teacher["shifts"][name].values()):
                ends[name] += [shift["value"], *shift["interval"], *shift["by_chance"]]
    return {name: (min(some), max(max(some), min(some) + 1e-6)) for name, some in ends.items()}


def _finite(value: Any) -> Any:
    """What JSON can hold: no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

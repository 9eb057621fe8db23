"""Which version of each pair to train on: two stages, as in V2 Eq. 6 and 9, then a filter.

Here is what select, decide and select_top take, give and say. `rules` has the rules as data, and who wins by them;
`versions` reads the table into sorted arrays, so that every comparison is one over all rows.
"""

from collections.abc import Iterable, Iterator
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..columns import LOSS_COLUMNS, require_columns
from ..errors import DataError, SettingsError
from .rules import COIN, HIGH_COHERENCE, HIGH_IFD, LONGEST, LOW_R_IFD, RESPONSE, RULES, Rule, Stage, winners
from .versions import TEXT_LENGTH, VARIANTS, Versions, hashes, read_numbers, read_rows, read_versions

__all__ = [
    "DEFAULTS",
    "RULES",
    "VARIANTS",
    "Decision",
    "Rule",
    "check_rule",
    "check_schedule",
    "check_settings",
    "check_top",
    "check_versions",
    "decide",
    "kept_positions",
    "select",
    "select_top",
]

# the settings of a choice that nobody changed
DEFAULTS = {"rule": "paper", "ifd_gate": 1.0, "r_ifd_gate": 1.0, "keep": "reflected", "seed": 0}
# what `select_top` can go by
_TOP = {"ifd": HIGH_IFD, "r_ifd": LOW_R_IFD, "coherence": HIGH_COHERENCE, "longest": LONGEST, "random": (COIN, -1)}
_TOP |= {name: (name, -1) for name in LOSS_COLUMNS}
_QUANTILES = {"min": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1.0}


class Decision(NamedTuple):
    """What became of one source row."""

    row_id: str
    position: int | None  # the winner's place in the table; None where the row has no usable version
    kept: bool
    why: str  # why this version won, or why the row was dropped


class _Choice(NamedTuple):
    """What became of all rows."""

    versions: Versions
    stages: list[Stage]
    winner: np.ndarray  # (rows,) index of a version, -1 where none is usable
    outcome: np.ndarray  # (rows,) index in reasons
    reasons: list[tuple[str, str]]  # why a row is dropped, "" where it is kept; and the score that this is about


def select(
    dataset: Dataset,
    rule: str = "paper",
    ifd_gate: float | None = 1.0,
    r_ifd_gate: float | None = 1.0,
    keep: str | None = "reflected",
    seed: int = 0,
) -> Dataset:
    """Keep at most one version of every pair, by a rule.

    In:  row_id, variant, the rule's columns (optionally source, instruction, response)                     (N rows)
    Out: the same columns; the winners that pass the filter, in the input's row order                       (≤ N rows)

    Who wins does not depend on the order of the rows. A score that is NaN is null.

    Args:
        dataset: the table, scored where the rule needs it.
        rule: a name in `RULES`: "paper" takes the new instruction where its IFD is higher, then the new response where
            its r-IFD is lower.
        ifd_gate: winners not strictly below are dropped, also those whose score is null; None: no gate. Where the
            column is absent its gate is skipped.
        r_ifd_gate: likewise.
        keep: "reflected" drops winners whose response was not rewritten (V2, section 3.2); None keeps them.
        seed: of the rule "random".

    Raises:
        SettingsError: an unknown rule or `keep`; a gate or a seed that is no number.
        DataError: a column is missing or of no use; a row_id or variant is null, a variant unknown, a version there
            twice; nothing is left (with the numbers).

    Source: arXiv 2402.10110, Eq. 6 and 9; the gates are those of the published script.
    """
    return dataset.select(_kept(dataset, rule, ifd_gate, r_ifd_gate, keep, seed))


def kept_positions(
    dataset: Dataset, rule: str, ifd_gate: float | None, r_ifd_gate: float | None, keep: str | None, seed: int
) -> list[int]:
    """The kept winners' places in row order; as `select`, which takes these rows."""
    return _kept(dataset, rule, ifd_gate, r_ifd_gate, keep, seed).tolist()


def decide(
    dataset: Dataset,
    rule: str = "paper",
    ifd_gate: float | None = 1.0,
    r_ifd_gate: float | None = 1.0,
    keep: str | None = "reflected",
    seed: int = 0,
) -> list[Decision]:
    """One decision for every row_id, in the order of their first versions; arguments as for `select`."""
    choice = _choose(dataset, rule, ifd_gate, r_ifd_gate, keep, seed)
    versions, winner = choice.versions, choice.winner
    columns = (versions.ids, winner, versions.place[winner], versions.variant[winner], choice.outcome)
    lists = (column.tolist() for column in columns)
    decisions = []
    for row_id, index, place, variant, outcome, why in zip(*lists, _whys(choice, RULES[rule]), strict=True):
        reason, score = choice.reasons[outcome]
        if index < 0:
            decisions.append(Decision(row_id, None, False, reason))
            continue
        if reason:
            value = f" with {score} {_shown(versions.scores[score][index])}" if score else ""
            why = f"{reason}: {VARIANTS[variant]} won{value}; {why}"
        decisions.append(Decision(row_id, place, not reason, why))
    return decisions


def select_top(
    dataset: Dataset, share: float | None = None, count: int | None = None, by: str = "ifd", seed: int = 0
) -> Dataset:
    """The fewer-data scenario: the best share, or number, of rows by one score; in the input's row order.

    In:  row_id and the column `by` ("longest" needs response)       (N rows)
    Out: the same columns     (`count`, or `round(share × N)`, at least 1)

    Highest first: ifd, coherence, longest (characters of the response); lowest first: r_ifd and the losses; "random":
    by a hash of (seed, row_id). Nulls, and NaN, last; ties by row_id.

    Raises:
        SettingsError: not exactly one of share (0 to 1) and count (1 to N); an unknown `by`; a seed that is no number.
        DataError: a column is missing or of no use; a row_id is null; there are no rows.

    Source: arXiv 2402.10110, section 4.4.
    """
    if (share is None) == (count is None):
        raise SettingsError("`select_top` takes either `share` or `count`.")
    _check_by(by)
    column, sign = _TOP[by]
    needed = {COIN: (), TEXT_LENGTH: ("response",)}.get(column, (column,))
    hint = "Score the table first." if by == column else ""
    require_columns(dataset.column_names, ("row_id",), "`select_top`")
    require_columns(dataset.column_names, needed, f"`select_top(by={by!r})`", hint)
    _check_number("seed", seed, Integral)
    if not (total := len(dataset)):
        raise DataError("`select_top` found no rows, so none is the best. Give it a table that has some.")
    size = 0
    if share is not None:
        _check_number("share", share)
        size = max(round(share * total), 1) if 0 < share <= 1 else 0
    elif count is not None:
        _check_number("count", count, Integral)
        size = int(count)
    if not 1 <= size <= total:
        raise SettingsError(f"`select_top` needs 0 < share <= 1 or 1 <= count <= {total}; got {share=}, {count=}.")

    row, ids = read_rows(dataset)
    if column == COIN:
        cost = hashes(ids, np.arange(len(ids)), int(seed))[row]
    else:
        cost = -sign * read_numbers(dataset, column)
    last = np.partition(cost, size - 1)[size - 1]  # who is still in; NaN comes at the end
    null = np.isnan(cost)
    taken, tied = (~null, null) if np.isnan(last) else (cost < last, cost == last)
    places = np.flatnonzero(tied)
    by_id = pc.sort_indices(ids.take(pa.array(row[places]))).to_numpy()
    taken[places[by_id[: size - np.count_nonzero(taken)]]] = True
    return dataset.select(np.flatnonzero(taken))


def check_top(share: float, by: str) -> None:
    """Raise a SettingsError unless `select_top` could take this share by this."""
    _check_by(by)
    _check_number("share", share)
    if not 0 < share <= 1:
        raise SettingsError(f"A share of the rows is above 0 and at most 1, not {share!r}.")


def _check_by(by: str) -> None:
    if by not in _TOP:
        raise SettingsError(
            f"`select_top(by={by!r})` is unknown: ifd, r_ifd, coherence, a loss column, longest, random."
        )


def check_settings(
    rule: str, ifd_gate: float | None, r_ifd_gate: float | None, keep: str | None, seed: int
) -> dict[str, Any]:
    """The settings of a choice as plain numbers; a SettingsError where one cannot be used."""
    check_rule(rule, keep)
    _check_number("seed", seed, Integral)
    gates = {"ifd_gate": ifd_gate, "r_ifd_gate": r_ifd_gate}
    for name, gate in gates.items():
        if gate is not None:
            _check_number(name, gate)
    numbers = {name: None if gate is None else float(gate) for name, gate in gates.items()}
    return {**numbers, "keep": keep, "seed": int(seed)}


def check_versions(dataset: Dataset) -> None:
    """Raise a DataError unless each version is there once, under a known name."""
    read_versions(dataset, set())


def check_rule(rule: str, keep: str | None) -> None:
    """Raise a SettingsError unless both are known."""
    if rule not in RULES:
        raise SettingsError(f"The rule {rule!r} is unknown; there are {', '.join(RULES)}.")
    if keep not in ("reflected", None):
        raise SettingsError(f'`keep` is "reflected" or None, not {keep!r}.')


def check_schedule(schedule: str) -> None:
    """Raise a SettingsError unless it is known."""
    if schedule not in ("once", "epoch"):
        raise SettingsError(f'`schedule` is "once" or "epoch", not {schedule!r}.')


def _check_number(name: str, value: Any, kind: type = Real) -> None:
    """Raise a SettingsError also for True, which Python takes for 1, and NaN, which nothing is below."""
    if not isinstance(value, kind) or isinstance(value, bool) or value != value:
        raise SettingsError(f"`{name}` is a {'whole ' * (kind is Integral)}number, not {value!r}.")


def _choose(
    dataset: Dataset, rule: str, ifd_gate: float | None, r_ifd_gate: float | None, keep: str | None, seed: int
) -> _Choice:
    """The winner of every row, and whether it passes the filter and the gates."""
    settings = check_settings(rule, ifd_gate, r_ifd_gate, keep, seed)
    chosen, gates = RULES[rule], {}
    for name in ("ifd", "r_ifd"):
        if chosen.gated and name in dataset.column_names and settings[f"{name}_gate"] is not None:
            gates[name] = settings[f"{name}_gate"]
    require_columns(dataset.column_names, ("row_id", "variant"), "`select`")
    require_columns(dataset.column_names, chosen.needs, f"The rule {rule!r}", _hint(chosen))
    # of the texts it is enough to know which are there, and how long they are
    scores = {TEXT_LENGTH if name == "response" else name for name in (*chosen.needs, *gates)}
    versions = read_versions(dataset, scores)
    winner, stages = winners(chosen, versions, int(seed))

    some = f" among {', '.join(chosen.order)}" if chosen.order and len(chosen.order) < len(VARIANTS) else ""
    reasons = [("", ""), (f"no usable version{some}", "")]
    outcome = np.where(winner < 0, 1, 0)
    if chosen.filtered and keep == "reflected":
        outcome[(outcome == 0) & (versions.variant[winner] < RESPONSE)] = len(reasons)
        reasons.append(("response not reflected", ""))
    for name, gate in gates.items():
        outcome[(outcome == 0) & ~(versions.scores[name][winner] < gate)] = len(reasons)  # as NaN is not
        reasons.append((f"{name} not below {gate:g}", name))
    return _Choice(versions, stages, winner, outcome, reasons)


def _kept(
    dataset: Dataset, rule: str, ifd_gate: float | None, r_ifd_gate: float | None, keep: str | None, seed: int
) -> np.ndarray:
    """The kept winners' places in row order; a DataError where there are none."""
    versions, _, winner, outcome, reasons = _choose(dataset, rule, ifd_gate, r_ifd_gate, keep, seed)
    if len(kept := versions.place[winner[outcome == 0]]):
        return np.sort(kept)
    if not len(dataset):
        raise DataError("`select` found no rows. Give it a table that has some.")
    counts = np.bincount(outcome, minlength=len(reasons))
    found = "; ".join(f"{counts[n]} {reasons[n][0]}" for n in np.argsort(-counts, kind="stable") if counts[n])
    usable = versions.place[:-1]
    names = [name for name in ("ifd", "r_ifd") if name in dataset.column_names]
    spread = "; ".join(f"{name}: {_spread(read_numbers(dataset, name)[usable])}" for name in names)
    raise DataError(
        f"The rule {rule!r} with ifd_gate={ifd_gate}, r_ifd_gate={r_ifd_gate}, keep={keep!r} keeps none of "
        f"{len(winner)} rows: {found}.\nOf {len(usable)} usable versions {spread or 'no scores are known'}.\n"
        + " ".join(_advice(reasons[n][0] for n in np.argsort(-counts, kind="stable") if counts[n]))
    )


def _advice(reasons: Iterable[str]) -> list[str]:
    """What to change, by why rows are dropped."""
    said: dict[str, None] = {}  # in order, once each
    for reason in reasons:
        if "not below" in reason:
            text = "Raise the gates or set them to null (an untuned small student has both above 1 on most rows)."
        elif reason == "response not reflected":
            text = "`keep: null` also keeps winners whose response was not rewritten."
        else:
            text = "Look at the column `error`: it says why versions cannot be used."
        said[text] = None
    return list(said)


def _spread(values: np.ndarray) -> str:
    """The quantiles of a score, for a person who looks for a gate. Some value's own: infinities have no mean."""
    scored = np.sort(values[~np.isnan(values)])
    shown = [f"{name} {scored[round(q * (len(scored) - 1))]:.3f}" for name, q in _QUANTILES.items() if len(scored)]
    return ", ".join([*shown, f"{len(values) - len(scored)} null"])


def _whys(choice: _Choice, rule: Rule) -> Iterator[str]:
    """Why the winner of each row won."""
    if rule.stages is not None:
        for parts in zip(*(_told(choice.versions, stage) for stage in choice.stages), strict=True):
            yield "; ".join(part for part in parts if part)
        return
    reason = f"the first usable of {', '.join(rule.order or ())}"
    if rule.among_all is not None:
        column, sign = rule.among_all
        reason = f"the {'highest' if sign > 0 else 'lowest'} {column}"
    for variant in choice.versions.variant[choice.winner].tolist():
        yield f"{VARIANTS[variant]}: {reason}"


def _told(versions: Versions, stage: Stage) -> Iterator[str]:
    """How the duel of each row went."""
    sides = stage.defender, stage.challenger
    scores = versions.scores.get(stage.column, np.zeros(len(versions.place)))
    columns = [column for side in sides for column in (side, versions.variant[side], scores[side])]
    columns.append(stage.winner == stage.challenger)
    for old, old_variant, old_score, new, new_variant, new_score, wins in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        if old < 0 or new < 0:
            yield "" if old == new else f"{VARIANTS[new_variant if old < 0 else old_variant]} stood alone"
        elif stage.column == COIN:
            yield f"a coin chose {VARIANTS[new_variant]}" if wins else f"a coin kept {VARIANTS[old_variant]}"
        else:
            verdict = f"{VARIANTS[new_variant]} {'taken' if wins else 'not taken'}"
            yield f"{stage.column} {_shown(old_score)} → {_shown(new_score)}: {verdict}"


def _shown(score: float) -> str:
    return "null" if score != score else f"{score:.4f}"


def _hint(rule: Rule) -> str:
    if "coherence" in rule.needs:
        return "Add it, the cosine of a sentence embedding of instruction and response."
    if "response" in rule.needs:
        return ""
    return "Score the table first: `StudentScorer(model, tokenizer).score(dataset)`."

"""Which version of each pair to train on: two stages, as in V2 Eq. 6 and 9, then a filter."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from datasets import Dataset

from .columns import LOSS_COLUMNS, is_usable, require_columns
from .errors import DataError, SettingsError

VARIANTS = ("original", "instruction", "response", "instruction+response")
_TEXT_LENGTH = "length of response"  # a column that is computed, characters


@dataclass(frozen=True)
class Rule:
    """How versions compete. `stages` name (column, +1 higher or -1 lower is better) for instruction and response."""

    stages: tuple[tuple[str, int], tuple[str, int]] | None = None
    order: tuple[str, ...] | None = None  # plain rules: the first usable of these variants
    among_all: tuple[str, int] | None = None  # all usable versions compete at once
    filtered: bool = False
    gated: bool = False
    needs: tuple[str, ...] = ()


def _staged(first: tuple[str, int], second: tuple[str, int]) -> Rule:
    return Rule(stages=(first, second), filtered=True, gated=True, needs=tuple(dict.fromkeys((first[0], second[0]))))


# the sign of the sort key of `select_top`
_BEST_FIRST = {"ifd": -1, "coherence": -1, "r_ifd": +1, **dict.fromkeys(LOSS_COLUMNS, +1)}
_HIGH_IFD, _LOW_R_IFD = ("ifd", +1), ("r_ifd", -1)
_HIGH_COHERENCE, _LOW_LOSS = ("coherence", +1), ("loss_response_given_instruction", -1)
RULES = {
    "paper": _staged(_HIGH_IFD, _LOW_R_IFD),
    "ifd": _staged(_HIGH_IFD, _HIGH_IFD),
    "r_ifd": _staged(_LOW_R_IFD, _LOW_R_IFD),
    "coherence": _staged(_HIGH_COHERENCE, _HIGH_COHERENCE),
    "perplexity": _staged(_LOW_LOSS, _LOW_LOSS),
    "random": Rule(stages=(("coin", +1), ("coin", +1)), filtered=True),
    "instruction": Rule(order=("instruction", "original")),
    "response": Rule(order=("response", "original")),
    "reflected": Rule(order=("instruction+response", "instruction", "response", "original")),
    "original": Rule(order=("original",)),
    "longest": Rule(among_all=(_TEXT_LENGTH, +1)),
    "fit": Rule(among_all=_LOW_LOSS, needs=(_LOW_LOSS[0],)),
}


class Decision(NamedTuple):
    """What became of one source row."""

    row_id: str
    position: int | None  # the winner's place in the table; None where the row has no usable version
    kept: bool
    why: str  # why this version won, or why the row was dropped


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
        SettingsError: an unknown rule or `keep`.
        DataError: a column is missing; nothing is left (with the numbers).

    Source: arXiv 2402.10110, Eq. 6 and 9; the gates are those of the published script.
    """
    return dataset.select(kept_positions(dataset, rule, ifd_gate, r_ifd_gate, keep, seed))


def kept_positions(
    dataset: Dataset, rule: str, ifd_gate: float | None, r_ifd_gate: float | None, keep: str | None, seed: int
) -> list[int]:
    """The kept winners' places in row order; as `select`, which takes these rows."""
    decisions = decide(dataset, rule, ifd_gate, r_ifd_gate, keep, seed)
    positions = sorted(decision.position for decision in decisions if decision.kept and decision.position is not None)
    if positions:
        return positions
    reasons: dict[str, int] = {}
    for decision in decisions:
        reason = decision.why.split(":")[0]
        reasons[reason] = reasons.get(reason, 0) + 1
    counts = "; ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    ranges = ""
    for name in ("ifd", "r_ifd"):
        if name in dataset.column_names and (
            values := sorted(v for v in dataset.with_format(None)[name] if v is not None)
        ):
            ranges += (
                f" {name} lies between {values[0]:.2f} and {values[-1]:.2f}, median {values[len(values) // 2]:.2f}."
            )
    raise DataError(
        f"The rule {rule!r} with ifd_gate={ifd_gate}, r_ifd_gate={r_ifd_gate}, keep={keep!r} keeps none of "
        f"{len(decisions)} rows: {counts}.{ranges}\nRaise the gates or set them to null (an untuned small student has "
        "both above 1 on most rows), or keep unreflected winners too with `keep: null`."
    )


def decide(
    dataset: Dataset,
    rule: str = "paper",
    ifd_gate: float | None = 1.0,
    r_ifd_gate: float | None = 1.0,
    keep: str | None = "reflected",
    seed: int = 0,
) -> list[Decision]:
    """One decision for every row_id, in the order of their first versions; arguments as for `select`."""
    check_rule(rule, keep)
    chosen = RULES[rule]
    require_columns(dataset.column_names, ("row_id", "variant"), "`select`")
    require_columns(dataset.column_names, chosen.needs, f"The rule {rule!r}", _score_hint(chosen))
    if rule == "longest":
        require_columns(dataset.column_names, ("response",), "The rule 'longest'")
    gates = {"ifd": ifd_gate, "r_ifd": r_ifd_gate} if chosen.gated else {}
    gates = {name: gate for name, gate in gates.items() if gate is not None and name in dataset.column_names}

    decisions = []
    for row_id, versions in _rows(dataset, {*chosen.needs, *gates}):
        winner, why = _winner(chosen, versions, row_id, seed)
        if winner is None:
            decisions.append(Decision(row_id, None, False, "no usable version"))
            continue
        dropped = None
        if chosen.filtered and keep == "reflected" and not winner["variant"].endswith("response"):
            dropped = f"response not reflected: {winner['variant']} won; {why}"
        for name, gate in gates.items():
            value = winner[name]
            if dropped is None and not (value is not None and value < gate):
                shown = "null" if value is None else f"{value:.4f}"
                dropped = f"{name} not below {gate:g}: {winner['variant']} won with {name} {shown}; {why}"
        decisions.append(Decision(row_id, winner["index"], dropped is None, dropped or why))
    return decisions


def select_top(
    dataset: Dataset, share: float | None = None, count: int | None = None, by: str = "ifd", seed: int = 0
) -> Dataset:
    """The fewer-data scenario: the best share, or number, of rows by one score; in the input's row order.

    In:  row_id and the column `by` ("longest" needs response)       (N rows)
    Out: the same columns     (`count`, or `round(share × N)`, at least 1)

    Highest first: ifd, coherence, longest (characters of the response); lowest first: r_ifd and the losses; "random":
    by a hash of (seed, row_id). Nulls last, ties by row_id.

    Raises:
        SettingsError: not exactly one of share (0 to 1) and count (1 to N); an unknown `by`.
        DataError: the column is missing.

    Source: arXiv 2402.10110, section 4.4.
    """
    if (share is None) == (count is None):
        raise SettingsError("`select_top` takes either `share` or `count`.")
    total = len(dataset)
    if share is not None and not 0 < share <= 1 or count is not None and not 1 <= count <= total:
        raise SettingsError(f"`select_top` needs 0 < share <= 1 or 1 <= count <= {total}; got {share=}, {count=}.")
    require_columns(dataset.column_names, ("row_id",), "`select_top`")
    columns = dataset.with_format(None)
    ids = columns["row_id"][:]
    if by == "random":
        values: list[Any] = [_hash(seed, row_id) for row_id in ids]
        sign = +1
    elif by == "longest":
        require_columns(dataset.column_names, ("response",), "`select_top(by='longest')`")
        values, sign = [None if text is None else len(text) for text in columns["response"]], -1
    elif by in _BEST_FIRST:
        require_columns(dataset.column_names, (by,), f"`select_top(by={by!r})`", "Score the table first.")
        values, sign = [_number(value) for value in columns[by]], _BEST_FIRST[by]
    else:
        raise SettingsError(
            f"`select_top(by={by!r})` is unknown: ifd, r_ifd, coherence, a loss column, longest, random."
        )
    ranked = sorted(
        range(total), key=lambda i: (values[i] is None, 0 if values[i] is None else sign * values[i], ids[i])
    )
    if share is not None:
        count = max(round(share * total), 1)
    return dataset.select(sorted(ranked[:count]))


def check_rule(rule: str, keep: str | None) -> None:
    """Raise a SettingsError unless both are known."""
    if rule not in RULES:
        raise SettingsError(f"The rule {rule!r} is unknown; there are {', '.join(RULES)}.")
    if keep not in ("reflected", None):
        raise SettingsError(f'`keep` is "reflected" or None, not {keep!r}.')


def _score_hint(rule: Rule) -> str:
    if "coherence" in rule.needs:
        return "Add it, the cosine of a sentence embedding of instruction and response."
    return "Score the table first: `StudentScorer(model, tokenizer).score(dataset)`."


def _rows(dataset: Dataset, scores: set[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each row_id with its usable versions: index, variant, source, length, the scores asked for."""
    names = {"row_id", "variant", *scores}
    names |= {name for name in ("source", "instruction", "response") if name in dataset.column_names}
    versions: dict[str, list[dict[str, Any]]] = {}
    index = 0
    for batch in dataset.select_columns(sorted(names)).with_format("arrow").iter(10_000):
        for version in batch.to_pylist():
            rows = versions.setdefault(version["row_id"], [])
            # a table without its texts holds what was scored: usable, all of it
            if "response" not in version or is_usable(version.get("instruction", ""), version["response"]):
                version["index"] = index
                version.update({name: _number(version[name]) for name in scores})
                version[_TEXT_LENGTH] = len(version.pop("response", None) or "")
                version.pop("instruction", None)
                version.setdefault("source", "")
                if version["variant"] not in VARIANTS:
                    raise DataError(
                        f"Row {version['row_id']!r} has the variant {version['variant']!r}; there are "
                        f"{', '.join(VARIANTS)}."
                    )
                rows.append(version)
            index += 1
    yield from versions.items()


def _winner(rule: Rule, versions: list[dict[str, Any]], row_id: str, seed: int) -> tuple[dict[str, Any] | None, str]:
    by_variant: dict[str, list[dict[str, Any]]] = {}
    ordered = sorted(versions, key=lambda version: (VARIANTS.index(version["variant"]), version["source"]))
    for variant, some in groupby(ordered, key=lambda version: version["variant"]):
        by_variant[variant] = list(some)
    if not by_variant:
        return None, ""

    if rule.order is not None:
        variant = next((variant for variant in rule.order if variant in by_variant), None)
        if variant is None:
            return None, ""
        return by_variant[variant][0], f"{variant}: the first usable of {', '.join(rule.order)}"

    if rule.among_all is not None:
        column, sign = rule.among_all
        best = ordered[0]
        for version in ordered[1:]:
            if _better(version, best, column, sign):
                best = version
        return best, f"{best['variant']}: the {'highest' if sign > 0 else 'lowest'} {column}"

    assert rule.stages is not None
    first, why_first = _stage(
        by_variant.get("original", []), by_variant.get("instruction", []), rule.stages[0], (row_id, seed, 1)
    )
    if first is None or first["variant"] == "original":
        challengers = by_variant.get("response", []) or (
            by_variant.get("instruction+response", []) if not first else []
        )
    else:
        challengers = [v for v in by_variant.get("instruction+response", []) if v["source"] == first["source"]]
    second, why_second = _stage([first] if first else [], challengers, rule.stages[1], (row_id, seed, 2))
    return second, "; ".join(part for part in (why_first, why_second) if part)


def _stage(
    defenders: list[dict[str, Any]],
    challengers: list[dict[str, Any]],
    criterion: tuple[str, int],
    coin: tuple[str, int, int],
) -> tuple[dict[str, Any] | None, str]:
    """A challenger wins only if strictly better; of several the best plays; null never wins; who is alone is taken."""
    column, sign = criterion
    if not challengers:
        return (defenders[0], f"{defenders[0]['variant']} stood alone") if defenders else (None, "")
    if column == "coin":
        row_id, seed, stage = coin
        challenger = challengers[_hash(seed, row_id, stage, "which") % len(challengers)]
        if not defenders:
            return challenger, f"{challenger['variant']} stood alone"
        heads = _hash(seed, row_id, stage) % 2 == 1
        return (
            (challenger, f"a coin chose {challenger['variant']}")
            if heads
            else (
                defenders[0],
                f"a coin kept {defenders[0]['variant']}",
            )
        )
    challenger = challengers[0]
    for other in challengers[1:]:
        if _better(other, challenger, column, sign):
            challenger = other
    if not defenders:
        return challenger, f"{challenger['variant']} stood alone"
    defender = defenders[0]
    wins = _better(challenger, defender, column, sign)
    shown = [("null" if version[column] is None else f"{version[column]:.4f}") for version in (defender, challenger)]
    verdict = "taken" if wins else "not taken"
    return challenger if wins else defender, f"{column} {shown[0]} → {shown[1]}: {challenger['variant']} {verdict}"


def _better(one: dict[str, Any], other: dict[str, Any], column: str, sign: int) -> bool:
    """Whether `one` is strictly better; null is never better, and anything is better than null."""
    a, b = one[column], other[column]
    return a is not None and (b is None or sign * a > sign * b)


def _number(value: float | None) -> float | None:
    """NaN, which another tool may have written, is no score: null."""
    return None if value is None or value != value else value


def _hash(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")

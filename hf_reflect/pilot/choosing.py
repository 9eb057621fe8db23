"""What choosing by the student's scores brings, and whether chance brings as much."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from ..selection import RULES
from ..selection.rules import RESPONSE, winners
from ..selection.versions import Versions, read_versions
from .chance import interval, ratio, samples

DEALS = 500  # times that the scores are dealt anew
COINS = 20  # seeds of the random control: where each of them keeps a row, all count
ENOUGH = 10  # kept rows, below which no mean is compared
SCORES = {"ifd": "IFD", "r_ifd": "r-IFD"}
COMPARED = {
    "control": "paper's rule against a coin",
    "originals": "paper's rule against originals",
    "by_the_teacher": "a coin's new versions against originals",
}


class Shift(NamedTuple):
    """How far two means lie apart, and how far they would by chance."""

    rows: int  # source rows that have a part in the first mean
    mean: float
    against: float
    value: float  # their difference
    interval: tuple[float, float]  # 95 %, over source rows
    by_chance: tuple[float, float]  # 95 % of what comes out where a row's scores are dealt among its versions
    distinguishable: bool


class _Sums(NamedTuple):
    """Of one comparison the sums of each source row, (rows,): numerators and denominators of both means."""

    over: np.ndarray
    under: np.ndarray
    other_over: np.ndarray
    other_under: np.ndarray

    def means(self, weights: np.ndarray) -> tuple[Any, Any]:
        """Both, for each line of weights."""
        sums = [weights @ each for each in self]
        return ratio(sums[0], sums[1]), ratio(sums[2], sums[3])


def shifts(
    table: Dataset, ifd_gate: float | None, r_ifd_gate: float | None, keep: str | None = "reflected", seed: int = 0
) -> dict[str, Any]:
    """What choosing by the student's scores does to the mean IFD and r-IFD of what is trained on.

    In:  row_id, variant, instruction, response, ifd, r_ifd, optionally source; one teacher's table
    Out: gated (whether the gates were on), kept (rows of the paper's rule), and for `ifd` and `r_ifd` each a Shift as
         dict, or None, of
             control         what the paper's rule keeps, against what the rule "random" keeps
             originals       what the paper's rule keeps, against the originals of the same rows
             by_the_teacher  the rewrites that "random" takes, without gates, against the originals of the same rows

    "random" is that of `COINS` seeds together, and passes the same filter and gates: gates on one side alone would
    shift its mean by themselves. Where fewer than `ENOUGH` rows pass the gates, all is compared without them.

    The rule chooses by the very numbers that are compared: of two r-IFDs it takes the lower one, and ends with a lower
    mean though they were noise. So each row's scores are also dealt among its versions, `DEALS` times, and the same is
    computed: a shift is distinguishable only if its interval excludes 0 and it lies beyond the middle 95 % of those,
    further from 0. By the teacher nothing is chosen by a score, so this is the number to compare teachers by.
    """
    versions = read_versions(table, SCORES)
    coins = [winners(RULES["random"], versions, seed + number)[0] for number in range(COINS)]

    def compared(scores: dict[str, np.ndarray], gates: dict[str, float]) -> dict[tuple[str, str], _Sums]:
        now = versions._replace(scores=scores)
        paper = _part(now, [winners(RULES["paper"], now, seed)[0]], gates, keep)
        coin, new = _part(now, coins, gates, keep), _part(now, coins, {}, "reflected")
        found = {}
        for name in SCORES:
            found[name, "control"] = _Sums(*paper[name][:2], *coin[name][:2])
            for what, side in (("originals", paper), ("by_the_teacher", new)):
                over, under, original = side[name]
                known = ~np.isnan(original)
                found[name, what] = _Sums(over * known, under * known, np.nan_to_num(original) * under, under * known)
        return found

    asked_for = {"ifd": ifd_gate, "r_ifd": r_ifd_gate}
    gates = {name: gate for name, gate in asked_for.items() if gate is not None}
    observed = compared(versions.scores, gates)
    if gates and np.count_nonzero(observed["ifd", "control"].under) < ENOUGH:
        gates, observed = {}, compared(versions.scores, {})
    rows = len(versions.ids)
    once, weights = np.ones((1, rows)), samples(rows, seed)
    dealt: dict[tuple[str, str], list[float]] = {each: [] for each in observed}
    rng = np.random.default_rng(seed)
    for _ in range(DEALS):
        order = np.append(np.lexsort((rng.random(len(versions.row)), versions.row)), -1)  # within each row
        scores = {name: some[order] for name, some in versions.scores.items()}
        for each, sums in compared(scores, gates).items():
            mean, other = sums.means(once)
            dealt[each].append((mean - other)[0])
    result: dict[str, Any] = {"gated": bool(gates), "kept": int(np.count_nonzero(observed["ifd", "control"].under))}
    for name in SCORES:
        result[name] = {}
        for what in COMPARED:
            sums = observed[name, what]
            enough = min(np.count_nonzero(sums.under), np.count_nonzero(sums.other_under)) >= ENOUGH
            by_chance = interval(np.array(dealt[name, what]))
            result[name][what] = _shift(sums, once, weights, by_chance)._asdict() if enough else None
    return result


def _part(
    versions: Versions, chosen: Sequence[np.ndarray], gates: Mapping[str, float], keep: str | None
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each score and row: the sum over what was kept of it, how often that was, and its original's score."""
    winner = np.stack(chosen)  # (choices, rows)
    kept = winner >= 0
    if keep == "reflected":
        kept &= versions.variant[winner] >= RESPONSE
    for name, gate in gates.items():
        kept &= versions.scores[name][winner] < gate
    found = {}
    for name in SCORES:
        score = versions.scores[name][winner]
        counts = kept & ~np.isnan(score)
        original = versions.scores[name][versions.first[:, 0]]
        found[name] = np.where(counts, score, 0.0).sum(axis=0), counts.sum(axis=0).astype(float), original
    return found


def _shift(sums: _Sums, once: np.ndarray, weights: np.ndarray, by_chance: tuple[float, float]) -> Shift:
    (mean,), (against,) = sums.means(once)
    drawn, drawn_against = sums.means(weights)
    low, high = interval(drawn - drawn_against)
    value = float(mean - against)
    beyond = value > max(by_chance[1], 0.0) if value > 0 else value < min(by_chance[0], 0.0)
    excludes = low > 0 or high < 0
    rows = int(np.count_nonzero(sums.under))
    return Shift(rows, float(mean), float(against), value, (low, high), by_chance, bool(excludes and beyond))


def in_words(score: str, shift: Mapping[str, Any] | None) -> str:
    """Whether a shift is more than chance, as a plain sentence.

    Args:
        score: ifd or r_ifd.
        shift: a Shift as dict; None where too few rows were kept.
    """
    if shift is None:
        return f"Fewer than {ENOUGH} rows on one side: too few to compare."
    low, high = shift["interval"]
    if not (low > 0 or high < 0):
        return f"The interval includes 0: the shift of {SCORES[score]} is not distinguishable from none."
    if not shift["distinguishable"]:
        return (
            "The interval excludes 0, but scores dealt at random among each row's versions bring as much ("
            f"{' to '.join(f'{end:+.3f}' for end in shift['by_chance'])}): the shift of {SCORES[score]} is not "
            "distinguishable from choosing by noise."
        )
    side = "higher" if shift["value"] > 0 else "lower"
    return (
        f"The interval excludes 0, and chance does not reach so far: {SCORES[score]} is {side} by "
        f"{abs(shift['value']):.3f}."
    )

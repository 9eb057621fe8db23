"""Which training sets differ by more than chance: judged outcomes over questions and training seeds, with intervals.

    outcome   +1 where the reference's answer won, −1 where it lost, 0 tie: (seeds, questions) for each training set
    chance    which questions were asked, and how each training went; both are drawn again by whoever repeats it

The variance of a mean over both is (MS_questions + seed component) / (seeds × questions), an analysis of variance with
two crossed random factors. With the usual three seeds one set alone says next to nothing about the seed component, so
it is pooled over all sets; they share the reference's trainings, and its degrees of freedom are counted accordingly.
In simulations (no true difference, 11 sets, 48 to 1,030 questions, 2 to 5 seeds, seed effects of nothing to 0.2) at
least one set was called different in 0 to 5 % of the experiments, and intervals missed in 1 to 5 %.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError, SettingsError
from ..judge import OUTCOMES

LEVEL = 0.05
_VALUES = {"win": 1.0, "tie": 0.0, "lose": -1.0}
# of one outcome: 0.73 in Table 4's row "Select by Randomness" (81 / 94 / 43), a little more where fewer are ties
OUTCOME_SD = 0.75


class Difference(NamedTuple):
    """How the reference fared against one training set."""

    win: int  # judgements over all seeds
    tie: int
    lose: int
    unparsed: int
    win_rate: float  # (win − lose) / all + 1, of the questions that were parsed with every seed
    interval: tuple[float, float]  # 95 %, over seeds and questions
    p_value: float
    distinguishable: bool  # after Holm's correction for the number of sets


def differences(outcomes: Mapping[str, Sequence[Sequence[str | None]]]) -> dict[str, Difference]:
    """Every training set's difference from the reference.

    Args:
        outcomes: of each set, for each seed, for each question (the same in all): win, tie, lose from the reference's
            side, or None where the judge's reviews could not be read.

    Raises:
        DataError: a set without a question that was parsed with every seed, or sets of different sizes.
        SettingsError: scipy is not installed.
    """
    if not outcomes:
        raise DataError("There is nothing to compare: no training set besides the reference was judged.")
    try:
        from scipy.stats import t
    except ImportError as error:
        raise SettingsError("Intervals need the package scipy: `pip install 'hf_reflect[eval]'`.") from error
    sizes = {name: {len(seed) for seed in seeds} for name, seeds in outcomes.items()}
    seeds_of = {len(seeds) for seeds in outcomes.values()}
    if len(set().union(*sizes.values())) != 1 or len(seeds_of) != 1:
        raise DataError(f"The sets were not judged alike: questions {sizes}, seeds {sorted(seeds_of)}.")
    tables = {name: _values(name, seeds) for name, seeds in outcomes.items()}
    parts = {name: _mean_squares(table) for name, table in tables.items()}
    seeds = seeds_of.pop()
    component, of_seeds, freedom = 0.0, 0.0, 1.0
    if seeds > 1:
        of_seeds = float(np.mean([part.seeds for part in parts.values()]))
        component = max(of_seeds - float(np.mean([part.rest for part in parts.values()])), 0.0)
        # the sets' mean squares are correlated by 1/4: half of each difference is the reference's own seed
        freedom = (seeds - 1) * len(tables) / (1 + (len(tables) - 1) / 4)
    found: dict[str, tuple[float, float, float]] = {}
    for name, table in tables.items():
        part, questions = parts[name], table.shape[1]
        variance = (part.questions + component) / table.size
        inverse = part.questions**2 / max(questions - 1, 1) + (of_seeds**2 / freedom if component else 0.0)
        degrees = (part.questions + component) ** 2 / inverse if inverse else 1.0  # Satterthwaite
        mean, spread = float(table.mean()), float(np.sqrt(variance))
        half = float(t.ppf(1 - LEVEL / 2, degrees)) * spread if spread else 0.0
        # no spread at all, as of one question: nothing can be said
        p_value = float(2 * t.sf(abs(mean) / spread, degrees)) if spread else 1.0
        found[name] = mean, half, p_value
    accepted = _holm({name: p_value for name, (_, _, p_value) in found.items()})
    return {
        name: Difference(
            *_counts(outcomes[name]),
            win_rate=1 + mean,
            interval=(1 + mean - half, 1 + mean + half),
            p_value=p_value,
            distinguishable=accepted[name],
        )
        for name, (mean, half, p_value) in found.items()
    }


class _MeanSquares(NamedTuple):
    seeds: float
    questions: float
    rest: float


def _values(name: str, seeds: Sequence[Sequence[str | None]]) -> np.ndarray:
    """Outcomes as numbers, (seeds, questions); questions that are unparsed with some seed are left out."""
    table = np.array([[np.nan if one is None else _VALUES[one] for one in seed] for seed in seeds])
    table = table[:, ~np.isnan(table).any(axis=0)]
    if not table.shape[1]:
        raise DataError(
            f"No question of the set {name!r} was judged in form with every seed. Take a judge that keeps to the form."
        )
    return table


def _mean_squares(table: np.ndarray) -> _MeanSquares:
    """Of a two-way layout without replication, (seeds, questions)."""
    seeds, questions = table.shape
    by_seed, by_question = table.mean(axis=1), table.mean(axis=0)
    if questions == 1:
        return _MeanSquares(0.0, 0.0, 0.0)
    if seeds == 1:
        return _MeanSquares(0.0, float(table.var(ddof=1)), 0.0)
    rest = table - by_seed[:, None] - by_question[None] + table.mean()
    return _MeanSquares(
        float(questions * by_seed.var(ddof=1)),
        float(seeds * by_question.var(ddof=1)),
        float((rest**2).sum() / ((seeds - 1) * (questions - 1))),
    )


def _counts(seeds: Sequence[Sequence[str | None]]) -> tuple[int, int, int, int]:
    counts = Counter(one for seed in seeds for one in seed)
    win, tie, lose = (counts[name] for name in OUTCOMES)
    return win, tie, lose, counts[None]


def _holm(p_values: dict[str, float]) -> dict[str, bool]:
    """Whose p-values stand after Holm's step-down correction."""
    accepted, standing = {}, True
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        standing = standing and p_values[name] <= LEVEL / (len(p_values) - rank)
        accepted[name] = standing
    return accepted


def detectable(questions: int, seeds: int, comparisons: int) -> tuple[float, float]:
    """How far from 1 a win rate must truly be, to be told from it with 80 % probability: at best, and at worst.

    At best each seed's outcome on a question is a new draw; at worst all seeds agree on it, and more of them tell
    nothing. Both leave out that trainings differ as a whole, and correct for the number of comparisons.
    """
    for name, value in (("questions", questions), ("seeds", seeds), ("comparisons", comparisons)):
        if value < 1:
            raise SettingsError(f"`{name}` must be 1 or more, not {value}.")
    normal = NormalDist()
    factor = (normal.inv_cdf(1 - LEVEL / (2 * comparisons)) + normal.inv_cdf(0.8)) * OUTCOME_SD
    return factor / (questions * seeds) ** 0.5, factor / questions**0.5


def as_table(found: Mapping[str, Difference], reference: str, more: Mapping[str, Mapping[str, Any]] = {}) -> str:
    """The paper's Table 4 with intervals, in Markdown; `more` are further columns, by set.

    `differs` says whether the difference is distinguishable from zero after the correction for the number of sets.
    """
    names = list(dict.fromkeys(name for columns in more.values() for name in columns))
    unparsed = any(each.unparsed for each in found.values())
    head = [f"`{reference}` against", *names, "win", "tie", "lose", *(["unparsed"] if unparsed else [])]
    head += ["rate", "95 % interval", "differs"]
    rows: list[list[Any]] = [head]
    for name, each in found.items():
        counts = [each.win, each.tie, each.lose, *([each.unparsed] if unparsed else [])]
        low, high = each.interval
        further = [more.get(name, {}).get(column, "") for column in names]
        verdict = "yes" if each.distinguishable else "no"
        rows.append([name, *further, *counts, f"{each.win_rate:.3f}", f"{low:.3f} to {high:.3f}", verdict])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table that is also one on a terminal: first the head; columns of numbers stand to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(3, *(len(row[n]) for row in texts)) for n in range(len(texts[0]))]
    right = [n > 0 and all(row[n][:1].isdigit() for row in texts[1:]) for n in range(len(widths))]
    rule = [
        "-" * (width - 1) + ":" if is_number else "-" * width for width, is_number in zip(widths, right, strict=True)
    ]

    def line(cells: Sequence[str]) -> str:
        placed = zip(cells, widths, right, strict=True)
        return "| " + " | ".join(c.rjust(w) if is_number else c.ljust(w) for c, w, is_number in placed) + " |"

    return "\n".join(line(row) for row in [texts[0], rule, *texts[1:]])


def in_words(found: Mapping[str, Difference], reference: str, seeds: int) -> str:
    """Which differences are distinguishable from zero, as a plain sentence or two."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "not": []}
    for name, each in found.items():
        side = "not" if not each.distinguishable else "better" if each.win_rate > 1 else "worse"
        groups[side].append(name)
    said = [
        f"`{reference}` is {side} than {', '.join(groups[side])}: the difference is distinguishable from zero."
        for side in ("better", "worse")
        if groups[side]
    ]
    if groups["not"]:
        all_of = "all of them: " if not said else ""
        said.append(f"not distinguishable from `{reference}`: {all_of}{', '.join(groups['not'])}.")
        said[-1] = said[-1][0].upper() + said[-1][1:]
    count = len(found)
    said.append(f"(5 % chance of one false alarm or more among {count} comparison{'s' * (count > 1)}, by Holm.)")
    if seeds == 1:
        said.append(
            "One seed: this compares two trained models, not two training sets; another seed may turn it round."
        )
    return "\n".join(said)

"""Which training sets differ by more than chance: judged outcomes over questions and training seeds, with intervals.

    outcome   +1 where the reference's answer won, −1 where it lost, 0 tie: (seeds, questions) for each training set
    chance    which questions were asked, and how each training went; both are drawn again by whoever repeats it

The variance of a mean over both is (MS_questions + seed component) / (seeds × questions), an analysis of variance with
two crossed random factors. With the usual three seeds one set alone says next to nothing about the seed component, so
it is pooled over all sets, per question; they share the reference's trainings, and its degrees of freedom are counted
accordingly. Where a set's own component is larger, the excess is added, with the set's own degrees of freedom.

Simulated without a true difference (an answer wins where its quality is higher by 0.5, with noise of a standard
deviation of 1 beside these effects): `alarm`, at least one set was called different, and `missed`, 95 % intervals
without the truth, in % of 120 to 2,000 experiments each.

    sets  questions    seeds   seed effect                               alarm    missed
    11    48 to 1,030  2 to 5  0 to 0.2                                  0 to 6   0 to 5
    11    1,030        3       0 to 0.2, in 9 sets 60 % unparsed         1 to 2   2; of the others 0 to 1
    11    80 to 1,030  2 to 5  of one set 0.15 to 0.5, else 0 or 0.1     2 to 5   1 to 2; of that set 8 to 14
    3     80           2, 3    of one set 0.5, else 0                    6        4; of that set 12 to 13
    11    218, 1,030   3       of the reference 0.3, else 0              4 to 5   10 to 12
    1     80 to 1,030  3       0 to 0.3 (question effects of 0 or 0.6)   1 to 7   as often
    1     80 to 1,030  2       0 to 0.3 (question effects of 0 or 0.6)   0 to 11  as often

So the intervals of a set or a reference that is much noisier than the rest miss two to three times as often as they
say, and one comparison with two seeds raises up to 11 % false alarms: more seeds help there, arithmetic does not.
"""

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError, SettingsError

LEVEL = 0.05
_VALUES = {"win": 1.0, "tie": 0.0, "lose": -1.0}
# of one outcome: 0.73 in Table 4's row "Select by Randomness" (81 / 94 / 43), a little more where fewer are ties
OUTCOME_SD = 0.75


class Difference(NamedTuple):
    """How the reference fared against one training set."""

    win: int  # judgements over all seeds, of the questions that were parsed with every seed
    tie: int
    lose: int
    unparsed: int  # judgements left out: of questions that were not
    win_rate: float  # (win − lose) / (win + tie + lose) + 1
    interval: tuple[float, float]  # 95 %, over seeds and questions, within 0 to 2
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
    t = _t()
    sizes = {name: {len(seed) for seed in seeds} for name, seeds in outcomes.items()}
    seeds_of = {len(seeds) for seeds in outcomes.values()}
    if len(set().union(*sizes.values())) != 1 or len(seeds_of) != 1:
        raise DataError(f"The sets were not judged alike: questions {sizes}, seeds {sorted(seeds_of)}.")
    tables = {name: _values(name, seeds) for name, seeds in outcomes.items()}
    seeds = seeds_of.pop()
    parts = {name: _mean_squares(table) for name, table in tables.items()}
    # per question, since a mean square of seeds grows with the questions, and sets may have lost different numbers
    questions_of = [table.shape[1] for table in tables.values()]
    of_seeds = sum(part.seeds for part in parts.values()) / sum(questions_of)
    of_rest = sum(part.rest for part in parts.values()) / sum(questions_of)
    pooled = max(of_seeds - of_rest, 0.0)
    # few seeds that agree by luck do not prove that there is nothing to estimate; without any effect it is of_rest
    of_seeds = max(of_seeds, of_rest / 2)
    freedom = _freedom(seeds, questions_of)
    found: dict[str, tuple[float, tuple[float, float], float]] = {}
    for name, table in tables.items():
        part, questions = parts[name], table.shape[1]
        # a set whose trainings differ more than the others' keeps its own component: an estimate of few seeds
        excess = max((part.seeds - part.rest) / questions - pooled, 0.0)
        component = questions * (pooled + excess)
        inverse = part.questions**2 / max(questions - 1, 1) + (questions * of_seeds) ** 2 / freedom
        inverse += (questions * excess) ** 2 / max(seeds - 1, 1)
        degrees = (part.questions + component) ** 2 / inverse if inverse else 1.0  # Satterthwaite
        mean, spread = float(table.mean()), float(np.sqrt((part.questions + component) / table.size))
        half = float(t.ppf(1 - LEVEL / 2, degrees)) * spread if spread else 0.0
        if questions < 3 or table.min() == table.max():
            # rule of three: an outcome that was never seen has a probability of 3 / questions at most
            half = max(half, (6 if mean else 3) / questions)
        p_value = float(2 * t.sf(abs(mean) / spread, degrees)) if spread else float(not mean)
        # no exact sign test of so many questions can give less; it is that of unanimous ones
        p_value = max(p_value, 2.0 ** (1 - questions))
        found[name] = mean, (max(1 + mean - half, 0.0), min(1 + mean + half, 2.0)), p_value
    accepted = _holm({name: p_value for name, (_, _, p_value) in found.items()})
    return {
        name: Difference(
            win=int((tables[name] == _VALUES["win"]).sum()),
            tie=int((tables[name] == _VALUES["tie"]).sum()),
            lose=int((tables[name] == _VALUES["lose"]).sum()),
            unparsed=sum(map(len, outcomes[name])) - tables[name].size,
            win_rate=1 + mean,
            interval=interval,
            p_value=p_value,
            distinguishable=accepted[name],
        )
        for name, (mean, interval, p_value) in found.items()
    }


def _t() -> Any:
    try:
        from scipy.stats import t
    except ImportError as error:
        raise SettingsError("Intervals need the package scipy: `pip install 'hf_reflect[eval]'`.") from error
    return t


def _freedom(seeds: int, sizes: Sequence[int]) -> float:
    """Degrees of freedom of the pooled seed component, where sets count by their sizes; 1 where there is none."""
    count = sum(sizes) ** 2 / sum(size**2 for size in sizes)
    # the sets' mean squares are correlated by 1/4: half of each difference is the reference's own seed
    return max(seeds - 1, 1) * count / (1 + (count - 1) / 4)


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
    if questions == 1:
        return _MeanSquares(0.0, 0.0, 0.0)
    # sums of whole numbers, so that equal ones have a variance of 0 exactly
    of_questions = float(table.sum(axis=0).var(ddof=1) / seeds)
    if seeds == 1:
        return _MeanSquares(0.0, of_questions, 0.0)
    residual = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    rest = float((residual**2).sum() / ((seeds - 1) * (questions - 1)))
    # questions alike in their sums but not in their outcomes, as of three: the rest estimates no more than the same
    return _MeanSquares(float(table.sum(axis=1).var(ddof=1) / questions), of_questions or rest, rest)


def _holm(p_values: dict[str, float]) -> dict[str, bool]:
    """Whose p-values stand after Holm's step-down correction."""
    accepted, standing = {}, True
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        standing = standing and p_values[name] <= LEVEL / (len(p_values) - rank)
        accepted[name] = standing
    return accepted


def detectable(questions: int, seeds: int, comparisons: int) -> tuple[float, float]:
    """How far from 1 a win rate must truly be, to be told from it with 80 % probability: at best, and at worst.

    Either each seed's outcome on a question is a new draw, and the seeds' differences must be estimated from few of
    them; or all seeds agree on every question, and more of them tell nothing. With many sets or seeds the first is
    the better case. Both leave out that trainings differ as a whole, and correct for the number of comparisons.

    Raises:
        SettingsError: a number below 1, or scipy is not installed.
    """
    for name, value in (("questions", questions), ("seeds", seeds), ("comparisons", comparisons)):
        if value < 1:
            raise SettingsError(f"`{name}` must be 1 or more, not {value}.")
    normal = NormalDist()
    unlikely = 1 - LEVEL / (2 * comparisons)
    agreeing = (normal.inv_cdf(unlikely) + normal.inv_cdf(0.8)) * OUTCOME_SD / questions**0.5
    if seeds == 1:
        return agreeing, agreeing
    t, freedom = _t(), _freedom(seeds, [questions] * comparisons)
    new_draws = float(t.ppf(unlikely, freedom) + t.ppf(0.8, freedom)) * OUTCOME_SD / (questions * seeds) ** 0.5
    return min(new_draws, agreeing), max(new_draws, agreeing)


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
    elif _freedom(seeds, [each.win + each.tie + each.lose for each in found.values()]) < 3:
        few = f"{'Two' if seeds == 2 else seeds} seeds with {count} comparison{'s' * (count > 1)}"
        said.append(f"{few} hardly tell anything about other trainings of the same sets; more seeds would.")
    return "\n".join(said)

"""The rules as data, and who wins by them: one comparison of arrays for all rows of a table."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .versions import TEXT_LENGTH, VARIANTS, Versions, hashes

_INSTRUCTION, RESPONSE, _BOTH = (VARIANTS.index(name) for name in VARIANTS[1:])
COIN = "coin"  # stands where a column would
Criterion = tuple[str, int]  # a column, and +1 where higher is better, -1 where lower is


@dataclass(frozen=True)
class Rule:
    """How versions compete: by `stages` for instruction and response, or by an order of variants, or all at once."""

    stages: tuple[Criterion, Criterion] | None = None
    order: tuple[str, ...] | None = None  # plain rules: the first usable of these variants
    among_all: Criterion | None = None  # all usable versions compete at once
    filtered: bool = False
    gated: bool = False
    needs: tuple[str, ...] = ()  # columns, beside row_id and variant


def _staged(first: Criterion, second: Criterion) -> Rule:
    return Rule(stages=(first, second), filtered=True, gated=True, needs=tuple(dict.fromkeys((first[0], second[0]))))


HIGH_IFD, LOW_R_IFD = ("ifd", +1), ("r_ifd", -1)
HIGH_COHERENCE, LOW_LOSS = ("coherence", +1), ("loss_response_given_instruction", -1)
LONGEST = (TEXT_LENGTH, +1)
RULES = {
    "paper": _staged(HIGH_IFD, LOW_R_IFD),
    "ifd": _staged(HIGH_IFD, HIGH_IFD),
    "r_ifd": _staged(LOW_R_IFD, LOW_R_IFD),
    "coherence": _staged(HIGH_COHERENCE, HIGH_COHERENCE),
    "perplexity": _staged(LOW_LOSS, LOW_LOSS),
    "random": Rule(stages=((COIN, +1), (COIN, +1)), filtered=True),
    "instruction": Rule(order=("instruction", "original")),
    "response": Rule(order=("response", "original")),
    "reflected": Rule(order=("instruction+response", "instruction", "response", "original")),
    "original": Rule(order=("original",)),
    "longest": Rule(among_all=LONGEST, needs=("response",)),
    "fit": Rule(among_all=LOW_LOSS, needs=(LOW_LOSS[0],)),
}


class Stage(NamedTuple):
    """One duel in every row: indices of versions, (rows,), -1 for none."""

    column: str
    defender: np.ndarray
    challenger: np.ndarray
    winner: np.ndarray


def winners(rule: Rule, versions: Versions, seed: int) -> tuple[np.ndarray, list[Stage]]:
    """The index of each row's winner, (rows,), -1 where no version is usable; and the stages that led there."""
    if rule.stages is not None:
        stages = _two_stages(rule.stages, versions, seed)
        return stages[-1].winner, stages
    if rule.among_all is not None:
        column, sign = rule.among_all
        return _best(sign * versions.scores[column][:-1], versions.row, len(versions.ids)), []
    winner = np.full(len(versions.ids), -1)
    for variant in reversed(rule.order or ()):
        first = versions.first[:, VARIANTS.index(variant)]
        winner = np.where(first >= 0, first, winner)
    return winner, []


def _two_stages(stages: tuple[Criterion, Criterion], versions: Versions, seed: int) -> list[Stage]:
    """Original against new instruction, then the one that won against the new response to it (V2 Eq. 6 and 9)."""
    challenger = _challengers(stages[0], versions, seed, 1)[:, _INSTRUCTION]
    first = _duel(stages[0], versions, versions.first[:, 0], challenger, seed, 1)
    challengers = _challengers(stages[1], versions, seed, 2)
    to_original = challengers[:, RESPONSE]
    # a new instruction was answered by its own source
    to_new = versions.at(np.arange(len(versions.ids)), _BOTH, versions.key[first.winner] % versions.sources)
    orphan = np.where(to_original >= 0, to_original, challengers[:, _BOTH])  # what it was made from is not usable
    is_new = versions.variant[first.winner] == _INSTRUCTION
    challenger = np.where(is_new, to_new, np.where(first.winner < 0, orphan, to_original))
    return [first, _duel(stages[1], versions, first.winner, challenger, seed, 2)]


def _challengers(criterion: Criterion, versions: Versions, seed: int, stage: int) -> np.ndarray:
    """Of each row and variant the version that plays, (rows, variants): of several sources the best."""
    column, sign = criterion
    if column != COIN:
        best = _best(sign * versions.scores[column][:-1], versions.cell, versions.first.size)
        return best.reshape(versions.first.shape)
    several = np.flatnonzero((versions.counts > 1).any(axis=1))
    drawn = hashes(versions.ids, several, seed, stage, "which")[:, None]
    playing = versions.first.copy()
    playing[several] += (drawn % np.maximum(versions.counts[several], 1).astype(np.uint64)).astype(np.int64)
    return playing


def _duel(
    criterion: Criterion, versions: Versions, defender: np.ndarray, challenger: np.ndarray, seed: int, stage: int
) -> Stage:
    """A challenger wins only if strictly better; null never wins; who is alone is taken."""
    column, sign = criterion
    if column == COIN:
        both = np.flatnonzero((defender >= 0) & (challenger >= 0))
        wins = np.zeros(len(defender), bool)
        wins[both] = hashes(versions.ids, both, seed, stage) % 2 == 1
    else:
        old, new = (sign * versions.scores[column][side] for side in (defender, challenger))
        wins = (new > old) | (np.isnan(old) & ~np.isnan(new))
    return Stage(column, defender, challenger, np.where(wins | (defender < 0), challenger, defender))


def _best(worth: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """The index of each group's best version, (groups,), -1 where it has none. Ties go to the first, NaN loses.

    `group` ascends; worth and group are (versions,).
    """
    best = np.full(groups, -1)
    if len(group):
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        top = np.fmax.reduceat(worth, starts)  # NaN where no version has a score
        top = np.repeat(top, np.diff(starts, append=len(group)))
        leads = np.flatnonzero((worth == top) | np.isnan(top))[::-1]
        best[group[leads]] = leads  # of several the last assignment stays: the first version
    return best

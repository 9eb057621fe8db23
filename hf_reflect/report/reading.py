"""A run's folder as the report needs it: tables, what became of every source row, what training and asking took."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..columns import SCORE_COLUMNS, require_columns
from ..errors import DataError
from ..launch import saved_table
from ..pairs import error_code, keys_of
from ..selection import RULES, VARIANTS, decide
from ..selection.versions import read_numbers, read_rows, read_versions
from .folder import Record, read_record
from .statistics import selected_places

KEPT, UNDECIDED = "kept", "not chosen yet"
NOT_SAVED = "not in selected/"
NO_VERSION = "no usable version"
_MOST_CODES = 30  # a check of the user's may give every version an error of its own
_LONGEST_CODE = 40  # characters
_OTHER = "other"
_NEEDED = ("row_id", "variant", "instruction", "input", "response")


@dataclass
class Reading:
    """All of a run. Arrays are over source rows or over versions, the rows of `candidates`."""

    folder: Path
    record: Record  # what was written down of it
    candidates: Dataset
    selected: Dataset | None
    scores: dict[str, np.ndarray]  # (versions,) of each score that is there
    row: np.ndarray  # (versions,) number of the source row
    variant: np.ndarray  # (versions,) number in VARIANTS
    usable: np.ndarray  # (versions,)
    code: np.ndarray  # (versions,) number in codes, -1 for none
    codes: list[str]
    ids: list[str]  # of the source rows
    original: np.ndarray  # (rows,) place of the original, -1 for none
    winner: np.ndarray  # (rows,) place of the version that won, -1 for none
    outcome: np.ndarray  # (rows,) number in outcomes
    outcomes: list[str]  # KEPT, then why rows are lost
    whys: list[str]  # (rows,) as `decide` says it
    decided: bool  # whether the settings could be applied to the scores
    notes: list[str] = field(default_factory=list)

    @property
    def kept(self) -> np.ndarray:
        """(kept rows,) places of the versions that were kept, or would be."""
        return np.sort(self.winner[self.outcome == self.outcomes.index(KEPT)]) if KEPT in self.outcomes else _NONE

    @property
    def places(self) -> list[np.ndarray]:
        """Of each source row its versions' places, original first, each rewrite by variant and place."""
        order = np.lexsort((np.arange(len(self.row)), self.variant, self.row))
        return np.split(order, np.cumsum(np.bincount(self.row, minlength=len(self.ids)))[:-1])


_NONE = np.empty(0, np.int64)


def read_run(run_dir: Path) -> Reading:
    """Read what there is; only `candidates` must be.

    Raises:
        DataError: there is no such folder, or no candidates in it, or they cannot be read.
    """
    if not run_dir.is_dir():
        raise DataError(f"There is no folder {run_dir}. Name the `output_dir` of a run.")
    candidates = saved_table(run_dir / "candidates")
    if candidates is None:
        raise DataError(
            f"{run_dir} has no candidates/, so there is nothing to report. Make them with the recipe's "
            f"`--stage recycle --output_dir {run_dir}`."
        )
    if not len(candidates):
        raise DataError(f"{run_dir / 'candidates'} has no rows. Make it anew with `--stage recycle --overwrite true`.")
    require_columns(candidates.column_names, _NEEDED, "`build_report`")
    record = read_record(run_dir)
    read_versions(candidates, ())  # says what is wrong with the table
    row, ids = read_rows(candidates)
    usable = np.ones(len(candidates), bool)
    for name in ("instruction", "response"):
        usable &= np.asarray(candidates.data.column(name).is_valid())
    code, codes = _codes(candidates, usable)
    variant = np.array([VARIANTS.index(name) for name in candidates["variant"][:]], np.int64)
    original = np.full(len(ids), -1)
    places = np.flatnonzero(variant == 0)[::-1]
    original[row[places]] = places
    reading = Reading(
        folder=run_dir,
        record=record,
        candidates=candidates,
        selected=saved_table(run_dir / "selected"),
        scores=_scores(candidates),
        row=row,
        variant=variant,
        usable=usable,
        code=code,
        codes=codes,
        ids=[str(each) for each in ids.to_pylist()],
        original=original,
        winner=np.full(len(ids), -1),
        outcome=np.zeros(len(ids), np.int64),
        outcomes=[UNDECIDED],
        whys=[""] * len(ids),
        decided=False,
        notes=list(record.notes),
    )
    if record.choosable:
        _decide(reading, record.reflect.get("order") == "selective")
    _follow_selected(reading)
    return reading


def _decide(reading: Reading, selective: bool) -> None:
    """What the settings make of the scores, for every row; nothing where the rule's scores are not there."""
    choice = reading.record.selection
    needs = RULES[choice["rule"]].needs
    needed = [name for name in needs if name not in reading.candidates.column_names]
    if not needed:
        # a table that nobody scored has the columns too, all null
        some = [name for name in needs if name in reading.scores]
        needed = [name for name in some if np.isnan(reading.scores[name]).all()]
    if needed:
        have = "no student has scored them" if set(needed) <= set(SCORE_COLUMNS) else f"they have no {needed[0]}"
        reading.notes.append(f"The rule {choice['rule']!r} cannot be applied to these candidates: {have} yet.")
        return
    table, places = reading.candidates, None
    if selective:
        from ..recycling import chosen_branches

        table = chosen_branches(reading.candidates)
        places = selected_places(reading.candidates, table)
        reading.notes.append("Only the version that the student chose was answered anew (reflect: selective).")
    numbers = {row_id: number for number, row_id in enumerate(reading.ids)}
    outcomes = {KEPT: 0}
    reading.outcome[:] = -1
    for decision in decide(table, **choice):
        number = numbers[str(decision.row_id)]
        reason = KEPT if decision.kept else decision.why.split(":")[0]
        reading.outcome[number] = outcomes.setdefault(reason, len(outcomes))
        reading.whys[number] = decision.why
        if decision.position is not None:
            reading.winner[number] = places[decision.position] if places else decision.position
    if (lost := reading.outcome < 0).any():  # the branches leave out rows without a usable version
        reading.outcome[lost] = outcomes.setdefault(NO_VERSION, len(outcomes))
        for number in np.flatnonzero(lost).tolist():
            reading.whys[number] = NO_VERSION
    reading.outcomes, reading.decided = list(outcomes), True


def _follow_selected(reading: Reading) -> None:
    """What `selected` holds is what was kept, whatever the settings say of it."""
    if reading.selected is None:
        if reading.decided:
            reading.notes.append(
                "There is no selected/ yet: what is called kept here is what the settings would keep. "
                "`--stage select` makes it."
            )
        return
    known = {key: place for place, key in enumerate(keys_of(reading.candidates))}
    found = [known.get(key) for key in keys_of(reading.selected)]
    if strange := found.count(None):
        reading.notes.append(
            f"{strange:,} of {len(found):,} rows of selected/ are not among the candidates, and are left out here."
        )
        there = [n for n, place in enumerate(found) if place is not None]
        reading.selected = reading.selected.select(there)
    saved = np.full(len(reading.ids), -1)
    places = np.array([place for place in found if place is not None], np.int64)
    if empty := np.count_nonzero(~reading.usable[places]):
        reading.notes.append(
            f"{empty:,} of the rows of selected/ lack a text among the candidates; statistics omit them."
        )
    saved[reading.row[places][::-1]] = places[::-1]
    if more := len(places) - np.count_nonzero(saved >= 0):
        reading.notes.append(f"selected/ holds {more:,} further versions of rows that it has already.")
    is_kept = (reading.outcome == 0) if reading.decided else np.zeros(len(saved), bool)
    if not reading.decided:
        reading.outcomes = [KEPT, NOT_SAVED]
        reading.outcome[:] = 1
    differs = np.flatnonzero((is_kept != (saved >= 0)) | (is_kept & (saved != reading.winner)))
    for number in differs.tolist():
        if saved[number] >= 0:
            reading.outcome[number], reading.winner[number] = 0, saved[number]
            reading.whys[number] = "" if not reading.decided else f"saved: {reading.whys[number]}"
        else:
            if NOT_SAVED not in reading.outcomes:
                reading.outcomes.append(NOT_SAVED)
            reading.outcome[number] = reading.outcomes.index(NOT_SAVED)
            reading.whys[number] = f"{NOT_SAVED}: {reading.whys[number]}"
    if reading.decided and len(differs):
        reading.notes.append(
            f"For {len(differs):,} rows selected/ holds something else than these settings and scores give: it was "
            "made with other scores (a schedule of epochs), with other settings, or was edited. Here kept is what "
            "selected/ holds."
        )


def _scores(candidates: Dataset) -> dict[str, np.ndarray]:
    names = [name for name in (*SCORE_COLUMNS, "coherence") if name in candidates.column_names]
    return {name: read_numbers(candidates, name) for name in names}


def _codes(candidates: Dataset, usable: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Each version's error code by number, -1 for none; the codes, most frequent first."""
    errors = candidates["error"][:] if "error" in candidates.column_names else [None] * len(candidates)
    found = [_code(error) or ("" if good else "unknown") for error, good in zip(errors, usable, strict=True)]
    codes = [code for code, _ in Counter(filter(None, found)).most_common(_MOST_CODES)]
    numbers = {code: number for number, code in enumerate(codes)}
    if len(set(found) - {""}) > len(codes):
        codes.append(_OTHER)
    return np.array([numbers.get(code, len(codes) - 1) if code else -1 for code in found], np.int64), codes


def _code(error: str | None) -> str:
    """A check of the user's may give whole sentences without a colon."""
    code = error_code(error)
    return code if len(code) <= _LONGEST_CODE else f"{code[:_LONGEST_CODE].rstrip()}…"

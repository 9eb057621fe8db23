"""What can be computed again of a published table, and how it is said where it does not agree.

Each check gives plain sentences that name the row; of one kind at most five, and how many more there are.
"""

import json
from collections.abc import Iterable, Iterator
from math import isclose
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from ..columns import SCORE_COLUMNS
from ..errors import DataError
from ..selection import check_versions
from ..selection.versions import read_numbers

Key = tuple[str, str, str]  # row_id, variant, source
MOST = 5  # examples of a kind
_SHOWN = 60  # characters of a text
_RATIOS = {
    "ifd": ("loss_response_given_instruction", "loss_response"),
    "r_ifd": ("loss_instruction_given_response", "loss_instruction"),
}
_BY_OTHERS = ("instruction_tokens", "response_tokens")  # of a tokenizer, which a table does not bring


def some(sentences: Iterable[str], kind: str) -> list[str]:
    """The first of them, and how many more are of this kind."""
    sentences = list(sentences)
    more = len(sentences) - MOST
    return sentences[:MOST] + [f"… and {more:,} more: {kind}."] * (more > 0)


def named(key: Key) -> str:
    """A row, for a sentence."""
    return f"row {key[0]!r} ({key[1]}{f', source {key[2]!r}' if key[2] else ''})"


def shown(one: Any, other: Any) -> tuple[str, str]:
    """Two values, around the place where they begin to differ."""
    if not (isinstance(one, str) and isinstance(other, str)):
        texts = [json.dumps(each, ensure_ascii=False) for each in (one, other)]
        return tuple(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…" for text in texts)  # type: ignore[return-value]
    same = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(same - _SHOWN // 3, 0)
    parts = ((each, each[start : start + _SHOWN]) for each in (one, other))
    shown = [f"{'…' * (start > 0)}{part!r}{'…' * (start + _SHOWN < len(each))}" for each, part in parts]
    return shown[0], shown[1]


def check_keys(candidates: Dataset) -> list[str]:
    """Each version is there once, under a known name."""
    try:
        check_versions(candidates)
    except DataError as error:
        return [f"candidates: {error}"]
    return []


def check_digests(keys: list[Key], digests: list[str], known: dict[Key, str]) -> list[str]:
    """Candidates, by their keys, against what checksums.parquet says of them, in its order."""
    there = dict(zip(keys, digests, strict=True))
    changed = [
        f"candidates: {named(key)} was changed: its digest is {digest}, and checksums.parquet has {known[key]}."
        for key, digest in zip(keys, digests, strict=True)
        if key in known and digest != known[key]
    ]
    if len(changed) == len(known) > 1:
        changed = [
            "candidates: every row has another digest than in checksums.parquet: a column was added, taken out, "
            "renamed or converted, or all rows were replaced."
        ]
    missing = (f"candidates: {named(key)} is missing; checksums.parquet has it." for key in known if key not in there)
    added = (
        f"candidates: {named(key)} was added; checksums.parquet does not have it." for key in set(keys) - set(known)
    )
    found = [
        *some(changed, "candidates that were changed"),
        *some(missing, "candidates that are missing"),
        *some(sorted(added), "candidates that were added"),
    ]
    for place, (key, other) in enumerate(zip(keys, known, strict=False)):
        if not found and key != other:
            found.append(
                f"candidates: the rows stand in another order than in checksums.parquet, first {named(key)}, which is "
                f"in place {place}."
            )
    return found


def check_scores(candidates: Dataset, keys: list[Key]) -> list[str]:
    """Ifd and r_ifd against the exponential of the difference of their losses."""
    found = []
    for name, (given, alone) in _RATIOS.items():
        if not {name, given, alone} <= set(candidates.column_names):
            continue
        value, first, second = (read_numbers(candidates, column) for column in (name, given, alone))
        with np.errstate(all="ignore"):
            expected = np.exp(np.minimum(first - second, 700.0))  # as the scorer
            # what was float32 once is as exact as that, and so is what was computed from it
            rough = np.any([each == each.astype(np.float32) for each in (value, first, second)], axis=0)
            allowed = np.where(rough, 1e-6, 1e-12) * (1 + np.abs(first) + np.abs(second)) * expected
            wrong = np.isfinite(first) & np.isfinite(second) & ~(np.abs(value - expected) <= allowed)
        wrong &= value != expected  # both may be infinite
        found += some(
            (
                f"candidates: {named(keys[n])} has `{name}` {_number(value[n])}, and its losses give "
                f"{_number(expected[n])} (exp({given} {_number(first[n])} − {alone} {_number(second[n])}))."
                for n in np.flatnonzero(wrong).tolist()
            ),
            f"`{name}` that is not what the losses give",
        )
    return found


def check_unusable(candidates: Dataset, keys: list[Key]) -> list[str]:
    """Versions without both texts have no scores."""
    usable = has_text(candidates)
    names = [name for name in SCORE_COLUMNS if name in candidates.column_names]
    found: list[str] = []
    for name in names:
        wrong = ~usable & ~np.isnan(read_numbers(candidates, name))
        found += [f"candidates: {named(keys[n])} has no text, but a `{name}`." for n in np.flatnonzero(wrong)]
    return some(found, "scores of versions without text")


def has_text(table: Dataset) -> np.ndarray:
    """Whether each version has instruction and response, (rows,)."""
    usable = [np.empty(0, bool)]
    for batch in table.select_columns(["instruction", "response"]).with_format("arrow").iter(10_000):
        usable.append(pc.and_(batch["instruction"].is_valid(), batch["response"].is_valid()).to_numpy())
    return np.concatenate(usable)


def check_numbers(where: str, stated: Any, found: Any) -> list[str]:
    """What a file states against what was computed again, number by number."""
    sentences = [
        f"{where}: {name or 'all'} is {was}, and the tables give {now}."
        for name, was, now in _unequal("", stated, found)
    ]
    return some(sentences, f"numbers of {where}")


def check_statistics(stated: dict[str, Any], candidates: Dataset, selected: Dataset) -> list[str]:
    """statistics.json, but for what needs a tokenizer or an encoder."""
    from ..report.statistics import statistics

    skipped = {*_BY_OTHERS, *(() if "coherence" in candidates.column_names else ("coherence",))}

    def comparable(numbers: dict[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in numbers.items() if name != "costs"}
        if isinstance(sets := numbers.get("sets"), dict):
            rest["sets"] = {
                name: {m: v for m, v in each.items() if m not in skipped} if isinstance(each, dict) else each
                for name, each in sets.items()
            }
        return rest

    return check_numbers("statistics.json", comparable(stated), comparable(statistics(candidates, selected)))


def _unequal(name: str, stated: Any, found: Any) -> Iterator[tuple[str, str, str]]:
    if isinstance(stated, dict) and isinstance(found, dict):
        for key in {**stated, **found}:
            yield from _unequal(f"{name}.{key}".lstrip("."), stated.get(key, "absent"), found.get(key, "nothing"))
        return
    numbers = [isinstance(each, int | float) and not isinstance(each, bool) for each in (stated, found)]
    if not (isclose(stated, found, rel_tol=1e-9) if all(numbers) else stated == found):
        was, now = ("null" if each is None else str(each) for each in (stated, found))
        yield name, was, now


def _number(value: float) -> str:
    return "null" if value != value else repr(float(value))

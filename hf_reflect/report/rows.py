"""What the page's reader gets: numbers of all rows, so that counts are exact, and the texts of as many as fit."""

import base64
import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from ..selection import VARIANTS
from .differences import differences, is_rewritten, packed
from .reading import KEPT, Reading
from .words import why_in_words

_AT_ONCE = 64  # rows
_LONGEST = 20_000  # characters of one text
_PARENTS = {"instruction": 0, "response": 0, "instruction+response": 1}  # numbers in VARIANTS
_TEXTS = ("instruction", "input", "response")


def numbers_of(reading: Reading, lengths: np.ndarray) -> dict[str, Any]:
    """Of every source row its outcome, winner, errors, scores and length, as typed arrays in base64.

    lengths: of each version's response, (versions,).
    """
    winner, original = reading.winner, reading.original
    errors = np.zeros(len(reading.ids), np.int64)
    has = reading.code >= 0
    np.bitwise_or.at(errors, reading.row[has], 1 << reading.code[has])
    combinations, combination = np.unique(errors, return_inverse=True)

    def taken(values: np.ndarray | None, place: np.ndarray) -> np.ndarray:
        if values is None:
            return np.full(len(place), np.nan)
        return np.where(place >= 0, values[place], np.nan)

    ifd, r_ifd = (reading.scores.get(name) for name in ("ifd", "r_ifd"))
    length = np.nan_to_num(taken(lengths, winner))
    with np.errstate(all="ignore"):
        change = taken(ifd, winner) - taken(ifd, original)
        columns = {
            "outcome": ("Uint8", reading.outcome),
            "winner": ("Uint8", np.where(winner >= 0, reading.variant[winner], len(VARIANTS))),
            "errors": (_smallest(combination), combination.reshape(-1)),
            "ifd": ("Float32", _single(taken(ifd, winner), reading.record.selection["ifd_gate"])),
            "r_ifd": ("Float32", _single(taken(r_ifd, winner), reading.record.selection["r_ifd_gate"])),
            "change": ("Float32", change),
            "length": (_smallest(length), length),
        }
        return {
            "rows": len(reading.ids),
            # of each combination of errors that occurs, the numbers of its codes
            "combinations": [
                [n for n in range(len(reading.codes)) if mask >> n & 1] for mask in combinations.tolist()
            ],
            "columns": {name: [kind, _base64(values, kind)] for name, (kind, values) in columns.items()},
        }


def _smallest(numbers: np.ndarray) -> str:
    """The smallest type of typed arrays that holds these, which are not negative."""
    most = numbers.max(initial=0)
    return next(kind for kind, end in (("Uint8", 2**8), ("Uint16", 2**16), ("Uint32", 2**32)) if most < end)


def _single(scores: np.ndarray, gate: float | None) -> np.ndarray:
    """In single precision; what is below the gate stays below it."""
    found = scores.astype(np.float32)
    if gate is not None:
        limit = np.float32(gate)
        found[(scores < gate) & (found >= limit)] = np.nextafter(limit, np.float32(-np.inf))
    return found


def _base64(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(values.astype(np.dtype(kind.lower()).newbyteorder("<")).tobytes()).decode()


def draw(reading: Reading) -> Iterator[int]:
    """All source rows, each kind of row (outcome, winner's variant, error) in turn; the same in every report."""
    strata: dict[tuple[int, int, int], list[int]] = {}
    error = np.full(len(reading.ids), -1)
    np.maximum.at(error, reading.row, reading.code)
    variant = np.where(reading.winner >= 0, reading.variant[reading.winner], -1)
    digest = [hashlib.sha256(row_id.encode("utf-8", "replace")).digest()[:8] for row_id in reading.ids]
    for row in sorted(range(len(reading.ids)), key=digest.__getitem__):
        key = int(reading.outcome[row]), int(variant[row]), int(error[row])
        strata.setdefault(key, []).append(row)
    queues = [iter(strata[key]) for key in sorted(strata)]
    while queues:
        for queue in list(queues):
            some = next(queue, -1)
            if some < 0:
                queues.remove(queue)
            else:
                yield some


def texts_of(reading: Reading, budget: int) -> dict[int, str]:
    """As many rows as fit into so many bytes, each as JSON, by number, in the order of the table."""
    found: dict[int, str] = {}
    places, order, misses = reading.places, draw(reading), 0
    while misses < 3 * _AT_ONCE and (some := list(islice(order, _AT_ONCE))):
        for row, versions in _read(reading, some, places):
            text = as_json(_row(reading, row, versions))
            if (size := len(text.encode("utf-8", "replace")) + 2) <= budget:
                found[row] = text
                budget -= size
            else:
                misses += 1
    return {row: found[row] for row in sorted(found)}


def has_every_kind(reading: Reading, rows: list[int]) -> bool:
    """Whether these rows have every outcome, every variant that won, and every error that there is."""

    def kinds(some: np.ndarray) -> list[set[int]]:
        winner, codes = reading.winner[some], reading.code[np.isin(reading.row, some)]
        variant = np.where(winner >= 0, reading.variant[winner], -1)
        return [set(np.unique(each).tolist()) for each in (reading.outcome[some], variant, codes)]

    return kinds(np.array(rows, np.int64)) == kinds(np.arange(len(reading.ids)))


def as_json(value: Any) -> str:
    """For a script element of the page: nothing in it can end the element, or begin another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _read(
    reading: Reading, rows: list[int], places: list[np.ndarray]
) -> Iterator[tuple[int, list[tuple[int, dict[str, Any]]]]]:
    """The versions of these rows with their places."""
    names = [*_TEXTS, "source", "history", "critique", "error"]
    there = [name for name in names if name in reading.candidates.column_names]
    wanted = [place for row in rows for place in places[row].tolist()]
    columns = reading.candidates.select_columns(there)[wanted]
    lines = (dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True))
    versions = iter(list(zip(wanted, lines, strict=True)))
    for row in rows:
        yield row, list(islice(versions, len(places[row])))


def _row(reading: Reading, row: int, versions: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """Keys are short, since each stands in the page thousands of times; report.js says what they mean."""
    shown: list[dict[str, Any]] = []
    known: dict[tuple[str, str], tuple[int, dict[str, Any]]] = {}  # by variant and source
    kept = reading.outcomes[reading.outcome[row]] == KEPT
    for place, version in versions:
        variant, source = VARIANTS[reading.variant[place]], version.get("source") or ""
        old = VARIANTS[_PARENTS[variant]] if variant in _PARENTS else ""
        parent = known.get((old, source)) or known.get((old, ""))
        texts = {name: None if version.get(name) is None else str(version[name]) for name in _TEXTS}
        had_input = parent is not None and parent[1]["input"] and texts["instruction"] is not None
        if had_input and texts["input"] is None:
            texts["input"] = ""  # taken out
        found: dict[str, Any] = {"v": int(reading.variant[place])}
        if parent is not None:
            found["p"] = parent[0]
        for name, text in texts.items():
            if text is not None and (text or name != "input" or had_input):
                found[name[0] if name != "input" else "x"] = _text(text, parent[1][name] if parent else None)
        more = {"s": source, "c": version.get("critique"), "e": version.get("error")}
        found |= {key: _cut(str(value)) for key, value in more.items() if value}
        found["n"] = [_number(reading.scores[name][place]) for name in reading.scores]
        if place == reading.winner[row]:
            found["w"] = 1
        known[variant, source] = len(shown), texts
        shown.append(found)
    history = next((version["history"] for _, version in versions if version.get("history")), None) or []
    return {
        "n": row,
        "id": reading.ids[row],
        "why": why_in_words(reading.whys[row], kept),
        "v": shown,
        **({"h": [[str(turn["role"]), _cut(str(turn["content"]))] for turn in history]} if history else {}),
    }


def _text(text: str, parent: str | None) -> str | list[Any]:
    """The text; where it has a parent, the changes to that; where these say nothing, why they are not there."""
    if parent is None or max(len(text), len(parent)) > _LONGEST:
        return _cut(text)
    segments = differences(parent, text)
    if segments is None:
        return ["long", text]
    return ["new", text] if is_rewritten(segments) else packed(segments)


def _cut(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}\n[… {len(text) - _LONGEST:,} characters more, which are in candidates/]"


def _number(value: float) -> float | str | None:
    """Five digits that count; infinities as text, since JSON has none."""
    if np.isnan(value):
        return None
    return float(f"{value:.5g}") if np.isfinite(value) else "∞" if value > 0 else "−∞"

"""Whether the published selection is what its settings choose among the candidates, row by row and cell by cell."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset

from ..columns import SCORE_COLUMNS
from ..pairs import keys_of
from ..selection import decide
from .checks import MOST, Key, has_text, named, shown, some
from .digests import cells, counted_columns, row_digests


def check_copies(candidates: Dataset, selected: Dataset, keys: list[Key], kept: list[Key], whole: bool) -> list[str]:
    """Selected rows are their candidates' rows, cell by cell.

    With `whole` in all columns of the candidates. Without, as in a run's folder, but for the scores: what was chosen
    there keeps those from before the choice, often none.
    """
    place = {key: n for n, key in enumerate(keys)}
    strangers = (f"default: {named(key)} is not among the candidates." for key in kept if key not in place)
    twice = (f"default: {named(key)} is there {n} times." for key, n in Counter(kept).items() if n > 1)
    found = [*some(strangers, "rows that are no candidates"), *some(twice, "rows that repeat")]
    if whole and (absent := [name for name in counted_columns(candidates) if name not in selected.column_names]):
        found.append(f"default: the candidates' columns {', '.join(absent)} are missing.")
    skipped = () if whole else (*SCORE_COLUMNS, "coherence")
    both = [name for name in counted_columns(selected) if name in candidates.column_names and name not in skipped]
    rows = [n for n, key in enumerate(kept) if key in place]
    ours = selected.select(rows).select_columns(both)
    theirs = candidates.select([place[kept[n]] for n in rows]).select_columns(both)
    pairs = zip(row_digests(ours), row_digests(theirs), strict=True)
    differ = [n for n, (one, other) in enumerate(pairs) if one != other]
    for n in differ[:MOST]:
        said = _difference(ours.select([n]), theirs.select([n]))
        found.append(f"default: {named(kept[rows[n]])} has {'; '.join(said)}.")
    more = len(differ) - MOST
    return found + [f"… and {more:,} more: rows that are not those of the candidates."] * (more > 0)


def _difference(row: Dataset, other: Dataset) -> Iterator[str]:
    """Each column in which two rows differ, in words."""
    for name in counted_columns(row):
        (here,), (there,) = cells(row, name), cells(other, name)
        if json.dumps(here) != json.dumps(there):
            words = shown(here, there)
            yield f"`{name}` {words[0]}, and in the candidates {words[1]}"


def check_messages(selected: Dataset, kept: list[Key]) -> list[str]:
    """`messages` are what `to_messages` makes of the texts."""
    from ..templates import to_messages

    texts = [name for name in ("instruction", "input", "response", "history") if name in selected.column_names]
    usable = has_text(selected)
    textless = (f"default: {named(kept[n])} has no text to train on." for n in np.flatnonzero(~usable))
    found = some(textless, "rows without text")
    rows = np.flatnonzero(usable).tolist()
    made = cells(to_messages(selected.select(rows).select_columns(texts)), "messages") if rows else []
    given = cells(selected.select(rows), "messages")
    sentences = []
    for n, one, other in zip(rows, given, made, strict=True):
        if one != other:
            words = shown(json.dumps(one, ensure_ascii=False), json.dumps(other, ensure_ascii=False))
            sentences.append(f"default: {named(kept[n])} has `messages` {words[0]}, and its texts make {words[1]}.")
    return found + some(sentences, "`messages` that are not made of the texts")


def check_selection(
    candidates: Dataset, kept: list[Key], reflect: str, choice: dict[str, Any], ordered: bool
) -> list[str]:
    """The selection, made once more with the same settings, has the same rows.

    Args:
        candidates: all versions, scored.
        kept: the keys of the selected rows.
        reflect: "selective": the versions that were not chosen to be answered anew did not play.
        choice: the settings of `select`.
        ordered: whether the rows must stand in the candidates' order, as `select` leaves them.
    """
    if reflect == "selective":
        from ..recycling import chosen_branches

        candidates = chosen_branches(candidates)
    keys, decisions = keys_of(candidates), decide(candidates, **choice)
    expected = {str(decision.row_id): decision for decision in decisions}
    found, seen = [], set()
    for key in kept:
        seen.add(key[0])
        decision = expected.get(key[0])
        if decision is None or decision.position is None or not decision.kept:
            why = decision.why if decision else "the candidates have no such row"
            found.append(f"default: {named(key)} is there, but the rule drops the row: {why}.")
        elif (winner := keys[decision.position]) != key:
            found.append(f"default: {named(key)} is there, but the rule takes {named(winner)}: {decision.why}.")
    missing = [
        f"default: {named(keys[decision.position])} is missing, but the rule keeps it: {decision.why}."
        for row_id, decision in expected.items()
        if decision.kept and decision.position is not None and row_id not in seen
    ]
    found = [
        *some(found, "rows that the rule does not keep"),
        *some(missing, "rows that the rule keeps and that are missing"),
    ]
    if ordered and not found:
        order = [keys[n] for n in sorted(d.position for d in decisions if d.kept and d.position is not None)]
        for key, other in zip(kept, order, strict=False):
            if key != other:
                return [f"default: the rows stand in another order than in the candidates, first {named(key)}."]
    return found

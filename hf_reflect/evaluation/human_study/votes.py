"""What the raters' votes come to: who won each item, how often, and how far they agree."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError, SettingsError
from ...judge import OUTCOMES, rate_of
from ..answers import listed
from .files import KEY, RATINGS, read, shown

VOTES = ("A", "tie", "B")


def read_ratings(paths: str | Path | Sequence[str | Path], key: str | Path, partial: str = "raise") -> dict[str, Any]:
    """Count the raters' files: who won each item, and how far the raters agree.

    An item's outcome is the vote that more raters gave than any other; where no vote leads, it is a tie. So with three
    raters two decide and three different votes are a tie; with two or any even number a draw is a tie too; a single
    rater decides alone. V2's study had three raters, 108 items, and 57 wins, 23 ties, 28 losses.

    Args:
        paths: the files that raters saved, one each.
        key: the study's `key.json`.
        partial: what becomes of items that not all raters rated: `raise`, or `drop` them for all.

    Returns:
        win, tie, lose, win_rate ((win − lose) / all + 1), interval (95 %, as in `rate_of`), no_majority (how many of
        the ties had no vote that leads), kappa (Fleiss'; None where undefined), raters, by_category and by_rater (win,
        tie, lose of each), items (question_id, category, votes, outcome, comments; in the page's order), dropped
        (ids), study, ours and theirs (names of the models).

    Raises:
        DataError: a file is damaged, of another study, a second one of the same rater, or lacks votes.
        SettingsError: `partial` is neither.
    """
    if partial not in ("raise", "drop"):
        raise SettingsError(f"`partial` is raise or drop, not {partial!r}.")
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise DataError("There are no ratings to count. Name the files that the raters saved, one for each.")
    truth = read(key, KEY)
    items = truth["items"]
    votes, comments = _collected(paths, truth, key)
    left_out = {rater: [name for name in items if name not in given] for rater, given in votes.items()}
    dropped = [name for name in items if any(name in some for some in left_out.values())]
    if dropped and partial == "raise":
        found = "; ".join(f"{rater} left out {listed(some, most=10)}" for rater, some in left_out.items() if some)
        raise DataError(
            f"Not all {len(items)} items were rated by all: {found}. Ask for the rest, or leave these items out for "
            "all raters with `partial`: drop."
        )
    if len(dropped) == len(items):
        raise DataError(f"No item was rated by all of {', '.join(votes)}: nothing is left to count.")

    counted = []
    for name in items:
        if name not in dropped:
            given = {rater: _outcome(some[name], items[name]["ours"]) for rater, some in votes.items()}
            said = {rater: some[name] for rater, some in comments.items() if name in some}
            row = {"question_id": name, "category": items[name]["category"], "votes": given}
            counted.append(row | {"outcome": majority(given.values()), "comments": said})
    rate = rate_of(row["outcome"] for row in counted)
    kappa = fleiss_kappa([[*_totals(row["votes"].values()).values()] for row in counted])
    categories = sorted({row["category"] for row in counted})
    return {
        "study": truth["study"],
        **{side: _models(items, side) for side in ("ours", "theirs")},
        **{name: rate[name] for name in (*OUTCOMES, "win_rate")},
        "interval": list(rate["interval"]),  # as JSON gives it back
        "no_majority": sum(_leading(row["votes"].values()) is None for row in counted),
        "kappa": None if math.isnan(kappa) else kappa,
        "raters": list(votes),
        "by_rater": {rater: _totals(row["votes"][rater] for row in counted) for rater in votes},
        "by_category": {
            category: _totals(row["outcome"] for row in counted if row["category"] == category)
            for category in categories
        },
        "dropped": dropped,
        "items": counted,
    }


def majority(votes: Iterable[str]) -> str:
    """Of win, tie and lose the one that leads; without a leader, tie."""
    return _leading(votes) or "tie"


def _leading(votes: Iterable[str]) -> str | None:
    (first, most), *others = Counter(votes).most_common()
    return None if others and others[0][1] == most else first


def fleiss_kappa(counts: Any) -> float:
    """How far raters agree beyond chance: 1 is fully, 0 as chance would have it.

    nan where that is undefined: with one rater, or where all votes are the same.

    Args:
        counts: how many raters chose each category, (items, categories); equally many raters for each item.

    Raises:
        DataError: the numbers of raters differ, or there are no items.

    Source: Fleiss, Measuring nominal scale agreement among many raters, Psychological Bulletin 76 (1971), 378-382.
    """
    counts = np.asarray(counts, dtype=float)
    if counts.ndim != 2 or not counts.size or np.ptp(counts.sum(axis=1)):
        raise DataError(
            f"Fleiss' kappa needs a table of counts, (items, categories), with equally many raters for each item, not "
            f"one of shape {counts.shape} with {sorted(set(counts.sum(axis=-1).ravel().tolist()))} raters."
        )
    raters = counts[0].sum()
    expected = ((counts.sum(axis=0) / counts.sum()) ** 2).sum()
    if raters < 2 or expected == 1:
        return math.nan
    agreeing = ((counts**2).sum(axis=1) - raters) / (raters * (raters - 1))  # (items,): share of pairs of raters
    return float((agreeing.mean() - expected) / (1 - expected))


def _collected(
    paths: Iterable[str | Path], truth: Mapping[str, Any], key: str | Path
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """Of each rater the votes and the comments by question_id; what was not rated is absent."""
    files: dict[str, str | Path] = {}  # by the rater's name in small letters
    votes, comments = {}, {}
    for path in paths:
        content = read(path, RATINGS)
        if content["study"] != truth["study"]:
            raise DataError(
                f"{path} belongs to the study {content['study']!r}, the key {key} to {truth['study']!r}. Give the "
                "key.json that was written together with the page of these ratings."
            )
        rater = " ".join(content["rater"].split())
        if other := files.get(rater.casefold()):
            raise DataError(f"{other} and {path} are both of the rater {rater!r}. Give one of them, the last saved.")
        files[rater.casefold()] = path
        votes[rater], comments[rater] = _votes(content["ratings"], truth["items"], path)
    return votes, comments


def _votes(ratings: list[Any], items: Mapping[str, Any], path: str | Path) -> tuple[dict[str, str], dict[str, str]]:
    votes, comments, seen = {}, {}, set()
    for rating in ratings:
        name, vote = (rating.get("item"), rating.get("vote")) if isinstance(rating, dict) else (None, rating)
        if not isinstance(name, str) or name not in items or name in seen:
            why = "rates it twice" if isinstance(name, str) and name in seen else "the key has no such item"
            raise DataError(f"{path} has a rating of {shown(name)}, but {why}. Take the file as the page saved it.")
        seen.add(name)
        if vote is not None and vote not in VOTES:
            raise DataError(f"{path} has the vote {vote!r} on {shown(name)}; votes are {', '.join(VOTES)}, or null.")
        if vote is not None:
            votes[name] = vote
        if comment := rating.get("comment"):
            comments[name] = str(comment)
    return votes, comments


def _outcome(vote: str, ours: str) -> str:
    return "tie" if vote == "tie" else "win" if vote == ours else "lose"


def _totals(outcomes: Iterable[str]) -> dict[str, int]:
    counts = Counter(outcomes)
    return {name: counts[name] for name in OUTCOMES}


def _models(items: Mapping[str, Any], side: str) -> str:
    letters = ((item, item["ours"] == "A") for item in items.values())
    names = {item["model_a" if is_a == (side == "ours") else "model_b"] for item, is_a in letters}
    return ", ".join(sorted(names))

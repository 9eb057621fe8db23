"""A human study: pairs of answers sampled, blinded and put on a page for raters, and what their votes come to."""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value

from ..columns import require_columns
from ..errors import DataError, SettingsError
from ..parsing.reply import shortened
from .answers import matched

logger = logging.getLogger(__name__)

ITEM_FEATURES = Features(
    {
        name: Value("string")
        for name in ("question_id", "question", "category", "answer_a", "answer_b", "model_a", "model_b", "ours")
    }
)
OUTCOMES = ("win", "tie", "lose")
VOTES = ("A", "tie", "B")
TITLE = "Which answer is better?"
GUIDANCE = (
    "Read the question and both answers to their end, then say which one you would rather have got. Weigh how "
    "helpful, relevant, accurate and detailed they are. Choose Tie where neither is better."
)
_KEY, _RATINGS = "hf_reflect key 1", "hf_reflect ratings 1"
_SHOWN = 10  # ids in a message


def sample_items(ours: Dataset, theirs: Dataset, per_category: int = 4, seed: int = 0) -> Dataset:
    """Draw the pairs of answers that raters shall see, shuffled and blinded.

    Questions, their order and the coin that decides who is A depend on the seed and the ids alone: the order of the
    tables' rows changes nothing. A category with fewer questions gives all it has, and a log line says so.

    In:  question_id, question, answer; optionally category and model (of both models, N rows each)
    Out: question_id, question, category, answer_a, answer_b, model_a, model_b, ours ("A" or "B")

    Args:
        ours: the answers of the model under study; a win is a vote for these.
        theirs: the other model's answers to the same questions.
        per_category: questions of each category.
        seed: another one draws others.

    Raises:
        DataError: the tables do not match (see `matched`), or are empty.
        SettingsError: `per_category` is below 1.
    """
    if per_category < 1:
        raise SettingsError(f"`per_category` is {per_category}, which leaves nothing to rate. Give 1 or more.")
    ours, theirs = matched(ours, theirs)
    if not len(ours):
        raise DataError("There are no answers to sample from: both tables are empty. Generate the answers first.")
    ids = ours["question_id"][:]
    categories = [category or "" for category in _column(ours, "category")]
    places: dict[str, list[int]] = {}
    for place, category in enumerate(categories):
        places.setdefault(category, []).append(place)
    if few := {category: len(some) for category, some in places.items() if len(some) < per_category}:
        listed = ", ".join(f"{category or 'no category'} ({count})" for category, count in sorted(few.items()))
        logger.warning("Fewer than %d questions, so all were taken: %s.", per_category, listed)
    chosen = [
        place
        for some in places.values()
        for place in sorted(some, key=lambda place: _draw(seed, "sample", ids[place]))[:per_category]
    ]
    chosen.sort(key=lambda place: _draw(seed, "order", ids[place]))
    answers = {"ours": ours["answer"][:], "theirs": theirs["answer"][:]}
    models = {"ours": _column(ours, "model"), "theirs": _column(theirs, "model")}
    questions = ours["question"][:]
    rows = []
    for place in chosen:
        a, b = ("ours", "theirs") if _draw(seed, "coin", ids[place]) % 2 else ("theirs", "ours")
        row = {"question_id": ids[place], "question": questions[place], "category": categories[place]}
        row |= {"answer_a": answers[a][place], "answer_b": answers[b][place]}
        row |= {"model_a": models[a][place] or "", "model_b": models[b][place] or ""}
        rows.append(row | {"ours": "A" if a == "ours" else "B"})
    items = Dataset.from_list(rows, features=ITEM_FEATURES)
    if telling := [row["question_id"] for row in rows if _names_a_model(row)]:
        logger.warning("Raters may guess who is who: a model is named in an answer to %s.", _listed(telling))
    return items


def _column(table: Dataset, name: str) -> list[str | None]:
    return table[name][:] if name in table.column_names else [None] * len(table)


def _draw(seed: int, purpose: str, question_id: str) -> int:
    """A number drawn for a question: the same on every machine, and whatever other questions there are."""
    return int.from_bytes(hashlib.sha256(repr((seed, purpose, question_id)).encode()).digest())


def _names_a_model(row: Mapping[str, str]) -> bool:
    answers = f"{row['answer_a']}\n{row['answer_b']}".casefold()
    return any(name and name.casefold() in answers for name in (row["model_a"], row["model_b"]))


def write_study(
    items: Dataset, folder: str | Path, title: str = TITLE, guidance: str = GUIDANCE, overwrite: bool = False
) -> str:
    """Write `rating_page.html`, which goes to the raters, and `key.json`, which does not; return the study's id.

    The page is one file without network or server. It holds neither model names nor categories nor who is who; the
    id is a hash of what it shows, so that ratings are never counted with another study's key.

    Args:
        items: the table of `sample_items`.
        folder: where both files go.
        title: the page's heading.
        guidance: what raters are asked to weigh.
        overwrite: whether another study's page and key may be replaced.

    Raises:
        DataError: the table has no items, or lacks columns.
        SettingsError: the folder holds another study.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    require_columns(items.column_names, ITEM_FEATURES, "`write_study`", "Give the table of `sample_items`.")
    if not len(items):
        raise DataError("There is nothing to rate: the table of items is empty.")
    shown = [
        {"id": row["question_id"], "question": row["question"], "a": row["answer_a"], "b": row["answer_b"]}
        for row in items
    ]
    study = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:12]
    folder = Path(folder)
    if not overwrite and (folder / "key.json").exists() and _read(folder / "key.json", _KEY)["study"] != study:
        raise SettingsError(
            f"{folder} holds the page and key of another study, whose ratings could then no longer be counted. Name "
            "another folder, or replace them with `overwrite`."
        )
    key = {
        "format": _KEY,
        "study": study,
        "items": {
            row["question_id"]: {name: row[name] for name in ("category", "ours", "model_a", "model_b")}
            for row in items
        },
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("rating_page.html").render(
        title=title, guidance=guidance, study={"id": study, "format": _RATINGS, "items": shown}
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("key.json", json.dumps(key, indent=1, ensure_ascii=False)), ("rating_page.html", page)):
        part = folder / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        part.rename(folder / name)
    return study


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
        win, tie, lose, win_rate ((win − lose) / all + 1), kappa (Fleiss'; None where undefined), raters, by_category
        and by_rater (win, tie, lose of each), items (question_id, category, votes, outcome, comments; in the page's
        order), dropped (ids), study, ours and theirs (names of the models).

    Raises:
        DataError: a file is damaged, of another study, a second one of the same rater, or lacks votes.
        SettingsError: `partial` is neither.
    """
    if partial not in ("raise", "drop"):
        raise SettingsError(f"`partial` is raise or drop, not {partial!r}.")
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise DataError("There are no ratings to count. Name the files that the raters saved, one for each.")
    truth = _read(key, _KEY)
    items = truth["items"]
    votes, comments = _collected(paths, truth, key)
    left_out = {rater: [name for name in items if name not in given] for rater, given in votes.items()}
    dropped = [name for name in items if any(name in some for some in left_out.values())]
    if dropped and partial == "raise":
        found = "; ".join(f"{rater} left out {_listed(some)}" for rater, some in left_out.items() if some)
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
    totals = _totals(row["outcome"] for row in counted)
    kappa = fleiss_kappa([[*_totals(row["votes"].values()).values()] for row in counted])
    categories = sorted({row["category"] for row in counted})
    return {
        "study": truth["study"],
        **{side: _models(items, side) for side in ("ours", "theirs")},
        **totals,
        "win_rate": (totals["win"] - totals["lose"]) / len(counted) + 1,
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
    (first, most), *others = Counter(votes).most_common()
    return "tie" if others and others[0][1] == most else first


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
        content = _read(path, _RATINGS)
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
            raise DataError(f"{path} has a rating of {_shown(name)}, but {why}. Take the file as the page saved it.")
        seen.add(name)
        if vote is not None and vote not in VOTES:
            raise DataError(f"{path} has the vote {vote!r} on {_shown(name)}; votes are {', '.join(VOTES)}, or null.")
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


def _read(path: str | Path, kind: str) -> dict[str, Any]:
    """A key or a rater's file, with the fields that it must have."""
    what, fields = {
        _KEY: ("the key.json of a study", {"study": str, "items": dict}),
        _RATINGS: ("a file of ratings that the page saved", {"study": str, "rater": str, "ratings": list}),
    }[kind]
    try:
        content = json.loads(Path(path).expanduser().read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    except ValueError as error:  # of JSON, or of UTF-8
        raise DataError(f"{path} is damaged: it is no JSON ({error}). Ask for it again.") from error
    if not isinstance(content, dict) or content.get("format") != kind:
        raise DataError(f"{path} is not {what} (its `format` would be {kind!r}). Check which file it is.")
    for name, type_ in fields.items():
        if not isinstance(content.get(name), type_):
            raise DataError(f"{path} is damaged: its `{name}` is {_shown(content.get(name))}. Ask for it again.")
    return content


def _shown(value: Any) -> str:
    return repr(shortened(value, 60) if isinstance(value, str) else value)


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(map(_shown, ids[:_SHOWN])) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")

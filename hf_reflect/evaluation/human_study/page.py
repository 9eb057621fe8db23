"""What raters see: pairs of answers, drawn, shuffled and blinded, on a page of one file; and its key."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset, Features, Value

from ...columns import require_columns
from ...errors import DataError, SettingsError
from ...files import write_whole
from ..answers import listed, matched
from .files import KEY, RATINGS, read

logger = logging.getLogger(__name__)

ITEM_FEATURES = Features(
    {
        name: Value("string")
        for name in ("question_id", "question", "category", "answer_a", "answer_b", "model_a", "model_b", "ours")
    }
)
TITLE = "Which answer is better?"
GUIDANCE = (
    "Read the question and both answers to their end, then say which one you would rather have got. Weigh how "
    "helpful, relevant, accurate and detailed they are. Choose Tie where neither is better."
)


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
        counts = ", ".join(f"{category or 'no category'} ({count})" for category, count in sorted(few.items()))
        logger.warning("Fewer than %d questions, so all were taken: %s.", per_category, counts)
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
        logger.warning("Raters may guess who is who: a model is named in an answer to %s.", listed(telling, most=10))
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
    rated = [
        {"id": row["question_id"], "question": row["question"], "a": row["answer_a"], "b": row["answer_b"]}
        for row in items
    ]
    study = hashlib.sha256(json.dumps(rated).encode()).hexdigest()[:12]
    folder = Path(folder)
    if not overwrite and (folder / "key.json").exists() and read(folder / "key.json", KEY)["study"] != study:
        raise SettingsError(
            f"{folder} holds the page and key of another study, whose ratings could then no longer be counted. Name "
            "another folder, or replace them with `overwrite`."
        )
    key = {
        "format": KEY,
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
        title=title, guidance=guidance, study={"id": study, "format": RATINGS, "items": rated}
    )
    write_whole(folder / "key.json", json.dumps(key, indent=1, ensure_ascii=False))
    write_whole(folder / "rating_page.html", page)
    return study

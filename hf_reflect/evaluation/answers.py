"""Files of answers: one JSON object a line, read into a table and matched question by question."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from ..columns import question, require_columns
from ..errors import DataError
from ..files import write_whole
from ..launch import load_table
from ..parsing.reply import shortened

ANSWER_FEATURES = Features(
    {name: Value("string") for name in ("question_id", "question", "category", "test_set", "answer", "model")}
)
# what other tools call the columns, AlpacaEval's first
_ALSO = {
    "question": ("instruction", "prompt"),
    "answer": ("output", "response"),
    "model": ("generator", "model_id"),
    "category": ("dataset",),
}


def read_answers(path: str | Path) -> Dataset:
    """A file of answers, of `generate.py` or in AlpacaEval's format, as a table.

    In:  question (or instruction, with its input), answer (or output), optionally question_id, category, test_set,
         model (or generator); without question_id the question is its own
    Out: question_id, question, category, test_set, answer, model (text; "" where unknown, a failed answer is null)

    Raises:
        DataError: no such file, columns are missing, a question stands there twice or is null.
    """
    table = load_table(str(path), what="answers")
    for name, others in _ALSO.items():
        there = [other for other in others if other in table.column_names]
        if name not in table.column_names and there:
            table = table.rename_column(there[0], name)
    hint = "Give one JSON object a line, with `question_id`, `question` and `answer`."
    require_columns(table.column_names, ("question", "answer"), f"A file of answers ({path})", hint)
    columns: dict[str, list[Any]] = {}
    try:
        for name in ANSWER_FEATURES:
            columns[name] = table[name][:] if name in table.column_names else [""] * len(table)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8: {error}. Save it so.") from error
    if "input" in table.column_names:  # of an Alpaca-style row
        pairs = zip(columns["question"], table["input"], strict=True)
        columns["question"] = [None if asked is None else question(asked, context) for asked, context in pairs]
    for name in ("question", "answer"):
        strange = [value for value in columns[name] if not isinstance(value, str | None)]
        if strange:
            raise DataError(f"{path} has {strange[0]!r} in its column of {name}s: each must be a text.")
    if "question_id" not in table.column_names:
        columns["question_id"] = columns["question"]
    for name in ("question", "question_id"):
        if None in columns[name]:
            raise DataError(f"{path} has a row whose `{name}` is null (row {columns[name].index(None)}): name it.")
    columns["question_id"] = [str(value) for value in columns["question_id"]]
    for name in ("category", "test_set", "model"):
        columns[name] = [value or "" for value in columns[name]]
    check_ids(columns["question_id"], f"The answers {str(path)!r}")
    return Dataset.from_dict(columns, features=ANSWER_FEATURES)


def answer_to(asked: Mapping[str, Any], **more: str | None) -> dict[str, Any]:
    """A row of answers: what is known of its question, and what came."""
    known = {name: asked.get(name) or "" for name in ("category", "test_set")}
    return {"question_id": asked["question_id"], "question": asked["question"], **known, **more}


def write_answers(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of answers, whole or not at all; columns as `read_answers` gives them, and others."""
    write_whole(Path(path), "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows))


def check_ids(ids: Iterable[str], who: str, remedy: str = "give them ids of their own") -> None:
    """Raise a DataError if an id stands there twice."""
    if twice := [name for name, count in Counter(ids).items() if count > 1]:
        raise DataError(
            f"{who} hold {len(twice)} question{'s' * (len(twice) > 1)} more than once: {listed(twice)}. Leave one "
            f"row for each, or {remedy}."
        )


def matched(ours: Dataset, theirs: Dataset) -> tuple[Dataset, Dataset]:
    """Both models' answers to the same questions, in the order of ours.

    Rows are matched by `question_id`, or by the question itself where the two share no id (only one has any, say).

    Raises:
        DataError: they answer different questions, an answer is missing, an id stands there twice.
    """
    sides = {"ours": ours, "theirs": theirs}
    for name, table in sides.items():
        require_columns(table.column_names, ("question_id", "question", "answer"), f"The answers `{name}`")
        check_ids(table["question_id"][:], f"The answers `{name}`")
        missing = [i for i, answer in zip(table["question_id"], table["answer"], strict=True) if answer is None]
        if missing:
            raise DataError(
                f"The answers `{name}` lack an answer to {len(missing)} of {len(table)} questions: {listed(missing)}."
                " Generate them again (what is there is kept), or leave these questions out of both."
            )
    by = "question_id"
    if set(ours[by]).isdisjoint(theirs[by]) and not set(ours["question"]).isdisjoint(theirs["question"]):
        by = "question"
        for name, table in sides.items():
            who = f"The answers `{name}`, which share no `question_id` with the others,"
            check_ids(table[by], who, "give the same question the same id in both")
    places = {name: {value: place for place, value in enumerate(table[by])} for name, table in sides.items()}
    only = {
        name: [value for value in places[name] if value not in places[other]]
        for name, other in (("ours", "theirs"), ("theirs", "ours"))
    }
    if any(only.values()):
        found = "; ".join(f"only `{name}` has {len(some)}: {listed(some)}" for name, some in only.items() if some)
        raise DataError(
            f"The two models were not asked the same questions ({found}), so they cannot be compared. Generate both "
            "from the same test sets."
        )
    theirs = theirs.select([places["theirs"][value] for value in ours[by]])
    for question_id, one, other in zip(ours["question_id"], ours["question"], theirs["question"], strict=True):
        if one != other:
            raise DataError(
                f"The question {question_id!r} is not the same in both: {shortened(one, 60)!r} and "
                f"{shortened(other, 60)!r}. Generate both from the same test sets."
            )
    return ours, theirs


def listed(ids: Sequence[str], most: int = 5) -> str:
    """The first of them, as a message can hold them, and how many more there are."""
    shown = ", ".join(repr(shortened(str(name), 60)) for name in ids[:most])
    return shown + (f" and {len(ids) - most} more" if len(ids) > most else "")

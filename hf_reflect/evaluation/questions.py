"""The questions that models are compared on: the papers' five test sets, and sets of one's own."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets

from ..columns import question, require_columns
from ..errors import DataError
from ..launch import load_table
from .answers import check_ids

logger = logging.getLogger(__name__)

QUESTION_FEATURES = Features({name: Value("string") for name in ("question_id", "question", "category", "test_set")})
Read = Callable[[dict[str, Any]], tuple[Any, Any, Any]]  # a row → its id (None: its number), question and category


@dataclass(frozen=True)
class PublishedSet:
    """A test set of the papers: how large it is, how its rows are read, and where they are."""

    size: int
    columns: tuple[str, ...]  # without which a table is not this set
    read: Read
    file: str  # repository and name of the published file
    hub: tuple[str, str] | None = None  # id and split, where the Hub is known to hold it


TEST_SETS = {
    "wizardlm": PublishedSet(
        size=218,
        columns=("idx", "Skill", "Instruction"),
        read=lambda row: (row["idx"], row["Instruction"], row["Skill"]),
        file="WizardLM/data/WizardLM_testset.jsonl of github.com/nlpxucan/WizardLM",
    ),
    "vicuna": PublishedSet(
        size=80,
        columns=("question_id", "text", "category"),
        read=lambda row: (row["question_id"], row["text"], row["category"]),
        file="evaluation/test_data/vicuna_test_set.jsonl of github.com/tianyi-lab/Cherry_LLM",
    ),
    "koala": PublishedSet(
        size=180,
        columns=("prompt",),
        read=lambda row: (row.get("id"), row["prompt"], ""),
        file="koala_test_set.jsonl of github.com/arnav-gudibande/koala-test-set",
        hub=("HuggingFaceH4/Koala-test-set", "test"),
    ),
    "self_instruct": PublishedSet(
        size=252,
        columns=("id", "motivation_app", "instruction", "instances"),
        read=lambda row: (row["id"], _asked(row["instruction"], _first_input(row)), row["motivation_app"]),
        file="human_eval/user_oriented_instructions.jsonl of github.com/yizhongw/self-instruct",
        hub=("HuggingFaceH4/self-instruct-eval", "test"),
    ),
    "lima": PublishedSet(
        size=300,
        columns=("conversations",),
        read=lambda row: (None, _first_turn(row["conversations"]), ""),
        file="test.jsonl of huggingface.co/datasets/GAIR/lima",
        hub=("HuggingFaceH4/lima", "test_ift"),  # GAIR/lima itself is a loading script, which datasets reads no more
    ),
}


def load_questions(test_set: str, path: str | None = None, split: str | None = None) -> Dataset:
    """The questions of one test set, for everybody who has them answered and judged.

    In:  the published file of a set in `TEST_SETS`; or, under any other name, a set of your own with the columns
         `question`, or `instruction` with an optional `input`; optionally `question_id` or `id`, and `category` or
         `dataset` (as in AlpacaEval's set)
    Out: question_id (`{test_set}/{id}`, the id being the row's number, from 0, where there is none), question,
         category ("" where there is none), test_set                                          (a row a question)

    Args:
        test_set: a name in `TEST_SETS`, or one of your own.
        path: a .json, .jsonl, .csv or .parquet file, a folder of `save_to_disk`, or the id of a dataset on the Hub;
            where the Hub is known to hold a published set, None takes it from there.
        split: its split: "test" unless given (a file has none).

    Raises:
        DataError: nothing is there; columns that are not the set's; an id that stands there twice; a question without
            text. A published set of another size is only a warning: a part of it is good for a trial.

    Source: arXiv 2310.11716 and 2402.10110; the formats are those of the authors' files (tianyi-lab/Cherry_LLM,
    evaluation/test_data).
    """
    if path is not None and not isinstance(path, str | Path):
        raise DataError(f"The test set {test_set!r} is a path, a Hub id, or null for the Hub's own, not {path!r}.")
    published = TEST_SETS.get(test_set)
    if path is None and published is not None and published.hub is not None:
        path, split = published.hub[0], split or published.hub[1]
    elif path is None:
        found = f"is unknown; there are {', '.join(TEST_SETS)}. A set of your own needs its file"
        if published is not None:
            found = f"has no copy on the Hub that is known. Download {published.file}, and say where it is"
        raise DataError(f"The test set {test_set!r} {found}: `load_questions({test_set!r}, path=...)`.")
    is_file = Path(path).expanduser().is_file()
    rows = load_table(path, split or ("train" if is_file else "test"), f"test set {test_set!r} in")
    where = f"The test set {test_set!r} in {path!r}"
    if published is not None:
        hint = f"A row of the published set has {', '.join(published.columns)}: {published.file}. "
        hint += "For other questions take another name."
        require_columns(rows.column_names, published.columns, where, hint)
        if len(rows) != published.size:
            logger.warning(
                "%s has %d questions, the published set %d: results are not comparable with published ones.",
                *(where, len(rows), published.size),
            )
    read = _own(rows.column_names, where) if published is None else published.read
    return _questions(test_set, rows, read, where)


def load_test_sets(test_sets: Mapping[str, str | None]) -> Dataset:
    """The questions of several test sets in one table: name → path, or None for the Hub's; as `load_questions`."""
    if not test_sets:
        raise DataError(f"No test set is named. Name some of {', '.join(TEST_SETS)}, or your own with its file.")
    return concatenate_datasets([load_questions(name, path) for name, path in test_sets.items()])


def question_rows(questions: Dataset, who: str) -> list[dict[str, Any]]:
    """A table of questions as dicts, looked through before anybody answers them; `who` is told off in errors."""
    hint = "Load them with `hf_reflect.evaluation.questions.load_test_sets`."
    require_columns(questions.column_names, ("question_id", "question"), who, hint)
    names = ("question_id", "question", "category", "test_set", "history", "temperature")
    rows = [dict(row) for row in questions.select_columns([n for n in names if n in questions.column_names])]
    if not rows:
        raise DataError(f"{who} was given no question.")
    check_ids([row["question_id"] for row in rows], "The questions")
    for row in rows:
        if not isinstance(row["question"], str):
            raise DataError(f"The question {row['question_id']!r} is {row['question']!r}, not a text: leave it out.")
        turns = row["history"] = list(row.get("history") or [])
        roles = [turn["role"] for turn in turns]
        pairs = roles[1:] if roles[:1] == ["system"] else roles
        if pairs != ["user", "assistant"] * (len(pairs) // 2) or None in (turn["content"] for turn in turns):
            raise DataError(
                f"The history of the question {row['question_id']!r} has the roles {roles}. It takes pairs of user "
                "and assistant, each with its text, behind a system message if there is one."
            )
    return rows


def _questions(test_set: str, rows: Dataset, read: Read, where: str) -> Dataset:
    table, empty = [], []
    for number, row in enumerate(rows):
        found, text, category = read(row)
        if not isinstance(text, str) or not text.strip():
            empty.append(number)
        identifier = str(number if found is None else found).removeprefix(f"{test_set}/")
        category = "" if category is None else str(category)
        row = (f"{test_set}/{identifier}", text, category, test_set)
        table.append(dict(zip(QUESTION_FEATURES, row, strict=True)))
    if empty:
        shown = ", ".join(map(str, empty[:3])) + ", …" * (len(empty) > 3)
        raise DataError(
            f"{where} has no text to ask in {len(empty)} of {len(rows)} rows: {shown} (counted from 0). Mend them, or "
            "leave them out."
        )
    check_ids((row["question_id"] for row in table), f"The rows of {where[0].lower()}{where[1:]}")
    return Dataset.from_list(table, features=QUESTION_FEATURES)


def _own(columns: Collection[str], where: str) -> Read:
    """How a set of the user's own is read."""
    if "question" not in columns and "instruction" not in columns:
        raise DataError(
            f"{where} has the columns {list(columns)}, but a set of your own needs `question`, or `instruction` with "
            f"an optional `input`. Rename them, or take the name of a published set: {', '.join(TEST_SETS)}."
        )
    ids = next((name for name in ("question_id", "id") if name in columns), "")
    categories = next((name for name in ("category", "dataset") if name in columns), "")

    def read(row: dict[str, Any]) -> tuple[Any, Any, Any]:
        text = row["question"] if "question" in columns else _asked(row["instruction"], row.get("input"))
        return row.get(ids), text, row.get(categories)

    return read


def _asked(instruction: Any, context: Any) -> Any:
    """The instruction with its input, as the student's x; as it is where it has no text."""
    has_input = isinstance(context, str) and context.strip() and isinstance(instruction, str) and instruction.strip()
    return question(instruction, context) if has_input else instruction


def _first_input(row: dict[str, Any]) -> Any:
    return row["instances"][0]["input"] if row["instances"] else None


def _first_turn(conversation: Any) -> Any:
    return next(iter(conversation), None) if isinstance(conversation, list) else conversation

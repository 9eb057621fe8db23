"""FastChat's files: what it asks, how it has it graded, and the answers and judgments that it shows."""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ...columns import require_columns
from ...errors import DataError, SettingsError
from ...parsing.reply import shortened
from ..answers import check_ids, write_answers

Row = dict[str, Any]
NEED_REFERENCE = ("math", "reasoning", "coding")
# what a prompt may show, by its turn
_FIELDS = {1: {"question", "answer"}, 2: {"question_1", "question_2", "answer_1", "answer_2"}}
_REFERENCES = {"ref_answer_1", "ref_answer_2"}


class Bench(NamedTuple):
    """Questions, and what a judge needs beside the answers to them."""

    questions: list[Row]  # question_id, category, turns
    prompts: dict[str, Row]  # by name: system_prompt, prompt_template
    references: dict[Any, list[str]]  # of the categories that need them: answers to both turns, by question


def read_bench(folder: str | Path, judge: str | None = None, reference: str | None = None) -> Bench:
    """FastChat's files, looked through before anything is generated or asked.

    Args:
        folder: FastChat's `fastchat/llm_judge/data`, or the `mt_bench` in it; `judge_prompts.jsonl` lies in either.
        judge: the model that grades; None: only the questions are read.
        reference: whose reference answers it is shown, the name of a file in `reference_answer/` without `.jsonl`;
            unless given the judge's, else the only ones there are.

    Raises:
        DataError: a file or a field is missing; a question that needs a reference answer has none.
        SettingsError: there are several reference answers, and none is named.
    """
    folder = Path(folder).expanduser()
    if not (folder / "question.jsonl").exists():
        folder = folder / "mt_bench"
    questions = _read(folder / "question.jsonl", ("question_id", "category", "turns"))
    check_ids([str(row["question_id"]) for row in questions], "The questions of MT-Bench")
    for row in questions:
        if not isinstance(row["turns"], list) or len(row["turns"]) not in (1, 2):
            raise DataError(f"The question {row['question_id']} has the turns {row['turns']!r}: it takes one or two.")
    if judge is None:
        return Bench(questions, {}, {})
    path = next(
        (p for p in (folder / "judge_prompts.jsonl", folder.parent / "judge_prompts.jsonl") if p.exists()), None
    )
    if path is None:
        raise DataError(f"There is no judge_prompts.jsonl in {folder} or above it: it comes with FastChat's data.")
    prompts = {row["name"]: row for row in _read(path, ("name", "type", "system_prompt", "prompt_template"))}
    needed = {(prompt_name(row, turn), turn) for row in questions for turn in range(1, len(row["turns"]) + 1)}
    for name, turn in sorted(needed):
        _check_prompt(prompts, name, turn, path)
    waiting = [row for row in questions if row["category"] in NEED_REFERENCE]
    references = _read_references(folder / "reference_answer", judge, reference) if waiting else {}
    for row in waiting:
        if len([turn for turn in references.get(row["question_id"], []) if turn]) < len(row["turns"]):
            raise DataError(
                f"The question {row['question_id']} ({row['category']}) has no reference answer to each of its turns "
                f"in {folder / 'reference_answer'}, without which a judge cannot grade it. Add it, or leave the "
                "question out."
            )
    return Bench(questions, prompts, references)


def _check_prompt(prompts: dict[str, Row], name: str, turn: int, path: Path) -> None:
    if name not in prompts:
        raise DataError(f"{path} has no prompt {name!r}; it has {', '.join(prompts)}. Take FastChat's file.")
    prompt = prompts[name]
    if (form := prompt.get("output_format", "[[rating]]")) != "[[rating]]" or prompt["type"] != "single":
        raise DataError(
            f"The prompt {name!r} in {path} asks for {prompt['type']} {form}, not for a single [[rating]]."
        )
    try:
        parts = list(string.Formatter().parse(prompt["prompt_template"]))
    except ValueError as error:
        raise DataError(f"The prompt {name!r} in {path} is no template: {error}. A brace is written twice.") from error
    fields = {field for _, field, _, _ in parts if field is not None}
    there = _FIELDS[turn] | (_REFERENCES if "math" in name else set())
    if strange := sorted(fields - there):
        raise DataError(f"The prompt {name!r} in {path} wants to show {strange}; there are {sorted(there)}.")


def _read_references(folder: Path, judge: str, reference: str | None) -> dict[Any, list[str]]:
    names = sorted(path.stem for path in folder.glob("*.jsonl"))
    name = reference or (file_name(judge) if file_name(judge) in names else names[0] if len(names) == 1 else None)
    if name is None and names:
        raise SettingsError(
            f"{folder} has answers of {', '.join(names)}, but none of the judge {judge!r}. Name whose it is shown: "
            "`reference: <name>`."
        )
    rows = _read(folder / f"{name or judge}.jsonl", ("question_id", "choices"))
    return {row["question_id"]: turns_of(row) for row in rows}


def _read(path: Path, fields: tuple[str, ...]) -> list[Row]:
    """The objects in a JSONL file, each with these fields."""
    if not path.exists():
        raise DataError(f"{path} does not exist. MT-Bench needs FastChat's files: see fastchat/llm_judge/data there.")
    rows = []
    # `splitlines` would also split at U+2028 and others that may stand in a JSON text
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"Line {number} of {path} is no JSON: {error}.") from error
            if not isinstance(row, dict):
                raise DataError(f"Line {number} of {path} is {shortened(line, 60)}, no object. Take FastChat's file.")
            require_columns(row, fields, f"Line {number} of {path}", "Take FastChat's file.")
            rows.append(row)
    if not rows:
        raise DataError(f"{path} is empty.")
    return rows


def turns_of(row: Row) -> list[str]:
    """The texts in a row of FastChat's answers, its first choice."""
    try:
        return list(row["choices"][0]["turns"])
    except (IndexError, KeyError, TypeError) as error:
        raise DataError(f"The answer to question {row['question_id']} has no `choices` with `turns` in it.") from error


def prompt_name(question: Row, turn: int) -> str:
    """Which of FastChat's prompts grades this turn."""
    kind = "single-math-v1" if question["category"] in NEED_REFERENCE else "single-v1"
    return kind + ("-multi-turn" if turn == 2 else "")


def file_name(model: str) -> str:
    """A model's name as one can name a file."""
    return model.strip("/").replace("/", "__")


def read_model_answers(path: str | Path) -> list[Row]:
    """The rows of a file in FastChat's model_answer."""
    return _read(Path(path).expanduser(), ("question_id", "model_id", "choices"))


def save_answers(path: str | Path, rows: list[Row]) -> None:
    """Write FastChat's model_answer, sorted by question; a row that says the same keeps its time stamp."""
    _save(Path(path), rows, ("question_id",), lambda row: row["question_id"])


def save_judgments(path: str | Path, rows: list[Row]) -> None:
    """Write a model's rows into FastChat's model_judgment; those of other models stay."""
    path = Path(path)
    models = {row["model"] for row in rows}
    others = [row for row in _read(path, ("model",)) if row["model"] not in models] if path.exists() else []
    _save(path, others + rows, ("question_id", "model", "turn"), lambda row: (row["model"], row["turn"]))


def _save(path: Path, rows: list[Row], key: tuple[str, ...], order: Callable[[Any], Any]) -> None:
    before = {tuple(row[name] for name in key): row for row in _read(path, key)} if path.exists() else {}
    for row in rows:
        old = before.get(tuple(row[name] for name in key), {})
        if old | {"tstamp": None} == row | {"tstamp": None}:
            row["tstamp"] = old["tstamp"]
    write_answers(path, sorted(rows, key=order))

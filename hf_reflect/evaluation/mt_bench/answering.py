"""Both turns of each question, asked of any model."""

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from datasets import Dataset, Features, List, Value

from ...pairs import TURN
from .files import Row

# FastChat's: what is created is sampled warmly, what has one answer greedily; any other category at 0.7
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_OTHERWISE = 0.7


def answer_turns(
    questions: list[Row], ask: Callable[[Dataset, int], Dataset], model_id: str, greedy: bool = False
) -> list[Row]:
    """A model's answers to both turns, as rows of FastChat's model_answer; the second turn sees the first's answer.

    Args:
        questions: of `read_bench`.
        ask: a table of questions (with history and temperature) and the turn's number → a table of their answers:
            `generate_answers` or `answers_from_endpoint` with their other arguments.
        model_id: the model's name in the files.
        greedy: whether to leave FastChat's temperatures out.
    """
    features = Features(
        {name: Value("string") for name in ("question_id", "question", "category", "test_set")}
        | {"history": List(TURN), "temperature": Value("float64")}
    )
    histories: dict[Any, list[dict[str, str]]] = {row["question_id"]: [] for row in questions}
    for turn in (1, 2):
        rows = [row for row in questions if len(row["turns"]) >= turn]
        if not rows:
            break
        table = [
            {
                "question_id": f"mt_bench/{row['question_id']}",
                "question": row["turns"][turn - 1],
                "category": row["category"],
                "test_set": "mt_bench",
                "history": histories[row["question_id"]],
                "temperature": 0.0 if greedy else TEMPERATURES.get(row["category"], _OTHERWISE),
            }
            for row in rows
        ]
        answers = ask(Dataset.from_list(table, features=features), turn)
        for row, answer in zip(rows, answers["answer"], strict=True):
            question = {"role": "user", "content": row["turns"][turn - 1]}
            histories[row["question_id"]] += [question, {"role": "assistant", "content": answer}]
    made = []
    for row in questions:
        turns = [turn["content"] for turn in histories[row["question_id"]] if turn["role"] == "assistant"]
        told = json.dumps([model_id, row["question_id"], turns])
        made.append(
            {
                "question_id": row["question_id"],
                "answer_id": hashlib.sha256(told.encode()).hexdigest()[:22],
                "model_id": model_id,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": time.time(),
            }
        )
    return made

"""MT-Bench: two turns of a conversation, each graded by a judge, in FastChat's own files.

    read from FastChat's data folder   mt_bench/question.jsonl, mt_bench/reference_answer/<judge>.jsonl,
                                       judge_prompts.jsonl; none of them is part of this project
    written below an output folder     data/mt_bench/model_answer/<model>.jsonl,
                                       data/mt_bench/model_judgment/<judge>_single.jsonl

so that `python -m fastchat.llm_judge.show_result --judge-model <judge>`, started in the output folder, shows the same
means. Sources: arXiv 2306.05685; FastChat's fastchat/llm_judge for the fields of each file, the sampling temperatures
and how a score is read.
"""

import hashlib
import json
import re
import string
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Features, List, Value

from ..columns import require_columns
from ..errors import DataError, SettingsError, TeacherError
from ..pairs import TURN, error_code
from ..parsing.reply import shortened, spoken
from ..teacher import Teacher
from ..teacher.replies import Reply
from ..teacher.stream import Verdict, ask_of
from .answers import check_ids, write_answers
from .generation import require_answers

Row = dict[str, Any]
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
NEED_REFERENCE = ("math", "reasoning", "coding")
UNPARSED = -1  # FastChat's score of a judgment without one; shown and counted, never averaged
HIGHEST = 10
_CHECKED_FROM = 50  # judgments
_RATINGS = tuple(re.compile(left + r"(\d+(?:\.\d*)?)" + right) for left, right in ((r"\[\[", r"\]\]"), (r"\[", r"\]")))
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
    fields = {field for _, field, _, _ in string.Formatter().parse(prompt["prompt_template"]) if field is not None}
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
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"Line {number} of {path} is no JSON: {error}.") from error
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


def grade(bench: Bench, answers: Iterable[Row], judge: Teacher, allow_missing: bool = False) -> list[Row]:
    """Have a judge grade each turn, as rows of FastChat's model_judgment; every reply is in the judge's ledger.

    Args:
        bench: of `read_bench`.
        answers: of one model, rows of FastChat's model_answer.
        judge: how it is asked; FastChat's settings are temperature 0 and 2,048 tokens.
        allow_missing: whether a judgment that failed counts as one without a score, as in FastChat.

    Raises:
        DataError: an answer is missing.
        TeacherError: judgments failed, for want of a budget say, and `allow_missing` is off; or past
            `max_failure_rate` of them have no score, checked from the 50th on; or none has.
    """
    by_id = {row["question_id"]: row for row in answers}
    rows: list[Row] = []
    asks = []
    for turn in (1, 2):
        for question in bench.questions:
            if len(question["turns"]) < turn:
                continue
            answer = by_id.get(question["question_id"])
            if answer is None or len(turns_of(answer)) < turn:
                raise DataError(f"There is no answer to question {question['question_id']}, turn {turn}: generate it.")
            name = prompt_name(question, turn)
            user_prompt = _shown(bench, name, question, turns_of(answer), turn)
            system = bench.prompts[name]["system_prompt"]
            chat = [{"role": "system", "content": system}] if system else []
            asks.append(ask_of(judge.request([*chat, {"role": "user", "content": user_prompt}])))
            rows.append(
                {
                    "question_id": question["question_id"],
                    "model": answer["model_id"],
                    "judge": [judge.model, name],
                    "user_prompt": user_prompt,
                    "judgment": "",
                    "score": UNPARSED,
                    "turn": turn,
                    "tstamp": 0.0,
                }
            )
    replies: dict[str, Reply] = {}
    useless: list[str] = []

    def take(key: str, reply: Reply) -> Verdict:
        replies[key] = reply
        if unparsed := not _is_missing(reply) and read_score(reply.text) == UNPARSED:
            useless.append(reply.error or reply.text)
            if len(replies) >= _CHECKED_FROM and len(useless) > judge.max_failure_rate * len(replies):
                raise _not_in_form(useless, len(replies), judge)
        return Verdict(unusable=unparsed)

    judge.stream((ask._replace(tag=ask.key) for ask in asks), take, total=len(asks))
    if not allow_missing:
        failed = [replies[ask.key].error if _is_missing(replies[ask.key]) else None for ask in asks]
        require_answers([{"error": error} for error in failed], "judgment", judge)
    if useless and all(read_score(reply.text) == UNPARSED for reply in replies.values()):
        raise _not_in_form(useless, len(replies), judge)
    for row, ask in zip(rows, asks, strict=True):
        reply = replies[ask.key]
        row |= {"judgment": reply.text or reply.error, "score": read_score(reply.text), "tstamp": time.time()}
    return rows


def _shown(bench: Bench, name: str, question: Row, answers: list[str], turn: int) -> str:
    fields = {}
    for number, text in enumerate(bench.references.get(question["question_id"], []), 1):
        fields[f"ref_answer_{number}"] = text
    if turn == 1:
        fields |= {"question": question["turns"][0], "answer": answers[0]}
    else:
        for number in (1, 2):
            fields[f"question_{number}"] = question["turns"][number - 1]
            fields[f"answer_{number}"] = answers[number - 1]
    return bench.prompts[name]["prompt_template"].format(**fields)


def _is_missing(reply: Reply) -> bool:
    """Whether asking again may bring one: what a filter withheld stays withheld."""
    return reply.error is not None and error_code(reply.error) != "refused"


def _not_in_form(useless: list[str], answered: int, judge: Teacher) -> TeacherError:
    return TeacherError(
        f"{len(useless)} of {answered} judgments of {judge.model!r} hold no score such as [[8]], for example: "
        f"{shortened(useless[0], 200)}\nTake a judge that follows the prompt, or give it more `max_tokens` if it "
        f"thinks first. Its replies are in {judge.ledger}, and are not asked for again."
    )


def read_score(judgment: str) -> float:
    """The first [[8]] in a judgment, else the first [8]; -1 where there is none from 0 to 10.

    FastChat also takes numbers above 10, which on this scale are no scores.
    """
    text = spoken(judgment, lambda rest: any(rating.search(rest) for rating in _RATINGS), lambda before: False)
    for rating in _RATINGS:
        if found := rating.search(text):
            score = float(found[1])
            return UNPARSED if score > HIGHEST else int(score) if "." not in found[1] else score
    return UNPARSED


def mean_scores(judgments: Iterable[Row], questions: Iterable[Row]) -> dict[str, Any]:
    """What a model's judgments come to: `turn_1`, `turn_2`, `overall`, `categories` by name, `unparsed`.

    Each is {"score": mean, "n": how many turns it is over}, without the unparsed; its score is None where n is 0.
    `overall` is the mean over all judged turns, as FastChat's. The paper's Table 5 gives sRecycled Alpaca 6.653 and
    2.888 for the turns and 4.891 overall, which is not their mean, 4.771: here `n` says what each is over.

    Source: arXiv 2402.10110, Table 5.
    """
    judgments = list(judgments)
    categories = {row["question_id"]: row["category"] for row in questions}
    by_category: dict[str, list[Row]] = {name: [] for name in categories.values()}
    for row in judgments:
        by_category[categories[row["question_id"]]].append(row)

    def mean(rows: list[Row]) -> dict[str, Any]:
        scores = [row["score"] for row in rows if row["score"] != UNPARSED]
        return {"score": sum(scores) / len(scores) if scores else None, "n": len(scores)}

    turns = {f"turn_{turn}": mean([row for row in judgments if row["turn"] == turn]) for turn in (1, 2)}
    return {
        **turns,
        "overall": mean(judgments),
        "categories": {name: mean(rows) for name, rows in by_category.items()},
        "unparsed": sum(row["score"] == UNPARSED for row in judgments),
    }


def describe_scores(scores: dict[str, Any]) -> str:
    """The scores as a table, for people."""
    means = {"first turn": scores["turn_1"], "second turn": scores["turn_2"], "overall": scores["overall"]}
    lines = []
    for name, mean in (means | scores["categories"]).items():
        lines.append(
            f"  {name:<12}  {'–' if mean['score'] is None else format(mean['score'], '.3f'):>6}  n {mean['n']}"
        )
    if scores["unparsed"]:
        lines.append(f"  unparsed      {scores['unparsed']} judgments without a score, in none of the means")
    return "\n".join(lines)


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

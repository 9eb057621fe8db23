"""A judge's grades of each turn, and the means of them."""

import re
import time
from collections.abc import Iterable
from typing import Any

from ...errors import DataError, TeacherError
from ...judge import ask_beforehand
from ...pairs import error_code
from ...parsing.reply import shortened, spoken
from ...teacher import Chat, Teacher
from ...teacher.replies import Reply
from ...teacher.stream import Verdict, ask_of, too_many
from ..generation import require_answers
from .files import Bench, Row, prompt_name, turns_of

UNPARSED = -1  # FastChat's score of a judgment without one; shown and counted, never averaged
HIGHEST = 10
_NUMBER = r"(\d+(?:\.\d*)?)"
_RATING = re.compile(rf"\[\[{_NUMBER}\]\]")
# [8] is a score behind that word or alone in the last line, and elsewhere an index or a source
_SINGLE = re.compile(rf"(?i)\b(?:rating|score)\b[^\[\]\n]{{0,30}}\[{_NUMBER}\]|(?:^|\n)\W*\[{_NUMBER}\]\W*\Z")


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
            chat, name = _chat(bench, question, turns_of(answer), turn)
            asks.append(ask_of(judge.request(chat)))
            rows.append(
                {
                    "question_id": question["question_id"],
                    "model": answer["model_id"],
                    "judge": [judge.model, name],
                    "user_prompt": chat[-1]["content"],
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
            if too_many(len(useless), len(replies), judge.max_failure_rate):
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


def check_judge(bench: Bench, judge: Teacher) -> None:
    """Have the judge grade one made-up answer, before hours are spent on real ones.

    Its reply stays in the ledger, so a second start asks nothing; see `ask_beforehand`.

    Raises:
        TeacherError: the judge cannot be asked, or its reply holds no score.
    """
    chat, _ = _chat(bench, bench.questions[0], ["I do not know."], 1)
    reply = ask_beforehand(judge, chat)
    if reply is None:
        return
    if reply.error:
        raise TeacherError(
            f"The judge {judge.model!r} was asked to grade one answer beforehand, and that failed: "
            f"{shortened(reply.error, 200)}\nSee to the endpoint and run it again."
        )
    if read_score(reply.text) == UNPARSED:
        raise _not_in_form([reply.text], 1, judge)


def _chat(bench: Bench, question: Row, answers: list[str], turn: int) -> tuple[Chat, str]:
    """What the judge is asked about this turn, and the name of the prompt."""
    name = prompt_name(question, turn)
    fields = {}
    for number, text in enumerate(bench.references.get(question["question_id"], []), 1):
        fields[f"ref_answer_{number}"] = text
    if turn == 1:
        fields |= {"question": question["turns"][0], "answer": answers[0]}
    else:
        for number in (1, 2):
            fields[f"question_{number}"] = question["turns"][number - 1]
            fields[f"answer_{number}"] = answers[number - 1]
    prompt = bench.prompts[name]
    system = [{"role": "system", "content": prompt["system_prompt"]}] if prompt["system_prompt"] else []
    return [*system, {"role": "user", "content": prompt["prompt_template"].format(**fields)}], name


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
    """The first [[8]] from 0 to 10 in a judgment, else the first "Rating: [8]"; -1 where there is none.

    FastChat takes the first [[8]] and else the first [8], whatever it stands behind, and numbers above 10 too: an
    index such as `a[0]` in a judgment that was cut off, which would be a score of 0 there, is none here.
    """
    text = spoken(judgment, lambda rest: bool(_scores(rest)), lambda before: False)
    return next(iter(_scores(text)), UNPARSED)


def _scores(text: str) -> list[float]:
    found = _RATING.findall(text) or ["".join(groups) for groups in _SINGLE.findall(text)]
    return [float(number) if "." in number else int(number) for number in found if float(number) <= HIGHEST]


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

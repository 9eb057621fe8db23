"""Answers from a model behind an endpoint, asked as the teacher is."""

from collections import Counter
from typing import Any

from datasets import Dataset, Features, Value

from ...errors import TeacherError
from ...pairs import error_code
from ...parsing import withheld
from ...parsing.reply import shortened
from ...teacher import Teacher
from ...teacher.replies import Reply
from ...teacher.stream import ask_of
from ..answers import ANSWER_FEATURES, answer_to
from ..questions import question_rows

_ASKED = Features({**ANSWER_FEATURES, "finish": Value("string"), "error": Value("string")})


def answers_from_endpoint(
    questions: Dataset,
    teacher: Teacher,
    system: str | None = None,
    name: str | None = None,
    allow_missing: bool = False,
) -> Dataset:
    """The answers of a model behind an endpoint (vLLM, SGLang, OpenAI, …), asked as a chat, kept in the ledger.

    In:  question_id, question, optionally category, test_set, history, temperature (of this question)     (N rows)
    Out: question_id, question, category, test_set, answer (null where it failed), model, finish, error    (N rows)

    Args:
        questions: the table.
        teacher: how the endpoint is asked; what is in its ledger is not asked again.
        system: what stands before each chat.
        name: of the model, for the column `model`; the endpoint's name for it unless given.
        allow_missing: whether questions may stay without an answer.

    Raises:
        TeacherError: some have none, and `allow_missing` is off; see `Teacher`.
        DataError: columns are missing, a question is null or stands there twice, a history is none.
    """
    rows = question_rows(questions, "`answers_from_endpoint`")
    opening = [{"role": "system", "content": system}] if system else []
    asks = []
    for row in rows:
        chat = [*opening, *row["history"], {"role": "user", "content": row["question"]}]
        changes = {"temperature": float(row["temperature"] or 0.0)} if "temperature" in row else {}
        asks.append(ask_of(teacher.request(chat, **changes)))
    replies: dict[str, Reply] = {}
    teacher.stream(
        (ask._replace(tag=ask.key) for ask in asks), lambda key, reply: replies.update({key: reply}), total=len(asks)
    )
    table = []
    for row, ask in zip(rows, asks, strict=True):
        reply = replies[ask.key]
        text, incomplete = reply.text.strip(), withheld(reply.finish_reason) or ""
        # an answer may be cut off, as a local model's may; one that never began, or was filtered, is none
        error = reply.error or (incomplete if not text or error_code(incomplete) == "refused" else None) or None
        answer = {"answer": None if error else text, "finish": reply.finish_reason, "error": error}
        table.append(answer_to(row, model=name or teacher.model, **answer))
    if not allow_missing:
        require_answers(table, "question", teacher)
    return Dataset.from_list(table, features=_ASKED)


def require_answers(rows: list[dict[str, Any]], what: str, teacher: Teacher) -> None:
    """Raise a TeacherError where rows carry an `error`: how many, why, and how to go on."""
    errors = [row["error"] for row in rows if row["error"]]
    if errors:
        counts = ", ".join(f"{code} {n}" for code, n in Counter(map(error_code, errors)).most_common())
        raise TeacherError(
            f"{len(errors)} of {len(rows)} {what}s have no answer ({counts}), such as: {shortened(errors[0], 200)}\n"
            f"Run it again: what {teacher.model!r} answered is in {teacher.ledger} and is not asked again. Raise the "
            "limit where it was a limit, or let these go with `allow_missing`."
        )

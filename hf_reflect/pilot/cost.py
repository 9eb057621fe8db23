"""What a teacher took for the sample, and what the full run will take."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..prompts import PROMPTS
from ..teacher import Teacher
from ..teacher.stream import size
from .chance import interval, ratio, samples
from .tables import Asked, code_of


class Took(NamedTuple):
    """What the calls of each row took, (rows,); reused replies as if they were asked now."""

    rows: list[str]
    calls: np.ndarray
    timed: np.ndarray  # calls of which it is known how long they took
    seconds: np.ndarray
    prompt_tokens: np.ndarray
    completion_tokens: np.ndarray
    cost: np.ndarray | None  # None without prices

    @property
    def tokens(self) -> np.ndarray:
        """Of prompts and replies, (rows,)."""
        return self.prompt_tokens + self.completion_tokens


def calls_of(teacher: Teacher, versions: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[dict[str, str]]]]:
    """All calls that these versions of a row ask for: the ledger's key, and the chat."""
    calls = []
    for row in versions:
        parts = {"original": ("instruction", "response"), "instruction": ("response",)}.get(row["variant"], ())
        for part in parts if not code_of(row) else ():
            chat = PROMPTS[part].chat(row["instruction"], row["response"], row["input"], row["history"])
            calls.append((teacher.key(chat), chat))
    return calls


def took_by(
    teacher: Teacher, versions: Mapping[str, list[dict[str, Any]]], known: Mapping[str, dict[str, Any]]
) -> Took:
    """Of each row what its calls took, by the records that the ledger has of them."""
    numbers = []
    for some in versions.values():
        calls = calls_of(teacher, some)
        there = [(known[key], chat) for key, chat in calls if key in known]
        seconds = [record["seconds"] for record, _ in there if record.get("seconds")]
        prompt, completion = np.array([(0, 0), *(_tokens(*each) for each in there)]).sum(axis=0)
        numbers.append((len(calls), len(seconds), sum(seconds), prompt, completion))
    asked, timed, took, prompt, completion = np.array(numbers, float).reshape(-1, 5).T
    has_prices = None not in (teacher.price_per_million_input, teacher.price_per_million_output)
    cost = np.array([teacher.cost(*each) for each in zip(prompt, completion, strict=True)]) if has_prices else None
    return Took(list(versions), asked, timed, took, prompt, completion, cost)


def _tokens(record: Mapping[str, Any], chat: list[dict[str, str]]) -> tuple[int, int]:
    """Of prompt and reply; a quarter of the bytes where the endpoint did not count."""
    if record.get("prompt_tokens"):
        return record["prompt_tokens"], record.get("completion_tokens") or 0
    return size(chat) // 4, len(record["text"].encode("utf-8", "replace")) // 4


def of_the_sample(asked: Asked, known: Mapping[str, dict[str, Any]], has_prices: bool) -> dict[str, Any]:
    """What the sample took, each reply once, whenever it was asked for."""
    records = known.values()
    prompt, completion = (sum(r.get(name) or 0 for r in records) for name in ("prompt_tokens", "completion_tokens"))
    return {
        "replies": len(records),
        "asked_now": int(asked.teacher.stats["asked"]),
        "requests_now": asked.requests,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cost": asked.teacher.cost(prompt, completion) if has_prices else None,
        "uncounted": sum(not record.get("prompt_tokens") for record in records),
        "returned": dict(Counter(record.get("model") or "no name" for record in records).most_common()),
    }


def cost_per_kept(took: Took, kept: list[bool], seed: int) -> dict[str, dict[str, Any] | None]:
    """Money for each row that is kept, dropped ones included; tokens without prices."""
    weights = samples(len(kept), seed)
    found: dict[str, dict[str, Any] | None] = {}
    for name, spent in (("cost_per_kept", took.cost), ("tokens_per_kept", took.tokens)):
        found[name] = None
        if spent is not None and any(kept):
            drawn = ratio(weights @ spent, weights @ np.array(kept, float))
            found[name] = {"value": float(spent.sum() / sum(kept)), "interval": interval(drawn)}
    return found


def of_the_full_run(took: Took, rows: int, teacher: Teacher, seed: int) -> dict[str, Any]:
    """What so many rows will take, if they are like those of the sample.

    Hours are requests times seconds a request over `max_concurrency`, but not fewer than the limits a minute allow.
    """
    as_it_is = np.full(len(took.rows), 1 / len(took.rows))
    weights = np.vstack([as_it_is, samples(len(took.rows), seed)])

    def estimate(drawn: np.ndarray) -> dict[str, Any]:
        return {"value": float(drawn[0]), "interval": interval(drawn[1:])}

    columns = {name: getattr(took, name) for name in ("calls", "prompt_tokens", "completion_tokens", "tokens")}
    found: dict[str, Any] = {"rows": rows, **{n: estimate(rows * (weights @ some)) for n, some in columns.items()}}
    found["cost"] = None if took.cost is None else estimate(rows * (weights @ took.cost))
    found["hours"] = found["bound_by"] = found["seconds_a_request"] = None
    if took.timed.sum():
        requests = rows * (weights @ took.calls)
        each = ratio(weights @ took.seconds, weights @ took.timed)
        by = {"max_concurrency": requests * each / teacher.max_concurrency}
        if teacher.requests_per_minute:
            by["requests_per_minute"] = requests * 60 / teacher.requests_per_minute
        if teacher.tokens_per_minute:  # counted as endpoints do
            tokens = rows * (weights @ took.prompt_tokens) + requests * teacher.max_tokens
            by["tokens_per_minute"] = tokens * 60 / teacher.tokens_per_minute
        found["bound_by"] = max(by, key=lambda name: by[name][0])
        found["hours"] = estimate(np.max(list(by.values()), axis=0) / 3600)
        found["seconds_a_request"] = float(took.seconds.sum() / took.timed.sum())
    return found

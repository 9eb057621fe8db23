"""Asking one endpoint many things at once: what the requests in flight share."""

import asyncio
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import BudgetExceeded, TeacherError
from .ledger import Ledger

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from .teacher import Teacher

logger = logging.getLogger(__name__)

# How long an endpoint may be out of reach before asking stops: little before the first reply, when a setting is likely
# wrong; more after it, when a server may be restarting. A rerun asks only what is missing.
PATIENCE_AT_FIRST = 5.0  # seconds
PATIENCE = 120.0  # seconds; also for an endpoint that answers nothing but 429


@dataclass(frozen=True)
class Reply:
    """What came back for one chat. `error` is `teacher: …` or `budget: …` where nothing did; then text is ""."""

    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reused: bool = False


class Question(NamedTuple):
    """A request, its key in the ledger, and the most that it can cost."""

    key: str
    request: dict[str, Any]
    tokens: int
    cost: float


class _Retryable(Exception):
    """A failure that may pass: its words, and how many seconds the endpoint asked to wait."""

    def __init__(self, words: str, wait: float | None = None, busy: bool = False):
        super().__init__(words)
        self.wait = wait
        self.busy = busy  # the endpoint is there and wants patience: no attempt is used up


class _Refused(Exception):
    """This one request will never work; others may."""


class _OutOfBudget(Exception):
    """This request could pass a limit."""


class _Stopped(Exception):
    """Another request found out that asking is of no use."""


class Asking:
    """One round of asking, on one event loop.

    Shared by the requests: rate limits; a gate that a 429 closes, and through which they then go spaced out until it
    works again; the budget; the reason to stop. Where one finds such a reason, no more are sent, and what is in flight
    is still waited for and kept.
    """

    def __init__(self, teacher: "Teacher", ledger: Ledger, on_reply: Callable[[str, Reply], None], largest: int):
        from aiolimiter import AsyncLimiter

        self.teacher, self.ledger, self.on_reply = teacher, ledger, on_reply
        self.stopped: Exception | None = None
        self.anything_answered = False
        self.failing_since: float | None = None  # the first failure since something got through (time.monotonic)
        self.gate = 0.0  # nobody sends before this moment (time.monotonic)
        self.spacing = 0.0  # seconds between two who pass the gate
        self.slowed = 0.0  # when the spacing last grew
        self.sent: dict[str, float] = {}  # in flight: key → when
        self.settled = asyncio.Event()  # set whenever a reservation was corrected
        self.limit_name = "max_tokens"
        # a limiter lets a whole window through at once, so windows are short: above its timer's precision, and for
        # tokens so long that the largest request fits
        rate = teacher.requests_per_minute
        window = max(60 / rate, 0.05) if rate else 0.0
        self.requests_limiter = AsyncLimiter(rate * window / 60, window) if rate else None
        rate = teacher.tokens_per_minute
        self.tokens_limiter = AsyncLimiter(largest, 60 * largest / rate) if rate else None

    async def all(self, questions: Iterator[Question], total: int) -> None:
        """Answer them all; raises what stopped the round, after what was in flight has come back."""
        import openai
        from tqdm import tqdm

        teacher = self.teacher
        client = openai.AsyncOpenAI(
            api_key=teacher.api_key(), base_url=teacher.base_url, max_retries=0, timeout=teacher.timeout
        )
        # disable=None: no bar where there is no terminal
        with tqdm(total=total, desc="Asking the teacher", unit="reply", disable=None) as bar:
            async with client, asyncio.TaskGroup() as group:
                for _ in range(min(teacher.max_concurrency, total)):
                    group.create_task(self._work(client, questions, bar.update))
        if self.stopped is not None:
            raise self.stopped

    async def _work(self, client: "AsyncOpenAI", questions: Iterator[Question], advance: Callable[[], Any]) -> None:
        """Take one question after the other; a question holds its place until its reply is committed."""
        for question in questions:
            try:
                reply = await self._answer(client, question)
                self.on_reply(question.key, reply)
            except _Stopped:
                return
            except Exception as error:  # raised again by `all`
                self.stopped = self.stopped or error
                self.settled.set()
            if self.stopped is not None:
                return
            advance()

    async def _answer(self, client: "AsyncOpenAI", question: Question) -> Reply:
        from tenacity import AsyncRetrying, retry_if_exception_type

        failures = 0

        def give_up(state: Any) -> bool:
            nonlocal failures
            failures += not state.outcome.exception().busy
            return failures > self.teacher.max_retries or self.stopped is not None

        def wait(state: Any) -> float:
            error = state.outcome.exception()
            if error.busy:
                return 0.0  # at the gate, with all others
            backoff = min(0.5 * 2 ** (failures - 1), 30.0) * random.uniform(0.5, 1.5)
            return backoff if error.wait is None else error.wait

        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(_Retryable), stop=give_up, wait=wait, reraise=True
            ):
                with attempt:
                    await self._turn(question)
                    return await self._once(client, question)
        except _OutOfBudget as error:
            words = f"budget: {error}"
        except (_Refused, _Retryable) as error:
            words = f"teacher: {error}"
        self.teacher.count(failed=1)
        return Reply(error=words)

    async def _turn(self, question: Question) -> None:
        """Wait until one may send: the gate, rate limits, the budget."""
        await self._pass_gate()
        if self.requests_limiter:
            await self.requests_limiter.acquire()
        if self.tokens_limiter:
            await self.tokens_limiter.acquire(question.tokens)
        while self.gate - self.spacing > time.monotonic():  # it was closed meanwhile
            await self._pass_gate()
        teacher = self.teacher
        limits = teacher.max_requests, teacher.max_total_tokens, teacher.max_cost
        while self.stopped is None and not self.ledger.reserve(question.tokens, question.cost, *limits):
            if not self.sent:
                self._out_of_budget()
            self.settled.clear()
            await self.settled.wait()  # what is in flight may give back part of what it reserved
        if self.stopped is not None:
            raise _Stopped
        self.sent[question.key] = time.monotonic()

    async def _pass_gate(self) -> None:
        while (closed := self.gate - time.monotonic()) > 0 and self.stopped is None:
            await asyncio.sleep(min(closed, 1.0))
        self.gate = max(self.gate, time.monotonic()) + self.spacing

    def _out_of_budget(self) -> None:
        teacher, spent = self.teacher, self.ledger.spent()
        limits = {"max_requests": "requests", "max_total_tokens": "tokens", "max_cost": "cost"}
        of = [
            f"{spent[unit]:.{4 if unit == 'cost' else 0}f} of {name}={getattr(teacher, name)}"
            for name, unit in limits.items()
            if getattr(teacher, name) is not None
        ]
        words = f"spent {', '.join(of)}; this request could pass it"
        if teacher.on_budget == "raise":
            raise BudgetExceeded(
                f"The budget of {teacher.ledger} is used up: {words}. Raise the limit and run again: only the rest is "
                "asked."
            )
        raise _OutOfBudget(words)

    async def _once(self, client: "AsyncOpenAI", question: Question) -> Reply:
        """Send once. What was reserved is corrected to what was used, together with the commit of the reply."""
        import openai

        unused = (-question.tokens, -question.cost)  # given back where the endpoint certainly did no work
        body = {**question.request}
        limit_name = self.limit_name
        body[limit_name] = body.pop("max_tokens")
        started = self.sent[question.key]
        try:
            raw = await client.chat.completions.with_raw_response.create(**body)
            answer = read_completion(raw.content)
        except openai.APIStatusError as error:
            self.ledger.correct(*unused)
            raise self._status_error(error, limit_name, started) from error
        except openai.APITimeoutError as error:  # may be billed: what was reserved stays so
            raise _Retryable(f"no answer within {self.teacher.timeout:g} s") from error
        except openai.APIConnectionError as error:
            self.ledger.correct(*unused)
            words = f"{type(error).__name__}: {error.__cause__ or error}"
            self._out_of_reach(words, error, question.key)
            raise _Retryable(words) from error
        except ValueError as error:  # a 200 that holds no reply; it may have been billed
            raise _Retryable(f"no reply in the answer: {error}") from error
        finally:
            del self.sent[question.key]
            self.settled.set()

        self.anything_answered, self.failing_since = True, None
        self.spacing = self.spacing * 0.95 if self.spacing > 1e-3 else 0.0
        used = answer["prompt_tokens"], answer["completion_tokens"]
        cost = self.teacher.cost(*used)
        # an endpoint that does not count: what was reserved is the only bound there is
        over = (sum(used) - question.tokens, cost - question.cost) if answer.pop("counted") else (0, 0.0)
        record = answer | {"seconds": round(time.monotonic() - started, 3)}
        self.ledger.put(question.key, question.request, record, self.teacher.endpoint, over)
        self.teacher.count(asked=1, prompt_tokens=used[0], completion_tokens=used[1], cost=cost)
        return reply_of(record)

    def _status_error(self, error: Any, limit_name: str, sent: float) -> Exception:
        """What to do about a status that is no success; `limit_name` is how the request named its token limit."""
        words = f"{error.status_code} {_endpoint_words(error)}"
        if error.status_code == 400 and "max_completion_tokens" in words and limit_name == "max_tokens":
            self.limit_name = "max_completion_tokens"  # the newer name, which OpenAI's reasoning models insist on
            return _Retryable(words, wait=0.0)
        hopeless = ("(insufficient_quota)", "(unsupported_parameter)", "(unsupported_value)")
        if error.status_code in (401, 403, 404) or words.endswith(hopeless):
            return TeacherError(
                f"The endpoint {self.teacher.endpoint} refuses the teacher {self.teacher.model!r}: {words}\n"
                f"Check the model's name, `base_url`, the key in {self.teacher.api_key_env}, and the sampling "
                "settings (null leaves one out). Replies that came before are in the ledger."
            )
        wait = _retry_after(error.response.headers)
        if error.status_code == 429:
            return self._slow_down(words, wait or 1.0, sent)
        if error.status_code in (408, 409, 425) or error.status_code >= 500:
            return _Retryable(words, wait)
        return _Refused(words)

    def _slow_down(self, words: str, wait: float, sent: float) -> Exception:
        """Close the gate for everybody; behind it go slower than those did who were too many."""
        now = time.monotonic()
        self.failing_since = self.failing_since or now
        if now - self.failing_since > max(PATIENCE, 3 * wait):
            return TeacherError(
                f"The endpoint {self.teacher.endpoint} only answers {words}\nSet `requests_per_minute` to what it "
                "allows, or go on later with the same command: replies that came before are in the ledger."
            )
        if sent > self.slowed:
            self.spacing, self.slowed = min(max(2 * self.spacing, 0.02), 5.0), now
        self.gate = max(self.gate, now + wait)
        return _Retryable(words, busy=True)

    def _out_of_reach(self, words: str, cause: BaseException, key: str) -> None:
        """Stop everything where nothing gets through for too long, and no older request may still be answered."""
        now = time.monotonic()
        if self.failing_since is None:
            self.failing_since = now
            logger.warning("The endpoint %s does not answer (%s); trying again.", self.teacher.endpoint, words)
        patience = PATIENCE if self.anything_answered else PATIENCE_AT_FIRST
        others = [sent for other, sent in self.sent.items() if other != key]
        if now - self.failing_since > patience and all(sent >= self.failing_since for sent in others):
            raise TeacherError(
                f"The endpoint {self.teacher.endpoint} cannot be reached: {words}\nStart it or check `base_url`, then "
                "give the same command again: replies that came before are in the ledger."
            ) from cause


def run(coroutine: Any) -> None:
    """Run to the end, also where a loop already runs (notebooks): then in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(coroutine)
        return
    outcome: list[BaseException] = []

    def target() -> None:
        try:
            asyncio.run(coroutine)
        except BaseException as error:  # handed to the caller's thread below
            outcome.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if outcome:
        raise outcome[0]


def read_completion(content: bytes) -> dict[str, Any]:
    """The fields of a chat completion that are kept. ValueError where there is no choice in it."""
    body = json.loads(content)
    try:
        choice, usage = body["choices"][0], body.get("usage") or {}
        text = choice["message"].get("content") or ""
        if isinstance(text, list):  # parts, as some servers send them
            text = "".join(part.get("text") or "" for part in text)
        return {
            "text": text.encode("utf-8", "replace").decode(),  # half a surrogate pair fits neither SQLite nor Arrow
            "finish_reason": choice.get("finish_reason"),
            "model": body.get("model"),
            "fingerprint": body.get("system_fingerprint"),
            "prompt_tokens": usage.get("prompt_tokens") or 0,
            "completion_tokens": usage.get("completion_tokens") or 0,
            "counted": bool(usage.get("prompt_tokens")),
        }
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"no choice in {content[:200].decode('utf-8', 'replace')}") from error


def reply_of(record: dict[str, Any], reused: bool = False) -> Reply:
    """A record of the ledger as a Reply; how long it took, and the endpoint's fingerprint, stay behind."""
    names = ("text", "finish_reason", "model", "prompt_tokens", "completion_tokens")
    return Reply(**{name: record[name] for name in names}, reused=reused)


def _endpoint_words(error: Any) -> str:
    """What the endpoint itself said, in one line."""
    body = error.body if isinstance(error.body, dict) else {}
    nested = body.get("error")
    inner = nested if isinstance(nested, dict) else body
    words = inner.get("message") or inner.get("detail") or error.response.text or error.message
    code = inner.get("code")
    return " ".join(f"{words}{f' ({code})' if isinstance(code, str) else ''}".split())[:300]


def _retry_after(headers: Any) -> float | None:
    """Seconds that the endpoint asks to wait, at most ten minutes."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return min(float(headers[name]) * unit, 600.0)
        except (KeyError, ValueError):
            continue
    return None

"""The teacher: any OpenAI-compatible endpoint, asked for many chats at once, politely and within a budget."""

import asyncio
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import BudgetExceeded, SettingsError, TeacherError
from .ledger import Ledger, request_key

if TYPE_CHECKING:
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)

Chat = list[dict[str, str]]

OPENAI = "https://api.openai.com/v1"
# How long nothing may get through before asking stops: little before the first reply, when a setting is likely wrong;
# more after it, when an endpoint may be restarting. A rerun asks only what is missing.
PATIENCE_AT_FIRST = 5.0  # seconds
PATIENCE = 120.0  # seconds
# A reply's length is unknown before it came; with fewer replies than this in the ledger it is guessed.
ENOUGH_REPLIES = 50
GUESSED_COMPLETION_TOKENS = 500


@dataclass(frozen=True)
class Reply:
    """What came back for one chat.

    `error` is `teacher: …` or `budget: …` where nothing usable did; then text is "".
    """

    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reused: bool = False


class _Retryable(Exception):
    """A failure that may pass: its words, and how many seconds the endpoint asked to wait."""

    def __init__(self, words: str, wait: float | None = None):
        super().__init__(words)
        self.wait = wait


class _Refused(Exception):
    """This one request will never work; others may."""


class _OutOfBudget(Exception):
    """The next request could pass a limit."""


class _Question(NamedTuple):
    key: str
    request: dict[str, Any]
    tokens: int  # the most this request can use
    cost: float  # likewise, money


@dataclass
class Teacher:
    """A model behind an OpenAI-compatible endpoint, and how hard it may be asked.

    `teacher(chats) -> list[Reply]`, one each, in order. Every reply is in the `ledger` before it is returned; a chat
    whose reply is there is never asked again, whatever endpoint answered it. Equal chats are asked once. Plain fields
    only: the key is read from the environment variable `api_key_env` when a call is made, and kept nowhere.

    Args:
        model: its name as the endpoint knows it.
        base_url: the endpoint, OpenAI's where absent. One with a key variable that is not set gets a dummy key.
        ledger: path of the SQLite file.
        temperature, top_p, max_tokens: sampling; the papers' defaults.
        extra_body: further fields of each request, as vLLM and others take them.
        max_concurrency: requests in flight.
        requests_per_minute, tokens_per_minute: the endpoint's limits; None: none.
        timeout: seconds for one request.
        max_retries: how often one request is repeated after a failure that may pass.
        max_failure_rate: share of unusable replies past which `ReflectionTransform` stops (from 50 replies on).
        price_per_million_input, price_per_million_output: money per million tokens, for `stats`, `estimate`,
            `max_cost`.
        max_cost, max_requests, max_total_tokens: limits that hold for the ledger, over restarts and processes. The
            most a request can cost is set aside before it is sent, so none is ever passed.
        on_budget: at a limit "stop" (the remaining chats get `error="budget: …"`) or "raise" BudgetExceeded.

    Raises:
        TeacherError: when called: no key, nothing gets through, the endpoint does not know key or model.
        BudgetExceeded: with `on_budget="raise"`.
        SettingsError: values out of range; `max_cost` without prices.
    """

    model: str
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    ledger: str = "ledger.sqlite"
    temperature: float | None = 0.0
    top_p: float | None = 1.0
    max_tokens: int = 2048
    extra_body: dict[str, Any] | None = None
    max_concurrency: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 300.0
    max_retries: int = 8
    max_failure_rate: float = 0.2
    price_per_million_input: float | None = None
    price_per_million_output: float | None = None
    max_cost: float | None = None
    max_requests: int | None = None
    max_total_tokens: int | None = None
    on_budget: str = "stop"
    _stats: dict[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.ledger = str(self.ledger)
        self._stats = _no_stats()
        if self.on_budget not in ("stop", "raise"):
            raise SettingsError(f'`on_budget` is "stop" or "raise", not {self.on_budget!r}.')
        if self.max_cost is not None and None in (self.price_per_million_input, self.price_per_million_output):
            raise SettingsError(
                f"`max_cost={self.max_cost}` cannot be kept without prices: set `price_per_million_input` and "
                "`price_per_million_output`, or limit `max_total_tokens` or `max_requests`."
            )
        for name in ("max_concurrency", "max_tokens"):
            if getattr(self, name) < 1:
                raise SettingsError(f"`{name}` must be at least 1, not {getattr(self, name)}.")

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _stats=_no_stats())

    @property
    def stats(self) -> dict[str, float]:
        """What this object did.

        Keys: asked, reused, failed (chats), prompt_tokens, completion_tokens, cost (of the asked).
        """
        return dict(self._stats)

    def __call__(self, chats: list[Chat]) -> list[Reply]:
        """Answer every chat, from the ledger or by asking; in order."""
        replies: list[Reply] = [Reply()] * len(chats)

        def collect(indices: list[int], reply: Reply) -> None:
            for index in indices:
                replies[index] = reply

        self.stream(chats, collect)
        return replies

    def stream(self, chats: list[Chat], on_reply: Callable[[list[int], Reply], None]) -> None:
        """Answer every chat, in whatever order replies come.

        `on_reply(indices, reply)` is called once for each distinct chat, with its positions in `chats`, after the
        reply is in the ledger. What it raises ends the asking.
        """
        places: dict[str, list[int]] = {}
        for index, chat in enumerate(chats):
            places.setdefault(self.key(chat), []).append(index)
        missing = []
        with Ledger(self.ledger) as ledger:
            known = ledger.get(places)
            for key, indices in places.items():
                if key in known:
                    self._stats["reused"] += len(indices)
                    on_reply(indices, _reply(known[key], reused=True))
                else:
                    missing.append(key)
            del known
            if missing:
                questions = (self._question(key, chats[places[key][0]]) for key in missing)
                asking = _Asking(self, ledger, lambda key, reply: on_reply(places[key], reply))
                _run(asking.all(questions, len(missing)))

    def request(self, chat: Chat) -> dict[str, Any]:
        """What determines the reply, and so the ledger's key: model, messages, sampling parameters, `extra_body`."""
        return {"messages": chat, **self.sampling()}

    def sampling(self) -> dict[str, Any]:
        """What determines a reply besides the messages; a setting that is None is not sent."""
        names = ("model", "temperature", "top_p", "max_tokens")
        sampling = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return sampling | ({"extra_body": self.extra_body} if self.extra_body else {})

    def key(self, chat: Chat) -> str:
        """The ledger's key of this chat."""
        return request_key(self.request(chat))

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Money for these tokens; 0 without prices."""
        price_in, price_out = self.price_per_million_input or 0.0, self.price_per_million_output or 0.0
        return (prompt_tokens * price_in + completion_tokens * price_out) / 1e6

    @property
    def endpoint(self) -> str:
        """Where requests go."""
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI

    def check_ready(self) -> None:
        """Before work: TeacherError if a key is needed, none is set, and the ledger has nothing of this model."""
        if Path(self.ledger).exists():
            with Ledger(self.ledger) as ledger:
                if ledger.mean_tokens(self.model, sample=1)[0]:
                    return
        self.api_key()

    def api_key(self) -> str:
        """The key from the environment; a dummy for an endpoint of one's own that needs none."""
        key = os.environ.get(self.api_key_env)
        if not key and self.endpoint == OPENAI:
            raise TeacherError(
                f"The teacher {self.model!r} needs an API key: `export {self.api_key_env}=...`, or set `base_url` to "
                "an endpoint of your own.\nTo see the whole way without a key: `accelerate launch --config_file "
                "accelerate_configs/cpu.yaml recipes/srecycle_wizardlm.py --config recipes/quickstart.yaml`"
            )
        return key or "not-needed"

    def recorded(self, chats: list[Chat]) -> list[Reply]:
        """The replies that are in the ledger; the others have `error="budget: not asked"`."""
        keys = [self.key(chat) for chat in chats]
        with Ledger(self.ledger) as ledger:
            known = ledger.get(dict.fromkeys(keys))
        missing = Reply(error="budget: not asked")
        return [_reply(known[key], reused=True) if key in known else missing for key in keys]

    def estimate(self, chats: list[Chat]) -> dict[str, float]:
        """What asking these chats would take, without asking: calls, reused, prompt_tokens, completion_tokens, cost.

        Tokens of prompts are guessed as a quarter of their UTF-8 bytes, those of replies as 500 each; from 50 replies
        of this model in the ledger on, as the mean of what those had.
        """
        unique = {self.key(chat): chat for chat in chats}
        with Ledger(self.ledger) as ledger:
            known = ledger.get(unique)
            count, _, mean_completion = ledger.mean_tokens(self.model)
        todo = [chat for key, chat in unique.items() if key not in known]
        prompt = sum(_bytes(chat) // 4 for chat in todo)
        each = mean_completion if count >= ENOUGH_REPLIES else min(GUESSED_COMPLETION_TOKENS, self.max_tokens)
        completion = round(len(todo) * each)
        return {
            "calls": len(todo),
            "reused": len(chats) - len(todo),
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "cost": self.cost(prompt, completion),
        }

    def _question(self, key: str, chat: Chat) -> _Question:
        prompt = _bytes(chat) + 16 * len(chat)  # no tokenizer makes more tokens than bytes
        return _Question(key, self.request(chat), prompt + self.max_tokens, self.cost(prompt, self.max_tokens))


class _Asking:
    """One round of asking: what the requests in flight share. Lives on one event loop."""

    def __init__(self, teacher: Teacher, ledger: Ledger, on_reply: Callable[[str, Reply], None]):
        from aiolimiter import AsyncLimiter

        self.teacher, self.ledger, self.on_reply = teacher, ledger, on_reply
        self.stats = teacher._stats
        self.anything_answered = False
        self.failing_since: float | None = None  # the first failure since something got through (time.monotonic)
        self.gate = 0.0  # nobody sends before this moment (time.monotonic)
        self.in_flight = 0
        self.limit_name = "max_tokens"
        self.settled = asyncio.Event()  # set whenever a reservation is given back
        self.budget_error: str | None = None
        # a limiter lets a whole window through at once, so windows are short (but not below its timer's precision)
        per_minute = teacher.requests_per_minute
        window = max(60 / per_minute, 0.05) if per_minute else 0.0
        self.requests_limiter = AsyncLimiter(per_minute * window / 60, window) if per_minute else None
        self.tokens_limiter: AsyncLimiter | None = None  # made with the first request that needs it

    async def all(self, questions: Iterator[_Question], total: int) -> None:
        import openai
        from tqdm import tqdm

        client = openai.AsyncOpenAI(
            api_key=self.teacher.api_key(), base_url=self.teacher.base_url, max_retries=0, timeout=self.teacher.timeout
        )
        # disable=None: no bar where there is no terminal
        with tqdm(total=total, desc="Asking the teacher", unit="reply", disable=None) as bar:
            async with client:
                workers = min(self.teacher.max_concurrency, total)
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(workers):
                            group.create_task(self._work(client, questions, bar.update))
                except BaseExceptionGroup as failures:
                    first = next(
                        (e for e in failures.exceptions if isinstance(e, TeacherError)), failures.exceptions[0]
                    )
                    raise first from first.__cause__

    async def _work(self, client: "AsyncOpenAI", questions: Iterator[_Question], advance: Callable[[], Any]) -> None:
        """Take one question after the other; a question holds its place until its reply is committed."""
        for question in questions:
            try:
                reply = await self._answer(client, question)
            except _OutOfBudget:
                self.stats["failed"] += 1
                reply = Reply(error=f"budget: {self.budget_error}")
            except (_Refused, _Retryable) as error:
                self.stats["failed"] += 1
                reply = Reply(error=f"teacher: {error}")
            self.on_reply(question.key, reply)
            advance()

    async def _answer(self, client: "AsyncOpenAI", question: _Question) -> Reply:
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

        def wait(state: Any) -> float:
            error = state.outcome.exception()
            backoff = min(0.5 * 2 ** (state.attempt_number - 1), 30.0)
            return error.wait if error.wait is not None else backoff * random.uniform(0.5, 1.5)

        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.teacher.max_retries + 1),
            wait=wait,
            retry=retry_if_exception_type(_Retryable),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                await self._turn(question)
                return await self._once(client, question)
        raise AssertionError("tenacity returns or raises")

    async def _turn(self, question: _Question) -> None:
        """Wait until one may send: rate limits, the gate that a 429 closes, the budget."""
        teacher = self.teacher
        if self.requests_limiter:
            await self.requests_limiter.acquire()
        if teacher.tokens_per_minute:
            await self._tokens_turn(teacher.tokens_per_minute, question.tokens)
        while (closed := self.gate - time.monotonic()) > 0:
            await asyncio.sleep(closed + random.uniform(0, 0.1))
        while not self.ledger.reserve(
            question.tokens, question.cost, teacher.max_requests, teacher.max_total_tokens, teacher.max_cost
        ):
            if self.in_flight == 0 or self.budget_error:
                self._stop_at_budget()
            self.settled.clear()
            await self.settled.wait()  # what is in flight may give back part of what it reserved
        self.in_flight += 1

    async def _tokens_turn(self, per_minute: float, tokens: int) -> None:
        from aiolimiter import AsyncLimiter

        if self.tokens_limiter is None or self.tokens_limiter.max_rate < tokens:
            # the window holds the largest request seen
            self.tokens_limiter = AsyncLimiter(tokens, 60 * tokens / per_minute)
        await self.tokens_limiter.acquire(tokens)

    def _stop_at_budget(self) -> None:
        teacher, spent = self.teacher, self.ledger.spent()
        limits = {"max_requests": "requests", "max_total_tokens": "tokens", "max_cost": "cost"}
        of = [
            f"{spent[unit]:.{4 if unit == 'cost' else 0}f} of {name}={getattr(teacher, name)}"
            for name, unit in limits.items()
            if getattr(teacher, name) is not None
        ]
        self.budget_error = f"spent {', '.join(of)}; the next request could pass it"
        self.settled.set()
        if teacher.on_budget == "raise":
            raise BudgetExceeded(
                f"The budget of {teacher.ledger} is used up: {self.budget_error}. Raise the limit and run again: only "
                "the rest is asked."
            )
        raise _OutOfBudget

    async def _once(self, client: "AsyncOpenAI", question: _Question) -> Reply:
        """Send once. What was reserved is corrected to what was used, together with the commit of the reply."""
        import openai

        unused = (-question.tokens, -question.cost)  # given back where the endpoint certainly did no work
        started = time.monotonic()
        try:
            body = {**question.request}
            limit_name = self.limit_name
            body[limit_name] = body.pop("max_tokens")
            raw = await client.chat.completions.with_raw_response.create(**body)
            answer = _read(raw.content)
        except openai.APIStatusError as error:
            self.ledger.correct(*unused)
            raise self._status_error(error, limit_name) from error
        except openai.APIConnectionError as error:  # includes timeouts, which may be billed: what was reserved stays
            if not isinstance(error, openai.APITimeoutError):
                self.ledger.correct(*unused)
            self._check_patience(f"{type(error).__name__}: {error.__cause__ or error}", error)
            raise _Retryable(f"{type(error).__name__}: {error.__cause__ or error}") from error
        except ValueError as error:  # a 200 that holds no reply; it may have been billed
            self._check_patience(str(error), error)
            raise _Retryable(f"no reply in the answer: {error}") from error
        finally:
            self.in_flight -= 1
            self.settled.set()

        self.anything_answered, self.failing_since = True, None
        used = answer["prompt_tokens"], answer["completion_tokens"]
        cost = self.teacher.cost(*used)
        record = answer | {"seconds": round(time.monotonic() - started, 3)}
        over = (sum(used) - question.tokens, cost - question.cost)
        self.ledger.put(question.key, question.request, record, self.teacher.endpoint, over)
        for name, value in (("asked", 1), ("prompt_tokens", used[0]), ("completion_tokens", used[1]), ("cost", cost)):
            self.stats[name] += value
        return _reply(record)

    def _status_error(self, error: Any, limit_name: str) -> Exception:
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
        if error.status_code in (408, 409, 425, 429) or error.status_code >= 500:
            wait = _retry_after(error.response.headers)
            if error.status_code == 429:  # the endpoint is there, and asks everybody for patience
                self.gate = max(self.gate, time.monotonic() + (wait or 1.0))
            else:
                self._check_patience(words, error)
            return _Retryable(words, wait)
        return _Refused(words)

    def _check_patience(self, words: str, cause: BaseException) -> None:
        """Stop everything where nothing gets through for too long."""
        now = time.monotonic()
        self.failing_since = self.failing_since or now
        if now - self.failing_since > (PATIENCE if self.anything_answered else PATIENCE_AT_FIRST):
            raise TeacherError(
                f"The endpoint {self.teacher.endpoint} cannot be reached: {words}\n"
                "Start it or check `base_url`, then give the same command again: "
                "replies that came before are in the ledger."
            ) from cause


def _read(content: bytes) -> dict[str, Any]:
    """The fields of a chat completion that are kept. ValueError where there is no choice in it."""
    body = json.loads(content)
    if not isinstance(body, dict) or not body.get("choices"):
        raise ValueError(f"no choices: {content[:200].decode('utf-8', 'replace')}")
    choice, usage = body["choices"][0], body.get("usage") or {}
    text = (choice.get("message") or {}).get("content") or ""
    return {
        "text": text.encode("utf-8", "replace").decode(),  # half a surrogate pair fits neither SQLite nor Arrow
        "finish_reason": choice.get("finish_reason"),
        "model": body.get("model"),
        "fingerprint": body.get("system_fingerprint"),
        "prompt_tokens": usage.get("prompt_tokens") or 0,
        "completion_tokens": usage.get("completion_tokens") or 0,
    }


def _reply(record: dict[str, Any], reused: bool = False) -> Reply:
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


def _bytes(chat: Chat) -> int:
    return sum(len(message["content"].encode()) for message in chat)


def _no_stats() -> dict[str, float]:
    return {"asked": 0, "reused": 0, "failed": 0, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}


def _run(coroutine: Any) -> None:
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

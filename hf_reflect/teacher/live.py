"""Asking one endpoint many things at once: what the requests in flight share."""

import asyncio
import math
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..errors import DataError, TeacherError
from ..ledger import Ledger
from .endpoint import (
    Dialect,
    innermost,
    is_hopeless,
    open_client,
    read_answer,
    refusal,
    refused,
    retry_after,
    seconds,
    without,
)
from .replies import Question, Questions, Reply, reply_of
from .round import Progress, Round

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from . import Teacher

# How long nothing may get through before asking stops: little before the first reply, when a setting is likely wrong;
# more after it, when a server may be restarting. A rerun asks only what is missing.
PATIENCE_AT_FIRST = 5.0  # seconds
PATIENCE = 120.0  # seconds; also for an endpoint that answers nothing but 429
_BUSY = 0.15  # share of 429 up to which they are accidents, not a limit
_MEMORY = 0.98  # weight of the answers before, in that share
_WIDEST = 1.0  # seconds between two requests, at most
_ENOUGH = 5  # different requests that fail, before an endpoint that does answer is given up
_PATIENCE_OF_SQLITE = 0.02  # seconds for which another process that writes may hold up the event loop
_CLAIM = 10.0  # seconds for which a request in flight is no other process's, unless said anew
_MOST_CLAIMED = 1000  # questions that are put off since another process asks them
_LONGEST_PAUSE = 60.0  # seconds that a used-up limit may close the gate, before it is refused


_NO_MORE = Question("", {}, None, 0, 0, 0.0)  # stands behind the last one


class _Retryable(Exception):
    """A failure that may pass: its words, and how many seconds the endpoint asked to wait."""

    def __init__(self, words: str, wait: float | None = None, free: bool = False):
        super().__init__(words)
        self.wait = wait
        self.free = free  # no attempt is used up: the endpoint is there and wants patience, or other settings


class _Refused(Exception):
    """This one request will never work; others may. The words are the reply's `error`."""


class _Answered(Exception):
    """Another process on this ledger asked the same meanwhile."""

    def __init__(self, reply: Reply):
        super().__init__()
        self.reply = reply


class _Claimed(Exception):
    """Another process on this ledger is asking the same."""


class _OutOfBudget(Exception):
    """This request could pass a limit."""


class _Stopped(Exception):
    """Another request found out that asking is of no use."""


class Live(Round):
    """Requests in flight, `max_concurrency` of them.

    Shared by them: rate limits; a gate that a 429 closes, and through which they then go spaced out until it works
    again; the budget; the reason to stop. Where one finds such a reason, no more are sent, and what is in flight is
    still waited for and kept.

    Args:
        questions: what is missing; asked for the next whenever a place is free.
        deliver: called with each question and its reply, once that is in the ledger; returns what to ask next for the
            same tag, or nothing.
    """

    def __init__(
        self,
        teacher: "Teacher",
        ledger: Ledger,
        progress: Progress,
        questions: Questions,
        deliver: Callable[[Question, Reply], Questions],
    ):
        from aiolimiter import AsyncLimiter

        super().__init__(teacher, ledger, progress)
        self.questions, self.deliver = questions, deliver
        self.unanswered: list[Question] = []  # where asking stopped
        self.owner = uuid.uuid4().hex
        self.put_off = deque[Question]()  # what another process is asking
        self.client: AsyncOpenAI
        self.dialect = Dialect()
        self.anything_answered = False
        self.failing_since = math.inf  # the first failure since something got through (time.monotonic)
        self.failing: set[str] = set()  # the keys that failed since
        self.closed_until = 0.0  # the gate: nobody sends before this moment (time.monotonic)
        self.next_slot = 0.0  # nor before this one, where they go spaced out
        self.spacing = 0.0  # seconds between two who pass the gate
        self.slowed = 0.0  # when the spacing last grew
        self.busy = 0.0  # share of 429 among the last answers
        self.too_much = math.inf  # tokens: so many were seen to pass a limit with nothing in flight
        self.sent: dict[str, float] = {}  # reserved or in flight: key → when
        self.settled = asyncio.Event()  # set whenever a reservation was corrected
        self.in_line: dict[asyncio.Task, Question] = {}  # who waits to send
        # A limiter lets a whole window through at once, so windows are short, but above its timer's precision. A
        # little below the limit: the endpoint's clock sees requests that were spaced out arrive closer together.
        rate = (teacher.requests_per_minute or 0) * 0.98 / 60  # a second
        self.requests_limiter = AsyncLimiter(max(rate * 0.05, 1), max(0.05, 1 / rate)) if rate else None
        rate = (teacher.tokens_per_minute or 0) * 0.98 / 60
        self.tokens_limiter = AsyncLimiter(rate / 10, 0.1) if rate else None
        self.tokens_line = asyncio.Lock()

    def stop(self, reason: BaseException) -> None:
        """As of every round; who waits to send need not wait any longer."""
        super().stop(reason)
        self.settled.set()
        for task in self.in_line:
            task.cancel()

    def left(self) -> list[Question]:
        """What was begun and not told of."""
        return [*self.unanswered, *self.put_off]

    async def run(self) -> None:
        """Answer them all."""
        self.client = open_client(self.teacher)
        self.ledger.wait_for_others(_PATIENCE_OF_SQLITE)
        claiming = asyncio.create_task(self._keep_claims())
        try:
            async with self.client, asyncio.TaskGroup() as group:
                for _ in range(self.teacher.max_concurrency):
                    group.create_task(self._work())
        finally:
            claiming.cancel()
            with suppress(DataError):  # claims run out by themselves
                self.ledger.disclaim(self.owner)

    async def _keep_claims(self) -> None:
        """What is in flight stays this process's, however long it takes."""

        def claim() -> None:
            for key in self.sent:
                self.ledger.claim(key, self.owner, _CLAIM)

        while True:
            await asyncio.sleep(_CLAIM / 4)
            with suppress(DataError):  # said where a reply is committed
                await self.commit(claim)

    async def _work(self) -> None:
        """Take one question after the other; a question holds its place until its reply is committed."""
        following: Questions = iter(())
        while self.stopped is None:
            question = None
            try:
                question = await self._next(following)
                if question is _NO_MORE:
                    return
                if question is None:
                    continue
                reply = await self._answer(question)
                following = self.deliver(question, reply)
            except _Claimed:
                assert question is not None
                self.put_off.append(question)
            except (_Stopped, asyncio.CancelledError) as error:
                if question is not None:
                    self.unanswered.append(question)
                if isinstance(error, asyncio.CancelledError):
                    raise
            except Exception as error:  # raised again at the end
                self.stop(error)
        self.unanswered += [question for question in following if question]

    async def _next(self, following: Questions) -> Question | None:
        """What is new, else what was put off; None where one must look again, `_NO_MORE` where nothing is left."""
        if len(self.put_off) < _MOST_CLAIMED:
            question = next(chain(following, self.questions), _NO_MORE)
            if question is None:
                await asyncio.sleep(0)
            if question is not _NO_MORE:
                return question
        if not self.put_off:
            return _NO_MORE
        await self._sleep(random.uniform(0.1, 0.3))  # its reply may come
        return self.put_off.popleft() if self.put_off else None

    async def _answer(self, question: Question) -> Reply:
        from tenacity import AsyncRetrying, retry_if_exception_type

        failures = 0

        def give_up(state: Any) -> bool:
            nonlocal failures
            failures += not state.outcome.exception().free
            return failures > self.teacher.max_retries or self.stopped is not None

        def wait(state: Any) -> float:
            error = state.outcome.exception()
            if error.free:
                return 0.0  # at the gate, with all others
            backoff = min(0.5 * 2 ** (failures - 1), 30.0) * random.uniform(0.5, 1.5)
            return backoff if error.wait is None else error.wait

        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(_Retryable), stop=give_up, wait=wait, sleep=self._sleep, reraise=True
            ):
                with attempt:
                    await self._turn(question)
                    return await self._once(question)
        except _Answered as found:
            self.teacher.count(reused=1)
            return found.reply
        except _OutOfBudget as error:
            words = f"budget: {error}"
        except _Retryable as error:
            words = f"teacher: {error}"
        except _Refused as error:
            words = str(error)
        if self.stopped is not None:
            raise _Stopped
        return Reply(error=words)

    async def _sleep(self, wait: float) -> None:
        """Wait, but not once asking stops."""
        try:
            await asyncio.wait_for(self.halt.wait(), wait)
        except TimeoutError:
            return

    async def _turn(self, question: Question) -> None:
        """Wait until one may send: the gate, rate limits, the budget."""
        if question.tokens >= self.too_much and not self.sent:
            raise _OutOfBudget(self.budget_words())
        while self.stopped is None:
            await self._stand_in_line(question)
            if await self._reserve(question):
                if self.closed_until <= time.monotonic() and self.stopped is None:
                    return
                # the gate was closed meanwhile; others see this given back before they see nothing in flight
                await self.commit(lambda: self.ledger.correct(-question.tokens, -question.cost, -1))
                del self.sent[question.key]
                self.settled.set()
        raise _Stopped

    async def _stand_in_line(self, question: Question) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.in_line[task] = question
        try:
            while (closed := max(self.closed_until, self.next_slot) - time.monotonic()) > 0 and self.stopped is None:
                await self._sleep(min(closed, 1.0))
            if self.stopped is not None:
                raise _Stopped
            self.next_slot = max(self.next_slot, time.monotonic()) + self.spacing
            if self.requests_limiter:
                await self.requests_limiter.acquire()
            if self.tokens_limiter:  # in pieces, since a limiter takes no more than its rate at once
                left: float = question.prompt_tokens + self.teacher.max_tokens
                async with self.tokens_line:  # else all would wait for their last piece together
                    while left > 0:
                        piece = min(left, self.tokens_limiter.max_rate)
                        await self.tokens_limiter.acquire(piece)
                        left -= piece
        except asyncio.CancelledError:
            if self.stopped is not None or question.tokens < self.too_much:
                raise
            task.uncancel()
            raise _OutOfBudget(self.budget_words()) from None
        finally:
            self.in_line.pop(task, None)

    async def _reserve(self, question: Question) -> bool:
        """Set aside the most that this can cost; False once asking stops."""

        def reserve() -> bool | Reply | None:
            if record := self.ledger.get([question.key]).get(question.key):
                return reply_of(record, reused=True)
            if not self.ledger.claim(question.key, self.owner, _CLAIM):
                return None
            fits = self.ledger.reserve(question.tokens, question.cost, self.teacher.limits)
            if fits:
                self.sent[question.key] = time.monotonic()
            return fits

        while self.stopped is None:
            if isinstance(result := await self.commit(reserve), Reply):
                raise _Answered(result)
            if result is None:
                raise _Claimed
            if result:
                return True
            if not self.sent:
                self.too_much = min(self.too_much, question.tokens)
                for task, other in list(self.in_line.items()):  # they would wait in vain
                    if other.tokens >= self.too_much:
                        del self.in_line[task]
                        task.cancel()
                raise _OutOfBudget(self.budget_words())
            self.settled.clear()
            await self.settled.wait()  # what is in flight may give back part of what it reserved
        return False

    async def _once(self, question: Question) -> Reply:
        """Send once. What was reserved is corrected to what was used, together with the commit of the reply."""
        import httpx2
        import openai

        body = self.dialect.body(question.request)
        started = self.sent[question.key]
        unused = (-question.tokens, -question.cost)  # given back where the endpoint certainly did no work
        try:
            self.progress.sent += 1
            # Typed `create` would take twice the CPU time for the same bytes.
            async with asyncio.timeout(self.teacher.timeout):
                raw = await self.client.post("/chat/completions", body=body, cast_to=httpx2.Response)
            self._heed(raw.headers)
            answer = read_answer(raw.content)
        except openai.APIStatusError as error:
            found = refusal(error.status_code, error.body, error.response.text, self.client.api_key)
            error.args = (str(found),)  # a traceback shows it as the cause, and it may repeat the key
            if error.status_code not in (502, 504):  # a gateway does not know whether the work was done
                await self.commit(lambda: self.ledger.correct(*unused))
            raise self._after(found, error.response.headers, body, question.key, started) from error
        except (TimeoutError, openai.APIConnectionError) as error:
            if never_arrived := _never_arrived(error):
                await self.commit(lambda: self.ledger.correct(*unused))
            # else it may be billed: what was reserved stays so
            words = _connection_words(error, self.teacher.timeout)
            self._nothing_got_through(words, question.key, answers=not never_arrived)
            raise _Retryable(words) from error
        except ValueError as error:  # a 200 that holds no reply; it may have been billed
            words = without(self.client.api_key, f"no reply in the answer: {error}")
            error.args = (words,)
            self._nothing_got_through(words, question.key, answers=True)
            raise _Retryable(words) from error
        else:
            self.anything_answered, self.failing_since = True, math.inf
            self.busy *= _MEMORY
            self.spacing = self.spacing * 0.9 if self.spacing > 1e-3 else 0.0
            return await self._keep(question, answer, started)
        finally:  # others see what was reserved corrected before they see nothing in flight
            del self.sent[question.key]
            self.settled.set()

    async def _keep(self, question: Question, answer: dict[str, Any], started: float) -> Reply:
        """Commit a reply, and what it took instead of what was reserved for it."""
        record = answer | {"seconds": round(time.monotonic() - started, 3)}
        endpoint, reserved = self.teacher.shown_endpoint, (question.tokens, question.cost)
        left_out = self.dialect.left_out
        return reply_of(
            await self.commit(lambda: self.store(question.key, question.request, record, endpoint, reserved, left_out))
        )

    def _after(self, found: Any, headers: Any, body: dict[str, Any], key: str, sent: float) -> Exception:
        """What to do about a status that is no success."""
        if self.dialect.learn(found, body):
            return _Retryable(str(found), free=True)
        if is_hopeless(found) and not (found.status == 403 and self.anything_answered):  # that may mean one prompt
            return refused(self.teacher, found)
        if found.code == "content_filter":
            return _Refused(f"refused: the endpoint's filter withheld the reply: {found.words}")
        wait = retry_after(headers)
        if found.status == 429:
            return self._slow_down(str(found), wait or 1.0, key, sent)
        if found.status in (408, 409, 425) or found.status >= 500:
            self._nothing_got_through(str(found), key, answers=True)
            return _Retryable(str(found), wait)
        return _Refused(f"teacher: {found}")

    def _heed(self, headers: Any) -> None:
        """Close the gate before a limit refuses, where the endpoint says how much is left of it."""
        for unit, needed in (("requests", 1), ("tokens", self.teacher.max_tokens)):
            left = headers.get(f"x-ratelimit-remaining-{unit}")
            if left is None or not left.isdecimal() or int(left) >= needed * len(self.sent):
                continue
            reset = seconds(headers.get(f"x-ratelimit-reset-{unit}"))
            if reset is not None and reset <= _LONGEST_PAUSE:
                self.closed_until = max(self.closed_until, time.monotonic() + reset)

    def _fails(self, key: str, now: float) -> bool:
        """Note a failure; whether it is the first since something got through."""
        if first := self.failing_since == math.inf:
            self.failing_since = now
            self.failing.clear()
        self.failing.add(key)
        return first

    def _slow_down(self, words: str, wait: float, key: str, sent: float) -> Exception:
        """Close the gate for a while, and space out those who pass it: more with each 429 that still comes."""
        now = time.monotonic()
        self._fails(key, now)
        if now - self.failing_since > PATIENCE + wait:
            if self.anything_answered and len(self.failing) < _ENOUGH:
                return _Refused(f"teacher: {words}")
            return TeacherError(
                f"The endpoint {self.teacher.shown_endpoint} answers nothing but 429 for {PATIENCE:g} s: {words}\n"
                "Set `requests_per_minute` or a smaller `max_concurrency`, or wait until its limit is reset. Replies "
                "that came before are in the ledger."
            )
        self.busy = _MEMORY * self.busy + 1 - _MEMORY
        if sent > self.slowed and self.busy > _BUSY:
            self.spacing, self.slowed = min(max(2 * self.spacing, 0.02), _WIDEST), now
        self.closed_until = max(self.closed_until, now + wait)
        return _Retryable(words, free=True)

    def _nothing_got_through(self, words: str, key: str, answers: bool) -> None:
        """Stop everything where nothing gets through for too long, and no older request may still be answered.

        One request that an endpoint always fails at is no reason; where it `answers`, several must fail.
        """
        now = time.monotonic()
        if self._fails(key, now) and not answers:
            self.progress.say(f"The endpoint {self.teacher.shown_endpoint} does not answer ({words}); trying again.")
        patience = PATIENCE if self.anything_answered else PATIENCE_AT_FIRST
        others = [sent for other, sent in self.sent.items() if other != key]
        if now - self.failing_since <= patience or any(sent < self.failing_since for sent in others):
            return
        if answers and len(self.failing) < _ENOUGH:
            return
        raise TeacherError(
            f"The endpoint {self.teacher.shown_endpoint} {'gives no reply' if answers else 'cannot be reached'}: "
            f"{words}\nStart it or check `base_url`, then give the same command again: replies that came before are "
            "in the ledger."
        )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _never_arrived(error: BaseException) -> bool:
    """Whether no connection came about, so that the endpoint cannot have done any work."""
    import aiohttp

    kinds = aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError
    return any(isinstance(cause, kinds) for cause in _causes(error))


def _connection_words(error: BaseException, timeout: float) -> str:
    import aiohttp

    if isinstance(error, TimeoutError) or any(isinstance(c, aiohttp.SocketTimeoutError) for c in _causes(error)):
        return f"no answer within {timeout:g} s"
    return innermost(error)

"""The batch API: requests go up as files, replies come within a day, at half the price.

A job is in the ledger before it is submitted, with its requests and what is reserved for them. So any later run on
the ledger finds it, waits for it, and takes what it brings.
"""

import asyncio
import json
import shlex
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from ..errors import Interrupted, TeacherError
from ..ledger import Job, Ledger
from .endpoint import Dialect, Refusal, innermost, open_client, read_completion, refusal, refused, without
from .replies import Question, Questions, Reply, reply_of
from .round import Progress, Round

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from . import Teacher

# OpenAI's limits of one file
MAX_REQUESTS = 50_000
MAX_BYTES = 200_000_000
POLL_FIRST, POLL_LATER = 1.0, 60.0  # seconds between two looks, growing from one to the other
_PATIENCE = 600.0  # seconds that the endpoint may be out of reach while jobs are waited for
_SKEW = 24 * 3600.0  # seconds that the endpoint's clock may differ from ours
ENDED = ("completed", "failed", "expired", "cancelled")
_NOT_BEGUN = ("batch_expired", "batch_cancelled")
_URL: Literal["/v1/chat/completions"] = "/v1/chat/completions"
_AT_ONCE = 500  # lines of a result in one commit


class Batch(Round):
    """Jobs for what is missing, as few as the limits allow; those of earlier runs are waited for, not asked again.

    Args:
        questions: what is missing.
        deliver: called with each question and its reply, once that is in the ledger; returns what to ask after it.
    """

    def __init__(
        self,
        teacher: "Teacher",
        ledger: Ledger,
        progress: Progress,
        questions: Questions,
        deliver: Callable[[Question, Reply], Questions],
    ):
        super().__init__(teacher, ledger, progress)
        self.questions, self.deliver = questions, deliver
        self.waiting: dict[str, Question] = {}  # what jobs owe, by key
        self.unsent: deque[Question] = deque()  # what none does
        self.errors: dict[str, str] = {}  # what jobs did not bring, by key
        self.clients: dict[tuple[str | None, str], AsyncOpenAI] = {}
        self.open = AsyncExitStack()
        self.dialect = _dialect()
        self.most = MAX_REQUESTS  # requests a job; fewer where the endpoint's queue has no room for so many
        self.cut: set[int] = set()  # jobs whose result seemed to be cut on its way, once
        self.one_by_one = False  # whether one job must end before its queue has room for the next
        # one process at a time submits, so that a job without an id is one whose process was killed
        self.lock = FileLock(f"{ledger.path}.batch.lock", thread_local=False)

    def left(self) -> list[Question]:
        """What was begun and not told of."""
        return [*self.waiting.values(), *self.unsent]

    def how_to_go_on(self) -> str:
        """What is said to whoever interrupts."""
        if not (ids := self._ids()):
            return super().how_to_go_on()
        names = ", ".join(ids) if len(ids) < 5 else f"{', '.join(ids[:3])} and {len(ids) - 3} more"
        return (
            f"Batch jobs go on at the endpoint ({names}): the same command takes up waiting for them, and "
            f"`python -m hf_reflect.ledger cancel {shlex.quote(self.teacher.ledger)}` cancels them."
        )

    def _ids(self) -> list[str]:
        """Of the jobs that go on at the endpoint."""
        return [job.remote for job in self.ledger.jobs() if job.remote]

    async def run(self) -> None:
        """Submit what is missing, wait, take what comes; also what is to be asked after that."""
        async with self.open:
            try:
                while self.stopped is None and (some := list(islice(self.questions, _AT_ONCE // 10))):
                    self._sort(some)
                    await asyncio.sleep(0)  # Ctrl-C need not wait for the rest
                await self._look_after_others()
                while self.stopped is None and (self.waiting or self.unsent):
                    await self._submit()
                    if self.waiting:
                        await self._wait_for_a_job()
                        self._sort_again()
                    elif self.stopped is None:
                        self._out_of_budget()
            finally:
                # whoever interrupts is told anyway
                if self.waiting and self._ids() and not isinstance(self.stopped, Interrupted):
                    self.progress.say(self.how_to_go_on())

    async def _client(self, base_url: str | None, api_key_env: str) -> "AsyncOpenAI":
        """For the endpoint that a job was given to."""
        if (base_url, api_key_env) not in self.clients:
            # jobs know their endpoint without the password that its address may hold
            url = self.teacher.endpoint if base_url == self.teacher.shown_endpoint else base_url
            teacher = replace(self.teacher, base_url=url, api_key_env=api_key_env)
            client = await self.open.enter_async_context(open_client(teacher, max_retries=teacher.max_retries))
            self.clients[base_url, api_key_env] = client
        return self.clients[base_url, api_key_env]

    # ---- what to do about each question

    def _sort(self, questions: Iterable[Question | None]) -> None:
        """What a job owes is waited for; what came, or will not, is told; the rest must be submitted."""
        some_left = filter(None, questions)
        while some := list(islice(some_left, _AT_ONCE)):
            owed = self.ledger.in_jobs(question.key for question in some)
            known = self.ledger.get(question.key for question in some if question.key not in owed)
            for question in some:
                if question.key in owed:
                    self.waiting[question.key] = question
                elif question.key in known:
                    self._sort(self.deliver(question, reply_of(known[question.key])))
                elif question.key in self.errors:
                    self._sort(self.deliver(question, Reply(error=self.errors.pop(question.key))))
                else:
                    self.unsent.append(question)

    def _sort_again(self) -> None:
        """After jobs ended, or other processes on this ledger may have submitted some."""
        questions = self.left()
        self.waiting, self.unsent = {}, deque()
        self._sort(questions)

    def _out_of_budget(self) -> None:
        """No job will give back anything any more."""
        words, questions = self.budget_words(), self.unsent
        self.unsent = deque()
        for question in questions:
            self._sort(self.deliver(question, Reply(error=f"budget: {words}")))

    # ---- up

    async def _submit(self) -> None:
        """Submit what the budget has room for; more once a job has given back what it did not need."""
        unknown = any(job.remote is None for job in self.ledger.jobs())
        if not unknown and (not self.unsent or (self.one_by_one and self.waiting)):
            return
        while True:
            try:
                self.lock.acquire(blocking=False)
                break
            except Timeout:  # another process submits
                await asyncio.sleep(0.2)
            if self.stopped is not None:
                return
        try:
            await self._find_lost_jobs()
            self._sort_again()
            while self.unsent and self.stopped is None and not (self.one_by_one and self.waiting):
                if not (job := self._prepared()):
                    return
                await self._send(*job)
        finally:
            self.lock.release()

    def _prepared(self) -> tuple[int, str, bytes] | None:
        """The next job, reserved and in the ledger before anything is sent: its id, mark, and file."""
        some: list[Question] = []
        later: list[Question] = []
        lines, mark = bytearray(), uuid.uuid4().hex
        too_much = float("inf")  # so many tokens and more were seen not to fit
        with self.ledger.transaction():
            while self.unsent and len(some) < self.most:
                question = self.unsent.popleft()
                if question.tokens >= too_much:
                    later.append(question)
                    continue
                body = self.dialect.body(question.request)
                row = {"custom_id": question.key, "method": "POST", "url": _URL, "body": body}
                line = json.dumps(row).encode() + b"\n"
                if some and len(lines) + len(line) > MAX_BYTES:
                    self.unsent.appendleft(question)
                    break
                if self.ledger.reserve(question.tokens, question.cost, self.teacher.limits):
                    some.append(question)
                    lines += line
                else:
                    too_much = question.tokens
                    later.append(question)
            self.unsent.extendleft(reversed(later))
            if not some:
                return None
            rows = ((q.key, q.request, q.tokens, q.cost) for q in some)
            job = self.ledger.add_job(mark, self.teacher.shown_endpoint, self.teacher.api_key_env, rows)
        self.waiting |= {question.key: question for question in some}
        self.progress.sent += len(some)
        return job, mark, bytes(lines)

    async def _send(self, job: int, mark: str, lines: bytes) -> None:
        import openai

        client = await self._client(self.teacher.shown_endpoint, self.teacher.api_key_env)
        try:
            file = await _whole(client, client.files.create(file=("requests.jsonl", lines), purpose="batch"))
        except (openai.APIError, _NoAnswer) as error:  # no job without a file
            self.ledger.release(job, "not submitted")
            raise self._not_taken(error, client) from error
        try:
            remote = await self._create(client, file.id, mark)
        except (openai.APIError, _NoAnswer) as error:
            if isinstance(error, openai.APIStatusError) and not _may_pass(error):
                self.ledger.release(job, "not submitted")
            raise self._not_taken(error, client) from error  # else the next run looks for its mark
        self.ledger.update_job(job, "submitted", remote)
        self.progress.say(f"Submitted {remote} with {len(lines.splitlines()):,} requests.")

    async def _create(self, client: "AsyncOpenAI", file: str, mark: str) -> str:
        """Its id at the endpoint. Where an attempt fails it may be there all the same: two would be paid twice."""
        import openai

        metadata, failures, began = {"hf_reflect": mark}, 0, time.time()
        if self.dialect.left_out:
            metadata["left_out"] = " ".join(sorted(self.dialect.left_out))
        while True:
            try:
                once = client.with_options(max_retries=0)
                creating = once.batches.create(
                    input_file_id=file, endpoint=_URL, completion_window="24h", metadata=metadata
                )
                return (await _whole(client, creating)).id
            except openai.APIError as error:
                failures += 1
                if not _may_pass(error) or failures > self.teacher.max_retries:
                    raise
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.halt.wait(), min(0.5 * 2 ** (failures - 1), 30.0))
                if self.stopped is not None:
                    raise
            try:
                found = await self._find(client, {mark: began})
            except openai.APIError as error:
                raise self._not_taken(error, client) from error
            if found:
                return found[mark]

    def _not_taken(self, error: Exception, client: "AsyncOpenAI") -> TeacherError:
        """The error for a job that could not be submitted."""
        import openai

        where = f"The endpoint {self.teacher.shown_endpoint}"
        if isinstance(error, openai.APIStatusError):
            return TeacherError(
                f"{where} takes no batch job for the model {self.teacher.model!r}: {_refusal(error, client)}\n"
                f'Check the key in {self.teacher.api_key_env}, and whether it has a batch API (mode="live" needs '
                "none). Replies that came before are in the ledger."
            )
        if isinstance(error, _NoAnswer):
            return TeacherError(f"{where} answers as none with a batch API does: {error}\nCheck `base_url`.")
        return TeacherError(
            f"{where} cannot be reached to submit a job: {innermost(error)}\n"
            "Give the same command again: what was submitted is waited for, the rest is submitted then."
        )

    async def _find(self, client: "AsyncOpenAI", marks: dict[str, float]) -> dict[str, str]:
        """Ids of the jobs with these marks, made at these times (seconds since 1970), as far as there are any."""
        found: dict[str, str] = {}
        async for remote in client.batches.list(limit=100):
            if (mark := (remote.metadata or {}).get("hf_reflect")) in marks:
                found[mark] = remote.id
            # newest come first
            if len(found) == len(marks) or remote.created_at < min(marks.values()) - _SKEW:
                break
        return found

    async def _find_lost_jobs(self) -> None:
        """Jobs of a process that was killed while it submitted: they are there under their mark, or never were."""
        import openai

        lost: dict[tuple[str | None, str], list[Job]] = {}
        for job in self.ledger.jobs():
            if job.remote is None:
                lost.setdefault((job.base_url, job.api_key_env), []).append(job)
        matters = set(self.ledger.in_jobs(self.waiting).values())
        for where, jobs in lost.items():
            try:
                client = await self._client(*where)
                if not matters.intersection(job.id for job in jobs):
                    client = client.with_options(max_retries=0)
                found = await self._find(client, {job.mark: job.created for job in jobs})
            except (openai.APIError, TeacherError) as error:
                if not matters.intersection(job.id for job in jobs):
                    continue
                if isinstance(error, TeacherError):
                    raise
                raise self._not_taken(error, client) from error
            for job in jobs:
                if job.mark in found:
                    self.ledger.update_job(job.id, "submitted", found[job.mark])
                else:
                    self.ledger.release(job.id, "never submitted")

    # ---- down

    async def _wait_for_a_job(self) -> None:
        """Until one of the jobs has ended and what it brought is in the ledger."""
        import httpx2
        import openai

        wait, reached = POLL_FIRST, time.monotonic()
        while self.stopped is None:
            owed, ended = self.ledger.in_jobs(self.waiting), False
            if len(owed) < len(self.waiting):
                return  # another process on this ledger took some
            matters = set(owed.values())
            try:
                for job in self.ledger.jobs():
                    if job.id in matters and job.remote is None:
                        return  # another process is about to submit it, or was killed then
                    if job.id in matters:
                        ended |= await self._look_after(job)
                reached = time.monotonic()
            except (openai.APIError, httpx2.TransportError, _NoAnswer) as error:
                if isinstance(error, openai.APIStatusError) and not _may_pass(error):
                    raise refused(self.teacher, _refusal(error, await self._client_of(job))) from error
                if time.monotonic() - reached > _PATIENCE:
                    raise TeacherError(
                        f"The endpoint {job.base_url} cannot be reached: {innermost(error)}\n"
                        "Give the same command again once it is there."
                    ) from error
            if ended:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self.halt.wait(), wait)
            wait = min(1.5 * wait, POLL_LATER)

    async def _client_of(self, job: Job) -> "AsyncOpenAI":
        return await self._client(job.base_url, job.api_key_env)

    async def _look_after_others(self) -> None:
        """Jobs that owe nothing of what is asked now: once, since they may give back what they did not need."""
        import httpx2
        import openai

        matters = set(self.ledger.in_jobs(self.waiting).values())
        for job in self.ledger.jobs():
            if job.id not in matters and job.remote is not None and self.stopped is None:
                with suppress(openai.APIError, httpx2.TransportError, TeacherError, _NoAnswer):
                    await self._look_after(job, max_retries=0)

    async def _look_after(self, job: Job, max_retries: int | None = None) -> bool:
        """Whether it has ended; then what it brought is in the ledger."""
        import openai

        client = await self._client_of(job)
        if max_retries is not None:
            client = client.with_options(max_retries=max_retries)
        try:
            remote = await _whole(client, client.batches.retrieve(job.remote or ""))
        except openai.NotFoundError as error:
            raise TeacherError(
                f"The endpoint {job.base_url} does not know the batch job {job.remote}: {_refusal(error, client)}\n"
                f"Check the key in {job.api_key_env}. If the job is gone, `python -m hf_reflect.ledger cancel "
                f"{shlex.quote(self.teacher.ledger)} {job.remote}` forgets it, and its requests are asked again."
            ) from error
        if remote.status != job.state:
            self.ledger.update_job(job.id, remote.status)
            self.progress.say(f"{remote.id}: {remote.status}.")
        if remote.status == "failed":
            self._failed(job, remote)
        elif remote.status in ENDED:
            await self._take(client, job, remote)
        return remote.status in ENDED

    async def _take(self, client: "AsyncOpenAI", job: Job, remote: Any) -> None:
        """Replies into the ledger; what was reserved is corrected to what was used, or given back."""
        import openai

        sent = _dialect((remote.metadata or {}).get("left_out", "").split())
        words, billed, count = f"the batch job ended ({remote.status}) before this request", False, 0
        for file in (remote.output_file_id, remote.error_file_id):
            if not file:
                continue
            with tempfile.TemporaryFile() as lines:
                try:
                    async with client.files.with_streaming_response.content(file) as response:
                        async for some in response.iter_bytes():
                            lines.write(some)
                except openai.NotFoundError:
                    words, billed = f"the endpoint has deleted what the batch job {job.remote} brought", True
                lines.seek(0)
                rows = _rows(lines)
                while several := list(islice(rows, _AT_ONCE)):
                    count += len(several)
                    with self.ledger.transaction():
                        for row in several:
                            self._take_row(row, job, sent, client)
                    await asyncio.sleep(0)  # Ctrl-C need not wait for the rest
        done = remote.request_counts.completed if remote.request_counts else 0
        if count < done and not billed:  # a result that came without its length may have been cut on its way
            words, billed = f"the result of the batch job {remote.id} holds {count} of {done} replies", True
            if job.id not in self.cut:
                self.cut.add(job.id)
                raise _NoAnswer(words)
        for key in self.ledger.release(job.id, remote.status, billed):
            self.errors[key] = f"teacher: {words}"

    def _take_row(self, row: dict[str, Any], job: Job, sent: Dialect, client: "AsyncOpenAI") -> None:
        key, response, error = row.get("custom_id"), row.get("response") or {}, row.get("error") or {}
        if not isinstance(key, str):
            return
        response = response if isinstance(response, dict) else {}
        error = error if isinstance(error, dict) else {"message": str(error)}
        if error.get("code") in _NOT_BEGUN or not (owed := self.ledger.settle(key, job.id)):
            return  # given back with the rest; or another process took it
        request, tokens, cost = owed
        status, body = response.get("status_code"), response.get("body")
        if status != 200:
            self.ledger.correct(-tokens, -cost)
            found = refusal(status or 0, body or {"error": error}, "no reason given", client.api_key)
            learned = _dialect(sent.left_out)
            if learned.learn(found, sent.body(request)):  # no error: it is submitted again, as the model wants it
                if request["model"] == self.teacher.model:
                    self.dialect.left_out |= learned.left_out
            elif found.code == "content_filter":
                self.errors[key] = f"refused: the endpoint's filter withheld the reply: {found.words}"
            else:
                self.errors[key] = f"teacher: {found}"
            return
        try:
            record = read_completion(body) | {"batch": job.remote}
        except ValueError as nothing:  # it may have been billed: what was reserved stays so
            self.errors[key] = f"teacher: {without(client.api_key, f'no reply in the answer: {nothing}')}"
            return
        self.store(key, request, record, job.base_url, (tokens, cost), sent.left_out)

    def _failed(self, job: Job, remote: Any) -> None:
        """A job that was not even begun: its queue was full, or nothing of the kind will ever work."""
        self.ledger.release(job.id, remote.status)
        errors = (remote.errors.data if remote.errors else None) or []
        if any(error.code == "token_limit_exceeded" for error in errors):
            alone = not any(other.base_url == job.base_url and other.remote for other in self.ledger.jobs())
            if not alone or job.requests > 1:
                self.one_by_one = True
                if alone:
                    self.most = max(1, min(self.most, job.requests) // 2)
                self.progress.say(f"The endpoint's queue has no room for {remote.id}: one job at a time from now on.")
                return
        words = [
            f"{error.message}{f' (line {error.line})' if error.line else ''} ({error.code})" for error in errors[:3]
        ]
        raise TeacherError(
            f"The endpoint {job.base_url} failed the batch job {remote.id}: {'; '.join(words) or 'no reason given'}\n"
            "Check the model's name and the sampling settings (null leaves one out). Replies that came before are in "
            "the ledger."
        )


class _NoAnswer(Exception):
    """A success that is not what this API answers, as a web page is none."""


async def _whole(client: "AsyncOpenAI", call: Awaitable[Any]) -> Any:
    try:
        answer = await call
    except json.JSONDecodeError as error:
        raise _NoAnswer(f"no JSON ({error})") from error
    if getattr(answer, "id", None) is None:
        raise _NoAnswer(without(client.api_key, repr(answer))[:100])
    return answer


def _dialect(left_out: Iterable[str] = ()) -> Dialect:
    """What OpenAI's models take: all know the newer name of the limit."""
    dialect = Dialect(limit_name="max_completion_tokens")
    dialect.left_out.update(left_out)
    return dialect


def _refusal(error: Any, client: "AsyncOpenAI") -> Refusal:
    found = refusal(error.status_code, error.body, error.response.text, client.api_key)
    error.args = (str(found),)  # a traceback shows it as the cause, and it may repeat the key
    return found


def _may_pass(error: Exception) -> bool:
    """Whether the endpoint may answer otherwise in a while."""
    status = getattr(error, "status_code", None)
    return status is None or status >= 500 or status in (408, 409, 425, 429)


def _rows(lines: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The rows of a result; a line that cannot be read is left out, as if it were not there."""
    for line in lines:
        with suppress(ValueError):
            if isinstance(row := json.loads(line), dict):
                yield row

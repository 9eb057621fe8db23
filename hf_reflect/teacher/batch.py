"""The batch API: requests go up as files, replies come within a day, at half the price.

A job is in the ledger before it is submitted, with its requests and what is reserved for them. So any later run on
the ledger finds it, waits for it, and takes what it brings.
"""

import asyncio
import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from ..errors import TeacherError
from ..ledger import Job, Ledger
from .endpoint import Dialect, innermost, open_client, read_completion, refusal, refused
from .replies import Question, Reply, reply_of
from .round import Progress, Round

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from . import Teacher

# OpenAI's limits of one file
MAX_REQUESTS = 50_000
MAX_BYTES = 200_000_000
POLL_FIRST, POLL_LATER = 1.0, 60.0  # seconds between two looks, growing from one to the other
_PATIENCE = 600.0  # seconds that the endpoint may be out of reach while jobs are waited for
_ENDED = ("completed", "failed", "expired", "cancelled")
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
        questions: Iterator[Question],
        deliver: Callable[[Question, Reply], Iterator[Question]],
    ):
        super().__init__(teacher, ledger, progress)
        self.questions, self.deliver = questions, deliver
        self.unsent: deque[Question] = deque()
        self.waiting: dict[str, Question] = {}  # what jobs owe, by key
        self.errors: dict[str, str] = {}  # what they will not bring, by key
        self.again: set[str] = set()  # submitted a second time, as the model wants it
        self.clients: dict[tuple[str | None, str], AsyncOpenAI] = {}
        self.open = AsyncExitStack()
        self.dialect = Dialect(limit_name="max_completion_tokens")  # OpenAI's models all know the newer name
        self.most = MAX_REQUESTS  # requests a job; fewer where the endpoint's queue has no room for so many
        # one process at a time submits, so that a job without an id is one whose process was killed
        self.lock = FileLock(f"{ledger.path}.batch.lock", thread_local=False)

    def left(self) -> list[Question]:
        """What was begun and not told of."""
        return [*self.waiting.values(), *self.unsent]

    def how_to_go_on(self) -> str:
        """What is said to whoever interrupts."""
        ids = [job.remote for job in self.ledger.jobs() if job.remote]
        if not ids:
            return super().how_to_go_on()
        return (
            f"The jobs {', '.join(ids)} go on at the endpoint: the same command takes up waiting for them, and "
            f"`python -m hf_reflect.ledger cancel {self.teacher.ledger}` cancels them."
        )

    async def run(self) -> None:
        """Submit what is missing, wait, take what comes; also what is to be asked after that."""
        async with self.open:
            self._sort(self.questions)
            while self.stopped is None and (self.unsent or self.waiting):
                await self._submit()
                if self.waiting:
                    await self._wait_for_a_job()
                    self._tell()
                elif self.unsent:
                    self._out_of_budget(self.unsent.popleft())

    async def _client(self, base_url: str | None, api_key_env: str) -> "AsyncOpenAI":
        """For the endpoint that a job was given to."""
        if (base_url, api_key_env) not in self.clients:
            teacher = replace(self.teacher, base_url=base_url, api_key_env=api_key_env)
            client = await self.open.enter_async_context(open_client(teacher, max_retries=teacher.max_retries))
            self.clients[base_url, api_key_env] = client
        return self.clients[base_url, api_key_env]

    def _sort(self, questions: Iterable[Question]) -> None:
        """What a job holds is waited for; the rest must be submitted."""
        questions = iter(questions)
        while some := list(islice(questions, _AT_ONCE)):
            held = self.ledger.in_jobs(question.key for question in some)
            for question in some:
                if question.key in held:
                    self.waiting[question.key] = question
                else:
                    self.unsent.append(question)

    # ---- up

    async def _submit(self) -> None:
        """Submit what the budget has room for; more once a job has given back what it did not need."""
        await asyncio.to_thread(self.lock.acquire)
        try:
            await self._find_lost_jobs()
            while self.unsent and self.stopped is None:
                if not (job := self._prepared()):
                    return
                await self._send(*job)
                if self.most < MAX_REQUESTS:
                    return  # its queue is short: one after the other
        finally:
            self.lock.release()

    def _prepared(self) -> tuple[int, str, bytes] | None:
        """The next job, reserved and in the ledger before anything is sent: its id, mark, and file."""
        some: list[Question] = []
        lines: list[bytes] = []
        size, mark = 0, uuid.uuid4().hex
        with self.ledger.transaction():
            while self.unsent and len(some) < self.most:
                question = self.unsent[0]
                body = self.dialect.body(question.request)
                line = json.dumps({"custom_id": question.key, "method": "POST", "url": _URL, "body": body}).encode()
                size += len(line) + 1
                if size > MAX_BYTES and some:
                    break
                if not self.ledger.reserve(question.tokens, question.cost, self.teacher.limits):
                    break
                some.append(self.unsent.popleft())
                lines.append(line)
            if not some:
                return None
            rows = ((q.key, q.request, q.tokens, q.cost) for q in some)
            job = self.ledger.add_job(mark, self.teacher.base_url, self.teacher.api_key_env, rows)
        self.waiting |= {question.key: question for question in some}
        self.progress.sent += len(some)
        return job, mark, b"\n".join(lines) + b"\n"

    async def _send(self, job: int, mark: str, lines: bytes) -> None:
        import openai

        client = await self._client(self.teacher.base_url, self.teacher.api_key_env)
        try:
            file = await client.files.create(file=("requests.jsonl", lines), purpose="batch")
            remote = await client.batches.create(
                input_file_id=file.id, endpoint=_URL, completion_window="24h", metadata={"hf_reflect": mark}
            )
        except openai.APIStatusError as error:
            self._release(job, "failed")
            found = refusal(error.status_code, error.body, error.response.text, client.api_key)
            raise refused(self.teacher, found) from error
        except openai.APIConnectionError as error:  # it may have arrived: the next run looks for its mark
            raise TeacherError(
                f"The endpoint {self.teacher.shown_endpoint} cannot be reached to submit a job: {innermost(error)}\n"
                "Give the same command again: what was submitted is waited for, the rest is submitted then."
            ) from error
        self.ledger.update_job(job, "submitted", remote.id)
        self.progress.say(f"Submitted {remote.id} with {len(lines.splitlines()):,} requests.")

    async def _find_lost_jobs(self) -> None:
        """Jobs of a process that was killed while it submitted: they are there under their mark, or never were."""
        lost = {job.mark: job for job in self.ledger.jobs() if job.remote is None}
        if not lost:
            return
        client = await self._client(self.teacher.base_url, self.teacher.api_key_env)
        async for remote in client.batches.list(limit=100):
            mark = (remote.metadata or {}).get("hf_reflect", "")
            if mark in lost:
                self.ledger.update_job(lost.pop(mark).id, "submitted", remote.id)
            oldest = min((job.created for job in lost.values()), default=None)
            if oldest is None or remote.created_at < oldest - 3600:  # newest come first
                break
        for job in lost.values():
            self._release(job.id, "never submitted")
        self._tell()

    def _release(self, job: int, state: str, error: str | None = None) -> None:
        """A job brings nothing (more): what was reserved for it is given back."""
        with self.ledger.transaction():
            self.ledger.update_job(job, state)
            for key in self.ledger.job_keys(job):
                self._give_back(key, error)

    def _give_back(self, key: str, error: str | None) -> None:
        if owed := self.ledger.settle(key):
            _, tokens, cost = owed
            self.ledger.correct(-tokens, -cost, -1)
            if error is not None:
                self.errors[key] = error

    # ---- down

    async def _wait_for_a_job(self) -> None:
        """Until one of the jobs has ended and what it brought is in the ledger."""
        import openai

        wait, reached, ended = POLL_FIRST, time.monotonic(), False
        while self.stopped is None:
            try:
                for job in self.ledger.jobs():
                    if job.remote is not None:  # else another process is about to submit it
                        ended |= await self._look_after(job)
                reached = time.monotonic()
            except openai.APIConnectionError as error:
                if time.monotonic() - reached > _PATIENCE:
                    raise TeacherError(
                        f"The endpoint {self.teacher.shown_endpoint} cannot be reached: {innermost(error)}\n"
                        f"{self.how_to_go_on()}"
                    ) from error
            except openai.APIStatusError as error:
                found = refusal(error.status_code, error.body, error.response.text, self.teacher.api_key())
                raise refused(self.teacher, found) from error
            # another process on this ledger may have taken what is waited for
            if ended or len(self.ledger.in_jobs(self.waiting)) < len(self.waiting):
                return
            try:
                await asyncio.wait_for(self.halt.wait(), wait)
            except TimeoutError:
                wait = min(1.5 * wait, POLL_LATER)

    async def _look_after(self, job: Job) -> bool:
        """Whether it has ended; then what it brought is in the ledger."""
        client = await self._client(job.base_url, job.api_key_env)
        remote = await client.batches.retrieve(job.remote or "")
        if remote.status != job.state:
            self.ledger.update_job(job.id, remote.status)
            self.progress.say(f"{remote.id}: {remote.status}.")
        if remote.status in _ENDED:
            await self._take(client, job, remote)
        return remote.status in _ENDED

    async def _take(self, client: "AsyncOpenAI", job: Job, remote: Any) -> None:
        """Replies into the ledger; what was reserved is corrected to what was used, or given back."""
        if remote.status == "failed":
            return self._failed(job, remote)
        for file in (remote.output_file_id, remote.error_file_id):
            if not file:
                continue
            lines = iter((await client.files.content(file)).content.splitlines())
            while some := list(islice(lines, _AT_ONCE)):
                with self.ledger.transaction():
                    for line in some:
                        if line.strip():
                            self._take_line(json.loads(line), remote.id)
        self._release(job.id, remote.status, f"teacher: the batch job ended ({remote.status}) before this request")

    def _take_line(self, line: dict[str, Any], job: str) -> None:
        key, response = line["custom_id"], line.get("response") or {}
        status, body = response.get("status_code"), response.get("body")
        if not (owed := self.ledger.settle(key)):
            return  # another process took it
        request, tokens, cost = owed
        try:
            if status != 200:
                error = line.get("error") or {}
                found = refusal(status or 0, body or {"error": error}, "no reason given", self.teacher.api_key())
                if key in self.again or not self.dialect.learn(found, self.dialect.all_of(request)):
                    self.errors[key] = f"teacher: {found}"
                self.again.add(key)
                raise ValueError
            record = read_completion(body) | {"batch": job}
        except ValueError as error:
            if key not in self.errors and key not in self.again:
                self.errors[key] = f"teacher: no reply in the answer: {error}"
            self.ledger.correct(-tokens, -cost)
            return
        used = record["prompt_tokens"], record["completion_tokens"]
        spent = self.teacher.cost(*used)
        over = (sum(used) - tokens, spent - cost) if record.pop("counted") else (0, 0.0)
        if self.dialect.left_out:
            record["left_out"] = sorted(self.dialect.left_out)
        self.ledger.put(key, request, record, self.teacher.shown_endpoint, over)
        self.progress.tokens += sum(used)
        self.progress.cost += spent
        self.teacher.count(asked=1, prompt_tokens=used[0], completion_tokens=used[1], cost=spent)

    def _failed(self, job: Job, remote: Any) -> None:
        """A job that was not even begun: its queue was full, or nothing of the kind will ever work."""
        errors = (remote.errors.data if remote.errors else None) or []
        words = "; ".join(f"{error.message} ({error.code})" for error in errors[:3]) or "no reason given"
        self._release(job.id, remote.status)
        if any(error.code == "token_limit_exceeded" for error in errors) and job.requests > 1:
            self.most = max(1, min(self.most, job.requests) // 2)
            self.progress.say(f"The endpoint's queue has no room for {job.requests:,} requests: fewer a job.")
            return
        raise TeacherError(
            f"The endpoint {self.teacher.shown_endpoint} failed the batch job {remote.id}: {words}\n"
            "Check the model's name and the sampling settings (null leaves one out). Replies that came before are in "
            "the ledger."
        )

    def _tell(self) -> None:
        """Tell of all that no job owes any more; what was given back without an error is submitted again."""
        held = self.ledger.in_jobs(self.waiting)
        gone = [key for key in self.waiting if key not in held]
        known = self.ledger.get(gone)
        for key in gone:
            question = self.waiting.pop(key)
            if key in known:
                self._sort(self.deliver(question, reply_of(known[key])))
            elif key in self.errors:
                self._sort(self.deliver(question, Reply(error=self.errors.pop(key))))
            else:
                self.unsent.append(question)

    def _out_of_budget(self, question: Question) -> None:
        self._sort(self.deliver(question, Reply(error=f"budget: {self.budget_words()}")))

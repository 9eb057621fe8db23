"""The batch API: requests go up as files, replies come within a day, at half the price.

A job is in the ledger before it is submitted, with its requests and what is reserved for them. So any later run on
the ledger finds it, waits for it, and takes what it brings.
"""

import asyncio
import shlex
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack, suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ..errors import Interrupted, TeacherError
from ..ledger import Job, Ledger
from .batch_api import ENDED, BatchApi, NoAnswer, Row, dialect, failed, left_out_of, may_pass, no_room, request_line
from .endpoint import Dialect, innermost, read_completion, refused
from .replies import Question, Questions, Reply, reply_of
from .round import Progress, Round

if TYPE_CHECKING:
    from . import Teacher

# OpenAI's limits of one file
MAX_REQUESTS = 50_000
MAX_BYTES = 200_000_000
POLL_FIRST, POLL_LATER = 1.0, 60.0  # seconds between two looks, growing from one to the other
_PATIENCE = 600.0  # seconds that the endpoint may be out of reach while jobs are waited for
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
        self.apis: dict[tuple[str | None, str], BatchApi] = {}  # of the endpoints that jobs were given to
        self.open = AsyncExitStack()
        self.dialect = dialect()
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

    async def _api(self, base_url: str | None, api_key_env: str) -> BatchApi:
        if (base_url, api_key_env) not in self.apis:
            api = BatchApi.of(self.teacher, base_url, api_key_env, self.halt)
            await self.open.enter_async_context(api.client)
            self.apis[base_url, api_key_env] = api
        return self.apis[base_url, api_key_env]

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
                line = request_line(question.key, self.dialect.body(question.request))
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

        api = await self._api(self.teacher.shown_endpoint, self.teacher.api_key_env)
        try:
            file = await api.upload(lines)
        except (openai.APIError, NoAnswer) as error:  # no job without a file
            self.ledger.release(job, "not submitted")
            raise api.not_taken(error) from error
        try:
            remote = await api.create(file, mark, self.dialect.left_out)
        except (openai.APIError, NoAnswer) as error:
            if isinstance(error, openai.APIStatusError) and not may_pass(error):
                self.ledger.release(job, "not submitted")
            raise api.not_taken(error) from error  # else the next run looks for its mark
        self.ledger.update_job(job, "submitted", remote)
        self.progress.say(f"Submitted {remote} with {len(lines.splitlines()):,} requests.")

    async def _find_lost_jobs(self) -> None:
        """Jobs of a process that was killed while it submitted: they are there under their mark, or never were."""
        import openai

        lost: dict[tuple[str | None, str], list[Job]] = {}
        for job in self.ledger.jobs():
            if job.remote is None:
                lost.setdefault((job.base_url, job.api_key_env), []).append(job)
        matters = set(self.ledger.in_jobs(self.waiting).values())
        for where, jobs in lost.items():
            needed = not matters.isdisjoint(job.id for job in jobs)
            try:
                api = await self._api(*where)
                found = await (api if needed else api.once()).find({job.mark: job.created for job in jobs})
            except (openai.APIError, TeacherError) as error:
                if not needed:
                    continue
                if isinstance(error, TeacherError):
                    raise
                raise api.not_taken(error) from error
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
            except (openai.APIError, httpx2.TransportError, NoAnswer) as error:
                if isinstance(error, openai.APIStatusError) and not may_pass(error):
                    api = await self._api(job.base_url, job.api_key_env)
                    raise refused(self.teacher, api.read_refusal(error)) from error
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

    async def _look_after_others(self) -> None:
        """Jobs that owe nothing of what is asked now: once, since they may give back what they did not need."""
        import httpx2
        import openai

        matters = set(self.ledger.in_jobs(self.waiting).values())
        for job in self.ledger.jobs():
            if job.id not in matters and job.remote is not None and self.stopped is None:
                with suppress(openai.APIError, httpx2.TransportError, TeacherError, NoAnswer):
                    await self._look_after(job, once=True)

    async def _look_after(self, job: Job, once: bool = False) -> bool:
        """Whether it has ended; then what it brought is in the ledger."""
        api = await self._api(job.base_url, job.api_key_env)
        api = api.once() if once else api
        remote = await api.retrieve(job)
        if remote.status != job.state:
            self.ledger.update_job(job.id, remote.status)
            self.progress.say(f"{remote.id}: {remote.status}.")
        if remote.status == "failed":
            self._failed(job, remote)
        elif remote.status in ENDED:
            await self._take(api, job, remote)
        return remote.status in ENDED

    async def _take(self, api: BatchApi, job: Job, remote: Any) -> None:
        """Replies into the ledger; what was reserved is corrected to what was used, or given back."""
        import openai

        sent = dialect(left_out_of(remote))
        words, billed, count = f"the batch job ended ({remote.status}) before this request", False, 0
        for file in filter(None, (remote.output_file_id, remote.error_file_id)):
            try:
                async with api.rows(file) as rows:
                    while several := list(islice(rows, _AT_ONCE)):
                        count += len(several)
                        with self.ledger.transaction():
                            for row in several:
                                self._take_row(row, job, sent, api)
                        await asyncio.sleep(0)  # Ctrl-C need not wait for the rest
            except openai.NotFoundError:
                words, billed = f"the endpoint has deleted what the batch job {job.remote} brought", True
        done = remote.request_counts.completed if remote.request_counts else 0
        if count < done and not billed:  # a result that came without its length may have been cut on its way
            words, billed = f"the result of the batch job {remote.id} holds {count} of {done} replies", True
            if job.id not in self.cut:
                self.cut.add(job.id)
                raise NoAnswer(words)
        for key in self.ledger.release(job.id, remote.status, billed):
            self.errors[key] = f"teacher: {words}"

    def _take_row(self, row: Row, job: Job, sent: Dialect, api: BatchApi) -> None:
        key, found = row.key, row.refusal
        if key is None or not row.begun or not (owed := self.ledger.settle(key, job.id)):
            return  # given back with the rest; or another process took it
        request, tokens, cost = owed
        if found is not None:
            self.ledger.correct(-tokens, -cost)
            learned = dialect(sent.left_out)
            if learned.learn(found, sent.body(request)):  # no error: it is submitted again, as the model wants it
                if request["model"] == self.teacher.model:
                    self.dialect.left_out |= learned.left_out
            elif found.code == "content_filter":
                self.errors[key] = f"refused: the endpoint's filter withheld the reply: {found.words}"
            else:
                self.errors[key] = f"teacher: {found}"
            return
        try:
            record = read_completion(row.body) | {"batch": job.remote}
        except ValueError as nothing:  # it may have been billed: what was reserved stays so
            self.errors[key] = f"teacher: {api.without_key(f'no reply in the answer: {nothing}')}"
            return
        self.store(key, request, record, job.base_url, (tokens, cost), sent.left_out)

    def _failed(self, job: Job, remote: Any) -> None:
        """A job that was not even begun: its queue was full, or nothing of the kind will ever work."""
        self.ledger.release(job.id, remote.status)
        if no_room(remote):
            alone = not any(other.base_url == job.base_url and other.remote for other in self.ledger.jobs())
            if not alone or job.requests > 1:
                self.one_by_one = True
                if alone:
                    self.most = max(1, min(self.most, job.requests) // 2)
                self.progress.say(f"The endpoint's queue has no room for {remote.id}: one job at a time from now on.")
                return
        raise failed(job, remote)

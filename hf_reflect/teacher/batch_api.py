"""The batch API of one endpoint: a file of requests up, a job on it, a file of results down.

Nothing here knows what a job owes or costs: that is the ledger's, and `batch` keeps it.
"""

import asyncio
import json
import shlex
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import TeacherError
from ..ledger import Job
from .endpoint import Dialect, Refusal, innermost, open_client, refusal, without

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from . import Teacher

ENDED = ("completed", "failed", "expired", "cancelled")
_NOT_BEGUN = ("batch_expired", "batch_cancelled")
_SKEW = 24 * 3600.0  # seconds that the endpoint's clock may differ from ours
_URL: Literal["/v1/chat/completions"] = "/v1/chat/completions"


class NoAnswer(Exception):
    """A success that is not what this API answers, as a web page is none."""


class Row(NamedTuple):
    """What a result says of one request: a refusal, or the body of an answer."""

    key: str | None  # None where it names no request
    begun: bool
    refusal: Refusal | None
    body: Any


@dataclass
class BatchApi:
    """One endpoint, asked about batch jobs. Its refusals are raised as the SDK's own errors.

    Args:
        client: for the endpoint and the key that the jobs were given with.
        teacher: who asks now, of whom errors speak; not always who submitted the jobs.
        halt: set once there is a reason to stop, which ends a wait between two attempts.
    """

    client: "AsyncOpenAI"
    teacher: "Teacher"
    halt: asyncio.Event

    @classmethod
    def of(cls, teacher: "Teacher", base_url: str | None, api_key_env: str, halt: asyncio.Event) -> "BatchApi":
        """For the endpoint that a job was given to; its client is the caller's to close."""
        # jobs know their endpoint without the password that its address may hold
        url = teacher.endpoint if base_url == teacher.shown_endpoint else base_url
        client = open_client(replace(teacher, base_url=url, api_key_env=api_key_env), max_retries=teacher.max_retries)
        return cls(client, teacher, halt)

    def once(self) -> "BatchApi":
        """The same without further attempts."""
        return replace(self, client=self.client.with_options(max_retries=0))

    def without_key(self, words: str) -> str:
        """These words, which may repeat the key, as they can be shown."""
        return without(self.client.api_key, words)

    # ---- up

    async def upload(self, lines: bytes) -> str:
        """The id of a file with these requests."""
        return (await self._whole(self.client.files.create(file=("requests.jsonl", lines), purpose="batch"))).id

    async def create(self, file: str, mark: str, left_out: Iterable[str]) -> str:
        """The id of a job. Where an attempt fails it may be there all the same: two would be paid twice."""
        import openai

        metadata, failures, began = {"hf_reflect": mark}, 0, time.time()
        if names := " ".join(sorted(left_out)):
            metadata["left_out"] = names
        while True:
            try:
                creating = self.once().client.batches.create(
                    input_file_id=file, endpoint=_URL, completion_window="24h", metadata=metadata
                )
                return (await self._whole(creating)).id
            except openai.APIError as error:
                failures += 1
                if not may_pass(error) or failures > self.teacher.max_retries:
                    raise
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.halt.wait(), min(0.5 * 2 ** (failures - 1), 30.0))
                if self.halt.is_set():
                    raise
            try:
                found = await self.find({mark: began})
            except openai.APIError as error:
                raise self.not_taken(error) from error
            if found:
                return found[mark]

    async def find(self, marks: dict[str, float]) -> dict[str, str]:
        """Ids of the jobs with these marks, made at these times (seconds since 1970), as far as there are any."""
        found: dict[str, str] = {}
        async for remote in self.client.batches.list(limit=100):
            if (mark := (remote.metadata or {}).get("hf_reflect")) in marks:
                found[mark] = remote.id
            # newest come first
            if len(found) == len(marks) or remote.created_at < min(marks.values()) - _SKEW:
                break
        return found

    # ---- down

    async def retrieve(self, job: Job) -> Any:
        """The job as the endpoint sees it. TeacherError where it knows of none."""
        import openai

        try:
            return await self._whole(self.client.batches.retrieve(job.remote or ""))
        except openai.NotFoundError as error:
            raise TeacherError(
                f"The endpoint {job.base_url} does not know the batch job {job.remote}: {self.read_refusal(error)}\n"
                f"Check the key in {job.api_key_env}. If the job is gone, `python -m hf_reflect.ledger cancel "
                f"{shlex.quote(self.teacher.ledger)} {job.remote}` forgets it, and its requests are asked again."
            ) from error

    @asynccontextmanager
    async def rows(self, file: str) -> AsyncIterator[Iterator[Row]]:
        """What a file of results says, row by row; on disk until then, since it may be larger than memory."""
        with tempfile.TemporaryFile() as lines:
            async with self.client.files.with_streaming_response.content(file) as response:
                async for some in response.iter_bytes():
                    lines.write(some)
            lines.seek(0)
            yield (self._row(row) for row in _objects(lines))

    def _row(self, row: dict[str, Any]) -> Row:
        key, response, error = row.get("custom_id"), row.get("response") or {}, row.get("error") or {}
        response = response if isinstance(response, dict) else {}
        error = error if isinstance(error, dict) else {"message": str(error)}
        status, body, found = response.get("status_code"), response.get("body"), None
        if status != 200:
            found = refusal(status or 0, body or {"error": error}, "no reason given", self.client.api_key)
        return Row(key if isinstance(key, str) else None, error.get("code") not in _NOT_BEGUN, found, body)

    async def _whole(self, call: Awaitable[Any]) -> Any:
        try:
            answer = await call
        except json.JSONDecodeError as error:
            raise NoAnswer(f"no JSON ({error})") from error
        if getattr(answer, "id", None) is None:
            raise NoAnswer(self.without_key(repr(answer))[:100])
        return answer

    # ---- what is said of it

    def read_refusal(self, error: Any) -> Refusal:
        """What a status that is no success says."""
        found = refusal(error.status_code, error.body, error.response.text, self.client.api_key)
        error.args = (str(found),)  # a traceback shows it as the cause, and it may repeat the key
        return found

    def not_taken(self, error: Exception) -> TeacherError:
        """The error for a job that could not be submitted."""
        import openai

        where = f"The endpoint {self.teacher.shown_endpoint}"
        if isinstance(error, openai.APIStatusError):
            return TeacherError(
                f"{where} takes no batch job for the model {self.teacher.model!r}: {self.read_refusal(error)}\n"
                f'Check the key in {self.teacher.api_key_env}, and whether it has a batch API (mode="live" needs '
                "none). Replies that came before are in the ledger."
            )
        if isinstance(error, NoAnswer):
            return TeacherError(f"{where} answers as none with a batch API does: {error}\nCheck `base_url`.")
        return TeacherError(
            f"{where} cannot be reached to submit a job: {innermost(error)}\n"
            "Give the same command again: what was submitted is waited for, the rest is submitted then."
        )


def dialect(left_out: Iterable[str] = ()) -> Dialect:
    """What OpenAI's models take: all know the newer name of the limit."""
    known = Dialect(limit_name="max_completion_tokens")
    known.left_out.update(left_out)
    return known


def left_out_of(remote: Any) -> list[str]:
    """What the requests of a job were sent without, as `create` noted with it."""
    return (remote.metadata or {}).get("left_out", "").split()


def request_line(key: str, body: dict[str, Any]) -> bytes:
    """One request in a job's file."""
    return json.dumps({"custom_id": key, "method": "POST", "url": _URL, "body": body}).encode() + b"\n"


def may_pass(error: Exception) -> bool:
    """Whether the endpoint may answer otherwise in a while."""
    status = getattr(error, "status_code", None)
    return status is None or status >= 500 or status in (408, 409, 425, 429)


def no_room(remote: Any) -> bool:
    """Whether a job failed because the endpoint's queue is full."""
    return any(error.code == "token_limit_exceeded" for error in _errors(remote))


def failed(job: Job, remote: Any) -> TeacherError:
    """The error for a job that was not even begun, as no other of its kind will be."""
    words = [
        f"{error.message}{f' (line {error.line})' if error.line else ''} ({error.code})"
        for error in _errors(remote)[:3]
    ]
    return TeacherError(
        f"The endpoint {job.base_url} failed the batch job {remote.id}: {'; '.join(words) or 'no reason given'}\n"
        "Check the model's name and the sampling settings (null leaves one out). Replies that came before are in "
        "the ledger."
    )


def _errors(remote: Any) -> list[Any]:
    return (remote.errors.data if remote.errors else None) or []


def _objects(lines: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The objects of a result; a line that cannot be read is left out, as if it were not there."""
    for line in lines:
        with suppress(ValueError):
            if isinstance(row := json.loads(line), dict):
                yield row

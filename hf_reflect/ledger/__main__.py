"""Look at a ledger, share what it holds, and mind its batch jobs: `python -m hf_reflect.ledger COMMAND PATH`."""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import DataError, ReflectError, TeacherError
from . import Job, Ledger, request_key

if TYPE_CHECKING:
    from openai import OpenAI

_FIELDS: dict[str, Any] = {
    "key": str,
    "request": dict,
    "reply": dict,
    "endpoint": (str, type(None)),
    "created": (int, float),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 1 after an error whose words went to stderr."""
    parser = argparse.ArgumentParser(prog="python -m hf_reflect.ledger", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, words: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=words, description=words)
        sub.add_argument("path", metavar="PATH", help="the ledger")
        return sub

    sub = command("stats", "What is stored, what was spent, what batch jobs owe, and whether the file is sound.")
    sub.add_argument("--json", action="store_true", help="as one JSON object")
    sub = command("export", "Write the replies as JSONL, in the order of their keys.")
    sub.add_argument("file", metavar="FILE", nargs="?", default="-", help="where to; - is stdout (default)")
    sub = command("import", "Add replies of such a file, all or none; what is there stays, what was spent too.")
    sub.add_argument("file", metavar="FILE", help="where from; - is stdin")
    command("vacuum", "Give unused space back to the disk.")
    command("batches", "List the jobs of the batch API, and how they stand now.")
    sub = command("cancel", "Ask the endpoint to cancel open jobs; the next run takes what they had finished.")
    sub.add_argument("ids", metavar="ID", nargs="*", help="which, by the endpoint's id; all unless given")
    args = parser.parse_args(argv)

    try:
        if args.command != "import" and not Path(args.path).exists():
            raise DataError(f"There is no ledger {args.path}: check the path.")
        with Ledger(args.path) as ledger:
            if args.command == "stats":
                _stats(ledger, args.json)
            elif args.command == "export":
                _export(ledger, args.file)
            elif args.command == "import":
                _import(ledger, args.file)
            elif args.command == "vacuum":
                _vacuum(ledger)
            elif args.command == "batches":
                _batches(ledger)
            else:
                _cancel(ledger, args.ids)
        sys.stdout.flush()
    except ReflectError as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:  # `export PATH | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


# ---- what is there


def _stats(ledger: Ledger, as_json: bool) -> None:
    groups, jobs = ledger.summary(), ledger.jobs()
    reasons = Counter[str]()
    for group in groups:
        reasons[group["finish_reason"] or "none"] += group["replies"]
    numbers = ("replies", "prompt_tokens", "completion_tokens")
    models: dict[tuple, dict[str, Any]] = {}
    for group in groups:
        names = {name: group[name] for name in ("model", "returned", "endpoint")}
        model = models.setdefault(tuple(names.values()), names | dict.fromkeys(numbers, 0))
        model.update({name: model[name] + group[name] for name in numbers})
    stats = {
        "path": str(ledger.path),
        "bytes": _size(ledger.path),
        "integrity": ledger.check() or ["ok"],
        **{name: sum(group[name] for group in groups) for name in numbers},
        "first": min((group["first"] for group in groups), default=None),
        "last": max((group["last"] for group in groups), default=None),
        "models": list(models.values()),
        "finish_reasons": dict(reasons.most_common()),
        "spent": ledger.spent(),
        "open_jobs": [{"id": job.remote, "state": job.state, "owed": job.requests} for job in jobs],
    }
    if as_json:
        print(json.dumps(stats, ensure_ascii=False))
        return
    print(f"{ledger.path}: {stats['replies']:,} replies, {stats['bytes']:,} bytes")
    print(f"integrity      {'; '.join(stats['integrity'])}")
    if groups:
        print(f"from, to       {_moment(stats['first'])}, {_moment(stats['last'])}")
    for m in models.values():
        print(
            f"{m['model']} ({m['returned']}) at {m['endpoint']}: {m['replies']:,} replies, "
            f"{m['prompt_tokens']:,} prompt tokens, {m['completion_tokens']:,} completion tokens"
        )
    if reasons:
        print(f"finish reason  {', '.join(f'{reason} {count:,}' for reason, count in reasons.most_common())}")
    spent = ledger.spent()
    print(
        f"spent          {spent['requests']:,} requests, {spent['tokens']:,} tokens, cost {spent['cost']:.4f} "
        "(with what is set aside for requests under way)"
    )
    owed = f", which owe {sum(job.requests for job in jobs):,} replies" if jobs else ""
    print(f"open jobs      {len(jobs)}{owed}")


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _size(path: Path) -> int:
    """Bytes on disk, with what is not yet taken into the file."""
    return sum(file.stat().st_size for file in (path, Path(f"{path}-wal")) if file.exists())


def _vacuum(ledger: Ledger) -> None:
    before = _size(ledger.path)
    ledger.vacuum()
    print(f"{ledger.path}: {before:,} bytes before, {_size(ledger.path):,} after")


# ---- JSONL out and in


def _export(ledger: Ledger, file: str) -> None:
    if file == "-":
        _write(ledger, sys.stdout)
        return
    if _is_database(file):
        raise DataError(f"{file} is a database, perhaps a ledger, which the replies would replace. Name another file.")
    # beside the file and then renamed, so that whoever reads it never sees half of it
    part = f"{file}.{os.getpid()}.part"
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as out:
            count = _write(ledger, out)
        os.replace(part, file)
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error.strerror}. Name a file in a folder that can.") from error
    finally:
        Path(part).unlink(missing_ok=True)
    print(f"{count:,} replies written to {file}")


def _is_database(file: str) -> bool:
    try:
        with open(file, "rb") as there:
            return there.read(16) == b"SQLite format 3\0"
    except OSError:  # said where it is written
        return False


def _write(ledger: Ledger, out: IO[str]) -> int:
    count = 0
    for row in ledger.rows():
        out.write(json.dumps(dict(zip(_FIELDS, row, strict=True))) + "\n")
        count += 1
    return count


def _import(ledger: Ledger, file: str) -> None:
    new = count = 0
    with _opened(file) as lines, ledger.transaction():
        for row in _checked(lines, "stdin" if file == "-" else file):
            new += ledger.put(row["key"], row["request"], row["reply"], row["endpoint"], created=row["created"])
            count += 1
    print(f"{new:,} replies imported, {count - new:,} were there already")


@contextmanager
def _opened(file: str) -> Iterator[IO[bytes]]:
    """The file; of a pipe, which may be slow while nobody else could write to the ledger, a copy."""
    try:
        with nullcontext(sys.stdin.buffer) if file == "-" else open(file, "rb") as lines:
            if lines.seekable():
                yield lines
                return
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(lines, copy)
                copy.seek(0)
                yield copy
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error


def _checked(lines: IO[bytes], where: str) -> Iterator[dict[str, Any]]:
    """The rows of such a file. DataError names the first line that is none."""
    for number, line in enumerate(lines, 1):
        try:
            yield _row(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"Line {number} of {where} is no reply: {error}. Nothing was imported.") from error


def _row(line: bytes) -> dict[str, Any]:
    row = json.loads(line.decode())
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair cannot be stored
    if missing := [name for name in _FIELDS if name not in row]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if wrong := [name for name, kind in _FIELDS.items() if not isinstance(row[name], kind)]:
        raise ValueError(f"{wrong[0]} is a {type(row[wrong[0]]).__name__}")
    if not isinstance(row["reply"].get("text"), str):
        raise ValueError("its reply has no text")
    if not math.isfinite(row["created"]):
        raise ValueError("its time is no number")
    messages = row["request"].get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "content" in m for m in messages):
        raise ValueError("its request has no messages")
    if row["key"] != request_key(row["request"]):
        raise ValueError("its key is not that of its request, so one of them was changed")
    return row


# ---- jobs


class _Unknown(TeacherError):
    """The endpoint does not know the job: it is gone, or another key's, or the address is wrong."""


@contextmanager
def _client(job: Job) -> Iterator["OpenAI"]:
    """The endpoint that a job was given to, asked with the key that the job was given with."""
    import openai

    from ..teacher import OPENAI, Teacher
    from ..teacher.endpoint import innermost, refusal, without

    if job.base_url == OPENAI and not os.environ.get(job.api_key_env):
        raise TeacherError(f"{job.api_key_env} is not set")
    key = Teacher("", job.base_url, job.api_key_env).api_key()
    with openai.OpenAI(api_key=key, base_url=job.base_url, timeout=30.0, max_retries=1) as client:
        try:
            yield client
        except openai.APIStatusError as error:
            words = str(refusal(error.status_code, error.body, error.response.text, key))
            kind = _Unknown if error.status_code == 404 else TeacherError
        except openai.APIError as error:
            words, kind = without(key, innermost(error)), TeacherError
        except AttributeError:  # the SDK hands over what is no JSON as it came
            words, kind = "what it answers is no batch job", TeacherError
        else:
            return
        raise kind(words)  # outside, so that no traceback shows what the endpoint said before the key was taken out


def _batches(ledger: Ledger) -> None:
    jobs = ledger.jobs(open_only=False)
    for job in jobs:
        state, note = job.state, ""
        if job.requests and job.remote:
            try:
                with _client(job) as client:
                    state = client.batches.retrieve(job.remote).status
            except TeacherError as error:
                note = f" (as last seen; the endpoint does not say: {error})"
        hours = (time.time() - job.created) / 3600
        print(
            f"{job.remote or 'not submitted'}  {state}{note}  {job.requests:,} replies owed  {hours:.1f} hours old  "
            f"{job.base_url}"
        )
    if not jobs:
        print(f"{ledger.path} knows of no batch job.")


def _cancel(ledger: Ledger, ids: list[str]) -> None:
    from ..teacher.batch import ENDED

    jobs = {job.remote: job for job in ledger.jobs() if job.remote}
    if unknown := [name for name in ids if name not in jobs]:
        raise DataError(f"{ledger.path} has no open job {', '.join(unknown)}. Open: {', '.join(jobs) or 'none'}.")
    failed = []
    for name in ids or list(jobs):
        job = jobs[name]
        try:
            with _client(job) as client:
                state = client.batches.retrieve(name).status
                if state not in ENDED:
                    state = client.batches.cancel(name).status
            ledger.update_job(job.id, state)
            print(f"{name}: {state}")
        except TeacherError as error:
            if isinstance(error, _Unknown) and name in ids:
                owed = ledger.release(job.id, "forgotten")
                print(f"{name}: {job.base_url} does not know it; {len(owed):,} requests are free to be asked again")
            else:
                failed.append(f"{name} could not be cancelled at {job.base_url}: {error}")
                if isinstance(error, _Unknown):
                    failed[-1] += f". To forget it: `python -m hf_reflect.ledger cancel {ledger.path} {name}`"
    if failed:
        raise TeacherError("\n".join(failed))
    print("What they finished is taken by the next run." if jobs else f"{ledger.path} has no open job.")


if __name__ == "__main__":
    sys.exit(main())

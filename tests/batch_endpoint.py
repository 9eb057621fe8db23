"""A stand-in for OpenAI's files and batch APIs on loopback: real HTTP, jobs that progress as they are looked at."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from endpoint import rewriting

LIVING = ("validating", "in_progress", "finalizing", "cancelling")


class BatchEndpoint:
    """`with BatchEndpoint() as endpoint: Teacher(model, base_url=endpoint.url, mode="batch")`.

    A job takes a step each time it is looked at: validating, in_progress (for `looks` of them), finalizing, completed.
    It lives on while its client is killed. What is scripted:

    answer: a request's body → text, or a dict with `text`, `finish_reason`, or `status` and `body` of an error.
    outcome: a job (dict, see `jobs`) → "completed", "expired", "cancelled", or a list of errors that fail it.
    share: the part of the rows that an expired or cancelled job has finished.
    room: requests that may be queued at once; more fail a job with `token_limit_exceeded`.
    hook: called with (what, handler) before a call is answered: "upload", "create", "created", "retrieve", "content";
        it may raise `Drop` to close the connection, or `Status` to refuse.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Any] = rewriting, looks: int = 1, port: int = 0):
        self.answer, self.looks = answer, looks
        self.outcome: Callable[[dict[str, Any]], Any] = lambda job: "completed"
        self.share, self.room = 0.5, 10**9
        self.hook: Callable[[str, Any], None] = lambda what, handler: None
        self.key: str | None = None  # the only one that is right
        self.models = ("teacher",)
        self.files: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}  # the batch objects, oldest first
        self.submitted: list[str] = []  # the custom_id of every row of every job that passed validation
        self.bodies: list[dict[str, Any]] = []  # and their bodies
        self.twice: list[str] = []  # rows submitted while a living job held them
        self.live: list[dict[str, Any]] = []  # what came to /chat/completions
        self.keys: set[str] = set()
        self.calls = Counter[str]()
        self.lock = threading.RLock()
        self.random = random.Random(0)
        endpoint = self

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *args: Any) -> None:
                pass  # clients that are killed on purpose

        class Handler(_Handler):
            pass

        Handler.endpoint = endpoint
        self.server = Server(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "BatchEndpoint":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    # ---- what jobs do

    def file(self, data: bytes, purpose: str, name: str) -> dict[str, Any]:
        with self.lock:
            about = {"id": f"file-{len(self.files):06d}", "object": "file", "bytes": len(data), "purpose": purpose}
            about |= {"created_at": int(time.time()), "filename": name, "status": "processed"}
            self.files[about["id"]] = about | {"data": data}
            return about

    def create(self, asked: dict[str, Any]) -> dict[str, Any]:
        now = int(time.time())
        job: dict[str, Any] = {"id": f"batch_{len(self.jobs):06d}", "object": "batch", "status": "validating"}
        job |= {name: asked.get(name) for name in ("endpoint", "input_file_id", "completion_window", "metadata")}
        job |= {"created_at": now, "expires_at": now + 86400, "errors": None, "output_file_id": None}
        job |= {"error_file_id": None, "request_counts": {"total": 0, "completed": 0, "failed": 0}, "looks": 0}
        self.jobs[job["id"]] = job
        return job

    def rows(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files[job["input_file_id"]]["data"].splitlines()]

    def step(self, job: dict[str, Any]) -> None:
        """One look later."""
        with self.lock:
            job["looks"] += 1
            if job["status"] == "validating":
                self._validate(job)
            elif job["status"] == "in_progress" and job["looks"] > self.looks:
                job["status"] = "finalizing"
            elif job["status"] == "finalizing":
                self.finish(job, self.outcome(job))
            elif job["status"] == "cancelling":
                self.finish(job, "cancelled")

    def _validate(self, job: dict[str, Any]) -> None:
        rows, outcome = self.rows(job), self.outcome(job)
        errors = outcome if isinstance(outcome, list) else []
        queued = sum(len(self.rows(other)) for other in self.jobs.values() if other["status"] in LIVING[1:])
        if queued + len(rows) > self.room:
            words = f"Enqueued token limit reached for teacher. Limit: {self.room}. Please try again later."
            errors.append({"code": "token_limit_exceeded", "message": words, "param": None, "line": None})
        for number, row in enumerate(rows, 1):
            known = {"custom_id", "method", "url", "body"}
            if set(row) != known or row["url"] != job["endpoint"] or len(row["custom_id"]) > 64:
                errors.append({"code": "invalid_request", "message": "The row is wrong.", "line": number})
            elif row["body"]["model"] not in self.models:
                words = f"The provided model '{row['body']['model']}' is not supported by the Batch API."
                errors.append({"code": "model_not_found", "message": words, "param": "body.model", "line": number})
        if len({row["custom_id"] for row in rows}) < len(rows):
            errors.append({"code": "duplicate_custom_id", "message": "A custom_id came twice.", "line": None})
        if errors:
            job |= {"status": "failed", "failed_at": int(time.time()), "errors": {"object": "list", "data": errors}}
            return
        living = [other for other in self.jobs.values() if other["status"] in LIVING and other is not job]
        held = {row["custom_id"] for other in living for row in self.rows(other)}
        self.twice += [row["custom_id"] for row in rows if row["custom_id"] in held]
        self.submitted += [row["custom_id"] for row in rows]
        self.bodies += [row["body"] for row in rows]
        job |= {"status": "in_progress", "in_progress_at": int(time.time())}
        job["request_counts"]["total"] = len(rows)

    def finish(self, job: dict[str, Any], status: str) -> None:
        """Write the files, in an order of their own, and end the job."""
        rows = self.rows(job)
        self.random.shuffle(rows)
        finished = len(rows) if status == "completed" else int(len(rows) * self.share)
        good, bad = [], []
        for number, row in enumerate(rows):
            line = {"id": f"batch_req_{number}", "custom_id": row["custom_id"], "response": None, "error": None}
            if number >= finished:
                words = f"This request could not be executed before the batch {status}."
                bad.append(line | {"error": {"code": f"batch_{status}", "message": words}})
                continue
            code, body = self.answered(row["body"])
            line["response"] = {"status_code": code, "request_id": f"req_{number}", "body": body}
            (good if code == 200 else bad).append(line)
        for name, lines in (("output", good), ("error", bad)):
            if lines:
                data = b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
                job[f"{name}_file_id"] = self.file(data, "batch_output", f"{job['id']}_{name}.jsonl")["id"]
        job["request_counts"] |= {"completed": len(good), "failed": len(bad)}
        job |= {"status": status, f"{status}_at": int(time.time())}

    def answered(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        given = self.answer(body)
        given = {"text": given} if isinstance(given, str) else given
        if "status" in given:
            return given["status"], given["body"]
        message = {"role": "assistant", "content": given["text"], "refusal": None}
        prompt = sum(len(m["content"]) for m in body["messages"]) // 4
        completion = len(given["text"]) // 4
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        choice = {"index": 0, "message": message, "finish_reason": given.get("finish_reason", "stop")}
        return 200, {"id": "x", "model": body["model"] + "-0125", "choices": [choice], "usage": usage}


class Drop(Exception):
    """The connection is closed without an answer."""


class Status(Exception):
    """Refused, with (status, message)."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes
    endpoint: BatchEndpoint

    def do_GET(self) -> None:
        self.handled({})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.headers.get("Content-Type", "")
        if not kind.startswith("multipart/"):
            return self.handled(json.loads(data or b"{}"))
        message = BytesParser().parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + data)
        parts: dict[str, Any] = {}
        for part in message.get_payload():
            name = part.get_param("name", header="content-disposition")
            parts[name] = part.get_payload(decode=True)
            if part.get_filename():
                parts["filename"] = part.get_filename()
        self.handled(parts)

    def handled(self, asked: dict[str, Any]) -> None:
        endpoint, url = self.endpoint, urlsplit(self.path)
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        try:
            with endpoint.lock:
                endpoint.keys.add(key)
            if endpoint.key is not None and key != endpoint.key:
                raise Status(401, f"Incorrect API key provided: {key}.")
            self.send(200, self.reply(url.path.removeprefix("/v1/").split("/"), parse_qs(url.query), asked))
        except Status as error:
            status, words = error.args
            self.send(status, {"error": {"message": words, "type": "invalid_request_error"}})
        except Drop:
            self.close_connection = True

    def reply(self, path: list[str], query: dict[str, list[str]], asked: dict[str, Any]) -> Any:
        endpoint, method = self.endpoint, self.command
        match (method, *path):
            case ("POST", "files"):
                self.called("upload")
                if asked["purpose"] != b"batch":
                    raise Status(400, "Invalid purpose.")
                return endpoint.file(asked["file"], "batch", asked["filename"])
            case ("GET", "files", name, "content"):
                self.called("content")
                return endpoint.files[name]["data"]
            case ("POST", "batches"):
                self.called("create")
                metadata = asked.get("metadata") or {}
                texts = [text for pair in metadata.items() for text in pair]
                file = endpoint.files.get(asked.get("input_file_id", ""))
                if file is None or file["purpose"] != "batch":
                    raise Status(400, "No such file, or its purpose is not batch.")
                if asked.get("completion_window") != "24h" or asked.get("endpoint") != "/v1/chat/completions":
                    raise Status(400, "Invalid completion_window or endpoint.")
                if len(metadata) > 16 or any(not isinstance(t, str) or len(t) > 512 for t in texts):
                    raise Status(400, "Invalid metadata.")
                with endpoint.lock:
                    job = endpoint.create(asked)
                self.called("created")
                return job
            case ("GET", "batches"):
                self.called("list")
                with endpoint.lock:
                    jobs = list(endpoint.jobs.values())[::-1]
                after, limit = query.get("after", [None])[0], int(query.get("limit", ["20"])[0])
                if not 1 <= limit <= 100:
                    raise Status(400, "Invalid limit.")
                ids = [job["id"] for job in jobs]
                rest = jobs[ids.index(after) + 1 :] if after else jobs
                page = rest[:limit]
                ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
                return {"object": "list", "data": page, "has_more": len(rest) > limit, **ends}
            case ("GET", "batches", name):
                self.called("retrieve")
                endpoint.step(self.job(name))
                return self.job(name)
            case ("POST", "batches", name, "cancel"):
                self.called("cancel")
                job = self.job(name)
                if job["status"] not in LIVING:
                    raise Status(409, f"Cannot cancel a batch with status '{job['status']}'.")
                job |= {"status": "cancelling", "cancelling_at": int(time.time())}
                return job
            case ("POST", "chat", "completions"):
                endpoint.live.append(asked)
                status, body = endpoint.answered(asked)
                if status != 200:
                    raise Status(status, body["error"]["message"])
                return body
        raise Status(404, "Not Found")

    def called(self, what: str) -> None:
        with self.endpoint.lock:
            self.endpoint.calls[what] += 1
        self.endpoint.hook(what, self)

    def job(self, name: str) -> dict[str, Any]:
        if name not in self.endpoint.jobs:
            raise Status(404, f"No batch found with id '{name}'.")
        return self.endpoint.jobs[name]

    def send(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass

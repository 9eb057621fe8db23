"""A small OpenAI-compatible endpoint on loopback: real HTTP, scripted replies, faults on demand."""

import hashlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def rewriting(request: dict[str, Any]) -> str:
    """A usable reply to either reflection prompt, different for each pair."""
    asked = request["messages"][-1]["content"]
    mark = hashlib.sha256(asked.encode()).hexdigest()[:6]
    shown = asked.split("[Instruction]\n", 1)[1].split("\n", 1)[0][:60]
    if "[New Instruction]" in asked:
        return (
            f"1. The instruction is vague.\n\n[New Instruction] Explain step by step ({mark}): {shown} [End]\n\n"
            f"[New Answer] First, think about {shown}. Then answer number {mark}. [End]"
        )
    return (
        "The answer lacks detail.\n\n"
        f"[Better Answer] A longer and better answer {mark} about {shown}, with reasons. [End]"
    )


def known(request: dict[str, Any]) -> str:
    """What a request is counted by: its last message, and which attempt it is."""
    return f"{request.get('seed', 0)} {request['messages'][-1]['content']}"


class Endpoint:
    """`with Endpoint() as endpoint: Teacher(model, base_url=endpoint.url)`; `endpoint.requests` holds what was asked.

    `answer(request)` gives the reply's text, or a dict that overrides fields: `text`, `finish_reason`, `message`
    (further fields of it), `fields` (of the whole answer), `usage`, or `status` with `body` and `headers` (which may
    also stand beside a text); `drop` closes the connection, `raw` sends these bytes with status 200, `drip` pauses so
    many seconds before each further byte.

    Of each request it keeps the body (`requests`), the path and the headers; `answered` counts the good replies by
    `known(request)`, `usage` holds their (prompt, completion) tokens.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], Any] = rewriting,
        models: tuple[str, ...] = ("teacher",),
        latency: float = 0.0,
        port: int = 0,
    ):
        self.answer, self.models, self.latency = answer, models, latency
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.keys: set[str] = set()
        self.answered: Counter[str] = Counter()
        self.usage: list[tuple[int, int]] = []
        self.in_flight, self.most_in_flight = 0, 0
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    endpoint.requests.append(body)
                    endpoint.paths.append(self.path)
                    endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
                    endpoint.keys.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
                    endpoint.in_flight += 1
                    endpoint.most_in_flight = max(endpoint.most_in_flight, endpoint.in_flight)
                try:
                    time.sleep(endpoint.latency)
                    self.reply(body)
                finally:
                    with endpoint.lock:
                        endpoint.in_flight -= 1

            def reply(self, body: dict[str, Any]) -> None:
                if body["model"] not in endpoint.models:
                    error = {"message": f"The model `{body['model']}` does not exist.", "code": "model_not_found"}
                    return self.send(404, {"error": error})
                given = endpoint.answer(body)
                given = {"text": given} if isinstance(given, str) else given
                if given.get("drop"):
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
                if "raw" in given:
                    return self.send(200, given["raw"])
                if "status" in given:
                    return self.send(given["status"], given.get("body", {}), given.get("headers", {}))
                text = given["text"]
                message = {"role": "assistant", "content": text, **given.get("message", {})}
                prompt = sum(len(m["content"]) for m in body["messages"]) // 4
                prompt, completion = given.get("usage", (prompt, len(text or "") // 4))
                with endpoint.lock:
                    endpoint.answered[known(body)] += 1
                    endpoint.usage.append((prompt, completion))
                choice = {"index": 0, "message": message, "finish_reason": given.get("finish_reason", "stop")}
                answer = {
                    "id": "x",
                    "model": body["model"] + "-0125",
                    "choices": [choice],
                    "usage": {"prompt_tokens": prompt, "completion_tokens": completion},
                    **given.get("fields", {}),
                }
                self.send(200, answer, given.get("headers"), given.get("drip", 0.0))

            def send(self, status: int, body: Any, headers: dict[str, str] | None = None, drip: float = 0.0) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                while drip and len(data) > 1:
                    self.wfile.write(data[:1])
                    data = data[1:]
                    time.sleep(drip)
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *args: Any) -> None:
                pass  # clients that are killed on purpose

        self.server = Server(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "Endpoint":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

"""An OpenAI-compatible endpoint for benchmarks: a process of its own, cheap, with faults and limits by flags.

`python serve.py --latency 0.2` prints its port, then serves `POST …/chat/completions` and, with what it counted under
each model's name, `GET /stats`. Whoever wants counts of his own asks for a model of his own.
"""

import argparse
import asyncio
import json
import math
import random
import re
import time
from collections import Counter, deque
from hashlib import blake2b
from statistics import NormalDist

FAULTS = ("429", "500", "503", "reset", "broken JSON", "no choices")
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_PROSE = "A clear step shows how each part of the question leads to one result that readers can check again. "
BETTER_ANSWER = f"It lacks detail. {3 * _PROSE}\n\n[Better Answer] Number @MARK@. {25 * _PROSE} [End]"  # 3 kB
NEW_INSTRUCTION = (
    f"It is vague. {3 * _PROSE}\n\n[New Instruction] Explain @MARK@. {3 * _PROSE} [End]\n\n"
    f"[New Answer] Number @MARK@. {22 * _PROSE} [End]"
)


def digest(chat: list[dict]) -> str:
    """What tells one chat from another, and decides its latency and its reply."""
    return blake2b("".join(message["content"] for message in chat[-1:]).encode(), digest_size=8).hexdigest()


def lognormal(mark: str, mean: float, sigma: float) -> float:
    """The latency of the chat with this digest, in seconds: the same whoever asks."""
    share = min(max(int(mark, 16) / 2**64, 1e-9), 1 - 1e-9)
    return math.exp(math.log(mean) - sigma**2 / 2 + sigma * NormalDist().inv_cdf(share))


def _completion(text: str) -> bytes:
    """A reply's body, in which @MARK@ and the tokens @P@, @C@ are still to be filled in."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", "logprobs": None}
    body = {"id": "chatcmpl-@MARK@", "object": "chat.completion", "created": 1700000000, "model": "benchmark-1"}
    body |= {"choices": [choice], "usage": {"prompt_tokens": "@P@", "completion_tokens": "@C@", "total_tokens": 0}}
    return json.dumps(body).replace('"@P@"', "@P@").replace('"@C@"', "@C@").encode()


_BETTER, _NEW = _completion(BETTER_ANSWER), _completion(NEW_INSTRUCTION)


class Counts:
    """What one model's requests came to."""

    def __init__(self) -> None:
        self.requests = self.prompt_tokens = self.completion_tokens = 0  # tokens of whatever may be billed
        self.outcomes: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()  # good replies by chat, whether or not the client was still there
        self.recent: deque[str] = deque(maxlen=20)  # the last chats asked

    def as_json(self) -> dict:
        twice = self.answered.total() - len(self.answered)
        return {**vars(self), "answered": len(self.answered), "answered_twice": twice, "recent": list(self.recent)}


class Server:
    """The settings, and what the connections share."""

    def __init__(self, settings: argparse.Namespace):
        self.settings, self.counts, self.open = settings, dict[str, Counts](), set[Connection]()
        self.taken = deque[float]()  # when the requests of the limit's last window came; refused ones do not count

    def stats(self, now: float) -> dict:
        # The client may still be reading a reply that was just written: in flight until the connection's next request,
        # for a second at most.
        flying = sum(now - connection.answered < 1 for connection in self.open)
        return {"in_flight": flying, "models": {name: counts.as_json() for name, counts in self.counts.items()}}

    def outcome(self) -> str:
        settings, now = self.settings, time.monotonic()
        while self.taken and now - self.taken[0] >= settings.window:
            self.taken.popleft()
        if settings.limit and len(self.taken) >= settings.limit:
            return "429"
        self.taken.append(now)
        return random.choice(FAULTS) if random.random() < settings.fail else "good"

    def headers(self, outcome: str) -> str:
        settings, left = self.settings, self.settings.limit - len(self.taken)
        if not settings.limit:
            return f"Retry-After: {settings.retry_after:g}\r\n" if outcome == "429" else ""
        free = self.taken[0] + settings.window - time.monotonic() if left <= 0 else 0.0  # seconds to the next place
        # real endpoints give this one in whole seconds
        headers = f"Retry-After: {math.ceil(max(free, 0))}\r\n" if outcome == "429" else ""
        if settings.limit_headers:
            values = {"limit": settings.limit, "remaining": max(left, 0), "reset": f"{max(free, 0):.3f}s"}
            headers += "".join(f"x-ratelimit-{name}-requests: {value}\r\n" for name, value in values.items())
        return headers


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, and no more of it than the clients use."""

    def __init__(self, server: Server):
        self.server, self.received = server, b""
        self.answered = -math.inf  # when the last reply was written; inf while a request waits for one

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.server.open.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.server.open.discard(self)

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (head := self.received.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self.received, 0, head + 2)
            end = head + 4 + (int(length[1]) if length else 0)
            if len(self.received) < end:
                return
            path, body = self.received.split(b" ", 2)[1], self.received[head + 4 : end]
            self.received = self.received[end:]
            if path == b"/stats":
                self.write(200, json.dumps(self.server.stats(time.monotonic())).encode())
            else:
                self.asked(json.loads(body))

    def asked(self, request: dict) -> None:
        settings, mark, outcome = self.server.settings, digest(request["messages"]), self.server.outcome()
        counts = self.server.counts.setdefault(request["model"], Counts())
        counts.requests += 1
        counts.recent.append(mark)
        counts.outcomes[outcome] += 1
        latency = lognormal(mark, settings.latency, settings.sigma) if settings.sigma else settings.latency
        prompt = completion = 0
        if outcome in ("429", "500", "503", "reset"):
            latency = min(latency, 0.01)
        else:
            prompt = sum(len(message["content"].encode()) for message in request["messages"]) // 4
            completion, most = len(BETTER_ANSWER) // 4, request.get("max_tokens", 100)
            if settings.random_usage:
                completion = most if random.random() < 0.1 else random.randint(1, most)
            counts.prompt_tokens += prompt
            counts.completion_tokens += completion
            counts.answered[mark] += outcome == "good"
        self.answered = math.inf
        usage = {b"@MARK@": mark, b"@P@": str(prompt), b"@C@": str(completion)}
        new = any("[New Instruction]" in message["content"] for message in request["messages"][-1:])
        asyncio.get_running_loop().call_later(latency, self.answer, outcome, _NEW if new else _BETTER, usage)

    def answer(self, outcome: str, body: bytes, usage: dict[bytes, str]) -> None:
        self.answered = time.monotonic()
        headers = self.server.headers(outcome)
        if outcome == "reset":
            return self.transport.abort()
        if outcome in ("429", "500", "503"):
            return self.write(int(outcome), b'{"error": {"message": "A scripted failure."}}', headers)
        for name, value in usage.items():
            body = body.replace(name, value.encode())
        if outcome == "broken JSON":
            body = body[: len(body) // 2]
        self.write(200, b'{"choices": []}' if outcome == "no choices" else body, headers)

    def write(self, status: int, body: bytes, headers: str = "") -> None:
        if not self.transport.is_closing():
            headers = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}"
            self.transport.write(f"HTTP/1.1 {status} X\r\n{headers}\r\n".encode() + body)


async def serve(settings: argparse.Namespace) -> None:
    server = Server(settings)
    listener = await asyncio.get_running_loop().create_server(lambda: Connection(server), "127.0.0.1", 0, backlog=1024)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await listener.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds; the mean where --sigma is given")
    parser.add_argument("--sigma", type=float, default=0.0, help="of a lognormal latency, which a chat's text decides")
    parser.add_argument("--fail", type=float, default=0.0, help="share of requests that fail, in one of six ways")
    parser.add_argument("--retry-after", type=float, default=0.2, help="seconds, in a scripted 429")
    parser.add_argument("--limit", type=int, default=0, help="requests in any window; 0: as many as come")
    parser.add_argument("--window", type=float, default=60.0, help="seconds")
    parser.add_argument("--limit-headers", action="store_true", help="send x-ratelimit-*-requests")
    parser.add_argument("--random-usage", action="store_true", help="bill any number of tokens up to max_tokens")
    asyncio.run(serve(parser.parse_args()))

"""What asking will take, from what it took."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from statistics import StatisticsError, fmean, linear_regression
from typing import TYPE_CHECKING, Any, NamedTuple

from ..ledger import Ledger, request_key
from .stream import size

if TYPE_CHECKING:
    from . import Teacher

# A reply's length is unknown before it came; with fewer replies than this in the ledger it is guessed.
ENOUGH_REPLIES = 50
GUESSED_COMPLETION_TOKENS = 500


class _Seen(NamedTuple):
    """A request of the ledger, and what it took."""

    size: int  # bytes of the prompt
    prompt_tokens: int
    completion_tokens: int


class Estimate:
    """Adds up requests without asking: calls, reused, prompt_tokens, completion_tokens, cost."""

    def __init__(self, teacher: "Teacher", ledger: Ledger):
        self.teacher, self.ledger = teacher, ledger
        self.reused = 0
        self._keys: set[bytes] = set()
        # calls and bytes of prompts that are missing, by the kind of prompt: its first message
        self._missing: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._seen: dict[str, list[_Seen]] = defaultdict(list)
        for request, reply in ledger.sample(teacher.model):
            chat = request["messages"]
            seen = _Seen(size(chat), reply.get("prompt_tokens") or 0, reply.get("completion_tokens") or 0)
            if seen.prompt_tokens:  # an endpoint that does not count teaches nothing
                self._seen[_kind(chat)].append(seen)

    def add(self, requests: Iterable[dict[str, Any]]) -> None:
        """Requests that would be made; equal ones count once."""
        requests = iter(requests)
        while some := [(request_key(request), request) for request in islice(requests, 500)]:
            known = self.ledger.get(key for key, _ in some)
            for key, request in some:
                if (digest := bytes.fromhex(key)) in self._keys or key in known:
                    self.reused += 1
                else:
                    self.add_guess(request["messages"], 1.0, size(request["messages"]))
                self._keys.add(digest)

    def add_guess(self, like: list[dict[str, str]], calls: float, prompt_bytes: float) -> None:
        """So many calls with prompts of the kind of `like`, and so many bytes in all, whose text is not known yet."""
        totals = self._missing[_kind(like)]
        totals[0] += calls
        totals[1] += prompt_bytes

    def result(self) -> dict[str, float]:
        """The sums."""
        calls = prompt = completion = 0.0
        everything = [seen for some in self._seen.values() for seen in some]
        for kind, (count, prompt_bytes) in self._missing.items():
            if not count:
                continue
            seen = self._seen[kind] if len(self._seen[kind]) >= ENOUGH_REPLIES else everything
            mean_size = prompt_bytes / count
            if len(seen) >= ENOUGH_REPLIES:
                sizes = [s.size for s in seen]
                prompt += count * _predicted(sizes, [s.prompt_tokens for s in seen], mean_size)
                # a mean beyond all replies that came would be an extrapolation, not an estimate
                replies = [s.completion_tokens for s in seen]
                completion += count * min(max(_predicted(sizes, replies, mean_size), min(replies)), max(replies))
            else:
                prompt += prompt_bytes / 4
                completion += count * min(GUESSED_COMPLETION_TOKENS, self.teacher.max_tokens)
            calls += count
        tokens = round(prompt), round(completion)
        return {
            "calls": round(calls),
            "reused": self.reused,
            "prompt_tokens": tokens[0],
            "completion_tokens": tokens[1],
            "cost": self.teacher.cost(*tokens),
        }


def _kind(chat: list[dict[str, str]]) -> str:
    return chat[0]["content"] if chat[0]["role"] == "system" else ""


def _predicted(x: list[int], y: list[int], at: float) -> float:
    """The value at `at` of the line through these points."""
    try:
        slope, intercept = linear_regression(x, y)
    except StatisticsError:  # all of one length
        return fmean(y)
    return max(slope * at + intercept, 0.0)

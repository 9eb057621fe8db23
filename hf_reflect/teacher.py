"""The teacher: any OpenAI-compatible endpoint, asked for many chats at once, politely and within a budget."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .asking import Asking, Question, Reply, reply_of, run
from .errors import SettingsError, TeacherError
from .ledger import Ledger, request_key

Chat = list[dict[str, str]]
OPENAI = "https://api.openai.com/v1"
# A reply's length is unknown before it came; with fewer replies than this in the ledger it is guessed.
ENOUGH_REPLIES = 50
GUESSED_COMPLETION_TOKENS = 500


@dataclass
class Teacher:
    """A model behind an OpenAI-compatible endpoint, and how hard it may be asked.

    `teacher(chats) -> list[Reply]`, one each, in order. Every reply is in the `ledger` before it is returned; a chat
    whose reply is there is never asked again, whatever endpoint answered it. Equal chats are asked once. Plain fields
    only: the key is read from the environment variable `api_key_env` when a call is made, and kept nowhere.

    Args:
        model: its name as the endpoint knows it.
        base_url: the endpoint, OpenAI's where absent. One with a key variable that is not set gets a dummy key.
        ledger: path of the SQLite file.
        temperature, top_p, max_tokens: sampling; the papers' defaults.
        extra_body: further fields of each request, as vLLM and others take them.
        max_concurrency: requests in flight.
        requests_per_minute, tokens_per_minute: the endpoint's limits; None: none.
        timeout: seconds for one request.
        max_retries: how often one request is repeated after a failure that may pass.
        max_failure_rate: share of unusable replies past which `ReflectionTransform` stops (from 50 replies on).
        price_per_million_input, price_per_million_output: money per million tokens, for `stats`, `estimate`,
            `max_cost`.
        max_cost, max_requests, max_total_tokens: limits that hold for the ledger, over restarts and processes. The
            most a request can cost is set aside before it is sent, so none is ever passed.
        on_budget: at a limit "stop" (the remaining chats get `error="budget: …"`) or "raise" BudgetExceeded.

    Raises:
        TeacherError: when called: no key, nothing gets through, the endpoint does not know key or model.
        BudgetExceeded: with `on_budget="raise"`.
        SettingsError: values out of range; `max_cost` without prices.
    """

    model: str
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    ledger: str = "ledger.sqlite"
    temperature: float | None = 0.0
    top_p: float | None = 1.0
    max_tokens: int = 2048
    extra_body: dict[str, Any] | None = None
    max_concurrency: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 300.0
    max_retries: int = 8
    max_failure_rate: float = 0.2
    price_per_million_input: float | None = None
    price_per_million_output: float | None = None
    max_cost: float | None = None
    max_requests: int | None = None
    max_total_tokens: int | None = None
    on_budget: str = "stop"
    _stats: dict[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.ledger = str(self.ledger)
        self._stats = no_stats()
        if self.on_budget not in ("stop", "raise"):
            raise SettingsError(f'`on_budget` is "stop" or "raise", not {self.on_budget!r}.')
        if self.max_cost is not None and None in (self.price_per_million_input, self.price_per_million_output):
            raise SettingsError(
                f"`max_cost={self.max_cost}` cannot be kept without prices: set `price_per_million_input` and "
                "`price_per_million_output`, or limit `max_total_tokens` or `max_requests`."
            )
        for name in ("max_concurrency", "max_tokens"):
            if getattr(self, name) < 1:
                raise SettingsError(f"`{name}` must be at least 1, not {getattr(self, name)}.")

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _stats=no_stats())

    @property
    def stats(self) -> dict[str, float]:
        """What this object did.

        Keys: asked, reused, failed (chats), prompt_tokens, completion_tokens, cost (of the asked).
        """
        return dict(self._stats)

    def __call__(self, chats: list[Chat]) -> list[Reply]:
        """Answer every chat, from the ledger or by asking; in order."""
        replies: list[Reply] = [Reply()] * len(chats)

        def collect(indices: list[int], reply: Reply) -> None:
            for index in indices:
                replies[index] = reply

        self.stream(chats, collect)
        return replies

    def stream(self, chats: list[Chat], on_reply: Callable[[list[int], Reply], None]) -> None:
        """Answer every chat, in whatever order replies come.

        `on_reply(indices, reply)` is called once for each distinct chat, with its positions in `chats`, after the
        reply is in the ledger. What it raises ends the asking.
        """
        places: dict[str, list[int]] = {}
        for index, chat in enumerate(chats):
            places.setdefault(self.key(chat), []).append(index)
        missing = []
        with Ledger(self.ledger) as ledger:
            known = ledger.get(places)
            for key, indices in places.items():
                if key in known:
                    self._stats["reused"] += len(indices)
                    on_reply(indices, reply_of(known[key], reused=True))
                else:
                    missing.append(key)
            del known
            if missing:
                largest = max(_most_prompt_tokens(chats[places[key][0]]) for key in missing) + self.max_tokens
                questions = (self._question(key, chats[places[key][0]]) for key in missing)
                asking = Asking(self, ledger, lambda key, reply: on_reply(places[key], reply), largest)
                run(asking.all(questions, len(missing)))

    def count(self, **numbers: float) -> None:
        """Add to `stats`."""
        for name, number in numbers.items():
            self._stats[name] += number

    def request(self, chat: Chat) -> dict[str, Any]:
        """What determines the reply, and so the ledger's key: model, messages, sampling parameters, `extra_body`."""
        return {"messages": chat, **self.sampling()}

    def sampling(self) -> dict[str, Any]:
        """What determines a reply besides the messages; a setting that is None is not sent."""
        names = ("model", "temperature", "top_p", "max_tokens")
        sampling = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return sampling | ({"extra_body": self.extra_body} if self.extra_body else {})

    def key(self, chat: Chat) -> str:
        """The ledger's key of this chat."""
        return request_key(self.request(chat))

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Money for these tokens; 0 without prices."""
        price_in, price_out = self.price_per_million_input or 0.0, self.price_per_million_output or 0.0
        return (prompt_tokens * price_in + completion_tokens * price_out) / 1e6

    @property
    def endpoint(self) -> str:
        """Where requests go."""
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI

    def check_ready(self) -> None:
        """Before work: TeacherError if a key is needed, none is set, and the ledger has nothing of this model."""
        if Path(self.ledger).exists():
            with Ledger(self.ledger) as ledger:
                if ledger.mean_tokens(self.model, sample=1)[0]:
                    return
        self.api_key()

    def api_key(self) -> str:
        """The key from the environment; a dummy for an endpoint of one's own that needs none."""
        key = os.environ.get(self.api_key_env)
        if not key and self.endpoint == OPENAI:
            raise TeacherError(
                f"The teacher {self.model!r} needs an API key: `export {self.api_key_env}=...`, or set `base_url` to "
                "an endpoint of your own.\nTo see the whole way without a key: `accelerate launch --config_file "
                "accelerate_configs/cpu.yaml recipes/srecycle_wizardlm.py --config recipes/quickstart.yaml`"
            )
        return key or "not-needed"

    def recorded(self, chats: list[Chat]) -> list[Reply]:
        """The replies that are in the ledger; the others have `error="budget: not asked"`."""
        keys = [self.key(chat) for chat in chats]
        with Ledger(self.ledger) as ledger:
            known = ledger.get(dict.fromkeys(keys))
        missing = Reply(error="budget: not asked")
        return [reply_of(known[key], reused=True) if key in known else missing for key in keys]

    def estimate(self, chats: list[Chat]) -> dict[str, float]:
        """What asking these chats would take, without asking: calls, reused, prompt_tokens, completion_tokens, cost.

        Tokens of prompts are guessed as a quarter of their UTF-8 bytes, those of replies as 500 each; from 50 replies
        of this model in the ledger on, as the mean of what those had.
        """
        unique = {self.key(chat): chat for chat in chats}
        with Ledger(self.ledger) as ledger:
            known = ledger.get(unique)
            count, mean_completion = ledger.mean_tokens(self.model)
        todo = [chat for key, chat in unique.items() if key not in known]
        prompt = sum(_bytes(chat) // 4 for chat in todo)
        each = mean_completion if count >= ENOUGH_REPLIES else min(GUESSED_COMPLETION_TOKENS, self.max_tokens)
        completion = round(len(todo) * each)
        return {
            "calls": len(todo),
            "reused": len(chats) - len(todo),
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "cost": self.cost(prompt, completion),
        }

    def _question(self, key: str, chat: Chat) -> Question:
        prompt = _most_prompt_tokens(chat)
        return Question(key, self.request(chat), prompt + self.max_tokens, self.cost(prompt, self.max_tokens))


def _most_prompt_tokens(chat: Chat) -> int:
    """No tokenizer makes more tokens than bytes, and 16 a message cover what a chat template adds."""
    return _bytes(chat) + 16 * len(chat)


def _bytes(chat: Chat) -> int:
    return sum(len(message["content"].encode()) for message in chat)


def no_stats() -> dict[str, float]:
    """The keys of `stats`, nothing done yet."""
    return {"asked": 0, "reused": 0, "failed": 0, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}

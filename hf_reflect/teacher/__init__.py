"""The teacher: any OpenAI-compatible endpoint, asked for many chats at once, politely and within a budget."""

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ..errors import DataError, SettingsError, TeacherError
from ..ledger import Ledger, Limits, request_key
from .replies import Reply
from .settings import check_settings
from .stream import Ask, Verdict, ask_of

Chat = list[dict[str, str]]
OPENAI = "https://api.openai.com/v1"


@dataclass
class Teacher:
    """A model behind an OpenAI-compatible endpoint, and how hard it may be asked.

    `teacher(chats) -> list[Reply]`, one each, in order. Every reply is in the `ledger` before it is returned; a chat
    whose reply is there is never asked again, whatever endpoint answered it. Equal chats are asked once, also by
    several processes on one ledger: what one has in flight the others put off. Plain fields only: the key is read from
    the environment variable `api_key_env` when a call is made, and kept nowhere.

    Args:
        model: its name as the endpoint knows it.
        base_url: the endpoint, OpenAI's where absent. One with a key variable that is not set gets a dummy key.
        api_key_env: the environment variable that holds the key.
        ledger: path of the SQLite file.
        temperature, top_p: sampling; the papers' defaults. None leaves one out. A model that refuses `temperature`,
            `top_p` or `seed` is asked without; the ledger says so (`left_out`).
        max_tokens: of a reply, thinking included.
        extra_body: further fields of each request, as vLLM and others take them; none of those that have an argument.
        mode: "live" sends each request; "batch" hands them to the batch API, which takes up to a day and half the
            price (set the prices accordingly). It waits for its jobs, also for those of an earlier run.
        max_concurrency: requests in flight.
        requests_per_minute, tokens_per_minute: the endpoint's limits; None: none. Tokens are a quarter of the
            prompt's bytes plus `max_tokens`, as endpoints count them.
        timeout: seconds for one request.
        total_timeout: seconds for one call with all its chats; past it the rest gets `error="budget: …"`.
        max_retries: how often one request is repeated after a failure that may pass.
        max_failure_rate: share of unusable replies past which reflecting or judging stops (from 50 replies on).
            Rewrites that change nothing, or that `accept` refuses, are usable in this sense.
        price_per_million_input, price_per_million_output: money per million tokens, for `stats`, `estimate`,
            `max_cost`.
        max_cost, max_requests, max_total_tokens: limits that hold for the ledger, over restarts and processes. The
            most a request can cost is set aside before it is sent, so none is ever passed.
        on_budget: at a limit "stop" (the remaining chats get `error="budget: …"`) or "raise" BudgetExceeded.
        api_version: of an Azure endpoint, whose key then goes into its own header. `base_url` is
            `https://NAME.openai.azure.com/openai`, `model` the deployment.

    Raises:
        TeacherError: when called: no key, nothing gets through, the endpoint does not know key or model.
        BudgetExceeded: with `on_budget="raise"`.
        DataError: when called with what are no chats; the ledger cannot be used.
        SettingsError: values out of range; `max_cost` without prices; a chat to ask in a worker of `map(num_proc=…)`.
    """

    model: str
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    ledger: str = "ledger.sqlite"
    temperature: float | None = 0.0
    top_p: float | None = 1.0
    max_tokens: int = 2048
    extra_body: dict[str, Any] | None = None
    mode: str = "live"
    max_concurrency: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 300.0
    total_timeout: float | None = None
    max_retries: int = 8
    max_failure_rate: float = 0.2
    price_per_million_input: float | None = None
    price_per_million_output: float | None = None
    max_cost: float | None = None
    max_requests: int | None = None
    max_total_tokens: int | None = None
    on_budget: str = "stop"
    api_version: str | None = None
    _stats: dict[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.ledger = os.path.expanduser(self.ledger)
        self._stats = no_stats()
        check_settings(self)
        for name in ("temperature", "top_p"):
            if getattr(self, name) is not None:  # a key of the ledger would tell 0 from 0.0
                setattr(self, name, float(getattr(self, name)))

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

    @property
    def limits(self) -> Limits:
        """What the ledger may come to."""
        return Limits(self.max_requests, self.max_total_tokens, self.max_cost)

    def __call__(self, chats: list[Chat]) -> list[Reply]:
        """Answer every chat, from the ledger or by asking; in order."""
        _check_chats(chats)
        asks = [ask_of(self.request(chat)) for chat in chats]
        found: dict[str, Reply] = {}
        self.stream((ask._replace(tag=ask.key) for ask in asks), lambda key, reply: found.update({key: reply}))
        return [found[ask.key] for ask in asks]

    def stream(
        self,
        asks: Iterable[Ask],
        on_reply: Callable[[Any, Reply], Verdict | None],
        total: int | None = None,
        may_ask: bool = True,
    ) -> None:
        """Answer everything that is asked, in whatever order replies come.

        Args:
            asks: requests, each with a tag of the caller's; read while replies come in, so that few are held at once.
            on_reply: told a tag and its reply once that is in the ledger; may say what to ask next. Of equal requests
                the first is told. What it raises ends the asking.
            total: how many there are, for the progress bar.
            may_ask: whether what is not in the ledger may be asked; if not, its reply has `error="budget: not asked"`.
        """
        from .batch import Batch
        from .live import Live
        from .round import OutOfTime, Progress, run
        from .stream import Stream

        with Ledger(self.ledger) as ledger:
            progress = Progress(self, total)
            stream = Stream(self, ledger, progress, on_reply)
            questions = stream.missing(asks)
            if not may_ask:
                return stream.give_up(questions, "budget: not asked")
            if (first := next(filter(None, questions), None)) is None:
                return
            _refuse_workers_of_map()
            kind = Batch if self.mode == "batch" else Live
            questions = chain([first], questions)
            asking = run(lambda: kind(self, ledger, progress, questions, stream.deliver))
            if isinstance(asking.stopped, OutOfTime):
                stream.give_up(chain(asking.left(), questions), f"budget: {asking.stopped}")

    def count(self, **numbers: float) -> None:
        """Add to `stats`."""
        for name, number in numbers.items():
            self._stats[name] += number

    def request(self, chat: Chat, **changes: Any) -> dict[str, Any]:
        """What determines the reply, and so the ledger's key: model, messages, sampling parameters, `extra_body`.

        `changes` are further parameters, or other values of these; what is None is left out.
        """
        return {"messages": chat, **self.sampling(**changes)}

    def sampling(self, **changes: Any) -> dict[str, Any]:
        """What determines a reply besides the messages; a setting that is None is not sent."""
        sampling: dict[str, Any] = {
            "model": self.model,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "extra_body": self.extra_body or None,
            **changes,
        }
        return {name: value for name, value in sampling.items() if value is not None}

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

    @property
    def shown_endpoint(self) -> str:
        """The endpoint without name and password, should it hold them."""
        parts = urlsplit(self.endpoint)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))

    def check_ready(self) -> None:
        """Before work: TeacherError if a key is needed, none is set, and the ledger has nothing of this model."""
        if Path(self.ledger).exists():
            with Ledger(self.ledger) as ledger:
                if next(ledger.sample(self.model, 1), None):
                    return
        self.api_key()

    def api_key(self) -> str:
        """The key from the environment; a dummy for an endpoint of one's own that needs none."""
        key = os.environ.get(self.api_key_env)
        if not key and self.endpoint == OPENAI:
            raise TeacherError(
                f"The model {self.model!r} needs an API key: `export {self.api_key_env}=...`, or set `base_url` to "
                "an endpoint of your own.\nTo see the whole way without a key: `accelerate launch --config_file "
                "accelerate_configs/cpu.yaml recipes/srecycle_wizardlm.py --config recipes/quickstart.yaml`"
            )
        if key and not ((key := key.strip()).isascii() and key.isprintable()):
            raise TeacherError(f"The key in {self.api_key_env} holds characters that no key has: copy it once more.")
        return key or "not-needed"

    def estimate(self, chats: list[Chat]) -> dict[str, float]:
        """What asking these chats would take, without asking: calls, reused, prompt_tokens, completion_tokens, cost.

        From 50 replies of this model in the ledger on, tokens follow those: of prompts by their length, of replies by
        the length of their prompts, each kind of prompt (its system message) by itself where it has 50 replies.
        Before, a prompt is guessed as a quarter of its UTF-8 bytes, a reply as 500 tokens.
        """
        from .estimate import Estimate

        _check_chats(chats)
        with Ledger(self.ledger) as ledger:
            estimate = Estimate(self, ledger)
            estimate.add(self.request(chat) for chat in chats)
            return estimate.result()


def _check_chats(chats: Any) -> None:
    for chat in [chats] if isinstance(chats, (str, dict)) else chats:
        if isinstance(chat, (str, dict)) or not all(isinstance(part, dict) and "content" in part for part in chat):
            raise DataError(
                f"A teacher takes a list of chats, each a list of messages; {str(chat)[:60]!r} is no chat. For one "
                'question: `teacher([[{"role": "user", "content": "…"}]])`.'
            )


def _refuse_workers_of_map() -> None:
    """Asking belongs into one process: limits, gate and stream are shared by what is in flight."""
    process = sys.modules.get("multiprocess.process")  # what `datasets` starts its workers with
    if process is not None and process.parent_process() is not None:
        raise SettingsError(
            "A worker of `map(num_proc=...)` would have to ask the teacher. Ask everything in one stream before, with "
            "`transform.prefetch(dataset)`; the `map` after it only replays. Where requests failed for good it would "
            "ask again: leave `num_proc` out then."
        )


def no_stats() -> dict[str, float]:
    """The keys of `stats`, nothing done yet."""
    return {"asked": 0, "reused": 0, "failed": 0, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}

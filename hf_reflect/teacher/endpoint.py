"""How one endpoint is spoken to: its client, what it takes, what its answers and its refusals say."""

import json
import re
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import TeacherError
from ..parsing.reply import shortened, whole

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from . import Teacher

_CONNECT_WITHIN = 10.0  # seconds; a host that does not answer to a connection is down
# What a model may not take, and is then asked without: its replies are those of its own defaults.
_MAY_BE_LEFT_OUT = ("temperature", "top_p", "seed")


def open_client(teacher: "Teacher", max_retries: int = 0) -> "AsyncOpenAI":
    """The SDK's client over aiohttp, which takes a third of the CPU time of its default transport."""
    import httpx2
    import openai

    settings: dict[str, Any] = {
        "api_key": teacher.api_key(),
        "base_url": teacher.endpoint,
        "max_retries": max_retries,
        "timeout": httpx2.Timeout(teacher.timeout, connect=min(_CONNECT_WITHIN, teacher.timeout)),
        "http_client": openai.DefaultAioHttpClient(limits=httpx2.Limits(max_connections=teacher.max_concurrency)),
    }
    if teacher.api_version is None:
        return openai.AsyncOpenAI(**settings)
    return openai.AsyncAzureOpenAI(api_version=teacher.api_version, **settings)


class Refusal(NamedTuple):
    """A status that is no success, in the endpoint's own words, without the key should it repeat it."""

    status: int
    words: str
    code: str | None = None
    param: str | None = None

    def __str__(self) -> str:
        return f"{self.status or ''} {self.words}{f' ({self.code})' if self.code else ''}".strip()


def refusal(status: int, body: Any, text: str, secret: str) -> Refusal:
    """Read the body of an error: OpenAI's, or those of vLLM, SGLang, TGI and FastAPI."""
    # the SDK hands over what stands in "error" where that is there: with TGI and vLLM's 401 a text
    body = {"error": body} if isinstance(body, str) else body if isinstance(body, dict) else {}
    nested = body.get("error")
    inner = nested if isinstance(nested, dict) else body
    words = inner.get("message") or inner.get("detail") or (nested if isinstance(nested, str) else None) or text
    words = words if isinstance(words, str) else json.dumps(words)
    code, param = inner.get("code"), inner.get("param")
    return Refusal(
        status,
        without(secret, words),
        code if isinstance(code, str) else None,
        param if isinstance(param, str) else None,
    )


def without(secret: str, words: str) -> str:
    """An endpoint's words on one line, cut to a length one can read, without the key should it repeat it."""
    return " ".join(words.replace(secret, "***").split())[:300]


class Dialect:
    """What this model takes of a request, learned from what it refuses."""

    def __init__(self, limit_name: str = "max_tokens"):
        self.limit_name = limit_name
        self.left_out: set[str] = set()

    def body(self, request: dict[str, Any]) -> dict[str, Any]:
        """The request as it is sent."""
        own = dict(request)
        body = own.pop("extra_body", {}) | own  # the seed of a further attempt goes before one of `extra_body`
        body[self.limit_name] = body.pop("max_tokens")
        return {name: value for name, value in body.items() if name not in self.left_out}

    def learn(self, found: Refusal, sent: dict[str, Any]) -> bool:
        """Whether the request may work when it is sent as the model wants it, which is known from now on."""
        if found.status not in (400, 422):
            return False
        if "max_completion_tokens" in found.words and "max_tokens" in sent:
            self.limit_name = "max_completion_tokens"  # the newer name, which OpenAI's reasoning models insist on
            return True
        # TGI takes no `top_p` of 1, which is what it does without one
        of_tgi = "`top_p` must be > 0.0 and < 1.0" in found.words and sent.get("top_p") == 1
        if found.code not in ("unsupported_parameter", "unsupported_value") and not of_tgi:
            return False
        named = found.param or next((n for n in _MAY_BE_LEFT_OUT if re.search(rf"\b{n}\b", found.words)), None)
        if named not in _MAY_BE_LEFT_OUT or named not in sent:
            return False
        self.left_out.add(named)
        return True


def is_hopeless(found: Refusal) -> bool:
    """Whether this refusal would meet every request."""
    codes = ("insufficient_quota", "unsupported_parameter", "unsupported_value")
    return found.status in (401, 402, 403, 404) or found.code in codes


def refused(teacher: "Teacher", found: Refusal) -> TeacherError:
    """The error that ends all asking."""
    return TeacherError(
        f"The endpoint {teacher.shown_endpoint} refuses the model {teacher.model!r}: {found}\n"
        f"Check the model's name, `base_url`, the key in {teacher.api_key_env}, and the sampling "
        "settings (null leaves one out). Replies that came before are in the ledger."
    )


def innermost(error: BaseException) -> str:
    """What happened; the SDK's own words say only that something did."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__


def read_completion(body: Any) -> dict[str, Any]:
    """The fields of a chat completion that are kept. ValueError where there is no choice in it."""
    try:
        choice, usage = body["choices"][0], body.get("usage") or {}
        message = choice["message"]
        text, no = _text(message.get("content")), _text(message.get("refusal"))
        record = {
            "text": text or no,
            "finish_reason": "refusal" if no and not text else choice.get("finish_reason"),
            "model": body.get("model"),
            "fingerprint": body.get("system_fingerprint"),
            "prompt_tokens": usage.get("prompt_tokens") or 0,
            "completion_tokens": usage.get("completion_tokens") or 0,
            "counted": bool(usage.get("prompt_tokens")),
        }
        # thoughts that a server of reasoning models keeps apart: paid for, never part of the answer
        if thoughts := _text(message.get("reasoning_content") or message.get("reasoning")):
            record["reasoning"] = thoughts
        return record
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"no choice in {json.dumps(body)}") from error


def read_answer(content: bytes) -> dict[str, Any]:
    """What `read_completion` takes of an answer's JSON. ValueError where it is none, with its first characters."""
    try:
        body = json.loads(content)
    except ValueError as error:
        begin = shortened(content[:400].decode("utf-8", "replace"))
        raise ValueError(f"it is no JSON, but {begin!r}" if begin else "it is empty") from error
    return read_completion(body)


def _text(content: Any) -> str:
    if isinstance(content, list):  # parts, as some servers send them
        content = "".join(part.get("text") or "" for part in content)
    return whole(content) if isinstance(content, str) else ""


def seconds(text: str | None) -> float | None:
    """A duration as headers give it: `2`, `0.5`, `20ms`, `1s`, `6m0s`, `1h2m3s`. None where it is none."""
    units = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)", text or "")
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * units[unit] for number, unit in parts)


def _until(text: str | None) -> float | None:
    """Seconds to wait: `Retry-After` is a duration or a date."""
    if text and seconds(text) is None:
        try:
            return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
        except ValueError:
            return None
    return seconds(text)


def retry_after(headers: Any) -> float | None:
    """Seconds that the endpoint asks to wait, at most ten minutes: `Retry-After`, else when a used-up limit resets."""
    if (wait := seconds(headers.get("retry-after-ms"))) is not None:
        return min(wait / 1000, 600.0)
    waits = [_until(headers.get("retry-after"))]
    for unit in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{unit}") == "0":
            waits.append(seconds(headers.get(f"x-ratelimit-reset-{unit}")))
    known = [wait for wait in waits if wait is not None]
    return min(known[0], 600.0) if known else None

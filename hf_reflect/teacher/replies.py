"""What is asked and what comes back."""

from collections.abc import Iterator
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What came back for one chat.

    Where nothing did, text is "" and `error` says why: `teacher: …`, `budget: …`, or `refused: …` where a filter
    withheld it.
    """

    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reused: bool = False


class Question(NamedTuple):
    """A request that must be sent, its key in the ledger, and the most that it can cost."""

    key: str
    request: dict[str, Any]
    tag: Any
    prompt_tokens: int  # about so many
    tokens: int  # of prompt and reply, at most
    cost: float  # of these


# None stands between two looks into the ledger: whoever asks may do something else for a moment.
Questions = Iterator[Question | None]


def reply_of(record: dict[str, Any], reused: bool = False) -> Reply:
    """A record of the ledger as a Reply; how long it took, and the endpoint's fingerprint, stay behind."""
    return Reply(
        record["text"],
        record.get("finish_reason"),
        None,
        record.get("model"),
        record.get("prompt_tokens") or 0,
        record.get("completion_tokens") or 0,
        reused,
    )

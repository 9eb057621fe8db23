"""What a request's key is: the same where all that determines the reply is the same."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

_ROLES = ("system", "user", "assistant")
_canonical = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


def request_key(request: dict[str, Any]) -> str:
    """SHA-256 of what determines a reply: model, messages, sampling parameters, `extra_body`.

    Of the request as canonical JSON with each text replaced by its length in bytes, and of the texts: escaping them
    would take longer than all the rest.
    """
    return Keys({name: value for name, value in request.items() if name != "messages"})(request.get("messages", ()))


class Keys:
    """`request_key` for many chats that are asked for with the same `sampling`, which is encoded once."""

    def __init__(self, sampling: dict[str, Any]):
        before = _canonical({name: value for name, value in sampling.items() if name < "messages"})
        after = _canonical({name: value for name, value in sampling.items() if name > "messages"})
        self._before = before[:-1] + ("," if before != "{}" else "") + '"messages":['
        self._after = "]" + ("," if after != "{}" else "") + after[1:]

    def __call__(self, messages: Iterable[dict[str, Any]]) -> str:
        """The key of this chat."""
        texts, framed = [], []
        for message in messages:
            content, role = message["content"], message.get("role")
            if isinstance(content, str):
                texts.append(content.encode("utf-8", "surrogatepass"))
                if len(message) == 2 and role in _ROLES:
                    framed.append(f'{{"content":{len(texts[-1])},"role":"{role}"}}')
                    continue
                message = message | {"content": len(texts[-1])}
            framed.append(_canonical(message))
        frame = f"{self._before}{','.join(framed)}{self._after}".encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(frame)
        for text in texts:
            digest.update(text)
        return digest.hexdigest()

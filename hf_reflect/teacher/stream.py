"""What goes through one call of a teacher: requests in, replies out, each told once."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from ..ledger import Ledger, request_key
from .replies import Question, Questions, Reply, reply_of
from .round import Progress

if TYPE_CHECKING:
    from . import Teacher

# So many requests are looked up at once: few enough that replies which come meanwhile do not wait for long.
_AT_ONCE = 100
_CHECKED_FROM = 50  # replies; fewer say little about the share that is useless


class Ask(NamedTuple):
    """A request, its key in the ledger, and whatever its asker knows it by."""

    key: str
    request: dict[str, Any]
    tag: Any


def ask_of(request: dict[str, Any], tag: Any = None) -> Ask:
    """A request under its key."""
    return Ask(request_key(request), request, tag)


class Verdict(NamedTuple):
    """What its asker thinks of a reply, and what to ask next for the same tag."""

    unusable: bool = False
    then: Ask | None = None


def too_many(useless: int, replies: int, limit: float) -> bool:
    """Whether so many of the replies are useless that asking on is: past `max_failure_rate`, from the 50th on."""
    return replies >= _CHECKED_FROM and useless > limit * replies


class Stream:
    """Splits requests into those whose replies are in the ledger, told at once, and questions to be asked.

    Args:
        on_reply: told a tag and its reply once that is in the ledger. Of equal requests the first is told. What it
            raises ends the asking.
    """

    def __init__(
        self,
        teacher: "Teacher",
        ledger: Ledger,
        progress: Progress,
        on_reply: Callable[[Any, Reply], Verdict | None],
    ):
        self.teacher, self.ledger, self.progress, self.on_reply = teacher, ledger, progress, on_reply
        self._seen: set[bytes] = set()

    def missing(self, asks: Iterable[Ask]) -> Questions:
        """Tell of the replies that are there; yield what must be asked."""
        asks = iter(asks)
        while some := list(islice(asks, _AT_ONCE)):
            while some:
                known = self.ledger.get(ask.key for ask in some)
                new, some = some, []
                for ask in new:
                    if (digest := bytes.fromhex(ask.key)) in self._seen:
                        self.teacher.count(reused=1)
                        self.progress.count(reused=True, unusable=False)
                    elif record := known.get(ask.key):
                        self._seen.add(digest)
                        self.teacher.count(reused=1)
                        some += self._tell(ask.tag, reply_of(record, reused=True))
                    else:
                        self._seen.add(digest)
                        yield self._question(ask)
            yield None

    def deliver(self, question: Question, reply: Reply) -> Questions:
        """Tell of a reply that was asked for; yields what must be asked after it."""
        if reply.error:
            self.teacher.count(failed=1)
        return self.missing(self._tell(question.tag, reply))

    def give_up(self, questions: Iterable[Question | None], error: str) -> None:
        """Tell of questions that are not asked."""
        for question in filter(None, questions):
            self.give_up(self.deliver(question, Reply(error=error)), error)

    def _tell(self, tag: Any, reply: Reply) -> list[Ask]:
        verdict = self.on_reply(tag, reply) or Verdict()
        if reply.error and reply.error.startswith("budget:"):
            self.progress.left += 1
        elif verdict.then is None:
            self.progress.count(reply.reused, verdict.unusable)
        return [verdict.then] if verdict.then else []

    def _question(self, ask: Ask) -> Question:
        chat, teacher = ask.request["messages"], self.teacher
        # No tokenizer makes more tokens than bytes, and 16 a message cover what a chat template adds.
        prompt = size(chat) + 16 * len(chat)
        cost = teacher.cost(prompt, teacher.max_tokens)
        return Question(*ask, size(chat) // 4, prompt + teacher.max_tokens, cost)


def size(chat: list[dict[str, str]]) -> int:
    """UTF-8 bytes of a chat's texts."""
    return sum(len(message["content"].encode()) for message in chat)

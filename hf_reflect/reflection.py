"""The transform: a teacher rewrites one part of every pair, inside `datasets.map`."""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .asking import Reply
from .errors import SettingsError, TeacherError
from .pairs import PAIR_FEATURES, SCORE_COLUMNS, WAITING, as_table, error_code, is_usable, put_column, require_columns
from .prompts import PROMPTS, ReflectionPrompt, Rewrite
from .teacher import Chat, Teacher, no_stats

# Errors that say something about the teacher or its settings; `unchanged`, `parent` and `budget` do not.
FAILURES = ("teacher", "truncated", "refused", "unparsed", "placeholder")
CHECKED_FROM = 50  # answered rows
_PARENTS = {"instruction": ("original",), "response": ("original", "instruction")}
_SCHEMA: pa.Schema = PAIR_FEATURES.arrow_schema
_NEEDED = ("row_id", "variant", "instruction", "input", "response", "error")


class _Parent(NamedTuple):
    """A version that this transform reflects on, and where it stands in the batch."""

    position: int
    chat: Chat | None  # None where the version is unusable


class ReflectionTransform:
    """Ask a teacher to rewrite one part of every pair, for `Dataset.map(..., batched=True)`.

    In:  row_id, variant, instruction, input, response, error, optionally source, history      (N rows)
    Out: the same columns plus critique; each rewrite right below its parent                    (2N rows)

    "instruction" rewrites originals, and brings the teacher's answer to the new instruction (V2 Eq. 5); "response"
    rewrites the answer of originals and of this source's rewritten instructions. Other versions pass through.
    A reply that cannot be used keeps its row, with null text and `error` set: counted, not lost. The child of an
    unusable version carries `parent: …` and is not asked for. Other columns are the parent's; scores are null.

    Pass `load_from_cache_file=False` to `map`: its cache would keep failed rows for ever, while replies are cheap to
    replay from the ledger.

    Args:
        teacher: a `Teacher`, or any picklable callable from a list of chats to a list of `Reply`.
        part: "instruction" or "response".
        prompt: how to ask and read; `PROMPTS[part]` unless given.
        source: who wrote the rewrites, as the column says; the teacher's model name unless given.
        keep_parent: False rewrites in place (N rows in, N out), as V1 does: an unusable rewrite leaves the parent's
            text, with the `error` beside it.

    Raises:
        TeacherError: the endpoint cannot be used; or past the teacher's `max_failure_rate` of unusable replies,
            checked from the 50th answered row on.
        DataError: a column is missing.

    Source: arXiv 2402.10110, section 3.1 and Figures 4 and 5; with `keep_parent=False` arXiv 2310.11716.
    """

    def __init__(
        self,
        teacher: Teacher | Callable[[list[Chat]], list[Reply]],
        part: str,
        prompt: ReflectionPrompt | None = None,
        source: str | None = None,
        keep_parent: bool = True,
    ):
        if part not in _PARENTS:
            raise SettingsError(f'`part` is "instruction" or "response", not {part!r}.')
        self.teacher, self.part, self.keep_parent = teacher, part, keep_parent
        self.prompt = prompt or PROMPTS[part]
        self.source = (
            source if source is not None else getattr(teacher, "model", getattr(teacher, "__name__", "teacher"))
        )
        if not self.source:
            raise SettingsError('`source` names who wrote the rewrites and cannot be "": that is the originals\'.')
        self._forget()

    def _forget(self) -> None:
        self._answered, self._failures = 0, Counter[str]()
        self._failed: dict[str, Reply] = {}  # by the ledger's key, from the last `prefetch`
        # a rewrite stands below its parent, perhaps in the next batch: the last keys made
        # show a table reflected before
        self._made: deque[tuple[str, str, str]] = deque(maxlen=1000)

    def __getstate__(self) -> dict[str, Any]:
        names = ("teacher", "part", "keep_parent", "prompt", "source")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, batch: Any) -> pa.Table:
        """One batch of `map`, as it comes: a dict of lists or, where the dataset is formatted so, a `pa.Table`."""
        table = as_table(batch)
        columns = self._columns(table)
        parents = self._parents(columns)
        asked = [parent for parent in parents if parent.chat is not None]
        replies = self._replies([parent.chat for parent in asked if parent.chat is not None])
        rewrites = {
            parent.position: self._read(columns, parent.position, reply)
            for parent, reply in zip(asked, replies, strict=True)
        }
        self._check_failures([rewrite.error for rewrite in rewrites.values()])
        for parent in parents:
            if parent.chat is None:
                variant, error = columns["variant"][parent.position], columns["error"][parent.position]
                rewrites[parent.position] = Rewrite(error=f"parent: its {variant} version is unusable ({error})")
        return self._written(table, columns, rewrites)

    def _replies(self, chats: list[Chat]) -> list[Reply]:
        """Ask the teacher, but not again for what `prefetch` tried in vain: `map` after it only replays."""
        if not self._failed or not isinstance(self.teacher, Teacher):
            return self.teacher(chats)
        keys = [self.teacher.key(chat) for chat in chats]
        replies = iter(self.teacher([chat for chat, key in zip(chats, keys, strict=True) if key not in self._failed]))
        return [self._failed[key] if key in self._failed else next(replies) for key in keys]

    def prefetch(self, dataset: Dataset) -> dict[str, float]:
        """Ask everything that `map` over `dataset` would, in one continuous stream into the ledger.

        So no slow reply holds up a batch; the `map` after it only replays. Returns the numbers of this call: asked,
        reused, failed, prompt_tokens, completion_tokens, cost. Any other callable than a Teacher keeps no ledger and
        is left to `map`.
        """
        if not isinstance(self.teacher, Teacher):
            return no_stats()
        teacher, before = self.teacher, self.teacher.stats
        self._failed.clear()
        chats = self._chats(dataset)
        answered, failures = 0, Counter[str]()

        def watch(indices: list[int], reply: Reply) -> None:
            # Read here only to stop early where replies are useless; `map` reads again.
            nonlocal answered
            if reply.error:
                self._failed[teacher.key(chats[indices[0]])] = reply
            error = reply.error or self.prompt.parse(reply.text, reply.finish_reason).error
            answered += 0 if error_code(error) == "budget" else len(indices)
            if error_code(error) in FAILURES:
                failures[error or ""] += len(indices)
                self._stop_if_useless(answered, failures)

        teacher.stream(chats, watch)
        return {name: value - before[name] for name, value in teacher.stats.items()}

    def estimate(self, dataset: Dataset) -> dict[str, float]:
        """What `map` over `dataset` would take, asking nothing: calls, reused, prompt_tokens, completion_tokens, cost.

        Versions that are not there yet because nobody was asked for them (`budget: …`, `teacher: …`) count as if they
        were as long as the version above them.
        """
        if not isinstance(self.teacher, Teacher):
            raise SettingsError("Only a `Teacher` can estimate: a callable knows neither tokens nor prices.")
        return self.teacher.estimate(self._chats(dataset, guess_missing=True))

    def _chats(self, dataset: Dataset, guess_missing: bool = False) -> list[Chat]:
        chats: list[Chat] = []
        last: Chat | None = None
        self._made.clear()
        for batch in dataset.with_format("arrow").iter(1000):
            columns = self._columns(batch)
            for parent in self._parents(columns):
                error = columns["error"][parent.position]
                chat = parent.chat
                if chat is None and guess_missing and error_code(error) in WAITING and last:
                    # another text of the same length: equal chats are asked once
                    chat = [*last[:-1], {**last[-1], "content": last[-1]["content"][:-1] + "\x00"}]
                if chat is not None:
                    chats.append(chat)
                last = parent.chat or last
        self._made.clear()
        return chats

    def _columns(self, table: pa.Table) -> dict[str, list]:
        """The columns of the design's table as lists; absent `source` and `history` are as of originals."""
        require_columns(table.column_names, _NEEDED, "`ReflectionTransform`")
        empty: dict[str, Any] = {"source": "", "history": [], "critique": None}
        return {
            name: table[name].to_pylist() if name in table.column_names else [empty[name]] * len(table)
            for name in PAIR_FEATURES
        }

    def _parents(self, columns: dict[str, list]) -> list[_Parent]:
        keys = list(zip(columns["row_id"], columns["variant"], columns["source"], strict=True))
        parents = []
        for position, (_, variant, source) in enumerate(keys):
            if variant not in _PARENTS[self.part] or source not in ("", self.source):
                continue
            values = {name: columns[name][position] for name in ("instruction", "response", "input", "history")}
            usable = is_usable(values["instruction"], values["response"])
            chat = self.prompt.chat(**values | {"input": values["input"] or ""}) if usable else None
            parents.append(_Parent(position, chat))
        if self.keep_parent:
            made = [(keys[p.position][0], self._child(keys[p.position][1]), self.source) for p in parents]
            existing = {*made, *self._made}
            if repeated := next((key for key in keys if key in existing), None):
                raise SettingsError(
                    f"Row {repeated[0]!r} already has a version {repeated[1]!r} by {self.source!r}. To add another "
                    "one, give it a name: `ReflectionTransform(..., source='second')`."
                )
            self._made.extend(made)
        return parents

    def _child(self, variant: str) -> str:
        return self.part if variant == "original" else f"{variant}+{self.part}"

    def _read(self, columns: dict[str, list], position: int, reply: Reply) -> Rewrite:
        """The rewrite in a reply; with the parent's instruction where only the answer is new."""
        if reply.error:
            return Rewrite(error=reply.error)
        rewrite = self.prompt.parse(reply.text, reply.finish_reason)
        if rewrite.error:
            return rewrite
        parent = columns[self.part][position]
        new = getattr(rewrite, self.part)
        if new.strip() == parent.strip():
            return Rewrite(critique=rewrite.critique, error=f"unchanged: the {self.part} came back as it was")
        return rewrite

    def _written(self, table: pa.Table, columns: dict[str, list], rewrites: dict[int, Rewrite]) -> pa.Table:
        """The batch with its rewrites, all columns, an explicit schema.

        A first batch of nulls must not type a column.
        """
        taken: list[int] = []  # for each row out, the row in whose other columns it has
        out: dict[str, list] = {name: [] for name in PAIR_FEATURES}
        fresh: list[bool] = []

        def emit(position: int, new: dict[str, Any], is_fresh: bool) -> None:
            taken.append(position)
            fresh.append(is_fresh)
            for name, values in out.items():
                values.append(new.get(name, columns[name][position]))

        for position in range(len(table)):
            rewrite = rewrites.get(position)
            if rewrite is None or self.keep_parent:
                emit(position, {}, False)
            if rewrite is None:
                continue
            new: dict[str, Any] = {"critique": rewrite.critique, "error": rewrite.error}
            if rewrite.error and not self.keep_parent:
                new["critique"] = rewrite.critique or columns["critique"][position]
            else:
                new |= {
                    "variant": self._child(columns["variant"][position]),
                    "source": self.source,
                    "instruction": None if rewrite.error else rewrite.instruction or columns["instruction"][position],
                    "input": "" if rewrite.error or rewrite.instruction else columns["input"][position],
                    "response": rewrite.response,
                }
            emit(position, new, rewrite.error is None or self.keep_parent)

        result = table.take(pa.array(taken, pa.int64()))
        for name, values in out.items():
            field = _SCHEMA.field(name)
            result = put_column(result, field, pa.array(values, field.type))
        keep = pa.array([not is_fresh for is_fresh in fresh])
        for name in (*SCORE_COLUMNS, "coherence"):  # another version's scores are not this one's
            if name in result.column_names:
                column = pc.if_else(keep, result[name], pa.scalar(None, result[name].type))
                result = put_column(result, result.schema.field(name), column)
        return result

    def _check_failures(self, errors: list[str | None]) -> None:
        self._answered += sum(error_code(error) != "budget" for error in errors)
        self._failures.update(error for error in errors if error and error_code(error) in FAILURES)
        self._stop_if_useless(self._answered, self._failures)

    def _stop_if_useless(self, answered: int, failures: Counter[str]) -> None:
        """Raise past the teacher's `max_failure_rate`, with the commonest reasons."""
        failed, limit = failures.total(), getattr(self.teacher, "max_failure_rate", 0.2)
        if answered < CHECKED_FROM or failed <= limit * answered:
            return
        codes: Counter[str] = Counter()
        for error, count in failures.items():
            codes[error_code(error)] += count
        reasons = ", ".join(f"{count} {code}" for code, count in codes.most_common())
        raise TeacherError(
            f"{failed} of {answered} replies to the {self.part} reflection are unusable ({reasons}), more than "
            f"max_failure_rate={limit} allows. The commonest: {failures.most_common(1)[0][0]}\n"
            "Mend the cause (a larger `max_tokens`, another model or prompt), or raise `max_failure_rate`. Replies "
            "that came are in the ledger."
        )


@dataclass(frozen=True)
class _Recorded:
    """A teacher that answers only what is in the ledger."""

    teacher: Teacher
    max_failure_rate: float = 1.0

    def __call__(self, chats: list[Chat]) -> list[Reply]:
        return self.teacher.recorded(chats)


def estimate_recycling(teacher: Teacher, pairs: Dataset) -> dict[str, float]:
    """What reflecting on every instruction and every response would take, asking nothing.

    In: the table of `to_pairs`. Returns calls (three a row, less those in the ledger), reused, prompt_tokens,
    completion_tokens, cost. A new instruction that nobody has asked for yet counts as if it were as long as its
    original.
    """
    instruction, response = (ReflectionTransform(teacher, part) for part in ("instruction", "response"))
    known = ReflectionTransform(_Recorded(teacher), "instruction", source=teacher.model)
    first = instruction.estimate(pairs)
    second = response.estimate(pairs.map(known, batched=True, load_from_cache_file=False))
    return {name: first[name] + second[name] for name in first}

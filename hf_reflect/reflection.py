"""The transform: a teacher rewrites one part of every pair, inside `datasets.map`."""

import gc
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from itertools import groupby
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .columns import SCORE_COLUMNS, is_usable, require_columns
from .errors import SettingsError, TeacherError
from .ledger import Keys, Ledger
from .pairs import PAIR_FEATURES, WAITING, as_table, error_code, put_column
from .parsing.reply import whole
from .prompts import PROMPTS, ReflectionPrompt, Rewrite
from .teacher import Chat, Teacher, no_stats
from .teacher.estimate import ENOUGH_REPLIES, Estimate
from .teacher.replies import Reply
from .teacher.stream import Ask, Verdict, size, too_many

# Errors that say something about the teacher or its settings; `unchanged`, `check`, `parent` and `budget` do not.
FAILURES = ("teacher", "truncated", "refused", "unparsed", "placeholder")
WARMER = 0.7  # temperature at which an unusable reply is asked for again
_PARENTS = {"instruction": ("original",), "response": ("original", "instruction")}
_SCHEMA: pa.Schema = PAIR_FEATURES.arrow_schema
_REWRITTEN = ("variant", "source", "instruction", "input", "response", "critique", "error")
_NEEDED = ("row_id", "variant", "instruction", "input", "response", "error")
_BATCH = 100  # rows read at once where replies are waited for meanwhile

Accept = Callable[[dict[str, Any], dict[str, Any]], str | None]


class _Parent(NamedTuple):
    """A version that this transform reflects on, and where it stands in the batch."""

    position: int
    values: dict[str, Any]  # of the columns of the design's table

    @property
    def is_usable(self) -> bool:
        return is_usable(self.values["instruction"], self.values["response"])


class _Attempt(NamedTuple):
    """A version whose chat is asked, for the how-manieth time, and what the first reply came to."""

    parent: _Parent
    number: int = 0
    first: Rewrite | None = None


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
        retry_unusable: how often a reply that came but cannot be used is asked for again, with temperature 0.7 and a
            seed of its own; the first usable one is kept.
        accept: a check of your own: called with parent and rewrite, as dicts of the table's columns, it returns None
            or why the rewrite is not accepted (`check: …`). `hf_reflect.checks` has ready ones.

    Raises:
        TeacherError: the endpoint cannot be used; or past the teacher's `max_failure_rate` of unusable replies,
            checked from the 50th answered row on.
        DataError: a column is missing.
        SettingsError: in a worker of `map(num_proc=...)` something would have to be asked; a prompt for another part;
            `map` without `batched=True`.

    Source: arXiv 2402.10110, section 3.1 and Figures 4 and 5; with `keep_parent=False` arXiv 2310.11716.
    """

    _FIELDS = ("teacher", "part", "prompt", "source", "keep_parent", "retry_unusable", "accept")
    _may_ask = True

    def __init__(
        self,
        teacher: Teacher | Callable[[list[Chat]], list[Reply]],
        part: str,
        prompt: ReflectionPrompt | None = None,
        source: str | None = None,
        keep_parent: bool = True,
        retry_unusable: int = 0,
        accept: Accept | None = None,
    ):
        if part not in _PARENTS:
            raise SettingsError(f'`part` is "instruction" or "response", not {part!r}.')
        if not callable(teacher):
            raise SettingsError(
                f"`teacher` is a `Teacher`, or a callable from chats to replies, not {teacher!r}. For an endpoint: "
                "`Teacher(model, base_url=...)`."
            )
        if not isinstance(prompt, ReflectionPrompt | None):
            raise SettingsError(
                f"`prompt` is a `ReflectionPrompt`, not {prompt!r}: `PROMPTS` has "
                f"{', '.join(name for name, some in PROMPTS.items() if isinstance(some, ReflectionPrompt))}."
            )
        if retry_unusable < 0:
            raise SettingsError(f"`retry_unusable` counts further attempts: 0 or more, not {retry_unusable}.")
        self.teacher, self.part, self.keep_parent = teacher, part, keep_parent
        self.retry_unusable, self.accept = retry_unusable, accept
        self.prompt = prompt or PROMPTS[part]
        if (brings := self.prompt.parts) != PROMPTS[part].parts:
            raise SettingsError(
                f'`part="{part}"` needs a prompt whose replies bring {" and ".join(PROMPTS[part].parts)}; this one\'s '
                f"bring {' and '.join(brings)}. Give it {len(PROMPTS[part].parts)} of `tags` (or properties of "
                "`schema`), or reflect on the other part."
            )
        self.source = (
            source if source is not None else getattr(teacher, "model", getattr(teacher, "__name__", "teacher"))
        )
        if not self.source:
            raise SettingsError('`source` names who wrote the rewrites and cannot be "": that is the originals\'.')
        self._forget()

    def _forget(self) -> None:
        self._answered, self._failures = 0, Counter[str]()
        # by all replies that the last `prefetch` saw, asked now or reused
        self.returned = Counter[str]()  # the model names that came with them
        self.took: dict[str, float] = {"replies": 0, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0}
        self._failed: dict[str, Reply] = {}  # by the ledger's key, from the last `prefetch`
        self._sampling: dict[int, tuple[dict[str, Any], Keys]] = {}  # the teacher's, by attempt, for one call
        # a rewrite stands below its parent, perhaps in the next batch: the last keys made
        # show a table reflected before
        self._made: deque[tuple[str, str, str]] = deque(maxlen=1000)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._FIELDS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, batch: Any) -> pa.Table:
        """One batch of `map`, as it comes: a dict of lists or, where the dataset is formatted so, a `pa.Table`."""
        with _collecting_seldom():
            return self._reflected(as_table(batch))

    def _reflected(self, table: pa.Table) -> pa.Table:
        columns = self._columns(table)
        parents = self._parents(columns)
        rewrites = self._rewrites([parent for parent in parents if parent.is_usable])
        self._check_failures([rewrite.error for rewrite in rewrites.values()])
        for parent in parents:
            if not parent.is_usable:
                variant, error = parent.values["variant"], parent.values["error"]
                rewrites[parent.position] = Rewrite(error=f"parent: its {variant} version is unusable ({error})")
        return self._written(table, columns, parents, rewrites)

    # ---- asking

    def _rewrites(self, parents: list[_Parent]) -> dict[int, Rewrite]:
        """By position: the rewrite of each, from the ledger or by asking."""
        if not isinstance(self.teacher, Teacher):
            return self._from_callable(self.teacher, parents)
        self._sampling.clear()
        keys: dict[int, str] = {}  # by position; equal chats have equal keys and are asked once
        results: dict[str, Rewrite] = {}

        def asks() -> Iterator[Ask]:
            for parent in parents:
                ask = self._ask(_Attempt(parent))
                keys[parent.position] = ask.key
                if failed := self._failed.get(ask.key):  # `prefetch` tried in vain: the `map` after it only replays
                    results[ask.key] = Rewrite(error=failed.error)
                else:
                    yield ask

        def finish(attempt: _Attempt, rewrite: Rewrite) -> None:
            results[keys[attempt.parent.position]] = rewrite

        self.teacher.stream(asks(), lambda attempt, reply: self._judge(attempt, reply, finish), may_ask=self._may_ask)
        return {position: results[key] for position, key in keys.items()}

    def _from_callable(
        self, teacher: Callable[[list[Chat]], list[Reply]], parents: list[_Parent]
    ) -> dict[int, Rewrite]:
        rewrites: dict[int, Rewrite] = {}
        left = parents
        for _ in range(1 + self.retry_unusable):
            if not left:
                break
            replies = teacher([self._chat(parent) for parent in left])
            if not isinstance(replies, list) or not all(isinstance(reply, Reply) for reply in replies):
                raise TeacherError(f"The teacher {self.source!r} must return a list of `hf_reflect.Reply`.")
            if len(replies) != len(left):
                raise TeacherError(
                    f"The teacher {self.source!r} gave {len(replies)} replies to {len(left)} chats: it must give one "
                    "each, in order; where there is none, a `Reply(error=...)`."
                )
            again = []
            for parent, reply in zip(left, replies, strict=True):
                rewrite = self._read(parent, reply._replace(text=whole(reply.text)))
                if rewrite.error is None or parent.position not in rewrites:
                    rewrites[parent.position] = rewrite
                if rewrite.error is not None and not reply.error:
                    again.append(parent)
            left = again
        return rewrites

    def _ask(self, attempt: _Attempt) -> Ask:
        """What the ledger knows this attempt by: a further one is warmer, and has a seed."""
        if attempt.number not in self._sampling:
            assert isinstance(self.teacher, Teacher)
            changes: dict[str, Any] = {"temperature": WARMER, "seed": attempt.number} if attempt.number else {}
            changes["response_format"] = self.prompt.response_format
            sampling = self.teacher.sampling(**changes)
            self._sampling[attempt.number] = sampling, Keys(sampling)
        sampling, keys = self._sampling[attempt.number]
        chat = self._chat(attempt.parent)
        return Ask(keys(chat), {"messages": chat, **sampling}, attempt)

    def _chat(self, parent: _Parent) -> Chat:
        values = parent.values
        return self.prompt.chat(values["instruction"], values["response"], values["input"], values["history"])

    def _judge(self, attempt: _Attempt, reply: Reply, finish: Callable[[_Attempt, Rewrite], None]) -> Verdict:
        """What a reply comes to; perhaps another attempt."""
        rewrite = self._read(attempt.parent, reply)
        if rewrite.error is None or (reply.error and attempt.first is None):
            finish(attempt, rewrite)
            return Verdict(unusable=rewrite.error is not None)
        first, number = attempt.first or rewrite, attempt.number + 1
        if number <= self.retry_unusable and not reply.error:
            ask = self._ask(_Attempt(attempt.parent, number, first))
            if (failed := self._failed.get(ask.key)) is None:
                return Verdict(True, ask)
            rewrite = Rewrite(error=failed.error)
        # where another run may still get the further attempt, the row says so
        finish(attempt, rewrite if error_code(rewrite.error) in WAITING else first)
        return Verdict(unusable=True)

    def prefetch(self, dataset: Dataset) -> dict[str, float]:
        """Ask everything that `map` over `dataset` would, in one continuous stream into the ledger.

        So no slow reply holds up a batch; the `map` after it only replays. Returns the numbers of this call: asked,
        reused, failed, prompt_tokens, completion_tokens, cost (of the asked); `took` has replies, prompt_tokens,
        completion_tokens and cost of all, also of the reused, and `returned` their models' names. Any other callable
        than a Teacher keeps no ledger and is left to `map`.
        """
        self.took, self.returned = dict.fromkeys(self.took, 0), Counter()
        if not isinstance(self.teacher, Teacher):
            return no_stats()
        teacher, before = self.teacher, self.teacher.stats
        self._failed.clear()
        answered, failures = 0, Counter[str]()

        def finish(attempt: _Attempt, rewrite: Rewrite) -> None:
            # Read here only to stop early where replies are useless; `map` reads again.
            nonlocal answered
            answered += error_code(rewrite.error) != "budget"
            if error_code(rewrite.error) in FAILURES:
                failures[rewrite.error or ""] += 1
                self._stop_if_useless(answered, failures)

        def judge(attempt: _Attempt, reply: Reply) -> Verdict:
            if reply.error:
                self._failed[self._ask(attempt).key] = reply
            else:
                self.took["replies"] += 1
                self.returned[reply.model or "not named"] += 1
                self.took["prompt_tokens"] += reply.prompt_tokens
                self.took["completion_tokens"] += reply.completion_tokens
                self.took["cost"] += teacher.cost(reply.prompt_tokens, reply.completion_tokens)
            return self._judge(attempt, reply, finish)

        asks = (self._ask(_Attempt(parent)) for parent in self._walk(dataset) if parent.is_usable)
        teacher.stream(asks, judge, self._count(dataset))
        return {name: value - before[name] for name, value in teacher.stats.items()}

    def estimate(self, dataset: Dataset) -> dict[str, float]:
        """What `map` over `dataset` would take, asking nothing: calls, reused, prompt_tokens, completion_tokens, cost.

        Versions that are not there yet because nobody was asked for them (`budget: …`, `teacher: …`) count as if they
        related to the version above them as those do that are there; with fewer than 50, as if they were all usable
        and as long. Further attempts (`retry_unusable`) are not counted.
        """
        if not isinstance(self.teacher, Teacher):
            raise SettingsError("Only a `Teacher` can estimate: a callable knows neither tokens nor prices.")
        with Ledger(self.teacher.ledger) as ledger:
            estimate = Estimate(self.teacher, ledger)
            above: Chat = []
            counted: set[str] = set()
            there = answered = waiting = 0
            bytes_there = bytes_above = bytes_waiting = 0

            def requests() -> Iterator[dict[str, Any]]:
                nonlocal above, there, answered, waiting, bytes_there, bytes_above, bytes_waiting
                for parent in self._walk(dataset):
                    is_child = parent.values["variant"] != "original"
                    if parent.is_usable:
                        request = self._ask(_Attempt(parent)).request
                        if is_child:
                            there, answered = there + 1, answered + 1
                            bytes_there += size(request["messages"])
                            bytes_above += size(above)
                        else:
                            above = request["messages"]
                        yield request
                    elif is_child and error_code(parent.values["error"]) in WAITING and above:
                        key = json.dumps(above)
                        if key not in counted:  # equal rows have equal children
                            counted.add(key)
                            waiting, bytes_waiting = waiting + 1, bytes_waiting + size(above)
                    else:
                        answered += is_child

            estimate.add(requests())
            if waiting:
                enough = there >= ENOUGH_REPLIES
                usable, growth = (there / answered, bytes_there / bytes_above) if enough else (1.0, 1.0)
                estimate.add_guess(above, waiting * usable, bytes_waiting * usable * growth)
            return estimate.result()

    def estimate_one_a_row(self, dataset: Dataset) -> dict[str, float]:
        """As `estimate`, where only one version of each row will be reflected on, and which is not known yet."""
        if not isinstance(self.teacher, Teacher):
            raise SettingsError("Only a `Teacher` can estimate: a callable knows neither tokens nor prices.")
        with Ledger(self.teacher.ledger) as ledger:
            estimate = Estimate(self.teacher, ledger)

            def requests() -> Iterator[dict[str, Any]]:
                usable = (parent for parent in self._walk(dataset) if parent.is_usable)
                for _, versions in groupby(usable, key=lambda parent: parent.values["row_id"]):
                    asks = [self._ask(_Attempt(parent)) for parent in versions]
                    there = ledger.get(ask.key for ask in asks)
                    yield max(asks, key=lambda ask: (ask.key in there, size(ask.request["messages"]))).request

            estimate.add(requests())
            return estimate.result()

    def _count(self, dataset: Dataset) -> int:
        """How many versions there are to reflect on."""
        require_columns(dataset.column_names, _NEEDED, "`ReflectionTransform`")
        columns = [name for name in ("variant", "source", "instruction", "response") if name in dataset.column_names]
        count = 0
        for batch in dataset.select_columns(columns).with_format("arrow").iter(10_000):
            mine = pc.is_in(batch["variant"], pa.array(_PARENTS[self.part]))
            if "source" in columns:
                mine = pc.and_(mine, pc.is_in(batch["source"], pa.array(["", self.source])))
            usable = pc.and_(pc.is_valid(batch["instruction"]), pc.is_valid(batch["response"]))
            count += pc.sum(pc.and_(mine, usable)).as_py() or 0
        return count

    def _walk(self, dataset: Dataset) -> Iterator[_Parent]:
        """Everything there is to reflect on, in order; few rows are held at a time."""
        self._sampling.clear()
        self._made.clear()
        for batch in dataset.with_format("arrow").iter(_BATCH):
            yield from self._parents(self._columns(batch))
        self._made.clear()

    # ---- reading and writing tables

    def _columns(self, table: pa.Table) -> dict[str, list]:
        """The columns of the design's table as lists; absent `source` and `history` are as of originals."""
        require_columns(table.column_names, _NEEDED, "`ReflectionTransform`")
        empty: dict[str, Any] = {"source": "", "history": [], "critique": None}
        columns = {
            name: table[name].to_pylist() if name in table.column_names else [empty[name]] * len(table)
            for name in PAIR_FEATURES
        }
        columns["input"] = [text or "" for text in columns["input"]]
        return columns

    def _parents(self, columns: dict[str, list]) -> list[_Parent]:
        keys = list(zip(columns["row_id"], columns["variant"], columns["source"], strict=True))
        parents = []
        for position, (row, (_, variant, source)) in enumerate(
            zip(zip(*columns.values(), strict=True), keys, strict=True)
        ):
            if variant in _PARENTS[self.part] and source in ("", self.source):
                parents.append(_Parent(position, dict(zip(columns, row, strict=True))))
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

    def _read(self, parent: _Parent, reply: Reply) -> Rewrite:
        """The rewrite in a reply, if it can be used."""
        if reply.error:
            return Rewrite(error=reply.error)
        rewrite = self.prompt.parse(reply.text, reply.finish_reason)
        if rewrite.error:
            return rewrite
        if getattr(rewrite, self.part).strip() == parent.values[self.part].strip():
            return Rewrite(critique=rewrite.critique, error=f"unchanged: the {self.part} came back as it was")
        if self.accept is not None:
            words = self.accept(dict(parent.values), self._version(parent, rewrite))
            if not isinstance(words, str | None):
                raise SettingsError(
                    f"`accept` returned {words!r}. It must return None where a rewrite is fine, else a text: why not."
                )
            if words:
                return Rewrite(critique=rewrite.critique, error=f"check: {words}")
        return rewrite

    def _version(self, parent: _Parent, rewrite: Rewrite) -> dict[str, Any]:
        """The columns in which a usable rewrite differs from its parent."""
        return {
            "variant": self._child(parent.values["variant"]),
            "source": self.source,
            "instruction": rewrite.instruction or parent.values["instruction"],
            "input": "" if rewrite.instruction else parent.values["input"],
            "response": rewrite.response,
            "critique": rewrite.critique,
            "error": None,
        }

    def _written(
        self, table: pa.Table, columns: dict[str, list], parents: list[_Parent], rewrites: dict[int, Rewrite]
    ) -> pa.Table:
        """The batch with its rewrites, all columns, an explicit schema.

        A first batch of nulls must not type a column.
        """
        for field in _SCHEMA:
            if field.name not in table.column_names or table.schema.field(field.name).type != field.type:
                table = put_column(table, field, pa.array(columns[field.name], field.type))
        others = table.select([name for name in table.column_names if name not in _REWRITTEN])
        others = others.take(pa.array([parent.position for parent in parents], pa.int64()))
        rows = [self._row(parent, rewrites[parent.position]) for parent in parents]
        new = {name: pa.array([row[name] for row in rows], _SCHEMA.field(name).type) for name in _REWRITTEN}
        new |= {name: others[name] for name in others.column_names}
        # another version's scores are not this one's
        same = pa.array([row["variant"] == old.values["variant"] for row, old in zip(rows, parents, strict=True)])
        for name in (*SCORE_COLUMNS, "coherence"):
            if name in new:
                new[name] = pc.if_else(same, new[name], pa.scalar(None, new[name].type))
        below = pa.table([new[name] for name in table.column_names], schema=table.schema)

        place = {parent.position: len(table) + number for number, parent in enumerate(parents)}
        order: list[int] = []
        for position in range(len(table)):
            if self.keep_parent or position not in place:
                order.append(position)
            if position in place:
                order.append(place[position])
        return pa.concat_tables([table, below]).take(pa.array(order, pa.int64()))

    def _row(self, parent: _Parent, rewrite: Rewrite) -> dict[str, Any]:
        """The columns in which what came of a version may differ from it."""
        if rewrite.error is None:
            return self._version(parent, rewrite)
        if not self.keep_parent:
            old = {name: parent.values[name] for name in _REWRITTEN}
            return old | {"critique": rewrite.critique or old["critique"], "error": rewrite.error}
        return {
            "variant": self._child(parent.values["variant"]),
            "source": self.source,
            "instruction": None,
            "input": "",
            "response": None,
            "critique": rewrite.critique,
            "error": rewrite.error,
        }

    def _check_failures(self, errors: list[str | None]) -> None:
        if self._may_ask:
            self._answered += sum(error_code(error) != "budget" for error in errors)
            self._failures.update(error for error in errors if error and error_code(error) in FAILURES)
            self._stop_if_useless(self._answered, self._failures)

    def _stop_if_useless(self, answered: int, failures: Counter[str]) -> None:
        """Raise past the teacher's `max_failure_rate`, with the commonest reasons and examples."""
        failed, limit = failures.total(), getattr(self.teacher, "max_failure_rate", 0.2)
        if not too_many(failed, answered, limit):
            return
        codes: Counter[str] = Counter()
        for error, count in failures.items():
            codes[error_code(error)] += count
        reasons = ", ".join(f"{count} {code}" for code, count in codes.most_common())
        examples = [
            next(error for error, _ in failures.most_common() if error_code(error) == code)
            for code, _ in codes.most_common(3)
        ]
        raise TeacherError(
            f"{failed} of {answered} replies to the {self.part} reflection are unusable ({reasons}), more than "
            f"max_failure_rate={limit} allows. For example: {'; '.join(examples)}\n"
            "Mend the cause (a larger `max_tokens`, another model or prompt), let them be asked again "
            "(`retry_unusable`), or raise `max_failure_rate`. Replies that came are in the ledger."
        )


@contextmanager
def _collecting_seldom() -> Iterator[None]:
    """What a batch allocates lives as long as the batch: the garbage collector would walk it over and over."""
    before = gc.get_threshold()
    if before[0]:  # else it is switched off
        gc.set_threshold(max(before[0], 100_000), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def estimate_recycling(
    instruction: ReflectionTransform, response: ReflectionTransform, pairs: Dataset, selective: bool = False
) -> dict[str, float]:
    """What reflecting on every instruction and then on every response would take, asking nothing.

    In: the table of `to_pairs`. Returns calls (three a row, less those in the ledger), reused, prompt_tokens,
    completion_tokens, cost; how what is not there yet is counted says `ReflectionTransform.estimate`.

    With `selective` only one response a row is asked for, so it is two calls a row. To which instruction is not known
    before the student chose: counted is the longer one of those that are there, or the one that has its answer.
    """
    known = copy(instruction)
    known._may_ask, known.teacher = False, copy(instruction.teacher)  # whose `stats` are not the user's
    first = instruction.estimate(pairs)
    table = pairs.map(known, batched=True, load_from_cache_file=False)
    second = response.estimate_one_a_row(table) if selective else response.estimate(table)
    return {name: first[name] + second[name] for name in first}

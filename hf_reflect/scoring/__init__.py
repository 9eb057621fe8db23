"""The student's view of every version: four losses, IFD and r-IFD.

packing.py      which sequences share a forward pass, and what they have in common
attention.py    keeps them apart inside the model, on every backend
student.py      the forward passes; sees by itself whether the architecture can be packed
plan.py         which rows are scored together, by which process
checkpoint.py   finished packs on disk
coherence.py    the cosine of a sentence embedding, on request
"""

import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..columns import LOSS_COLUMNS, SCORE_COLUMNS, require_columns
from ..errors import SettingsError
from ..templates import StudentTemplate
from .packing import Passage, size
from .plan import Bin, Version, bins_of, groups_of, passages_of, versions_of, work_of
from .processes import Processes, Progress
from .student import Losses, Student

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from .checkpoint import Checkpoint

logger = logging.getLogger(__name__)

_TEXTS = ("instruction", "input", "response", "history")
# settings of a model that change no loss
_NO_MATTER = ("architectures", "dtype", "id2label", "label2id", "torch_dtype", "transformers_version", "use_cache")
_KEPT_TOKENS = 2**26  # ids that stay in memory between measuring and scoring, 4 bytes each; the rest is read again
Reader = Callable[[Sequence[int]], list[dict[str, Any]]]  # numbers of rows → their texts


class StudentScorer:
    """Score every usable version with the student: losses, IFD and r-IFD.

    In:  instruction, input, response, optionally history                                                     (N rows)
    Out: the same columns plus loss_instruction, loss_response, loss_instruction_given_response,
         loss_response_given_instruction (nats per target token, float64), ifd, r_ifd; null on unusable rows  (N rows)

    `dataset.map(scorer, batched=True)` on one process; `scorer.score(dataset)` on any number. The model is scored as
    it is, in eval mode, without gradients, on the device where it lies.

    Sequences are packed into forward passes without padding, and beginnings that they share are computed once. Whether
    the architecture takes that is seen with the first pack, and again with a longer sequence than any before: losses
    must not change with other neighbours, and some sequences are scored one at a time too. Where it does not
    (recurrent layers, ALiBi) a warning says so, and sequences are scored without packs.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        template: how the student sees a pair, as in training: see `hf_reflect.templates`.
        max_length: as in training; what is longer is cut as there, alike in the passes that are compared.
        tokens_per_batch: tokens in one forward pass, a single longer sequence excepted; "auto" measures what the
            device's memory holds. Where memory does not suffice it is halved, and nothing done is lost.
        adapter: None takes a PEFT model as it is, adapter on; "base" scores the model below it.
        coherence: name or path of a Sentence-BERT model, or a loaded `SentenceTransformer`: fills the column
            `coherence` too. Needs the extra `hf_reflect[coherence]`.

    Attributes:
        rows_cut: versions scored so far of which something had to be cut to fit `max_length`.

    Raises:
        DataError: a column is missing.
        SettingsError: see `StudentTemplate`; an encoder or sequence-to-sequence model; a length for which the model
            has no positions; losses that are no numbers; a sequence that does not fit into memory.

    Source: arXiv 2402.10110, Eq. 2 to 4 (IFD) and 7, 8 (r-IFD).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: str = "auto",
        max_length: int = 2048,
        tokens_per_batch: int | str = "auto",
        adapter: str | None = None,
        coherence: Any = None,
    ):
        number = isinstance(tokens_per_batch, int) and not isinstance(tokens_per_batch, bool) and tokens_per_batch > 0
        if tokens_per_batch != "auto" and not number:
            raise SettingsError(f'`tokens_per_batch` is a number of tokens or "auto", not {tokens_per_batch!r}.')
        self._student: Student | None = Student(model, adapter, tokens_per_batch)
        self.tokenizer = tokenizer
        self.template = StudentTemplate(tokenizer, template, max_length)
        self.tokens_per_batch = tokens_per_batch
        self.coherence = coherence
        self.rows_cut = 0

    @property
    def model(self) -> Any:
        """The student."""
        return self._here().model

    @property
    def tokens_in_a_pass(self) -> int | None:
        """What `tokens_per_batch` came to: as measured, or as memory allowed; None before the first batch."""
        return self._here().limit

    def __getstate__(self) -> dict[str, Any]:
        """What the scores depend on, for the fingerprint of `map`: the weights as a digest, not the model."""
        from .checkpoint import digest_of_weights

        named = isinstance(self.coherence, str | None)
        return {**self._depends_on(), "coherence": self.coherence if named else digest_of_weights(self.coherence)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._student = None  # a copy in another process, which cannot score

    def __call__(self, batch: Any) -> "pa.Table":
        """One batch of `map`; this process scores all of it."""
        import pyarrow as pa

        from ..pairs import as_table, put_column

        self._here()
        table = as_table(batch)
        require_columns(table.column_names, _TEXTS[:3], "`StudentScorer`")
        rows = table.select([name for name in _TEXTS if name in table.column_names]).to_pylist()
        for name, values in self.score_rows(rows).items():
            table = put_column(table, pa.field(name, pa.float64()), pa.array(values, pa.float64()))
        return table

    def score_rows(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
        """Scores of plain dicts, by this process: for programs without `datasets`.

        In:  instruction, input, response, optionally history       Out: the score columns, a list each
        """

        def read(numbers: Sequence[int]) -> list[dict[str, Any]]:
            return [rows[number] for number in numbers]

        return self._scores(len(rows), lambda: enumerate(rows), read, Processes(alone=True))

    def score(self, dataset: "Dataset", checkpoint_dir: str | os.PathLike | None = None) -> "Dataset":
        """Score a whole table on all processes of the launch; each returns the same table.

        Rows are dealt out by their tokens. Every process makes the same number of forward passes, as ZeRO-3 and FSDP
        need it.

        Args:
            dataset: the table.
            checkpoint_dir: a folder that all processes see. Finished packs are written there, and after a crash the
                same call goes on where it ended, on any number of processes.

        Raises:
            SettingsError: `checkpoint_dir` holds scores of another student, table or setting (which one is said).
        """
        require_columns(dataset.column_names, _TEXTS[:3], "`StudentScorer`")
        texts = dataset.select_columns([name for name in _TEXTS if name in dataset.column_names]).with_format("arrow")

        def rows() -> Iterable[tuple[int, dict[str, Any]]]:
            return enumerate(row for batch in texts.iter(1000) for row in batch.to_pylist())

        def read(numbers: Sequence[int]) -> list[dict[str, Any]]:
            return texts[numbers].to_pylist()

        processes, checkpoint = Processes(), None
        if checkpoint_dir is not None:
            from .checkpoint import Checkpoint, digest_of_rows

            checkpoint = Checkpoint(checkpoint_dir, {**self._depends_on(), "rows": digest_of_rows(rows())}, processes)
        return replace_scores(dataset, self._scores(len(dataset), rows, read, processes, checkpoint, told=True))

    def _here(self) -> Student:
        if self._student is None:
            raise SettingsError(
                "A `StudentScorer` does not travel to other processes: leave `num_proc` out of `map`. For more speed "
                "launch several processes, `accelerate launch ...`, and call `scorer.score(dataset)`."
            )
        return self._student

    def _depends_on(self) -> dict[str, Any]:
        """What the losses depend on, by name."""
        import xxhash

        from .checkpoint import digest_of_weights

        student, tokenizer = self._here(), self.tokenizer
        if tokenizer.is_fast:  # how a call before padded or cut is kept there, and not what was learned
            words = {**json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}
        else:
            words = tokenizer.get_vocab()
        told = (words, str(tokenizer.special_tokens_map), getattr(tokenizer, "chat_template", None))
        config = {k: v for k, v in student.model.config.to_dict().items() if k not in _NO_MATTER and k[0] != "_"}
        adapters = [
            (module.scaling, module.disable_adapters, module.merged_adapters, module.active_adapters)
            for module in student.model.modules()
            if hasattr(module, "scaling") and hasattr(module, "merged_adapters")
        ]

        def digest(value: Any) -> str:
            return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())

        return {
            "model": f"{type(student.model).__name__} {digest(config)}",
            "dtype": str(student.dtype).removeprefix("torch."),
            "adapter": f"{student.adapter or 'as loaded'} {digest(adapters)}",
            "weights": digest_of_weights(student.model),
            "tokenizer": f"{type(tokenizer).__name__} {digest(told)}",
            "template": f"{self.template.name} {digest(self.template.texts)}",
            "max_length": self.template.max_length,
        }

    def _scores(
        self,
        count: int,
        rows: Callable[[], Iterable[tuple[int, dict[str, Any]]]],
        read: Reader,
        processes: Processes,
        checkpoint: "Checkpoint | None" = None,
        told: bool = False,
    ) -> dict[str, list[float | None]]:
        """The score columns of a table of `count` rows, on every process."""
        values = np.full((count, len(LOSS_COLUMNS)), np.nan)
        student, groups = self._here(), groups_of(rows())
        with student.ready():
            planned, *mine = self._losses(values, groups, read, processes, checkpoint, told)
        parts = processes.gather(mine)
        for numbers, some in parts:
            values[numbers] = some
        if planned != (scored := sum(len(numbers) for numbers, _ in parts)):
            raise RuntimeError(f"{scored} of {planned} versions were scored: please report this.")
        columns = dict(zip(LOSS_COLUMNS, values.T, strict=True))
        for name, given, alone in (
            ("ifd", "loss_response_given_instruction", "loss_response"),
            ("r_ifd", "loss_instruction_given_response", "loss_instruction"),
        ):
            columns[name] = np.exp(np.minimum(columns[given] - columns[alone], 700.0))
        scores = {
            name: [None if missing else value for value, missing in zip(some.tolist(), np.isnan(some), strict=True)]
            for name, some in columns.items()
        }
        if self.coherence is not None:
            scores["coherence"] = self._coherence(count, read, processes)
        return scores

    def _losses(
        self,
        values: np.ndarray,  # (rows, 4); filled with what a checkpoint holds
        groups: list[list[int]],
        read: Reader,
        processes: Processes,
        checkpoint: "Checkpoint | None",
        told: bool,
    ) -> tuple[int, list[int], np.ndarray]:
        """How many rows there are to score, those that this process scored, and their losses."""
        student = self._here()
        # what this process learned by itself, in a `map` say, must not make it take another path than the others
        limits, packs, checked = zip(*processes.gather((student.limit, student.packs, student.checked)), strict=True)
        student.limit = None if None in limits else min(limits)
        tokens, longest, kept = self._measured(groups, read, processes)
        most = longest.max(initial=0)  # a window may show only with a sequence longer than any before
        known = len(set(packs)) == 1 and (packs[0] is False or most <= min(checked))
        student.packs, student.checked = packs[0] if known else None, max(most, min(checked))
        if (positions := student.positions) is not None and most > positions:
            raise SettingsError(
                f"The student has positions for {positions} tokens, and a sequence has {most}: lower "
                f"`max_length` from {self.template.max_length} to {positions}, in training too."
            )
        if student.limit is None:
            before = None if checkpoint is None else checkpoint.tokens_per_batch
            student.limit = before or self._fitting(groups, longest, read, processes)
        limit, shares = student.limit, processes.count
        done: set[tuple[int, int]] = set()
        if checkpoint is not None:
            limit, shares = checkpoint.settled(limit, shares)
            done = checkpoint.load(values)
        work = work_of(bins_of(groups, tokens, longest, limit, shares), done, processes.rank, processes.count)

        scored: list[tuple[Bin, np.ndarray]] = []
        queue = iter(work.mine)
        versions = self._versions(next(queue, None), read, kept)
        passages = passages_of(versions)
        found: dict[Passage, float] = {}
        if student.packs is None and any(processes.gather(bool(passages))):
            found = self._checked(passages, processes)
        with Progress(told and processes.rank == 0, work.tokens) as progress:
            for each in itertools.chain(work.mine, itertools.repeat(None)):
                batches = [some for some in student.batches(passages_of(versions)) if not found.keys() >= set(some)]
                steps = processes.gather((len(batches), 0 if each is None else each.tokens, each is not None))
                if not any(busy for _, _, busy in steps):
                    break
                running = [losses for batch in batches for losses in student.run(batch)]
                for _ in range(max(number for number, _, _ in steps) - len(batches)):
                    student.idle()
                following = self._versions(next(queue, None), read, kept)  # tokenized while the device computes
                if each is not None:
                    some = _collected(versions, running, found)
                    scored.append((each, some))
                    if checkpoint is not None:
                        checkpoint.add(each, some)
                versions, found = following, {}
                progress.add(sum(number for _, number, _ in steps))
        if checkpoint is not None:
            checkpoint.flush()
        numbers = [row for each, _ in scored for row in each.rows]
        own = np.concatenate([np.empty((0, len(LOSS_COLUMNS))), *(some for _, some in scored)])
        if processes.rank == 0:
            numbers, own = [*work.loaded, *numbers], np.concatenate([values[work.loaded], own])
        return work.rows, numbers, own

    def _versions(self, wanted: Bin | None, read: Reader, kept: dict[int, Version]) -> list[Version]:
        rows = () if wanted is None else wanted.rows
        missing = [row for row in rows if row not in kept]
        found = (
            {version.row: version for version in versions_of(self.template, missing, read(missing))} if missing else {}
        )
        return [found[row] if row in found else kept.pop(row) for row in rows]

    def _measured(
        self, groups: list[list[int]], read: Reader, processes: Processes
    ) -> tuple[np.ndarray, np.ndarray, dict[int, Version]]:
        """Tokens and longest sequence of each group, each process measuring its part; and the first versions it read.

        Counts what was cut.
        """
        own = range(processes.rank, len(groups), processes.count)
        part = np.zeros((len(own), 2), dtype=np.int64)
        kept: dict[int, Version] = {}
        room, cut = _KEPT_TOKENS, 0
        for start in range(0, len(own), 64):
            some = own[start : start + 64]
            numbers = [row for group in some for row in groups[group]]
            versions = iter(versions_of(self.template, numbers, read(numbers)))
            for place, group in enumerate(some, start):
                together = list(itertools.islice(versions, len(groups[group])))
                passages = passages_of(together)
                part[place] = size(passages), max(map(len, passages), default=0)
                cut += sum(version.cut for version in together)
                room -= sum(map(len, passages))
                if room > 0:
                    kept |= {version.row: version for version in together}
        measured = np.zeros((len(groups), 2), dtype=np.int64)
        for rank, (some, number) in enumerate(processes.gather((part, cut))):
            measured[rank :: processes.count] = some
            self.rows_cut += number
        return measured[:, 0], measured[:, 1], kept

    def _fitting(self, groups: list[list[int]], longest: np.ndarray, read: Reader, processes: Processes) -> int:
        """What "auto" is here: measured with the longest group, by all processes alike."""
        worst = groups[int(longest.argmax())] if len(groups) else []
        passages = passages_of(versions_of(self.template, worst, read(worst))) if worst else set()
        return min(processes.gather(self._here().fit(passages)))

    def _checked(self, passages: set[Passage], processes: Processes) -> dict[Passage, float]:
        """Decide whether this student is scored in packs; the losses of the first pack, where it may be trusted."""
        student = self._here()
        student.packs = True
        first = max(student.batches(passages), key=lambda some: max(map(len, some)), default=[])
        found, reason = student.check(first)
        reasons = [reason for reason in processes.gather(reason) if reason is not None]
        student.packs = not reasons
        if not reasons:
            return found
        if processes.rank == 0:
            logger.warning(
                "%s cannot be scored in packs (%s): it is scored without, exactly, but several times slower.",
                type(student.model).__name__,
                reasons[0],
            )
        return {}

    def _coherence(self, count: int, read: Reader, processes: Processes) -> list[float | None]:
        from .coherence import coherence_of, load_encoder

        encoder = load_encoder(self.coherence, str(self._here().device))
        own = range(processes.rank, count, processes.count)
        found: list[float | None] = []
        for start in range(0, len(own), 1000):
            found += coherence_of(encoder, read(own[start : start + 1000]))
        parts = processes.gather(found)
        return [parts[number % processes.count][number // processes.count] for number in range(count)]


def _collected(versions: list[Version], running: list[Losses], found: dict[Passage, float]) -> np.ndarray:
    """The four losses of each version, (versions, 4); NaN where there is no target.

    Raises:
        SettingsError: a loss is no finite number: it would win comparisons that nobody can see.
    """
    for losses in running:
        found = found | losses.means()
    values = np.full((len(versions), len(LOSS_COLUMNS)), np.nan)
    for place, version in enumerate(versions):
        for column, passage in enumerate(version.passages):
            if passage is None:
                continue
            values[place, column] = found[passage]
            if not math.isfinite(found[passage]):
                raise SettingsError(
                    f"The student's {LOSS_COLUMNS[column]} of row {version.row} is no finite number: its weights are "
                    "broken, or its precision is too small (float16?). Load it in bfloat16 or float32."
                )
    return values


def replace_scores(dataset: "Dataset", scores: dict[str, list[float | None]]) -> "Dataset":
    """The dataset with these values, by name, as its score columns."""
    from datasets import Value

    result = dataset.remove_columns([name for name in {*SCORE_COLUMNS, *scores} if name in dataset.column_names])
    for name, values in scores.items():
        result = result.add_column(name, values, feature=Value("float64"))
    return result

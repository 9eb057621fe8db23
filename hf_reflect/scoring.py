"""The student's view of every version: four losses, IFD and r-IFD.

ids      b  c1 c2 c3 | t1 t2 t3          context (prompt or BOS), target
logits   .  .  .  p1   p2 p3 .           the logits at a position predict the next one: wanted are those from the
loss                -log p1[t1], …       context's last id on
"""

import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
from datasets import Dataset, Value

from .errors import SettingsError
from .pairs import LOSS_COLUMNS, SCORE_COLUMNS, as_table, is_usable, put_column, require_columns
from .templates import StudentTemplate

if TYPE_CHECKING:
    import torch

# "auto" keeps a batch's float32 logits below 2**28 values (1 GiB) whatever the vocabulary (one long row may exceed
# it), and a batch as small as pays: on a CPU more tokens only mean more padding.
_AUTO_LOGITS = 2**28
_AUTO_TOKENS = {"cpu": 2048}
_AUTO_TOKENS_ELSEWHERE = 16_384


_READ = ("instruction", "input", "response", "history")


class _Pass(NamedTuple):
    """One sequence to score: which row and loss it is for, and its ids at 4 bytes each (a table has a million)."""

    row: int
    loss: str
    context: array
    target: array

    @property
    def length(self) -> int:
        return len(self.context) + len(self.target)


class StudentScorer:
    """Score every usable version with the student: losses, IFD and r-IFD.

    In:  instruction, input, response, optionally history                                                     (N rows)
    Out: the same columns plus loss_instruction, loss_response, loss_instruction_given_response,
         loss_response_given_instruction (nats per target token, float64), ifd, r_ifd; null on unusable rows  (N rows)

    `dataset.map(scorer, batched=True)` on one process; `scorer.score(dataset)` on any number. The model is scored as
    it is, in eval mode, without gradients, on the device where it lies.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        template: how the student sees a pair, as in training: see `hf_reflect.templates`.
        max_length: as in training; what is longer is cut as there, alike in the passes that are compared.
        tokens_per_batch: padded tokens in one forward pass; "auto" keeps the logits of a batch below 1 GiB, and takes
            no more than the device has use for.

    Raises:
        DataError: a column is missing.
        SettingsError: see `StudentTemplate`; an encoder or sequence-to-sequence model.

    Source: arXiv 2402.10110, Eq. 2 to 4 (IFD) and 7, 8 (r-IFD).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: str = "auto",
        max_length: int = 2048,
        tokens_per_batch: int | str = "auto",
    ):
        config = getattr(model, "config", None)
        generates = getattr(model, "can_generate", None)
        if getattr(config, "is_encoder_decoder", False) or generates is None or not generates():
            raise SettingsError(f"The student must be a causal language model; {type(model).__name__} is none.")
        if tokens_per_batch != "auto" and not (isinstance(tokens_per_batch, int) and tokens_per_batch > 0):
            raise SettingsError(f'`tokens_per_batch` is a number of tokens or "auto", not {tokens_per_batch!r}.')
        self.model, self.tokenizer = model, tokenizer
        self.template = StudentTemplate(tokenizer, template, max_length)
        self.tokens_per_batch = tokens_per_batch
        self.rows_cut = 0  # versions scored so far of which something had to be cut

    def __getstate__(self) -> dict[str, Any]:
        """What the scores depend on, for the fingerprint of `map`: the weights as a digest, not the model."""
        tokenizer = self.tokenizer
        vocabulary = (
            tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
        )
        return {
            "weights": _digest(self.model),
            "config": str(getattr(self.model, "config", None)),
            "tokenizer": (vocabulary, str(tokenizer.special_tokens_map), getattr(tokenizer, "chat_template", None)),
            "template": self.template.name,
            "max_length": self.template.max_length,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.model = None  # a copy in another process, which cannot score

    def __call__(self, batch: Any) -> pa.Table:
        """One batch of `map`; this process scores all of it."""
        if self.model is None:
            raise SettingsError(
                "A `StudentScorer` does not travel to other processes: leave `num_proc` out of `map`. For more speed "
                "launch several processes, `accelerate launch ...`, and call `scorer.score(dataset)`."
            )
        table = as_table(batch)
        return _with_scores(table, _finite(self._losses(self._passes([table]))))

    def score(self, dataset: Dataset) -> Dataset:
        """Score a whole table on all processes of the launch; each returns the same table.

        Rows are dealt out in turn. Every process makes the same number of forward passes, as ZeRO-3 and FSDP need it.
        """
        from accelerate import PartialState
        from accelerate.utils import gather_object

        state = PartialState()
        rank, processes = state.process_index, state.num_processes
        names = [name for name in _READ if name in dataset.column_names]
        share = dataset.select_columns(names).select(range(rank, len(dataset), processes)).with_format("arrow")
        before = self.rows_cut
        passes = self._passes(share.iter(1000), rank, processes)
        gather = gather_object if processes > 1 else list
        parts = gather([self._losses(passes, lambda count: max(gather([count])))])
        self.rows_cut = before + sum(gather([self.rows_cut - before]))
        scores = _with_scores(
            pa.table({"row": pa.array(range(len(dataset)))}),
            _finite({key: loss for part in parts for key, loss in part.items()}),
        )
        return replace_scores(dataset, scores.to_pydict())

    def _losses(
        self, passes: list[_Pass], agree: Callable[[int], int] = lambda count: count
    ) -> dict[tuple[int, str], float]:
        """The losses by row and column; `agree` turns this rank's number of forward passes into that of all."""
        import torch

        batches = list(self._batches(passes))
        eos = array("i", [self.template.eos])
        most = agree(len(batches))
        idle = batches[-1] if batches else [_Pass(0, "", eos, eos)]
        losses: dict[tuple[int, str], float] = {}
        with _evaluating(self.model), torch.inference_mode():
            for batch in batches:
                for item, loss in zip(batch, self._forward(batch), strict=True):
                    losses[item.row, item.loss] = loss
            for _ in range(most - len(batches)):
                self._forward(idle)  # the ranks that have more to do must not wait alone
        return losses

    def _passes(self, tables: Iterable[pa.Table], first: int = 0, step: int = 1) -> list[_Pass]:
        """The sequences to score; the n-th row is number first + n * step of the table."""
        alone = array("i", self.template.alone)
        passes: list[_Pass] = []
        numbers = count(first, step)
        for table in tables:
            require_columns(table.column_names, ("instruction", "input", "response"), "`StudentScorer`")
            names = [name for name in _READ if name in table.column_names]
            for row, number in zip(table.select(names).to_pylist(), numbers, strict=False):
                if not is_usable(row["instruction"], row["response"]):
                    continue
                forward, reverse = self.template.forward(row), self.template.reverse(row)
                self.rows_cut += forward.cut or reverse.cut
                for given, by_itself, encoded in (
                    ("loss_response_given_instruction", "loss_response", forward),
                    ("loss_instruction_given_response", "loss_instruction", reverse),
                ):
                    if encoded.target:
                        target = array("i", encoded.target)
                        passes.append(_Pass(number, given, array("i", encoded.context), target))
                        passes.append(_Pass(number, by_itself, alone, target))
        return passes

    def _batches(self, passes: list[_Pass]) -> Iterator[list[_Pass]]:
        """Longest first, so that the first batch is the worst; alike lengths together, so that little is padded."""
        limit = self.tokens_per_batch
        if isinstance(limit, str):
            config = self.model.config.get_text_config() if hasattr(self.model.config, "get_text_config") else None
            by_memory = _AUTO_LOGITS // (getattr(config, "vocab_size", None) or 32_000)
            limit = min(by_memory, _AUTO_TOKENS.get(self._device().type, _AUTO_TOKENS_ELSEWHERE))
        batch: list[_Pass] = []
        for item in sorted(passes, key=lambda item: -item.length):
            if batch and batch[0].length * (len(batch) + 1) > limit:
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _device(self) -> "torch.device":
        """Where ids go in; of an offloaded model the device that it runs on."""
        import torch

        hooked = getattr(getattr(self.model, "_hf_hook", None), "execution_device", None)
        return self.model.get_input_embeddings().weight.device if hooked is None else torch.device(hooked)

    def _forward(self, batch: list[_Pass]) -> list[float]:
        """Mean negative log-likelihood of each target, in nats."""
        import torch

        device, length, pad = self._device(), batch[0].length, [self.template.eos]
        ids = torch.tensor([[*item.context, *item.target, *pad * (length - item.length)] for item in batch])
        mask = torch.tensor([[1] * item.length + [0] * (length - item.length) for item in batch])  # (rows, length)
        # no logits before the first target's; a number serves every device, and the slice models that ignore it
        wanted = length - min(len(item.context) for item in batch) + 1
        model: torch.nn.Module = self.model
        output = model(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, logits_to_keep=wanted
        )
        logits = output.logits[:, -wanted:]  # (rows, wanted, vocabulary)
        losses = []
        for item, row in zip(batch, logits, strict=True):
            start = len(item.context) - 1 - (length - wanted)
            some = row[start : start + len(item.target)].float()  # (targets, vocabulary)
            target = torch.tensor(item.target, device=some.device)
            losses.append(torch.nn.functional.cross_entropy(some, target, reduction="none").double().mean().item())
        return losses


def _finite(losses: dict[tuple[int, str], float]) -> dict[tuple[int, str], float]:
    """The losses, if all are numbers: NaN would win comparisons that nobody can see."""
    if broken := next(((row, name) for (row, name), loss in losses.items() if not math.isfinite(loss)), None):
        raise SettingsError(
            f"The student's {broken[1]} of row {broken[0]} is no finite number: its weights are broken, or its "
            "precision is too small (float16?). Load it in bfloat16 or float32."
        )
    return losses


def _with_scores(table: pa.Table, losses: dict[tuple[int, str], float]) -> pa.Table:
    """The table with the six score columns; null where there is no loss."""
    columns: dict[str, list[float | None]] = {
        name: [losses.get((row, name)) for row in range(len(table))] for name in LOSS_COLUMNS
    }

    def ratio(given: str, alone: str) -> list[float | None]:
        return [
            None if a is None or b is None else math.exp(min(a - b, 700.0))
            for a, b in zip(columns[given], columns[alone], strict=True)
        ]

    columns["ifd"] = ratio("loss_response_given_instruction", "loss_response")
    columns["r_ifd"] = ratio("loss_instruction_given_response", "loss_instruction")
    for name, values in columns.items():
        table = put_column(table, pa.field(name, pa.float64()), pa.array(values, pa.float64()))
    return table


def replace_scores(dataset: Dataset, scores: dict[str, list[float | None]]) -> Dataset:
    """The dataset with these values, by name, as its six score columns."""
    result = dataset.remove_columns([name for name in SCORE_COLUMNS if name in dataset.column_names])
    for name in SCORE_COLUMNS:
        result = result.add_column(name, scores[name], feature=Value("float64"))
    return result


@contextmanager
def _evaluating(model: "torch.nn.Module") -> Iterator[None]:
    """Eval mode, and back: every module gets the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _digest(model: "torch.nn.Module") -> str:
    """A cheap digest of all weights (20 GB/s); equal weights under equal names digest alike."""
    import torch
    import xxhash

    digest = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()

"""The student's view of every version: four losses, IFD and r-IFD.

ids      b  c1 c2 c3 | t1 t2 t3          context (prompt or BOS), target
logits   .  .  .  p1   p2 p3 .           the logits at a position predict the next one: those from the context's last
loss                -log p1[t1], …       id on are wanted, the last target's are not
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
from datasets import Dataset

from .errors import SettingsError
from .pairs import LOSS_COLUMNS, SCORE_COLUMNS, as_table, is_usable, require_columns
from .templates import StudentTemplate

if TYPE_CHECKING:
    import torch

# "auto" keeps a batch's float32 logits below 2**28 values (1 GiB) whatever the vocabulary, and a batch as small as
# pays: on a CPU more tokens only mean more padding.
_AUTO_LOGITS = 2**28
_AUTO_TOKENS = {"cpu": 2048}
_AUTO_TOKENS_ELSEWHERE = 16_384


class _Pass(NamedTuple):
    """One sequence to score: which row and loss it is for, its ids, and where the target begins."""

    row: int
    loss: str
    ids: list[int]
    start: int


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
        if isinstance(tokens_per_batch, str) and tokens_per_batch != "auto" or tokens_per_batch in (0, None):
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
        return _with_scores(table, self._losses(table, rank=0, processes=1))

    def score(self, dataset: Dataset) -> Dataset:
        """Score a whole table on all processes of the launch; each returns the same table.

        Every process makes the same number of forward passes, as ZeRO-3 and FSDP need it.
        """
        from accelerate import PartialState
        from accelerate.utils import gather_object

        state = PartialState()
        names = [name for name in ("instruction", "input", "response", "history") if name in dataset.column_names]
        table = dataset.select_columns(names).with_format("arrow")[:]
        losses = self._losses(table, state.process_index, state.num_processes)
        if state.num_processes > 1:
            losses = {key: loss for part in gather_object([losses]) for key, loss in part.items()}
        scores = _with_scores(pa.table({"row": list(range(len(dataset)))}), losses)
        result = dataset.remove_columns([name for name in SCORE_COLUMNS if name in dataset.column_names])
        for name in SCORE_COLUMNS:
            result = result.add_column(name, scores[name].combine_chunks())
        return result

    def _losses(self, table: pa.Table, rank: int, processes: int) -> dict[tuple[int, str], float]:
        """This rank's share of the losses, by row and column."""
        import torch

        passes = self._passes(table)
        batches = list(self._batches(passes))
        mine = batches[rank::processes]
        losses: dict[tuple[int, str], float] = {}
        with _evaluating(self.model), torch.inference_mode():
            for batch in mine:
                for item, loss in zip(batch, self._forward(batch), strict=True):
                    losses[item.row, item.loss] = loss
            if len(mine) < math.ceil(len(batches) / processes):
                self._forward(batches[-1])  # the ranks with one batch more must not wait alone
        return losses

    def _passes(self, table: pa.Table) -> list[_Pass]:
        require_columns(table.column_names, ("instruction", "input", "response"), "`StudentScorer`")
        passes = []
        alone = self.template.alone
        names = [name for name in ("instruction", "input", "response", "history") if name in table.column_names]
        for number, row in enumerate(table.select(names).to_pylist()):
            if not is_usable(row["instruction"], row["response"]):
                continue
            forward, reverse = self.template.forward(row), self.template.reverse(row)
            self.rows_cut += forward.cut or reverse.cut
            for loss, encoded, context in (
                ("loss_response_given_instruction", forward, forward.context),
                ("loss_response", forward, alone),
                ("loss_instruction_given_response", reverse, reverse.context),
                ("loss_instruction", reverse, alone),
            ):
                if encoded.target:
                    passes.append(_Pass(number, loss, context + encoded.target, len(context)))
        return passes

    def _batches(self, passes: list[_Pass]) -> Iterator[list[_Pass]]:
        """Longest first, so that the first batch is the worst; alike lengths together, so that little is padded."""
        limit = self.tokens_per_batch
        if isinstance(limit, str):
            config = self.model.config.get_text_config() if hasattr(self.model.config, "get_text_config") else None
            by_memory = _AUTO_LOGITS // (getattr(config, "vocab_size", None) or 32_000)
            limit = min(by_memory, _AUTO_TOKENS.get(self._device().type, _AUTO_TOKENS_ELSEWHERE))
        batch: list[_Pass] = []
        for item in sorted(passes, key=lambda item: -len(item.ids)):
            if batch and len(batch[0].ids) * (len(batch) + 1) > limit:
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _device(self) -> "torch.device":
        return self.model.get_input_embeddings().weight.device

    def _forward(self, batch: list[_Pass]) -> list[float]:
        """Mean negative log-likelihood of each target, in nats."""
        import torch

        device = self._device()
        length = len(batch[0].ids)
        pad = self.template.eos
        ids = torch.tensor([item.ids + [pad] * (length - len(item.ids)) for item in batch])  # (rows, length)
        mask = torch.tensor([[1] * len(item.ids) + [0] * (length - len(item.ids)) for item in batch])
        first = min(item.start for item in batch) - 1  # no logits before the first target's
        keep = torch.arange(first, length - 1, device=device)
        model: torch.nn.Module = self.model
        logits = model(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, logits_to_keep=keep
        ).logits  # (rows, length - 1 - first, vocabulary)
        losses = []
        for item, row in zip(batch, logits, strict=True):
            some = row[item.start - 1 - first : len(item.ids) - 1 - first].float()  # (targets, vocabulary)
            target = torch.tensor(item.ids[item.start :], device=some.device)
            losses.append(torch.nn.functional.cross_entropy(some, target, reduction="none").double().mean().item())
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
        array = pa.array(values, pa.float64())
        index = table.schema.get_field_index(name)
        field = pa.field(name, pa.float64())
        table = table.append_column(field, array) if index < 0 else table.set_column(index, field, array)
    return table


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

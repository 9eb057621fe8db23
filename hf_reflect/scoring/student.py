"""The student's forward passes: passages in, the loss of each target out."""

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..errors import SettingsError
from .attention import packed_attention
from .packing import Pack, Passage, pack, packs_within, size

logger = logging.getLogger(__name__)

# Logits that exist at once, in values: 2**24 take 64 MiB in float32, and as much again while they become a loss. More
# make a CPU's bfloat16 slower by a fifth.
_LOGITS = {"cpu": 2**24}
_LOGITS_ELSEWHERE = 2**27
_PADDED_LOGITS = 2**28  # of a batch without packing; a single long passage may exceed it
# "auto": larger packs are slower on a CPU, whose caches they outgrow; CUDA is measured, between these
_AUTO_TOKENS = {"cpu": 2048}
_AUTO_TOKENS_ELSEWHERE = 8192
_PROBE_TOKENS, _MOST_TOKENS = 2048, 32_768
# How far two losses may lie apart by rounding alone, as a share; wider where few tokens are averaged. Passes of one
# shape round alike, unless tokens share an expert or a scale with their neighbours.
_ROUNDING = {"float32": 2e-5, "halves": 4e-3}
_SAME_SHAPE, _SAME_SHAPE_BUT_MIXED = 1e-6, 1e-3
# How far a logit may move, as a share of the largest, where only what comes after it changes.
_BLIND = {"float32": 1e-3, "halves": 2e-2}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_IDLE = Passage.of([0], [0])
# What shows whether passages see each other: one whose beginning another shares, that other, and one beside them; the
# first may change without the others noticing. Ids are small enough for any vocabulary.
_FIRST, _CHANGED, *_OTHERS = [
    *(Passage.of([1, 2, 3, 4, 5], some) for some in ([6, 7], [7, 6], [8, 9, 10])),
    Passage.of([11], [12, 13]),
]


class Student:
    """A causal language model that scores passages, packed where that gives the same numbers.

    Args:
        model: the causal language model, on the device or devices where it is to run.
        adapter: None takes a PEFT model as it is; "base" switches its adapters off.
        tokens: most in one forward pass, or "auto".

    Raises:
        SettingsError: an encoder or sequence-to-sequence model; an unknown `adapter`.
    """

    def __init__(self, model: Any, adapter: str | None = None, tokens: int | str = "auto"):
        inner = getattr(model, "module", model)  # of DDP or DeepSpeed
        config = getattr(inner, "config", None)
        generates = getattr(inner, "can_generate", None)
        if getattr(config, "is_encoder_decoder", False) or generates is None or not generates():
            raise SettingsError(f"The student must be a causal language model; {type(model).__name__} is none.")
        if adapter not in (None, "base"):
            raise SettingsError(f'`adapter` is None (the model as it is) or "base", not {adapter!r}.')
        self.model, self.adapter = inner, adapter
        self.limit = None if isinstance(tokens, str) else tokens  # None: to be measured
        self.packs: bool | None = None  # None: to be seen with the first pack
        self.checked = 0  # tokens of the longest passage that this was seen with

    @property
    def config(self) -> Any:
        """Of the language model, where there is more than one."""
        return self.model.config.get_text_config()

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return next((p.dtype for p in self.model.parameters() if p.dtype.is_floating_point), torch.float32)

    @property
    def positions(self) -> int | None:
        """The longest sequence that it has learned positions for; None where they are computed."""
        most = getattr(self.config, "max_position_embeddings", None)
        words = self.model.get_input_embeddings()
        tables = [m for m in self.model.modules() if isinstance(m, torch.nn.Embedding) and m is not words]
        lengths = [table.num_embeddings for table in tables]
        return most if most is not None and any(most <= length <= most + 2 for length in lengths) else None

    @property
    def device(self) -> torch.device:
        """Where ids go in; of an offloaded model the device that it runs on."""
        words = self.model.get_input_embeddings()
        for module in (self.model, words):
            if (hooked := getattr(getattr(module, "_hf_hook", None), "execution_device", None)) is not None:
                return torch.device(hooked)
        return words.weight.device

    @property
    def is_sharded(self) -> bool:
        """Whether its weights lie in parts on several processes (ZeRO-3, FSDP), which must run in step."""
        parts = any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in self.model.parameters())
        return parts or any(type(m).__name__ == "FullyShardedDataParallel" for m in self.model.modules())

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Eval mode without gradients, with the adapter that was asked for; afterwards all as it was."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad(), self._adapted():  # inference tensors could not be trained on
                yield
        finally:
            for module, training in modes.items():
                module.training = training

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        if self.adapter == "base" and hasattr(self.model, "disable_adapter"):  # a PeftModel
            with self.model.disable_adapter():
                yield
        elif self.adapter == "base" and getattr(self.model, "_hf_peft_config_loaded", False):
            from peft.tuners.tuners_utils import BaseTunerLayer

            layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
            for layer in layers:
                layer.enable_adapters(False)
            try:
                yield
            finally:
                for layer in layers:
                    layer.enable_adapters(True)
        else:
            yield

    def fit(self, worst: Iterable[Passage]) -> int:
        """Tokens of one forward pass that the device's memory holds, measured with the worst passages there are."""
        if self.device.type != "cuda":
            return _AUTO_TOKENS.get(self.device.type, _AUTO_TOKENS_ELSEWHERE)
        probe = next(packs_within(worst, _PROBE_TOKENS), [_IDLE])
        fitting = _MOST_TOKENS
        if self.config._attn_implementation == "flex_attention":
            fitting = _AUTO_TOKENS_ELSEWHERE  # while its mask is made all pairs of tokens exist
        try:
            self._packed(pack(probe)).means()  # what is needed once is allocated now
            for device in {p.device for p in self.model.parameters() if p.device.type == "cuda"}:
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                self._packed(pack(probe)).means()
                each = max(torch.cuda.max_memory_allocated(device) - before, 1) / size(probe)
                free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - before
                fitting = min(fitting, int(0.8 * free / each))
        except Exception:  # no memory, or an architecture that takes no packs: `check` will tell
            return _PROBE_TOKENS
        return max(fitting, _PROBE_TOKENS)

    def batches(self, passages: Iterable[Passage]) -> list[list[Passage]]:
        """What goes into one forward pass each: packs within the limit, or batches of like lengths."""
        assert self.limit is not None
        stretched = self._stretches_from
        apart = [[passage] for passage in passages if len(passage) > stretched]
        together = [passage for passage in passages if len(passage) <= stretched]
        if self.packs:
            return [*apart, *packs_within(together, self.limit)]
        if self.device.type == "cpu":
            return [*apart, *([passage] for passage in together)]  # padding costs more than it brings
        limit = min(self.limit, _PADDED_LOGITS // self.config.vocab_size)
        some: list[list[Passage]] = []
        for passage in sorted(together, key=len, reverse=True):
            if some and len(some[-1][0]) * (len(some[-1]) + 1) <= limit:
                some[-1].append(passage)
            else:
                some.append([passage])
        return [*apart, *some]

    @property
    def _stretches_from(self) -> float:
        """The length past which a sequence changes the rotary positions of all that share its forward pass."""
        ropes = getattr(self.config, "rope_parameters", None) or {}
        lengths = [
            rope.get("original_max_position_embeddings")
            or getattr(self.config, "original_max_position_embeddings", None)
            or self.config.max_position_embeddings
            for rope in (ropes, *ropes.values())
            if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope")
        ]
        return min(lengths, default=math.inf)

    def run(self, passages: list[Passage]) -> list["Losses"]:
        """One forward pass, or as many as memory asks for; `ready` must hold.

        Raises:
            SettingsError: not even one passage fits, or other processes wait for this pass (ZeRO-3, FSDP).
        """
        if self._stretches_from < math.inf:
            for module in self.model.modules():  # what it has seen before must not stretch this pass
                if hasattr(module, "max_seq_len_cached"):
                    module.max_seq_len_cached = 0
        try:
            return [self._packed(pack(passages)) if self.packs else self._padded(passages)]
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            tokens = size(passages)
            if len(passages) == 1 or self.is_sharded:
                raise SettingsError(
                    f"The memory of {self.device} does not hold a forward pass of {tokens} tokens. Lower "
                    f"{'`max_length`' if len(passages) == 1 else '`tokens_per_batch`'}, load the student in bfloat16, "
                    "or spread it over several devices (`device_map`, ZeRO-3)."
                ) from error
        # out here the failed pass and its traceback hold no tensors any more
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.limit = max(tokens // 2, 1)
        logger.warning("Out of memory with %d tokens in a forward pass: going on with %d.", tokens, self.limit)
        half = len(passages) // 2
        return [*self.run(passages[:half]), *self.run(passages[half:])]

    def idle(self) -> None:
        """A forward pass for nothing: other processes have more to do, and must not wait alone."""
        self.run([_IDLE])

    def check(self, passages: list[Passage]) -> tuple[dict[Passage, float], str | None]:
        """A pack's losses, and why packs of this model cannot be trusted, if so.

        The architecture must be known to look at nothing but positions and attention; of three tiny passages, packed,
        the loss of two must not change with the third; the output embeddings must say all that the logits say; and the
        pack's longest and shortest must score as they do by themselves. Eight forward passes in all, six of them tiny
        or short, unless memory runs out. None makes the logits of a long passage.

        Raises:
            SettingsError: tokens see what comes after them: an encoder.
        """
        ordered = sorted(passages or [_FIRST, *_OTHERS], key=len)
        together: dict[Passage, float] = {}
        reason = self._known_not_to_pack()
        if reason is None:
            self.packs = True
            try:
                for losses in self.run(ordered):
                    together |= losses.means()
                # all are asked, whatever one finds: processes that share out the weights must pass equally often
                found = [
                    self._differs_in_company(),
                    self._differs_by_itself(ordered[0], together),
                    self._differs_by_itself(ordered[-1], together),
                ]
                by_head = self._alone(_FIRST)
                reason = next(filter(None, found), None)
            except SettingsError:
                raise
            except Exception as error:  # whatever an architecture may say to a pack, it can be scored without
                reason = f"{type(error).__name__}: {error}"
            finally:
                self.packs = False
        by_logits = self._by_its_logits(_FIRST)
        if reason is None and _differ(_FIRST, by_head, by_logits, _ROUNDING[self._precision]):
            reason = f"a loss is {by_head:.6g} by its output embeddings and {by_logits:.6g} by its logits"
        return together, reason

    def _differs_in_company(self) -> str | None:
        mixed = self._is_quantized or any(getattr(self.config, name, None) for name in _EXPERTS)
        same_shape = _SAME_SHAPE_BUT_MIXED if mixed else _SAME_SHAPE
        company = [self._packed(pack([first, *_OTHERS])).means() for first in (_FIRST, _CHANGED)]
        for passage in _OTHERS:
            one, other = (losses[passage] for losses in company)
            if _differ(passage, one, other, same_shape):
                return f"a loss of {one:.6g} becomes {other:.6g} in other company"
        return None

    def _differs_by_itself(self, passage: Passage, together: dict[Passage, float]) -> str | None:
        one, other = together[passage], self._alone(passage)
        if _differ(passage, one, other, _ROUNDING[self._precision]):
            return f"a loss is {one:.6g} in a pack and {other:.6g} by itself"
        return None

    def _alone(self, passage: Passage) -> float:
        """A passage's loss by the model's own attention."""
        return self._targets_only(pack([passage])).means()[passage]

    def _by_its_logits(self, passage: Passage) -> float:
        """A short passage's loss by the logits as they come.

        Raises:
            SettingsError: they change with what comes after them. Loaded as a causal model, BERT sees its targets.
        """
        ids = torch.from_numpy(passage.tokens)[None].to(self.device)
        changed = ids.clone()
        changed[0, -1] += 1
        one, other = (
            self.model(input_ids=some, attention_mask=torch.ones_like(some), use_cache=False).logits[0, :-1].float()
            for some in (ids, changed)
        )  # (tokens, vocabulary)
        if (one - other).abs().max() > _BLIND[self._precision] * one.abs().max():
            raise SettingsError(
                f"The student must be a causal language model; in this {type(self.model).__name__} a token sees what "
                "comes after it. Load a decoder (`is_decoder=True` in the config, if its weights were trained so)."
            )
        return _token_losses(one[passage.start - 1 :], ids[0, passage.start :]).mean().item()

    def _known_not_to_pack(self) -> str | None:
        kinds = set(getattr(self.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            return f"it has layers of {', '.join(sorted(kinds))}"
        return "its layers have a state" if getattr(self.model, "_is_stateful", False) else None

    @property
    def _precision(self) -> str:
        """How it rounds."""
        halves = self.dtype in (torch.float16, torch.bfloat16) or self._is_quantized
        tf32 = self.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"  # as float16 does
        return "halves" if halves or tf32 else "float32"

    @property
    def _is_quantized(self) -> bool:
        return getattr(self.model, "quantization_method", None) is not None

    def _packed(self, some: Pack) -> "Losses":
        with packed_attention(self.model, some):
            return self._targets_only(some, position_ids=torch.from_numpy(some.positions)[None].to(self.device))

    def _targets_only(self, some: Pack, **inputs: torch.Tensor) -> "Losses":
        ids = torch.from_numpy(some.ids)[None].to(self.device)
        losses: list[torch.Tensor] = []
        with self._head_on(some, losses):
            # all ones: without a mask some models warn, and transformers guesses what is packed from the positions
            self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs)
        return Losses(some.passages, losses)

    @contextmanager
    def _head_on(self, some: Pack, losses: list[torch.Tensor]) -> Iterator[None]:
        """Within, the output embeddings see only what predicts a target, a chunk at a time, and append the losses."""
        head = self.model.get_output_embeddings()
        plain, patched = head.forward, "forward" in vars(head)  # accelerate patches it on the instance

        def forward(hidden: torch.Tensor) -> torch.Tensor:  # (1, tokens, size)
            where, targets = (torch.from_numpy(x).to(hidden.device) for x in (some.where, some.targets))
            rows = _rows_at_once(hidden, self.config)
            for places, wanted in zip(where.split(rows), targets.split(rows), strict=True):
                losses.append(_token_losses(_finished(plain(hidden[0, places]), self.config), wanted))
            return hidden.new_zeros(1, 1, self.config.vocab_size)

        head.forward = forward
        try:
            yield
        finally:
            if patched:
                head.forward = plain
            else:
                del head.forward

    def _padded(self, passages: list[Passage]) -> "Losses":
        """Without packing: one passage a row, the model's own attention and logits."""
        length = max(map(len, passages))
        ids = torch.zeros(len(passages), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, passage in enumerate(passages):
            ids[row, : len(passage)] = torch.from_numpy(passage.tokens)
            mask[row, : len(passage)] = 1
        # no logits before the first target's; a number serves every device, and the slice models that ignore it
        wanted = length - min(passage.start for passage in passages) + 1
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        logits = self.model(**inputs, use_cache=False, logits_to_keep=wanted).logits[:, -wanted:]
        losses = []
        for passage, row in zip(passages, logits, strict=True):
            start = passage.start - 1 - (length - wanted)
            targets, rows = torch.from_numpy(passage.tokens[passage.start :]), _rows_at_once(row, self.config)
            logits = row[start : start + passage.targets].split(rows)
            losses += [_token_losses(*both) for both in zip(logits, targets.split(rows), strict=True)]
        return Losses(passages, losses)


class Losses:
    """The losses of some passages, on their way from the device."""

    def __init__(self, passages: list[Passage], losses: list[torch.Tensor]):
        self.passages, self._losses = passages, losses

    def means(self) -> dict[Passage, float]:
        """Mean negative log-likelihood of each passage's target, in nats; waits for the device."""
        tokens = torch.cat([some.cpu() for some in self._losses]).double().numpy()  # (targets,)
        counts = np.array([passage.targets for passage in self.passages])
        if len(tokens) != counts.sum():
            raise RuntimeError(f"the output embeddings were asked for {len(tokens)} tokens, not {counts.sum()}")
        sums = np.add.reduceat(tokens, np.cumsum(counts) - counts)
        return dict(zip(self.passages, (sums / counts).tolist(), strict=True))


def _rows_at_once(on: torch.Tensor, config: Any) -> int:
    """Tokens whose logits may become losses together."""
    return max(1, _LOGITS.get(on.device.type, _LOGITS_ELSEWHERE) // config.vocab_size)


def _token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # (tokens, vocabulary), (tokens,)
    return torch.nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")


def _is_out_of_memory(error: BaseException) -> bool:
    words = ("can't allocate memory", "not enough memory")  # a CPU's is a bare RuntimeError
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def _differ(passage: Passage, one: float, other: float, share: float) -> bool:
    return abs(one - other) > share * (1 + 8 / math.sqrt(passage.targets)) * (1 + abs(other))


def _finished(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """What some models do to their logits after the output embeddings."""
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / scaling
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return logits

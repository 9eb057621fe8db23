"""Attention inside a pack, computed by the backend that the student was loaded with.

    flash_attention_*    one call of the variable-length kernel; each segment's keys are gathered from what it sees
    flex_attention       one call with a block mask
    sdpa on CUDA, half   as flash_attention_*, with the kernel that torch brings
    all others           a call for each segment: on a CPU a mask over the whole pack would cost more than the model

One function is registered with `transformers.AttentionInterface`; while a pack is scored the model's config names it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from inspect import getmodule
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .packing import Pack, joined

_NAME = "hf_reflect_packed"
_current: ContextVar["_Layout"] = ContextVar("the pack that a model runs on")


@contextmanager
def packed_attention(model: torch.nn.Module, pack: Pack) -> Iterator[None]:
    """Within, the model's attention keeps the passages of this pack apart."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    backends = [getattr(config, "_attn_implementation", None) for config in configs]
    text = model.config.get_text_config()
    token = _current.set(_Layout(pack, text._attn_implementation or "eager"))
    try:
        for config, backend in zip(configs, backends, strict=True):
            if backend is not None:
                config._attn_implementation = _NAME
        yield
    finally:
        for config, backend in zip(configs, backends, strict=True):
            if backend is not None:
                config._attn_implementation = backend
        _current.reset(token)


class _Layout:
    """A pack's segments as the backends want them; made once, used by all layers."""

    def __init__(self, pack: Pack, backend: str):
        self.pack, self.backend = pack, backend
        self.windows: set[int | None] = set()  # of the masks that the model asked for
        self._made: dict[Any, Any] = {}

    def once(self, make: Callable[..., Any], *key: Any) -> Any:
        """What `make(*key)` returns, made once."""
        if (make.__name__, *key) not in self._made:
            self._made[make.__name__, *key] = make(*key)
        return self._made[make.__name__, *key]

    @cached_property
    def longest(self) -> int:
        """Tokens that the last token of a segment sees, at most."""
        return max(segment.reach for segment in self.pack.segments)

    def window(self, kwargs: dict[str, Any]) -> int | None:
        """How far back a layer looks; None where that is farther than any passage reaches.

        Most models tell the attention function; some leave it to the mask alone.
        """
        if "sliding_window" in kwargs or not self.windows:
            window = kwargs.get("sliding_window")
        elif len(self.windows) == 1:
            (window,) = self.windows
        else:
            raise RuntimeError("its layers do not tell which of its masks they want")
        return None if window is None or window >= self.longest else window

    def causal(self, device: torch.device, dtype: torch.dtype, window: int | None) -> torch.Tensor:
        """An additive mask; each segment's is a part of it."""  # (longest, longest)
        ones = torch.ones(self.longest, self.longest, dtype=torch.bool, device=device)
        hidden = ones.triu(1) if window is None else ones.triu(1) | ones.tril(-window)
        return torch.zeros(self.longest, self.longest, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)

    def gathered(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """For kernels of variable length: places of the keys, where queries and keys of each segment end, longest."""
        segments = self.pack.segments
        ranges = [piece for s in segments for piece in (*s.before, (s.start, s.end))]
        keys = np.concatenate([np.arange(start, end) for start, end in ranges])
        ends = [
            torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
            for lengths in ([s.end - s.start for s in segments], [s.reach for s in segments])
        ]
        return torch.from_numpy(keys).to(device), *ends, max(s.end - s.start for s in segments), self.longest

    def block_mask(self, device: torch.device, window: int | None) -> Any:
        """For FlexAttention: a token sees what comes before it and is visible up to it."""
        from torch.nn.attention.flex_attention import create_block_mask

        until = torch.from_numpy(self.pack.visible_to).to(device)
        place = torch.from_numpy(self.pack.positions.astype(np.int32)).to(device)

        def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            seen = (key <= query) & (query < until[key])
            return seen if window is None else seen & (place[query] - place[key] < window)

        length = len(until)
        return create_block_mask(sees, None, None, length, length, device=device)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, tokens, size of a head)
    key: torch.Tensor,  # (1, heads of keys, tokens, size of a head)
    value: torch.Tensor,
    attention_mask: None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of transformers, for the pack that runs."""
    layout = _current.get()
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotary positions leave queries and keys in float32
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    backend = layout.backend
    own = ALL_ATTENTION_FUNCTIONS.get_interface(
        backend, getattr(getmodule(type(module)), "eager_attention_forward", None)
    )
    if "flash" in backend:
        keys, q_ends, k_ends, q_longest, k_longest = layout.once(layout.gathered, query.device)
        ends = {"cu_seq_lens_q": q_ends, "cu_seq_lens_k": k_ends}
        longest = {"max_length_q": q_longest, "max_length_k": k_longest}
        seen = (key.index_select(2, keys), value.index_select(2, keys))
        module.config._attn_implementation = backend  # the function looks its kernel up there
        try:
            return own(module, query, *seen, None, **kwargs | ends | longest)[0], None
        finally:
            module.config._attn_implementation = _NAME
    window = layout.window(kwargs)
    if backend == "flex_attention":
        mask = layout.once(layout.block_mask, query.device, window)
        return own(module, query, key, value, mask, **kwargs)[0], None
    if backend == "sdpa" and _has_kernel(query, value, kwargs):
        return _variable_length(query, key, value, layout, window, kwargs.get("scaling")), None
    return _by_segment(own, module, query, key, value, layout, window, kwargs), None


def _by_segment(
    own: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: _Layout,
    window: int | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    outputs = []
    for segment in layout.pack.segments:
        start, end, before = segment
        ranges = joined(before, (start, end))
        pieces = ([whole[:, :, a:b] for a, b in ranges] for whole in (key, value))
        k, v = (torch.cat(some, dim=2) if len(some) > 1 else some[0] for some in pieces)
        mask = None
        if before or window is not None or layout.backend != "sdpa":  # SDPA knows by itself what causal means
            whole = layout.once(layout.causal, query.device, query.dtype, window)
            mask = whole[segment.reach - (end - start) : segment.reach, : segment.reach][None, None]
        outputs.append(own(module, query[:, :, start:end], k, v, mask, **kwargs)[0])  # (1, of segment, heads, size)
    return torch.cat(outputs, dim=1)


def _has_kernel(query: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether torch's own variable-length kernel computes this attention."""
    if not query.is_cuda or torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    half = query.dtype in (torch.float16, torch.bfloat16)
    plain = all(kwargs.get(name) is None for name in ("softcap", "position_bias", "s_aux"))
    return half and plain and query.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0


def _variable_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: _Layout,
    window: int | None,
    scaling: float | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    keys, q_ends, k_ends, q_longest, k_longest = layout.once(layout.gathered, query.device)
    k, v = (
        whole[0].transpose(0, 1).index_select(0, keys) for whole in (key, value)
    )  # (tokens, heads, size of a head)
    if (groups := query.shape[1] // key.shape[1]) > 1:
        k, v = (whole.repeat_interleave(groups, dim=1) for whole in (k, v))
    left = -1 if window is None else window - 1
    q = query[0].transpose(0, 1).contiguous()
    return varlen_attn(q, k, v, q_ends, k_ends, q_longest, k_longest, scale=scaling, window_size=(left, 0))[None]


def _no_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> None:
    """The models make no mask of their own for a pack; a window that it would have is remembered."""
    _current.get().windows.add(local_size)


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, _no_mask)

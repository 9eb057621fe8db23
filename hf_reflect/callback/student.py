"""The trainer's own model, lent for forward passes and given back as it was."""

import copy
import gc
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_BOUND = ("pre_bwd_fn", "post_bwd_fn")  # DeepSpeed makes these once a module, bound to the engine it then has


class Untouched:
    """What a trainer is like before anything of it is wrapped, so that it can be made so again.

    Preparing a model for evaluation alone leaves marks that a training after it trips over: DDP then trains unwrapped
    and its processes drift apart, ZeRO-3 has an engine without optimizer, and DeepSpeed's settings have lost theirs.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.forward = vars(trainer.model).get("forward")  # TRL's own; accelerate puts autocast around it
        self.hooks = {module: {name: set(getattr(module, name)) for name in _HOOKS} for module in _modules(trainer)}
        self.bound = {module: {name for name in _BOUND if name in vars(module)} for module in _modules(trainer)}
        settings = _deepspeed_settings(trainer)
        self.settings = None if settings is None else (copy.deepcopy(settings.config), list(settings.mismatches))

    @property
    def is_so(self) -> bool:
        """Whether nothing was prepared since."""
        settings = _deepspeed_settings(self.trainer)
        return (
            self.trainer.model_wrapped is self.trainer.model
            and "_is_accelerate_prepared" not in vars(self.trainer.model)
            and (self.settings is None or settings.config == self.settings[0])
        )

    def restore(self) -> None:
        """Undo what `evaluate()`, `predict()` or scoring prepared; only before the first training."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        if trainer.model_wrapped is not trainer.model and hasattr(trainer.model_wrapped, "destroy"):
            trainer.model_wrapped.destroy()
        for name in ("_is_accelerate_prepared", "_original_forward", "forward"):
            vars(trainer.model).pop(name, None)
        if self.forward is not None:
            trainer.model.forward = self.forward
        accelerator.free_memory()
        trainer.model_wrapped, trainer.deepspeed = trainer.model, None
        if self.settings is not None:
            settings = _deepspeed_settings(trainer)
            settings.config, settings.mismatches = copy.deepcopy(self.settings[0]), list(self.settings[1])
        for module, names in self.hooks.items():  # some of DeepSpeed's stay behind after `destroy`
            for name, known in names.items():
                current = getattr(module, name)
                for key, hook in list(current.items()):
                    if key not in known and getattr(hook, "__module__", "").startswith("deepspeed"):
                        del current[key]
            for name in _BOUND:
                if name not in self.bound[module]:
                    vars(module).pop(name, None)


@contextmanager
def lent(trainer: Any, training: bool) -> Iterator[None]:
    """The trainer's model, ready for forward passes; afterwards random states, device and hooks are as before.

    Before training the bare model serves everywhere but under ZeRO-3, where its parameters are partitioned: there a
    temporary engine without optimizer gathers them. While training runs, the prepared model serves as it is.
    """
    with ExitStack() as stack:
        stack.enter_context(_undisturbed())
        if training:
            stack.enter_context(_sharded_again(trainer))
        else:
            plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
            if plugin is not None and plugin.zero_stage == 3:
                stack.enter_context(_temporary_engine(trainer))
            else:
                stack.enter_context(_on_device(trainer))
        stack.enter_context(_precision(trainer, training))
        yield


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Random states as before: one number drawn for scoring would change the order of the training data."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)


@contextmanager
def _sharded_again(trainer: Any) -> Iterator[None]:
    """What FSDP and ZeRO-3 do in a backward pass, which scoring lacks.

    FSDP would keep its outermost weights whole. ZeRO-3 would take the passes of scoring for the order in which modules
    follow each other, and in training free weights that are still needed.
    """
    try:
        yield
    finally:
        for module in _modules(trainer):
            if hasattr(module, "reshard"):
                module.reshard()
        offload = getattr(getattr(trainer.deepspeed, "optimizer", None), "parameter_offload", None)
        if offload is not None and not (coordinator := offload.get_param_coordinator()).is_invalid_trace():
            coordinator._invalidate_trace()


@contextmanager
def _precision(trainer: Any, training: bool) -> Iterator[None]:
    """That of training. DeepSpeed casts the model itself, but only once it trains."""
    accelerator = trainer.accelerator
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if kind is not None and not accelerator.native_amp and not training:
        with torch.autocast(accelerator.device.type, kind):
            yield
    else:
        with accelerator.autocast():
            yield


@contextmanager
def _on_device(trainer: Any) -> Iterator[None]:
    """The bare model where it will train; under DeepSpeed and FSDP it waits on the CPU, and goes back there.

    Left on the device, its full copy would stand beside the shards while those are made.
    """
    model = trainer.model
    _fill(model)
    quantized = getattr(model, "quantization_method", None) is not None
    before = next((p.device for p in model.parameters()), trainer.args.device)
    moves = not trainer.is_model_parallel and not quantized and before != trainer.args.device
    if moves:
        model.to(trainer.args.device)
    try:
        yield
    finally:
        if moves:
            model.to(before)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _fill(model: torch.nn.Module) -> None:
    """FSDP's `cpu_ram_efficient_loading` reads the weights on one process only, and all need them to score."""
    from accelerate import PartialState
    from accelerate.utils import gather_object, set_module_tensor_to_device

    if PartialState().num_processes == 1:
        return
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if not any(gather_object([bool(empty)])):
        return
    device = PartialState().device
    for name, tensor in model.state_dict().items():
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if tensor.is_meta else tensor.to(device)
        torch.distributed.broadcast(value, 0)
        if tensor.is_meta:
            set_module_tensor_to_device(model, name, "cpu", value=value.cpu())
    if hasattr(model, "tie_weights"):
        model.tie_weights()


@contextmanager
def _temporary_engine(trainer: Any) -> Iterator[None]:
    """ZeRO-3 hooks on the model's modules for the time of scoring, without an optimizer."""
    before = Untouched(trainer)
    settings = _deepspeed_settings(trainer)
    settings.config = {k: v for k, v in settings.config.items() if k not in ("optimizer", "scheduler")}
    engine = None
    try:
        engine = trainer.accelerator.prepare(trainer.model)
        yield
    finally:
        if engine is not None:
            engine.destroy()
        before.restore()


def _modules(trainer: Any) -> list[torch.nn.Module]:
    return list(trainer.model.modules())


def _deepspeed_settings(trainer: Any) -> Any:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return None if plugin is None else plugin.hf_ds_config

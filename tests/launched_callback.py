"""Launched by test_matrix.py: modes of the callback and their oracles in turn, on one backend.

    launched_callback.py <student> <candidates> <result.json> <backend> <modes>

`once` is compared with a trainer that was given the chosen rows, `epoch` with one that is shown the recorded choices,
`epoch@6`, resumed from that step, with the uninterrupted run. Written are histories, choices, and what each process
saw of the backend.
"""

import json
import os
import sys
import time
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from training import OPEN, Recorder, Replay, history
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from hf_reflect import SelectionCallback, to_training_ids
from hf_reflect.errors import DataError

student, table, output, backend, modes = sys.argv[1:]
ON_GPU = os.environ.get("DEVICE") == "cuda"  # as tests/benchmarks/callback.py sets it
tokenizer = AutoTokenizer.from_pretrained(student)
candidates = to_training_ids(datasets.load_from_disk(table), tokenizer, "vicuna", 256)


def build(rows, name="out", **settings):
    arguments = SFTConfig(
        **{
            "output_dir": str(folder(name)),
            "max_length": 256,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4 // int(os.environ.get("WORLD_SIZE", "1")),
            "num_train_epochs": 3,
            "learning_rate": 2e-2,  # so high that the student changes its mind
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": ON_GPU,
            "use_cpu": not ON_GPU,
            "disable_tqdm": True,
            **settings,
        }
    )
    if (
        backend == "fsdp" and not ON_GPU
    ):  # which accelerate lets become DDP where there is no GPU, whatever was asked for
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return SFTTrainer(student, args=arguments, train_dataset=rows, processing_class=tokenizer)


def inside(trainer):
    """What this process sees of the backend, while it trains or just after."""
    parameters = list(trainer.model.parameters())
    return {
        "distributed_type": trainer.accelerator.distributed_type.value,
        "processes": trainer.accelerator.num_processes,
        "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
        "class": type(trainer.model_wrapped).__name__,
        "partitioned": all(hasattr(p, "ds_id") and p.ds_tensor.numel() < p.ds_numel for p in parameters)
        or all(hasattr(p, "full_tensor") for p in parameters),
    }


def folder(name):
    return Path(output).with_suffix("") / name


def chosen(schedule, name, **settings):
    """A trainer with the callback, and what records its choices."""
    trainer = build(candidates, name, **settings)
    callback = SelectionCallback(trainer, schedule=schedule, **OPEN)
    trainer.add_callback(callback)
    trainer.add_callback(recorder := Recorder(callback, inside))
    return trainer, callback, recorder


def told(trainer, recorder, **arguments):
    """Train, and what is compared: losses and learning rates, the choices, what each process saw."""
    run = history(trainer, **arguments)
    trainer.accelerator.free_memory()
    choices = [
        [list(key) for key in zip(choice["row_id"], choice["variant"], strict=True)] for choice in recorder.choices
    ]
    return {"run": run, "choices": choices, "inside": gather_object([recorder.seen])}


def oracle(trainer):
    run = history(trainer)
    trainer.accelerator.free_memory()
    return run


def once():
    trainer, callback, recorder = chosen("once", "once", save_strategy="steps", save_steps=4)
    found = told(trainer, recorder)
    found["scores"] = callback.candidates["loss_response_given_instruction"][:]
    return found | {"oracle": oracle(build(callback.selected, "given"))}


def epoch():
    trainer, _, recorder = chosen("epoch", "epoch", save_strategy="steps", save_steps=2)
    found = told(trainer, recorder)
    given = build(recorder.choices[0], "replayed")
    given.train_dataset = replay = Replay(recorder.choices)
    given.add_callback(replay)
    return found | {"oracle": oracle(given)}


def resumed(schedule, step):
    """From a checkpoint of the modes above, with a student that would choose otherwise."""
    trainer, _, recorder = chosen(schedule, f"{schedule}@{step}")
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            getattr(parameter, "ds_tensor", parameter).mul_(-1)
    return told(trainer, recorder, resume_from_checkpoint=str(folder(schedule) / f"checkpoint-{step}"))


def evaluated():
    """As `once`, after an evaluation, where the backend can do one before training."""
    trainer, _, recorder = chosen("once", "evaluated")
    trainer.eval_dataset = candidates.select(range(5))
    states = torch.get_rng_state()
    try:
        trainer.evaluate()
        raised = None
    except ValueError as error:
        raised = str(error)
    torch.set_rng_state(states)
    return told(trainer, recorder) | {"raised": raised}


def disagreeing():
    """What is said where processes hold other candidates, or choose otherwise."""
    rank, errors = PartialState().process_index, {}
    trainer = build(candidates.select(range(rank, len(candidates))), "disagreeing")
    try:
        SelectionCallback(trainer, **OPEN).choose()
    except DataError as error:
        errors["candidates"] = str(error)
    try:
        SelectionCallback(build(candidates, "disagreeing"), **OPEN | {"rule": "random", "seed": rank}).choose()
    except RuntimeError as error:
        errors["choice"] = str(error)
    return gather_object([errors])


class Slow(TrainerCallback):
    """Time to be killed in."""

    def on_step_end(self, *args, **kwargs):
        time.sleep(1)


def killed(name):
    """As `epoch`, slowly; with a checkpoint it goes on from there."""
    trainer, _, recorder = chosen("epoch", name, save_strategy="steps", save_steps=2)
    if os.environ.get("SLOW"):
        trainer.add_callback(Slow())
        started = folder(name) / "scoring"
        trainer.model.register_forward_pre_hook(lambda *_: (started.touch(), time.sleep(0.3)) and None)
    return told(trainer, recorder, resume_from_checkpoint=bool(get_last_checkpoint(folder(name))) or None)


known = {function.__name__: function for function in (once, epoch, evaluated, disagreeing)}
result = {}
for mode in modes.split():
    if "@" in mode:
        result[mode] = resumed(*mode.split("@"))
    elif mode.startswith("killed"):
        folder(mode).mkdir(parents=True, exist_ok=True)
        result[mode] = killed(mode)
    else:
        result[mode] = known[mode]()
    if PartialState().is_main_process:
        Path(output).write_text(json.dumps(result))
# Together, and without the interpreter's end: what was trained still holds process groups, whose threads live on after
# `destroy_process_group`, and one that then lets go of a tensor aborts the process (seen in one launch of some dozens;
# pytorch's issue 117762). All that is asserted is written.
PartialState().wait_for_everyone()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)

"""Launched by test_matrix.py: every mode of the callback and its oracle in turn, on one backend.

    launched_callback.py <student> <candidates> <result.json> <backend> <modes>

`once` is compared with a trainer that was given the chosen rows, `epoch` with one that is shown the recorded choices,
`resumed` with the uninterrupted run. Written are the histories, and what each process saw of the backend.
"""

import json
import os
import sys
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from training import OPEN, Recorder, Replay, history
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_reflect import SelectionCallback, to_training_ids

student, table, output, backend, modes = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(student)
candidates = to_training_ids(datasets.load_from_disk(table), tokenizer, "vicuna", 256)


def build(rows, name="out", **settings):
    arguments = SFTConfig(
        **{
            "output_dir": str(Path(output).with_suffix("") / name),
            "max_length": 256,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4 // int(os.environ.get("WORLD_SIZE", "1")),
            "num_train_epochs": 3,
            "learning_rate": 2e-2,  # so high that the student changes its mind
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
            **settings,
        }
    )
    if backend == "fsdp":  # which accelerate lets become DDP where there is no GPU, whatever was asked for
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


def drop(trainer):
    trainer.accelerator.free_memory()


def chosen(**settings):
    """A trainer with the callback, and what records its choices."""
    schedule = settings.pop("schedule")
    trainer = build(candidates, **settings)
    callback = SelectionCallback(trainer, schedule=schedule, **OPEN)
    trainer.add_callback(callback)
    trainer.add_callback(recorder := Recorder(callback, inside))
    return trainer, callback, recorder


def keys(choice):
    return [list(key) for key in zip(choice["row_id"], choice["variant"], strict=True)]


result = {}
if "once" in modes.split():
    trainer, callback, recorder = chosen(schedule="once", name="once", save_strategy="steps", save_steps=4)
    result["once"] = {"run": history(trainer), "inside": gather_object([recorder.seen])}
    result["scores"] = callback.candidates["loss_response_given_instruction"][:]
    rows = callback.selected
    drop(trainer)
    result["once"]["oracle"] = history(given := build(rows, "given"))
    drop(given)
if "epoch" in modes.split():
    trainer, callback, recorder = chosen(schedule="epoch", name="epoch", save_strategy="steps", save_steps=2)
    result["epoch"] = {"run": history(trainer), "inside": gather_object([recorder.seen])}
    result["epoch"]["choices"] = [keys(choice) for choice in recorder.choices]
    drop(trainer)
    given = build(recorder.choices[0], "replayed")
    given.train_dataset = replay = Replay(recorder.choices)
    given.add_callback(replay)
    result["epoch"]["oracle"] = history(given)
    drop(given)
for mode in [mode for mode in modes.split() if "@" in mode]:  # epoch@6: resumed from that step's checkpoint
    schedule, step = mode.split("@")
    trainer, callback, recorder = chosen(schedule=schedule, name=mode)
    with torch.no_grad():  # a student that would choose otherwise
        for parameter in trainer.model.parameters():
            getattr(parameter, "ds_tensor", parameter).mul_(-1)
    checkpoint = str(Path(output).with_suffix("") / schedule / f"checkpoint-{step}")
    result[mode] = {
        "run": history(trainer, resume_from_checkpoint=checkpoint),
        "inside": gather_object([recorder.seen]),
        "choices": [keys(choice) for choice in recorder.choices],
    }
    drop(trainer)
if PartialState().is_main_process:
    Path(output).write_text(json.dumps(result))

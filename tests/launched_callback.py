"""Launched by test_callback.py: train after a choice, then train on what was chosen, and write both histories."""

import json
import sys
from pathlib import Path

import datasets
import torch
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_reflect import SelectionCallback, to_training_ids

student, table, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(student)
candidates = to_training_ids(datasets.load_from_disk(table), tokenizer, "vicuna", 256)


def build(rows):
    arguments = SFTConfig(
        output_dir=str(Path(output).with_suffix("")),
        max_length=256,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=4,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    return SFTTrainer(student, args=arguments, train_dataset=rows, processing_class=tokenizer)


def history(trainer):
    trainer.train()
    return [[entry["loss"], entry["learning_rate"]] for entry in trainer.state.log_history if "loss" in entry]


trainer = build(candidates)
callback = SelectionCallback(trainer, template="vicuna", ifd_gate=None, r_ifd_gate=None, keep=None)
trainer.add_callback(callback)
result = {
    "chosen": history(trainer),
    "rows": len(callback.selected),
    "losses_of_candidates": callback.candidates["loss_response_given_instruction"][:],
    "distributed_type": trainer.accelerator.distributed_type.value,
    "processes": trainer.accelerator.num_processes,
    "backend": torch.distributed.get_backend(),
    "class": type(trainer.model_wrapped).__name__,
    "partitioned": all(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters()),
}
trainer.accelerator.free_memory()
selected, first = callback.selected, trainer.is_world_process_zero()
del trainer, callback
result["given"] = history(build(selected))
if first:
    Path(output).write_text(json.dumps(result))

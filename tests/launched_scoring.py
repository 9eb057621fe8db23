"""Launched by test_scoring_launch.py: score a table, and write what this and the other processes saw."""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_reflect import StudentScorer
from hf_reflect.callback.student import lent

options = json.loads(sys.argv[1])
torch.set_num_threads(1)
zero3 = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
tokenizer = AutoTokenizer.from_pretrained(options["student"])
model = AutoModelForCausalLM.from_pretrained(options["student"], dtype=torch.float32)
if zero3:
    # as in training: the Trainer's own engine, made for scoring by the callback
    trainer = Trainer(model, TrainingArguments(output_dir=options["output"] + ".trainer", use_cpu=True, bf16=False))
    accelerator, ready = trainer.accelerator, lent(trainer, training=False)
else:
    accelerator, ready = Accelerator(cpu=True), nullcontext()
tokens = []


def forward(_, args, given):
    tokens.append(given["input_ids"].numel())
    time.sleep(options.get("seconds_a_pass", 0))


model.register_forward_pre_hook(forward, with_kwargs=True)
scorer = StudentScorer(model, tokenizer, "vicuna", max_length=512, tokens_per_batch=options.get("tokens", 2048))
Path(options["output"] + f".started.{accelerator.process_index}").touch()
with ready:
    if accelerator.is_main_process and not zero3:  # as after a `map` on one process
        scorer.score_rows([{"instruction": "Why?", "input": "", "response": "So."}])
        tokens.clear()
        scorer.rows_cut = 0
    scored = scorer.score(load_from_disk(options["table"]), checkpoint_dir=options.get("checkpoint_dir"))
    passes = [len(tokens)]
    if options.get("again"):
        scorer.score(load_from_disk(options["table"]), checkpoint_dir=options["checkpoint_dir"])
        passes.append(len(tokens) - passes[0])
    partitioned = all(hasattr(parameter, "ds_id") for parameter in model.parameters())
result = {
    "losses": scored["loss_response_given_instruction"][:],
    "ifd": scored["ifd"][:],
    "r_ifd": scored["r_ifd"][:],
    "cut": scorer.rows_cut,
    "passes": gather_object(passes[:1]),
    "passes_again": gather_object(passes[1:]),
    "tokens": gather_object([sum(tokens)]),
    "distributed_type": accelerator.distributed_type.value,
    "processes": accelerator.num_processes,
    "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
    "partitioned": partitioned,
    "same": len({json.dumps(ifd) for ifd in gather_object([scored["ifd"][:]])}) == 1,
}
if accelerator.is_main_process:
    Path(options["output"]).write_text(json.dumps(result))
accelerator.end_training()

"""What the quickstart runs on, written for this project: 48 pairs, recorded teacher replies, a toy student.

The replies were written by hand for the demo, some of them refused, cut off or with a preamble on purpose. The student
learns for some seconds: what it chooses means nothing.
"""

import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..ledger import Ledger
from ..prompts import PROMPTS
from ..teacher import Teacher

FOLDER = Path(__file__).parent
PAIRS = str(FOLDER / "pairs.jsonl")
NOTE = "the teacher's replies were written for the demo, and the choices of its toy student mean nothing"


def prepare(teacher: Teacher, student: Path) -> None:
    """Everything the quickstart needs: recorded replies in the ledger, and a student, made once."""
    record(teacher)
    if not student.exists():
        print("Training the demo's toy student, some 15 seconds ...", flush=True)
        part = student.with_name(f".{student.name}.part")
        build_student(part)
        part.rename(student)


def record(teacher: Teacher) -> None:
    """Put the recorded replies into the teacher's ledger, where the ordinary way finds them."""
    with Ledger(teacher.ledger) as ledger:

        def put(part: str, text: dict[str, str], reply: dict[str, str]) -> None:
            chat = PROMPTS[part].chat(text["instruction"], text["response"], text.get("input", ""))
            record = {
                "text": reply["text"],
                "finish_reason": reply["finish_reason"],
                "model": teacher.model,
                "prompt_tokens": 0,
                "completion_tokens": 0,
                "fingerprint": "written for the demo",
                "seconds": 0.0,
            }
            ledger.put(teacher.key(chat), teacher.request(chat), record, endpoint="demo")

        for pair, replies in zip(_lines("pairs"), _lines("replies"), strict=True):
            text = {"instruction": pair["instruction"], "input": pair["input"], "response": pair["output"]}
            put("instruction", text, replies["instruction"])
            put("response", text, replies["response"])
            if "instruction+response" in replies:
                rewrite = PROMPTS["instruction"].parse(**replies["instruction"])
                new = {"instruction": rewrite.instruction or "", "response": rewrite.response or ""}
                put("response", new, replies["instruction+response"])


def build_student(folder: str | Path, steps: int = 80, seed: int = 0) -> None:
    """Make a Llama of 1M parameters with a byte-level BPE tokenizer, and train it on the demo's pairs.

    Some 15 s on a CPU.
    """
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from ..pairs import to_pairs
    from ..templates import StudentTemplate

    pairs = to_pairs(Dataset.from_list(_lines("pairs")))
    replies = [reply["text"] for replies in _lines("replies") for reply in replies.values()]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [*pairs["instruction"], *pairs["response"], *replies], 2048, special_tokens=["<s>", "</s>"]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    student = LlamaForCausalLM(config)
    # the teacher's prose, so that it can read at all, and pairs in the template, so that it knows the form
    stream: list[int] = []
    template = StudentTemplate(tokenizer, "vicuna", 512)
    for row, text in zip(pairs, replies, strict=False):
        stream += template.training_ids(row)["input_ids"] + tokenizer(text)["input_ids"] + [template.eos]
    ids = torch.tensor(stream)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # launchers set one a process, and the others are waiting
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 10)
        starts = torch.randint(0, len(ids) - 256, (8,))
        batch = torch.stack([ids[start : start + 256] for start in starts])  # (8, 256)
        loss = student(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]

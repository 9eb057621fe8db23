"""Every backend, schedule and way to resume against its oracle: the largest difference must be 0.0."""

import json

import datasets
import pytest
from conftest import TEXTS, byte_level_tokenizer, tiny_llama
from launching import launch, on_cpu

from hf_reflect import StudentScorer, to_training_ids

BACKENDS = {  # what every process must see: distributed_type, processes, backend, class, partitioned
    "alone": ("NO", 1, None, "LlamaForCausalLM", False),
    "ddp": ("MULTI_CPU", 2, "gloo", "DistributedDataParallel", False),
    "zero1": ("DEEPSPEED", 2, "gloo", "DeepSpeedEngine", False),
    "zero2": ("DEEPSPEED", 2, "gloo", "DeepSpeedEngine", False),
    "zero3": ("DEEPSPEED", 2, "gloo", "DeepSpeedEngine", True),
    "fsdp": ("FSDP", 2, "gloo", "FSDPLlamaForCausalLM", True),
}


def of_thirteen_rows(candidates):
    """A prime number of rows, so that no number of processes and steps divides them; four steps an epoch."""
    more = candidates.select(range(20)).map(
        lambda row: {"row_id": f"{row['row_id']} more", "response": f"Also: {row['response']}"}
    )
    return datasets.concatenate_datasets([candidates, more])


@pytest.mark.parametrize(
    "backend", [name if name in ("alone", "ddp") else pytest.param(name, marks=pytest.mark.slow) for name in BACKENDS]
)
def test_losses_and_learning_rates_are_those_of_the_oracle(backend, candidates, tmp_path):
    tokenizer = byte_level_tokenizer(TEXTS)
    student = tiny_llama(len(tokenizer), attention_dropout=0.1)
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    candidates = of_thirteen_rows(candidates)
    candidates.save_to_disk(tmp_path / "candidates")
    config = None if backend == "alone" else on_cpu("cpu" if backend == "ddp" else backend, tmp_path)
    arguments = [tmp_path / name for name in ("student", "candidates", "result.json")]
    modes = ("once", "epoch", "epoch@6", "epoch@8", "once@4")  # steps 6 and 8: in the middle of an epoch, at its end
    launch("tests/launched_callback.py", *arguments, backend, " ".join(modes), config=config)
    result = json.loads((tmp_path / "result.json").read_text())

    seen = ("distributed_type", "processes", "backend", "class", "partitioned")
    for mode in modes:
        inside = [tuple(process[name] for name in seen) for process in result[mode]["inside"]]
        assert inside == [BACKENDS[backend]] * BACKENDS[backend][1], mode
    alone = StudentScorer(student, tokenizer, template="vicuna", max_length=256)
    alone = alone.score(to_training_ids(candidates, tokenizer, "vicuna", 256))
    assert result["scores"] == pytest.approx(alone["loss_response_given_instruction"][:], rel=1e-5)

    once, epoch = result["once"], result["epoch"]
    assert len(once["run"]) == 12 and once["run"] == once["oracle"]
    assert epoch["run"] == epoch["oracle"] and epoch["run"] != once["run"]
    first, second, third = epoch["choices"]
    assert first != second != third  # the student did change its mind
    assert [row for row, _ in first] == [row for row, _ in second] == [row for row, _ in third]
    assert result["epoch@6"]["run"] == epoch["run"] and result["epoch@6"]["choices"] == [second, third]
    assert result["epoch@8"]["run"] == epoch["run"] and result["epoch@8"]["choices"] == [third]
    assert result["once@4"]["run"] == once["run"]

"""Every backend, schedule and way to resume against its oracle: the largest difference must be 0.0."""

import json

import datasets
import pytest
from conftest import TEXTS, byte_level_tokenizer, tiny_llama
from launching import command, environment, kill_when, launch, on_cpu

from hf_reflect import StudentScorer, to_training_ids

SCRIPT = "tests/launched_callback.py"
BACKENDS = {  # what every process must see: distributed_type, processes, backend, class, partitioned
    "alone": ("NO", 1, None, "LlamaForCausalLM", False),
    "ddp": ("MULTI_CPU", 2, "gloo", "DistributedDataParallel", False),
    "zero1": ("DEEPSPEED", 2, "gloo", "DeepSpeedEngine", False),
    "zero2": ("DEEPSPEED", 2, "gloo", "DeepSpeedEngine", False),
    "zero3": ("DEEPSPEED", 2, "gloo", "DeepSpeedEngine", True),
    "fsdp": ("FSDP", 2, "gloo", "FSDPLlamaForCausalLM", True),
}
RAISES = {  # what evaluating before training says, with or without the callback
    "zero1": "ZeRO inference only makes sense with ZeRO Stage 3",
    "zero2": "ZeRO inference only makes sense with ZeRO Stage 3",
    "fsdp": "a model and optimizer must be passed together",
}


@pytest.fixture
def folder(candidates, tmp_path):
    """A student and uneven candidates: of a prime number of rows some are far longer than the others."""
    tokenizer = byte_level_tokenizer(TEXTS)
    tiny_llama(len(tokenizer), attention_dropout=0.1).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    long = candidates.select(range(20)).map(
        lambda row: {"row_id": f"{row['row_id']} long", "response": f"{row['response']} Again: " * 6}
    )
    datasets.concatenate_datasets([candidates, long]).save_to_disk(tmp_path / "candidates")
    return tmp_path


def arguments(folder, backend, *modes):
    paths = [folder / name for name in ("student", "candidates", "result.json")]
    return [SCRIPT, *paths, backend, " ".join(modes)]


def configured(backend, folder):
    return None if backend == "alone" else on_cpu("cpu" if backend == "ddp" else backend, folder)


@pytest.mark.parametrize(
    "backend",
    # by default those that need no compiler: DeepSpeed's collectives are compiled the first time
    [name if name in ("ddp", "fsdp") else pytest.param(name, marks=pytest.mark.slow) for name in BACKENDS],
)
def test_losses_and_learning_rates_are_those_of_the_oracle(backend, folder):
    modes = ("once", "epoch", "epoch@6", "epoch@8", "once@4", "evaluated")  # 6: in the middle of an epoch, 8: its end
    more = ["disagreeing"] if backend == "ddp" else []
    launch(*arguments(folder, backend, *modes, *more), config=configured(backend, folder))
    result = json.loads((folder / "result.json").read_text())

    seen = ("distributed_type", "processes", "backend", "class", "partitioned")
    for mode in modes:
        inside = [tuple(process[name] for name in seen) for process in result[mode]["inside"]]
        assert inside == [BACKENDS[backend]] * BACKENDS[backend][1], mode
    tokenizer = byte_level_tokenizer(TEXTS)
    alone = StudentScorer(tiny_llama(len(tokenizer)), tokenizer, template="vicuna", max_length=256)
    rows = to_training_ids(datasets.load_from_disk(folder / "candidates"), tokenizer, "vicuna", 256)
    expected = alone.score(rows)["loss_response_given_instruction"][:]
    assert result["once"]["scores"] == pytest.approx(expected, rel=1e-5)

    once, epoch = result["once"], result["epoch"]
    assert len(once["run"]) == 12 and once["run"] == once["oracle"]
    assert epoch["run"] == epoch["oracle"] and epoch["run"] != once["run"]
    first, second, third = epoch["choices"]
    assert first != second != third  # the student did change its mind
    assert [row for row, _ in first] == [row for row, _ in second] == [row for row, _ in third]
    assert result["epoch@6"]["run"] == epoch["run"] and result["epoch@6"]["choices"] == [second, third]
    assert result["epoch@8"]["run"] == epoch["run"] and result["epoch@8"]["choices"] == [third]
    assert result["once@4"]["run"] == once["run"]
    assert result["evaluated"]["run"] == once["run"]
    assert RAISES.get(backend, "") in (result["evaluated"]["raised"] or "")
    for errors in result.get("disagreeing", []):
        assert "Process 1 holds other candidates" in errors["candidates"]
        assert "The processes chose differently" in errors["choice"]


@pytest.mark.slow
def test_a_rank_killed_in_training_or_scoring_ends_the_launch_and_the_next_has_the_undisturbed_losses(folder):
    config = on_cpu("cpu", folder)
    out = folder / "result"
    checkpoint, scoring = out / "killed" / "checkpoint-6" / "selection.json", out / "killed-2" / "scoring"
    for there, modes in ((checkpoint, ("killed",)), (scoring, ("killed-2",))):
        line = command(*arguments(folder, "ddp", *modes), config=config)
        seconds, code = kill_when(there.exists, line, rank=1, env=environment() | {"SLOW": "1"})
        assert seconds < 60 and code != 0
    assert not list((out / "killed-2").glob("checkpoint-*"))
    launch(*arguments(folder, "ddp", "epoch", "killed", "killed-2"), config=config)
    result = json.loads((folder / "result.json").read_text())
    assert result["killed"]["run"] == result["killed-2"]["run"] == result["epoch"]["run"]
    assert result["killed"]["choices"] == result["epoch"]["choices"][1:]

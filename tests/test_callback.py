import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TEXTS, byte_level_tokenizer, tiny_llama
from trl import SFTConfig, SFTTrainer

from hf_reflect import SelectionCallback, StudentScorer, select, to_training_ids
from hf_reflect.errors import DataError, SettingsError


@pytest.fixture
def tokenizer():
    return byte_level_tokenizer(TEXTS)


@pytest.fixture
def build(tokenizer, tmp_path):
    """A trainer over these rows with a student of fixed weights; dropout, so that random states matter."""

    def build(rows, **settings):
        arguments = SFTConfig(
            **{
                "output_dir": str(tmp_path / "out"),
                "max_length": 256,
                "per_device_train_batch_size": 3,
                "num_train_epochs": 2,
                "learning_rate": 1e-3,
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
        student = tiny_llama(len(tokenizer), attention_dropout=0.1)
        return SFTTrainer(student, args=arguments, train_dataset=rows, processing_class=tokenizer)

    return build


@pytest.fixture
def training_rows(candidates, tokenizer):
    return to_training_ids(candidates, tokenizer, "vicuna", 256)


OPEN = {"template": "vicuna", "ifd_gate": None, "r_ifd_gate": None, "keep": None}


def history(trainer):
    trainer.train()
    return [(entry["loss"], entry["learning_rate"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shuffle_dataset": True},
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"padding_free": True},
    ],
    ids=["plain", "shuffled", "accumulation", "padding-free"],
)
def test_training_after_the_choice_is_training_on_the_chosen_rows(build, training_rows, settings):
    if settings.get("padding_free"):
        settings = settings | {"max_length": None}
    trainer = build(training_rows, **settings)
    callback = SelectionCallback(trainer, **OPEN)
    trainer.add_callback(callback)
    chosen = history(trainer)
    assert len(chosen) > 2
    assert chosen == history(build(callback.selected, **settings))
    assert chosen != history(build(training_rows.select(range(len(callback.selected))), **settings))


def test_the_choice_is_what_select_makes_of_the_students_scores(build, training_rows, tokenizer):
    trainer = build(training_rows)
    callback = SelectionCallback(trainer, **OPEN)
    callback.choose()
    student = tiny_llama(len(tokenizer))
    scored = StudentScorer(student, tokenizer, template="vicuna", max_length=256).score(training_rows)
    expected = select(scored, ifd_gate=None, r_ifd_gate=None, keep=None)
    for name in ("row_id", "variant", "source", "input_ids"):
        assert callback.selected[name][:] == expected[name][:]
    assert trainer.train_dataset["input_ids"][:] == expected["input_ids"][:]


def test_choosing_leaves_random_states_and_modes_alone(build, training_rows):
    trainer = build(training_rows)
    trainer.model.train()
    trainer.model.lm_head.eval()
    modes = [module.training for module in trainer.model.modules()]
    callback = SelectionCallback(trainer, **OPEN)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    callback.choose()
    assert modes == [module.training for module in trainer.model.modules()]
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())


def test_the_choice_is_written_down(build, training_rows, tmp_path):
    callback = SelectionCallback(build(training_rows), seed=3, **OPEN)
    selected = callback.choose()
    written = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert written["rows"] == {row["row_id"]: [row["variant"], row["source"]] for row in selected}
    assert written["rule"] == "paper" and written["seed"] == 3 and written["rescored"] is True


def test_scores_go_back_to_the_whole_table(build, training_rows, candidates):
    broken = candidates.map(lambda row, i: {"response": None} if i == 3 else {}, with_indices=True)
    callback = SelectionCallback(build(training_rows), **OPEN)
    with pytest.raises(SettingsError, match="Nothing is scored yet"):
        callback.with_scores(broken)
    callback.choose()
    scored = callback.with_scores(broken)
    assert scored.column_names[: len(broken.column_names)] == broken.column_names
    assert scored["ifd"][:] == callback.candidates["ifd"][:]


def test_without_rescoring_the_columns_that_are_there_decide(build, training_rows):
    high = [10.0 if variant == "instruction" else 1.0 for variant in training_rows["variant"]]
    low = [0.5 if variant.endswith("response") else 1.0 for variant in training_rows["variant"]]
    scored = training_rows.add_column("ifd", high).add_column("r_ifd", low)
    callback = SelectionCallback(build(scored), rescore=False, **OPEN)
    assert set(callback.choose()["variant"]) == {"instruction+response"}
    with pytest.raises(DataError, match="needs the columns 'ifd', 'r_ifd'"):
        SelectionCallback(build(training_rows), rescore=False, **OPEN).choose()


def test_an_empty_selection_says_so_with_the_numbers(build, training_rows):
    callback = SelectionCallback(build(training_rows), template="vicuna", ifd_gate=0.0001)
    with pytest.raises(DataError, match=r"keeps none of 8 rows(.|\n)*median"):
        callback.trainer.train()


def test_packing_and_other_templates_and_bare_rows_are_refused(build, training_rows, pairs):
    with pytest.raises(SettingsError, match="packed rows"):
        SelectionCallback(build(training_rows, packing=True), **OPEN)
    with pytest.raises(SettingsError, match="another template than 'alpaca'(.|\n)*template="):
        SelectionCallback(build(training_rows), template="alpaca")
    with pytest.raises(DataError, match="to_training_ids"):
        SelectionCallback(build(training_rows.remove_columns("row_id")), **OPEN)
    with pytest.raises(SettingsError, match='"once"'):
        SelectionCallback(build(training_rows), schedule="sometimes", **OPEN)


def test_training_on_other_rows_than_the_chosen_ones_is_stopped(build, training_rows):
    trainer = build(training_rows)
    callback = SelectionCallback(trainer, **OPEN)
    trainer.add_callback(callback)
    with pytest.raises(RuntimeError, match="no choice was made"):
        type(trainer).train(trainer)  # round the instance's own `train`
    callback.choose()
    trainer.train_dataset = training_rows.select(range(len(callback.selected)))
    with pytest.raises(RuntimeError, match=f"{len(callback.selected)} rows were chosen"):
        trainer.train()


def test_a_resumed_training_keeps_the_choice_of_its_checkpoint(build, training_rows, tmp_path):
    whole = build(training_rows, save_strategy="steps", save_steps=2)
    whole.add_callback(callback := SelectionCallback(whole, **OPEN))
    losses = history(whole)
    resumed = build(training_rows, save_strategy="no")
    with torch.no_grad():  # a student that would choose otherwise
        resumed.model.model.embed_tokens.weight.mul_(-1)
    resumed.add_callback(again := SelectionCallback(resumed, **OPEN))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert again.selected["input_ids"][:] == callback.selected["input_ids"][:]
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == [loss for loss, _ in losses]

    other = build(training_rows, save_strategy="no")
    SelectionCallback(other, **{**OPEN, "rule": "longest"})
    with pytest.raises(SettingsError, match="rule='paper'.*'longest'"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_candidates_cut_at_another_length_are_refused(build, candidates, tokenizer):
    long = candidates.map(lambda row: {"response": row["response"] and row["response"] * 9})
    rows = to_training_ids(long, tokenizer, "vicuna", 2048)
    with pytest.raises(SettingsError, match="same `max_length`"):
        SelectionCallback(build(rows), **OPEN)
    SelectionCallback(build(to_training_ids(long, tokenizer, "vicuna", 256)), **OPEN)
    unlimited = build(rows, max_length=None)
    assert SelectionCallback(unlimited, **OPEN).choose()["input_ids"][0] in rows["input_ids"][:]


def test_a_trainer_takes_one_callback(build, training_rows):
    trainer = build(training_rows)
    SelectionCallback(trainer, **OPEN)
    with pytest.raises(SettingsError, match="already"):
        SelectionCallback(trainer, **OPEN)


def launch(config, student, tokenizer, candidates, folder):
    student.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    candidates.save_to_disk(folder / "candidates")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        "tests/launched_callback.py",
    ]
    arguments = [str(folder / name) for name in ("student", "candidates", "result.json")]
    done = subprocess.run(
        [*map(str, command), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


def test_two_processes_choose_and_train_alike(tokenizer, candidates, training_rows, tmp_path):
    student = tiny_llama(len(tokenizer), attention_dropout=0.1)
    result = launch(ROOT / "accelerate_configs" / "cpu.yaml", student, tokenizer, candidates, tmp_path)
    inside = result["processes"], result["distributed_type"], result["backend"], result["class"]
    assert inside == (2, "MULTI_CPU", "gloo", "DistributedDataParallel")
    assert len(result["chosen"]) > 2 and result["chosen"] == result["given"]
    alone = StudentScorer(student, tokenizer, template="vicuna", max_length=256).score(training_rows)
    assert result["losses_of_candidates"] == pytest.approx(alone["loss_response_given_instruction"][:], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_chooses_and_trains_alike(stage, tokenizer, candidates, training_rows, tmp_path):
    shipped = yaml.safe_load((ROOT / "accelerate_configs" / f"zero{stage}.yaml").read_text())
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        # without a threshold of 0 nothing of a model this small is partitioned
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    shipped |= {"use_cpu": True, "num_processes": 2}
    shipped["deepspeed_config"] = {
        "deepspeed_config_file": str(tmp_path / "deepspeed.json"),
        "zero3_init_flag": stage == 3,
    }
    del shipped["mixed_precision"]
    config = tmp_path / "accelerate.yaml"
    config.write_text(yaml.safe_dump(shipped))
    student = tiny_llama(len(tokenizer), attention_dropout=0.1)
    result = launch(config, student, tokenizer, candidates, tmp_path)
    inside = result["processes"], result["distributed_type"], result["class"], result["partitioned"]
    assert inside == (2, "DEEPSPEED", "DeepSpeedEngine", stage == 3)
    assert len(result["chosen"]) > 2 and result["chosen"] == result["given"]
    alone = StudentScorer(student, tokenizer, template="vicuna", max_length=256).score(training_rows)
    assert result["losses_of_candidates"] == pytest.approx(alone["loss_response_given_instruction"][:], rel=1e-5)


def test_every_accelerate_configuration_can_be_read():
    from accelerate.commands.config.config_args import load_config_from_file

    for path in sorted(Path(ROOT, "accelerate_configs").glob("*.yaml")):
        assert load_config_from_file(str(path)).num_processes >= 2

"""What a checkpoint knows of its choice: taken up again, chosen again where that is the same, or refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, byte_level_tokenizer
from training import OPEN, Recorder, history, trainer_over
from transformers import TrainerCallback

from hf_reflect import SelectionCallback, to_training_ids
from hf_reflect.errors import DataError, SettingsError

CHANGING = {"learning_rate": 5e-2, "num_train_epochs": 3}  # three steps an epoch


@pytest.fixture
def tokenizer():
    return byte_level_tokenizer(TEXTS)


@pytest.fixture
def training_rows(candidates, tokenizer):
    return to_training_ids(candidates, tokenizer, "vicuna", 256)


@pytest.fixture
def build(tokenizer, tmp_path, training_rows):
    """A trainer with its callback."""

    def build(schedule, name="out", rows=training_rows, choice=None, **settings):
        settings = {"output_dir": str(tmp_path / name), **CHANGING, **settings}
        trainer = trainer_over(rows, tokenizer, tmp_path, **settings)
        callback = SelectionCallback(trainer, schedule=schedule, **OPEN | (choice or {}))
        trainer.add_callback(callback)
        return trainer, callback

    return build


@pytest.fixture
def trained(build, tmp_path):
    """Run to its end with a checkpoint at every step: its losses and choices."""

    def trained(schedule, **settings):
        trainer, callback = build(schedule, save_strategy="steps", save_steps=1, **settings)
        trainer.add_callback(recorder := Recorder(callback))
        return history(trainer), recorder.choices

    return trained


def keys(choice):
    return list(zip(choice["row_id"], choice["variant"], strict=True))


def another_mind(trainer):
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(-1)


@pytest.mark.parametrize("options", [{}, {"shuffle_dataset": True, "gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("schedule", ["once", "epoch"])
def test_from_any_step_it_goes_on_as_if_nothing_had_been(schedule, options, build, trained, tmp_path):
    losses, choices = trained(schedule, **options)
    for step in (4, 6) if not options else (3,):  # in the middle of the second epoch, at its end; at the first's
        trainer, callback = build(schedule, "again", **options)
        another_mind(trainer)
        assert history(trainer, resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}")) == losses
        assert keys(callback.selected) == keys(choices[-1])


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


@pytest.mark.parametrize("schedule", ["once", "epoch"])
def test_after_ctrl_c_the_same_trainer_can_resume(schedule, build, trained):
    losses, _ = trained(schedule)
    trainer, _ = build(schedule, "interrupted", save_strategy="steps", save_steps=3)
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    assert history(trainer, resume_from_checkpoint=True) == losses


@pytest.mark.parametrize("schedule", ["once", "epoch"])
def test_a_choice_made_before_resuming_gives_way_to_the_checkpoints(schedule, build, trained, tmp_path):
    losses, choices = trained(schedule)
    trainer, callback = build(schedule, "again")
    another_mind(trainer)
    assert keys(callback.choose()) != keys(choices[0])
    assert history(trainer, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4")) == losses


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rule": "ifd"}, "rule='paper', and this callback has 'ifd'"),
        ({"ifd_gate": 50.0}, "ifd_gate=None, and this callback has 50.0"),
        ({"r_ifd_gate": 50}, "r_ifd_gate=None"),
        ({"seed": 7}, "seed=0, and this callback has 7"),
        ({"schedule": "epoch"}, "schedule='once'"),
    ],
    ids=str,
)
def test_other_settings_are_refused_by_name(change, words, build, trained, tmp_path):
    trained("once", num_train_epochs=1)
    schedule = change.pop("schedule", "once")
    trainer, _ = build(schedule, "again", choice=change)
    with pytest.raises(SettingsError, match=words):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_other_candidates_are_refused(build, trained, training_rows, tmp_path):
    trained("once", num_train_epochs=1)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    fewer = training_rows.select(range(4, len(training_rows)))
    changed = training_rows.map(lambda row: {"input_ids": [*row["input_ids"][:-2], 7, row["input_ids"][-1]]})
    for rows, words in (
        (fewer, "32 versions of 8 rows then, 28 versions of 7 rows now"),
        (changed, "as many with other texts, ids or order now"),
        (training_rows.select(range(31, -1, -1)), "as many with other texts, ids or order now"),
    ):
        trainer, _ = build("once", "again", rows=rows)
        with pytest.raises(DataError, match=words):
            trainer.train(resume_from_checkpoint=checkpoint)


def without_its_file(tmp_path, step=4):
    """A checkpoint as it is left where callbacks were not called: no `selection.json`, in another output folder."""
    shutil.copytree(tmp_path / "out" / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}")
    (tmp_path / "again" / f"checkpoint-{step}" / "selection.json").unlink()


def test_without_its_file_once_chooses_again_and_goes_on_if_that_is_the_same(build, trained, tmp_path):
    losses, _ = trained("once")
    without_its_file(tmp_path)
    trainer, _ = build("once", "again")
    assert history(trainer, resume_from_checkpoint=True) == losses
    shutil.copy(tmp_path / "out" / "selection.json", tmp_path / "again" / "selection.json")
    trainer, callback = build("once", "again")
    another_mind(trainer)  # the file of the output folder serves, since the checkpoint knows it
    assert history(trainer, resume_from_checkpoint=True) == losses and callback.candidates is None


def test_without_its_file_a_student_that_chooses_otherwise_is_refused(build, trained, tmp_path):
    trained("once")
    without_its_file(tmp_path)
    trainer, _ = build("once", "again")
    another_mind(trainer)
    with pytest.raises(DataError, match=r"has no selection.json(.|\n)*choosing again gave another choice"):
        trainer.train(resume_from_checkpoint=True)


def test_without_its_file_no_epochs_choice_can_be_made_again(build, trained, tmp_path):
    trained("epoch")
    without_its_file(tmp_path)
    trainer, _ = build("epoch", "again")
    with pytest.raises(DataError, match=r"has no selection.json(.|\n)*cannot choose them again(.|\n)*train anew"):
        trainer.train(resume_from_checkpoint=True)


def test_the_checkpoint_of_a_training_without_choice_is_refused(build, tokenizer, training_rows, tmp_path):
    plain = trainer_over(training_rows, tokenizer, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    plain.train()
    trainer, _ = build("once", "again")
    with pytest.raises(DataError, match="does not say on which rows it was trained"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_a_checkpoint_that_is_not_there_is_said_before_scoring(build):
    for where, words in ((True, "There is no checkpoint in"), ("no/such/folder", "There is no checkpoint at")):
        trainer, callback = build("once", "again")
        with pytest.raises(DataError, match=words):
            trainer.train(resume_from_checkpoint=where)
        assert callback.candidates is None


def other_rows(written):
    return {**written, "rows": dict(list(written["rows"].items())[1:])}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda written: json.dumps(written)[:50], "cannot be read"),
        (lambda written: "[]", "holds a list"),
        (lambda written: json.dumps({"rule": "paper"}), "does not say which rows"),
        (lambda written: json.dumps({**written, "rows": {"0": "original"}}), "does not say which rows"),
        (lambda written: json.dumps({**written, "first": None}), "does not say which rows"),
        (lambda written: json.dumps(other_rows(written)), "does not say which rows|another choice"),
        (lambda written: json.dumps({**written, "first": written["rows"]}), "another choice"),
    ],
    ids=["half", "a list", "no rows", "other rows", "no first", "a row less", "another first"],
)
def test_a_damaged_file_is_named(damage, words, build, trained, tmp_path):
    trained("epoch")
    path = Path(tmp_path / "out" / "checkpoint-4" / "selection.json")
    path.write_text(damage(json.loads(path.read_text())))
    trainer, _ = build("epoch", "again")
    with pytest.raises(DataError, match=words):
        trainer.train(resume_from_checkpoint=str(path.parent))


def test_scores_before_training_are_taken_up_after_a_crash(build, tmp_path):
    trainer, callback = build("once", choice={"checkpoint_dir": tmp_path / "scores"})
    calls = []
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(1) and None)
    callback.choose()
    first = len(calls)
    again, other = build("once", choice={"checkpoint_dir": tmp_path / "scores"})
    again.model.register_forward_pre_hook(lambda *_: calls.append(1) and None)
    other.choose()
    assert len(calls) == first > 0 and keys(other.selected) == keys(callback.selected)

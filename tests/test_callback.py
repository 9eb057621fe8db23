import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXTS, byte_level_tokenizer, tiny_llama
from training import OPEN, history, trainer_over

from hf_reflect import SelectionCallback, StudentScorer, select, to_training_ids
from hf_reflect.callback import Figures
from hf_reflect.errors import DataError, SettingsError


@pytest.fixture
def tokenizer():
    return byte_level_tokenizer(TEXTS)


@pytest.fixture
def build(tokenizer, tmp_path):
    return lambda rows, **settings: trainer_over(rows, tokenizer, tmp_path, **settings)


@pytest.fixture
def training_rows(candidates, tokenizer):
    return to_training_ids(candidates, tokenizer, "vicuna", 256)


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
    assert set(callback.with_scores(scored)["loss_response"]) == {None}
    with pytest.raises(DataError, match="needs the columns 'ifd', 'r_ifd'"):
        SelectionCallback(build(training_rows), rescore=False, **OPEN)


def test_other_templates_and_schedules_are_refused(build, training_rows):
    with pytest.raises(SettingsError, match="another template than 'alpaca'(.|\n)*template="):
        SelectionCallback(build(training_rows), template="alpaca")
    with pytest.raises(SettingsError, match='"once" or "epoch"'):
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


def test_what_cannot_work_is_said_before_anything_is_scored(build, training_rows):
    for settings, words in (
        ({"ifd_gate": "1"}, "`ifd_gate` is a number"),
        ({"seed": 1.5}, "`seed` is a whole number"),
        ({"rule": "papr"}, "'papr' is unknown"),
    ):
        with pytest.raises(SettingsError, match=words):
            SelectionCallback(build(training_rows), **OPEN | settings)
    with pytest.raises(DataError, match="'coherence'(.|\n)*before the trainer is built"):
        SelectionCallback(build(training_rows), **OPEN | {"rule": "coherence"})
    twice = training_rows.select([0, *range(len(training_rows))])
    numbers = list(range(len(training_rows)))
    numbered = training_rows.remove_columns("row_id").add_column("row_id", numbers)
    for rows, words in ((twice, "1 of 33 versions repeat"), (numbered, "row_id holds int64, and must hold strings")):
        with pytest.raises(DataError, match=words):
            SelectionCallback(build(rows), **OPEN)
    numpy_numbers = OPEN | {"seed": np.int64(3), "ifd_gate": np.float32(50)}
    assert len(SelectionCallback(build(training_rows.with_format("numpy")), **numpy_numbers).choose())


def test_an_empty_choice_keeps_the_scores(build, training_rows):
    callback = SelectionCallback(build(training_rows), template="vicuna", ifd_gate=1e-6)
    with pytest.raises(DataError, match="keeps none"):
        callback.choose()
    assert None not in callback.with_scores(training_rows)["ifd"][:]


def test_what_was_chosen_is_told_and_logged_at_every_epoch(build, training_rows, capsys):
    trainer = build(training_rows, num_train_epochs=3, learning_rate=5e-2)
    trainer.add_callback(callback := SelectionCallback(trainer, schedule="epoch", **OPEN))
    history(trainer)
    told = [entry for entry in trainer.state.log_history if "selection/rows" in entry]
    assert [entry["epoch"] for entry in told] == [0, 1, 2]
    assert all(entry["selection/kept"] == 8 for entry in told) and "selection/changed" not in told[0]
    assert any(entry["selection/changed"] > 0 for entry in told[1:])
    scored = zip(training_rows["variant"], callback.candidates["ifd"], strict=True)
    originals = [score for variant, score in scored if variant == "original"]
    assert told[0]["selection/ifd/before"] == pytest.approx(np.mean(originals))
    said = capsys.readouterr().out
    assert said.count("The student chose by the rule 'paper':") == 3 and said.count("  changed ") == 2
    assert max(len(line) for line in said.splitlines() if not line.startswith("{")) <= 80
    written = json.loads((Path(trainer.args.output_dir) / "selection.json").read_text())
    assert written["rows"] == {row["row_id"]: [row["variant"], row["source"]] for row in callback.selected}
    assert written["first"] != written["rows"] and list(written["first"]) == list(written["rows"])


def test_choice_and_cost_reach_the_tracker_and_leave_the_losses_alone(build, training_rows):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = build(training_rows)
    plain.add_callback(SelectionCallback(plain, **OPEN))
    expected = history(plain)
    trainer = build(training_rows, report_to="tensorboard")
    trainer.add_callback(callback := SelectionCallback(trainer, **OPEN))
    trainer.add_callback(Figures(trainer, {"teacher/cost": 12.25, "teacher/replies": 24}))
    assert history(trainer) == expected
    (events,) = Path(trainer.args.output_dir).rglob("events.out.tfevents.*")
    curves = EventAccumulator(str(events)).Reload()

    def shown(name):
        return [(event.step, event.value) for event in curves.Scalars(name)]

    assert shown("train/teacher/cost") == [(0, 12.25)] and shown("train/teacher/replies") == [(0, 24)]
    assert shown("train/selection/kept") == [(0, len(callback.selected))]
    scored = callback.candidates
    means = [scored["ifd"][n] for n in range(len(scored)) if scored["variant"][n] == "original"]
    assert shown("train/selection/ifd/before") == [(0, pytest.approx(np.mean(means), rel=1e-6))]
    assert [value for _, value in shown("train/loss")] == pytest.approx([loss for loss, _ in expected])


def test_what_was_dropped_is_counted_by_reason(build, training_rows, capsys):
    callback = SelectionCallback(build(training_rows), template="vicuna", ifd_gate=None, r_ifd_gate=1.15, keep=None)
    kept = len(callback.choose())
    assert 0 < kept < 8
    said = capsys.readouterr().out
    assert f"{8 - kept}  r_ifd not below 1.15" in said


def test_a_trainer_takes_one_callback(build, training_rows):
    trainer = build(training_rows)
    SelectionCallback(trainer, **OPEN)
    with pytest.raises(SettingsError, match="already"):
        SelectionCallback(trainer, **OPEN)


def test_every_accelerate_configuration_can_be_read():
    from accelerate.commands.config.config_args import load_config_from_file

    for path in sorted(Path(ROOT, "accelerate_configs").glob("*.yaml")):
        assert load_config_from_file(str(path)).num_processes >= 2

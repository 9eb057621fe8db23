"""The options of the trainers with which the callback is used: exact, or refused with what to do instead."""

import datasets
import pytest
import torch
from conftest import CHATML, ROWS, TEXTS, byte_level_tokenizer, chat_tokenizer, tiny_llama
from training import OPEN, Recorder, Replay, history, trainer_over
from transformers import BertConfig, BertForMaskedLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_reflect import SelectionCallback, to_messages, to_pairs, to_prompt_completion, to_training_ids
from hf_reflect.errors import DataError, SettingsError


@pytest.fixture
def tokenizer():
    return byte_level_tokenizer(TEXTS)


@pytest.fixture
def build(tokenizer, tmp_path):
    def build(rows, **settings):
        return trainer_over(rows, settings.pop("tokenizer", tokenizer), tmp_path, **settings)

    return build


@pytest.fixture
def training_rows(candidates, tokenizer):
    return to_training_ids(candidates, tokenizer, "vicuna", 256)


def compare(build, rows, given=None, template="vicuna", schedule="once", **settings):
    """Train on the choice and on the chosen rows given as they were before preparation; the callback."""
    trainer = build(rows, **settings)
    callback = SelectionCallback(trainer, schedule=schedule, **{**OPEN, "template": template})
    trainer.add_callback(callback)
    trainer.add_callback(recorder := Recorder(callback))
    chosen = history(trainer)
    assert len(chosen) > 2
    keys = set(zip(callback.selected["row_id"], callback.selected["variant"], strict=True))
    other = build(rows.filter(lambda row: (row["row_id"], row["variant"]) in keys), **settings)
    if schedule == "epoch":
        first, second, *_ = recorder.choices
        assert first["variant"][:] != second["variant"][:]
        args = trainer.args
        choices = [rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows for rows in recorder.choices]
        other.train_dataset = replay = Replay(choices)
        other.add_callback(replay)
    assert chosen == history(other)
    return callback


EXACT = {
    "plain": {},
    "shuffle_dataset": {"shuffle_dataset": True},
    "accumulation and gradient checkpointing": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "padding_free": {"padding_free": True, "max_length": None},
    "remove_unused_columns=False": {"remove_unused_columns": False},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "neftune": {"neftune_noise_alpha": 5.0},
    "bf16": {"bf16": True},
    "workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    "max_steps": {"max_steps": 7},
}


@pytest.mark.parametrize("name", EXACT)
def test_training_after_the_choice_is_training_on_the_chosen_rows(name, build, training_rows):
    compare(build, training_rows, **EXACT[name])


# a learning rate at which the student changes its mind; workers that persist draw other dropout masks in plain TRL too
EPOCH = {name: EXACT[name] | {"learning_rate": 5e-2, "num_train_epochs": 3} for name in EXACT if name != "max_steps"}
EPOCH["workers"]["model"] = lambda: tiny_llama(305)


@pytest.mark.parametrize("name", EPOCH)
def test_versions_chosen_every_epoch_train_as_if_replayed(name, build, training_rows, tokenizer):
    assert len(tokenizer) == 305
    compare(build, training_rows, schedule="epoch", **EPOCH[name])

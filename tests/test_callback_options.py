"""The options of the trainers with which the callback is used: exact, or refused with what to do instead."""

import datasets
import pytest
import torch
from conftest import CHATML, TEXTS, byte_level_tokenizer, chat_tokenizer, tiny_llama
from training import OPEN, Recorder, Replay, history, trainer_over
from transformers import BertConfig, BertForMaskedLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTTrainer

from hf_reflect import SelectionCallback, to_messages, to_prompt_completion, to_training_ids
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
        choices = [
            rows.shuffle(seed=args.seed) if getattr(args, "shuffle_dataset", False) else rows
            for rows in recorder.choices
        ]
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


def each(options):
    """Workers that persist take ten seconds to end."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name == "workers")) for name in options]


@pytest.mark.parametrize("name", each(EXACT))
def test_training_after_the_choice_is_training_on_the_chosen_rows(name, build, training_rows):
    compare(build, training_rows, **EXACT[name])


# a learning rate at which the student changes its mind; workers that persist draw other dropout masks in plain TRL too
EPOCH = ("shuffle_dataset", "padding_free", "remove_unused_columns=False", "group_by_length", "workers")
EPOCH = {name: EXACT[name] | {"learning_rate": 5e-2, "num_train_epochs": 3} for name in EPOCH}
EPOCH["workers"]["model"] = lambda: tiny_llama(305)


@pytest.mark.parametrize("name", each(EPOCH))
def test_versions_chosen_every_epoch_train_as_if_replayed(name, build, training_rows, tokenizer):
    assert len(tokenizer) == 305
    compare(build, training_rows, schedule="epoch", **EPOCH[name])


def test_prompts_and_completions_are_scored_by_their_texts_whatever_the_labels_say(build, candidates, tokenizer):
    rows = to_prompt_completion(candidates, template="vicuna", keep_texts=True)
    completions = compare(build, rows)
    everything = compare(build, rows, completion_only_loss=False)
    assert everything.candidates["labels"][0][0] != -100 and completions.candidates["labels"][0][0] == -100
    assert everything.candidates["ifd"][:] == completions.candidates["ifd"][:]
    ids = SelectionCallback(build(to_training_ids(candidates, tokenizer, "vicuna", 256)), **OPEN)
    assert ids.choose()["variant"][:] == completions.selected["variant"][:]


GENERATION = CHATML.replace(
    "{{ m['content'] | trim }}<|im_end|>\n",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] | trim }}<|im_end|>\n{% endif %}",
)


@pytest.mark.parametrize("settings", [{}, {"assistant_only_loss": True}], ids=["whole", "assistant_only_loss"])
def test_conversations_are_chosen_among(settings, build, candidates):
    tokenizer = chat_tokenizer(TEXTS)
    tokenizer.chat_template = GENERATION
    rows = to_messages(candidates, keep_texts=True)
    callback = compare(build, rows, template="auto", tokenizer=tokenizer, **settings)
    assert callback.scorer.template.name == "chat"
    assert (callback.selected["labels"][0][0] == -100) == bool(settings)


@pytest.mark.parametrize("form", ["training ids", "prompt and completion", "messages"])
def test_earlier_turns_are_scored_and_trained_on(form, build, candidates, tokenizer):
    history = [{"role": "user", "content": "Hello there."}, {"role": "assistant", "content": "Hello, what is it?"}]
    rows = candidates.map(lambda row: {"history": history})
    template = "vicuna"
    if form == "training ids":
        rows = to_training_ids(rows, tokenizer, "vicuna", 512)
    elif form == "prompt and completion":
        rows = to_prompt_completion(rows, template="vicuna", keep_texts=True)
    else:
        tokenizer, template = chat_tokenizer(TEXTS), "auto"
        rows = to_messages(rows, keep_texts=True)
    callback = compare(build, rows, template=template, tokenizer=tokenizer, max_length=512)
    context = callback.scorer.template.forward(rows[0]).context
    assert "Hello, what is it?" in tokenizer.decode(context)


def test_rows_that_max_length_drops_are_not_chosen_among(build, candidates, caplog):
    long = candidates.map(
        lambda row: {"instruction": row["instruction"] * (40 if row["row_id"] == candidates["row_id"][0] else 1)}
    )
    rows = to_prompt_completion(long, template="vicuna", keep_texts=True)
    callback = compare(build, rows)
    assert set(callback.candidates["row_id"]) == set(rows["row_id"]) - {rows["row_id"][0]}
    cut = long.map(lambda row: {"response": row["response"] * 9})
    compare(build, to_training_ids(cut, byte_level_tokenizer(TEXTS), "vicuna", 2048))
    assert "the same `max_length`" in caplog.text


def test_an_eval_dataset_is_left_alone(build, training_rows):
    more = {"eval_dataset": training_rows.select(range(5))}
    compare(build, training_rows, more=more, eval_strategy="epoch", eval_on_start=True)


def test_an_adapter_chooses_as_its_base_before_training_and_trains_on_that(build, training_rows):
    from peft import LoraConfig

    lora = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
    with_adapter = compare(build, training_rows, more=lora)
    without = SelectionCallback(build(training_rows), **OPEN)
    without.choose()
    assert with_adapter.candidates["ifd"][:] == without.candidates["ifd"][:]
    compare(build, training_rows, more=lora, schedule="epoch", learning_rate=0.5, num_train_epochs=3)


@pytest.mark.slow
def test_a_compiled_model_is_scored_uncompiled_and_trained_alike(build, training_rows):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}  # another backend takes minutes to compile
    compare(build, training_rows, **compiled)
    compare(build, training_rows, schedule="epoch", learning_rate=5e-2, num_train_epochs=3, **compiled)


@pytest.mark.parametrize("schedule", ["once", "epoch"])
def test_the_plain_trainer_takes_tokenised_data_with_its_texts(schedule, build, training_rows, tokenizer):
    settings = {"trainer_class": Trainer, "config": TrainingArguments, "learning_rate": 5e-2, "num_train_epochs": 3}
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    compare(build, training_rows, schedule=schedule, more={"data_collator": collator}, **settings)


class Patched(SFTTrainer):
    """As trainers that others patch: its own `train` around the loop, its own dataloader."""

    def train(self, *args, **kwargs):
        self.began = True
        return super().train(*args, **kwargs)

    def get_train_dataloader(self):
        assert self.began
        return super().get_train_dataloader()


def test_a_subclass_that_wraps_train_and_dataloader_keeps_the_contract(build, training_rows):
    compare(build, training_rows, trainer_class=Patched)


@pytest.mark.parametrize("ask", ["evaluate", "predict"])
def test_evaluating_before_training_changes_nothing_after_it(ask, build, training_rows):
    def trained(first):
        trainer = build(training_rows, more={"eval_dataset": training_rows.select(range(5))}, bf16=True)
        callback = SelectionCallback(trainer, **OPEN)
        trainer.add_callback(callback)
        if first:
            state = torch.get_rng_state()
            trainer.evaluate() if ask == "evaluate" else trainer.predict(trainer.eval_dataset)
            torch.set_rng_state(state)
        return history(trainer)

    assert trained(first=True) == trained(first=False)


@pytest.mark.parametrize("schedule", ["once", "epoch"])
def test_a_second_training_keeps_the_choice(schedule, build, training_rows):
    trainer = build(training_rows, learning_rate=5e-2)
    callback = SelectionCallback(trainer, schedule=schedule, **OPEN)
    trainer.add_callback(callback)
    history(trainer)
    chosen = callback.selected
    trainer.args.num_train_epochs = 1
    trainer.train()
    assert callback.selected is chosen


def test_packing_comes_after_the_choice(build, training_rows):
    with pytest.raises(SettingsError, match=r"Choose first, then pack(.|\n)*choose\(\)"):
        SelectionCallback(build(training_rows, packing=True), **OPEN)
    chosen = SelectionCallback(build(training_rows), **OPEN).choose()
    packed = build(chosen, packing=True, max_length=1024)
    assert len(packed.train_dataset) < len(chosen)
    assert len(history(packed)) > 0


def test_a_stream_is_refused(build, training_rows, tmp_path, tokenizer):
    stream = datasets.IterableDataset.from_generator(lambda: iter(training_rows))
    with pytest.raises(SettingsError, match=r"not a IterableDataset(.|\n)*from_list"):
        SelectionCallback(build(stream, max_steps=2), **OPEN)


@pytest.mark.parametrize("column", ["row_id", "variant", "instruction", "response"])
def test_a_missing_column_is_named(column, build, training_rows):
    with pytest.raises(DataError, match=f"'{column}'(.|\n)*to_training_ids"):
        SelectionCallback(build(training_rows.remove_columns(column)), **OPEN)


def test_a_student_that_is_no_causal_language_model_is_refused(build, training_rows, tokenizer):
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    settings = {"trainer_class": Trainer, "config": TrainingArguments, "model": lambda: BertForMaskedLM(config)}
    with pytest.raises(SettingsError, match="must be a causal language model; BertForMaskedLM is none"):
        SelectionCallback(build(training_rows, **settings), **OPEN)


def test_an_empty_choice_shows_how_both_scores_are_spread(build, training_rows):
    trainer = build(training_rows)
    SelectionCallback(trainer, template="vicuna", ifd_gate=1e-6)
    with pytest.raises(DataError, match=r"keeps none of 8 rows(.|\n)*ifd: min(.|\n)*median(.|\n)*r_ifd: min"):
        trainer.train()

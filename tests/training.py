"""Small trainers for tests: a student of fixed weights with dropout, so that random states matter."""

import gc

import torch
from conftest import tiny_llama
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

# Every training collects garbage several times: what was imported need not be looked through each time.
gc.collect()
gc.freeze()

OPEN = {"template": "vicuna", "ifd_gate": None, "r_ifd_gate": None, "keep": None}


def trainer_over(
    rows, tokenizer, folder, model=None, trainer_class=SFTTrainer, config=SFTConfig, more=None, **settings
):
    arguments = {
        "output_dir": str(folder / "out"),
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
    }
    if config is SFTConfig:
        arguments["max_length"] = 256
    student = tiny_llama(len(tokenizer), attention_dropout=0.1) if model is None else model()
    arguments = config(**arguments | settings)
    return trainer_class(student, args=arguments, train_dataset=rows, processing_class=tokenizer, **(more or {}))


def history(trainer, **arguments):
    """Loss and learning rate of every step."""
    trainer.train(**arguments)
    return [(entry["loss"], entry["learning_rate"]) for entry in trainer.state.log_history if "loss" in entry]


class Recorder(TrainerCallback):
    """The choice of each epoch, as it begins; add it after the callback that chooses."""

    def __init__(self, callback, look=lambda trainer: None):
        self.callback, self.look, self.choices, self.seen = callback, look, [], None

    def on_epoch_begin(self, *args, **kwargs):
        self.choices.append(self.callback.selected)
        self.seen = self.look(self.callback.trainer)


class Replay(torch.utils.data.Dataset, TrainerCallback):
    """A training set that shows these choices, one an epoch, to workers too: the oracle of `schedule="epoch"`."""

    def __init__(self, choices):
        self.choices, self.epoch = choices, torch.tensor(-1).share_memory_()

    def on_epoch_begin(self, *args, **kwargs):
        self.epoch += 1

    def __len__(self):
        return len(self.choices[0])

    def __getitem__(self, number):
        return self.choices[int(self.epoch.clamp(min=0))][number]

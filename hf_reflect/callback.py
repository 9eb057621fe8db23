"""The joint with the Trainer: the student about to be trained, as the trainer holds it, chooses its data."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback

from .errors import SettingsError
from .pairs import KEY_COLUMNS, SCORE_COLUMNS, require_columns
from .scoring import StudentScorer
from .selection import RULES, check_rule, decide, kept_indices

if TYPE_CHECKING:
    from trl import SFTTrainer


class SelectionCallback(TrainerCallback):
    """Let the student choose its training data, before the first step.

        trainer.add_callback(SelectionCallback(trainer))

    The trainer is built with all candidates as its `train_dataset` (from `to_training_ids`: row_id, variant, source,
    instruction, input, response, history, input_ids, labels). When `trainer.train()` is called, before dataloader,
    schedule and wrapped model exist, the student scores them and `trainer.train_dataset` becomes the rows that
    `select` keeps: losses, steps and learning rates are those of a trainer that was given these rows. Every process
    makes the same choice; random states and train/eval modes are as they were before.

    Args:
        trainer: an `SFTTrainer`, built with the candidates.
        rule, ifd_gate, r_ifd_gate, keep, seed: as for `hf_reflect.select`.
        schedule: "once", before training.
        template: as given to `to_training_ids`; compared with the first row's `input_ids`.
        rescore: False trusts the score columns that are there, which another student may have made.

    Attributes:
        candidates: the table the trainer was built with, scored; None before the choice.
        selected: the rows that are trained on; None before the choice.
        rows_cut: candidates of which something had to be cut for `max_length`.

    Raises:
        DataError: columns are missing; nothing passes the rule and its gates (with the numbers).
        SettingsError: `packing`, a streamed dataset, another template than the data's, unknown rule or schedule.
        RuntimeError: when training begins on other rows than the chosen ones.

    Source: arXiv 2402.10110, section 3.2.
    """

    def __init__(
        self,
        trainer: "SFTTrainer",
        rule: str = "paper",
        schedule: str = "once",
        ifd_gate: float | None = 1.0,
        r_ifd_gate: float | None = 1.0,
        keep: str | None = "reflected",
        seed: int = 0,
        template: str = "auto",
        rescore: bool = True,
    ):
        check_rule(rule, keep)
        if schedule != "once":
            raise SettingsError(f'`schedule` is "once", not {schedule!r}.')
        if trainer.args.packing:
            raise SettingsError(
                "`SelectionCallback` cannot choose among packed rows: several pairs share one. Set `packing=False` in "
                "the SFTConfig (`padding_free=True` with `max_length=None` saves the padding as well)."
            )
        if not isinstance(trainer.train_dataset, Dataset):
            raise SettingsError(
                f"`SelectionCallback` needs the candidates as a `datasets.Dataset`, not a "
                f"{type(trainer.train_dataset).__name__}: it scores all before it chooses."
            )
        needed = ("row_id", "variant", "instruction", "input", "response", "input_ids")
        require_columns(
            trainer.train_dataset.column_names,
            needed,
            "`SelectionCallback`",
            "Build the trainer with `to_training_ids(candidates, tokenizer)`.",
        )
        self.trainer = trainer
        self.rule, self.schedule, self.rescore = rule, schedule, rescore
        self.settings: dict[str, Any] = {"ifd_gate": ifd_gate, "r_ifd_gate": r_ifd_gate, "keep": keep, "seed": seed}
        self.scorer = StudentScorer(
            trainer.model, trainer.processing_class, template=template, max_length=trainer.args.max_length or 2048
        )
        self._check_template()
        self.candidates: Dataset | None = None
        self.selected: Dataset | None = None
        self._rows: Dataset | None = None  # as the dataloader should have them
        self._train = trainer.train
        trainer.train = self._choose_and_train

    @property
    def rows_cut(self) -> int:
        """Candidates of which something had to be cut for `max_length`."""
        return self.scorer.rows_cut

    def choose(self) -> Dataset:
        """Score and choose now, and give the trainer the chosen rows; `train` then takes them.

        All processes must call.
        """
        if self.selected is not None:
            return self.selected
        trainer = self.trainer
        prepared = trainer.train_dataset
        order = list(range(len(prepared)))
        if trainer.args.shuffle_dataset:
            # preparation has shuffled: undo it, choose in the table's order, shuffle what was
            # chosen as it would have been
            order = np.argsort(np.random.default_rng(trainer.args.seed).permutation(len(prepared))).tolist()
        candidates = prepared.select(order)
        if self.rescore:
            with _undisturbed(), _scorable(trainer):
                scores = self.scorer.score(candidates)
        else:
            needed = RULES[self.rule].needs
            require_columns(candidates.column_names, needed, f"The rule {self.rule!r} with `rescore=False`")
            scores = candidates
        decisions = decide(scores, self.rule, **self.settings)
        gates = {name: self.settings[name] for name in ("ifd_gate", "r_ifd_gate", "keep")}
        kept = kept_indices(scores, decisions, self.rule, **gates)
        self.candidates, self.selected = scores, scores.select(kept)
        chosen = prepared.select([order[index] for index in kept])
        self._rows = chosen.shuffle(seed=trainer.args.seed) if trainer.args.shuffle_dataset else chosen
        trainer.train_dataset = self._rows
        self._save()
        return self.selected

    def with_scores(self, dataset: Dataset) -> Dataset:
        """The same rows with the scores of this choice; null on versions that were not among the candidates.

        In:  row_id, variant, optionally source    Out: the same columns plus the six score columns
        """
        if self.candidates is None:
            raise SettingsError("Nothing is scored yet: call `choose()` or `trainer.train()` first.")
        scores = dict(zip(_keys(self.candidates), self.candidates.select_columns(list(SCORE_COLUMNS)), strict=True))
        rows = [scores.get(key, {}) for key in _keys(dataset)]
        result = dataset.remove_columns([name for name in SCORE_COLUMNS if name in dataset.column_names])
        feature = self.candidates.features["ifd"]
        for name in SCORE_COLUMNS:
            result = result.add_column(name, [row.get(name) for row in rows], feature=feature)
        return result

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop where a subclass or a patch went round `train`, and other rows than the chosen would be trained on."""
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if self._rows is not None and isinstance(dataset, Dataset) and len(dataset) == len(self._rows):
            running, chosen = (rows.with_format("arrow")["input_ids"][:] for rows in (dataset, self._rows))
            if running == chosen:
                return
        found = f"{len(dataset)} rows" if isinstance(dataset, Dataset) else f"a {type(dataset).__name__}"
        expected = "no choice was made" if self.selected is None else f"{len(self.selected)} rows were chosen"
        raise RuntimeError(
            f"Training would run on {found}, but {expected}: something called the training loop without "
            "`trainer.train()`, or replaced `trainer.train_dataset`. Call `callback.choose()` before, "
            "and leave the dataset alone."
        )

    def _choose_and_train(self, *args: Any, **kwargs: Any) -> Any:
        self.choose()
        return self._train(*args, **kwargs)

    def _check_template(self) -> None:
        """The first row's prompt must be the one that will be scored; its last id may merge with the answer."""
        row = self.trainer.train_dataset[0]
        prompt = self.scorer.template.forward(row).context[:-1]
        if list(row["input_ids"][: len(prompt)]) != prompt:
            found = self.trainer.processing_class.decode(row["input_ids"][: len(prompt) + 1])
            raise SettingsError(
                f"The candidates were tokenized with another template than {self.scorer.template.name!r}: their first "
                f"row begins {found[:120]!r}. Give the callback the template of the data: "
                "`SelectionCallback(trainer, template=...)`."
            )

    def _save(self) -> None:
        """`selection.json` in the output folder: what was chosen, by which rule, on whose scores."""
        assert self.selected is not None
        if not self.trainer.is_world_process_zero():
            return
        rows = {row_id: [variant, source] for row_id, variant, source in _keys(self.selected)}
        text = json.dumps(
            {
                "rule": self.rule,
                **self.settings,
                "template": self.scorer.template.name,
                "rescored": self.rescore,
                "rows": rows,
            }
        )
        folder = Path(self.trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "selection.json").write_text(text)


def _keys(dataset: Dataset) -> list[tuple[str, str, str]]:
    columns = [dataset[name][:] if name in dataset.column_names else [""] * len(dataset) for name in KEY_COLUMNS]
    return list(zip(*columns, strict=True))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Random states as before: one number drawn for scoring would change the order of the training data."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)


@contextmanager
def _scorable(trainer: "SFTTrainer") -> Iterator[None]:
    """The trainer's own model, ready for forward passes before training, and afterwards as if nothing had been.

    The bare model serves everywhere but under ZeRO-3, where its parameters are partitioned: there a temporary engine
    without optimizer gathers them.
    """
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        with _temporary_engine(trainer.accelerator, plugin, trainer.model), trainer.compute_loss_context_manager():
            yield
        return
    quantized = getattr(trainer.model, "quantization_method", None) is not None
    if not trainer.is_model_parallel and not quantized:
        trainer.model.to(trainer.args.device)
    with trainer.compute_loss_context_manager():
        yield


@contextmanager
def _temporary_engine(accelerator: Any, plugin: Any, model: torch.nn.Module) -> Iterator[None]:
    """ZeRO-3 hooks on the model's modules for the time of scoring, without an optimizer."""
    settings = plugin.hf_ds_config
    config, mismatches = settings.config, list(settings.mismatches)
    settings.config = {k: v for k, v in json.loads(json.dumps(config)).items() if k not in ("optimizer", "scheduler")}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    before = {(module, name): dict(getattr(module, name)) for module in model.modules() for name in hooks}
    try:
        engine = accelerator.prepare(model)
        yield
        engine.destroy()
    finally:
        accelerator.free_memory()
        settings.config, settings.mismatches = config, mismatches
        for (module, name), kept in before.items():  # some stay behind after `destroy`
            current = getattr(module, name)
            for key in [key for key in current if key not in kept]:
                del current[key]

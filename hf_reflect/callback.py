"""The joint with the Trainer: the student about to be trained, as the trainer holds it, chooses its data."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .columns import KEY_COLUMNS, SCORE_COLUMNS, require_columns
from .errors import DataError, SettingsError
from .scoring import StudentScorer, replace_scores
from .selection import RULES, check_rule, kept_positions

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
        lengths = pc.list_value_length(trainer.train_dataset.with_format("arrow")["input_ids"][:])
        self._longest = int(np.argmax(lengths.to_numpy()))
        self.scorer = StudentScorer(
            trainer.model,
            getattr(trainer.processing_class, "tokenizer", trainer.processing_class),
            template=template,
            max_length=trainer.args.max_length or pc.max(lengths).as_py(),
        )
        self._check_ids()
        self.candidates: Dataset | None = None
        self.selected: Dataset | None = None
        self._rows: Dataset | None = None  # as the dataloader should have them
        if isinstance(getattr(trainer.train, "__self__", None), SelectionCallback):
            raise SettingsError("The trainer has a `SelectionCallback` already: build it anew for another choice.")
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
        candidates = self._in_order()
        if self.rescore:
            with _undisturbed(), _scorable(self.trainer):
                scores = self.scorer.score(candidates)
        else:
            needed = RULES[self.rule].needs
            require_columns(candidates.column_names, needed, f"The rule {self.rule!r} with `rescore=False`")
            scores = candidates
        kept = kept_positions(scores, self.rule, **self.settings)
        self.candidates = scores
        return self._take(scores, kept)

    def _in_order(self) -> Dataset:
        """The candidates in the order of the table that the trainer was built with."""
        args, prepared = self.trainer.args, self.trainer.train_dataset
        if not args.shuffle_dataset:
            return prepared
        return prepared.select(np.argsort(np.random.default_rng(args.seed).permutation(len(prepared))))

    def _take(self, candidates: Dataset, kept: list[int]) -> Dataset:
        """Train on these candidates, shuffled as they would have been had the trainer been given them."""
        args = self.trainer.args
        self.selected = candidates.select(kept)
        self._rows = self.selected.shuffle(seed=args.seed) if args.shuffle_dataset else self.selected
        self.trainer.train_dataset = self._rows
        if self.trainer.is_world_process_zero():
            self._write(Path(args.output_dir))
        return self.selected

    def with_scores(self, dataset: Dataset) -> Dataset:
        """The same rows with the scores of this choice; null on versions that were not among the candidates.

        In:  row_id, variant, optionally source    Out: the same columns plus the six score columns
        """
        if self.candidates is None:
            raise SettingsError("Nothing is scored yet: call `choose()` or `trainer.train()` first.")
        scores = dict(zip(_keys(self.candidates), self.candidates.select_columns(list(SCORE_COLUMNS)), strict=True))
        rows = [scores.get(key, {}) for key in _keys(dataset)]
        return replace_scores(dataset, {name: [row.get(name) for row in rows] for name in SCORE_COLUMNS})

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

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the choice with the checkpoint: the student scored again in mid-training would choose otherwise."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.selected is not None and state.is_world_process_zero and folder.is_dir():
            self._write(folder)

    def _choose_and_train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        resume = resume_from_checkpoint
        folder = get_last_checkpoint(self.trainer.args.output_dir) if resume is True else resume
        if self.selected is None and folder and (Path(folder) / "selection.json").exists():
            self._restore(Path(folder) / "selection.json")
        self.choose()
        return self._train(resume_from_checkpoint, *args, **kwargs)

    def _restore(self, path: Path) -> None:
        """Take the choice that a checkpoint was trained on."""
        written = json.loads(path.read_text())
        now = self._settings()
        if other := next((name for name in now if written.get(name) != now[name]), None):
            raise SettingsError(
                f"The checkpoint was trained on a choice with {other}={written.get(other)!r}, and this callback has "
                f"{now[other]!r}. Resume with the same settings, or train anew."
            )
        candidates = self._in_order()
        rows = {(row_id, *version) for row_id, version in written["rows"].items()}
        kept = [position for position, key in enumerate(_keys(candidates)) if key in rows]
        if len(kept) != len(rows):
            raise DataError(
                f"The checkpoint was trained on {len(rows)} chosen rows, of which the candidates hold {len(kept)}. "
                "Resume with the same candidates, or train anew."
            )
        self._take(candidates, kept)

    def _check_ids(self) -> None:
        """The ids to train on must be those that will be scored: the same template, cut at the same length.

        Looked at are the first row and the longest. A prompt's last id is left out: it may merge with the answer.
        """
        rows, template = self.trainer.train_dataset, self.scorer.template
        longest = rows[self._longest]
        for row in (rows[0], longest):
            expected = template.forward(row)
            prompt = expected.context[:-1]
            if list(row["input_ids"][: len(prompt)]) == prompt:
                continue
            if expected.cut:
                raise SettingsError(self._other_length())
            found = template.tokenizer.decode(row["input_ids"][: len(prompt) + 1])
            raise SettingsError(
                f"The candidates were tokenized with another template than {template.name!r}: their first row begins "
                f"{found[:120]!r}. Give the callback the template of the data: "
                "`SelectionCallback(trainer, template=...)`."
            )
        if len(longest["input_ids"]) == self.trainer.args.max_length and longest["input_ids"][-1] != template.eos:
            raise SettingsError(self._other_length())

    def _other_length(self) -> str:
        return (
            f"The trainer cuts rows at max_length={self.trainer.args.max_length}, but the candidates were made for "
            "another length: they would be scored on other ids than they are trained on. Give `to_training_ids` and "
            "`SFTConfig` the same `max_length`."
        )

    def _settings(self) -> dict[str, Any]:
        return {"rule": self.rule, **self.settings, "template": self.scorer.template.name, "rescored": self.rescore}

    def _write(self, folder: Path) -> None:
        """`selection.json`: what was chosen, by which rule, on whose scores."""
        assert self.selected is not None
        rows = {row_id: [variant, source] for row_id, variant, source in _keys(self.selected)}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "selection.json").write_text(json.dumps({**self._settings(), "rows": rows}))


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
        with _temporary_engine(trainer.accelerator, plugin, trainer.model), trainer.accelerator.autocast():
            yield
        return
    quantized = getattr(trainer.model, "quantization_method", None) is not None
    if not trainer.is_model_parallel and not quantized:
        trainer.model.to(trainer.args.device)
    with trainer.accelerator.autocast():  # the precision of training
        yield


@contextmanager
def _temporary_engine(accelerator: Any, plugin: Any, model: torch.nn.Module) -> Iterator[None]:
    """ZeRO-3 hooks on the model's modules for the time of scoring, without an optimizer."""
    settings = plugin.hf_ds_config
    config, mismatches = settings.config, list(settings.mismatches)
    settings.config = {k: v for k, v in json.loads(json.dumps(config)).items() if k not in ("optimizer", "scheduler")}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    before = {(module, name): dict(getattr(module, name)) for module in model.modules() for name in hooks}
    engine = None
    try:
        engine = accelerator.prepare(model)
        yield
    finally:
        if engine is not None:
            engine.destroy()
        accelerator.free_memory()
        settings.config, settings.mismatches = config, mismatches
        for (module, name), kept in before.items():  # some stay behind after `destroy`
            current = getattr(module, name)
            for key in [key for key in current if key not in kept]:
                del current[key]

"""The joint with the Trainer: the student about to be trained, as the trainer holds it, chooses its data.

checks.py    what the trainer and its rows must be
view.py      the training set whose versions change between epochs
student.py   the trainer's model, lent for scoring and given back as it was
record.py    what was chosen, on disk
numbers.py   what the choice did, for `report_to` and for people
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ..columns import SCORE_COLUMNS, require_columns
from ..errors import DataError, SettingsError
from ..pairs import keys_of
from ..scoring import StudentScorer, replace_scores
from ..scoring.processes import Processes
from ..selection import RULES, Decision, check_schedule, check_settings, decide, kept_positions
from . import record
from .checks import check_ids, check_trainer, lengths_of, same_rows
from .numbers import Figures, as_table, numbers_of, tell
from .student import Untouched, lent
from .view import CandidateView

if TYPE_CHECKING:
    from transformers import Trainer
    from trl import SFTTrainer

__all__ = ["CandidateView", "Figures", "SelectionCallback"]


class SelectionCallback(TrainerCallback):
    """Let the student choose its training data: before the first step, or again at every epoch.

        trainer.add_callback(SelectionCallback(trainer))

    The trainer is built with all candidates as its `train_dataset` (row_id, variant, source, instruction, input,
    response, history, and what it trains on: `to_training_ids` makes all of it). When `trainer.train()` is called,
    before dataloader, schedule and wrapped model exist, the student scores them and `trainer.train_dataset` becomes
    the rows that `select` keeps: losses, steps and learning rates are those of a trainer that was given these rows.
    Every process makes the same choice; random states and train/eval modes are as they were before.

    The choice is saved with each checkpoint and taken up again on resume. `selection.json`, there and in the output
    folder, lists row_id → variant, source; what the choice did goes to `report_to` too.

    Args:
        trainer: an `SFTTrainer`, or a `transformers.Trainer` over tokenised data, built with the candidates.
        rule, ifd_gate, r_ifd_gate, keep, seed: as for `hf_reflect.select`.
        schedule: "once", before training; "epoch": the first choice says which rows are kept, and at each later
            epoch's start the student, as it then is, chooses each row's version again. A row of which none passes
            keeps the version it has.
        template: as the data was tokenised with; compared with the first row's `input_ids`.
        rescore: False trusts the score columns that are there for the choice before training; another student may have
            made them.
        tokens_per_batch: of the scorer; "auto" takes a training batch's tokens on a GPU, so that scoring needs less
            memory than training.
        checkpoint_dir: a folder that all processes see, for the scores before training: after a crash the same run
            goes on scoring where it ended.

    Attributes:
        candidates: the table the trainer was built with, scored; None before the choice, and after a resume.
        selected: the rows that are trained on; None before the choice.
        rows_cut: candidates of which something had to be cut for `max_length`.
        seconds: that scoring before training took.

    Raises:
        DataError: columns are missing; nothing passes the rule and its gates (with the numbers); the processes hold
            different candidates; a checkpoint was trained on other candidates, or does not say on which.
        SettingsError: `packing`, a streamed dataset, another template than the data's, unknown rule or schedule, a
            student that is no causal language model, a checkpoint of other settings.
        RuntimeError: when training begins on other rows than the chosen ones; when processes chose differently.

    Source: arXiv 2402.10110, section 3.2.
    """

    def __init__(
        self,
        trainer: "SFTTrainer | Trainer",
        rule: str = "paper",
        schedule: str = "once",
        ifd_gate: float | None = 1.0,
        r_ifd_gate: float | None = 1.0,
        keep: str | None = "reflected",
        seed: int = 0,
        template: str = "auto",
        rescore: bool = True,
        tokens_per_batch: int | str = "auto",
        checkpoint_dir: str | os.PathLike | None = None,
    ):
        settings = check_settings(rule, ifd_gate, r_ifd_gate, keep, seed)
        check_schedule(schedule)
        check_trainer(trainer)
        if isinstance(getattr(trainer.train, "__self__", None), SelectionCallback):
            raise SettingsError("The trainer has a `SelectionCallback` already: build it anew for another choice.")
        dataset = trainer.train_dataset
        given = [name for name in RULES[rule].needs if not rescore or name not in SCORE_COLUMNS]
        require_columns(
            dataset.column_names,
            given,
            f"The rule {rule!r}{'' if rescore else ' with `rescore=False`'}",
            "Add it to the candidates before the trainer is built.",
        )
        self.trainer, self.template, self.settings = trainer, template, settings
        self.rule, self.schedule, self.rescore = rule, schedule, rescore
        self.max_length = getattr(trainer.args, "max_length", None) or int(lengths_of(dataset).max())
        self.tokens_per_batch = self._within_training(tokens_per_batch)
        self.checkpoint_dir = checkpoint_dir
        self._auto_tokens = tokens_per_batch == "auto"
        self.scorer = self._scorer()
        check_ids(dataset, self.scorer.template, self.max_length, told=trainer.is_world_process_zero())
        self.candidates: Dataset | None = None
        self.selected: Dataset | None = None
        self.seconds = 0.0
        self._table: Dataset | None = None  # the candidates in their order
        self._described: dict[str, Any] = {}  # how many, and which
        self._places: list[int] = []  # the chosen versions' in it, one a kept row, in row order
        self._first: list[record.Key] = []  # the choice that decided which rows are kept
        self._rows: Dataset | CandidateView | None = None  # as the dataloader should have them
        self._untold: dict[str, float] = {}  # numbers of a choice that `report_to` has not got yet
        self._trained = self._resuming = False
        self._untouched = Untouched(trainer)
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
        if self.selected is None:
            table, started = self._in_order(), time.monotonic()
            scored = self._scored(table, self.checkpoint_dir) if self.rescore else table
            self.seconds = time.monotonic() - started
            self.candidates = scored  # also where nothing of it is kept
            places = kept_positions(scored, self.rule, **self.settings)
            originals = [place for place, variant in enumerate(scored["variant"][:]) if variant == "original"]
            self._take(places, table)
            self._tell(scored, decide(scored, self.rule, **self.settings), originals, places)
        assert self.selected is not None
        return self.selected

    def with_scores(self, dataset: Dataset) -> Dataset:
        """The same rows with the scores of this choice; null on versions that were not among the candidates.

        In:  row_id, variant, optionally source    Out: the same columns plus the six score columns
        """
        if self.candidates is None:
            raise SettingsError("Nothing is scored yet: call `choose()` or `trainer.train()` first.")
        places = {key: place for place, key in enumerate(keys_of(self.candidates))}
        wanted = [places.get(key) for key in keys_of(dataset)]
        there = {name: self.candidates[name][:] for name in SCORE_COLUMNS if name in self.candidates.column_names}
        nothing: list[float | None] = [None] * len(self.candidates)
        scores = {name: there.get(name, nothing) for name in SCORE_COLUMNS}
        return replace_scores(
            dataset, {name: [None if n is None else some[n] for n in wanted] for name, some in scores.items()}
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop where a subclass or a patch went round `train`, and other rows than the chosen would be trained on."""
        dataset: Any = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if self._rows is None or not same_rows(dataset, self._rows):
            found = f"{len(dataset)} rows" if hasattr(dataset, "__len__") else f"a {type(dataset).__name__}"
            chosen = None if self.selected is None else len(self.selected)
            others = "others " if hasattr(dataset, "__len__") and len(dataset) == chosen else ""
            expected = "no choice was made" if chosen is None else f"{others}{chosen} rows were chosen"
            raise RuntimeError(
                f"Training would run on {found}, but {expected}: something called the training loop without "
                "`trainer.train()`, or replaced `trainer.train_dataset`. Call `callback.choose()` before, "
                "and leave the dataset alone."
            )
        self._trained, self._resuming = True, state.global_step > 0
        if isinstance(self._rows, CandidateView):  # a sampler that groups by length has seen the first choice
            self._rows.show(self._shuffled(self._places))
        self._log(state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose versions again, with `schedule="epoch"`: at each epoch's start but the first."""
        resuming, self._resuming = self._resuming, False
        if self.schedule == "once" or state.global_step == 0:
            return
        steps = -(-len(kwargs["train_dataloader"]) // args.gradient_accumulation_steps)
        if not resuming or state.global_step % steps == 0:  # else in the middle of an epoch, whose choice was restored
            self._choose_versions()
            self._log(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the choice with the checkpoint: the student scored again in mid-training would choose otherwise."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.selected is not None and args.should_save and folder.is_dir():
            record.write(folder, self._record())

    def _choose_and_train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        trainer, folder = self.trainer, resume_from_checkpoint
        if folder is True:
            there = Path(trainer.args.output_dir).is_dir()
            folder = get_last_checkpoint(trainer.args.output_dir) if there else None
        if resume_from_checkpoint is True and folder is None:
            raise DataError(f"There is no checkpoint in {trainer.args.output_dir} to resume from: train anew.")
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        if folder is None or folder is False:
            self.choose()
        else:
            self._resume(Path(folder))
        self._undo_evaluation()
        return self._train(resume_from_checkpoint, *args, **kwargs)

    def _undo_evaluation(self) -> None:
        """A model that `evaluate()` prepared before the training would be trained wrongly, without a word."""
        if not self._trained and not self._untouched.is_so:
            self._untouched.restore()

    # ---- Choosing

    def _in_order(self) -> Dataset:
        """The candidates in the order of the table that the trainer was built with; the same on all processes."""
        if self._table is not None:
            return self._table
        args, prepared = self.trainer.args, self.trainer.train_dataset.with_format(None)
        if getattr(args, "shuffle_dataset", False):
            prepared = prepared.select(np.argsort(np.random.default_rng(args.seed).permutation(len(prepared))))
        self._described = record.describe(prepared)
        all_described = Processes().gather(self._described)
        for rank, described in enumerate(all_described):
            if described != all_described[0]:
                raise DataError(
                    f"Process {rank} holds other candidates ({described}) than process 0 ({all_described[0]}). Let "
                    "all processes read the same table, in the same order."
                )
        return prepared

    def _scored(self, rows: Dataset, checkpoint_dir: str | os.PathLike | None = None) -> Dataset:
        """These rows with the student's scores as it is now."""
        self._undo_evaluation()
        scorer = self._scorer()
        with lent(self.trainer, training=self._trained):
            scored = scorer.score(rows, checkpoint_dir)
        if self.candidates is None:
            self.scorer = scorer
        # another limit, say by the memory that is free after a resume, would round otherwise
        self.tokens_per_batch = min(Processes().gather(scorer.tokens_in_a_pass), default=self.tokens_per_batch)
        return scored

    def _scorer(self) -> StudentScorer:
        """A new one each time, so that what it finds out on the way is found out alike in a resumed run."""
        trainer = self.trainer
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        return StudentScorer(
            trainer.model,
            tokenizer,
            template=self.template,
            max_length=self.max_length,
            tokens_per_batch=self.tokens_per_batch,
        )

    def _within_training(self, tokens: int | str) -> int | str:
        """Tokens of a forward pass for which training has the memory too; on a CPU the scorer knows better."""
        if tokens != "auto" or self.trainer.args.device.type == "cpu":
            return tokens
        return self.trainer.args.per_device_train_batch_size * self.max_length

    def _choose_versions(self) -> None:
        """Each kept row's version anew; a row of which none passes keeps the one it has."""
        assert self._table is not None and self.selected is not None
        kept = dict(zip(self.selected["row_id"][:], self._places, strict=True))
        places = [place for place, row_id in enumerate(self._table["row_id"][:]) if row_id in kept]
        ids = [name for name in ("input_ids", "labels") if name in self._table.column_names]
        scored = self._scored(self._table.select(places).remove_columns(ids))
        decisions = decide(scored, self.rule, **self.settings)
        for decision in decisions:
            if decision.kept and decision.position is not None:
                kept[decision.row_id] = places[decision.position]
        before, after = self._places, list(kept.values())
        self._take(after, self._table)
        here = {place: number for number, place in enumerate(places)}
        self._tell(scored, decisions, [here[place] for place in before], [here[place] for place in after])

    def _take(self, places: Sequence[int], table: Dataset) -> None:
        """Train on these versions; all processes must have chosen the same."""
        selected = table.select(places)
        keys = keys_of(selected)
        if self.schedule == "epoch" and not isinstance(self._rows, CandidateView):
            self._first = keys
        checksums = Processes().gather(record.checksum([*self._first, *keys]))
        if other := [rank for rank, found in enumerate(checksums) if found != checksums[0]]:
            raise RuntimeError(
                f"The processes chose differently ({', '.join(checksums)} by rank; {other} differ from 0) and would "
                "train on different data. Their rules, gates, seeds or scores are not the same: please report this "
                "with `selection.json` if one script started them all."
            )
        self._table, self.selected, self._places, self._checksum = table, selected, list(places), checksums[0]
        if self.schedule == "once":
            args = self.trainer.args
            self._rows = selected.shuffle(seed=args.seed) if getattr(args, "shuffle_dataset", False) else selected
        elif isinstance(self._rows, CandidateView):
            self._rows.show(self._shuffled(places))
        else:
            self._rows = CandidateView(table, self._shuffled(places))
        self.trainer.train_dataset = self._rows
        if self.trainer.args.should_save:
            record.write(Path(self.trainer.args.output_dir), self._record())

    def _shuffled(self, places: Sequence[int]) -> list[int]:
        """As `shuffle_dataset` would have ordered the chosen rows, had the trainer been given them."""
        args = self.trainer.args
        if not getattr(args, "shuffle_dataset", False):
            return list(places)
        return np.asarray(places)[np.random.default_rng(args.seed).permutation(len(places))].tolist()

    # ---- Saving and resuming

    def _settings(self) -> dict[str, Any]:
        """What a choice depends on, the student excepted."""
        return {
            "rule": self.rule,
            "schedule": self.schedule,
            **self.settings,
            "template": self.scorer.template.name,
            "max_length": self.max_length,
            "candidates": self._described,
        }

    def _record(self) -> dict[str, Any]:
        """`selection.json`: what was chosen, by which rule, on whose scores."""
        assert self.selected is not None
        first = {"first": record.rows_of(self._first)} if self.schedule == "epoch" else {}
        rows = record.rows_of(keys_of(self.selected))
        return {
            **self._settings(),
            "rescored": self.rescore,
            "tokens_per_batch": self.tokens_per_batch,
            **first,
            "rows": rows,
        }

    def _resume(self, checkpoint: Path) -> None:
        """Take the choice that a checkpoint was trained on."""
        processes = Processes()
        found: tuple[Any, ...] = (None, None, None)
        if processes.rank == 0:
            try:
                found = (*record.read(checkpoint, Path(self.trainer.args.output_dir)), None)
            except DataError as error:
                found = (None, None, error)
        written, checksum, problem = processes.gather(found)[0]
        if problem is not None:
            raise problem
        if written is not None:
            table = self._in_order()
            record.compare(written, self._settings(), checkpoint)
            if self._auto_tokens:
                self.tokens_per_batch = written.get("tokens_per_batch", self.tokens_per_batch)
            first, rows = (record.places_of(written.get(name, {}), table) for name in ("first", "rows"))
            self._rows = None
            if first:
                self._take(first, table)
            self._take(rows, table)
            if isinstance(self._rows, CandidateView):
                self._rows.show(self._shuffled(first))  # to a sampler that groups by length; see `on_train_begin`
            self._untold = {}
            return
        missing = f"{checkpoint} has no {record.SELECTION}, so it does not say on which rows it was trained"
        if checksum is None or self.schedule != "once":
            raise DataError(
                f"{missing}{'' if checksum is None else ', and a student in mid-training cannot choose them again'}. "
                f"Put the file there that was saved with it, resume from a checkpoint that has one, or train anew."
            )
        self.choose()  # by the student as the trainer was built with it, before the checkpoint is loaded
        if self._checksum != checksum:
            raise DataError(
                f"{missing}; choosing again gave another choice ({self._checksum}, not {checksum}). Put the file "
                "there that was saved with it, resume with the same student, candidates and settings, or train anew."
            )

    # ---- Telling

    def _tell(
        self, scored: Dataset, decisions: Sequence[Decision], before: Sequence[int], after: Sequence[int]
    ) -> None:
        self._untold = numbers_of(scored, decisions, before, after, again=self._trained)
        if self.trainer.is_world_process_zero():
            print(as_table(self._untold, f"The student chose by the rule {self.rule!r}:"), flush=True)

    def _log(self, state: Any) -> None:
        """Numbers to `report_to`; the choice's checksum to every checkpoint's trainer_state.json."""
        state.stateful_callbacks[record.STATE] = {"choice": self._checksum}
        if self._untold:
            tell(self.trainer, {f"selection/{name}": number for name, number in self._untold.items()})
        self._untold = {}

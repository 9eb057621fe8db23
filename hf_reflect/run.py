"""One run of a recipe: its folder, who works and who waits, and what it says at the end."""

import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets import Dataset
from filelock import FileLock, Timeout

from .columns import is_usable
from .errors import DataError, SettingsError
from .files import read_object, write_whole
from .pairs import PAIR_FEATURES, WAITING, error_code, keys_of

T = TypeVar("T")
_POLL = 0.2  # seconds
_SHARED_WITHIN = 60.0  # seconds until a shared file system must show a file of rank 0


class Run:
    """The folder of a run: tables, each with the settings that made it, and `summary.json`.

    Rank 0 works while the others wait by looking for a file, never in a collective: asking a teacher may take hours,
    and a process group gives up after minutes. What is recorded:

        summary.json   hash and settings (data, teacher, student, selection), then what happened
        pairs/         only with `preselect_share` by a score: the dataset, scored
        instructions/  only with `reflect: selective`: originals and new instructions, with the scores of the choice
        candidates/    all versions; its made_with.json holds the settings `data` and `teacher`, and with
                       `reflect: selective` whom they were made for, as `reflect`
        selected/      what the student kept; likewise with `student` and `selection`
        statistics.json, report.html   what happened to the data
        .lock, .work/  who runs here; the rows as trained on, and who is ready; gone at the end

    Args:
        folder: where all of it lies; shared by all nodes.
        overwrite: whether a table that was made with other settings may be replaced. A ledger never is.
    """

    GUARDS = {
        "pairs": ("pairs",),
        "instructions": ("data", "teacher", "reflect"),
        "candidates": ("data", "teacher", "reflect"),
        "selected": ("student", "selection"),
    }

    def __init__(self, folder: str, overwrite: bool = False):
        import transformers
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        self.folder, self.overwrite = Path(folder), overwrite
        self.work = self.folder / ".work"
        self.state = PartialState()
        self.is_first = self.state.is_main_process
        if self.state.num_processes != (launched := int(os.environ.get("WORLD_SIZE", "1"))):
            raise SettingsError(
                f"{launched} processes were launched, but each runs alone: on a CPU add `--use_cpu true`; otherwise "
                "check the accelerate configuration."
            )
        # Ready files carry the launch's own id: those of an earlier launch mean nothing.
        launch = [uuid.uuid4().hex if self.is_first else None]
        if self.state.num_processes > 1:
            broadcast_object_list(launch)
        self.launch = launch[0]
        self.summary: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}  # of rank 0, to be saved with the candidates
        self._settings: dict[str, dict[str, Any]] = {}  # of this launch, by section
        # one lock a process: a run that an error ended in this very one, a notebook, does not keep the next one out
        self._lock = FileLock(self.folder / ".lock", is_singleton=True)
        if self.is_first:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock.acquire(timeout=0)
                shutil.rmtree(self.work, ignore_errors=True)
                self.work.mkdir()
                for table in self.GUARDS:  # a kill between the two renames of `save`
                    if (old := self.folder / f".{table}.old").exists() and not (self.folder / table).exists():
                        old.rename(self.folder / table)
            except Timeout as error:
                raise SettingsError(f"Another run is using {self.folder}. Wait for it, or name another.") from error
            except OSError as error:
                raise SettingsError(
                    f"The output folder {self.folder} cannot be used: {error}. Name another."
                ) from error
        else:  # one bar of each kind on the screen
            datasets.disable_progress_bars()
            transformers.utils.logging.disable_progress_bar()
        self.first("start", lambda: None, within=_SHARED_WITHIN)

    def first(self, name: str, work: Callable[[], T], within: float | None = None) -> T:
        """Rank 0 does `work`, the others wait for it; all get its result, which must fit into JSON."""
        ready = self.work / f"{name}.{self.launch}.json"
        if self.is_first:
            datasets.disable_caching()  # what one rank computes is saved under its own name
            try:
                result = work()
            finally:
                datasets.enable_caching()
            write_whole(ready, json.dumps(result))
            return result
        started = time.monotonic()
        while not ready.exists():
            if within is not None and time.monotonic() - started > within:
                # said by this rank, since rank 0 does not know
                print(
                    f"{self.folder} is not shared between the nodes: put `output_dir` on a shared disk.",
                    file=sys.stderr,
                )
                sys.exit(1)
            time.sleep(_POLL)
        return json.loads(ready.read_text())

    def has(self, table: str) -> bool:
        """Whether the folder has this table."""
        return (self.folder / table).exists()

    def holds(self, table: str, **settings: dict[str, Any] | None) -> bool:
        """Rank 0: whether the folder's table was made with these settings, by section; None: without that section.

        Raises:
            SettingsError: it was made with others, and `overwrite` is off.
        """
        self._settings |= {section: value for section, value in settings.items() if value is not None}
        if not self.has(table):
            return False
        if (difference := self._first_difference(table, settings)) is None:
            return True
        section, words = difference
        if not self.overwrite:
            raise SettingsError(
                f"{self.folder / table} holds the results of another run: {words}.\nName another `output_dir`, "
                "or replace them with `--overwrite true`: replies stay in the ledger, only new chats are asked."
            )
        self.drop(next(name for name, sections in self.GUARDS.items() if section in sections))
        return False

    def require(self, table: str, **settings: dict[str, Any] | None) -> None:
        """Rank 0: raise a SettingsError if the folder's table, which this stage cannot make, was made with others."""
        if self.has(table) and (difference := self._first_difference(table, settings)):
            raise SettingsError(
                f"{self.folder / table} was made for another choice: {difference[1]}.\nChoose as it was made for, or "
                "make it anew with `--stage recycle --overwrite true`: replies stay in the ledger."
            )

    def _first_difference(self, table: str, settings: dict[str, dict[str, Any] | None]) -> tuple[str, str] | None:
        """Its section, and what to say."""
        made_with = self.settings_of(table)
        for section in self.GUARDS[table]:
            if section in settings:
                before, now = made_with.get(section, {}), settings[section] or {}
                for key in {**before, **now}:
                    if before.get(key) != now.get(key):
                        return section, _difference(section, key, before.get(key), now.get(key))
        return None

    def note(self, **sections: Any) -> None:
        """Put something into the summary; only rank 0's is written."""
        self.summary |= sections

    def drop(self, table: str) -> None:
        """Rank 0: remove a table, and what was made from it."""
        shutil.rmtree(self.folder / table, ignore_errors=True)
        self._drop_made_from(table)

    def _drop_made_from(self, table: str) -> None:
        tables = list(self.GUARDS)
        for name in tables[tables.index(table) + 1 :]:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def save(self, table: str, dataset: Dataset, **notes: Any) -> None:
        """Rank 0: write a table with the settings that made it, whole or not at all; what was made from it goes.

        `notes` stay with it: `source`, the rows that were read and left out; `costs` by stage.
        """
        settings = {name: value for name, value in self._settings.items() if name in self.GUARDS[table]}
        made_with = self.settings_of(table) | settings | notes
        part, old = self.folder / f".{table}.part", self.folder / f".{table}.old"
        for folder in (part, old):
            shutil.rmtree(folder, ignore_errors=True)
        dataset.save_to_disk(part)
        (part / "made_with.json").write_text(json.dumps(made_with))
        self._drop_made_from(table)
        if (self.folder / table).exists():
            (self.folder / table).rename(old)
        part.rename(self.folder / table)
        shutil.rmtree(old, ignore_errors=True)

    def settings_of(self, table: str) -> dict[str, dict[str, Any]]:
        """What a table was made with, by section; and the notes that were saved with it."""
        return read_object(self.folder / table / "made_with.json", absent={})

    def load(self, table: str) -> Dataset:
        """A table of this run, the same on all ranks."""
        if not self.has(table):
            raise DataError(f"{self.folder / table} does not exist: run the stage that makes it first.")
        return Dataset.load_from_disk(self.folder / table)

    def training_rows(self, make: Callable[[], Dataset], name: str = "rows") -> Dataset:
        """A table that rank 0 makes for a Trainer of all ranks; its caches stay out of the run's tables."""
        self.first(f"training_{name}", lambda: make().save_to_disk(self.work / name))
        return Dataset.load_from_disk(self.work / name)

    def finish(self, then: Callable[[], None]) -> None:
        """Rank 0 writes the summary and does what is to be done `then`; all ranks leave together."""
        self.first("summary", self._summarise)
        self.first("then", then)
        self.close()

    def close(self) -> None:
        """All ranks leave together, and nothing of the launch stays behind."""
        self.state.wait_for_everyone()
        if self.is_first:
            shutil.rmtree(self.work, ignore_errors=True)
            self._lock.release(force=True)
        self.state.destroy_process_group()

    def _summarise(self) -> None:
        """`summary.json`, atomically. Its hash covers the settings of data, teacher, student and selection."""
        tables = ("candidates", "selected")  # whose settings cover those of instructions/
        settings = {
            name: value
            for table in tables
            for name, value in self.settings_of(table).items()
            if name in self.GUARDS[table]
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        source = {"source": found} if (found := self.settings_of("candidates").get("source")) else {}
        self.summary = {"hash": digest, "settings": settings, **source, **self.summary, "costs": self.costs()}
        write_whole(self.folder / "summary.json", json.dumps(self.summary, indent=2, ensure_ascii=False))

    def costs(self) -> dict[str, dict[str, float]]:
        """What each stage took; the teacher's by all replies behind the tables, whenever they were asked for."""
        costs: dict[str, dict[str, float]] = {}
        for table in self.GUARDS:
            for stage, numbers in self.settings_of(table).get("costs", {}).items():
                sums = costs.setdefault(stage, {})
                for name, number in numbers.items():
                    sums[name] = sums.get(name, 0) + number
        if training := self.summary.get("training"):
            costs["training"] = {name: training[name] for name in ("seconds", "steps") if training[name] is not None}
        return costs


def _difference(section: str, key: str, before: Any, now: Any) -> str:
    if key == "content" or (section, key) == ("selection", "candidates"):
        return f"the rows of {'the dataset' if section in ('data', 'pairs') else 'the candidates'} have changed"
    if (section, key) == ("reflect", "order"):
        return f"`reflect` was {before or 'all'!r} and is now {now or 'all'!r}"
    return f"`{section}.{key}` was {before!r} and is now {now!r}"


def content_digest(dataset: Dataset) -> str:
    """Of what the table says, whatever the scores: its ids, texts, history and errors, in order."""
    digest = hashlib.sha256()
    names = [name for name in PAIR_FEATURES if name in dataset.column_names]
    for batch in dataset.select_columns(names).with_format("arrow").iter(10_000):
        for row in batch.to_pylist():
            digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def weights_digest(model: str) -> str | None:
    """Of a local model's weight files: sizes and last MiB, which training changes; None for one on the Hub."""
    files = (
        sorted(p for p in Path(model).glob("*") if p.suffix in (".safetensors", ".bin"))
        if Path(model).is_dir()
        else []
    )
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 2**20, 0))
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read())
    return digest.hexdigest()[:16] if files else None


def describe_student(model: Any, training: Any, template: str) -> dict[str, Any]:
    """What a choice depends on: of TRL's ModelConfig and SFTConfig, the template, and a digest of local weights."""
    return {
        "model": model.model_name_or_path,
        "revision": model.model_revision,
        "dtype": model.dtype,
        "template": template,
        "max_length": training.max_length,
        "bf16": training.bf16,
        "load_in_4bit": model.load_in_4bit,
        "load_in_8bit": model.load_in_8bit,
        "weights": weights_digest(model.model_name_or_path),
    }


def is_complete(candidates: Dataset) -> bool:
    """Whether no version waits for the teacher, who failed or whose budget was used up."""
    return not any(error_code(error) in WAITING for error in candidates["error"][:])


def describe_candidates(candidates: Dataset) -> dict[str, Any]:
    """rows, versions, made (rewrites asked for and usable), unusable by error code."""
    variants, codes, usable = Counter(candidates["variant"][:]), Counter[str](), 0
    columns = (candidates[name][:] for name in ("variant", "instruction", "response", "error"))
    for variant, instruction, response, error in zip(*columns, strict=True):
        if is_usable(instruction, response):
            usable += variant != "original"
        else:
            codes[error_code(error) or "unknown"] += 1
    return {
        "rows": variants["original"],
        "versions": len(candidates),
        "rewrites_usable": usable,
        "unusable": dict(codes.most_common()),
    }


def describe_selected(selected: Dataset, rows_cut: int | None = None) -> dict[str, Any]:
    """rows, their number by variant, a digest of which were kept, how many candidates were cut to fit."""
    keys = sorted(keys_of(selected))
    return {
        "rows": len(selected),
        "by_variant": dict(Counter(selected["variant"]).most_common()),
        "keys": hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16],
        **({"cut": rows_cut} if rows_cut is not None else {}),
    }


def describe_training(trainer: Any) -> dict[str, Any]:
    """steps, first and last logged loss, and the launch as seen from inside."""
    import torch

    history = trainer.state.log_history
    losses = [entry[name] for name in ("loss", "train_loss") for entry in history if name in entry]
    losses = losses[:-1] or losses  # the mean over all steps only where no step was logged
    backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else None
    return {
        "steps": trainer.state.global_step,
        "seconds": next((entry["train_runtime"] for entry in history if "train_runtime" in entry), None),
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "backend": backend,
        "model_class": type(trainer.model_wrapped).__name__,
        "partitioned": any(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters()),
    }


def print_estimate(estimate: dict[str, float]) -> None:
    """What recycling would take, for people."""
    lines = {
        "calls": f"{estimate['calls']:,} to ask, {estimate['reused']:,} in the ledger",
        "tokens": tokens_of(estimate),
        "cost": cost_of(estimate),
    }
    print("\n" + "\n".join(f"  {name:<6}  {value}" for name, value in lines.items()) + "\n", flush=True)


def tokens_of(estimate: dict[str, float]) -> str:
    """The tokens of an estimate, for people."""
    return f"{estimate['prompt_tokens']:,} tokens asked, {estimate['completion_tokens']:,} answered"


def cost_of(estimate: dict[str, float]) -> str:
    """Its cost, or how it would be known."""
    if estimate["cost"]:
        return f"{estimate['cost']:.2f}"
    return "set price_per_million_input and price_per_million_output"


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """What happened, for people."""
    lines: list[tuple[str, str]] = []

    def counts(numbers: dict[str, int]) -> str:
        return ", ".join(f"{name} {number}" for name, number in numbers.items()) or "none"

    if "candidates" in summary:
        made = summary["candidates"]
        lines.append(("source rows", f"{made['rows']}"))
        lines.append(("versions", f"{made['versions']}, {made['rewrites_usable']} of them usable rewrites"))
        lines.append(("unusable, by error", counts(made["unusable"])))
    if calls := summary.get("calls"):
        cost = f", cost {calls['cost']:.2f}" if calls["cost"] else ""
        numbers = f"{calls['asked']} asked, {calls['reused']} reused, {calls['failed']} failed{cost}"
        lines.append(("teacher calls", "0 asked, the candidates are reused" if calls["table_reused"] else numbers))
    if kept := summary.get("selected"):
        lines.append(("kept", f"{kept['rows']}: {counts(kept['by_variant'])}"))
        if kept.get("cut"):
            lines.append(("cut to max_length", f"{kept['cut']} versions"))
    if training := summary.get("training"):
        loss = " → ".join("?" if x is None else f"{x:.4f}" for x in (training["loss_first"], training["loss_last"]))
        lines.append(("training loss", f"{loss} in {training['steps']} steps"))
        backend = f", {training['backend']}, {training['model_class']}" if training["backend"] else ""
        lines.append(("processes", f"{training['processes']} ({training['distributed_type']}{backend})"))
    made = {name: folder / name for name in ("candidates", "selected", *(["model"] if "training" in summary else []))}
    made |= {"summary": folder / "summary.json", "report": folder / "report.html"}
    lines += [(name, str(path)) for name, path in made.items() if path.exists()]
    if not find_spec("matplotlib"):
        lines.append(("report", f"pip install 'hf_reflect[report]', then python -m hf_reflect.report {folder}"))
    lines += [("note", summary["note"])] if "note" in summary else []
    width = max(len(name) for name, _ in lines)
    print("\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in lines) + "\n", flush=True)

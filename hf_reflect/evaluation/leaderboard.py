"""The Open LLM Leaderboard's first version, as in the papers' Table 2, by lm-eval: tasks, shots, metrics, average.

arc           ARC-challenge, 25 shots, acc_norm
hellaswag     HellaSwag, 10 shots, acc_norm
mmlu          57 subjects, 5 shots, acc, and the mean over subjects (lm-eval's own weighs them by size)
truthfulqa    TruthfulQA-mc2, no shots

The leaderboard ran one commit of lm-eval, b281b09 of 2023. Other versions may give other numbers: compare models that
were measured by the same one.
"""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ..errors import DataError, SettingsError
from ..launch import first_line

_FORM = "`name:shots:metric`, such as `arc_challenge:25:acc_norm`, or a mapping with `task`, `shots` and `metric`"


class Benchmark(NamedTuple):
    """A column of the table: a task or group of lm-eval's, the examples in its prompts, what is counted."""

    column: str
    task: str
    shots: int
    metric: str


BENCHMARKS = (
    Benchmark("arc", "arc_challenge", 25, "acc_norm"),
    Benchmark("hellaswag", "hellaswag", 10, "acc_norm"),
    Benchmark("mmlu", "mmlu", 5, "acc"),
    Benchmark("truthfulqa", "truthfulqa_mc2", 0, "acc"),
)


def read_benchmarks(entries: Iterable[str | Mapping[str, Any]]) -> list[Benchmark]:
    """Columns from their written form: `name:shots:metric`, or a mapping, whose `column` may name the column.

    Raises:
        SettingsError: an entry of another form, a task that is named twice, none at all.
    """
    benchmarks = [_read(entry) for entry in entries]
    for what in ("task", "column"):
        names = [getattr(one, what) for one in benchmarks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise SettingsError(f"The {what} {min(twice)!r} stands twice among `tasks`: leave one of them.")
    if not benchmarks:
        raise SettingsError(f"`tasks` is empty: name some as {_FORM}.")
    return benchmarks


def evaluate(
    model: str,
    benchmarks: Sequence[Benchmark] = BENCHMARKS,
    dtype: str = "auto",
    batch_size: int | str = 8,
    device: str | None = None,
    limit: float | None = None,
    include_path: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> dict[str, Any] | None:
    """A model's row of the table; on a launch of several processes each takes its share, and rank 0 has the row.

    Args:
        model: folder or Hub id.
        benchmarks: the columns.
        dtype: "auto" is that of the saved weights.
        batch_size: per process; "auto" finds out what fits.
        device: such as "cuda:0"; the accelerator that there is, else the CPU.
        limit: only so many questions of each task, or below 1 that share: for a trial.
        include_path: folders of task YAMLs, which go before lm-eval's own of that name.
        trust_remote_code: whether code of the model's own may run.

    Returns:
        None on other ranks than 0; else table (average first, then each column, in percent), columns (of each: task,
        shots, metric, value, and how many tasks and questions it is over), and lm_eval, its own result.

    Raises:
        SettingsError: an unknown task, a metric or shots that it does not have; processes that would repeat each
            other's work; lm-eval is not installed.
        DataError: a model or a task's data cannot be loaded.
    """
    import torch

    lm_eval = _package()
    manager = _manager([one.task for one in benchmarks], include_path)
    loaded = {one.column: _load(manager, one) for one in benchmarks}
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = "cpu" if found is None else found.type
    student = _student(model, dtype, batch_size, device, trust_remote_code)
    tops = [loaded_as for top, _ in loaded.values() for loaded_as in top]
    result = lm_eval.simple_evaluate(student, tasks=tops, task_manager=manager, limit=limit, log_samples=False)
    if result is None:
        return None
    columns: dict[str, dict[str, Any]] = {}
    table: dict[str, float] = {}
    for one in benchmarks:
        names = loaded[one.column][1]
        table[one.column] = fmean(100 * _value(result["results"][name], one.metric) for name in names)
        questions = sum(result["n-samples"][name]["effective"] for name in names)
        columns[one.column] = {"task": one.task, "shots": one.shots, "metric": one.metric}
        columns[one.column] |= {"value": table[one.column], "tasks": len(names), "questions": questions}
    result["config"] |= {"model": model, "batch_size": batch_size, "device": device}
    return {"table": {"average": fmean(table.values()), **table}, "columns": columns, "lm_eval": result}


def _read(entry: str | Mapping[str, Any]) -> Benchmark:
    parts = entry.rsplit(":", 2) if isinstance(entry, str) else ()
    fields = dict(zip(("task", "shots", "metric"), parts, strict=True)) if len(parts) == 3 else entry
    if not isinstance(fields, Mapping) or not {"task", "shots", "metric"} <= set(fields) <= {*Benchmark._fields}:
        raise SettingsError(f"{entry!r} is no task: write {_FORM}.")
    if not str(fields["shots"]).isdigit():
        raise SettingsError(f"{entry!r} has {fields['shots']!r} shots, but that is a whole number: write {_FORM}.")
    task = str(fields["task"])
    return Benchmark(str(fields.get("column", Path(task).stem)), task, int(fields["shots"]), str(fields["metric"]))


def _manager(names: Sequence[str], include_path: Sequence[str]) -> Any:
    from lm_eval.tasks import TaskManager

    if missing := [folder for folder in include_path if not Path(folder).is_dir()]:
        raise SettingsError(f"`include_path` names {missing[0]!r}, which is no folder (seen from {Path.cwd()}).")
    if include_path:  # lm-eval's own are 10,000 files: they are read only where they are needed
        own = TaskManager(include_path=list(include_path), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=list(include_path) or None)
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise SettingsError(
                f"lm-eval knows no task {name!r}. "
                + (f"Did you mean {', '.join(near)}? " if near else "")
                + "`lm-eval ls tasks` lists its own; `include_path` names a folder with further ones."
            )
    return manager


def _load(manager: Any, benchmark: Benchmark) -> tuple[list[Any], list[str]]:
    """What lm-eval is to run for a column, with its shots set, and the names of the tasks in it."""
    import datasets

    try:
        loaded = manager.load([benchmark.task])
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"The data of the task {benchmark.task!r} cannot be loaded: {first_line(error)}\nBe online, or give a "
            "folder with a YAML of that task and its data as `include_path`."
        ) from error
    for name, task in loaded["tasks"].items():
        if benchmark.metric not in (metrics := list(task.aggregation())):
            raise SettingsError(
                f"The task {name!r} has no metric {benchmark.metric!r}, but {', '.join(metrics)}: name one of these."
            )
        if task.get_config("num_fewshot") == 0 and benchmark.shots:
            raise SettingsError(
                f"The task {name!r} is one without shots, by its own configuration, not with {benchmark.shots}: write "
                f"`{benchmark.task}:0:{benchmark.metric}`."
            )
        if benchmark.shots and len(docs := list(task.fewshot_docs())) < benchmark.shots:
            raise SettingsError(
                f"The task {name!r} has {len(docs)} examples for its prompts, not {benchmark.shots}: ask for fewer."
            )
        task.set_config(key="num_fewshot", value=benchmark.shots)
    group = loaded["groups"].get(benchmark.task)
    return [group] if group is not None else list(loaded["tasks"].values()), list(loaded["tasks"])


def _student(model: str, dtype: str, batch_size: int | str, device: str, trust_remote_code: bool) -> Any:
    from lm_eval.models.huggingface import HFLM

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != int(os.environ.get("LOCAL_WORLD_SIZE", processes)):
        raise SettingsError("lm-eval shares its work out over the GPUs of one machine: launch it on one.")
    settings = {"dtype": dtype, "batch_size": batch_size, "device": device, "trust_remote_code": trust_remote_code}
    try:
        student = HFLM(pretrained=model, **settings)
    except (OSError, ValueError) as error:
        raise DataError(
            f"The model {model!r} cannot be loaded: {first_line(error)}\nGive a folder of `save_pretrained` with its "
            "tokenizer, or the id of a model on the Hub (and be online, and logged in where it is gated)."
        ) from error
    if student.world_size != processes:
        raise SettingsError(
            f"{processes} processes were launched, but lm-eval shares its work out over GPUs, one to a process: each "
            "would do all of it. Start one with `python`."
        )
    return student


def _value(found: Mapping[str, Any], metric: str) -> float:
    """A metric of a task's result, whose keys also name the filter that replies went through."""
    keys = [f"{metric},none", *(key for key in found if key.startswith(f"{metric},"))]
    return float(next(found[key] for key in keys if key in found))


def _package() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise SettingsError(
            f"The leaderboard needs the package lm-eval, which cannot be imported ({error}): `pip install "
            "'hf_reflect[eval]'`."
        ) from error
    return lm_eval

"""What `build_report` costs on 70,000 rows of four versions: seconds, memory, and the size of the page.

    python tests/benchmarks/report.py        # two minutes, 0.4 GB in a temporary folder; writes its part of RESULTS.md
    python tests/benchmarks/report.py --folder made --rows 3000     # a run's folder, and its page, to look at

The run is made up, in a process of its own: scores and errors are drawn as real runs have them, texts are put together
from sentences. The peak of memory is that of the process that writes the page, imports and the mapped table included.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from results import RESULTS, Row, report, shown, write

PACKAGES = ("hf-reflect", "datasets", "pyarrow", "numpy", "matplotlib")
VARIANTS = ("original", "instruction", "response", "instruction+response")
ERRORS = {
    "refused: I cannot help with that request.": 0.012,
    "truncated: the reply was cut off at the token limit": 0.02,
    "unparsed: no [Better Answer] in the reply: Certainly, here is a better answer to it …": 0.015,
    "unchanged: the response came back as it was": 0.006,
    "teacher: the endpoint answered with status 503, eight times": 0.003,
}
TOPICS = (
    "the tides of a shallow bay,how a bicycle stays upright,a bridge of wood,why bread rises,the price of salt,"
    "a letter to a landlord,sorting a list of dates,the history of paper,a garden in the shade,how vaccines work,"
    "planning a week of meals,the grammar of questions,a lighthouse at night,reading a map,the sound of a cello"
).split(",")
TASKS = ("Explain", "Describe", "Write a short text about", "Give three facts about", "Summarise what is known of")
DEMANDS = (
    "Name the assumptions that you make, and say which of them matters most.",
    "Compare two approaches, and say when each of them fails.",
    "Write for somebody who has never heard of it, without a single technical term.",
    "Give one worked example with numbers, and check the result in another way.",
    "Keep it under two hundred words, and end with an open question.",
    "Say what would have to be measured to find out whether this is true.",
)
SENTENCES = (
    "It begins with something that everybody has seen and few have looked at.",
    "The usual account leaves out the part that takes most of the time.",
    "For a small case this can be worked out by hand, which is worth doing once.",
    "Two things are needed: patience, and a way to notice mistakes early.",
    "Most of the difference comes from a single step, and that step is easy to miss.",
    "Where the numbers are large, the same rule holds, but for another reason.",
    "A good test is to change one thing and to see whether the rest still fits.",
    "In practice people do it the other way round, and it works nearly as well.",
    "The exception is worth remembering: it shows where the rule comes from.",
    "Written down, it looks longer than it is.",
    "None of this depends on the place or on the season.",
    "That is also why the oldest method has not gone away.",
)


def make_run(folder: Path, rows: int, seed: int = 0) -> dict[str, Any]:
    """A run's folder of so many source rows; returns what was put in, counted while it was made.

    In the folder: candidates/, selected/, summary.json, model/trainer_state.json.
    """
    import pyarrow as pa
    from datasets import Dataset

    chance = np.random.default_rng(seed)
    tables, winners, counted = [], [], {"versions": 0, "unusable": {}, "by_variant": {}, "kept": 0, "outcomes": {}}
    for start in range(0, rows, 5_000):
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for number in range(start, min(start + 5_000, rows)):
            versions = _versions(chance, number)
            winner, outcome = _choice(versions)
            counted["outcomes"][outcome] = counted["outcomes"].get(outcome, 0) + 1
            if outcome == "kept":
                name = versions[winner]["variant"]
                counted["kept"] += 1
                counted["by_variant"][name] = counted["by_variant"].get(name, 0) + 1
                winners.append(counted["versions"] + winner)
            for version in versions:
                counted["versions"] += 1
                if version["response"] is None:
                    code = version["error"].split(":")[0]
                    counted["unusable"][code] = counted["unusable"].get(code, 0) + 1
                for name in COLUMNS:
                    columns[name].append(version[name])
        tables.append(pa.table(columns, schema=pa.schema(COLUMNS)))
    candidates = Dataset(pa.concat_tables(tables))
    candidates.save_to_disk(str(folder / "candidates"))
    candidates.select(winners).save_to_disk(str(folder / "selected"))
    _notes(folder, rows, counted, chance)
    return counted


def _columns() -> dict[str, Any]:
    import pyarrow as pa

    texts = ("row_id", "variant", "source", "instruction", "input", "response", "critique", "error")
    losses = [f"loss_{name}" for name in ("instruction", "response", "instruction_given_response")]
    numbers = (*losses, "loss_response_given_instruction", "ifd", "r_ifd")
    return {name: pa.string() for name in texts} | {name: pa.float64() for name in numbers}


COLUMNS = _columns()


def _versions(chance: np.random.Generator, number: int) -> list[dict[str, Any]]:
    """The four versions of one row."""

    def prose(least: int, most: int) -> str:
        return " ".join(SENTENCES[n] for n in chance.integers(0, len(SENTENCES), chance.integers(least, most)))

    topic = TOPICS[chance.integers(len(TOPICS))]
    asked = f"{TASKS[chance.integers(len(TASKS))]} {topic}."
    demands = " ".join(DEMANDS[n] for n in chance.choice(len(DEMANDS), 2, replace=False))
    short = prose(1, 8)
    difficulty = chance.normal(-0.42, 0.22)  # log IFD of the original
    fit = chance.normal(-0.25, 0.14)
    found, failed = [], False
    for variant in VARIANTS:
        is_new, is_answered = variant.startswith("instruction"), variant.endswith("response")
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= {"row_id": f"{number:06d}-{number * 2654435761 % 2**32:08x}", "variant": variant, "input": ""}
        row |= {"source": "" if variant == "original" else "made-up-teacher"}
        found.append(row)
        draw, error = chance.random(), None
        if variant == "instruction+response" and failed:
            error = "parent: its instruction version is unusable"
        elif variant != "original":
            for name, share in ERRORS.items():
                error = name if 0 <= draw < share and error is None else error
                draw -= share
        if error:
            row["error"], failed = error, failed or variant == "instruction"
            continue
        row["instruction"] = f"{asked} {demands}" if is_new else asked
        longer = prose(6, 16)
        row["response"] = {"original": short, "response": f"{short} {longer}"}.get(variant, longer)
        if variant == "instruction+response":
            row["response"] = f"{found[1]['response']} {prose(2, 6)}"
        if variant != "original":
            row["critique"] = f"The text is sound but thin. {prose(2, 5)}"
        ifd = difficulty + chance.normal(0.16 if is_new else 0.05, 0.14) * (variant != "original")
        r_ifd = fit + chance.normal(-0.09 if is_answered else 0.02, 0.08) * (variant != "original")
        alone, asked_alone = chance.normal(2.4, 0.4), chance.normal(3.1, 0.5)
        row |= {"loss_response": alone, "loss_response_given_instruction": alone + ifd, "ifd": math.exp(ifd)}
        row |= {"loss_instruction": asked_alone, "loss_instruction_given_response": asked_alone + r_ifd}
        row |= {"r_ifd": math.exp(r_ifd)}
    return found


def _choice(versions: list[dict[str, Any]]) -> tuple[int, str]:
    """The rule `paper`, row by row and by itself: which version wins, and what becomes of the row."""
    original, instruction, response, both = versions
    winner = 1 if instruction["response"] is not None and instruction["ifd"] > original["ifd"] else 0
    challenger = both if winner else response
    if challenger["response"] is not None and challenger["r_ifd"] < versions[winner]["r_ifd"]:
        winner = 3 if winner else 2
    if winner < 2:
        return winner, "response not reflected"
    for name, label in (("ifd", "IFD"), ("r_ifd", "r-IFD")):
        if not versions[winner][name] < 1:
            return winner, f"{label} not below 1"
    return winner, "kept"


def _notes(folder: Path, rows: int, counted: dict[str, Any], chance: np.random.Generator) -> None:
    """`summary.json` and what a Trainer logs."""
    made_with = {
        "data": {"dataset": "made-up/instructions", "split": "train"},
        "teacher": {"model": "made-up-teacher", "temperature": 0.0},
        "student": {"model": "made-up/student-7b", "template": "vicuna", "max_length": 2048},
        "selection": {"rule": "paper", "ifd_gate": 1.0, "r_ifd_gate": 1.0, "keep": "reflected", "seed": 0},
    }
    asked = {"replies": rows, "asked": rows, "prompt_tokens": 612 * rows, "completion_tokens": 377 * rows}
    costs = {
        "instruction": asked | {"cost": 0.00042 * rows, "seconds": 0.02 * rows},
        "response": {name: 1.9 * n if name.endswith("tokens") else 2 * n for name, n in asked.items()}
        | {"cost": 0.00081 * rows, "seconds": 0.05 * rows},
        "scoring": {"seconds": 0.03 * rows},
        "training": {"seconds": 0.11 * rows, "steps": 200},
    }
    source = {"rows": rows + 137, "not_taken": 0, "invalid": 12, "not_preselected": 125}
    summary = {"settings": made_with, "source": source, "costs": costs}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "model").mkdir()
    losses = [1.45 * math.exp(-step / 60) + 0.83 + float(chance.normal(0, 0.015)) for step in range(0, 201, 2)]
    history: list[dict[str, float]] = [{"step": 2 * n + 1, "loss": loss} for n, loss in enumerate(losses)]
    history += [{"step": step, "eval_loss": losses[step // 2] + 0.06} for step in range(50, 201, 50)]
    (folder / "model" / "trainer_state.json").write_text(json.dumps({"log_history": history}))


def write_page(folder: Path) -> dict[str, float]:
    """In this process: seconds, its peak of memory in bytes, the page's size in bytes."""
    from hf_reflect.report.page import build_report

    started = time.perf_counter()
    path = build_report(folder)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds, "memory": peak, "size": path.stat().st_size}


def by_itself(step: str, folder: Path, rows: int) -> Any:
    """A step in a process of its own, whose peak of memory is then its own; what it printed."""
    line = [sys.executable, __file__, "--step", step, "--folder", str(folder), "--rows", str(rows)]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(folder: Path, rows: int) -> Iterator[Row]:
    by_itself("make", folder, rows)
    found = by_itself("write", folder, rows)
    size = sum(path.stat().st_size for path in (folder / "candidates").iterdir()) / 1e6
    what = f"`build_report`, {rows:,} rows × 4 versions ({size:.0f} MB on disk), lengths in characters"
    yield Row(what, f"{found['seconds']:.1f} s", "≤ 60 s", found["seconds"] <= 60)
    yield Row(
        "… peak of resident memory", f"{found['memory'] / 2**20:,.0f} MiB", "≤ 2,048 MiB", found["memory"] <= 2**31
    )
    yield Row("… the page", f"{found['size'] / 1e6:.2f} MB", "≤ 5 MB", found["size"] <= 5e6)
    by_itself("tokenizer", folder, rows)
    found = by_itself("write", folder, rows)
    what = "… with a byte-level tokenizer of 2,000 pieces in the folder, lengths in tokens"
    yield Row(what, f"{found['seconds']:.1f} s, {found['memory'] / 2**20:,.0f} MiB")


def make_tokenizer(folder: Path) -> None:
    """A student's tokenizer, trained on the made-up texts."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator([*SENTENCES, *DEMANDS, *TOPICS], 2_000, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer).save_pretrained(folder / "student")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=70_000)
    parser.add_argument("--folder", type=Path, help="only make a run there, and its page, to look at")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write; its part of RESULTS.md")
    parser.add_argument("--step", choices=("make", "write", "tokenizer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        steps = {"make": lambda: make_run(options.folder, options.rows), "write": lambda: write_page(options.folder)}
        steps["tokenizer"] = lambda: make_tokenizer(options.folder)
        print(json.dumps(steps[options.step]()))
        return
    if options.folder is not None:
        by_itself("make", options.folder, options.rows)
        print(by_itself("write", options.folder, options.rows))
        return
    with TemporaryDirectory() as folder:
        found = shown(measure(Path(folder), options.rows))
    write(report("The report, measured", found, PACKAGES, "each step in a process of its own"), options.output)
    sys.exit(not all(row.reached for row in found))


if __name__ == "__main__":
    main()

"""What `select`, `select_top` and `decide` cost on a million versions: seconds, and memory beside texts on disk.

    python tests/benchmarks/selection.py     # two minutes, 1.5 GB in a temporary folder; writes its part of RESULTS.md

The tables lie on disk, as every stage leaves them. A figure is the median of several runs in one process.
"""

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
from datasets import Dataset, disable_progress_bars, load_from_disk
from results import RESULTS, Row, report, shown, write

from hf_reflect import RULES, select, select_top
from hf_reflect.selection import VARIANTS, decide

PACKAGES = ("hf-reflect", "datasets", "pyarrow", "numpy")
SCORES = ("ifd", "r_ifd", "coherence", "loss_response_given_instruction")
PROSE = "an answer is seldom as long as its question deserves, or as short as its reader hopes; " * 40


def candidates(folder: Path, rows: int, teachers: int, texts: bool) -> Dataset:
    """All versions of each row, as reflection leaves them, with random scores of which 1 % are null.

    With texts an instruction has 200 characters on average, an answer 1,000.
    """
    versions = [("original", "")] + [(variant, f"teacher-{n}") for n in range(teachers) for variant in VARIANTS[1:]]

    def batches() -> Iterator[pa.Table]:
        for start in range(0, rows, 5_000):
            chance = np.random.default_rng(start)
            ids = [f"{chance.integers(2**62):016x}-0" for _ in range(min(5_000, rows - start))]
            size = len(ids) * len(versions)
            columns = {
                "row_id": pa.array([row_id for row_id in ids for _ in versions]),
                "variant": pa.array([variant for variant, _ in versions] * len(ids)),
                "source": pa.array([source for _, source in versions] * len(ids)),
            }
            for name in SCORES:
                columns[name] = pa.array(chance.uniform(0.3, 1.2, size), mask=chance.random(size) < 0.01)
            for name, longest in (("instruction", 400), ("response", 2000)) if texts else ():
                columns[name] = pa.array([PROSE[:length] for length in chance.integers(0, longest, size)])
            yield pa.table(columns)

    Dataset(pa.concat_tables(batches())).save_to_disk(str(folder))
    return load_from_disk(str(folder))


def timed(function: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each run, in ascending order."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)


def row(what: str, seconds: list[float], limit: float) -> Row:
    figure = f"{median(seconds):.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f})"
    return Row(what, figure, f"≤ {limit:g} s", median(seconds) <= limit)


def slowest(calls: dict[str, Callable[[], object]], repeats: int) -> tuple[str, list[float]]:
    """The call with the greatest median."""
    return max(((name, timed(call, repeats)) for name, call in calls.items()), key=lambda found: median(found[1]))


def measure(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    rows, repeats = options.rows, options.repeats
    bare = candidates(folder / "bare", rows, teachers=1, texts=False)
    texts = candidates(folder / "texts", rows, teachers=1, texts=True)
    shuffled, several = texts.shuffle(seed=0), candidates(folder / "several", rows * 2 // 5, teachers=3, texts=True)
    size = f"{len(bare):,} versions of {rows:,} rows"
    gigabytes = sum(file.stat().st_size for file in (folder / "texts").iterdir()) / 1e9
    on_disk = f"with texts on disk ({gigabytes:.1f} GB)"

    yield row(f'`select(rule="paper")`, {size}, no texts', timed(lambda: select(bare), repeats), 3)
    yield row(f"… {on_disk}", timed(lambda: select(texts), repeats), 3)
    yield row("… the same, shuffled", timed(lambda: select(shuffled), repeats), 3)
    yield row(f"… {len(several):,} versions by three teachers", timed(lambda: select(several), repeats), 3)
    for what, table in (("", texts), (", shuffled", shuffled), (", three teachers", several)):
        calls = {rule: lambda rule=rule, table=table: select(table, rule) for rule in RULES if rule != "paper"}
        name, seconds = slowest(calls, repeats)
        yield row(f'the slowest of the other rules{what}: "{name}"', seconds, 3)
    calls = {by: lambda by=by: select_top(texts, share=0.1, by=by) for by in ("ifd", "r_ifd", "longest", "random")}
    name, seconds = slowest(calls, repeats)
    yield row(f'`select_top(share=0.1)`, the slowest: by "{name}"', seconds, 3)
    yield row(f'`decide(rule="paper")`, {rows:,} decisions with their whys', timed(lambda: decide(texts), repeats), 8)

    command = [sys.executable, __file__, "--peak", str(folder / "texts")]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    yield Row(f'`select(rule="paper")`, {on_disk}, growth of anonymous memory at its peak', f"{grown:.0f} MB")


def peak(folder: str) -> float:
    """By how many MB the process's own memory grows while it selects; mapped files are not counted."""

    def anonymous() -> float:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

    def watch() -> None:
        while True:
            most[0] = max(most[0], anonymous())
            time.sleep(0.002)

    dataset = load_from_disk(folder)
    select(dataset.select(range(4000)))
    before = anonymous()
    most = [before]
    threading.Thread(target=watch, daemon=True).start()
    select(dataset)
    return most[0] - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=250_000, help="row_ids; each has four versions")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is taken")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write; its part of RESULTS.md")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak))
        return
    with TemporaryDirectory() as folder:
        found = shown(measure(Path(folder), options))
    write(report("Selection, measured", found, PACKAGES, f"medians of {options.repeats} runs"), options.output)
    sys.exit(not all(line.reached for line in found))


if __name__ == "__main__":
    disable_progress_bars()
    main()

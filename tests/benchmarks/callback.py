"""What a SelectionCallback costs beside the training that it is part of, and on a GPU whether it is exact there.

    python tests/benchmarks/callback.py                  # on a CPU, some 10 minutes; writes into RESULTS.md
    python tests/benchmarks/callback.py --device cuda    # 1B in bfloat16; ZeRO-2 and ZeRO-3 on all GPUs

The student of random weights and the rows are those of scoring.py. Training is SFTTrainer's, three epochs with
gradient checkpointing, on the rows that the rule `reflected` keeps of four versions each. Exact means as in
tests/test_matrix.py, by the same script: `once`, `epoch`, and `epoch` resumed in mid-epoch, to their oracles.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from results import Row, report, shown, write  # noqa: E402
from scoring import build, rows_of  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from hf_reflect import SelectionCallback, to_training_ids  # noqa: E402
from hf_reflect.selection import VARIANTS  # noqa: E402

PACKAGES = ("hf-reflect", "torch", "transformers", "trl", "accelerate", "deepspeed", "datasets")


class Clock(TrainerCallback):
    """Seconds and peak memory of what happens between two moments."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peaks: list[int] = []
        self.start()

    def start(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()

    def stop(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peaks.append(torch.cuda.max_memory_allocated())
        self.seconds.append(time.perf_counter() - self.began)


def beside_training(shape: str, count: int, schedule: str, device: str) -> Iterator[Row]:
    """The choice's share of the run's time, and its peak memory beside the training's."""
    on_gpu = device == "cuda"
    model, tokenizer = build(shape, torch.bfloat16 if on_gpu else torch.float32, device)
    table = Dataset.from_list(rows_of(count, len(tokenizer)))
    keys = [(f"{number // 4}", VARIANTS[number % 4]) for number in range(len(table))]
    table = table.add_column("row_id", [key[0] for key in keys]).add_column("variant", [key[1] for key in keys])
    with TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            max_length=1024,
            per_device_train_batch_size=4,
            num_train_epochs=3,
            learning_rate=2e-5,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1000,
        )
        rows = to_training_ids(table, tokenizer, "vicuna", 1024)
        trainer = SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        callback = SelectionCallback(trainer, rule="reflected", schedule=schedule, template="vicuna")
        choosing, training = Clock(), Clock()
        callback.choose()
        choosing.stop()
        if schedule == "epoch":
            again = callback.on_epoch_begin

            def timed(*args: object, **kwargs: object) -> None:
                choosing.start()
                again(*args, **kwargs)
                choosing.stop()

            callback.on_epoch_begin = timed  # type: ignore[method-assign]
        training.start()
        trainer.train()
        training.stop()
    whole = training.seconds[0] + choosing.seconds[0]
    share = sum(choosing.seconds) / whole
    what = f"{shape}, {count} rows × 4 versions, 3 epochs, `{schedule}`"
    times = f"{share:.0%} ({sum(choosing.seconds):.0f} of {whole:.0f} s)"
    yield Row(f"{what}: choosing, as a share of the run's time", times)
    if on_gpu:
        choice, train = (max(clock.peaks) / 2**30 for clock in (choosing, training))
        figure = f"{choice:.1f} GiB beside {train:.1f} GiB"
        yield Row("… peak memory of scoring beside that of training", figure, "≤ training's", choice <= train)


def exact(backend: str) -> Iterator[Row]:
    """The matrix on CUDA, in bfloat16, on all GPUs."""
    from conftest import ROWS, TEXTS, byte_level_tokenizer, scripted_teacher, tiny_llama
    from launching import command, environment, on_gpus

    from hf_reflect import ReflectionTransform, to_pairs

    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = byte_level_tokenizer(TEXTS)
        for made in (tiny_llama(len(tokenizer), attention_dropout=0.1), tokenizer):
            made.save_pretrained(folder / "student")
        table = to_pairs(Dataset.from_list(ROWS))
        for part in ("instruction", "response"):
            transform = ReflectionTransform(scripted_teacher, part, source="scripted")
            table = table.map(transform, batched=True, load_from_cache_file=False)
        table.save_to_disk(folder / "candidates")
        paths = [folder / part for part in ("student", "candidates", "result.json")]
        config = None if backend == "alone" else on_gpus(backend, folder)
        modes = "once epoch epoch@2"
        line = command("tests/launched_callback.py", *paths, backend, modes, config=config)
        done = subprocess.run(line, env=environment() | {"DEVICE": "cuda"}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        result = json.loads(paths[-1].read_text())
    pairs = {
        "once": (result["once"]["run"], result["once"]["oracle"]),
        "epoch": (result["epoch"]["run"], result["epoch"]["oracle"]),
        "epoch resumed": (result["epoch@2"]["run"], result["epoch"]["run"]),
    }
    for mode, (run, oracle) in pairs.items():
        worst = max(
            abs(a - b) for one, other in zip(run, oracle, strict=True) for a, b in zip(one, other, strict=True)
        )
        inside = result["once"]["inside"][0]
        what = f"{inside['distributed_type']}, {inside['class']}, {inside['processes']} GPU, bfloat16, `{mode}`"
        yield Row(f"{what}: largest difference of loss and learning rate to the oracle", f"{worst}", "0.0", worst == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    started = time.perf_counter()
    on_gpu = options.device == "cuda"
    shape, count = ("1B", 400) if on_gpu else ("15M", 40)
    parts = [beside_training(shape, count, schedule, options.device) for schedule in ("once", "epoch")]
    parts += [exact(backend) for backend in ("alone", "zero2", "zero3")] if on_gpu else []
    found = shown(row for part in parts for row in part)
    minutes = (time.perf_counter() - started) / 60
    gpu = f", {torch.cuda.get_device_name()}" if on_gpu else f", {torch.get_num_threads()} threads"
    title = f"Choosing inside the Trainer, measured on {'a GPU' if on_gpu else 'a CPU'}"
    write(report(title, found, PACKAGES, f"in {minutes:.0f} minutes", gpu))
    sys.exit(not all(line.reached for line in found))


if __name__ == "__main__":
    main()

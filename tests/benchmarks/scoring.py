"""What a StudentScorer reaches: against the authors' loop, by rows and length, in memory, on two processes.

    python tests/benchmarks/scoring.py                            # on a CPU, some 30 minutes; writes into RESULTS.md
    python tests/benchmarks/scoring.py --only 15M cost
    python tests/benchmarks/scoring.py --device cuda              # models of 1B and 7B in bfloat16
    python tests/benchmarks/scoring.py --device cuda --only vllm  # where vLLM is installed

The authors' loop is written here from the definition: one row, one pass, batch 1, the logits of the whole vocabulary
at every position. Both take turns in one process on the same rows, every other turn in the opposite order; a ratio is
the median over the turns, tokenizing included. Weights are random, which changes no timing; a word is a token; lengths
are drawn around Alpaca's means (20.7 tokens of instruction, 65.5 of response: arXiv 2402.10110, Table 6), and of the
four versions of a row two share each instruction. Imports neither datasets nor trl, but for two processes.
"""

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import platform
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # a GPU machine may have nothing installed

import torch  # noqa: E402
from results import RESULTS, Row, report, shown, write  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from hf_reflect.scoring import StudentScorer  # noqa: E402
from hf_reflect.scoring.packing import size  # noqa: E402
from hf_reflect.scoring.plan import passages_of, versions_of  # noqa: E402

PACKAGES = ("hf-reflect", "torch", "transformers", "accelerate", "numpy")
SHAPES = {  # vocabulary, size, of the MLP, layers, heads, heads of keys, tied
    "15M": (32_000, 288, 768, 6, 6, 6, True),
    "135M": (49_152, 576, 1536, 30, 9, 3, True),
    "1B": (128_256, 2048, 8192, 16, 32, 8, True),
    "7B": (32_000, 4096, 11_008, 32, 32, 32, False),
}
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16, FLOP/s, by their data sheets


def build(shape: str, dtype: torch.dtype, device: str, vocabulary: int | None = None) -> tuple[Any, Any]:
    """A student of random weights, and a tokenizer for which a word is a token."""
    words, hidden, mlp, layers, heads, of_keys, tied = SHAPES[shape]
    words = vocabulary or words
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=of_keys,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2", unk_token="w0")


def rows_of(count: int, words: int, longer: float = 1.0, lengths: int | None = None) -> list[dict[str, Any]]:
    """Four versions of each row: two instructions, each with two responses; `lengths` rows differ in length."""
    chosen = random.Random(0)
    rows = []
    for number in range(count):
        draw = random.Random(number % (lengths or count))

        def text(mean: float, spread: float, least: int) -> str:
            length = draw.lognormvariate(math.log(mean) - spread**2 / 2, spread)  # noqa: B023
            return " ".join(
                f"w{chosen.randrange(3, words)}" for _ in range(int(longer * max(least, min(length, 900))))
            )

        for instruction in (text(20.7, 0.5, 4), text(20.7, 0.5, 4)):
            rows += [{"instruction": instruction, "input": "", "response": text(65.5, 0.8, 2)} for _ in range(2)]
    return rows


def authors_loop(model: Any, scorer: StudentScorer, rows: list[dict[str, Any]]) -> list[float]:
    """ppl(y|x), ppl(y), ppl(x|y'), ppl(x) of each row, one after the other."""
    template, losses = scorer.template, []
    for row in rows:
        forward, reverse = template.forward(row), template.reverse(row)
        for context, target in (
            (forward.context, forward.target),
            (template.alone, forward.target),
            (reverse.context, reverse.target),
            (template.alone, reverse.target),
        ):
            ids = torch.tensor([[*context, *target]], device=model.device)
            labels = ids.clone()
            labels[0, : len(context)] = -100
            with torch.no_grad():
                losses.append(model(input_ids=ids, labels=labels).loss.item())
    return losses


def timed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turns(one: Callable[[], Any], other: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each turn of both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats):
        for number in (0, 1) if turn % 2 == 0 else (1, 0):
            seconds[number].append(timed((one, other)[number]))
    return seconds


def against_the_loop(shape: str, count: int, mark: float, options: argparse.Namespace) -> Iterator[Row]:
    model, tokenizer = build(shape, torch.float32, "cpu")
    rows = rows_of(count, len(tokenizer))
    loop, ours = in_turns(
        lambda: authors_loop(model, StudentScorer(model, tokenizer, "vicuna"), rows),
        lambda: StudentScorer(model, tokenizer, "vicuna").score_rows(rows),  # the comparison of its first pack as well
        options.repeats,
    )
    ratios = sorted(a / b for a, b in zip(loop, ours, strict=True))
    rates = f"{len(rows) / median(ours):.2f} to {len(rows) / median(loop):.2f} versions/s"
    what = f"{shape}, float32, {count} rows × 4 versions, to the authors' loop"
    figure = f"{median(ratios):.2f}× ({ratios[0]:.2f} to {ratios[-1]:.2f}; {rates})"
    yield Row(what, figure, f"≥ {mark:g}×" if mark else "", median(ratios) >= mark)
    if shape != "135M":
        return
    what = "135M, bfloat16, to the same float32 loop"
    if not _has_bfloat16():
        yield Row(what, "not run: this CPU has no bfloat16 instructions (the mark is ≥ 4.5×)")
        return
    half = build(shape, torch.bfloat16, "cpu")[0]
    loop, ours = in_turns(
        lambda: authors_loop(model, StudentScorer(model, tokenizer, "vicuna"), rows),
        lambda: StudentScorer(half, tokenizer, "vicuna").score_rows(rows),
        options.repeats,
    )
    ratio = median(a / b for a, b in zip(loop, ours, strict=True))
    yield Row(what, f"{ratio:.2f}×", "≥ 4.5×", ratio >= 4.5)


def _has_bfloat16() -> bool:
    return platform.machine() == "x86_64" and any(
        flag in Path("/proc/cpuinfo").read_text() for flag in (" avx512_bf16", " amx_bf16")
    )


def cost(options: argparse.Namespace) -> Iterator[Row]:
    model, tokenizer = build("15M", torch.float32, "cpu")
    few = rows_of(15, len(tokenizer))
    for what, more, mark in (
        ("twice the rows", rows_of(30, len(tokenizer), lengths=15), 2.05),
        ("twice the length", rows_of(15, len(tokenizer), longer=2.0), 2.3),
    ):
        scorer = StudentScorer(model, tokenizer, "vicuna")
        scorer.score_rows(few[:8])
        one, two = in_turns(lambda: scorer.score_rows(few), lambda: scorer.score_rows(more), options.repeats)  # noqa: B023
        ratio = median(b / a for a, b in zip(one, two, strict=True))
        yield Row(f"15M, {what}, time", f"{ratio:.2f}×", f"≤ {mark}×", ratio <= mark)


def memory(options: argparse.Namespace) -> Iterator[Row]:
    command = [sys.executable, __file__, "--child", "peak"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, tokens = json.loads(done.stdout)
    what = (
        "135M, float32, vocabulary of 152,000, `max_length` 2,048, `tokens_per_batch` 16,384: peak above the weights"
    )
    yield Row(what, f"{grown:.2f} GiB ({tokens:,} tokens in the largest pass)", "< 1.5 GiB", grown < 1.5)


def peak() -> None:
    """How far this process grows while it scores long rows."""

    def resident() -> float:
        return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 2**20

    def watch() -> None:
        while True:
            most[0] = max(most[0], resident())
            time.sleep(0.005)

    model, tokenizer = build("135M", torch.float32, "cpu", vocabulary=152_000)
    tokens = []
    model.register_forward_pre_hook(
        lambda _, args, given: tokens.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    draw = random.Random(0)
    text = [
        " ".join(f"w{draw.randrange(3, 152_000)}" for _ in range(length))
        for length in (900, 1100, 1000, 950, 1050, 50, 1900)
    ]
    rows = [{"instruction": x, "input": "", "response": y} for x, y in itertools.pairwise(text)]

    def score(rows: list[dict[str, Any]]) -> None:
        StudentScorer(model, tokenizer, "vicuna", max_length=2048, tokens_per_batch=16_384).score_rows(rows)

    score([{"instruction": "w5 w6", "input": "", "response": "w7"}])
    most = [before := resident()]
    threading.Thread(target=watch, daemon=True).start()
    score(rows)
    print(json.dumps([most[0] - before, max(tokens)]))


def two_processes(options: argparse.Namespace) -> Iterator[Row]:
    config = Path(__file__).parents[2] / "accelerate_configs" / "cpu.yaml"
    with TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        for line, output in (([sys.executable], "one"), (launcher, "two")):
            command = [*line, __file__, "--child", "launched", "--output", f"{folder}/{output}"]
            subprocess.run(command, capture_output=True, check=True)
        (one, _), (two, tokens) = (json.loads(Path(folder, name).read_text()) for name in ("one", "two"))
    worst = max(abs(a - b) / a for a, b in zip(one, two, strict=True))
    apart = max(tokens) / min(tokens) - 1
    figure = f"{apart:.1%} apart ({tokens[0]:,} and {tokens[1]:,}); losses within {worst:.0e}"
    marks = "within 5 %, the same table (1e-6)"
    yield Row(
        "15M, 25 rows × 4 versions, two processes: shares of the tokens",
        figure,
        marks,
        apart <= 0.05 and worst < 1e-6,
    )


def launched(output: Path) -> None:
    """One of the processes."""
    from accelerate import Accelerator
    from accelerate.utils import gather_object
    from datasets import Dataset

    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)
    model, tokenizer = build("15M", torch.float32, "cpu")
    tokens = []
    model.register_forward_pre_hook(lambda _, args, given: tokens.append(given["input_ids"].numel()), with_kwargs=True)
    scored = StudentScorer(model, tokenizer, "vicuna").score(Dataset.from_list(rows_of(25, len(tokenizer))))
    shares = gather_object([sum(tokens)])
    if accelerator.is_main_process:
        output.write_text(json.dumps([scored["loss_response_given_instruction"][:], shares]))
    accelerator.end_training()


def on_cuda(shape: str, options: argparse.Namespace) -> Iterator[Row]:
    model, tokenizer = build(shape, torch.bfloat16, "cuda")
    rows, some = (rows_of(count, len(tokenizer)) for count in (options.rows, max(1, options.rows // 40)))
    scorer = StudentScorer(model, tokenizer, "vicuna")
    scorer.score_rows(some)  # the first use of every kernel, and the measurement of memory
    seconds = sorted(timed(lambda: scorer.score_rows(rows)) for _ in range(options.repeats))
    rate = len(rows) / median(seconds)
    done = needed_flop(model, scorer, rows) / median(seconds)
    name = torch.cuda.get_device_name()
    peak = next((flops for part, flops in PEAKS.items() if part in name), None)
    share = f"{done / peak:.0%} of peak" if peak else "peak unknown"
    what = f"{shape}, bfloat16, {options.rows:,} rows × 4 versions: FLOP/s on the tokens that are needed"
    mark = "≥ 50 % of peak" if shape == "7B" else ""
    figure = f"{done / 1e12:.0f} TFLOP/s, {share} ({rate:.1f} versions/s, {scorer._student.limit:,} tokens a pass)"
    yield Row(what, figure, mark, not mark or bool(peak) and done >= 0.5 * peak)

    loop = [timed(lambda: authors_loop(model, scorer, some)) for _ in range(options.repeats)]
    ratio = rate * median(loop) / len(some)
    yield Row(f"… to the authors' loop in bfloat16, {len(some)} versions", f"{ratio:.1f}×", "≥ 3×", ratio >= 3)
    model.float()
    authors_loop(model, scorer, some[:2])
    loop = [timed(lambda: authors_loop(model, scorer, some)) for _ in range(options.repeats)]
    ratio = rate * median(loop) / len(some)
    yield Row("… to the authors' loop as shipped, in float32", f"{ratio:.1f}×", "≥ 10×", ratio >= 10)


def needed_flop(model: Any, scorer: StudentScorer, rows: list[dict[str, Any]]) -> float:
    """Of the matrix products: each token that is needed once through the layers, each target through the head."""
    passages = passages_of(versions_of(scorer.template, range(len(rows)), rows))
    head = model.get_output_embeddings().weight.numel()
    inside = sum(p.numel() for p in model.model.parameters()) - model.get_input_embeddings().weight.numel()
    return 2.0 * inside * size(passages) + 2.0 * head * sum(passage.targets for passage in passages)


def vllm(options: argparse.Namespace) -> Iterator[Row]:
    """`prompt_logprobs` with prefix caching, on the same passages."""
    from vllm import LLM, SamplingParams

    with TemporaryDirectory() as folder:
        model, tokenizer = build("7B", torch.bfloat16, "cpu")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        scorer = StudentScorer(model, tokenizer, "vicuna")
        rows = rows_of(options.rows, len(tokenizer))
        passages = sorted(passages_of(versions_of(scorer.template, range(len(rows)), rows)))
        prompts = [{"prompt_token_ids": passage.tokens.tolist()} for passage in passages]
        engine = LLM(folder, dtype="bfloat16", enable_prefix_caching=True, max_model_len=2048)
        asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
        engine.generate(prompts[:64], asked)
        seconds = timed(lambda: engine.generate(prompts, asked))
        version = importlib.metadata.version("vllm")
        yield Row(f"7B, bfloat16, vLLM {version}, `prompt_logprobs`", f"{len(rows) / seconds:.1f} versions/s")


ON_CPU: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "15M": lambda options: against_the_loop("15M", 20, 0, options),
    "135M": lambda options: against_the_loop("135M", 16, 1.8, options),
    "cost": cost,
    "memory": memory,
    "processes": two_processes,
}
ON_CUDA: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "1B": lambda options: on_cuda("1B", options),
    "7B": lambda options: on_cuda("7B", options),
    "vllm": vllm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--only", nargs="+", default=[], choices=[*ON_CPU, *ON_CUDA], help="written where --output says"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns of which the median is taken")
    parser.add_argument("--rows", type=int, default=1000, help="source rows on a GPU")
    parser.add_argument("--output", type=Path, help="where to write; RESULTS.md beside this file, if all rows are run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        peak() if options.child == "peak" else launched(options.output)
        return
    benchmarks = ON_CUDA if options.device == "cuda" else ON_CPU
    names = options.only or [name for name in benchmarks if name != "vllm"]
    started = time.perf_counter()
    found = shown(itertools.chain.from_iterable(benchmarks[name](options) for name in names))
    output = options.output or (None if options.only else RESULTS)
    if output:
        minutes = (time.perf_counter() - started) / 60
        how = f"in {minutes:.0f} minutes; medians of {options.repeats} turns"
        gpu = (
            f", {torch.cuda.get_device_name()}" if options.device == "cuda" else f", {torch.get_num_threads()} threads"
        )
        cpu = f"a CPU ({torch.backends.cpu.get_cpu_capability()})"  # the ratios depend on it
        title = f"Scoring, measured on {'a GPU' if options.device == 'cuda' else cpu}"
        write(report(title, found, PACKAGES, how, gpu), output)
    sys.exit(not all(line.reached for line in found))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

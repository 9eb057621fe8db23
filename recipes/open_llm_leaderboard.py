"""The Open LLM Leaderboard's first version, as in the papers' Table 2: ARC, HellaSwag, MMLU, TruthfulQA, by lm-eval.

    python recipes/open_llm_leaderboard.py --model runs/srecycle_wizardlm/model
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/open_llm_leaderboard.py --model ...

Every argument: `--help`. On several GPUs each process takes its share of the questions.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from hf_reflect.arguments import parse_arguments
from hf_reflect.evaluation.leaderboard import BENCHMARKS, evaluate, read_benchmarks
from hf_reflect.files import write_whole
from hf_reflect.launch import main_of


@dataclass(kw_only=True)
class LeaderboardArguments:
    """Which model is asked what, and on what."""

    model: str = field(metadata={"help": "Folder or Hub id."})
    tasks: list[str] | None = field(
        default=None,
        metadata={"help": "name:shots:metric each, or in the YAML a mapping; the leaderboard's four if absent."},
    )
    include_path: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of task YAMLs, which go before lm-eval's own: for machines without a network."},
    )
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16."})
    batch_size: str = field(default="8", metadata={"help": "On each process; auto finds out what fits."})
    device: str | None = field(default=None, metadata={"help": "Such as cuda:0; what there is if absent."})
    limit: float | None = field(
        default=None, metadata={"help": "Only so many questions of each task, or below 1 that share: for a trial."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code of the model's own may run."})
    output_dir: str = field(default="runs/leaderboard", metadata={"help": "For results.json."})


def main() -> None:
    asked, *_ = parse_arguments((LeaderboardArguments,), __file__)
    settings = {name: value for name, value in vars(asked).items() if name not in ("tasks", "output_dir")}
    benchmarks = BENCHMARKS if asked.tasks is None else read_benchmarks(asked.tasks)
    found = evaluate(benchmarks=benchmarks, **settings)
    if found is None:  # rank 0 has it
        return
    folder = Path(asked.output_dir)
    # configurations in lm-eval's own result hold functions
    write_whole(folder / "results.json", json.dumps({"model": asked.model, **found}, indent=2, default=str))
    widths = [max(len(name), 6) for name in found["table"]]
    for row in (list(found["table"]), [f"{value:.2f}" for value in found["table"].values()]):
        print("  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    questions = ", ".join(f"{name} {one['questions']:,}" for name, one in found["columns"].items())
    print(f"\n  questions  {questions}\n  lm-eval    {found['lm_eval']['lm_eval_version']}")
    print(f"  results    {folder / 'results.json'}\n", flush=True)


if __name__ == "__main__":
    main_of(main)

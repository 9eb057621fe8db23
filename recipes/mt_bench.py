"""MT-Bench in one command: answers to both turns, a judge's grades, and the means.

    python recipes/mt_bench.py                                           # runs mt_bench.yaml, beside it
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/mt_bench.py --model runs/mine/model

Every argument: `--help`. Questions, prompts and reference answers are FastChat's: `bench` names its data folder. A run
that was killed goes on; what a judge answered is in <output_dir>/ledger.sqlite. Source: arXiv 2306.05685.
"""

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import Dataset

from hf_reflect.arguments import EndpointArguments, parse_arguments
from hf_reflect.errors import SettingsError
from hf_reflect.evaluation.generation import answers_from_endpoint, generate_answers, join_launch, load_student
from hf_reflect.evaluation.mt_bench import (
    answer_turns,
    check_judge,
    describe_scores,
    file_name,
    grade,
    mean_scores,
    read_bench,
    read_model_answers,
    save_answers,
    save_judgments,
)
from hf_reflect.files import write_whole
from hf_reflect.launch import main_of
from hf_reflect.templates import check_template


@dataclass(kw_only=True)
class BenchArguments:
    """Who answers, and who grades; the judge is asked as the endpoint's arguments say."""

    bench: str = field(metadata={"help": "FastChat's fastchat/llm_judge/data."})
    output_dir: str = field(metadata={"help": "Where answers, judgments and means go; for any number of models."})
    judge_model: str | None = field(
        default=None, metadata={"help": "Who grades, as the endpoint knows it; null: answers only."}
    )
    reference: str | None = field(
        default=None, metadata={"help": "Whose reference answers the judge is shown, such as gpt-4."}
    )
    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of a local model."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or Hub id of a PEFT adapter on top of it."})
    endpoint_model: str | None = field(
        default=None, metadata={"help": "In place of `model`: one behind `endpoint_base_url`, by its name there."}
    )
    endpoint_base_url: str | None = field(default=None, metadata={"help": "OpenAI's if absent."})
    endpoint_api_key_env: str = field(default="OPENAI_API_KEY", metadata={"help": "Variable that holds its key."})
    system: str | None = field(default=None, metadata={"help": "System message, with `endpoint_model`."})
    answers: str | None = field(
        default=None, metadata={"help": "In place of both: a file in FastChat's model_answer, to be graded."}
    )
    model_id: str | None = field(default=None, metadata={"help": "What the files call the model; its name if absent."})
    greedy: bool = field(default=False, metadata={"help": "Sample nothing, in place of FastChat's temperatures."})
    template: str = field(
        default="auto", metadata={"help": "As trained: auto, chat, vicuna, alpaca, wizardlm, plain."}
    )
    max_new_tokens: int = field(default=1024, metadata={"help": "Of an answer, at most."})
    max_length: int | None = field(default=None, metadata={"help": "Prompt and answer; the model's own if absent."})
    batch_size: int = field(default=8, metadata={"help": "Questions at once on each process; less needs less memory."})
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code of the model's own may run."})
    seed: int = field(default=0, metadata={"help": "Of a local model's sampling."})
    allow_missing: bool = field(default=False, metadata={"help": "Count judgments that failed as without a score."})
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU, whatever else is there."})

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.model, self.endpoint_model, self.answers)) != 1:
            raise SettingsError(
                "Name one of `model` (a local one), `endpoint_model` and `answers` (a file of them); null takes one "
                "away that the YAML names (`--model null`)."
            )
        if self.answers is not None and self.judge_model is None:
            raise SettingsError("With `answers` there is nothing to do but to grade them: name a `judge_model`.")
        if self.model is None and os.environ.get("WORLD_SIZE", "1") != "1":
            raise SettingsError("An endpoint is asked by one process: start this with `python recipes/mt_bench.py`.")
        check_template(self.template)


def main() -> None:
    asked, endpoint = parse_arguments((BenchArguments, EndpointArguments), __file__)
    folder = Path(asked.output_dir)
    files = folder / "data" / "mt_bench"  # where FastChat's show_result looks, started in output_dir
    bench = read_bench(asked.bench, asked.judge_model, asked.reference)
    if asked.judge_model is not None:
        judge = endpoint.asking(asked.judge_model, folder / "ledger.sqlite")
        if os.environ.get("RANK", "0") == "0":
            judge.check_ready()
            if asked.answers is None:
                check_judge(bench, judge)
    folder.mkdir(parents=True, exist_ok=True)

    # 1. Both turns; a local model on all processes.
    if asked.answers is not None:
        rows = read_model_answers(asked.answers)
        model_id = asked.model_id or rows[0]["model_id"]
        rows = [row | {"model_id": model_id} for row in rows]
    else:
        model_id = asked.model_id or asked.endpoint_model or asked.adapter or asked.model
        if asked.endpoint_model is not None:
            own = {"base_url": asked.endpoint_base_url, "api_key_env": asked.endpoint_api_key_env}
            own |= {"max_tokens": asked.max_new_tokens, "ledger": None, "extra_body": None, "api_version": None}
            own |= dict.fromkeys(("max_cost", "max_requests", "max_total_tokens"))  # limits are the judge's
            answering = replace(endpoint, **own).asking(asked.endpoint_model, folder / "answers.sqlite")
            answering.check_ready()

            def ask(questions: Dataset, turn: int) -> Dataset:
                return answers_from_endpoint(questions, answering, asked.system)

        else:
            state = join_launch(asked.use_cpu)
            model, tokenizer = load_student(asked.model, asked.dtype, asked.trust_remote_code, asked.adapter)

            def ask(questions: Dataset, turn: int) -> Dataset:
                return generate_answers(
                    model,
                    tokenizer,
                    questions,
                    template=asked.template,
                    max_new_tokens=asked.max_new_tokens,
                    max_length=asked.max_length,
                    batch_size=asked.batch_size,
                    seed=asked.seed,
                    output=folder / "turns" / f"{file_name(model_id)}.turn{turn}.jsonl",
                    name=model_id,
                )

        rows = answer_turns(bench.questions, ask, model_id, asked.greedy)
        if asked.model is not None:
            state.destroy_process_group()
            if not state.is_main_process:
                return  # one process grades, however long that takes
            del model, ask
    save_answers(files / "model_answer" / f"{file_name(model_id)}.jsonl", rows)
    if asked.judge_model is None:
        return print(f"\n  answers  {files / 'model_answer' / file_name(model_id)}.jsonl\n", flush=True)

    # 2. The judge grades, and the means are shown.
    judgments = grade(bench, rows, judge, asked.allow_missing)
    graded_by = file_name(asked.judge_model)
    save_judgments(files / "model_judgment" / f"{graded_by}_single.jsonl", judgments)
    scores = mean_scores(judgments, bench.questions)
    result = folder / f"{file_name(model_id)}.{graded_by}.json"
    write_whole(result, json.dumps({"model": model_id, "judge": asked.judge_model, **scores}, indent=2))
    calls, of_them = judge.stats, "" if asked.answers else "; one of them before the answers, to see that it grades"
    print(f"\n  {model_id}, graded by {asked.judge_model}\n\n{describe_scores(scores)}\n")
    print(f"  judge calls   {calls['asked']} asked, {calls['reused']} reused{of_them}")
    print(f"  scores        {result}\n", flush=True)


if __name__ == "__main__":
    main_of(main)

"""Answers of a tuned model to test sets, in one file: what judges and AlpacaEval compare.

    python recipes/generate.py                                           # runs generate.yaml, beside it
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/generate.py --model runs/mine/model

Every argument: `--help`. A run that was killed goes on, on any number of processes.
"""

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from hf_reflect.arguments import EndpointArguments, mapping, parse_arguments
from hf_reflect.errors import SettingsError
from hf_reflect.evaluation.answers import write_answers
from hf_reflect.evaluation.generation import answers_from_endpoint, generate_answers, join_launch, load_student
from hf_reflect.evaluation.questions import load_test_sets
from hf_reflect.launch import load_table, main_of
from hf_reflect.templates import check_template


@dataclass(kw_only=True)
class GenerationArguments:
    """Who answers what, and how."""

    output: str = field(metadata={"help": "File of answers (JSONL)."})
    test_sets: dict | str | None = field(
        default=None, metadata={"help": "Name of each test set to its file; null: from the Hub."}
    )
    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of a local model."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or Hub id of a PEFT adapter on top of it."})
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code of the model's own may run."})
    endpoint_model: str | None = field(
        default=None, metadata={"help": "In place of `model`: one behind `base_url`, by its name there."}
    )
    system: str | None = field(default=None, metadata={"help": "System message, with `endpoint_model`."})
    name: str | None = field(default=None, metadata={"help": "What the answers call the model; its path if absent."})
    template: str = field(
        default="auto", metadata={"help": "As trained: auto, chat, vicuna, alpaca, wizardlm, plain."}
    )
    max_new_tokens: int = field(
        default=1024, metadata={"help": "Of an answer, at most; with `endpoint_model` in place of max_tokens."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Prompt and answer; the model's own if absent."})
    batch_size: int = field(default=8, metadata={"help": "Questions at once on each process; less needs less memory."})
    seed: int = field(default=0, metadata={"help": "Of sampling, where `temperature` is above 0."})
    allow_missing: bool = field(default=False, metadata={"help": "Write the file though the endpoint left some out."})
    overwrite: bool = field(default=False, metadata={"help": "Replace answers of other settings in the file."})
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU, whatever else is there."})

    def __post_init__(self) -> None:
        self.test_sets = mapping("test_sets", self.test_sets)
        if not self.test_sets:
            raise SettingsError("Name what is asked: `test_sets: {koala: null}`, or a file in place of null.")
        if (self.model is None) == (self.endpoint_model is None):
            raise SettingsError(
                "Name either `model`, a local one, or `endpoint_model`, behind `base_url`; null takes one away that "
                "the YAML names (`--model null`)."
            )
        check_template(self.template)


def main() -> None:
    asked, endpoint = parse_arguments((GenerationArguments, EndpointArguments), __file__)
    if asked.endpoint_model is not None and os.environ.get("WORLD_SIZE", "1") != "1":
        raise SettingsError("An endpoint is asked by one process: start this with `python recipes/generate.py`.")
    state = join_launch(asked.use_cpu)
    questions = load_test_sets(asked.test_sets)
    if asked.endpoint_model is not None:
        if not asked.overwrite and Path(asked.output).exists():
            require_own(asked.output, asked.name or asked.endpoint_model)
        endpoint = replace(endpoint, max_tokens=asked.max_new_tokens)
        teacher = endpoint.asking(asked.endpoint_model, Path(f"{asked.output}.ledger.sqlite"))
        teacher.check_ready()
        answers = answers_from_endpoint(questions, teacher, asked.system, asked.name, asked.allow_missing)
        write_answers(asked.output, answers)
    else:
        if endpoint.top_p not in (None, 1.0):
            raise SettingsError("A local model draws from all tokens: leave `top_p` out, or set it to 1.0.")
        model, tokenizer = load_student(asked.model, asked.dtype, asked.trust_remote_code, asked.adapter)
        answers = generate_answers(
            model,
            tokenizer,
            questions,
            template=asked.template,
            max_new_tokens=asked.max_new_tokens,
            max_length=asked.max_length,
            batch_size=asked.batch_size,
            do_sample=bool(endpoint.temperature),
            temperature=endpoint.temperature or 1.0,
            seed=asked.seed,
            output=asked.output,
            name=asked.name or asked.adapter or asked.model,
            replace=asked.overwrite,
        )
    if state.is_main_process:
        ends = ", ".join(f"{finish or 'failed'} {count}" for finish, count in Counter(answers["finish"]).most_common())
        sets = ", ".join(f"{name} {count}" for name, count in Counter(answers["test_set"]).items())
        print(f"\n  answers    {len(answers)}: {sets}\n  ended by   {ends}")
        print(f"  processes  {state.num_processes}\n  file       {asked.output}\n", flush=True)
    state.destroy_process_group()


def require_own(output: str, name: str) -> None:
    """Raise a SettingsError unless the file holds answers of this endpoint's model, which its ledger has too."""
    table = load_table(output, what="answers")
    found = set(table["model"]) if {"model", "finish", "error"} <= set(table.column_names) else {"somebody else"}
    if others := sorted(map(str, found - {name})):
        raise SettingsError(
            f"{output} holds answers of {', '.join(others)}, not of {name} behind an endpoint.\nName another "
            "`output`, or replace them with `--overwrite true`."
        )


if __name__ == "__main__":
    main_of(main)

"""A judge compares two models' answers, shown in both orders; win, tie and lose as in both papers, with intervals.

    python recipes/judge.py --config recipes/judge.yaml --ours mine.jsonl --theirs theirs.jsonl

The answers are those of generate.py, or files in AlpacaEval's format; questions are matched by their ids, or by their
text where the two files share no id. Every review is in the ledger before it is used: a second run asks only what is
missing. Source: arXiv 2402.10110, section 4.2 and Figure 4.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from hf_reflect import judge_pairs
from hf_reflect.arguments import EndpointArguments, parse_arguments
from hf_reflect.errors import SettingsError
from hf_reflect.evaluation.answers import matched, read_answers, write_answers
from hf_reflect.evaluation.comparison import markdown
from hf_reflect.evaluation.experiment import digest_of, is_done, put
from hf_reflect.judge import require_asked, win_rates
from hf_reflect.launch import main_of


@dataclass(kw_only=True)
class JudgeArguments:
    """Whose answers are compared, and by whom."""

    ours: str = field(metadata={"help": "File of answers of the model that may win."})
    theirs: str = field(metadata={"help": "File of answers to the same questions that it is compared with."})
    judges: list[str] = field(metadata={"help": "Model names as the endpoint knows them; each judges everything."})
    output_dir: str = field(metadata={"help": "Where reviews, the table and the ledger go."})
    estimate_only: bool = field(default=False, metadata={"help": "Print calls, tokens and money, and stop."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what other answers came to."})

    def __post_init__(self) -> None:
        if isinstance(self.judges, str):  # `judges: gpt-5.4` in a YAML
            self.judges = [self.judges]
        if not self.judges:
            raise SettingsError("Name at least one judge: `judges: [gpt-5.4-mini]`.")


def main() -> None:
    from hf_reflect.prompts import PROMPTS
    from hf_reflect.run import print_estimate

    asked, endpoint = parse_arguments((JudgeArguments, EndpointArguments), __file__)
    datasets.disable_progress_bars()
    ours, theirs = matched(read_answers(asked.ours), read_answers(asked.theirs))
    folder = Path(asked.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    judges = {name: endpoint.asking(name, folder / "ledger.sqlite") for name in asked.judges}
    if asked.estimate_only:
        pairs = list(zip(ours["question"], ours["answer"], theirs["answer"], strict=True))
        chats = [PROMPTS["judge"].chat(*each) for q, a, b in pairs for each in ((q, a, b), (q, b, a))]
        for name, judge in judges.items():
            print(f"\n{name}:")
            print_estimate(judge.estimate(chats))
        return

    sides = {"ours": ours, "theirs": theirs}
    made_with: dict[str, Any] = {
        side: {"model": names(table, ""), "answers": digest_of(table)} for side, table in sides.items()
    }
    path = folder / "win_rates.json"
    reuse = is_done(path, made_with, asked.overwrite)
    result = json.loads(path.read_text()) if reuse else {**made_with, "judges": {}}
    for name, judge in judges.items():
        judge.check_ready()
        judged = judge_pairs(ours["question"], ours["answer"], theirs["answer"], judge, ours["category"])
        for column in ("question_id", "test_set"):
            judged = judged.add_column(column, ours[column][:])
        write_answers(folder / f"judged-{name.replace('/', '_')}.jsonl", judged)
        require_asked(judged, judge)
        result["judges"][name] = rates = win_rates(judged)
        put(path, result, settings=made_with)  # after each: the next judge may fail
        print(f"\nJudged by {name}: {names(ours, asked.ours)} against {names(theirs, asked.theirs)}\n")
        print(as_table(rates), flush=True)
        if broken := rates["pooled"]["unparsed"]:
            print(f"\nOf {broken} of {len(judged)} questions a review could not be read; they are in no count.")
    print("\nwin rate: (win − lose) / (win + tie + lose) + 1, so 1 is equal; wins, %: of these questions.")
    print(f"Written: {path}, and every review beside it\n", flush=True)


def names(answers: datasets.Dataset, path: str) -> str:
    """Who wrote them."""
    return ", ".join(sorted(set(answers["model"]) - {""})) or path


def as_table(rates: dict[str, Any]) -> str:
    """Pooled, per test set, per category."""
    rows: list[list[Any]] = [
        ["questions", "name", "win", "tie", "lose", "unparsed", "win rate", "95 % interval", "wins, %"]
    ]
    groups = [("all", "", rates["pooled"])]
    for column, label in (("test_set", "test set"), ("category", "category")):
        groups += [(label, name, rate) for name, rate in rates.get(column, {}).items()]
    for label, name, rate in groups:
        shown = ["-", "-", "-"]
        if rate["win_rate"] is not None:
            low, high = rate["interval"]
            shown = [f"{rate['win_rate']:.3f}", f"{low:.3f} to {high:.3f}", f"{100 * rate['share']:.1f}"]
        rows.append([label, name, *(rate[count] for count in ("win", "tie", "lose", "unparsed")), *shown])
    return markdown(rows)


if __name__ == "__main__":
    main_of(main)

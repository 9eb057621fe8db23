"""AlpacaEval of a model's answers: its win rate against a reference, beside the length of both models' answers.

    python recipes/run_alpaca_eval.py --answers answers.jsonl --annotator alpaca_eval_gpt4 --reference text_davinci_003

Every argument: `--help`. Judgements are kept: after a kill the same command goes on.
Source: github.com/tatsu-lab/alpaca_eval, whose package does the judging.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_reflect.arguments import EndpointArguments, parse_arguments
from hf_reflect.errors import SettingsError
from hf_reflect.evaluation.alpaca_eval import (
    VERSIONS,
    annotate,
    is_asked_by_teacher,
    load_reference,
    read_annotations,
    write_outputs,
)
from hf_reflect.evaluation.answers import read_answers
from hf_reflect.files import write_whole
from hf_reflect.launch import main_of
from hf_reflect.teacher import Teacher

_OF_THE_ANNOTATOR = ("temperature", "top_p", "max_tokens")


@dataclass(kw_only=True)
class AlpacaEvalArguments:
    """Whose answers are compared with whose, and by whom."""

    answers: str | None = field(
        default=None, metadata={"help": "File of answers, of generate.py or in AlpacaEval's format."}
    )
    generator: str | None = field(default=None, metadata={"help": "The model's name; that in the answers if absent."})
    annotator: str | None = field(
        default=None,
        metadata={"help": "A configuration of alpaca-eval's, or a folder or YAML of that form; no default."},
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "text_davinci_003 or gpt4_1106_preview (from the Hub), or a file like `answers`; no default."
        },
    )
    annotations: str | None = field(
        default=None, metadata={"help": "Only read this file of annotations, instead of asking for any."}
    )
    max_instances: int | None = field(default=None, metadata={"help": "Judge only so many: for a trial."})
    output_dir: str = field(default="runs/alpaca_eval", metadata={"help": "For outputs, annotations and metrics."})

    def pair(self) -> tuple[str, str]:
        """Annotator and reference, which belong together."""
        if self.annotator is None or self.reference is None:
            known = "\n".join(
                f"  {version}: `annotator: {annotator}` with `reference: {reference}`"
                for version, (annotator, reference) in VERSIONS.items()
            )
            raise SettingsError(
                "Name `annotator` and `reference`: a win rate means nothing without them, and those of one version "
                f"compare with none of the other.\n{known} (both papers used the first)."
            )
        return self.annotator, self.reference


def main() -> None:
    asked, endpoint, *_ = parse_arguments((AlpacaEvalArguments, EndpointArguments), __file__)
    changed = [name for name in _OF_THE_ANNOTATOR if getattr(endpoint, name) != getattr(EndpointArguments, name)]
    if changed:
        raise SettingsError(
            f"`{changed[0]}` stands in the annotator's configuration. For another take a copy of that folder as "
            "`annotator`; its win rates compare with no published one."
        )
    pair = asked.pair() if asked.annotations is None else None
    folder, outputs = Path(asked.output_dir), None
    if asked.answers is not None:
        outputs = write_outputs(read_answers(asked.answers), folder / "model_outputs.json", asked.generator)
    if pair is None:
        metrics = read_annotations(asked.annotations, outputs)
        return report(
            metrics, folder, {"annotations": asked.annotations}, "nobody was asked: the annotations were there"
        )
    if outputs is None:
        raise SettingsError("Name the `answers` to judge, or existing `annotations` to read.")
    annotator, reference = pair
    # the annotator's configuration names the model that is asked
    teacher = endpoint.asking(annotator, folder / "ledger.sqlite")
    rows = annotate(
        outputs, load_reference(reference), annotator, teacher, folder / "judgements.json", asked.max_instances
    )
    write_json(folder / "annotations.json", rows)
    made_with = {"model": outputs[0]["generator"], "annotator": annotator, "reference": reference}
    metrics = read_annotations(rows, outputs)
    report(
        metrics, folder, made_with | {"max_instances": asked.max_instances}, who_was_asked(annotator, teacher, rows)
    )


def who_was_asked(annotator: str, teacher: Teacher, rows: list[dict[str, Any]]) -> str:
    """By whom the judgements were asked for, and how many."""
    calls = teacher.stats
    if all(row["output_1"] == row["output_2"] for row in rows):
        return "nobody was asked: both models' outputs are equal"
    if is_asked_by_teacher(annotator):
        return f"through the ledger: {calls['asked']} asked, {calls['reused']} reused, {calls['failed']} failed"
    if not calls["asked"]:
        return "nobody was asked: alpaca-eval has kept all judgements"
    return f"by alpaca-eval's own client: {calls['asked']} asked"


def report(metrics: dict[str, Any], folder: Path, made_with: dict[str, Any], judge: str) -> None:
    """Save what came out, and say it."""
    write_json(folder / "metrics.json", made_with | metrics)
    error = metrics["standard_error"]
    controlled = metrics["length_controlled_winrate"]
    of_reference = metrics["avg_length_reference"]
    lines = {
        "win rate": f"{metrics['win_rate']:.2f} %" + (f" (standard error {error:.2f})" if error is not None else ""),
        "wins, draws, losses": f"{metrics['n_wins']}, {metrics['n_draws']}, {metrics['n_losses']}",
        "annotated": f"{metrics['n_total']}, and {metrics['n_unannotated']} without a judgement",
        "mean length": f"{metrics['avg_length']} characters"
        + (f", the reference's {of_reference}" if of_reference is not None else ""),
        "length-controlled": f"{controlled:.2f} %"
        if controlled is not None
        else f"none: {metrics['length_controlled_note']}",
    }
    lines |= {"judge": judge, "metrics": str(folder / "metrics.json")}
    print("\n" + "\n".join(f"  {name:<19}  {value}" for name, value in lines.items()) + "\n", flush=True)


def write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main_of(main)

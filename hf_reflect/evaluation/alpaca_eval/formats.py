"""AlpacaEval's format: the outputs of a model, and of the reference that it is compared with."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...columns import require_columns
from ...errors import DataError
from ...files import write_whole
from ...launch import first_line
from ...parsing.reply import shortened
from ..answers import read_answers
from .package import HUB

Row = dict[str, Any]

# The package reads these by a loading script, which datasets runs no more: the files behind it.
REFERENCES = {"text_davinci_003": "alpaca_eval.json", "gpt4_1106_preview": "alpaca_eval_gpt4_baseline.json"}


def write_outputs(answers: Iterable[Mapping[str, Any]], path: str | Path, generator: str | None = None) -> list[Row]:
    """One model's answers in AlpacaEval's format: for `annotate`, and for the package's own command line.

    In:  question, answer, model, optionally category or test_set       (as `read_answers` gives them)
    Out: instruction, output, generator, dataset (where known)          (a JSON file, and the same rows)

    Raises:
        DataError: answers of two models, or of none that is named; missing ones; a question that stands there twice.
    """
    outputs = _as_outputs(answers, generator, "The answers")
    write_whole(Path(path), json.dumps(outputs, ensure_ascii=False, indent=2))
    return outputs


def load_reference(reference: str) -> list[Row]:
    """What a model is compared with: a name in `REFERENCES`, from the Hub, or a file as `read_answers` reads it.

    Raises:
        DataError: no such file, the Hub cannot be reached, or it holds no outputs of one model.
    """
    import huggingface_hub

    path = reference
    if reference in REFERENCES and not Path(reference).exists():
        try:
            path = huggingface_hub.hf_hub_download(HUB, REFERENCES[reference], repo_type="dataset")
        except OSError as error:
            raise DataError(
                f"The reference {reference!r} cannot be loaded: {REFERENCES[reference]} of {HUB} on the Hub: "
                f"{first_line(error)}\nBe online, or give the path of that file as `reference`."
            ) from error
    answers = read_answers(path)
    named = None if any(answers["model"]) else Path(reference).stem
    return _as_outputs(answers, named, f"The answers of the reference {reference!r}")


def _as_outputs(answers: Iterable[Mapping[str, Any]], generator: str | None, who: str) -> list[Row]:
    rows = list(answers)
    require_columns(rows[0] if rows else (), ("question", "answer"), who, "Read them with `read_answers(path)`.")
    models = sorted({row.get("model") or "" for row in rows} - {""})
    if len(models) > 1:
        raise DataError(
            f"{who} are of {len(models)} models ({', '.join(models[:3])}), but outputs have one generator. Give each "
            "model a file of its own."
        )
    if not generator and not models:
        raise DataError(f"{who} do not say which model gave them: name it as `generator`.")
    missing = [row["question"] for row in rows if not isinstance(row["answer"], str)]
    twice = [text for text, count in Counter(row["question"] for row in rows).items() if count > 1]
    if texts := missing or twice:
        found = "lack an output to" if missing else "hold more than once"
        raise DataError(
            f"{who} {found} {len(texts)} of {len(rows)} questions, such as {shortened(texts[0], 60)!r}: AlpacaEval "
            "matches one output to each instruction. Generate what is missing again, and leave one of each."
        )
    outputs = []
    for row in rows:
        dataset = row.get("category") or row.get("test_set")
        output = {"instruction": row["question"], "output": row["answer"], "generator": generator or models[0]}
        outputs.append(output | ({"dataset": dataset} if dataset else {}))
    return outputs

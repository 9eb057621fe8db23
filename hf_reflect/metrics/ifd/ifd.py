"""IFD and r-IFD of instruction-response pairs, as a module of the `evaluate` library; its card is README.md."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import datasets
import evaluate

from hf_reflect.columns import LOSS_COLUMNS
from hf_reflect.errors import SettingsError
from hf_reflect.metrics import NullsAllowed, rows_of

_CITATION = """\
@article{li2024selective,
    title={Selective Reflection-Tuning: Student-Selected Data Recycling for LLM Instruction-Tuning},
    author={Li, Ming and Chen, Lichang and Chen, Jiuhai and He, Shwai and Gu, Jiuxiang and Zhou, Tianyi},
    journal={arXiv preprint arXiv:2402.10110},
    year={2024}
}
@article{li2023quantity,
    title={From Quantity to Quality: Boosting LLM Performance with Self-Guided Data Selection for Instruction Tuning},
    author={Li, Ming and Zhang, Yong and Li, Zhitao and Chen, Jiuhai and Chen, Lichang and Cheng, Ning and
        Wang, Jianzong and Zhou, Tianyi and Xiao, Jing},
    journal={arXiv preprint arXiv:2308.12032},
    year={2023}
}
"""

_DESCRIPTION = """\
IFD (Instruction-Following Difficulty) says how much an instruction helps a causal language model, the student, to
predict the response: the response's perplexity given the instruction, divided by its perplexity alone. Near 1 the
instruction hardly helps; low values are pairs that the student already masters.
r-IFD turns it round: the instruction's perplexity when it has to be guessed from the response, divided by its
perplexity alone. The lower, the better the response shows what was asked.
"""

_KWARGS_DESCRIPTION = """
Args:
    instructions (list of str): what is asked.
    responses (list of str): the answer to each. A pair in which a text is None is not scored.
    inputs (list of str): context of each instruction, "" or None where there is none; may be left out.
    model_id (str): the student, a causal language model: its id on the Hub or a folder.
    model, tokenizer: instead of `model_id`, a loaded student, scored where it lies.
    template (str): how the student sees a pair: auto (its chat template, else vicuna), chat, vicuna, alpaca,
        wizardlm or plain. Defaults to auto.
    max_length (int): tokens of a pair; what is longer is cut. Defaults to 2048.
    device (str): where the model of `model_id` runs. Defaults to an accelerator if there is one.
Returns:
    ifd, r_ifd (lists of float): one value a pair, None where it cannot be scored.
    mean_ifd, mean_r_ifd (float): over the values that are there; None where there are none.
    scored (int): pairs that have both scores.
    cut (int): pairs of which something was cut to fit `max_length`.
    loss_instruction, loss_response, loss_instruction_given_response, loss_response_given_instruction (lists of float):
        the losses behind them, in nats per token.
Examples:
    >>> from importlib.resources import files
    >>> import evaluate
    >>> ifd = evaluate.load(str(files("hf_reflect") / "metrics" / "ifd"))
    >>> results = ifd.compute(
    ...     instructions=["Name three rivers of Europe.", "Add the numbers."],
    ...     inputs=["", "17 and 25"],
    ...     responses=["The Danube, the Rhine and the Loire.", "42"],
    ...     model_id="Qwen/Qwen3-0.6B-Base",
    ... )
    >>> results["scored"], len(results["ifd"]), len(results["r_ifd"])
    (2, 2, 2)
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Ifd(NullsAllowed, evaluate.Metric):
    """Source: arXiv 2402.10110, Eq. 2 to 4 (IFD) and 7, 8 (r-IFD)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            module_type="metric",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"instructions": datasets.Value("string"), "responses": datasets.Value("string")}
            ),
            codebase_urls=["https://github.com/tianyi-lab/Reflection_Tuning"],
            reference_urls=["https://arxiv.org/abs/2402.10110", "https://arxiv.org/abs/2308.12032"],
        )

    def _compute(
        self,
        instructions: Sequence[str | None],
        responses: Sequence[str | None],
        inputs: Sequence[str | None] | None = None,
        model_id: str | None = None,
        model: Any = None,
        tokenizer: Any = None,
        template: str = "auto",
        max_length: int = 2048,
        device: str | None = None,
    ) -> dict[str, Any]:
        from hf_reflect.scoring import StudentScorer

        rows = rows_of(instructions, responses, inputs)
        scorer = StudentScorer(*_student(model_id, model, tokenizer, device), template, max_length)
        scores = scorer.score_rows(rows)
        pairs = zip(scores["ifd"], scores["r_ifd"], strict=True)
        return {
            "ifd": scores["ifd"],
            "r_ifd": scores["r_ifd"],
            "mean_ifd": _mean(scores["ifd"]),
            "mean_r_ifd": _mean(scores["r_ifd"]),
            "scored": sum(None not in pair for pair in pairs),
            "cut": scorer.rows_cut,
            **{name: scores[name] for name in LOSS_COLUMNS},
        }


def _student(model_id: str | None, model: Any, tokenizer: Any, device: str | None) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    given = {"model_id": model_id, "model": model, "tokenizer": tokenizer}
    names = [name for name, value in given.items() if value is not None]
    if names == ["model", "tokenizer"]:
        if device is not None:
            raise SettingsError("`device` goes with `model_id`; move a loaded model yourself: `model.to(device)`.")
        return model, tokenizer
    if model_id is None or names != ["model_id"]:
        raise SettingsError(
            "`ifd` needs one student: `model_id`, or a loaded `model` together with its `tokenizer`; it was given "
            f"{' and '.join(names) or 'none of them'}."
        )
    import torch
    from transformers import AutoModelForCausalLM

    from hf_reflect.launch import load_tokenizer

    tokenizer = load_tokenizer(model_id)
    place = device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    return AutoModelForCausalLM.from_pretrained(model_id).to(place), tokenizer


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there else None

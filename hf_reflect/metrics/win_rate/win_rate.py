"""Win rate by a judge's scores in both orders, as a module of the `evaluate` library; its card is README.md."""

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

import hf_reflect.judge

_CITATION = """\
@article{li2024selective,
    title={Selective Reflection-Tuning: Student-Selected Data Recycling for LLM Instruction-Tuning},
    author={Li, Ming and Chen, Lichang and Chen, Jiuhai and He, Shwai and Gu, Jiuxiang and Zhou, Tianyi},
    journal={arXiv preprint arXiv:2402.10110},
    year={2024}
}
"""

_DESCRIPTION = """\
Win rate of one model's answers over another's, by a judge that scored both answers to each question twice, once in
either order. A question is won if our answer is better in both orders, or better in one and equal in the other; lost
if theirs is; everything else is a tie. The win rate is (win - lose) / all + 1: 1 means equal, 2 that all questions
were won, 0 that all were lost. It comes with a bootstrap interval over the questions.
"""

_KWARGS_DESCRIPTION = """
Args:
    scores (list of pairs of float): of each question [ours, theirs], judged with our answer shown first.
    scores_reverse (list of pairs of float): of each question [ours, theirs] again, judged with their answer shown
        first. NOT in the order shown: turn the pair round if the judge's first number is theirs.
        In both lists an empty list, None or NaN stands for a judgement without two scores.
    seed (int): of the bootstrap. Defaults to 0.
Returns:
    win, tie, lose (int): questions.
    unparsed (int): questions left out, since one of their two judgements has no two scores.
    win_rate (float): (win - lose) / (win + tie + lose) + 1.
    interval (pair of float): its 95 % bootstrap interval.
    share, tie_share, lose_share (float): of wins, ties, losses.
    share_interval (pair of float): 95 % bootstrap interval of the share of wins.
    Rates, shares and intervals are None where no question is left.
Examples:
    >>> from importlib.resources import files
    >>> import evaluate
    >>> win_rate = evaluate.load(str(files("hf_reflect") / "metrics" / "win_rate"))
    >>> results = win_rate.compute(
    ...     scores=[[9, 7], [10, 6], [8, 8], [9, 6], [6, 9], []],
    ...     scores_reverse=[[8, 8], [9, 5], [8, 8], [6, 9], [7, 9], [8, 7]],
    ... )
    >>> results["win"], results["tie"], results["lose"], results["unparsed"]
    (2, 2, 1, 1)
    >>> results["win_rate"]
    1.2
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class WinRate(evaluate.Metric):
    """Source: arXiv 2402.10110, section 4.3 and Table 4."""

    def _info(self) -> evaluate.MetricInfo:
        pair = datasets.List(datasets.Value("float64"))
        return evaluate.MetricInfo(
            module_type="metric",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"scores": pair, "scores_reverse": pair}),
            codebase_urls=["https://github.com/tianyi-lab/Cherry_LLM"],
            reference_urls=["https://arxiv.org/abs/2402.10110"],
        )

    def _compute(self, scores: Sequence[Any], scores_reverse: Sequence[Any], seed: int = 0) -> dict[str, Any]:
        both = zip(map(_judgement, scores), map(_judgement, scores_reverse), strict=True)
        rates = hf_reflect.judge.win_rate(list(both), seed=seed)
        counted = rates["win"] + rates["tie"] + rates["lose"]
        shares = {f"{name}_share": rates[name] / counted if counted else None for name in ("tie", "lose")}
        return rates | shares


def _judgement(pair: Sequence[float | None] | None) -> Sequence[float | None] | None:
    """None where one of two scores is missing; what is no pair is left for `win_rate` to refuse."""
    missing = not pair or any(score is None or not math.isfinite(score) for score in pair)
    return None if missing else pair

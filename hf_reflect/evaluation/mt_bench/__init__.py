"""MT-Bench: two turns of a conversation, each graded by a judge, in FastChat's own files.

    read from FastChat's data folder   mt_bench/question.jsonl, mt_bench/reference_answer/<judge>.jsonl,
                                       judge_prompts.jsonl; none of them is part of this project
    written below an output folder     data/mt_bench/model_answer/<model>.jsonl,
                                       data/mt_bench/model_judgment/<judge>_single.jsonl

so that `python -m fastchat.llm_judge.show_result --judge-model <judge>`, started in the output folder, shows the same
means. Sources: arXiv 2306.05685; FastChat's fastchat/llm_judge for the fields of each file, the sampling temperatures
and how a score is read.

`files` reads and writes them, `answering` asks a model for both turns, `grading` has the judge grade them.
"""

from .answering import TEMPERATURES, answer_turns
from .files import Bench, file_name, read_bench, read_model_answers, save_answers, save_judgments
from .grading import UNPARSED, check_judge, describe_scores, grade, mean_scores, read_score

__all__ = [
    "TEMPERATURES",
    "UNPARSED",
    "Bench",
    "answer_turns",
    "check_judge",
    "describe_scores",
    "file_name",
    "grade",
    "mean_scores",
    "read_bench",
    "read_model_answers",
    "read_score",
    "save_answers",
    "save_judgments",
]

"""Reflection-Tuning for Hugging Face Trainers: a teacher rewrites the data, the student chooses what to train on.

Names load on first use, so that `import hf_reflect` costs milliseconds and pulls in neither torch nor openai.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import SelectionCallback as SelectionCallback
    from .errors import BudgetExceeded as BudgetExceeded
    from .errors import ReflectError as ReflectError
    from .hub import push_recycled as push_recycled
    from .hub import verify as verify
    from .judge import judge_pairs as judge_pairs
    from .judge import read_scores as read_scores
    from .judge import win_rate as win_rate
    from .pairs import to_pairs as to_pairs
    from .prompts import PROMPTS as PROMPTS
    from .prompts import ReflectionPrompt as ReflectionPrompt
    from .reflection import ReflectionTransform as ReflectionTransform
    from .report import build_report as build_report
    from .report import statistics as statistics
    from .scoring import StudentScorer as StudentScorer
    from .selection import RULES as RULES
    from .selection import select as select
    from .selection import select_top as select_top
    from .teacher import Teacher as Teacher
    from .teacher.replies import Reply as Reply
    from .templates import to_messages as to_messages
    from .templates import to_prompt_completion as to_prompt_completion
    from .templates import to_training_ids as to_training_ids

_HOME = {
    "BudgetExceeded": "errors",
    "PROMPTS": "prompts",
    "RULES": "selection",
    "ReflectError": "errors",
    "ReflectionPrompt": "prompts",
    "ReflectionTransform": "reflection",
    "Reply": "teacher.replies",
    "SelectionCallback": "callback",
    "StudentScorer": "scoring",
    "Teacher": "teacher",
    "build_report": "report",
    "judge_pairs": "judge",
    "push_recycled": "hub",
    "read_scores": "judge",
    "select": "selection",
    "select_top": "selection",
    "statistics": "report",
    "to_messages": "templates",
    "to_pairs": "pairs",
    "to_prompt_completion": "templates",
    "to_training_ids": "templates",
    "verify": "hub",
    "win_rate": "judge",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("hf-reflect")
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

"""How a judge is asked: the form of such a prompt."""

from dataclasses import dataclass

from .filling import check_template, filled


@dataclass(frozen=True)
class JudgePrompt:
    """How a judge is asked to compare two answers; `hf_reflect.judge.read_scores` reads its review.

    Args:
        system: the system message.
        user: a `str.format` template with `{question}`, `{answer_1}` and `{answer_2}`.

    Raises:
        SettingsError: the template has unknown fields or lacks one.

    Source: arXiv 2402.10110, Figure 4.
    """

    system: str
    user: str

    def __post_init__(self) -> None:
        fields = ("question", "answer_1", "answer_2")
        check_template("user", self.user, fields, needed=fields)

    def chat(self, question: str, answer_1: str, answer_2: str) -> list[dict[str, str]]:
        """The messages that ask for two scores."""
        user = filled(self.user, question=question, answer_1=answer_1, answer_2=answer_2)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]

"""What teacher and judge are asked and what shape a reply has: criteria, template and form side by side.

Texts after arXiv 2402.10110, Figures 4 to 6. Ledger keys hang on them: a changed character asks everything again.

Here are the texts. `reflecting` has the form of a prompt that asks for a rewrite, with the criteria it lists;
`judging` that of one that asks for two scores; `filling` the templates of both.
"""

from typing import Any

from ..parsing import Rewrite
from .judging import JudgePrompt
from .reflecting import INSTRUCTION_CRITERIA, RESPONSE_CRITERIA, ReflectionPrompt

__all__ = [
    "INSTRUCTION_CRITERIA",
    "PROMPTS",
    "RESPONSE_CRITERIA",
    "JudgePrompt",
    "ReflectionPrompt",
    "Rewrite",
]

_PAIR = "{history}[Instruction]\n{instruction}\n\n{input}[The Start of Answer]\n{response}\n[The End of Answer]\n\n"


def _schema(*keys: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {key: {"type": "string"} for key in keys},
        "required": list(keys),
        "additionalProperties": False,
    }


_INSTRUCTION_SYSTEM = "You are a helpful, precise but picky assistant for checking the quality of a given instruction."
_INSTRUCTION_TASK = (
    _PAIR + "We would like you to answer several questions related to the quality of a given instruction.\n\n"
    "1. Why this instruction is not good? First analyze the instruction based on the {instruction_criteria}. "
    "Then analyze why this answer is not good for the given instruction based on the {response_criteria}. "
    "Finally, analyze why this bad instruction leads to a bad answer.\n\n"
    "2. Based on the reason you provided, generate a new and complete instruction that is complex and difficult "
    "to answer directly. Make sure the new instruction is relevant but independent to the original instruction, "
    "which can be answered without knowing the original instruction"
)
_INSTRUCTION_ANSWER = "3. Answer the newly generated instruction as detailed as possible"
_RESPONSE_SYSTEM = (
    "You are a helpful, precise but picky assistant for checking the quality of the answer to a given instruction."
)
_RESPONSE_TASK = (
    _PAIR + "We would like you to answer several questions related to the quality of the answer to the given "
    "instruction.\n\n"
    "1. Why this answer is not good for the given instruction? Analyze based on the {response_criteria}.\n\n"
    "2. Based on the reason you provided, generate a better answer, new and complete, as detailed as possible"
)

PROMPTS: dict[str, Any] = {
    "instruction": ReflectionPrompt(
        system=_INSTRUCTION_SYSTEM,
        user=f"{_INSTRUCTION_TASK}, put the new instruction in the format of [New Instruction] your instruction [End]"
        f"\n\n{_INSTRUCTION_ANSWER}, in the format of [New Answer] your answer [End]",
        tags=("New Instruction", "New Answer"),
    ),
    "response": ReflectionPrompt(
        system=_RESPONSE_SYSTEM,
        user=f"{_RESPONSE_TASK}, in the format of [Better Answer] your answer [End]",
        tags=("Better Answer",),
    ),
    "instruction-json": ReflectionPrompt(
        system=_INSTRUCTION_SYSTEM,
        user=f"{_INSTRUCTION_TASK}.\n\n{_INSTRUCTION_ANSWER}.\n\n"
        'Reply with one JSON object and nothing else. Its keys are "critique" (your answer to 1), "instruction" (the '
        'new instruction of 2) and "response" (the answer of 3); each value is a string.',
        schema=_schema("critique", "instruction", "response"),
    ),
    "response-json": ReflectionPrompt(
        system=_RESPONSE_SYSTEM,
        user=f"{_RESPONSE_TASK}.\n\n"
        'Reply with one JSON object and nothing else. Its keys are "critique" (your answer to 1) and "response" (the '
        "better answer of 2); each value is a string.",
        schema=_schema("critique", "response"),
    ),
    # Figure 4 as meant: printed, it shows the block of Assistant 2 twice
    "judge": JudgePrompt(
        system="You are a helpful and precise assistant for checking the quality of the answer.",
        user="[Question]\n{question}\n\n"
        "[The Start of Assistant 1's Answer]\n{answer_1}\n[The End of Assistant 1's Answer]\n\n"
        "[The Start of Assistant 2's Answer]\n{answer_2}\n[The End of Assistant 2's Answer]\n\n"
        "We would like to request your feedback on the performance of two AI assistants in response to the user "
        "question displayed above.\n"
        "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant "
        "receives an overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
        "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
        "respectively. The two scores are separated by a space. In the subsequent line, please provide a "
        "comprehensive explanation of your evaluation, avoiding any potential bias and ensuring that the order in "
        "which the responses were presented does not affect your judgment.",
    ),
}

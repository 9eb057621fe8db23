"""Modules of the `evaluate` library, each loaded by the path of its folder; its README.md is its card.

ifd/        IFD and r-IFD: how hard a pair is for a student, and how well its answer tells what was asked
coherence/  Sentence-BERT cosine of instruction and response
win_rate/   win, tie and lose from a judge's scores in both orders

    evaluate.load(str(importlib.resources.files("hf_reflect") / "metrics" / "ifd"))

`evaluate` copies a module's script alone, and takes the first metric class in it for the module's own: what two of
them share stands here, and is no metric itself.
"""

from collections.abc import Sequence
from typing import Any

from ..errors import DataError


class NullsAllowed:
    """A base, to be named before `evaluate.Metric`, of metrics whose texts may be null."""

    def _enforce_nested_string_type(self, schema: Any, obj: Any) -> Any:
        # evaluate refuses a null, but only in the first row
        return None if obj is None else super()._enforce_nested_string_type(schema, obj)  # type: ignore[misc]


def rows_of(
    instructions: Sequence[str | None], responses: Sequence[str | None], inputs: Sequence[str | None] | None
) -> list[dict[str, Any]]:
    """Columns as `compute` is given them, as rows of instruction, input and response.

    Raises:
        DataError: `inputs` are no texts, or not one for each instruction.
    """
    inputs = [None] * len(instructions) if inputs is None else inputs
    strange = [inputs] if isinstance(inputs, str) else [text for text in inputs if not isinstance(text, str | None)]
    if strange or len(inputs) != len(instructions):
        found = repr(strange[0]) if strange else f"{len(inputs)} of them"
        raise DataError(
            f"`inputs` is a list with a text, or None, for each of the {len(instructions)} instructions, not {found}. "
            "Leave it out where no instruction has an input."
        )
    return [
        {"instruction": instruction, "input": context, "response": response}
        for instruction, context, response in zip(instructions, inputs, responses, strict=True)
    ]

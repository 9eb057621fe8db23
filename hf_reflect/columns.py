"""The vocabulary of the table: names of columns, and what can be said of a row without any table library."""

from collections.abc import Iterable

from .errors import DataError

KEY_COLUMNS = ("row_id", "variant", "source")
LOSS_COLUMNS = (
    "loss_instruction",
    "loss_response",
    "loss_instruction_given_response",
    "loss_response_given_instruction",
)
SCORE_COLUMNS = (*LOSS_COLUMNS, "ifd", "r_ifd")


def question(instruction: str, input: str | None) -> str:
    """The x of the papers: the instruction with its input, joined by a newline."""
    return f"{instruction}\n{input}" if input else instruction


def is_usable(instruction: str | None, response: str | None) -> bool:
    """Whether a version can be scored, reflected on and trained on: both texts are there. `error` is only a remark."""
    return instruction is not None and response is not None


def require_columns(found: Iterable[str], needed: Iterable[str], who: str, hint: str = "") -> None:
    """Raise a DataError that names the columns which `who` misses."""
    found = list(found)
    if missing := [name for name in needed if name not in found]:
        raise DataError(
            f"{who} needs the column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}, but found only "
            f"{found}. " + (hint or "Make the table with `to_pairs(dataset)` first.")
        )

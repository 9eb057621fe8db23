"""What a trainer must be for its student to choose its data, and what is trained on must be."""

import logging
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from ..columns import require_columns
from ..errors import DataError, SettingsError
from ..selection import check_versions
from ..templates import StudentTemplate
from .view import CandidateView

logger = logging.getLogger(__name__)


def check_trainer(trainer: Any) -> None:
    """Raise unless the trainer's data can be chosen among; each message says what to do instead."""
    if getattr(trainer.args, "packing", False):
        raise SettingsError(
            "`SelectionCallback` cannot choose among packed rows: several pairs share one. Choose first, then "
            "pack: build the trainer with `packing=False`, take `chosen = SelectionCallback(trainer).choose()`, "
            "and build a second one with `packing=True` over `chosen`. Or set `padding_free=True` and "
            "`max_length=None`, which saves the padding as well."
        )
    if trainer.processing_class is None:
        raise SettingsError("The trainer has no tokenizer: give it one, `Trainer(..., processing_class=tokenizer)`.")
    dataset = trainer.train_dataset
    if not isinstance(dataset, Dataset):
        raise SettingsError(
            f"`SelectionCallback` needs the candidates as a `datasets.Dataset`, not a {type(dataset).__name__}: "
            "it scores all before it chooses. Make a table of a stream first: `Dataset.from_list(list(stream))`."
        )
    require_columns(
        dataset.column_names,
        ("row_id", "variant", "instruction", "input", "response", "input_ids"),
        "`SelectionCallback`",
        "Build the trainer with `to_training_ids(candidates, tokenizer)`.",
    )
    if (kind := dataset.features["row_id"].dtype) not in ("string", "large_string"):
        raise DataError(
            f"The column row_id holds {kind}, and must hold strings: `selection.json` names rows by it. Make the "
            "table with `to_pairs`, or `cast_column('row_id', Value('string'))`."
        )
    check_versions(dataset)


def check_ids(rows: Dataset, template: StudentTemplate, max_length: int, told: bool) -> None:
    """The ids to train on must be those that will be scored: the same template, cut at the same length.

    Looked at are the first row that is not cut, and the longest. A prompt's last id is left out, since it may
    merge with the answer; so may others, at the borders of earlier turns: there the text must be the same.
    """
    rows = rows.with_format(None)
    for number in range(min(len(rows), 100)):
        row = rows[number]
        expected = template.forward(row)
        if expected.cut or len(row["input_ids"]) >= max_length:
            continue
        prompt = expected.context[:-1]
        found = row["input_ids"][: len(prompt)]
        if found == prompt or _said(template.tokenizer, row["input_ids"]).startswith(
            _said(template.tokenizer, prompt)
        ):
            break
        raise SettingsError(
            f"The candidates were tokenized with another template than {template.name!r}: row {number} begins "
            f"{template.tokenizer.decode(found)[:120]!r}. Give the callback the template of the data: "
            "`SelectionCallback(trainer, template=...)`."
        )
    longest = rows[int(lengths_of(rows).argmax())]
    expected, ids = template.forward(longest), longest["input_ids"]
    whole = len(expected.context) + len(expected.target)
    if len(ids) < whole or (expected.cut and ids[-1] != template.eos):
        if told:
            logger.warning(
                "Long candidates are not cut at max_length=%d in training as they are in scoring. With "
                "`to_training_ids` and `SFTConfig` of the same `max_length` what is scored is what is trained on.",
                max_length,
            )


def lengths_of(dataset: Dataset) -> np.ndarray:
    """Tokens of each row."""
    return pc.list_value_length(dataset.with_format("arrow")["input_ids"][:]).to_numpy()


def _said(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.decode(ids).split())


def same_rows(running: Any, chosen: Dataset | CandidateView) -> bool:
    """Whether a dataloader has the rows that it should; columns may have been removed."""
    if isinstance(chosen, CandidateView):
        return running is chosen
    if not isinstance(running, Dataset) or len(running) != len(chosen):
        return False
    both = (some.select_columns("input_ids").with_format("arrow").iter(10_000) for some in (running, chosen))
    return all(one["input_ids"] == other["input_ids"] for one, other in zip(*both, strict=True))

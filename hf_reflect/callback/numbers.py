"""What a choice did, in numbers: for `report_to`, and as a table for people."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from ..selection import VARIANTS, Decision

_SCORES = ("ifd", "r_ifd")


class Figures(TrainerCallback):
    """Numbers that are known before training, say the teacher's cost, for whatever `report_to` names.

        trainer.add_callback(Figures(trainer, {"teacher/cost": 12.3}))

    Args:
        trainer: who logs them, once, when training begins.
        figures: by name; the same on all processes.
    """

    def __init__(self, trainer: Trainer, figures: Mapping[str, float]):
        self.trainer, self.figures = trainer, dict(figures)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell them."""
        if self.figures:
            tell(self.trainer, self.figures)


def tell(trainer: Trainer, figures: dict[str, float]) -> None:
    """Log numbers through the trainer, by themselves.

    By the base class: SFTTrainer's own would mix in, and use up, the metrics of the steps since its last log.
    """
    Trainer.log(trainer, figures)


def numbers_of(
    scored: Dataset, decisions: Sequence[Decision], before: Sequence[int], after: Sequence[int], again: bool = False
) -> dict[str, float]:
    """rows, kept, by version too; the other rows by reason; mean IFD and r-IFD over finite values.

    Args:
        scored: the versions that were to be chosen among.
        decisions: of every row, from `decide`.
        before: places of the versions that the means compare with: the originals, or those trained on until now.
        after: of the versions that are trained on from now on.
        again: whether the rows are kept already: `changed` says how many got another version, and a row of which none
            passes is not dropped.
    """
    numbers: dict[str, float] = {"rows": len(decisions), "kept": len(after)}
    kept = Counter(np.array(scored["variant"][:], dtype=object)[list(after)].tolist())
    numbers |= {f"kept/{variant}": kept[variant] for variant in VARIANTS if kept[variant]}
    if again:
        numbers["changed"] = sum(one != other for one, other in zip(before, after, strict=True))
    reasons = Counter(decision.why.split(":")[0] for decision in decisions if not decision.kept)
    others = "none_passes" if again else "dropped"
    numbers[others] = reasons.total()
    numbers |= {f"{others}/{reason}": count for reason, count in reasons.most_common()}
    for name in _SCORES:
        if name in scored.column_names:
            values = np.array(scored[name][:], dtype=float)
            for when, places in (("before", before), ("after", after)):
                finite = values[list(places)][np.isfinite(values[list(places)])]
                if len(finite):
                    numbers[f"{name}/{when}"] = float(finite.mean())
    return numbers


def as_table(numbers: dict[str, float], title: str) -> str:
    """For a terminal of 80 columns."""
    lines = [title]
    for name in ("rows", "kept", "changed", "dropped", "none_passes"):
        if name in numbers:
            lines.append(f"  {name.replace('_', ' '):<12}{numbers[name]:>8}")
        for part, number in numbers.items():
            if part.startswith(f"{name}/"):
                lines.append(f"  {'':<12}{number:>8}  {part.removeprefix(f'{name}/')}")
    for name, label in zip(_SCORES, ("mean IFD", "mean r-IFD"), strict=True):
        means = [f"{numbers[key]:.4f}" for key in (f"{name}/before", f"{name}/after") if key in numbers]
        if means:
            lines.append(f"  {label:<14}{' → '.join(means)}")
    return "\n" + "\n".join(lines) + "\n"

"""What annotations come to: the win rate by the package's functions, and the mean lengths beside it."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...columns import require_columns
from ...errors import DataError
from ...launch import first_line
from ...parsing.reply import shortened
from .formats import Row
from .package import HUB, imported, known, quiet

# SHA-256 of the 805 instructions, one a line, in the order that their published difficulties have
_STANDARD_SET = "80812b0556445b68"


def read_annotations(
    annotations: str | Path | Iterable[Mapping[str, Any]], outputs: Iterable[Mapping[str, Any]] | None = None
) -> Row:
    """What annotations come to, by the functions of the alpaca-eval package.

    In:  instruction, output_2, preference; for the length-controlled win rate all that `annotate` gives

    Args:
        annotations: a JSON file of the package's, or rows.
        outputs: what they should be about, as `write_outputs` gives it; it may hold more than was annotated.

    Returns:
        win_rate and standard_error in percent, n_wins, n_draws, n_losses, n_total: of annotated instructions alone;
        n_unannotated; avg_length and avg_length_reference (or None), mean characters, whole ones as the package has
        it; length_controlled_winrate, or None and the reason in length_controlled_note.

    Raises:
        DataError: no annotations; those of other outputs, or of two models; none that holds a preference.
        SettingsError: alpaca-eval is not installed.
    """
    who = f"The annotations {str(annotations)!r}" if isinstance(annotations, str | Path) else "The annotations"
    rows = _read(annotations, who)
    _check_about(rows, who, outputs)
    annotated = [row for row in rows if row["preference"] is not None]
    if not annotated:
        raise DataError(
            f"{who} hold no preference for any of {len(rows)} instructions: the judge's replies failed, or the "
            "annotator's parser could not read them. Annotate again, with another annotator if it was the latter."
        )
    imported()
    from alpaca_eval.metrics import get_winrate

    found = get_winrate(annotated)
    standard_error = known(float(found["standard_error"]))  # none of a single annotation
    against = [len(row["output_1"]) for row in rows if isinstance(row.get("output_1"), str)]
    length_controlled, note = _length_controlled(rows)
    return {
        "win_rate": float(found["win_rate"]),
        "standard_error": standard_error,
        "n_wins": int(found["n_wins"]),
        "n_draws": int(found["n_draws"]),
        "n_losses": int(found["n_wins_base"]),
        "n_total": int(found["n_total"]),
        "n_unannotated": len(rows) - len(annotated),
        "avg_length": sum(len(row["output_2"]) for row in rows) // len(rows),
        "avg_length_reference": sum(against) // len(rows) if len(against) == len(rows) else None,
        "length_controlled_winrate": length_controlled,
        "length_controlled_note": note,
    }


def _read(annotations: str | Path | Iterable[Mapping[str, Any]], who: str) -> list[Row]:
    """Rows of annotations, with None where there is no preference."""
    found: Any = annotations
    if isinstance(annotations, str | Path):
        try:
            found = json.loads(Path(annotations).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{who} cannot be read: {first_line(error)}") from error
    rows = [dict(row) for row in found if isinstance(row, Mapping)]
    hint = "Give `annotations.json` as alpaca-eval writes it."
    require_columns(rows[0] if rows else (), ("instruction", "output_2", "preference"), who, hint)
    for row in rows:
        preference = known(row["preference"])
        row["preference"] = preference = None if preference == -1 else preference  # the package's mark of a failure
        if not (preference is None or preference == 0 or 1 <= preference <= 2):
            raise DataError(
                f"{who} hold the preference {preference!r}, but AlpacaEval knows 1 (the reference), 2 (the model), "
                "1.5 or 0 (neither), and what lies between 1 and 2."
            )
    return rows


def _check_about(rows: list[Row], who: str, outputs: Iterable[Mapping[str, Any]] | None) -> None:
    """That annotations are of one model, one an instruction, and of these outputs."""
    models = sorted({row["generator_2"] for row in rows if row.get("generator_2")})
    instructions = {row["instruction"] for row in rows}
    if len(models) > 1 or len(instructions) < len(rows):
        raise DataError(
            f"{who} are {len(rows)}, of {len(instructions)} instructions and {len(models) or 'unnamed'} "
            f"model{'s' * (len(models) != 1)} ({', '.join(models[:3])}), but a win rate is that of one model, one "
            "annotation an instruction. Read each model's by itself."
        )
    ours = None if outputs is None else {row["instruction"]: row["output"] for row in outputs}
    others = [
        row["instruction"] for row in rows if ours is not None and ours.get(row["instruction"]) != row["output_2"]
    ]
    if others:
        unknown = sum(text not in (ours or {}) for text in others)
        raise DataError(
            f"{who} are not of these outputs: {unknown} of {len(rows)} are of other instructions, "
            f"{len(others) - unknown} of other outputs to the same ones, such as {shortened(others[0], 60)!r}. "
            "Annotate these outputs, or read the annotations with their own."
        )


def _length_controlled(rows: list[Row]) -> tuple[float | None, str | None]:
    """The package's estimate of the win rate at equal lengths, or why there is none. Source: arXiv 2404.04475."""
    listed = "\n".join(str(row["instruction"]) for row in rows)
    if hashlib.sha256(listed.encode()).hexdigest()[:16] != _STANDARD_SET:
        return None, "it is defined for AlpacaEval's 805 instructions, all and in their order; these are others"
    if not all(row.get(name) for row in rows for name in ("generator_1", "generator_2", "output_1")):
        return None, "it needs generator_1, generator_2 and output_1 in each annotation"
    try:
        from alpaca_eval.metrics import get_length_controlled_winrate

        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of scikit-learn, for the package's calls
            found = get_length_controlled_winrate(rows, save_weights_dir=None, is_warn_extreme_changes=False)
    except (OSError, ImportError) as error:  # difficulties from the Hub, or patsy
        return None, f"the instructions' difficulties cannot be had from {HUB} on the Hub: {first_line(error)}"
    return float(found["length_controlled_winrate"]), None

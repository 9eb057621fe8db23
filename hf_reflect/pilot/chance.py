"""Intervals: what comes of drawing the source rows again, each with all its versions."""

from typing import Any

import numpy as np

DRAWS = 2000  # samples drawn again for an interval


def samples(rows: int, seed: int) -> np.ndarray:
    """How often each source row is in each sample that is drawn again, (draws, rows), as shares."""
    return np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), DRAWS) / rows


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of them."""
    known = values[np.isfinite(values)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def ratio(over: np.ndarray, under: np.ndarray) -> Any:
    """Their quotient; NaN or infinite where nothing is below."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(over, under)

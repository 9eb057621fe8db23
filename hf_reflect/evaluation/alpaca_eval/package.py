"""The alpaca-eval package itself: imported when it is needed, and kept quiet."""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import SettingsError

HUB = "tatsu-lab/alpaca_eval"  # its data


def imported() -> Any:
    """The module, or a SettingsError that says what to install."""
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pkg_resources, which the package uses
            import alpaca_eval
    except ImportError as error:
        raise SettingsError(
            f"AlpacaEval needs the package alpaca-eval, which cannot be imported ({error}): `pip install "
            "'hf_reflect[eval]'`."
        ) from error
    return alpaca_eval


@contextmanager
def quiet() -> Iterator[None]:
    """The package sets the root logger's level on import, and logs each reply that its parser cannot read."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(before)


def known(value: Any) -> Any:
    """The value, with None for the nan that pandas has in place of one."""
    return None if isinstance(value, float) and math.isnan(value) else value

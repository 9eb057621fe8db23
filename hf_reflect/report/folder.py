"""What lies in a run's folder, piece by piece; what is not there is empty."""

from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from ..errors import DataError, ReflectError
from ..files import read_object


def read_table(folder: Path) -> Dataset | None:
    """A saved table; a DataError where it cannot be read."""
    if not folder.is_dir():
        return None
    try:
        return Dataset.load_from_disk(folder).with_format(None)
    except IndexError as error:  # how `datasets` says that no file belongs to it
        raise DataError(f"{folder} has no rows. Make it anew, or move it away.") from error
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{folder} cannot be read as a saved dataset: {error}. Make it anew.") from error


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """What the Trainer logged."""
    for folder in (run_dir / "model", run_dir):
        if entries := read_object(folder / "trainer_state.json", absent={}).get("log_history"):
            return [entry for entry in entries if isinstance(entry, dict)]
    return []


def read_spent(path: Path) -> dict[str, float] | None:
    """What the ledger says; a ledger that is in use, or damaged, must not cost anybody the report."""
    if not path.is_file():
        return None
    from ..ledger import Ledger

    try:
        with Ledger(path) as ledger:
            return ledger.spent()
    except (ReflectError, OSError):
        return None

"""Files that are there whole or not at all, whatever ends the process that writes them; and JSON read back."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import DataError


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears, in place of an earlier one, when all of it is on the disk; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_whole(path: Path, text: str) -> None:
    """Write a text in UTF-8; half of a surrogate pair, which that cannot hold, becomes a question mark."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8", "replace"))


def read_object(path: Path, absent: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object from a file, or `absent` where there is no file.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    if absent is not None and not path.exists():
        return absent
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Restore it, or make it anew.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}, not an object. Restore it, or make it anew.")
    return found

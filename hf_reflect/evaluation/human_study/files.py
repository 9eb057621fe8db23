"""The key of a study and the files that raters saved: JSON, checked as it is read."""

import json
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...parsing.reply import shortened

KEY, RATINGS = "hf_reflect key 1", "hf_reflect ratings 1"


def read(path: str | Path, kind: str) -> dict[str, Any]:
    """A key or a rater's file, with the fields that it must have."""
    what, fields = {
        KEY: ("the key.json of a study", {"study": str, "items": dict}),
        RATINGS: ("a file of ratings that the page saved", {"study": str, "rater": str, "ratings": list}),
    }[kind]
    try:
        content = json.loads(Path(path).expanduser().read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    except ValueError as error:  # of JSON, or of UTF-8
        raise DataError(f"{path} is damaged: it is no JSON ({error}). Ask for it again.") from error
    if not isinstance(content, dict) or content.get("format") != kind:
        raise DataError(f"{path} is not {what} (its `format` would be {kind!r}). Check which file it is.")
    for name, type_ in fields.items():
        if not isinstance(content.get(name), type_):
            raise DataError(f"{path} is damaged: its `{name}` is {shown(content.get(name))}. Ask for it again.")
    return content


def shown(value: Any) -> str:
    """A value as a message can hold it."""
    return repr(shortened(value, 60) if isinstance(value, str) else value)

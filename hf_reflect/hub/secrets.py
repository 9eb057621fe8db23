"""The last look before anything is published: no key and no token of this machine may be in it."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import DataError

_CERTAIN = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY")
_OTHERS = "PGPASSWORD|MYSQL_PWD|SSHPASS|REDISCLI_AUTH"  # named by programs that read them
_NAME = re.compile(rf"(.*_)?(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PAT)|{_OTHERS}", re.IGNORECASE)
_SHORTEST = {True: 8, False: 12}  # characters, of those that are known to be secret and of others
_NO_SECRET = re.compile(r"[a-z]{1,15}|[\d.,+-]+")  # a word, such as "placeholder"; a number
_SURROGATES = re.compile("[\ud800-\udfff]")  # stand for bytes that are no UTF-8
_SHOWN = 5  # places


def known_secrets(provenance: Mapping[str, Any] | None = None, token: str | None = None) -> dict[str, str]:
    """What must not leave, as value → what to call it: Hub tokens, API keys, and what else the environment names so.

    A path of this machine, a word of a few lower-case letters and a number are no secrets, whatever their names say.

    Args:
        provenance: its `api_key_env`, or its teacher's, names one more variable.
        token: the Hub's, where one is given.
    """
    from huggingface_hub import get_token

    provenance = provenance or {}
    teacher = provenance.get("teacher")
    more = [each.get("api_key_env") for each in (provenance, teacher) if isinstance(each, Mapping)]
    known = {name for name in (*_CERTAIN, *more) if isinstance(name, str)}
    found = {"the Hub token that was given": token, "the Hub token of this login": get_token()}
    secrets = {}
    for name, value in {**os.environ, **found}.items():
        certain = name in known or name in found
        if certain or _NAME.fullmatch(name):
            value = (value or "").strip()
            if len(value) >= _SHORTEST[certain] and not (_NO_SECRET.fullmatch(value) or _is_path(value)):
                secrets[value] = name  # the token's own name where a variable holds the same
    return secrets


def _is_path(value: str) -> bool:
    return value.startswith(("/", "~")) and os.path.exists(os.path.expanduser(value))


def refuse_secrets(folder: Path, secrets: Mapping[str, str]) -> None:
    """Raise a DataError that names where a secret is in the files of a folder, and never the secret itself.

    Every file is searched as it is about to leave: of Parquet files all strings and bytes in all columns, nested
    ones too, and the names of columns, fields and classes; of others the bytes. A secret is also found as JSON or a
    URL would spell it.
    """
    if not secrets:
        return
    patterns = {form: name for value, name in secrets.items() for form in _spellings(value)}
    found: dict[str, None] = {}  # in order, once each
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        where = path.relative_to(folder).as_posix()
        places = _in_parquet(path, patterns) if path.suffix == ".parquet" else _in_text(path.read_bytes(), patterns)
        for name, place in places:
            for pattern in patterns:  # a row may be called by it
                place = place.replace(pattern, "…")
            found[f"{name} is in {where}{place and ', '}{place}"] = None
    if found:
        more = f"\n  … and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise DataError(
            "Nothing was published: what should be holds a secret.\n  "
            + "\n  ".join([*found][:_SHOWN])
            + more
            + "\nTake it out of the data, the provenance or the card, and revoke it where it was ever shown to "
            "anybody. If this value is no secret, unset the variable."
        )


def _spellings(secret: str) -> set[str]:
    """As it is, as JSON has it, and as a URL has it."""
    escaped = {json.dumps(secret, ensure_ascii=ascii)[1:-1] for ascii in (True, False)}
    return {secret, *escaped, *(quote(os.fsencode(secret), safe=safe) for safe in ("", "/"))}


def _bytes(pattern: str) -> bytes:
    """As it is in a file; a variable may hold bytes that are no UTF-8."""
    return pattern.encode("utf-8", "surrogateescape")


def _in_text(content: bytes, patterns: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Whose secret, and in which line of it, where there is more than one."""
    for pattern, name in patterns.items():
        place = content.find(_bytes(pattern))
        if place >= 0:
            line = content.count(b"\n", 0, place) + 1
            yield name, f"line {line}" if b"\n" in content else ""


def _in_parquet(path: Path, patterns: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Whose secret, and in which column and row."""
    in_bytes = b"|".join(re.escape(_bytes(pattern)) for pattern in patterns)
    texts_only = [pattern for pattern in patterns if not _SURROGATES.search(pattern)]  # texts are all UTF-8
    in_texts = "|".join(re.escape(pattern) for pattern in texts_only)
    with pq.ParquetFile(path) as file:
        for name, _ in _in_text(file.schema_arrow.serialize().to_pybytes(), patterns):
            yield name, "the name of a column, a field or a class"
        for number in range(file.num_row_groups):
            group = file.read_row_group(number)
            for column in group.column_names:
                offset = 0
                for chunk in group[column].chunks:
                    rows = pa.array(range(offset, offset + len(chunk)), pa.int64())
                    offset += len(chunk)
                    for texts, origins in _texts(chunk, rows):
                        expression = in_texts if texts.type in (pa.string(), pa.large_string()) else in_bytes
                        place = pc.index(pc.match_substring_regex(texts, expression), True).as_py()
                        if place >= 0:
                            name = _whose(texts[place].as_py(), patterns)
                            yield name, f"column `{column}`, {_row(group, origins[place].as_py())}"


def _texts(array: pa.Array, rows: pa.Array) -> Iterator[tuple[pa.Array, pa.Array]]:
    """All strings in an Arrow array, however deep, and the row that each belongs to."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        yield from _texts(array.storage, rows)
    elif pa.types.is_dictionary(kind):
        yield from _texts(array.dictionary_decode(), rows)
    elif pa.types.is_struct(kind):
        for part in array.flatten():
            yield from _texts(part, rows)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _texts(pc.list_flatten(array), rows.take(pc.list_parent_indices(array)))
    elif pa.types.is_fixed_size_binary(kind):
        yield array.cast(pa.binary()), rows
    elif any(test(kind) for test in (pa.types.is_string_view, pa.types.is_binary_view)):
        yield array.cast(pa.large_string() if pa.types.is_string_view(kind) else pa.large_binary()), rows
    elif any(test(kind) for test in _TEXTS):
        yield array, rows


_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def _whose(text: str | bytes, patterns: Mapping[str, str]) -> str:
    content = text if isinstance(text, bytes) else text.encode()
    return next(name for pattern, name in patterns.items() if _bytes(pattern) in content)


def _row(group: pa.Table, row: int) -> str:
    """What to call a row: by its keys, where it has them."""
    keys = [name for name in ("row_id", "variant") if name in group.column_names]
    return ", ".join(f"{name} {group[name][row].as_py()!r}" for name in keys) or f"row {row}"

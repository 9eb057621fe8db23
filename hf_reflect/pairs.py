"""The one long table of hf_reflect, in which a row is one version of one pair; and the formats that come in."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.formatting.formatting import LazyBatch, LazyRow

from .columns import KEY_COLUMNS, SCORE_COLUMNS
from .errors import DataError, SettingsError

logger = logging.getLogger(__name__)

TURN = {"role": Value("string"), "content": Value("string")}
PAIR_FEATURES = Features(
    {
        "row_id": Value("string"),
        "variant": Value("string"),
        "source": Value("string"),
        "instruction": Value("string"),
        "input": Value("string"),
        "response": Value("string"),
        "history": List(TURN),
        "critique": Value("string"),
        "error": Value("string"),
    }
)
WAITING = ("teacher", "budget")  # codes of versions that another run may still get
RESERVED = (*PAIR_FEATURES, *SCORE_COLUMNS, "coherence", "input_ids", "labels")

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
KNOWN_FORMATS = (
    "messages | conversations | instruction (+ input) + output or response | prompt + completion "
    "(the first of these that is complete is taken)"
)


class _BadRow(Exception):
    """Why one row cannot be a pair: column and reason."""


def to_pairs(
    dataset: Dataset,
    instruction: str | None = None,
    input: str | None = None,
    response: str | None = None,
    row_id: str | None = None,
    turns: str = "last",
    invalid: str = "raise",
) -> Dataset:
    """Turn instruction data of any usual format into the table that every stage of hf_reflect takes.

    In:  one of `instruction`, `input`, `output` (Alpaca, WizardLM); `conversations` of from/value (ShareGPT, WizardLM
         V2); `messages` of role/content; `prompt`/`completion`, as text or as messages; or columns you name.
         All other columns travel along.
    Out: row_id, variant ("original"), source (""), instruction, input, response, history, critique, error
         (N rows, in the same order), then the other columns

    Of a conversation the last exchange is the pair; earlier turns, and a system message, are its `history`. A user
    turn that nobody answered any more is left out. With `turns="all"` every exchange is a pair of its own (N → M
    rows, in the order in which they were said, the other columns repeated), and `row_id` is `{id}/{n}`: n counts the
    assistant's turns from 0, id is what `row_id` would be for the last exchange alone. Formats without turns give
    `{id}/0`.
    `row_id` is the column you name, else a column `id` that is unique and has no nulls (it stays as well), else a hash
    of the content plus its position among equal rows: stable when other rows are added, removed or edited.

    Args:
        dataset: one split.
        instruction: name of the column that holds the instruction, where it is not recognised.
        input: likewise, of the input.
        response: likewise, of the response.
        row_id: name of the column that identifies a row; unique, without nulls.
        turns: "last" makes a pair of a conversation's last exchange, "all" of each.
        invalid: "raise" on rows that are no pair, or "drop" them and log how many. A conversation is taken or left
            as a whole.

    Raises:
        DataError: unknown columns, reserved column names, rows that are no pair (the first three, and how many).
    """
    if invalid not in ("raise", "drop"):
        raise DataError(f'`to_pairs(invalid=...)` is "raise" or "drop", not {invalid!r}.')
    if turns not in ("last", "all"):
        raise DataError(f'`to_pairs(turns=...)` is "last" or "all", not {turns!r}.')
    if not isinstance(dataset, Dataset):
        hint = f"pick a split: `dataset[{next(iter(dataset))!r}]`" if isinstance(dataset, dict) else "load it as one"
        raise DataError(f"`to_pairs` takes a `datasets.Dataset`, not a {type(dataset).__name__}: {hint}.")

    named = {"instruction": instruction, "input": input, "response": response, "row_id": row_id}
    read, consumed = _reader(dataset.column_names, named)
    others = [name for name in dataset.column_names if name not in consumed]
    if taken := [name for name in others if name in RESERVED]:
        raise DataError(
            f"`to_pairs` found the column{'s' * (len(taken) > 1)} {', '.join(map(repr, taken))}, whose name "
            "hf_reflect needs for itself. Rename before: "
            f"`dataset.rename_column({taken[0]!r}, 'original_{taken[0]}')`, in "
            f"a recipe `rename_columns: {{{taken[0]}: original_{taken[0]}}}`."
        )
    features = Features({**PAIR_FEATURES, **{name: dataset.features[name] for name in others}})
    if not len(dataset):
        return Dataset.from_dict({name: [] for name in features}, features=features)
    id_column = row_id or ("id" if "id" in others else None)
    ids = None if id_column is None else _ids(dataset[id_column], id_column, required=row_id is not None)

    seen: Counter[str] = Counter()
    bad: dict[int, str] = {}

    def convert(batch: Any, indices: list[int]) -> pa.Table:
        rows: list[dict[str, Any]] = []
        origins: list[int] = []  # where in the batch each of these rows comes from
        texts = {name: batch[name] for name in sorted(consumed)}
        for position, index in enumerate(indices):
            try:
                pair = read({name: values[position] for name, values in texts.items()})
            except _BadRow as error:
                bad[index] = str(error)
                continue
            digest = content_hash(pair)
            identifier = f"{digest}-{seen[digest]}" if ids is None else ids[index]
            seen[digest] += 1
            exchanges = [(identifier, pair)]
            if turns == "all":
                exchanges = [(f"{identifier}/{n}", exchange) for n, exchange in enumerate(_exchanges(pair))]
            for key, exchange in exchanges:
                rows.append({"row_id": key, "variant": "original", "source": "", **exchange})
                origins.append(position)
        table = pa.Table.from_pylist(rows, PAIR_FEATURES.arrow_schema)
        places = pa.array(origins, pa.int64())
        for name in others:  # as Arrow: neither decoded nor typed anew
            table = table.append_column(batch.pa_table.schema.field(name), batch.pa_table[name].take(places))
        return table

    pairs = dataset.with_format(None).map(
        convert,
        with_indices=True,
        batched=True,
        batch_size=1000 if turns == "last" else 100,  # histories grow with the square of the turns
        features=features,
        load_from_cache_file=False,
        desc="Reading pairs",
    )
    if bad:
        examples = "; ".join(f"row {index}, {reason}" for index, reason in list(bad.items())[:3])
        found = f"{len(bad)} of {len(dataset)} rows are no instruction pair: {examples}"
        if invalid == "raise" or len(bad) == len(dataset):
            more = "; …" * (len(bad) > 3)
            raise DataError(
                f"`to_pairs` found that {found}{more}. Mend these rows, or leave them out with `invalid='drop'` "
                "(in a recipe `invalid: drop`)."
            )
        logger.warning("`to_pairs` left out rows: %s%s", found, "; …" * (len(bad) > 3))
    return pairs


def content_hash(pair: dict[str, Any]) -> str:
    """16 hexadecimal digits over instruction, input, response and history."""
    content = [
        pair["instruction"],
        pair["input"],
        pair["response"],
        [[t["role"], t["content"]] for t in pair["history"]],
    ]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def error_code(error: str | None) -> str:
    """What stands before the colon of an `error`; "" where there is none."""
    return (error or "").split(":")[0]


def keys_of(dataset: Dataset) -> list[tuple[str, str, str]]:
    """row_id, variant and source of every version, as text; a source that is null or not there is ""."""
    dataset = dataset.with_format(None)
    columns = [dataset[name][:] if name in dataset.column_names else [""] * len(dataset) for name in KEY_COLUMNS]
    return [(str(row_id), variant, source or "") for row_id, variant, source in zip(*columns, strict=True)]


def put_column(table: pa.Table, field: pa.Field, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The table with this column, in its place where it is there already, else at the end."""
    index = table.schema.get_field_index(field.name)
    return table.append_column(field, values) if index < 0 else table.set_column(index, field, values)


def as_table(batch: Any) -> pa.Table:
    """The batch of a `map` as Arrow; the user's own columns keep the types they have."""
    if isinstance(batch, pa.Table):
        return batch
    if isinstance(batch, LazyRow) or (isinstance(batch, dict) and isinstance(batch.get("row_id"), str)):
        raise SettingsError("A single row came, where a batch is needed: `map(..., batched=True)`.")
    if isinstance(batch, LazyBatch):  # what `datasets.map` hands over
        return batch.pa_table
    schema = PAIR_FEATURES.arrow_schema
    fields = {name: schema.field(name).type for name in batch if name in PAIR_FEATURES}
    return pa.table({name: pa.array(values, fields.get(name)) for name, values in batch.items()})


def _reader(
    columns: list[str], named: dict[str, str | None]
) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], set[str]]:
    """How a row of these columns becomes a pair, and the columns that this uses up."""
    given = {role: name for role, name in named.items() if name is not None}
    if unknown := [f"{role}={name!r}" for role, name in given.items() if name not in columns]:
        raise DataError(f"`to_pairs` was given {', '.join(unknown)}, but the dataset's columns are {columns}.")
    used = {given["row_id"]} if "row_id" in given else set()

    if not {"instruction", "input", "response"} & set(given):
        for name in ("messages", "conversations"):
            if name in columns:
                return (lambda row, name=name: _conversation(row[name], name)), used | {name}

    if (
        "prompt" in columns
        and "completion" in columns
        and "instruction" not in columns
        and not given.keys() - {"row_id"}
    ):
        return _prompt_completion, used | {"prompt", "completion"}

    x = given.get("instruction") or ("instruction" if "instruction" in columns else None)
    y = given.get("response") or next((name for name in ("output", "response") if name in columns), None)
    context = given.get("input") or ("input" if "input" in columns else None)
    if x is None or y is None:
        raise DataError(
            f"`to_pairs` found the columns {columns}, but needs one of: {KNOWN_FORMATS}. Rename your columns, or say "
            "which they are: `to_pairs(dataset, instruction='question', response='answer')`, in a recipe "
            "`rename_columns: {question: instruction, answer: output}`."
        )

    def read(row: dict[str, Any]) -> dict[str, Any]:
        text = row[context] if context else None
        if text is not None and not isinstance(text, str):
            raise _BadRow(f"column `{context}`: a {type(text).__name__} instead of text")
        return {
            "instruction": _text(row[x], x),
            "input": text if text and text.strip() else "",
            "response": _text(row[y], y),
            "history": [],
        }

    return read, used | {x, y} | ({context} if context else set())


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise _BadRow(f"column `{column}`: {'null' if value is None else f'a {type(value).__name__}'} instead of text")
    if not value.strip():
        raise _BadRow(f"column `{column}`: empty text")
    return value


def _prompt_completion(row: dict[str, Any]) -> dict[str, Any]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(prompt + completion, "prompt/completion")
    return {
        "instruction": _text(prompt, "prompt"),
        "input": "",
        "response": _text(completion, "completion"),
        "history": [],
    }


def _conversation(turns: Any, column: str) -> dict[str, Any]:
    """The last exchange of a conversation, and what came before it."""
    if not isinstance(turns, list) or not turns:
        raise _BadRow(f"column `{column}`: no turns")
    history = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise _BadRow(f"column `{column}`, turn {number}: a {type(turn).__name__} instead of role and content")
        role = turn.get("role") or turn.get("from")
        where = f"{column}[{number}]"
        if role not in ROLES:
            raise _BadRow(f"column `{column}`, turn {number}: role {role!r} is none of {', '.join(ROLES)}")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        history.append({"role": ROLES[role], "content": _text(content, where)})
    start = 1 if history[0]["role"] == "system" else 0
    if len(history) > start and history[-1]["role"] == "user":
        history.pop()  # a question that nobody answered
    for number, turn in enumerate(history[start:]):
        expected = ("user", "assistant")[number % 2]
        if turn["role"] != expected:
            raise _BadRow(
                f"column `{column}`, turn {number + start}: comes from the {turn['role']} where the {expected} "
                "should speak; user and assistant take turns, and the user begins"
            )
    if len(history) - start < 2:
        raise _BadRow(f"column `{column}`: no user turn with an answer")
    return _last_exchange(history)


def _last_exchange(turns: list[dict[str, str]]) -> dict[str, Any]:
    *history, user, assistant = turns
    return {"instruction": user["content"], "input": "", "response": assistant["content"], "history": history}


def _exchanges(pair: dict[str, Any]) -> list[dict[str, Any]]:
    """Every exchange of a conversation as a pair of its own, given the last one with its history."""
    history = pair["history"]
    start = 1 if history and history[0]["role"] == "system" else 0
    return [*(_last_exchange(history[: n + 2]) for n in range(start, len(history), 2)), pair]


def _ids(values: Iterable[Any], column: str, required: bool) -> list[str] | None:
    """The values as strings if they can identify rows, else None or, where the user asked for them, a DataError."""
    values = list(values)
    where = next((n for n, value in enumerate(values) if value is None), None)
    problem = f"row {where} has none" if where is not None else None
    if problem is None and len({str(value) for value in values}) < len(values):
        value, times = Counter(map(str, values)).most_common(1)[0]
        problem = f"{value!r} stands in {times} rows"
    if problem is None:
        return [str(value) for value in values]
    if required:
        raise DataError(
            f"`to_pairs(row_id={column!r})` needs one distinct value a row, but {problem}. Name another column, or "
            "leave `row_id` out: rows are then known by their content."
        )
    return None

"""The authors' published tables as candidates of hf_reflect; and whether the paper rule keeps as many as they say.

    python -m hf_reflect.published alpaca-7b

Their texts are four splits of one length, matched by position; their scores, one table a student, likewise. A pass
that failed when they scored is 0 there, and their script counts it as an IFD of 0, which passes both gates. Here it
is null. Source: arXiv 2402.10110, Table 1; github.com/tianyi-lab/Reflection_Tuning, selection_code.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, Value

from .columns import LOSS_COLUMNS, SCORE_COLUMNS, require_columns
from .errors import DataError
from .launch import first_line, hub_without_retries_on_screen
from .pairs import PAIR_FEATURES
from .selection import VARIANTS, decide

SPLITS = ("origin", "reflect_instruction", "reflect_response", "reflect_both")  # in the order of VARIANTS
TEACHER = "gpt-3.5-turbo"
RATIO_COLUMNS = ("published_ifd", "published_r_ifd")
EMPTY = "unparsed: empty in the published table"


class Published(NamedTuple):
    """A selection that the authors published: two ids on the Hub, and how many rows they keep where that is known."""

    texts: str
    scores: str
    rows: int | None = None


_ALPACA, _WIZARDLM = "umd-zhou-lab/Reflect_Alpaca_All", "umd-zhou-lab/Reflect_Wiz70_All"
PUBLISHED = {
    "alpaca-7b": Published(_ALPACA, "MingLiiii/Alpaca_Analysis_llama2_7b", 37114),
    "alpaca-13b": Published(_ALPACA, "MingLiiii/Alpaca_Analysis_llama2_13b", None),
    "wizardlm-7b": Published(_WIZARDLM, "MingLiiii/Wiz70_Analysis_llama2_7b", 46325),
    "wizardlm-13b": Published(_WIZARDLM, "MingLiiii/Wiz70_Analysis_llama2_13b", 46064),
}


def load_published(texts: str | Path | DatasetDict, scores: str | Path | DatasetDict | None = None) -> Dataset:
    """The authors' table, and their scores by one student, as the table that every stage of hf_reflect takes.

    In:  texts: the splits origin, reflect_instruction, reflect_response, reflect_both; a column `data` of instruction,
         input, output                                                                                        (N rows)
         scores: the same splits; `data` of `loss` and `ppl`, each four numbers: instruction alone, response alone,
         instruction given response, response given instruction                                               (N rows)
    Out: the columns of `to_pairs`, the four versions of a row together (original, instruction, response,
         instruction+response), `row_id` the row's number from 0                                             (4N rows)
         with scores also the losses, ifd, r_ifd; and published_ifd, published_r_ifd: the ratios of perplexities as the
         authors' script has them, 0 where a pass failed, null where nothing was scored

    A failed pass is a null loss, and so are the ifd or r_ifd made from it. A text that is empty is null, with an
    `error`; such a version has no scores.

    Args:
        texts: an id on the Hub, a folder of `save_to_disk`, or the table itself.
        scores: likewise.

    Raises:
        DataError: the Hub cannot be reached, or nothing is there; other splits or columns, splits of different
            lengths, scores of another number of rows.
    """
    given = _columns(texts, "published texts", dict.fromkeys(("instruction", "input", "output"), pa.string()))
    rows = len(given["input"]) // len(VARIANTS)
    # not text: null, nothing, or white space alone
    blank = {name: pc.equal(pc.utf8_trim_whitespace(text).fill_null(""), "") for name, text in given.items()}
    unusable = pc.or_(blank["instruction"], blank["output"])
    null = pa.scalar(None, pa.string())
    table = {
        "row_id": pa.array(np.repeat(np.arange(rows), len(VARIANTS))).cast(pa.string()),
        "variant": pa.array(list(VARIANTS) * rows, pa.string()),
        "source": pa.array(["", *[TEACHER] * (len(VARIANTS) - 1)] * rows, pa.string()),
        "instruction": pc.if_else(blank["instruction"], null, given["instruction"]),
        "input": pc.if_else(blank["input"], "", given["input"]),
        "response": pc.if_else(blank["output"], null, given["output"]),
        "history": pa.repeat(pa.scalar([], PAIR_FEATURES.arrow_schema.field("history").type), len(VARIANTS) * rows),
        "critique": pa.nulls(len(VARIANTS) * rows, pa.string()),
        "error": pc.if_else(unusable, EMPTY, null),
    }
    features = dict(PAIR_FEATURES)
    if scores is not None:
        passes = _columns(scores, "published scores", dict.fromkeys(("loss", "ppl"), pa.list_(pa.float64())))
        if len(passes["ppl"]) != len(unusable):
            raise DataError(
                f"The published scores have {len(passes['ppl']) // len(VARIANTS)} rows, the texts {rows}. They are "
                "matched by position: take the scores that were made for these texts."
            )
        numbers = _scores(_fours(passes["loss"], "loss"), _fours(passes["ppl"], "ppl"), unusable.to_numpy(False))
        # NaN is null
        table |= {name: pa.array(values, from_pandas=True) for name, values in numbers.items()}
        features |= dict.fromkeys(numbers, Value("float64"))
    return Dataset.from_dict(table, features=Features(features))


def check_published(table: Dataset, expected: int | None) -> dict[str, Any]:
    """Whether the paper rule, with its gates, keeps as many rows of a published table as its authors published.

    In:  the table of `load_published(texts, scores)`, whole and in its order
    Out: kept; expected; agrees (None where expected is); failed: versions with both texts and without ifd or r_ifd;
         kept_with_failed_as_zero: what the authors' script would keep, which takes a failed score for 0

    Raises:
        DataError: columns are missing, or the versions are in another order.
    """
    needed = ("row_id", "variant", "ifd", "r_ifd", *RATIO_COLUMNS)
    hint = "Make the table with `load_published(texts, scores)`."
    require_columns(table.column_names, needed, "`check_published`", hint)
    columns = table.select_columns([*needed, "instruction", "response"]).with_format("arrow")[:]
    names = columns["row_id"].combine_chunks().dictionary_encode().indices.to_numpy(False)
    in_order = columns["variant"].to_pylist() == list(VARIANTS) * (len(table) // len(VARIANTS))
    if not in_order or (names.reshape(-1, len(VARIANTS)) != names[:: len(VARIANTS), None]).any():
        raise DataError(
            f"`check_published` needs the whole table, each row's versions together: {', '.join(VARIANTS)}. " + hint
        )
    usable = pc.and_(columns["instruction"].is_valid(), columns["response"].is_valid())
    scored = pc.and_(columns["ifd"].is_valid(), columns["r_ifd"].is_valid())
    ifd, r_ifd = (columns[name].to_numpy().reshape(-1, len(VARIANTS)) for name in RATIO_COLUMNS)
    kept = sum(decision.kept for decision in decide(table, rule="paper"))
    return {
        "kept": kept,
        "expected": expected,
        "agrees": None if expected is None else kept == expected,
        "failed": pc.sum(pc.and_not(usable, scored)).as_py() or 0,
        "kept_with_failed_as_zero": int(_authors_keep(ifd, r_ifd).sum()),
    }


def load_checked(published: Published) -> tuple[Dataset, str]:
    """The candidates of a published selection, with their authors' scores; and what `check_published` finds, in words.

    Where the scores cannot be had the table is without them, and the words say that the check was not run.

    Raises:
        DataError: the texts cannot be had, or are no such table.
    """
    try:
        table = load_published(published.texts, published.scores)
    except DataError as error:
        return load_published(published.texts), f"not checked: {' '.join(str(error).split())}"
    return table.remove_columns(RATIO_COLUMNS), f"the paper rule keeps {_told(check_published(table, published.rows))}"


def _columns(source: Any, what: str, fields: dict[str, pa.DataType]) -> dict[str, pa.Array]:
    """Of each field of `data` the values of all splits, the four versions of a row together."""
    loaded = _load(source, what)
    if not isinstance(loaded, dict) or set(loaded) != set(SPLITS):
        found = f"the splits {', '.join(loaded)}" if isinstance(loaded, dict) else f"a {type(loaded).__name__}"
        raise DataError(f"The {what} need the splits {', '.join(SPLITS)}, but are {found}.")
    lengths = {name: len(loaded[name]) for name in SPLITS}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {rows}" for name, rows in lengths.items())
        raise DataError(f"The {what} have splits of different lengths, where rows are matched by position: {shown}.")
    parts: dict[str, list[pa.Array]] = {field: [] for field in fields}
    for name in SPLITS:
        try:
            data = loaded[name].select_columns("data").with_format("arrow")[:]["data"].combine_chunks()
            for field, kind in fields.items():
                parts[field].append(pc.struct_field(data, field).cast(kind))
        except (ValueError, pa.ArrowException) as error:
            raise DataError(
                f"The {what} need a column `data` of {', '.join(fields)}, but {name} has {loaded[name].features}."
            ) from error
    versions, rows = len(SPLITS), lengths["origin"]
    order = pa.array(np.arange(versions * rows).reshape(versions, rows).T.ravel())
    return {field: pa.concat_arrays(arrays).take(order) for field, arrays in parts.items()}


def _load(source: Any, what: str) -> Any:
    """All splits of a table on the Hub or in a folder; what is no path is taken for the table itself."""
    if not isinstance(source, (str, Path)):
        return source
    hub_without_retries_on_screen()
    local = Path(source).expanduser()
    try:
        if (local / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(local))
        return datasets.load_dataset(str(local) if local.exists() else str(source))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"The {what} {str(source)!r} cannot be loaded: {first_line(error)}\nGive a folder of `save_to_disk`, or "
            "the id of a dataset on the Hub (and be online)."
        ) from error


def _fours(column: pa.Array, name: str) -> np.ndarray:
    """Lists of four numbers as (versions, 4); NaN where there is no list, or no number."""
    lengths = pc.list_value_length(column).fill_null(0).to_numpy()
    if len(other := np.flatnonzero((lengths != len(LOSS_COLUMNS)) & (lengths != 0))):
        row, version = divmod(int(other[0]), len(SPLITS))
        raise DataError(
            f"The published scores need four numbers in `{name}`, one a pass, but row {row} of {SPLITS[version]} has "
            f"{lengths[other[0]]}."
        )
    numbers = np.full((len(column), len(LOSS_COLUMNS)), np.nan)
    numbers[lengths > 0] = column.flatten().to_numpy(False).reshape(-1, len(LOSS_COLUMNS))
    return numbers


def _scores(loss: np.ndarray, ppl: np.ndarray, unusable: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of scores, (versions,), from those of four passes, (versions, 4); NaN where there is none."""
    instruction, response, instruction_given, response_given = range(len(LOSS_COLUMNS))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.stack((ppl[:, response_given] / ppl[:, response], ppl[:, instruction_given] / ppl[:, instruction]))
    ratios[:, (ppl[:, [instruction, response]] == 0).any(axis=1)] = 0  # one division by zero, and both are 0 there
    # a perplexity is never below 1, while a loss of 0 can be true
    kept = np.where((ppl == 0) | unusable[:, None], np.nan, loss)
    ifd = np.exp(kept[:, response_given] - kept[:, response])
    r_ifd = np.exp(kept[:, instruction_given] - kept[:, instruction])
    return dict(zip((*SCORE_COLUMNS, *RATIO_COLUMNS), (*kept.T, ifd, r_ifd, *ratios), strict=True))


def _authors_keep(ifd: np.ndarray, r_ifd: np.ndarray) -> np.ndarray:
    """The rows that the authors' get_select_data.py keeps, (rows,), of ratios (rows, variants); NaN is never less."""
    original, instruction, response, both = range(len(VARIANTS))
    is_new = ifd[:, instruction] > ifd[:, original]
    rows, parent = np.arange(len(ifd)), np.where(is_new, instruction, original)
    answer = np.where(is_new, both, response)
    better = r_ifd[rows, answer] < r_ifd[rows, parent]
    return better & (r_ifd[rows, answer] < 1) & (ifd[rows, answer] < 1)


def main(argv: list[str] | None = None) -> int:
    """Check one published selection, or all.

    Returns the exit code: 0 where all agree, 1 where one does not, 2 where one could not be checked.
    """
    parser = argparse.ArgumentParser(
        prog="python -m hf_reflect.published",
        description="Load what the authors published, and see whether the paper rule keeps as many rows as they say.",
    )
    parser.add_argument("name", nargs="?", default="all", choices=[*PUBLISHED, "all"], help="which (default: all)")
    parser.add_argument("--texts", metavar="TABLE", help="its texts, a folder or a Hub id; the authors' unless given")
    parser.add_argument("--scores", metavar="TABLE", help="its scores, likewise")
    arguments = parser.parse_args(argv)
    if arguments.name == "all" and (arguments.texts or arguments.scores):
        parser.error("--texts and --scores are those of one table: name it")
    codes = set()
    for name in PUBLISHED if arguments.name == "all" else [arguments.name]:
        published = PUBLISHED[name]
        try:
            table = load_published(arguments.texts or published.texts, arguments.scores or published.scores)
            found = check_published(table, published.rows)
        except DataError as error:
            print(f"{name}: not run: {' '.join(str(error).split())}", flush=True)
            codes.add(2)
            continue
        print(f"{name}: the paper rule keeps {_told(found)}", flush=True)
        codes.add(1 if found["agrees"] is False else 0)
    return 1 if 1 in codes else max(codes)


def _told(found: dict[str, Any]) -> str:
    kept, expected = f"{found['kept']:,} rows", found["expected"]
    if found["agrees"]:
        return f"{kept}, as published"
    words = f"{kept}, " + (f"{expected:,} are published" if expected is not None else "no number is published")
    if found["failed"]:
        as_zero = found["kept_with_failed_as_zero"]
        words += f" ({found['failed']:,} versions have a failed score; counted as 0, as by the authors: {as_zero:,})"
    return words


if __name__ == "__main__":
    sys.exit(main())

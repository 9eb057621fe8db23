"""What the authors published, loaded as the table that every stage of hf_reflect takes."""

from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, Value

from ..columns import LOSS_COLUMNS, SCORE_COLUMNS
from ..errors import DataError
from ..launch import first_line, hub_without_retries_on_screen
from ..pairs import PAIR_FEATURES
from ..selection import VARIANTS

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

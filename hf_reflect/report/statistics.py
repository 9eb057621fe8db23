"""The papers' statistics of a recycled dataset: Table 6 for any data, Figure 7, errors and costs."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..columns import KEY_COLUMNS, LOSS_COLUMNS, question, require_columns
from ..errors import DataError
from ..files import write_whole
from ..pairs import error_code, keys_of
from ..selection import VARIANTS
from ..selection.versions import read_numbers, read_versions

# measure → what it is called; tokens by the student's tokenizer, perplexities by the student
MEASURES = {
    "instruction_tokens": "instruction, tokens",
    "response_tokens": "response, tokens",
    "ppl_instruction": "perplexity of instruction",
    "ppl_response": "perplexity of response",
    "ppl_response_given_instruction": "… given the instruction",
    "coherence": "coherence",
    "ifd": "IFD (of perplexities)",
    "ifd_of_losses": "IFD (of losses)",
    "r_ifd": "r-IFD",
}
SETS = {"original": "original", "reflected": "fully reflected", "selected": "selected"}
REWRITTEN = dict(zip(VARIANTS, ("nothing", "instruction", "response", "both"), strict=True))  # Figure 7
_WHOLE_SETS = {"original": "original", "reflected": "instruction+response"}  # all usable versions of a variant
_PERPLEXITIES = {
    "ppl_instruction": "loss_instruction",
    "ppl_response": "loss_response",
    "ppl_response_given_instruction": "loss_response_given_instruction",
}
_AT_ONCE = 1000  # texts


class Statistics(dict[str, Any]):
    """A plain dict of numbers, which prints as a table."""

    def __str__(self) -> str:
        return table_of(self)

    def save(self, path: str | PathLike) -> None:
        """Write it as JSON."""
        write_whole(Path(path), json.dumps(self, indent=1, ensure_ascii=False))


def statistics(
    candidates: Dataset,
    selected: Dataset | None = None,
    tokenizer: Any = None,
    encoder: Any = None,
    costs: Mapping[str, Mapping[str, float]] | None = None,
) -> Statistics:
    """What was in the data, what full reflection would make of it, and what was selected, side by side.

    In:  row_id, variant, instruction, input, response; optionally source, error, the scores, coherence
    Out: rows, versions
         sets: original, reflected (usable versions with both parts rewritten), selected; each has rows and, for each
             of `MEASURES`, mean and n: over the rows on which it is finite, mean None where there are none
         rewritten: of the selected rows how many have instruction, response, both or nothing rewritten
         errors: versions that cannot be used, by code; remarks: usable versions with an error beside their text
         costs: as given

    Scores of selected rows are those of the candidates, in which they are looked up by row_id, variant and source.

    Args:
        candidates: all versions.
        selected: those that were chosen.
        tokenizer: the student's, or its name; without it no lengths.
        encoder: a Sentence-BERT model or its name; where the candidates have no column `coherence`, it fills one.
        costs: what each stage took, as a run's `summary.json` has it.

    Raises:
        DataError: a column is missing, a version is there twice, a selected row is not among the candidates.
        SettingsError: `encoder` without the extra `coherence`, or no such encoder.

    Source: arXiv 2402.10110, Table 6 and Figure 7; `ifd_of_losses` is what V1 (arXiv 2310.11716, Table 3) cites.
    """
    needed = ("row_id", "variant", "instruction", "input", "response")
    require_columns(candidates.column_names, needed, "`statistics`")
    candidates = candidates.with_format(None)
    versions = read_versions(candidates, ())
    usable, variant = versions.place[:-1], versions.variant[:-1]
    places = {name: np.sort(usable[variant == VARIANTS.index(which)]) for name, which in _WHOLE_SETS.items()}
    if selected is not None:
        selected = selected.with_format(None)
        places["selected"] = np.array(selected_places(candidates, selected), dtype=np.int64)
    wanted = np.intersect1d(np.concatenate(list(places.values())), usable)  # each once
    values = _measures(candidates, wanted, tokenizer, encoder)
    kept = Counter(selected["variant"][:]) if selected is not None else None
    errors, remarks = _errors(candidates, usable)
    return Statistics(
        rows=len(versions.ids),
        versions=len(candidates),
        sets={
            name: {"rows": len(some), **{measure: _mean(numbers[some]) for measure, numbers in values.items()}}
            for name, some in places.items()
        },
        rewritten=None if kept is None else {name: kept[variant] for variant, name in REWRITTEN.items()},
        errors=errors,
        remarks=remarks,
        costs={stage: dict(numbers) for stage, numbers in (costs or {}).items()},
    )


def selected_places(candidates: Dataset, selected: Dataset) -> list[int]:
    """Where the selected rows stand in the candidates, by row_id, variant and source.

    Raises:
        DataError: one is not there.
    """
    require_columns(selected.column_names, KEY_COLUMNS[:2], "`statistics`")
    places = {key: place for place, key in enumerate(keys_of(candidates))}
    keys = keys_of(selected)
    if missing := [key for key in keys if key not in places]:
        raise DataError(
            f"{len(missing)} of {len(keys)} selected rows are not among the candidates, first {missing[0]} (row_id, "
            "variant, source). Give the candidates that they were selected from."
        )
    return [places[key] for key in keys]


def table_of(statistics: Mapping[str, Any]) -> str:
    """For a terminal of 80 columns; n where it is not the number of rows."""
    sets = statistics["sets"]
    lines = [
        _line("", *(SETS[name] for name in sets)),
        *(_line(label, *cells) for label, cells in means_of(sets)),
    ]
    if kept := statistics["rewritten"]:
        total = max(sum(kept.values()), 1)
        shares = (_line(f"  {name}", "", "", f"{n:,} ({n / total:.0%})") for name, n in kept.items())
        lines += ["", "rewritten, of the selected", *shares]
    for title, counts in (("unusable versions", statistics["errors"]), ("remarks", statistics["remarks"])):
        if counts:
            lines += ["", title, *(_line(f"  {code}", f"{n:,}") for code, n in counts.items())]
    if costs := statistics["costs"]:
        lines += ["", "costs"]
    for stage, numbers in costs.items():
        lines.append(f"  {stage}: " + ", ".join(f"{name.replace('_', ' ')} {n:,.6g}" for name, n in numbers.items()))
    return "\n".join(line.rstrip() for line in lines)


def _line(label: str, *cells: str) -> str:
    return f"{label:<32}" + "".join(f"{cell:>16}" for cell in cells)


def means_of(sets: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Table 6 for people: label, and a text for each set; without measures that nobody has."""
    lines = [("rows", [f"{some['rows']:,}" for some in sets.values()])]
    for measure, label in MEASURES.items():
        if any(some[measure]["n"] for some in sets.values()):
            lines.append((label, [_cell(some[measure], some["rows"]) for some in sets.values()]))
    return lines


def _cell(measure: Mapping[str, Any], rows: int) -> str:
    """A mean for people, with its n where that is not the number of rows."""
    if not measure["n"]:
        return "–"
    n = f" (n {measure['n']:,})" if measure["n"] != rows else ""
    return f"{measure['mean']:,.{3 if abs(measure['mean']) < 10 else 1}f}{n}"


def _measures(candidates: Dataset, places: np.ndarray, tokenizer: Any, encoder: Any) -> dict[str, np.ndarray]:
    """Of each measure its value for every version, (versions,); NaN where there is none, or none was wanted."""
    nothing = np.full(len(candidates), np.nan)

    def column(name: str) -> np.ndarray:
        return read_numbers(candidates, name) if name in candidates.column_names else nothing

    loss = {name: column(name) for name in LOSS_COLUMNS}
    with np.errstate(all="ignore"):  # what is not finite is not counted
        values = {measure: np.exp(loss[name]) for measure, name in _PERPLEXITIES.items()}
        of_losses = loss["loss_response_given_instruction"] / loss["loss_response"]
    tokens = tokens_of(candidates, places, tokenizer)
    coherence = column("coherence")
    if encoder is not None and "coherence" not in candidates.column_names:
        coherence = _coherence(candidates, places, encoder)
    values |= {"instruction_tokens": tokens[0], "response_tokens": tokens[1], "coherence": coherence}
    values |= {"ifd": column("ifd"), "ifd_of_losses": of_losses, "r_ifd": column("r_ifd")}
    return {measure: values[measure] for measure in MEASURES}


def tokens_of(candidates: Dataset, places: np.ndarray, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of x (instruction and input) and of y (response), without special tokens; each (versions,).

    NaN but at these places, whose versions must be usable, and everywhere without a tokenizer.
    """
    lengths = np.full((2, len(candidates)), np.nan)
    if tokenizer is None:
        return lengths[0], lengths[1]
    if isinstance(tokenizer, str | PathLike):
        from ..launch import load_tokenizer

        tokenizer = load_tokenizer(str(tokenizer))
    for some, rows in _batches(candidates, places):
        questions = map(question, rows["instruction"], rows["input"])
        for part, texts in enumerate((list(questions), rows["response"])):
            different = list(dict.fromkeys(texts))  # versions share their halves
            ids = tokenizer(different, add_special_tokens=False, return_attention_mask=False, verbose=False)
            length = dict(zip(different, map(len, ids["input_ids"]), strict=True))
            lengths[part, some] = [length[text] for text in texts]
    return lengths[0], lengths[1]


def _coherence(candidates: Dataset, places: np.ndarray, encoder: Any) -> np.ndarray:
    """The cosine of a sentence embedding of x and y, (versions,)."""
    from ..scoring.coherence import coherence_of, load_encoder

    encoder, found = load_encoder(encoder, "cpu"), np.full(len(candidates), np.nan)
    for some, rows in _batches(candidates, places):
        lists = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        found[some] = [np.nan if value is None else value for value in coherence_of(encoder, lists)]
    return found


def _batches(candidates: Dataset, places: np.ndarray) -> Iterator[tuple[np.ndarray, dict[str, list[Any]]]]:
    """The texts of these versions, some at a time."""
    texts = candidates.select_columns(["instruction", "input", "response"])
    for start in range(0, len(places), _AT_ONCE):
        some = places[start : start + _AT_ONCE]
        yield some, texts[some]


def _errors(candidates: Dataset, usable: np.ndarray) -> tuple[dict[str, int], dict[str, int]]:
    """By code, most first: of versions that cannot be used, and of those at these places, which can."""
    there = "error" in candidates.column_names
    codes: list[str | None] = [
        error_code(error) for error in (candidates["error"][:] if there else [None] * len(candidates))
    ]
    remarks = Counter(code for place in usable.tolist() if (code := codes[place]))
    for place in usable.tolist():
        codes[place] = None
    errors = Counter(code or "unknown" for code in codes if code is not None)
    return dict(errors.most_common()), dict(remarks.most_common())


def _mean(values: np.ndarray) -> dict[str, float | int | None]:
    finite = values[np.isfinite(values)]
    mean = float((finite / len(finite)).sum()) if len(finite) else None  # a sum of them all might not be finite
    return {"mean": mean, "n": len(finite)}

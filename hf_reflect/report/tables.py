"""The report's exact numbers: the funnel, the versions, the statistics and the costs, as rows for tables."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..columns import is_usable
from ..selection import VARIANTS
from .reading import KEPT, Reading
from .statistics import SETS, means_of
from .words import CODES, NAMES, outcome_in_words, outcome_name

_SOURCE = {
    "not_taken": ("not taken", "Beyond max_rows."),
    "invalid": ("no instruction pair", "Dropped while reading (invalid: drop)."),
    "not_preselected": ("not preselected", "Left out by preselect_share before anything was asked."),
}
_EXAMPLE = 160  # characters


def funnel(reading: Reading) -> list[dict[str, Any]]:
    """Steps from source to kept: label, count, of which count it is a share; what was lost, and what was gained.

    Losses and gains are those before the next step, each a label, a sentence and a count.
    """
    total = len(reading.ids)
    steps: list[dict[str, Any]] = []
    source, whole = reading.record.source, total
    if "rows" in source:
        lost = [(label, words, int(source.get(key) or 0)) for key, (label, words) in _SOURCE.items()]
        gap = int(source["rows"]) - sum(count for *_, count in lost) - total
        if gap > 0:
            lost.append(("lost elsewhere", "Read, but not among the candidates; the summary does not say why.", gap))
        more = ("pairs more than rows", "A conversation of several exchanges gives several pairs.", -gap)
        rows = int(source["rows"])
        whole = total if gap < 0 else rows
        steps.append(
            {
                "label": "Source rows",
                "count": rows,
                "of": rows,
                "lost": [each for each in lost if each[2]],
                "gained": [more] if gap < 0 else [],
            }
        )
    counts = np.bincount(reading.outcome, minlength=len(reading.outcomes)).tolist()
    lost = [
        (outcome_name(name), outcome_in_words(name), count)
        for name, count in zip(reading.outcomes, counts, strict=True)
        if name != KEPT and count
    ]
    lost.sort(key=lambda each: -each[2])
    steps.append({"label": "Rows in the candidates", "count": total, "of": whole, "lost": lost, "gained": []})
    if KEPT in reading.outcomes:
        label = "Kept for training" if reading.selected is not None else "Would be kept"
        kept = counts[reading.outcomes.index(KEPT)]
        steps.append({"label": label, "count": kept, "of": whole, "lost": [], "gained": []})
    return steps


def kept_by_variant(reading: Reading) -> list[tuple[str, str, int]]:
    """Figure 7: variant, its name, how many of the kept rows are of it."""
    counts = Counter(reading.variant[reading.kept].tolist())
    return [(name, NAMES[name], counts[number]) for number, name in enumerate(VARIANTS)]


def versions(reading: Reading) -> dict[str, Any]:
    """Of each variant how many versions there are, are usable, and are not, by code; what the codes mean.

    A remark is an error beside texts that are there.
    """
    unusable = Counter(
        zip(reading.variant[~reading.usable].tolist(), reading.code[~reading.usable].tolist(), strict=True)
    )
    noted = reading.usable & (reading.code >= 0)
    remarks = Counter(reading.code[noted].tolist())
    codes = [number for number in range(len(reading.codes)) if any(code == number for _, code in unusable)]
    rows = []
    for number, name in enumerate(VARIANTS):
        of_it = reading.variant == number
        if not of_it.any():
            continue
        by_code = [unusable[number, code] for code in codes]
        rows.append((NAMES[name], int(of_it.sum()), int((of_it & reading.usable).sum()), by_code))
    total = (
        "All",
        len(reading.usable),
        int(reading.usable.sum()),
        [sum(each) for each in zip(*(r[3] for r in rows), strict=True)],
    )
    explained = [
        (
            reading.codes[code],
            sum(n for (_, its), n in unusable.items() if its == code),
            remarks[code],
            *_explained(reading, code),
        )
        for code in sorted({*codes, *remarks})
    ]
    return {"codes": [reading.codes[code] for code in codes], "rows": [*rows, total], "explained": explained}


def _explained(reading: Reading, code: int) -> tuple[str, str]:
    """A sentence, and what one version says."""
    place = int(np.argmax(reading.code == code))
    row = reading.candidates[place]
    error = row.get("error") or ("" if is_usable(row["instruction"], row["response"]) else "a text is missing")
    detail = error.partition(":")[2].strip() or error
    words = CODES.get(reading.codes[code], "A code of your own check.")
    return words, detail if len(detail) <= _EXAMPLE else f"{detail[:_EXAMPLE].rstrip()}…"


def statistics_rows(statistics: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Names of the sets; of each measure its mean and n in each of them, without measures that nobody has."""
    sets = statistics["sets"]
    rows = [(label.replace("… given", "perplexity of response given"), cells) for label, cells in means_of(sets)]
    return [SETS[name] for name in sets], rows


def cost_rows(reading: Reading) -> dict[str, Any]:
    """What each stage took: the columns that any has, and of each stage a number for each, None where it has none."""
    costs = reading.record.costs
    if not costs and reading.record.calls:
        costs = {"teacher, in the last launch": reading.record.calls}
    known = {
        "replies": "replies",
        "asked": "asked in the last launch",
        "prompt_tokens": "prompt tokens",
        "completion_tokens": "completion tokens",
        "cost": "money",
        "seconds": "seconds",
        "steps": "steps",
    }
    has_prices = any(some.get("cost") for some in costs.values())
    names = [name for name in known if any(name in some for some in costs.values())]
    names = [name for name in names if name != "cost" or has_prices]
    rows = [(stage, [some.get(name) for name in names]) for stage, some in costs.items()]
    most = {name: max((row[n] or 0 for _, row in rows), default=0) for n, name in enumerate(names)}
    return {
        "names": [known[name] for name in names],
        "rows": rows,
        "most": list(most.values()),
        "by_stage": bool(reading.record.costs),
        "priced": has_prices,
        "spent": reading.record.spent,
    }


def teacher_total(reading: Reading) -> dict[str, Any]:
    """replies, tokens and cost of both reflections."""
    stages = [reading.record.costs.get(stage, {}) for stage in ("instruction", "response")]
    total = {name: sum(some.get(name, 0) for some in stages) for name in ("replies", "cost")}
    tokens = sum(some.get(name, 0) for some in stages for name in ("prompt_tokens", "completion_tokens"))
    return {"replies": int(total["replies"]), "tokens": int(tokens), "cost": total["cost"]}

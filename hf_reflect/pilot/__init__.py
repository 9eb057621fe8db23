"""What a careful person sees before a full recycling: a sample, several teachers, one student, one page.

    ask          a teacher rewrites the sample; where it cannot, why, and what came before
    measure      of one teacher: usable, kept, shifts, price and hours
    shifts       what choosing by the student's scores brings, and whether chance brings as much
    examples     the same rows by all teachers, side by side
    write_pilot  the numbers as JSON, and all of it as one HTML page

Intervals hold 95 % of the samples that come of drawing the source rows again, each with all its versions.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets

from ..columns import KEY_COLUMNS, is_usable
from ..errors import TeacherError
from ..ledger import Ledger
from ..pairs import error_code
from ..prompts import PROMPTS
from ..reflection import ReflectionTransform
from ..selection import RULES, VARIANTS, Decision, decide, select_top
from ..selection.rules import RESPONSE, winners
from ..selection.versions import Versions, read_versions
from ..teacher import Teacher
from ..teacher.stream import size
from ..templates import StudentTemplate

DRAWS = 2000  # samples drawn again for an interval
DEALS = 500  # times that the scores are dealt anew
COINS = 20  # seeds of the random control: where each of them keeps a row, all count
ENOUGH = 10  # kept rows, below which no mean is compared
PRESELECTED = 0.05  # the share of the rows that the authors advise to recycle
SCORES = {"ifd": "IFD", "r_ifd": "r-IFD"}
COMPARED = {
    "control": "paper's rule against a coin",
    "originals": "paper's rule against originals",
    "by_the_teacher": "a coin's new versions against originals",
}
_ROWS_AT_ONCE = 25  # at least
_MADE_BY = {"instruction": ("instruction",), "response": ("response", "instruction+response")}
_NOT_ASKED = ("budget", "parent")


class Asked(NamedTuple):
    """What one teacher made of the sample."""

    name: str  # the `source` of its rewrites
    teacher: Teacher
    table: Dataset  # originals and rewrites; what was not asked for has an error `budget: …`
    failed: str | None  # why asking stopped before its end
    requests: int  # HTTP requests of this run, repeated ones included


class Shift(NamedTuple):
    """How far two means lie apart, and how far they would by chance."""

    rows: int  # source rows that have a part in the first mean
    mean: float
    against: float
    value: float  # their difference
    interval: tuple[float, float]  # 95 %, over source rows
    by_chance: tuple[float, float]  # 95 % of what comes out where a row's scores are dealt among its versions
    distinguishable: bool


# ---- asking


def ask(pairs: Dataset, teacher: Teacher, name: str) -> Asked:
    """Let a teacher rewrite the instructions and then the responses of a sample.

    In:  the table of `to_pairs`                                         (N rows)
    Out: that and the rewrites, with `name` as their `source`            (4N rows)

    A TeacherError ends the asking, not the program: it is in `failed`, and the table has what came before.
    """

    def transforms(may_ask: bool) -> list[ReflectionTransform]:
        both = [ReflectionTransform(teacher, part, source=name) for part in _MADE_BY]
        for transform in both:
            transform._may_ask = may_ask
        return both

    def reflected(table: Dataset, transform: ReflectionTransform) -> Dataset:  # as one batch, so in one stream
        words = f"{name}: {transform.part}"
        return table.map(transform, batched=True, batch_size=None, load_from_cache_file=False, desc=words)

    # some rows to their end, then the next: where money ends, most of what was begun is complete
    at_once = len(pairs) if teacher.mode == "batch" else max(teacher.max_concurrency, _ROWS_AT_ONCE)
    before, failed, parts = _requests(teacher), None, []
    try:
        teacher.check_ready()
        both = transforms(may_ask=True)
        for start in range(0, len(pairs), at_once):
            some = pairs.select(range(start, min(start + at_once, len(pairs))))
            parts.append(reduce(reflected, both, some))
    except TeacherError as error:
        failed, parts = str(error), [reduce(reflected, transforms(may_ask=False), pairs)]
    return Asked(name, teacher, concatenate_datasets(parts), failed, _requests(teacher) - before)


def _requests(teacher: Teacher) -> int:
    with Ledger(teacher.ledger) as ledger:
        return int(ledger.spent()["requests"])


def all_versions(every: Sequence[Asked]) -> Dataset:
    """Originals once and the rewrites of all teachers, the table to be scored."""
    rewrites = [_some(asked.table, lambda row: row["source"] != "") for asked in every[1:]]
    return concatenate_datasets([every[0].table, *rewrites])


def of_teacher(scored: Dataset, name: str) -> Dataset:
    """Originals and the rewrites of one teacher, out of the table of all."""
    return _some(scored, lambda row: row["source"] in ("", name))


def answered(table: Dataset) -> set[str]:
    """The rows of which no version waits for money, or for an endpoint that stopped."""
    return {row_id for row_id, some in _by_row(table).items() if not any(_code(row) == "budget" for row in some)}


def student_numbers(scored: Dataset, template: StudentTemplate) -> dict[str, Any]:
    """What the student makes of the sample: scores of the originals, and how many versions are cut to fit."""
    rows = [row for row in scored.to_list() if not _code(row)]
    found: dict[str, Any] = {
        "versions": len(rows),
        "cut": sum(one.cut or two.cut for one, two in template.encode(rows)),
    }
    for name in SCORES:
        values = np.array([row[name] for row in rows if row["variant"] == "original" and row[name] is not None])
        median, high = (float(np.median(values)), float((values >= 1).mean())) if len(values) else (None, None)
        found[name] = {"median": median, "share_from_1_on": high}
    return found


def _some(table: Dataset, wanted: Callable[[Mapping[str, Any]], bool]) -> Dataset:
    keys = table.select_columns(list(KEY_COLUMNS))
    return table.select([number for number, row in enumerate(keys) if wanted(row)])


# ---- what came of it


def measure(asked: Asked, scored: Dataset, rows: int, seed: int = 0, **selection: Any) -> dict[str, Any]:
    """All numbers of one teacher, ready for JSON; what cannot be known is None.

    Usable shares are over the rewrites that were asked for; all else is over answered rows, see `answered`.

    Args:
        asked: what `ask` gave.
        scored: the same table with the student's scores.
        rows: of the whole dataset, for the price of the full run.
        seed: of what is drawn.
        selection: ifd_gate, r_ifd_gate and keep, as for `select`.
    """
    teacher, versions, there = asked.teacher, _by_row(scored), answered(scored)
    table = _some(scored, lambda row: row["row_id"] in there)
    every = [row for some in versions.values() for row in some]
    with Ledger(teacher.ledger) as ledger:
        known = ledger.get({key for key, _ in _calls(teacher, every)})
    took = _took(teacher, {row_id: some for row_id, some in versions.items() if row_id in there}, known)
    result: dict[str, Any] = {
        "name": asked.name,
        "model": teacher.model,
        "endpoint": teacher.shown_endpoint,
        "failed": asked.failed,
        "rows": len(versions),
        "answered": len(there),
        "usable": {part: _usable(row for row in every if row["variant"] in some) for part, some in _MADE_BY.items()},
        "pilot": _pilot(asked, known, took.cost is not None),
        "kept": None,
        "shifts": None,
        "full": None,
        "preselected": None,
    }
    parts = list(result["usable"].values())
    count, usable = (sum(part[name] for part in parts) for name in ("asked", "usable"))
    result["usable_share"] = usable / count if count else None
    if not there:
        return result

    with_gates, without = (
        {each.row_id for each in decide(table, **selection | gates) if each.kept}
        for gates in ({}, {"ifd_gate": None, "r_ifd_gate": None})
    )
    result["kept"] = {
        "rows": len(with_gates),
        "share": len(with_gates) / len(there),
        "rows_without_gates": len(without),
        "share_without_gates": len(without) / len(there),
        "dropped_by_gates": len(without) - len(with_gates),
        **_cost_per_kept(took, [row_id in with_gates for row_id in took.rows], seed),
    }
    result["shifts"] = shifts(table, seed=seed, **selection)
    result["full"] = _run(took, rows, teacher, seed)
    result["preselected"] = _run(took, max(round(PRESELECTED * rows), 1), teacher, seed)
    return result


def _by_row(table: Dataset) -> dict[str, list[dict[str, Any]]]:
    """The versions of each source row."""
    found = defaultdict(list)
    for row in table.to_list():
        found[row["row_id"]].append(row)
    return dict(found)


def _code(row: Mapping[str, Any]) -> str:
    """Of a version that is not usable; `budget` also where its parent was not asked for."""
    if is_usable(row["instruction"], row["response"]):
        return ""
    code = error_code(row["error"]) or "unknown"
    return "budget" if code == "parent" and "(budget:" in row["error"] else code


def _usable(rewrites: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """asked, usable, share, codes (of what was asked, and `parent`: not asked, for want of an instruction)."""
    codes = Counter(_code(row) for row in rewrites)
    usable = codes.pop("", 0)
    count = usable + sum(number for code, number in codes.items() if code not in _NOT_ASKED)
    return {
        "asked": count,
        "usable": usable,
        "share": usable / count if count else None,
        "codes": dict(codes.most_common()),
    }


# ---- what it took


class _Took(NamedTuple):
    """What the calls of each row took, (rows,); reused replies as if they were asked now."""

    rows: list[str]
    calls: np.ndarray
    timed: np.ndarray  # calls of which it is known how long they took
    seconds: np.ndarray
    prompt_tokens: np.ndarray
    completion_tokens: np.ndarray
    cost: np.ndarray | None  # None without prices

    @property
    def tokens(self) -> np.ndarray:
        """Of prompts and replies, (rows,)."""
        return self.prompt_tokens + self.completion_tokens


def _calls(teacher: Teacher, versions: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[dict[str, str]]]]:
    """All calls that these versions of a row ask for: the ledger's key, and the chat."""
    calls = []
    for row in versions:
        parts = {"original": ("instruction", "response"), "instruction": ("response",)}.get(row["variant"], ())
        for part in parts if not _code(row) else ():
            chat = PROMPTS[part].chat(row["instruction"], row["response"], row["input"], row["history"])
            calls.append((teacher.key(chat), chat))
    return calls


def _took(
    teacher: Teacher, versions: Mapping[str, list[dict[str, Any]]], known: Mapping[str, dict[str, Any]]
) -> _Took:
    numbers = []
    for some in versions.values():
        calls = _calls(teacher, some)
        there = [(known[key], chat) for key, chat in calls if key in known]
        seconds = [record["seconds"] for record, _ in there if record.get("seconds")]
        prompt, completion = np.array([(0, 0), *(_tokens(*each) for each in there)]).sum(axis=0)
        numbers.append((len(calls), len(seconds), sum(seconds), prompt, completion))
    asked, timed, took, prompt, completion = np.array(numbers, float).reshape(-1, 5).T
    has_prices = None not in (teacher.price_per_million_input, teacher.price_per_million_output)
    cost = np.array([teacher.cost(*each) for each in zip(prompt, completion, strict=True)]) if has_prices else None
    return _Took(list(versions), asked, timed, took, prompt, completion, cost)


def _tokens(record: Mapping[str, Any], chat: list[dict[str, str]]) -> tuple[int, int]:
    """Of prompt and reply; a quarter of the bytes where the endpoint did not count."""
    if record.get("prompt_tokens"):
        return record["prompt_tokens"], record.get("completion_tokens") or 0
    return size(chat) // 4, len(record["text"].encode("utf-8", "replace")) // 4


def _pilot(asked: Asked, known: Mapping[str, dict[str, Any]], has_prices: bool) -> dict[str, Any]:
    """What the sample took, each reply once, whenever it was asked for."""
    records = known.values()
    prompt, completion = (sum(r.get(name) or 0 for r in records) for name in ("prompt_tokens", "completion_tokens"))
    return {
        "replies": len(records),
        "asked_now": int(asked.teacher.stats["asked"]),
        "requests_now": asked.requests,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cost": asked.teacher.cost(prompt, completion) if has_prices else None,
        "uncounted": sum(not record.get("prompt_tokens") for record in records),
        "returned": dict(Counter(record.get("model") or "no name" for record in records).most_common()),
    }


# ---- intervals


def _drawn(rows: int, seed: int) -> np.ndarray:
    """How often each source row is in each sample that is drawn again, (draws, rows), as shares."""
    return np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), DRAWS) / rows


def _interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of them."""
    known = values[np.isfinite(values)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def _ratio(over: np.ndarray, under: np.ndarray) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(over, under)


def _cost_per_kept(took: _Took, kept: list[bool], seed: int) -> dict[str, dict[str, Any] | None]:
    """Money for each row that is kept, dropped ones included; tokens without prices."""
    weights = _drawn(len(kept), seed)
    found: dict[str, dict[str, Any] | None] = {}
    for name, spent in (("cost_per_kept", took.cost), ("tokens_per_kept", took.tokens)):
        found[name] = None
        if spent is not None and any(kept):
            drawn = _ratio(weights @ spent, weights @ np.array(kept, float))
            found[name] = {"value": float(spent.sum() / sum(kept)), "interval": _interval(drawn)}
    return found


def _run(took: _Took, rows: int, teacher: Teacher, seed: int) -> dict[str, Any]:
    """What so many rows will take, if they are like those of the sample.

    Hours are requests times seconds a request over `max_concurrency`, but not fewer than the limits a minute allow.
    """
    weights = np.vstack([np.full(len(took.rows), 1 / len(took.rows)), _drawn(len(took.rows), seed)])  # first: as it is

    def estimate(drawn: np.ndarray) -> dict[str, Any]:
        return {"value": float(drawn[0]), "interval": _interval(drawn[1:])}

    columns = {name: getattr(took, name) for name in ("calls", "prompt_tokens", "completion_tokens", "tokens")}
    found: dict[str, Any] = {"rows": rows, **{n: estimate(rows * (weights @ some)) for n, some in columns.items()}}
    found["cost"] = None if took.cost is None else estimate(rows * (weights @ took.cost))
    found["hours"] = found["bound_by"] = found["seconds_a_request"] = None
    if took.timed.sum():
        requests = rows * (weights @ took.calls)
        each = _ratio(weights @ took.seconds, weights @ took.timed)
        by = {"max_concurrency": requests * each / teacher.max_concurrency}
        if teacher.requests_per_minute:
            by["requests_per_minute"] = requests * 60 / teacher.requests_per_minute
        if teacher.tokens_per_minute:  # counted as endpoints do
            tokens = rows * (weights @ took.prompt_tokens) + requests * teacher.max_tokens
            by["tokens_per_minute"] = tokens * 60 / teacher.tokens_per_minute
        found["bound_by"] = max(by, key=lambda name: by[name][0])
        found["hours"] = estimate(np.max(list(by.values()), axis=0) / 3600)
        found["seconds_a_request"] = float(took.seconds.sum() / took.timed.sum())
    return found


# ---- what choosing brings


class _Sums(NamedTuple):
    """Of one comparison the sums of each source row, (rows,): numerators and denominators of both means."""

    over: np.ndarray
    under: np.ndarray
    other_over: np.ndarray
    other_under: np.ndarray

    def means(self, weights: np.ndarray) -> tuple[Any, Any]:
        """Both, for each line of weights."""
        sums = [weights @ each for each in self]
        return _ratio(sums[0], sums[1]), _ratio(sums[2], sums[3])


def shifts(
    table: Dataset, ifd_gate: float | None, r_ifd_gate: float | None, keep: str | None = "reflected", seed: int = 0
) -> dict[str, Any]:
    """What choosing by the student's scores does to the mean IFD and r-IFD of what is trained on.

    In:  row_id, variant, instruction, response, ifd, r_ifd, optionally source; one teacher's table
    Out: gated (whether the gates were on), kept (rows of the paper's rule), and for `ifd` and `r_ifd` each a Shift as
         dict, or None, of
             control         what the paper's rule keeps, against what the rule "random" keeps
             originals       what the paper's rule keeps, against the originals of the same rows
             by_the_teacher  the rewrites that "random" takes, without gates, against the originals of the same rows

    "random" is that of `COINS` seeds together, and passes the same filter and gates: gates on one side alone would
    shift its mean by themselves. Where fewer than `ENOUGH` rows pass the gates, all is compared without them.

    The rule chooses by the very numbers that are compared: of two r-IFDs it takes the lower one, and ends with a lower
    mean though they were noise. So each row's scores are also dealt among its versions, `DEALS` times, and the same is
    computed: a shift is distinguishable only if its interval excludes 0 and it lies beyond the middle 95 % of those,
    further from 0. By the teacher nothing is chosen by a score, so this is the number to compare teachers by.
    """
    versions = read_versions(table, SCORES)
    coins = [winners(RULES["random"], versions, seed + number)[0] for number in range(COINS)]

    def compared(scores: dict[str, np.ndarray], gates: dict[str, float]) -> dict[tuple[str, str], _Sums]:
        now = versions._replace(scores=scores)
        paper = _part(now, [winners(RULES["paper"], now, seed)[0]], gates, keep)
        coin, new = _part(now, coins, gates, keep), _part(now, coins, {}, "reflected")
        found = {}
        for name in SCORES:
            found[name, "control"] = _Sums(*paper[name][:2], *coin[name][:2])
            for what, side in (("originals", paper), ("by_the_teacher", new)):
                over, under, original = side[name]
                known = ~np.isnan(original)
                found[name, what] = _Sums(over * known, under * known, np.nan_to_num(original) * under, under * known)
        return found

    asked_for = {"ifd": ifd_gate, "r_ifd": r_ifd_gate}
    gates = {name: gate for name, gate in asked_for.items() if gate is not None}
    observed = compared(versions.scores, gates)
    if gates and np.count_nonzero(observed["ifd", "control"].under) < ENOUGH:
        gates, observed = {}, compared(versions.scores, {})
    rows = len(versions.ids)
    once, weights = np.ones((1, rows)), _drawn(rows, seed)
    dealt: dict[tuple[str, str], list[float]] = {each: [] for each in observed}
    rng = np.random.default_rng(seed)
    for _ in range(DEALS):
        order = np.append(np.lexsort((rng.random(len(versions.row)), versions.row)), -1)  # within each row
        scores = {name: some[order] for name, some in versions.scores.items()}
        for each, sums in compared(scores, gates).items():
            mean, other = sums.means(once)
            dealt[each].append((mean - other)[0])
    result: dict[str, Any] = {"gated": bool(gates), "kept": int(np.count_nonzero(observed["ifd", "control"].under))}
    for name in SCORES:
        result[name] = {}
        for what in COMPARED:
            sums = observed[name, what]
            enough = min(np.count_nonzero(sums.under), np.count_nonzero(sums.other_under)) >= ENOUGH
            by_chance = _interval(np.array(dealt[name, what]))
            result[name][what] = _shift(sums, once, weights, by_chance)._asdict() if enough else None
    return result


def _part(
    versions: Versions, chosen: Sequence[np.ndarray], gates: Mapping[str, float], keep: str | None
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each score and row: the sum over what was kept of it, how often that was, and its original's score."""
    winner = np.stack(chosen)  # (choices, rows)
    kept = winner >= 0
    if keep == "reflected":
        kept &= versions.variant[winner] >= RESPONSE
    for name, gate in gates.items():
        kept &= versions.scores[name][winner] < gate
    found = {}
    for name in SCORES:
        score = versions.scores[name][winner]
        counts = kept & ~np.isnan(score)
        original = versions.scores[name][versions.first[:, 0]]
        found[name] = np.where(counts, score, 0.0).sum(axis=0), counts.sum(axis=0).astype(float), original
    return found


def _shift(sums: _Sums, once: np.ndarray, weights: np.ndarray, by_chance: tuple[float, float]) -> Shift:
    (mean,), (against,) = sums.means(once)
    drawn, drawn_against = sums.means(weights)
    low, high = _interval(drawn - drawn_against)
    value = float(mean - against)
    beyond = value > max(by_chance[1], 0.0) if value > 0 else value < min(by_chance[0], 0.0)
    excludes = low > 0 or high < 0
    rows = int(np.count_nonzero(sums.under))
    return Shift(rows, float(mean), float(against), value, (low, high), by_chance, bool(excludes and beyond))


def in_words(score: str, shift: Mapping[str, Any] | None) -> str:
    """Whether a shift is more than chance, as a plain sentence.

    Args:
        score: ifd or r_ifd.
        shift: a Shift as dict; None where too few rows were kept.
    """
    if shift is None:
        return f"Fewer than {ENOUGH} rows on one side: too few to compare."
    low, high = shift["interval"]
    if not (low > 0 or high < 0):
        return f"The interval includes 0: the shift of {SCORES[score]} is not distinguishable from none."
    if not shift["distinguishable"]:
        return (
            "The interval excludes 0, but scores dealt at random among each row's versions bring as much ("
            f"{' to '.join(f'{end:+.3f}' for end in shift['by_chance'])}): the shift of {SCORES[score]} is not "
            "distinguishable from choosing by noise."
        )
    side = "higher" if shift["value"] > 0 else "lower"
    return (
        f"The interval excludes 0, and chance does not reach so far: {SCORES[score]} is {side} by "
        f"{abs(shift['value']):.3f}."
    )


# ---- what people see


def examples(
    tables: Mapping[str, Dataset | None], count: int = 20, seed: int = 0, **selection: Any
) -> list[dict[str, Any]]:
    """The same source rows by all teachers: original, critique, versions, scores, and why one won; failures too.

    Args:
        tables: of each teacher its scored table; None where there is no reply of it.
        count: rows, drawn by the seed.
        seed: of the draw.
        selection: as for `measure`.
    """
    known = {name: table for name, table in tables.items() if table is not None}
    if not known:
        return []
    versions = {name: _by_row(table) for name, table in known.items()}
    decisions = {name: {each.row_id: each for each in decide(table, **selection)} for name, table in known.items()}
    first = next(iter(known.values()))
    originals = _some(first, lambda row: row["variant"] == "original")
    drawn = select_top(originals, count=min(count, len(originals)), by="random", seed=seed + 1)
    return [
        {
            "original": original,
            "teachers": [
                {"name": name, "versions": None}
                if name not in known
                else _example(
                    name, versions[name][original["row_id"]], decisions[name][original["row_id"]], known[name]
                )
                for name in tables
            ],
        }
        for original in drawn.to_list()
    ]


def _example(name: str, versions: list[dict[str, Any]], decision: Decision, table: Dataset) -> dict[str, Any]:
    winner = None if decision.position is None else table[decision.position]["variant"]
    rewrites = sorted((row for row in versions if row["source"]), key=lambda row: VARIANTS.index(row["variant"]))
    return {"name": name, "versions": rewrites, "kept": decision.kept, "winner": winner, "why": decision.why}


def percent(share: float | None) -> str:
    """A share for people."""
    return "–" if share is None else f"{100 * share:.0f} %"


def amount(value: float) -> str:
    """Money, tokens or a time, to three digits that count."""
    for least, factor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return amount(value / factor) + unit
    if value >= 100 or value < 1e-9:  # what a ledger reserved and gave back may leave as much
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(value))}f}"


def estimated(estimate: Mapping[str, Any] | None, factor: float = 1.0) -> str:
    """A value with its interval."""
    if estimate is None:
        return "–"
    value, low, high = (amount(factor * each) for each in (estimate["value"], *estimate["interval"]))
    return f"{value} [{low}, {high}]"


def lasting(hours: Mapping[str, Any] | None) -> str:
    """A time with its interval, in the unit that fits."""
    if hours is None:
        return "–"
    factor, unit = next((f, u) for f, u in ((1, "h"), (60, "min"), (3600, "s")) if hours["value"] * f >= 1 or u == "s")
    return f"{estimated(hours, factor)} {unit}"


def priced(found: Mapping[str, Any], name: str = "") -> str:
    """The money of a run, or of `cost_per_kept`, with its interval; its tokens where there are no prices."""
    cost, tokens = found[f"cost{name}"], found[f"tokens{name}"]
    return estimated(cost) if cost or not tokens else f"{estimated(tokens)} tok"


def shifted(shift: Mapping[str, Any] | None) -> str:
    """A shift with its interval; * where it is distinguishable."""
    if shift is None:
        return "–"
    low, high = shift["interval"]
    return f"{shift['value']:+.3f} [{low:+.3f}, {high:+.3f}]{'*' * shift['distinguishable']}"


def write_pilot(folder: Path, pilot: Mapping[str, Any], side_by_side: list[dict[str, Any]]) -> None:
    """`pilot.json`, all numbers, and `pilot.html`, one file without network or script.

    Args:
        folder: where both go.
        pilot: data (dataset, split, rows, sampled, seed), student (model, template, originals), selection (ifd_gate,
            r_ifd_gate, keep), teachers (what `measure` gave), ledger (spent, and its limits), note (or None).
        side_by_side: what `examples` gave.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {each.__name__: each for each in (percent, amount, estimated, lasting, priced, shifted)}
    more = {"in_words": in_words, "scales": _scales(pilot)}
    page = environment.get_template("page.html").render(
        **pilot, examples=side_by_side, scores=SCORES, compared=COMPARED, coins=COINS, deals=DEALS, **more
    )
    for name, text in (("pilot.json", json.dumps(_finite(pilot), indent=1, ensure_ascii=False)), ("pilot.html", page)):
        part = folder / f".{name}.part"
        part.write_text(text, encoding="utf-8", errors="replace")
        part.rename(folder / name)


def _scales(pilot: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """For each score the ends of the axis on which all teachers' shifts are drawn."""
    ends: dict[str, list[float]] = {name: [0.0] for name in SCORES}
    for teacher in pilot["teachers"]:
        for name in SCORES if teacher["shifts"] else ():
            for shift in filter(None, teacher["shifts"][name].values()):
                ends[name] += [shift["value"], *shift["interval"], *shift["by_chance"]]
    return {name: (min(some), max(max(some), min(some) + 1e-6)) for name, some in ends.items()}


def _finite(value: Any) -> Any:
    """What JSON can hold: no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

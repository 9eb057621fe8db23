"""Several training sets from one table of candidates, for a comparison in which nothing else differs.

rule, gates, keep    as `select` takes them: which version of each pair, which rows
share | count, by    then only the first of these rows, as `select_top` takes them
like                 then as many rows as another set has, at random
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from ..columns import SCORE_COLUMNS
from ..errors import DataError, SettingsError
from ..files import read_object, write_whole
from ..ledger import Ledger
from ..prompts import PROMPTS
from ..run import content_digest, describe_selected
from ..selection import check_rule, check_settings, check_top, select, select_top
from ..teacher import Teacher
from ..teacher.estimate import Estimate
from ..teacher.stream import size

# Table 4 of arXiv 2402.10110, the order its own; then the controls that later work asks for (arXiv 2410.09335: few
# selectors beat random choice, and long answers alone win comparisons)
TABLE_4: dict[str, dict[str, Any]] = {
    "paper": {"rule": "paper"},
    "original": {"rule": "original"},
    "instruction": {"rule": "instruction"},
    "response": {"rule": "response"},
    "instruction+response": {"rule": "reflected"},
    "random": {"rule": "random"},
    "coherence": {"rule": "coherence"},
    "perplexity": {"rule": "perplexity"},
    "ifd": {"rule": "ifd"},
    "r_ifd": {"rule": "r_ifd"},
    "longest": {"rule": "longest"},
    "random-same-size": {"rule": "random", "keep": None, "like": "paper"},
}
_SELECT = ("rule", "ifd_gate", "r_ifd_gate", "keep")
_TOP = ("share", "count", "by")


def check_sets(sets: Any, reference: str) -> None:
    """Raise a SettingsError unless these are training sets, the reference among them."""
    if not isinstance(sets, Mapping) or not all(isinstance(settings, Mapping) for settings in sets.values()):
        raise SettingsError("`sets` is a mapping of names to settings, such as `{longest: {rule: longest}}`.")
    if reference not in sets:
        raise SettingsError(f"`reference: {reference}` is none of the sets, which are {', '.join(sets)}.")
    for name, settings in sets.items():
        if not isinstance(name, str) or not isinstance(settings.get("rule", ""), str):
            raise SettingsError(f"The set {name!r} needs a text as its name, in quotes perhaps, and one as its rule.")
        if "/" in name or name.startswith("."):
            raise SettingsError(f"The set {name!r} names files: leave out slashes, and begin with no point.")
        if unknown := sorted(set(settings) - {*_SELECT, *_TOP, "like"}):
            known = ", ".join((*_SELECT, *_TOP, "like"))
            raise SettingsError(f"The set {name!r} has the setting {unknown[0]!r}, but there are {known}.")
        try:
            check_rule(settings.get("rule", "paper"), settings.get("keep", "reflected"))
        except SettingsError as error:
            raise SettingsError(f"The training set {name!r}: {error}") from error
        if any(part in settings for part in _TOP):
            check_top(settings.get("share", 1), settings.get("by", "ifd"))
            if "share" not in settings and "count" not in settings:
                raise SettingsError(f"The set {name!r} says by what, but not how many: add `share` or `count`.")
            if type(settings.get("count", 1)) is not int or settings.get("count", 1) < 1:
                raise SettingsError(f"`count` of the set {name!r} is a number of rows, not {settings['count']!r}.")
        if sum(part in settings for part in ("share", "count", "like")) > 1:
            raise SettingsError(f"The set {name!r} has more than one of `share`, `count` and `like`: keep one.")
        other = settings.get("like")
        if other is not None and (other not in sets or "like" in sets[other]):
            raise SettingsError(f"The set {name!r} is like {other!r}, which is no other set with a size of its own.")


def training_sets(
    candidates: Dataset,
    sets: Mapping[str, Mapping[str, Any]],
    ifd_gate: float | None = 1.0,
    r_ifd_gate: float | None = 1.0,
    seed: int = 0,
) -> dict[str, Dataset]:
    """The rows of each training set.

    In:  row_id, variant, instruction, response, what the rules need; unusable versions never win
    Out: the same columns, a table for each name

    Args:
        candidates: the scored table.
        sets: settings by name, as the head of this module says; what they leave out is as in the paper.
        ifd_gate: of sets that name none of their own.
        r_ifd_gate: likewise.
        seed: of everything random.

    Raises:
        SettingsError: settings that do not fit; see also `select` and `select_top`.
        DataError: a set that would be empty, or whose scores are missing, by its name.

    Source: arXiv 2402.10110, section 4.4 and Table 4, Tables 3 and 8 for shares. The paper does not say whether its
    ablations were filtered and gated; here they are, by their rules.
    """
    made: dict[str, Dataset] = {}
    for name, settings in sorted(sets.items(), key=lambda item: "like" in item[1]):
        chosen = {"ifd_gate": ifd_gate, "r_ifd_gate": r_ifd_gate, **{k: settings[k] for k in _SELECT if k in settings}}
        check_settings(**{"rule": "paper", "keep": "reflected", "seed": seed, **chosen})
        try:
            rows = select(candidates, **chosen, seed=seed)
            if "like" in settings:
                count = len(made[settings["like"]])
                if count > len(rows):
                    raise DataError(f"it has {len(rows)} rows, fewer than the {count} of {settings['like']!r}")
                rows = select_top(rows, count=count, by="random", seed=seed)
            elif any(part in settings for part in _TOP):
                top: dict[str, Any] = {part: settings[part] for part in _TOP if part in settings}
                rows = select_top(rows, **top, seed=seed)
        except (DataError, SettingsError) as error:
            raise type(error)(f"The training set {name!r}: {error}") from error
        made[name] = rows
    return {name: made[name] for name in sets}


def with_coherence(candidates: Dataset, encoder: Any, device: str = "cpu") -> Dataset:
    """The table with the column `coherence`: the cosine of Sentence-BERT embeddings of instruction and response.

    Raises:
        SettingsError: see `hf_reflect.scoring.coherence.load_encoder`.
    """
    from ..scoring.coherence import coherence_of, load_encoder

    loaded = load_encoder(encoder, device)
    values: list[float | None] = []
    for batch in candidates.select_columns(["instruction", "input", "response"]).iter(1000):
        names = list(batch)
        values += coherence_of(
            loaded, [dict(zip(names, row, strict=True)) for row in zip(*batch.values(), strict=True)]
        )
    if "coherence" in candidates.column_names:
        candidates = candidates.remove_columns("coherence")
    return candidates.add_column("coherence", values)


def by_coherence(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The sets that compare the column `coherence`."""
    return [name for name, some in sets.items() if "coherence" in (some.get("rule"), some.get("by"))]


def digest_of_scores(candidates: Dataset) -> str:
    """Of all numbers by which versions are compared."""
    scores = {name: candidates[name][:] for name in SCORE_COLUMNS if name in candidates.column_names}
    return hashlib.sha256(json.dumps(scores).encode()).hexdigest()[:16]


def steps_of(rows: int, arguments: Any, processes: int) -> int:
    """Optimizer steps of a transformers training over so many rows; `max_steps` where that is set."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    batches = math.ceil(rows / (arguments.per_device_train_batch_size * processes))
    return math.ceil(arguments.num_train_epochs * max(math.ceil(batches / arguments.gradient_accumulation_steps), 1))


def judging_takes(
    judges: Iterable[Teacher],
    questions: Sequence[str],
    sets: Mapping[int, Mapping[str, Dataset]],
    reference: str,
    comparisons: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """What judging will take in all, nothing of it asked yet: calls, prompt_tokens, completion_tokens, cost.

    An answer is taken to be as long as the responses that its student learns from, and no longer than `max_new_tokens`
    of four bytes each. Tokens are counted as `Teacher.estimate` does.

    Args:
        judges: who is asked.
        questions: what is answered.
        sets: the training sets by seed and name.
        reference: the set that each other one is compared with.
        comparisons: how many others there are; those that are not in `sets` count as the rest of them does.
        max_new_tokens: of an answer.
    """
    chats = [PROMPTS["judge"].chat(question, "", "") for question in questions]
    calls = 2 * len(chats) * comparisons  # of one seed
    read = 0.0  # bytes
    for rows in sets.values():
        lengths = {name: min(_mean_bytes(some), 4.0 * max_new_tokens) for name, some in rows.items()}
        others = [length for name, length in lengths.items() if name != reference]
        answers = lengths.get(reference, 0.0) + (fmean(others) if others else 0.0)
        read += 2 * comparisons * sum(map(size, chats)) + calls * answers
    taken: dict[str, float] = dict.fromkeys(("calls", "prompt_tokens", "completion_tokens", "cost"), 0)
    for judge in judges if comparisons else ():
        with Ledger(judge.ledger) as ledger:
            estimate = Estimate(judge, ledger)
            estimate.add_guess(chats[0], calls * len(sets), read)
            found = estimate.result()
        taken = {name: taken[name] + found[name] for name in taken}
    return taken


def _mean_bytes(rows: Dataset) -> float:
    return pc.mean(pc.binary_length(rows.with_format("arrow")[:]["response"])).as_py()


def describe_set(rows: Dataset) -> dict[str, Any]:
    """What identifies a training set: its rows, their texts, and how long its answers are (mean characters)."""
    answers = [len(text) for text in rows["response"]]
    return {
        **describe_selected(rows),
        "content": content_digest(rows),
        "characters": round(sum(answers) / len(answers)),
    }


# of SFTConfig what changes no training: where it writes, what it says, what is recorded apart
_NO_MATTER = (
    *("output_dir", "log", "save", "hub", "push", "eval", "do_", "report", "run_name", "project", "trackio", "debug"),
    *(
        "disable_tqdm",
        "dataloader",
        "ddp",
        "local_rank",
        "seed",
        "max_steps",
        "num_train_epochs",
        "resume",
        "load_best",
    ),
    *("metric", "greater", "include", "torch_empty", "enable_jit", "restore", "length_column", "ignore_data_skip"),
)


def describe_arguments(training: Any, model: Any) -> dict[str, Any]:
    """What a training's result depends on beside rows, seed, steps and the student: of SFTConfig and ModelConfig."""
    settings = {k: v for k, v in training.to_dict().items() if not k.startswith(_NO_MATTER)}
    adapter = {k: v for k, v in vars(model).items() if not k.startswith("model_")}
    return json.loads(json.dumps({"training": settings, "model": adapter}, default=str))


def digest_of(table: Dataset) -> str:
    """Of what is asked, and of what was answered."""
    texts = [table[name][:] for name in ("question_id", "question", "answer") if name in table.column_names]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def is_done(result: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether a result is there and was made with these settings; what was made with others goes if it may.

    Raises:
        SettingsError: it was made with others, and `overwrite` is off; which one is said.
    """
    if not result.exists():
        return False
    before, now = (_flat(each) for each in (made_with(result).get("settings", {}), json.loads(json.dumps(settings))))
    different = next((key for key in {**before, **now} if before.get(key) != now.get(key)), None)
    if different is None:
        return True
    if not overwrite:
        raise SettingsError(
            f"{result} was made otherwise: `{different}` was {before.get(different)!r} and is now "
            f"{now.get(different)!r}.\nName another `output_dir`, or make it anew with `--overwrite true`."
        )
    result.unlink()
    return False


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = value if isinstance(value, dict) else {}
        flat |= {f"{name}.{part}": each for part, each in inner.items()} or {name: value}
    return flat


def made_with(result: Path) -> dict[str, Any]:
    """How a result was made: its `settings`, and what else was put beside it."""
    return read_object(result.with_name(f"{result.name}.made_with.json"), absent={})


def put(result: Path, content: Any = None, **sections: Any) -> None:
    """Say how a result is made, and then write it as JSON, unless somebody else does."""
    write_whole(result.with_name(f"{result.name}.made_with.json"), json.dumps(sections, indent=2))
    if content is not None:
        write_whole(result, json.dumps(content, indent=2))

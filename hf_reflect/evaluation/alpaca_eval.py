"""AlpacaEval: a model's outputs for the alpaca-eval package, its annotators asked, and what its annotations come to.

answers → write_outputs → annotate (prompts, orders and parsers are the package's) → read_annotations → win rate

Long answers win more often, and models tuned on rewritten answers write long ones: a win rate stands beside the mean
length, and beside the package's length-controlled win rate where that can be had.
"""

import difflib
import hashlib
import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..columns import require_columns
from ..errors import DataError, SettingsError, TeacherError
from ..parsing.reply import shortened
from ..teacher import Teacher
from ..teacher.endpoint import without
from .answers import read_answers

Row = dict[str, Any]

# annotator and reference of each version; both papers used the first
VERSIONS = {
    "AlpacaEval 1": ("alpaca_eval_gpt4", "text_davinci_003"),
    "AlpacaEval 2": ("weighted_alpaca_eval_gpt4_turbo", "gpt4_1106_preview"),
}
# The package reads these by a loading script, which datasets runs no more: the files behind it.
REFERENCES = {"text_davinci_003": "alpaca_eval.json", "gpt4_1106_preview": "alpaca_eval_gpt4_baseline.json"}
_HUB = "tatsu-lab/alpaca_eval"
# SHA-256 of the 805 instructions, one a line, in the order that their published difficulties have
_STANDARD_SET = "80812b0556445b68"
_OF_A_CHAT = {"model_name", "max_tokens", "temperature", "top_p"}
_SHUFFLED_BY = 123  # the package's seed, before it takes the first `max_instances`


def write_outputs(answers: Iterable[Mapping[str, Any]], path: str | Path, generator: str | None = None) -> list[Row]:
    """One model's answers in AlpacaEval's format: for `annotate`, and for the package's own command line.

    In:  question, answer, model, optionally category or test_set       (as `read_answers` gives them)
    Out: instruction, output, generator, dataset (where known)          (a JSON file, and the same rows)

    Raises:
        DataError: answers of two models, or of none that is named; missing ones; a question that stands there twice.
    """
    outputs = _as_outputs(answers, generator, "The answers")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(outputs, ensure_ascii=False, indent=2), encoding="utf-8")
    part.rename(path)
    return outputs


def load_reference(reference: str) -> list[Row]:
    """What a model is compared with: a name in `REFERENCES`, from the Hub, or a file as `read_answers` reads it.

    Raises:
        DataError: no such file, the Hub cannot be reached, or it holds no outputs of one model.
    """
    import huggingface_hub

    path = reference
    if reference in REFERENCES and not Path(reference).exists():
        try:
            path = huggingface_hub.hf_hub_download(_HUB, REFERENCES[reference], repo_type="dataset")
        except OSError as error:
            raise DataError(
                f"The reference {reference!r} cannot be loaded: {REFERENCES[reference]} of {_HUB} on the Hub: "
                f"{_first_line(error)}\nBe online, or give the path of that file as `reference`."
            ) from error
    answers = read_answers(path)
    named = None if any(answers["model"]) else Path(reference).stem
    return _as_outputs(answers, named, f"The answers of the reference {reference!r}")


def annotate(
    outputs: list[Row],
    reference: list[Row],
    annotator: str,
    teacher: Teacher | None = None,
    cache: str | Path | None = None,
    max_instances: int | None = None,
) -> list[Row]:
    """Which of two outputs a judge prefers, for every instruction: the work of the alpaca-eval package.

    Annotators that read the text of one chat model (`alpaca_eval_gpt4`) are asked through the teacher: every judgement
    enters its ledger first, within its limits. Those that need log-probabilities (`weighted_alpaca_eval_gpt4_turbo`),
    tools or another provider are asked by the package's own client.

    In:  instruction, output, generator                   (N rows each, of `write_outputs` and of `load_reference`)
    Out: instruction, output_1 (the reference's), output_2, generator_1, generator_2, annotator, preference (1: the
         reference, 2: the model, 1.5: neither, between for weighted annotators, None: no judgement)           (N rows)

    Args:
        outputs: the model's.
        reference: the other model's, to the same instructions; rows come out in its order.
        annotator: a name among the package's `evaluators_configs`, or a folder or YAML file of that form.
        teacher: where to ask and how hard; model and sampling are the annotator's. None: the package asks by itself,
            as its environment variables say.
        cache: where judgements are kept that its own client asked for; a rerun asks only for those that are missing.
        max_instances: only so many, drawn as the package draws them.

    Raises:
        DataError: the two do not answer the same instructions.
        SettingsError: no such annotator; limits that cannot be kept; alpaca-eval is not installed.
        TeacherError: asking stopped.
    """
    path, configs = _configuration(annotator)
    judge = None if teacher is None else _judge(teacher, path, configs)
    if teacher is not None and judge is None and any(limit is not None for limit in teacher.limits):
        raise SettingsError(
            f"The annotator {annotator!r} is asked by alpaca-eval's own client, past the ledger for which `max_cost`, "
            "`max_requests` and `max_total_tokens` hold. Leave them out, and set a limit at the provider."
        )
    outputs = _in_order_of(reference, outputs)
    import openai
    import pandas
    from alpaca_eval.annotators import PairwiseAnnotator

    tables = [pandas.DataFrame.from_records(rows) for rows in (reference, outputs)]
    if max_instances is not None:
        tables = [table.sample(frac=1, random_state=_SHUFFLED_BY)[:max_instances] for table in tables]
    caching = None if judge or cache is None else str(cache)  # else the package keeps them among its own files
    asking: Row = {}
    with _quiet():
        package = PairwiseAnnotator(
            annotators_config=str(path),
            caching_path=caching,
            # failures are asked again; the package takes this only where its file is already there
            is_store_missing_annotations=caching is None or not Path(caching).exists(),
        )
        if judge is not None:
            for one in package.annotators.values():
                one.fn_completions = _completions(judge)
            asking = {"chunksize": None}
        elif teacher is not None and _client(configs) == "openai_completions":
            asking = {"openai_api_base": teacher.endpoint, "openai_api_keys": teacher.api_key()}
        try:
            annotations = package.annotate_head2head(*tables, **asking)
        except openai.OpenAIError as error:
            words = without(teacher.api_key(), str(error)) if teacher else _first_line(error)
            raise TeacherError(
                f"The annotator {annotator!r} cannot be asked: {words}\nCheck its model, `base_url` and the key."
            ) from error
    if judge is not None and teacher is not None:
        teacher.count(**judge.stats)
    return [{name: _known(value) for name, value in row.items()} for row in annotations]


def read_annotations(
    annotations: str | Path | Iterable[Mapping[str, Any]], outputs: Iterable[Mapping[str, Any]] | None = None
) -> Row:
    """What annotations come to, by the functions of the alpaca-eval package.

    In:  instruction, output_2, preference; for the length-controlled win rate all that `annotate` gives

    Args:
        annotations: a JSON file of the package's, or rows.
        outputs: what they should be about, as `write_outputs` gives it; it may hold more than was annotated.

    Returns:
        win_rate and standard_error in percent, n_wins, n_draws, n_losses, n_total: of annotated instructions alone;
        n_unannotated; avg_length and avg_length_reference (or None), mean characters, whole ones as the package has
        it; length_controlled_winrate, or None and the reason in length_controlled_note.

    Raises:
        DataError: no annotations; those of other outputs, or of two models; none that holds a preference.
        SettingsError: alpaca-eval is not installed.
    """
    who = f"The annotations {str(annotations)!r}" if isinstance(annotations, str | Path) else "The annotations"
    rows = _read(annotations, who)
    _check_about(rows, who, outputs)
    annotated = [row for row in rows if row["preference"] is not None]
    if not annotated:
        raise DataError(
            f"{who} hold no preference for any of {len(rows)} instructions: the judge's replies failed, or the "
            "annotator's parser could not read them."
        )
    _package()
    from alpaca_eval.metrics import get_winrate

    found = get_winrate(annotated)
    standard_error = _known(float(found["standard_error"]))  # none of a single annotation
    against = [len(row["output_1"]) for row in rows if isinstance(row.get("output_1"), str)]
    length_controlled, note = _length_controlled(rows)
    return {
        "win_rate": float(found["win_rate"]),
        "standard_error": standard_error,
        "n_wins": int(found["n_wins"]),
        "n_draws": int(found["n_draws"]),
        "n_losses": int(found["n_wins_base"]),
        "n_total": int(found["n_total"]),
        "n_unannotated": len(rows) - len(annotated),
        "avg_length": sum(len(row["output_2"]) for row in rows) // len(rows),
        "avg_length_reference": sum(against) // len(rows) if len(against) == len(rows) else None,
        "length_controlled_winrate": length_controlled,
        "length_controlled_note": note,
    }


def _as_outputs(answers: Iterable[Mapping[str, Any]], generator: str | None, who: str) -> list[Row]:
    rows = list(answers)
    require_columns(rows[0] if rows else (), ("question", "answer"), who, "Read them with `read_answers(path)`.")
    models = sorted({row.get("model") or "" for row in rows} - {""})
    if len(models) > 1:
        raise DataError(
            f"{who} are of {len(models)} models ({', '.join(models[:3])}), but outputs have one generator. Give each "
            "model a file of its own."
        )
    if not generator and not models:
        raise DataError(f"{who} do not say which model gave them: name it as `generator`.")
    missing = [row["question"] for row in rows if not isinstance(row["answer"], str)]
    twice = [text for text, count in Counter(row["question"] for row in rows).items() if count > 1]
    if texts := missing or twice:
        found = "lack an output to" if missing else "hold more than once"
        raise DataError(
            f"{who} {found} {len(texts)} of {len(rows)} questions, such as {shortened(texts[0], 60)!r}: AlpacaEval "
            "matches one output to each instruction. Generate what is missing again, and leave one of each."
        )
    outputs = []
    for row in rows:
        dataset = row.get("category") or row.get("test_set")
        output = {"instruction": row["question"], "output": row["answer"], "generator": generator or models[0]}
        outputs.append(output | ({"dataset": dataset} if dataset else {}))
    return outputs


def _in_order_of(reference: list[Row], outputs: list[Row]) -> list[Row]:
    """The package joins the two by instruction and leaves out what has no partner: that is an error here."""
    ours, theirs = ({row["instruction"]: row for row in rows} for rows in (outputs, reference))
    for who, texts in (
        ("The outputs miss", [text for text in theirs if text not in ours]),
        ("The reference misses", [text for text in ours if text not in theirs]),
    ):
        if texts:
            raise DataError(
                f"{who} {len(texts)} of {len(ours | theirs)} instructions, such as {shortened(texts[0], 60)!r}: a win "
                "rate over a part compares with no published one.\nAnswer the reference's instructions, all of them; "
                "for a trial set `max_instances`."
            )
    return [ours[text] for text in theirs]


def _configuration(annotator: str) -> tuple[Path, Row]:
    """An annotator's file, and what stands in it."""
    published = _package().constants.EVALUATORS_CONFIG_DIR
    local = Path(annotator).expanduser()
    path = local.resolve() if local.exists() else published / annotator
    path = path / "configs.yaml" if path.is_dir() else path
    if not path.is_file():
        known = sorted(file.parent.name for file in published.glob("*/configs.yaml"))
        near = difflib.get_close_matches(annotator, known, n=1)
        raise SettingsError(
            f"The annotator {annotator!r} is neither a file or folder of yours nor one of alpaca-eval's. "
            + (f"Did you mean `{near[0]}`?" if near else f"Those are {', '.join(known)}.")
        )
    return path, yaml.safe_load(path.read_text(encoding="utf-8"))


def _client(configs: Row) -> str:
    """The function of the package that asks; "" where there are several."""
    clients = {config.get("fn_completions", "openai_completions") for config in configs.values()}
    return clients.pop() if len(clients) == 1 else ""


def _judge(teacher: Teacher, path: Path, configs: Row) -> Teacher | None:
    """The teacher as this annotator's model; None where more than the text of a chat's reply is needed."""
    config = next(iter(configs.values()))
    settings = config.get("completions_kwargs") or {}
    prompt = path.parents[1] / config["prompt_template"]
    is_chat = prompt.is_file() and prompt.read_text(encoding="utf-8").strip().startswith("<|im_start|>")
    is_text = config.get("completion_key", "completions") == "completions"
    plain = {"model_name"} <= set(settings) <= _OF_A_CHAT
    if len(configs) > 1 or _client(configs) != "openai_completions" or not (is_chat and is_text and plain):
        return None
    sampling = {"max_tokens": 2048, "temperature": 0.7, "top_p": 1.0} | settings  # the package's own defaults
    return replace(teacher, model=sampling.pop("model_name"), **sampling)


def _completions(judge: Teacher) -> Callable[..., Row]:
    """What the package calls to have its prompts answered."""

    def completions(prompts: Iterable[str], **settings: Any) -> Row:
        from alpaca_eval.utils import prompt_to_chatml

        replies = judge([prompt_to_chatml(prompt.strip()) for prompt in prompts])
        # no parser takes an empty text: the preference is missing then
        return {"completions": ["" if reply.error else reply.text for reply in replies]}

    return completions


def _read(annotations: str | Path | Iterable[Mapping[str, Any]], who: str) -> list[Row]:
    """Rows of annotations, with None where there is no preference."""
    found: Any = annotations
    if isinstance(annotations, str | Path):
        try:
            found = json.loads(Path(annotations).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{who} cannot be read: {_first_line(error)}") from error
    rows = [dict(row) for row in found if isinstance(row, Mapping)]
    hint = "Give `annotations.json` as alpaca-eval writes it."
    require_columns(rows[0] if rows else (), ("instruction", "output_2", "preference"), who, hint)
    for row in rows:
        preference = _known(row["preference"])
        row["preference"] = preference = None if preference == -1 else preference  # the package's mark of a failure
        if not (preference is None or preference == 0 or 1 <= preference <= 2):
            raise DataError(
                f"{who} hold the preference {preference!r}, but AlpacaEval knows 1 (the reference), 2 (the model), "
                "1.5 or 0 (neither), and what lies between 1 and 2."
            )
    return rows


def _check_about(rows: list[Row], who: str, outputs: Iterable[Mapping[str, Any]] | None) -> None:
    """That annotations are of one model, one an instruction, and of these outputs."""
    models = sorted({row["generator_2"] for row in rows if row.get("generator_2")})
    instructions = {row["instruction"] for row in rows}
    if len(models) > 1 or len(instructions) < len(rows):
        raise DataError(
            f"{who} are {len(rows)}, of {len(instructions)} instructions and {len(models) or 'unnamed'} models "
            f"({', '.join(models[:3])}), but a win rate is that of one model, one annotation an instruction. Read "
            "each model's by itself."
        )
    ours = None if outputs is None else {row["instruction"]: row["output"] for row in outputs}
    others = [
        row["instruction"] for row in rows if ours is not None and ours.get(row["instruction"]) != row["output_2"]
    ]
    if others:
        unknown = sum(text not in (ours or {}) for text in others)
        raise DataError(
            f"{who} are not of these outputs: {unknown} of {len(rows)} are of other instructions, "
            f"{len(others) - unknown} of other outputs to the same ones, such as {shortened(others[0], 60)!r}. "
            "Annotate these outputs, or read the annotations with their own."
        )


def _length_controlled(rows: list[Row]) -> tuple[float | None, str | None]:
    """The package's estimate of the win rate at equal lengths, or why there is none. Source: arXiv 2404.04475."""
    listed = "\n".join(str(row["instruction"]) for row in rows)
    if hashlib.sha256(listed.encode()).hexdigest()[:16] != _STANDARD_SET:
        return None, "it is defined for AlpacaEval's 805 instructions, all and in their order; these are others"
    if not all(row.get(name) for row in rows for name in ("generator_1", "generator_2", "output_1")):
        return None, "it needs generator_1, generator_2 and output_1 in each annotation"
    try:
        from alpaca_eval.metrics import get_length_controlled_winrate

        with _quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of scikit-learn, for the package's calls
            found = get_length_controlled_winrate(rows, save_weights_dir=None, is_warn_extreme_changes=False)
    except (OSError, ImportError) as error:  # difficulties from the Hub, or patsy
        return None, f"the instructions' difficulties cannot be had from {_HUB} on the Hub: {_first_line(error)}"
    return float(found["length_controlled_winrate"]), None


def _package() -> Any:
    try:
        with _quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pkg_resources, which the package uses
            import alpaca_eval
    except ImportError as error:
        raise SettingsError(
            f"AlpacaEval needs the package alpaca-eval, which cannot be imported ({error}): `pip install "
            "'hf_reflect[eval]'`."
        ) from error
    return alpaca_eval


@contextmanager
def _quiet() -> Iterator[None]:
    """The package sets the root logger's level on import, and logs each reply that its parser cannot read."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(before)


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]

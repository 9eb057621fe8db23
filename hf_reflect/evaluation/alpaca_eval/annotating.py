"""Who is asked which of two outputs is better: the package's annotators, through a teacher where that can be."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ...errors import DataError, SettingsError, TeacherError
from ...launch import first_line
from ...parsing.reply import shortened
from ...teacher import Teacher
from ...teacher.endpoint import without
from ...teacher.replies import Reply
from .formats import Row
from .package import imported, known, quiet

# annotator and reference of each version; both papers used the first
VERSIONS = {
    "AlpacaEval 1": ("alpaca_eval_gpt4", "text_davinci_003"),
    "AlpacaEval 2": ("weighted_alpaca_eval_gpt4_turbo", "gpt4_1106_preview"),
}
_OF_A_CHAT = {"model_name", "max_tokens", "temperature", "top_p"}
_SHUFFLED_BY = 123  # the package's seed, before it takes the first `max_instances`


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
    tools or another provider are asked by the package's own client: see `is_asked_by_teacher`. Either way what was
    asked is counted in the teacher's `stats`.

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
        TeacherError: asking stopped, or no judgement can be used.
    """
    path, configs = _configuration(annotator)
    judge = None if teacher is None or not _reads_a_chat(path, configs) else _judge(teacher, configs)
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
    replies: list[Reply] = []
    with quiet():
        package = PairwiseAnnotator(
            annotators_config=str(path),
            caching_path=caching,
            # failures are asked again; the package takes this only where its file is already there
            is_store_missing_annotations=caching is None or not Path(caching).exists(),
        )
        for one in package.annotators.values():
            one.fn_completions = _completions(judge, replies) if judge else _overheard(one.fn_completions, replies)
        if judge is not None:
            asking = {"chunksize": None}
        elif teacher is not None and _client(configs) == "openai_completions":
            asking = {"openai_api_base": teacher.endpoint, "openai_api_keys": teacher.api_key()}
        try:
            annotations = package.annotate_head2head(*tables, **asking)
        except openai.OpenAIError as error:
            words = without(teacher.api_key(), str(error)) if teacher else first_line(error)
            raise TeacherError(
                f"The annotator {annotator!r} cannot be asked: {words}\nCheck its model, `base_url` and the key."
            ) from error
    if teacher is not None:
        teacher.count(**(judge.stats if judge else {"asked": len(replies)}))
    rows = [{name: known(value) for name, value in row.items()} for row in annotations]
    # equal outputs are a draw without a judge
    if replies and all(row["preference"] is None for row in rows if row["output_1"] != row["output_2"]):
        raise _of_no_use(annotator, replies, judge.ledger if judge else None)
    return rows


def is_asked_by_teacher(annotator: str) -> bool:
    """Whether `annotate` asks it through the teacher and its ledger, rather than by the package's own client.

    Raises:
        SettingsError: no such annotator; alpaca-eval is not installed.
    """
    return _reads_a_chat(*_configuration(annotator))


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
    published = imported().constants.EVALUATORS_CONFIG_DIR
    local = Path(annotator).expanduser()
    path = local.resolve() if local.exists() else published / annotator
    path = path / "configs.yaml" if path.is_dir() else path
    if not path.is_file():
        names = sorted(file.parent.name for file in published.glob("*/configs.yaml"))
        near = difflib.get_close_matches(annotator, names, n=1)
        raise SettingsError(
            f"The annotator {annotator!r} is neither a file or folder of yours nor one of alpaca-eval's. "
            + (f"Did you mean `{near[0]}`?" if near else f"Those are {', '.join(names)}.")
        )
    try:
        configs = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"The annotator {path} is no YAML: {' '.join(str(error).split())}") from error
    if (
        not isinstance(configs, dict)
        or not all(isinstance(config, dict) for config in configs.values())
        or not configs
    ):
        raise SettingsError(f"The annotator {path} is a mapping of a name to its settings, as alpaca-eval's are.")
    for name, config in configs.items():
        prompt = path.parents[1] / str(config.get("prompt_template"))  # where the package looks
        if not prompt.is_file():
            raise SettingsError(
                f"The annotator {name!r} in {path} has the prompt_template {config.get('prompt_template')!r}, but "
                f"{prompt} is no file. It is looked for from the folder above: write `{path.parent.name}/<its file>`."
            )
    return path, configs


def _client(configs: Row) -> str:
    """The function of the package that asks; "" where there are several."""
    clients = {config.get("fn_completions", "openai_completions") for config in configs.values()}
    return clients.pop() if len(clients) == 1 else ""


def _reads_a_chat(path: Path, configs: Row) -> bool:
    """Whether all that an annotator needs is the text of a chat's reply, with settings that a teacher has."""
    config = next(iter(configs.values()))
    settings = config.get("completions_kwargs") or {}
    prompt = path.parents[1] / config["prompt_template"]
    is_chat = prompt.read_text(encoding="utf-8").strip().startswith("<|im_start|>")
    is_text = config.get("completion_key", "completions") == "completions"
    plain = {"model_name"} <= set(settings) <= _OF_A_CHAT
    return len(configs) == 1 and _client(configs) == "openai_completions" and is_chat and is_text and plain


def _judge(teacher: Teacher, configs: Row) -> Teacher:
    """The teacher as this annotator's model."""
    settings = next(iter(configs.values())).get("completions_kwargs") or {}
    sampling = {"max_tokens": 2048, "temperature": 0.7, "top_p": 1.0} | settings  # the package's own defaults
    return replace(teacher, model=sampling.pop("model_name"), **sampling)


def _completions(judge: Teacher, heard: list[Reply]) -> Callable[..., Row]:
    """What the package calls to have its prompts answered; the replies are in `heard` too."""

    def completions(prompts: Iterable[str], **settings: Any) -> Row:
        from alpaca_eval.utils import prompt_to_chatml

        replies = judge([prompt_to_chatml(prompt.strip()) for prompt in prompts])
        heard.extend(replies)
        # no parser takes an empty text: the preference is missing then
        return {"completions": ["" if reply.error else reply.text for reply in replies]}

    return completions


def _overheard(client: Callable[..., Row], heard: list[Reply]) -> Callable[..., Row]:
    """The package's own client; what it brings is in `heard` too."""

    def completions(prompts: Iterable[str], **settings: Any) -> Row:
        found = client(prompts=prompts, **settings)
        heard.extend(Reply(str(text)) for text in found["completions"])
        return found

    return completions


def _of_no_use(annotator: str, replies: list[Reply], ledger: str | None) -> TeacherError:
    """Whether nothing came, or nothing that the annotator's parser could read."""
    unread = [reply.text for reply in replies if not reply.error]
    errors = [reply.error for reply in replies if reply.error]
    if not unread:
        return TeacherError(
            f"The annotator {annotator!r} judged nothing: none of {len(replies)} prompts was answered, the first "
            f"for {shortened(errors[0], 200)}\nSee to the endpoint, or raise the limit, and run it again."
        )
    return TeacherError(
        f"The annotator {annotator!r} judged nothing: none of {len(unread)} replies could be read, for example: "
        f"{shortened(unread[0], 200)!r}\nIts model does not keep to the form that its prompt asks for. Take a copy of "
        "the annotator's folder, `prompt_template` being that of the copy, with another `model_name`, or with more "
        "`max_tokens` if it thinks first. "
        + (f"Replies that came are kept in {ledger}, and not asked for again." if ledger else "")
    )

"""What the recipes can be told: dataclasses for TrlParser, beside its SFTConfig and ModelConfig."""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

from datasets import Dataset

from .checks import all_of
from .columns import SCORE_COLUMNS, require_columns
from .errors import ReflectError, SettingsError
from .launch import load_table, revision_of
from .pairs import to_pairs
from .prompts import PROMPTS
from .reflection import ReflectionTransform
from .selection import check_rule, check_schedule, check_top
from .teacher import Teacher
from .templates import check_template

if TYPE_CHECKING:
    from .published import Published


@dataclass
class DataArguments:
    """What is recycled, and which part of the way is gone."""

    dataset: str | None = field(default=None, metadata={"help": "Folder, .json(l)/.csv/.parquet file, or Hub id."})
    split: str = field(default="train", metadata={"help": "Its split."})
    max_rows: int | None = field(default=None, metadata={"help": "Only the first rows: for a trial."})
    rename_columns: dict | str | None = field(default=None, metadata={"help": "Old to new column names."})
    turns: str = field(default="last", metadata={"help": "Of a conversation: last exchange, or all of them."})
    invalid: str = field(default="raise", metadata={"help": "Rows that are no pair: raise or drop."})
    stage: str = field(default="all", metadata={"help": "all, recycle, select or train."})
    reflect: str = field(
        default="all",
        metadata={
            "help": "all: three calls a row, candidates for any student. selective: two, as the student chooses "
            "between instructions before the rest is asked; `stage: recycle` then needs it, with launcher and GPUs."
        },
    )
    candidates: str | None = field(
        default=None, metadata={"help": "A recycled table (folder or Hub id) to choose from."}
    )
    published: dict | str | None = field(
        default=None,
        metadata={
            "help": "Candidates of the papers' authors: alpaca-7b, alpaca-13b, wizardlm-7b, wizardlm-13b (the student "
            "of their scores), or a mapping of texts, scores and rows, each of the first two a folder or a Hub id."
        },
    )
    preselect_share: float | None = field(
        default=None, metadata={"help": "Recycle only this share of the rows, those that come first by preselect_by."}
    )
    preselect_by: str = field(
        default="ifd", metadata={"help": "ifd (hardest first), r_ifd, a loss column, longest or random."}
    )
    estimate_only: bool = field(default=False, metadata={"help": "Print calls, tokens and money, and stop."})
    overwrite: bool = field(default=False, metadata={"help": "Replace tables that other settings made."})
    report: bool = field(default=True, metadata={"help": "Write report.html; needs the extra `report`."})
    push_dataset_to: str | None = field(
        default=None, metadata={"help": "Hub id for candidates, selected rows and their provenance; private."}
    )
    push_public: bool = field(
        default=False, metadata={"help": "A public dataset; `license` and `teacher_terms` must be said."}
    )
    license: str | None = field(default=None, metadata={"help": "Of the source dataset, as the Hub writes it."})
    teacher_terms: str | None = field(
        default=None, metadata={"help": "What the teacher's terms say of training on its replies: words or a link."}
    )
    demo: bool = field(default=False, metadata={"help": "Bundled pairs, written replies and a toy student."})

    def __post_init__(self) -> None:
        self.rename_columns = mapping("rename_columns", self.rename_columns)
        if self.stage not in ("all", "recycle", "select", "train"):
            raise SettingsError(f"`stage` is all, recycle, select or train, not {self.stage!r}.")
        if self.reflect not in ("all", "selective"):
            raise SettingsError(f"`reflect` is all or selective, not {self.reflect!r}.")
        if self.published is not None:
            self.published_table()
            if self.candidates is not None or self.stage == "recycle" or self.reflect == "selective":
                raise SettingsError(
                    "`published` are candidates that nobody recycles: leave out `candidates`, `stage: recycle` and "
                    "`reflect: selective`."
                )
        if self.preselect_share is not None:
            check_top(self.preselect_share, self.preselect_by)
            if self.preselect_by == "coherence":
                raise SettingsError(
                    "`preselect_by: coherence` cannot be: nobody computes it before the teacher is asked."
                )
            if self.candidates is not None or self.published is not None:
                raise SettingsError(
                    "With `candidates` or `published` nothing is asked, so there is nothing to preselect: leave out "
                    "`preselect_share`."
                )

    def publication(self) -> dict[str, str]:
        """What only a person knows of a dataset that is pushed."""
        given = {"license": self.license, "teacher_terms": self.teacher_terms}
        return {name: words for name, words in given.items() if words}

    def published_table(self) -> "Published":
        """What `published` names.

        Raises:
            SettingsError: nothing is known by that name.
        """
        from .published import PUBLISHED, Published

        given = self.published
        if isinstance(given, str) and given not in PUBLISHED:
            given = mapping("published", given) if given.lstrip().startswith("{") else given
        try:
            found = PUBLISHED[given] if isinstance(given, str) else Published(**(given or {}))
            if not isinstance(found.texts, str) or not isinstance(found.scores, str):
                raise TypeError
            return found
        except (KeyError, TypeError) as error:
            raise SettingsError(
                f"`published` is one of {', '.join(PUBLISHED)}, or a mapping of `texts`, `scores` and `rows`, not "
                f"{given!r}."
            ) from error

    @property
    def preselects_by_score(self) -> bool:
        """Whether the student must score the rows before the teacher sees some."""
        return self.preselect_share is not None and self.preselect_by in SCORE_COLUMNS

    def pairs(self) -> tuple[Dataset, dict[str, Any]]:
        """The table of `to_pairs` of these settings; and of its source: rows, not_taken, invalid, revision."""
        if self.dataset is None:
            raise SettingsError("Name the data to recycle: `dataset: <folder, file or Hub id>`, or `--dataset ...`.")
        dataset = load_table(self.dataset, self.split)
        revision = revision_of(dataset)
        assert not isinstance(self.rename_columns, str)  # parsed above
        names = self.rename_columns or {}
        require_columns(dataset.column_names, names, "`rename_columns`", "Give the names as they are: old to new.")
        dataset = dataset.rename_columns(names)
        taken = min(self.max_rows or len(dataset), len(dataset))
        pairs = to_pairs(dataset.take(taken), turns=self.turns, invalid=self.invalid)
        rows = {row_id.rsplit("/", 1)[0] for row_id in pairs["row_id"]} if self.turns == "all" else pairs
        source = {"rows": len(dataset), "not_taken": len(dataset) - taken, "invalid": taken - len(rows)}
        return pairs, source | ({"revision": revision} if revision else {})

    def candidates_table(self) -> Dataset:
        """What `candidates` names: of a dataset of `push_recycled` all versions."""
        assert self.candidates is not None
        return load_table(self.candidates, what="candidates", config="candidates")


@dataclass(kw_only=True)
class EndpointArguments:
    """How an endpoint is asked, and how hard; the key is in the environment."""

    base_url: str | None = field(
        default=None, metadata={"help": "Any OpenAI-compatible endpoint; OpenAI's if absent."}
    )
    api_key_env: str = field(default="OPENAI_API_KEY", metadata={"help": "Environment variable that holds the key."})
    ledger: str | None = field(default=None, metadata={"help": "All replies; <output_dir>/ledger.sqlite if absent."})
    temperature: float | None = field(default=0.0, metadata={"help": "Sampling temperature."})
    top_p: float | None = field(default=1.0, metadata={"help": "Nucleus sampling."})
    max_tokens: int = field(default=2048, metadata={"help": "Tokens of a reply, at most."})
    extra_body: dict | str | None = field(default=None, metadata={"help": "Further fields of each request."})
    api_version: str | None = field(default=None, metadata={"help": "Of an Azure endpoint."})
    mode: str = field(
        default="live", metadata={"help": "live, or batch: OpenAI's batch API, slow and half the price."}
    )
    max_concurrency: int = field(default=64, metadata={"help": "Requests in flight; changes speed, never replies."})
    requests_per_minute: float | None = field(default=None, metadata={"help": "The endpoint's limit."})
    tokens_per_minute: float | None = field(default=None, metadata={"help": "The endpoint's limit."})
    timeout: float = field(default=300.0, metadata={"help": "Seconds for one request."})
    total_timeout: float | None = field(
        default=None, metadata={"help": "Seconds for each round of asking as a whole."}
    )
    max_retries: int = field(default=8, metadata={"help": "Of one request, after failures that may pass."})
    max_failure_rate: float = field(default=0.2, metadata={"help": "Stop past this share of unusable replies."})
    price_per_million_input: float | None = field(default=None, metadata={"help": "Money per million tokens."})
    price_per_million_output: float | None = field(default=None, metadata={"help": "Money per million tokens."})
    max_cost: float | None = field(default=None, metadata={"help": "Never spend more, over all runs of the ledger."})
    max_requests: int | None = field(default=None, metadata={"help": "Likewise, HTTP requests."})
    max_total_tokens: int | None = field(default=None, metadata={"help": "Likewise, tokens asked and answered."})
    on_budget: str = field(default="stop", metadata={"help": "stop (the rest stays unasked) or raise."})

    def __post_init__(self) -> None:
        self.extra_body = mapping("extra_body", self.extra_body)

    def asking(self, model: str, ledger: Path) -> Teacher:
        """A `Teacher` of these settings for a model; `ledger` is its file unless they name one."""
        settings = asdict(self) | {"ledger": str(self.ledger or ledger), "model": model}
        return Teacher(**{f.name: settings[f.name] for f in fields(Teacher) if f.name in settings})


@dataclass(kw_only=True)
class TeacherArguments(EndpointArguments):
    """Who rewrites the data, and how hard it may be asked; the key is in the environment."""

    teacher_model: str = field(metadata={"help": "Model name as the endpoint knows it."})
    structured: bool = field(default=False, metadata={"help": "Ask for JSON by a schema that the endpoint enforces."})
    retry_unusable: int = field(default=0, metadata={"help": "Ask again, warmer, for replies that cannot be used."})
    checks: list[str] = field(
        default_factory=list, metadata={"help": "Names in hf_reflect.checks.CHECKS: same_language, code_still_parses."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        all_of(self.checks)  # what it needs is there

    def teacher(self, ledger: Path) -> Teacher:
        """The `Teacher` of these settings; `ledger` is its file unless they name one."""
        return self.asking(self.teacher_model, ledger)

    def reflections(self, teacher: Teacher) -> tuple[ReflectionTransform, ReflectionTransform]:
        """On the instruction, then on the response."""
        kind = "-json" if self.structured else ""
        instruction, response = (
            ReflectionTransform(
                teacher,
                part,
                prompt=PROMPTS[f"{part}{kind}"],
                retry_unusable=self.retry_unusable,
                accept=all_of(self.checks) if self.checks else None,
            )
            for part in ("instruction", "response")
        )
        return instruction, response

    def settings(self, teacher: Teacher) -> dict[str, Any]:
        """What the replies depend on, and which of them are taken."""
        more = {"structured": self.structured, "retry_unusable": self.retry_unusable, "checks": self.checks}
        return teacher.sampling() | {name: value for name, value in more.items() if value}


@dataclass
class SelectionArguments:
    """How the student chooses."""

    rule: str = field(default="paper", metadata={"help": "A name in hf_reflect.RULES."})
    schedule: str = field(default="once", metadata={"help": "once, or epoch: versions are chosen anew at each epoch."})
    ifd_gate: float | None = field(default=1.0, metadata={"help": "Keep rows with IFD strictly below; null: no gate."})
    r_ifd_gate: float | None = field(
        default=1.0, metadata={"help": "Keep rows with r-IFD strictly below; null: no gate."}
    )
    keep: str | None = field(default="reflected", metadata={"help": "reflected (only rewritten responses), or null."})
    template: str = field(default="vicuna", metadata={"help": "auto, chat, vicuna, alpaca, wizardlm or plain."})
    rescore: bool = field(
        default=True, metadata={"help": "false: the candidates' own scores count, or the rule needs none."}
    )

    def settings(self, seed: int) -> dict[str, Any]:
        """What a choice depends on, student and candidates excepted."""
        gates = {"ifd_gate": self.ifd_gate, "r_ifd_gate": self.r_ifd_gate}
        found = {"rule": self.rule, "keep": self.keep, "seed": seed, **gates}
        return found if self.rescore else found | {"rescore": False}

    def __post_init__(self) -> None:
        check_rule(self.rule, self.keep)
        check_schedule(self.schedule)
        check_template(self.template)


def mapping(name: str, value: dict | str | None) -> dict | None:
    """A mapping, which the command line gives as the text of one."""
    import yaml

    try:
        parsed = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        parsed = value
    if parsed is not None and not isinstance(parsed, dict):
        raise SettingsError(f"`{name}` is a mapping, such as `{{old: new}}`, not {value!r}.")
    return parsed


def _text_or_null(text: str) -> str | None:
    return None if text == "null" else text


def parse_arguments(types: Sequence[type], script: str) -> tuple[Any, ...]:
    """The dataclasses filled by TrlParser.

    From `--config x.yaml`, else the YAML of the recipe's name beside it, and flags.

    Raises:
        SettingsError: unknown keys (with the nearest known one), values that do not fit, a YAML that cannot be read.
    """
    import torch
    import yaml
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise SettingsError(f"The arguments do not fit: {message}.")

    arguments = sys.argv[1:]
    if not any(argument.split("=")[0] in ("--config", "-h", "--help") for argument in arguments):
        arguments = ["--config", str(Path(script).with_suffix(".yaml")), *arguments]
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    config = arguments[arguments.index("--config") + 1] if "--config" in arguments[:-1] else None
    hints = [get_type_hints(kind) for kind in types]
    optional = {name for some in hints for name, hint in some.items() if hint == (str | None)}
    parser = Parser(types, allow_abbrev=False)
    for action in parser._actions:
        if action.dest in optional:  # as in a YAML
            action.type = _text_or_null
    known = [action.dest for action in parser._actions]
    if "use_cpu" in known and not torch.accelerator.is_available():
        # said here, since accelerate hands its own `use_cpu` only to single processes:
        # several would each think it is alone
        parser.set_defaults(use_cpu=True)
    try:
        if config is not None:
            for key in set(yaml.safe_load(Path(config).read_text()) or {}) - {*known, "env"}:
                near = difflib.get_close_matches(str(key), known, n=1)
                raise SettingsError(f"{config} has the key `{key}`, which no argument has." + _did_you_mean(near))
        return parser.parse_args_and_config(args=arguments)
    except OSError as error:
        raise SettingsError(
            f"The configuration {config} cannot be read: {error.strerror}. Check `--config`."
        ) from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{config} is no YAML: {' '.join(str(error).split())}") from error
    except (ValueError, TypeError) as error:
        if isinstance(error, ReflectError):
            raise
        words = str(error)
        if words.startswith("Some specified arguments are not used"):
            flag = words.split("'")[1].lstrip("-")
            near = difflib.get_close_matches(flag, known, n=1)
            raise SettingsError(f"The flag --{flag} is unknown." + _did_you_mean(near)) from error
        raise SettingsError(f"The arguments do not fit: {' '.join(words.split())}") from error


def _did_you_mean(near: list[str]) -> str:
    return f" Did you mean `{near[0]}`?" if near else " `--help` lists them all."

"""The pilot before a full recycling: 200 rows, several teachers, one student, a cap on money, one page to decide by.

    python recipes/pilot.py                              # runs pilot.yaml, beside it
    python recipes/pilot.py --estimate_only true         # what asking about the sample would take
    python recipes/pilot.py --demo true                  # bundled rows and replies: no key, no network

Every argument: `--help`. Written into `output_dir`: pilot.html, pilot.json, candidates/ (all versions, scored) and
ledger.sqlite. A second run asks, and scores, only what is missing.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import datasets
from datasets import Dataset

from hf_reflect import ReflectionTransform, StudentScorer, Teacher, demo, pilot, select_top
from hf_reflect.arguments import DataArguments, EndpointArguments, SelectionArguments, parse_arguments
from hf_reflect.errors import DataError, SettingsError, TeacherError
from hf_reflect.evaluation.comparison import markdown
from hf_reflect.launch import load_tokenizer, main_of
from hf_reflect.ledger import Ledger
from hf_reflect.parsing.reply import shortened
from hf_reflect.recycling import put_scores, unscored
from hf_reflect.reflection import estimate_recycling
from hf_reflect.run import print_estimate, weights_digest
from hf_reflect.templates import StudentTemplate

# of arguments that other recipes have too, those that mean something here
USED = {
    DataArguments: ("dataset", "split", "max_rows", "rename_columns", "turns", "invalid", "estimate_only", "demo"),
    SelectionArguments: ("ifd_gate", "r_ifd_gate", "keep", "template"),
}
LIMITS = ("max_cost", "max_requests", "max_total_tokens")
FOR_ALL = ("ledger", *LIMITS)  # of an endpoint, what no single teacher can have
# the comparisons, as a narrow table names them
SHORT = {"control": "rule − coin", "originals": "rule − original", "by_the_teacher": "coin − original"}


@dataclass(kw_only=True)
class PilotArguments:
    """How many rows, which teachers, which student."""

    output_dir: str = field(metadata={"help": "Where page, numbers, table and ledger go."})
    teachers: list | str | None = field(
        default=None,
        metadata={
            "help": "A list of mappings: model, perhaps a name, and any argument of an endpoint, in place of those "
            "beside `teachers`. They are asked one after the other, as long as limits allow."
        },
    )
    rows: int = field(default=200, metadata={"help": "Rows that each teacher rewrites, drawn by the seed."})
    side_by_side: int = field(default=20, metadata={"help": "How many of them the page shows in full."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "The student: folder or Hub id."})
    model_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit."})
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code of the model's own may run."})
    max_length: int = field(default=2048, metadata={"help": "Tokens of a training sequence, as in training."})
    use_cpu: bool = field(default=False, metadata={"help": "Score on the CPU, whatever else is there."})
    seed: int = field(default=0, metadata={"help": "Of the sample, the random control and the intervals."})

    def __post_init__(self) -> None:
        import yaml

        given = yaml.safe_load(self.teachers) if isinstance(self.teachers, str) else self.teachers
        if not isinstance(given or [], list) or not all(isinstance(each, dict) for each in given or []):
            raise SettingsError(f"`teachers` is a list of mappings, such as `[{{model: gpt-5.4}}]`, not {given!r}.")
        self.teachers = given or []
        for name in ("rows", "side_by_side"):
            if getattr(self, name) < 1:
                raise SettingsError(f"`{name}` is a number of rows, 1 or more, not {getattr(self, name)}.")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise SettingsError("A pilot is for one process: start it with `python recipes/pilot.py`.")


def main() -> None:
    types = (PilotArguments, DataArguments, EndpointArguments, SelectionArguments)
    asked, data, endpoint, chosen_by = parse_arguments(types, __file__)
    for arguments in (data, chosen_by):
        refuse_what_means_nothing(arguments)
    datasets.disable_progress_bars()
    folder = Path(asked.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if data.demo:
        endpoint = prepare_demo(asked, data, endpoint, folder)
    teachers = teachers_of(asked.teachers, endpoint, folder / "ledger.sqlite")
    selection = {"ifd_gate": chosen_by.ifd_gate, "r_ifd_gate": chosen_by.r_ifd_gate, "keep": chosen_by.keep}

    pairs, _ = data.pairs()
    sample = select_top(pairs, count=min(asked.rows, len(pairs)), by="random", seed=asked.seed)
    if data.estimate_only:
        return estimate(teachers, sample)

    # 1. All teachers rewrite the same rows. What can be wrong later is looked at before.
    if asked.model_name_or_path is None:
        raise SettingsError("Name the student that shall be trained: `model_name_or_path: <folder or Hub id>`.")
    tokenizer = load_tokenizer(asked.model_name_or_path, asked.model_revision, asked.trust_remote_code)
    template = StudentTemplate(tokenizer, chosen_by.template, asked.max_length)
    every = []
    for name, teacher in teachers.items():
        print(f"Asking {name} about {len(sample)} rows ...", flush=True)
        every.append(pilot.ask(sample, teacher, name))

    # 2. The student scores the originals once, and of the rewrites what it has not scored before.
    versions = pilot.all_versions(every)
    if any(pilot.answered(each.table) for each in every):
        versions = with_scores(versions, asked, template, folder / "candidates")
    else:
        versions = put_scores(versions, versions)  # none: there is nothing to choose from

    # 3. What came of it.
    tables = {each.name: pilot.of_teacher(versions, each.name) for each in every}
    numbers = [pilot.measure(each, tables[each.name], len(pairs), asked.seed, **selection) for each in every]
    replied = {each["name"]: tables[each["name"]] if each["pilot"]["replies"] else None for each in numbers}
    with Ledger(every[0].teacher.ledger) as ledger:
        spent = ledger.spent()
    result = {
        "note": demo.NOTE if data.demo else None,
        "data": {"dataset": data.dataset, "split": data.split, "rows": len(pairs), "sampled": len(sample)},
        "seed": asked.seed,
        "student": student_of(asked, template.name) | pilot.student_numbers(versions, template),
        "selection": selection,
        "teachers": numbers,
        "ledger": spent | {name: getattr(endpoint, name) for name in LIMITS},
    }
    pilot.write_pilot(folder, result, pilot.examples(replied, asked.side_by_side, asked.seed, **selection))
    print(verdict(result), flush=True)
    print(f"\n  page     {folder / 'pilot.html'}\n  numbers  {folder / 'pilot.json'}\n", flush=True)
    if all(each["failed"] and not each["pilot"]["replies"] for each in numbers):
        raise TeacherError("No teacher replied at all. Why not stands above, and on the page.")


def refuse_what_means_nothing(arguments: Any) -> None:
    """Raise a SettingsError where an argument was set that is for other recipes."""
    for each in fields(arguments):
        if each.name not in USED[type(arguments)] and getattr(arguments, each.name) != each.default:
            raise SettingsError(
                f"`{each.name}` means nothing in a pilot, which asks for all versions of a sample and compares the "
                "paper's rule with chance: leave it out."
            )


def teachers_of(entries: Sequence[Mapping[str, Any]], endpoint: EndpointArguments, ledger: Path) -> dict[str, Teacher]:
    """Each teacher under its name.

    Raises:
        SettingsError: there is none; keys that no teacher can have; two of one name, or of one model and sampling.
    """
    if not entries:
        raise SettingsError("Name the teachers to be compared: `teachers: [{model: ...}, {model: ...}]`.")
    known = ["name", "model", *(each.name for each in fields(EndpointArguments) if each.name not in FOR_ALL)]
    teachers: dict[str, Teacher] = {}
    for number, entry in enumerate(entries, 1):
        settings = dict(entry)
        if (model := settings.pop("model", None)) is None:
            raise SettingsError(f"Teacher {number} of `teachers` has no `model`: {dict(entry)!r}.")
        name = str(settings.pop("name", model))
        for key in set(settings) - set(known):
            if key in FOR_ALL:
                raise SettingsError(
                    f"`{key}` holds for all teachers together: set it beside `teachers`, not in {name}."
                )
            near = difflib.get_close_matches(str(key), known, n=1)
            raise SettingsError(
                f"The teacher {name} has the key `{key}`, which no endpoint has."
                + (f" Did you mean `{near[0]}`?" if near else "")
            )
        teacher = replace(endpoint, **settings).asking(str(model), ledger)
        if name in teachers:
            raise SettingsError(f"Two teachers are called {name!r}: give each a `name` of its own.")
        for other, before in teachers.items():
            if before.sampling() == teacher.sampling():
                raise SettingsError(
                    f"The ledger knows replies by model and sampling, whatever endpoint gave them, and {other} and "
                    f"{name} have both in common: the second would be given the first one's. Pilot them with "
                    "different `output_dir`s."
                )
        teachers[name] = teacher
    return teachers


def estimate(teachers: Mapping[str, Teacher], sample: Dataset) -> None:
    """What asking would take, teacher by teacher."""
    total = 0.0
    for name, teacher in teachers.items():
        first, then = (ReflectionTransform(teacher, part, source=name) for part in ("instruction", "response"))
        found = estimate_recycling(first, then, sample)
        total += found["cost"]
        print(f"\n{name}, {len(sample)} rows:")
        print_estimate(found)
    if total:
        print(f"  all teachers  {total:.2f}\n", flush=True)


def student_of(asked: PilotArguments, template: str) -> dict[str, Any]:
    """What the scores depend on beside the texts."""
    assert asked.model_name_or_path is not None  # looked at before
    return {
        "model": asked.model_name_or_path,
        "revision": asked.model_revision,
        "dtype": asked.dtype,
        "template": template,
        "max_length": asked.max_length,
        "weights": weights_digest(asked.model_name_or_path),
    }


def with_scores(versions: Dataset, asked: PilotArguments, template: StudentTemplate, saved: Path) -> Dataset:
    """The table with the student's scores, those of an earlier run of the same student included; saved."""
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM

    student, made_with = student_of(asked, template.name), saved / "made_with.json"
    before = made_with.exists() and json.loads(made_with.read_text()) == student
    versions = put_scores(versions, Dataset.load_from_disk(saved) if before else versions)
    if len(missing := unscored(versions)):
        name = asked.model_name_or_path
        try:
            model = AutoModelForCausalLM.from_pretrained(
                name, revision=asked.model_revision, dtype=asked.dtype, trust_remote_code=asked.trust_remote_code
            )
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"The student {name!r} cannot be loaded: {shortened(str(error), 300)}\nThe teachers' replies are in "
                "the ledger: name another student, and only it has to work."
            ) from error
        print(f"Scoring with {name} ...", flush=True)
        model.to(PartialState(cpu=asked.use_cpu).device)
        scorer = StudentScorer(model, template.tokenizer, template=template.name, max_length=asked.max_length)
        versions = put_scores(versions, scorer.score(missing))
    part = saved.with_name(".candidates.part")
    rmtree(part, ignore_errors=True)
    versions.save_to_disk(part)
    (part / "made_with.json").write_text(json.dumps(student))
    rmtree(saved, ignore_errors=True)
    part.rename(saved)
    return versions


def verdict(result: Mapping[str, Any]) -> str:
    """Two tables for a terminal of 100 columns, and why a teacher stopped."""
    first = [["teacher", "usable", "kept", "a kept row", "the full run", "time of asking"]]
    second = [["teacher", "", *pilot.SCORES.values()]]
    words = []
    for each in result["teachers"]:
        name, kept, full = shortened(each["name"], 14), each["kept"], each["full"]
        line = [name, pilot.percent(each["usable_share"]), *["–"] * 4]
        if each["answered"]:
            line[2:4] = pilot.percent(kept["share"]), pilot.priced(kept, "_per_kept").split(" [")[0]
            line[4:] = pilot.priced(full), pilot.lasting(full["hours"])
            for what, short in SHORT.items():
                second.append([name, short, *(pilot.shifted(each["shifts"][score][what]) for score in pilot.SCORES)])
        first.append(line)
        if left := each["rows"] - each["answered"]:
            words.append(f"{name}: {left} of {each['rows']} rows were not answered, and are in no mean or price.")
        if each["failed"]:
            words.append(f"{name} stopped: {each['failed']}")
    lines = ["", markdown(first), ""]
    if len(second) > 1:
        lines += [
            markdown(second),
            "",
            "In brackets 95 % intervals. *: it excludes 0, and chance does not reach so far.",
        ]
    return "\n".join([*lines, *words])


def prepare_demo(
    asked: PilotArguments, data: DataArguments, endpoint: EndpointArguments, folder: Path
) -> EndpointArguments:
    """Bundled pairs, a toy student, and two teachers in the ledger: the demo's, and one as if it were careless."""
    data.dataset, data.split, data.rename_columns = demo.PAIRS, "train", None
    asked.model_name_or_path, asked.model_revision, asked.dtype = str(folder / "student"), None, "float32"
    careful, careless = "written-for-the-demo", "the-same-but-careless"
    asked.teachers = [{"model": careful}, {"model": careless}]
    prices: dict[str, Any] = {"price_per_million_input": 0.5, "price_per_million_output": 2.0}
    # nobody is there: what is not in the ledger is asked of nobody, whatever key is set
    endpoint = replace(endpoint, base_url="http://demo.invalid/v1", max_failure_rate=1.0, **prices)
    teacher, other = (endpoint.asking(name, folder / "ledger.sqlite") for name in (careful, careless))
    demo.prepare(teacher, folder / "student")
    with Ledger(teacher.ledger) as ledger:
        written = [row for row in ledger.rows() if row[1]["model"] == careful]
        for _, request, reply, *_ in written:
            draw = hashlib.sha256(reply["text"].encode()).digest()[0] % 8
            if draw < 2:  # cut off
                reply |= {"text": reply["text"][: len(reply["text"]) // 2], "finish_reason": "length"}
            elif draw == 2:
                reply |= {"text": "I'm sorry, but I can't help with that.", "finish_reason": "stop"}
            chat = request["messages"]
            ledger.put(other.key(chat), other.request(chat), reply | {"model": careless}, endpoint="demo")
    return endpoint


if __name__ == "__main__":
    main_of(main)

"""Every recipe and every YAML, for two steps, on a tiny model, with the teacher and the judge on loopback."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys

import datasets
import pytest
import yaml
from conftest import ROOT, ROWS, load_recipe, scripted_teacher
from endpoint import Endpoint, rewriting
from launching import command, environment, kill_when, launch, on_cpu

from hf_reflect import ReflectionTransform, StudentScorer, to_pairs
from hf_reflect.arguments import (
    DataArguments,
    EndpointArguments,
    SelectionArguments,
    TeacherArguments,
    parse_arguments,
)
from hf_reflect.errors import BudgetExceeded, ReflectError, SettingsError
from hf_reflect.evaluation.answers import write_answers

RECIPES = ROOT / "recipes"
YAMLS = sorted(path.name for path in RECIPES.glob("*.yaml"))


def launched(name):
    """The recipe that a YAML's first line launches, and its arguments there."""
    first = (RECIPES / name).read_text().splitlines()[0]
    words = shlex.split(first.removeprefix("# "))
    (script,) = [word for word in words if word.startswith("recipes/") and word.endswith(".py")]
    return script.removeprefix("recipes/"), words[words.index(script) + 1 :], words[: words.index(script)]


def types_of(script, monkeypatch):
    """The dataclasses that a recipe is told by."""
    from trl import ModelConfig, SFTConfig

    if script == "srecycle_wizardlm.py":
        return DataArguments, TeacherArguments, SelectionArguments, SFTConfig, ModelConfig
    module = load_recipe(monkeypatch, script[:-3])
    own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
    own = [value for value in own if isinstance(value, type) and hasattr(value, "__dataclass_fields__")]
    shared = {"EndpointArguments": EndpointArguments, "SFTConfig": SFTConfig, "ModelConfig": ModelConfig}
    shared |= {"DataArguments": DataArguments, "SelectionArguments": SelectionArguments}
    return *own, *(kind for name, kind in shared.items() if hasattr(module, name))


# ---- what stands in them


@pytest.mark.parametrize("name", YAMLS)
def test_a_configuration_begins_with_its_launch_command_and_fits_that_recipe(name, monkeypatch):
    script, arguments, launcher = launched(name)
    assert (RECIPES / script).exists()
    assert launcher == ["python"] or launcher[:2] == ["accelerate", "launch"]
    for path in (word for word in launcher if word.endswith(".yaml")):
        assert (ROOT / path).exists()
    given = arguments[arguments.index("--config") + 1] if "--config" in arguments else f"recipes/{script[:-3]}.yaml"
    assert given == f"recipes/{name}"
    monkeypatch.setattr(sys, "argv", [script, "--config", str(RECIPES / name)])
    assert parse_arguments(types_of(script, monkeypatch), script)


def test_no_recipe_is_named_after_an_importable_module():
    for path in RECIPES.glob("*.py"):
        found = importlib.util.find_spec(path.stem)
        assert found is None or str(RECIPES) in str(found.origin), path


def test_the_table_of_recipes_has_a_row_for_every_configuration():
    table = (RECIPES / "README.md").read_text()
    missing = [name for name in YAMLS if f"`{name}`" not in table]
    assert not missing
    named = set(re.findall(r"`([a-z0-9_]+\.(?:yaml|py))`", table))
    assert all((RECIPES / name).exists() for name in named)


# ---- two steps of each


@pytest.fixture(scope="module")
def student(student_folder):
    return student_folder


@pytest.fixture(scope="module")
def candidates(student, tmp_path_factory):
    """A scored table, coherence made up."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    table = to_pairs(datasets.Dataset.from_list(ROWS))
    for part in ("instruction", "response"):
        transform = ReflectionTransform(scripted_teacher, part, source="scripted")
        table = table.map(transform, batched=True, load_from_cache_file=False)
    model, tokenizer = (kind.from_pretrained(student) for kind in (AutoModelForCausalLM, AutoTokenizer))
    table = StudentScorer(model, tokenizer, "vicuna", 256).score(table)
    table = table.add_column("coherence", [n % 7 / 7 for n in range(len(table))])
    folder = tmp_path_factory.mktemp("candidates") / "candidates"
    table.save_to_disk(folder)
    return folder


def replying(request):
    """Teacher, judge and examinee in one: two scores where a judge is asked, else a rewrite or a line."""
    asked = request["messages"][-1]["content"]
    if "Assistant 1" in asked:
        return f"{3 + len(asked) % 5} {3 + hash(asked) % 5}\nI compared them."
    return rewriting(request) if "[Instruction]" in asked else "A short answer."


@pytest.fixture
def served():
    with Endpoint(replying, models=("teacher",)) as server:
        yield server


TINY = {
    "max_length": 256,
    "max_steps": 2,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": None,
    "disable_tqdm": True,
}
OPEN = {"ifd_gate": None, "r_ifd_gate": None}


def adapted(name, folder, student, served, **changes):
    """A copy of a YAML with everything that is large or far away replaced by something tiny; the rest as it stands."""
    settings = yaml.safe_load((RECIPES / name).read_text()) | changes
    path = folder / name
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def run_recipe(script, path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--config", str(path)])
    load_recipe(monkeypatch, script[:-3]).main()


MAIN = [name for name in YAMLS if launched(name)[0] == "srecycle_wizardlm.py" and name != "quickstart.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MAIN)
def test_a_recycling_recipe_takes_two_steps(name, student, candidates, served, tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    before = yaml.safe_load((RECIPES / name).read_text())
    changes = TINY | OPEN | {"output_dir": str(tmp_path / "run"), "model_name_or_path": str(student), "report": False}
    if "candidates" in before:
        changes |= {"candidates": str(candidates)}
    if "dataset" in before:
        changes |= {"dataset": str(tmp_path / "data.jsonl"), "teacher_model": "teacher", "base_url": served.url}
    if "published" in before:
        texts, scores = published(tmp_path)
        changes |= {"published": {"texts": texts, "scores": scores, "rows": 4}}
    if before.get("keep"):
        changes["keep"] = None
    if "preselect_share" in before:
        changes["preselect_share"] = 0.5
    if "dtype" in before:
        changes["dtype"] = "float32"
    run_recipe("srecycle_wizardlm.py", adapted(name, tmp_path, student, served, **changes), monkeypatch)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["training"]["steps"] == 2
    rows = {"preselect.yaml": 4}.get(name, len(ROWS))
    calls = {"selective": 2, None: 3}[before.get("reflect")] * rows * ("dataset" in before)
    assert len(served.requests) == calls
    selected, table = (datasets.load_from_disk(tmp_path / "run" / each) for each in ("selected", "candidates"))
    assert len(selected) == (4 if "published" in before else rows)
    if name.startswith("recycle_"):
        assert set(selected["variant"]) == {"instruction+response"}
        assert set(table["ifd"]) == {None}  # nobody chose, nothing was scored
    else:
        assert None not in table["ifd"][:] and None not in table["r_ifd"][:]


def published(folder):
    """A table of the authors' schema, four rows, and scores of it by which all four are kept."""
    texts, scores = {}, {}
    for split in ("origin", "reflect_instruction", "reflect_response", "reflect_both"):
        pair = [{"instruction": f"{split} {n}?", "input": "", "output": f"{split}: {n} it is."} for n in range(4)]
        texts[split] = datasets.Dataset.from_list([{"data": each} for each in pair])
        ifd = 0.8 if "instruction" in split or "both" in split else 0.6
        r_ifd = 0.5 if "response" in split or "both" in split else 0.7
        ppl = [10.0, 10.0, 10.0 * r_ifd, 10.0 * ifd]
        from math import log

        numbers = {"ppl": ppl, "loss": [log(each) for each in ppl]}
        scores[split] = datasets.Dataset.from_list([{"data": numbers}] * 4)
    for name, splits in (("texts", texts), ("scores", scores)):
        datasets.DatasetDict(splits).save_to_disk(folder / name)
    return str(folder / "texts"), str(folder / "scores")


@pytest.mark.slow
def test_published_scores_that_are_trusted_choose_without_scoring(student, served, tmp_path, monkeypatch, capsys):
    texts, scores = published(tmp_path)
    changes = TINY | {"output_dir": str(tmp_path / "run"), "model_name_or_path": str(student), "rescore": False}
    changes |= {"published": {"texts": texts, "scores": scores, "rows": 4}}
    path = adapted("reselect_published.yaml", tmp_path, student, served, **changes)
    run_recipe("srecycle_wizardlm.py", path, monkeypatch)
    assert "the paper rule keeps 4 rows, as published" in capsys.readouterr().out
    selected, table = (datasets.load_from_disk(tmp_path / "run" / each) for each in ("selected", "candidates"))
    assert set(selected["variant"]) == {"instruction+response"}
    assert table["ifd"][:] == pytest.approx([0.6, 0.8, 0.6, 0.8] * 4)  # theirs


QUESTIONS = [{"question": f"Name {n} things.", "category": "even" if n % 2 else "odd"} for n in range(3)]


@pytest.fixture
def test_set(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return {"mine": str(path)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in YAMLS if launched(name)[0] == "ablation.py"])
def test_an_experiment_takes_two_steps_of_each_set(
    name, student, candidates, served, test_set, tmp_path, monkeypatch, capsys
):
    before = yaml.safe_load((RECIPES / name).read_text())
    changes = TINY | OPEN | {"output_dir": str(tmp_path / "run"), "model_name_or_path": str(student)}
    changes |= {"candidates": str(candidates), "test_sets": test_set, "judges": ["teacher"], "base_url": served.url}
    changes |= {"seeds": 1, "max_new_tokens": 4, "coherence_model": None}
    if "sets" in before:  # eight rows have no 2,316
        smaller = {"count": 3}
        sets = before["sets"].items()
        changes["sets"] = {key: each | (smaller if "count" in each else {}) | {"keep": None} for key, each in sets}
    else:
        kept = {"keep": None}
        from hf_reflect.evaluation.experiment import TABLE_4

        changes["sets"] = {key: each | kept for key, each in TABLE_4.items()}
    path = adapted(name, tmp_path, student, served, **changes)
    run_recipe("ablation.py", path, monkeypatch)
    result = json.loads((tmp_path / "run" / "ablation.json").read_text())
    sets = set(changes["sets"])
    assert set(result["judges"]["teacher"]) == sets - {result["reference"]} and set(result["sets"]) == sets
    assert sum(
        len(path.read_text().splitlines()) for path in (tmp_path / "run" / "answers").glob("*.jsonl")
    ) == 3 * len(sets)
    table = (tmp_path / "run" / "ablation.md").read_text()
    assert all(f"| {key} " in table for key in sets - {result["reference"]})
    asked = len(served.requests)
    run_recipe("ablation.py", path, monkeypatch)  # nothing is trained or asked again
    assert len(served.requests) == asked and "steps\n" not in capsys.readouterr().out.split("Written:")[1]


@pytest.fixture
def experiment(student, candidates, served, test_set, tmp_path):
    """`experiment(**changes)` writes the demo's ablation of two sets and returns its path."""

    def write(**changes):
        settings = TINY | OPEN | {"output_dir": str(tmp_path / "run"), "model_name_or_path": str(student)}
        settings |= {"candidates": str(candidates), "test_sets": test_set, "judges": ["teacher"]}
        settings |= {"base_url": served.url, "max_new_tokens": 4, "seeds": 1}
        settings["sets"] = {"paper": {"keep": None}, "longest": {"rule": "longest"}}
        return adapted("ablation_demo.yaml", tmp_path, student, served, **settings | changes)

    return write


def result_of(folder):
    return json.loads((folder / "run" / "ablation.json").read_text())


@pytest.mark.slow
def test_students_train_one_after_the_other_under_zero3_and_answer_whole(experiment, tmp_path):
    # three questions, one a batch: the processes generate unequally often
    done = launch("recipes/ablation.py", "--config", experiment(answer_batch_size=1), config=on_cpu("zero3", tmp_path))
    for training in result_of(tmp_path)["trainings"].values():
        inside = [training[key] for key in ("processes", "distributed_type", "model_class", "steps")]
        assert inside == [2, "DEEPSPEED", "DeepSpeedEngine", 2]
        assert training["partitioned"] is True  # the second student too
    assert done.stderr.count("2 + 1 on 2 processes") == 2


@pytest.mark.slow
def test_an_experiment_trains_adapters_with_several_seeds(experiment, tmp_path, monkeypatch, capsys):
    adapter = {"use_peft": True, "lora_target_modules": "all-linear", "learning_rate": 0.1, "keep_models": True}
    run_recipe("ablation.py", experiment(seeds=2, **adapter), monkeypatch)
    result = result_of(tmp_path)
    assert set(result["trainings"]) == {"paper-0", "paper-1", "longest-0", "longest-1"}
    losses = {training["loss_last"] for training in result["trainings"].values()}
    assert len(losses) == 4  # another seed is another training
    each = result["judges"]["teacher"]["longest"]
    assert each["win"] + each["tie"] + each["lose"] == 2 * len(QUESTIONS)
    assert (tmp_path / "run" / "models" / "paper-0" / "adapter_model.safetensors").exists()
    out = capsys.readouterr().out
    assert "2 of each set" in out and "win rates further than" in out and "One seed" not in out


@pytest.mark.slow
def test_coherence_that_is_missing_is_added_once_by_a_sentence_encoder(
    experiment, candidates, encoder, tmp_path, monkeypatch, capsys
):
    from hf_reflect.scoring.coherence import coherence_of, load_encoder

    table = datasets.load_from_disk(candidates).remove_columns("coherence")
    table.save_to_disk(tmp_path / "bare")
    sets = {"paper": {"keep": None}, "coherence": {"rule": "coherence", "keep": None}}
    changes = {"candidates": str(tmp_path / "bare"), "sets": sets, "judges": []}
    with pytest.raises(
        ReflectError, match="has no column `coherence`, which coherence compares: set `coherence_model`"
    ):
        run_recipe("ablation.py", experiment(**changes), monkeypatch)
    changes["coherence_model"] = str(encoder / "sbert")
    run_recipe("ablation.py", experiment(**changes, estimate_only=True), monkeypatch)
    assert "rows are known with the coherence: coherence." in capsys.readouterr().out
    run_recipe("ablation.py", experiment(**changes), monkeypatch)
    assert (tmp_path / "run" / "answers" / "coherence-0.jsonl").exists()
    made = datasets.load_from_disk(tmp_path / "run" / "candidates")
    assert made["coherence"][:] == pytest.approx(
        coherence_of(load_encoder(str(encoder / "sbert"), "cpu"), list(table))
    )
    (encoder / "sbert").rename(encoder / "gone")
    run_recipe("ablation.py", experiment(**changes), monkeypatch)  # not embedded again
    (encoder / "gone").rename(encoder / "sbert")


@pytest.mark.slow
def test_a_killed_experiment_goes_on_with_what_is_missing(experiment, tmp_path, monkeypatch, capsys):
    path, first = experiment(), tmp_path / "run" / "answers" / "paper-0.jsonl"
    line = command("recipes/ablation.py", "--config", path)
    _, code = kill_when(first.exists, line, env=environment(), stdout=subprocess.DEVNULL)
    assert code == -9
    before = first.stat().st_mtime_ns
    run_recipe("ablation.py", path, monkeypatch)
    out = capsys.readouterr().out
    assert first.stat().st_mtime_ns == before and "paper-0:" not in out and "longest-0:" in out
    for changes, words in (
        ({"learning_rate": 0.1}, "`training.learning_rate` was 0.003 and is now 0.1"),
        ({"optim": "sgd"}, "`training.optim` was"),
        ({"use_peft": True}, "`model.use_peft` was False and is now True"),
        ({"max_new_tokens": 5}, "`max_new_tokens` was 4 and is now 5"),
    ):
        with pytest.raises(SettingsError, match=words):
            run_recipe("ablation.py", experiment(**changes), monkeypatch)
    # what another judge said earlier stays beside the table, until the answers are others
    result = result_of(tmp_path)
    result["judges"]["earlier"] = result["judges"]["teacher"]
    (tmp_path / "run" / "ablation.json").write_text(json.dumps(result))
    run_recipe("ablation.py", experiment(), monkeypatch)
    assert set(result_of(tmp_path)["judges"]) == {"teacher", "earlier"}
    run_recipe("ablation.py", experiment(learning_rate=0.1, overwrite=True), monkeypatch)
    assert set(result_of(tmp_path)["judges"]) == {"teacher"}


@pytest.mark.slow
def test_what_an_experiment_takes_is_said_before_anything_is_done(experiment, served, tmp_path, monkeypatch, capsys):
    prices = {"price_per_million_input": 2.0, "price_per_million_output": 1000.0}
    run_recipe("ablation.py", experiment(estimate_only=True, seeds=3, judges="teacher", **prices), monkeypatch)
    out = capsys.readouterr().out
    assert "tokens asked, 9,000 answered" in out and "  cost       9.0" in out
    assert "trainings  6, 3 of each set" in out and "judging    18 calls at most (teacher)" in out
    assert "can tell   win rates further than" in out
    assert not served.requests and not (tmp_path / "run" / "models").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sets": {"paper": {"rule": "papr"}}}, "The rule 'papr' is unknown"),
        ({"sets": {"paper": {}, "few": {"share": 0, "by": "ifd"}}}, "A share of the rows is above 0"),
        ({"sets": {"paper": {}, "few": {"share": 1.5}}}, "A share of the rows is above 0 and at most 1, not 1.5"),
        ({"sets": {"paper": {}, "few": {"by": "ifd"}}}, "says by what, but not how many"),
        ({"sets": {"paper": {}, "few": {"like": "many"}}}, "is like 'many', which is no other set"),
        ({"sets": {"longest": {"rule": "longest"}}}, "`reference: paper` is none of the sets"),
        ({"sets": {"paper": {"gate": 1}}}, "has the setting 'gate'"),
        ({"sets": {"paper": {"ifd_gate": 0.0001}}}, "The training set 'paper': The rule 'paper' .* keeps none of 8"),
        ({"sets": {"paper": {}, 1: {"rule": "longest"}}}, "The set 1 needs a text as its name"),
        ({"sets": {"paper": {}, "few": {"count": 0, "by": "ifd"}}}, "`count` of the set 'few' is a number of rows"),
        (
            {"sets": {"paper": {"keep": None}, "few": {"count": 900, "keep": None}}},
            "The training set 'few': `select_top`",
        ),
        ({"seeds": 0}, "`seeds` is a whole number"),
        ({"seeds": 2.5}, "`seeds` is a whole number|`seeds`|do not fit"),
        ({"answer_batch_size": 0}, "`answer_batch_size` is a whole number"),
        ({"test_sets": None}, "Name what is asked"),
        ({"candidates": "nowhere/table"}, "cannot be loaded"),
    ],
    ids=str,
)
def test_an_experiment_that_cannot_work_is_refused_at_once(experiment, changes, words, monkeypatch):
    with pytest.raises(ReflectError, match=words):
        run_recipe("ablation.py", experiment(**changes), monkeypatch)


@pytest.mark.slow
def test_a_judge_of_no_use_is_found_before_anything_is_trained(experiment, served, tmp_path, monkeypatch):
    with pytest.raises(ReflectError, match="The model `nobody` does not exist"):
        run_recipe("ablation.py", experiment(judges=["nobody"]), monkeypatch)
    served.answer = lambda request: "Both are fine."
    with pytest.raises(
        ReflectError, match=r"(?s)1 of 1 reviews .* hold no two scores .*kept in .*ledger.sqlite and not"
    ):
        run_recipe("ablation.py", experiment(output_dir=str(tmp_path / "other")), monkeypatch)
    assert not list(tmp_path.glob("*/models"))


@pytest.mark.slow
def test_an_experiment_whose_limit_is_reached_says_so_and_goes_on_when_it_is_raised(
    experiment, served, tmp_path, monkeypatch
):
    with pytest.raises(BudgetExceeded, match="was not asked about 2 of 3 questions, for a limit"):
        run_recipe("ablation.py", experiment(max_requests=3, max_concurrency=1), monkeypatch)
    assert not (tmp_path / "run" / "ablation.json").exists()
    run_recipe("ablation.py", experiment(max_requests=30), monkeypatch)
    assert len(served.requests) == 1 + 6 and "teacher" in result_of(tmp_path)["judges"]


@pytest.mark.slow
def test_another_judge_is_added_and_another_experiment_refused(experiment, served, tmp_path, monkeypatch):
    served.models = ("teacher", "second")
    run_recipe("ablation.py", experiment(), monkeypatch)
    run_recipe("ablation.py", experiment(judges=["second"]), monkeypatch)
    assert set(result_of(tmp_path)["judges"]) == {"teacher", "second"}
    assert (tmp_path / "run" / "ablation.md").read_text().count("Judged by") == 2
    with pytest.raises(SettingsError, match="`seeds` was"):
        run_recipe("ablation.py", experiment(seeds=2), monkeypatch)
    (tmp_path / "recycled" / "selected").mkdir(parents=True)
    with pytest.raises(SettingsError, match="is the folder of a recycling run"):
        run_recipe("ablation.py", experiment(output_dir=str(tmp_path / "recycled")), monkeypatch)


@pytest.mark.slow
def test_judge_compares_two_files(served, student, tmp_path, monkeypatch, capsys):
    for who in ("ours", "theirs"):
        rows = [row | {"question_id": str(n), "answer": f"{who} {n}"} for n, row in enumerate(QUESTIONS)]
        write_answers(tmp_path / f"{who}.jsonl", rows)
    changes = {who: str(tmp_path / f"{who}.jsonl") for who in ("ours", "theirs")}
    changes |= {"output_dir": str(tmp_path / "run"), "judges": ["teacher"], "base_url": served.url}
    run_recipe("judge.py", adapted("judge.yaml", tmp_path, student, served, **changes), monkeypatch)
    rates = json.loads((tmp_path / "run" / "win_rates.json").read_text())["judges"]["teacher"]
    assert rates["pooled"]["win"] + rates["pooled"]["tie"] + rates["pooled"]["lose"] == 3
    assert set(rates["category"]) == {"even", "odd"} and "| all " in capsys.readouterr().out
    assert len((tmp_path / "run" / "judged-teacher.jsonl").read_text().splitlines()) == 3
    swapped = {"ours": changes["theirs"], "theirs": changes["ours"]}
    with pytest.raises(SettingsError, match="win_rates.json was made otherwise: `ours.answers` was"):
        run_recipe("judge.py", adapted("judge.yaml", tmp_path, student, served, **changes | swapped), monkeypatch)
    few = {"output_dir": str(tmp_path / "few"), "max_requests": 3, "max_concurrency": 1}
    with pytest.raises(BudgetExceeded, match="was not asked about 2 of 3 questions"):
        run_recipe("judge.py", adapted("judge.yaml", tmp_path, student, served, **changes | few), monkeypatch)
    assert not (tmp_path / "few" / "win_rates.json").exists()

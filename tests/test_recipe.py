import gc
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import datasets
import pytest
import yaml
from conftest import ROOT, ROWS, load_recipe
from endpoint import Endpoint, rewriting
from filelock import FileLock
from launching import command, kill_when, on_cpu

import hf_reflect
from hf_reflect.arguments import DataArguments, SelectionArguments, TeacherArguments, parse_arguments
from hf_reflect.errors import SettingsError
from hf_reflect.launch import main_of

RECIPE = "recipes/srecycle_wizardlm.py"


def start(*arguments, processes=1, cwd=ROOT, accelerate=ROOT / "accelerate_configs" / "cpu.yaml"):
    """The recipe in processes of its own, as people start it."""
    line = command(RECIPE, *arguments, config=accelerate if processes > 1 else None)
    without_key = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    return subprocess.Popen(line, cwd=cwd, env=without_key, stdout=PIPE, stderr=PIPE, text=True)


def run(*arguments, timeout=420, **launch):
    with start(*arguments, **launch) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def said(done):
    """What the recipe itself said: the last paragraph, after progress bars and other libraries' warnings."""
    assert done.returncode != 0 and "Traceback" not in done.stderr
    return done.stderr.strip().rsplit("\n\n", 1)[-1].splitlines()


@pytest.fixture
def here(monkeypatch, capfd):
    """As `run` on one process, in the test's own."""

    def recipe(*arguments):
        module = load_recipe(monkeypatch, "srecycle_wizardlm")
        monkeypatch.setattr(sys, "argv", [RECIPE, *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main_of(module.main)
        except SystemExit as ended:
            code = ended.code
        gc.collect()  # after an error its folder is free for other processes
        return subprocess.CompletedProcess(sys.argv, code, *capfd.readouterr())

    return recipe


@pytest.fixture
def refused(here):
    return lambda *arguments: said(here(*arguments))


@pytest.fixture(scope="module")
def student(student_folder):
    return student_folder


@pytest.fixture
def settings(tmp_path, student, endpoint):
    """`settings(**changes)` writes a configuration that runs and returns its path."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def write(**changes):
        base = {
            "dataset": str(data),
            "output_dir": str(tmp_path / "run"),
            "teacher_model": "teacher",
            "base_url": endpoint.url,
            "model_name_or_path": str(student),
            "ifd_gate": None,
            "r_ifd_gate": None,
            "keep": None,
            "max_length": 256,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "report": False,
            "bf16": False,
            "disable_tqdm": True,
        }
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in (base | changes).items() if value != "absent"}))
        return path

    return write


def summary(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


def losses(folder):
    history = json.loads((Path(folder) / "model" / "trainer_state.json").read_text())["log_history"]
    return [(entry["loss"], entry["learning_rate"]) for entry in history if "loss" in entry]


@pytest.mark.slow
def test_the_quickstart_runs_again_without_asking_and_in_either_order_on_two_processes(tmp_path):
    def quickstart(name, *arguments):
        arguments = ("--config", ROOT / "recipes" / "quickstart.yaml", "--output_dir", tmp_path / name, *arguments)
        done = run(*arguments, processes=2, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-9000:]
        result = summary(tmp_path / name)
        inside = [result["training"][name] for name in ("processes", "backend", "model_class")]
        assert inside == [2, "gloo", "DistributedDataParallel"]
        return done.stdout, result, result["calls"]["asked"], result["calls"]["reused"]

    output, first, *calls = quickstart("all")
    assert first["candidates"]["rows"] >= 40 and first["candidates"]["versions"] == 4 * first["candidates"]["rows"]
    assert {"refused", "truncated"} <= set(first["candidates"]["unusable"])
    assert calls == [0, 141] and calls[1] > 2.5 * first["candidates"]["rows"]
    assert first["training"]["loss_last"] < 0.9 * first["training"]["loss_first"]
    for words in (
        "source rows",
        "unusable, by error",
        "teacher calls",
        "student chose",
        "training loss",
        "mean nothing",
    ):
        assert output.count(words) == 1
    assert not (tmp_path / "all" / ".work").exists()
    assert hf_reflect.verify(str(tmp_path / "all")) == []
    pictures = [sys.executable, ROOT / "tests" / "pictures.py", tmp_path / "all", tmp_path / "pictures"]
    assert subprocess.run(pictures, capture_output=True, timeout=120).returncode == 0
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"report.png", "reader.png", "card.png"}

    few_steps = ("--max_steps", "3", "--logging_steps", "1")
    output, again, asked, _ = quickstart("all", *few_steps)
    assert asked == 0 and "the candidates are reused" in output
    assert again["hash"] == first["hash"] and again["selected"]["keys"] == first["selected"]["keys"]
    assert again["training"]["loss_first"] == first["training"]["loss_first"]

    shutil.copytree(tmp_path / "all" / "student", tmp_path / "selective" / "student")
    _, selective, *calls = quickstart("selective", "--reflect", "selective", *few_steps)
    assert calls == [0, 96]
    assert selective["selected"]["keys"] == first["selected"]["keys"]
    assert losses(tmp_path / "selective") == losses(tmp_path / "all")
    one, other = (datasets.load_from_disk(tmp_path / name / "selected") for name in ("all", "selective"))
    assert one["input_ids"][:] == other["input_ids"][:]


@pytest.mark.slow
def test_real_rows_go_the_whole_way_on_two_processes(reference, settings, endpoint, tmp_path):
    config = settings(
        dataset=str(reference / "reference" / "alpaca_sample.json"),
        model_name_or_path=str(reference / "models" / "tiny-student"),
        max_length=512,
        max_steps=3,
        max_rows=100,
        price_per_million_input=2.0,
        price_per_million_output=8.0,
        report=True,
    )
    done = run("--config", config, processes=2)
    assert done.returncode == 0, done.stderr[-9000:]
    result = summary(tmp_path / "run")
    assert len(endpoint.requests) == 300 and result["calls"]["asked"] == 300
    assert result["training"]["processes"] == 2 and result["training"]["model_class"] == "DistributedDataParallel"
    candidates = datasets.load_from_disk(tmp_path / "run" / "candidates")
    assert len(candidates) == 400 and len(set(candidates["row_id"])) == 100
    unusable = sum(result["candidates"]["unusable"].values())
    usable = [row for row in candidates if row["instruction"] is not None and row["response"] is not None]
    assert len(usable) + unusable == 400
    assert all(row["ifd"] is not None and row["r_ifd"] is not None for row in usable)
    selected = datasets.load_from_disk(tmp_path / "run" / "selected")
    assert len(selected) == result["selected"]["rows"] == 100

    # what it leaves to look at
    taken = json.loads((reference / "reference" / "alpaca_sample.json").read_text())
    assert result["source"] == {"rows": len(taken), "not_taken": len(taken) - 100, "invalid": 0}
    assert (tmp_path / "run" / "report.html").exists() and f"{tmp_path / 'run' / 'report.html'}" in done.stdout
    assert hf_reflect.verify(str(tmp_path / "run")) == []
    written = json.loads((tmp_path / "run" / "statistics.json").read_text())
    assert written == hf_reflect.statistics(candidates, selected, tmp_path / "run" / "model", costs=result["costs"])
    costs, (prompt, completion) = result["costs"], map(sum, zip(*endpoint.usage, strict=True))
    of_teacher = {name: costs["instruction"][name] + costs["response"][name] for name in costs["response"]}
    money = (2.0 * prompt + 8.0 * completion) / 1e6
    expected = {"replies": 300, "prompt_tokens": prompt, "completion_tokens": completion, "cost": pytest.approx(money)}
    assert of_teacher == expected and costs["instruction"]["replies"] == 100
    assert costs["scoring"]["seconds"] > 0 and costs["training"]["steps"] == 3
    log = json.loads((tmp_path / "run" / "model" / "trainer_state.json").read_text())["log_history"]
    (told,) = (entry for entry in log if "teacher/cost" in entry)
    assert told["step"] == 0 and {name: told[f"teacher/{name}"] for name in expected} == expected
    card = (tmp_path / "run" / "model" / "README.md").read_text().replace("\\", "")
    assert all(words in card for words in ("tiny-student", "alpaca_sample.json", "settings.yaml", "rule | paper"))

    # training alone, in another launch: nothing is asked, and all of it is known
    assert run("--config", config, "--stage", "train").returncode == 0
    again = summary(tmp_path / "run")
    assert len(endpoint.requests) == 300 and again["source"] == result["source"]
    assert again["costs"] | {"training": costs["training"]} == costs
    log = json.loads((tmp_path / "run" / "model" / "trainer_state.json").read_text())["log_history"]
    (told,) = (entry for entry in log if "teacher/cost" in entry)
    assert {name: told[f"teacher/{name}"] for name in expected} == expected
    (told,) = (entry for entry in log if "selection/rows" in entry)
    assert told["selection/kept"] == 100


@pytest.mark.slow
def test_the_run_trains_as_a_trainer_that_was_given_selected(settings, student, tmp_path):
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    config = settings(learning_rate=1e-3, lr_scheduler_type="cosine")
    assert run("--config", config).returncode == 0
    arguments = SFTConfig(
        output_dir=str(tmp_path / "other"),
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        num_train_epochs=2,
        per_device_train_batch_size=2,
        max_length=256,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
    )
    trainer = SFTTrainer(
        str(student),
        args=arguments,
        train_dataset=datasets.load_from_disk(tmp_path / "run" / "selected"),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    trainer.train()
    given = [(entry["loss"], entry["learning_rate"]) for entry in trainer.state.log_history if "loss" in entry]
    assert len(given) == 8 and losses(tmp_path / "run") == given


@pytest.mark.slow
def test_stages_one_by_one_end_where_one_run_does(settings, here, refused, endpoint, tmp_path):
    assert here("--config", settings()).returncode == 0
    apart = str(tmp_path / "apart")
    for stage in ("recycle", "select", "train"):
        config = settings(output_dir=apart, stage=stage, ledger=str(tmp_path / "run" / "ledger.sqlite"))
        done = run("--config", config, processes=2 if stage == "select" else 1)
        assert done.returncode == 0, done.stderr[-9000:]
    assert len(endpoint.requests) == 24
    assert losses(apart) == losses(tmp_path / "run")
    assert summary(apart)["selected"]["keys"] == summary(tmp_path / "run")["selected"]["keys"]

    other = str(tmp_path / "other")
    done = here(
        "--config", settings(output_dir=other, candidates=f"{apart}/candidates", stage="select", dataset="absent")
    )
    assert done.returncode == 0, done.stderr[-9000:]
    assert summary(other)["selected"]["keys"] == summary(apart)["selected"]["keys"]
    lines = refused("--config", settings(candidates=f"{other}/candidates", stage="select"))
    assert "`data.dataset` was" in lines[0]
    assert here("--config", settings(output_dir=apart)).returncode == 0
    assert len(endpoint.requests) == 24 and set(summary(apart)["settings"]) == {
        "data",
        "teacher",
        "student",
        "selection",
    }


@pytest.mark.slow
@pytest.mark.parametrize("reflect", ["all", "selective"])
def test_only_the_rows_that_the_student_finds_hardest_are_recycled(settings, endpoint, student, tmp_path, reflect):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_reflect import StudentScorer, to_pairs

    config = settings(preselect_share=0.375, reflect=reflect)  # 3 of 8
    done = run("--config", config, processes=2)
    assert done.returncode == 0, done.stderr[-9000:]
    assert len(endpoint.requests) == 3 * (3 if reflect == "all" else 2)
    pairs = to_pairs(datasets.Dataset.from_list(ROWS))
    model, tokenizer = (kind.from_pretrained(student) for kind in (AutoModelForCausalLM, AutoTokenizer))
    scored = StudentScorer(model, tokenizer, "vicuna", 256).score(pairs)
    hardest = sorted(zip(scored["ifd"], scored["row_id"], strict=True))[-3:]
    selected = datasets.load_from_disk(tmp_path / "run" / "selected")
    assert set(selected["row_id"]) == {row_id for _, row_id in hardest}
    assert run("--config", config, processes=2).returncode == 0
    assert len(endpoint.requests) == 3 * (3 if reflect == "all" else 2)  # nothing anew


@pytest.mark.slow
def test_preselecting_does_not_replace_what_was_made_from_all_rows(settings, here, refused, endpoint, tmp_path):
    assert here("--config", settings(stage="recycle")).returncode == 0
    before = datasets.load_from_disk(tmp_path / "run" / "candidates")
    lines = refused("--config", settings(stage="recycle", preselect_share=0.5))
    assert "holds the results of another run, without `preselect_share`" in lines[0]
    assert len(datasets.load_from_disk(tmp_path / "run" / "candidates")) == len(before) == 32
    done = here("--config", settings(stage="recycle", preselect_share=0.5), "--overwrite", "true")
    assert done.returncode == 0 and len(endpoint.requests) == 24
    assert len(datasets.load_from_disk(tmp_path / "run" / "candidates")) == 16


@pytest.mark.slow
def test_rows_preselected_without_a_score_need_no_student(settings, here, refused, endpoint, tmp_path):
    config = settings(preselect_share=0.25, preselect_by="longest", stage="recycle", model_name_or_path="absent")
    done = here("--config", config)
    assert done.returncode == 0, done.stderr[-9000:]
    assert len(endpoint.requests) == 6 and "Of 8 rows 2 are recycled, the first by longest." in done.stdout
    lines = refused("--config", settings(preselect_share=0.5, preselect_by="longest", stage="recycle"))
    assert "`data.preselect_share` was 0.25 and is now 0.5" in lines[0]
    table = datasets.load_from_disk(tmp_path / "run" / "candidates")
    longest = sorted((row["output"] for row in ROWS), key=len)[-2:]
    assert {row["response"] for row in table if row["variant"] == "original"} == set(longest)


@pytest.mark.slow
def test_an_estimate_asks_nothing(settings, here, endpoint):
    config = settings(price_per_million_input=1.0, price_per_million_output=2.0)
    done = here("--config", config, "--estimate_only", "true")
    assert done.returncode == 0, done.stderr[-9000:]
    assert "24 to ask, 0 in the ledger" in done.stdout and re.search(r"cost\s+0\.\d\d", done.stdout)
    assert endpoint.requests == []


@pytest.mark.slow
def test_other_settings_are_refused_with_the_first_difference_unless_overwriting(
    settings, here, refused, endpoint, tmp_path
):
    assert here("--config", settings(max_steps=1)).returncode == 0
    before = summary(tmp_path / "run")
    lines = refused("--config", settings(stage="select", rule="longest"))
    assert len(lines) <= 3 and "`selection.rule` was 'paper' and is now 'longest'" in lines[0]
    lines = refused("--config", settings(temperature=0.5))
    assert "`teacher.temperature` was 0.0 and is now 0.5" in lines[0] and "--overwrite true" in lines[1]
    assert summary(tmp_path / "run") == before and len(endpoint.requests) == 24
    done = here("--config", settings(stage="select", rule="longest"), "--overwrite", "true")
    assert done.returncode == 0, done.stderr[-9000:]
    assert summary(tmp_path / "run")["settings"]["selection"]["rule"] == "longest" and len(endpoint.requests) == 24


@pytest.mark.slow
def test_an_endpoint_that_comes_back_is_asked_for_the_rest(settings, here, tmp_path):
    with Endpoint() as gone:
        port = gone.port
    config = settings(base_url=f"http://127.0.0.1:{port}/v1", stage="recycle", max_concurrency=2)
    lines = said(here("--config", config))
    assert len(lines) <= 3 and "cannot be reached" in lines[0]
    down = {"status": 400, "body": {"error": {"message": "this one fails for now"}}}
    with Endpoint(lambda request: down if "synonym" in str(request) else rewriting(request), port=port) as flaky:
        assert here("--config", config).returncode == 0
        first = len(flaky.requests)
    assert summary(tmp_path / "run")["candidates"]["unusable"] == {"teacher": 2, "parent": 1}
    with Endpoint(port=port) as back:
        assert here("--config", config).returncode == 0
        assert (first, len(back.requests)) == (
            23,
            3,
        )  # two calls of the one row, then the answer to its new instruction
    assert summary(tmp_path / "run")["candidates"]["unusable"] == {}


def test_a_public_push_without_licence_and_terms_is_refused_before_a_teacher_is_paid(settings, refused, endpoint):
    lines = refused("--config", settings(push_dataset_to="me/recycled", push_public=True, license="mit"))
    assert "A public push needs `teacher_terms`" in lines[0] and not endpoint.requests


def test_without_a_key_two_lines_say_what_to_do(tmp_path):
    lines = said(run(cwd=tmp_path))
    assert len(lines) == 2
    assert "export OPENAI_API_KEY" in lines[0] and "quickstart.yaml" in lines[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"teacher_model": "gpt-typo"}, "The model `gpt-typo` does not exist", id="model"),
        pytest.param({"dataset": "no/such/file.jsonl"}, "'no/such/file.jsonl' does not exist", id="path"),
        pytest.param({}, "found the columns", id="columns"),
        pytest.param({"ifd_gate": 0.0001}, "keeps none of 8 rows", id="empty selection"),
        pytest.param({"lerning_rate": 1e-3}, "Did you mean `learning_rate`?", id="misspelt key"),
        pytest.param({"model_name_or_path": "./no-student"}, "'./no-student' cannot be loaded", id="student"),
    ],
)
def test_what_a_user_can_mend_is_said_in_three_lines(settings, here, changes, words, tmp_path):
    if "columns" in words:
        changes = {"dataset": str(tmp_path / "strange.csv")}
        (tmp_path / "strange.csv").write_text("question,answer\nWhy?,Because.\n")
    lines = said(here("--config", settings(**changes)))
    assert 1 <= len(lines) <= 3
    assert words in "\n".join(lines)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rule": "papr"}, "The rule 'papr' is unknown"),
        ({"schedule": "daily"}, '`schedule` is "once" or "epoch"'),
        ({"stage": "recycel"}, "`stage` is all, recycle, select or train"),
        ({"reflect": "some"}, "`reflect` is all or selective"),
        ({"preselect_share": 0}, "A share of the rows is above 0 and at most 1, not 0"),
        ({"preselect_share": 1.01}, "A share of the rows is above 0 and at most 1, not 1.01"),
        ({"preselect_share": 0.1, "preselect_by": "size"}, "`select_top(by='size')` is unknown"),
        ({"preselect_share": 0.1, "candidates": "x"}, "so there is nothing to preselect"),
        ({"published": "alpaca-70b"}, "`published` is one of alpaca-7b"),
        ({"published": {"text": "x"}}, "`published` is one of alpaca-7b"),
        ({"published": "alpaca-7b", "stage": "recycle"}, "`published` are candidates that nobody recycles"),
        ({"published": "alpaca-7b", "reflect": "selective"}, "`published` are candidates that nobody recycles"),
        ({"published": {"texts": "x", "scores": None}}, "`published` is one of alpaca-7b"),
        ({"preselect_share": 0.1, "preselect_by": "coherence"}, "`preselect_by: coherence` cannot be"),
    ],
    ids=str,
)
def test_values_that_no_argument_takes_are_named(settings, changes, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(settings(**changes))])
    with pytest.raises(SettingsError, match=re.escape(words)):
        parse_arguments(every_type(), "recipe.py")


def test_null_on_the_command_line_is_no_text(settings, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(settings()), "--keep", "null", "--dataset", "null"])
    data, _, chosen_by, *_ = parse_arguments(every_type(), "recipe.py")
    assert chosen_by.keep is None and data.dataset is None


@pytest.mark.slow
def test_of_two_processes_one_speaks(settings):
    done = run("--config", settings(teacher_model="gpt-typo"), processes=2)
    assert done.returncode != 0
    assert done.stderr.count("The model `gpt-typo` does not exist") == 1


@pytest.mark.slow
def test_a_folder_that_is_no_runs_is_left_alone(settings, refused, tmp_path):
    (tmp_path / "run" / "candidates").mkdir(parents=True)
    (tmp_path / "run" / "candidates" / "mine.txt").write_text("precious")
    lines = refused("--config", settings())
    assert "holds the results of another run" in lines[0]
    assert (tmp_path / "run" / "candidates" / "mine.txt").read_text() == "precious"


@pytest.mark.slow
def test_one_run_at_a_time_uses_a_folder(settings, tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        lines = said(run("--config", settings()))
    assert "Another run is using" in lines[0] and len(lines) == 1


@pytest.mark.slow
def test_mappings_fit_on_the_command_line(settings, here, refused, endpoint, tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"ask": "Why?", "say": "Because.", "source": "x"}) + "\n")
    names = "{ask: instruction, say: output, source: origin}"
    done = here("--config", settings(stage="recycle"), "--rename_columns", names, "--extra_body", '{"seed": 7}')
    assert done.returncode == 0, done.stderr[-9000:]
    assert all(request["seed"] == 7 for request in endpoint.requests)
    assert datasets.load_from_disk(tmp_path / "run" / "candidates")["origin"][:] == ["x"] * 4
    for names, words in (("{asks: x}", "'asks'"), ("ask", "is a mapping")):
        assert words in refused("--config", settings(stage="recycle"), "--rename_columns", names)[0]


@pytest.mark.slow
def test_versions_are_chosen_every_epoch_also_after_a_crash_and_in_a_second_run(settings, tmp_path):
    changing = {"schedule": "epoch", "learning_rate": 5e-2, "num_train_epochs": 3, "save_strategy": "steps"}
    changing |= {"save_steps": 2}
    done = run("--config", settings(**changing))
    assert done.returncode == 0, done.stderr[-9000:]
    assert done.stdout.count("The student chose") == 3 and not (tmp_path / "run" / "scores").exists()
    whole = losses(tmp_path / "run")
    chosen = json.loads((tmp_path / "run" / "model" / "selection.json").read_text())
    assert chosen["first"] != chosen["rows"]
    checkpoint = tmp_path / "run" / "model" / "checkpoint-6"  # in the middle of the second epoch
    resumed = run("--config", settings(**changing), "--resume_from_checkpoint", checkpoint)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert losses(tmp_path / "run") == whole


CONFIGURATIONS = {  # as seen from inside on a CPU, where accelerate lets FSDP become DDP
    "cpu": ("MULTI_CPU", "DistributedDataParallel"),
    "ddp": ("MULTI_CPU", "DistributedDataParallel"),
    "zero1": ("DEEPSPEED", "DeepSpeedEngine"),
    "zero2": ("DEEPSPEED", "DeepSpeedEngine"),
    "zero3": ("DEEPSPEED", "DeepSpeedEngine"),
    "zero3_offload": ("DEEPSPEED", "DeepSpeedEngine"),
    "fsdp": ("MULTI_CPU", "DistributedDataParallel"),
    "multi_node": ("DEEPSPEED", "DeepSpeedEngine"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")))
def test_the_recipe_runs_with_every_accelerate_configuration(name, settings, tmp_path):
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": 2}
    nodes = config["num_machines"]
    if nodes > 1:
        config |= {"main_process_ip": "127.0.0.1", "main_process_port": free_port()}
    arguments = ("--config", settings(max_steps=2))
    launches = []
    for rank in range(nodes):
        path = tmp_path / f"node{rank}.yaml"
        path.write_text(yaml.safe_dump(config | {"machine_rank": rank}))
        launches.append(start(*arguments, processes=2, accelerate=path))
    for launched in launches:
        _, said = launched.communicate(timeout=600)
        assert launched.returncode == 0, said[-3000:]
    training = summary(tmp_path / "run")["training"]
    inside = training["processes"], training["distributed_type"], training["model_class"]
    assert inside == (2, *CONFIGURATIONS[name]) and training["steps"] == 2
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def keys(folder):
    table = datasets.load_from_disk(folder)
    return sorted(zip(table["row_id"], table["variant"], strict=True))


def winners_among_all(student, endpoint, ledger):
    """What the student chooses when everything is reflected on: computed here, with the replies of a run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_reflect import ReflectionTransform, StudentScorer, Teacher, select, to_pairs

    teacher = Teacher("teacher", base_url=endpoint.url, ledger=str(ledger))
    table = to_pairs(datasets.Dataset.from_list(ROWS))
    for part in ("instruction", "response"):
        table = table.map(ReflectionTransform(teacher, part), batched=True, load_from_cache_file=False)
    assert len(table) == 32 and None not in table["response"][:]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    scored = StudentScorer(model, tokenizer, template="vicuna", max_length=256).score(table)
    chosen = select(scored, ifd_gate=None, r_ifd_gate=None, keep=None)
    return sorted(zip(chosen["row_id"], chosen["variant"], strict=True))


@pytest.mark.slow
def test_asking_for_what_the_student_chose_takes_two_calls_a_row(settings, student, endpoint, tmp_path):
    done = run("--config", settings(reflect="selective", max_steps=1))
    assert done.returncode == 0, done.stderr[-9000:]
    result = summary(tmp_path / "run")
    assert len(endpoint.requests) == 16 == result["calls"]["asked"]
    assert result["settings"]["reflect"]["rule"] == "paper" and result["selected"]["rows"] == 8
    candidates = datasets.load_from_disk(tmp_path / "run" / "candidates")
    assert len(candidates) == 24 and None not in candidates["ifd"][:]  # those that lost the first duel keep theirs
    answered = [variant for variant in candidates["variant"] if "response" in variant]
    assert len(answered) == 8 and len(set(answered)) == 2  # some of each, else nothing is compared here
    children = {"original": "response", "instruction": "instruction+response"}
    below = list(zip(candidates["row_id"], candidates["variant"], strict=True))
    for (row_id, variant), parent in zip(below[1:], below, strict=False):
        assert "response" not in variant or (row_id, variant) == (parent[0], children[parent[1]])

    whole = winners_among_all(student, endpoint, tmp_path / "run" / "ledger.sqlite")
    assert len(endpoint.requests) == 24  # the losing branches, too
    assert keys(tmp_path / "run" / "selected") == whole


@pytest.mark.slow
def test_selective_stages_one_by_one_end_where_one_run_does(settings, endpoint, tmp_path):
    # an adapter starts at random: its losses show whether the choice before left a trace
    ours = {"reflect": "selective", "ledger": str(tmp_path / "ledger.sqlite"), "use_peft": True, "learning_rate": 1e-2}
    assert run("--config", settings(**ours)).returncode == 0
    apart = str(tmp_path / "apart")
    for stage in ("recycle", "select", "train"):
        config = settings(**ours, output_dir=apart, stage=stage)
        done = run("--config", config, processes=1 if stage == "train" else 2)
        assert done.returncode == 0, done.stderr[-9000:]
    assert len(endpoint.requests) == 16
    assert losses(apart) == losses(tmp_path / "run")
    assert keys(f"{apart}/selected") == keys(tmp_path / "run" / "selected")
    again = run("--config", config, "--stage", "all")
    assert again.returncode == 0 and "the candidates are reused" in again.stdout
    assert len(endpoint.requests) == 16


@pytest.mark.slow
def test_selective_candidates_are_for_one_student_and_rule(settings, here, refused, endpoint, tmp_path):
    ours = {"reflect": "selective", "max_steps": 1}
    assert here("--config", settings(**ours)).returncode == 0
    before = summary(tmp_path / "run")
    for changes, words in (
        ({"rule": "r_ifd"}, "`reflect.rule` was 'paper' and is now 'r_ifd'"),
        ({"rule": "r_ifd", "stage": "select", "overwrite": True}, "`reflect.rule` was 'paper' and is now 'r_ifd'"),
        ({"max_length": 128}, "`reflect.max_length` was 256 and is now 128"),
        ({"reflect": "all"}, "`reflect` was 'selective' and is now 'all'"),
        ({"reflect": "all", "stage": "select"}, "`reflect` was 'selective' and is now 'all'"),
        ({"candidates": f"{tmp_path}/other/candidates"}, "nothing is asked"),
        ({"rule": "longest"}, "`reflect: all`"),
    ):
        lines = refused("--config", settings(**ours | changes))
        assert len(lines) <= 3 and words in lines[0]
    assert summary(tmp_path / "run") == before and len(endpoint.requests) == 16
    done = here("--config", settings(**ours, rule="r_ifd"), "--overwrite", "true")
    assert done.returncode == 0, done.stderr[-9000:]
    assert summary(tmp_path / "run")["settings"]["reflect"]["rule"] == "r_ifd"
    assert 16 < len(endpoint.requests) < 24  # new responses only where the choice is another
    done = here("--config", settings(**ours | {"reflect": "all"}), "--overwrite", "true")
    assert done.returncode == 0, done.stderr[-9000:]
    assert set(summary(tmp_path / "run")["settings"]) == {"data", "teacher", "student", "selection"}
    assert len(endpoint.requests) == 24 and not (tmp_path / "run" / "instructions").exists()


@pytest.mark.slow
def test_a_kill_between_choice_and_responses_costs_neither(settings, refused, student, endpoint, tmp_path):
    endpoint.latency = 0.5
    config = settings(reflect="selective", max_steps=1, max_concurrency=1)
    kill_when(lambda: len(endpoint.requests) >= 11, command(RECIPE, "--config", config))
    assert len(endpoint.requests) == 11 and not (tmp_path / "run" / "candidates").exists()
    made = (tmp_path / "run" / "instructions" / "made_with.json").stat().st_mtime_ns
    assert "`reflect.rule` was" in refused("--config", settings(reflect="selective", rule="ifd"))[0]

    endpoint.latency = 0.0
    done = run("--config", settings(reflect="selective", max_steps=1))
    assert done.returncode == 0, done.stderr[-9000:]
    assert 16 <= len(endpoint.requests) <= 17  # the one in flight may be asked twice
    assert (tmp_path / "run" / "instructions" / "made_with.json").stat().st_mtime_ns == made  # not scored again
    whole = winners_among_all(student, endpoint, tmp_path / "run" / "ledger.sqlite")
    assert keys(tmp_path / "run" / "selected") == whole


@pytest.mark.slow
def test_a_new_instruction_that_came_later_is_chosen_from(settings, student, endpoint, tmp_path):
    def failing(request):
        asked = str(request)
        lost = "[New Instruction]" in asked and any(word in asked for word in ("synonym", "iron or cork"))
        return {"status": 400, "body": {"error": {"message": "not now"}}} if lost else rewriting(request)

    endpoint.answer = failing
    config = settings(reflect="selective", max_steps=1)
    assert run("--config", config, processes=2).returncode == 0
    assert summary(tmp_path / "run")["candidates"]["unusable"] == {"teacher": 2} and len(endpoint.requests) == 16
    assert summary(tmp_path / "run")["selected"]["rows"] == 8

    endpoint.answer = rewriting
    done = run("--config", config, processes=2)
    assert done.returncode == 0, done.stderr[-9000:]
    assert summary(tmp_path / "run")["candidates"]["unusable"] == {}
    assert 18 <= len(endpoint.requests) <= 20  # two instructions, and the responses to them where they won
    whole = winners_among_all(student, endpoint, tmp_path / "run" / "ledger.sqlite")
    assert keys(tmp_path / "run" / "selected") == whole


@pytest.mark.slow
def test_the_student_chooses_twice_under_zero_3(settings, student, endpoint, tmp_path):
    zero3 = on_cpu("zero3", tmp_path)
    done = run("--config", settings(reflect="selective"), processes=2, accelerate=zero3)
    assert done.returncode == 0, done.stderr[-9000:]
    training = summary(tmp_path / "run")["training"]
    inside = training["processes"], training["distributed_type"], training["model_class"]
    assert inside == (2, "DEEPSPEED", "DeepSpeedEngine")
    assert len(endpoint.requests) == 16
    ledger = tmp_path / "run" / "ledger.sqlite"
    assert keys(tmp_path / "run" / "selected") == winners_among_all(student, endpoint, ledger)

    before = losses(tmp_path / "run")  # of the second trainer in its launch; now the first and only one
    alone = settings(reflect="selective", stage="train")
    assert run("--config", alone, processes=2, accelerate=zero3).returncode == 0
    assert losses(tmp_path / "run") == before


def every_type():
    from trl import ModelConfig, SFTConfig

    return DataArguments, TeacherArguments, SelectionArguments, SFTConfig, ModelConfig


def test_the_recipe_reads_in_under_150_lines():
    assert len((ROOT / RECIPE).read_text().splitlines()) < 150

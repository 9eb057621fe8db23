"""The recipe and the Hub: what one run publishes, another chooses from."""

import json
import os
import subprocess
import sys

import datasets
import pytest
import yaml
from conftest import ROOT, ROWS
from hub import WRITER, Fault, Hub
from launching import command

RECIPE = "recipes/srecycle_wizardlm.py"
SETTINGS = {
    "teacher_model": "teacher",
    "ifd_gate": None,
    "r_ifd_gate": None,
    "keep": None,
    "max_length": 256,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "report_to": "none",
    "report": False,
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture
def recipe(endpoint, tmp_path):
    """`recipe(hub, name, **settings)` runs it in a process that knows only this Hub, and returns what it did."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(hub, name, token=WRITER, **settings):
        base = SETTINGS | {"base_url": endpoint.url, "output_dir": str(tmp_path / name)}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(base | settings))
        line = command(RECIPE, "--config", tmp_path / f"{name}.yaml")
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= hub.environment(token, HF_HOME=str(tmp_path / f"home-{token}"))
        return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.mark.slow
def test_what_one_run_publishes_another_student_chooses_from(recipe, endpoint, student_folder, tmp_path):
    mine = {"dataset": str(tmp_path / "data.jsonl"), "model_name_or_path": str(student_folder)}
    with Hub() as hub:
        published = recipe(
            hub, "mine", **mine, push_dataset_to="writer/recycled", push_to_hub=True, hub_model_id="student"
        )
        assert published.returncode == 0, published.stderr[-3000:]
        dataset, model = hub.repositories["datasets", "writer/recycled"], hub.repositories["models", "writer/student"]
        assert dataset.private and f"{hub.url}/datasets/writer/recycled/commit/{dataset.head}" in published.stdout
        provenance = json.loads(dataset.files["provenance.json"])
        assert provenance["teacher"]["model"] == "teacher" and provenance["ifd_gate"] is None
        assert provenance["student"]["model"] == student_folder.name and provenance["source_dataset"] == "data.jsonl"
        assert str(tmp_path) not in dataset.files["README.md"].decode() + json.dumps(provenance)
        assert json.loads(dataset.files["statistics.json"])["sets"]["selected"]["response_tokens"]["n"] == len(ROWS)
        card = model.files["README.md"].decode()
        assert "  - writer/recycled\n" in card or "- writer/recycled\n" in card
        assert "mine.yaml" in card and "model.safetensors" in model.files

        asked = len(endpoint.requests)
        theirs = {"candidates": "writer/recycled", "model_name_or_path": str(student_folder), "rule": "ifd"}
        chosen = recipe(hub, "theirs", **theirs, push_dataset_to="writer/chosen")
        assert chosen.returncode == 0, chosen.stderr[-3000:]
        assert len(endpoint.requests) == asked
        ours, theirs = (datasets.load_from_disk(tmp_path / name / "candidates") for name in ("mine", "theirs"))
        again = json.loads(hub.repositories["datasets", "writer/chosen"].files["provenance.json"])
        assert again["candidates_from"] == "writer/recycled" and again["candidates_revision"] == dataset.head
        assert again["rule"] == "ifd" and again["reflect"] == "all"
        for name in ("teacher", "teacher_models", "prompts", "source_dataset"):  # who made them is still said
            assert again[name] == provenance[name]
        assert provenance["teacher_models"] == ["teacher-0125"] and provenance["api_key_env"] == "OPENAI_API_KEY"
        assert ours["response"][:] == theirs["response"][:] and ours["ifd"][:] == pytest.approx(theirs["ifd"][:])


@pytest.mark.slow
def test_a_push_that_fails_costs_nothing_but_itself(recipe, student_folder, tmp_path):
    mine = {"dataset": str(tmp_path / "data.jsonl"), "model_name_or_path": str(student_folder)}
    with Hub() as hub:
        hub.faults.append(Fault("POST", r"/commit/", status=403, times=99))
        done = recipe(hub, "mine", **mine, push_dataset_to="writer/recycled")
        assert done.returncode == 1 and "Traceback" not in done.stderr and "training loss" in done.stdout
        last = done.stderr.strip().splitlines()[-1]
        assert f"`python -m hf_reflect.hub push {tmp_path / 'mine'} writer/recycled`" in last
        hub.faults.clear()
        again = [sys.executable, "-m", "hf_reflect.hub", "push", str(tmp_path / "mine"), "writer/recycled"]
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= hub.environment(WRITER, HF_HOME=str(tmp_path / "home"))
        pushed = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=120)
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.strip().endswith(hub.repositories["datasets", "writer/recycled"].head)


@pytest.mark.slow
def test_where_a_push_may_not_go_is_said_before_a_teacher_is_paid(recipe, endpoint, student_folder, tmp_path):
    mine = {"dataset": str(tmp_path / "data.jsonl"), "model_name_or_path": str(student_folder)}
    with Hub() as hub:
        done = recipe(hub, "refused", **mine, push_dataset_to="stranger/recycled")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "writer may not write to stranger/recycled" in done.stderr.strip().rsplit("\n\n", 1)[-1]
        assert not endpoint.requests and not hub.repositories

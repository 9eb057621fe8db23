import json
import os
import re
import subprocess
import sys

import datasets
import pytest
from conftest import ROOT, ROWS, TEXTS, byte_level_tokenizer, tiny_llama
from endpoint import rewriting
from hub import Hub

from hf_reflect import select

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_readme_begins_with_its_two_commands():
    commands = re.findall(r"^pip install -c constraints\.txt.*$", README, re.M)
    assert len(commands) == 2 and README.index(commands[1]) < 1800
    assert commands[0].endswith("--config recipes/quickstart.yaml") and commands[1].endswith("&& pytest")


def test_the_transforms_lines_run_as_they_stand(endpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    endpoint.models = ("Qwen/Qwen3-32B",)
    endpoint.answer = lambda request: "I cannot help with that." if "quick" in str(request) else rewriting(request)
    code = next(block for block in PYTHON if "keep_parent=False" in block)
    assert len(code.splitlines()) <= 11
    exec(code.replace("http://localhost:8000/v1", endpoint.url), {})
    better = datasets.load_from_disk("better")
    assert len(better) == len(ROWS) == len(endpoint.requests)
    assert [row["messages"][-1]["content"] for row in better][5] == "Fast."
    assert "refused: I cannot help with that." in capsys.readouterr().out


def test_the_lines_of_an_own_reflection_make_a_prompt_that_reads_its_replies(teacher, endpoint, pairs):
    code = next(block for block in PYTHON if "ReflectionPrompt(" in block)
    assert len(code.splitlines()) <= 14
    names = {"teacher": teacher}
    exec(code, names)
    endpoint.answer = lambda request: "Zu schwer.\n\n[Bessere Antwort] Ein Fluss ist Wasser, das läuft. [Ende]"
    table = pairs.map(names["better"], batched=True, load_from_cache_file=False)
    assert table["response"][1] == "Ein Fluss ist Wasser, das läuft." and table["critique"][1] == "Zu schwer."
    assert table["source"][1] == "for children"
    asked = [request["messages"][1]["content"] for request in endpoint.requests]  # in any order
    assert sum("[Dazu]\nGood morning, my friend.\n\n[Antwort]" in text for text in asked) == 1


def test_the_judges_lines_run_as_they_stand(endpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    endpoint.models = ("gpt-5.4-mini",)
    endpoint.answer = lambda request: (
        "9 3" if "1's Answer]\nBlue" in request["messages"][-1]["content"] else "2 8\nThe second explains."
    )
    exec(next(block for block in PYTHON if "judge_pairs" in block), {})
    assert "{'win': 1, 'tie': 0, 'lose': 0, 'unparsed': 0, 'win_rate': 2.0" in capsys.readouterr().out
    assert len(endpoint.requests) == 2


@pytest.fixture
def finished_run(candidates, tmp_path, monkeypatch):
    """A working directory with a student, and the candidates of a run that was called `mine`."""
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_level_tokenizer(TEXTS)
    tiny_llama(len(tokenizer)).save_pretrained("student")
    tokenizer.save_pretrained("student")
    candidates.save_to_disk("runs/mine/candidates")


def test_the_callbacks_lines_run_as_they_stand(finished_run, tmp_path):
    code = next(block for block in PYTHON if "SelectionCallback(trainer" in block)
    code = code.replace("Qwen/Qwen3-0.6B-Base", str(tmp_path / "student"))
    code = code.replace(
        'SFTConfig("out",', 'SFTConfig("out", use_cpu=True, bf16=False, max_steps=2, report_to="none",'
    )
    code = code.replace('template="vicuna"))', 'template="vicuna", ifd_gate=None, r_ifd_gate=None, keep=None))')
    names = {}
    exec(code, names)
    assert names["trainer"].state.global_step == 2
    assert len(names["trainer"].train_dataset) == len(ROWS)


def test_the_scorers_lines_run_as_they_stand(finished_run, tmp_path):
    code = next(block for block in PYTHON if "checkpoint_dir" in block)
    code = code.replace("Qwen/Qwen3-0.6B-Base", str(tmp_path / "student"))
    exec(code.replace('rule="paper"', 'rule="paper", ifd_gate=None, r_ifd_gate=None, keep=None'), {})
    assert len(datasets.load_from_disk("chosen")) == len(ROWS)
    assert (tmp_path / "scores" / "scoring.json").exists()


def test_the_configuration_in_the_readme_fits_the_recipe(tmp_path, monkeypatch):
    import sys

    from trl import ModelConfig, SFTConfig

    from hf_reflect.arguments import DataArguments, SelectionArguments, TeacherArguments, parse_arguments

    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    (tmp_path / "my.yaml").write_text(block)
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(tmp_path / "my.yaml")])
    types = (DataArguments, TeacherArguments, SelectionArguments, SFTConfig, ModelConfig)
    assert parse_arguments(types, "recipe.py")[1].extra_body == {"reasoning_effort": "none"}


def test_the_lines_of_statistics_and_publishing_run_as_they_stand(finished_run, tmp_path, capsys):
    candidates = datasets.load_from_disk("runs/mine/candidates")
    for place, name in enumerate(("ifd", "r_ifd")):
        candidates = candidates.add_column(name, [0.5 + (n + place) % 7 / 20 for n in range(len(candidates))])
    candidates.save_to_disk("runs/scored/candidates")
    select(candidates).save_to_disk("runs/mine/selected")
    names = {}
    code = next(block for block in PYTHON if "found.save(" in block)
    code = code.replace("Qwen/Qwen3-0.6B-Base", str(tmp_path / "student")).replace(
        "mine/candidates", "scored/candidates"
    )
    exec(code, names)
    assert json.loads((tmp_path / "statistics.json").read_text()) == names["found"]
    assert "fully reflected" in capsys.readouterr().out
    with Hub() as hub:
        code = next(block for block in PYTHON if "push_recycled(" in block)
        python = "from datasets import load_from_disk\ncandidates = load_from_disk('runs/scored/candidates')\n"
        python += "selected = load_from_disk('runs/mine/selected')\n" + code.replace("you/name", "writer/name")
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= hub.environment(HF_HOME=str(tmp_path / "home"))
        done = subprocess.run(
            [sys.executable, "-c", python], env=environment, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        assert hub.repositories["datasets", "writer/name"].private


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./]+\.(?:md|png|yaml))\)", README))
def test_links_to_files_lead_somewhere(path):
    assert (ROOT / path).exists()

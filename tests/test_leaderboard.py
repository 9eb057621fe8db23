"""The leaderboard's recipe on small tasks of its own, by lm-eval, against log-likelihoods one choice at a time."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, TEXTS, byte_level_tokenizer, load_recipe, tiny_llama
from launching import command, environment

from hf_reflect.arguments import parse_arguments
from hf_reflect.errors import DataError, SettingsError
from hf_reflect.evaluation.leaderboard import BENCHMARKS, Benchmark, evaluate, read_benchmarks

RECIPE = "recipes/open_llm_leaderboard.py"
SUMS = [
    {
        "question": f"What is {n} plus {n + 3}?",
        "choices": [str(2 * n + 3), f"about {n}", "none of them, I fear", "x" * (n % 4 + 1)],
        "gold": (3 * n + n // 4) % 4,
    }
    for n in range(24)
]
WORDS = [
    {"question": f"Which one rhymes with {word}?", "choices": [word[::-1], "the " + word], "gold": n % 2}
    for n, word in enumerate("cat dog tree house light sound stone river winter".split())
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a saved student, two tasks and a group of both; lm-eval's own scan of its tasks takes 8 s."""
    folder = tmp_path_factory.mktemp("leaderboard")
    tokenizer = byte_level_tokenizer([*TEXTS, *(row["question"] for row in SUMS)])
    model = tiny_llama(len(tokenizer))
    model.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, rows, more in (("sums", SUMS, {}), ("words", WORDS, {"num_fewshot": 0})):
        for split, part in (("train", rows[:3]), ("test", rows[3:])):
            (tasks / f"{name}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        described = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {split: str(tasks / f"{name}_{split}.jsonl") for split in ("train", "test")}
            },
            "output_type": "multiple_choice",
            "training_split": "train",
            "test_split": "test",
            "fewshot_split": "train",
            "fewshot_config": {"sampler": "first_n"},
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
            "metadata": {"version": 1.0},
        }
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(described | more))
    group = {"group": "both", "task": ["sums", "words"], "metadata": {"version": 1.0}}
    group["aggregate_metric_list"] = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    (tasks / "both.yaml").write_text(yaml.safe_dump(group))
    return SimpleNamespace(folder=folder, student=folder / "student", tasks=tasks, model=model, tokenizer=tokenizer)


def naive(place, rows, shots, metric):
    """Each choice after its prompt in a forward pass of its own; the likeliest, per character for acc_norm."""
    shown = "".join(f"Question: {row['question']}\nAnswer: {row['choices'][row['gold']]}\n\n" for row in rows[:shots])
    right = []
    for row in rows[3:]:
        prompt = place.tokenizer(f"{shown}Question: {row['question']}\nAnswer:")["input_ids"]
        scores = []
        for choice in row["choices"]:
            target = place.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = place.model(torch.tensor([prompt + target])).logits[0].double()
            likely = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(target)[:, None]).sum().item()
            scores.append(likely / len(choice) if metric == "acc_norm" else likely)
        right.append(scores.index(max(scores)) == row["gold"])
    return 100 * sum(right) / len(right)


def recipe(*arguments):
    """The recipe's `main`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        module = load_recipe(patch, "open_llm_leaderboard")
        patch.setattr(sys, "argv", [RECIPE, *map(str, arguments)])
        module.main()


def separately(*arguments):
    """The recipe in a process of its own."""
    done = subprocess.run(command(RECIPE, *arguments), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)


@pytest.mark.parametrize("run", [recipe, pytest.param(separately, marks=pytest.mark.slow)])
def test_accuracies_are_those_of_one_choice_at_a_time(run, place, tmp_path, capsys):
    settings = {
        "model": str(place.student),
        "tasks": [
            "sums:2:acc_norm",
            {"task": "words", "shots": 0, "metric": "acc", "column": "rhymes"},
        ],
        "include_path": [str(place.tasks)],
        "device": "cpu",
        "batch_size": 5,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    run("--config", tmp_path / "mine.yaml")
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    sums, rhymes = naive(place, SUMS, 2, "acc_norm"), naive(place, WORDS, 0, "acc")
    assert 0 < sums < 100 and sums != naive(place, SUMS, 0, "acc_norm")  # else shots are not seen to count
    assert results["table"] == pytest.approx({"average": (sums + rhymes) / 2, "sums": sums, "rhymes": rhymes})
    assert list(results["table"]) == ["average", "sums", "rhymes"]
    lines = [line.split() for line in said.splitlines()]
    values = lines[lines.index(["average", "sums", "rhymes"]) + 1]
    assert values == [f"{value:.2f}" for value in results["table"].values()]
    assert results["columns"]["sums"]["questions"] == len(SUMS) - 3
    assert results["lm_eval"]["lm_eval_version"] and results["lm_eval"]["n-shot"] == {"sums": 2, "words": 0}
    assert results["lm_eval"]["versions"] == {"sums": 1.0, "words": 1.0}


def test_metric_batch_and_limit_are_as_asked(place):
    def found(metric, **settings):
        row = evaluate(
            str(place.student),
            [Benchmark("sums", "sums", 3, metric)],
            include_path=[str(place.tasks)],
            device="cpu",
            **settings,
        )
        return row["table"]["sums"], row["columns"]["sums"]["questions"]

    for metric in ("acc", "acc_norm"):
        assert (
            found(metric, batch_size=1)
            == found(metric, batch_size="7")
            == (
                pytest.approx(naive(place, SUMS, 3, metric)),
                len(SUMS) - 3,
            )
        )
    few = naive(place, SUMS[:8], 3, "acc")
    assert found("acc", limit=5) == (pytest.approx(few), 5)


@pytest.mark.slow  # lm-eval reads all of its own tasks for a group
def test_a_group_counts_each_task_alike(place):
    row = evaluate(
        str(place.student), [Benchmark("both", "both", 0, "acc")], include_path=[str(place.tasks)], device="cpu"
    )
    sums, words = naive(place, SUMS, 0, "acc"), naive(place, WORDS, 0, "acc")
    assert row["table"]["both"] == pytest.approx((sums + words) / 2)
    weighted = (sums * (len(SUMS) - 3) + words * (len(WORDS) - 3)) / (len(SUMS) + len(WORDS) - 6)
    assert 100 * row["lm_eval"]["results"]["both"]["acc,none"] == pytest.approx(weighted)
    assert weighted != pytest.approx((sums + words) / 2)
    assert row["columns"]["both"]["tasks"] == 2


def test_the_shipped_configuration_is_the_papers_table(monkeypatch):
    module = load_recipe(monkeypatch, "open_llm_leaderboard")
    monkeypatch.setattr(sys, "argv", [RECIPE])
    asked, *_ = parse_arguments((module.LeaderboardArguments,), str(ROOT / RECIPE))
    assert tuple(read_benchmarks(asked.tasks)) == BENCHMARKS
    assert [(one.task, one.shots, one.metric) for one in BENCHMARKS] == [
        ("arc_challenge", 25, "acc_norm"),
        ("hellaswag", 10, "acc_norm"),
        ("mmlu", 5, "acc"),
        ("truthfulqa_mc2", 0, "acc"),
    ]


@pytest.mark.slow
def test_the_tasks_of_the_table_are_lm_evals():
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    assert all(one.task in known for one in BENCHMARKS)


def test_tasks_are_written_in_one_of_two_forms():
    assert read_benchmarks(["arc_challenge:25:acc_norm", {"task": "a", "shots": 0, "metric": "m", "column": "b"}]) == [
        Benchmark("arc_challenge", "arc_challenge", 25, "acc_norm"),
        Benchmark("b", "a", 0, "m"),
    ]
    for entries, words in (
        (["arc_challenge"], "'arc_challenge' is no task: write `name:shots:metric`, such as"),
        (["arc_challenge:many:acc"], "has 'many' shots, but that is a whole number"),
        ([{"task": "arc_challenge", "shots": 5}], "is no task: write"),
        (["a:0:acc", "a:5:acc"], "The task 'a' stands twice"),
        ([], "`tasks` is empty"),
    ):
        with pytest.raises(SettingsError, match=re.escape(words)):
            read_benchmarks(entries)


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        pytest.param("sms:0:acc", {}, "lm-eval knows no task 'sms'. Did you mean sums", marks=pytest.mark.slow),
        ("sums:0:f1", {}, "The task 'sums' has no metric 'f1', but acc, acc_norm: name one of these"),
        ("sums:9:acc", {}, "The task 'sums' has 3 examples for its prompts, not 9"),
        ("words:5:acc", {}, "one without shots, by its own configuration, not with 5: write `words:0:acc`"),
        ("sums:0:acc", {"include_path": ["no/folder"]}, "`include_path` names 'no/folder', which is no folder"),
        ("sums:0:acc", {"model": "./no-student"}, "The model './no-student' cannot be loaded"),
    ],
    ids=["task", "metric", "too many shots", "fixed shots", "include_path", "model"],
)
def test_what_cannot_be_measured_is_said(place, task, changes, words):
    settings = {"model": str(place.student), "include_path": [str(place.tasks)], "device": "cpu"} | changes
    with pytest.raises((SettingsError, DataError), match=re.escape(words)):
        evaluate(benchmarks=read_benchmarks([task]), **settings)


def test_a_task_without_its_data_is_said(place, tmp_path):
    described = yaml.safe_load((place.tasks / "sums.yaml").read_text())
    described["dataset_kwargs"]["data_files"] = str(tmp_path / "nowhere.jsonl")
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(described))
    with pytest.raises(DataError, match="data of the task 'sums' cannot be loaded: (.*)nowhere.jsonl"):
        evaluate(str(place.student), read_benchmarks(["sums:0:acc"]), include_path=[str(tmp_path)], device="cpu")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SettingsError, match=re.escape("`pip install 'hf_reflect[eval]'`")):
        evaluate("a/model")


@pytest.mark.slow
def test_processes_that_would_repeat_each_other_are_refused(place, tmp_path):
    line = command(
        RECIPE,
        *("--model", place.student, "--include_path", place.tasks, "--tasks", "sums:0:acc"),
        *("--output_dir", tmp_path / "out"),
        config=ROOT / "accelerate_configs" / "cpu.yaml",
    )
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    assert "2 processes were launched, but lm-eval shares its work out over GPUs" in done.stderr

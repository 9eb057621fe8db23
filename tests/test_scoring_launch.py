"""Scoring on several processes, killed and taken up again: real launches, real kills."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, byte_level_tokenizer, tiny_llama
from launching import command, kill_when, launch, on_cpu
from test_templates import row_of, table_of

from hf_reflect import StudentScorer
from hf_reflect.errors import SettingsError

WORDS = " ".join(TEXTS).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student and a table of 150 rows on disk: two answers to each instruction, of all lengths, some too long."""
    folder = tmp_path_factory.mktemp("scoring")
    tokenizer = byte_level_tokenizer(TEXTS)
    tiny_llama(len(tokenizer)).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    draw = random.Random(0)

    def text(most):
        return " ".join(draw.choice(WORDS) for _ in range(min(200, int(draw.lognormvariate(2.5, 0.8)) + 1, most)))

    rows = [row_of(x, text(300)) for x in (text(60) for _ in range(75)) for _ in range(2)]
    table_of(*rows, row_of("Why?", None)).save_to_disk(folder / "table")
    return folder


def arguments(folder, output, **options):
    options = {"student": str(folder / "student"), "table": str(folder / "table"), "output": str(output)} | options
    return "tests/launched_scoring.py", json.dumps(options)


def run(folder, output, config=None, **options):
    done = launch(*arguments(folder, output, **options), config=config)
    assert "Scoring" not in done.stderr  # no terminal, and less than a minute
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def alone(folder):
    """The same table scored by one process that nobody disturbs."""
    return run(folder, folder / "alone.json")


@pytest.mark.slow
def test_two_processes_share_the_tokens_evenly_and_give_the_table_of_one(folder, alone, tmp_path):
    result = run(folder, tmp_path / "two.json", on_cpu("ddp", tmp_path))
    assert (result["processes"], result["distributed_type"], result["backend"]) == (2, "MULTI_CPU", "gloo")
    assert result["same"]
    for name in ("losses", "ifd", "r_ifd"):
        assert result[name][-1] is None
        assert result[name][:-1] == pytest.approx(alone[name][:-1], rel=1e-6)
    assert result["cut"] == alone["cut"] > 0
    assert result["passes"][0] == result["passes"][1]
    small, large = sorted(result["tokens"])
    assert large < 1.05 * small


@pytest.mark.slow
def test_partitioned_weights_give_the_same_table_with_as_many_passes_on_every_rank(folder, alone, tmp_path):
    config = on_cpu("zero3", tmp_path)
    result = run(folder, tmp_path / "zero3.json", config, checkpoint_dir=str(tmp_path / "scores"), again=True)
    assert (result["processes"], result["distributed_type"]) == (2, "DEEPSPEED")
    assert result["partitioned"] and result["same"]
    assert result["losses"][:-1] == pytest.approx(alone["losses"][:-1], rel=1e-6)
    assert result["passes"][0] == result["passes"][1] > 0 and result["passes_again"] == [0, 0]


def start_and_kill(folder, output, config=None, rank=None, **options):
    """Kill it as soon as two files of losses are there."""
    scores, line = Path(options["checkpoint_dir"]), command(*arguments(folder, output, **options), config=config)
    return kill_when(lambda: len(list(scores.glob("losses*"))) >= 2, line, rank=rank)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(folder, tmp_path):
    options = {"tokens": 512, "seconds_a_pass": 0.1, "checkpoint_dir": str(tmp_path / "scores")}
    whole = run(folder, tmp_path / "whole.json", tokens=512)
    (tmp_path / "scores").mkdir()
    start_and_kill(folder, tmp_path / "out.json", **options)
    assert not (tmp_path / "out.json").exists()
    resumed = run(folder, tmp_path / "out.json", **{**options, "seconds_a_pass": 0})
    for name in ("losses", "ifd", "r_ifd", "cut"):
        assert resumed[name] == whole[name]
    assert resumed["passes"][0] < whole["passes"][0] - 5
    again = run(folder, tmp_path / "out.json", **options)
    assert again["ifd"] == whole["ifd"] and again["passes"] == [0]


@pytest.mark.slow
def test_a_killed_rank_ends_the_launch_and_one_process_can_finish(folder, alone, tmp_path):
    options = {"tokens": 512, "seconds_a_pass": 0.1, "checkpoint_dir": str(tmp_path / "scores")}
    (tmp_path / "scores").mkdir()
    seconds, code = start_and_kill(folder, tmp_path / "out.json", on_cpu("ddp", tmp_path), rank=1, **options)
    assert seconds < 60 and code != 0
    resumed = run(folder, tmp_path / "out.json", **{**options, "seconds_a_pass": 0})
    for name in ("losses", "ifd", "r_ifd"):
        assert resumed[name][:-1] == pytest.approx(alone[name][:-1], rel=1e-6)


def other_weights(model, tokenizer, rows):
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1e-3
    return model, tokenizer, rows, {}


OTHERS = {
    "weights": other_weights,
    "model": lambda model, tokenizer, rows: (tiny_llama(len(tokenizer), rope_theta=5e5), tokenizer, rows, {}),
    "dtype": lambda model, tokenizer, rows: (model.to(torch.bfloat16), tokenizer, rows, {}),
    "tokenizer": lambda model, tokenizer, rows: (model, byte_level_tokenizer(TEXTS, 300), rows, {}),
    "template": lambda model, tokenizer, rows: (model, tokenizer, rows, {"template": "plain"}),
    "max_length": lambda model, tokenizer, rows: (model, tokenizer, rows, {"max_length": 1024}),
    "adapter": lambda model, tokenizer, rows: (model, tokenizer, rows, {"adapter": "base"}),
    "rows": lambda model, tokenizer, rows: (model, tokenizer, rows.select(range(7)), {}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_folder_with_scores_of_something_else_is_refused_and_says_what_differs(what, student, pairs, tmp_path):
    model, tokenizer = tiny_llama(len(student[1])), student[1]
    scored = StudentScorer(model, tokenizer).score(pairs, checkpoint_dir=tmp_path)
    files = sorted(tmp_path.iterdir())
    model, tokenizer, rows, settings = OTHERS[what](model, tokenizer, pairs)
    with pytest.raises(SettingsError, match=rf"made with (an)?other {what}: .* Name another `checkpoint_dir`"):
        StudentScorer(model, tokenizer, **settings).score(rows, checkpoint_dir=tmp_path)
    assert sorted(tmp_path.iterdir()) == files
    again = StudentScorer(tiny_llama(len(student[1])), student[1]).score(pairs, checkpoint_dir=tmp_path)
    assert again["ifd"][:] == scored["ifd"][:]


def test_another_batch_size_goes_on_with_the_packs_that_were_planned(student, pairs, tmp_path):
    scored = StudentScorer(*student, tokens_per_batch=400).score(pairs, checkpoint_dir=tmp_path)
    files = sorted(tmp_path.glob("losses-*.npz"))
    files[0].unlink()
    again = StudentScorer(*student, tokens_per_batch=3000).score(pairs, checkpoint_dir=tmp_path)
    assert again["ifd"][:] == pytest.approx(scored["ifd"][:], rel=1e-6)


def test_losses_without_a_description_are_not_taken_for_ones_own(student, pairs, tmp_path):
    StudentScorer(*student).score(pairs, checkpoint_dir=tmp_path)
    (tmp_path / "scoring.json").unlink()
    with pytest.raises(SettingsError, match="holds losses, but no scoring.json that says whose"):
        StudentScorer(*student).score(pairs, checkpoint_dir=tmp_path)


WRONG = {"student": {"model": "x"}, "tokens_per_batch": 2048, "shares": 1}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        *(json.dumps(WRONG | one) for one in ({"student": 3}, {"tokens_per_batch": 0}, {"shares": None})),
    ],
)
def test_a_damaged_description_is_refused_with_what_to_do(student, pairs, tmp_path, content):
    (tmp_path / "scoring.json").write_text(content)
    with pytest.raises(SettingsError, match="scoring.json cannot be read .* Name another `checkpoint_dir`"):
        StudentScorer(*student).score(pairs, checkpoint_dir=tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_damaged_file_of_losses_is_scored_anew(student, pairs, tmp_path, share, caplog):
    scored = StudentScorer(*student).score(pairs, checkpoint_dir=tmp_path)
    (path,) = tmp_path.glob("losses-*.npz")
    if share < 1:
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    else:  # a method of compression that nobody knows
        content = bytearray(path.read_bytes())
        content[content.index(b"PK\1\2") + 10] = 99
        path.write_bytes(content)
    again = StudentScorer(*student).score(pairs, checkpoint_dir=tmp_path)
    assert again["ifd"][:] == scored["ifd"][:]
    assert "is damaged" in caplog.text
    caplog.clear()
    StudentScorer(*student).score(pairs, checkpoint_dir=tmp_path)
    assert "is damaged" not in caplog.text

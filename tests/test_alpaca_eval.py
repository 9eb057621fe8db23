"""AlpacaEval by the alpaca-eval package itself: its annotators ask an endpoint on loopback, its functions count."""

import hashlib
import importlib.util
import json
import math
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from conftest import ROOT, load_recipe
from datasets import Dataset
from endpoint import Endpoint
from launching import environment

from hf_reflect import Teacher
from hf_reflect.errors import DataError, SettingsError, TeacherError
from hf_reflect.evaluation import alpaca_eval
from hf_reflect.evaluation.alpaca_eval import (
    annotate,
    is_asked_by_teacher,
    load_reference,
    read_annotations,
    write_outputs,
)
from hf_reflect.evaluation.answers import read_answers, write_answers

RECIPE = "recipes/run_alpaca_eval.py"
CONFIGS = Path(importlib.util.find_spec("alpaca_eval").origin).parent / "evaluators_configs"
COUNT = 12
SAME, UNREADABLE = 4, 7  # the questions whose answers are equal, and to which the judge says nothing usable
QUESTIONS = [f"What comes after {n}?" for n in range(COUNT)]
LENGTHS = [(7 * n + 3) % 23 + 1 for n in range(COUNT)]  # of the model's answers
THEIRS = 13  # characters of each of the reference's answers; none of the model's has as many
TOKENS = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}


def answers(model="ours", letter="x", lengths=LENGTHS):
    return [
        {
            "question_id": f"own/{n}",
            "question": question,
            "answer": "same" if n == SAME else letter * lengths[n],
            "model": model,
            "category": "counting",
        }
        for n, question in enumerate(QUESTIONS)
    ]


def in_format(rows):
    return [
        {"instruction": r["question"], "output": r["answer"], "generator": r["model"], "dataset": r["category"]}
        for r in rows
    ]


OUTPUTS, REFERENCE = in_format(answers()), in_format(answers("theirs", "y", lengths=[THEIRS] * COUNT))


def shown(request):
    """Question, first and second answer, as the package's prompts for GPT-4 show them."""
    return re.findall(r'"""(.*?)"""', request["messages"][-1]["content"], re.DOTALL)


def prefers_longer(request):
    """The ranking that AlpacaEval 1 asks for."""
    question, first, second = shown(request)
    if question == QUESTIONS[UNREADABLE]:
        return "I would rather not say."
    ranks = (1, 2) if len(first) > len(second) else (2, 1)
    return str([{"model": f"model_{n}", "rank": rank} for n, rank in enumerate(ranks, start=1)])


def how_sure(ours, theirs):
    """Of the weighted judge below: the probability of our answer."""
    return len(ours) / (len(ours) + len(theirs))


def weighs(request, instead=None):
    """The log-probabilities of both names that AlpacaEval 2 asks for; or a text without them."""
    if instead is not None:
        silent = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": instead}}
        token = {"token": instead, "logprob": 0.0, "bytes": None, "top_logprobs": []}
        return {"text": instead, "fields": {"choices": [silent | {"logprobs": {"content": [token]}}], "usage": TOKENS}}
    question, first, second = shown(request)
    sure = how_sure(first, second)
    top = [{"token": name, "logprob": math.log(p), "bytes": None} for name, p in (("m", sure), ("M", 1 - sure))]
    token = {"token": "m", "logprob": math.log(sure), "bytes": None, "top_logprobs": top}
    choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "m"}}
    return {"text": "m", "fields": {"choices": [choice | {"logprobs": {"content": [token]}}], "usage": TOKENS}}


@pytest.fixture
def gpt4(tmp_path):
    """An endpoint that judges as GPT-4 is asked to, and a teacher for it."""
    with Endpoint(prefers_longer, models=("gpt-4",)) as endpoint:
        yield endpoint, Teacher("unnamed", base_url=endpoint.url, ledger=str(tmp_path / "ledger.sqlite"))


def standard_digest(rows):
    return hashlib.sha256("\n".join(row["instruction"] for row in rows).encode()).hexdigest()[:16]


def expected(n):
    if n == UNREADABLE:
        return None
    return 1.5 if n == SAME else 2.0 if LENGTHS[n] > THEIRS else 1.0


def test_the_published_annotations_come_to_the_published_numbers(reference):
    published = json.loads((reference / "reference" / "alpaca_eval_v1.json").read_text())
    pairs = zip(published["preferences"], published["output_lengths"], strict=True)
    rows = [{"instruction": f"{n}", "output_2": "x" * k, "preference": p} for n, (p, k) in enumerate(pairs)]
    found = read_annotations(rows)
    assert (round(found["win_rate"], 2), round(found["standard_error"], 2)) == (78.88, 1.44)
    assert [found[name] for name in ("n_wins", "n_draws", "n_losses", "n_total")] == [635, 0, 170, 805]
    assert (found["n_unannotated"], found["avg_length"]) == (0, 1494)
    assert found["length_controlled_winrate"] is None and "805 instructions" in found["length_controlled_note"]


def test_win_rates_are_over_annotated_instructions_alone(tmp_path):
    draw = random.Random(3)
    kinds = [1, 2, 1.0, 2.0, 1.5, 0, 1.25, 1.9, None, math.nan, -1]
    rows = [{"instruction": f"{n}", "output_2": "x" * n, "preference": draw.choice(kinds)} for n in range(200)]
    wins = [{0: 0.5}.get(p, p - 1) for row in rows if not ((p := row["preference"]) is None or p != p or p == -1)]
    found = read_annotations(rows)
    assert found["win_rate"] == pytest.approx(100 * sum(wins) / len(wins))
    assert found["standard_error"] == pytest.approx(100 * statistics.stdev(wins) / math.sqrt(len(wins)))
    assert found["n_wins"] == sum(win > 0.5 for win in wins) and found["n_losses"] == sum(win < 0.5 for win in wins)
    assert found["n_draws"] == wins.count(0.5) and found["n_total"] == len(wins) < 190
    assert found["n_unannotated"] == 200 - len(wins) and found["avg_length"] == 199 // 2

    from_file = [
        row | {"preference": None if row["preference"] != row["preference"] else row["preference"]} for row in rows
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(from_file))
    assert read_annotations(tmp_path / "annotations.json") == found


def test_the_length_controlled_win_rate_of_who_wins_by_length_alone_is_near_half(tmp_path, monkeypatch):
    draw, count = random.Random(1), 805
    rows, gamed = [], []
    for n in range(count):
        ours, theirs = draw.randint(1, 1000), draw.randint(1, 600)
        row = {"instruction": f"Invented {n}?", "generator_1": "theirs", "generator_2": "ours"}
        row |= {"output_1": "y" * theirs, "output_2": "x" * ours, "preference": 2 if ours > theirs else 1}
        rows.append(row)
    for model, longer in (("verbose", 1), ("concise", -1)):
        for n in range(count):
            gap = -longer * draw.random()  # the reference's length less the model's
            gamed.append((model, n, 0.5 - gap / 2, gap, draw.gauss(0, 1), False))
    folder = tmp_path / "datasets--tatsu-lab--alpaca_eval"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("invented")
    (folder / "snapshots" / "invented").mkdir(parents=True)
    head = "model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"
    lines = [head, *(",".join(map(str, values)) for values in gamed)]
    monkeypatch.setattr(alpaca_eval.results, "_STANDARD_SET", standard_digest(rows))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = read_annotations(rows)
    assert found["length_controlled_winrate"] is None
    assert "difficulties cannot be had from tatsu-lab/alpaca_eval" in found["length_controlled_note"]

    (folder / "snapshots" / "invented" / "df_gamed.csv").write_text("\n".join(lines))
    found = read_annotations(rows)
    assert found["win_rate"] > 65 and abs(found["length_controlled_winrate"] - 50) < 6
    assert found["length_controlled_note"] is None
    assert read_annotations(rows[::-1])["length_controlled_winrate"] is None  # difficulties go by place


def test_one_annotation_has_no_standard_error():
    found = read_annotations([{"instruction": "Why?", "output_2": "Because.", "preference": 2}])
    assert (found["win_rate"], found["standard_error"], found["n_total"]) == (100.0, None, 1)


def test_outputs_are_what_the_package_reads(tmp_path):
    from alpaca_eval import utils

    write_answers(tmp_path / "answers.jsonl", answers())
    written = write_outputs(read_answers(tmp_path / "answers.jsonl"), tmp_path / "made" / "outputs.json")
    table = utils.load_or_convert_to_dataframe(tmp_path / "made" / "outputs.json")
    assert table.to_dict(orient="records") == written == OUTPUTS
    assert utils.get_generator_name(None, table) == "ours"
    assert write_outputs(read_answers(tmp_path / "made" / "outputs.json"), tmp_path / "again.json") == OUTPUTS
    assert load_reference(str(tmp_path / "made" / "outputs.json")) == OUTPUTS
    renamed = write_outputs(answers(), tmp_path / "renamed.json", "another name")
    assert {row["generator"] for row in renamed} == {"another name"}


def test_the_first_version_is_judged_through_the_ledger_and_asked_once(gpt4, tmp_path):
    endpoint, teacher = gpt4
    shuffled = random.Random(0).sample(OUTPUTS, COUNT)
    rows = annotate(shuffled, REFERENCE, "alpaca_eval_gpt4", teacher)
    assert [row["instruction"] for row in rows] == QUESTIONS
    assert [row["preference"] for row in rows] == [expected(n) for n in range(COUNT)]
    assert [(row["output_1"], row["output_2"]) for row in rows] == [
        (theirs["output"], ours["output"]) for theirs, ours in zip(REFERENCE, OUTPUTS, strict=True)
    ]
    assert {(row["generator_1"], row["generator_2"]) for row in rows} == {("theirs", "ours")}

    # the sampling is the annotator's, and each answer stands first sometimes; equal answers need no judge
    assert len(endpoint.requests) == COUNT - 1 and teacher.stats["asked"] == COUNT - 1
    assert {(r["model"], r["temperature"], r["max_tokens"]) for r in endpoint.requests} == {("gpt-4", 0.0, 100)}
    assert {"x" in shown(request)[1] for request in endpoint.requests} == {True, False}

    found = read_annotations(rows, OUTPUTS)
    wins = [expected(n) - 1 for n in range(COUNT) if n != UNREADABLE]
    assert found["win_rate"] == pytest.approx(100 * sum(wins) / len(wins))
    assert (found["n_total"], found["n_unannotated"], found["n_draws"]) == (COUNT - 1, 1, 1)
    assert found["avg_length"] == sum(len(row["output"]) for row in OUTPUTS) // COUNT
    assert found["avg_length_reference"] == sum(len(row["output"]) for row in REFERENCE) // COUNT

    again = annotate(OUTPUTS, REFERENCE, "alpaca_eval_gpt4", teacher)
    assert [row["preference"] for row in again] == [row["preference"] for row in rows]
    assert len(endpoint.requests) == COUNT - 1 and teacher.stats["reused"] == COUNT - 1


def test_a_budget_leaves_the_rest_unannotated_and_is_taken_up_again(gpt4):
    endpoint, teacher = gpt4
    teacher.max_requests = 5
    rows = annotate(OUTPUTS, REFERENCE, "alpaca_eval_gpt4", teacher)
    assert len(endpoint.requests) == 5
    unannotated = read_annotations(rows)["n_unannotated"]
    assert unannotated >= COUNT - 6
    teacher.max_requests = None
    rows = annotate(OUTPUTS, REFERENCE, "alpaca_eval_gpt4", teacher)
    assert [row["preference"] for row in rows] == [expected(n) for n in range(COUNT)]
    assert len(endpoint.requests) == COUNT - 1


def test_for_a_trial_a_part_is_drawn_for_both_models_alike(gpt4):
    _, teacher = gpt4
    rows = annotate(OUTPUTS[::-1], REFERENCE, "alpaca_eval_gpt4", teacher, max_instances=5)
    assert len(rows) == 5 and [row["instruction"] for row in rows] != QUESTIONS[:5]
    assert all(row["preference"] == expected(QUESTIONS.index(row["instruction"])) for row in rows)
    assert read_annotations(rows, OUTPUTS)["n_total"] + read_annotations(rows)["n_unannotated"] == 5


def test_a_judge_of_ones_own_is_a_folder(gpt4, tmp_path, monkeypatch):
    endpoint, teacher = gpt4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "configs.yaml").write_text(
        "mine:\n  prompt_template: mine/prompt.txt\n  completions_kwargs: {model_name: gpt-4, max_tokens: 7}\n"
        "  fn_completion_parser: ranking_parser\n"
    )
    prompt = '<|im_start|>user\n"""{instruction}""" """{output_1}""" """{output_2}"""\n<|im_end|>'
    (tmp_path / "mine" / "prompt.txt").write_text(prompt)
    monkeypatch.chdir(tmp_path)
    rows = annotate(OUTPUTS, REFERENCE, "mine", teacher)
    assert [row["preference"] for row in rows] == [expected(n) for n in range(COUNT)]
    assert {row["annotator"] for row in rows} == {"mine"}
    assert {(r["temperature"], r["max_tokens"]) for r in endpoint.requests} == {(0.7, 7)}  # 0.7: the package's default


@pytest.mark.parametrize(
    ("configs", "words"),
    [
        ((CONFIGS / "alpaca_eval_gpt4" / "configs.yaml").read_text(), "alpaca_eval.txt is no file. It is looked for"),
        ("mine:\n  completions_kwargs: {model_name: gpt-4}\n", "has the prompt_template None"),
        ("mine: [", "configs.yaml is no YAML: while parsing"),
        ("mine: gpt-4", "is a mapping of a name to its settings"),
        ("", "is a mapping of a name to its settings"),
    ],
)
def test_a_copy_of_an_annotator_that_is_not_whole_is_told_what_it_lacks(configs, words, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "configs.yaml").write_text(configs)
    with pytest.raises(SettingsError, match=words):
        annotate(OUTPUTS, REFERENCE, str(tmp_path / "mine"), Teacher("unnamed", ledger=str(tmp_path / "l.sqlite")))


def test_every_annotator_of_the_package_is_whole():
    names = [path.parent.name for path in CONFIGS.glob("*/configs.yaml")]
    assert sum(map(is_asked_by_teacher, names)) > 3 and len(names) > 30


def test_an_annotator_of_whom_nothing_can_be_read_is_shown_with_what_to_change(tmp_path):
    ledger = str(tmp_path / "ledger.sqlite")
    with Endpoint(lambda request: "Both are lovely.", models=("gpt-4",)) as endpoint:
        teacher = Teacher("unnamed", base_url=endpoint.url, ledger=ledger, max_requests=0)
        with pytest.raises(
            TeacherError, match="none of 11 prompts was answered, the first for budget: .*\n.*the limit"
        ):
            annotate(OUTPUTS, REFERENCE, "alpaca_eval_gpt4", teacher)
        teacher.max_requests = None
        for _ in range(2):  # the second time from the ledger
            with pytest.raises(TeacherError, match="none of 11 replies could be read") as found:
                annotate(OUTPUTS, REFERENCE, "alpaca_eval_gpt4", teacher)
            for words in ("'Both are lovely.'", "another `model_name`", f"kept in {ledger}, and not asked"):
                assert words in str(found.value)
        assert len(endpoint.requests) == COUNT - 1


def test_the_second_version_is_asked_by_the_package_and_only_for_what_is_missing(tmp_path):
    broken = {"on": True}

    def sometimes(request):
        return weighs(request, "?" if broken["on"] and shown(request)[0] == QUESTIONS[2] else None)

    def judged(teacher):
        rows = annotate(OUTPUTS, REFERENCE, "weighted_alpaca_eval_gpt4_turbo", teacher, tmp_path / "judgements.json")
        return [row["preference"] for row in rows]

    with Endpoint(sometimes, models=("gpt-4-1106-preview",)) as endpoint:
        teacher = Teacher("unnamed", base_url=endpoint.url, ledger=str(tmp_path / "ledger.sqlite"))
        lengths = [
            (len(ours["output"]), len(theirs["output"])) for ours, theirs in zip(OUTPUTS, REFERENCE, strict=True)
        ]
        sure = [1.5 if n == SAME else 1 + ours / (ours + theirs) for n, (ours, theirs) in enumerate(lengths)]
        first = judged(teacher)
        assert first[2] is None and len(endpoint.requests) == COUNT - 1
        assert all(request["logprobs"] and request["max_tokens"] == 1 for request in endpoint.requests)
        broken["on"] = False
        assert judged(teacher) == pytest.approx(sure)
        assert len(endpoint.requests) == COUNT
        teacher.max_requests = 100
        with pytest.raises(SettingsError, match="past the ledger for which `max_cost`"):
            judged(teacher)
    teacher.max_requests = None
    with Endpoint(models=("another",)) as endpoint:
        teacher.base_url = endpoint.url
        with pytest.raises(TeacherError, match="`gpt-4-1106-preview` does not exist"):
            annotate(OUTPUTS, REFERENCE, "weighted_alpaca_eval_gpt4_turbo", teacher)
    with Endpoint(lambda request: weighs(request, "Both!"), models=("gpt-4-1106-preview",)) as endpoint:
        teacher.base_url = endpoint.url
        with pytest.raises(TeacherError, match="none of 11 replies could be read, for example: 'Both!'") as found:
            annotate(OUTPUTS, REFERENCE, "weighted_alpaca_eval_gpt4_turbo", teacher)
    assert teacher.ledger not in str(found.value)  # it has none of these


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: annotate(OUTPUTS[1:], REFERENCE, "alpaca_eval_gpt4"), "The outputs miss 1 of 12 instructions"),
        (lambda: annotate(OUTPUTS, REFERENCE[3:], "alpaca_eval_gpt4"), "The reference misses 3 of 12 instructions"),
        (lambda: annotate(OUTPUTS, REFERENCE, "alpaca_eval_gtp4"), "Did you mean `alpaca_eval_gpt4`?"),
        (lambda: load_reference("no/such/file.json"), "'no/such/file.json' does not exist"),
        (lambda: read_annotations([]), "needs the columns 'instruction', 'output_2', 'preference'"),
        (lambda: read_annotations("no/annotations.json"), "cannot be read"),
    ],
    ids=["outputs miss", "reference misses", "annotator", "reference", "none", "no file"],
)
def test_what_cannot_be_compared_is_said(work, words):
    with pytest.raises((DataError, SettingsError), match=re.escape(words)):
        work()


def test_answers_that_are_no_outputs_are_refused(tmp_path):
    lacking = answers()
    lacking[3]["answer"] = None
    for rows, words in (
        (lacking, "lack an output to 1 of 12 questions, such as 'What comes after 3?'"),
        (answers() + answers("another"), "are of 2 models (another, ours)"),
        (answers() + answers()[:1], "hold more than once 1 of 13 questions"),
        ([row | {"model": ""} for row in answers()], "do not say which model gave them"),
        ([], "needs the columns 'question', 'answer'"),
        (Dataset.from_list([{"question": "Why?"}]), "needs the column 'answer'"),
    ):
        with pytest.raises(DataError, match=re.escape(words)):
            write_outputs(rows, tmp_path / "outputs.json")
    assert not (tmp_path / "outputs.json").exists()


def test_annotations_of_anything_else_are_refused():
    rows = [
        {"instruction": o["instruction"], "output_2": o["output"], "preference": 2, "generator_2": "ours"}
        for o in OUTPUTS
    ]
    assert read_annotations(rows[:9], OUTPUTS)["n_total"] == 9
    for changed, words in (
        ([rows[0] | {"instruction": "Another?"}, *rows[1:]], "1 of 12 are of other instructions, 0 of other outputs"),
        ([rows[0] | {"output_2": "Another."}, *rows[1:]], "0 of 12 are of other instructions, 1 of other outputs"),
        ([rows[0] | {"generator_2": "another"}, *rows[1:]], "12, of 12 instructions and 2 models (another, ours)"),
        ([*rows, rows[0]], "are 13, of 12 instructions and 1 model (ours)"),
        ([row | {"preference": None} for row in rows], "hold no preference for any of 12 instructions"),
        ([rows[0] | {"preference": 3}], "hold the preference 3, but AlpacaEval knows 1 (the reference)"),
    ):
        with pytest.raises(DataError, match=re.escape(words)):
            read_annotations(changed, OUTPUTS)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "alpaca_eval", None)
    with pytest.raises(SettingsError, match=re.escape("`pip install 'hf_reflect[eval]'`")):
        annotate(OUTPUTS, REFERENCE, "alpaca_eval_gpt4")


def recipe(*arguments):
    """The recipe's `main`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        module = load_recipe(patch, "run_alpaca_eval")
        patch.setattr(sys, "argv", [RECIPE, *map(str, arguments)])
        module.main()


@pytest.fixture
def files(tmp_path):
    write_answers(tmp_path / "answers.jsonl", answers())
    (tmp_path / "reference.json").write_text(json.dumps(REFERENCE))
    return ["--answers", tmp_path / "answers.jsonl", "--output_dir", tmp_path / "out"]


def separately(*arguments):
    """The recipe in a process of its own."""
    line = [str(part) for part in (sys.executable, ROOT / RECIPE, *arguments)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)


@pytest.mark.parametrize("run", [recipe, pytest.param(separately, marks=pytest.mark.slow)])
def test_the_recipe_judges_counts_and_asks_nothing_twice(run, gpt4, files, tmp_path, capsys):
    endpoint, _ = gpt4
    line = [*files, "--annotator", "alpaca_eval_gpt4", "--base_url", endpoint.url]
    line += ["--reference", tmp_path / "reference.json"]
    run(*line)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    saved = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [row["preference"] for row in saved] == [expected(n) for n in range(COUNT)]
    assert read_annotations(saved).items() <= metrics.items()
    assert (metrics["annotator"], metrics["model"]) == ("alpaca_eval_gpt4", "ours")
    said = capsys.readouterr().out
    assert f"{metrics['win_rate']:.2f} % (standard error {metrics['standard_error']:.2f})" in said
    assert "through the ledger: 11 asked, 0 reused, 0 failed" in said and "and 1 without a judgement" in said
    assert f"{metrics['avg_length']} characters, the reference's {metrics['avg_length_reference']}" in said
    run(*line)
    assert "0 asked, 11 reused, 0 failed" in capsys.readouterr().out and len(endpoint.requests) == COUNT - 1


def test_the_recipe_only_reads_where_there_are_annotations(files, tmp_path, capsys):
    rows = [{"instruction": o["instruction"], "output_2": o["output"], "preference": 2} for o in OUTPUTS[:4]]
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    recipe(*files, "--annotations", tmp_path / "annotations.json")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["win_rate"] == 100.0
    said = capsys.readouterr().out
    assert "100.00 % (standard error 0.00)" in said and "nobody was asked: the annotations were there" in said


def test_the_recipe_says_who_was_asked_where_the_ledger_was_not(files, tmp_path, capsys):
    (tmp_path / "equal.json").write_text(json.dumps([row | {"generator": "twin"} for row in OUTPUTS]))
    with Endpoint(weighs, models=("gpt-4-1106-preview",)) as endpoint:
        for annotator, reference, words in (
            ("weighted_alpaca_eval_gpt4_turbo", "reference.json", "by alpaca-eval's own client: 11 asked"),
            (
                "weighted_alpaca_eval_gpt4_turbo",
                "reference.json",
                "nobody was asked: alpaca-eval has kept all judgements",
            ),
            ("alpaca_eval_gpt4", "equal.json", "nobody was asked: both models' outputs are equal"),
        ):
            line = ["--annotator", annotator, "--reference", tmp_path / reference, "--base_url", endpoint.url]
            recipe(*files, *line)
            assert f"judge                {words}\n" in capsys.readouterr().out
        assert len(endpoint.requests) == COUNT - 1


def test_the_recipe_has_no_default_pair_and_says_both(files):
    for given in ([], ["--annotator", "alpaca_eval_gpt4"], ["--reference", "text_davinci_003"]):
        with pytest.raises(SettingsError) as found:
            recipe(*files, *given)
        for words in (
            "AlpacaEval 1: `annotator: alpaca_eval_gpt4` with `reference: text_davinci_003`",
            "AlpacaEval 2: `annotator: weighted_alpaca_eval_gpt4_turbo` with `reference: gpt4_1106_preview`",
        ):
            assert words in str(found.value)
    with pytest.raises(SettingsError, match="`temperature` stands in the annotator's configuration"):
        recipe(*files, "--temperature", "0.5")

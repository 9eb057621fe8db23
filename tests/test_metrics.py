import doctest
import inspect
import itertools
import json
import math
import random
import re
import subprocess
import sys
from importlib.resources import files

import pytest
import test_coherence
import torch
from conftest import ROWS
from test_scoring import SCORES, naive_scores
from test_templates import naive_encoding

from hf_reflect.errors import DataError, SettingsError

FOLDER = files("hf_reflect") / "metrics"
NAMES = ("ifd", "coherence", "win_rate")
TEXTS = {
    "instructions": [row["instruction"] for row in ROWS],
    "inputs": [row["input"] for row in ROWS],
    "responses": [row["output"] for row in ROWS],
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`load(name)`: the module, as evaluate gives it, with evaluate's caches in a folder of these tests."""
    import evaluate

    cache, threads = tmp_path_factory.mktemp("evaluate"), torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", cache / "modules")
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", cache / "metrics")
        patch.setattr(sys, "path", [*sys.path])
        numbers = itertools.count()  # one that failed keeps its files locked
        yield lambda name: evaluate.load(str(FOLDER / name), experiment_id=f"test-{next(numbers)}")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(student, encoder, tmp_path_factory):
    """A folder in which the models that the cards name are tiny local ones."""
    folder = tmp_path_factory.mktemp("models")
    model, tokenizer = student
    model.save_pretrained(folder / "Qwen" / "Qwen3-0.6B-Base")
    tokenizer.save_pretrained(folder / "Qwen" / "Qwen3-0.6B-Base")
    (folder / "sentence-transformers").mkdir()
    (folder / "sentence-transformers" / "all-MiniLM-L6-v2").symlink_to(encoder / "sbert")
    return folder


def given(student):
    return dict(zip(("model", "tokenizer"), student, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_evaluate_loads_the_module_by_the_path_of_its_folder(load, name):
    metric = load(name)
    assert (metric.name, metric.module_type) == (name, "metric")
    assert type(metric).__module__.startswith("evaluate_modules.")  # a copy, outside of the package
    assert metric.description in type(metric).__doc__ and metric.inputs_description in metric.compute.__doc__


@pytest.mark.slow  # a second import of evaluate
def test_a_fresh_process_anywhere_loads_and_computes_without_a_network(tmp_path):
    lines = (
        "import importlib.resources, socket, evaluate",
        "socket.socket = None",
        "path = str(importlib.resources.files('hf_reflect') / 'metrics' / 'win_rate')",
        "print(evaluate.load(path).compute(scores=[[9, 7]], scores_reverse=[[8, 8]])['win_rate'])",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "2.0\n", done.stderr


# --- ifd


@pytest.mark.parametrize(("template", "max_length"), [("vicuna", 2048), ("alpaca", 2048), ("vicuna", 280)])
def test_ifd_is_that_of_a_plain_loop_over_pairs(load, student, template, max_length):
    rows = [{"instruction": row["instruction"], "input": row["input"], "response": row["output"]} for row in ROWS]
    rows += [{"instruction": "Go on. " * 20, "input": "now", "response": "Rain taps the roof. " * 12}]
    texts = {f"{name}s": [row[name] for row in rows] for name in rows[0]}
    found = load("ifd").compute(**texts, **given(student), template=template, max_length=max_length)
    expected = [naive_scores(*student, template, row, max_length) for row in rows]
    for name in SCORES:
        assert found[name] == pytest.approx([row[name] for row in expected], rel=1e-5)
    for name in ("ifd", "r_ifd"):
        assert found[f"mean_{name}"] == pytest.approx(sum(row[name] for row in expected) / len(rows), rel=1e-5)
    whole, fitting = (
        [[naive_encoding(student[1], template, row, length, way) for way in (False, True)] for row in rows]
        for length in (9999, max_length)
    )
    assert found["scored"] == len(rows)
    assert found["cut"] == sum(one != other for one, other in zip(whole, fitting, strict=True))
    assert bool(found["cut"]) == (max_length < 2048)


def test_a_model_named_by_its_folder_scores_as_the_loaded_one(load, student, models):
    ifd = load("ifd")
    named = ifd.compute(**TEXTS, model_id=str(models / "Qwen" / "Qwen3-0.6B-Base"), device="cpu")
    loaded = ifd.compute(**TEXTS, **given(student))
    assert list(named) == list(loaded)
    for name in SCORES:
        assert named[name] == pytest.approx(loaded[name], rel=1e-6)


def test_ifd_of_the_reference_rows_is_the_reference_ifd(load, reference):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in (reference / "reference" / "scores.jsonl").read_text().splitlines()[:10]]
    texts = {f"{name}s": [row[name] for row in rows] for name in ("instruction", "input", "response")}
    folder = reference / "models" / "tiny-student"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    student = given((model, AutoTokenizer.from_pretrained(folder)))
    found = load("ifd").compute(**texts, **student, template="vicuna")
    for name in ("ifd", "r_ifd"):
        assert found[name] == pytest.approx([row[name] for row in rows], rel=1e-3)


def test_pairs_that_cannot_be_scored_are_null_wherever_they_stand(load, student):
    ifd = load("ifd")
    found = ifd.compute(
        instructions=[None, "Why?", "Go on.", ""],
        responses=["Fast.", "42", None, "Rain taps the roof."],
        **given(student),
    )
    assert [value is None for value in found["ifd"]] == [True, False, True, False]
    assert [value is None for value in found["r_ifd"]] == [True, False, True, True]  # nothing to guess in the last
    assert found["scored"] == 1 and found["mean_r_ifd"] == found["r_ifd"][1]
    assert found["mean_ifd"] == pytest.approx((found["ifd"][1] + found["ifd"][3]) / 2)
    none = ifd.compute(instructions=[None], responses=[None], **given(student))
    assert (none["mean_ifd"], none["mean_r_ifd"], none["scored"]) == (None, None, 0)
    assert none["loss_response"] == [None]


def test_pairs_may_come_in_batches(load, student):
    ifd = load("ifd")
    ifd.add(instructions=TEXTS["instructions"][0], responses=TEXTS["responses"][0])
    ifd.add_batch(instructions=TEXTS["instructions"][1:], responses=TEXTS["responses"][1:])
    batches = ifd.compute(inputs=TEXTS["inputs"], **given(student))
    assert batches == ifd.compute(**TEXTS, **given(student))


@pytest.mark.parametrize(
    ("names", "said"),
    [((), "it was given none of them"), (("model",), "given model."), (("model_id", "tokenizer"), "model_id and tok")],
)
def test_ifd_without_exactly_one_student_says_what_it_needs(load, student, names, said):
    arguments = {name: value for name, value in {**given(student), "model_id": "x"}.items() if name in names}
    with pytest.raises(SettingsError, match=f"`ifd` needs one student: `model_id`, or a loaded `model`.*{said}"):
        load("ifd").compute(instructions=["Why?"], responses=["42"], **arguments)


@pytest.mark.parametrize("name", ["ifd", "coherence"])
def test_a_device_for_a_loaded_model_is_refused(load, student, name):
    with pytest.raises(SettingsError, match=r"`device` goes with `model_id`; .* `model.to\(device\)`"):
        arguments = given(student) if name == "ifd" else {"model": object()}
        load(name).compute(instructions=["Why?"], responses=["42"], device="cpu", **arguments)


@pytest.mark.parametrize("name", ["ifd", "coherence"])
@pytest.mark.parametrize(
    ("inputs", "said"), [(["a"], "not 1 of them"), ("ab", "not 'ab'"), (["a", math.nan], "not nan")]
)
def test_inputs_that_do_not_fit_the_pairs_are_refused(load, student, name, inputs, said):
    with pytest.raises(DataError, match=f"`inputs` .* each of the 2 instructions, {said}. Leave it out"):
        load(name).compute(instructions=["a", "b"], responses=["c", "d"], inputs=inputs)


# --- coherence


@pytest.mark.parametrize("how", ["named", "loaded"])
def test_coherence_is_the_cosine_of_instruction_with_input_and_response(load, encoder, how):
    from sentence_transformers import SentenceTransformer

    path = str(encoder / "sbert")
    model = (
        {"model_id": path, "device": "cpu"} if how == "named" else {"model": SentenceTransformer(path, device="cpu")}
    )
    found = load("coherence").compute(
        instructions=[None, "Add the numbers.", "Why?"],
        inputs=["", "17 and 25", None],
        responses=["42", "42", "Fast."],
        **model,
    )
    cosines = [
        test_coherence.naive_cosine(encoder, "Add the numbers.\n17 and 25", "42"),
        test_coherence.naive_cosine(encoder, "Why?", "Fast."),
    ]
    assert found["coherence"][0] is None and found["coherence"][1:] == pytest.approx(cosines, abs=1e-5)
    assert found["mean_coherence"] == pytest.approx(sum(cosines) / 2, abs=1e-5) and found["scored"] == 2


def test_coherence_without_any_pair_to_score_has_no_mean(load, encoder):
    found = load("coherence").compute(instructions=["Why?"], responses=[None], model_id=str(encoder / "sbert"))
    assert found == {"coherence": [None], "mean_coherence": None, "scored": 0}


# --- win_rate


@pytest.mark.parametrize(
    ("log", "counts", "rate"), [("wizardlm", (102, 54, 62), 1.1835), ("vicuna", (44, 15, 21), 1.2875)]
)
def test_published_judgements_give_the_published_counts(load, reference, log, counts, rate):
    reviews = json.loads((reference / "reference" / f"judge_{log}_gpt4.json").read_text())["reviews"]
    found = load("win_rate").compute(
        scores=[review["scores"] for review in reviews],
        scores_reverse=[review["scores_reverse"][::-1] for review in reviews],  # the log has them as they were shown
    )
    assert (found["win"], found["tie"], found["lose"]) == counts and found["unparsed"] == 0
    assert found["win_rate"] == pytest.approx(rate, abs=5e-5)
    assert found["interval"][0] < found["win_rate"] < found["interval"][1]


def naive_outcome(first, second):
    better = [one[0] > one[1] for one in (first, second)]
    worse = [one[0] < one[1] for one in (first, second)]
    if any(better) and not any(worse):
        return "win"
    return "lose" if any(worse) and not any(better) else "tie"


def test_counts_shares_and_interval_are_those_of_a_plain_loop(load):
    chance = random.Random(0)
    scores, scores_reverse = ([[chance.randint(5, 8), chance.randint(4, 8)] for _ in range(200)] for _ in range(2))
    outcomes = [naive_outcome(*both) for both in zip(scores, scores_reverse, strict=True)]
    found = load("win_rate").compute(scores=scores, scores_reverse=scores_reverse, seed=1)
    for name, share in (("win", "share"), ("tie", "tie_share"), ("lose", "lose_share")):
        assert found[name] == outcomes.count(name) and found[share] == pytest.approx(outcomes.count(name) / 200)
    rates = []
    for _ in range(2000):
        drawn = chance.choices(outcomes, k=200)
        rates.append((drawn.count("win") - drawn.count("lose")) / 200 + 1)
    rates.sort()
    assert found["interval"] == pytest.approx((rates[50], rates[1949]), abs=0.02)


@pytest.mark.parametrize("broken", [[], None, [math.nan, math.nan], [8.0, math.nan], [None, None]])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_broken_judgement_is_counted_and_never_a_tie(load, broken, reverse):
    whole, part = [[9, 7], [8, 8], [6, 8]], [broken, [8, 8], [7, 7]]
    scores, scores_reverse = (part, whole) if reverse else (whole, part)
    found = load("win_rate").compute(scores=scores, scores_reverse=scores_reverse)
    assert [found[name] for name in ("win", "tie", "lose", "unparsed", "win_rate")] == [0, 1, 1, 1, 0.5]


def test_nothing_but_broken_judgements_has_no_rate(load):
    found = load("win_rate").compute(scores=[[9, 7]], scores_reverse=[[]])
    rates = ("win_rate", "interval", "share", "share_interval", "tie_share", "lose_share")
    assert found["unparsed"] == 1 and [found[name] for name in rates] == [None] * 6


def test_scores_that_are_no_pair_are_refused(load):
    with pytest.raises(DataError, match=r"found \(\[9.0, 7.0, 8.0\], .* at place 1; .* a pair of scores per order"):
        load("win_rate").compute(scores=[[9, 7], [9, 7, 8]], scores_reverse=[[8, 8], [8, 8]])


# --- the cards

SECTIONS = [
    "# Metric Card for",
    "## Metric Description",
    "## Intended Uses",
    "## How to Use",
    "### Inputs",
    "### Output Values",
    "#### Values from Popular Papers",
    "### Examples",
    "## Limitations and Bias",
    "## Citation",
    "## Further References",
]


def card_of(name):
    return (FOLDER / name / "README.md").read_text()


def section_of(name, heading):
    text = card_of(name).split(f"\n{heading}\n", 1)[1]
    return re.split(r"\n#+ ", text)[0]


@pytest.mark.parametrize("name", NAMES)
def test_each_card_has_the_sections_and_the_citation(load, name):
    import yaml

    _, front, text = card_of(name).split("---\n", 2)
    assert yaml.safe_load(front)["tags"] == ["evaluate", "metric"] and yaml.safe_load(front)["description"]
    headings = re.findall(r"^#+ .*", text, re.M)
    assert headings[0].startswith(SECTIONS[0]) and headings[1:] == SECTIONS[1:]
    assert load(name).citation in section_of(name, "## Citation")


@pytest.mark.parametrize("name", NAMES)
def test_each_card_names_every_argument_and_every_value(load, student, encoder, name):
    metric = load(name)
    if name == "win_rate":
        found = metric.compute(scores=[[9, 7]], scores_reverse=[[8, 8]])
    else:
        model = given(student) if name == "ifd" else {"model_id": str(encoder / "sbert")}
        found = metric.compute(instructions=["Why?"], responses=["42"], **model)
    for heading, names in (
        ("### Inputs", inspect.signature(metric._compute).parameters),
        ("### Output Values", found),
    ):
        assert sorted(re.findall(r"\*\*(\w+)\*\*", section_of(name, heading))) == sorted(names)
        assert all(re.search(rf"\b{one}\b", metric.inputs_description) for one in names)


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_values_in_the_cards_are_the_papers(reference, name):
    tables = json.loads((reference / "reference" / "paper_tables.json").read_text())
    paper = tables["table_4_ablation_vs_srecycled_wizardlm_7b" if name == "win_rate" else "table_6_statistics"]
    columns = {"ifd": ("ifd", "r_ifd"), "coherence": ("coherence",), "win_rate": ("win", "tie", "lose", "win_rate")}
    places = [paper["columns"].index(column) for column in columns[name]]
    lines = section_of(name, "#### Values from Popular Papers").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    rows = {title: values for title, values in paper.items() if title not in ("columns", "student")}
    assert {title: [*map(float, values)] for title, *values in cells} == {
        title: [float(values[place]) for place in places] for title, values in rows.items()
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["card", "docstring"])
def test_the_examples_give_what_they_say(load, models, monkeypatch, name, where):
    monkeypatch.chdir(models)
    code = "\n".join(re.findall(r"```python\n(.*?)```", card_of(name), re.S))
    code = code if where == "card" else load(name).inputs_description
    test = doctest.DocTestParser().get_doctest(code, {}, f"{name}, {where}", None, None)
    said = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert result.failed == 0 and result.attempted >= 5, "".join(said)

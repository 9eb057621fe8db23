"""Answers of a tiny model, against one token at a time; launched, it generates them on this file's own account."""

import json
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from conftest import (
    ROOT,
    TEXTS,
    byte_level_tokenizer,
    chat_tokenizer,
    llama_style_tokenizer,
    load_recipe,
    tiny_llama,
)
from datasets import Dataset
from endpoint import Endpoint
from launching import command, environment, kill_when, launch, on_cpu
from test_templates import naive_encoding, row_of
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from hf_reflect import Teacher
from hf_reflect.errors import DataError, SettingsError, TeacherError
from hf_reflect.evaluation.answers import read_answers
from hf_reflect.evaluation.generation import answers_from_endpoint, generate_answers, join_launch, load_student

WORDS = " ".join(TEXTS).split()
TOKENIZERS = {"vicuna": byte_level_tokenizer, "chat": chat_tokenizer, "alpaca": llama_style_tokenizer}


def asked(count=12, seed=0, **columns):
    """Questions of very different lengths."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.choice((1, 3, 10, 40)))) + f" ({n})" for n in range(count)]
    rows = {"question_id": [f"own/{n}" for n in range(count)], "question": texts, "test_set": ["own"] * count}
    return Dataset.from_dict({**rows, "category": ["b" if n % 2 else "a" for n in range(count)], **columns})


def restless(tokenizer, seed=0, **settings):
    """A model that ends some of its answers within some twenty tokens."""
    model = tiny_llama(len(tokenizer), seed, **settings)
    torch.manual_seed(seed)
    with torch.no_grad():  # a head that finds EOS likely now and then
        model.lm_head.weight[tokenizer.eos_token_id] *= 1.8
    return model


def naive_answer(model, tokenizer, ids, most, pick=lambda logits: logits.argmax()):
    """One token after the other, each from a forward pass over everything before."""
    new = []
    with torch.no_grad():
        while len(new) < most:
            token = int(pick(model(torch.tensor([ids + new])).logits[0, -1]))
            if token == tokenizer.eos_token_id:
                return tokenizer.decode(new, skip_special_tokens=True).strip(), "stop"
            new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True).strip(), "length"


def prompt_ids(tokenizer, template, row, max_length=2048):
    x = row_of(row["question"], "", history=row.get("history") or ())
    return naive_encoding(tokenizer, template, x, max_length)[0]


@pytest.mark.parametrize("template", TOKENIZERS)
def test_answers_of_mixed_lengths_are_those_of_one_question_at_a_time(template):
    tokenizer = TOKENIZERS[template](TEXTS)
    model = restless(tokenizer)
    questions = asked()
    answers = generate_answers(model, tokenizer, questions, template, max_new_tokens=24, batch_size=5)
    expected = [naive_answer(model, tokenizer, prompt_ids(tokenizer, template, row), 24) for row in questions]
    assert list(zip(answers["answer"], answers["finish"], strict=True)) == expected
    assert {"stop", "length"} == set(answers["finish"])  # else one of them was not looked at
    for name in ("question_id", "question", "test_set", "category"):
        assert answers[name][:] == questions[name][:]


def test_earlier_turns_are_seen(student):
    model, tokenizer = restless(student[1]), student[1]
    earlier = [{"role": "user", "content": "Name a tall tree."}, {"role": "assistant", "content": "The spruce."}]
    questions = asked(4).add_column("history", [[], earlier, earlier * 2, []])
    answers = generate_answers(model, tokenizer, questions, "vicuna", max_new_tokens=12)
    expected = [naive_answer(model, tokenizer, prompt_ids(tokenizer, "vicuna", row), 12)[0] for row in questions]
    assert answers["answer"][:] == expected
    alone = generate_answers(model, tokenizer, asked(4), "vicuna", max_new_tokens=12)
    assert alone["answer"][1] != answers["answer"][1] and alone["answer"][0] == answers["answer"][0]


@pytest.mark.parametrize("positions", ["computed", "learned"])
def test_a_long_prompt_gives_way_until_a_quarter_is_left_for_the_answer(positions, student, capsys):
    tokenizer = student[1]
    length = 96
    if positions == "learned":  # past its last position the model would fail
        torch.manual_seed(0)
        shape = {"n_positions": length, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).eval()
    else:
        model = restless(tokenizer, max_position_embeddings=length)
    questions = asked(10)
    answers = generate_answers(model, tokenizer, questions, "plain", max_new_tokens=40, batch_size=10)
    cut = set()
    for row, answer, finish in zip(questions, answers["answer"], answers["finish"], strict=True):
        ids = prompt_ids(tokenizer, "plain", row)
        room = min(40, max(length - len(ids), 24))
        if len(ids) > length - 24:
            ids = prompt_ids(tokenizer, "plain", row, length - 24 + 1)
            cut.add(row["question_id"])
        assert (answer, finish) == naive_answer(model, tokenizer, ids, room)
    assert 0 < len(cut) < 10
    assert f"{len(cut)} of 10 prompts were cut" in capsys.readouterr().err


def test_what_the_model_folder_says_of_generating_plays_no_part(student):
    model, tokenizer = restless(student[1]), student[1]
    plain = generate_answers(model, tokenizer, asked(), max_new_tokens=16)
    config = GenerationConfig(
        repetition_penalty=9.0, do_sample=True, top_k=3, eos_token_id=[5], suppress_tokens=[9, 10]
    )
    model.generation_config = config
    model.train()
    again = generate_answers(model, tokenizer, asked(), max_new_tokens=16)
    assert again["answer"][:] == plain["answer"][:]
    assert model.generation_config is config and model.training


def test_an_adapter_takes_part(student, tmp_path):
    from peft import LoraConfig, get_peft_model

    base, tokenizer = restless(student[1]), student[1]
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    plain = generate_answers(base, tokenizer, asked(5), "vicuna", max_new_tokens=12, output=tmp_path / "a.jsonl")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded, words = load_student(str(tmp_path / "base"), "float32", adapter=str(tmp_path / "adapter"))
    answers = generate_answers(loaded, words, asked(5), "vicuna", max_new_tokens=12, output=tmp_path / "a.jsonl")
    merged = loaded.merge_and_unload()
    expected = [naive_answer(merged, words, prompt_ids(words, "vicuna", row), 12)[0] for row in asked(5)]
    assert answers["answer"][:] == expected != plain["answer"][:]


def test_a_sampled_answer_depends_on_seed_and_question_alone(student):
    model, tokenizer = restless(student[1]), student[1]

    def sampled(questions, **changes):
        settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "batch_size": 5} | changes
        answers = generate_answers(model, tokenizer, questions, **settings)
        return dict(zip(answers["question_id"], answers["answer"], strict=True))

    once = sampled(asked())
    torch.manual_seed(7)
    assert sampled(asked().select(range(11, 2, -1)), batch_size=2) == {i: once[i] for i in list(once)[3:]}
    assert len(set(sampled(asked(), seed=1).items()) & set(once.items())) < 3
    greedy = sampled(asked(), do_sample=False)
    # of each question its own temperature
    mixed = sampled(asked(temperature=[None if n % 3 else 0.8 for n in range(12)]), do_sample=False)
    assert mixed == {i: once[i] if n % 3 == 0 else greedy[i] for n, i in enumerate(once)}


def test_tokens_are_drawn_as_often_as_the_model_says(student):
    model, tokenizer = student
    count, temperature = 4000, 2.0
    rows = {"question_id": [str(n) for n in range(count)], "question": ["Why?"] * count}
    answers = generate_answers(
        *(model, tokenizer, Dataset.from_dict(rows), "plain"),
        **{"max_new_tokens": 1, "do_sample": True, "temperature": temperature, "batch_size": 500},
    )
    ids = prompt_ids(tokenizer, "plain", {"question": "Why?"})
    with torch.no_grad():
        likely = (model(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1).tolist()
    expected = Counter()  # several tokens may read alike
    for token, share in enumerate(likely):
        expected["" if token == tokenizer.eos_token_id else tokenizer.decode([token]).strip()] += share
    found = Counter(answers["answer"])
    assert set(found) <= set(expected) and len(found) > 50
    often = {text: share for text, share in expected.items() if share * count >= 20}
    assert len(often) > 10
    for text, share in often.items():
        assert abs(found[text] - share * count) < 4.5 * math.sqrt(share * count)


def test_the_file_has_the_order_of_the_questions_and_a_second_call_only_reads_it(student, tmp_path, capsys):
    model, tokenizer = restless(student[1]), student[1]
    output = tmp_path / "new" / "answers.jsonl"
    answers = generate_answers(model, tokenizer, asked(), max_new_tokens=12, output=output, name="tiny")
    assert sorted(path.name for path in output.parent.iterdir()) == ["answers.jsonl"]
    read = read_answers(output)
    for name in ("question_id", "question", "category", "test_set", "answer", "model"):
        assert read[name][:] == answers[name][:]
    assert set(read["model"]) == {"tiny"} and read["question_id"][:] == asked()["question_id"][:]
    capsys.readouterr()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    rows[4]["answer"] = "kept"  # no model says this
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = generate_answers(model, tokenizer, asked(), max_new_tokens=12, output=output, batch_size=3)
    assert (
        again["answer"][4] == "kept" and capsys.readouterr().err == f"{output}: 12 of 12 answers are there and kept.\n"
    )
    assert again["answer"][5:] == answers["answer"][5:]
    more = generate_answers(model, tokenizer, asked(14), max_new_tokens=12, output=output)
    assert more["answer"][4] == "kept" and len(read_answers(output)) == 14
    assert "12 of 14 answers are there and kept.\nGenerated 2 answers.\n" in capsys.readouterr().err


def test_what_was_done_before_an_error_is_kept_though_a_line_was_cut(student, tmp_path, capsys):
    model, tokenizer = restless(student[1]), student[1]
    output, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part-0"
    whole = generate_answers(model, tokenizer, asked(6), max_new_tokens=8)

    def fail(module, args):
        if part.exists():  # the first batch is done
            raise MemoryError

    hook = model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        generate_answers(model, tokenizer, asked(6), max_new_tokens=8, batch_size=2, output=output)
    hook.remove()
    assert part.read_text().count("\n") == 2 and not output.exists()
    part.write_text(part.read_text()[:-20])
    capsys.readouterr()
    again = generate_answers(model, tokenizer, asked(6), max_new_tokens=8, batch_size=1, output=output)
    assert capsys.readouterr().err == f"{output}: 1 of 6 answers are there and kept.\nGenerated 5 answers.\n"
    assert again["answer"][:] == whole["answer"][:] and not part.exists()


OTHERS = {
    "weights": lambda model, tokenizer: (tiny_llama(len(tokenizer), seed=1), {}),
    "model": lambda model, tokenizer: (tiny_llama(len(tokenizer), rope_theta=5e5), {}),
    "template": lambda model, tokenizer: (model, {"template": "alpaca"}),
    "room": lambda model, tokenizer: (model, {"max_new_tokens": 5}),
    "sampling": lambda model, tokenizer: (model, {"do_sample": True}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_answers_of_other_settings_are_replaced_and_it_is_said(what, student, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    settings = {"template": "vicuna", "max_new_tokens": 6}
    generate_answers(*student, asked(4), **settings, output=output)
    assert "will be replaced" not in capsys.readouterr().err
    other, changes = OTHERS[what](*student)
    with pytest.raises(SettingsError, match="holds 4 answers of other settings"):
        generate_answers(other, student[1], asked(4), **settings | changes, output=output, replace=False)
    again = generate_answers(other, student[1], asked(4), **settings | changes, output=output)
    said = capsys.readouterr().err
    assert "4 answers of other settings (model, template, sampling, lengths) or to other questions" in said
    assert "Generated 4 answers." in said
    alone = generate_answers(other, student[1], asked(4), **settings | changes)
    assert again["answer"][:] == alone["answer"][:] == read_answers(output)["answer"][:]


def test_a_file_that_was_not_generated_here_is_left_as_it_is(student, tmp_path):
    output = tmp_path / "answers.jsonl"
    output.write_text('{"question_id": "1", "question": "Why?", "answer": "Because."}\n')
    with pytest.raises(DataError, match="was not generated here .*Name another `output`"):
        generate_answers(*student, asked(4), output=output)
    assert output.read_text().count("Because") == 1 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` is a whole number, at least 1, not 0"),
        ({"batch_size": 2.0}, "`batch_size` is a whole number, at least 1, not 2.0"),
        ({"max_length": 0}, "`max_length` is a whole number, at least 1, not 0"),
        ({"max_length": 20, "template": "vicuna"}, "leaves no room"),
        ({"do_sample": True, "temperature": 0}, "`do_sample` needs a temperature above 0"),
        ({"template": "chat"}, "needs a tokenizer with a chat template"),
        ({"model": torch.nn.Linear(2, 2)}, "must be a causal language model"),
        ({"questions": asked(2).remove_columns("question")}, "needs the column 'question'"),
        ({"questions": asked(2).select([])}, "was given no question"),
        ({"questions": asked(2).select([0, 1, 0])}, "hold 1 question more than once: 'own/0'"),
        ({"questions": Dataset.from_dict({"question_id": ["a"], "question": [None]})}, "'a' is None, not a text"),
        ({"questions": asked(1, history=[[{"role": "user", "content": "Hm."}]])}, "'own/0' has the roles ['user']"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_said(changes, words, student):
    model, tokenizer = student
    arguments = {"model": model, "tokenizer": tokenizer, "questions": asked(2)} | changes
    with pytest.raises((DataError, SettingsError), match=re.escape(words)):
        generate_answers(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"model": "./nowhere"}, {"adapter": "./nowhere"}], ids=lambda value: next(iter(value))
)
def test_a_model_that_is_not_there_is_named(arguments, student, tmp_path):
    for part in student:
        part.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"'\./nowhere' cannot be loaded"):
        load_student(**{"model": str(tmp_path)} | arguments)


def echoing(request):
    return f"You said: {request['messages'][-1]['content']} "


@pytest.fixture
def tuned(tmp_path):
    with Endpoint(echoing, models=("tuned",)) as server:
        server.teacher = Teacher("tuned", base_url=server.url, ledger=str(tmp_path / "l.sqlite"), max_tokens=99)
        yield server


def test_a_model_behind_an_endpoint_is_asked_in_chats_and_once(tuned):
    earlier = [{"role": "user", "content": "Name a tall tree."}, {"role": "assistant", "content": "The spruce."}]
    questions = asked(4, history=[[], earlier, [], []], temperature=[None, 0.5, 0.0, 0.7])
    answers = answers_from_endpoint(questions, tuned.teacher, system="Be brief.", name="mine")
    assert answers["answer"][:] == [f"You said: {text}" for text in questions["question"]]
    assert set(answers["model"]) == {"mine"} and set(answers["finish"]) == {"stop"} and set(answers["error"]) == {None}
    assert answers["category"][:] == questions["category"][:]
    sent = {request["messages"][-1]["content"]: request for request in tuned.requests}
    for row in questions:
        request = sent[row["question"]]
        opening = [{"role": "system", "content": "Be brief."}, *row["history"]]
        assert request["messages"] == [*opening, {"role": "user", "content": row["question"]}]
        assert request["temperature"] == (row["temperature"] or 0) and request["max_tokens"] == 99
    assert answers_from_endpoint(questions, tuned.teacher, "Be brief.", "mine")["answer"][:] == answers["answer"][:]
    assert len(tuned.requests) == 4


def test_missing_answers_are_refused_with_how_many_and_why_and_asked_for_again(tuned):
    faults = {
        "(0)": {"status": 400, "body": {"error": {"message": "too long for me"}}},
        "(1)": {"text": "Half a", "finish_reason": "length"},
        "(2)": {"text": "", "finish_reason": "length"},
        "(3)": {"status": 400, "body": {"error": {"message": "policy", "code": "content_filter"}}},
    }
    tuned.answer = lambda request: faults.get(request["messages"][-1]["content"][-3:], echoing(request))
    with pytest.raises(TeacherError) as raised:
        answers_from_endpoint(asked(6), tuned.teacher)
    assert "3 of 6 questions have no answer (" in str(raised.value) and "too long for me" in str(raised.value)
    for count in ("teacher 1", "truncated 1", "refused 1"):
        assert count in str(raised.value)
    answers = answers_from_endpoint(asked(6), tuned.teacher, allow_missing=True)
    assert [answer is None for answer in answers["answer"]] == [True, False, True, True, False, False]
    assert answers["answer"][1] == "Half a" and answers["finish"][1] == "length"
    assert [error and error.split(":")[0] for error in answers["error"]] == [
        *("teacher", None, "truncated", "refused", None, None)
    ]
    tuned.answer = echoing
    asked_before = len(tuned.requests)
    answers_from_endpoint(asked(6), tuned.teacher, allow_missing=True)
    assert len(tuned.requests) - asked_before == 2  # what failed, and what was filtered, may come another time


RECIPE = "recipes/generate.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student on disk, and two test sets."""
    folder = tmp_path_factory.mktemp("generation")
    tokenizer = byte_level_tokenizer(TEXTS)
    restless(tokenizer).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    for name, count in (("few", 5), ("many", 40)):
        rows = [{"id": n, "question": text} for n, text in enumerate(asked(count, seed=count)["question"])]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def arguments(folder, tmp_path):
    """`arguments(**changes)`: those of a run of the recipe, on a configuration of its own."""

    def write(**changes):
        settings = {"output": str(tmp_path / "answers.jsonl"), "model": str(folder / "student"), "dtype": "float32"}
        settings |= {"test_sets": {"few": str(folder / "few.jsonl")}, "template": "vicuna", "max_new_tokens": 16}
        settings |= {"max_length": 512, "batch_size": 2} | changes
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
        return ("--config", path)

    return write


def test_the_recipe_answers_test_sets_with_python(arguments, folder, tmp_path):
    sets = {name: str(folder / f"{name}.jsonl") for name in ("few", "many")}
    done = launch(RECIPE, *arguments(batch_size=16), "--test_sets", json.dumps(sets))
    answers = read_answers(tmp_path / "answers.jsonl")
    assert "answers    45: few 5, many 40" in done.stdout and "processes  1" in done.stdout
    assert answers["question_id"][:] == [f"few/{n}" for n in range(5)] + [f"many/{n}" for n in range(40)]
    model, tokenizer = load_student(str(folder / "student"))
    for row in answers.select(range(0, 45, 9)):
        assert row["answer"] == naive_answer(model, tokenizer, prompt_ids(tokenizer, "vicuna", row), 16)[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"endpoint_model": "tuned"}, "Name either `model`"),
        ({"model": None}, "Name either `model`"),
        ({"template": "vikuna"}, "`template='vikuna'` is unknown"),
        ({"test_sets": "{few"}, "`test_sets` is a mapping"),
        ({"test_sets": {"few": "no/file.jsonl"}}, "'no/file.jsonl' does not exist"),
        ({"model": "./no-student"}, "'./no-student' cannot be loaded"),
        ({"model": None, "endpoint_model": "tuned"}, "needs an API key"),
    ],
    ids=str,
)
def test_arguments_that_do_not_go_together_are_named(arguments, changes, words, monkeypatch):
    module = load_recipe(monkeypatch, "generate")
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments(**changes))])
    with pytest.raises((SettingsError, DataError, TeacherError), match=re.escape(words)):
        module.main()


def test_the_recipe_asks_an_endpoint_in_one_process_and_goes_on_by_its_ledger(arguments, tuned, tmp_path, monkeypatch):
    module = load_recipe(monkeypatch, "generate")
    settings_of = {"model": None, "endpoint_model": "tuned", "base_url": tuned.url, "temperature": 0.3}
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments(**settings_of))])
    for _ in range(2):
        module.main()
        assert read_answers(tmp_path / "answers.jsonl")["answer"][0].startswith("You said: ")
        assert len(tuned.requests) == 5
    assert {(request["temperature"], request["max_tokens"]) for request in tuned.requests} == {(0.3, 16)}
    by_hand = '{"question": "Why?", "answer": "Because."}\n'
    for path, content, words in (
        ("answers.jsonl", None, "holds answers of tuned, not of other behind an endpoint"),
        ("own.jsonl", by_hand, "holds answers of somebody else"),
    ):
        if content:
            (tmp_path / path).write_text(content)
        before = (tmp_path / path).read_text()
        line = arguments(**settings_of | {"name": "other", "output": str(tmp_path / path)})
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, line)])
        with pytest.raises(SettingsError, match=words):
            module.main()
        assert (tmp_path / path).read_text() == before
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, line), "--overwrite", "true"])
    module.main()
    assert set(read_answers(tmp_path / path)["model"]) == {"other"}
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="is asked by one process"):
        module.main()


def test_the_configuration_fits_its_recipe(monkeypatch):
    module, path = load_recipe(monkeypatch, "generate"), ROOT / "recipes" / "generate.yaml"
    assert path.read_text().startswith(
        "# accelerate launch --config_file accelerate_configs/ddp.yaml recipes/generate"
    )
    monkeypatch.setattr(sys, "argv", ["generate"])
    types = (module.GenerationArguments, module.EndpointArguments)
    asked, endpoint = module.parse_arguments(types, str(path.with_suffix(".py")))
    assert asked.template == "vicuna" and endpoint.temperature == 0 and asked.model is not None


def report(folder, output):
    """On every process of a launch: generate, and write what this and the others saw."""
    from accelerate.utils import gather_object

    state = join_launch(use_cpu=True)
    model, tokenizer = load_student(f"{folder}/student", "float32")
    shapes = []
    generate = model.generate
    model.generate = lambda **given: shapes.append(list(given["input_ids"].shape)) or generate(**given)
    answers = generate_answers(model, tokenizer, asked(11), "vicuna", max_new_tokens=16, batch_size=2)
    result = {
        "processes": state.num_processes,
        "distributed_type": state.distributed_type.value,
        "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
        "answers": gather_object([answers["answer"][:]]),
        "shapes": gather_object([shapes]),
    }
    if state.is_main_process:
        Path(output).write_text(json.dumps(result))
    state.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_batches_and_hold_the_table_of_one(folder, tmp_path):
    launch("tests/test_generation.py", folder, tmp_path / "two.json", config=on_cpu("ddp", tmp_path))
    result = json.loads((tmp_path / "two.json").read_text())
    assert (result["processes"], result["distributed_type"], result["backend"]) == (2, "MULTI_CPU", "gloo")
    first, second = result["shapes"]
    assert (len(first), len(second)) == (3, 3) and sorted(size for size, _ in first + second) == [1, 2, 2, 2, 2, 2]
    assert [length for _, length in first] == sorted((length for _, length in first), reverse=True)
    model, tokenizer = load_student(str(folder / "student"))
    expected = [naive_answer(model, tokenizer, prompt_ids(tokenizer, "vicuna", row), 16)[0] for row in asked(11)]
    assert result["answers"] == [expected, expected]


@pytest.mark.slow
def test_a_killed_launch_goes_on_with_another_number_of_processes_and_asks_nothing_twice(arguments, folder, tmp_path):
    many = {"test_sets": {"many": str(folder / "many.jsonl")}, "max_new_tokens": 200, "batch_size": 1}
    whole = tmp_path / "whole.jsonl"
    launch(RECIPE, *arguments(**many, output=str(whole)))
    output, kept = tmp_path / "answers.jsonl", {}
    parts = [Path(f"{output}.part-{rank}") for rank in (0, 1)]

    def ready():
        return all(path.exists() and path.read_bytes().count(b"\n") >= 3 for path in parts)

    line = command(RECIPE, *arguments(**many), config=on_cpu("ddp", tmp_path))
    _, code = kill_when(ready, line, rank=1, env=environment())
    assert code != 0 and not output.exists()
    for path in parts:  # no model says this: where it comes back, it was not generated again
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept |= {row["made_with"]: f"kept {path.suffix} {n}" for n, row in enumerate(rows)}
        path.write_text("".join(json.dumps(row | {"answer": kept[row["made_with"]]}) + "\n" for row in rows) + '{"an')
    assert 6 <= len(kept) < 40
    done = launch(RECIPE, *arguments(**many))
    assert f"{len(kept)} of 40 answers are there and kept" in done.stderr
    assert f"Generated {40 - len(kept)} answers" in done.stderr
    assert not any(path.exists() for path in parts)
    found, expected = ([json.loads(line) for line in path.read_text().splitlines()] for path in (output, whole))
    assert found == [row | {"answer": kept.get(row["made_with"], row["answer"])} for row in expected]


if __name__ == "__main__":
    report(*sys.argv[1:])

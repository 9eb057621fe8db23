import ast
import os
import pickle
import random
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import ROWS, scripted_teacher
from datasets import ClassLabel, Dataset, Features, List, Value
from endpoint import Endpoint, rewriting

import hf_reflect
from hf_reflect import PROMPTS, ReflectionTransform, Reply, Teacher, to_pairs
from hf_reflect.columns import SCORE_COLUMNS
from hf_reflect.errors import DataError, SettingsError, TeacherError
from hf_reflect.pairs import PAIR_FEATURES
from hf_reflect.reflection import estimate_recycling

VARIANTS = ["original", "response", "instruction", "instruction+response"]  # as they stand below each other
BLANK = dict.fromkeys(("instruction", "response", "critique"))


def reflected(pairs, teacher, *parts, **options):
    for part in parts or ("instruction", "response"):
        pairs = pairs.map(ReflectionTransform(teacher, part, **options), batched=True, load_from_cache_file=False)
    return pairs


def asked_for(request):
    """Which reflection a request asks for, and of which instruction."""
    asked = request["messages"][-1]["content"]
    part = "instruction" if "[New Instruction]" in asked else "response"
    return part, asked.split("[Instruction]\n", 1)[1].split("\n", 1)[0]


def answering(special):
    """An endpoint's answer: special ones by (part, instruction), else a usable rewrite."""

    def answer(request):
        return special.get(asked_for(request)) or rewriting(request)

    return answer


def test_every_row_becomes_four_with_each_rewrite_right_below_its_parent(pairs, teacher, endpoint):
    first = reflected(pairs, teacher, "instruction")
    assert list(first["variant"]) == ["original", "instruction"] * 8
    table = reflected(first, teacher, "response")
    assert list(table["variant"]) == VARIANTS * 8
    assert list(table["row_id"]) == [row_id for row_id in pairs["row_id"] for _ in range(4)]
    assert list(table["source"]) == ["", "teacher", "teacher", "teacher"] * 8
    assert table.column_names == pairs.column_names
    assert table.features == pairs.features == PAIR_FEATURES
    assert table.filter(lambda row: row["variant"] == "original").to_list() == pairs.to_list()
    assert set(table["error"]) == {None}
    assert len(endpoint.requests) == 3 * 8
    assert {key: teacher.stats[key] for key in ("asked", "reused", "failed")} == {
        "asked": 24,
        "reused": 0,
        "failed": 0,
    }


def test_rewrites_hold_what_the_teacher_wrote(pairs, teacher):
    table = reflected(pairs, teacher)
    for number in range(8):
        original, response, instruction, both = table.select(range(4 * number, 4 * number + 4)).to_list()
        pair = {name: original[name] for name in ("instruction", "response", "input", "history")}
        said = PROMPTS["instruction"].parse(rewriting({"messages": PROMPTS["instruction"].chat(**pair)}))
        assert (instruction["instruction"], instruction["response"]) == (said.instruction, said.response)
        assert (instruction["critique"], instruction["input"]) == ("1. The instruction is vague.", "")
        assert instruction["instruction"].startswith("Explain step by step")
        assert instruction["response"].startswith("First, think about")

        said = PROMPTS["response"].parse(rewriting({"messages": PROMPTS["response"].chat(**pair)}))
        assert response["response"] == said.response != original["response"]
        assert (response["instruction"], response["input"]) == (original["instruction"], original["input"])
        assert response["critique"] == "The answer lacks detail."

        pair = {name: instruction[name] for name in pair}
        said = PROMPTS["response"].parse(rewriting({"messages": PROMPTS["response"].chat(**pair)}))
        assert (both["instruction"], both["input"]) == (instruction["instruction"], "")
        assert both["response"] == said.response
    assert sum(text != "" for text in table["input"]) == 2 * sum(row["input"] != "" for row in ROWS)


def test_requests_carry_the_prompts_and_the_defaults_of_the_papers(pairs, teacher, endpoint):
    reflected(pairs.select([1]), teacher, "instruction")
    (request,) = endpoint.requests
    row = ROWS[1]
    assert request["messages"] == PROMPTS["instruction"].chat(row["instruction"], row["output"], row["input"])
    assert f"[The Start of Input]\n{row['input']}\n[The End of Input]" in request["messages"][1]["content"]
    assert {k: request[k] for k in ("model", "temperature", "top_p", "max_tokens")} == {
        "model": "teacher", "temperature": 0, "top_p": 1, "max_tokens": 2048,
    }  # fmt: skip


def test_equal_chats_are_asked_once(teacher, endpoint):
    table = reflected(to_pairs(Dataset.from_list(ROWS[:2] * 3)), teacher)
    assert len(endpoint.requests) == 3 * 2
    assert len(table) == 4 * 6 and set(table["error"]) == {None}
    assert len(set(zip(table["row_id"], table["variant"], strict=True))) == 24


GOOD = "[New Instruction] Why? [End] [New Answer] Because. [End]"
UNUSABLE = {
    "truncated": {"text": GOOD, "finish_reason": "length"},
    "refused": {"text": "I'm sorry, but I can't help with that."},
    "refused by a filter": {"text": "", "finish_reason": "content_filter"},
    "unparsed": {"text": "What a nice instruction."},
    "unparsed, empty": {"text": "   "},
    "placeholder": {"text": "[New Instruction] your instruction [End] [New Answer] your answer [End]"},
    "unchanged": {"text": f"[New Instruction]  {ROWS[2]['instruction']} [End] [New Answer] The sum is 42. [End]"},
    "teacher": {"status": 400, "body": {"error": {"message": "This prompt is too long."}}},
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_unusable_instruction_keeps_its_row_and_its_child_is_not_asked(case, pairs, teacher, endpoint):
    endpoint.answer = answering({("instruction", ROWS[2]["instruction"]): UNUSABLE[case]})
    table = reflected(pairs, teacher)
    code = case.split()[0].rstrip(",")
    assert list(table["variant"]) == VARIANTS * 8
    original, response, instruction, both = table.select(range(8, 12)).to_list()
    assert original["error"] is None and response["error"] is None and response["response"]
    assert instruction["instruction"] is None and instruction["response"] is None
    assert instruction["error"].startswith(f"{code}: ")
    assert both["instruction"] is None and both["response"] is None
    assert both["error"].startswith("parent: ") and instruction["error"] in both["error"]
    assert sum(error is not None for error in table["error"]) == 2
    assert len(endpoint.requests) == 3 * 8 - 1
    if case == "teacher":
        assert "This prompt is too long." in instruction["error"]


@pytest.mark.parametrize("case", ["truncated", "refused", "unparsed", "placeholder", "unchanged", "teacher"])
def test_an_unusable_response_keeps_its_row(case, pairs, teacher, endpoint):
    words = {
        "placeholder": "[Better Answer] your answer [End]",
        "unchanged": f"[Better Answer]{ROWS[2]['output']}[End]",
    }
    reply = UNUSABLE[case] | ({"text": words[case]} if case in words else {})
    endpoint.answer = answering({("response", ROWS[2]["instruction"]): reply})
    table = reflected(pairs, teacher)
    original, response, instruction, both = table.select(range(8, 12)).to_list()
    assert response["instruction"] is None and response["response"] is None
    assert response["error"].startswith(f"{case}: ")
    assert {original["error"], instruction["error"], both["error"]} == {None} and both["response"]


def test_what_was_said_before_an_unusable_rewrite_is_kept(pairs, teacher, endpoint):
    said = "It is too short.\n\n" + UNUSABLE["unchanged"]["text"]
    endpoint.answer = answering({("instruction", ROWS[2]["instruction"]): said})
    assert reflected(pairs, teacher, "instruction")["critique"][5] == "It is too short."


def test_past_the_budget_rows_stay_and_their_children_are_not_asked(pairs, endpoint, tmp_path):
    teacher = Teacher("teacher", endpoint.url, ledger=tmp_path / "ledger", max_requests=3, max_concurrency=1)
    table = reflected(pairs, teacher)
    codes = [None if error is None else error.split(":")[0] for error in table["error"]]
    assert codes[2::4] == [None] * 3 + ["budget"] * 5
    assert codes[3::4] == ["budget"] * 3 + ["parent"] * 5
    assert len(endpoint.requests) == 3
    richer = Teacher("teacher", endpoint.url, ledger=tmp_path / "ledger")
    assert set(reflected(pairs, richer)["error"]) == {None}
    assert len(endpoint.requests) == 24


def test_an_unusable_original_is_not_asked_and_its_child_says_so(pairs, teacher, endpoint):
    rows = pairs.to_list()
    rows[3] |= {"response": None, "error": "check: too old"}
    table = reflected(Dataset.from_list(rows, features=pairs.features), teacher, "instruction")
    assert table[7]["error"].startswith("parent: ") and "check: too old" in table[7]["error"]
    assert table[6] == rows[3]
    assert len(endpoint.requests) == 7


def test_without_parents_rows_are_rewritten_in_place(pairs, teacher, endpoint):
    special = {(part, ROWS[2]["instruction"]): UNUSABLE["refused"] for part in ("instruction", "response")}
    endpoint.answer = answering(special)
    table = reflected(pairs, teacher, keep_parent=False)
    whole = reflected(pairs, teacher)
    assert table.features == pairs.features and list(table["row_id"]) == list(pairs["row_id"])
    for number, row in enumerate(table):
        if number == 2:
            assert row == pairs[2] | {"error": row["error"]}
            assert row["error"].startswith("refused: ")
        else:
            assert row == whole[4 * number + 3]


@pytest.mark.parametrize("case", ["teacher", "unchanged", "truncated"])
def test_in_place_a_row_keeps_what_it_had_where_only_the_second_rewrite_fails(case, pairs, teacher, endpoint):
    once = reflected(pairs, teacher, "instruction", keep_parent=False)
    reply = UNUSABLE[case] | ({"text": f"[Better Answer] {once[2]['response']} [End]"} if case == "unchanged" else {})
    endpoint.answer = answering({("response", once[2]["instruction"]): reply})
    row = reflected(once, teacher, "response", keep_parent=False)[2]
    names = ("variant", "source", "instruction", "input", "response", "critique")
    assert {name: row[name] for name in names} == {name: once[2][name] for name in names}
    assert row["error"].startswith(f"{case}: ")


def test_other_columns_travel_along_with_their_types(rows, teacher):
    more = {
        "topic": (ClassLabel(names=["geography", "other"]), [0, 1] * 4),
        "tags": (List(Value("string")), [["a"], None, [], ["b", "c"]] * 2),
        "meta": (
            {"year": Value("int16"), "where": {"url": Value("string")}},
            [{"year": 3, "where": {"url": None}}] * 8,
        ),
        "seen": (Value("timestamp[us]"), [datetime(2024, 2, 29, 12, n, 0, 7) for n in range(8)]),
        "weight": (Value("float32"), [0.1, None] * 4),
        "nothing": (Value("null"), [None] * 8),
        "big": (Value("large_string"), ["x"] * 8),
    }
    values = {name: rows[name][:] for name in rows.column_names} | {name: column for name, (_, column) in more.items()}
    features = Features({**rows.features, **{name: kind for name, (kind, _) in more.items()}})
    pairs = to_pairs(Dataset.from_dict(values, features=features))
    for table, copies in (
        (reflected(pairs, teacher), 4),
        (reflected(pairs, teacher, keep_parent=False), 1),
        (reflected(pairs.with_format("arrow"), teacher).with_format(None), 4),
    ):
        assert table.features == pairs.features
        for name in more:
            assert list(table[name]) == [value for value in pairs[name] for _ in range(copies)], name


def test_a_dataset_in_arrow_format_gives_the_same_table(pairs, teacher):
    plain = reflected(pairs, teacher)
    formatted = reflected(pairs.with_format("arrow"), teacher)
    assert formatted.with_format(None).to_list() == plain.to_list()
    assert formatted.features == plain.features


def test_scores_of_the_parent_are_not_those_of_its_rewrite(pairs, teacher, endpoint):
    endpoint.answer = answering({("response", ROWS[2]["instruction"]): UNUSABLE["refused"]})
    names = (*SCORE_COLUMNS, "coherence")
    for name in names:
        pairs = pairs.add_column(name, [0.25 + n for n in range(8)])
    table = reflected(pairs, teacher, "response")
    in_place = reflected(pairs, teacher, "response", keep_parent=False)
    for name in names:
        assert list(table[name]) == [value for n in range(8) for value in (0.25 + n, None)]
        assert table.features[name] == in_place.features[name] == Value("float64")
        # where the text stayed its scores still hold
        assert list(in_place[name]) == [2.25 if n == 2 else None for n in range(8)]


def test_the_teacher_sees_the_turns_before(teacher, endpoint):
    turns = [
        ("system", "Be brief."),
        ("user", "Hi!"),
        ("assistant", "Hello."),
        ("user", "Name a tree."),
        ("assistant", "Oak."),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    table = reflected(to_pairs(Dataset.from_list([{"messages": messages}])), teacher, "response")
    (request,) = endpoint.requests
    assert request["messages"][1]["content"].startswith(
        "[The Start of Conversation]\nSYSTEM: Be brief.\nUSER: Hi!\nASSISTANT: Hello.\n[The End of Conversation]\n\n"
        "[Instruction]\nName a tree.\n\n[The Start of Answer]\nOak.\n[The End of Answer]\n"
    )
    assert table["history"][0] == table["history"][1] == messages[:3]


def test_a_map_after_prefetch_asks_nothing_more(pairs, teacher, endpoint):
    for part, calls in (("instruction", 8), ("response", 16)):
        endpoint.requests.clear()
        transform = ReflectionTransform(teacher, part)
        did = transform.prefetch(pairs)
        assert {name: did[name] for name in ("asked", "reused", "failed")} == {
            "asked": calls,
            "reused": 0,
            "failed": 0,
        }
        assert did["prompt_tokens"] > 0 and did["completion_tokens"] > 0
        assert len(endpoint.requests) == calls
        pairs = pairs.map(transform, batched=True, batch_size=3, load_from_cache_file=False)
        assert len(endpoint.requests) == calls
        assert transform.prefetch(pairs.filter(lambda row: row["variant"] == "original"))["asked"] == 0
    assert list(pairs["variant"]) == VARIANTS * 8 and set(pairs["error"]) == {None}


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_the_table_does_not_depend_on_the_size_of_batches(batch_size, pairs, teacher):
    whole = reflected(pairs, teacher).to_list()
    for part in ("instruction", "response"):
        transform = ReflectionTransform(teacher, part)
        pairs = pairs.map(transform, batched=True, batch_size=batch_size, load_from_cache_file=False)
    assert pairs.to_list() == whole


def test_a_second_run_asks_nothing_and_an_edited_row_only_its_own_calls(rows, teacher, endpoint):
    first = reflected(to_pairs(rows), teacher).to_list()
    endpoint.requests.clear()
    again = Teacher("teacher", base_url=endpoint.url, ledger=teacher.ledger)
    assert reflected(to_pairs(rows), again).to_list() == first
    assert endpoint.requests == [] and again.stats["reused"] == 24

    edited = rows.to_list()
    edited[5]["output"] = "Swift."
    table = reflected(to_pairs(Dataset.from_list(edited)), again).to_list()
    asked = [asked_for(request) for request in endpoint.requests]
    assert sorted(part for part, _ in asked) == ["instruction", "response", "response"]
    assert [row for n, row in enumerate(table) if n // 4 != 5] == [row for n, row in enumerate(first) if n // 4 != 5]


def test_a_failed_request_is_asked_again_by_the_next_run(pairs, teacher, endpoint):
    endpoint.answer = answering({("instruction", ROWS[2]["instruction"]): UNUSABLE["teacher"]})
    reflected(pairs, teacher)
    endpoint.requests.clear()
    endpoint.answer = rewriting
    assert set(reflected(pairs, teacher)["error"]) == {None}
    assert len(endpoint.requests) == 2


def test_a_plain_function_may_be_the_teacher(pairs):
    table = reflected(pairs, scripted_teacher)
    assert list(table["variant"]) == VARIANTS * 8 and set(table["error"]) == {None}
    assert set(table["source"]) == {"", "scripted_teacher"}
    transform = ReflectionTransform(scripted_teacher, "instruction")
    assert set(transform.prefetch(pairs).values()) == {0}
    with pytest.raises(SettingsError, match="Only a `Teacher` can estimate"):
        transform.estimate(pairs)


def test_two_sources_stand_side_by_side_and_each_reflects_on_its_own(pairs, tmp_path):
    with Endpoint(models=("small", "large")) as endpoint:
        small, large = (
            Teacher(model, base_url=endpoint.url, ledger=tmp_path / "ledger") for model in ("small", "large")
        )
        table = reflected(pairs, small, "instruction")
        table = reflected(table, large, "instruction")
        assert list(zip(table["variant"], table["source"], strict=True)) == [
            ("original", ""), ("instruction", "large"), ("instruction", "small"),
        ] * 8  # fmt: skip
        table = reflected(table, small, "response")
        assert len(table) == 5 * 8
        table = reflected(table, large, "response")
    keys = set(zip(table["row_id"], table["variant"], table["source"], strict=True))
    assert len(table) == len(keys) == 7 * 8 and set(table["error"]) == {None}
    for source in ("small", "large"):
        own = table.filter(lambda row, source=source: row["source"] in ("", source))
        assert list(own["variant"]) == VARIANTS * 8
        assert all(own[4 * n + 3]["instruction"] == own[4 * n + 2]["instruction"] for n in range(8))
    assert len(endpoint.requests) == 2 * 3 * 8
    assert {request["model"] for request in endpoint.requests} == {"small", "large"}


@pytest.mark.parametrize("part", ["instruction", "response"])
@pytest.mark.parametrize("batch_size", [1, 1000])
def test_reflecting_twice_by_the_same_source_is_refused(part, batch_size, pairs, teacher, endpoint):
    table = reflected(pairs, teacher)
    again = ReflectionTransform(teacher, part)
    with pytest.raises(SettingsError, match=f"already has a version.*{part}.*by 'teacher'.*source='second'"):
        table.map(again, batched=True, batch_size=batch_size, load_from_cache_file=False)
    second = reflected(table, teacher, part, source="second")
    assert len(second) == 5 * 8
    assert len(endpoint.requests) == 24  # the same model and settings: the same replies


def test_a_table_without_source_history_and_critique_has_one_source(pairs, teacher):
    table = reflected(pairs.remove_columns(["source", "history", "critique"]), teacher)
    assert {name: table.features[name] for name in PAIR_FEATURES} == dict(PAIR_FEATURES)
    assert table.select_columns(list(PAIR_FEATURES)).to_list() == reflected(pairs, teacher).to_list()


def test_a_missing_column_is_named(pairs, teacher):
    for name in ("row_id", "variant", "instruction", "input", "response", "error"):
        with pytest.raises(DataError, match=f"needs the column '{name}'"):
            reflected(pairs.remove_columns(name), teacher, "instruction")
        with pytest.raises(DataError, match=f"needs the column '{name}'"):
            ReflectionTransform(teacher, "instruction").prefetch(pairs.remove_columns(name))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"part": "answer"}, "'answer'"),
        ({"part": "response", "source": ""}, 'cannot be ""'),
        ({"part": "response", "prompt": "response-json"}, "`PROMPTS` has instruction, response, instruction-json"),
        ({"part": "response", "prompt": PROMPTS["instruction"]}, "needs a prompt whose replies bring response;"),
        ({"part": "instruction", "prompt": PROMPTS["response-json"]}, "bring instruction and response; this"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, words):
    with pytest.raises(SettingsError, match=words):
        ReflectionTransform(scripted_teacher, **options)


def test_a_check_that_answers_yes_or_no_is_refused_at_the_first_reply(endpoint, teacher, pairs):
    transform = ReflectionTransform(teacher, "response", accept=lambda parent, rewrite: len(rewrite["response"]) > 3)
    with pytest.raises(SettingsError, match="`accept` returned True"):
        pairs.map(transform, batched=True, load_from_cache_file=False)


def test_a_check_that_runs_out_of_its_iterator_is_no_end_of_the_questions(endpoint, teacher, pairs):
    transform = ReflectionTransform(teacher, "response", accept=lambda parent, rewrite: next(iter(())))
    with pytest.raises((StopIteration, RuntimeError)):
        transform.prefetch(pairs)


def test_a_callable_that_returns_no_replies_is_said(pairs):
    transform = ReflectionTransform(lambda chats: ["[Better Answer] Rain. [End]" for _ in chats], "response")
    with pytest.raises(TeacherError, match="must return a list of `hf_reflect.Reply`"):
        transform(pairs[:2])


def test_a_teacher_by_name_is_refused():
    with pytest.raises(SettingsError, match="callable from chats to replies, not 'gpt-5'"):
        ReflectionTransform("gpt-5", "response")


def test_a_map_without_batches_is_refused_before_anything_is_asked(endpoint, teacher, pairs):
    transform = ReflectionTransform(teacher, "response")
    with pytest.raises(SettingsError, match="batched=True"):
        pairs.map(transform, load_from_cache_file=False)
    with pytest.raises(SettingsError, match="batched=True"):
        transform(pairs[0])
    assert not endpoint.requests


class Picky:
    """Answers usably only where `fine(number of the row)`."""

    max_failure_rate = 1.0
    model = "picky"

    def __init__(self, fine, bad="Nothing to add.", max_failure_rate=1.0):
        self.fine, self.bad, self.max_failure_rate = fine, bad, max_failure_rate

    def __call__(self, chats):
        texts = [rewriting({"messages": chat}) for chat in chats]
        numbers = [int(chat[-1]["content"].split("Question ")[1].split("?")[0]) for chat in chats]
        bad = [self.bad.format(number) for number in numbers]
        return [Reply(text if self.fine(n) else b, "stop") for n, text, b in zip(numbers, texts, bad, strict=True)]


def numbered(count):
    return to_pairs(
        Dataset.from_list([{"instruction": f"Question {n}?", "output": f"Answer {n}."} for n in range(count)])
    )


@pytest.mark.parametrize("keep_parent", [True, False])
@pytest.mark.parametrize("fine", [True, False], ids=["only one usable", "only one unusable"])
def test_types_hold_where_the_first_batches_hold_only_nulls(fine, keep_parent):
    pairs = numbered(2500)
    table = pairs
    for part in ("instruction", "response"):
        transform = ReflectionTransform(Picky(lambda n: (n == 2400) == fine), part, keep_parent=keep_parent)
        table = table.map(transform, batched=True, load_from_cache_file=False)
    assert table.features == pairs.features
    assert len(table) == (4 if keep_parent else 1) * 2500
    usable = table.filter(lambda error: error is None, input_columns="error")
    rewritten = len({row_id for row_id, source in zip(usable["row_id"], usable["source"], strict=True) if source})
    assert rewritten == (1 if fine else 2499)


def test_a_first_batch_whose_every_version_is_unusable_holds_the_types(pairs):
    silent = Dataset.from_list([row | BLANK for row in pairs.to_list()], features=pairs.features)
    table = reflected(silent, scripted_teacher)
    assert table.features == pairs.features
    assert len(table) == 32 and set(table["response"]) == {None}


def test_too_many_unusable_replies_stop_from_the_fiftieth_row_on():
    pairs = numbered(120)

    def run(fine, batch_size=10, rate=0.2, rows=120, bad="Nothing to add."):
        transform = ReflectionTransform(Picky(fine, bad, rate), "instruction")
        return pairs.select(range(rows)).map(
            transform, batched=True, batch_size=batch_size, load_from_cache_file=False
        )

    words = "11 of 50 replies to the instruction reflection are unusable.*11 unparsed.*max_failure_rate=0.2"
    with pytest.raises(TeacherError, match=words):
        run(lambda n: n >= 11)
    assert len(run(lambda n: n >= 10)) == 240  # a fifth of the first fifty is allowed, less later
    assert len(run(lambda n: False, rows=49)) == 98
    with pytest.raises(TeacherError, match="50 of 50"):
        run(lambda n: False, rows=50)
    with pytest.raises(TeacherError, match="of 120 replies"):  # late failures count as well
        run(lambda n: n < 95, batch_size=60)
    with pytest.raises(TeacherError, match="1 of 50"):
        run(lambda n: n > 0, rate=0.0)
    same = "[New Instruction] Question {}? [End] [New Answer] Something else. [End]"
    assert len(run(lambda n: False, bad=same)) == 240
    assert len(run(lambda n: False, rate=1.0)) == 240


def test_the_failure_rate_begins_anew_with_each_transform():
    pairs = numbered(40)
    for _ in range(2):
        assert len(reflected(pairs, Picky(lambda n: False, max_failure_rate=0.2), "instruction")) == 80


def test_prefetch_stops_early_where_replies_are_useless(endpoint, tmp_path):
    endpoint.answer = lambda request: "I'm sorry, but I can't help with that."
    teacher = Teacher("teacher", base_url=endpoint.url, ledger=tmp_path / "ledger", max_concurrency=8)
    transform = ReflectionTransform(teacher, "instruction")
    with pytest.raises(TeacherError, match="50 of 50.*50 refused"):
        transform.prefetch(numbered(200))
    assert 50 <= len(endpoint.requests) <= 50 + 8
    with pytest.raises(TeacherError, match="refused"):
        transform.prefetch(numbered(200))  # those in the ledger say so at once
    assert len(endpoint.requests) <= 50 + 8


def test_rows_that_nobody_asked_for_do_not_count_as_answered(endpoint, tmp_path):
    endpoint.answer = lambda request: "I'm sorry, but I can't help with that."
    teacher = Teacher("teacher", base_url=endpoint.url, ledger=tmp_path / "ledger", max_requests=20)
    table = reflected(numbered(60), teacher, "instruction")
    codes = [error.split(":")[0] for error in table["error"] if error]
    assert (codes.count("refused"), codes.count("budget")) == (20, 40)


def counts(estimate):
    return estimate["calls"], estimate["reused"]


def test_an_estimate_asks_nothing_and_counts_what_is_missing(pairs, endpoint, tmp_path):
    prices = {"price_per_million_input": 2.0, "price_per_million_output": 8.0}
    teacher = Teacher("teacher", base_url=endpoint.url, ledger=tmp_path / "ledger", **prices)
    transform = ReflectionTransform(teacher, "instruction")
    before = transform.estimate(pairs)
    assert set(before) == {"calls", "reused", "prompt_tokens", "completion_tokens", "cost"}
    assert counts(before) == (8, 0)
    chats = [PROMPTS["instruction"].chat(row["instruction"], row["response"], row["input"]) for row in pairs]
    assert before["prompt_tokens"] == pytest.approx(sum(len(m["content"]) for c in chats for m in c) / 4, rel=0.01)
    assert before["cost"] == pytest.approx((before["prompt_tokens"] * 2 + before["completion_tokens"] * 8) / 1e6)
    assert endpoint.requests == []

    transform.prefetch(pairs.select(range(3)))
    half = transform.estimate(pairs)
    assert counts(half) == (5, 3) and half["prompt_tokens"] < before["prompt_tokens"]
    transform.prefetch(pairs)
    assert transform.estimate(pairs) == {
        "calls": 0, "reused": 8, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0,
    }  # fmt: skip
    assert len(endpoint.requests) == 8


def estimate_both(teacher, pairs):
    return estimate_recycling(*(ReflectionTransform(teacher, part) for part in ("instruction", "response")), pairs)


def test_the_estimate_of_both_reflections_counts_three_calls_a_row(pairs, teacher, endpoint):
    assert counts(estimate_both(teacher, pairs)) == (24, 0)
    instruction, response = (ReflectionTransform(teacher, part) for part in ("instruction", "response"))
    instruction.prefetch(pairs.select(range(3)))
    assert counts(estimate_both(teacher, pairs)) == (21, 3)
    instruction.prefetch(pairs)
    assert counts(estimate_both(teacher, pairs)) == (16, 8)
    table = reflected(pairs, teacher, "instruction")
    assert counts(response.estimate(table)) == (16, 0)
    response.prefetch(table.select(range(4)))
    assert counts(estimate_both(teacher, pairs)) == (12, 12)
    response.prefetch(table)
    assert counts(estimate_both(teacher, pairs)) == (0, 24)
    assert len(endpoint.requests) == 24


def test_the_estimate_of_both_knows_children_that_will_not_be_asked(pairs, teacher, endpoint):
    endpoint.answer = answering({("instruction", ROWS[2]["instruction"]): UNUSABLE["refused"]})
    ReflectionTransform(teacher, "instruction").prefetch(pairs)
    assert counts(estimate_both(teacher, pairs)) == (15, 8)
    reflected(pairs, teacher)
    assert counts(estimate_both(teacher, pairs)) == (0, 23)


def test_the_estimate_counts_versions_that_the_budget_left_out(pairs, endpoint, tmp_path):
    poor = Teacher("teacher", base_url=endpoint.url, ledger=tmp_path / "ledger", max_requests=5)
    table = reflected(pairs, poor, "instruction")
    rich = Teacher("teacher", base_url=endpoint.url, ledger=tmp_path / "ledger")
    assert counts(ReflectionTransform(rich, "response").estimate(table)) == (16, 0)


def test_equal_rows_are_estimated_once(teacher):
    assert estimate_both(teacher, to_pairs(Dataset.from_list(ROWS[:2] * 3)))["calls"] == 6


def test_a_transform_is_a_callable_from_a_batch_to_an_arrow_table(pairs):
    transform = ReflectionTransform(scripted_teacher, "response")
    for batch in (pairs[:], pairs.with_format("arrow")[:]):
        table = transform(batch)
        assert isinstance(table, pa.Table)
        assert {name: table.schema.field(name).type for name in PAIR_FEATURES} == {
            name: PAIR_FEATURES.arrow_schema.field(name).type for name in PAIR_FEATURES
        }
        assert table["variant"].to_pylist() == ["original", "response"] * 8


def test_a_pickled_teacher_or_transform_holds_no_key_and_works(pairs, teacher, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    reflected(pairs.select([0]), teacher, "instruction")
    assert endpoint.keys == {"sk-very-secret"}  # or this would prove nothing
    transform = ReflectionTransform(teacher, "response")
    for thing in (teacher, transform):
        assert b"very-secret" not in pickle.dumps(thing) and "very-secret" not in repr(vars(thing))
    assert b"very-secret" not in Path(teacher.ledger).read_bytes()
    assert pickle.loads(pickle.dumps(teacher)) == teacher
    copy = pickle.loads(pickle.dumps(transform))
    assert reflected(pairs, copy.teacher).to_list() == reflected(pairs, teacher).to_list()


def test_equal_transforms_hash_alike_whatever_they_have_done(pairs, teacher, endpoint):
    from datasets.fingerprint import Hasher

    used = ReflectionTransform(teacher, "instruction")
    before = Hasher.hash(used)
    pairs.map(used, batched=True, load_from_cache_file=False)
    fresh = Teacher("teacher", base_url=endpoint.url, ledger=teacher.ledger)
    assert Hasher.hash(used) == before == Hasher.hash(ReflectionTransform(fresh, "instruction"))
    assert Hasher.hash(ReflectionTransform(fresh, "instruction", source="second")) != before


def python(code, *arguments):
    """What this code prints in a fresh interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_importing_the_package_is_cheap():
    heavy = ("torch", "openai", "transformers", "trl", "datasets")
    assert python(f"import sys, hf_reflect; print([name for name in {heavy} if name in sys.modules])") == ["[]"]


def test_recycling_needs_no_torch(endpoint, tmp_path):
    code = """
import sys
from datasets import Dataset
from hf_reflect import ReflectionTransform, Teacher, to_pairs
pairs = to_pairs(Dataset.from_list([{"instruction": "Name a tree.", "output": "Oak."}]))
teacher = Teacher("teacher", base_url=sys.argv[1], ledger=sys.argv[2])
for part in ("instruction", "response"):
    transform = ReflectionTransform(teacher, part)
    transform.prefetch(pairs)
    pairs = pairs.map(transform, batched=True, load_from_cache_file=False)
print(len(pairs), [m for m in ("torch", "transformers", "trl", "accelerate") if m in sys.modules])
"""
    assert python(code, endpoint.url, tmp_path / "ledger") == ["4", "[]"]
    assert len(endpoint.requests) == 3


def test_the_public_names_are_those_that_can_be_got():
    for name in hf_reflect.__all__:
        assert getattr(hf_reflect, name) is not None
    assert set(dir(hf_reflect)) == {*hf_reflect.__all__, "__version__"}
    assert len(set(hf_reflect.__all__)) == len(hf_reflect.__all__)
    assert hf_reflect.__version__
    with pytest.raises(AttributeError, match="'reflect'"):
        _ = hf_reflect.reflect
    # what type checkers and editors see is the same
    seen = {
        alias.asname
        for node in ast.walk(ast.parse(Path(hf_reflect.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert seen == set(hf_reflect.__all__)


@pytest.mark.parametrize("change", ["one row edited", "a column added", "rows shuffled", "rows removed"])
def test_a_changed_table_asks_exactly_what_it_has_not_asked(change, endpoint, tmp_path):
    rows = [{"instruction": f"Say number {n}.", "output": f"It is {n}."} for n in range(60)]
    teacher = Teacher("teacher", base_url=endpoint.url, ledger=tmp_path / "ledger.sqlite")

    def run(rows):
        table = to_pairs(Dataset.from_list(rows))
        for part in ("instruction", "response"):
            transform = ReflectionTransform(teacher, part)
            transform.prefetch(table)
            table = table.map(transform, batched=True, load_from_cache_file=False)
        assert set(table["error"]) == {None} and len(table) == 4 * len(rows)

    run(rows)
    before = len(endpoint.requests)
    assert before == 3 * 60
    if change == "one row edited":
        rows[17]["output"] = "It is seventeen."
    elif change == "a column added":
        rows = [row | {"origin": "here"} for row in rows]
    elif change == "rows shuffled":
        random.Random(0).shuffle(rows)
    else:
        rows = rows[10:]
    run(rows)
    asked = endpoint.requests[before:]
    assert len(asked) == (3 if change == "one row edited" else 0)
    assert all("seventeen" in str(r) or "number 17" in str(r) for r in asked)


@pytest.mark.parametrize("correlated", [True, False], ids=["long prompts get long replies", "lengths are random"])
def test_an_estimate_from_fifty_replies_is_within_a_tenth(correlated, endpoint, tmp_path):
    """Calls, prompt and completion tokens, cost, over both reflections; most children are not there yet."""
    chance = random.Random(3)
    rows = [
        {
            "instruction": f"Task {n}: " + "explain this " * chance.randint(3, 60),
            "output": "So. " * chance.randint(1, 99),
        }
        for n in range(500)
    ]

    def answer(request):
        text = request["messages"][-1]["content"]
        wanted = len(text) // 3 if correlated else random.Random(text).randint(200, 1800)
        return rewriting(request).replace("[End]", "word " * (wanted // 5) + "[End]", 1)

    endpoint.answer = answer
    settings = {"base_url": endpoint.url, "ledger": tmp_path / "ledger.sqlite"}
    settings |= {"price_per_million_input": 2.0, "price_per_million_output": 10.0}
    pairs = to_pairs(Dataset.from_list(rows))

    def recycle(table):
        teacher = Teacher("teacher", **settings)
        for part in ("instruction", "response"):
            transform = ReflectionTransform(teacher, part)
            transform.prefetch(table)
            table = table.map(transform, batched=True, load_from_cache_file=False)
        return teacher.stats

    recycle(pairs.select(range(50)))  # 50 replies to instructions, 100 to responses
    estimate = estimate_both(Teacher("teacher", **settings), pairs)
    stats = recycle(pairs)
    assert estimate["calls"] == stats["asked"] == 3 * 450
    for name in ("prompt_tokens", "completion_tokens", "cost"):
        assert estimate[name] == pytest.approx(stats[name], rel=0.1)

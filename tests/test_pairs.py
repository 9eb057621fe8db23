import logging
from datetime import datetime

import datasets
import pyarrow as pa
import pytest
from conftest import ROWS
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features, List, Value

from hf_reflect import ReflectError, to_pairs
from hf_reflect.columns import question

CREATED = Features(
    {
        "row_id": Value("string"),
        "variant": Value("string"),
        "source": Value("string"),
        "instruction": Value("string"),
        "input": Value("string"),
        "response": Value("string"),
        "history": List({"role": Value("string"), "content": Value("string")}),
        "critique": Value("string"),
        "error": Value("string"),
    }
)


def turns(*said, role="role", content="content", names=("user", "assistant")):
    return [{role: names[number % 2], content: text} for number, text in enumerate(said)]


def sharegpt(*said):
    return turns(*said, role="from", content="value", names=("human", "gpt"))


def ids_by_text(pairs):
    return dict(zip(zip(pairs["instruction"], pairs["response"], strict=True), pairs["row_id"], strict=True))


# ---- formats

X, Y = "Why is the sky blue?", "Air scatters blue light most."
ONE_PAIR = {
    "Alpaca": ({"instruction": X, "input": "", "output": Y}, {}),
    "Alpaca, null input": ({"instruction": X, "input": None, "output": Y}, {}),
    "Alpaca, blank input": ({"instruction": X, "input": " \n", "output": Y}, {}),
    "WizardLM": ({"instruction": X, "output": Y}, {}),
    "response": ({"instruction": X, "response": Y}, {}),
    "WizardLM V2": ({"idx": "w1", "conversations": sharegpt(X, Y)}, {}),
    "ShareGPT": ({"id": "s_0", "conversations": sharegpt(X, Y)}, {}),
    "ShareGPT, other names": (
        {"conversations": turns(X, Y, role="from", content="value", names=("user", "chatgpt"))},
        {},
    ),
    "conversations of role and content": ({"conversations": turns(X, Y)}, {}),
    "messages": ({"messages": turns(X, Y)}, {}),
    "messages beside their first prompt": ({"prompt": X, "prompt_id": "u1", "messages": turns(X, Y)}, {}),
    "messages with more keys": (
        {"messages": [{**turn, "name": None, "weight": 1.0, "tool_calls": None} for turn in turns(X, Y)]},
        {},
    ),
    "question that nobody answered": ({"messages": turns(X, Y, "And at night?")}, {}),
    "prompt and completion": ({"prompt": X, "completion": Y}, {}),
    "prompt and completion as messages": ({"prompt": turns(X), "completion": turns(X, Y)[1:]}, {}),
    "named": ({"question": X, "answer": Y}, {"instruction": "question", "response": "answer"}),
    "one named": ({"question": X, "output": Y}, {"instruction": "question"}),
    "all named": (
        {"q": X, "context": None, "a": Y, "key": 7},
        {"instruction": "q", "input": "context", "response": "a", "row_id": "key"},
    ),
    "named beside messages": (
        {"question": X, "answer": Y, "messages": turns("Hm?", "Hm.")},
        {"instruction": "question", "response": "answer"},
    ),
    "named beside prompt and completion": (
        {"prompt": "Hm?", "completion": "Hm.", "question": X, "answer": Y},
        {"instruction": "question", "response": "answer"},
    ),
}


@pytest.mark.parametrize(("row", "names"), ONE_PAIR.values(), ids=ONE_PAIR)
def test_every_format_gives_the_same_pair(row, names):
    (pair,) = to_pairs(Dataset.from_list([row]), **names)
    assert {name: pair[name] for name in CREATED if name != "row_id"} == {
        "variant": "original",
        "source": "",
        "instruction": X,
        "input": "",
        "response": Y,
        "history": [],
        "critique": None,
        "error": None,
    }
    assert isinstance(pair["row_id"], str) and pair["row_id"]


def test_alpaca_rows_keep_order_and_every_character():
    rows = [*ROWS, {"instruction": "  Indent this:\r\n\tx ", "input": " a\n", "output": "\n    x\n"}]
    pairs = to_pairs(Dataset.from_list(rows))
    assert [{"instruction": p["instruction"], "input": p["input"], "output": p["response"]} for p in pairs] == rows


def test_input_column_may_be_named():
    pairs = to_pairs(Dataset.from_list([{"instruction": X, "context": "At noon.", "output": Y}]), input="context")
    assert pairs[0]["input"] == "At noon." and "context" not in pairs.column_names


def test_question_joins_instruction_and_input_by_a_newline():
    assert question("Add.", "1 and 2") == "Add.\n1 and 2"
    assert question("Add.", "") == question("Add.", None) == "Add."


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_last_exchange_is_the_pair_and_what_came_before_its_history(column):
    make = turns if column == "messages" else sharegpt
    said = ["Hi.", "Hello.", "A river?", "The Po.", "Another?", "The Oder."]
    key = (
        {"role": "system", "content": "Be brief."}
        if column == "messages"
        else {"from": "system", "value": "Be brief."}
    )
    (pair,) = to_pairs(Dataset.from_list([{column: [key, *make(*said)]}]))
    assert (pair["instruction"], pair["response"], pair["input"]) == ("Another?", "The Oder.", "")
    assert pair["history"] == [{"role": "system", "content": "Be brief."}, *turns(*said[:4])]


def test_system_message_alone_is_history():
    system = {"role": "system", "content": "Be brief."}
    (pair,) = to_pairs(Dataset.from_list([{"prompt": [system, *turns(X)], "completion": turns(X, Y)[1:]}]))
    assert pair["history"] == [system] and pair["instruction"] == X and pair["response"] == Y


# ---- columns and types


def test_other_columns_travel_along_with_values_and_types():
    features = Features(
        {
            "instruction": Value("string"),
            "topic": ClassLabel(names=["sky", "sea"]),
            "tags": List(Value("string")),
            "embedding": List(Value("float32"), length=2),
            "meta": {"score": Value("int8"), "by": List({"name": Value("string")})},
            "output": Value("large_string"),
            "when": Value("timestamp[s]"),
            "blob": Value("binary"),
            "nothing": Value("null"),
            "always_null": Value("int16"),
        }
    )
    row = {
        "topic": 1,
        "tags": ["a", None],
        "embedding": [0.5, 2.0],
        "meta": {"score": 3, "by": [{"name": "Ada"}]},
        "when": datetime(2024, 2, 29, 12),
        "blob": b"\x00\xff",
        "nothing": None,
        "always_null": None,
    }
    empty = {**dict.fromkeys(row), "tags": []}
    given = [{"instruction": X, "output": Y, **row}, {"instruction": "And now?", "output": "Dark.", **empty}]
    pairs = to_pairs(Dataset.from_list(given, features=features))
    others = [name for name in features if name not in ("instruction", "output")]
    assert pairs.column_names == [*CREATED, *others]
    assert pairs.features == Features({**CREATED, **{name: features[name] for name in others}})
    assert pairs.select_columns(others).to_list() == [row, empty]


@pytest.mark.parametrize("row", [{"instruction": X, "output": Y}, {"messages": turns(X, Y)}])
def test_created_columns_have_their_types_though_all_null(row):
    pairs = to_pairs(Dataset.from_list([row] * 3))
    assert pairs.features == CREATED
    text = pairs.data.table.schema.field
    assert all(text(name).type == pa.string() for name in CREATED if name != "history")
    grown = datasets.concatenate_datasets(
        [pairs, pairs.map(lambda row: {"error": "teacher: no", "critique": "Thin."})]
    )
    assert grown["error"][-1] == "teacher: no" and grown["error"][0] is None


def test_table_without_rows_gives_the_columns_too(rows):
    pairs = to_pairs(rows.filter(lambda row: False))
    assert len(pairs) == 0 and pairs.features == CREATED


def test_the_table_that_was_given_is_left_as_it_was(rows):
    before = rows.to_list(), rows.features.copy()
    to_pairs(rows)
    assert (rows.to_list(), rows.features) == before


@pytest.mark.parametrize(
    "change", [lambda d: d.with_format("numpy"), lambda d: d.shuffle(seed=3), lambda d: d.flatten_indices()]
)
def test_format_and_indices_of_the_table_do_not_matter(rows, change):
    assert ids_by_text(to_pairs(change(rows))) == ids_by_text(to_pairs(rows))


# ---- row_id


def test_row_ids_do_not_depend_on_other_rows(rows):
    before = ids_by_text(to_pairs(rows))
    edited = rows.to_list()
    edited[2] |= {"output": "It is 42."}
    added = [
        {"instruction": "New?", "input": "", "output": "Yes."},
        *ROWS,
        {"instruction": "Old?", "input": "", "output": "No."},
    ]
    for changed in (ROWS[3:], ROWS[::-1], edited, added):
        after = ids_by_text(to_pairs(Dataset.from_list(changed)))
        assert all(before[key] == after[key] for key in before.keys() & after.keys())
        assert len(set(after.values())) == len(after) == len(changed)
        assert not {after[key] for key in after.keys() - before.keys()} & set(before.values())


def test_each_part_of_a_pair_changes_its_row_id():
    first = {"messages": turns("Hi.", "Hello.", X, Y)}
    rows = [first, {"messages": turns("Hi!", "Hello.", X, Y)}, {"messages": turns("Hi.", "Hello.", X, Y + "!")}]
    assert len(set(to_pairs(Dataset.from_list(rows))["row_id"])) == 3
    alpaca = [
        {"instruction": a, "input": b, "output": c} for a, b, c in [("1", "2", "3"), ("12", "", "3"), ("1", "23", "3")]
    ]
    assert len(set(to_pairs(Dataset.from_list(alpaca))["row_id"])) == 3


def test_row_ids_do_not_depend_on_format_or_other_columns():
    tables = [
        {"instruction": X, "output": Y, "topic": "sky"},
        {"messages": turns(X, Y)},
        {"prompt": X, "completion": Y},
    ]
    assert len({to_pairs(Dataset.from_list([row]))[0]["row_id"] for row in tables}) == 1


def test_equal_rows_get_distinct_ids_wherever_they_stand():
    same, other = {"instruction": X, "output": Y}, [{"instruction": str(n), "output": "n"} for n in range(1200)]
    ids = to_pairs(Dataset.from_list([same, same, *other, same]))["row_id"]
    assert len(set(ids)) == 1203
    close = to_pairs(Dataset.from_list([other[0], same, same, same]))["row_id"]
    assert close[1:] == [ids[0], ids[1], ids[-1]]


@pytest.mark.parametrize(("ids", "expected"), [(["b", "a"], ["b", "a"]), ([7, 3], ["7", "3"])])
def test_id_column_identifies_rows_and_stays(ids, expected):
    pairs = to_pairs(Dataset.from_dict({"id": ids, "instruction": ["1?", "2?"], "output": ["1", "2"]}))
    assert pairs["row_id"] == expected and pairs["id"] == ids


@pytest.mark.parametrize("ids", [["a", "a"], ["a", None], [None, None]])
def test_id_column_that_cannot_identify_rows_is_only_carried_along(ids):
    data = {"instruction": ["1?", "2?"], "output": ["1", "2"]}
    pairs = to_pairs(Dataset.from_dict({"id": ids, **data}))
    assert pairs["row_id"] == to_pairs(Dataset.from_dict(data))["row_id"]
    assert pairs["id"] == ids


def test_named_row_id_column_is_taken_before_id():
    data = {"id": ["a", "b"], "row_id": [11, 12], "messages": [turns("1?", "1"), turns("2?", "2")]}
    pairs = to_pairs(Dataset.from_dict(data), row_id="row_id")
    assert pairs["row_id"] == ["11", "12"] and pairs["id"] == ["a", "b"]
    assert pairs.features["row_id"] == Value("string")


@pytest.mark.parametrize(
    ("keys", "found"), [(["a", "b", "a"], "'a' stands in 2 rows"), (["a", None, None], "row 1 has none")]
)
def test_named_row_id_column_must_identify_rows(keys, found):
    data = Dataset.from_dict({"key": keys, "instruction": ["1?", "2?", "3?"], "output": ["1", "2", "3"]})
    with pytest.raises(ValueError, match=f"row_id='key'.*{found}"):
        to_pairs(data, row_id="key")


def test_dropped_rows_leave_the_ids_of_the_others_alone():
    good = [{"instruction": "1?", "output": "1"}, {"instruction": "2?", "output": "2"}]
    bad = {"instruction": None, "output": "3"}
    kept = to_pairs(Dataset.from_list([bad, good[0], bad, good[1]]), invalid="drop")
    assert kept["row_id"] == to_pairs(Dataset.from_list(good))["row_id"]
    numbered = Dataset.from_list([{**bad, "id": 1}, {**good[0], "id": 2}, {**good[1], "id": 3}])
    assert to_pairs(numbered, invalid="drop")["row_id"] == ["2", "3"]


# ---- rows that are no pair

SYSTEM = {"role": "system", "content": "Be brief."}
NO_PAIR = {
    "starts with the assistant": (turns("?", "Hello.", X, Y)[1:], "turn 0.*assistant where the user"),
    "assistant first after the system": ([SYSTEM, *turns("?", "Hello.", X, Y)[1:]], "turn 1.*assistant"),
    "user twice": ([*turns(X), *turns(X, Y)], "turn 1.*user where the assistant"),
    "assistant twice": ([*turns(X, Y), *turns(X, Y)[1:]], "turn 2.*assistant where the user"),
    "system in between": ([*turns(X, Y), SYSTEM, *turns(X, Y)], "turn 2.*system"),
    "another role": ([*turns(X), {"role": "tool", "content": Y}], "turn 1.*'tool'"),
    "no role": ([*turns(X), {"role": None, "content": Y}], "turn 1.*None"),
    "only a question": (turns(X), "no user turn with an answer"),
    "only a system message": ([SYSTEM], "no user turn with an answer"),
    "empty": ([], "no turns"),
    "null": (None, "no turns"),
    "null turn": ([*turns(X, Y), None], "turn 2"),
    "null content": ([*turns(X), {"role": "assistant", "content": None}], r"`messages\[1\]`: null"),
    "blank content": ([*turns(X), {"role": "assistant", "content": " \n"}], r"`messages\[1\]`: empty"),
    "blank earlier content": ([*turns("Hi.", ""), *turns(X, Y)], r"`messages\[1\]`: empty"),
}


@pytest.mark.parametrize(("conversation", "reason"), NO_PAIR.values(), ids=NO_PAIR)
def test_conversation_without_a_pair_is_named_or_dropped(conversation, reason):
    table = Dataset.from_list([{"messages": turns(X, Y)}, {"messages": conversation}])
    with pytest.raises(ValueError, match=f"1 of 2 rows .*row 1, .*{reason}"):
        to_pairs(table)
    assert to_pairs(table, invalid="drop")["response"] == [Y]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": None, "output": Y}, "`instruction`: null"),
        ({"instruction": "", "output": Y}, "`instruction`: empty"),
        ({"instruction": " \n\t", "output": Y}, "`instruction`: empty"),
        ({"instruction": X, "output": None}, "`output`: null"),
        ({"instruction": X, "output": "  "}, "`output`: empty"),
    ],
)
def test_null_and_empty_text_is_no_pair(row, reason):
    table = Dataset.from_list([{"instruction": X, "output": Y}, row])
    with pytest.raises(ValueError, match=f"row 1, column {reason}"):
        to_pairs(table)
    assert len(to_pairs(table, invalid="drop")) == 1


@pytest.mark.parametrize(
    "table",
    [
        {"instruction": [1, 2], "output": ["a", "b"]},
        {"instruction": ["a", "b"], "input": [1, 2], "output": ["a", "b"]},
        {"prompt": ["a", "b"], "completion": [turns("a"), turns("b")]},
        {"messages": ["user: hi", "user: hello"]},
        {"conversations": [["Hi.", "Hello."], ["How?", "So."]]},
        {"messages": [[1, 2], [3, 4]]},
    ],
    ids=lambda table: ",".join(table),
)
def test_column_of_another_type_is_an_error_of_the_data(table):
    with pytest.raises(ReflectError, match="2 of 2 rows"):
        to_pairs(Dataset.from_dict(table))


def test_error_shows_the_first_three_bad_rows_and_their_number():
    outputs = ["", "fine", None, " ", "fine", None, ""]
    table = Dataset.from_dict({"instruction": [X] * 7, "output": outputs})
    with pytest.raises(ReflectError) as error:
        to_pairs(table)
    told = str(error.value)
    assert "5 of 7 rows" in told and "invalid='drop'" in told
    assert [f"row {n}," in told for n in range(7)] == [True, False, True, True, False, False, False]


def test_drop_keeps_the_other_rows_in_order_and_says_how_many_went(caplog):
    table = Dataset.from_dict({"instruction": list("abcde"), "output": ["1", "", "3", None, "5"], "n": range(5)})
    with caplog.at_level(logging.WARNING, logger="hf_reflect"):
        pairs = to_pairs(table, invalid="drop")
    assert pairs["instruction"] == ["a", "c", "e"] and pairs["n"] == [0, 2, 4]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "2 of 5 rows" in caplog.text and "row 1," in caplog.text and "row 3," in caplog.text


def test_nothing_is_said_where_nothing_is_dropped(rows, caplog):
    assert len(to_pairs(rows, invalid="drop")) == len(rows)
    assert not caplog.records


@pytest.mark.parametrize("conversational", [False, True])
def test_bad_row_far_behind_is_found(conversational):
    good = {"messages": turns(X, Y)} if conversational else {"instruction": X, "output": Y}
    bad = {"messages": None} if conversational else {"instruction": X, "output": None}
    table = Dataset.from_list([good | {"n": n} for n in range(2500)]).to_list()
    table[2399] = bad | {"n": 2399}
    table = Dataset.from_list(table)
    with pytest.raises(ValueError, match="1 of 2500 rows .*row 2399,"):
        to_pairs(table)
    pairs = to_pairs(table, invalid="drop")
    assert pairs["n"] == [n for n in range(2500) if n != 2399]
    assert len(set(pairs["row_id"])) == 2499
    assert pairs.select_columns(list(CREATED)).features == CREATED


def test_column_null_for_more_than_a_batch_keeps_its_type():
    inputs = [None] * 2400 + ["late"] * 100
    data = {"instruction": [X] * 2500, "input": inputs, "output": [Y] * 2500, "note": inputs}
    pairs = to_pairs(Dataset.from_dict(data))
    assert pairs["input"] == [text or "" for text in inputs] and pairs["note"] == inputs
    assert pairs.features["note"] == Value("string")


# ---- every turn


def naive_exchanges(conversation):
    """Each assistant turn with the user turn before it and everything said before both."""
    rows = []
    for place, (role, text) in enumerate(conversation):
        if role == "assistant":
            history = [{"role": r, "content": t} for r, t in conversation[: place - 1]]
            rows.append((conversation[place - 1][1], text, history))
    return rows


CONVERSATIONS = [
    [("user", "A river?"), ("assistant", "The Po.")],
    [("system", "Be brief."), ("user", "A tree?"), ("assistant", "Oak."), ("user", "Taller?"), ("assistant", "Fir.")],
    [("user", "Hi."), ("assistant", "Hello."), ("user", "Hi."), ("assistant", "Hello."), ("user", "Anyone there?")],
    [("system", "Be brief."), ("user", "A river?"), ("assistant", "The Po.")],
    [("user", "1?"), ("assistant", "1"), ("user", "2?"), ("assistant", "2"), ("user", "3?"), ("assistant", "3")],
]
GIVEN_AS = {
    "messages": lambda said: {"messages": [{"role": role, "content": text} for role, text in said]},
    "conversations": lambda said: {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in said
        ]
    },
    "prompt and completion": lambda said: {
        name: [{"role": role, "content": text} for role, text in part]
        for name, part in (("prompt", said[:-1]), ("completion", said[-1:]))
    },
}


@pytest.mark.parametrize("given", GIVEN_AS.values(), ids=GIVEN_AS)
def test_every_assistant_turn_becomes_a_row_in_the_order_in_which_it_was_said(given):
    table = Dataset.from_list([{**given(said), "id": f"c{n}"} for n, said in enumerate(CONVERSATIONS)])
    pairs = to_pairs(table, turns="all")
    expected = [
        (f"c{number}/{n}", *row)
        for number, said in enumerate(CONVERSATIONS)
        for n, row in enumerate(naive_exchanges(said))
    ]
    assert [(p["row_id"], p["instruction"], p["response"], p["history"]) for p in pairs] == expected
    assert pairs.features == Features({**CREATED, "id": Value("string")})
    assert set(pairs["variant"]) == {"original"} and set(pairs["source"]) == set(pairs["input"]) == {""}


@pytest.mark.parametrize("names", [{}, {"row_id": "key"}])
def test_the_last_row_of_every_turn_is_the_row_of_the_last_turn(names):
    rows = [{**GIVEN_AS["messages"](said), "key": n} for n, said in enumerate([*CONVERSATIONS, *CONVERSATIONS])]
    table = Dataset.from_list(rows)
    last, every = (to_pairs(table, turns=turns, **names).to_list() for turns in ("last", "all"))
    assert len({row["row_id"] for row in every}) == len(every)
    by_id = {row["row_id"]: row for row in every}
    counts = [sum(role == "assistant" for role, _ in said) for said in CONVERSATIONS] * 2
    assert [by_id[f"{row['row_id']}/{n - 1}"] for row, n in zip(last, counts, strict=True)] == [
        {**row, "row_id": f"{row['row_id']}/{n - 1}"} for row, n in zip(last, counts, strict=True)
    ]
    assert len(every) == sum(counts)


@pytest.mark.parametrize(("row", "names"), ONE_PAIR.values(), ids=ONE_PAIR)
def test_every_format_of_one_turn_gives_that_turn_as_number_0(row, names):
    (last,), (every,) = (to_pairs(Dataset.from_list([row]), **names, turns=turns) for turns in ("last", "all"))
    assert every == {**last, "row_id": f"{last['row_id']}/0"}


def test_other_columns_are_repeated_on_every_turn_with_their_types():
    features = Features(
        {
            "messages": List({"role": Value("string"), "content": Value("string")}),
            "topic": ClassLabel(names=["sky", "sea"]),
            "grid": Array2D((2, 2), "float32"),
            "meta": {"score": Value("int8"), "by": List({"name": Value("large_string")})},
            "when": Value("timestamp[s]"),
            "blob": Value("binary"),
            "always_null": Value("int16"),
            "nothing": Value("null"),
        }
    )
    row = {
        "topic": 1,
        "grid": [[1.0, 2.0], [3.0, 4.0]],
        "meta": {"score": 3, "by": [{"name": "Ada"}]},
        "when": datetime(2024, 2, 29, 12),
        "blob": b"\x00\xff",
        "always_null": None,
        "nothing": None,
    }
    other = {**row, "topic": 0, "blob": None, "meta": {"score": -1, "by": []}}
    data = [{"messages": turns(*"abcdef"), **row}, {"messages": turns(*"gh"), **other}]
    pairs = to_pairs(Dataset.from_list(data, features=features), turns="all")
    others = [name for name in features if name != "messages"]
    assert pairs.features == Features({**CREATED, **{name: features[name] for name in others}})
    assert pairs.select_columns(others).to_list() == [row, row, row, other]


@pytest.mark.parametrize("invalid", ["raise", "drop"])
@pytest.mark.parametrize("broken", [1, 1300, 2199])
def test_a_broken_conversation_is_left_as_a_whole_and_named_by_its_place_in_the_source(broken, invalid):
    rows = [{"messages": turns("1?", "1", "2?", "2"), "n": n} for n in range(2200)]
    rows[broken] = {"messages": [*turns("1?", "1"), {"role": "tool", "content": "2"}], "n": broken}
    table = Dataset.from_list(rows)
    if invalid == "raise":
        with pytest.raises(ReflectError, match=f"1 of 2200 rows .*row {broken}, .*'tool'"):
            to_pairs(table, turns="all")
    else:
        pairs = to_pairs(table, turns="all", invalid="drop")
        assert pairs["n"] == [n for n in range(2200) if n != broken for _ in "12"]
        assert len(set(pairs["row_id"])) == len(pairs)


@pytest.mark.parametrize("turns_", ["last", "all"])
def test_a_first_batch_without_any_pair_does_not_change_the_types(turns_):
    table = Dataset.from_list([{"messages": None, "note": None}] * 1200 + [{"messages": turns(X, Y), "note": "late"}])
    pairs = to_pairs(table, turns=turns_, invalid="drop")
    assert pairs["response"] == [Y] and pairs["note"] == ["late"]
    assert pairs.features == Features({**CREATED, "note": Value("string")})


def test_no_conversation_at_all_is_an_error_even_where_they_may_be_dropped():
    with pytest.raises(ReflectError, match="2 of 2 rows"):
        to_pairs(Dataset.from_list([{"messages": turns(X)}] * 2), turns="all", invalid="drop")


@pytest.mark.parametrize(
    "change", [lambda d: d.with_format("numpy"), lambda d: d.with_format("arrow"), lambda d: d.select([3, 0, 1])]
)
def test_format_and_indices_of_the_conversations_do_not_matter(change):
    table = Dataset.from_list([{**GIVEN_AS["messages"](said), "n": n} for n, said in enumerate(CONVERSATIONS)])
    whole = {(row["n"], row["row_id"]): row for row in to_pairs(table, turns="all")}
    changed = to_pairs(change(table), turns="all").to_list()
    assert changed == [whole[row["n"], row["row_id"]] for row in changed]
    assert [n for n in dict.fromkeys(row["n"] for row in changed)] == change(table).with_format(None)["n"][:]


def test_conversations_without_rows_give_the_columns_too():
    table = Dataset.from_list([{**GIVEN_AS["messages"](CONVERSATIONS[0]), "n": 1}]).select([])
    pairs = to_pairs(table, turns="all")
    assert len(pairs) == 0 and pairs.features == Features({**CREATED, "n": Value("int64")})


@pytest.mark.parametrize("value", ["first", None, 2])
def test_turns_are_last_or_all(rows, value):
    with pytest.raises(ReflectError, match=f'"last" or "all", not {value!r}'):
        to_pairs(rows, turns=value)


# ---- arguments


@pytest.mark.parametrize(
    "name",
    [
        *("row_id", "variant", "source", "history", "critique", "error", "ifd", "r_ifd", "coherence"),
        *("loss_instruction", "loss_response", "loss_instruction_given_response", "loss_response_given_instruction"),
        *("instruction", "input", "response", "input_ids", "labels"),
    ],
)
def test_reserved_column_name_is_an_error_that_tells_the_way_out(name):
    rows = Dataset.from_list([{"messages": turns(X, Y), name: "mine"}])
    with pytest.raises(ValueError, match=f"'{name}'.*rename_column\\('{name}', 'original_{name}'\\)"):
        to_pairs(rows)
    assert to_pairs(rows.rename_column(name, f"original_{name}"))[f"original_{name}"] == ["mine"]


def test_all_reserved_columns_are_named_at_once():
    with pytest.raises(ValueError, match="'source', 'error'"):
        to_pairs(Dataset.from_list([{"instruction": X, "output": Y, "source": "web", "error": None}]))


def test_unknown_columns_are_shown_beside_the_formats_that_are_known():
    with pytest.raises(
        ValueError, match=r"\['question', 'reply'\].*messages.*conversations.*prompt.*instruction='question'"
    ):
        to_pairs(Dataset.from_list([{"question": X, "reply": Y}]))
    with pytest.raises(ValueError, match=r"\['instruction'\].*output or response"):
        to_pairs(Dataset.from_list([{"instruction": X}]))


@pytest.mark.parametrize("role", ["instruction", "input", "response", "row_id"])
def test_named_column_must_exist(rows, role):
    with pytest.raises(ValueError, match=f"{role}='nowhere'.*'instruction', 'input', 'output'"):
        to_pairs(rows, **{role: "nowhere"})


def test_split_must_be_picked(rows):
    with pytest.raises(ReflectError, match=r"DatasetDict.*dataset\['train'\]"):
        to_pairs(DatasetDict({"train": rows, "test": rows}))


@pytest.mark.parametrize("make", [list, lambda rows: rows.to_iterable_dataset(), lambda rows: rows.to_dict()])
def test_anything_but_a_dataset_is_refused(rows, make):
    with pytest.raises(ReflectError, match="takes a `datasets.Dataset`"):
        to_pairs(make(rows))


def test_invalid_is_raise_or_drop(rows):
    with pytest.raises(ReflectError, match="'ignore'"):
        to_pairs(rows, invalid="ignore")

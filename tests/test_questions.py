import json
import logging
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from datasets import Dataset, DatasetDict

from hf_reflect.errors import DataError
from hf_reflect.evaluation.questions import TEST_SETS, load_questions, load_test_sets

# Two rows in the format of each published file, and what they come to.
FILES = {
    "wizardlm": (
        [
            {"idx": 1, "Skill": "Knots", "Difficulty": 2, "Instruction": "How is a bowline tied?"},
            {"idx": 2, "Skill": "Maps", "Difficulty": 7, "Instruction": "Why is north above?"},
        ],
        [("wizardlm/1", "How is a bowline tied?", "Knots"), ("wizardlm/2", "Why is north above?", "Maps")],
    ),
    "vicuna": (
        [
            {"question_id": 11, "text": "What keeps bread fresh?", "category": "kitchen"},
            {"question_id": 12, "text": "Describe fog\nin two lines.", "category": "writing"},
        ],
        [
            ("vicuna/11", "What keeps bread fresh?", "kitchen"),
            ("vicuna/12", "Describe fog\nin two lines.", "writing"),
        ],
    ),
    "koala": (
        [{"id": "koala_5", "prompt": "Plan a walk."}, {"id": "koala_6", "prompt": " Name a moth. "}],
        [("koala/koala_5", "Plan a walk.", ""), ("koala/koala_6", " Name a moth. ", "")],
    ),
    "self_instruct": (
        [
            {
                "id": "task_0",
                "motivation_app": "Mail",
                "instruction": "Make it shorter.",
                "instances": [{"input": "I would like to ask for salt.", "output": "Salt, please."}],
            },
            {
                "id": "task_1",
                "motivation_app": "Chess",
                "instruction": "Name an opening.",
                "instances": [{"input": "", "output": "The Vienna game."}],
            },
        ],
        [
            ("self_instruct/task_0", "Make it shorter.\nI would like to ask for salt.", "Mail"),
            ("self_instruct/task_1", "Name an opening.", "Chess"),
        ],
    ),
    "lima": (
        [{"conversations": "May I prune in June?"}, {"conversations": "Is rust red?"}],
        [("lima/0", "May I prune in June?", ""), ("lima/1", "Is rust red?", "")],
    ),
}


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def as_tuples(table):
    return list(zip(table["question_id"], table["question"], table["category"], strict=True))


@pytest.mark.parametrize("name", TEST_SETS)
def test_each_published_format_is_read(name, tmp_path):
    rows, expected = FILES[name]
    table = load_questions(name, written(tmp_path / "set.jsonl", rows))
    assert table.column_names == ["question_id", "question", "category", "test_set"]
    assert as_tuples(table) == expected
    assert set(table["test_set"]) == {name}


def test_a_lima_row_may_be_a_list_of_turns_of_which_the_first_is_asked(tmp_path):
    rows = [{"conversations": ["Who sails?", "They do."], "source": "s"}, {"conversations": ["Why?"], "source": "s"}]
    assert load_questions("lima", written(tmp_path / "set.jsonl", rows))["question"] == ["Who sails?", "Why?"]


def test_koala_rows_without_an_id_are_known_by_their_number(tmp_path):
    rows = [{"prompt": "Plan a walk."}, {"prompt": "Name a moth."}]
    assert load_questions("koala", written(tmp_path / "set.jsonl", rows))["question_id"] == ["koala/0", "koala/1"]


def test_a_self_instruct_row_without_instances_has_no_input(tmp_path):
    rows = [FILES["self_instruct"][0][0], FILES["self_instruct"][0][1] | {"instances": []}]
    assert load_questions("self_instruct", written(tmp_path / "s.jsonl", rows))["question"][1] == "Name an opening."


def test_only_a_published_set_of_another_size_is_warned_of(tmp_path, caplog):
    rows = [{"id": f"koala_{n}", "prompt": f"Question {n}?"} for n in range(181)]
    with caplog.at_level(logging.WARNING):
        load_questions("koala", written(tmp_path / "whole.jsonl", rows[:180]))
        load_questions("mine", written(tmp_path / "mine.jsonl", [{"question": "Why?"}]))
        assert not caplog.records
        assert len(load_questions("koala", written(tmp_path / "more.jsonl", rows))) == 181
    assert "has 181 questions, the published set 180" in caplog.text


def test_a_set_of_ones_own_may_have_questions_ids_and_categories(tmp_path):
    rows = [{"question": "Why?", "question_id": 4, "category": "x"}, {"question": "How?", "question_id": 9}]
    table = load_questions("mine", written(tmp_path / "mine.json", rows))
    assert as_tuples(table) == [("mine/4", "Why?", "x"), ("mine/9", "How?", "")]


def test_a_set_of_ones_own_may_have_instructions_with_input(tmp_path):
    rows = [{"id": "a", "instruction": "Sum up.", "input": "Long."}, {"id": "b", "instruction": "Go.", "input": " "}]
    rows.append({"id": "c", "instruction": "Rest.", "input": None})
    table = load_questions("mine", written(tmp_path / "mine.jsonl", rows))
    assert as_tuples(table) == [("mine/a", "Sum up.\nLong.", ""), ("mine/b", "Go.", ""), ("mine/c", "Rest.", "")]


def test_alpaca_evals_format_is_a_set_of_ones_own_with_its_dataset_as_category(tmp_path):
    rows = [{"instruction": "Who?", "output": "I.", "generator": "g", "dataset": "oasst"}]
    rows.append({"instruction": "When?", "output": "Now.", "generator": "g", "dataset": "vicuna"})
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps(rows))
    assert as_tuples(load_questions("alpaca_eval", str(path))) == [
        ("alpaca_eval/0", "Who?", "oasst"),
        ("alpaca_eval/1", "When?", "vicuna"),
    ]


def test_files_and_folders_of_every_kind_are_read_alike(tmp_path):
    rows = Dataset.from_list([{"id": "a", "question": "Why?"}, {"id": "b", "question": 'How, "so"?\nThus?'}])
    rows.to_csv(tmp_path / "set.csv")
    rows.to_parquet(tmp_path / "set.parquet")
    rows.save_to_disk(tmp_path / "folder")
    DatasetDict(train=rows.take(1), test=rows).save_to_disk(tmp_path / "splits")
    tables = [load_questions("mine", str(tmp_path / n)) for n in ("set.csv", "set.parquet", "folder", "splits")]
    expected = [("mine/a", "Why?", ""), ("mine/b", 'How, "so"?\nThus?', "")]
    assert [as_tuples(table) for table in tables] == [expected] * 4
    assert len(load_questions("mine", str(tmp_path / "splits"), split="train")) == 1


def test_a_saved_questions_table_is_read_back_as_it_was(tmp_path):
    table = load_questions("mine", written(tmp_path / "mine.jsonl", [{"question": "Why?"}, {"question": "How?"}]))
    table.save_to_disk(tmp_path / "saved")
    assert load_questions("mine", str(tmp_path / "saved")).to_list() == table.to_list()


def test_several_sets_come_in_one_table_in_the_order_that_was_named(tmp_path):
    paths = {name: written(tmp_path / f"{name}.jsonl", FILES[name][0]) for name in ("lima", "vicuna")}
    paths["mine"] = written(tmp_path / "mine.jsonl", [{"question": "Why?"}])
    table = load_test_sets(paths)
    assert as_tuples(table) == [*FILES["lima"][1], *FILES["vicuna"][1], ("mine/0", "Why?", "")]
    assert table["test_set"] == ["lima"] * 2 + ["vicuna"] * 2 + ["mine"]


def test_an_id_that_stands_there_twice_is_named(tmp_path):
    rows = [{"question_id": n, "text": f"What of {n}?", "category": ""} for n in (3, 7, 3)]
    with pytest.raises(DataError, match="more than once: 'vicuna/3'"):
        load_questions("vicuna", written(tmp_path / "set.jsonl", rows))


@pytest.mark.parametrize("text", ["", "  \n", None])
def test_a_question_without_text_is_named_by_its_row(text, tmp_path):
    rows = [{"id": "a", "prompt": "Why?"}, {"id": "b", "prompt": text}]
    with pytest.raises(DataError, match=r"no text to ask in 1 of 2 rows: 1 \(counted from 0\)"):
        load_questions("koala", written(tmp_path / "set.jsonl", rows))


@pytest.mark.parametrize("instruction", [None, " "])
def test_an_input_alone_is_no_question(instruction, tmp_path):
    rows = [{"instruction": "Go.", "input": "there"}, {"instruction": instruction, "input": "nowhere"}]
    with pytest.raises(DataError, match="1 of 2 rows: 1"):
        load_questions("mine", written(tmp_path / "set.jsonl", rows))


def test_a_conversation_without_turns_is_no_question(tmp_path):
    rows = [{"conversations": ["Why?"]}, {"conversations": []}]
    with pytest.raises(DataError, match="1 of 2 rows: 1"):
        load_questions("lima", written(tmp_path / "set.jsonl", rows))


@pytest.mark.parametrize("path", [180, ["a.jsonl"]])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(DataError, match=r"'koala' is a path, a Hub id, or null for the Hub's own, not "):
        load_test_sets({"koala": path})


def test_other_columns_are_named_beside_those_of_the_set(tmp_path):
    path = written(tmp_path / "set.jsonl", [{"id": 1, "Instruction": "Why?"}])
    with pytest.raises(DataError) as error:
        load_questions("wizardlm", path)
    message = str(error.value)
    assert message.startswith(f"The test set 'wizardlm' in {path!r} needs the columns 'idx', 'Skill', but found only")
    assert "['id', 'Instruction']" in message and "has idx, Skill, Instruction: WizardLM/data" in message
    with pytest.raises(DataError, match=r"\['id', 'Instruction'\], but a set of your own needs `question`"):
        load_questions("mine", path)


def test_sets_that_the_hub_is_not_known_to_hold_say_where_their_file_is():
    with pytest.raises(DataError, match="WizardLM_testset.jsonl of github.com/nlpxucan/WizardLM"):
        load_questions("wizardlm")
    with pytest.raises(DataError, match="vicuna_test_set.jsonl of github.com/tianyi-lab/Cherry_LLM"):
        load_test_sets({"vicuna": None})


def test_a_hub_that_cannot_be_reached_is_said():
    program = "import sys\nfrom hf_reflect.evaluation.questions import load_questions\n"
    program += "for name in sys.argv[1:]:\n    try:\n        load_questions(name)\n"
    program += "    except ValueError as error:\n        print(type(error).__name__, error)"
    line = [sys.executable, "-c", program, "koala", "self_instruct", "lima"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, cwd=ROOT, env=offline, capture_output=True, text=True, check=True)
    said = [words for words in done.stdout.splitlines() if words.startswith("DataError")]
    for name, words in zip(line[3:], said, strict=True):
        assert f"The test set '{name}' in '{TEST_SETS[name].hub[0]}' cannot be loaded: " in words


def test_an_unknown_name_without_a_file_lists_those_that_are_known():
    with pytest.raises(DataError, match="'wizard' is unknown; there are wizardlm, vicuna, koala, self_instruct, lima"):
        load_questions("wizard")
    with pytest.raises(DataError, match="No test set is named"):
        load_test_sets({})


def test_a_missing_file_and_a_missing_split_are_said(tmp_path):
    with pytest.raises(DataError, match="The test set 'mine' in '.*none.jsonl' does not exist"):
        load_questions("mine", str(tmp_path / "none.jsonl"))
    DatasetDict(dev=Dataset.from_dict({"question": ["Why?"]})).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="has no split 'test'; it has dev"):
        load_questions("mine", str(tmp_path / "splits"))

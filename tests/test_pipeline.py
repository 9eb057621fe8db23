"""The stages together, and what the whole package promises."""

import subprocess
import sys

import datasets
import pytest
from conftest import scripted_teacher, tiny_llama

from hf_reflect import (
    ReflectionTransform,
    Reply,
    StudentScorer,
    demo,
    select,
    select_top,
    to_messages,
    to_pairs,
    to_prompt_completion,
    to_training_ids,
)
from hf_reflect.columns import SCORE_COLUMNS
from hf_reflect.pairs import PAIR_FEATURES


def failing_late(chats):
    return [
        Reply(text="No.", finish_reason="stop") if "number 2400" in chat[1]["content"] else reply
        for chat, reply in zip(chats, scripted_teacher(chats), strict=True)
    ]


@pytest.mark.slow
def test_one_error_late_in_a_long_table_changes_no_type(student, tmp_path):
    model, tokenizer = student
    rows = [{"instruction": f"Say number {n}", "output": f"{n}", "tag": n % 3} for n in range(1, 2501)]
    table = to_pairs(datasets.Dataset.from_list(rows))
    for part in ("instruction", "response"):
        transform = ReflectionTransform(failing_late, part, source="scripted")
        table = table.map(transform, batched=True, load_from_cache_file=False)
        assert {name: table.features[name] for name in PAIR_FEATURES} == dict(PAIR_FEATURES)
    assert len(table) == 10_000
    bad = table.filter(lambda row: row["error"] is not None)
    assert {row["tag"] for row in bad} == {0} and [row["error"].split(":")[0] for row in bad] == ["unparsed"] * 2 + [
        "parent"
    ]

    scored = table.map(StudentScorer(model, tokenizer, template="plain"), batched=True)
    assert all(scored.features[name] == datasets.Value("float64") for name in SCORE_COLUMNS)
    assert sum(value is None for value in scored["ifd"]) == 3
    chosen = select(scored, ifd_gate=None, r_ifd_gate=None, keep=None)
    assert chosen["row_id"][:] == list(dict.fromkeys(scored["row_id"])) and chosen.features == scored.features
    assert len(select_top(chosen, share=0.5)) == 1250
    for made in (to_training_ids(table, tokenizer), to_messages(table), to_prompt_completion(table)):
        assert len(made) == 9_997 and made.features["tag"] == table.features["tag"]
    table.save_to_disk(tmp_path / "table")
    assert datasets.load_from_disk(tmp_path / "table").features == table.features


def test_the_demo_has_recorded_replies_for_every_call(tmp_path):
    from hf_reflect import Teacher

    teacher = Teacher("any", base_url="http://127.0.0.1:9/v1", ledger=str(tmp_path / "ledger.sqlite"))
    demo.record(teacher)
    table = to_pairs(datasets.load_dataset("json", data_files=demo.PAIRS, split="train", cache_dir=str(tmp_path)))
    for part in ("instruction", "response"):
        transform = ReflectionTransform(teacher, part)
        assert transform.prefetch(table)["asked"] == 0
        table = table.map(transform, batched=True, load_from_cache_file=False)
    codes = {error.split(":")[0] for error in table["error"] if error}
    assert {"refused", "truncated", "placeholder", "unparsed", "unchanged", "parent"} == codes
    preamble = [
        text for text in table["response"] if text and text.lower().startswith(("here is a new", "better answer"))
    ]
    assert preamble == [] and any(pair["input"] for pair in table)


def test_the_demos_student_can_be_made_in_a_moment(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    demo.build_student(tmp_path / "student", steps=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.decode(tokenizer("naïve café ✓")["input_ids"]) == "naïve café ✓"


def test_importing_is_quick_and_light():
    code = (
        "import sys, time; t = time.perf_counter(); import hf_reflect; "
        "print(sorted({'torch', 'openai', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_scorer_and_templates_take_a_table_without_extras(student):
    model, tokenizer = student
    table = datasets.Dataset.from_list([{"instruction": "Say hi.", "input": "", "response": "Hi."}])
    assert tiny_llama(8).config.vocab_size == 8
    assert StudentScorer(model, tokenizer).score(table)["ifd"][0] > 0


def test_two_teachers_compete_and_the_student_takes_the_best_version_of_each_pair(student, rows, tmp_path):
    """Two endpoints, one ledger; the winner may be either's, and is the one that a plain look at the scores says."""
    from endpoint import Endpoint, rewriting

    from hf_reflect import Teacher

    def terse(request):
        return rewriting(request).replace("A longer and better answer", "Briefly").replace("step by step", "now")

    table = to_pairs(rows)
    with Endpoint(models=("wordy",)) as one, Endpoint(terse, models=("terse",)) as other:
        for part in ("instruction", "response"):
            for name, url in (("wordy", one.url), ("terse", other.url)):
                transform = ReflectionTransform(Teacher(name, base_url=url, ledger=tmp_path / "ledger.sqlite"), part)
                transform.prefetch(table)
                table = table.map(transform, batched=True, load_from_cache_file=False)
        assert len(one.requests) == len(other.requests) == 3 * len(rows)
    assert len(table) == 7 * len(rows) and set(table["source"]) == {"", "wordy", "terse"}
    scored = table.map(StudentScorer(*student, template="plain"), batched=True)
    chosen = select(scored, ifd_gate=None, r_ifd_gate=None, keep=None)
    for winner in chosen:
        versions = [row for row in scored if row["row_id"] == winner["row_id"]]
        first = max((v for v in versions if "response" not in v["variant"]), key=lambda v: v["ifd"])
        children = [v for v in versions if "response" in v["variant"] and v["instruction"] == first["instruction"]]
        best = min([first, *children], key=lambda v: v["r_ifd"])
        assert (winner["variant"], winner["source"]) == (best["variant"], best["source"])
    assert len(set(chosen["source"]) - {""}) == 2

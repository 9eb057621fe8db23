"""`reflect: selective`: the parts of it. Whole runs of the recipe: test_recipe.py."""

import gc
import random
import weakref

import pytest
from conftest import TEXTS, byte_level_tokenizer, tiny_llama
from datasets import Dataset

from hf_reflect import RULES, ReflectionTransform, recycling, select, to_training_ids
from hf_reflect.columns import SCORE_COLUMNS
from hf_reflect.errors import SettingsError
from hf_reflect.reflection import estimate_recycling
from hf_reflect.run import Run

SELECTIVE = [name for name, rule in RULES.items() if rule.among_all is None and name != "coherence"]


def scored_table(rows, seed):
    """All four versions of many rows, some unusable, with scores that are often equal and sometimes null."""
    draw = random.Random(seed)
    table = []
    for n in range(rows):
        usable = {"original": True, "instruction": draw.random() < 0.8, "response": draw.random() < 0.8}
        usable["instruction+response"] = usable["instruction"] and draw.random() < 0.8
        for variant, is_usable in usable.items():
            text = f"{variant} {n}" if is_usable else None
            row = {"row_id": str(n), "variant": variant, "source": "teacher" * (variant != "original")}
            row |= {"instruction": text, "input": "", "response": text}
            scores = {name: draw.choice([0.25, 0.5, 0.75, 1.0, 1.25, None]) for name in SCORE_COLUMNS}
            table.append(row | (scores if is_usable else dict.fromkeys(SCORE_COLUMNS)))
    order = {"original": 0, "response": 1, "instruction": 2, "instruction+response": 3}
    return Dataset.from_list(sorted(table, key=lambda row: (int(row["row_id"]), order[row["variant"]])))


def keys(table):
    return list(zip(table["row_id"], table["variant"], strict=True))


@pytest.mark.parametrize("rule", SELECTIVE)
@pytest.mark.parametrize("settings", [{}, {"keep": None}, {"ifd_gate": None, "r_ifd_gate": None}])
def test_the_winners_are_those_of_the_whole_table(rule, settings):
    whole = scored_table(400, seed=1)
    before = whole.filter(lambda row: "response" not in row["variant"])
    chosen = set(keys(select(before, rule, ifd_gate=None, r_ifd_gate=None, keep=None, seed=5)))
    answered = {(row_id, "response" if variant == "original" else f"{variant}+response") for row_id, variant in chosen}
    made = whole.filter(lambda row: "response" not in row["variant"] or (row["row_id"], row["variant"]) in answered)
    assert len(made) == 3 * 400
    playing = recycling.chosen_branches(made)
    assert set(keys(playing)) == chosen | answered and len(playing) == 2 * 400
    expected = keys(select(whole, rule, seed=5, **settings))
    assert keys(select(playing, rule, seed=5, **settings)) == expected
    assert expected


def test_rules_that_compare_all_versions_are_refused():
    compared = [name for name, rule in RULES.items() if rule.among_all is not None]
    assert compared == ["longest", "fit"]
    for rule in compared:
        with pytest.raises(SettingsError, match=f"The rule '{rule}' compares all versions .* `reflect: all`"):
            recycling.check_selective(rule, None)
    with pytest.raises(SettingsError, match="needs the column 'coherence', which nobody adds"):
        recycling.check_selective("coherence", None)
    with pytest.raises(SettingsError, match="With `candidates: you/table` nothing is asked"):
        recycling.check_selective("paper", "you/table")
    for rule in SELECTIVE:
        recycling.check_selective(rule, None)


def test_a_version_that_came_later_has_its_row_scored_again():
    whole = scored_table(3, seed=0)
    before = Dataset.from_list(
        [
            {**row, **dict.fromkeys(SCORE_COLUMNS, 1.0)}
            | ({"instruction": None, "response": None} if key == ("1", "instruction") else {})
            for key, row in zip(keys(whole), whole, strict=True)
            if "response" not in row["variant"]
        ]
    )
    texts = {"instruction": "It came.", "response": "Here."}
    now = [row | (texts if (row["row_id"], row["variant"]) == ("1", "instruction") else {}) for row in before]
    table = recycling.put_scores(Dataset.from_list(now).remove_columns(list(SCORE_COLUMNS)), before)
    assert keys(recycling.unscored(table)) == [("1", "original"), ("1", "instruction")]
    assert [row["ifd"] for row in table] == [1.0, 1.0, 1.0, None, 1.0, 1.0]
    bare = table.remove_columns(list(SCORE_COLUMNS))
    assert len(recycling.unscored(bare)) == 6
    assert len(recycling.unscored(recycling.put_scores(bare, before))) == 2


def test_the_estimate_counts_two_calls_a_row(pairs, teacher, endpoint):
    def counts():
        transforms = (ReflectionTransform(teacher, part) for part in ("instruction", "response"))
        estimate = estimate_recycling(*transforms, pairs, selective=True)
        return estimate["calls"], estimate["reused"]

    assert counts() == (16, 0) and endpoint.requests == []
    instruction, response = (ReflectionTransform(teacher, part) for part in ("instruction", "response"))
    table = pairs.map(instruction, batched=True, load_from_cache_file=False)
    assert counts() == (8, 8)
    chosen = table.select([0, 3, 5])  # of three rows one version each
    chosen.map(response, batched=True, load_from_cache_file=False)
    assert counts() == (5, 11)
    table.map(ReflectionTransform(teacher, "response"), batched=True, load_from_cache_file=False)
    assert counts() == (0, 16)


def test_nothing_of_the_student_stays_after_its_choice(pairs, teacher, tmp_path):
    from trl import SFTConfig, SFTTrainer

    run = Run(str(tmp_path / "run"))
    run.save("instructions", pairs.map(ReflectionTransform(teacher, "instruction"), batched=True))
    tokenizer = byte_level_tokenizer(TEXTS)
    students = []

    def build():
        rows = to_training_ids(recycling.unscored(run.load("instructions")), tokenizer, "vicuna", 256)
        arguments = SFTConfig(str(tmp_path / "out"), max_length=256, report_to="none", bf16=False, use_cpu=True)
        student = tiny_llama(len(tokenizer))
        students.append(weakref.ref(student))
        return SFTTrainer(student, args=arguments, train_dataset=rows, processing_class=tokenizer)

    gc.disable()  # so that chance does not do the work
    try:
        recycling.score(run, "instructions", build, "paper", "vicuna", seed=0)
    finally:
        gc.enable()
    assert len(students) == 1 and students[0]() is None
    scored = run.load("instructions")
    assert len(scored) == 16 and len(recycling.unscored(scored)) == 0 and None not in scored["ifd"][:]
    run.close()

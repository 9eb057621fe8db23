import math
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from datasets import Dataset, DatasetDict

from hf_reflect import select
from hf_reflect.errors import DataError
from hf_reflect.pairs import PAIR_FEATURES
from hf_reflect.published import PUBLISHED, SPLITS, Published, check_published, load_published
from hf_reflect.published.__main__ import main

VARIANTS = ["original", "instruction", "response", "instruction+response"]
LOSSES = (
    "loss_instruction",
    "loss_response",
    "loss_instruction_given_response",
    "loss_response_given_instruction",
)


def texts_of(rows):
    """N rows of (instruction, input, output) in each of the four splits."""
    names = ("instruction", "input", "output")
    splits = zip(SPLITS, zip(*rows, strict=True), strict=True)
    return DatasetDict(
        {s: Dataset.from_dict({"data": [dict(zip(names, v, strict=True)) for v in vs]}) for s, vs in splits}
    )


def scores_of(rows):
    """N rows of four versions, each four (loss, ppl) or None, as an empty dict becomes."""
    splits = {}
    for split, versions in zip(SPLITS, zip(*rows, strict=True), strict=True):
        data = [{"loss": v and [x for x, _ in v], "ppl": v and [x for _, x in v]} for v in versions]
        splits[split] = Dataset.from_dict({"data": data})
    return DatasetDict(splits)


def plain_texts(count):
    return texts_of([[(f"Ask {n}", "", f"{split} {n}") for split in SPLITS] for n in range(count)])


def passes(*losses):
    return [(loss, math.exp(loss)) for loss in losses]


FAILED = (0, 0)
NAN = (math.nan, math.nan)

TEXTS = [
    [
        ("Sort.", "3 1 2", "1 2 3"),
        ("Sort well.", "", "1, 2, 3"),
        ("Sort.", "3 1 2", "So: 1 2 3"),
        ("Sort well.", "", "So"),
    ],
    [("Sort.", "3 1 2", "1 2 3"), ("Wash.", None, ""), ("Sort.", " ", None), (None, "x", "Scrub.")],
]
SCORES = [
    [passes(2, 1.5, 1, 0.5), passes(3, 2, 1, 1.75), passes(2, 3, 1.5, 1), passes(1, 1, 2, 2)],
    [[*passes(2, 1, 1.5), FAILED], None, None, passes(1, 2, 3, 4)],
]


def test_the_four_splits_become_versions_of_one_row_together():
    table = load_published(texts_of(TEXTS))
    assert table.features == PAIR_FEATURES
    assert table["row_id"] == ["0"] * 4 + ["1"] * 4
    assert table["variant"] == VARIANTS * 2
    assert table["source"] == ["", "gpt-3.5-turbo", "gpt-3.5-turbo", "gpt-3.5-turbo"] * 2
    assert table["instruction"][:4] == ["Sort.", "Sort well.", "Sort.", "Sort well."]
    assert table["input"][:4] == ["3 1 2", "", "3 1 2", ""]
    assert table["response"][:4] == ["1 2 3", "1, 2, 3", "So: 1 2 3", "So"]
    assert table["history"] == [[]] * 8 and set(table["critique"]) == {None}


def test_empty_texts_are_null_and_say_so():
    table = load_published(texts_of(TEXTS))
    assert table["response"][4:] == ["1 2 3", None, None, "Scrub."]
    assert table["instruction"][4:] == ["Sort.", "Wash.", "Sort.", None]
    assert table["input"][4:] == ["3 1 2", "", "", "x"]
    assert table["error"] == [None] * 5 + ["unparsed: empty in the published table"] * 3


def test_losses_are_as_given_and_ratios_those_of_the_definition():
    table = load_published(texts_of(TEXTS), scores_of(SCORES))
    for place, version in enumerate(SCORES[0]):
        row = table[place]
        assert [row[name] for name in LOSSES] == [loss for loss, _ in version]
        alone_x, alone_y, x_given_y, y_given_x = (ppl for _, ppl in version)
        assert row["ifd"] == pytest.approx(y_given_x / alone_y, rel=1e-12)
        assert row["r_ifd"] == pytest.approx(x_given_y / alone_x, rel=1e-12)


def test_a_failed_pass_is_null_and_not_0():
    row = load_published(texts_of(TEXTS), scores_of(SCORES))[4]
    assert [row[name] for name in LOSSES] == [2, 1, 1.5, None]
    assert row["ifd"] is None and row["r_ifd"] == pytest.approx(math.exp(-0.5))
    assert row["published_ifd"] == 0 and row["published_r_ifd"] == pytest.approx(math.exp(-0.5))


def test_a_true_loss_of_0_stays():
    table = load_published(plain_texts(1), scores_of([[passes(2, 1, 0, 0)] * 4]))
    assert table[0]["loss_instruction_given_response"] == 0
    assert table[0]["ifd"] == pytest.approx(math.exp(-1)) and table[0]["r_ifd"] == pytest.approx(math.exp(-2))


def test_versions_without_text_or_without_scores_have_none():
    table = load_published(texts_of(TEXTS), scores_of(SCORES))
    for place in (5, 6, 7):
        assert {table[place][name] for name in (*LOSSES, "ifd", "r_ifd")} == {None}
    table = load_published(plain_texts(1), scores_of([[passes(2, 1, 1, 1), None, [], [NAN] * 4]]))
    for name in (*LOSSES, "ifd", "r_ifd", "published_ifd", "published_r_ifd"):
        assert table[name][0] is not None and table[name][1:] == [None] * 3


def test_objects_folders_and_the_hubs_layout_load_alike(tmp_path):
    texts, scores = texts_of(TEXTS), scores_of(SCORES)
    expected = load_published(texts, scores).to_list()
    for name, table in (("texts", texts), ("scores", scores)):
        table.save_to_disk(tmp_path / name)
        for split in SPLITS:
            (tmp_path / "hub" / name / "data").mkdir(parents=True, exist_ok=True)
            table[split].to_parquet(
                tmp_path / "hub" / name / "data" / f"{split}-00000-of-00001-0a1b2c3d4e5f6071.parquet"
            )
    assert load_published(tmp_path / "texts", str(tmp_path / "scores")).to_list() == expected
    assert load_published(str(tmp_path / "hub" / "texts"), tmp_path / "hub" / "scores").to_list() == expected


def test_splits_that_were_sorted_or_hold_only_nulls_load_alike():
    rows = [[(f"Ask {n}", None, f"{split} {n}") for split in SPLITS] for n in range(3)]
    texts = texts_of(rows)
    turned = DatasetDict({name: split.select([2, 1, 0]) for name, split in texts_of(rows[::-1]).items()})
    assert load_published(turned).to_list() == load_published(texts).to_list()
    assert set(load_published(texts)["input"]) == {""}


def test_the_table_goes_through_selection():
    selected = select(load_published(texts_of(TEXTS[:1]), scores_of(SCORES[:1])), "paper", None, None, None)
    assert selected["variant"] == ["instruction"]  # ifd 0.78 > 0.37; r-IFD e > 0.14


# The authors' two scripts once more, told row by row: ratios of perplexities, then two comparisons and two gates.


def naive_ratios(version):
    if not version:
        return math.nan, math.nan
    alone_x, alone_y, x_given_y, y_given_x = (float(ppl) for _, ppl in version)
    if alone_x == 0 or alone_y == 0:
        return 0.0, 0.0
    return y_given_x / alone_y, x_given_y / alone_x


def naive_authors_keep(row):
    (ifd, r_ifd), (new_ifd, new_r_ifd), (answer_ifd, answer_r_ifd), (both_ifd, both_r_ifd) = map(naive_ratios, row)
    if new_ifd > ifd:
        return both_r_ifd < new_r_ifd and both_r_ifd < 1 and both_ifd < 1
    return answer_r_ifd < r_ifd and answer_r_ifd < 1 and answer_ifd < 1


# And the paper rule as the design tells it: a score that failed is null, never wins, and does not pass a gate.


def naive_scores(version):
    if not version:
        return None, None
    losses = [None if ppl == 0 or math.isnan(ppl) else loss for loss, ppl in version]

    def ratio(given, alone):
        return None if None in (given, alone) else math.exp(given - alone)

    return ratio(losses[3], losses[1]), ratio(losses[2], losses[0])


def naive_paper_keeps(row, usable):
    scored = [naive_scores(version) if there else None for version, there in zip(row, usable, strict=True)]

    def winner(defender, challenger, better):
        if defender is None or challenger is None:
            return defender if challenger is None else challenger
        old, new = (scored[place][0 if better == "higher ifd" else 1] for place in (defender, challenger))
        if new is None or (old is not None and (new <= old if better == "higher ifd" else new >= old)):
            return defender
        return challenger

    there = [place if there else None for place, there in enumerate(usable)]
    first = winner(there[0], there[1], "higher ifd")
    if first is None:
        answer = there[2] if there[2] is not None else there[3]
    else:
        answer = there[3] if first == 1 else there[2]
    last = winner(first, answer, "lower r_ifd")
    return last in (2, 3) and all(score is not None and score < 1 for score in scored[last])


def random_version(random, grid):
    """Mostly four numbers; some passes failed, some were cut away whole, some versions were never scored."""
    losses = random.integers(1, 6, 4) / 2 if grid else random.normal(2, 0.6, 4).clip(0.1)
    version = passes(*losses.tolist())
    kind = random.random()
    if kind < 0.08:
        return None
    for place in range(4):
        if random.random() < 0.08:
            version[place] = NAN if random.random() < 0.3 else FAILED
    return version


@pytest.mark.parametrize("seed", range(8))
def test_the_numbers_are_those_of_a_naive_reading_with_failed_and_missing_scores(seed):
    random = np.random.default_rng(seed)
    texts = [
        [("Ask", "", "") if random.random() < 0.05 else ("Ask", "", f"Answer {split}") for split in SPLITS]
        for _ in range(400)
    ]
    rows = [[random_version(random, grid=seed % 2) for _ in SPLITS] for _ in texts]
    usable = [[bool(output) for _, _, output in row] for row in texts]
    found = check_published(load_published(texts_of(texts), scores_of(rows)), 17)
    kept = sum(naive_paper_keeps(row, there) for row, there in zip(rows, usable, strict=True))
    as_zero = sum(naive_authors_keep(row) for row in rows)
    failed = sum(
        there and None in naive_scores(version)
        for row, all_there in zip(rows, usable, strict=True)
        for version, there in zip(row, all_there, strict=True)
    )
    assert kept != as_zero and kept > 20 and failed > 100
    assert found == {
        "kept": kept,
        "expected": 17,
        "agrees": False,
        "failed": failed,
        "kept_with_failed_as_zero": as_zero,
    }


def test_without_failed_scores_the_paper_rule_keeps_what_the_authors_keep():
    random = np.random.default_rng(0)
    rows = [[passes(*random.normal(2, 0.6, 4).clip(0.1).tolist()) for _ in SPLITS] for _ in range(1000)]
    kept = sum(naive_authors_keep(row) for row in rows)
    table = load_published(plain_texts(1000), scores_of(rows))
    assert len(select(table, rule="paper")) == kept
    found = check_published(table, kept)
    assert (found["kept"], found["kept_with_failed_as_zero"], found["failed"]) == (kept, kept, 0)
    assert found["agrees"] is True and check_published(table, None)["agrees"] is None


def test_a_failed_score_passes_the_gates_only_when_it_counts_as_0():
    answered = passes(2, 2, 1, 1)
    rows = [[passes(2, 2, 1.5, 1), passes(2, 2, 1, 0.5), [FAILED] * 4, answered]]
    found = check_published(load_published(plain_texts(1), scores_of(rows)), None)
    assert found == {"kept": 0, "expected": None, "agrees": None, "failed": 1, "kept_with_failed_as_zero": 1}


def test_a_table_from_elsewhere_or_in_another_order_cannot_be_checked():
    with pytest.raises(DataError, match=r"`check_published` needs the columns 'ifd', 'r_ifd', 'published_ifd'"):
        check_published(load_published(texts_of(TEXTS)), 1)
    table = load_published(texts_of(TEXTS), scores_of(SCORES))
    for order in (range(1, 8), [1, 0, 2, 3, 4, 5, 6, 7], [0, 1, 2, 7, 4, 5, 6, 3]):
        with pytest.raises(DataError, match="needs the whole table, each row's versions together"):
            check_published(table.select(order), 1)
    assert check_published(table.select([4, 5, 6, 7, 0, 1, 2, 3]), 0) == check_published(table, 0)


def changed(table, name, split):
    return DatasetDict({**table, name: split})


def test_other_splits_are_named():
    texts = texts_of(TEXTS)
    three = DatasetDict({name: texts[name] for name in SPLITS if name != "reflect_response"})
    with pytest.raises(
        DataError, match="need the splits origin, .*, but are the splits origin, reflect_instruction, r"
    ):
        load_published(three)
    with pytest.raises(DataError, match="but are the splits .*, more"):
        load_published(DatasetDict({**texts, "more": texts["origin"]}))
    with pytest.raises(DataError, match="but are a Dataset"):
        load_published(texts["origin"])


def test_splits_of_different_lengths_are_refused():
    texts = texts_of(TEXTS)
    with pytest.raises(DataError, match="origin 2, reflect_instruction 2, reflect_response 2, reflect_both 1"):
        load_published(changed(texts, "reflect_both", texts["reflect_both"].take(1)))


@pytest.mark.parametrize(
    "column",
    [
        {"text": ["a", "b"]},
        {"data": ["a", "b"]},
        {"data": [{"instruction": "a", "output": "b"}] * 2},
        {"data": [{"instruction": "a", "input": {"b": 1}, "output": "c"}] * 2},
    ],
)
def test_other_columns_are_named(column):
    with pytest.raises(DataError, match="need a column `data` of instruction, input, output, but reflect_both has {"):
        load_published(changed(texts_of(TEXTS), "reflect_both", Dataset.from_dict(column)))


def test_scores_and_texts_are_not_taken_for_each_other():
    with pytest.raises(DataError, match="need a column `data` of loss, ppl, but origin has"):
        load_published(texts_of(TEXTS), texts_of(TEXTS))


def test_scores_of_another_number_of_rows_are_refused():
    with pytest.raises(DataError, match="The published scores have 1 rows, the texts 2"):
        load_published(texts_of(TEXTS), scores_of(SCORES[:1]))


def test_lists_that_are_not_four_numbers_are_named_by_row():
    rows = [SCORES[0], [*SCORES[0][:2], passes(1, 2, 3), SCORES[0][3]]]
    with pytest.raises(DataError, match="four numbers in `loss`, one a pass, but row 1 of reflect_response has 3"):
        load_published(texts_of(TEXTS), scores_of(rows))


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(DataError, match="published scores '.*nowhere' cannot be loaded"):
        load_published(texts_of(TEXTS), tmp_path / "nowhere")


def command(*arguments):
    line = [sys.executable, "-m", "hf_reflect.published", *map(str, arguments)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(line, cwd=ROOT, env=offline, capture_output=True, text=True)


def saved(folder, kept, dropped=0, failed=0):
    """Texts and scores of which the paper rule keeps so many; `failed` more only if a failed score is 0."""
    low, high = passes(2, 2, 1, 1), passes(2, 2, 1.5, 1)
    rows = [[high, low, low, low]] * kept + [[low, low, high, high]] * dropped
    rows += [[high, low, [FAILED] * 4, low]] * failed
    plain_texts(len(rows)).save_to_disk(folder / "texts")
    scores_of(rows).save_to_disk(folder / "scores")
    return "--texts", folder / "texts", "--scores", folder / "scores"


def test_the_command_says_that_a_published_number_comes_out(tmp_path):
    done = command("alpaca-7b", *saved(tmp_path, kept=37114, dropped=20))
    assert (done.stdout, done.returncode) == ("alpaca-7b: the paper rule keeps 37,114 rows, as published\n", 0)


def test_the_command_says_that_another_number_comes_out(tmp_path, capsys):
    folders = [str(part) for part in saved(tmp_path, kept=3, dropped=2, failed=4)]
    assert main(["wizardlm-13b", *folders]) == 1
    assert capsys.readouterr().out == (
        "wizardlm-13b: the paper rule keeps 3 rows, 46,064 are published "
        "(4 versions have a failed score; counted as 0, as by the authors: 7)\n"
    )
    assert main(["alpaca-13b", *folders]) == 0
    assert capsys.readouterr().out.startswith("alpaca-13b: the paper rule keeps 3 rows, no number is published (")


def test_among_all_a_number_that_differs_counts_more_than_a_table_that_is_not_there(tmp_path, monkeypatch, capsys):
    here = [str(tmp_path / name) for name in ("texts", "scores")]
    saved(tmp_path, kept=3)
    for name, rows in zip(PUBLISHED, (3, 4, None, 3), strict=True):
        monkeypatch.setitem(PUBLISHED, name, Published(*here, rows))
    monkeypatch.setitem(PUBLISHED, "wizardlm-7b", Published(here[0], str(tmp_path / "nowhere"), 3))
    assert main([]) == 1
    first, second, third, last = capsys.readouterr().out.splitlines()
    assert first == "alpaca-7b: the paper rule keeps 3 rows, as published"
    assert second == "alpaca-13b: the paper rule keeps 3 rows, 4 are published"
    assert third.startswith("wizardlm-7b: not run: The published scores")
    assert last == "wizardlm-13b: the paper rule keeps 3 rows, as published"
    monkeypatch.setitem(PUBLISHED, "alpaca-13b", Published(*here, 3))
    assert main([]) == 2


def test_the_command_says_what_it_could_not_run():
    done = command()
    lines = done.stdout.splitlines()
    for line, (name, published) in zip(lines, PUBLISHED.items(), strict=True):
        assert line.startswith(f"{name}: not run: The published texts '{published.texts}' cannot be loaded: ")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_tables_of_ones_own_go_with_one_name(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--texts", "somewhere"])
    assert stop.value.code == 2 and "name it" in capsys.readouterr().err

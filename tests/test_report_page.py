import base64
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import ROOT, TEXTS, byte_level_tokenizer, chromium
from hypothesis import given
from hypothesis import strategies as st

import hf_reflect.report.page as page_module
from hf_reflect import RULES, select
from hf_reflect.errors import DataError, SettingsError
from hf_reflect.ledger import Ledger
from hf_reflect.pairs import PAIR_FEATURES
from hf_reflect.recycling import chosen_branches
from hf_reflect.report.__main__ import main
from hf_reflect.report.differences import CUT, KEPT, NEW, differences, packed
from hf_reflect.report.lengths import lengths_of
from hf_reflect.report.page import build_report
from hf_reflect.report.plots import histogram
from hf_reflect.report.reading import read_run
from hf_reflect.report.words import percent, why_in_words
from hf_reflect.selection import VARIANTS, decide

ROWS = 60
SCORES = ("loss_instruction", "loss_response", "loss_instruction_given_response", "loss_response_given_instruction")
HOSTILE = "Close it: </script><script>window.bad = 1</script><img src=x onerror='window.bad = 2'><!--"
ODD = (
    HOSTILE,
    "עברית מימין לשמאל",
    "ა" * 400,
    "",
    "𝔘nicode 👩‍🚀 \u2028 next",
    "\x00 and \ufeff",
)
CODES = ("refused: no", "truncated: cut off", "my own check, without a colon", "check: too short")


def benchmark(monkeypatch):
    """The script that makes runs up, as a module."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    spec = importlib.util.spec_from_file_location("report_benchmark", ROOT / "tests" / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def versions_of(rows=ROWS, seed=0):
    """All versions of so many rows, with errors, odd texts and odd scores among them."""
    chance, found = np.random.default_rng(seed), []
    for row in range(rows):
        for place, variant in enumerate(VARIANTS):
            error = CODES[(row + place) % 4] if place and (row * 3 + place) % 7 == 0 else None
            instruction = f"Ask number {row}." if place in (0, 2) else f"Ask number {row}, but with more care."
            response = f"The quick brown fox number {row} sleeps." + " It sleeps long and well." * (place > 1)
            if row < len(ODD):
                response = ODD[row] if place < 2 else f"{ODD[row]} {place}"
            numbers = {name: float(chance.uniform(1, 4)) for name in SCORES}
            numbers |= {"ifd": float(chance.uniform(0.4, 1.2)), "r_ifd": float(chance.uniform(0.4, 1.2))}
            if row in (10, 11) and place == 0:
                numbers["ifd"] = (math.inf, None)[row - 10]
            found.append(
                {
                    "row_id": f"row {row} & <b>", "variant": variant, "source": "teacher" if place else "",
                    "instruction": None if error else instruction, "input": "",
                    "response": None if error else response,
                    "history": [{"role": "user", "content": HOSTILE}] * (row == 3),
                    "critique": f"It lacks depth. {HOSTILE}" if place else None, "error": error,
                    **{name: None if error else number for name, number in numbers.items()},
                    "score of my own <script>": row,
                }
            )  # fmt: skip
    return found


def table(versions):
    features = datasets.Features(
        {**PAIR_FEATURES, **{name: datasets.Value("float64") for name in (*SCORES, "ifd", "r_ifd")}}
    )
    others = {name: [row[name] for row in versions] for name in versions[0] if name not in features}
    known = datasets.Dataset.from_list(
        [{name: row.get(name) for name in features if name in versions[0]} for row in versions],
        features=datasets.Features({name: kind for name, kind in features.items() if name in versions[0]}),
    )
    for name, values in others.items():
        known = known.add_column(name, values)
    return known


def make(folder, candidates, selected=None, summary=None):
    candidates.save_to_disk(str(folder / "candidates"))
    if selected is not None:
        selected.save_to_disk(str(folder / "selected"))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def data_of(page, name="numbers"):
    """What the page's script reads."""
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)[1])


def column(numbers, name):
    kind, text = numbers["columns"][name]
    return np.frombuffer(base64.b64decode(text), kind.lower())


def outcomes(page):
    numbers = data_of(page)
    return {numbers["outcomes"][n]: k for n, k in Counter(column(numbers, "outcome").tolist()).items()}


def unpack(value, old):
    """As the page's script does."""
    if isinstance(value, str):
        return value
    if len(value) == 2 and all(isinstance(each, str) for each in value):
        return value[1]
    units, text, place = old.encode("utf-16-le"), "", 0
    for each in value:
        if isinstance(each, str):
            text += each
        else:
            some = units[2 * place : 2 * (place + abs(each))].decode("utf-16-le", "surrogatepass")
            place += abs(each)
            text += some if each > 0 else ""
    return text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A complete run's folder, and its versions."""
    folder = tmp_path_factory.mktemp("run")
    versions = versions_of()
    candidates = table(versions)
    costs = {
        "instruction": {"replies": 60, "asked": 60, "prompt_tokens": 1200, "completion_tokens": 900, "cost": 0.25},
        "scoring": {"seconds": 12.5},
    }
    summary = {
        "settings": {
            "data": {"dataset": HOSTILE, "split": "train"}, "teacher": {"model": HOSTILE},
            "student": {"model": "some/student"},
            "selection": {"rule": "paper", "ifd_gate": 1.0, "r_ifd_gate": 1.0, "keep": "reflected", "seed": 0},
        },
        "note": HOSTILE, "costs": costs, "calls": {"asked": 60, "table_reused": False},
        "source": {"rows": 70, "not_taken": 5, "invalid": 3, "not_preselected": 2},
    }  # fmt: skip
    make(folder, candidates, select(candidates), summary)
    (folder / "model").mkdir()
    history = [{"step": n, "loss": 3 / n} for n in range(1, 20)] + [
        {"step": 10, "eval_loss": 0.5},
        {"train_loss": 1.0},
    ]
    (folder / "model" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    with Ledger(folder / "ledger.sqlite") as ledger:
        ledger.correct(4321, 1.75, requests=17)
    build_report(folder)
    return folder, versions


@pytest.fixture(scope="module")
def page(run):
    return (run[0] / "report.html").read_text()


# ---- the differences

WORDS = st.lists(st.sampled_from(["fox", "dog", "the", " ", "\n", ".", "👩‍🚀", "a", "́", "\t ", "naïve"]), max_size=30)
TEXT = st.one_of(st.text(max_size=60), WORDS.map("".join))


@given(TEXT, TEXT)
def test_differences_give_back_both_texts_to_the_character(old, new):
    found = differences(old, new)
    assert "".join(text for kind, text in found if kind != NEW) == old
    assert "".join(text for kind, text in found if kind != CUT) == new
    assert all(text for _, text in found)
    if not any("\ud800" <= sign <= "\udfff" for sign in old + new):
        assert unpack(packed(found), old) == new
    if old == new:
        assert {kind for kind, _ in found} <= {KEPT}


def test_a_changed_word_is_marked_and_its_neighbours_are_not():
    assert differences("The quick brown fox sleeps.", "The quick red fox sleeps.") == [
        (KEPT, "The quick "), (CUT, "brown "), (NEW, "red "), (KEPT, "fox sleeps."),
    ]  # fmt: skip
    assert differences("one two", "one  two") == [(KEPT, "one"), (CUT, " "), (NEW, "  "), (KEPT, "two")]


@pytest.mark.parametrize("words", [2, 4, 12, 30, 100, 300, 3000])
def test_no_pair_takes_difflib_long_however_repetitive(words):
    old = [f"w{n % words}" for n in range(3_900)]
    started = time.perf_counter()
    for size in (300, 3_900):
        found = differences(" ".join(old[:size]), " ".join(old[:size][::-1]))
        assert "".join(text for kind, text in found if kind != NEW) == " ".join(old[:size])
    assert time.perf_counter() - started < 3  # at most 0.2 on an idle core; difflib alone takes up to minutes


def test_of_texts_too_long_to_be_compared_nothing_is_marked():
    assert differences("a b " * 20_000, "b a " * 20_000) is None
    assert differences("a b " * 20_000, "a b " * 20_000) == [(KEPT, "a b " * 20_000)]


# ---- the numbers


def test_rows_kept_and_lost_are_those_of_the_decisions_and_sum_up(run, page):
    folder, versions = run
    decisions = decide(table(versions))
    naive = Counter("kept" if each.kept else each.why.split(":")[0] for each in decisions)
    names = {"ifd not below 1": "IFD not below 1", "r_ifd not below 1": "r-IFD not below 1"}
    assert outcomes(page) == {names.get(name, name): count for name, count in naive.items()}
    assert sum(naive.values()) == ROWS and len(naive) > 3
    numbers = data_of(page)
    winners = [VARIANTS.index(versions[each.position]["variant"]) for each in decisions]
    assert column(numbers, "winner").tolist() == winners
    scores = [versions[each.position]["ifd"] for each in decisions]
    np.testing.assert_allclose(column(numbers, "ifd"), np.array([math.nan if s is None else s for s in scores]), 1e-6)
    with_code = Counter(
        code for row in range(ROWS)
        for code in {(v["error"] or "").split(":")[0] for v in versions[4 * row : 4 * row + 4]} - {""}
    )  # fmt: skip
    combinations = [numbers["combinations"][n] for n in column(numbers, "errors")]
    assert {
        numbers["codes"][n]: sum(n in some for some in combinations) for n in range(len(numbers["codes"]))
    } == with_code


def funnel_of(page):
    """(count, label) of every line of the funnel."""
    part = page[page.index('<ol class="funnel">') : page.index("</ol>", page.index('<ol class="funnel">'))]
    return [
        (int(number.replace(",", "").replace("−", "-")), label)
        for number, label in re.findall(r'class="count">([^<]*)</(?:strong|span)> <span>([^<]*)<', part)
    ]


def test_every_line_of_the_funnel_follows_from_the_one_before(page):
    lines = funnel_of(page)
    assert lines[:5] == [(70, "Source rows"), (-5, "not taken"), (-3, "no instruction pair"), (-2, "not preselected"),
                         (60, "Rows in the candidates")]  # fmt: skip
    left = 0
    for count, _ in lines:
        assert count < 0 or left in (0, count)
        left = count if count > 0 else left + count
    assert lines[-1] == (outcomes(page)["kept"], "Kept for training")


def test_versions_are_counted_by_variant_and_error(run, page):
    _, versions = run
    part = page[page.index('aria-label="Versions by variant"') :]
    cells = [
        [
            re.sub(r"<small>.*?</small>|<[^>]*>", "", cell).strip().replace("·", "0")
            for cell in re.findall(r"<t[hd].*?</t[hd]>", line)
        ]
        for line in re.findall(r"<tr.*?</tr>", part[: part.index("</table>")], re.S)
    ]  # fmt: skip
    codes = cells[0][3:]
    assert set(codes) == {code.split(":")[0] for code in CODES}
    for line, variant in zip(cells[1:5], VARIANTS, strict=True):
        of_it = [row for row in versions if row["variant"] == variant]
        by_code = Counter((row["error"] or "").split(":")[0] for row in of_it)
        assert list(map(int, line[1:])) == [ROWS, by_code[""], *(by_code[code] for code in codes)]
    assert list(map(int, cells[5][1:])) == [sum(int(line[n]) for line in cells[1:5]) for n in range(1, len(cells[0]))]


def test_what_was_kept_is_shown_by_variant_and_costs_by_stage(run, page):
    folder, _ = run
    kept = Counter(datasets.load_from_disk(folder / "selected")["variant"])
    part = page[page.index("Which version was kept") :]
    shown = re.findall(r'class="count">(\d+)</strong> <span>', part[: part.index("</ul>")])
    assert list(map(int, shown)) == [kept[variant] for variant in VARIANTS]
    assert "Left out, since" not in page and "or before. The ledger" in re.sub(r"\s+", " ", page)
    assert "17 requests, 4,321 tokens and 1.75 of money" in page and "12.50" in page and "0.25" in page
    assert "The training loss went from 3.000 (step 1) to 0.158 (step 19)." in page
    assert "1 infinite" in page and "without a value" in page


def test_every_text_in_the_page_is_that_of_the_table(run, page):
    _, versions = run
    rows = data_of(page, "texts")
    assert len(rows) == ROWS
    for row in rows:
        mine, read = versions[4 * row["n"] : 4 * row["n"] + 4], []
        assert [VARIANTS[each["v"]] for each in row["v"]] == list(VARIANTS) and row["id"] == mine[0]["row_id"]
        for shown, version in zip(row["v"], mine, strict=True):
            parent = read[shown["p"]] if "p" in shown else {}
            texts = {key: unpack(shown[key], parent.get(key) or "") if key in shown else None for key in "ir"}
            read.append(texts)
            assert (texts["i"], texts["r"]) == (version["instruction"], version["response"])
            assert shown.get("c") == version["critique"] and shown.get("e") == version["error"]
    assert sum("p" in each for row in rows for each in row["v"]) == 3 * ROWS


def test_a_report_is_the_same_every_time_and_nothing_in_it_leaves_the_file(run, page, tmp_path):
    assert build_report(run[0], tmp_path / "again.html").read_text() == page
    assert not re.search(r'(?:src|href)="(?!#|data:,)', page) and "url(http" not in page and "@import" not in page
    assert (
        "<script>window" not in page
        and "&lt;script&gt;window" in page
        and "\u2028" not in page.split("<main")[1].split('id="texts"')[1]
    )


# ---- why, in words

WHYS = {
    "ifd 0.6200 → 0.8100: instruction taken; r_ifd 0.5000 → 0.4100: instruction+response taken":
        "IFD rose 0.62 → 0.81, so the new instruction was taken; r-IFD fell 0.50 → 0.41, so the new response "
        "was taken.",
    "r_ifd not below 1: response won with r_ifd 1.0800; original stood alone; r_ifd 1.2000 → 1.0800: response taken":
        "Dropped: r-IFD 1.08 is not below the gate 1. There is no usable new instruction, so the old one stayed; "
        "r-IFD fell 1.20 → 1.08, so the new response was taken.",
    "ifd not below 1: response won with ifd null; ifd 0.9000 → 0.8000: instruction not taken; response stood alone":
        "Dropped: the version that won has no IFD, and the gate asks for one below 1. IFD fell 0.90 → 0.80, so the "
        "old instruction stayed; the new response had nothing to beat, so it was taken.",
    "response not reflected: original won; original stood alone; original stood alone":
        "Dropped: the original won, but its response was not rewritten. There is no usable new instruction, so the "
        "old one stayed; there is no usable new response, so the old one stayed.",
    "instruction+response stood alone": "The new response had nothing to beat, so it was taken.",
    "ifd 0.9320 → 0.9965: instruction taken; instruction stood alone":
        "IFD rose 0.932 → 0.997, so the new instruction was taken; there is no usable new response, so the old "
        "one stayed.",
    "ifd null → null: instruction not taken; a coin chose response":
        "Neither version has an IFD, so the old instruction stayed; a coin chose the new response.",
    "ifd null → inf: instruction taken; r_ifd 0.5 → 0.5: response not taken":
        "Only the new version has an IFD, so the new instruction was taken; r-IFD stayed at 0.50, so the old response "
        "stayed.",
    "no usable version": "Dropped: none of its versions that the rule looks at has both texts.",
    "response: the highest length of response": "The new response won: it is the longest response of the row.",
    "original: the lowest loss_response_given_instruction":
        "The original won: it is the lowest loss of response given instruction of the row.",
    "instruction+response: the first usable of instruction+response, instruction, response, original":
        "The new instruction with a new response won: it is usable, and the rule asks for it first.",
    "original: the first usable of instruction+response, instruction, response, original":
        "The original won: there is no usable new instruction with a new response, new instruction or new response.",
    "original: the first usable of response, original": "The original won: there is no usable new response.",
    "original: the first usable of original": "The original won: the rule takes nothing else.",
    "no usable version among response, original":
        "Dropped: of the new response and the original, none has both texts.",
}  # fmt: skip


@pytest.mark.parametrize("why", WHYS)
def test_why_is_said_in_sentences(why):
    assert why_in_words(why, kept=True) == WHYS[why]


@pytest.mark.parametrize("rule", RULES)
def test_every_reason_of_every_rule_has_its_sentence(rule):
    versions = table(versions_of()).add_column("coherence", [n % 17 / 17 for n in range(4 * ROWS)])
    for decision in decide(versions, rule=rule):
        said = why_in_words(decision.why, decision.kept)
        assert said.endswith(".") and "→:" not in said and "_" not in said and "stood alone" not in said, said
        assert "n+r" not in said and not re.search("first usable", said)
        assert said.startswith("Dropped") != decision.kept
        assert not re.search(r"\b(not taken|won with|taken;)", said) or ", so " in said


@pytest.mark.parametrize(("part", "whole", "words"), [
    (0, 5, "0 %"), (1, 1000, "< 1 %"), (1, 100, "1 %"), (50, 100, "50 %"), (9_999, 10_000, "> 99 %"), (5, 5, "100 %"),
    (0, 0, "0 %"),
])  # fmt: skip
def test_a_share_is_all_or_nothing_only_where_it_is(part, whole, words):
    assert percent(part, whole) == words


# ---- what a run's folder may lack


def test_candidates_alone_are_enough(tmp_path):
    """As `stage: recycle` leaves them: no scores, no choice, no summary."""
    rows = [{key: v for key, v in row.items() if key not in (*SCORES, "ifd", "r_ifd")} for row in versions_of(5)]
    page = build_report(make(tmp_path, table(rows))).read_text()
    assert outcomes(page) == {"not chosen yet": 5} and "No scores yet" in page and "no student has scored them" in page
    assert funnel_of(page) == [(5, "Rows in the candidates"), (-5, "not chosen yet")]
    assert "Which version would be kept" not in page and "the lines" not in page and "Dashed" not in page
    assert "What the words mean" in page and "The originals" in page


def test_scores_without_selected_say_what_would_be_kept(tmp_path):
    versions = table(versions_of(30))
    page = build_report(make(tmp_path, versions)).read_text()
    assert outcomes(page)["kept"] == len(select(versions)) and "There is no selected/ yet" in page
    assert funnel_of(page)[-1] == (len(select(versions)), "Would be kept")


def test_what_selected_holds_is_what_was_kept_and_a_difference_is_said(tmp_path):
    versions = table(versions_of(30))
    kept = select(versions)
    taken = kept["row_id"]
    others = versions.filter(lambda row: row["row_id"] not in taken and row["variant"] == "original")
    edited = datasets.concatenate_datasets([kept.select(range(2, len(kept))), others.select([0])])
    stranger = edited.select([0]).map(lambda row: {"row_id": "nowhere"})
    page = build_report(make(tmp_path, versions, datasets.concatenate_datasets([edited, stranger]))).read_text()
    assert outcomes(page)["kept"] == len(edited) == len(kept) - 1 and outcomes(page)["not in selected/"] == 2
    assert "For 3 rows selected/ holds something else" in page
    assert f"1 of {len(edited) + 1} rows of selected/ are not among the candidates" in page
    by_row = {row["id"]: row for row in data_of(page, "texts")}
    assert by_row[others[0]["row_id"]]["why"].startswith("Kept, since selected/ holds this version.")
    assert by_row[taken[0]]["why"].startswith("Not kept: selected/ does not hold this row.")


def test_selected_without_scores_is_counted_and_says_that_why_is_unknown(tmp_path):
    versions = table(versions_of(12))
    bare = versions.remove_columns([*SCORES, "ifd", "r_ifd"])
    kept = bare.select([4 * n for n in range(5)])
    page = build_report(make(tmp_path, bare, kept)).read_text()
    assert outcomes(page) == {"kept": 5, "not in selected/": 7}
    assert data_of(page, "texts")[0]["why"].startswith("Kept: selected/ holds this version")


def test_settings_come_from_the_selected_table_where_there_is_no_summary(tmp_path):
    versions = table(versions_of(30))
    kept = select(versions, "ifd", ifd_gate=None, r_ifd_gate=0.9, keep=None)
    make(tmp_path, versions, kept)
    made_with = {"selection": {"rule": "ifd", "ifd_gate": None, "r_ifd_gate": 0.9, "keep": None, "seed": 0}}
    (tmp_path / "selected" / "made_with.json").write_text(json.dumps(made_with))
    page = build_report(tmp_path).read_text()
    assert "something else" not in page and outcomes(page)["kept"] == len(kept) and "r-IFD below 0.9" in page


def test_of_a_selective_run_only_the_chosen_branch_plays(tmp_path):
    versions = [row for row in versions_of(40) if row["variant"] != "response" or int(row["row_id"].split()[1]) % 2]
    versions = [
        row for row in versions
        if row["variant"] != "instruction+response" or not int(row["row_id"].split()[1]) % 2
    ]  # fmt: skip
    candidates = table(versions)
    summary = {"settings": {"reflect": {"order": "selective", "rule": "paper"}}}
    kept = select(chosen_branches(candidates))
    page = build_report(make(tmp_path, candidates, kept, summary)).read_text()
    assert outcomes(page)["kept"] == len(kept) and "something else" not in page
    assert sum(outcomes(page).values()) == 40


def test_tables_of_one_variant_and_of_several_teachers_are_shown(tmp_path):
    rewritten = [row | {"variant": "response"} for row in versions_of(8) if row["variant"] == "original"]
    rewritten[0] |= {"error": "refused: I would rather not"}  # keep_parent=False: the parent's text stays
    page = build_report(make(tmp_path / "one", table(rewritten))).read_text()
    assert "0 unusable, 1 beside usable text" in page and outcomes(page)
    several = versions_of(8) + [row | {"source": "second"} for row in versions_of(8, seed=1) if row["source"]]
    page = build_report(make(tmp_path / "several", table(several))).read_text()
    assert {len(row["v"]) for row in data_of(page, "texts")} == {7} and "56 versions" in page
    assert {each.get("s") for row in data_of(page, "texts") for each in row["v"]} == {None, "teacher", "second"}


@pytest.mark.parametrize(("gate", "keep", "expected"), [(99.0, None, 1.0), (0.001, "reflected", 0.0)])
def test_all_rows_kept_and_none_kept_are_both_fine(tmp_path, gate, keep, expected):
    versions = table([row | {"ifd": 0.5 + row["score of my own <script>"] / 100} for row in versions_of(10)])
    chosen_by = {"rule": "original", "ifd_gate": gate, "r_ifd_gate": gate, "keep": keep}
    if not expected:
        chosen_by["rule"] = "paper"
    page = build_report(make(tmp_path, versions, None, {"settings": {"selection": chosen_by}})).read_text()
    assert outcomes(page).get("kept", 0) == expected * 10


def test_conversations_of_several_exchanges_are_a_gain_and_no_share_exceeds_the_whole(tmp_path):
    summary = {"source": {"rows": 12, "not_taken": 2, "invalid": 0}}
    page = build_report(make(tmp_path, table(versions_of(18)), None, summary)).read_text()
    lines = funnel_of(page)
    assert lines[:4] == [(12, "Source rows"), (-2, "not taken"), (8, "pairs more than rows"),
                         (18, "Rows in the candidates")]  # fmt: skip
    assert '<span class="count">+8</span>' in page
    part = page[page.index('<ol class="funnel">') : page.index("</ol>", page.index('<ol class="funnel">'))]
    shares = [int(share) for share in re.findall(r"(\d+) %", part)]
    assert max(shares) == 100 and max(float(width) for width in re.findall(r"width: ([\d.]+)%", part)) <= 100
    kept = outcomes(page)["kept"]
    assert f'Would be kept</span> <span class="quiet">{percent(kept, 18)}' in part


ODD_NOTES = {
    "costs": [1], "costs of a stage": {"instruction": 3, "response": [1], "scoring": {"seconds": "x", "steps": None}},
    "source": [1], "rows": {"rows": "12", "invalid": {}}, "calls": 3, "note": ["<b>"], "settings": ["x"],
    "sections": {"student": "gpt2", "teacher": 3, "data": [], "selection": "paper", "reflect": "all"},
}  # fmt: skip


def test_of_a_summary_what_has_an_odd_form_is_left_out_and_said(tmp_path):
    make(tmp_path, table(versions_of(4)))
    for name, odd in ODD_NOTES.items():
        place = {"costs of a stage": "costs", "rows": "source", "sections": "settings"}.get(name, name)
        (tmp_path / "summary.json").write_text(json.dumps({place: odd}))
        (note,) = read_run(tmp_path).record.notes
        assert note.startswith("Left out, since it does not have the form that a run writes: "), name
    (tmp_path / "summary.json").write_text(
        json.dumps({"costs": ODD_NOTES["costs of a stage"]} | ODD_NOTES["sections"])
    )
    assert "Left out, since it does not have the form" in build_report(tmp_path).read_text()


def test_a_damaged_log_costs_nobody_the_report(tmp_path):
    make(tmp_path, table(versions_of(4)))
    for log in (
        "{",
        json.dumps({"log_history": 5}),
        json.dumps({"log_history": [{"loss": 1.0, "step": "x"}, {"loss": 1.0, "step": None}, 3]}),
    ):
        (tmp_path / "trainer_state.json").write_text(log)
        reading = read_run(tmp_path)
        assert "trainer_state.json" in reading.record.notes[0] and reading.record.history == []


def test_a_loss_that_is_no_number_is_said_beside_those_that_are(tmp_path):
    history = [{"step": n, "loss": loss} for n, loss in enumerate([3.0, 2.0, math.nan, math.inf])]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    page = build_report(make(tmp_path, table(versions_of(4)))).read_text()
    assert "3.000 → 2.000" in page and "2 of 4 are none" in page


def test_settings_that_cannot_choose_are_said_and_not_applied(tmp_path):
    versions = table(versions_of(12))
    make(tmp_path, versions)
    for choice in ({"rule": ["paper"]}, {"ifd_gate": "1"}, {"keep": "some"}, {"seed": 0.5}, {"rule": "mine"}):
        (tmp_path / "summary.json").write_text(json.dumps({"settings": {"selection": choice}}))
        reading = read_run(tmp_path)
        assert "The settings of the choice cannot be used" in reading.notes[0] and not reading.decided, choice
        assert reading.outcomes == ["not chosen yet"]
    select(versions).save_to_disk(str(tmp_path / "selected"))
    page = build_report(tmp_path).read_text()
    assert outcomes(page)["kept"] == len(select(versions)) and "<code>mine</code> is not known here" in page


def test_names_that_no_file_could_have_are_names(tmp_path):
    names = {"data": {"dataset": "a" * 300, "split": 3}, "student": {"model": "a" * 300}, "teacher": {"model": "b\0c"}}
    page = build_report(make(tmp_path, table(versions_of(2)), None, {"settings": names})).read_text()
    assert f"<title>Report: {'a' * 300}</title>" in page


def test_saved_versions_that_cannot_be_used_have_no_length(tmp_path):
    versions, tokenizer = table(versions_of(20)), byte_level_tokenizer(TEXTS)
    unusable = [place for place, text in enumerate(versions["response"]) if text is None][:1]
    page = build_report(make(tmp_path, versions, versions.select(unusable)), tokenizer=tokenizer).read_text()
    assert column(data_of(page), "length")[unusable[0] // 4] == 0 and "1 of the rows of selected/ lack a text" in page
    places = np.array([0, unusable[0], 4])
    lengths = lengths_of(read_run(tmp_path), places, tokenizer)["response"][places]
    assert np.isnan(lengths).tolist() == [False, True, False]


def test_numbers_of_the_filters_are_exact_at_their_limits(tmp_path):
    """As the page compares: both sides in single precision."""
    scores = [0.6, 0.7, 0.9, 0.99999999, 1.0]
    rows = [row | {"ifd": scores[n // 4], "r_ifd": 0.5, "response": "x" * (70_000 + n // 4), "error": None,
                   "instruction": "Ask."} for n, row in enumerate(versions_of(5))]  # fmt: skip
    summary = {"settings": {"selection": {"rule": "original"}}}
    numbers = data_of(build_report(make(tmp_path, table(rows), None, summary)).read_text())
    found = column(numbers, "ifd")
    for limit, below, above in ((0.6, 1, 5), (0.7, 2, 4), (0.9, 3, 3), (1.0, 5, 1)):
        assert ((found <= np.float32(limit)).sum(), (found >= np.float32(limit)).sum()) == (below, above), limit
    assert column(numbers, "length").tolist() == [70_000 + n for n in range(5)]


def test_scores_beyond_all_measure_are_counted_and_not_drawn():
    before, after = np.array([1e308, -1e308, 0.5, 0.7]), np.array([0.6])
    figure = histogram("ifd", "IFD", "IFD", before, after, ("originals", "kept"), 1.0)
    assert "Originals: mean 0.600" in figure.words and "2 beyond 1e+15" in figure.words


def test_an_input_that_a_rewrite_took_away_is_shown_as_taken_out(tmp_path):
    rows = [row | {"error": None, "instruction": "Ask.", "response": "Answer."} for row in versions_of(1)]
    for row, text in zip(rows, ("Good morning", "", None, "Good evening"), strict=True):
        row["input"] = text
    rows[0]["response"] = rows[1]["response"] = "Answer."
    shown = data_of(build_report(make(tmp_path, table(rows))).read_text(), "texts")[0]["v"]
    assert [each["x"] for each in shown[:3]] == ["Good morning", [-12], [-12]]
    assert unpack(shown[3]["x"], "") == "Good evening"


def test_codes_that_are_whole_sentences_are_cut(tmp_path):
    rows = [row | {"error": f"{'long ' * 100_000}{n % 3}", "response": None} if row["variant"] == "response" else row
            for n, row in enumerate(versions_of(6))]  # fmt: skip
    codes = read_run(make(tmp_path, table(rows))).codes
    assert max(map(len, codes)) <= 41 and sum(code.startswith("long") for code in codes) == 1


def test_rows_without_any_usable_version_and_one_row_alone_are_fine(tmp_path):
    nothing = [row | {"instruction": None, "response": None, "error": None} for row in versions_of(1)]
    page = build_report(make(tmp_path, table(nothing))).read_text()
    assert "no usable version" in outcomes(page) or "not chosen yet" in outcomes(page)
    assert "unknown" in page


def test_more_error_codes_than_a_filter_can_list_are_put_together(tmp_path):
    rows = [row | {"error": f"code-{n}: {n}", "response": None} if row["variant"] == "response" else row
            for n, row in enumerate(versions_of(50))]  # fmt: skip
    numbers = data_of(build_report(make(tmp_path, table(rows))).read_text())
    assert len(numbers["codes"]) == 31 and numbers["codes"][-1] == "other"
    assert all(any(numbers["combinations"][n]) or numbers["combinations"][n] for n in column(numbers, "errors"))


def test_texts_too_long_for_a_page_are_cut_and_it_is_said(tmp_path):
    rows = versions_of(3)
    rows[0]["response"] = "word " * 200_000
    path = build_report(make(tmp_path, table(rows)))
    assert path.stat().st_size < 1e6 and "980,000 characters more, which are in candidates/" in path.read_text()


def test_of_a_table_that_does_not_fit_every_kind_of_row_can_be_read_and_all_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "_MOST_BYTES", 1_500_000)
    monkeypatch.setattr(page_module, "_LEAST_TEXTS", 0)
    chance = np.random.default_rng(0)
    words = [f"w{n}" for n in range(2000)]
    rows = versions_of(300)
    for row in rows:
        row["response"] = row["response"] and " ".join(chance.choice(words, 600))
    rows[8:12] = [row | {"instruction": None, "response": None, "error": "unparsed: all of it"} for row in rows[8:12]]
    path = build_report(make(tmp_path, table(rows)))
    page = path.read_text()
    readable, numbers = data_of(page, "texts"), data_of(page)
    assert 1_400_000 < path.stat().st_size < 1_510_000 and 50 < len(readable) < 250
    assert sum(outcomes(page).values()) == 300
    kinds = set(zip(column(numbers, "outcome").tolist(), column(numbers, "winner").tolist(), strict=True))
    shown = [row["n"] for row in readable]
    assert kinds == {(int(column(numbers, "outcome")[n]), int(column(numbers, "winner")[n])) for n in shown}
    assert shown == sorted(shown) and 2 in shown


def test_texts_have_a_share_of_their_own_and_the_page_says_whether_every_kind_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "_MOST_BYTES", 1000)  # as if the numbers had taken all of it
    folder = make(tmp_path, table(versions_of(30)))
    whole = build_report(folder).read_text()
    assert len(data_of(whole, "texts")) == 30 and "All 30 rows are here." in whole
    monkeypatch.setattr(page_module, "_LEAST_TEXTS", 20_000)
    some = build_report(folder).read_text()
    assert 3 < len(data_of(some, "texts")) < 30 and "drawn so that every outcome" in some
    monkeypatch.setattr(page_module, "_LEAST_TEXTS", 2_000)
    few = build_report(folder).read_text()
    assert 0 < len(data_of(few, "texts")) < 4 and "a sample in which not every kind of row is" in few
    monkeypatch.setattr(page_module, "_LEAST_TEXTS", 0)
    none = build_report(folder).read_text()
    assert not data_of(none, "texts") and "No texts are in this file" in none


# ---- misuse, and the command line


def test_a_folder_without_candidates_says_what_to_run(tmp_path, capsys):
    with pytest.raises(DataError, match="There is no folder .*nowhere"):
        build_report(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no candidates/.*--stage recycle --output_dir"):
        build_report(tmp_path)
    assert main([str(tmp_path)]) == 1 and "has no candidates/" in capsys.readouterr().err
    make(tmp_path, table(versions_of(2)).select([]))
    with pytest.raises(DataError, match="has no rows"):
        build_report(tmp_path)


def test_an_output_that_is_a_folder_says_to_name_a_file(tmp_path):
    make(tmp_path, table(versions_of(2)))
    with pytest.raises(SettingsError, match="which is a folder. Name a file in it."):
        build_report(tmp_path, tmp_path)


def test_a_broken_summary_and_a_broken_table_say_which(tmp_path):
    make(tmp_path, table(versions_of(2)))
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match="summary.json cannot be read"):
        build_report(tmp_path)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "candidates" / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a saved dataset"):
        build_report(tmp_path)


def test_half_a_character_in_the_summary_becomes_a_question_mark(tmp_path):
    summary = {"note": "half \ud83d of one", "settings": {"data": {"dataset": "\udc80"}}}
    assert "half ? of one" in build_report(make(tmp_path, table(versions_of(2)), None, summary)).read_text()


def test_a_ledger_that_is_none_costs_nobody_the_report(tmp_path):
    make(tmp_path, table(versions_of(2)))
    (tmp_path / "ledger.sqlite").write_bytes(b"no database")
    assert build_report(tmp_path).exists()


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    make(tmp_path, table(versions_of(2)))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SettingsError, match=re.escape("pip install 'hf_reflect[report]'")):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_command_line_writes_where_it_is_told(run, tmp_path, capsys):
    assert main([str(run[0]), "--output", str(tmp_path / "new" / "page.html")]) == 0
    assert "page.html (" in capsys.readouterr().out and (tmp_path / "new" / "page.html").exists()


@pytest.mark.slow
def test_the_module_can_be_run(run, tmp_path):
    line = [sys.executable, "-m", "hf_reflect.report", str(run[0]), "--output", str(tmp_path / "new" / "page.html")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "page.html (" in done.stdout and (tmp_path / "new" / "page.html").exists()


def test_lengths_are_tokens_where_the_students_tokenizer_is_at_hand(tmp_path):
    versions = versions_of(12)
    make(tmp_path, table(versions))
    tokenizer = byte_level_tokenizer(TEXTS)
    tokenizer.save_pretrained(tmp_path / "student")
    page = build_report(tmp_path).read_text()
    lengths = [
        len(tokenizer(row["response"], add_special_tokens=False)["input_ids"])
        for row in versions if row["variant"] == "original" and row["response"] is not None
    ]  # fmt: skip
    assert 0 in lengths  # a text that is there, but empty, counts in the mean as it does in the statistics
    assert (
        "Lengths are in tokens" in page
        and f"Originals: mean {np.mean(lengths):,.0f}" in page.split('id="length-response"')[1]
    )


# ---- in a browser

PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
DESK = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("downloads")) as window:
        yield window


@contextmanager
def seen(browser, screen=DESK, colours="light"):
    """The browser as a device with these colours."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = [{"name": "prefers-color-scheme", "value": colours}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    yield browser


@pytest.fixture
def opened(browser, run):
    with seen(browser):
        browser.get("about:blank")
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get((run[0] / "report.html").as_uri())
        yield browser


def said(browser):
    return browser.find_element("id", "count").text


def choose(browser, name, value):
    """As a person does: a value, and the event that follows."""
    browser.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input', {bubbles: true}));",
        name,
        value,
    )


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def test_the_page_opens_without_complaint_asks_for_nothing_and_runs_no_script_of_the_data(opened):
    assert opened.get_log("browser") == []
    requests = [
        message["params"]["request"]["url"]
        for entry in opened.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    ]
    assert all(url.startswith(("file:", "data:")) for url in requests)
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert opened.execute_script("return window.bad") is None
    assert HOSTILE in opened.find_element("id", "row").text
    assert HOSTILE in opened.find_element("tag name", "h1").text
    opened.execute_script("document.querySelectorAll('details').forEach((each) => each.open = true)")
    assert HOSTILE in opened.find_element("id", "content").text.split("critique")[1]
    assert opened.execute_script("return window.bad") is None and opened.get_log("browser") == []


def test_search_and_every_filter_change_the_count(opened, run):
    _, versions = run
    decisions = decide(table(versions))
    assert said(opened) == f"{ROWS} of {ROWS} rows match."
    winners = [versions[each.position] for each in decisions]
    for n, name in enumerate(data_of(opened.page_source)["outcomes"]):
        choose(opened, "outcome", str(n))
        reasons = ["kept" if each.kept else each.why.split(":")[0] for each in decisions]
        wanted = sum(why.replace("r_ifd", "r-IFD").replace("ifd", "IFD") == name for why in reasons)
        assert said(opened) == f"{wanted} of {ROWS} rows match.", name
    choose(opened, "outcome", "")
    choose(opened, "winner", "3")
    assert said(opened) == f"{sum(w['variant'] == VARIANTS[3] for w in winners)} of {ROWS} rows match."
    choose(opened, "winner", "")
    choose(opened, "ifd-min", "0.6")
    choose(opened, "r_ifd-max", "0.7")
    wanted = sum((w["ifd"] or 0) >= 0.6 and w["r_ifd"] <= 0.7 for w in winners)
    assert 0 < wanted < ROWS and said(opened) == f"{wanted} of {ROWS} rows match."
    opened.find_element("css selector", "button[type=reset]").click()
    assert said(opened) == f"{ROWS} of {ROWS} rows match."
    choose(opened, "code", "-1")
    clean = sum(not any(v["error"] for v in versions[4 * row : 4 * row + 4]) for row in range(ROWS))
    assert said(opened) == f"{clean} of {ROWS} rows match."
    choose(opened, "code", "")
    opened.find_element("id", "query").send_keys("NUMBER 17 fox")
    assert said(opened) == f"1 of the {ROWS} rows match."
    assert opened.find_element("css selector", "#list button").text.startswith("Ask number 17.")


def test_rows_are_sorted_by_what_was_asked_for(opened, run):
    _, versions = run
    choose(opened, "order", "-r_ifd")
    best = max(decide(table(versions)), key=lambda each: versions[each.position]["r_ifd"])
    first = opened.find_element("css selector", "#list button")
    assert first.get_attribute("data-row") == best.row_id.split()[1]


def test_the_versions_stand_side_by_side_with_their_differences_marked(opened):
    opened.get(f"{opened.current_url.split('#')[0]}#row=row%2020%20%26%20%3Cb%3E")
    opened.refresh()
    assert opened.find_element("id", "row-heading").text == "Row 21"
    cards = {
        card.get_attribute("aria-label"): card for card in opened.find_elements("css selector", ".branch section")
    }
    assert list(cards) == ["Original", "New response", "New instruction", "New instruction and new response"]
    for card, old in (("New instruction", "."), ("New response", None)):
        added = [each.text for each in cards[card].find_elements("tag name", "ins")]
        taken = [each.text for each in cards[card].find_elements("tag name", "del")]
        assert added == ([", but with more care"] if old else [" It sleeps long and well."]) or added, card
        assert all(text.strip() in "." for text in taken)
    left, right = (cards[name].rect for name in ("Original", "New instruction"))
    assert left["y"] == right["y"] and left["x"] < right["x"]
    box = opened.find_element("css selector", "section[aria-label='New instruction'] .text")
    assert box.text == "Ask number 20, but with more care."
    opened.find_element("id", "marks").click()
    assert (
        not cards["New instruction"]
        .find_element("tag name", "ins")
        .value_of_css_property("text-decoration")
        .startswith("underline")
    )
    assert "IFD" in opened.find_element("css selector", ".why").text


def test_the_keyboard_alone_goes_through_the_rows(opened):
    from selenium.webdriver.common.keys import Keys

    heading = opened.find_element("id", "row-heading")
    assert heading.text == "Row 1"
    press(opened, "j")
    press(opened, "j")
    assert heading.text == "Row 3" and opened.current_url.endswith("#row=row%202%20%26%20%3Cb%3E")
    press(opened, "k")
    assert heading.text == "Row 2"
    press(opened, "/")
    press(opened, "jk/")
    assert opened.switch_to.active_element.get_attribute("value") == "jk/" and heading.text == "Row 2"
    assert said(opened).startswith("0 of")
    press(opened, Keys.ESCAPE)
    assert said(opened).startswith(f"{ROWS} of")
    press(opened, Keys.ESCAPE)
    active = opened.switch_to.active_element
    assert active.get_attribute("aria-current") == "true" and active.get_attribute("data-row") == "1"
    press(opened, Keys.ARROW_DOWN)
    assert heading.text == "Row 3" and opened.switch_to.active_element.get_attribute("data-row") == "2"
    for _ in range(15):
        press(opened, Keys.ARROW_DOWN)
    assert heading.text == "Row 18" and opened.switch_to.active_element.get_attribute("data-row") == "17"
    press(opened, Keys.ENTER)
    assert opened.switch_to.active_element.get_attribute("id") == "row-heading"
    press(opened, Keys.ESCAPE)
    assert opened.switch_to.active_element.get_attribute("data-row") == "17"
    opened.find_element("css selector", "#listing summary").click()
    opened.find_element("id", "keys").click()
    press(opened, "j")
    assert heading.text == "Row 18"


def test_the_focus_stays_in_the_list_where_pages_change(opened):
    from selenium.webdriver.common.keys import Keys

    def focus():
        return opened.execute_script("return document.activeElement.dataset.row ?? document.activeElement.id")

    opened.execute_script("document.querySelector('#list button').focus()")
    press(opened, *"j" * 14)
    assert opened.find_element("id", "row-heading").text == "Row 15" and focus() == "14"
    opened.execute_script("document.getElementById('after').focus()")
    for _ in range(3):
        press(opened, Keys.ENTER)
    assert opened.find_element("id", "page").text == "Page 5 of 5" and focus() == "48"
    opened.execute_script("document.getElementById('outcome').focus()")
    press(opened, Keys.ESCAPE)
    assert focus() == "outcome"


def test_a_row_that_does_not_match_says_so(opened):
    apart = opened.find_element("id", "apart")
    assert not apart.is_displayed()
    choose(opened, "query", "no text has this")
    assert said(opened).startswith("0 of") and apart.is_displayed()
    choose(opened, "query", "")
    assert not apart.is_displayed()


def test_an_address_opens_its_row_however_it_is_spelt(opened):
    page = opened.current_url.split("#")[0]
    for spelt in ("row%2020%20%26%20%3Cb%3E", "row 20 & <b>", "%72ow 20 %26 <b>"):
        opened.get("about:blank")
        opened.get(f"{page}#row={spelt}")
        assert opened.find_element("id", "row-heading").text == "Row 21", spelt
    opened.get("about:blank")
    opened.get(f"{page}#row=100%")
    assert said(opened).startswith("The row 100% is not among") and opened.get_log("browser") == []


def test_without_javascript_all_but_the_reader_is_there(browser, run):
    with seen(browser):
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        try:
            browser.get((run[0] / "report.html").as_uri())
            text = browser.find_element("tag name", "main").text
            assert "From source rows to kept rows" in text and "switched off" in text
            assert len(browser.find_elements("css selector", "figure svg")) == 7
            assert not browser.find_element("id", "desk").is_displayed()
        finally:
            browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize(("screen", "colours"), [(DESK, "light"), (DESK, "dark"), (PHONE, "light")])
def test_axe_finds_nothing_serious_and_nothing_is_wider_than_the_screen(browser, run, screen, colours):
    axe = pytest.importorskip("axe_playwright_python")
    script = (Path(axe.__file__).parent / "axe.min.js").read_text()
    with seen(browser, screen, colours):
        browser.execute_cdp_cmd("Page.enable", {})
        browser.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})
        try:
            browser.get((run[0] / "report.html").as_uri())
            browser.execute_script("document.querySelectorAll('details').forEach((each) => each.open = true)")
            browser.execute_script(script)
            found = browser.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
        finally:
            browser.execute_cdp_cmd("Page.setBypassCSP", {"enabled": False})
        serious = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
        assert [(each["id"], each["nodes"][0]["html"], each["nodes"][0]["failureSummary"]) for each in serious] == []
        assert browser.execute_script("return document.documentElement.scrollWidth") <= screen["width"]


# ---- at full size


@pytest.mark.slow
def test_a_page_of_70_000_rows_is_small_and_counts_them_all(tmp_path, browser, monkeypatch):
    made = benchmark(monkeypatch)
    counted = made.make_run(tmp_path, 70_000)
    took = made.write_page(tmp_path)
    assert took["size"] < 5_000_000
    page = (tmp_path / "report.html").read_text()
    assert outcomes(page) == counted["outcomes"] and funnel_of(page)[-1] == (counted["kept"], "Kept for training")
    assert f"{counted['versions']:,} versions" in page
    for code, count in counted["unusable"].items():
        assert f'<code>{code}</code> <span class="quiet">{count:,} unusable' in page
    with seen(browser):
        browser.get((tmp_path / "report.html").as_uri())
        readable = len(data_of(page, "texts"))
        assert said(browser) == f"70,000 of 70,000 rows match; {readable:,} of them can be read here."
        for n, name in enumerate(data_of(page)["outcomes"]):
            choose(browser, "outcome", str(n))
            assert said(browser).startswith(f"{counted['outcomes'][name]:,} of 70,000 rows match;")
        choose(browser, "outcome", "")
        for name, count in counted["by_variant"].items():
            choose(browser, "winner", str(VARIANTS.index(name)))
            choose(browser, "outcome", str(data_of(page)["outcomes"].index("kept")))
            assert said(browser).startswith(f"{count:,} of 70,000 rows match;")
    shutil.rmtree(tmp_path / "candidates")

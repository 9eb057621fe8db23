import hashlib
import math
import subprocess
import sys
from collections import Counter
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Value, concatenate_datasets, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_reflect import RULES, select, select_top
from hf_reflect.errors import DataError, SettingsError
from hf_reflect.selection import decide, kept_positions

VARIANTS = ("original", "instruction", "response", "instruction+response")
FIT = "loss_response_given_instruction"
SCORES = ("ifd", "r_ifd", "coherence", FIT)
FEATURES = Features(
    {name: Value("string") for name in ("row_id", "variant", "source", "instruction", "response")}
    | {name: Value("float64") for name in SCORES}
)


def table(*versions):
    """Versions as (variant, values); those of one row unless values name a row_id."""
    rows = []
    for variant, values in versions:
        row = {"row_id": "a", "variant": variant, "source": "" if variant == "original" else "teacher"}
        rows.append(row | {"instruction": "x", "response": "y"} | dict.fromkeys(SCORES) | values)
    return Dataset.from_list(rows, features=FEATURES)


def winners(dataset, rule="paper", ifd_gate=None, r_ifd_gate=None, keep=None, **more):
    chosen = select(dataset, rule, ifd_gate, r_ifd_gate, keep, **more)
    return list(chosen["variant"])


# The rules once more, row by row as the design tells them: (better at stage 1, better at stage 2), +1 where higher is.
STAGES = {
    "paper": (("ifd", +1), ("r_ifd", -1)),
    "ifd": (("ifd", +1), ("ifd", +1)),
    "r_ifd": (("r_ifd", -1), ("r_ifd", -1)),
    "coherence": (("coherence", +1), ("coherence", +1)),
    "perplexity": ((FIT, -1), (FIT, -1)),
}
ANCESTRY = {
    "original": ["original"],
    "instruction": ["instruction", "original"],
    "response": ["response", "original"],
    "reflected": ["instruction+response", "instruction", "response", "original"],
}


def coin(*parts):
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def is_null(value):
    return value is None or math.isnan(value)


def strictly_better(one, other, column, sign):
    if is_null(one[column]):
        return False
    return is_null(other[column]) or sign * one[column] > sign * other[column]


def best_of(versions, column, sign):
    """None of the others is better, and none before it is as good."""
    for version in versions:
        if not any(strictly_better(other, version, column, sign) for other in versions):
            return version
    return None


def naive_winner(versions, rule, seed):
    usable = [v for v in versions if v["instruction"] is not None and v["response"] is not None]
    usable.sort(key=lambda v: (VARIANTS.index(v["variant"]), v["source"] or ""))

    def named(variant):
        return [v for v in usable if v["variant"] == variant]

    if rule in ANCESTRY:
        return next((v for variant in ANCESTRY[rule] for v in named(variant)), None)
    if rule == "fit":
        return best_of(usable, FIT, -1)
    if rule == "longest":
        return max(usable, key=lambda v: len(v["response"]), default=None)  # the first of equals

    def play(number, defender, challengers):
        if rule == "random":
            toss = (seed, versions[0]["row_id"], number)
            champion = challengers[coin(*toss, "which") % len(challengers)] if challengers else None
            challenger_wins = coin(*toss) % 2 == 1
        else:
            champion = best_of(challengers, *STAGES[rule][number - 1])
            challenger_wins = champion and defender and strictly_better(champion, defender, *STAGES[rule][number - 1])
        if defender is None or champion is None:
            return defender or champion
        return champion if challenger_wins else defender

    first = play(1, next(iter(named("original")), None), named("instruction"))
    if first is None:
        answers = named("response") or named("instruction+response")
    elif first["variant"] == "original":
        answers = named("response")
    else:
        answers = [v for v in named("instruction+response") if (v["source"] or "") == (first["source"] or "")]
    return play(2, first, answers)


def naive_keeps(winner, rule, ifd_gate, r_ifd_gate, keep):
    if winner is None:
        return False
    if (rule in STAGES or rule == "random") and keep == "reflected" and "response" not in winner["variant"]:
        return False
    held = {"ifd": ifd_gate, "r_ifd": r_ifd_gate} if rule in STAGES else {}
    return all(gate is None or (not is_null(winner[name]) and winner[name] < gate) for name, gate in held.items())


NUMBERS = st.sampled_from([None, math.nan, math.inf, -math.inf, -0.0, 0.0, 0.5, 0.5, 0.75, 0.75, 0.9, 1.0, 1.25])
KEYS = st.tuples(st.sampled_from("abcdé"), st.sampled_from(VARIANTS), st.sampled_from(["", "", "t", "s", "ü", None]))
TEXTS = st.sampled_from([None, "", "y", "yy", "é", "日本語", *["yyy"] * 4])
VALUES = st.tuples(TEXTS, TEXTS, *[NUMBERS] * 4)


def key_of(version):
    row_id, variant, source = version[0]
    return row_id, variant, source or ""


def as_rows(versions):
    return [dict(zip(FEATURES, (*key, *values), strict=True)) for key, values in versions]


# few row_ids, sources and scores, so that versions compete, tie and are missing; any order of rows
TABLES = st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=25, unique_by=key_of).map(as_rows)
GATES = st.sampled_from([None, 1.0, 0.75, math.inf])


@settings(max_examples=60, deadline=None)
@given(
    TABLES, GATES, GATES, st.sampled_from(["reflected", None]), st.integers(0, 3), st.randoms(use_true_random=False)
)
def test_every_rule_chooses_as_a_reader_of_the_design_would_row_by_row(versions, ifd, r_ifd, keep, seed, chance):
    places = chance.sample(range(len(versions)), len(versions))
    stored = Dataset.from_list([versions[place] for place in places], features=FEATURES)
    mapped = stored.select([places.index(n) for n in range(len(versions))])  # the order of `versions` again
    rows = {}
    for place, version in enumerate(versions):
        rows.setdefault(version["row_id"], []).append(version | {"place": place})
    for rule in RULES:
        expected = []
        decisions = decide(mapped, rule, ifd, r_ifd, keep, seed)
        assert [decision.row_id for decision in decisions] == list(rows)
        for decision, row in zip(decisions, rows.values(), strict=True):
            winner = naive_winner(row, rule, seed)
            assert decision.position == (None if winner is None else winner["place"]), (rule, decision)
            assert decision.kept == naive_keeps(winner, rule, ifd, r_ifd, keep), (rule, decision)
            assert decision.why
            if decision.kept:
                expected.append(decision.position)
        if expected:
            assert kept_positions(mapped, rule, ifd, r_ifd, keep, seed) == sorted(expected)
            there = sorted(places.index(place) for place in expected)  # the same versions where rows stand otherwise
            assert kept_positions(stored, rule, ifd, r_ifd, keep, seed) == there
        else:
            with pytest.raises(DataError, match="keeps none of"):
                select(mapped, rule, ifd, r_ifd, keep, seed)


def test_every_rule_of_the_design_is_there_and_covered_here():
    assert set(RULES) == {*STAGES, *ANCESTRY, "longest", "fit", "random"}


@pytest.mark.parametrize(
    ("ifd", "r_ifd", "expected"),
    [
        ((0.5, 0.6), (0.5, 0.4), "instruction+response"),
        ((0.5, 0.5), (0.5, 0.4), "response"),  # a draw keeps the original
        ((0.5, 0.6), (0.4, 0.4), "instruction"),
        ((0.6, 0.5), (0.4, 0.5), "original"),
        ((0.5, None), (None, 0.9), "response"),  # null loses to any score
        ((None, 0.1), (0.5, None), "instruction"),
        ((None, None), (None, None), "original"),
    ],
)
def test_a_challenger_wins_only_if_strictly_better_and_null_never_wins(ifd, r_ifd, expected):
    old, new = ({"ifd": ifd[0], "r_ifd": r_ifd[0]}, {"r_ifd": r_ifd[1]})
    rewritten = {"ifd": ifd[1], "r_ifd": r_ifd[0]}
    dataset = table(("original", old), ("instruction", rewritten), ("response", new), ("instruction+response", new))
    assert winners(dataset) == [expected]


def test_the_first_stage_of_paper_looks_at_ifd_alone_and_the_second_at_r_ifd_alone():
    dataset = table(
        ("original", {"ifd": 0.5, "r_ifd": 0.2}),
        ("instruction", {"ifd": 0.6, "r_ifd": 0.9}),
        ("response", {"ifd": 0.9, "r_ifd": 0.1}),
        ("instruction+response", {"ifd": 0.1, "r_ifd": 0.8}),
    )
    assert winners(dataset) == ["instruction+response"]
    assert winners(dataset, "r_ifd") == ["response"]
    assert winners(dataset, "ifd") == ["instruction"]


@pytest.mark.parametrize("rule", [*STAGES, "random", "longest", "fit", "reflected"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_only_usable_version_is_taken_whatever_its_scores(rule, variant):
    dataset = table(*((v, {} if v == variant else {"response": None, "ifd": 0.5, "r_ifd": 0.5}) for v in VARIANTS))
    assert winners(dataset, rule) == [variant]


def test_the_best_of_several_sources_plays_and_brings_its_own_response():
    dataset = table(
        ("original", {"ifd": 0.5}),
        ("instruction", {"source": "a", "ifd": 0.6}),
        ("instruction+response", {"source": "a", "r_ifd": 0.1}),
        ("instruction", {"source": "b", "ifd": 0.7, "r_ifd": 0.5}),
        ("instruction+response", {"source": "b", "r_ifd": 0.4}),
        ("instruction", {"source": "c", "ifd": None}),
        ("instruction+response", {"source": "c", "r_ifd": 0.0}),
    )
    chosen = select(dataset, ifd_gate=None, r_ifd_gate=None)
    assert (chosen["variant"][0], chosen["source"][0]) == ("instruction+response", "b")


@pytest.mark.parametrize(("value", "kept"), [(0.99, True), (1.0, False), (1.01, False), (None, False)])
@pytest.mark.parametrize("gate", ["ifd", "r_ifd"])
@pytest.mark.parametrize("rule", STAGES)
def test_gates_are_strict_and_drop_nulls(rule, gate, value, kept):
    scores = {"ifd": 0.5, "r_ifd": 0.5, gate: value}
    dataset = table(("response", scores))
    assert [d.kept for d in decide(dataset, rule)] == [kept]
    assert [d.kept for d in decide(dataset, rule, **{f"{gate}_gate": None})] == [True]
    assert [d.kept for d in decide(dataset, rule, **{f"{gate}_gate": 1.005})] == [kept or value == 1.0]


@pytest.mark.parametrize("rule", ["random", "longest", "fit", *ANCESTRY])
def test_other_rules_know_no_gates(rule):
    assert all(d.kept for d in decide(table(("original", {"ifd": 3.0})), rule, keep=None))


@pytest.mark.parametrize("rule", ["longest", "fit", "instruction", "response", "reflected", "original"])
def test_plain_rules_know_no_filter(rule):
    assert winners(table(("original", {})), rule, keep="reflected") == ["original"]


@pytest.mark.parametrize("rule", [*STAGES, "random"])
def test_keep_reflected_drops_winners_whose_response_was_not_rewritten(rule):
    dataset = table(
        ("original", {}), ("instruction", {"row_id": "b"}), ("response", {"row_id": "c"}),
        ("instruction+response", {"row_id": "d"}),
    )  # fmt: skip
    assert winners(dataset, rule, keep="reflected") == ["response", "instruction+response"]
    assert winners(dataset, rule, keep=None) == list(VARIANTS)


def test_the_gate_of_an_absent_column_is_skipped():
    dataset = table(("original", {"ifd": 0.5}), ("response", {"ifd": 0.6, "r_ifd": 7.0}))
    assert winners(dataset.remove_columns("r_ifd"), "ifd", 1.0, 1.0, "reflected") == ["response"]
    with pytest.raises(DataError, match="r_ifd not below 1"):
        select(dataset, "ifd")


@pytest.mark.parametrize("column", ["ifd", "r_ifd"])
def test_paper_needs_both_scores_also_without_gates(column):
    dataset = table(("original", {"ifd": 0.5, "r_ifd": 0.5})).remove_columns(column)
    with pytest.raises(DataError, match=f"'paper' needs the column '{column}'.*Score the table first"):
        select(dataset, ifd_gate=None, r_ifd_gate=None, keep=None)


@pytest.mark.parametrize(
    ("rule", "column"),
    [("ifd", "ifd"), ("r_ifd", "r_ifd"), ("coherence", "coherence"), ("perplexity", FIT), ("fit", FIT)],
)
def test_row_id_variant_and_the_scores_of_the_rule_are_enough(rule, column):
    dataset = table(("original", {column: 0.5}), ("response", {column: 0.5}), ("instruction", {column: None}))
    columns = ["row_id", "variant", column]
    assert winners(dataset.select_columns(columns), rule, 1.0, 1.0) == ["original"]
    assert select(dataset.select_columns(columns), rule, keep=None).column_names == columns
    with pytest.raises(DataError, match=f"'{column}'"):
        select(dataset.remove_columns(column), rule)


@pytest.mark.parametrize("rule", ["random", *ANCESTRY])
def test_rules_without_scores_need_only_row_id_and_variant(rule):
    dataset = table(*((variant, {}) for variant in VARIANTS)).select_columns(["row_id", "variant"])
    assert winners(dataset, rule)[0] in (VARIANTS if rule == "random" else (rule, "instruction+response"))
    for column in ("row_id", "variant"):
        with pytest.raises(DataError, match=f"'{column}'"):
            select(dataset.remove_columns(column), rule)


def test_longest_counts_characters_and_ties_go_to_the_least_rewritten():
    lengths = {"original": "äöü", "instruction": "abcd", "response": "日本語文", "instruction+response": "four"}
    assert winners(table(*((v, {"response": lengths[v]}) for v in reversed(VARIANTS))), "longest") == ["instruction"]
    with pytest.raises(DataError, match="'longest' needs the column 'response'"):
        select(table(("original", {})).remove_columns("response"), "longest")


@pytest.mark.parametrize("first", range(4))
def test_reflected_falls_back_to_the_next_most_rewritten(first):
    order = ["instruction+response", "instruction", "response", "original"]
    unusable = {"instruction": None, "response": None}
    dataset = table(*((v, unusable if order.index(v) < first else {}) for v in VARIANTS))
    assert winners(dataset, "reflected") == [order[first]]


@pytest.mark.parametrize(("rule", "ancestor"), [("instruction", "original"), ("response", "original")])
def test_a_plain_rule_takes_an_ancestor_and_never_a_sibling(rule, ancestor):
    others = [v for v in VARIANTS if v not in (rule, ancestor)]
    gone = (rule, {"response": None})
    assert winners(table(gone, (ancestor, {}), *((v, {}) for v in others)), rule) == [ancestor]
    with pytest.raises(DataError, match="no usable version"):
        select(table(gone, *((v, {}) for v in others)), rule)


@pytest.mark.parametrize("missing", ["instruction", "response"])
def test_a_version_without_text_never_wins_and_one_with_a_remark_may(missing):
    dataset = table(("original", {"ifd": 0.1, "r_ifd": 0.9}), ("response", {"r_ifd": 0.1, "ifd": 0.1, missing: None}))
    assert winners(dataset) == ["original"]
    remark = table(("original", {"r_ifd": 0.9}), ("response", {"r_ifd": 0.1})).add_column(
        "error", [None, "unchanged: x"]
    )
    assert winners(remark) == ["response"]


def many(rows):
    return table(*((variant, {"row_id": f"row{n}"}) for n in range(rows) for variant in VARIANTS))


def test_random_depends_on_seed_and_row_id_alone():
    dataset = many(60)

    def chosen(of, seed=0):
        return {d.row_id: of[d.position]["variant"] for d in decide(of, "random", keep=None, seed=seed)}

    once = chosen(dataset)
    assert chosen(dataset.shuffle(seed=3)) == once
    part = dataset.filter(lambda row: row["row_id"] in ("row7", "row8", "row50"))
    assert chosen(part) == {row_id: once[row_id] for row_id in ("row7", "row8", "row50")}
    assert chosen(dataset.remove_columns(["ifd", "instruction", "response", "source"])) == once
    assert chosen(dataset, seed=1) != once


def test_the_coins_of_random_are_the_same_in_every_release():
    numbers = {variant: number for number, variant in enumerate(VARIANTS)}
    assert "".join(str(numbers[variant]) for variant in winners(many(12), "random")) == "323010002322"
    versions = [("original", "")] + [(variant, source) for variant in VARIANTS[1:] for source in "ab"]
    rows = [(v, {"row_id": f"row{n}", "source": source}) for n in range(8) for v, source in versions]
    chosen = select(table(*rows), "random", keep=None, seed=1)
    shown = [f"{numbers[v]}{source}" for v, source in zip(chosen["variant"], chosen["source"], strict=True)]
    assert shown == ["2a", "0", "0", "2b", "3b", "2b", "2b", "2b"]
    assert winners(many(12), "random", seed=np.int64(3)) == winners(many(12), "random", seed=3)


def test_the_two_coins_of_random_are_fair_and_independent():
    counts = Counter(winners(many(2000), "random"))
    assert set(counts) == set(VARIANTS)
    assert all(420 < count < 580 for count in counts.values())  # 500 expected, four standard deviations


def test_random_among_several_sources_does_not_depend_on_row_order():
    versions = [
        ("original", {}), *(("instruction", {"source": s}) for s in "abc"),
        *((v, {"source": s}) for v in ("response", "instruction+response") for s in "abc"),
    ]  # fmt: skip
    dataset = table(*((v, values | {"row_id": f"row{n}"}) for n in range(90) for v, values in versions))
    keys = [
        {
            of[d.position]["row_id"]: (of[d.position]["variant"], of[d.position]["source"])
            for d in decide(of, "random", keep=None)
        }
        for of in (dataset, dataset.shuffle(seed=1))
    ]
    assert keys[0] == keys[1]
    assert {source for _, source in keys[0].values()} == {"", "a", "b", "c"}
    with_parent = [key for key in keys[0].values() if key[0] == "instruction+response"]
    assert len({source for _, source in with_parent}) == 3


def test_the_winners_stand_in_the_order_of_the_input():
    rows = [("response", {"row_id": "c"}), ("original", {"row_id": "b"}), ("response", {"row_id": "a"})]
    rows += [("response", {"row_id": "b"}), ("original", {"row_id": "c"}), ("original", {"row_id": "a"})]
    chosen = select(table(*rows), "reflected")
    assert list(zip(chosen["row_id"], chosen["variant"], strict=True)) == [
        ("c", "response"), ("a", "response"), ("b", "response"),
    ]  # fmt: skip


def test_an_empty_selection_raises_with_the_gates_and_the_spread_of_both_scores():
    dataset = table(
        ("response", {"ifd": 1.5, "r_ifd": 0.5}),
        ("response", {"row_id": "b", "ifd": 1.25, "r_ifd": 0.5}),
        ("response", {"row_id": "c", "ifd": 0.5, "r_ifd": None}),
        ("original", {"row_id": "d", "ifd": 0.5, "r_ifd": math.nan}),
        ("original", {"row_id": "e", "response": None, "ifd": 7.0}),
        ("original", {"row_id": "f", "ifd": math.inf, "r_ifd": 0.25}),
    )
    with pytest.raises(DataError) as error:
        select(dataset, r_ifd_gate=0.9)
    for words in (
        "'paper' with ifd_gate=1.0, r_ifd_gate=0.9, keep='reflected' keeps none of 6 rows",
        "2 response not reflected; 2 ifd not below 1; 1 no usable version; 1 r_ifd not below 0.9.\n",
        "Of 5 usable versions ifd: min 0.500, 5 % 0.500, 25 % 0.500, median 1.250, 75 % 1.500, 95 % inf, max inf",
        "; r_ifd: min 0.250, 5 % 0.250, 25 % 0.250, median 0.500, 75 % 0.500, 95 % 0.500, max 0.500, 2 null.",
        "Raise the gates or set them to null",
        "`keep: null`",
    ):
        assert words in str(error.value)
    with pytest.raises(DataError, match="not reflected.\n.*\n`keep: null` also keeps winners") as error:
        select(table(("original", {"ifd": 0.5, "r_ifd": 0.5})))
    assert "gates" not in str(error.value)  # they drop nothing here
    with pytest.raises(DataError, match="none of 1 rows: 1 ifd not below 1.\nOf 1 usable versions ifd: 1 null; r_"):
        select(table(("response", {})))
    with pytest.raises(DataError, match="none of 1 rows: 1 no usable version.\nOf 0 usable versions ifd: 0 null"):
        select(table(("response", {"response": None})))
    bare = table(("original", {})).select_columns(["row_id", "variant"])
    with pytest.raises(DataError, match="none of 1 rows: 1 response not reflected.\nOf 1 usable versions no scores"):
        select(bare, "random")


@pytest.mark.parametrize("rule", RULES)
def test_a_table_without_rows_has_no_decisions_and_nothing_to_select(rule):
    for empty in (table(("original", {})).select([]), Dataset.from_dict({name: [] for name in FEATURES})):
        assert decide(empty, rule) == []
        with pytest.raises(DataError, match="no rows"):
            select(empty, rule)
    with pytest.raises(DataError, match="no rows"):
        select_top(empty, share=0.5)


@pytest.mark.parametrize(
    ("there", "paper", "plain"),
    [
        (["instruction"], "instruction", "instruction"),
        (["response"], "response", "response"),
        (["instruction+response"], "instruction+response", "instruction+response"),
        (["instruction", "response"], "instruction", "instruction"),
        (["instruction", "instruction+response"], "instruction+response", "instruction+response"),
        (["response", "instruction+response"], "response", "instruction+response"),
        (["original", "instruction+response"], "original", "instruction+response"),
        (["instruction", "response", "instruction+response"], "instruction+response", "instruction+response"),
    ],
)
def test_versions_that_are_missing_leave_the_field_to_those_that_are_there(there, paper, plain):
    """A new response plays against what it was written to; alone it does where that is not usable."""
    gone = {"response": None, "ifd": 0.9, "r_ifd": 0.1}
    for rest in ([], [(variant, gone) for variant in VARIANTS if variant not in there]):
        scored = [(v, {"ifd": 0.5, "r_ifd": 0.9 - 0.1 * VARIANTS.index(v)}) for v in there]
        assert winners(table(*scored, *rest)) == [paper]
        assert winners(table(*scored, *rest), "reflected") == [plain]


def test_a_version_that_is_there_twice_is_refused_with_where_and_what_to_do():
    rows = [("original", {}), ("response", {}), ("response", {"source": "b"}), ("response", {"ifd": 0.5})]
    with pytest.raises(DataError) as error:
        select(table(*rows, ("original", {"row_id": "b"}), ("original", {"response": None})))
    for words in ("2 of 6 versions", "('a', 'response', 'teacher') in place 3", "('a', 'original', '') in place 5"):
        assert words in str(error.value)
    for words in ("order of the rows", "`source`", "drop"):
        assert words in str(error.value)
    with pytest.raises(
        DataError, match=r"2 of 4 versions .*\('a', 'response'\) in place 2, .* in place 3\. .*`source`"
    ):
        select(table(*rows).remove_columns("source"))
    with pytest.raises(DataError, match=r"4 of 5 versions .*in place 3, …"):
        decide(table(*[("original", {})] * 5), "original")


def test_a_source_that_is_null_is_the_one_without_a_name():
    dataset = table(
        ("instruction", {"source": None, "ifd": 0.5}), ("instruction+response", {"source": "", "r_ifd": 0.1})
    )
    assert winners(dataset) == ["instruction+response"]
    with pytest.raises(DataError, match="1 of 2 versions repeat"):
        select(table(("response", {"source": ""}), ("response", {"source": None})))


@pytest.mark.parametrize("texts", ["x", None])
def test_versions_of_no_row_or_no_known_variant_are_refused(texts):
    ours, theirs = ("original", {}), {"instruction": texts}
    with pytest.raises(DataError, match="2 of 3 versions have no row_id, first that in place 1: "):
        select(table(ours, ("response", theirs | {"row_id": None}), ("response", theirs | {"row_id": None})))
    with pytest.raises(DataError, match="1 of 2 versions .* row 'a' with the variant None; there are original"):
        select(table(ours, (None, theirs)))
    with pytest.raises(DataError, match="1 of 2 versions .* row 'b' with the variant 'Response'; there are original"):
        decide(table(ours, ("Response", theirs | {"row_id": "b"})))
    left_out = table(ours, ("Response", theirs), (None, theirs | {"row_id": None})).select([0])
    assert len(decide(left_out)) == 1


def test_nan_is_null_and_infinity_is_a_number():
    for null in (None, math.nan):
        for number in (0.5, math.inf, -math.inf):
            dataset = table(("original", {"ifd": null}), ("instruction", {"ifd": number}))
            assert winners(dataset, "ifd") == winners(dataset, "paper") == ["instruction"]
            dataset = table(("original", {"ifd": number}), ("instruction", {"ifd": null}))
            assert winners(dataset, "ifd") == ["original"]
    assert winners(table(("original", {"ifd": 9.0}), ("instruction", {"ifd": math.inf})), "ifd") == ["instruction"]
    assert winners(table(("original", {"ifd": -9.0}), ("instruction", {"ifd": -math.inf})), "ifd") == ["original"]
    for value, gate, kept in (
        (math.inf, 1.0, False),
        (math.inf, math.inf, False),
        (-math.inf, 1.0, True),
        (9.0, math.inf, True),
        (math.nan, math.inf, False),
    ):
        assert decide(table(("response", {"ifd": value})), "ifd", gate, None)[0].kept == kept


def test_a_decision_says_why():
    def why(versions, rule="paper", **more):
        (decision,) = decide(table(*versions), rule, **more)
        return decision.why

    versions = [
        ("original", {"ifd": 0.5}),
        ("instruction", {"ifd": 0.75, "r_ifd": 0.5}),
        ("instruction+response", {"ifd": 1.5, "r_ifd": None}),
    ]
    story = "ifd 0.5000 → 0.7500: instruction taken; r_ifd 0.5000 → null: instruction+response not taken"
    assert why(versions, keep=None) == story
    assert why(versions) == f"response not reflected: instruction won; {story}"
    assert why(versions, keep=None, r_ifd_gate=0.25) == (
        f"r_ifd not below 0.25: instruction won with r_ifd 0.5000; {story}"
    )
    assert why(versions[:1], keep=None, ifd_gate=None) == (
        "r_ifd not below 1: original won with r_ifd null; original stood alone; original stood alone"
    )
    assert why(versions[2:], "r_ifd", ifd_gate=None, r_ifd_gate=None) == "instruction+response stood alone"
    assert why([("original", {"response": None})]) == "no usable version"
    assert why([("response", {})], rule="instruction") == "no usable version among instruction, original"
    assert why(versions, "response") == "original: the first usable of response, original"
    assert why(versions, "longest") == "original: the highest length of response"
    assert why(versions, "fit") == "original: the lowest loss_response_given_instruction"
    told = {decision.why for decision in decide(many(50), "random", keep=None)}
    assert told == {
        f"a coin {first}; a coin {second}"
        for first, seconds in {
            "kept original": ("kept original", "chose response"),
            "chose instruction": ("kept instruction", "chose instruction+response"),
        }.items()
        for second in seconds
    }


COLUMN_TYPES = {
    "row_id": [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()],
    "variant": [pa.large_string(), pa.dictionary(pa.int8(), pa.large_string()), pa.string_view()],
    "source": [pa.large_string(), pa.dictionary(pa.int32(), pa.string())],
    "response": [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()],
    "ifd": [pa.float32(), pa.float16(), pa.int64(), pa.int8(), pa.decimal128(5, 2)],
    "r_ifd": [pa.float32(), pa.uint8()],
    FIT: [pa.float32(), pa.int32()],
}


@pytest.mark.parametrize(("column", "kind"), [(name, kind) for name, kinds in COLUMN_TYPES.items() for kind in kinds])
def test_the_type_in_which_a_column_is_stored_changes_no_choice(column, kind):
    rng = np.random.default_rng(0)
    rows = []
    for row_id, variant in product("abcdefgh", VARIANTS):
        values = {name: None if rng.random() < 0.2 else float(rng.integers(4)) for name in SCORES}
        rows.append((variant, values | {"row_id": row_id, "response": "y" * rng.integers(5)}))
    dataset = table(*rows)
    stored = dataset.data.table
    place = stored.column_names.index(column)
    other = Dataset(stored.set_column(place, column, stored[column].cast(kind)).replace_schema_metadata(None))
    for rule in ("paper", "random", "longest", "fit", "reflected"):
        assert kept_positions(other, rule, 3.0, 3.0, None, 0) == kept_positions(dataset, rule, 3.0, 3.0, None, 0)
    for by in ("ifd", "longest", FIT):
        mine, theirs = (
            select_top(some, count=11, by=by).select_columns(["row_id", "variant"]) for some in (dataset, other)
        )
        assert mine.to_list() == theirs.to_list()


def test_columns_of_nothing_but_nulls_and_ids_that_are_numbers_are_taken_as_they_are():
    rows = [{"row_id": n, "variant": v, "source": None, "ifd": None, "r_ifd": None} for n in (7, 3) for v in VARIANTS]
    dataset = Dataset.from_list(rows)
    assert [(d.row_id, d.position) for d in decide(dataset)] == [(7, 0), (3, 4)]
    assert winners(dataset, keep=None) == ["original", "original"]
    assert list(select_top(dataset, count=4)["row_id"]) == [3] * 4
    unusable = Dataset.from_list([row | {"response": None} for row in rows])
    assert [d.why for d in decide(unusable)] == ["no usable version"] * 2


def test_a_column_that_holds_something_else_is_named_with_its_type():
    dataset = table(("response", {}))
    for column, values, words in (
        ("ifd", ["high"], "'ifd' holds string, .* double"),
        ("ifd", [[0.5]], "'ifd' holds list<.* double"),
        ("variant", [["response"]], "'variant' holds list<.* string"),
        ("row_id", [{"id": "a"}], "'row_id' holds struct<.* string"),
    ):
        other = dataset.remove_columns(column).add_column(column, values)
        with pytest.raises(DataError, match=words):
            select(other)
    with pytest.raises(DataError, match="'response' holds list<"):
        select(dataset.remove_columns("response").add_column("response", [["y"]]), "longest")


@pytest.mark.parametrize("order", ["shuffled", "sliced", "filtered", "joined", "on disk"])
def test_how_rows_are_stored_and_shown_changes_no_choice(order, tmp_path):
    places = product(range(40), enumerate(VARIANTS))
    plain = table(*((v, {"row_id": f"row{n}", "ifd": 0.01 * n, "r_ifd": 0.1 * i}) for n, (i, v) in places))
    plain.save_to_disk(tmp_path / "table", num_shards=3)
    dataset = {
        "shuffled": lambda: plain.shuffle(seed=1),
        "sliced": lambda: plain.select(range(30, 90)),
        "filtered": lambda: plain.filter(lambda row: row["row_id"] > "row2", load_from_cache_file=False),
        "joined": lambda: concatenate_datasets([plain.select(range(8)), plain.shuffle(seed=2).select(range(90, 99))]),
        "on disk": lambda: load_from_disk(str(tmp_path / "table")),
    }[order]()
    same = Dataset.from_list(dataset.to_list(), features=FEATURES)
    rules = ("paper", "random", "longest")
    expected = [select(same, rule, None, None, None).to_list() for rule in rules]
    top = select_top(same, count=5, by="r_ifd").to_list()
    for name, columns in ((None, None), ("arrow", None), ("numpy", ["ifd"]), ("torch", ["ifd"]), ("pandas", None)):
        shown = dataset.with_format(name, columns=columns)
        chosen = [select(shown, rule, None, None, None) for rule in rules]
        assert [rows.with_format(None).to_list() for rows in chosen] == expected
        assert all(rows.format == shown.format for rows in chosen)
        assert select_top(shown, count=5, by="r_ifd").with_format(None).to_list() == top


def test_gates_and_seeds_that_are_no_numbers_are_refused():
    dataset = table(("response", {"ifd": 0.5, "r_ifd": 0.5}))
    for name, value in product(("ifd_gate", "r_ifd_gate"), (True, "1.0", math.nan, [1.0])):
        with pytest.raises(SettingsError, match=f"`{name}` is a number, not "):
            select(dataset, **{name: value})
    for seed in (None, 0.5, True, "0"):
        with pytest.raises(SettingsError, match="`seed` is a whole number, not "):
            select(dataset, "random", seed=seed)
        with pytest.raises(SettingsError, match="`seed` is a whole number, not "):
            select_top(dataset, count=1, by="random", seed=seed)
    assert len(select(dataset, ifd_gate=1, r_ifd_gate=np.float32(0.75))) == 1


def test_selecting_needs_no_torch():
    code = "import hf_reflect.selection, sys; print({'torch', 'transformers', 'openai'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_unknown_names_are_refused_with_those_that_are_known():
    dataset = table(("original", {}))
    with pytest.raises(SettingsError, match="'best' is unknown.*paper.*longest"):
        select(dataset, "best")
    with pytest.raises(SettingsError, match="`keep`.*'all'"):
        select(dataset, "original", keep="all")
    with pytest.raises(DataError, match="variant 'rewritten'.*instruction\\+response"):
        select(table(("rewritten", {})), "original")


TOP = {
    "row_id": ["d", "b", "a", "e", "c", "f"],
    "response": ["12345", "1", None, "123", "123", ""],
    "ifd": [0.2, 0.9, None, 0.5, 0.5, -0.1],
}


@pytest.mark.parametrize(
    ("by", "descending"),
    [
        ("ifd", True),
        ("coherence", True),
        ("longest", True),
        ("r_ifd", False),
        (FIT, False),
        ("loss_instruction", False),
    ],
)
@pytest.mark.parametrize("count", range(1, 7))
def test_select_top_takes_the_best_by_every_score(by, descending, count):
    dataset = Dataset.from_dict(TOP | ({} if by == "longest" else {by: TOP["ifd"]}))
    values = [None if t is None else len(t) for t in TOP["response"]] if by == "longest" else TOP["ifd"]
    order = sorted(range(6), key=lambda i: TOP["row_id"][i])
    scored = sorted((i for i in order if values[i] is not None), key=lambda i: values[i], reverse=descending)
    best = (scored + [i for i in order if values[i] is None])[:count]
    chosen = select_top(dataset, count=count, by=by)
    assert chosen.to_list() == [dataset[i] for i in sorted(best)]  # in the input's order
    assert chosen.features == dataset.features


RANKED = st.lists(st.tuples(st.sampled_from("abcdeéz"), TEXTS, NUMBERS), min_size=1, max_size=15)


@settings(max_examples=60, deadline=None)
@given(RANKED, st.sampled_from(["ifd", "r_ifd", "loss_response", "longest", "random"]), st.data())
def test_select_top_takes_what_sorting_would_put_first(rows, by, data):
    count = data.draw(st.integers(1, len(rows)))
    column = "ifd" if by in ("longest", "random") else by
    features = Features({"row_id": Value("string"), "response": Value("string"), column: Value("float64")})
    dataset = Dataset.from_list([dict(zip(features, row, strict=True)) for row in rows], features=features)

    def rank(place):
        row_id, response, score = rows[place]
        score = {"longest": None if response is None else len(response), "random": coin(0, row_id)}.get(by, score)
        null = score is None or score != score
        return null, 0 if null else -score if by in ("ifd", "longest") else score, row_id, place

    expected = sorted(sorted(range(len(rows)), key=rank)[:count])
    chosen = select_top(dataset.add_column("place", list(range(len(rows)))), count=count, by=by)
    assert list(chosen["place"]) == expected
    backwards = dataset.add_column("place", list(range(len(rows)))).select(range(len(rows) - 1, -1, -1))
    if len({row[0] for row in rows}) == len(rows):
        assert sorted(select_top(backwards, count=count, by=by)["place"]) == expected


@pytest.mark.parametrize(
    ("share", "rows", "expected"), [(0.05, 6, 1), (0.3, 10, 3), (0.26, 10, 3), (0.24, 10, 2), (1.0, 7, 7), (1, 7, 7)]
)
def test_a_share_is_rounded_and_at_least_one_row(share, rows, expected):
    dataset = Dataset.from_dict({"row_id": [str(n) for n in range(rows)], "ifd": [n / 10 for n in range(rows)]})
    chosen = select_top(dataset, share=share)
    assert list(chosen["row_id"]) == [str(n) for n in range(rows - expected, rows)]


def test_select_top_refuses_rows_without_an_id_and_takes_the_same_at_random_in_every_release():
    with pytest.raises(DataError, match="1 of 6 versions have no row_id, first that in place 2"):
        select_top(Dataset.from_dict(TOP | {"row_id": ["d", "b", None, "e", "c", "f"]}), count=1)
    chosen = select_top(Dataset.from_dict({"row_id": [f"row{n}" for n in range(20)]}), count=5, by="random")
    assert list(chosen["row_id"]) == ["row0", "row7", "row9", "row11", "row15"]
    assert len(select_top(Dataset.from_dict(TOP), count=np.int64(2))) == 2
    assert len(select_top(Dataset.from_dict(TOP), share=np.float32(0.5))) == 3


def test_select_top_by_random_depends_on_seed_and_row_id_alone():
    dataset = Dataset.from_dict({"row_id": [f"row{n}" for n in range(200)]})
    once = select_top(dataset, share=0.25, by="random")["row_id"]
    assert len(once) == 50
    assert set(select_top(dataset.shuffle(seed=5), share=0.25, by="random")["row_id"]) == set(once)
    assert set(select_top(dataset, share=0.25, by="random", seed=1)["row_id"]) != set(once)
    assert set(select_top(dataset, share=0.5, by="random")["row_id"]) > set(once)  # less data is part of more
    assert list(once) != [f"row{n}" for n in range(50)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either `share` or `count`"),
        ({"share": 0.5, "count": 2}, "either `share` or `count`"),
        ({"share": 0.0}, "0 < share <= 1"),
        ({"share": 1.1}, "0 < share <= 1"),
        ({"share": -0.5}, "0 < share <= 1"),
        ({"count": 0}, "1 <= count <= 6"),
        ({"count": 7}, "1 <= count <= 6.*count=7"),
        ({"count": 2, "by": "beauty"}, "'beauty'.*ifd.*random"),
        ({"share": math.nan}, "`share` is a number, not nan"),
        ({"share": True}, "`share` is a number, not True"),
        ({"share": "0.5"}, "`share` is a number, not '0.5'"),
        ({"share": math.inf}, "0 < share <= 1"),
        ({"count": True}, "`count` is a whole number, not True"),
        ({"count": 2.0}, "`count` is a whole number, not 2.0"),
    ],
)
def test_select_top_refuses_arguments_that_make_no_sense(arguments, words):
    with pytest.raises(SettingsError, match=words):
        select_top(Dataset.from_dict(TOP), **arguments)


@pytest.mark.parametrize(("by", "column"), [("r_ifd", "r_ifd"), ("coherence", "coherence"), ("longest", "response")])
def test_select_top_names_the_column_that_it_misses(by, column):
    with pytest.raises(DataError, match=f"needs the column '{column}'"):
        select_top(Dataset.from_dict(TOP).remove_columns("response"), count=1, by=by)
    with pytest.raises(DataError, match="'row_id'"):
        select_top(Dataset.from_dict(TOP).remove_columns("row_id"), count=1)

import random
from collections import Counter
from itertools import product

import pytest
from datasets import Dataset, Features, Value

from hf_reflect import RULES, select, select_top
from hf_reflect.errors import DataError, SettingsError
from hf_reflect.selection import decide

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


# The rules once more, naively: (better at stage 1, better at stage 2), +1 where higher is better.
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


def naive(versions, rule, ifd_gate, r_ifd_gate, keep):
    """(the winner or None, whether it is kept) among the versions of one row."""
    usable = [v for v in versions if v["instruction"] is not None and v["response"] is not None]
    usable.sort(key=lambda v: (VARIANTS.index(v["variant"]), v.get("source", "")))
    if rule in ANCESTRY:
        for variant in ANCESTRY[rule]:
            for version in usable:
                if version["variant"] == variant:
                    return version, True
        return None, False
    if rule in ("longest", "fit"):
        if not usable:
            return None, False
        worth = {
            "longest": lambda v: len(v["response"]),
            "fit": lambda v: float("-inf") if v[FIT] is None else -v[FIT],
        }[rule]
        return [v for v in usable if worth(v) == max(map(worth, usable))][0], True

    def duel(defender, challengers, column, sign):
        scored = [v for v in challengers if v[column] is not None]
        best = max(scored, key=lambda v: sign * v[column], default=None)
        if defender is None:
            return best or (challengers[0] if challengers else None)
        if best is None:
            return defender
        return best if defender[column] is None or sign * best[column] > sign * defender[column] else defender

    def named(variant):
        return [v for v in usable if v["variant"] == variant]

    first = duel(next(iter(named("original")), None), named("instruction"), *STAGES[rule][0])
    if first is None:
        return None, False
    if first["variant"] == "original":
        challengers = named("response")
    else:
        challengers = [v for v in named("instruction+response") if v.get("source") == first.get("source")]
    winner = duel(first, challengers, *STAGES[rule][1])
    kept = keep is None or winner["variant"] in ("response", "instruction+response")
    for name, gate in (("ifd", ifd_gate), ("r_ifd", r_ifd_gate)):
        if gate is not None and name in winner:
            kept = kept and winner[name] is not None and winner[name] < gate
    return winner, kept


def random_versions(seed, rows, sources):
    """Coarse scores, so that ties are common; nulls; absent versions, and unusable ones with stale scores."""
    rng = random.Random(seed)
    versions = []
    for number in range(rows):
        some = [("original", "")] + [(v, s) for v in VARIANTS[1:] for s in sources]
        some = [(v, s) for v, s in some if rng.random() < 0.85]
        row = []
        for variant, source in some:
            version = {"row_id": f"row{number}", "variant": variant, "source": source, "instruction": "x"}
            version["response"] = "y" * rng.randrange(4)
            version |= {name: rng.choice([None, 0.5, 0.75, 0.9, 1.0, 1.25]) for name in SCORES}
            if rng.random() < 0.2:
                version[rng.choice(["instruction", "response"])] = None
                if rng.random() < 0.7:
                    version |= dict.fromkeys(SCORES)
            row.append(version)
        if not any(v["variant"] in VARIANTS[:2] and v["instruction"] and v["response"] is not None for v in row):
            for version in row:  # nothing to reflect on, so nobody was asked for its children
                version["response"] = None
        versions += row
    rng.shuffle(versions)
    return versions


@pytest.mark.parametrize("sources", [("t",), ("b", "c", "a"), None], ids=["one", "three", "no column"])
@pytest.mark.parametrize("rule", [*STAGES, *ANCESTRY, "longest", "fit"])
def test_decisions_agree_with_a_naive_implementation(rule, sources):
    versions = random_versions(f"{rule}{sources}", 200, sources or ("t",))
    dataset = Dataset.from_list(versions, features=FEATURES)
    if sources is None:
        dataset = dataset.remove_columns("source")
        versions = [{k: v for k, v in version.items() if k != "source"} for version in versions]
    rows = {}
    for index, version in enumerate(versions):
        rows.setdefault(version["row_id"], []).append(version | {"index": index})

    for ifd_gate, r_ifd_gate, keep in product((1.0, 0.9, None), (1.0, None), ("reflected", None)):
        decisions = decide(dataset, rule, ifd_gate, r_ifd_gate, keep)
        assert [d.row_id for d in decisions] == list(rows)
        kept_places = []
        for decision in decisions:
            winner, kept = naive(rows[decision.row_id], rule, ifd_gate, r_ifd_gate, keep)
            assert decision.position == (None if winner is None else winner["index"]), decision
            assert decision.kept == kept, decision
            assert decision.why
            if kept:
                kept_places.append(winner["index"])
        kept = select(dataset, rule, ifd_gate, r_ifd_gate, keep)
        assert kept.to_list() == [dataset[i] for i in sorted(kept_places)]
        assert kept.features == dataset.features


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


def test_an_empty_selection_raises_with_the_numbers():
    dataset = table(
        ("response", {"ifd": 1.5, "r_ifd": 0.5}),
        ("response", {"row_id": "b", "ifd": 1.25, "r_ifd": 0.5}),
        ("response", {"row_id": "c", "ifd": 0.5, "r_ifd": None}),
        ("original", {"row_id": "d", "ifd": 0.5, "r_ifd": 0.5}),
        ("original", {"row_id": "e", "response": None}),
    )
    with pytest.raises(DataError) as error:
        select(dataset)
    for words in (
        "'paper'", "none of 5 rows", "2 ifd not below 1", "1 r_ifd not below 1", "1 response not reflected",
        "1 no usable version", "0.50", "1.50",
    ):  # fmt: skip
        assert words in str(error.value)


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


@pytest.mark.parametrize(
    ("share", "rows", "expected"), [(0.05, 6, 1), (0.3, 10, 3), (0.26, 10, 3), (0.24, 10, 2), (1.0, 7, 7), (1, 7, 7)]
)
def test_a_share_is_rounded_and_at_least_one_row(share, rows, expected):
    dataset = Dataset.from_dict({"row_id": [str(n) for n in range(rows)], "ifd": [n / 10 for n in range(rows)]})
    chosen = select_top(dataset, share=share)
    assert list(chosen["row_id"]) == [str(n) for n in range(rows - expected, rows)]


def test_select_top_by_random_depends_on_seed_and_row_id_alone():
    dataset = Dataset.from_dict({"row_id": [f"row{n}" for n in range(200)]})
    once = select_top(dataset, share=0.25, by="random")["row_id"]
    assert len(once) == 50
    assert set(select_top(dataset.shuffle(seed=5), share=0.25, by="random")["row_id"]) == set(once)
    assert set(select_top(dataset, share=0.25, by="random", seed=1)["row_id"]) != set(once)
    assert set(select_top(dataset, share=0.5, by="random")["row_id"]) > set(once)  # less data is part of more
    assert list(once) != [f"row{n}" for n in range(50)]


@pytest.mark.parametrize("name", [None, "arrow", "numpy", "pandas"])
def test_the_format_of_a_dataset_changes_no_choice(name):
    dataset = Dataset.from_dict(TOP | {"r_ifd": TOP["ifd"], "variant": ["response"] * 6, "instruction": ["x"] * 6})
    formatted = dataset.with_format(name)
    for by in ("ifd", "longest", "r_ifd"):
        assert (
            select_top(formatted, count=5, by=by).with_format(None).to_list()
            == select_top(dataset, count=5, by=by).to_list()
        )
    assert select(formatted).with_format(None).to_list() == select(dataset).to_list()
    with pytest.raises(DataError, match="median 0.50"):
        select(formatted, ifd_gate=-1.0)


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

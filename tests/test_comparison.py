import numpy as np
import pytest

from hf_reflect.errors import DataError, SettingsError
from hf_reflect.evaluation.comparison import as_table, detectable, differences, in_words, markdown

NAMES = np.array(["lose", "tie", "win"], dtype=object)


def experiment(
    rng, sets=11, seeds=3, questions=80, seed_effect=0.0, question_effect=0.0, shift=0.0, noisiest=None, unparsed=()
):
    """Judged outcomes of an experiment in which the reference is truly better by `shift`; 0 for noise.

    `noisiest` is the first set's own seed effect; `unparsed` are shares of judgements, of the first sets.
    """
    reference = rng.normal(0, seed_effect, (seeds, 1)) + rng.normal(0, question_effect, (1, questions))
    outcomes = {}
    for number in range(sets):
        its_effect = noisiest if noisiest is not None and number == 0 else seed_effect
        other = rng.normal(0, its_effect, (seeds, 1)) + rng.normal(0, question_effect, (1, questions))
        quality = reference - other + rng.normal(shift, 1, (seeds, questions))
        judged = NAMES[1 + np.sign(quality * (abs(quality) > 0.5)).astype(int)]
        if number < len(unparsed):
            judged[rng.random(judged.shape) < unparsed[number]] = None
        outcomes[f"set {number}"] = judged.tolist()
    return outcomes


@pytest.mark.parametrize(
    "chance",
    [
        {},
        {"questions": 218, "question_effect": 0.6},
        {"seed_effect": 0.15},
        {"seed_effect": 0.3, "question_effect": 0.6, "questions": 218},
        {"seeds": 2, "seed_effect": 0.15},
        {"seeds": 1},
        {"sets": 1, "seeds": 1},
        {"sets": 1, "seeds": 2},
        {"sets": 1, "seeds": 2, "seed_effect": 0.15},
        {"questions": 1030, "seed_effect": 0.2, "unparsed": (0.6,) * 9},
        {"noisiest": 0.5},
        {"noisiest": 0.3, "seed_effect": 0.1, "questions": 1030},
    ],
    ids=str,
)
def test_noise_is_called_not_distinguishable_in_at_least_90_of_100_experiments(chance):
    silent = 0
    for number in range(100):
        found = differences(experiment(np.random.default_rng(number), **chance))
        words = in_words(found, "paper", chance.get("seeds", 3))
        silent += "Not distinguishable from `paper`: all of them" in words
    assert silent >= 90


def test_a_true_difference_of_the_size_that_was_promised_is_found_about_as_often_as_promised():
    """At worst: every seed agrees with the first, so that three of them tell no more than one."""
    questions, sets = 218, 3
    size = detectable(questions, 3, sets)[1]
    found = 0
    for number in range(200):
        rng = np.random.default_rng(number)
        tie = 1 - 0.75**2 - size**2  # a standard deviation of 0.75
        win = (1 - tie + size) / 2
        once = {f"set {n}": rng.choice(NAMES, questions, p=[1 - tie - win, tie, win]).tolist() for n in range(sets)}
        found += differences({name: [one] * 3 for name, one in once.items()})["set 0"].distinguishable
    assert 0.72 <= found / 200 <= 0.95


def test_with_one_seed_the_interval_is_the_ordinary_one_of_a_mean():
    from scipy.stats import ttest_1samp

    outcomes = ["win"] * 81 + ["tie"] * 94 + ["lose"] * 43  # Table 4, "Select by Randomness"
    (found,) = differences({"random": [outcomes]}).values()
    assert found[:4] == (81, 94, 43, 0) and round(found.win_rate, 3) == 1.174
    ordinary = ttest_1samp([1] * 81 + [0] * 94 + [-1] * 43, 0)
    assert found.interval == pytest.approx([1 + limit for limit in ordinary.confidence_interval(0.95)])
    assert found.p_value == pytest.approx(ordinary.pvalue)


@pytest.mark.parametrize(
    ("questions", "seeds", "sets", "which"),
    [(218, 3, 11, 0), (218, 5, 11, 0), (218, 3, 3, 0), (218, 3, 1, 1)],
)
def test_seeds_that_are_new_draws_find_what_was_promised_for_them(questions, seeds, sets, which):
    size = detectable(questions, seeds, sets)[which]
    tie = 1 - 0.75**2 - size**2
    win = (1 - tie + size) / 2
    found = []
    for number in range(100):
        rng = np.random.default_rng(number)
        draws = rng.choice(NAMES, (sets, seeds, questions), p=[1 - tie - win, tie, win])
        outcomes = {f"set {n}": one.tolist() for n, one in enumerate(draws)}
        found += [each.distinguishable for each in differences(outcomes).values()]
    assert 0.65 <= np.mean(found) <= 0.95


@pytest.mark.parametrize(
    ("chance", "which"),
    [
        ({"questions": 1030, "seed_effect": 0.2, "unparsed": (0.6,) * 9}, "set 10"),
        ({"noisiest": 0.5}, "set 0"),
    ],
    ids=["unparsed", "noisy"],
)
def test_the_interval_of_a_set_unlike_the_others_covers_the_truth_too(chance, which):
    missed = 0
    for number in range(100):
        low, high = differences(experiment(np.random.default_rng(number), **chance))[which].interval
        missed += not low <= 1 <= high
    assert missed <= 18  # about 10 are expected


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    missed = 0
    for number in range(100):
        chance = {"seed_effect": 0.2, "question_effect": 0.5, "sets": 8}
        for each in differences(experiment(np.random.default_rng(number), **chance)).values():
            low, high = each.interval
            missed += not low <= 1 <= high
    assert 0.01 <= missed / 800 <= 0.08


@pytest.mark.parametrize(
    ("outcome", "interval"),
    [("win", (2 - 6 / 218, 2)), ("tie", (1 - 3 / 218, 1 + 3 / 218)), ("lose", (0, 6 / 218))],
)
def test_unanimous_outcomes_are_judged_by_their_questions(outcome, interval):
    from scipy.stats import binomtest

    found = differences({"a": [[outcome] * 218] * 3})["a"]
    assert found.interval == pytest.approx(interval)
    assert found.distinguishable == (outcome != "tie")
    expected = 1.0 if outcome == "tie" else binomtest(218, 218).pvalue
    assert found.p_value == pytest.approx(expected)
    assert ("yes" in as_table({"a": found}, "paper")) == (outcome != "tie")


def test_an_interval_stays_between_all_lost_and_all_won():
    seeds = [["win"] * 20, ["win"] * 18 + ["lose"] * 2, ["win"] * 20]
    low, high = differences({"a": seeds})["a"].interval
    assert 1 < low < high == 2


def test_seeds_that_balance_each_other_are_no_certainty():
    found = differences({"a": [["win", "tie", "win", "tie"], ["tie", "win", "tie", "win"]]})["a"]
    assert found.win_rate == 1.5 and found.interval[1] - found.interval[0] > 0.5


def test_seeds_that_disagree_widen_the_interval():
    same = [["win"] * 30 + ["lose"] * 30] * 3
    apart = [["win"] * 45 + ["lose"] * 15, ["win"] * 30 + ["lose"] * 30, ["win"] * 15 + ["lose"] * 45]
    narrow, wide = (differences({"a": seeds})["a"] for seeds in (same, apart))
    assert narrow.win_rate == wide.win_rate == 1.0
    assert wide.interval[1] - wide.interval[0] > 3 * (narrow.interval[1] - narrow.interval[0])


def test_what_was_not_parsed_is_shown_and_left_out_with_every_seed():
    seeds = [["win", None, "tie", "lose"], ["win", "win", "tie", "win"], ["win", "tie", "tie", "win"]]
    (found,) = differences({"a": seeds}).values()
    assert found[:4] == (5, 3, 1, 3)
    assert found.win_rate == pytest.approx(1 + (5 - 1) / (5 + 3 + 1))
    assert "unparsed" in as_table({"a": found}, "paper")


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        ({}, "nothing to compare"),
        ({"a": [["win"]], "b": [["win", "tie"]]}, "not judged alike"),
        ({"a": [["win"]], "b": [["win"], ["win"]]}, "not judged alike"),
        ({"a": [["win", None], [None, "win"]]}, "No question of the set 'a'"),
    ],
)
def test_what_cannot_be_compared_is_refused(outcomes, message):
    with pytest.raises(DataError, match=message):
        differences(outcomes)


def test_too_little_to_say_anything_is_no_difference():
    for outcomes in ([["win"]], [["win"], ["win"]], [["tie", "tie"]], [["win", "win"]] * 5, [["win", "tie"]] * 5):
        found = differences({"a": outcomes})["a"]
        assert not found.distinguishable and found.interval[0] <= 1 <= found.interval[1]


def test_words_and_table_say_who_won():
    rng = np.random.default_rng(0)
    outcomes = {
        "worse set": [["win"] * 70 + ["lose"] * 10] * 3,
        "better set": [["lose"] * 70 + ["win"] * 10] * 3,
        "like it": [rng.choice(NAMES, 80).tolist() for _ in range(3)],
    }
    found = differences(outcomes)
    words = in_words(found, "paper", 3).splitlines()
    assert words[0] == "`paper` is better than worse set: the difference is distinguishable from zero."
    assert words[1] == "`paper` is worse than better set: the difference is distinguishable from zero."
    assert words[2] == "Not distinguishable from `paper`: like it."
    assert "among 3 comparisons" in words[3] and len(words) == 4
    assert "One seed" in in_words(found, "paper", 1)
    one = {"like it": found["like it"]}
    assert "Two seeds with 1 comparison hardly tell anything about other trainings" in in_words(one, "paper", 2)
    assert "hardly" not in in_words(found, "paper", 3)
    table = as_table(found, "paper", {"like it": {"rows": 12}}).splitlines()
    assert len({len(line) for line in table}) == 1 and table[2].split("|")[1].strip() == "worse set"
    assert "210" in table[2]


def test_the_design_says_what_it_can_detect():
    best, worst = detectable(218, 3, 11)
    assert 0.10 < best < worst < 0.20
    assert detectable(1030, 3, 11)[0] < best and detectable(218, 3, 1)[0] < best
    assert detectable(218, 1, 11) == (worst, worst)  # if they agree, more seeds tell nothing
    assert detectable(218, 2, 1)[1] > 0.4  # two seeds hardly tell what a seed does
    with pytest.raises(SettingsError, match="`seeds`"):
        detectable(218, 0, 11)


def test_numbers_stand_to_the_right():
    assert markdown([["a", "b"], ["x", 1], ["yy", 10]]).splitlines() == [
        "| a   |   b |",
        "| --- | --: |",
        "| x   |   1 |",
        "| yy  |  10 |",
    ]

import json
import random
import re
import runpy
import sys
import time

import pytest
import yaml
from conftest import ROOT
from endpoint import Endpoint

from hf_reflect import PROMPTS, Reply, Teacher, judge_pairs, read_scores, win_rate
from hf_reflect.errors import DataError, SettingsError, TeacherError
from hf_reflect.evaluation.answers import matched, read_answers, write_answers
from hf_reflect.judge import check_judges, rate_of, win_rates
from hf_reflect.prompts import JudgePrompt

TABLE_4 = (ROOT / "recipes" / "README.md").read_text()


# ---- what the judge is asked


def test_the_judges_prompt_is_the_papers_to_the_character(reference):
    text = (reference / "reference" / "prompts.md").read_text()
    blocks = [text.split(f'## PROMPTS["judge"], {part}\n```\n')[1].split("\n```")[0] for part in ("system", "user")]
    assert [PROMPTS["judge"].system, PROMPTS["judge"].user] == blocks


def test_braces_in_answers_stay_as_they_are():
    system, user = PROMPTS["judge"].chat("{question}", "{answer_2}", "x = {}")
    assert "[Question]\n{question}\n" in user["content"]
    assert "Answer]\n{answer_2}\n[The End of Assistant 1's" in user["content"]
    assert "Answer]\nx = {}\n[The End of Assistant 2's" in user["content"]


def test_a_prompt_that_would_hide_an_answer_is_refused():
    with pytest.raises(SettingsError, match="lacks {answer_2}"):
        JudgePrompt("s", "{question} {answer_1}")
    with pytest.raises(SettingsError, match="uses {answer}"):
        JudgePrompt("s", "{question} {answer_1} {answer_2} {answer}")


# ---- what it says

READ = {
    "8 7": (8, 7),
    "8 7\nAssistant 1 named 3 rivers, Assistant 2: 9 of them.": (8, 7),
    "8/10 7/10": (8, 7),
    "8 / 10 and 7 / 10": (8, 7),
    "7 out of 10, 8 out of 10": (7, 8),
    "Assistant 1: 8\nAssistant 2: 7": (8, 7),
    "Assistant 2: 7\nAssistant 1: 8": (8, 7),
    "Assistant 1: 8/10, Assistant 2: 7/10": (8, 7),
    "**Assistant 1:** 8\n**Assistant 2:** 6.5\n\nBoth …": (8, 6.5),
    "Assistant 1's score: 8\nAssistant 2's score: 6.5": (8, 6.5),
    "Assistant 1 gets a score of 8 and Assistant 2 gets a score of 7": (8, 7),
    "Score for Assistant 1: 8\nScore for Assistant 2: 7": (8, 7),
    "Scores for Assistant 1 and 2: 8 7": (8, 7),
    "8.5 7.25\nfine": (8.5, 7.25),
    "8,7": (8, 7),
    "8, 7": (8, 7),
    "**8 7**": (8, 7),
    "[[8]] [[7]]": (8, 7),
    "8 | 7": (8, 7),
    "8\n7": (8, 7),
    "Scores:\n8\n7": (8, 7),
    "8，7": (8, 7),
    "Assistant 1：8（clear）\nAssistant 2：6（short）": (8, 6),
    "Assistant 1: 8 (helpful, accurate)\nAssistant 2: 7 (less so)": (8, 7),
    "8,7\n1. The first is better.": (8, 7),
    "8/10\n7/10\nBecause.": (8, 7),
    "Both did well.\n\n8 7\n\nThe first …": (8, 7),
    "8 7. The first is better.": (8, 7),
    "<think>perhaps 9 9</think>\n8 7\nok": (8, 7),
    "\ufeff8 7\r\nok": (8, 7),
    "10 0": (10, 0),
    # thinking
    "<think>\n7 8\n</think>\n8 7": (8, 7),
    "<think>\nFirst:\n9 3\nno.</think>\nAssistant 1: 5\nAssistant 2: 8": (5, 8),
    "7 8 at first sight\n</think>\n8 7": (8, 7),
    "7 8\nbut then\n</think>\n8 7": (8, 7),
    "8 7\nAssistant 1 leaves a </think> in its answer.": (8, 7),
    "8 7<|im_end|>": (8, 7),
    # labels and dress
    "Scores (out of 10): 8 7": (8, 7),
    "Scores (1-10): 8 7": (8, 7),
    "Scores on a scale of 1 to 10: 8 7": (8, 7),
    "Scores: 8 7. The first is better.": (8, 7),
    "The scores are 8 and 7.": (8, 7),
    "The scores for Assistant 1 and Assistant 2 are 8 and 7.": (8, 7),
    "Output: 8 7": (8, 7),
    "Here is my view in the form that was asked for:\n8 7": (8, 7),
    "\\boxed{8 7}": (8, 7),
    "<score>8 7</score>": (8, 7),
    "8 7 Both are good": (8, 7),
    "| Assistant 1 | Assistant 2 |\n|---|---|\n| 8 | 7 |": (8, 7),
    "| Assistant | Score |\n|:--|--:|\n| Assistant 1 | 8 |\n| Assistant 2 | 7 |": (8, 7),
    # by name
    "Assistant 1 (8/10), Assistant 2 (7/10)": (8, 7),
    "I would give Assistant 1 a score of 8 and Assistant 2 a score of 7": (8, 7),
    "I would rate Assistant 1 an 8 and Assistant 2 a 7": (8, 7),
    "Assistant 1 scored 8; Assistant 2 scored 7": (8, 7),
    "Assistant 1: 8. It names all. Assistant 2: 7. It does not.": (8, 7),
    "Assistant 1:\n8\nAssistant 2:\n7": (8, 7),
    # a criterion's scores stand beside those of the answers
    "Assistant 1: 8\nAssistant 2: 7\n\nAccuracy ratings: 9 9": (8, 7),
    "Assistant 1: 8\nAssistant 2: 7\n\nOn accuracy:\n9 9": (8, 7),
    "Rating for helpfulness: 9 9\nRating: 8 7": (8, 7),
    "Rating scale: 1 10\nScores: 8 7": (8, 7),
}
BROKEN = [
    *("8,5\n7,5", "8,5\n7\nweil", "Scores:\n8\n7\n9", "Assistant 1: 2 (errors)\nAssistant 2: 3 (errors)\nScores: 8 7"),
    *("", "   \n", "8", "8/10", "I cannot judge this.", "N/A N/A", "-1 -1", "80 90", "11 9", "10 9 8", "8,5 7", "8-7"),
    *("Assistant 1: 8 7", "Assistant 1: 8", "1. 8\n2. 7", "Both.\n8 7\nOn second thought\n7 8", "2023 10 9"),
    *("Assistant 1: 8\nAssistant 2: 7\nAssistant 1: 6", "8 7 9 are primes? No.", "eight seven", "8 7/100"),
    # thinking that never ends, or leads to nothing
    *(
        "<think>\nFirst guess:\n9 3\nbut wait, is it",
        "Sure.\n<think>\n9 3\nbut",
        "Sure.\n<think>\n9 3\n</think>\nNo idea.",
    ),
    # counts
    *("Assistant 1: 3 errors. Assistant 2: 1 error.", "5 10 minute steps were given", "5 10-minute steps"),
    "Assistant 1 is 2 paragraphs long, Assistant 2 is 1 paragraph.",
    "Assistant 1: 10 out of 10 steps are right. Assistant 2: 4 out of 10 steps are.",
    *(
        "Assistant 1: 1. The answer names all. Assistant 2: 1. It is short.",
        "Number of errors:\n3 4",
        "Points lost: 2 3",
    ),
    *("Assistant 1: 2, 3 and 5.\nAssistant 2: 2, 3", "The answers are 3 and 5.", "Rating scale: 1 10", "Step 1: 3 4"),
    "Assistant 1's answer: 4\nAssistant 2's answer: 5",
    # of one criterion
    *("Accuracy ratings: 9 9", "On accuracy:\n9 9", "On accuracy, Assistant 1 scored 8 and Assistant 2 scored 7."),
    *("Assistant 1's accuracy: 8\nAssistant 2's accuracy: 7", "| Accuracy | Depth |\n|---|---|\n| 8 | 7 |"),
    # the other way round
    *("| Assistant 2 | Assistant 1 |\n|---|---|\n| 8 | 7 |", "Scores for Assistant 2 and 1: 8 7"),
    # two readings
    *("Both did well.\n8 7\nAssistant 1: 6", "8 7 Both are good.\n7 8", "8\n7\nBut no:\n7 8"),
]


@pytest.mark.parametrize(("review", "scores"), READ.items())
def test_a_review_is_read_as_a_careful_reader_would(review, scores):
    assert read_scores(review) == scores


@pytest.mark.parametrize("review", BROKEN)
def test_what_has_no_two_scores_or_could_be_read_in_two_ways_is_not_read(review):
    assert read_scores(review) is None


def test_no_text_makes_reading_raise_or_leave_the_scale():
    pieces = [*READ, *BROKEN, " ", "\n", "Assistant 1:", "/10", ".", "<think>", "9" * 40, "٣ ٤", "½ 7"]
    draw = random.Random(0)
    for _ in range(3000):
        scores = read_scores("".join(draw.choices(pieces, k=draw.randrange(1, 5))))
        assert scores is None or all(0 <= score <= 10 for score in scores)


@pytest.mark.parametrize(
    "piece",
    [
        "assistant 1 ",
        "Assistant 1: 8, ",
        "8 7 ",
        "Scores: ",
        "scores are ",
        "<think>",
        "8 7\n</think>x\n",
        " ",
        "1",
        "|-",
    ],
)
def test_a_long_review_is_read_in_time_in_line_with_its_length(piece):
    begin = time.perf_counter()
    read_scores(piece * (200_000 // len(piece)) + "x")
    assert time.perf_counter() - begin < 3  # where time grew with the square of the length it would take minutes


# ---- what it comes to


@pytest.mark.parametrize(
    ("name", "counts", "rate"), [("wizardlm", (102, 54, 62), 1.1835), ("vicuna", (44, 15, 21), 1.2875)]
)
def test_published_reviews_come_out_as_published(reference, name, counts, rate):
    published = json.loads((reference / "reference" / f"judge_{name}_gpt4.json").read_text())["reviews"]
    scores = []
    for row in published:
        first, second = read_scores(row["review"]), read_scores(row["review_reverse"])
        assert [list(first), list(second)] == [row["scores"], row["scores_reverse"]]
        scores.append((first, second[::-1]))  # the second review has the other's answer first
    result = win_rate(scores)
    assert (result["win"], result["tie"], result["lose"], result["unparsed"]) == (*counts, 0)
    assert round(result["win_rate"], 4) == rate
    low, high = result["interval"]
    assert low < rate < high and result["share"] == counts[0] / sum(counts)


def test_all_rates_of_table_4_follow_from_their_counts_and_those_of_table_9_do_not(reference):
    tables = json.loads((reference / "reference" / "paper_tables.json").read_text())

    def rate(counts):
        names = ("win", "tie", "lose")
        return rate_of([name for name, n in zip(names, counts, strict=True) for _ in range(n)])["win_rate"]

    table_4 = tables["table_4_ablation_vs_srecycled_wizardlm_7b"]
    rows = {name: row for name, row in table_4.items() if name != "columns"}
    assert len(rows) == 9
    for *counts, printed in rows.values():
        assert sum(counts) == 218 and abs(rate(counts) - printed) < 0.0006
    table_9 = tables["table_9_ablation_1030_questions"]
    off = {name: rate(row[:3]) - row[3] for name, row in table_9.items() if name != "columns"}
    assert sum(abs(difference) > 0.001 for difference in off.values()) >= 5


def test_the_intervals_printed_beside_the_papers_counts_follow_from_them():
    rows = re.findall(
        r"^\| ([^|]+) \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \| (\**)([\d.]+) to ([\d.]+)", TABLE_4, re.M
    )
    assert len(rows) == 9
    for _, win, tie, lose, rate, bold, low, high in rows:
        outcomes = ["win"] * int(win) + ["tie"] * int(tie) + ["lose"] * int(lose)
        found = rate_of(outcomes)
        assert f"{found['win_rate']:.3f}" == rate
        assert [f"{limit:.2f}" for limit in found["interval"]] == [low, high]
        assert (found["interval"][0] <= 1 <= found["interval"][1]) == bool(bold)


def test_two_orders_make_one_outcome():
    """All nine cases of two signs, counted by hand."""
    better, equal, worse = (8, 7), (7, 7), (6, 7)
    expected = {
        (better, better): "win",
        (better, equal): "win",
        (better, worse): "tie",
        (equal, equal): "tie",
        (equal, worse): "lose",
        (worse, worse): "lose",
    }
    for (one, other), outcome in expected.items():
        for pair in ((one, other), (other, one)):
            result = win_rate([pair])
            assert result[outcome] == 1 and result["win"] + result["tie"] + result["lose"] == 1


def test_what_was_not_parsed_is_counted_and_never_a_tie():
    result = win_rate([((8, 7), (8, 7)), ((8, 7), None), None, (None, None)])
    assert (result["win"], result["tie"], result["lose"], result["unparsed"]) == (1, 0, 0, 3)
    assert result["win_rate"] == 2.0
    nothing = win_rate([None])
    assert nothing["unparsed"] == 1 and nothing["win_rate"] is None and nothing["interval"] is None


def test_the_interval_is_that_of_questions_drawn_again():
    """Against a bootstrap written out, question by question."""
    outcomes = ["win"] * 44 + ["tie"] * 15 + ["lose"] * 21
    value = {"win": 2, "tie": 1, "lose": 0}
    draw = random.Random(0)
    means = sorted(sum(value[o] for o in draw.choices(outcomes, k=80)) / 80 for _ in range(4000))
    low, high = rate_of(outcomes)["interval"]
    assert low == pytest.approx(means[100], abs=0.02) and high == pytest.approx(means[3900], abs=0.02)


@pytest.mark.parametrize("n", [1, 3, 10, 100])
def test_unanimous_outcomes_have_an_interval_with_a_width_by_the_rule_of_three(n):
    wins, ties, loses = (rate_of([outcome] * n) for outcome in ("win", "tie", "lose"))
    assert wins["interval"] == pytest.approx((max(2 - 6 / n, 0), 2))
    assert loses["interval"] == pytest.approx((0, min(6 / n, 2)))
    assert ties["interval"] == pytest.approx((max(1 - 3 / n, 0), min(1 + 3 / n, 2)))
    assert wins["share_interval"] == pytest.approx((max(1 - 3 / n, 0), 1))
    for none_won in (ties, loses):
        assert none_won["share_interval"] == pytest.approx((0, min(3 / n, 1)))
    assert rate_of(["tie", "lose"] * n)["share_interval"] == pytest.approx((0, min(3 / (2 * n), 1)))
    # an outcome whose probability is just that bound stays unseen in about one of twenty such samples
    assert (1 - min(3 / n, 1)) ** n < 0.05


@pytest.mark.parametrize(
    "item", [(8, 7), ((8, 7),), ((8, 7), (8, 7, 6)), "87", ((8, None), (8, 7)), ((8, float("nan")),) * 2]
)
def test_scores_that_are_no_pairs_are_refused_with_their_place(item):
    with pytest.raises(DataError, match="at place 1"):
        win_rate([((8, 7), (8, 7)), item])


# ---- asking

QUESTIONS = ["Name a river.", "Name a tree.", "Name a bird.", "Name a fish."]
OURS = [f"our answer {n}" for n in range(4)]
THEIRS = [f"their answer {n}" for n in range(4)]


def liking_the_first(request):
    """A judge with a bias for what it sees first, which likes our answers to the first two questions."""
    asked = request["messages"][-1]["content"]
    scores = {"1": 6.0, "2": 5.0}
    for place in "12":
        text = asked.split(f"[The Start of Assistant {place}'s Answer]\n")[1].split("\n[The End")[0]
        scores[place] += 3 * (text in OURS[:2])
    return f"{scores['1']:g} {scores['2']:g}\nI compared them."


def test_judging_in_both_orders_takes_the_place_out_and_asks_nothing_twice(tmp_path):
    with Endpoint(liking_the_first, models=("judge",)) as endpoint:
        judge = Teacher("judge", base_url=endpoint.url, ledger=str(tmp_path / "judge.sqlite"))
        judged = judge_pairs(QUESTIONS, OURS, THEIRS, judge, category=["water", "land", "land", "water"])
        assert judged["outcome"][:] == ["win", "win", "tie", "tie"]
        assert judged[0]["scores"] == [9.0, 5.0] and judged[0]["scores_reverse"] == [8.0, 6.0]  # ours first in both
        assert judged["review"][0].startswith("9 5") and judged["review_reverse"][0].startswith("6 8")
        assert len(endpoint.requests) == 8
        assert judge_pairs(QUESTIONS, OURS, THEIRS, judge)["outcome"][:] == judged["outcome"][:]
        assert len(endpoint.requests) == 8
        judge_pairs(QUESTIONS[:1], OURS[:1], ["something else"], judge)
        assert len(endpoint.requests) == 10
    rates = win_rates(judged.add_column("test_set", ["a", "a", "b", "b"]))
    assert rates["pooled"]["win"] == 2 and rates["test_set"]["a"]["win_rate"] == 2.0
    assert rates["category"]["land"]["tie"] == 1 and set(rates) == {"pooled", "test_set", "category"}


def test_broken_reviews_are_kept_and_counted_and_the_rest_is_used(tmp_path):
    def answer(request):
        return "Both are nice." if "tree" in str(request) else liking_the_first(request)

    with Endpoint(answer, models=("judge",)) as endpoint:
        judge = Teacher("judge", base_url=endpoint.url, ledger=str(tmp_path / "judge.sqlite"))
        judged = judge_pairs(QUESTIONS, OURS, THEIRS, judge)
    assert judged["outcome"][:] == ["win", None, "tie", "tie"]
    assert judged["review"][1] == "Both are nice." and judged["scores"][1] is None
    assert judged["error"][1] == "unparsed: 'Both are nice.'; unparsed: 'Both are nice.'"
    assert win_rates(judged)["pooled"]["unparsed"] == 1


def test_a_judge_that_never_answers_in_form_is_stopped_early_with_an_example(tmp_path):
    with Endpoint(lambda request: "I like both!", models=("judge",)) as endpoint:
        judge = Teacher("judge", base_url=endpoint.url, ledger=str(tmp_path / "judge.sqlite"), max_concurrency=4)
        with pytest.raises(TeacherError, match=r"8 of 8 reviews .* no two scores .*such as unparsed: 'I like both!'"):
            judge_pairs(QUESTIONS, OURS, THEIRS, judge)
        many = [f"Question {n}?" for n in range(100)]
        with pytest.raises(TeacherError, match="hold no two scores"):
            judge_pairs(many, many, many, judge)
        assert len(endpoint.requests) < 100


def test_a_judge_whose_budget_ends_leaves_a_usable_table(tmp_path):
    with Endpoint(liking_the_first, models=("judge",)) as endpoint:
        judge = Teacher(
            "judge", base_url=endpoint.url, ledger=str(tmp_path / "j.sqlite"), max_requests=5, max_concurrency=1
        )
        judged = judge_pairs(QUESTIONS, OURS, THEIRS, judge)
        assert judged["outcome"][:] == ["win", "win", None, None]
        assert all("budget: " in error for error in judged["error"][2:])
        judge.max_requests = None
        assert judge_pairs(QUESTIONS, OURS, THEIRS, judge)["outcome"][:] == ["win", "win", "tie", "tie"]
        assert len(endpoint.requests) == 8


def test_a_budget_spent_before_the_first_review_leaves_a_table_too(tmp_path):
    with Endpoint(liking_the_first, models=("judge",)) as endpoint:
        judge = Teacher("judge", base_url=endpoint.url, ledger=str(tmp_path / "j.sqlite"), max_requests=2)
        judge_pairs(QUESTIONS[:1], OURS[:1], THEIRS[:1], judge)
        judged = judge_pairs(QUESTIONS[1:], OURS[1:], THEIRS[1:], judge)
    assert judged["outcome"][:] == [None] * 3 and judged["review"][:] == [None] * 3
    assert all(error.startswith("budget: ") for error in judged["error"])
    assert win_rates(judged)["pooled"]["unparsed"] == 3


def test_an_endpoint_that_fails_is_not_blamed_on_the_judges_form(tmp_path):
    def out_of_order(request):
        return {"status": 500, "body": {"error": {"message": "the disk is full"}}}

    with Endpoint(out_of_order, models=("judge",)) as endpoint:
        judge = Teacher("judge", base_url=endpoint.url, ledger=str(tmp_path / "j.sqlite"), max_retries=0)
        with pytest.raises(
            TeacherError, match=r"8 of 8 requests to the judge failed .*first: teacher: .*disk is full"
        ):
            judge_pairs(QUESTIONS, OURS, THEIRS, judge)
        judge = Teacher("judge", base_url=endpoint.url, ledger=str(tmp_path / "j.sqlite"), max_retries=0)
        endpoint.answer = lambda request: out_of_order(request) if "9?" in str(request) else "8 7"
        many = [f"Question {n}?" for n in [*range(20), *[99] * 60]]
        answers = [f"answer {n}" for n in range(80)]
        with pytest.raises(TeacherError, match="requests to the judge failed") as caught:
            judge_pairs(many, answers, answers, judge)
    assert "no two scores" not in str(caught.value) and "form" not in str(caught.value)


def test_only_reviews_that_came_count_as_never_in_form():
    failed, chatty, unasked = Reply(error="teacher: lost"), Reply("Both!"), Reply(error="budget: spent")
    replies = [failed, unasked, *[chatty] * 6]
    with pytest.raises(TeacherError, match="6 of 7 reviews of the judge hold no two scores .* 6 such as unparsed"):
        judge_pairs(QUESTIONS, OURS, THEIRS, lambda chats: replies)


def test_halves_of_surrogate_pairs_become_question_marks(tmp_path):
    half = "Name a \ud83d."
    judged = judge_pairs([half], [half], ["b"], lambda chats: [Reply("8 7\nA \ude00.", "stop") for _ in chats])
    assert judged["question"][:] == ["Name a ?."] == judged["ours"][:] and judged["review"][:] == ["8 7\nA ?."]
    with Endpoint(lambda request: "8 7", models=("judge",)) as endpoint:
        judge = Teacher("judge", base_url=endpoint.url, ledger=str(tmp_path / "judge.sqlite"))
        assert judge_pairs([half], ["a"], ["b"], judge)["outcome"][:] == ["tie"]


def test_neither_a_spent_budget_nor_a_filter_says_anything_about_a_judge(tmp_path):
    filtered = {"status": 400, "body": {"error": {"message": "policy", "code": "content_filter"}}}
    said = iter([filtered, {"text": "", "finish_reason": "content_filter"}, "Both are fine."])
    with Endpoint(lambda request: next(said), models=("judge",)) as endpoint:
        judge = Teacher("judge", base_url=endpoint.url, ledger=str(tmp_path / "judge.sqlite"), max_requests=0)
        check_judges([judge], "Why?")
        judge.max_requests = None
        for question in ("Why?", "How?"):
            check_judges([judge], question)
        with pytest.raises(TeacherError, match="hold no two scores .*Both are fine"):
            check_judges([judge], "When?")
        assert len(endpoint.requests) == 3


@pytest.mark.parametrize("reply", ["8 7", None, {"text": "8 7"}, Reply(None)])
def test_a_callable_that_returns_no_replies_is_told_so(reply):
    with pytest.raises(TeacherError, match="a list of 8 `Reply`"):
        judge_pairs(QUESTIONS, OURS, THEIRS, lambda chats: [reply for _ in chats])


@pytest.mark.parametrize("judge", [None, "gpt-5.4"])
def test_what_cannot_judge_is_refused(judge):
    with pytest.raises(SettingsError, match=rf"a `Teacher` or a callable .* not a {type(judge).__name__}"):
        judge_pairs(QUESTIONS, OURS, THEIRS, judge)


def test_a_judge_may_be_any_callable():
    judged = judge_pairs(QUESTIONS, OURS, THEIRS, lambda chats: [Reply("7 7", "stop") for _ in chats])
    assert judged["outcome"][:] == ["tie"] * 4
    with pytest.raises(TeacherError, match="a list of 8 `Reply`"):
        judge_pairs(QUESTIONS, OURS, THEIRS, lambda chats: [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theirs": THEIRS[:3]}, "4 questions, 4 ours, 3 theirs"),
        ({"questions": [], "ours": [], "theirs": []}, "no questions"),
        ({"ours": [None, *OURS[1:]]}, "None at place 0 of `ours`"),
        ({"category": ["a"]}, "1 category"),
        ({"questions": "abcd"}, "`questions` of `judge_pairs` is a list of texts, one a question, not 'abcd'"),
        ({"theirs": None}, "`theirs` of `judge_pairs` is a list of texts, .* not None"),
        ({"category": "abcd"}, "`category` of `judge_pairs` is a list of texts"),
    ],
)
def test_lists_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        judge_pairs(**{"questions": QUESTIONS, "ours": OURS, "theirs": THEIRS, **changes}, teacher=lambda chats: [])


# ---- files of answers


def rows(ids, model="m", **changes):
    return [
        {"question_id": n, "question": f"Question {n}?", "answer": f"{model} {n}", "model": model, **changes}
        for n in ids
    ]


def test_files_of_answers_are_matched_by_their_ids_whatever_their_order(tmp_path):
    write_answers(tmp_path / "a.jsonl", rows(["x/1", "x/2", "x/3"], "a", test_set="x"))
    write_answers(tmp_path / "b.jsonl", rows(["x/3", "x/1", "x/2"], "b"))
    ours, theirs = matched(read_answers(tmp_path / "a.jsonl"), read_answers(tmp_path / "b.jsonl"))
    assert theirs["answer"][:] == ["b x/1", "b x/2", "b x/3"] and ours["test_set"][:] == ["x"] * 3


def test_a_null_question_is_named_also_where_it_has_an_input(tmp_path):
    path, row = tmp_path / "a.jsonl", {"instruction": "Go.", "input": "there", "output": "I went."}
    path.write_text(json.dumps(row))
    assert read_answers(path)["question"][:] == ["Go.\nthere"]
    path.write_text(json.dumps(row | {"instruction": None}))
    with pytest.raises(DataError, match="a row whose `question` is null"):
        read_answers(path)


def test_files_that_share_no_id_are_matched_by_the_question(tmp_path):
    write_answers(tmp_path / "a.jsonl", rows(["x/1", "x/2", "x/3"], "a"))
    outputs = [{"instruction": f"Question x/{n}?", "output": f"b {n}", "generator": "b"} for n in (3, 1, 2)]
    (tmp_path / "b.json").write_text(json.dumps(outputs))
    sides = [read_answers(tmp_path / name) for name in ("a.jsonl", "b.json")]
    ours, theirs = matched(*sides)
    assert ours["question_id"][:] == ["x/1", "x/2", "x/3"] and theirs["answer"][:] == ["b 1", "b 2", "b 3"]
    ours, theirs = matched(*sides[::-1])
    assert ours["answer"][:] == ["b 3", "b 1", "b 2"] and theirs["answer"][:] == ["a x/3", "a x/1", "a x/2"]
    with pytest.raises(DataError, match=r"not asked the same questions \(only `ours` has 1: 'Question x/2\?'\)"):
        matched(sides[0], sides[1].select([0, 1]))
    write_answers(tmp_path / "a.jsonl", rows(["x/1"]) + [row | {"question_id": "y/1"} for row in rows(["x/1"])])
    with pytest.raises(DataError, match="share no `question_id` with the others, hold 1 .* the same id in both"):
        matched(read_answers(tmp_path / "a.jsonl"), sides[1])


def test_alpaca_evals_format_is_read_too(tmp_path):
    outputs = [{"instruction": f"Do {n}.", "output": f"Done {n}.", "generator": "me"} for n in range(3)]
    (tmp_path / "outputs.json").write_text(json.dumps(outputs))
    table = read_answers(tmp_path / "outputs.json")
    assert table[1] == {
        "question_id": "Do 1.",
        "question": "Do 1.",
        "category": "",
        "test_set": "",
        "answer": "Done 1.",
        "model": "me",
    }


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (rows(["1", "2"]), r"only `ours` has 1: '3'"),
        (rows(["1", "2", "3", "4"]), r"only `theirs` has 1: '4'"),
        (rows(["7", "8", "9"]), r"only `ours` has 3: .*; only `theirs` has 3"),
        (rows(["1", "2", "3"], question="Another?"), "The question '1' is not the same in both"),
        (rows(["1", "2"]) + rows(["3"], answer=None), r"lack an answer to 1 of 3 questions: '3'"),
        (rows(["1", "2", "2", "3"]), r"1 question more than once: '2'"),
        ([{"question_id": "1", "text": "x"}], "needs the columns 'question', 'answer'"),
    ],
)
def test_answers_that_cannot_be_compared_are_refused(tmp_path, theirs, message):
    write_answers(tmp_path / "a.jsonl", rows(["1", "2", "3"]))
    write_answers(tmp_path / "b.jsonl", theirs)
    with pytest.raises(DataError, match=message):
        matched(read_answers(tmp_path / "a.jsonl"), read_answers(tmp_path / "b.jsonl"))


# ---- the recipe


@pytest.fixture
def recipe():
    return runpy.run_path(str(ROOT / "recipes" / "judge.py"))


def test_one_judge_may_be_named_without_brackets(recipe):
    arguments = recipe["JudgeArguments"](ours="a", theirs="b", judges="gpt-5.4", output_dir="c")
    assert arguments.judges == ["gpt-5.4"]


def test_a_category_named_as_a_test_set_keeps_a_row_of_its_own(recipe):
    rates = {"pooled": rate_of(["win", "tie"]), "test_set": {"koala": rate_of(["win"])}}
    table = recipe["as_table"](rates | {"category": {"koala": rate_of(["lose"]), "all": rate_of(["tie"])}})
    rows = [[cell.strip() for cell in line.split("|")[1:6]] for line in table.splitlines()]
    assert rows[0] == ["questions", "name", "win", "tie", "lose"]
    assert rows[2:] == [
        ["all", "", "1", "1", "0"],
        ["test set", "koala", "1", "0", "0"],
        ["category", "koala", "0", "0", "1"],
        ["category", "all", "0", "1", "0"],
    ]


def test_the_rates_of_one_judge_are_kept_when_the_next_fails(recipe, tmp_path, monkeypatch):
    for who in ("ours", "theirs"):
        write_answers(tmp_path / f"{who}.jsonl", rows(["1", "2"], who))
    settings = {who: str(tmp_path / f"{who}.jsonl") for who in ("ours", "theirs")}
    with Endpoint(
        lambda request: "8 7" if request["model"] == "judge" else "Both!", models=("judge", "chatty")
    ) as endpoint:
        settings |= {"judges": ["judge", "chatty"], "output_dir": str(tmp_path / "run"), "base_url": endpoint.url}
        (tmp_path / "judge.yaml").write_text(yaml.safe_dump(settings))
        monkeypatch.setattr(sys, "argv", ["judge.py", "--config", str(tmp_path / "judge.yaml")])
        with pytest.raises(TeacherError, match="no two scores"):
            recipe["main"]()
    kept = json.loads((tmp_path / "run" / "win_rates.json").read_text())
    assert list(kept["judges"]) == ["judge"] and kept["judges"]["judge"]["pooled"]["tie"] == 2
    assert not list((tmp_path / "run").glob("*.part"))


def test_an_instructions_input_is_part_of_the_question(tmp_path):
    rows = [{"instruction": "Translate.", "input": text, "output": "…"} for text in ("Hello.", "Good night.", "")]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = read_answers(tmp_path / "answers.jsonl")["question"][:]
    assert questions == ["Translate.\nHello.", "Translate.\nGood night.", "Translate."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "a", "answer": ["x"]}', r"has \['x'\] in its column of answers"),
        ('{"question": "é", "answer": "ü"}'.encode("latin-1"), "is not in UTF-8"),
        (b'{"question": null, "answer": "x"}', "whose `question` is null"),
        (b"", "is empty"),
    ],
)
def test_files_that_hold_no_answers_are_refused(tmp_path, content, message):
    (tmp_path / "answers.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_answers(tmp_path / "answers.jsonl")

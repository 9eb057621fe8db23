"""MT-Bench on invented questions, with invented prompts in files of FastChat's form, and a judge on loopback."""

import hashlib
import json
import re
import sys
from collections import defaultdict

import pandas
import pytest
from conftest import ROOT, load_recipe
from endpoint import Endpoint
from launching import command, environment, kill_when, launch, on_cpu

from hf_reflect import Teacher
from hf_reflect.errors import DataError, SettingsError, TeacherError
from hf_reflect.evaluation.generation import answers_from_endpoint, generate_answers
from hf_reflect.evaluation.mt_bench import (
    TEMPERATURES,
    answer_turns,
    check_judge,
    describe_scores,
    grade,
    mean_scores,
    read_bench,
    read_model_answers,
    read_score,
    save_answers,
    save_judgments,
)

RECIPE = "recipes/mt_bench.py"
QUESTIONS = [
    (7, "writing", ["Describe a lighthouse in a storm.", "Now from the gull's view."]),
    (3, "math", ["What is 12 times 12?", "And half of that?"]),
    (11, "coding", ["Write a loop that counts to ten.", "Let it count backwards."]),
    (5, "stem", ["Why is ice lighter than water?", "What follows for lakes?"]),
    (9, "poetry", ["A rhyme on rain, please."]),
]
SHOWN = {
    "single-v1": "Grade. Asked: {question} Said: {answer}",
    "single-math-v1": "Grade. Asked: {question} Right: {ref_answer_1} Said: {answer}",
    "single-v1-multi-turn": "Grade the second. {question_1} | {answer_1} | {question_2} | {answer_2}",
    "single-math-v1-multi-turn": (
        "Grade the second. {question_1} ({ref_answer_1}) {question_2} ({ref_answer_2}) said {answer_1}, {answer_2}"
    ),
}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def data(tmp_path):
    """A folder as FastChat's data: prompts above the questions."""
    folder = tmp_path / "data"
    questions = [{"question_id": i, "category": c, "turns": t} for i, c, t in QUESTIONS]
    write_lines(folder / "mt_bench" / "question.jsonl", questions)
    prompts = [
        {
            "name": name,
            "type": "single",
            "system_prompt": "You grade." if "multi" in name else "",
            "prompt_template": text,
            "description": "",
            "category": "math" if "math" in name else "general",
            "output_format": "[[rating]]",
        }
        for name, text in SHOWN.items()
    ]
    prompts.append({**prompts[0], "name": "pair-v2", "type": "pairwise", "output_format": "[[A]]"})
    write_lines(folder / "judge_prompts.jsonl", prompts)
    references = [
        {
            "question_id": i,
            "answer_id": "x",
            "model_id": "judge",
            "choices": [{"index": 0, "turns": [f"right {i}.1", f"right {i}.2"]}],
            "tstamp": 1.0,
        }
        for i in (3, 11)
    ]
    write_lines(folder / "mt_bench" / "reference_answer" / "judge.jsonl", references)
    return folder


def invented(prompt):
    """Of each prompt a score of its own, said in one of the ways that judges have; None: none is said."""
    number = int(hashlib.sha256(prompt.encode()).hexdigest(), 16)
    score = (number % 19 + 2) / 2
    shown = int(score) if score == int(score) else score
    ways = (f"Fair. Rating: [[{shown}]]", f"[[{shown}]] as [[1]] would be harsh", f"Rating: [{shown}]")
    return score, ways[number // 19 % 3]


def judging(request):
    return invented(request["messages"][-1]["content"])[1]


@pytest.fixture
def judge_endpoint():
    with Endpoint(judging, models=("judge", "tuned")) as server:
        yield server


@pytest.fixture
def judge(judge_endpoint, tmp_path):
    return Teacher("judge", base_url=judge_endpoint.url, ledger=str(tmp_path / "judge.sqlite"))


def answers_of(questions, model="m", text=lambda i, turn: f"answer {i}.{turn}"):
    return [
        {
            "question_id": row["question_id"],
            "answer_id": "a",
            "model_id": model,
            "choices": [
                {"index": 0, "turns": [text(row["question_id"], n + 1) for n in range(len(row["turns"]))]},
            ],
            "tstamp": 2.0,
        }
        for row in questions
    ]


def test_each_turn_is_graded_by_the_prompt_of_its_kind_with_what_it_shows(data, judge, judge_endpoint):
    bench = read_bench(data, "judge")
    judgments = grade(bench, answers_of(bench.questions), judge)
    by_place = {(row["question_id"], row["turn"]): row for row in judgments}
    assert len(by_place) == len(judgments) == 9 == len(judge_endpoint.requests)
    for row in judgments:
        assert list(row) == "question_id model judge user_prompt judgment score turn tstamp".split()
        assert row["score"] == invented(row["user_prompt"])[0] and row["judgment"] == invented(row["user_prompt"])[1]
    expected = {
        (7, 1): ("single-v1", "Grade. Asked: Describe a lighthouse in a storm. Said: answer 7.1"),
        (3, 1): ("single-math-v1", "Grade. Asked: What is 12 times 12? Right: right 3.1 Said: answer 3.1"),
        (5, 2): (
            "single-v1-multi-turn",
            "Grade the second. Why is ice lighter than water? | answer 5.1 | What follows for lakes? | answer 5.2",
        ),
        (11, 2): (
            "single-math-v1-multi-turn",
            "Grade the second. Write a loop that counts to ten. (right 11.1) Let it count backwards. (right 11.2) "
            "said answer 11.1, answer 11.2",
        ),
    }
    for place, (name, text) in expected.items():
        assert (by_place[place]["judge"], by_place[place]["user_prompt"]) == (["judge", name], text)
    systems = {len(request["messages"]) for request in judge_endpoint.requests}
    assert systems == {1, 2}  # an empty system prompt is none
    assert all(request["temperature"] == 0 and request["max_tokens"] == 2048 for request in judge_endpoint.requests)
    grade(bench, answers_of(bench.questions), judge)
    assert len(judge_endpoint.requests) == 9 and judge.stats["reused"] == 9


def test_means_are_those_of_the_judged_turns_alone(data, judge, judge_endpoint):
    bench = read_bench(data, "judge")
    silent = ("Asked: A rhyme", "ice lighter than water? |")  # a first turn, a second one
    judge_endpoint.answer = lambda request: (
        "No rating." if any(words in request["messages"][-1]["content"] for words in silent) else judging(request)
    )
    judgments = grade(bench, answers_of(bench.questions), judge)
    scores = mean_scores(judgments, bench.questions)
    by_turn, by_category = defaultdict(list), defaultdict(list)
    for i, category, turns in QUESTIONS:
        for turn in range(1, len(turns) + 1):
            (row,) = [row for row in judgments if (row["question_id"], row["turn"]) == (i, turn)]
            if any(words in row["user_prompt"] for words in silent):
                assert row["score"] == -1 and row["judgment"] == "No rating."
            else:
                by_turn[turn].append(invented(row["user_prompt"])[0])
                by_category[category].append(by_turn[turn][-1])
    for turn, some in by_turn.items():
        assert scores[f"turn_{turn}"] == {"score": pytest.approx(sum(some) / len(some)), "n": len(some)}
    every = by_turn[1] + by_turn[2]
    assert len(by_turn[1]) == 4 and len(by_turn[2]) == 3
    assert scores["overall"] == {"score": pytest.approx(sum(every) / 7), "n": 7} and scores["unparsed"] == 2
    for category, mean in scores["categories"].items():
        some = by_category[category]
        assert mean == {"score": pytest.approx(sum(some) / len(some)) if some else None, "n": len(some)}
    assert list(scores["categories"]) == ["writing", "math", "coding", "stem", "poetry"]
    shown = describe_scores(scores)
    assert f"overall       {sum(every) / 7:6.3f}  n 7" in shown
    assert "unparsed      2 judgments without a score" in shown and "poetry             –  n 0" in shown


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("Good. Rating: [[8]]", 8),
        ("Rating: [[7.5]], not [[3]]", 7.5),
        ("Rating: [9]", 9),
        ("See [2]. Rating: [[6]]", 6),
        ("The matrix [[12]] is right. Rating: [[6]]", 6),
        ("I give it a rating of [7].", 7),
        ("Good.\n\n**[8]**\n", 8),
        ("It begins at a[0], which", -1),
        ("As said in [2]. Rating: 8", -1),
        ("[[10]]", 10),
        ("[[0]]", 0),
        ("Rating: [[5.]]", 5),
        ("Rating: 8", -1),
        ("[[eight]]", -1),
        ("[[85]]", -1),
        ("[[-3]]", -1),
        ("[[8/10]]", -1),
        ("", -1),
        ("<think>Perhaps [[2]]?</think>\nRating: [[7]]", 7),
        ("<think>Perhaps [[2]]?", -1),
    ],
)
def test_a_score_is_read_from_double_else_from_single_brackets(said, score):
    assert read_score(said) == score


def test_a_judge_that_never_answers_in_form_ends_it_with_an_example(data, judge, judge_endpoint):
    judge_endpoint.answer = lambda request: "I would say eight out of ten."
    bench = read_bench(data, "judge")
    with pytest.raises(TeacherError, match=r"9 of 9 judgments of 'judge' hold no score .*I would say eight out of"):
        grade(bench, answers_of(bench.questions), judge)
    assert len(judge_endpoint.requests) == 9
    with pytest.raises(TeacherError):
        grade(bench, answers_of(bench.questions), judge)
    assert len(judge_endpoint.requests) == 9  # the replies are in the ledger


def test_a_judge_that_mostly_fails_is_stopped_before_it_was_asked_everything(data, judge_endpoint, tmp_path):
    rows = [{"question_id": n, "category": "stem", "turns": [f"Why {n}?"]} for n in range(400)]
    write_lines(data / "mt_bench" / "question.jsonl", rows)
    judge_endpoint.answer = lambda request: "[[4]]" if "1?" in request["messages"][-1]["content"] else "Fine."
    bench = read_bench(data, "judge")
    ledger = str(tmp_path / "l.sqlite")
    judge = Teacher("judge", base_url=judge_endpoint.url, ledger=ledger, max_concurrency=4)
    with pytest.raises(TeacherError, match="hold no score"):
        grade(bench, answers_of(bench.questions), judge)
    assert 50 <= len(judge_endpoint.requests) < 120


def test_a_judge_is_checked_by_one_made_up_answer_that_is_asked_for_once(data, judge, judge_endpoint):
    bench = read_bench(data, "judge")
    for _ in range(2):
        check_judge(bench, judge)
    (request,) = judge_endpoint.requests
    shown = "Grade. Asked: Describe a lighthouse in a storm. Said: I do not know."
    assert request["messages"] == [{"role": "user", "content": shown}]
    assert (judge.stats["asked"], judge.stats["reused"]) == (1, 1)


def test_a_judge_that_is_to_take_batch_jobs_is_checked_live(data, judge_endpoint, tmp_path):
    ledger = str(tmp_path / "l.sqlite")
    judge = Teacher("judge", base_url=judge_endpoint.url, ledger=ledger, mode="batch")
    check_judge(read_bench(data, "judge"), judge)
    assert judge_endpoint.paths == ["/v1/chat/completions"] and judge.stats["asked"] == 1 and judge.mode == "batch"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("I would say one of ten.", r"1 of 1 judgments of 'judge' hold no score .*I would say one of ten"),
        ({"status": 400, "body": {"error": {"message": "not now"}}}, "to grade one answer beforehand, .* 400 not now"),
    ],
)
def test_a_judge_that_is_of_no_use_is_told_by_one_answer(data, judge, judge_endpoint, answer, words):
    judge_endpoint.answer = lambda request: answer
    with pytest.raises(TeacherError, match=words):
        check_judge(read_bench(data, "judge"), judge)


def test_neither_a_spent_budget_nor_a_filter_says_anything_about_a_judge(data, judge, judge_endpoint, tmp_path):
    bench = read_bench(data, "judge")
    spent = Teacher("judge", base_url=judge_endpoint.url, ledger=str(tmp_path / "spent.sqlite"), max_requests=0)
    check_judge(bench, spent)
    assert not judge_endpoint.requests
    filtered = {"status": 400, "body": {"error": {"message": "policy", "code": "content_filter"}}}
    for answer in (filtered, {"text": "", "finish_reason": "content_filter"}):
        judge_endpoint.answer = lambda request, answer=answer: answer
        check_judge(bench, judge)
    assert len(judge_endpoint.requests) == 2


def test_files_hold_every_character_that_a_model_may_write(tmp_path):
    turns = ["a\u2028b\u2029\x85\x0b\r\n", ""]
    answer = {
        "question_id": 1,
        "answer_id": "x",
        "model_id": "m",
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": 1,
    }
    judgment = {"question_id": 1, "model": "m", "turn": 1, "judgment": turns[0], "score": 8, "tstamp": 1.0}
    for _ in range(2):
        save_answers(tmp_path / "answers.jsonl", [dict(answer)])
        for model in ("m", "other"):
            save_judgments(tmp_path / "judgments.jsonl", [judgment | {"model": model}])
    (row,) = read_model_answers(tmp_path / "answers.jsonl")
    assert row["choices"][0]["turns"] == turns


def test_missing_judgments_are_counted_and_asked_for_again(data, judge, judge_endpoint):
    broken = {"status": 400, "body": {"error": {"message": "not now"}}}
    judge_endpoint.answer = lambda request: broken if "rain" in str(request) else judging(request)
    bench = read_bench(data, "judge")
    with pytest.raises(TeacherError, match=r"1 of 9 judgments have no answer \(teacher 1\).*not now"):
        grade(bench, answers_of(bench.questions), judge)
    failed = [
        row for row in grade(bench, answers_of(bench.questions), judge, allow_missing=True) if row["score"] == -1
    ]
    assert [row["question_id"] for row in failed] == [9] and "not now" in failed[0]["judgment"]
    judge_endpoint.answer = judging
    assert len(grade(bench, answers_of(bench.questions), judge)) == 9
    assert len(judge_endpoint.requests) == 11


def test_a_judgment_that_a_filter_withheld_stays_unparsed(data, judge, judge_endpoint):
    filtered = {"status": 400, "body": {"error": {"message": "policy", "code": "content_filter"}}}
    judge_endpoint.answer = lambda request: filtered if "rain" in str(request) else judging(request)
    bench = read_bench(data, "judge")
    judgments = grade(bench, answers_of(bench.questions), judge)
    (row,) = [row for row in judgments if row["score"] == -1]
    assert row["question_id"] == 9 and row["judgment"].startswith("refused: ")


def test_the_second_turn_sees_the_first_answer_at_the_temperature_of_the_category(data, judge_endpoint, tmp_path):
    tuned = Teacher("tuned", base_url=judge_endpoint.url, ledger=str(tmp_path / "a.sqlite"), top_p=None)
    judge_endpoint.answer = lambda request: f"said {len(request['messages'])} to {request['messages'][-1]['content']}"
    questions = read_bench(data).questions
    rows = answer_turns(questions, lambda table, turn: answers_from_endpoint(table, tuned, "Be brief."), "tuned")
    assert [row["question_id"] for row in rows] == [7, 3, 11, 5, 9]
    for (_, _, turns), row in zip(QUESTIONS, rows, strict=True):
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        said = [f"said {2 * n + 2} to {turn}" for n, turn in enumerate(turns)]
        assert row["choices"] == [{"index": 0, "turns": said}] and row["model_id"] == "tuned"
    for request in judge_endpoint.requests:
        system, first, *rest = request["messages"]
        (question,) = [q for q in QUESTIONS if q[2][0] == first["content"]]
        assert request["temperature"] == TEMPERATURES.get(question[1], 0.7)
        assert system == {"role": "system", "content": "Be brief."}
        if rest:
            assert rest == [
                {"role": "assistant", "content": f"said 2 to {question[2][0]}"},
                {"role": "user", "content": question[2][1]},
            ]
    judge_endpoint.requests.clear()
    greedy = answer_turns(questions, lambda table, turn: answers_from_endpoint(table, tuned), "tuned", greedy=True)
    assert {request["temperature"] for request in judge_endpoint.requests} == {0}
    assert len({row["answer_id"] for row in rows + greedy}) == 10


def test_files_hold_several_models_and_rows_that_say_the_same_stay_as_they_are(data, judge, tmp_path):
    bench = read_bench(data, "judge")
    path, answer_file = tmp_path / "out" / "judge_single.jsonl", tmp_path / "out" / "m.jsonl"
    expected = {}
    for model in ("m", "n"):
        answers = answers_of(bench.questions, model, lambda i, turn, model=model: f"{model} says {i}.{turn}")
        judgments = grade(bench, answers, judge)
        save_judgments(path, judgments)
        expected[model] = [invented(row["user_prompt"])[0] for row in judgments]
    before = path.read_bytes()
    save_judgments(path, grade(bench, answers, judge))
    assert path.read_bytes() == before
    # as FastChat's show_result reads the file
    table = pandas.read_json(path, lines=True)
    table = table[table["score"] != -1]
    means = table.groupby("model")["score"].mean()
    assert {model: sum(some) / len(some) for model, some in expected.items()} == pytest.approx(dict(means))
    save_answers(answer_file, answers)
    assert [row["question_id"] for row in read_model_answers(answer_file)] == [3, 5, 7, 9, 11]
    assert read_lines(answer_file)[0]["tstamp"] == 2.0


def without(path, keep):
    write_lines(path, [row for row in read_lines(path) if keep(row)])


def test_what_is_missing_is_named_before_anything_is_asked(data):
    bench = data / "mt_bench"
    references = bench / "reference_answer" / "judge.jsonl"
    assert read_bench(bench, "judge") == read_bench(data, "judge") == read_bench(data, "another judge")
    without(references, lambda row: row["question_id"] != 11)
    with pytest.raises(DataError, match=r"The question 11 \(coding\) has no reference answer"):
        read_bench(data, "judge")
    references.rename(references.with_stem("one"))
    (bench / "reference_answer" / "two.jsonl").write_text((bench / "reference_answer" / "one.jsonl").read_text())
    with pytest.raises(SettingsError, match="has answers of one, two, but none of the judge 'judge'"):
        read_bench(data, "judge")
    with pytest.raises(DataError, match="three.jsonl does not exist"):
        read_bench(data, "judge", reference="three")
    without(data / "judge_prompts.jsonl", lambda row: row["name"] != "single-v1-multi-turn")
    with pytest.raises(DataError, match="has no prompt 'single-v1-multi-turn'"):
        read_bench(data, "judge")
    (data / "judge_prompts.jsonl").unlink()
    with pytest.raises(DataError, match="no judge_prompts.jsonl"):
        read_bench(data, "judge")
    assert len(read_bench(data).questions) == 5  # enough to generate
    with (bench / "question.jsonl").open("a") as file:
        file.write('{"question_id": 12, "text": "Why?"}\n')
    with pytest.raises(DataError, match="Line 6 of .*question.jsonl needs the columns 'category', 'turns'"):
        read_bench(data)
    with pytest.raises(DataError, match="nowhere/mt_bench/question.jsonl does not exist"):
        read_bench(data / "nowhere")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_template": "Grade {answr}"}, r"wants to show \['answr'\]"),
        ({"prompt_template": "Grade {answer"}, r"is no template: expected '}'"),
        ({"prompt_template": "Grade {ref_answer_1}"}, r"wants to show \['ref_answer_1'\]"),
        ({"output_format": "[[A]]"}, "not for a single"),
    ],
)
def test_prompts_that_cannot_be_filled_in_are_refused(data, changes, words):
    prompts = read_lines(data / "judge_prompts.jsonl")
    write_lines(data / "judge_prompts.jsonl", [prompts[0] | changes, *prompts[1:]])
    with pytest.raises(DataError, match=words):
        read_bench(data, "judge")


def test_answers_that_are_missing_are_named(data, judge, judge_endpoint):
    bench = read_bench(data, "judge")
    answers = answers_of(bench.questions)
    answers[3]["choices"][0]["turns"].pop()
    with pytest.raises(DataError, match="no answer to question 5, turn 2"):
        grade(bench, answers, judge)
    with pytest.raises(DataError, match="no answer to question 9, turn 1"):
        grade(bench, answers_of(bench.questions)[:-1], judge)
    assert not judge_endpoint.requests


@pytest.fixture(scope="module")
def student(student_folder):
    return student_folder


@pytest.fixture
def arguments(data, student, judge_endpoint, tmp_path):
    """`arguments(**changes)`: those of a run of the recipe, on a configuration of its own."""

    def write(**changes):
        settings = {"bench": str(data), "output_dir": str(tmp_path / "out"), "model": str(student), "dtype": "float32"}
        settings |= {"model_id": "tiny", "judge_model": "judge", "base_url": judge_endpoint.url, "max_new_tokens": 16}
        settings |= {"template": "vicuna", "batch_size": 2} | changes
        path = tmp_path / "settings.json"
        path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
        return ("--config", path)

    return write


def test_one_command_generates_grades_and_shows_the_means(arguments, data, student, judge_endpoint, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = launch(RECIPE, *arguments())
    out = tmp_path / "out"
    answers = read_lines(out / "data" / "mt_bench" / "model_answer" / "tiny.jsonl")
    judgments = read_lines(out / "data" / "mt_bench" / "model_judgment" / "judge_single.jsonl")
    result = json.loads((out / "tiny.judge.json").read_text())
    scores = {(row["question_id"], row["turn"]): row["score"] for row in judgments}
    assert len(judgments) == 9 == len(judge_endpoint.requests) - 1  # one to see that the judge grades
    assert result["overall"] == {"score": pytest.approx(sum(scores.values()) / 9), "n": 9}
    assert f"overall       {result['overall']['score']:6.3f}  n 9" in done.stdout

    # what the same model says here
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    rows = answer_turns(
        read_bench(data).questions,
        lambda table, turn: generate_answers(model, tokenizer, table, "vicuna", max_new_tokens=16),
        "tiny",
    )
    assert {row["question_id"]: row["choices"] for row in rows} == {r["question_id"]: r["choices"] for r in answers}


@pytest.fixture
def run_here(arguments, monkeypatch):
    """`run_here(**changes)`: the recipe in this process."""
    module = load_recipe(monkeypatch, "mt_bench")

    def run(**changes):
        monkeypatch.setattr(sys, "argv", ["mt_bench", *map(str, arguments(**changes))])
        module.main()

    return run


BEHIND_ENDPOINT = {"model": None, "model_id": None, "endpoint_model": "tuned"}


@pytest.mark.parametrize("behind_endpoint", [True, False])
def test_a_judge_of_no_use_is_found_before_a_single_answer_is_generated(
    run_here, judge_endpoint, tmp_path, behind_endpoint
):
    judge_endpoint.answer = lambda request: "One out of ten."
    answering = BEHIND_ENDPOINT | {"endpoint_base_url": judge_endpoint.url} if behind_endpoint else {}
    for _ in range(2):
        with pytest.raises(TeacherError, match="hold no score such as .*One out of ten"):
            run_here(**answering)
    assert [request["model"] for request in judge_endpoint.requests] == ["judge"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ledger.sqlite"]


def test_calls_of_the_judge_are_counted_with_the_one_before_and_a_second_start_asks_nothing(
    run_here, judge_endpoint, capsys
):
    answering = BEHIND_ENDPOINT | {"endpoint_base_url": judge_endpoint.url}
    run_here(**answering)
    assert "10 asked, 0 reused; one of them before the answers" in capsys.readouterr().out
    assert [request["model"] for request in judge_endpoint.requests] == ["judge"] + ["tuned"] * 9 + ["judge"] * 9
    run_here(**answering)
    assert "0 asked, 10 reused; one of them before the answers" in capsys.readouterr().out
    assert len(judge_endpoint.requests) == 19


@pytest.mark.slow
def test_a_second_run_generates_and_asks_nothing_and_keeps_other_models(arguments, judge_endpoint, tmp_path):
    launch(RECIPE, *arguments())
    out = tmp_path / "out"
    files = {path: path.read_bytes() for path in out.rglob("*.json*") if path.is_file()}
    again = launch(RECIPE, *arguments())
    assert "5 of 5 answers are there and kept" in again.stderr and "0 asked, 10 reused" in again.stdout
    assert {path: path.read_bytes() for path in files} == files
    # of a model behind an endpoint, and of answers that are there
    tuned = {"model": None, "model_id": None, "endpoint_model": "tuned", "endpoint_base_url": judge_endpoint.url}
    launch(RECIPE, *arguments(**tuned, judge_model=None))
    assert len(judge_endpoint.requests) == 19
    answers = out / "data" / "mt_bench" / "model_answer" / "tuned.jsonl"
    graded = launch(RECIPE, *arguments(model=None, model_id=None, answers=str(answers)))
    assert len(judge_endpoint.requests) == 28 and "9 asked, 0 reused\n" in graded.stdout
    judgments = read_lines(out / "data" / "mt_bench" / "model_judgment" / "judge_single.jsonl")
    assert [row["model"] for row in judgments] == ["tiny"] * 9 + ["tuned"] * 9
    assert not (out / "answers.sqlite.ledger.sqlite").exists() and (out / "answers.sqlite").exists()


@pytest.mark.slow
def test_two_processes_generate_and_one_grades(arguments, judge_endpoint, tmp_path):
    launch(RECIPE, *arguments(output_dir=str(tmp_path / "one")))
    judge_endpoint.requests.clear()
    done = launch(RECIPE, *arguments(ledger=str(tmp_path / "new.sqlite")), config=on_cpu("ddp", tmp_path))
    assert "Generated 5 answers, 3 + 2 on 2 processes" in done.stderr  # of the first turn; four have a second
    assert "Generated 4 answers, 2 + 2 on 2 processes" in done.stderr
    assert len(judge_endpoint.requests) == 10 and done.stdout.count("overall") == 1
    one, two = (json.loads((tmp_path / folder / "tiny.judge.json").read_text()) for folder in ("one", "out"))
    assert one == two


@pytest.mark.slow
def test_after_kills_in_generation_and_grading_nothing_is_done_twice(arguments, data, judge_endpoint, tmp_path):
    rows = [{"question_id": n, "category": "stem", "turns": [f"Why {n}?", f"Why not {n}?"]} for n in range(16)]
    write_lines(data / "mt_bench" / "question.jsonl", rows)
    many = arguments(max_new_tokens=150, batch_size=1, max_concurrency=2)
    out = tmp_path / "out"
    first, second = (out / "turns" / f"tiny.turn{turn}.jsonl" for turn in (1, 2))
    part = second.with_name(second.name + ".part-0")
    kill_when(lambda: part.exists() and part.read_bytes().count(b"\n") >= 3, command(RECIPE, *many), env=environment())
    assert not second.exists() and len(judge_endpoint.requests) == 1  # to see that the judge grades
    kept = [json.loads(line) for line in part.read_bytes().splitlines()[:3]]
    # no model says this: where it comes back, it was not generated again
    write_lines(part, [row | {"answer": f"kept {n}"} for n, row in enumerate(kept)])
    with part.open("a") as file:
        file.write('{"answer": "cut o')
    before = first.read_bytes()

    judge_endpoint.latency = 0.3
    kill_when(lambda: len(judge_endpoint.requests) >= 8, command(RECIPE, *many), env=environment())
    assert first.read_bytes() == before and len(read_lines(second)) == 16
    assert {f"kept {n}" for n in range(3)} <= {row["answer"] for row in read_lines(second)}
    assert not list(out.glob("turns/*.part-*"))

    judge_endpoint.latency = 0.0
    done = launch(RECIPE, *many)
    assert done.stderr.count("16 of 16 answers are there and kept") == 2
    assert 33 <= len(judge_endpoint.requests) <= 35  # those in flight may be asked twice
    assert json.loads((out / "tiny.judge.json").read_text())["overall"]["n"] == 32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"endpoint_model": "tuned"}, "Name one of `model`"),
        ({"model": None}, "Name one of `model`"),
        ({"model": None, "answers": "x.jsonl", "judge_model": None}, "name a `judge_model`"),
        ({"template": "vikuna"}, "`template='vikuna'` is unknown"),
        ({"bench": "no/bench"}, "no/bench/mt_bench/question.jsonl does not exist"),
        ({"model": "./no-student"}, "'./no-student' cannot be loaded"),
        ({"base_url": None}, "'judge' needs an API key"),
    ],
    ids=str,
)
def test_arguments_that_do_not_go_together_are_named(arguments, changes, words, monkeypatch):
    module = load_recipe(monkeypatch, "mt_bench")
    monkeypatch.setattr(sys, "argv", ["mt_bench", *map(str, arguments(**changes))])
    with pytest.raises((SettingsError, DataError, TeacherError), match=re.escape(words)):
        module.main()


def test_the_configuration_fits_its_recipe(monkeypatch):
    module, path = load_recipe(monkeypatch, "mt_bench"), ROOT / "recipes" / "mt_bench.yaml"
    assert path.read_text().startswith(
        "# accelerate launch --config_file accelerate_configs/ddp.yaml recipes/mt_bench"
    )
    monkeypatch.setattr(sys, "argv", ["mt_bench"])
    types = (module.BenchArguments, module.EndpointArguments)
    asked, endpoint = module.parse_arguments(types, str(path.with_suffix(".py")))
    assert asked.template == "vicuna" and (endpoint.temperature, endpoint.max_tokens) == (0, 2048)

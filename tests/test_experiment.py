from datasets import Dataset

from hf_reflect import PROMPTS, Teacher
from hf_reflect.evaluation.experiment import judging_takes


def test_the_plan_counts_the_bytes_that_judges_will_read(tmp_path):
    questions = ["What floats?", "Why does ice float on a lake in winter?"]
    answers = {"paper": "Ice, for it is lighter.", "longest": "Ice does. " * 9, "random": "Wood."}
    sets = {
        seed: {name: Dataset.from_dict({"response": [text] * 3}) for name, text in answers.items()} for seed in (0, 1)
    }
    prices = {"price_per_million_input": 3.0, "price_per_million_output": 8.0}
    judges = [Teacher(name, ledger=str(tmp_path / "ledger.sqlite"), **prices) for name in ("one", "other")]

    def read(other, ours=answers["paper"]):  # both orders of each question, with each of the two seeds
        chats = [PROMPTS["judge"].chat(q, ours, other) for q in questions for _ in range(2 * len(sets))]
        return sum(len(message["content"].encode()) for chat in chats for message in chat)

    expected = {"calls": 2 * 16, "prompt_tokens": 2 * round(sum(read(answers[n]) for n in ("longest", "random")) / 4)}
    expected |= {"completion_tokens": 2 * 16 * 500}
    expected["cost"] = (expected["prompt_tokens"] * 3 + expected["completion_tokens"] * 8) / 1e6
    taken = judging_takes(judges, questions, sets, "paper", 2, max_new_tokens=1024)
    assert {name: round(number, 9) for name, number in taken.items()} == expected
    # a set whose rows are not known yet counts as the other
    without = {seed: {name: rows for name, rows in some.items() if name != "random"} for seed, some in sets.items()}
    two = judging_takes(judges, questions, without, "paper", 2, max_new_tokens=1024)
    assert (two["calls"], two["prompt_tokens"]) == (32, 2 * round(2 * read(answers["longest"]) / 4))
    # an answer of one token has no more than some four bytes
    short = judging_takes(judges, questions, sets, "paper", 2, max_new_tokens=1)
    assert short["prompt_tokens"] == 2 * round(2 * read("Ice ", "Ice,") / 4)
    assert not any(judging_takes([], questions, sets, "paper", 2, 9).values())

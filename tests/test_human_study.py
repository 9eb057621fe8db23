import json
import logging
import math
import random
import statistics
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, chromium, load_recipe
from datasets import Dataset
from launching import command, environment

from hf_reflect.arguments import parse_arguments
from hf_reflect.errors import DataError, SettingsError
from hf_reflect.evaluation.answers import write_answers
from hf_reflect.evaluation.human_study import fleiss_kappa, majority, read_ratings, sample_items, write_study

OURS, THEIRS = "recycled-7b", "plain-7b"
HOSTILE = "Close it: </script><script>window.bad = 1</script><img src=x onerror='window.bad = 2'> <!-- <script>"
CODE = "Like this:\n\n```python\nif x < 1 && y:\n\treturn '&amp;'\n```\n\nand no more."
QUESTIONS = {
    "q/1": ("code", "Clip a number.\n    Keep <b>this</b> indented.", CODE, HOSTILE),
    "q/2": ("code", HOSTILE, "One.", "Two."),
    "q/3": ("code", "Sort a list.", "```\nnever closed", "sorted(x)"),
    "q/4": ("maths", "What is 17 + 25?", "42", ""),
    "q/5": ("maths", "ما هي عاصمة فرنسا؟", "باريس", "Paris\u2028and more"),
    "q/6": ("story", "Tell of a keeper.", "The keeper counted ships. " * 60, "There was a lighthouse."),
}


def table(model, answers):
    """A table of answers: question_id → (category, question, answer)."""
    rows = [
        {"question_id": name, "question": question, "category": category, "answer": answer, "model": model}
        for name, (category, question, answer) in answers.items()
    ]
    return Dataset.from_list([row | {"test_set": "written"} for row in rows])


def both(questions=QUESTIONS):
    ours = table(OURS, {name: row[:3] for name, row in questions.items()})
    theirs = table(THEIRS, {name: (*row[:2], row[3]) for name, row in questions.items()})
    return ours, theirs


def many(count, categories=1):
    return both({f"q/{i}": (f"c{i % categories}", f"Question {i}?", f"ours {i}", f"theirs {i}") for i in range(count)})


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


# ---- sampling and blinding


def test_the_sample_has_so_many_of_each_category_and_says_where_there_are_fewer(caplog):
    ours, theirs = many(20, categories=3)  # 7, 7 and 6 questions
    with caplog.at_level(logging.WARNING):
        items = sample_items(ours, theirs, per_category=2)
        assert sorted(items["category"]) == ["c0", "c0", "c1", "c1", "c2", "c2"] and not caplog.messages
        items = sample_items(ours, theirs, per_category=7)
    assert len(items) == 20 and caplog.messages == ["Fewer than 7 questions, so all were taken: c2 (6)."]


def test_the_sample_depends_on_the_seed_and_not_on_the_order_of_rows():
    ours, theirs = many(60, categories=4)
    items = sample_items(ours, theirs, 5, seed=3)
    again = sample_items(ours.shuffle(seed=1), theirs.shuffle(seed=2), 5, seed=3)
    assert items.to_list() == again.to_list()
    other = sample_items(ours, theirs, 5, seed=4)
    assert set(items["question_id"]) != set(other["question_id"])
    assert items["category"][:] != sorted(items["category"])  # shuffled over categories too


def test_the_coin_is_fair_and_the_key_tells_the_truth():
    ours, theirs = many(600)
    items = sample_items(ours, theirs, 600)
    assert 250 < sum(letter == "A" for letter in items["ours"]) < 350
    for row in items:
        number = row["question_id"].split("/")[1]
        mine, other = ("a", "b") if row["ours"] == "A" else ("b", "a")
        assert (row[f"answer_{mine}"], row[f"model_{mine}"]) == (f"ours {number}", OURS)
        assert (row[f"answer_{other}"], row[f"model_{other}"]) == (f"theirs {number}", THEIRS)


def test_tables_without_category_or_model_are_taken_too():
    ours, theirs = (t.select_columns(["question_id", "question", "answer"]) for t in both())
    items = sample_items(ours, theirs, 2)
    assert items["category"][:] == ["", ""] and items["model_a"][:] == ["", ""]


def test_an_answer_that_names_a_model_is_pointed_out(caplog):
    ours, theirs = both({"q/1": ("", "Who are you?", f"I am {OURS.upper()}.", "Nobody."), "q/2": ("", "?", "!", "!")})
    with caplog.at_level(logging.WARNING):
        sample_items(ours, theirs, 2)
    assert caplog.messages == ["Raters may guess who is who: a model is named in an answer to 'q/1'."]


def test_what_cannot_be_sampled_is_said():
    ours, theirs = both()
    with pytest.raises(SettingsError, match="`per_category` is 0, which leaves nothing to rate"):
        sample_items(ours, theirs, 0)
    with pytest.raises(DataError, match="not asked the same questions.*only `ours` has 1: 'q/6'"):
        sample_items(ours, theirs.select(range(5)))
    with pytest.raises(DataError, match="both tables are empty"):
        sample_items(ours.select([]), theirs.select([]))


# ---- page and key


def test_the_page_does_not_tell_who_is_who(tmp_path):
    items = sample_items(*both(), per_category=3)
    study = write_study(items, tmp_path)
    page = (tmp_path / "rating_page.html").read_text()
    for word in (OURS, THEIRS, "maths", "written", "theirs", "model"):
        assert word not in page
    shown = json.loads(page.split('id="study">')[1].split("</script>")[0])
    assert {name for item in shown["items"] for name in item} == {"id", "question", "a", "b"}
    key = read_json(tmp_path / "key.json")
    assert key["study"] == study == shown["id"]
    assert [(name, item["ours"]) for name, item in key["items"].items()] == [
        (row["question_id"], row["ours"]) for row in items
    ]


def test_the_same_study_is_written_alike_and_another_one_does_not_replace_it(tmp_path):
    ours, theirs = both()
    study = write_study(sample_items(ours, theirs), tmp_path)
    before = [(tmp_path / name).read_bytes() for name in ("rating_page.html", "key.json")]
    assert write_study(sample_items(ours, theirs), tmp_path) == study
    assert before == [(tmp_path / name).read_bytes() for name in ("rating_page.html", "key.json")]
    other = sample_items(ours, theirs, seed=1)
    with pytest.raises(SettingsError, match="holds the page and key of another study.*`overwrite`"):
        write_study(other, tmp_path)
    assert write_study(other, tmp_path, overwrite=True) != study
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.json", "rating_page.html"]


def test_only_a_table_of_items_becomes_a_page(tmp_path):
    with pytest.raises(DataError, match="`write_study` needs the columns 'answer_a', .*Give the table of `sample_i"):
        write_study(both()[0], tmp_path)
    with pytest.raises(DataError, match="nothing to rate"):
        write_study(sample_items(*both()).select([]), tmp_path)


# ---- counting


@pytest.fixture
def study(tmp_path):
    """(folder, items): a study of 12 items in three categories."""
    items = sample_items(*many(12, categories=3), per_category=4)
    write_study(items, tmp_path)
    return tmp_path, items


def ratings_file(study, rater, votes, name=None, /, **changes):
    """A rater's file as the page saves it; votes (A, tie, B, None) in the page's order."""
    folder, items = study
    rated = zip(items["question_id"], votes, strict=True)
    content = {
        "format": "hf_reflect ratings 1",
        "study": read_json(folder / "key.json")["study"],
        "rater": rater,
        "ratings": [{"item": item, "vote": vote, "comment": ""} for item, vote in rated],
    }
    path = folder / f"{name or rater}.json"
    path.write_text(json.dumps(content | changes))
    return path


@pytest.mark.parametrize(
    ("votes", "outcome"),
    [
        ("win", "win"),
        ("win win lose", "win"),
        ("lose tie lose", "lose"),
        ("win tie lose", "tie"),
        ("win lose", "tie"),
        ("win tie", "tie"),
        ("lose lose", "lose"),
        ("win win lose lose", "tie"),
        ("win win tie lose", "win"),
        ("lose lose win win tie", "tie"),
    ],
)
def test_the_vote_that_leads_decides_and_a_draw_is_a_tie(votes, outcome):
    assert majority(votes.split()) == outcome
    assert majority(votes.split()[::-1]) == outcome


@pytest.mark.parametrize("raters", [1, 2, 3, 5])
def test_counts_agree_with_a_count_by_hand(study, raters):
    folder, items = study
    rng = random.Random(raters)
    said = {f"rater {i}": rng.choices(("A", "tie", "B"), k=12) for i in range(raters)}
    paths = [ratings_file(study, rater, votes) for rater, votes in said.items()]
    result = read_ratings(paths, folder / "key.json")

    points = {"win": 0, "tie": 0, "lose": 0}
    by_category, undecided = {}, 0
    for place, row in enumerate(items):
        sides = [votes[place] for votes in said.values()]
        theirs = "B" if row["ours"] == "A" else "A"
        counts = {"win": sides.count(row["ours"]), "tie": sides.count("tie"), "lose": sides.count(theirs)}
        leaders = [name for name, count in counts.items() if count == max(counts.values())]
        outcome = leaders[0] if len(leaders) == 1 else "tie"
        points[outcome] += 1
        undecided += len(leaders) > 1
        by_category.setdefault(row["category"], []).append(outcome)
        assert result["items"][place]["question_id"] == row["question_id"]
        assert result["items"][place]["outcome"] == outcome
        assert sorted(result["items"][place]["votes"].values()) == sorted(
            name for name, count in counts.items() for _ in range(count)
        )
    assert {name: result[name] for name in points} == points
    assert result["no_majority"] == undecided <= points["tie"]
    assert result["win_rate"] == pytest.approx((points["win"] - points["lose"]) / 12 + 1)
    for category, outcomes in by_category.items():
        assert result["by_category"][category] == {name: outcomes.count(name) for name in points}
    for rater, votes in said.items():
        assert result["by_rater"][rater]["tie"] == votes.count("tie")
    assert (result["ours"], result["theirs"], result["raters"]) == (OURS, THEIRS, list(said))
    assert (result["kappa"] is None) == (raters == 1)


def test_the_papers_numbers_give_its_rate(tmp_path):
    items = sample_items(*many(108), per_category=108)
    write_study(items, tmp_path)
    outcomes = [1] * 57 + [0] * 23 + [-1] * 28
    votes = [
        "tie" if outcome == 0 else "AB"[(ours == "A") != (outcome == 1)]
        for outcome, ours in zip(outcomes, items["ours"], strict=True)
    ]
    paths = [ratings_file((tmp_path, items), rater, votes) for rater in ("one", "two")]
    paths.append(ratings_file((tmp_path, items), "three", ["tie"] * 108))  # always outvoted
    result = read_ratings(paths, tmp_path / "key.json")
    assert (result["win"], result["tie"], result["lose"]) == (57, 23, 28)
    assert result["win_rate"] == pytest.approx(1.2685, abs=1e-4)
    # the interval, by the normal distribution: each item counts 1, 0 or -1
    spread = 1.96 * statistics.pstdev(outcomes) / math.sqrt(108)
    assert result["interval"] == pytest.approx([1.2685 - spread, 1.2685 + spread], abs=0.015)
    assert result["no_majority"] == 0


def test_what_not_all_rated_is_refused_with_names_or_dropped_for_all(study):
    folder, items = study
    ids = items["question_id"][:]
    paths = [
        ratings_file(study, "Ann", [None] + ["A"] * 11),
        ratings_file(study, "Ben", ["B"] * 10 + [None] * 2),
        ratings_file(study, "Cem", ["A"] * 12),
    ]
    without = read_json(paths[2])  # an entry that is not there at all counts like an empty one
    without["ratings"] = [rating for rating in without["ratings"] if rating["item"] != ids[4]]
    paths[2].write_text(json.dumps(without))
    with pytest.raises(DataError) as error:
        read_ratings(paths, folder / "key.json")
    assert f"Ann left out {ids[0]!r}; Ben left out {ids[10]!r}, {ids[11]!r}; Cem left out {ids[4]!r}." in str(
        error.value
    )
    assert "`partial`: drop" in str(error.value)
    result = read_ratings(paths, folder / "key.json", partial="drop")
    assert result["dropped"] == [ids[0], ids[4], ids[10], ids[11]]
    assert result["win"] + result["tie"] + result["lose"] == len(result["items"]) == 8
    nothing = ratings_file(study, "Dan", [None] * 12)
    with pytest.raises(DataError, match="No item was rated by all of Ann, Dan: nothing is left"):
        read_ratings([paths[0], nothing], folder / "key.json", partial="drop")


def test_files_that_cannot_be_counted_are_named_with_the_reason(study, tmp_path_factory):
    folder, items = study
    key = folder / "key.json"
    good = ratings_file(study, "Ann Lee", ["A"] * 12)

    def refused(*paths, match, key=key):
        with pytest.raises(DataError, match=match):
            read_ratings(paths, key)

    refused(match="no ratings to count")
    refused(folder / "nowhere.json", match="nowhere.json cannot be read: No such file")
    other = tmp_path_factory.mktemp("other")
    write_study(sample_items(*many(12), per_category=4), other)
    refused(good, key=other / "key.json", match="Ann Lee.json belongs to the study '.*', the key .* to '.*'")
    twice = ratings_file(study, " ann  LEE", ["B"] * 12, "again")
    refused(good, twice, match="Ann Lee.json and .*again.json are both of the rater 'ann LEE'")
    refused(good, good, match="are both of the rater 'Ann Lee'")
    refused(
        ratings_file(study, "Ben", ["A"] * 11 + ["C"]), match="Ben.json has the vote 'C' on 'q/.*A, tie, B, or null"
    )
    refused(ratings_file(study, "Ben", ["A"] * 11 + [["A"]]), match=r"has the vote \['A'\]")
    some = read_json(good)["ratings"]
    refused(ratings_file(study, "Ben", ["A"] * 12, ratings=[*some, some[0]]), match="of 'q/.*, but rates it twice")
    strange = [{"item": "x", "vote": "A"}]
    refused(ratings_file(study, "Ben", ["A"] * 12, ratings=strange), match="of 'x', but the key has no such item")
    refused(ratings_file(study, "Ben", ["A"] * 12, ratings=["A"]), match="of None, but the key has no such item")
    refused(ratings_file(study, "Ben", ["A"] * 12, rater=None), match="is damaged: its `rater` is None")
    refused(key, match="is not a file of ratings that the page saved")
    refused(good, key=good, match="is not the key.json of a study")
    good.write_text(good.read_text()[:-20])
    refused(good, match="Ann Lee.json is damaged: it is no JSON.*Ask for it again")
    good.write_bytes(b"\xff\xfe\xff")
    refused(good, match="is damaged: it is no JSON")
    with pytest.raises(SettingsError, match="`partial` is raise or drop, not 'skip'"):
        read_ratings([good], key, partial="skip")


# ---- agreement


def test_kappa_is_that_of_the_well_known_example():
    # 14 raters put 10 subjects into 5 categories; https://en.wikipedia.org/wiki/Fleiss%27_kappa#Worked_example
    counts = [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)


@pytest.mark.parametrize("seed", range(5))
def test_kappa_agrees_with_counting_pairs_of_raters(seed):
    rng = random.Random(seed)
    raters, items = rng.randint(2, 6), rng.randint(2, 30)
    votes = [rng.choices("ABC", weights=(5, 2, 1), k=raters) for _ in range(items)]
    pairs = [(one, two) for row in votes for i, one in enumerate(row) for two in row[i + 1 :]]
    agreeing = sum(one == two for one, two in pairs) / len(pairs)
    every = [vote for row in votes for vote in row]
    by_chance = sum(one == two for one in every for two in every) / len(every) ** 2
    expected = (agreeing - by_chance) / (1 - by_chance)
    assert fleiss_kappa([[row.count(name) for name in "ABC"] for row in votes]) == pytest.approx(expected)


def test_kappa_is_one_where_all_agree_and_undefined_where_chance_would_say_the_same():
    assert fleiss_kappa([[3, 0, 0], [0, 3, 0], [0, 0, 3]]) == pytest.approx(1)
    assert math.isnan(fleiss_kappa([[3, 0, 0], [3, 0, 0]]))
    assert math.isnan(fleiss_kappa([[1, 0, 0], [0, 1, 0]]))
    for wrong in ([[3, 0], [1, 1]], [], [1, 2]):
        with pytest.raises(DataError, match="equally many raters for each item"):
            fleiss_kappa(wrong)


# ---- the page in a browser


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads):
    with chromium(downloads) as browser:
        yield browser


@pytest.fixture
def rating(browser, tmp_path):
    """(browser, folder, items): a page as a rater first sees it; at the end nothing was complained of or sent."""
    items = sample_items(*both(), per_category=3)
    write_study(items, tmp_path, title="Which is <i>better</i>?")
    url = (tmp_path / "rating_page.html").as_uri()
    browser.get(url)
    for _ in range(5):  # Chromium may show a page what was there before it was cleared
        browser.execute_script("localStorage.clear(); window.name = ''")
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(url)
        if not browser.execute_script("return localStorage.length"):
            break
    yield browser, tmp_path, items
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked and all(address == url or address.startswith(("data:", "blob:")) for address in asked)


def find(browser, selector):
    return browser.find_element("css selector", selector)


def click(browser, selector):
    element = find(browser, selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)  # from behind the bar
    element.click()


def press(browser, *keys):
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def start(browser, name):
    find(browser, "#name").send_keys(name)
    click(browser, "#name-form button")


def heading(browser):
    return find(browser, "#item-heading").text


def pressed(browser):
    return [
        button.get_attribute("data-vote") for button in browser.find_elements("css selector", "[aria-pressed=true]")
    ]


def saved(browser, downloads):
    """The path of the file that the page just said it saved."""
    from selenium.webdriver.support.ui import WebDriverWait

    name = find(browser, "#status").text.split("Saved as ")[1].split(",")[0]
    path = downloads / name
    WebDriverWait(browser, 10, poll_frequency=0.05).until(lambda _: path.exists() and path.read_text().endswith("}"))
    return path


def test_three_raters_rate_on_the_page_and_their_files_are_counted(rating, downloads):
    from selenium.webdriver.common.keys import Keys

    browser, folder, items = rating
    plans = {
        "Zoë Ångström": ["A", "A", "B", "tie", "B", "B"],
        "ben": ["A", "B", "B", "tie", "A", "B"],
        "<b>Cem</b>": ["B", "tie", "B", "B", "tie", "A"],
    }
    files = []
    for rater, votes in plans.items():
        start(browser, rater)
        assert find(browser, "#rater").text == rater
        assert find(browser, "#rated").text == "0 of 6 rated" and pressed(browser) == []
        for place, vote in enumerate(votes):
            assert heading(browser) == f"Item {place + 1} of 6"
            if rater == "ben":  # by keys
                press(browser, {"A": "1", "tie": "2", "B": "3"}[vote])
            else:
                click(browser, f"[data-vote={vote}]")
            assert find(browser, "#rated").text == f"{place + 1} of 6 rated"
            if place < 5:
                assert pressed(browser) == [vote]
                press(browser, Keys.ARROW_RIGHT) if rater == "ben" else click(browser, "#next")
        if rater == "ben":
            find(browser, "#comment").send_keys('1 is "short"\nbut 2…')
        assert "All 6 items are rated" in find(browser, "#status").text
        click(browser, "#save")
        files.append(saved(browser, downloads))
        click(browser, "#change")
    result = read_ratings(files, folder / "key.json")
    assert result["raters"] == list(plans)
    expected = []
    for place, ours in enumerate(items["ours"]):
        votes = [plan[place] for plan in plans.values()]
        winner = next((vote for vote in "AB" if votes.count(vote) >= 2), "tie")
        expected.append("tie" if winner == "tie" else "win" if winner == ours else "lose")
    assert [item["outcome"] for item in result["items"]] == expected
    assert [result[name] for name in ("win", "tie", "lose")] == [expected.count(n) for n in ("win", "tie", "lose")]
    assert set(expected) == {"win", "tie", "lose"}  # so that a mistake would show
    assert result["items"][5]["comments"] == {"ben": '1 is "short"\nbut 2…'}

    start(browser, "BEN")  # the same person
    assert find(browser, "#rater").text == "ben" and "Welcome back: 6 of 6" in find(browser, "#status").text


def test_text_of_the_data_is_shown_to_the_letter_and_never_run(rating):
    browser, _, items = rating
    start(browser, "Ann")
    for row in items:
        shown = [find(browser, f"#{name}").get_property("textContent") for name in ("question", "a", "b")]
        assert shown == [row[name] or "(empty)" for name in ("question", "answer_a", "answer_b")]
        assert all(find(browser, f"#{name}").value_of_css_property("white-space") == "pre-wrap" for name in ("a", "b"))
        press(browser, "2", "\ue014")
    assert browser.execute_script("return [typeof bad, document.scripts.length, document.images.length]") == [
        "undefined",
        2,
        0,
    ]
    assert browser.title == find(browser, "h1").text == "Which is <i>better</i>?"
    click(browser, "#change")


def test_closing_the_page_loses_nothing(rating):
    browser, folder, _ = rating
    start(browser, "Ann")
    press(browser, "1", "\ue014", "3")
    find(browser, "#comment").send_keys("not sure")
    browser.refresh()
    assert find(browser, "#rater").text == "Ann" and find(browser, "#rated").text == "2 of 6 rated"
    assert heading(browser) == "Item 2 of 6" and pressed(browser) == ["B"]
    assert find(browser, "#comment").get_property("value") == "not sure"
    first = browser.current_window_handle
    url = browser.current_url
    browser.switch_to.new_window("tab")
    try:
        browser.get(url)
        click(browser, "#unrated")
        press(browser, "2")
        assert (heading(browser), pressed(browser)) == ("Item 3 of 6", ["tie"])
    finally:
        browser.close()
        browser.switch_to.window(first)
    press(browser, "1")  # what the other tab did stays
    assert pressed(browser) == ["A"] and find(browser, "#rated").text == "3 of 6 rated"
    click(browser, "#change")
    start(browser, "Ben")
    assert find(browser, "#rated").text == "0 of 6 rated"


def test_saving_too_early_says_which_items_are_not_rated(rating, downloads):
    browser, folder, items = rating
    start(browser, "Early")
    press(browser, "1", "\ue014", "\ue014", "2")
    click(browser, "#save")
    assert find(browser, "#missing-heading").text == "4 items are not rated"
    listed = [button.text for button in browser.find_elements("css selector", "#missing-items button")]
    assert listed == ["Item 2", "Item 4", "Item 5", "Item 6"]
    press(browser, "3")  # no vote behind the warning's back
    browser.find_elements("css selector", "#missing-items button")[1].click()
    assert heading(browser) == "Item 4 of 6" and pressed(browser) == []
    click(browser, "#unrated")
    assert heading(browser) == "Item 5 of 6"
    click(browser, "#save")
    click(browser, "#anyway")
    path = saved(browser, downloads)
    ids = items["question_id"][:]
    with pytest.raises(DataError, match=f"Early left out '{ids[1]}', '{ids[3]}', '{ids[4]}', '{ids[5]}'"):
        read_ratings(path, folder / "key.json")
    assert len(read_ratings(path, folder / "key.json", partial="drop")["items"]) == 2


def test_keys_do_not_vote_while_a_comment_is_written_or_when_switched_off(rating):
    browser, _, _ = rating
    start(browser, "Ann")
    find(browser, "#comment").send_keys("1, 2 or 3?", "\ue012")
    assert pressed(browser) == [] and heading(browser) == "Item 1 of 6"
    assert "A is better" in find(browser, "#votes").text and "1" in find(browser, "#votes").text
    click(browser, "summary")
    assert "Keys: 1 A is better, 2 tie, 3 B is better, ← back, → next" in find(browser, "details").text
    click(browser, "[name=onward]")
    press(browser, "1")
    assert heading(browser) == "Item 2 of 6"
    press(browser, "\ue012")
    assert heading(browser) == "Item 1 of 6" and pressed(browser) == ["A"]
    click(browser, "[name=keys]")
    press(browser, "3", "\ue014")
    assert heading(browser) == "Item 1 of 6" and pressed(browser) == ["A"]
    browser.refresh()
    assert not find(browser, "[name=keys]").is_selected() and find(browser, "[name=onward]").is_selected()


def test_the_newest_of_two_copies_holds(rating):
    browser, _, _ = rating
    start(browser, "Ann")
    press(browser, "1")
    earlier = browser.execute_script("return JSON.stringify({...localStorage})")
    press(browser, "\ue014", "3")
    for changed in (
        "localStorage.clear()",
        f"Object.assign(localStorage, {earlier})",
        "for (const key of Object.keys(localStorage)) localStorage[key] = '{'",
    ):
        browser.execute_script(changed)
        browser.refresh()
        assert find(browser, "#rater").text == "Ann" and find(browser, "#rated").text == "2 of 6 rated", changed
    browser.execute_script("window.name = 'of somebody else'")
    press(browser, "1")
    assert pressed(browser) == ["A"]


def test_a_browser_without_a_store_says_so_and_still_saves(rating, downloads):
    browser, folder, _ = rating
    refuse = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };"
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": refuse})
    try:
        browser.refresh()
        start(browser, "Nomad")
        assert "keeps nothing for this page" in find(browser, "#forgetful").text
        press(browser, *"1\ue0142\ue0143\ue0141\ue0142\ue0143")
        click(browser, "#save")
        assert read_ratings(saved(browser, downloads), folder / "key.json")["raters"] == ["Nomad"]
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


CONTRASTS = """
const luminance = (colour) => {
  const linear = (x) => (x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
  const [r, g, b] = colour.match(/[\\d.]+/g).map((part) => linear(part / 255));
  return .2126 * r + .7152 * g + .0722 * b;
};
const behind = (element) => {
  const colour = getComputedStyle(element).backgroundColor;
  return colour === "rgba(0, 0, 0, 0)" ? behind(element.parentElement) : colour;
};
return [...document.querySelectorAll("body *")]
  .filter((element) => element.offsetParent && !element.disabled)
  .filter((element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
  .map((element) => {
    const [one, two] = [luminance(getComputedStyle(element).color), luminance(behind(element))];
    return [element.outerHTML.slice(0, 80), (Math.max(one, two) + .05) / (Math.min(one, two) + .05)];
  });
"""


def test_the_page_is_readable_on_a_phone_and_in_the_dark_and_its_controls_have_names(rating):
    browser, _, _ = rating
    start(browser, "Ann")
    press(browser, "1")
    click(browser, "summary")
    try:
        for width, scheme in ((1280, "light"), (390, "dark")):
            size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            measured = browser.execute_script(CONTRASTS)
            assert len(measured) > 15 and min(measured, key=lambda pair: pair[1])[1] >= 4.5
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            a, b = (find(browser, f"#{name}").rect for name in "ab")
            if width == 390:
                assert b["y"] >= a["y"] + a["height"] and a["x"] == b["x"]
            else:
                assert b["x"] >= a["x"] + a["width"] and a["y"] == b["y"]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    controls = browser.find_elements("css selector", "button, input, textarea, progress, section, article")
    unnamed = [c.get_attribute("outerHTML") for c in controls if c.is_displayed() and not c.accessible_name.strip()]
    assert unnamed == [] and len(controls) > 15
    assert find(browser, "#status").get_attribute("aria-live") == "polite"


def test_nothing_on_the_page_could_reach_a_server(browser, tmp_path):
    seen = []

    class Listening(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listening)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        write_study(sample_items(*both()), tmp_path)
        browser.get((tmp_path / "rating_page.html").as_uri())
        address = f"http://127.0.0.1:{server.server_port}"
        reached = browser.execute_async_script(
            "const [address, done] = arguments; new Image().src = address + '/image';"
            "navigator.sendBeacon(address + '/beacon', 'x');"
            "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.bad = 1\">');"
            "fetch(address + '/fetch').then(() => done('reached'), () => setTimeout(done, 200, typeof bad));",
            address,
        )
        assert reached == "undefined" and seen == []
    finally:
        server.shutdown()
        server.server_close()
        browser.get_log("browser")  # its refusals


# ---- the recipe


@pytest.fixture
def recipe(monkeypatch):
    return load_recipe(monkeypatch, "human_study")


def test_the_recipes_configuration_fits_and_its_misuse_is_said(recipe, monkeypatch):
    script = str(ROOT / "recipes" / "human_study.py")

    def parsed(*arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        return parse_arguments((recipe.StudyArguments,), script)[0]

    assert parsed().stage == "page" and parsed().per_category == 4
    assert parsed("--stage", "count", "--ratings", "a.json", "b.json").ratings == ["a.json", "b.json"]
    with pytest.raises(SettingsError, match="`stage` is page or count, not 'rate'"):
        parsed("--stage", "rate")
    with pytest.raises(SettingsError, match="Name the files that the raters saved"):
        parsed("--stage", "count")
    with pytest.raises(SettingsError, match="name their files with `ours` and `theirs`"):
        recipe.StudyArguments(ours="a.jsonl")


def test_the_recipe_goes_from_answers_to_a_result(recipe, tmp_path, monkeypatch, capsys):
    for name, answers in zip(("ours", "theirs"), many(12, categories=3), strict=True):
        write_answers(tmp_path / f"{name}.jsonl", answers)
    folder = tmp_path / "study"
    line = command("recipes/human_study.py", "--ours", tmp_path / "ours.jsonl", "--theirs", tmp_path / "theirs.jsonl")
    line += ["--per_category", "3", "--output_dir", str(folder)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "9 items of 3 categories" in done.stdout and (folder / "rating_page.html").exists()

    items = sample_items(*many(12, categories=3), per_category=3)
    for_us = items["ours"][:]
    for_them = ["B" if letter == "A" else "A" for letter in for_us]
    votes = {"Ann": for_us, "Ben": [*for_us[:6], *["tie"] * 3], "Cem": ["tie"] * 9}
    paths = [ratings_file((folder, items), rater, given) for rater, given in votes.items()]
    count = ["--stage", "count", "--output_dir", str(folder), "--ratings", *map(str, paths)]
    monkeypatch.setattr(sys, "argv", ["human_study.py", *count])
    recipe.main()
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].strip() == f"{OURS} against {THEIRS}"
    table = [line.rsplit(maxsplit=4) for line in printed.splitlines()]
    rows = {line[0].strip(): line[1:] for line in table if len(line) == 5}
    assert rows["majority"] == ["6", "3", "0", "1.67"] and rows["rater Ben"] == ["6", "3", "0", "1.67"]
    assert rows["rater Cem"] == ["0", "9", "0", "1.00"] and {"c0", "c1", "c2"} < set(rows)
    result = read_json(folder / "result.json")
    assert result == read_ratings(paths, folder / "key.json")
    assert f"Fleiss' kappa  {result['kappa']:.3f}" in printed
    low, high = result["interval"]
    assert 1 < low < 5 / 3 < high <= 2 and f"win rate       1.67, 95 % interval {low:.2f} to {high:.2f}" in printed
    assert "no majority    0, counted as ties" in printed and "dropped" not in printed

    # nobody agrees on the first, and one rater left the last out
    votes = {"Ann": for_us, "Ben": [*for_them[:1], *for_us[1:]], "Cem": [*["tie"] * 8, None]}
    paths = [ratings_file((folder, items), rater, given) for rater, given in votes.items()]
    monkeypatch.setattr(sys, "argv", ["human_study.py", *count, "--partial", "drop"])
    recipe.main()
    result = read_json(folder / "result.json")
    assert [result[name] for name in ("win", "tie", "lose", "no_majority")] == [7, 1, 0, 1]
    printed = capsys.readouterr().out
    assert "no majority    1, counted as a tie\n" in printed and "1 item that not all raters rated" in printed

import json
import random
import re
import statistics
import subprocess
import sys

import datasets
import numpy as np
import pytest
import yaml
from conftest import ROOT, chromium, load_recipe
from endpoint import Endpoint, rewriting
from launching import command, environment

from hf_reflect import StudentScorer, Teacher, pilot, select, to_pairs
from hf_reflect.arguments import DataArguments, EndpointArguments, SelectionArguments, parse_arguments
from hf_reflect.errors import SettingsError
from hf_reflect.ledger import Ledger
from hf_reflect.templates import StudentTemplate

ROWS = 60
PRICES = {"price_per_million_input": 2.0, "price_per_million_output": 10.0}
GATES = {"ifd_gate": 1.05, "r_ifd_gate": 0.95}  # that an untrained student passes now and then
VARIANTS = ("original", "instruction", "response", "instruction+response")
TOPICS = "rain iron tea glass bread wool salt ink cork sand".split()


def number_of(request):
    """Which row a request is about: its number stands in the instruction, old or new."""
    return int(re.search(r"case (\d+)", request["messages"][-1]["content"])[1])


def answer(request):
    """`good` rewrites; `careless` refuses every fourth new instruction, and every fifth response is in no form."""
    asks_for_instruction = "[New Instruction]" in request["messages"][-1]["content"]
    if request["model"] == "careless":
        if asks_for_instruction and number_of(request) % 4 == 0:
            return "I'm sorry, but I can't help with that."
        if not asks_for_instruction and number_of(request) % 5 == 0:
            return {"text": "Well, it could be better.", "finish_reason": "stop"}
    return rewriting(request)


def source_rows(count=ROWS):
    draw = random.Random(0)
    words = [" ".join(draw.choices(TOPICS, k=draw.randrange(3, 25))) for _ in range(count)]
    return [
        {"instruction": f"Write about case {n}: {TOPICS[n % 10]}.", "output": f"It is {words[n]}."}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def pilot_run(tmp_path_factory, student):
    """Both teachers' rewrites of all rows, scored: (asked by name, tables by name, endpoint)."""
    ledger = str(tmp_path_factory.mktemp("pilot") / "ledger.sqlite")
    pairs = to_pairs(datasets.Dataset.from_list(source_rows()))
    with Endpoint(answer, models=("good", "careless"), latency=0.002) as endpoint:
        more = {"base_url": endpoint.url, "ledger": ledger, "max_failure_rate": 0.9, **PRICES}
        every = [pilot.ask(pairs, Teacher(name, **more), name) for name in ("good", "careless")]
    scorer = StudentScorer(*student, template="vicuna", max_length=1024)
    scored = scorer.score(pilot.all_versions(every))
    return (
        {each.name: each for each in every},
        {each.name: pilot.of_teacher(scored, each.name) for each in every},
        endpoint,
    )


@pytest.fixture(scope="module")
def measured(pilot_run):
    every, tables, _ = pilot_run
    return {name: pilot.measure(every[name], tables[name], 7000, **GATES, keep="reflected") for name in every}


# ---- the numbers, computed here once more, row by row


def naive_winner(versions, ifd_gate=None, r_ifd_gate=None):
    """V2 Eq. 6 and 9 for one row with one source: the kept version, or None."""
    there = {row["variant"]: row for row in versions if row["response"] is not None}
    first = there["original"]
    if "instruction" in there and there["instruction"]["ifd"] > first["ifd"]:
        first = there["instruction"]
    challenger = there.get("response" if first["variant"] == "original" else "instruction+response")
    if challenger is None or not challenger["r_ifd"] < first["r_ifd"]:
        return None
    for name, gate in (("ifd", ifd_gate), ("r_ifd", r_ifd_gate)):
        if gate is not None and not challenger[name] < gate:
            return None
    return challenger


def grouped(table):
    rows = {}
    for row in table:
        rows.setdefault(row["row_id"], []).append(row)
    return list(rows.values())


def bootstrapped(rows, statistic, draws=1500):
    draw = random.Random(1)
    values = sorted(statistic(draw.choices(rows, k=len(rows))) for _ in range(draws))
    return values[round(0.025 * draws)], values[round(0.975 * draws)]


def assert_alike(interval, naive):
    """Up to what two draws of some thousand samples differ by."""
    width = naive[1] - naive[0]
    assert interval == pytest.approx(naive, abs=0.12 * width)


def test_usable_shares_are_those_that_the_teachers_were_told_to_give(measured):
    good, careless = measured["good"], measured["careless"]
    assert good["usable"] == {
        "instruction": {"asked": 60, "usable": 60, "share": 1.0, "codes": {}},
        "response": {"asked": 120, "usable": 120, "share": 1.0, "codes": {}},
    }
    numbers = range(ROWS)
    with_new = [n for n in numbers if n % 4]
    useless = sum(n % 5 == 0 for n in numbers) + sum(n % 5 == 0 for n in with_new)
    instruction, response = careless["usable"]["instruction"], careless["usable"]["response"]
    assert instruction["codes"] == {"refused": 15} and instruction["share"] == 45 / 60
    assert response["asked"] == 60 + len(with_new) == 105
    assert response["codes"] == {"unparsed": useless, "parent": 15} and response["usable"] == 105 - useless
    assert careless["usable_share"] == (45 + 105 - useless) / 165
    assert good["answered"] == careless["answered"] == ROWS and good["failed"] is None
    assert good["pilot"]["returned"] == {"good-0125": 180}


def test_kept_shares_and_prices_agree_with_a_count_row_by_row(pilot_run, measured):
    every, tables, endpoint = pilot_run
    for name, found in measured.items():
        rows = grouped(tables[name])
        kept = [naive_winner(versions, **GATES) is not None for versions in rows]
        without = [naive_winner(versions) is not None for versions in rows]
        assert 5 < sum(kept) < sum(without) < ROWS  # else the gates are not tried here
        assert found["kept"]["share"] == sum(kept) / ROWS and found["kept"]["rows_without_gates"] == sum(without)
        assert found["kept"]["dropped_by_gates"] == sum(without) - sum(kept)

        cost, calls, prompt, completion = ([0.0] * ROWS for _ in range(4))
        for request in endpoint.requests:
            if request["model"] == name:
                given = answer(request)
                text = given if isinstance(given, str) else given["text"]
                tokens = sum(len(m["content"]) for m in request["messages"]) // 4, len(text) // 4
                row = number_of(request)
                calls[row] += 1
                prompt[row] += tokens[0]
                completion[row] += tokens[1]
                cost[row] += (2.0 * tokens[0] + 10.0 * tokens[1]) / 1e6
        pairs = list(zip(cost, kept, strict=True))

        def a_kept_row(some):
            return sum(c for c, _ in some) / max(sum(k for _, k in some), 1)

        assert found["kept"]["cost_per_kept"]["value"] == pytest.approx(a_kept_row(pairs))
        assert_alike(found["kept"]["cost_per_kept"]["interval"], bootstrapped(pairs, a_kept_row))
        for rows_of_run, run in ((7000, found["full"]), (350, found["preselected"])):
            assert run["rows"] == rows_of_run
            for key, column in (
                ("cost", cost),
                ("calls", calls),
                ("prompt_tokens", prompt),
                ("completion_tokens", completion),
            ):
                assert run[key]["value"] == pytest.approx(rows_of_run * statistics.fmean(column))
                naive = bootstrapped([rows_of_run * value for value in column], statistics.fmean)
                if naive[1] > naive[0]:  # `good` takes three calls for each row
                    assert_alike(run[key]["interval"], naive)
        assert found["pilot"]["cost"] == pytest.approx(sum(cost)) and found["pilot"]["replies"] == sum(calls)


def test_hours_are_requests_times_seconds_over_concurrency_unless_limits_bind(pilot_run, measured):
    every, tables, _ = pilot_run
    asked = every["careless"]
    with Ledger(asked.teacher.ledger) as ledger:
        records = [(request, reply) for _, request, reply, *_ in ledger.rows() if request["model"] == "careless"]
    seconds = [(number_of(request), reply["seconds"]) for request, reply in records]
    calls = len(seconds) / ROWS
    mean = statistics.fmean(value for _, value in seconds)
    full = measured["careless"]["full"]
    assert full["hours"]["value"] == pytest.approx(7000 * calls * mean / 64 / 3600)
    assert full["seconds_a_request"] == pytest.approx(mean) and full["bound_by"] == "max_concurrency"
    by_row = [[value for n, value in seconds if n == row] for row in range(ROWS)]
    assert_alike(
        full["hours"]["interval"],
        bootstrapped(by_row, lambda some: 7000 * sum(map(sum, some)) / ROWS / 64 / 3600),
    )
    for limits, hours in (
        ({"requests_per_minute": 30.0}, 7000 * calls / 30 / 60),
        ({"tokens_per_minute": 9000.0}, None),
    ):
        slow = asked._replace(teacher=Teacher("careless", ledger=asked.teacher.ledger, **limits))
        found = pilot.measure(slow, tables["careless"], 7000, **GATES, keep="reflected")["full"]
        assert found["bound_by"] == next(iter(limits))
        assert found["hours"]["value"] == pytest.approx(hours) if hours else found["hours"]["value"] > 1
        assert found["cost"] is None and found["tokens"]["value"] > 0  # these have no prices


def test_tokens_are_guessed_from_bytes_where_an_endpoint_does_not_count(tmp_path):
    pairs = to_pairs(datasets.Dataset.from_list(source_rows(4)))

    def uncounted(request):
        return {"text": rewriting(request), "usage": (0, 0)}

    with Endpoint(uncounted) as endpoint:
        teacher = Teacher("teacher", base_url=endpoint.url, ledger=str(tmp_path / "ledger.sqlite"), **PRICES)
        asked = pilot.ask(pairs, teacher, "teacher")
    table = noisy(asked.table)
    found = pilot.measure(asked, table, 4, ifd_gate=None, r_ifd_gate=None)
    prompts = [sum(len(m["content"].encode()) for m in request["messages"]) for request in endpoint.requests]
    assert found["full"]["prompt_tokens"]["value"] == sum(size // 4 for size in prompts)
    texts = [rewriting(request).encode() for request in endpoint.requests]
    assert found["full"]["completion_tokens"]["value"] == sum(len(text) // 4 for text in texts)
    assert found["pilot"]["uncounted"] == 12 and found["pilot"]["cost"] == 0


# ---- shifts


def with_columns(table, **columns):
    for name, values in columns.items():
        table = table.remove_columns([name] if name in table.column_names else []).add_column(name, values)
    return table


def noisy(table, seed=0, spread=0.2):
    """Every usable version's scores replaced by noise."""
    draw = np.random.default_rng(seed)
    usable = [text is not None for text in table["response"]]
    values = np.exp(draw.normal(-0.05, spread, (2, len(table)))).tolist()
    ifd, r_ifd = ([v if u else None for v, u in zip(column, usable, strict=True)] for column in values)
    return with_columns(table, ifd=ifd, r_ifd=r_ifd)


def test_shifts_agree_with_means_over_what_select_keeps(pilot_run):
    table = noisy(pilot_run[1]["careless"], seed=5)
    gates = {"ifd_gate": 1.1, "r_ifd_gate": 1.2}
    found = pilot.shifts(table, **gates, seed=3)

    def passes(row):
        return row["ifd"] < gates["ifd_gate"] and row["r_ifd"] < gates["r_ifd_gate"]

    original = {row["row_id"]: row for row in table if row["variant"] == "original"}
    coins = [select(table, rule="random", seed=3 + n).to_list() for n in range(pilot.COINS)]
    sides = {
        "paper": select(table, **gates).to_list(),
        "coin": [row for some in coins for row in some if passes(row)],
        "new": [row for some in coins for row in some],
    }
    assert found["gated"] and found["kept"] == len(sides["paper"]) >= pilot.ENOUGH
    for score in ("ifd", "r_ifd"):
        for what, side, against in (
            ("control", "paper", sides["coin"]),
            ("originals", "paper", [original[row["row_id"]] for row in sides["paper"]]),
            ("by_the_teacher", "new", [original[row["row_id"]] for row in sides["new"]]),
        ):
            shift = found[score][what]
            mean, other = (statistics.fmean(row[score] for row in some) for some in (sides[side], against))
            assert (shift["mean"], shift["against"]) == pytest.approx((mean, other))
            assert shift["value"] == pytest.approx(mean - other)

            pieces = {row_id: ([], []) for row_id in original}
            for side_number, rows in enumerate((sides[side], against)):
                for row in rows:
                    pieces[row["row_id"]][side_number].append(row[score])

            def difference(some):
                one, two = ([value for row in some for value in row[number]] for number in (0, 1))
                return statistics.fmean(one) - statistics.fmean(two)

            assert_alike(shift["interval"], bootstrapped(list(pieces.values()), difference, draws=800))


def test_what_chance_brings_agrees_with_dealing_a_rows_scores_by_hand(pilot_run):
    table = noisy(pilot_run[1]["good"], seed=6)
    found = pilot.shifts(table, None, None)
    draw, values = random.Random(0), []
    dealt, ifds = ([[row[score] for row in rows] for rows in grouped(table)] for score in ("r_ifd", "ifd"))
    for _ in range(300):
        kept, all_new = [], []
        for scores, others in zip(dealt, ifds, strict=True):
            order = draw.sample(range(4), 4)
            rows = [
                {"variant": v, "response": "", "ifd": others[n], "r_ifd": scores[n]}
                for v, n in zip(("original", "response", "instruction", "instruction+response"), order, strict=True)
            ]
            kept += [row["r_ifd"] for row in [naive_winner(rows)] if row]
            all_new += [row["r_ifd"] for row in rows if row["variant"] in ("response", "instruction+response")]
        values.append(statistics.fmean(kept) - statistics.fmean(all_new))
    values.sort()
    shift = found["r_ifd"]["control"]
    # of noise: choosing the lower of two numbers shifts them by itself
    assert shift["interval"][1] < 0 and shift["by_chance"][1] < 0
    assert shift["by_chance"] == pytest.approx((values[7], values[292]), abs=0.015)


@pytest.mark.parametrize("gate", [1.0, pytest.param(None, marks=pytest.mark.slow)])
def test_noise_is_called_noise_in_at_least_90_of_100_seeds(pilot_run, gate, monkeypatch):
    monkeypatch.setattr(pilot.choosing, "DEALS", 200)
    table, honest, excluded = pilot_run[1]["careless"], {}, 0
    for seed in range(100):
        found = pilot.shifts(noisy(table, seed), gate, gate, seed=seed)
        for score in pilot.SCORES:
            for what in pilot.COMPARED:
                words = pilot.in_words(score, found[score][what])
                honest[score, what] = honest.get((score, what), 0) + ("not distinguishable" in words)
        low, high = found["r_ifd"]["originals"]["interval"]
        excluded += not low <= 0 <= high
    assert len(honest) == 6 and min(honest.values()) >= 90, honest
    assert excluded > 70  # so the interval alone would have been wrong


def test_a_teacher_that_lowers_r_ifd_is_told_from_one_that_does_not(pilot_run):
    table = noisy(pilot_run[1]["good"], seed=1, spread=0.1)
    lower = [v - 0.1 * ("response" in name) for v, name in zip(table["r_ifd"], table["variant"], strict=True)]
    found = pilot.shifts(with_columns(table, r_ifd=lower), 1.0, 1.0)
    by_the_teacher = found["r_ifd"]["by_the_teacher"]
    assert by_the_teacher["distinguishable"] and by_the_teacher["value"] == pytest.approx(-0.1, abs=0.04)
    words = pilot.in_words("r_ifd", by_the_teacher)
    assert words.startswith("The interval excludes 0, and chance does not reach so far: r-IFD is lower by 0.")
    assert "not distinguishable" in pilot.in_words("ifd", found["ifd"]["by_the_teacher"])


def test_a_choice_of_better_instructions_shifts_ifd_against_the_coin(pilot_run):
    table = noisy(pilot_run[1]["good"], seed=2, spread=0.02)
    draw = random.Random(0)
    # an instruction that is harder stays so with another response
    lift = {(row, new): draw.gauss(0, 0.15) for row in set(table["row_id"]) for new in (False, True)}
    names = zip(table["ifd"], table["row_id"], table["variant"], strict=True)
    ifd = [value + lift[row, "instruction" in name] for value, row, name in names]
    shift = pilot.shifts(with_columns(table, ifd=ifd), None, None)["ifd"]["control"]
    assert shift["distinguishable"] and shift["value"] > 0


def test_where_the_gates_leave_too_few_rows_all_is_compared_without_them(pilot_run, measured):
    every, tables, _ = pilot_run
    found = pilot.measure(every["good"], tables["good"], 7000, ifd_gate=0.01, r_ifd_gate=0.01, keep="reflected")
    kept = found["kept"]
    assert kept["rows"] == 0 and kept["share"] == 0 and kept["cost_per_kept"] is None
    assert kept["dropped_by_gates"] == kept["rows_without_gates"] == measured["good"]["kept"]["rows_without_gates"]
    assert not found["shifts"]["gated"] and found["shifts"]["ifd"]["control"] is not None
    few = tables["good"].select(range(20))
    assert pilot.shifts(few, None, None)["ifd"]["control"] is None
    assert pilot.in_words("ifd", None) == "Fewer than 10 rows on one side: too few to compare."


# ---- teachers that fail, and money that ends


def test_teachers_that_fail_say_why_and_keep_what_came_before(tmp_path):
    pairs = to_pairs(datasets.Dataset.from_list(source_rows()))
    with Endpoint(answer, models=("careless",)) as endpoint:
        more = {"base_url": endpoint.url, "ledger": str(tmp_path / "ledger.sqlite"), "max_concurrency": 4}
        unknown = pilot.ask(pairs, Teacher("unknown", **more), "unknown")
        careless = pilot.ask(pairs, Teacher("careless", **more), "careless")
    assert "does not exist" in unknown.failed and not pilot.answered(unknown.table)
    assert (
        "more than max_failure_rate=0.2" in careless.failed
        and careless.requests == len(endpoint.requests) - unknown.requests
    )
    found = pilot.measure(careless, noisy(careless.table), 60, ifd_gate=None, r_ifd_gate=None)
    assert found["usable"]["instruction"]["codes"]["refused"] >= 10 and found["pilot"]["replies"] == careless.requests
    found = pilot.measure(unknown, noisy(unknown.table), 60, ifd_gate=None, r_ifd_gate=None)
    assert found["usable_share"] is None and found["kept"] is None and found["answered"] == 0


def test_a_key_that_is_missing_stops_one_teacher_only(tmp_path):
    pairs = to_pairs(datasets.Dataset.from_list(source_rows(3)))
    asked = pilot.ask(pairs, Teacher("gpt", api_key_env="NO_SUCH_KEY", ledger=str(tmp_path / "l.sqlite")), "gpt")
    assert "needs an API key" in asked.failed and len(asked.table) == 12 and asked.requests == 0


def test_the_cap_over_all_teachers_is_never_passed_and_what_it_left_out_is_in_no_mean(tmp_path):
    pairs = to_pairs(datasets.Dataset.from_list(source_rows()))
    cap = 0.25
    with Endpoint(answer, models=("good", "careless")) as endpoint:
        more = {
            "base_url": endpoint.url,
            "max_cost": cap,
            "max_tokens": 512,
            "max_failure_rate": 0.9,
            "max_concurrency": 8,
            **PRICES,
        }
        more["ledger"] = str(tmp_path / "ledger.sqlite")
        every = [pilot.ask(pairs, Teacher(name, **more), name) for name in ("good", "careless")]
    billed = sum(2.0 * prompt + 10.0 * completion for prompt, completion in endpoint.usage) / 1e6
    with Ledger(more["ledger"]) as ledger:
        assert ledger.spent()["cost"] == pytest.approx(billed) and 0.6 * cap < billed <= cap
    good, careless = every
    assert len(pilot.answered(good.table)) == ROWS
    found = pilot.measure(careless, noisy(careless.table), 1000, ifd_gate=None, r_ifd_gate=None)
    complete = [rows for rows in grouped(careless.table) if not any("budget:" in (row["error"] or "") for row in rows)]
    assert 20 < found["answered"] == len(complete) < ROWS  # rows are asked about to their end, not all of them halfway
    assert sum(part["codes"].get("budget", 0) for part in found["usable"].values()) > 0
    ids = {rows[0]["row_id"] for rows in complete}
    numbers = {n for n, row_id in enumerate(pairs["row_id"]) if row_id in ids}
    calls = sum(r["model"] == "careless" and number_of(r) in numbers for r in endpoint.requests)
    assert found["full"]["calls"]["value"] == pytest.approx(1000 * calls / len(complete))


# ---- the page


HOSTILE = "Close it: </script><script>window.bad = 1</script><img src=x onerror='window.bad = 2'>"


@pytest.fixture
def written(pilot_run, measured, student, tmp_path):
    """A pilot's folder, as the recipe writes it, with hostile text in rows, errors and names."""
    every, tables, _ = pilot_run
    broken = tables["good"].map(
        lambda row: {"response": row["response"] and HOSTILE, "critique": row["critique"] and HOSTILE}
    )
    down = measured["good"] | {"name": HOSTILE, "failed": HOSTILE, "answered": 0, "kept": None, "shifts": None}
    down |= {"full": None, "preselected": None, "pilot": measured["good"]["pilot"] | {"returned": {HOSTILE: 3}}}
    result = {
        "note": None,
        "data": {"dataset": HOSTILE, "split": "train", "rows": 7000, "sampled": ROWS},
        "seed": 0,
        "student": {"model": HOSTILE, "template": "vicuna", "max_length": 1024}
        | pilot.student_numbers(tables["good"], StudentTemplate(student[1], "vicuna", 1024)),
        "selection": {**GATES, "keep": "reflected"},
        "teachers": [measured["good"], measured["careless"], down],
        "ledger": {
            "requests": 1,
            "tokens": 2,
            "cost": 0.5,
            "max_cost": 5,
            "max_requests": None,
            "max_total_tokens": 9,
        },
    }
    shown = pilot.examples(
        {"good": broken, "careless": tables["careless"], HOSTILE: None}, 20, 0, **GATES, keep="reflected"
    )
    pilot.write_pilot(tmp_path, result, shown)
    return tmp_path, result, shown


def test_the_same_rows_stand_side_by_side_failures_among_them(written):
    folder, result, shown = written
    assert len(shown) == 20 and len({each["original"]["row_id"] for each in shown}) == 20
    errors = []
    for each in shown:
        good, careless, down = each["teachers"]
        assert [side["name"] for side in each["teachers"]] == ["good", "careless", HOSTILE] and down[
            "versions"
        ] is None
        assert [row["variant"] for row in good["versions"]] == list(VARIANTS[1:])
        assert {row["row_id"] for row in good["versions"] + careless["versions"]} == {each["original"]["row_id"]}
        assert good["why"] and (not good["kept"] or "taken" in good["why"])
        errors += [row["error"].split(":")[0] for row in careless["versions"] if row["error"]]
    assert {"refused", "unparsed", "parent"} <= set(errors)
    again = pilot.examples({"good": None}, 20, 0)
    assert again == []


def test_the_numbers_are_json_without_nan(written):
    folder, result, _ = written
    found = json.loads((folder / "pilot.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [each["name"] for each in found["teachers"]] == ["good", "careless", HOSTILE]
    assert found["teachers"][0]["kept"] == json.loads(json.dumps(result["teachers"][0]["kept"]))
    assert sorted(path.name for path in folder.iterdir()) == ["pilot.html", "pilot.json"]


def test_the_page_opens_without_complaint_and_shows_scripts_as_text(written, tmp_path):
    folder, *_ = written
    page = (folder / "pilot.html").read_text()
    assert "<script" not in page and "&lt;script&gt;window.bad" in page
    with chromium(tmp_path) as window:
        window.get((folder / "pilot.html").as_uri())
        assert window.get_log("browser") == []
        assert window.execute_script("return window.bad") is None
        assert window.execute_script("return performance.getEntriesByType('resource').length") == 0
        window.execute_script("document.querySelectorAll('details').forEach((each) => each.open = true)")
        text = window.find_element("css selector", "main").text
        assert HOSTILE in text and "refused 15" in text
        for width in (360, 1280):
            window.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
            )
            assert window.execute_script("return document.documentElement.scrollWidth") <= width


# ---- the recipe

RECIPE = ROOT / "recipes" / "pilot.py"


@pytest.fixture(scope="module")
def recipe():
    with pytest.MonkeyPatch.context() as patch:
        yield load_recipe(patch, "pilot")


@pytest.fixture
def run(recipe, student, tmp_path, monkeypatch, capsys):
    """`run(**changes)` runs the recipe with a configuration; returns pilot.json and what was printed."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in source_rows()))
    for each in student:
        each.save_pretrained(tmp_path / "student")

    def run(*arguments, **changes):
        settings = {
            "dataset": str(data),
            "output_dir": str(tmp_path / "run"),
            "rows": 24,
            "side_by_side": 3,
            "model_name_or_path": str(tmp_path / "student"),
            "max_length": 1024,
            "template": "vicuna",
            "use_cpu": True,
            "max_failure_rate": 0.9,
            **GATES,
            **PRICES,
        }
        path = tmp_path / "pilot.yaml"
        path.write_text(yaml.safe_dump(settings | changes))
        monkeypatch.setattr(sys, "argv", [str(RECIPE), "--config", str(path), *arguments])
        recipe.main()
        made = tmp_path / "run" / "pilot.json"
        return json.loads(made.read_text()) if made.exists() else None, capsys.readouterr().out

    return run


def test_a_second_run_asks_and_scores_nothing_and_one_teacher_down_costs_the_others_nothing(
    run, recipe, tmp_path, monkeypatch
):
    with Endpoint(answer, models=("good", "careless")) as endpoint:
        teachers = [{"model": "gone"}, {"model": "good", "name": "the good one"}, {"model": "careless", **PRICES}]
        first, said = run(base_url=endpoint.url, teachers=teachers, max_cost=1.0)
        asked = len(endpoint.requests)
    gone, good, careless = first["teachers"]
    assert "does not exist" in gone["failed"] and "gone stopped: The endpoint" in said
    assert good["answered"] == careless["answered"] == 24 and good["pilot"]["asked_now"] == 72
    assert (good["name"], good["model"]) == ("the good one", "good")
    assert first["data"]["rows"] == ROWS and good["full"]["rows"] == ROWS
    assert max(map(len, said.splitlines()[2:])) <= 300  # the reason is one long line
    tables = [line for line in said.splitlines() if line.startswith("|")]
    assert len(tables) == 2 + 3 + 2 + 6 and max(map(len, tables)) <= 100
    table = datasets.load_from_disk(tmp_path / "run" / "candidates")
    assert set(table["source"]) == {"", "gone", "the good one", "careless"}
    assert sum(row["variant"] == "original" for row in table) == 24  # scored once
    page = (tmp_path / "run" / "pilot.html").read_text()
    assert "gone stopped:" in page and "good-0125 (72 replies)" in page

    def scoring(*_, **__):
        raise AssertionError("scored again")

    monkeypatch.setattr(recipe, "StudentScorer", scoring)
    second, _ = run(base_url=endpoint.url, teachers=teachers[1:], max_cost=1.0)  # the endpoint is gone
    assert len(endpoint.requests) == asked
    for before, after in zip((good, careless), second["teachers"], strict=True):
        assert after["pilot"]["asked_now"] == 0 and after["pilot"]["requests_now"] == 0
        same = {"pilot": None}
        assert before | same == after | same


def test_a_selection_that_is_empty_is_said_and_not_a_crash(run, tmp_path):
    with Endpoint(answer, models=("good",)) as endpoint:
        found, said = run(base_url=endpoint.url, teachers=[{"model": "good"}], ifd_gate=0.001)
    kept = found["teachers"][0]["kept"]
    assert kept["share"] == 0 and kept["dropped_by_gates"] == kept["rows_without_gates"] > 0
    page = (tmp_path / "run" / "pilot.html").read_text()
    assert "Nothing was kept." in page and "this student needs other gates" in page
    assert "too few rows pass them" in page and "0 %" in said


def test_where_no_teacher_replies_there_is_a_page_and_an_error(run, tmp_path):
    from hf_reflect.errors import TeacherError

    with Endpoint(models=()) as endpoint, pytest.raises(TeacherError, match="No teacher replied at all"):
        run(base_url=endpoint.url, teachers=[{"model": "a"}, {"model": "b"}])
    assert "a stopped:" in (tmp_path / "run" / "pilot.html").read_text()


def test_an_estimate_asks_nothing(run):
    with Endpoint(answer, models=("good", "careless")) as endpoint:
        teachers = [{"model": "good"}, {"model": "careless"}]
        found, said = run("--estimate_only", "true", base_url=endpoint.url, teachers=teachers)
    assert found is None and endpoint.requests == []
    assert said.count("72 to ask, 0 in the ledger") == 2 and re.search(r"all teachers  0\.\d\d", said)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teachers": None}, "Name the teachers to be compared"),
        ({"teachers": {"model": "a"}}, "`teachers` is a list of mappings"),
        ({"teachers": [{"name": "a"}]}, "Teacher 1 of `teachers` has no `model`"),
        ({"teachers": [{"model": "a"}, {"model": "a"}]}, "Two teachers are called 'a'"),
        (
            {"teachers": [{"model": "a"}, {"model": "a", "name": "b", "base_url": "http://other/v1"}]},
            "the second would be given the first one's",
        ),
        ({"teachers": [{"model": "a", "base_ulr": "x"}]}, "Did you mean `base_url`"),
        ({"teachers": [{"model": "a", "max_cost": 1}]}, "`max_cost` holds for all teachers together"),
        (
            {"teachers": [{"model": "a", "price_per_million_input": None}], "max_cost": 1},
            "cannot be kept without prices",
        ),
        ({"teachers": [{"model": "a"}], "preselect_share": 0.05}, "`preselect_share` means nothing in a pilot"),
        ({"teachers": [{"model": "a"}], "rule": "longest"}, "`rule` means nothing in a pilot"),
        ({"teachers": [{"model": "a"}], "rows": 0}, "`rows` is a number of rows"),
        ({"teachers": [{"model": "a"}], "model_name_or_path": None}, "Name the student"),
    ],
)
def test_misuse_is_said_before_anything_is_asked(run, changes, words):
    with pytest.raises(SettingsError, match=re.escape(words)):
        run(**changes)


def test_a_launch_of_several_processes_is_refused(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="A pilot is for one process"):
        run(teachers=[{"model": "a"}])


def test_its_configuration_fits_and_teachers_may_come_from_the_command_line(recipe, monkeypatch):
    types = (recipe.PilotArguments, DataArguments, EndpointArguments, SelectionArguments)
    monkeypatch.setattr(sys, "argv", [str(RECIPE)])
    asked, data, endpoint, chosen_by = parse_arguments(types, str(RECIPE))
    assert asked.rows == 200 and chosen_by.ifd_gate == 1.0 and data.dataset
    for arguments in (data, chosen_by):
        recipe.refuse_what_means_nothing(arguments)
    assert len(recipe.teachers_of(asked.teachers, endpoint, ROOT / "none")) == 2
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "--teachers", "[{model: a, temperature: 0.5}]"])
    asked, _, endpoint, _ = parse_arguments(types, str(RECIPE))
    teacher = recipe.teachers_of(asked.teachers, endpoint, ROOT / "none")["a"]
    assert teacher.temperature == 0.5 and teacher.max_total_tokens == 3_000_000


def test_the_verdict_fits_100_columns_whatever_the_numbers(recipe, measured, pilot_run):
    every, tables, _ = pilot_run
    asked = every["good"]._replace(
        name="a-teacher-with-quite-a-long-name", teacher=Teacher("good", ledger=every["good"].teacher.ledger)
    )
    large = pilot.measure(asked, tables["good"], 123_456_789, **GATES, keep="reflected")
    said = recipe.verdict({"teachers": [large, measured["careless"]]})
    assert max(map(len, said.splitlines())) <= 100 and " tok " in said


@pytest.mark.slow
def test_the_demo_needs_no_key_and_asks_nothing(tmp_path):
    line = command("recipes/pilot.py", "--demo", "true", "--output_dir", tmp_path / "run", "--use_cpu", "true")
    pages = []
    for _ in range(2):
        done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads((tmp_path / "run" / "pilot.json").read_text())
        careful, careless = found["teachers"]
        assert (
            careful["pilot"]["asked_now"] == careless["pilot"]["asked_now"] == 0 and found["ledger"]["requests"] == 0
        )
        assert careful["usable_share"] > 0.9 > careless["usable_share"] > 0.4
        assert careful["full"]["cost"]["value"] > 0 and careful["full"]["hours"] is None
        assert "written-for-t…" in done.stdout and "mean nothing" in (
            page := (tmp_path / "run" / "pilot.html").read_text()
        )
        pages.append(page)
    assert pages[0] == pages[1]

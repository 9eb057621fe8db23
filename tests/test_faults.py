"""What goes wrong while a teacher is asked, and what must hold: paid once, never past a limit, the key nowhere."""

import json
import os
import pickle
import pty
import random
import re
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import termios
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest
from datasets import Dataset
from endpoint import Endpoint, rewriting

from hf_reflect import BudgetExceeded, ReflectionTransform, Teacher, to_pairs
from hf_reflect.errors import SettingsError, TeacherError
from hf_reflect.ledger import Ledger
from hf_reflect.teacher import live

# A real process that asks. It prints what `prefetch` did and, given "map", how many rows came out usable; given
# "chats" it starts sooner.
CHILD = """
    import json, sys
    from hf_reflect import Teacher

    url, ledger, count, settings, then = *sys.argv[1:3], int(sys.argv[3]), json.loads(sys.argv[4]), sys.argv[5]
    teacher = Teacher("teacher", base_url=url, ledger=ledger, **settings)
    if then == "chats":
        teacher([[{"role": "user", "content": f"[Instruction]\\nDescribe thing {n}."}] for n in range(count)])
        sys.exit()

    from datasets import Dataset, disable_progress_bars
    from hf_reflect import ReflectionTransform, to_pairs

    disable_progress_bars()
    rows = [{"instruction": f"Describe thing {n}.", "input": "", "output": f"It is {n}."} for n in range(count)]
    pairs = to_pairs(Dataset.from_list(rows))
    transform = ReflectionTransform(teacher, "response")
    print(json.dumps(transform.prefetch(pairs)), flush=True)
    if then == "map":
        table = pairs.map(transform, batched=True, load_from_cache_file=False)
        print(sum(error is None for error in table["error"]), flush=True)
"""


def child(endpoint, tmp_path, count, then="", stderr=subprocess.PIPE, ignoring=None, **settings):
    """Start a process that asks for `count` response reflections."""
    (tmp_path / "ask.py").write_text(textwrap.dedent(CHILD))
    command = [sys.executable, str(tmp_path / "ask.py"), endpoint.url, str(tmp_path / "ledger.sqlite"), str(count)]
    return subprocess.Popen(
        [*command, json.dumps(settings), then],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
        preexec_fn=(lambda: signal.signal(ignoring, signal.SIG_IGN)) if ignoring else None,
    )


def wait_for(condition, within=60.0):
    until = time.monotonic() + within
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.01)


def chats(count, words="Say something about"):
    return [[{"role": "user", "content": f"[Instruction]\n{words} {number}"}] for number in range(count)]


def make(endpoint, tmp_path, **settings):
    return Teacher("teacher", **{"base_url": endpoint.url, "ledger": str(tmp_path / "ledger.sqlite"), **settings})


def many(count):
    rows = [{"instruction": f"Describe thing {n}.", "input": "", "output": f"It is {n}."} for n in range(count)]
    return to_pairs(Dataset.from_list(rows))


def stored(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        return [(request, reply) for _, request, reply, *_ in ledger.rows()]


def spent(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        return ledger.spent()


def is_sound(tmp_path):
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        return database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


FAULTS = [
    {"status": 429, "body": {"error": {"message": "slow down"}}, "headers": {"Retry-After": "0.05"}},
    {"status": 500, "body": {"error": {"message": "oops"}}, "headers": {"retry-after-ms": "100"}},
    {"status": 503, "body": {}, "headers": {"retry-after-ms": "100"}},
    {"drop": True},
    {"raw": b'{"choices": [{"mess'},
    {"raw": b'{"choices": []}'},
]


# ---- everything comes through, once


def come_through(endpoint, tmp_path, count):
    chance = random.Random(1)
    endpoint.answer = lambda request: chance.choice(FAULTS) if chance.random() < 0.3 else rewriting(request)
    pairs = many(count)
    transform = ReflectionTransform(make(endpoint, tmp_path), "response")
    assert transform.prefetch(pairs)["asked"] == count
    asked = len(endpoint.requests)
    assert asked > 1.2 * count
    table = pairs.map(transform, batched=True, load_from_cache_file=False)
    assert set(table["error"]) == {None} and len(table) == 2 * count
    assert len(endpoint.requests) == asked
    assert set(endpoint.answered.values()) == {1} and len(endpoint.answered) == count


def test_all_rows_come_through_though_a_third_of_the_requests_fail(endpoint, tmp_path):
    come_through(endpoint, tmp_path, 100)


@pytest.mark.slow
def test_a_thousand_rows_come_through_though_a_third_of_the_requests_fail(endpoint, tmp_path):
    come_through(endpoint, tmp_path, 1000)


def kill_at_random_moments(endpoint, tmp_path, kills, rows, seed):
    chance, in_flight = random.Random(seed), 8
    endpoint.latency = 0.05
    for _ in range(kills):
        before = len(endpoint.requests)
        process = child(endpoint, tmp_path, rows, "chats", max_concurrency=in_flight)
        wait_for(lambda before=before: len(endpoint.requests) > before)
        time.sleep(chance.uniform(0.0, 0.4))
        assert process.poll() is None, process.stderr.read()
        process.kill()
        process.communicate()
        assert is_sound(tmp_path)
        wait_for(lambda: endpoint.in_flight == 0)
    _, err = child(endpoint, tmp_path, rows, "chats", max_concurrency=in_flight).communicate(timeout=120)
    assert len(stored(tmp_path)) == len(endpoint.answered) == rows, err
    assert sum(count - 1 for count in endpoint.answered.values()) <= kills * in_flight
    assert is_sound(tmp_path)


@pytest.mark.slow
def test_killed_again_and_again_every_row_comes_and_little_is_paid_twice(endpoint, tmp_path):
    kill_at_random_moments(endpoint, tmp_path, kills=5, rows=400, seed=2)


@pytest.mark.slow
def test_killed_twenty_times_every_row_comes_and_little_is_paid_twice(endpoint, tmp_path):
    kill_at_random_moments(endpoint, tmp_path, kills=20, rows=1200, seed=3)


# ---- Ctrl-C and SIGTERM


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["SIGINT", "SIGTERM"]
)
def test_interrupted_it_keeps_what_comes_back_in_a_moment_and_says_how_to_go_on(endpoint, tmp_path, number):
    endpoint.latency = 1.0
    process = child(endpoint, tmp_path, 40, max_concurrency=8)
    wait_for(lambda: len(endpoint.requests) >= 12)
    started = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - started < 6
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT), err
    assert f"{tmp_path}/ledger.sqlite: the same command goes on from there" in err
    assert ("KeyboardInterrupt" in err or "Interrupted" in err) == (number == signal.SIGINT)
    assert len(stored(tmp_path)) == len(endpoint.requests) < 40
    # nothing stays set aside
    assert spent(tmp_path) == {"requests": len(endpoint.requests), "tokens": sum(map(sum, endpoint.usage)), "cost": 0}
    endpoint.latency = 0.0
    out, err = child(endpoint, tmp_path, 40, "map").communicate(timeout=60)
    assert out.split()[-1] == "80" and len(endpoint.requests) == 40, err


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM], ids=["SIGINT", "SIGTERM"]
)
def test_interrupted_it_does_not_wait_for_an_endpoint_that_takes_a_minute(endpoint, tmp_path, number):
    def answer(request):
        if int(re.search(r"thing (\d+)", str(request)).group(1)) >= 4:
            time.sleep(60)
        return rewriting(request)

    endpoint.answer = answer
    process = child(endpoint, tmp_path, 20, "chats", max_concurrency=4)
    wait_for(lambda: len(endpoint.requests) >= 8)
    started = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - started < 6
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT), err
    assert "the same command goes on from there" in err
    answered = len(stored(tmp_path))
    assert answered == len(endpoint.usage)
    # what was cancelled in flight may still be billed: it stays set aside, nothing else does
    set_aside = spent(tmp_path)["tokens"] - sum(map(sum, endpoint.usage))
    assert 0 < set_aside <= (len(endpoint.requests) - answered) * (3000 + 2048)


def test_a_second_ctrl_c_stops_at_once(endpoint, tmp_path):
    endpoint.latency = 60.0
    process = child(endpoint, tmp_path, 20, "chats", max_concurrency=4)
    wait_for(lambda: len(endpoint.requests) >= 4)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - started < 3
    assert "the same command goes on from there" in err


def test_an_interrupt_that_was_ignored_before_stays_ignored(endpoint, tmp_path):
    endpoint.latency = 0.3
    process = child(endpoint, tmp_path, 16, "chats", ignoring=signal.SIGINT, max_concurrency=4)
    wait_for(lambda: len(endpoint.requests) >= 5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and len(stored(tmp_path)) == 16, err


# ---- nothing gets through


@contextmanager
def closing_at_once():
    """A host that takes connections and closes each without a word."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                server.accept()[0].close()
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def test_an_endpoint_through_which_nothing_gets_is_given_up_in_seconds_in_its_own_words(tmp_path):
    def given_up(url, words):
        started = time.monotonic()
        teacher = Teacher("teacher", base_url=url, ledger=str(tmp_path / f"{words[:6]}.sqlite"))
        with pytest.raises(TeacherError) as raised:
            teacher(chats(300))
        assert re.search(words, str(raised.value)) and url in str(raised.value)
        assert time.monotonic() - started < 15

    broken = {"status": 500, "body": {"error": {"message": "CUDA out of memory"}}}
    loading = {"status": 503, "body": {"error": "Model is loading", "error_type": "loading"}}
    with (
        Endpoint() as closed,
        Endpoint(lambda request: broken) as failing,
        Endpoint(lambda request: loading) as starting,
        Endpoint(lambda request: {"status": 500, "body": b"Internal Server Error"}) as wordless,
        closing_at_once() as deaf,
        ThreadPoolExecutor() as together,
    ):
        closed.server.server_close()
        cases = [
            (closed.url, "cannot be reached"),
            (failing.url, "500 CUDA out of memory"),
            (starting.url, "503 Model is loading"),  # TGI
            (wordless.url, "500 Internal Server Error"),  # `transformers serve` without a chat template
            (deaf, "Disconnected|[Rr]eset|clos"),
        ]
        for done in [together.submit(given_up, *case) for case in cases]:
            done.result()


def test_one_row_that_always_fails_does_not_stop_the_others(endpoint, tmp_path):
    broken = {"status": 500, "body": {"error": {"message": "boom"}}, "headers": {"retry-after-ms": "10"}}
    endpoint.answer = lambda request: broken if "thing 7." in str(request) else rewriting(request)
    pairs = many(60)
    transform = ReflectionTransform(make(endpoint, tmp_path), "response")
    transform.prefetch(pairs)
    asked = len(endpoint.requests)
    table = pairs.map(transform, batched=True, load_from_cache_file=False)
    assert [error for error in table["error"] if error] == ["teacher: 500 boom"]
    assert len(endpoint.requests) == asked == 59 + 9  # the map does not ask for it again


# ---- rate limits


def limited(endpoint, most, window):
    """An endpoint that takes `most` requests in each `window` seconds, and says what is left."""
    counts, began, refused = Counter(), time.monotonic(), []

    def answer(request):
        now = time.monotonic() - began
        with endpoint.lock:
            counts[int(now / window)] += 1
            left = most - counts[int(now / window)]
        time.sleep(0.1)  # longer than requests in flight arrive apart
        reset = f"{(window - now % window) * 1000:.0f}ms"
        headers = {
            "x-ratelimit-limit-requests": str(most),
            "x-ratelimit-remaining-requests": str(max(left, 0)),
            "x-ratelimit-reset-requests": reset,
        }
        if left >= 0:
            return {"text": "fine", "headers": headers}
        refused.append(now)
        words = {"error": {"message": "Rate limit reached.", "code": "rate_limit_exceeded"}}
        return {"status": 429, "body": words, "headers": headers | {"retry-after-ms": reset[:-2]}}

    endpoint.answer = answer
    return refused


@pytest.mark.slow  # the benchmark shows more
def test_an_unknown_limit_is_learned_from_the_headers(endpoint, tmp_path):
    refused = limited(endpoint, 20, 2.0)
    replies = make(endpoint, tmp_path, max_concurrency=16, max_retries=0)(chats(50))
    assert {reply.text for reply in replies} == {"fine"}
    assert len(refused) <= 0.2 * 50


@pytest.mark.slow  # the benchmark shows the same for 600 a minute
def test_a_limit_that_is_set_is_hardly_ever_passed(endpoint, tmp_path):
    refused = limited(endpoint, 20, 2.0)
    replies = make(endpoint, tmp_path, max_concurrency=16, requests_per_minute=600)(chats(45))
    assert {reply.text for reply in replies} == {"fine"}
    assert len(refused) <= 1


@pytest.mark.parametrize("form", ["seconds", "milliseconds", "date", "reset of a used-up limit"])
def test_an_endpoint_that_says_how_long_to_wait_is_not_asked_before(endpoint, tmp_path, form):
    moments = []

    def answer(request):
        moments.append(time.monotonic())
        if len(moments) > 1:
            return "fine"
        headers = {
            "seconds": {"Retry-After": "1.5"},
            "milliseconds": {"retry-after-ms": "1500"},
            "date": {"Retry-After": formatdate(time.time() + 2.5, usegmt=True)},  # whole seconds only
            "reset of a used-up limit": {
                "x-ratelimit-remaining-requests": "12",
                "x-ratelimit-reset-requests": "6m0s",
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-tokens": "1.5s",
            },
        }[form]
        return {"status": 429, "body": {"error": {"message": "slow down"}}, "headers": headers}

    endpoint.answer = answer
    assert {reply.text for reply in make(endpoint, tmp_path, max_concurrency=4)(chats(1))} == {"fine"}
    assert 1.4 < moments[1] - moments[0] < 4.0


# ---- time


def test_an_endpoint_that_drips_is_cut_off_at_the_timeout(endpoint, tmp_path):
    endpoint.answer = lambda request: {"text": "fine " * 50, "drip": 0.05}
    started = time.monotonic()
    (reply,) = make(endpoint, tmp_path, timeout=1.0, max_retries=0)(chats(1))
    assert reply.error == "teacher: no answer within 1 s"
    assert time.monotonic() - started < 4


def test_past_the_total_time_the_rest_is_left_for_another_call(endpoint, tmp_path):
    endpoint.latency = 0.3
    started = time.monotonic()
    replies = make(endpoint, tmp_path, total_timeout=1.5, max_concurrency=4)(chats(60))
    assert time.monotonic() - started < 4
    left = [reply for reply in replies if reply.error]
    assert 4 <= len(replies) - len(left) <= 20
    assert {reply.error for reply in left} == {"budget: total_timeout=1.5 s are over"}
    endpoint.latency = 0.0
    assert all(reply.error is None for reply in make(endpoint, tmp_path)(chats(60)))
    assert sum(count - 1 for count in endpoint.answered.values()) <= 4


def test_past_the_total_time_a_prefetched_table_is_whole_and_asks_the_rest_later(endpoint, tmp_path):
    endpoint.latency = 0.3
    pairs = many(60)
    transform = ReflectionTransform(make(endpoint, tmp_path, total_timeout=1.0, max_concurrency=4), "response")
    transform.prefetch(pairs)
    asked = len(endpoint.requests)
    table = pairs.map(transform, batched=True, load_from_cache_file=False)
    assert len(endpoint.requests) == asked and len(table) == 120
    assert {error.split(":")[0] for error in table["error"] if error} == {"budget"}
    endpoint.latency = 0.0
    later = ReflectionTransform(make(endpoint, tmp_path), "response")
    assert set(pairs.map(later, batched=True, load_from_cache_file=False)["error"]) == {None}


def test_past_the_total_time_no_row_whose_further_attempt_is_due_is_lost(endpoint, tmp_path):
    endpoint.answer, endpoint.latency = (lambda request: "nothing of use"), 0.05
    pairs = many(40)
    teacher = make(endpoint, tmp_path, total_timeout=1.0, max_concurrency=4)
    transform = ReflectionTransform(teacher, "response", retry_unusable=50)
    transform.prefetch(pairs)
    table = pairs.map(transform, batched=True, load_from_cache_file=False)
    assert len(table) == 80 and {error.split(":")[0] for error in table["error"][1::2]} == {"budget"}


# ---- limits


def test_past_a_limit_nobody_waits_for_a_turn(endpoint, tmp_path):
    teacher = make(endpoint, tmp_path, max_requests=2, requests_per_minute=60, total_timeout=15.0)
    errors = [reply.error for reply in teacher(chats(300))]
    assert errors.count(None) == 2 == len(endpoint.requests)
    assert {error for error in errors if error} == {"budget: spent 2 of max_requests=2; this request could pass it"}


def test_one_row_that_only_meets_429_fails_alone(endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "PATIENCE", 0.5)
    no = {"status": 429, "body": {"error": {"message": "too long for this tier"}}, "headers": {"retry-after-ms": "50"}}
    endpoint.answer = lambda request: no if "about 7" in str(request) else "fine"
    replies = make(endpoint, tmp_path, max_concurrency=2)(chats(30))
    assert {n: reply.error for n, reply in enumerate(replies) if reply.error} == {
        7: "teacher: 429 too long for this tier"
    }


# ---- several processes


def test_what_another_process_got_meanwhile_is_not_asked_again(endpoint, tmp_path):
    teacher, asked = make(endpoint, tmp_path, max_concurrency=1), chats(20)

    def answer(request):
        if len(endpoint.requests) == 1:
            endpoint.answer = lambda request: "fine"
            assert not any(reply.reused for reply in make(endpoint, tmp_path)(asked[5:]))
        return "fine"

    endpoint.answer = answer
    assert [reply.reused for reply in teacher(asked)] == [False] * 5 + [True] * 15
    assert len(endpoint.requests) == 20
    assert teacher.stats["asked"] == 5 and teacher.stats["reused"] == 15
    with Ledger(teacher.ledger) as ledger:
        assert ledger.spent()["requests"] == 20


def test_workers_of_map_may_replay_but_not_ask(endpoint, tmp_path):
    pairs = many(20)
    transform = ReflectionTransform(make(endpoint, tmp_path), "response")
    with pytest.raises(SettingsError, match=r"`transform.prefetch\(dataset\)`"):
        pairs.map(transform, batched=True, num_proc=2, load_from_cache_file=False)
    assert endpoint.requests == []
    transform.prefetch(pairs)
    table = pairs.map(transform, batched=True, num_proc=2, load_from_cache_file=False)
    assert set(table["error"]) == {None} and len(endpoint.requests) == 20
    assert table.to_list() == pairs.map(transform, batched=True, load_from_cache_file=False).to_list()


OPENING = """
    import multiprocessing, sys, time
    from hf_reflect.ledger import Ledger

    def use(path, start):
        time.sleep(max(start - time.time(), 0))
        with Ledger(path) as ledger:
            return ledger.reserve(1, 0.0)

    if __name__ == "__main__":
        with multiprocessing.Pool(4) as pool:
            for number in range(30):
                new = (f"{sys.argv[1]}/{number}.sqlite", time.time() + 0.02)
                assert pool.starmap(use, [new] * 4, chunksize=1) == [True] * 4
"""


def test_processes_that_start_together_may_share_a_new_ledger(tmp_path):
    (tmp_path / "opening.py").write_text(textwrap.dedent(OPENING))
    command = [sys.executable, str(tmp_path / "opening.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---- budgets


def run_within_a_budget(seed, folder, processes=1):
    """One random run; all is counted by the server, also what it worked at in vain."""
    chance = random.Random(seed)
    folder.mkdir()
    kind = chance.choice(["max_requests", "max_total_tokens", "max_cost"])
    most = chance.randint(20, 200)  # tokens of a reply
    prices = {"price_per_million_input": chance.uniform(0, 5), "price_per_million_output": chance.uniform(0.1, 20)}
    rate_of_faults = chance.choice([0.0, 0.0, 0.3])
    size = chance.randint(1, 60)
    count = chance.randint(5, 40)
    used, chance_of_server, lock = [], random.Random(seed + 1), threading.Lock()

    def answer(request):
        time.sleep(0.002)
        with lock:
            prompt = chance_of_server.randint(1, sum(len(m["content"].encode()) + 16 for m in request["messages"]))
            completion = chance_of_server.randint(1, most)
            fault = chance_of_server.random() < rate_of_faults
            which = chance_of_server.choice(
                [
                    {"drop": True},
                    {"raw": b"{broken"},
                    {"status": 502, "body": {}, "headers": {"retry-after-ms": "20"}},
                    *FAULTS[:3],
                ]
            )
            if not fault or which.get("status") not in (429, 500, 503):  # those did no work
                used.append((prompt, completion))
        return which if fault else {"text": rewriting(request), "usage": (prompt, completion)}

    with Endpoint(answer) as endpoint:
        worst = 3000 + 16 * 2 + most  # about what one request of these can take
        limit = {
            "max_requests": chance.randint(1, count + 5),
            "max_total_tokens": chance.randint(worst // 2, worst * count),
            "max_cost": chance.uniform(0.5, count) * worst * prices["price_per_million_output"] / 1e6,
        }[kind]
        settings = dict(prices, max_tokens=most, max_concurrency=chance.choice([1, 3, 16, 64]), max_retries=2)
        settings |= {kind: limit}
        if processes > 1:
            started = [child(endpoint, folder, count, "chats", **settings) for _ in range(processes)]
            for process in started:
                _, err = process.communicate(timeout=120)
                assert process.returncode == 0, err
        else:
            questions = chats(count, "word " * size)
            for _ in range(2):  # over a restart too
                codes = {(reply.error or "").split(":")[0] for reply in make(endpoint, folder, **settings)(questions)}
                assert codes <= {"", "budget", "teacher"}
        tokens = [sum(numbers) for numbers in zip(*used, strict=True)] or [0, 0]
        cost = sum(n * p for n, p in zip(tokens, prices.values(), strict=True)) / 1e6
        counted = {"max_requests": len(endpoint.requests), "max_total_tokens": sum(tokens), "max_cost": cost}
        assert counted[kind] <= limit * (1 + 1e-9), (seed, kind, counted, limit)
        booked = spent(folder)
        assert booked["requests"] == counted["max_requests"] and booked["tokens"] >= counted["max_total_tokens"]
        assert booked["cost"] >= cost * (1 - 1e-9)


def many_budgets(tmp_path, seeds, of_two_processes):
    with ThreadPoolExecutor(6) as together:
        runs = [together.submit(run_within_a_budget, seed, tmp_path / str(seed)) for seed in seeds]
        for run in runs:
            run.result()
    for seed in of_two_processes:
        run_within_a_budget(seed, tmp_path / f"two-{seed}", processes=2)


def test_budgets_are_never_passed_by_the_servers_own_count(tmp_path):
    many_budgets(tmp_path, range(30), range(1))


@pytest.mark.slow
def test_budgets_are_never_passed_in_many_random_runs(tmp_path):
    many_budgets(tmp_path, range(1000, 1200), range(1000, 1010))


# ---- the key

KEY = "sk-proj-9vQ2nowhereToBeFound7"
SECRETIVE = """
    import logging, os, pickle, sys, traceback
    from datasets import Dataset
    from datasets.fingerprint import Hasher
    logging.basicConfig(level=logging.DEBUG, filename="debug.log")
    from hf_reflect import ReflectionTransform, Teacher, to_pairs

    url, rows = sys.argv[1], [{"instruction": f"Describe {n}.", "output": "?"} for n in range(6)]
    pairs = to_pairs(Dataset.from_list(rows))
    for settings in ({"base_url": url}, {"base_url": url.replace("/v1", "/openai"), "api_version": "2024-10-21"}):
        name = "azure" if "api_version" in settings else "openai"
        for model in ("wrong key", "no model", "echoes", "teacher"):
            teacher = Teacher(model, ledger=f"{name}.sqlite", api_key_env="MY_KEY", max_retries=1, **settings)
            transform = ReflectionTransform(teacher, "response")
            try:
                print(transform.estimate(pairs), transform.prefetch(pairs))
                table = pairs.map(transform, batched=True, load_from_cache_file=False)
                table.save_to_disk(f"{name} {model}")
                print(table["error"])
            except Exception as error:
                print(repr(error))
                traceback.print_exc()  # with all that caused it
                logging.exception("it failed")
        with open(f"{name}.pickle", "wb") as file:
            pickle.dump((teacher, transform, Hasher.hash(transform)), file)
        print(teacher, transform, Hasher.hash(teacher), open("/proc/self/cmdline").read())
    teacher(chats := [[{"role": "user", "content": "still here"}]])
    Teacher("wrong key", base_url=url, ledger="last.sqlite", api_key_env="MY_KEY")(chats)  # dies of it
"""


def test_the_key_is_nowhere(endpoint, tmp_path):
    def answer(request):
        words = f"Incorrect API key provided: {KEY}. You sent 'Authorization: Bearer {KEY}'."
        if request["model"] == "wrong key":
            return {"status": 401, "body": {"error": {"message": words, "code": "invalid_api_key"}}}
        if request["model"] == "echoes":
            return chance.choice(
                [
                    {"status": 500, "body": words.encode()},
                    {"status": 400, "body": {"detail": [{"input": {"key": KEY}}]}},
                    {"raw": words.encode()},
                    {"raw": json.dumps({"error": words}).encode()},
                ]
            )
        time.sleep(0.2)
        return rewriting(request)

    chance = random.Random(0)
    endpoint.answer = answer
    endpoint.models = ("wrong key", "echoes", "teacher")
    folder = tmp_path / "run"
    folder.mkdir()
    environment = {"MY_KEY": KEY, "OPENAI_LOG": "debug", "HF_HOME": str(folder / "home"), "TMPDIR": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SECRETIVE), endpoint.url],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    lines, written = set(), set()

    def look():
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                lines.add(path.read_bytes())
            except OSError:
                pass
        for path in folder.rglob("*"):  # what is there only for a while: write-ahead logs, temporary files
            try:
                if path.is_file() and KEY.encode() in path.read_bytes():
                    written.add(str(path))
            except OSError:
                pass

    with ThreadPoolExecutor() as together:
        output = together.submit(process.communicate, None, 120)
        while not output.done():
            look()
            time.sleep(0.2)
        look()
    out, err = output.result()
    assert process.returncode == 1 and b"TeacherError" in err, err.decode()
    assert KEY in endpoint.keys and any(headers.get("api-key") == KEY for headers in endpoint.headers)
    assert (folder / "openai teacher").is_dir() and (folder / "azure teacher").is_dir()
    assert (folder / "debug.log").stat().st_size > 1000 and b"***" in out
    where = [name for name, text in (("stdout", out), ("stderr", err)) if KEY.encode() in text]
    assert where + sorted(written) == []
    assert not any(KEY.encode() in line for line in lines)


def test_a_key_that_no_header_can_hold_is_said_at_once_and_not_shown(endpoint, tmp_path, monkeypatch):
    endpoint.answer = lambda request: "fine"
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")  # as read from a file
    assert make(endpoint, tmp_path)(chats(1))[0].text == "fine" and endpoint.keys == {KEY}
    monkeypatch.setenv("OPENAI_API_KEY", "“" + KEY + "”")  # as copied from a text
    with pytest.raises(TeacherError, match="OPENAI_API_KEY") as raised:
        make(endpoint, tmp_path)(chats(5))
    assert KEY not in str(raised.value)


# ---- replies that cannot be used

USELESS = "What a nice instruction!"


def usable_from(attempt):
    """Useless before this attempt (0 is the first), each in words of its own."""
    return lambda request: (
        rewriting(request) if request.get("seed", 0) >= attempt else f"{USELESS} {request.get('seed')}"
    )


def reflect(pairs, teacher, prefetching, **options):
    transform = ReflectionTransform(teacher, "response", **options)
    if prefetching:
        transform.prefetch(pairs)
    return pairs.map(transform, batched=True, load_from_cache_file=False)


prefetched = pytest.mark.parametrize("prefetching", [False, True], ids=["map", "prefetch"])


@prefetched
def test_an_unusable_reply_is_asked_for_again_warmer_and_the_first_usable_one_is_kept(
    endpoint, tmp_path, pairs, prefetching
):
    endpoint.answer = usable_from(2)
    table = reflect(pairs, make(endpoint, tmp_path), prefetching, retry_unusable=3)
    assert set(table["error"]) == {None}
    assert Counter((request["temperature"], request.get("seed")) for request in endpoint.requests) == {
        (0.0, None): 8, (0.7, 1): 8, (0.7, 2): 8,
    }  # fmt: skip
    assert {(request["temperature"], request.get("seed")) for request, _ in stored(tmp_path)} == {
        (0.0, None), (0.7, 1), (0.7, 2),
    }  # fmt: skip
    again = reflect(pairs, make(endpoint, tmp_path), prefetching, retry_unusable=3)
    assert again.to_list() == table.to_list() and len(endpoint.requests) == 24
    more = reflect(pairs, make(endpoint, tmp_path), prefetching, retry_unusable=5)
    assert more.to_list() == table.to_list() and len(endpoint.requests) == 24


@prefetched
def test_where_no_attempt_is_usable_the_first_replys_error_stays(endpoint, tmp_path, pairs, prefetching):
    endpoint.answer = usable_from(99)
    table = reflect(pairs, make(endpoint, tmp_path), prefetching, retry_unusable=2)
    assert len(endpoint.requests) == 24
    assert all(error.startswith("unparsed: ") and f"{USELESS} None" in error for error in table["error"][1::2])
    assert reflect(pairs, make(endpoint, tmp_path), prefetching, retry_unusable=2).to_list() == table.to_list()
    assert len(endpoint.requests) == 24


@prefetched
def test_a_further_attempt_that_could_not_be_made_is_made_up_by_another_run(endpoint, tmp_path, pairs, prefetching):
    no_seeds = {"status": 400, "body": {"error": {"message": "no seeds"}}}
    endpoint.answer = lambda request: no_seeds if "seed" in request and len(endpoint.requests) > 13 else USELESS
    few = make(endpoint, tmp_path, max_requests=13, max_concurrency=1)
    table = reflect(pairs, few, prefetching, retry_unusable=2)
    # rows are finished one after the other: four took three requests each, the fifth one
    codes = [error.split(":")[0] for error in table["error"][1::2]]
    assert codes == ["unparsed"] * 4 + ["budget"] * 4 and len(endpoint.requests) == 13
    table = reflect(pairs, make(endpoint, tmp_path), prefetching, retry_unusable=2)
    assert table["error"][1::2] == [*table["error"][1:9:2], *["teacher: 400 no seeds"] * 4]
    endpoint.answer = lambda request: USELESS
    table = reflect(pairs, make(endpoint, tmp_path), prefetching, retry_unusable=2)
    assert {error.split(":")[0] for error in table["error"][1::2]} == {"unparsed"}
    made = [request.get("seed", 0) for request in endpoint.requests]
    assert Counter(made) == {0: 8, 1: 8 + 4, 2: 8}  # four of the first further attempts were refused


def not_for_rain(parent, rewrite):
    assert set(parent) >= {"row_id", "variant", "source", "instruction", "input", "response", "history"}
    assert set(rewrite) >= {"variant", "source", "instruction", "input", "response", "critique"}
    assert rewrite["variant"] == "response" and rewrite["critique"] and rewrite["source"] == "teacher"
    return f"too long by {len(rewrite['response'])}" if "rain" in parent["instruction"] else None


@prefetched
def test_ones_own_check_refuses_a_rewrite_and_says_why(endpoint, tmp_path, pairs, prefetching):
    table = reflect(pairs, make(endpoint, tmp_path), prefetching, accept=not_for_rain)
    refused = [row for row in table if row["error"]]
    assert len(refused) == 1 and re.fullmatch(r"check: too long by \d+", refused[0]["error"])
    assert refused[0]["response"] is None and refused[0]["critique"] == "The answer lacks detail."
    assert len(endpoint.requests) == 8


@prefetched
def test_what_ones_own_check_refuses_is_asked_for_again(endpoint, tmp_path, pairs, prefetching):
    reflect(pairs, make(endpoint, tmp_path), prefetching, accept=not_for_rain, retry_unusable=1)
    assert len(endpoint.requests) == 9 and sum("seed" in request for request in endpoint.requests) == 1


def raising(parent, rewrite):
    raise ZeroDivisionError("a mistake of one's own")


@prefetched
def test_a_check_that_raises_loses_nothing_that_was_paid(endpoint, tmp_path, pairs, prefetching):
    with pytest.raises(ZeroDivisionError, match="of one's own"):
        reflect(pairs, make(endpoint, tmp_path, max_concurrency=4), prefetching, accept=raising)
    asked = len(endpoint.requests)
    assert len(stored(tmp_path)) == asked > 0
    assert set(reflect(pairs, make(endpoint, tmp_path), prefetching)["error"]) == {None}
    assert len(endpoint.requests) == 8


@prefetched
def test_past_the_failure_rate_it_stops_with_the_commonest_reasons_and_examples(endpoint, tmp_path, prefetching):
    def answer(request):
        number = int(re.search(r"thing (\d+)", str(request)).group(1))
        if number % 4 == 0:
            return "I'm sorry, but I can't help with that."
        return {"text": "[Better Answer] cut", "finish_reason": "length"} if number % 8 == 1 else rewriting(request)

    endpoint.answer = answer
    with pytest.raises(TeacherError, match="replies to the response reflection are unusable") as raised:
        reflect(many(400), make(endpoint, tmp_path), prefetching)
    words = str(raised.value)
    assert re.search(r"\d+ refused, \d+ truncated", words) and "max_failure_rate=0.2" in words
    assert "refused: I'm sorry" in words and "truncated: the reply was cut off" in words
    assert len(stored(tmp_path)) == len(endpoint.requests)
    if prefetching:
        assert len(endpoint.requests) < 200
    assert len(reflect(many(400), make(endpoint, tmp_path, max_failure_rate=0.5), prefetching)) == 800
    assert set(endpoint.answered.values()) == {1}


def test_with_raise_a_used_up_budget_says_what_was_spent_and_keeps_all(endpoint, tmp_path):
    pairs = many(20)
    with pytest.raises(BudgetExceeded, match="spent 7 of max_requests=7"):
        reflect(pairs, make(endpoint, tmp_path, max_requests=7, on_budget="raise"), True)
    assert len(stored(tmp_path)) == 7
    assert set(reflect(pairs, make(endpoint, tmp_path, max_requests=20, on_budget="raise"), True)["error"]) == {None}
    assert len(endpoint.requests) == 20


def test_a_teacher_and_its_transform_survive_a_pickle_with_their_settings(endpoint, tmp_path):
    teacher = make(endpoint, tmp_path, extra_body={"top_k": 3}, max_requests=9)
    teacher(chats(1))
    again = pickle.loads(pickle.dumps(teacher))
    assert again == teacher and again.stats["asked"] == 0 and len(again(chats(1))) == 1
    assert len(endpoint.requests) == 1


# ---- progress


def test_without_a_terminal_a_short_run_says_nothing(endpoint, tmp_path):
    endpoint.latency = 0.5
    _, err = child(endpoint, tmp_path, 16, max_concurrency=4).communicate(timeout=60)
    assert err == ""


def on_a_terminal(endpoint, tmp_path, count, width, **settings):
    """What a process writes to its terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, width))
    process = child(endpoint, tmp_path, count, stderr=theirs, **settings)
    os.close(theirs)
    seen = b""
    while process.poll() is None or select.select([ours], [], [], 0.2)[0]:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
    process.wait(timeout=30)
    os.close(ours)
    return seen.decode()


def test_on_a_terminal_one_bar_shows_how_far_it_is_and_what_it_costs(endpoint, tmp_path):
    endpoint.latency = 0.2
    endpoint.answer = lambda request: USELESS if "thing 3." in str(request) else rewriting(request)
    ReflectionTransform(make(endpoint, tmp_path), "response").prefetch(many(4))
    seen = on_a_terminal(
        endpoint, tmp_path, 24, 240, max_concurrency=4, price_per_million_input=100.0, price_per_million_output=200.0,
        max_cost=50.0, max_total_tokens=1_000_000, max_requests=500,
    )  # fmt: skip
    assert seen.count("\n") == 1  # one bar, which stays
    last = seen.rstrip().split("\r")[-1]
    assert "24/24" in last and "4 reused" in last and "1 unusable" in last
    assert re.search(r"\d+\.\d req/s \(24 of 500\)", last)
    assert re.search(r"[\d.]+k? of 1.00M tokens", last)
    assert re.search(r"cost \d+\.\d\d of 50", last)


def test_a_limit_is_said_once_and_what_is_not_asked_is_not_called_unusable(endpoint, tmp_path):
    seen = on_a_terminal(endpoint, tmp_path, 24, 240, max_concurrency=4, max_requests=10)
    assert seen.count("is reached: spent 10 of max_requests=10. What could pass it is not asked;") == 1
    last = seen.rstrip().split("\r")[-1]
    assert "10/24" in last and "14 not asked, 0 unusable, 0 reused" in last


def test_eighty_columns_are_enough_for_what_matters_most(endpoint, tmp_path):
    endpoint.latency = 0.2
    prices = {"price_per_million_input": 100.0, "price_per_million_output": 200.0, "max_cost": 50.0}
    last = on_a_terminal(endpoint, tmp_path, 24, 80, max_concurrency=4, **prices).rstrip().split("\r")[-1]
    assert re.match(r"Asking 24/24, 00:00 left, cost \d\.\d\d of 50, 0 unusable, 0 reused, \d+\.\d req/s, ", last)


# ---- what several share


def test_two_processes_that_start_the_same_share_the_work(tmp_path):
    with Endpoint(lambda request: "fine", latency=0.1) as endpoint:
        runs = [child(endpoint, tmp_path, 200, "chats", max_concurrency=16) for _ in range(2)]
        for run in runs:
            _, stderr = run.communicate(timeout=60)
            assert run.returncode == 0, stderr
        assert len(endpoint.answered) == 200 and set(endpoint.answered.values()) == {1}
    assert len(stored(tmp_path)) == 200 and spent(tmp_path)["requests"] == 200


def test_what_a_killed_process_was_asking_is_asked_by_another(tmp_path):
    """Last, once its claim has run out."""
    with Endpoint(lambda request: "fine") as endpoint:
        teacher = make(endpoint, tmp_path)
        with Ledger(teacher.ledger) as ledger:
            assert ledger.claim(teacher.key(chats(1)[0]), "somebody who was killed", 4.0)
            assert not ledger.claim(teacher.key(chats(1)[0]), "another", 4.0)
        assert [reply.text for reply in teacher(chats(3))] == ["fine"] * 3
        assert endpoint.requests[2]["messages"] == chats(1)[0] and len(endpoint.requests) == 3
    with sqlite3.connect(teacher.ledger) as database:
        assert database.execute("SELECT count(*) FROM claims").fetchone() == (0,)


@pytest.mark.slow
def test_a_slow_request_stays_the_one_who_sent_it(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "_CLAIM", 2.0)
    with Endpoint(lambda request: "fine", latency=5.0) as endpoint, ThreadPoolExecutor(2) as pool:
        teachers = [make(endpoint, tmp_path) for _ in range(2)]
        replies = list(pool.map(lambda teacher: teacher(chats(1))[0].text, teachers))
        assert replies == ["fine", "fine"] and len(endpoint.requests) == 1


@contextmanager
def locked(path, seconds):
    """Another connection writes to the ledger for so long."""
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(seconds, database.execute, ["COMMIT"])
    timer.start()
    yield
    timer.join()
    database.close()


def test_replies_wait_for_another_process_that_writes(tmp_path):
    with Endpoint(lambda request: "fine", latency=0.5) as endpoint, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(make(endpoint, tmp_path), chats(20))
        wait_for(lambda: endpoint.in_flight)
        with locked(tmp_path / "ledger.sqlite", 2.0):
            assert [reply.text for reply in asking.result()] == ["fine"] * 20
        assert set(endpoint.answered.values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_asking_while_another_process_writes(tmp_path, number):
    with Endpoint(lambda request: "fine", latency=0.2) as endpoint:
        run = child(endpoint, tmp_path, 500, "chats", max_concurrency=4)
        wait_for(lambda: len(endpoint.answered) >= 8)
        with locked(tmp_path / "ledger.sqlite", 12.0):
            time.sleep(0.5)
            started = time.monotonic()
            run.send_signal(number)
            run.communicate(timeout=30)
            assert time.monotonic() - started < 9  # 4 seconds for what is in flight; the lock lasts longer


def test_a_closed_gate_does_not_use_up_the_budget(tmp_path):
    answers = [{"text": "fine", "usage": (5, 2)}] * 2 + [
        {"status": 429, "body": {"error": {"message": "slow down"}}, "headers": {"Retry-After": "1"}}
    ]

    def answer(request):
        return answers.pop(0) if answers else {"text": "fine", "usage": (5, 2)}

    with Endpoint(answer, latency=0.05) as endpoint:
        settings = {"max_tokens": 2000, "max_total_tokens": 3500, "max_concurrency": 16}
        replies = make(endpoint, tmp_path, **settings)(chats(40))
    assert [reply.error for reply in replies] == [None] * 40


def test_stopping_does_not_wait_for_the_rate_limit(tmp_path):
    """A wrong key is found out while others stand at a closed gate."""
    count = 0

    def answer(request):
        nonlocal count
        count += 1
        if count == 1:
            time.sleep(3)
            return {"status": 401, "body": {"error": {"message": "bad key"}}}
        return {"status": 429, "body": {"error": {"message": "slow down"}}, "headers": {"Retry-After": "60"}}

    with Endpoint(answer) as endpoint:
        started = time.monotonic()
        settings = {"requests_per_minute": 120, "max_concurrency": 32}
        with pytest.raises(TeacherError, match="bad key"):
            make(endpoint, tmp_path, **settings)(chats(100))
        assert time.monotonic() - started < 12  # at 120 a minute, 32 who queue take 16 s


def test_a_limit_on_tokens_lets_one_request_after_the_other(tmp_path):
    """Not all at once after a long silence."""
    arrived = []

    def answer(request):
        arrived.append(time.monotonic())
        return "fine"

    with Endpoint(answer) as endpoint:
        settings = {"max_tokens": 1000, "tokens_per_minute": 120_000, "max_concurrency": 8}
        started = time.monotonic()
        make(endpoint, tmp_path, **settings)(chats(8))
    # each takes half a second; all together would come at the end of four
    assert arrived[0] - started < 0.6 * (arrived[-1] - started), arrived


def test_an_answer_that_is_no_completion_is_shown(tmp_path):
    page = b"<!doctype html><title>Sign in</title>"
    with Endpoint(lambda request: {"raw": page}) as endpoint:
        teacher = make(endpoint, tmp_path, max_retries=0)
        (reply,) = teacher(chats(1))
    assert "Sign in" in reply.error

"""`Teacher(mode="batch")` against a stand-in for the batch API."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from batch_endpoint import BatchEndpoint, Drop, Status
from conftest import ROWS
from datasets import Dataset
from endpoint import Endpoint, rewriting

from hf_reflect import BudgetExceeded, ReflectionTransform, Teacher, to_pairs
from hf_reflect.errors import SettingsError, TeacherError
from hf_reflect.ledger import Ledger
from hf_reflect.ledger.__main__ import main as ledger_command
from hf_reflect.teacher import batch

NOTHING_SPENT = {"requests": 0, "tokens": 0, "cost": 0.0}
CLIENT = """
import json, sys
from hf_reflect.teacher import Teacher, batch
batch.POLL_FIRST = batch.POLL_LATER = float(sys.argv[2])
batch._AT_ONCE = 10
chats = [[{"role": "user", "content": f"[Instruction]\\nSay something about {n}"}] for n in range(int(sys.argv[3]))]
try:
    replies = Teacher("teacher", mode="batch", **json.loads(sys.argv[1]))(chats)
except KeyboardInterrupt:
    sys.exit(130)
print(json.dumps([reply.text or reply.error for reply in replies]))
"""


@pytest.fixture(autouse=True)
def looking_often(monkeypatch):
    monkeypatch.setattr(batch, "POLL_FIRST", 0.01)
    monkeypatch.setattr(batch, "POLL_LATER", 0.02)


@pytest.fixture
def endpoint():
    with BatchEndpoint(answer=about) as server:
        yield server


def about(body):
    return f"fine: {body['messages'][-1]['content'].split()[-1]}"


def chats(count):
    return [[{"role": "user", "content": f"[Instruction]\nSay something about {number}"}] for number in range(count)]


def texts(count):
    return [f"fine: {number}" for number in range(count)]


def make(endpoint, tmp_path, **settings):
    defaults = {"base_url": endpoint.url, "ledger": str(tmp_path / "ledger.sqlite"), "mode": "batch"}
    return Teacher("teacher", **{**defaults, **settings})


def ledger_of(tmp_path):
    return Ledger(tmp_path / "ledger.sqlite")


def spent(tmp_path):
    with ledger_of(tmp_path) as ledger:
        return ledger.spent()


def start(endpoint, tmp_path, count, poll=0.05, **settings):
    settings = {"base_url": endpoint.url, "ledger": str(tmp_path / "ledger.sqlite"), **settings}
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, json.dumps(settings), str(poll), str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answers_always(endpoint, *answer):
    def do_POST(handler):
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send(*answer)

    endpoint.server.RequestHandlerClass.do_POST = do_POST


def wait_until(true, within=30.0):
    until = time.monotonic() + within
    while not true():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)


# ---- what comes back


def test_one_job_brings_all_replies_in_order_and_a_rerun_asks_nothing(endpoint, tmp_path, capfd):
    teacher = make(endpoint, tmp_path)
    replies = teacher(chats(40) + chats(10))
    assert [reply.text for reply in replies] == texts(40) + texts(10)
    assert replies[0].model == "teacher-0125" and replies[0].finish_reason == "stop"
    assert len(endpoint.jobs) == 1 and len(endpoint.submitted) == 40
    assert "Submitted batch_000000 with 40 requests." in capfd.readouterr().err
    with ledger_of(tmp_path) as ledger:
        rows = list(ledger.rows())
        assert ledger.jobs() == [] and ledger.jobs(open_only=False)[0].state == "completed"
        used = sum(reply["prompt_tokens"] + reply["completion_tokens"] for _, _, reply, *_ in rows)
        assert ledger.spent() == {"requests": 40, "tokens": used, "cost": 0.0}
    for _, request, reply, where, _ in rows:
        assert request["temperature"] == 0.0 and request["max_tokens"] == 2048 and where == endpoint.url
        assert reply["batch"] == "batch_000000" and reply["finish_reason"] == "stop"
    assert all(body["max_completion_tokens"] == 2048 and "max_tokens" not in body for body in endpoint.bodies)
    assert all(reply.reused for reply in make(endpoint, tmp_path)(chats(40)))
    assert len(endpoint.jobs) == 1 and endpoint.calls["list"] == 0
    assert teacher.stats["asked"] == 40 and teacher.stats["reused"] == 10


def test_prefetch_is_one_job_and_map_after_it_asks_nothing(endpoint, tmp_path):
    endpoint.answer = rewriting
    pairs = to_pairs(Dataset.from_list(ROWS))
    transform = ReflectionTransform(make(endpoint, tmp_path), "response")
    assert transform.prefetch(pairs)["asked"] == len(ROWS)
    calls = endpoint.calls.copy()
    table = pairs.map(transform, batched=True, batch_size=3, load_from_cache_file=False)
    assert len(table) == 2 * len(ROWS) and table["error"] == [None] * len(table)
    assert len(endpoint.jobs) == 1 and endpoint.calls == calls


def test_map_after_a_prefetch_with_failures_asks_nothing(endpoint, tmp_path):
    boom = {"status": 400, "body": {"error": {"message": "too rude"}}}
    endpoint.answer = lambda body: boom if "breakfast" in body["messages"][-1]["content"] else rewriting(body)
    pairs = to_pairs(Dataset.from_list(ROWS))
    transform = ReflectionTransform(make(endpoint, tmp_path), "response")
    assert transform.prefetch(pairs)["failed"] == 1
    table = pairs.map(transform, batched=True, load_from_cache_file=False)
    assert [error for error in table["error"] if error] == ["teacher: 400 too rude"]
    assert len(endpoint.jobs) == 1


def test_live_and_batch_replies_stand_for_each_other(endpoint, tmp_path):
    assert [reply.text for reply in make(endpoint, tmp_path, mode="live")(chats(5))] == texts(5)
    assert [reply.reused for reply in make(endpoint, tmp_path)(chats(8))] == [True] * 5 + [False] * 3
    assert all(reply.reused for reply in make(endpoint, tmp_path, mode="live")(chats(8)))
    assert len(endpoint.live) == 5 and len(endpoint.submitted) == 3


@pytest.mark.parametrize(("limit", "jobs"), [({"MAX_REQUESTS": 10}, 3), ({"MAX_BYTES": 3000}, 25 // 10 + 1)])
def test_requests_are_split_at_the_limits_of_one_file(endpoint, tmp_path, monkeypatch, limit, jobs):
    for name, value in limit.items():
        monkeypatch.setattr(batch, name, value)
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(25))] == texts(25)
    files = [file for file in endpoint.files.values() if file["purpose"] == "batch"]
    assert len(endpoint.jobs) == jobs == len(files)
    assert all(len(file["data"].splitlines()) <= 10 and file["bytes"] <= 3100 for file in files)


def test_texts_with_line_separators_and_other_scripts_come_back_whole(endpoint, tmp_path):
    said = "first\u2028second\u0085third\x0b\r\n日本語 🎉"
    endpoint.answer = lambda body: body["messages"][-1]["content"]
    assert [reply.text for reply in make(endpoint, tmp_path)([[{"role": "user", "content": said}]])] == [said]


def test_an_unreadable_line_of_a_result_costs_only_its_row(endpoint, tmp_path):
    def spoil(what, handler):
        name = handler.path.split("/")[-2]
        if what == "content":
            lines = endpoint.files[name]["data"].splitlines(keepends=True)
            endpoint.files[name]["data"] = b"".join([lines[0][:20] + b"\n", b"\n", b"7\n", *lines[1:]])

    endpoint.hook = spoil
    replies = make(endpoint, tmp_path)(chats(10))
    assert sum(reply.error is None for reply in replies) == 9
    endpoint.hook = lambda what, handler: None
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(10))] == texts(10)


def test_it_works_where_an_event_loop_runs(endpoint, tmp_path):
    async def notebook():
        return make(endpoint, tmp_path)(chats(3))

    assert [reply.text for reply in asyncio.run(notebook())] == texts(3)


def test_unusable_replies_are_asked_for_again_in_a_second_job(endpoint, tmp_path):
    endpoint.answer = lambda body: rewriting(body) if "seed" in body else "no tags at all"
    pairs = to_pairs(Dataset.from_list(ROWS))
    transform = ReflectionTransform(make(endpoint, tmp_path), "response", retry_unusable=1)
    transform.prefetch(pairs)
    table = pairs.map(transform, batched=True, load_from_cache_file=False)
    assert table["error"] == [None] * len(table)
    assert [len(endpoint.rows(job)) for job in endpoint.jobs.values()] == [len(ROWS)] * 2
    assert {body.get("temperature") for body in endpoint.bodies} == {0.0, 0.7}


# ---- what fails


def test_rows_that_fail_say_why_are_given_back_and_are_asked_again(endpoint, tmp_path):
    boom = {"status": 500, "body": {"error": {"message": "boom"}}}
    endpoint.answer = lambda body: boom if about(body) in ("fine: 3", "fine: 7") else about(body)
    replies = make(endpoint, tmp_path, max_total_tokens=10**6)(chats(10))
    assert [reply.error for reply in replies] == [None] * 3 + ["teacher: 500 boom"] + [None] * 3 + [
        "teacher: 500 boom"
    ] + [None] * 2
    assert spent(tmp_path)["tokens"] == sum(reply.prompt_tokens + reply.completion_tokens for reply in replies)
    endpoint.answer = about
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(10))] == texts(10)
    assert len(endpoint.submitted) == 12


def test_a_job_in_which_every_row_fails_has_no_output_file(endpoint, tmp_path):
    endpoint.answer = lambda body: {"status": 400, "body": {"error": {"message": "no", "code": "content_filter"}}}
    replies = make(endpoint, tmp_path)(chats(3))
    assert {reply.error for reply in replies} == {"refused: the endpoint's filter withheld the reply: no"}


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_of_an_unfinished_job_what_it_finished_is_taken_and_the_rest_submitted_by_the_next_run(
    endpoint, tmp_path, status
):
    endpoint.outcome = lambda job: status
    replies = make(endpoint, tmp_path, max_requests=100)(chats(20))
    failed = [reply.error for reply in replies if reply.error]
    assert failed == [f"teacher: the batch job ended ({status}) before this request"] * 10
    assert spent(tmp_path)["requests"] == 10
    assert spent(tmp_path)["tokens"] == sum(reply.prompt_tokens + reply.completion_tokens for reply in replies)
    endpoint.outcome = lambda job: "completed"
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(20))] == texts(20)
    assert len(endpoint.submitted) == 30


def test_a_queue_without_room_is_given_smaller_jobs_one_after_the_other(endpoint, tmp_path):
    endpoint.room = 7
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(20))] == texts(20)
    assert len(endpoint.submitted) == 20 and len(set(endpoint.submitted)) == 20
    assert [job["status"] for job in endpoint.jobs.values()] == ["failed"] * 2 + ["completed"] * 4


def test_a_queue_with_room_for_one_job_is_given_the_same_size_one_after_the_other(endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "MAX_REQUESTS", 5)
    endpoint.room, endpoint.looks = 6, 5
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(20))] == texts(20)
    done = [len(endpoint.rows(job)) for job in endpoint.jobs.values() if job["status"] == "completed"]
    assert done == [5] * 4 and len(endpoint.submitted) == 20


def test_a_queue_without_room_for_one_request_is_an_error(endpoint, tmp_path):
    endpoint.room = 0
    with pytest.raises(TeacherError, match="Enqueued token limit reached"):
        make(endpoint, tmp_path)(chats(4))
    assert spent(tmp_path) == NOTHING_SPENT


def test_a_job_that_fails_validation_says_why_and_leaves_nothing_reserved(endpoint, tmp_path):
    endpoint.models = ("another",)
    prices = {"price_per_million_input": 1.0, "price_per_million_output": 3.0}
    with pytest.raises(TeacherError, match=r"'teacher' is not supported by the Batch API.*line 1.*model_not_found"):
        make(endpoint, tmp_path, max_cost=1.0, **prices)(chats(4))
    assert spent(tmp_path)["requests"] == spent(tmp_path)["tokens"] == 0
    assert spent(tmp_path)["cost"] == pytest.approx(0, abs=1e-12)
    endpoint.models = ("teacher",)
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(4))] == texts(4)


def test_a_model_that_refuses_sampling_settings_is_asked_without_and_the_ledger_says_so(endpoint, tmp_path):
    def answer(body):
        for name in ("temperature", "top_p"):
            if name in body:
                error = {"message": f"Unsupported value: '{name}'.", "param": name, "code": "unsupported_value"}
                return {"status": 400, "body": {"error": error}}
        return about(body)

    endpoint.answer = answer
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(6))] == texts(6)
    assert [len(endpoint.rows(job)) for job in endpoint.jobs.values()] == [6, 6, 6]
    with ledger_of(tmp_path) as ledger:
        for _, request, reply, *_ in ledger.rows():
            assert request["temperature"] == 0.0 and reply["left_out"] == ["temperature", "top_p"]


def test_a_wrong_key_is_said_at_once_without_it_and_nothing_stays_reserved(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-wrong")
    endpoint.key = "sk-right"
    with pytest.raises(TeacherError, match="takes no batch job.*401 Incorrect API key") as raised:
        make(endpoint, tmp_path, api_key_env="MY_KEY")(chats(3))
    assert "sk-very-wrong" not in str(raised.value) and "MY_KEY" in str(raised.value)
    assert spent(tmp_path) == NOTHING_SPENT
    monkeypatch.setenv("MY_KEY", "sk-right")
    assert [reply.text for reply in make(endpoint, tmp_path, api_key_env="MY_KEY")(chats(3))] == texts(3)
    assert all(b"sk-right" not in path.read_bytes() for path in tmp_path.iterdir())


def test_an_endpoint_without_a_batch_api_is_told_apart(tmp_path):
    with Endpoint() as endpoint:
        answers_always(endpoint, 404, {"detail": "Not Found"})
        with pytest.raises(TeacherError, match='404 Not Found\n.*mode="live" needs none'):
            make(endpoint, tmp_path)(chats(3))
    assert spent(tmp_path) == NOTHING_SPENT


def test_an_endpoint_that_is_down_is_said(tmp_path):
    with BatchEndpoint() as endpoint:
        pass
    with pytest.raises(TeacherError, match="cannot be reached to submit a job"):
        make(endpoint, tmp_path, max_retries=0)(chats(3))
    assert spent(tmp_path) == NOTHING_SPENT


@pytest.mark.parametrize("failure", [Drop(), Status(503, "Overloaded."), Status(429, "Slow down.")])
def test_an_endpoint_that_fails_for_a_while_is_waited_for(endpoint, tmp_path, failure):
    failures = []

    def hook(what, handler):
        if what == "retrieve" and len(failures) < 5:
            failures.append(what)
            raise failure

    endpoint.hook = hook
    assert [reply.text for reply in make(endpoint, tmp_path, max_retries=1)(chats(5))] == texts(5)
    assert len(endpoint.jobs) == 1 and len(failures) == 5


@pytest.mark.parametrize("moment", ["create", "created"])
@pytest.mark.parametrize("failure", [Drop(), Status(500, "Oops.")])
def test_a_submission_without_an_answer_is_not_made_twice(endpoint, tmp_path, moment, failure):
    failures = []

    def hook(what, handler):
        if what == moment and not failures:
            failures.append(what)
            raise failure

    endpoint.hook = hook
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(5))] == texts(5)
    assert len(endpoint.jobs) == 1 and endpoint.calls["create"] == (2 if moment == "create" else 1)


def test_a_download_that_breaks_off_is_made_again(endpoint, tmp_path):
    failures = []

    def hook(what, handler):
        if what == "content" and len(failures) < 2:
            failures.append(what)
            handler.send_response(200)
            handler.send_header("Content-Length", "100000")
            handler.end_headers()
            handler.wfile.write(b'{"custom_id": ')
            raise Drop

    endpoint.hook = hook
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(5))] == texts(5)
    assert len(endpoint.jobs) == 1


def test_results_that_the_endpoint_deleted_are_an_error_and_count_as_spent(endpoint, tmp_path):
    def hook(what, handler):
        if what == "content":
            raise Status(404, "No such File object.")

    endpoint.hook = hook
    replies = make(endpoint, tmp_path)(chats(4))
    assert {reply.error for reply in replies} == {
        "teacher: the endpoint has deleted what the batch job batch_000000 brought"
    }
    assert spent(tmp_path)["requests"] == 4 and spent(tmp_path)["tokens"] > 4 * 2048
    endpoint.hook = lambda what, handler: None
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(4))] == texts(4)


def test_an_endpoint_that_stays_away_is_said_with_how_to_go_on(endpoint, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(batch, "_PATIENCE", 0.3)

    def hook(what, handler):
        if what == "retrieve":
            raise Drop

    endpoint.hook = hook
    with pytest.raises(TeacherError, match="cannot be reached: "):
        make(endpoint, tmp_path, max_retries=0)(chats(5))
    assert re.search("go on at the endpoint .batch_000000.*ledger cancel", capfd.readouterr().err)
    endpoint.hook = lambda what, handler: None
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(5))] == texts(5)
    assert len(endpoint.jobs) == 1


def test_a_web_page_is_no_answer(tmp_path):
    with Endpoint() as endpoint:
        answers_always(endpoint, 200, b"<html>Hello</html>", {"Content-Type": "text/html"})
        with pytest.raises(TeacherError, match="answers as none with a batch API does: '<html>.*\nCheck `base_url`"):
            make(endpoint, tmp_path)(chats(3))
    assert spent(tmp_path) == NOTHING_SPENT


def test_a_job_that_the_endpoint_lost_can_be_forgotten(endpoint, tmp_path, capsys):
    teacher = make(endpoint, tmp_path, total_timeout=0.6)
    endpoint.looks = 10**9
    teacher(chats(3))
    kept, endpoint.jobs = endpoint.jobs, {}
    with pytest.raises(TeacherError, match="does not know the batch job batch_000000.*\n.*cancel .* batch_000000"):
        make(endpoint, tmp_path)(chats(3))
    assert ledger_command(["cancel", teacher.ledger]) == 1
    assert "To forget it: " in capsys.readouterr().err
    assert ledger_command(["cancel", teacher.ledger, "batch_000000"]) == 0
    assert "does not know it; 3 requests are free to be asked again" in capsys.readouterr().out
    assert spent(tmp_path) == NOTHING_SPENT
    endpoint.looks = 1
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(3))] == texts(3)
    assert kept


# ---- budgets


def test_submitted_jobs_count_at_their_worst_against_the_budget(endpoint, tmp_path):
    seen = []
    endpoint.hook = lambda what, handler: seen.append(spent(tmp_path)) if what == "created" else None
    teacher = make(endpoint, tmp_path, max_tokens=100)
    teacher(chats(4))
    worst = sum(len(chat[0]["content"].encode()) + 16 + 100 for chat in chats(4))
    assert seen == [{"requests": 4, "tokens": worst, "cost": 0.0}]
    assert spent(tmp_path)["tokens"] < worst


def test_what_does_not_fit_waits_for_what_jobs_give_back_and_the_rest_says_so(endpoint, tmp_path):
    seen = []
    endpoint.hook = lambda what, handler: seen.append(spent(tmp_path)["tokens"]) if what == "created" else None
    endpoint.answer = lambda body: "word " * 60
    replies = make(endpoint, tmp_path, max_tokens=100, max_total_tokens=1000)(chats(40))
    answered = [reply for reply in replies if reply.error is None]
    assert len(endpoint.jobs) > 1 and max(seen) <= 1000 and spent(tmp_path)["tokens"] <= 1000
    assert 5 < len(answered) == len(endpoint.submitted) < 40
    assert {reply.error.split(":")[0] for reply in replies if reply.error} == {"budget"}
    assert all(reply.error is None for reply in make(endpoint, tmp_path, max_tokens=100)(chats(40)))
    assert len(endpoint.submitted) == 40


def test_a_row_too_large_for_the_budget_fails_alone(endpoint, tmp_path):
    giant = [[{"role": "user", "content": "word " * 6000}]]
    replies = make(endpoint, tmp_path, max_tokens=100, max_total_tokens=20_000)(giant + chats(30))
    assert [reply.error is None for reply in replies] == [False] + [True] * 30
    assert len(endpoint.jobs) == 1


def test_at_a_limit_it_raises_where_it_shall_and_more_money_goes_on(endpoint, tmp_path):
    with pytest.raises(BudgetExceeded, match="max_requests=4"):
        make(endpoint, tmp_path, max_requests=4, on_budget="raise")(chats(10))
    assert len(endpoint.submitted) == 4
    assert [reply.text for reply in make(endpoint, tmp_path, max_requests=10)(chats(10))] == texts(10)
    assert len(endpoint.submitted) == 10 and spent(tmp_path)["requests"] == 10


def test_jobs_of_other_data_give_back_what_they_did_not_need(endpoint, tmp_path):
    endpoint.looks = 10**9
    make(endpoint, tmp_path, max_tokens=300, total_timeout=0.6)(chats(10))
    endpoint.looks = 1
    for job in endpoint.jobs.values():
        for _ in range(4):
            endpoint.step(job)
    others = [[{"role": "user", "content": f"Another thing about {number}"}] for number in range(10)]
    replies = make(endpoint, tmp_path, max_tokens=300, max_total_tokens=4500)(others)
    assert [reply.error for reply in replies] == [None] * 10
    with ledger_of(tmp_path) as ledger:
        assert len(list(ledger.rows())) == 20 and ledger.jobs() == []


def test_the_jobs_of_another_model_are_not_counted_at_this_ones_prices(endpoint, tmp_path):
    def prices(of):
        return {"price_per_million_input": of, "price_per_million_output": of}

    endpoint.looks, endpoint.models = 10**9, ("teacher", "dear")
    dear = replace(make(endpoint, tmp_path, total_timeout=0.6, **prices(10.0)), model="dear")
    dear(chats(3))
    reserved = spent(tmp_path)["cost"]
    endpoint.looks = 1
    for job in endpoint.jobs.values():
        for _ in range(4):
            endpoint.step(job)
    cheap = make(endpoint, tmp_path, **prices(1e-3))
    cheap(chats(2))
    assert cheap.stats["asked"] == 2 and len(endpoint.submitted) == 5
    assert reserved <= spent(tmp_path)["cost"] < 1.01 * reserved
    with ledger_of(tmp_path) as ledger:
        assert ledger.jobs() == [] and len(list(ledger.rows())) == 5


def test_jobs_at_an_endpoint_that_is_gone_do_not_hold_up_others(endpoint, tmp_path):
    with BatchEndpoint(answer=about, looks=10**9) as gone:
        make(gone, tmp_path, total_timeout=0.6)(chats(3))
    others = [[{"role": "user", "content": f"Another thing about {number}"}] for number in range(3)]
    replies = make(endpoint, tmp_path, max_retries=0)(others)
    assert [reply.text for reply in replies] == texts(3)


# ---- time and interruptions


def test_out_of_time_the_jobs_are_left_and_the_next_run_takes_up_waiting(endpoint, tmp_path, capfd):
    endpoint.looks = 10**9
    replies = make(endpoint, tmp_path, total_timeout=0.6)(chats(5))
    assert {reply.error for reply in replies} == {"budget: total_timeout=0.6 s are over"}
    said = capfd.readouterr().err
    assert "Batch jobs go on" in said and "python -m hf_reflect.ledger cancel" in said
    endpoint.looks = 1
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(5))] == texts(5)
    assert len(endpoint.jobs) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_waiting_says_how_to_cancel_and_loses_nothing(endpoint, tmp_path, number, capsys):
    endpoint.looks = 10**9
    client = start(endpoint, tmp_path, 6, poll=60)
    wait_until(lambda: endpoint.calls["retrieve"])
    time.sleep(0.3)
    sent = time.monotonic()
    client.send_signal(number)
    _, said = client.communicate(timeout=30)
    assert time.monotonic() - sent < 5.0
    assert client.returncode == 128 + number, said
    path = tmp_path / "ledger.sqlite"
    assert f"python -m hf_reflect.ledger cancel {path}" in said and "batch_000000" in said
    assert "Traceback" not in said

    assert ledger_command(["batches", str(path)]) == 0
    line = capsys.readouterr().out
    assert re.match(r"batch_000000  \w+  6 replies owed  0\.0 hours old  http://127", line)
    assert ledger_command(["cancel", str(path)]) == 0
    assert "batch_000000: cancelling" in capsys.readouterr().out
    replies = make(endpoint, tmp_path)(chats(6))
    assert sum(reply.error is None for reply in replies) == 3  # what it had finished
    endpoint.looks = 1
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(6))] == texts(6)
    assert len(endpoint.submitted) == 9 and not endpoint.twice


def test_jobs_are_listed_and_cancelled_with_the_key_that_they_were_given_with(endpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    endpoint.key, endpoint.looks = "sk-very-secret", 10**9
    monkeypatch.setattr(batch, "MAX_REQUESTS", 5)
    make(endpoint, tmp_path, api_key_env="MY_KEY", total_timeout=0.6)(chats(10))
    path = str(tmp_path / "ledger.sqlite")
    capsys.readouterr()

    def said(*argv, code):
        assert ledger_command(list(argv)) == code
        return "".join(capsys.readouterr())

    assert said("batches", path, code=0).count("  in_progress  5 replies owed") == 2
    monkeypatch.setenv("MY_KEY", "sk-also-secret")
    words = said("batches", path, code=0) + said("cancel", path, code=1)
    assert words.count("(as last seen; the endpoint does not say: 401 Incorrect API key provided: ***.)") == 2
    assert words.count("could not be cancelled") == 2 and "secret" not in words
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    assert "no open job batch_9" in said("cancel", path, "batch_9", code=1)
    assert said("cancel", path, "batch_000001", code=0).splitlines() == [
        "batch_000001: cancelling",
        "What they finished is taken by the next run.",
    ]
    assert [job["status"] for job in endpoint.jobs.values()] == ["in_progress", "cancelling"]
    assert "batch_000000: cancelling" in said("cancel", path, code=0)
    endpoint.server.shutdown()
    endpoint.server.server_close()
    assert said("batches", path, code=0).count("(as last seen; the endpoint does not say: ") == 2


def test_without_its_key_a_job_at_openai_is_shown_as_last_seen(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ledger_of(tmp_path) as ledger:
        job = ledger.add_job("mark", "https://api.openai.com/v1", "OPENAI_API_KEY", [("key", {}, 1, 0.0)])
        ledger.update_job(job, "in_progress", "batch_7")
    assert ledger_command(["batches", str(tmp_path / "ledger.sqlite")]) == 0
    assert "the endpoint does not say: OPENAI_API_KEY is not set" in capsys.readouterr().out


def kill_at(endpoint, moment, then):
    """Kill whoever makes this call, at that moment; `then` is what the server does to the connection."""
    clients = []

    def hook(what, handler):
        if what == moment and clients and clients[0].poll() is None:
            os.kill(clients[0].pid, signal.SIGKILL)
            clients[0].wait()
            if then:
                raise then

    endpoint.hook = hook
    return clients


@pytest.mark.parametrize("moment", ["upload", "create", "created", "retrieve", "content"])
def test_a_killed_client_is_taken_up_where_it_was(endpoint, tmp_path, moment):
    clients = kill_at(endpoint, moment, None if moment == "created" else Drop())
    clients.append(start(endpoint, tmp_path, 30))
    clients[0].communicate(timeout=60)
    assert clients[0].returncode == -signal.SIGKILL
    assert len(endpoint.jobs) == (moment not in ("upload", "create"))
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(30))] == texts(30)
    assert len(endpoint.jobs) == 1 and len(endpoint.submitted) == 30
    with ledger_of(tmp_path) as ledger:
        used = sum(reply["prompt_tokens"] + reply["completion_tokens"] for _, _, reply, *_ in ledger.rows())
        assert ledger.spent() == {"requests": 30, "tokens": used, "cost": 0.0}
        assert ledger.check() == [] and ledger.jobs() == []


def test_a_client_killed_while_it_takes_results_loses_none(endpoint, tmp_path):
    """Its commits are of ten replies: it is killed once some are there."""
    path, count = tmp_path / "ledger.sqlite", 2000
    killed = 0
    for _ in range(2):
        client = start(endpoint, tmp_path, count)
        before, found = None, 0
        while client.poll() is None:
            if path.exists():
                with Ledger(path) as ledger:
                    found = sum(group["replies"] for group in ledger.summary())
                before = found if before is None else before
                if found > before:
                    client.kill()
                    break
            time.sleep(0.005)
        client.communicate(timeout=60)
        killed += client.returncode == -signal.SIGKILL
        with Ledger(path) as ledger:
            assert ledger.check() == []
    assert killed
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(count))] == texts(count)
    assert len(endpoint.jobs) == 1 and len(endpoint.submitted) == count
    with Ledger(path) as ledger:
        used = sum(reply["prompt_tokens"] + reply["completion_tokens"] for _, _, reply, *_ in ledger.rows())
        assert ledger.spent() == {"requests": count, "tokens": used, "cost": 0.0}


def test_processes_that_want_the_same_share_one_job(endpoint, tmp_path):
    endpoint.looks = 10
    clients = [start(endpoint, tmp_path, 50) for _ in range(2)]
    for client in clients:
        out, said = client.communicate(timeout=60)
        assert json.loads(out) == texts(50), said
    assert len(endpoint.jobs) == 1 and len(endpoint.submitted) == 50
    assert spent(tmp_path)["requests"] == 50


@pytest.mark.slow
def test_processes_that_share_a_job_both_say_which_rows_failed(endpoint, tmp_path):
    boom = {"status": 500, "body": {"error": {"message": "boom"}}}
    endpoint.answer = lambda body: boom if about(body) == "fine: 3" else about(body)
    endpoint.looks = 20
    clients = [start(endpoint, tmp_path, 10) for _ in range(2)]
    for client in clients:
        out, said = client.communicate(timeout=60)
        assert json.loads(out) == [*texts(3), "teacher: 500 boom", *texts(10)[4:]], said
    # who did not take the job's results asks for the failed row once more, as another run would
    assert len(set(endpoint.submitted)) == 10 and len(endpoint.submitted) <= 11 and not endpoint.twice


def test_who_waits_for_the_job_of_a_process_that_died_submitting_finds_it(endpoint, tmp_path):
    """The second process looks while the first is about to submit; then the first is killed."""
    held, clients = threading.Event(), []

    def hook(what, handler):
        if what == "create" and not held.is_set():
            held.set()
            time.sleep(1.5)
            os.kill(clients[0].pid, signal.SIGKILL)
            raise Drop

    endpoint.hook = hook
    clients.append(start(endpoint, tmp_path, 20))
    wait_until(held.is_set)
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(20))] == texts(20)
    clients[0].communicate(timeout=30)
    assert clients[0].returncode == -signal.SIGKILL
    assert len(endpoint.jobs) == 1 and len(endpoint.submitted) == 20


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_paid_twice(endpoint, tmp_path):
    endpoint.looks, count, moments = 40, 2000, random.Random(5)
    killed = 0
    for _ in range(15):
        client = start(endpoint, tmp_path, count)
        time.sleep(moments.uniform(0.8, 2.5))
        client.kill()
        client.communicate()
        killed += client.returncode == -signal.SIGKILL
        if (tmp_path / "ledger.sqlite").exists():
            with ledger_of(tmp_path) as ledger:
                assert ledger.check() == []
    assert killed
    assert [reply.text for reply in make(endpoint, tmp_path)(chats(count))] == texts(count)
    assert len(endpoint.submitted) == count and not endpoint.twice
    with ledger_of(tmp_path) as ledger:
        used = sum(reply["prompt_tokens"] + reply["completion_tokens"] for _, _, reply, *_ in ledger.rows())
        assert ledger.spent() == {"requests": count, "tokens": used, "cost": 0.0}


@pytest.mark.slow
def test_more_requests_than_one_file_may_hold_are_two_jobs(endpoint, tmp_path):
    replies = make(endpoint, tmp_path)(chats(50_001))
    assert [reply.text for reply in replies] == texts(50_001)
    assert [len(endpoint.rows(job)) for job in endpoint.jobs.values()] == [50_000, 1]


@pytest.mark.slow
def test_an_interruption_does_not_wait_for_an_endpoint_that_is_away(endpoint, tmp_path):
    def hook(what, handler):
        if what == "retrieve":
            raise Drop

    endpoint.hook = hook
    client = start(endpoint, tmp_path, 6)
    wait_until(lambda: endpoint.calls["retrieve"] > 3)
    sent = time.monotonic()
    client.send_signal(signal.SIGINT)
    _, said = client.communicate(timeout=30)
    assert time.monotonic() - sent < 5.5 and client.returncode == 130 and "Batch jobs go on" in said


@pytest.mark.slow
def test_a_budget_is_never_passed_whatever_comes_back(endpoint, tmp_path):
    dice = random.Random(3)

    def answer(body):
        if dice.random() < 0.1:
            return {"status": 500, "body": {"error": {"message": "boom"}}}
        return "x" * dice.randrange(4 * body["max_completion_tokens"])

    endpoint.answer, endpoint.outcome = answer, lambda job: dice.choice(["completed"] * 3 + ["expired", "cancelled"])
    for number in range(40):
        folder, limit = tmp_path / str(number), dice.randrange(300, 6000)
        limits, seen = {"max_total_tokens": limit, "max_requests": dice.randrange(3, 40)}, []
        endpoint.hook = lambda what, handler, folder=folder, seen=seen: seen.append(spent(folder))
        for _ in range(2):
            replies = make(endpoint, folder, max_tokens=dice.randrange(20, 200), **limits)(chats(30))
            seen.append(spent(folder))
            assert {reply.error.split(":")[0] for reply in replies if reply.error} <= {"budget", "teacher"}
        assert max(s["tokens"] for s in seen) <= limit
        assert max(s["requests"] for s in seen) <= limits["max_requests"]
        with Ledger(folder / "ledger.sqlite") as ledger:
            used = sum(r["prompt_tokens"] + r["completion_tokens"] for _, _, r, *_ in ledger.rows())
            assert ledger.spent()["tokens"] == used and ledger.jobs() == []


def test_settings_that_cannot_hold_are_refused():
    with pytest.raises(SettingsError, match="mode"):
        Teacher("teacher", mode="bulk")
    with pytest.raises(SettingsError, match="Azure"):
        Teacher("teacher", mode="batch", api_version="2024-10-21")

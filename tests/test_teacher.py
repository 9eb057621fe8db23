import asyncio
import json
import pickle
import random
import sqlite3
import threading

import pytest
from conftest import ROWS
from endpoint import Endpoint, rewriting

from hf_reflect import BudgetExceeded, Teacher
from hf_reflect.errors import DataError, SettingsError, TeacherError
from hf_reflect.ledger import Ledger


def chats(count, words="Say something about"):
    return [[{"role": "user", "content": f"[Instruction]\n{words} {number}"}] for number in range(count)]


def make(endpoint, tmp_path, **settings):
    return Teacher("teacher", **{"base_url": endpoint.url, "ledger": str(tmp_path / "ledger.sqlite"), **settings})


def test_replies_come_in_the_order_of_their_chats(endpoint, tmp_path):
    endpoint.answer = lambda request: request["messages"][0]["content"][-3:]
    replies = make(endpoint, tmp_path)(chats(50, "Count to 1"))
    assert [reply.text for reply in replies] == [chat[0]["content"][-3:] for chat in chats(50, "Count to 1")]
    assert replies[0].model == "teacher-0125" and replies[0].finish_reason == "stop"


def test_equal_chats_are_asked_once_and_a_rerun_asks_nothing(endpoint, tmp_path):
    teacher = make(endpoint, tmp_path)
    assert len(teacher(chats(5) * 3)) == 15
    assert len(endpoint.requests) == 5
    assert all(reply.reused for reply in make(endpoint, tmp_path)(chats(5)))
    assert len(endpoint.requests) == 5


def test_requests_in_flight_stay_within_max_concurrency_and_use_it(endpoint, tmp_path):
    endpoint.latency = 0.05
    make(endpoint, tmp_path, max_concurrency=7)(chats(40))
    assert endpoint.most_in_flight == 7


def test_what_was_answered_before_a_failure_is_not_asked_again(endpoint, tmp_path):
    gone = threading.Event()
    endpoint.answer = lambda request: (
        {"status": 401, "body": {"error": {"message": "Key revoked."}}} if gone.is_set() else "ok"
    )
    teacher = make(endpoint, tmp_path, max_concurrency=1)
    teacher(chats(3))
    gone.set()
    with pytest.raises(TeacherError, match=r"refuses the model 'teacher': 401 Key revoked\."):
        teacher(chats(10))
    gone.clear()
    before = len(endpoint.requests)
    teacher(chats(10))
    assert len(endpoint.requests) - before == 7


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500, "body": {"error": {"message": "oops"}}},
        {"status": 503, "body": {}},
        {"status": 429, "body": {"error": {"message": "slow down"}}, "headers": {"Retry-After": "0.1"}},
        {"raw": b"{broken"},
        {"raw": b'{"choices": []}'},
        {"drop": True},
    ],
    ids=["500", "503", "429", "broken JSON", "no choices", "reset"],
)
def test_failures_that_may_pass_are_asked_again(endpoint, tmp_path, fault):
    chance = random.Random(0)
    endpoint.answer = lambda request: fault if chance.random() < 0.3 else "fine"
    replies = make(endpoint, tmp_path, max_concurrency=8)(chats(30))
    assert [reply.text for reply in replies] == ["fine"] * 30


def test_a_request_that_is_refused_for_good_fails_alone(endpoint, tmp_path):
    too_long = {"status": 400, "body": {"error": {"message": "maximum context length is 4096 tokens"}}}
    endpoint.answer = lambda request: too_long if request["messages"][0]["content"].endswith(" 3") else "fine"
    replies = make(endpoint, tmp_path)(chats(6))
    assert [reply.error is None for reply in replies] == [True, True, True, False, True, True]
    assert replies[3].error == "teacher: 400 maximum context length is 4096 tokens"


def test_an_unknown_model_is_said_in_the_endpoints_words(endpoint, tmp_path):
    teacher = Teacher("gpt-typo", base_url=endpoint.url, ledger=str(tmp_path / "l.sqlite"))
    with pytest.raises(TeacherError, match="The model `gpt-typo` does not exist"):
        teacher(chats(2))
    assert len(endpoint.requests) <= 2


def test_a_model_that_wants_max_completion_tokens_gets_it(endpoint, tmp_path):
    def answer(request):
        if "max_tokens" in request:
            message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return {"status": 400, "body": {"error": {"message": message, "code": "unsupported_parameter"}}}
        return f"at most {request['max_completion_tokens']}"

    endpoint.answer = answer
    replies = make(endpoint, tmp_path, max_tokens=99)(chats(5))
    assert {reply.text for reply in replies} == {"at most 99"}


def test_a_setting_that_the_model_does_not_take_stops_at_once(endpoint, tmp_path):
    message = {"message": "'stop' is not supported with this model.", "code": "unsupported_parameter", "param": "stop"}
    endpoint.answer = lambda request: {"status": 400, "body": {"error": message}} if "stop" in request else "fine"
    with pytest.raises(TeacherError, match="'stop' is not supported.*\n.*null leaves"):
        make(endpoint, tmp_path, extra_body={"stop": ["x"]})(chats(50))
    assert make(endpoint, tmp_path)(chats(1))[0].text == "fine"


def test_a_model_that_refuses_sampling_settings_is_asked_without_and_the_ledger_says_so(endpoint, tmp_path):
    def answer(request):
        for name in ("temperature", "top_p"):
            if name in request:
                message = f"Unsupported value: '{name}' does not support {request[name]} with this model."
                error = {"message": message, "param": name, "code": "unsupported_value"}
                return {"status": 400, "body": {"error": error}}
        return "fine"

    endpoint.answer = answer
    assert {reply.text for reply in make(endpoint, tmp_path)(chats(20))} == {"fine"}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for _, request, reply, *_ in ledger.rows():
            assert request["temperature"] == 0.0 and reply["left_out"] == ["temperature", "top_p"]
    assert all(reply.reused for reply in make(endpoint, tmp_path)(chats(20)))


def test_an_endpoint_that_is_down_is_said_within_seconds_and_filled_later(tmp_path):
    with Endpoint() as endpoint:
        port = endpoint.port
    teacher = Teacher("teacher", base_url=f"http://127.0.0.1:{port}/v1", ledger=str(tmp_path / "l.sqlite"))
    with pytest.raises(TeacherError, match=rf"127.0.0.1:{port}/v1 cannot be reached"):
        teacher(chats(3))
    with Endpoint(port=port):
        assert all(reply.error is None for reply in teacher(chats(3)))


def test_without_a_key_the_message_says_how_to_set_one(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    teacher = Teacher("teacher", ledger=str(tmp_path / "l.sqlite"))
    with pytest.raises(TeacherError, match="export OPENAI_API_KEY") as raised:
        teacher.check_ready()
    assert len(str(raised.value).splitlines()) == 2
    assert not (tmp_path / "l.sqlite").exists()


def test_the_key_is_sent_but_kept_nowhere(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    teacher = make(endpoint, tmp_path, api_key_env="MY_KEY")
    teacher(chats(2))
    assert endpoint.keys == {"sk-very-secret"}
    assert b"sk-very-secret" not in pickle.dumps(teacher)
    assert all(b"sk-very-secret" not in path.read_bytes() for path in tmp_path.iterdir())


def test_it_works_where_an_event_loop_runs(endpoint, tmp_path):
    async def notebook():
        return make(endpoint, tmp_path)(chats(3))

    endpoint.answer = lambda request: "fine"
    assert [reply.text for reply in asyncio.run(notebook())] == ["fine"] * 3


@pytest.mark.parametrize("limit", [{"max_requests": 5}, {"max_total_tokens": 2000}, {"max_cost": 0.004}])
def test_a_limit_is_never_passed_and_holds_over_restarts(endpoint, tmp_path, limit):
    endpoint.answer, endpoint.latency = (lambda request: "word " * 60), 0.01
    prices = {"price_per_million_input": 1.0, "price_per_million_output": 5.0}
    spent = []
    for _ in range(3):
        replies = make(endpoint, tmp_path, max_tokens=100, max_concurrency=4, **prices, **limit)(chats(40))
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            spent.append(ledger.spent())
    name = {"max_requests": "requests", "max_total_tokens": "tokens", "max_cost": "cost"}[next(iter(limit))]
    answered = [reply for reply in replies if reply.error is None]
    assert 0 < spent[-1][name] <= next(iter(limit.values()))
    assert spent[0] == spent[-1]
    assert len(answered) == len(endpoint.requests) < 40
    assert {reply.error.split(":")[0] for reply in replies if reply.error} == {"budget"}


def test_raising_the_limit_asks_only_the_rest(endpoint, tmp_path):
    make(endpoint, tmp_path, max_requests=4)(chats(10))
    with pytest.raises(BudgetExceeded, match="max_requests=4"):
        make(endpoint, tmp_path, max_requests=4, on_budget="raise")(chats(10))
    assert all(reply.error is None for reply in make(endpoint, tmp_path, max_requests=10)(chats(10)))
    assert len(endpoint.requests) == 10


def test_spending_is_what_the_endpoint_counted(endpoint, tmp_path):
    teacher = make(endpoint, tmp_path, price_per_million_input=2.0, price_per_million_output=8.0)
    replies = teacher(chats(10))
    prompt, completion = (sum(getattr(r, name) for r in replies) for name in ("prompt_tokens", "completion_tokens"))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        spent = ledger.spent()
    assert spent["tokens"] == prompt + completion
    assert spent["cost"] == pytest.approx((2 * prompt + 8 * completion) / 1e6)
    assert teacher.stats["cost"] == pytest.approx(spent["cost"])


def test_estimating_asks_nothing(endpoint, tmp_path):
    teacher = make(endpoint, tmp_path, price_per_million_input=1.0, price_per_million_output=1.0)
    teacher(chats(4))
    before = len(endpoint.requests)
    estimate = teacher.estimate(chats(10))
    assert (estimate["calls"], estimate["reused"]) == (6, 4)
    assert estimate["cost"] == pytest.approx((estimate["prompt_tokens"] + estimate["completion_tokens"]) / 1e6)
    assert len(endpoint.requests) == before


def test_a_rate_of_requests_is_kept(endpoint, tmp_path):
    import time

    endpoint.answer = lambda request: "fine"
    started = time.monotonic()
    make(endpoint, tmp_path, requests_per_minute=1200)(chats(30))
    assert time.monotonic() - started > 1.0  # 30 at 20 a second: a limit that does nothing takes a tenth of that


def test_settings_that_cannot_hold_are_refused():
    with pytest.raises(SettingsError, match="without prices"):
        Teacher("teacher", max_cost=1.0)
    with pytest.raises(SettingsError, match="on_budget"):
        Teacher("teacher", on_budget="ignore")
    with pytest.raises(SettingsError, match="`max_tokens` must be at least 1"):
        Teacher("teacher", max_tokens=None)
    with pytest.raises(SettingsError, match="`extra_body` holds max_completion_tokens, which would undo"):
        Teacher("teacher", extra_body={"max_completion_tokens": 10**6, "top_k": 5})


@pytest.mark.parametrize(
    "settings",
    [
        {"max_concurrency": "64"},
        {"max_concurrency": 2.5},
        {"max_retries": -1},
        {"max_retries": None},
        {"max_failure_rate": 20},
        {"timeout": 0},
        {"requests_per_minute": -600.0},
        {"price_per_million_input": -1.0},
        {"max_requests": -1},
        {"max_total_tokens": float("nan")},
        {"base_url": "localhost:8000/v1"},
    ],
)
def test_numbers_out_of_range_and_addresses_without_scheme_are_refused(settings):
    with pytest.raises(SettingsError, match=f"`{next(iter(settings))}` (must be|begins with)"):
        Teacher("teacher", **settings)


KEYS = ["sk-proj-abc", "sk_live_51H8xQ2eZvKYlo2CqT9RxW", "9f8e7d6c5b4a39281706f5e4d3c2b1a0", "a" * 31 + "1", ""]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_in_place_of_its_variables_name_is_refused_and_not_repeated(key):
    with pytest.raises(SettingsError, match="name of the environment variable") as refused:
        Teacher("teacher", api_key_env=key)
    assert not key or key not in str(refused.value)


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "my_key_2", "_K", "COMPANY_WIDE_AZURE_OPENAI_API_KEY_FOR_GPT4"])
def test_names_of_variables_are_taken(name):
    assert Teacher("teacher", api_key_env=name).api_key_env == name


@pytest.mark.parametrize("what", ["Why?", ["Why?"], chats(1)[0], [[{"role": "user"}]]])
@pytest.mark.parametrize("use", [Teacher.__call__, Teacher.estimate])
def test_what_is_no_list_of_chats_is_said(endpoint, tmp_path, what, use):
    with pytest.raises(DataError, match="is no chat"):
        use(make(endpoint, tmp_path), what)


def test_whole_numbers_are_the_same_sampling(tmp_path):
    plain, whole = Teacher("teacher"), Teacher("teacher", temperature=0, top_p=1)
    assert plain.key(chats(1)[0]) == whole.key(chats(1)[0])
    assert whole.key(chats(1)[0]) != Teacher("teacher", temperature=None).key(chats(1)[0])


def test_a_ledger_may_lie_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Teacher("teacher", ledger="~/a.sqlite").ledger == str(tmp_path / "a.sqlite")
    Ledger("~/b.sqlite")
    assert (tmp_path / "b.sqlite").exists()


def test_the_ledger_stores_what_was_asked_and_who_answered(endpoint, tmp_path):
    make(endpoint, tmp_path)(chats(1))
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        ((key, request, reply, where),) = database.execute(
            "SELECT key, request, reply, endpoint FROM replies"
        ).fetchall()
    assert json.loads(request)["messages"] == chats(1)[0]
    assert json.loads(reply)["model"] == "teacher-0125" and where == endpoint.url and len(key) == 64


def test_a_damaged_newer_or_foreign_ledger_is_refused_and_left_alone(tmp_path):
    damaged, newer, foreign = (tmp_path / name for name in ("damaged", "newer", "foreign"))
    damaged.write_bytes(b"not a database at all, but long enough to look like one" * 100)
    with sqlite3.connect(newer) as database:
        database.execute("PRAGMA user_version = 99")
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE recipes (name TEXT)")
    for path, words in ((damaged, "not a database"), (newer, "newer hf_reflect"), (foreign, "something else")):
        before = path.read_bytes()
        with pytest.raises(DataError, match=words):
            Ledger(path)
        assert path.read_bytes() == before


def test_two_processes_share_a_ledger(tmp_path):
    with Ledger(tmp_path / "l") as one, Ledger(tmp_path / "l") as other:
        one.put("key", {"model": "m"}, {"text": "first"})
        other.put("key", {"model": "m"}, {"text": "second"})
        assert other.get(["key"]) == {"key": {"text": "first"}}


def test_the_scripted_endpoint_answers_both_prompts():
    from hf_reflect import PROMPTS

    for part in ("instruction", "response"):
        prompt = PROMPTS[part]
        chat = prompt.chat(ROWS[0]["instruction"], ROWS[0]["output"])
        rewrite = prompt.parse(rewriting({"messages": chat}))
        assert rewrite.error is None and (rewrite.instruction is not None) == (part == "instruction")


def test_a_throttling_endpoint_is_asked_slower_until_all_is_answered(endpoint, tmp_path):
    import time

    sent = []

    def answer(request):
        now = time.monotonic()
        sent.append(now)
        if sum(now - moment < 0.5 for moment in sent) > 10:
            return {"status": 429, "body": {"error": {"message": "slow down"}}, "headers": {"Retry-After": "0.2"}}
        return "fine"

    endpoint.answer = answer
    replies = make(endpoint, tmp_path, max_retries=1)(chats(100))
    assert {reply.text for reply in replies} == {"fine"}
    assert len(sent) < 400


def test_one_row_that_always_fails_ends_neither_the_others_nor_a_rerun(endpoint, tmp_path):
    broken = {"status": 500, "body": {"error": {"message": "boom"}}}
    endpoint.answer = lambda request: broken if request["messages"][0]["content"].endswith(" 3") else "fine"
    for _ in range(2):
        replies = make(endpoint, tmp_path, max_retries=1)(chats(6))
        assert [reply.error for reply in replies] == [None] * 3 + ["teacher: 500 boom"] + [None] * 2


def test_replies_in_flight_are_kept_when_asking_stops(endpoint, tmp_path):
    import time

    def answer(request):
        if request["messages"][0]["content"].endswith(" 0"):
            return {"status": 401, "body": {"error": {"message": "Key revoked."}}}
        time.sleep(0.5)
        return "fine"

    endpoint.answer = answer
    with pytest.raises(TeacherError, match="Key revoked"):
        make(endpoint, tmp_path, max_concurrency=8)(chats(50))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert len(list(ledger.sample("teacher"))) == len(endpoint.requests) - 1 == 7
        assert ledger.spent()["tokens"] < 7 * 100  # nothing stays reserved


def test_without_the_endpoints_count_the_worst_case_is_what_was_spent(endpoint, tmp_path):
    body = {"choices": [{"message": {"content": [{"type": "text", "text": "fine"}]}, "finish_reason": "stop"}]}
    endpoint.answer = lambda request: {"raw": json.dumps(body).encode()}
    replies = make(endpoint, tmp_path, max_tokens=100, max_total_tokens=1000)(chats(30))
    assert 0 < sum(reply.text == "fine" for reply in replies) < 10
    assert {reply.error.split(":")[0] for reply in replies if reply.error} == {"budget"}


def test_a_row_too_large_for_the_budget_fails_alone(endpoint, tmp_path):
    endpoint.answer = lambda request: "fine"
    giant = [[{"role": "user", "content": "word " * 6000}]]
    replies = make(endpoint, tmp_path, max_tokens=100, max_total_tokens=20_000)(giant + chats(60))
    assert [reply.error is None for reply in replies] == [False] + [True] * 60


def test_tokens_per_minute_hold_when_requests_grow(endpoint, tmp_path):
    import time

    endpoint.answer = lambda request: "fine"
    growing = [[{"role": "user", "content": "word " * (20 * number)}] for number in range(1, 13)]
    started = time.monotonic()
    make(endpoint, tmp_path, max_tokens=100, tokens_per_minute=120_000)(growing)
    assert time.monotonic() - started > 1.0  # 3,150 tokens at 2,000 a second

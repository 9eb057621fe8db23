"""Each kind of endpoint, as a server on loopback that answers and refuses like it."""

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from conftest import ROWS, scripted_teacher
from endpoint import Endpoint, rewriting

from hf_reflect import ReflectionTransform, Reply, Teacher
from hf_reflect.errors import TeacherError
from hf_reflect.ledger import Ledger

SECRET = "sk-proj-4f9dKLm2secret7Qx"


def chats(count, words="Say something about"):
    return [[{"role": "user", "content": f"[Instruction]\n{words} {number}"}] for number in range(count)]


def make(endpoint, tmp_path, **settings):
    return Teacher("teacher", **{"base_url": endpoint.url, "ledger": str(tmp_path / "ledger.sqlite"), **settings})


def refusing(status, body, headers=None):
    return {"status": status, "body": body, "headers": headers or {}}


def openai_error(status, message, code, param=None, kind="invalid_request_error", headers=None):
    return refusing(status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers)


def records(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        return [(request, reply) for _, request, reply, *_ in ledger.rows()]


def ends_with(number):
    return lambda request: request["messages"][-1]["content"].endswith(f" {number}")


# ---- OpenAI


def picky(*refused, wants_newer_limit=False):
    """A model that takes its own sampling only; it names one thing at a time, as OpenAI's do."""

    def answer(request):
        if wants_newer_limit and "max_tokens" in request:
            words = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
            return openai_error(400, f"Unsupported parameter: {words}", "unsupported_parameter", "max_tokens")
        for name in refused:
            if name in request:
                words = f"Unsupported value: '{name}' does not support {request[name]} with this model. Only the "
                return openai_error(400, words + "default (1) value is supported.", "unsupported_value", name)
        return "fine"

    return answer


@pytest.mark.parametrize(
    "model",
    [
        picky("temperature"),
        picky("temperature", "top_p"),
        picky(wants_newer_limit=True),
        picky("temperature", "top_p", wants_newer_limit=True),
    ],
    ids=["temperature", "temperature and top_p", "max_tokens", "all of them"],
)
def test_openai_a_model_that_takes_few_settings_is_asked_with_those(endpoint, tmp_path, model):
    endpoint.answer = model
    teacher = make(endpoint, tmp_path, max_tokens=77, max_retries=0, max_concurrency=4)
    assert {reply.text for reply in teacher(chats(30))} == {"fine"}
    last = endpoint.requests[-1]
    assert last.get("max_tokens", last.get("max_completion_tokens")) == 77
    assert len(endpoint.requests) <= 30 + 3 * 4  # learned once, by those who were in flight
    assert all(set(request) >= {"temperature", "top_p", "max_tokens"} for request, _ in records(tmp_path))


def test_openai_a_seed_that_is_refused_is_left_out_and_said_so(endpoint, tmp_path, pairs):
    taking = picky("seed")

    def answer(request):
        refused = taking(request)
        if refused != "fine":
            return refused
        return rewriting(request) if "temperature" in request and request["temperature"] else "no tags here"

    endpoint.answer = answer
    transform = ReflectionTransform(make(endpoint, tmp_path), "response", retry_unusable=1)
    table = pairs.map(transform, batched=True, load_from_cache_file=False)
    assert set(table["error"]) == {None}
    again = [(request, reply) for request, reply in records(tmp_path) if "seed" in request]
    assert len(again) == 8 and all(reply["left_out"] == ["seed"] for _, reply in again)


def test_openai_a_wrong_key_is_said_without_the_key(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    words = f"Incorrect API key provided: {SECRET}. You can find your API key at https://platform.openai.com."
    endpoint.answer = lambda request: openai_error(401, words, "invalid_api_key")
    with pytest.raises(TeacherError, match=r"401 Incorrect API key provided: \*\*\*.*\(invalid_api_key\)") as raised:
        make(endpoint, tmp_path, max_concurrency=8)(chats(100))
    assert SECRET not in str(raised.value) and "OPENAI_API_KEY" in str(raised.value)
    assert len(endpoint.requests) <= 8


USED_UP = {
    "OpenAI": openai_error(429, "You exceeded your current quota.", "insufficient_quota", kind="insufficient_quota"),
    "DeepSeek": openai_error(402, "Insufficient Balance", "invalid_request_error", kind="unknown_error"),
    "OpenRouter": refusing(402, {"error": {"code": 402, "message": "Insufficient credits. Add more on its site."}}),
}


@pytest.mark.parametrize("kind", USED_UP)
def test_openai_and_others_an_account_that_is_used_up_stops_at_once(endpoint, tmp_path, kind):
    endpoint.answer = lambda request: USED_UP[kind]
    with pytest.raises(TeacherError, match="429 You exceeded your current quota|402 Insufficient"):
        make(endpoint, tmp_path, max_concurrency=8)(chats(100))
    assert len(endpoint.requests) <= 8


def test_openai_an_unknown_model_stops_at_once(endpoint, tmp_path):
    words = "The model `teacher` does not exist or you do not have access to it."
    endpoint.answer = lambda request: openai_error(404, words, "model_not_found")
    with pytest.raises(TeacherError, match=r"404 The model `teacher` does not exist.*\(model_not_found\)"):
        make(endpoint, tmp_path, max_concurrency=8)(chats(100))
    assert len(endpoint.requests) <= 8


def test_openai_a_prompt_that_is_too_long_fails_alone(endpoint, tmp_path):
    words = "This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens."
    too_long = openai_error(400, words, "context_length_exceeded", "messages")
    endpoint.answer = lambda request: too_long if ends_with(3)(request) else "fine"
    replies = make(endpoint, tmp_path)(chats(6))
    assert [reply.error for reply in replies] == [None] * 3 + [
        f"teacher: 400 {words} (context_length_exceeded)"
    ] + [None] * 2  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [
        {"text": None, "message": {"refusal": "This goes against our usage policies."}},
        {"text": None, "finish_reason": "content_filter"},
        {"text": "[Better Answer] Half of a sent", "finish_reason": "content_filter"},
    ],
    ids=["refusal field", "filtered", "filtered midway"],
)
def test_openai_refusals_and_filtered_replies_are_refused_rows(endpoint, tmp_path, pairs, given):
    endpoint.answer = lambda request: given if ROWS[2]["instruction"] in str(request) else rewriting(request)
    transform = ReflectionTransform(make(endpoint, tmp_path), "response")
    table = pairs.map(transform, batched=True, load_from_cache_file=False)
    errors = [error for error in table["error"] if error]
    assert len(errors) == 1 and errors[0].startswith("refused: ")
    assert table[5]["error"] == errors[0] and table[5]["response"] is None


def test_openai_the_fingerprint_and_the_real_model_are_in_the_ledger(endpoint, tmp_path):
    endpoint.answer = lambda request: {"text": "fine", "fields": {"system_fingerprint": "fp_44709d6fcb"}}
    make(endpoint, tmp_path)(chats(1))
    ((_, reply),) = records(tmp_path)
    assert (reply["fingerprint"], reply["model"]) == ("fp_44709d6fcb", "teacher-0125")


# ---- Azure


def azure(endpoint, tmp_path, **settings):
    url = endpoint.url.removesuffix("/v1") + "/openai"
    return make(endpoint, tmp_path, base_url=url, api_version="2024-10-21", **settings)


FILTERED = {
    "error": {
        "message": "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
        "type": None,
        "param": "prompt",
        "code": "content_filter",
        "status": 400,
        "innererror": {
            "code": "ResponsibleAIPolicyViolation",
            "content_filter_result": {"violence": {"filtered": True, "severity": "medium"}},
        },
    }
}


def test_azure_deployment_and_version_are_in_the_path_and_the_key_in_its_header(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", SECRET)
    endpoint.answer = lambda request: "fine"
    assert azure(endpoint, tmp_path, api_key_env="AZURE_OPENAI_API_KEY")(chats(1))[0].text == "fine"
    assert endpoint.paths == ["/openai/deployments/teacher/chat/completions?api-version=2024-10-21"]
    assert endpoint.headers[0]["api-key"] == SECRET
    assert SECRET not in endpoint.headers[0].get("authorization", "")


def test_azure_the_entra_token_of_a_developers_shell_is_not_sent_instead_of_the_key(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("AZURE_OPENAI_AD_TOKEN", "another-account")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    endpoint.answer = lambda request: "fine"
    azure(endpoint, tmp_path)(chats(1))
    assert endpoint.headers[0].get("api-key") == SECRET
    assert "another-account" not in str(endpoint.headers)


def test_azure_a_filtered_prompt_is_a_refused_row_and_the_others_go_on(endpoint, tmp_path):
    endpoint.answer = lambda request: refusing(400, FILTERED) if ends_with(2)(request) else "fine"
    replies = azure(endpoint, tmp_path)(chats(6))
    assert [reply.error is None for reply in replies] == [True, True, False, True, True, True]
    assert replies[2].error.startswith("refused: ") and "content management policy" in replies[2].error


@pytest.mark.parametrize(
    "status, code, words",
    [
        (401, "401", "Access denied due to invalid subscription key or wrong API endpoint."),
        (404, "DeploymentNotFound", "The API deployment for this resource does not exist."),
    ],
    ids=["wrong key", "no such deployment"],
)
def test_azure_a_wrong_key_or_deployment_stops_at_once(endpoint, tmp_path, status, code, words):
    endpoint.answer = lambda request: refusing(status, {"error": {"code": code, "message": words}})
    with pytest.raises(TeacherError, match=f"{status} {words}"):
        azure(endpoint, tmp_path, max_concurrency=8)(chats(100))
    assert len(endpoint.requests) <= 8


def test_azure_a_limit_is_waited_for_as_its_headers_say(endpoint, tmp_path):
    words = "Requests to the ChatCompletions_Create Operation have exceeded the token rate limit of your tier."
    headers = {"Retry-After": "1", "retry-after-ms": "300"}
    answers = iter([refusing(429, {"error": {"code": "429", "message": words}}, headers)])
    moments = []

    def answer(request):
        moments.append(time.monotonic())
        return next(answers, "fine")

    endpoint.answer = answer
    assert {reply.text for reply in azure(endpoint, tmp_path, max_concurrency=1)(chats(2))} == {"fine"}
    assert 0.3 <= moments[1] - moments[0] < 1.0


# ---- vLLM, SGLang, TGI


def test_vllm_fields_of_its_own_are_sent_at_top_level_and_are_part_of_the_key(endpoint, tmp_path):
    endpoint.answer = lambda request: f"top_k {request.get('top_k')}"
    thinking = {"top_k": 20, "chat_template_kwargs": {"enable_thinking": False}}
    for extra, text in ((thinking, "top_k 20"), ({"top_k": 5}, "top_k 5"), (None, "top_k None"), ({}, "top_k None")):
        assert make(endpoint, tmp_path, extra_body=extra)(chats(1))[0].text == text
    assert len(endpoint.requests) == 3  # none and an empty one are the same
    assert endpoint.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert "extra_body" not in endpoint.requests[0]
    assert {json.dumps(request.get("extra_body")) for request, _ in records(tmp_path)} == {
        json.dumps(thinking), '{"top_k": 5}', "null",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_vllm_thoughts_beside_the_answer_are_kept_but_never_part_of_it(endpoint, tmp_path, pairs, name):
    thoughts = "The user wants [Better Answer] a trap [End]. I think so."
    endpoint.answer = lambda request: {"text": rewriting(request), "message": {name: thoughts}}
    transform = ReflectionTransform(make(endpoint, tmp_path), "response")
    table = pairs.map(transform, batched=True, load_from_cache_file=False)
    assert set(table["error"]) == {None}
    assert not any("trap" in text for text in [*table["response"], *filter(None, table["critique"])])
    assert all(reply["reasoning"] == thoughts for _, reply in records(tmp_path))


@pytest.mark.parametrize("opening", ["<think>\n", ""], ids=["whole block", "opening tag in the prompt"])
def test_vllm_thoughts_within_the_text_are_read_away(endpoint, tmp_path, pairs, opening):
    thoughts = f"{opening}They want [Better Answer] and [End]. Let me see: [Better Answer] a trap [End]\n</think>\n\n"
    endpoint.answer = lambda request: thoughts + rewriting(request)
    transform = ReflectionTransform(make(endpoint, tmp_path), "response")
    table = pairs.map(transform, batched=True, load_from_cache_file=False)
    assert set(table["error"]) == {None}
    assert not any("trap" in text for text in [*table["response"], *filter(None, table["critique"])])


def test_vllm_a_model_that_thinks_up_to_the_token_limit_gives_truncated_rows(endpoint, tmp_path, pairs):
    cut = {"text": None, "finish_reason": "length", "message": {"reasoning_content": "Well, let me see"}}
    endpoint.answer = lambda request: cut
    transform = ReflectionTransform(make(endpoint, tmp_path), "response")
    table = pairs.map(transform, batched=True, load_from_cache_file=False)
    assert all(error.startswith("truncated: ") for error in table["error"][1::2])


LONG = "This model's maximum context length is 4096 tokens. However, you requested 6048 tokens."
TGI_LONG = "Input validation error: `inputs` must have less than 4096 tokens. Given: 4200"
TOO_LONG = {
    "vLLM": (400, {"object": "error", "message": LONG, "type": "BadRequestError", "param": None, "code": 400}, LONG),
    "vLLM, newer": (
        400,
        {"error": {"message": LONG, "type": "BadRequestError", "param": "input_tokens", "code": 400}},
        LONG,
    ),
    "SGLang": (
        400,
        {"object": "error", "message": "The input (5000 tokens) is longer than the model's context length.",
         "type": "BadRequestError", "param": None, "code": 400},
        "The input (5000 tokens) is longer than the model's context length.",
    ),
    "TGI": (422, {"error": TGI_LONG, "error_type": "validation"}, TGI_LONG),
    "FastAPI": (400, {"detail": "The prompt is too long."}, "The prompt is too long."),
    "plain text": (413, b"Request Entity Too Large", "Request Entity Too Large"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOO_LONG)
def test_one_request_that_is_too_long_fails_alone_in_the_endpoints_words(endpoint, tmp_path, kind):
    status, body, words = TOO_LONG[kind]
    endpoint.answer = lambda request: refusing(status, body) if ends_with(1)(request) else "fine"
    replies = make(endpoint, tmp_path)(chats(4))
    assert [reply.error for reply in replies] == [None, f"teacher: {status} {words}", None, None]
    assert len(endpoint.requests) == 4


FOR_GOOD = {
    "vLLM, model": (
        404,
        {"object": "error", "message": "The model `teacher` does not exist.", "type": "NotFoundError", "code": 404},
        "The model `teacher` does not exist",
    ),
    "vLLM, key": (401, {"error": "Unauthorized"}, "401 Unauthorized"),
    "FastAPI, path": (404, {"detail": "Not Found"}, "404 Not Found"),
    "a proxy's page": (403, b"<html><body>Forbidden</body></html>", "403 <html><body>Forbidden"),
}


@pytest.mark.parametrize("kind", FOR_GOOD)
def test_what_would_meet_every_request_stops_at_once_in_the_endpoints_words(endpoint, tmp_path, kind):
    status, body, words = FOR_GOOD[kind]
    endpoint.answer = lambda request: refusing(status, body)
    with pytest.raises(TeacherError, match=words):
        make(endpoint, tmp_path, max_concurrency=8)(chats(100))
    assert len(endpoint.requests) <= 8


def test_fastapi_a_list_of_mistakes_is_said(endpoint, tmp_path):
    wrong = [{"type": "missing", "loc": ["body", "prompt"], "msg": "Field required", "input": {}}]
    endpoint.answer = lambda request: refusing(422, {"detail": wrong}) if ends_with(0)(request) else "fine"
    replies = make(endpoint, tmp_path)(chats(2))
    assert replies[0].error.startswith("teacher: 422 ") and "Field required" in replies[0].error
    assert replies[1].text == "fine"


def test_tgi_an_overloaded_server_is_waited_for(endpoint, tmp_path):
    overloaded = refusing(429, {"error": "Model is overloaded", "error_type": "overloaded"})

    def answer(request):
        return overloaded if endpoint.in_flight > 2 else "fine"

    endpoint.answer = answer
    endpoint.latency = 0.02
    replies = make(endpoint, tmp_path, max_retries=0, max_concurrency=16)(chats(30))
    assert {reply.text for reply in replies} == {"fine"}


def test_tgi_the_papers_top_p_which_it_refuses_is_left_out(endpoint, tmp_path):
    words = "Input validation error: `top_p` must be > 0.0 and < 1.0"

    def answer(request):
        return refusing(422, {"error": words, "error_type": "validation"}) if request.get("top_p") == 1.0 else "fine"

    endpoint.answer = answer
    assert {reply.text for reply in make(endpoint, tmp_path)(chats(10))} == {"fine"}
    assert all(reply["left_out"] == ["top_p"] for _, reply in records(tmp_path))


def test_a_server_of_ones_own_needs_no_key(endpoint, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    endpoint.answer = lambda request: "fine"
    teacher = make(endpoint, tmp_path)
    teacher.check_ready()
    assert teacher(chats(1))[0].text == "fine"
    assert endpoint.keys == {"not-needed"}


def test_an_endpoint_may_come_from_the_environment(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    endpoint.answer = lambda request: "fine"
    assert make(endpoint, tmp_path, base_url=None)(chats(1))[0].text == "fine"


# ---- transformers serve


def test_transformers_serve_knows_its_model_by_the_path_and_lists_none(endpoint, tmp_path):
    path = "/models/tiny-student"
    endpoint.models = (path,)
    endpoint.answer = lambda request: {"text": "fine", "fields": {"model": f"{path}@main", "system_fingerprint": ""}}
    teacher = make(endpoint, tmp_path)
    teacher.model = path
    teacher.check_ready()
    assert {(reply.text, reply.model) for reply in teacher(chats(3))} == {("fine", f"{path}@main")}
    assert set(endpoint.paths) == {"/v1/chat/completions"}  # its `/v1/models` answers 500


def test_transformers_serve_a_field_that_it_does_not_take_is_said(endpoint, tmp_path):
    known = {"model", "messages", "temperature", "top_p", "max_tokens", "seed", "response_format"}

    def answer(request):
        unexpected = set(request) - known
        return refusing(422, {"detail": f"Unexpected fields in the request: {unexpected}"}) if unexpected else "fine"

    endpoint.answer = answer
    (reply,) = make(endpoint, tmp_path, extra_body={"top_k": 5})(chats(1))
    assert reply.error == "teacher: 422 Unexpected fields in the request: {'top_k'}"
    assert make(endpoint, tmp_path, extra_body={"seed": 5})(chats(1))[0].text == "fine"
    assert endpoint.requests[-1]["seed"] == 5


# ---- notebooks

NOTEBOOK = """
    import asyncio, sys
    from hf_reflect import Teacher

    teacher = Teacher("teacher", base_url=sys.argv[1], ledger=sys.argv[2], max_concurrency=4)
    chats = [[{"role": "user", "content": f"[Instruction]\\nSay {n}"}] for n in range(12)]

    async def cell():  # a kernel runs each cell within its loop
        print(len(teacher(chats)), flush=True)

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(cell())
    except KeyboardInterrupt:
        print("KeyboardInterrupt", flush=True)
    loop.run_until_complete(asyncio.sleep(0))  # the kernel lives on
"""


def notebook(endpoint, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(NOTEBOOK), endpoint.url, str(tmp_path / "ledger.sqlite")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_notebooks_running_loop_is_left_alone(endpoint, tmp_path):
    endpoint.answer = lambda request: "fine"

    async def cell():
        ticks = 0

        async def other():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.01)

        task = asyncio.create_task(other())
        replies = make(endpoint, tmp_path)(chats(3))
        await asyncio.sleep(0.05)
        task.cancel()
        return replies, ticks

    replies, ticks = asyncio.run(cell())
    assert {reply.text for reply in replies} == {"fine"} and ticks > 1


def test_a_notebook_can_be_interrupted_and_goes_on_from_there(endpoint, tmp_path):
    endpoint.answer, endpoint.latency = (lambda request: "fine"), 1.0
    process = notebook(endpoint, tmp_path)
    while len(endpoint.requests) < 6:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert "KeyboardInterrupt" in out and process.returncode == 0, err
    assert "ledger.sqlite: the same command goes on from there" in err
    asked = len(endpoint.requests)
    assert asked < 12 and len(records(tmp_path)) == asked  # one second is within the moment they have
    endpoint.latency = 0.0
    out, err = notebook(endpoint, tmp_path).communicate(timeout=60)
    assert out.strip() == "12" and len(endpoint.requests) == 12


# ---- any callable


class Counting:
    """A teacher with a state of its own: the first attempt at every chat is useless."""

    def __init__(self):
        self.seen = set()
        self.calls = []

    def __call__(self, chats):
        self.calls.append(len(chats))
        replies = []
        for chat in chats:
            text = chat[-1]["content"]
            replies += scripted_teacher([chat]) if text in self.seen else [Reply("I would rather not.", "stop")]
            self.seen.add(text)
        return replies


def test_any_picklable_callable_is_a_teacher_and_may_be_asked_again(pairs):
    teacher = pickle.loads(pickle.dumps(Counting()))
    once = pairs.map(
        ReflectionTransform(Counting(), "response", source="mine"), batched=True, load_from_cache_file=False
    )
    assert all(error.startswith("unparsed: ") for error in once["error"][1::2])
    transform = ReflectionTransform(teacher, "response", source="mine", retry_unusable=2)
    table = transform(pairs.with_format("arrow")[:])
    assert teacher.calls == [8, 8]
    assert table["error"].null_count == len(table) == 16
    assert set(table["source"].to_pylist()) == {"", "mine"}


def test_a_callable_goes_to_workers_of_map(pairs):
    transform = ReflectionTransform(scripted_teacher, "response")
    table = pairs.map(transform, batched=True, num_proc=2, load_from_cache_file=False)
    assert set(table["error"]) == {None} and set(table["source"]) == {"", "scripted_teacher"}


def test_a_callable_that_answers_too_few_chats_is_an_error(pairs):
    with pytest.raises(TeacherError, match="1 replies to 8 chats"):
        pairs.map(
            ReflectionTransform(lambda chats: [Reply("x")], "response", source="short"),
            batched=True,
            load_from_cache_file=False,
        )


def test_two_teachers_share_a_ledger_and_never_each_others_replies(tmp_path):
    with Endpoint(lambda request: "one", ("one",)) as one, Endpoint(lambda request: "two", ("two",)) as two:
        for server, name in ((one, "one"), (two, "two"), (one, "one")):
            teacher = Teacher(name, base_url=server.url, ledger=str(tmp_path / "ledger.sqlite"))
            assert {reply.text for reply in teacher(chats(3))} == {name}
        assert len(one.requests) == len(two.requests) == 3

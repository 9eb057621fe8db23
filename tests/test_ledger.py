"""The ledger: shared, upgraded, damaged, killed in the middle, and looked at with `python -m hf_reflect.ledger`."""

import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_reflect.errors import DataError
from hf_reflect.ledger import Ledger, Limits, request_key
from hf_reflect.ledger import file as ledger_file
from hf_reflect.ledger.__main__ import main


def request(number, words="Say something about"):
    return {"model": "teacher", "messages": [{"role": "user", "content": f"{words} {number}"}], "temperature": 0.0}


def reply(number, text="fine"):
    record = {"text": f"{text} {number}", "finish_reason": "stop", "model": "teacher-0125"}
    return record | {"prompt_tokens": number, "completion_tokens": 2 * number}


def naive_key(request):
    """The definition, word by word: canonical JSON with lengths for texts, then the texts."""
    request, texts = copy.deepcopy(request), b""
    for message in request.get("messages", []):
        if isinstance(message["content"], str):
            text = message["content"].encode("utf-8", "surrogatepass")
            texts += text
            message["content"] = len(text)
    frame = json.dumps(request, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(frame.encode("utf-8", "surrogatepass") + texts).hexdigest()


parameter = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5))
message = st.fixed_dictionaries(
    {"content": st.one_of(st.text(), st.none(), st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=3))))},
    optional={"role": st.one_of(st.sampled_from(["system", "user", 'a"b', "ö"]), st.none()), "name": st.text()},
)


@given(
    st.dictionaries(
        st.one_of(st.sampled_from(["a", "model", "message", "messages2", "zz"]), st.text(max_size=5)),
        st.one_of(parameter, st.dictionaries(st.text(max_size=3), parameter)),
    ),
    st.lists(message, max_size=3),
)
def test_a_key_is_the_hash_of_lengths_and_texts(sampling, messages):
    asked = sampling | {"messages": messages}
    assert request_key(asked) == naive_key(asked)


def test_a_key_tells_apart_what_a_text_could_imitate():
    two = [{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}]
    others = [{"role": "user", "content": "a"}, {"role": "user", "content": "bc"}]
    assert request_key({"messages": two}) != request_key({"messages": others})
    assert request_key({"messages": [{"role": "user", "content": 2}]}) != request_key({"messages": two[:1]})


def fill(path, count, start=0):
    with Ledger(path) as ledger, ledger.transaction():
        for number in range(start, start + count):
            asked = request(number)
            ledger.put(request_key(asked), asked, reply(number), "http://somewhere/v1")
            ledger.reserve(3 * number, 0.5)
    return path


def rows(path):
    with Ledger(path) as ledger:
        return list(ledger.rows())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


# ---- looking at it


def test_stats_say_what_is_there_and_what_was_spent(path, capsys):
    fill(path, 10)
    with Ledger(path) as ledger:
        asked = request(99) | {"model": "other"}
        ledger.put(request_key(asked), asked, reply(1) | {"finish_reason": "length", "model": None}, None)
        ledger.add_job("mark", "http://somewhere/v1", "KEY", [("a", request(1), 10, 1.0), ("b", request(2), 10, 1.0)])
    assert main(["stats", str(path), "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["replies"] == 11 and stats["prompt_tokens"] == 46 and stats["completion_tokens"] == 92
    assert stats["spent"] == {"requests": 10, "tokens": 135, "cost": 5.0} and stats["integrity"] == ["ok"]
    assert stats["finish_reasons"] == {"stop": 10, "length": 1}
    assert [job["owed"] for job in stats["open_jobs"]] == [2]
    teacher = next(model for model in stats["models"] if model["model"] == "teacher")
    assert (teacher["returned"], teacher["endpoint"]) == ("teacher-0125", "http://somewhere/v1")
    assert stats["bytes"] >= path.stat().st_size and stats["first"] <= stats["last"]
    assert main(["stats", str(path)]) == 0
    said = capsys.readouterr().out
    assert "11 replies" in said and "10 requests, 135 tokens, cost 5.0000" in said and "owe 2 replies" in said


def test_an_empty_ledger_has_stats_too(path, capsys):
    fill(path, 0)
    assert main(["stats", str(path)]) == 0 and main(["batches", str(path)]) == 0 and main(["cancel", str(path)]) == 0
    assert "0 replies" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["stats", "export", "vacuum", "batches", "cancel"])
def test_a_path_that_is_not_there_is_an_error_and_makes_nothing(tmp_path, command, capsys):
    assert main([command, str(tmp_path / "no" / "ledger.sqlite")]) == 1
    out, said = capsys.readouterr()
    assert "no ledger" in said and len(said.splitlines()) == 1 and not out and not list(tmp_path.iterdir())


def test_what_was_exported_is_imported_the_same(path, tmp_path, capsys):
    fill(path, 1200)
    asked = request(7, "日本語\u2028\x00 🎉 \\n")
    with Ledger(path) as ledger:
        ledger.put(request_key(asked), asked, reply(7, "ligne\u2028\x85\r\n🎉"), None, created=12345.678)
    file, copy = tmp_path / "replies.jsonl", tmp_path / "copy.sqlite"
    assert main(["export", str(path), str(file)]) == 0
    lines = file.read_bytes().split(b"\n")[:-1]
    keys = [json.loads(line)["key"] for line in lines]
    assert len(lines) == 1201 and keys == sorted(keys)
    assert set(json.loads(lines[0])) == {"key", "request", "reply", "endpoint", "created"}
    assert main(["import", str(copy), str(file)]) == 0
    assert "1,201 replies imported, 0 were there already" in capsys.readouterr().out
    assert rows(copy) == rows(path)
    with Ledger(copy) as ledger:
        assert ledger.spent() == {"requests": 0, "tokens": 0, "cost": 0.0}
    assert sorted(file.name for file in tmp_path.iterdir() if "part" in file.name) == []


def test_an_import_keeps_what_is_there_and_says_so(path, tmp_path, capsys):
    fill(path, 4)
    file, other = tmp_path / "replies.jsonl", tmp_path / "other.sqlite"
    main(["export", str(path), str(file)])
    with Ledger(other) as ledger:
        ledger.put(request_key(request(2)), request(2), reply(2, "mine"), "http://mine/v1")
    capsys.readouterr()
    assert main(["import", str(other), str(file)]) == 0
    assert capsys.readouterr().out == "3 replies imported, 1 were there already\n"
    with Ledger(other) as ledger:
        assert ledger.get([request_key(request(2))])[request_key(request(2))]["text"] == "mine 2"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{no json", "Expecting property name"),
        (b"7", "no JSON object"),
        (b"", "Expecting value"),
        (b"\xff\xfe", "codec can't decode"),
        (b'{"key": "a", "request": {}, "reply": {}, "endpoint": null}', "lacks created"),
        (b'{"key": "a", "request": {}, "reply": "x", "endpoint": null, "created": 1}', "reply is a str"),
        (
            b'{"key": "a", "request": {"messages": []}, "reply": {"text": ""}, "endpoint": null, "created": 1}',
            "key is not that of its request",
        ),
        (b'{"key": "a", "request": {"messages": []}, "reply": {}, "endpoint": null, "created": 1}', "has no text"),
        (
            b'{"key": "a", "request": {}, "reply": {"text": ""}, "endpoint": null, "created": 1}',
            "request has no messages",
        ),
        (b"[" * 100_000, "recursion depth"),
    ],
)
def test_a_line_that_is_no_reply_is_named_and_nothing_is_imported(path, tmp_path, line, words, capsys):
    fill(path, 5)
    file, other = tmp_path / "replies.jsonl", fill(tmp_path / "other.sqlite", 2, start=50)
    main(["export", str(path), str(file)])
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([*lines[:3], line, *lines[3:]]) + b"\n")
    before = rows(other)
    capsys.readouterr()
    assert main(["import", str(other), str(file)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"Line 4 of {file} is no reply") and words in said and "Nothing was imported" in said
    assert rows(other) == before


def test_it_reads_and_writes_pipes_and_imports_nothing_heavy(path, tmp_path):
    fill(path, 2000)
    python, copy = [sys.executable, "-m", "hf_reflect.ledger"], tmp_path / "copy.sqlite"
    exported = subprocess.run([*python, "export", str(path)], capture_output=True, check=True)
    assert exported.stderr == b"" and len(exported.stdout.splitlines()) == 2000
    subprocess.run([*python, "import", str(copy), "-"], input=exported.stdout, capture_output=True, check=True)
    assert rows(copy) == rows(path)
    head = subprocess.run(
        f"{sys.executable} -m hf_reflect.ledger export {path} | head -n 1", shell=True, capture_output=True, check=True
    )
    assert head.stderr == b"" and len(head.stdout.splitlines()) == 1
    light = "import sys; from hf_reflect.ledger.__main__ import main; main(sys.argv[1:]); "
    light += "print([name for name in ('torch', 'datasets', 'openai', 'pyarrow') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", light, "stats", str(path)], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("file", ["/proc/replies.jsonl", "/proc/no/such", "."])
def test_an_export_that_cannot_be_written_or_read_says_so(path, file, capsys):
    fill(path, 2)
    for command in ("export", "import"):
        assert main([command, str(path), file]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_export_replaces_no_database(path, tmp_path, capsys):
    fill(path, 2)
    other = tmp_path / "other.sqlite"
    fill(other, 3)
    for file in (path, other):
        assert main(["export", str(path), str(file)]) == 1
        assert "is a database" in capsys.readouterr().err
    assert (len(rows(path)), len(rows(other))) == (2, 3)


@pytest.mark.parametrize(
    "change", [{"created": float("nan")}, {"reply": {"text": "\ud800"}}], ids=["time", "half a surrogate pair"]
)
def test_import_says_which_line_cannot_be_stored(path, tmp_path, change, capsys):
    request = {"model": "m", "messages": []}
    row = {"key": request_key(request), "request": request, "reply": {"text": ""}, "endpoint": None, "created": 1.0}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | change) + "\n")
    assert main(["import", str(path), str(tmp_path / "rows.jsonl")]) == 1
    assert "Line 1" in capsys.readouterr().err and rows(path) == []


def test_vacuum_gives_space_back(path, capsys):
    fill(path, 5000)
    with Ledger(path) as ledger:
        ledger._db.execute("DELETE FROM replies")
    assert main(["vacuum", str(path)]) == 0
    before, after = (int(word.replace(",", "")) for word in capsys.readouterr().out.split() if word[0].isdigit())
    assert after < before / 10


# ---- two at once


WRITER = """
import sys
from hf_reflect.ledger import Ledger, Limits, request_key
path, who, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
reserved = 0
with Ledger(path) as ledger:
    for number in range(count):
        if ledger.reserve(10, 0.01, Limits(max_requests=700, max_total_tokens=6005, max_cost=100.0)):
            reserved += 1
        request = {"model": who, "messages": [{"content": f"{number}"}]}
        ledger.put(request_key(request), request, {"text": "x" * 1000}, "http://somewhere/v1", (-1, -0.001))
        print(request_key(request), flush=True)
print(reserved)
"""


def test_two_processes_lose_nothing_and_never_pass_a_limit(path):
    def write(who):
        ran = subprocess.run([sys.executable, "-c", WRITER, str(path), who, "500"], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return int(ran.stdout.splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:
        reserved = sum(pool.map(write, ("one", "other")))
    with Ledger(path) as ledger:
        assert len(list(ledger.rows())) == 1000 and ledger.check() == []
        spent = ledger.spent()
    assert spent["requests"] == reserved <= 700
    assert spent["tokens"] == 10 * reserved - 1000 <= 6005
    assert spent["cost"] == pytest.approx(0.01 * reserved - 1.0)


def test_a_limit_is_the_same_for_one_by_one_and_all_at_once(path):
    limits = Limits(max_requests=7, max_total_tokens=100, max_cost=1.0)
    with Ledger(path) as ledger:
        assert [ledger.reserve(20, 0.1, limits) for _ in range(7)] == [True] * 5 + [False] * 2
        assert ledger.reserve(0, 0.1, limits) and ledger.reserve(0, 0.1, limits) and not ledger.reserve(0, 0, limits)


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_writer_loses_nothing_that_was_put(path, seed):
    """Every key that it printed after `put` returned is there."""
    client = subprocess.Popen([sys.executable, "-c", WRITER, str(path), "one", "100000"], stdout=subprocess.PIPE)
    said = [client.stdout.readline() for _ in range(random.Random(seed).randrange(50, 2000))]
    os.kill(client.pid, signal.SIGKILL)
    rest = client.communicate()[0].split(b"\n")
    keys = [line.strip().decode() for line in said + rest[:-1] if line.strip()]
    with Ledger(path) as ledger:
        assert ledger.check() == []
        assert len(ledger.get(keys)) == len(keys)
        assert len(list(ledger.rows())) - len(keys) <= 1


# ---- files that are not as they should be


def refused(path, words):
    """The words of the DataError that opening and reading it raises; at most two lines."""
    with pytest.raises(DataError, match=words) as raised:
        rows(path)
    assert len(str(raised.value).splitlines()) <= 2 and str(path) in str(raised.value)
    return str(raised.value)


def test_a_schema_1_ledger_is_upgraded_with_its_replies(path, capsys):
    with sqlite3.connect(path) as database:
        for statement in ledger_file._SCHEMAS[0].split(";"):
            database.execute(statement)
        # its keys were hashes of the request as JSON throughout
        text = json.dumps(request(1), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        row = (
            hashlib.sha256(text.encode()).hexdigest(),
            json.dumps(request(1)),
            json.dumps(reply(1)),
            "http://somewhere/v1",
            1e9,
        )
        database.execute("INSERT INTO replies VALUES (?, ?, ?, ?, ?)", row)
        database.execute("UPDATE spent SET requests = 1, tokens = 30, cost = 0.25")
        database.execute("PRAGMA user_version = 1")
    database.close()
    with ThreadPoolExecutor(8) as pool:  # also where many open it at once
        assert (
            list(pool.map(lambda _: rows(path), range(8)))
            == [[(request_key(request(1)), request(1), reply(1), "http://somewhere/v1", 1e9)]] * 8
        )
    with Ledger(path) as ledger:
        assert ledger.spent() == {"requests": 1, "tokens": 30, "cost": 0.25} and ledger.jobs() == []
        ledger.add_job("mark", None, "KEY", [("key", request(2), 1, 0.0)])
        assert [job.requests for job in ledger.jobs()] == [1]


def test_a_new_file_may_be_opened_by_many_at_once(path):
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: rows(path), range(16))) == [[]] * 16


@pytest.mark.parametrize(
    "content", [b"not a database at all, but long enough to look like one" * 100, os.urandom(9000)]
)
def test_garbage_is_refused_and_left_alone(path, content):
    path.write_bytes(content)
    refused(path, "not a database")
    assert path.read_bytes() == content


def test_a_newer_or_foreign_file_is_refused_and_left_alone(path):
    for statement, words in (
        ("PRAGMA user_version = 99", "newer hf_reflect"),
        ("CREATE TABLE t (x)", "something else"),
    ):
        path.unlink(missing_ok=True)
        with sqlite3.connect(path) as database:
            database.execute(statement)
        database.close()
        before = path.read_bytes()
        refused(path, words)
        assert path.read_bytes() == before


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_zeroed_pages_are_said_to_be_damage_and_stats_says_so(path, share, capsys):
    fill(path, 2000)
    with Ledger(path) as ledger:
        ledger.vacuum()
    data = bytearray(path.read_bytes())
    start = int(len(data) * share) // 4096 * 4096
    data[start : start + 3 * 4096] = bytes(3 * 4096)
    path.write_bytes(data)
    words = refused(path, "malformed|damaged|no JSON")
    assert "restore it from a copy" in words
    main(["stats", str(path)])
    out, said = capsys.readouterr()
    assert "malformed" in said or "integrity      ok" not in out
    assert "Traceback" not in said and len(said.splitlines()) <= 2


def test_a_truncated_file_is_said_to_be_damaged(path):
    fill(path, 2000)
    with Ledger(path) as ledger:
        ledger.vacuum()
    path.write_bytes(path.read_bytes()[: 20 * 4096])
    refused(path, "malformed|damaged")


def test_a_stored_reply_that_is_no_json_is_damage(path):
    fill(path, 3)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE replies SET reply = '{\"text\": '")
    database.close()
    refused(path, "no JSON any more")
    with Ledger(path) as ledger, pytest.raises(DataError, match="no JSON any more"):
        ledger.get([request_key(request(0))])


def test_a_folder_is_no_ledger(tmp_path):
    assert "Name a file: this is a folder" in refused(tmp_path, "unable to open")


@pytest.mark.parametrize("where", ["/proc/ledger.sqlite", "/proc/no/ledger.sqlite", "/sys/ledger.sqlite"])
def test_a_folder_that_cannot_be_written_is_said(where):
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    assert "folder that can be written" in refused(Path(where), "cannot be used")


def mounted(script, *arguments):
    """Run a shell script that may mount, for itself alone, and exits with 77 where it may not."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare")
    ran = subprocess.run(["unshare", "-m", "sh", "-c", script, *arguments], capture_output=True, text=True)
    if ran.returncode == 77 or "unshare:" in ran.stderr:
        pytest.skip(f"cannot mount here: {ran.stderr.strip()[:100]}")
    return ran


def test_a_file_in_a_read_only_file_system_is_said_and_readable_elsewhere(path):
    """Mounted so for one process only, where one may mount at all."""
    fill(path, 3)
    script = f"mount --bind {path.parent} {path.parent} && mount -o remount,ro,bind {path.parent} || exit 77; "
    ran = mounted(script + f"{sys.executable} -m hf_reflect.ledger stats {path}")
    assert ran.returncode == 1 and "Traceback" not in ran.stderr and len(ran.stderr.splitlines()) <= 2, ran.stderr
    assert len(rows(path)) == 3


FULL = """
import sys
from hf_reflect.errors import DataError
from hf_reflect.ledger import Ledger, request_key
try:
    with Ledger(sys.argv[1]) as ledger:
        for number in range(100000):
            request = {"model": "m", "messages": [{"content": f"{number}"}]}
            ledger.put(request_key(request), request, {"text": "x" * 5000})
            print(request_key(request), flush=True)
except DataError as error:
    sys.exit(str(error))
"""


def check_full(ran, path):
    assert ran.returncode == 1 and "Traceback" not in ran.stderr, ran.stderr
    assert "Make room on the disk" in ran.stderr and "untouched" in ran.stderr
    assert len(ran.stderr.splitlines()) <= 2
    keys = ran.stdout.split()
    with Ledger(path) as ledger:
        assert ledger.check() == [] and len(keys) > 10
        assert len(ledger.get(keys)) == len(keys) == len(list(ledger.rows()))
        ledger.put("another", {}, {})


def test_past_the_largest_file_the_disk_is_said_to_be_full_and_what_was_put_is_there(path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))

    command = [sys.executable, "-c", FULL, str(path)]
    check_full(subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files), path)


def test_on_a_full_disk_what_was_put_is_there(path, tmp_path):
    """A file system of a megabyte, mounted for this process only; its ledger is copied out when it is full."""
    mount, command = tmp_path / "small", [sys.executable, "-c", FULL]
    mount.mkdir()
    script = f'mount -t tmpfs -o size=2m none {mount} || exit 77; "$@" {mount}/ledger.sqlite; code=$?; '
    script += f"cp {mount}/ledger.sqlite* {tmp_path}; exit $code"
    check_full(mounted(script, "sh", *command), path)


def test_a_transaction_is_all_or_nothing(path):
    fill(path, 2)
    with Ledger(path) as ledger:
        with pytest.raises(KeyError), ledger.transaction():
            ledger.put("a", {}, {})
            ledger.reserve(100, 1.0)
            raise KeyError
        assert len(list(ledger.rows())) == 2 and ledger.spent()["tokens"] == 3
        job = ledger.add_job("mark", None, "KEY", [("k1", request(1), 7, 0.5), ("k2", request(2), 7, 0.5)])
        for _ in range(2):
            ledger.reserve(7, 0.5)
        before = ledger.spent()
        assert ledger.settle("k1", job + 1) is None and ledger.settle("k1", job) == (request(1), 7, 0.5)
        assert ledger.settle("k1", job) is None
        assert ledger.release(job, "expired") == ["k2"] and ledger.release(job, "expired") == []
        assert ledger.spent() == {name: before[name] - by for name, by in zip(before, (1, 7, 0.5), strict=True)}
        assert ledger.jobs() == [] and ledger.jobs(open_only=False)[0].state == "expired"

"""Publishing on the Hub, against one that speaks its HTTP on loopback. What talks to it runs in another process, whose
environment names it, since huggingface_hub reads that when it is imported."""

import json
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime

import datasets
import pyarrow.parquet as pq
import pytest
from conftest import ROWS, scripted_teacher
from hub import READER, STRANGER, WRITER, Fault, Hub

from hf_reflect import ReflectionTransform, select, to_pairs
from hf_reflect.errors import DataError, HubError, SettingsError

PROVENANCE = {"teacher": {"model": "scripted"}, "rule": "reflected", "source_dataset": "someone/some-data"}
TERMS = {"license": "cc-by-4.0", "teacher_terms": "https://example.org/terms"}
KEY = "sk-" + "written-for-tests" * 2


@pytest.fixture(scope="session")
def hub():
    with Hub() as server:
        yield server


@pytest.fixture(autouse=True)
def no_faults(request):
    if "hub" in request.fixturenames:
        server = request.getfixturevalue("hub")
        server.faults.clear()
        server.requests.clear()


@pytest.fixture(scope="session")
def at_hub(hub, tmp_path_factory):
    """Calls a function of this module in a process that talks to the Hub, as its writer."""
    environment = hub.environment(HF_HOME=str(tmp_path_factory.mktemp("home")), TQDM_DISABLE="1")
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            process.submit(loaded_modules).result()
            os.environ.clear()
            os.environ.update(before)
            yield lambda function, *arguments, **named: process.submit(function, *arguments, **named).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def tables():
    """(candidates, selected): all versions with invented scores, some of them null, and the most rewritten of each."""
    rows = [{**row, "note": None, "topic": number % 2} for number, row in enumerate(ROWS)]
    features = datasets.Features(
        {
            **{name: datasets.Value("string") for name in ("instruction", "input", "output", "note")},
            "topic": datasets.ClassLabel(names=["land", "words"]),
        }
    )
    pairs = to_pairs(datasets.Dataset.from_list(rows, features=features))
    for part in ("instruction", "response"):
        transform = ReflectionTransform(scripted_teacher, part, source="scripted")
        pairs = pairs.map(transform, batched=True, load_from_cache_file=False)
    unusable = [2, 3]
    texts = [None if n in unusable else text for n, text in enumerate(pairs["response"])]
    errors = ["refused: I cannot" if n in unusable else None for n in range(len(pairs))]
    histories = [[{"role": "system", "content": "Be brief."}] if n % 3 == 0 else [] for n in range(len(pairs))]
    scores = [None if n in unusable else 0.5 + n / 7 for n in range(len(pairs))]
    kept = pairs.features
    for name, column in {"response": texts, "error": errors, "history": histories}.items():
        pairs = pairs.remove_columns(name).add_column(name, column, feature=kept[name])
    candidates = pairs.add_column("ifd", scores, feature=datasets.Value("float64"))
    selected = select(candidates, rule="reflected").remove_columns("ifd")
    selected = selected.add_column("input_ids", [[1, 2]] * len(selected))
    return candidates, selected.add_column("labels", [[1, 2]] * len(selected))


# ---- what the other process does


def loaded_modules():
    import hf_reflect.hub.pushing  # noqa: F401

    os.environ["OPENAI_API_KEY"] = KEY


def push(name, candidates, selected, provenance=None, **named):
    from hf_reflect import push_recycled

    return push_recycled(name, candidates, selected, PROVENANCE | (provenance or {}), **named)


def load(name, *config):
    """Rows and features, as everybody gets them, without any cache of before."""
    table = datasets.load_dataset(name, *config, split="train", download_mode="force_redownload")
    return table.to_list(), table.features


def warnings_of_push(*arguments, **named):
    import logging

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hf_reflect").addHandler(handler)
    try:
        push(*arguments, **named)
    finally:
        logging.getLogger("hf_reflect").removeHandler(handler)
    return said


# ---- round trip


def test_both_configs_come_back_as_they_were_pushed(hub, at_hub, tables):
    candidates, selected = tables
    url = at_hub(push, "writer/round-trip", candidates, selected)
    repository = hub.repositories["datasets", "writer/round-trip"]
    assert url == f"{hub.url}/datasets/writer/round-trip/commit/{repository.head}"
    assert repository.private and len(repository.commits) == 2  # its first commit, and the push

    rows, features = at_hub(load, "writer/round-trip", "candidates")
    assert rows == candidates.to_list() and features == candidates.features
    assert None in [row["response"] for row in rows] and None in [row["ifd"] for row in rows]

    rows, features = at_hub(load, "writer/round-trip")
    by_key = {(row["row_id"], row["variant"], row["source"]): row for row in candidates.to_list()}
    for row, chosen in zip(rows, selected.to_list(), strict=True):
        messages = row.pop("messages")
        assert row == by_key[chosen["row_id"], chosen["variant"], chosen["source"]]
        asked = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
        assert messages[:-2] == row["history"]
        assert [turn["content"] for turn in messages[-2:]] == [asked, row["response"]]
    assert features["topic"] == candidates.features["topic"]


def test_what_was_pushed_verifies(hub, at_hub, tables):
    at_hub(push, "writer/verified", *tables)
    assert at_hub(verified, "writer/verified") == []


def verified(name):
    from hf_reflect import verify

    return verify(name)


def test_the_other_files_say_where_the_rows_come_from(hub, at_hub, tables):
    candidates, selected = tables
    at_hub(push, "recycled", candidates, selected, {"costs": {"response": {"cost": 1.5}}})
    files = hub.repositories["datasets", "writer/recycled"].files  # without a namespace: one's own
    provenance, numbers = (json.loads(files[f"{name}.json"]) for name in ("provenance", "statistics"))
    assert (provenance["format"], provenance["rule"], provenance["seed"]) == (1, "reflected", 0)
    assert provenance["counts"]["selected"]["rows"] == len(selected)
    assert numbers["costs"] == {"response": {"cost": 1.5}} and numbers["errors"] == {"refused": 2}
    assert numbers["sets"]["selected"]["ifd"]["n"] == len(selected)  # the candidates' scores
    checksums = pq.read_table(pa_buffer(files["checksums.parquet"]))
    assert checksums.column_names == ["row_id", "variant", "source", "digest"]
    assert checksums["row_id"].to_pylist() == candidates["row_id"][:]


def pa_buffer(content):
    import pyarrow as pa

    return pa.BufferReader(content)


def test_shuffled_tables_and_columns_of_the_selected_rows_alone_are_published(hub, at_hub, tables):
    candidates, selected = tables
    selected = selected.add_column("judged", list(range(len(selected)))).shuffle(seed=1)
    candidates = candidates.shuffle(seed=2).with_format("numpy")
    at_hub(push, "writer/shuffled", candidates, selected)
    rows, _ = at_hub(load, "writer/shuffled")
    assert [row["judged"] for row in rows] == selected["judged"][:]
    assert [row["row_id"] for row in rows] == selected["row_id"][:]
    assert at_hub(load, "writer/shuffled", "candidates")[0] == candidates.with_format(None).to_list()


def test_a_second_push_replaces_only_what_is_ours(hub, at_hub, tables):
    candidates, selected = tables
    name = "writer/twice"
    at_hub(push, name, candidates, selected)
    files = hub.repositories["datasets", name].files
    card = files["README.md"].decode().replace("- synthetic\n", "- synthetic\n- poetry\n")
    card = card.replace("tags:\n", "# mine\ntags:\n").replace(
        "<!-- hf_reflect:begin", "Paid by the lab. 🐟\n\n<!-- hf_reflect:begin"
    )
    shards = {f"data/train-0000{n}-of-00002.parquet": files["data/train-00000-of-00001.parquet"] for n in (0, 1)}
    hub.edit(name, {"README.md": card.encode(), "notes.txt": b"kept", **shards})
    at_hub(push, name, candidates, selected.select([0, 1]))
    after = hub.repositories["datasets", name].files
    text = after["README.md"].decode()
    assert "Paid by the lab. 🐟" in text and "- poetry" in text and "# mine" in text and after["notes.txt"] == b"kept"
    assert text.count("<!-- hf_reflect:begin") == 1 and "and 2 rows were kept" in text
    assert [path for path in after if path.startswith("data/")] == ["data/train-00000-of-00001.parquet"]
    assert len(at_hub(load, name)[0]) == 2
    assert len(hub.repositories["datasets", name].commits) == 4


def test_large_tables_become_several_files_that_load_in_order(tables, tmp_path, monkeypatch):
    from hf_reflect.hub import contents

    monkeypatch.setattr(contents, "_SHARD_BYTES", 2_000)
    contents.write_contents(tmp_path, *tables, PROVENANCE)
    files = sorted(str(path) for path in (tmp_path / "candidates").glob("*.parquet"))
    assert len(files) > 2
    again = datasets.concatenate_datasets(
        [datasets.Dataset.from_parquet(file, cache_dir=str(tmp_path)) for file in files]
    )
    assert again.to_list() == tables[0].to_list()
    monkeypatch.undo()
    contents.write_contents(tmp_path, *tables, PROVENANCE)
    assert len(list((tmp_path / "candidates").glob("*"))) == 1


def test_columns_of_any_type_come_back_as_they_were(tmp_path):
    from datasets import ClassLabel, List, Translation, Value, load_dataset

    from hf_reflect.hub.contents import write_contents

    texts = {name: Value("string") for name in ("row_id", "variant", "input", "response")}
    features = datasets.Features(
        {
            **texts,
            "instruction": Value("large_string"),
            "nothing": Value("null"),
            "when": Value("timestamp[us]"),
            "label": ClassLabel(names=["a", "b"]),
            "nested": List({"a": Value("int8"), "b": List(Value("float32"))}),
            "two": List(Value("int32"), length=2),
            "bytes": Value("binary"),
            "number": Value("float64"),
            "deep": {"x": Value("string"), "y": {"z": Value("int64")}},
            "words": Translation(["en", "fr"]),
        }
    )
    full = {
        "input": "",
        "when": datetime(2020, 1, 1),
        "label": 1,
        "nested": [{"a": 1, "b": [0.5, None]}],
        "two": [1, 2],
    }
    full |= {
        "bytes": b"\xff",
        "number": float("inf"),
        "deep": {"x": None, "y": {"z": 3}},
        "words": {"en": "a", "fr": None},
    }
    empty = dict.fromkeys(full) | {
        "deep": {"x": "", "y": {"z": None}},
        "words": {"en": None, "fr": ""},
        "number": -0.0,
    }
    always = {"variant": "original", "instruction": "Ask.", "response": "Say.", "nothing": None}
    rows = [{"row_id": str(n), **always, **some} for n, some in enumerate([full, empty, {**full, "nested": []}])]
    candidates = datasets.Dataset.from_list(rows, features=features)
    write_contents(tmp_path / "made", candidates, candidates.select([2, 1]), {"rule": "original"})
    for config, expected in {"candidates": candidates, "default": candidates.select([2, 1])}.items():
        table = load_dataset(str(tmp_path / "made"), config, split="train", cache_dir=str(tmp_path / config))
        assert table.features.items() >= features.items()
        assert table.select_columns(expected.column_names).to_list() == expected.to_list()


def test_pictures_given_by_their_paths_are_published_with_the_table(hub, at_hub, tables, tmp_path):
    from PIL import Image

    Image.new("RGB", (3, 2), (255, 0, 0)).save(tmp_path / "red.png")
    candidates, selected = tables
    red = {"bytes": None, "path": str(tmp_path / "red.png")}
    column = [[red] if n else None for n in range(len(candidates))]
    candidates = candidates.add_column("shown", column, feature=datasets.List(datasets.Image(decode=False)))
    seen = [red] * len(selected)
    at_hub(push, "writer/pictures", candidates, selected.add_column("seen", seen, feature=datasets.Image()))
    content = (tmp_path / "red.png").read_bytes()
    (tmp_path / "red.png").unlink()
    files = hub.repositories["datasets", "writer/pictures"].files
    stored = pq.read_table(pa_buffer(files["candidates/train-00000-of-00001.parquet"]))["shown"]
    assert stored.to_pylist()[:2] == [None, [{"bytes": content, "path": "red.png"}]]
    assert at_hub(verified, "writer/pictures") == []
    rows, _ = at_hub(load, "writer/pictures")
    assert rows[0]["seen"] == {"bytes": content, "path": "red.png"}
    with pytest.raises(DataError, match="in `shown` cannot be read: .*red.png.*Bring it back, or remove the column"):
        push("writer/pictures", candidates, selected)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("empty", [{}], r"The column `empty` holds struct<>, which cannot be published as Parquet"),
        ("view", [b"x"], "The column `view` holds binary_view, which cannot be published as Parquet"),
        ("error", [7], "The column `error` of the table `candidates` holds int64, where text or null is needed"),
    ],
)
def test_a_column_that_cannot_be_published_is_named(tmp_path, name, values, said):
    import pyarrow as pa

    from hf_reflect.hub.contents import write_contents

    kinds = {"empty": pa.struct([]), "view": pa.binary_view(), "error": pa.int64()}
    row = {"row_id": "1", "variant": "original", "instruction": "Ask.", "input": "", "response": "Say."}
    candidates = datasets.Dataset.from_list([row]).add_column(name, pa.array(values, kinds[name]))
    with pytest.raises(DataError, match=said):
        write_contents(tmp_path / "made", candidates, candidates, {"rule": "original"})


def test_a_folder_that_cannot_be_written_is_an_error_that_says_what_to_do(
    hub, at_hub, tables, tmp_path, monkeypatch, capfd
):
    from hf_reflect.hub import contents

    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file, and what is published is a folder"):
        contents.write_contents(tmp_path / "file", *tables)
    with pytest.raises(DataError, match="cannot be written.*Not a directory.*give a folder that may be written to"):
        contents.write_contents(tmp_path / "file" / "folder", *tables)
    monkeypatch.setattr(contents, "_SHARD_BYTES", 1)  # never more files than rows
    datasets.enable_progress_bars()
    try:
        contents.write_contents(tmp_path / "made", *tables, PROVENANCE)
        assert "%|" not in capfd.readouterr().err and not datasets.are_progress_bars_disabled()
    finally:
        datasets.disable_progress_bars()
    assert len(list((tmp_path / "made" / "candidates").iterdir())) == len(tables[0])
    with pytest.raises(DataError, match="cannot be written.*nowhere.*set TMPDIR"):
        at_hub(push_from, str(tmp_path / "nowhere"), "writer/nowhere", *tables)
    assert ("datasets", "writer/nowhere") not in hub.repositories


def push_from(folder, *arguments):
    import tempfile

    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        push(*arguments)
    finally:
        tempfile.tempdir = before


# ---- interrupted


def test_a_push_killed_in_the_middle_leaves_nothing_and_can_be_repeated(hub, tables, tmp_path, monkeypatch, at_hub):
    name = "writer/killed"
    at_hub(push, name, tables[0], tables[1].select([0]))
    before = hub.repositories["datasets", name].head
    hub.held.clear()
    hub.objects.clear()  # other tests sent the same
    hub.faults.append(Fault("PUT", "^/objects/", hold=100))
    for key, value in hub.environment(HF_HOME=str(tmp_path), TQDM_DISABLE="1").items():
        monkeypatch.setenv(key, value)
    process = multiprocessing.get_context("spawn").Process(target=push, args=(name, *tables))
    process.start()
    assert hub.held.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert hub.repositories["datasets", name].head == before
    assert len(at_hub(load, name)[0]) == 1
    at_hub(push, name, *tables)
    assert len(hub.repositories["datasets", name].commits) == 3
    assert len(at_hub(load, name)[0]) == len(tables[1])


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("POST", "/commit/", status=500), "trouble of its own"),
        (Fault("POST", "/commit/", drop=10), "went away"),
        (Fault("POST", "/commit/", status=429, headers={"Retry-After": "77"}), "try again in 77 seconds"),
        (Fault("POST", "/commit/", status=403), "may not write to"),
        (
            Fault("POST", "/commit/", status=403, headers={"X-Error-Message": "Storage is over its limit."}),
            "The Hub says: .*Storage is over its limit",
        ),
        (Fault("PUT", "^/objects/", status=400), "refused this for writer/refused"),
    ],
)
def test_a_commit_that_fails_changes_nothing_and_says_how_to_go_on(hub, at_hub, tables, fault, said):
    name = "writer/refused"
    if ("datasets", name) not in hub.repositories:
        at_hub(push, name, *tables)
    before = hub.repositories["datasets", name].head
    hub.objects.clear()
    hub.faults.append(fault)
    with pytest.raises(HubError, match=said) as raised:
        at_hub(push, name, tables[0], tables[1].select([0]))
    assert f"{name} is as it was" in str(raised.value)
    assert hub.repositories["datasets", name].head == before


def test_a_connection_that_breaks_once_while_a_file_is_sent_does_no_harm(hub, at_hub, tables):
    hub.objects.clear()
    hub.faults.append(Fault("PUT", "^/objects/", drop=50))
    at_hub(push, "writer/broken-once", *tables)
    assert not hub.faults[0].times and at_hub(verified, "writer/broken-once") == []


def test_a_hub_that_cannot_be_reached_is_said_before_anything_is_made(hub, at_hub, tables):
    hub.faults.append(Fault("GET", "^/api/whoami", drop=0))
    with pytest.raises(HubError, match="not reached, or went away.*your tables are untouched.*Nothing was sent"):
        at_hub(push, "writer/new", *tables)
    hub.faults.append(Fault("GET", "^/api/whoami", status=429, headers={"RateLimit": '"api";r=0;t=55'}))
    with pytest.raises(HubError, match="takes no more requests for now; try again in 55 seconds"):
        at_hub(push, "writer/new", *tables)
    assert ("datasets", "writer/new") not in hub.repositories


def test_a_first_push_that_fails_leaves_an_empty_repository_that_the_next_one_fills(hub, at_hub, tables):
    name = "writer/first"
    hub.faults += [Fault("POST", "/commit/", lost=False, drop=10), Fault("GET", f"/{name}$", drop=0, after=2)]
    with pytest.raises(HubError, match="Either all of the push arrived.*or writer/first was made, and is empty"):
        at_hub(push, name, *tables)
    hub.faults[:] = [Fault("POST", "/commit/", status=502)]
    with pytest.raises(HubError, match="writer/first is as it was"):
        at_hub(push, name, *tables)
    assert len(hub.repositories["datasets", name].commits) == 1
    at_hub(push, name, *tables)
    assert at_hub(verified, name) == []


def test_a_card_that_the_hub_does_not_take_is_an_error_of_the_card(hub, at_hub, tables):
    hub.faults.append(Fault("POST", "^/api/validate-yaml", status=400))
    with pytest.raises(DataError, match="does not take the card of writer/bad-card.*Mend the metadata or `license`"):
        at_hub(push, "writer/bad-card", *tables)


def test_a_commit_whose_answer_is_lost_counts(hub, at_hub, tables):
    hub.faults.append(Fault("POST", "/commit/", lost=True))
    url = at_hub(push, "writer/lost", *tables)
    repository = hub.repositories["datasets", "writer/lost"]
    assert url.endswith(repository.head) and len(repository.commits) == 2


def test_a_push_by_somebody_else_meanwhile_is_not_overwritten(hub, at_hub, tables):
    name = "writer/meanwhile"
    at_hub(push, name, *tables)
    hub.before_commit = lambda: hub.edit(name, {"README.md": b"# Theirs"})
    try:
        with pytest.raises(
            HubError, match="Somebody else changed writer/meanwhile meanwhile. Run the same call again"
        ):
            at_hub(push, name, tables[0], tables[1].select([0]))
    finally:
        hub.before_commit = None
    assert hub.repositories["datasets", name].files["README.md"] == b"# Theirs"


# ---- who may, and what


@pytest.mark.parametrize(
    ("token", "name", "said"),
    [
        ("hf_" + "unknown" * 5, "writer/new", "does not know this token"),
        (READER, "writer/new", "may only read"),
        (STRANGER, "writer/round-trip", "may not write to writer/round-trip"),
        (WRITER, "nobody/new", "may not write to nobody/new"),
    ],
)
def test_whoever_may_not_write_is_told_so(hub, at_hub, tables, token, name, said):
    before = set(hub.repositories)
    with pytest.raises(HubError, match=said):
        at_hub(push, name, *tables, token=token)
    assert set(hub.repositories) == before


def without_token(*arguments):
    from huggingface_hub import constants

    token = os.environ.pop("HF_TOKEN")
    try:
        push(*arguments)
    finally:
        os.environ["HF_TOKEN"] = token
        assert constants.ENDPOINT.startswith("http://127.0.0.1")


def test_without_a_token_it_says_how_to_log_in(hub, at_hub, tables):
    with pytest.raises(HubError, match="Log in with `hf auth login`, or set HF_TOKEN"):
        at_hub(without_token, "writer/new", *tables)


def test_offline_it_says_so(tables):
    with pytest.raises(HubError, match="HF_HUB_OFFLINE=1 is set"):
        push("writer/new", *tables, token=WRITER)


def test_a_repository_with_other_data_is_left_alone(hub, at_hub, tables):
    hub.make("writer/theirs", {"train.csv": b"a,b\n1,2\n"})
    with pytest.raises(DataError, match="writer/theirs holds data with another schema: train.csv"):
        at_hub(push, "writer/theirs", *tables)
    hub.make("writer/newer", {"provenance.json": b'{"format": 99, "hashes": {}}', "data/x.parquet": b""})
    with pytest.raises(DataError, match="newer hf_reflect"):
        at_hub(push, "writer/newer", *tables)
    assert len(hub.repositories["datasets", "writer/theirs"].commits) == 2


@pytest.mark.parametrize(
    "path", ["pictures/a.png", "words.tar", "train.jsonl.xz", "data/a.txt", "model.pkl", "x.json"]
)
def test_files_of_any_kind_are_other_data(hub, at_hub, tables, path):
    hub.make("writer/others", {path: b"theirs", "README.md": b"# Theirs", "LICENSE-MIT": b"", "notes.txt": b""})
    with pytest.raises(DataError, match=f"holds data with another schema: {path}, and no provenance"):
        at_hub(push, "writer/others", *tables)
    assert len(hub.repositories["datasets", "writer/others"].commits) == 2


@pytest.mark.parametrize("found", [b'{"format": "w3c"}', b'{"format": true, "hashes": {}}', b'{"format": 1}', b"[1]"])
def test_a_provenance_of_another_tool_makes_nothing_ours(hub, at_hub, tables, found):
    theirs = {"provenance.json": found, "data/train-00000-of-00002.parquet": b"theirs"}
    repository = hub.make("writer/w3c", theirs)
    with pytest.raises(DataError, match="holds data with another schema: data/train-00000-of-00002.parquet"):
        at_hub(push, "writer/w3c", *tables)
    assert repository.files.items() >= theirs.items()


def test_what_a_push_said_in_the_card_follows_the_next_and_what_others_said_stays(hub, at_hub, tables):
    name = "writer/follows"
    at_hub(push, name, *tables, {"license": "Ask us", "language": "en"})
    at_hub(push, name, *tables, {"license": "mit", "language": "en", "source_dataset": "someone/else"})
    card = hub.repositories["datasets", name].files["README.md"].decode()
    assert "\nlicense: mit\n" in card and "license_name" not in card
    assert "someone/else" in (head := card.split("---")[1]) and "some-data" not in head
    theirs = card.replace("license: mit", "license: apache-2.0").replace("language: en", "language: [en, la]")
    hub.edit(name, {"README.md": theirs.encode()})
    requests = len(hub.repositories["datasets", name].commits)
    for call in (push, access):
        with pytest.raises(DataError, match="`license: apache-2.0`, and the provenance says 'mit'"):
            at_hub(call, name, *tables, {"license": "mit"})
    assert len(hub.repositories["datasets", name].commits) == requests
    at_hub(push, name, *tables, {"license": "Apache-2.0", "language": "fr"})
    card = hub.repositories["datasets", name].files["README.md"].decode()
    assert "license: apache-2.0" in card and "language: [en, la]" in card


def access(name, candidates, selected, provenance):
    from hf_reflect.hub.pushing import check_access

    check_access(name, provenance)


def test_a_repository_with_only_a_card_is_taken(hub, at_hub, tables):
    hub.make("writer/card-only", {"README.md": b"---\r\nlicense: mit\r\n---\r\n\r\n# Mine\r\n\r\nOwn words.\r\n"})
    at_hub(push, "writer/card-only", *tables)
    card = hub.repositories["datasets", "writer/card-only"].files["README.md"].decode()
    assert card.startswith("---\r\nlicense: mit\r\n") and "# Mine\r\n\r\nOwn words.\r\n" in card
    assert "\n" not in card.replace("\r\n", "")


def test_visibility_is_never_changed(hub, at_hub, tables):
    hub.make("writer/public", {}, private=False)
    with pytest.raises(SettingsError, match="exists and is public, so this push would publish the rows"):
        at_hub(push, "writer/public", *tables)
    hub.make("writer/hidden", {})
    assert any("stays so" in said for said in at_hub(warnings_of_push, "writer/hidden", *tables, TERMS, private=False))
    assert hub.repositories["datasets", "writer/hidden"].private


def test_what_is_allowed_and_perhaps_not_meant_is_said(at_hub, tables):
    first = at_hub(warnings_of_push, "writer/said", *tables, PROVENANCE)
    other = at_hub(warnings_of_push, "writer/said", *tables, PROVENANCE | {"source_dataset": "someone/else"})
    assert not first and any(
        "held rows of someone/some-data; these, of someone/else, replace" in each for each in other
    )
    chosen = at_hub(warnings_of_push, "writer/other-rule", *tables, PROVENANCE | {"rule": "original"})
    assert any(
        "`verify` will not agree with writer/other-rule" in each and "the rule takes" in each for each in chosen
    )


def test_a_public_push_needs_licence_and_terms(hub, at_hub, tables):
    with pytest.raises(SettingsError, match="needs `license` and `teacher_terms`"):
        push("writer/open", *tables, private=False)
    with pytest.raises(SettingsError, match="needs `teacher_terms`: "):
        push("writer/open", *tables, {"licence": "mit"}, private=False)
    at_hub(push, "writer/open", *tables, TERMS, private=False)
    repository = hub.repositories["datasets", "writer/open"]
    assert not repository.private and b"\nlicense: cc-by-4.0\n" in repository.files["README.md"]


@pytest.mark.parametrize("name", ["a/b/c", "writer/a b", "", "writer/..", None])
def test_a_name_that_cannot_be_one_is_refused(tables, name):
    with pytest.raises(SettingsError, match="cannot be the name of a dataset"):
        push(name, *tables)


# ---- reading what was pushed


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 429, "headers": {"Retry-After": "33"}}, "takes no more requests for now; try again in 33 seconds"),
        ({"status": 503}, r"trouble of its own \(status 503\)"),
        ({"status": 403, "headers": {"X-Error-Message": "Not from here."}}, "may not read .*The Hub says: .*Not from"),
        ({"status": 401, "headers": {"X-Error-Message": "Invalid credentials in Authorization header"}}, "this token"),
        ({"drop": 0}, "was not reached, or went away"),
    ],
)
def test_a_hub_that_does_not_let_us_read_is_told_by_its_reason(hub, at_hub, tables, fault, said):
    if ("datasets", "writer/read") not in hub.repositories:
        at_hub(push, "writer/read", *tables)
    hub.faults.append(Fault("GET", "^/api/datasets/writer/read", **fault, times=9))
    with pytest.raises(HubError, match=f"'writer/read' could not be read from the Hub. .*{said}"):
        at_hub(verified, "writer/read")


def test_our_own_mistakes_are_not_the_hub_s(tmp_path):
    from hf_reflect.hub.refusals import hub_errors

    for mistake in (KeyError("name"), TypeError("no"), AssertionError("no"), FileNotFoundError("no")):
        with pytest.raises(type(mistake)), hub_errors("writer/new", ""):
            raise mistake


@pytest.mark.parametrize("token", ["hf_x\n", "hf_\u00fc", "hf_a b", ""])
def test_a_token_that_cannot_be_sent_is_not_shown(tables, token):
    with pytest.raises(SettingsError, match="The token of the Hub .*Copy it once more") as raised:
        push("writer/new", *tables, token=token)
    assert not token or token not in str(raised.value)


# ---- secrets


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("response", f"The key is {KEY}."),
        ("critique", f"see https://example.org/?key={KEY}"),
        ("history", [{"role": "user", "content": f"my token: {WRITER}"}]),
    ],
)
def test_a_secret_anywhere_in_the_rows_stops_the_push(hub, at_hub, tables, column, value):
    candidates, selected = tables
    values = [value if n == 5 else old for n, old in enumerate(candidates[column])]
    told = candidates.remove_columns(column).add_column(column, values, feature=candidates.features[column])
    row = candidates[5]["row_id"]
    with pytest.raises(DataError, match="holds a secret") as raised:
        at_hub(push, "writer/secret", told, selected.filter(lambda each: each["row_id"] != row))
    assert f"column `{column}`" in str(raised.value) and row in str(raised.value)
    assert KEY not in str(raised.value) and WRITER not in str(raised.value)
    assert ("datasets", "writer/secret") not in hub.repositories


def test_a_secret_in_a_column_s_name_the_provenance_or_the_card_stops_the_push(hub, at_hub, tables):
    candidates, selected = tables
    with pytest.raises(DataError, match="the name of a column") as raised:
        at_hub(push, "writer/secret", candidates.rename_column("note", KEY), selected)
    assert KEY not in str(raised.value)
    with pytest.raises(DataError, match="OPENAI_API_KEY is in provenance.json"):
        at_hub(push, "writer/secret", *tables, {"note": f"asked with {KEY}"})
    hub.make("writer/told", {"README.md": f"# Mine\n\nexport HF_TOKEN={WRITER}\n".encode()})
    with pytest.raises(DataError, match="in README.md, line"):
        at_hub(push, "writer/told", *tables)
    assert ("datasets", "writer/secret") not in hub.repositories


def test_only_what_looks_like_a_secret_is_one(monkeypatch):
    from hf_reflect.hub.secrets import known_secrets

    for name, value in {
        "MY_SERVICE_API_KEY": "0123456789ab",
        "SHORT_TOKEN": "0123456789a",
        "TOKENIZERS_PARALLELISM": "false-and-much-longer",
        "NAMED_BY_ME": "1234567x",
        "db_password": "correct horse battery",
        "TOGETHER_KEY": "tgp-0123456789",
        "GITHUB_PAT": "ghp-0123456789",
        "API_KEY": "plain-0123456789",
        "AWS_SECRET_ACCESS_KEY": "aws-0123456789",
        "PGPASSWORD": "postgres-0123456789",
        "OPENAI_API_KEY": "placeholder",
        "SSH_KEY": __file__,
        "MAX_TOKEN": "123456789012",
        "MONKEY": "no-key-of-anything",
    }.items():
        monkeypatch.setenv(name, value)
    found = known_secrets({"teacher": {"api_key_env": "NAMED_BY_ME"}}, token="hf_given_one")
    assert found.items() >= {
        ("0123456789ab", "MY_SERVICE_API_KEY"),
        ("1234567x", "NAMED_BY_ME"),
        ("tgp-0123456789", "TOGETHER_KEY"),
        ("ghp-0123456789", "GITHUB_PAT"),
        ("plain-0123456789", "API_KEY"),
        ("aws-0123456789", "AWS_SECRET_ACCESS_KEY"),
        ("postgres-0123456789", "PGPASSWORD"),
        ("correct horse battery", "db_password"),
        ("hf_given_one", "the Hub token that was given"),
    }
    assert known_secrets({"api_key_env": "NAMED_BY_ME"})["1234567x"] == "NAMED_BY_ME"
    others = {"0123456789a", "false-and-much-longer", "placeholder", __file__, "123456789012", "no-key-of-anything"}
    assert not others & found.keys()


def test_a_secret_that_is_no_utf8_is_found_and_harms_nothing(tmp_path, monkeypatch):
    from hf_reflect.hub.secrets import known_secrets, refuse_secrets

    secret = b"\xe9\xe8geheim-0123"
    monkeypatch.setenv("DB_PASSWORD", os.fsdecode(secret))
    table = datasets.Dataset.from_dict({"blob": [b"x", b"a" + secret], "text": ["é", "è"]})
    table.select([0]).to_parquet(tmp_path / "table.parquet")
    refuse_secrets(tmp_path, known_secrets())
    table.to_parquet(tmp_path / "table.parquet")
    (tmp_path / "address.txt").write_text("https://me:%E9%E8geheim-0123@example.org")
    with pytest.raises(DataError, match="DB_PASSWORD is in address.txt") as raised:
        refuse_secrets(tmp_path, known_secrets())
    assert "in table.parquet, column `blob`, row 1" in str(raised.value) and "geheim" not in str(raised.value)


# ---- tables that do not go together


def test_selected_rows_that_are_not_the_candidates_are_refused(tables):
    candidates, selected = tables
    edited = selected.map(lambda row, n: {"response": "Edited." if n == 1 else row["response"]}, with_indices=True)
    with pytest.raises(DataError, match=f"{selected[1]['row_id']}.*another `response` than the candidates: 'Edited.'"):
        push("writer/new", candidates, edited)
    with pytest.raises(DataError, match="not among the candidates"):
        push("writer/new", candidates.select(range(8)), selected)
    with pytest.raises(DataError, match="has no instruction or no response"):
        push("writer/new", candidates, candidates.select([2]))
    with pytest.raises(DataError, match="column 'messages'.*Rename yours"):
        push("writer/new", candidates.rename_column("note", "messages"), selected)
    with pytest.raises(DataError, match="has no rows"):
        push("writer/new", candidates, selected.select([]))
    with pytest.raises(DataError, match="needs the column 'response'"):
        push("writer/new", candidates, selected.remove_columns("response"))

"""Digests of tables that say the same, and what `provenance.json` says of where they come from."""

import datetime
import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Array2D, Dataset, Features, Value, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_reflect import PROMPTS, select
from hf_reflect.errors import DataError, SettingsError
from hf_reflect.hub import provenance_of
from hf_reflect.hub.digests import cells, row_digests, table_digest
from hf_reflect.hub.provenance import KEYS, complete
from hf_reflect.ledger import Ledger, request_key

TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
CELLS = {
    "text": (pa.string(), st.one_of(st.none(), st.text(max_size=3))),
    "number": (pa.int32(), st.one_of(st.none(), st.integers(-3, 3))),
    "score": (pa.float64(), st.one_of(st.none(), st.floats(), st.sampled_from([0.0, -0.0, 1.0, 0.1]))),
    "history": (TURNS, st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=1)}))),
    "image": (pa.binary(), st.one_of(st.none(), st.binary(max_size=2))),
}


def table_of(rows, types=None):
    kinds = {name: (types or {}).get(name, kind) for name, (kind, _) in CELLS.items()}
    return Dataset(pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()}))


def told(value):
    """A cell in words, naively: two cells are the same where these are."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "null"
    if isinstance(value, float):
        return f"float {value + 0.0!r}"
    if isinstance(value, list):
        return f"list {[sorted(each.items()) for each in value]!r}"
    return f"{type(value).__name__} {value!r}"


rows_strategy = st.lists(st.fixed_dictionaries({name: cell for name, (_, cell) in CELLS.items()}), max_size=5)


@settings(max_examples=60, deadline=None)
@given(rows=rows_strategy, order=st.randoms(use_true_random=False))
def test_digests_are_equal_exactly_where_the_cells_are(rows, order):
    digests = row_digests(table_of(rows))
    naive = [tuple((name, told(row[name])) for name in CELLS) for row in rows]
    for n, one in enumerate(naive):
        for m, other in enumerate(naive):
            assert (digests[n] == digests[m]) == (one == other)
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in digests)

    wide = {"text": pa.large_string(), "number": pa.int64(), "image": pa.large_binary()}
    wide["history"] = pa.large_list(pa.struct([("content", pa.large_string()), ("role", pa.string())]))
    other = table_of(rows, wide)
    names = order.sample(other.column_names, len(other.column_names))
    other = other.select_columns(names).add_column("input_ids", [[n] for n in range(len(rows))])
    assert row_digests(other) == digests and table_digest(other) == table_digest(table_of(rows))
    if rows:
        parts = concatenate_datasets([table_of(rows[:1]), table_of(rows[1:])])
        assert row_digests(parts) == digests
        places = order.sample(range(len(rows)), len(rows))
        assert row_digests(parts.select(places)) == [digests[n] for n in places]


def test_a_digest_does_not_change_with_the_version():
    # published checksums hang on it
    row = {"text": "né", "number": 3, "score": 0.1, "history": [{"role": "user", "content": "a"}], "image": b"\x00"}
    words = '["history","image","number","score","text"]'.replace(",", ", ")
    words += '[[{"content":"a","role":"user"}],["bytes","00"],3,0.1,"n\\u00e9"]'
    assert row_digests(table_of([row])) == [hashlib.sha256(words.encode()).hexdigest()[:16]]


def test_names_count_and_order_of_rows_counts_for_the_table():
    table = Dataset.from_dict({"a": ["x", "y"], "b": [1, 2]})
    assert row_digests(table) != row_digests(table.rename_column("b", "c"))
    swapped = table.select([1, 0])
    assert sorted(row_digests(swapped)) == sorted(row_digests(table)) and table_digest(swapped) != table_digest(table)
    assert table_digest(table.select([])) != table_digest(table.remove_columns("b").select([]))


@pytest.mark.parametrize("kind", ["parquet", "disk", "json"])
def test_a_table_that_was_stored_and_read_again_has_the_same_digests(tmp_path, kind, monkeypatch):
    rows = [
        {"t": "a", "f": 0.1, "i": 2**40, "l": [["x"], []], "s": {"b": [1.5], "a": None}, "n": None, "e": []},
        {"t": None, "f": 1e300, "i": None, "l": [], "s": {"b": [], "a": "z"}, "n": None, "e": []},
    ]
    table = Dataset.from_list(rows)
    if kind == "parquet":
        table.to_parquet(tmp_path / "t.parquet")
        again = Dataset.from_parquet(str(tmp_path / "t.parquet"), cache_dir=str(tmp_path))
    elif kind == "disk":
        table.save_to_disk(tmp_path / "t")
        again = Dataset.load_from_disk(tmp_path / "t")
    else:
        table.to_json(tmp_path / "t.jsonl")
        again = Dataset.from_json(str(tmp_path / "t.jsonl"), cache_dir=str(tmp_path), features=table.features)
    assert row_digests(again) == row_digests(table)


def test_times_dates_decimals_arrays_and_categories_count_by_their_value():
    moment = datetime.datetime(2024, 2, 29, 12)
    columns = [pa.array([moment, None], pa.timestamp(unit)) for unit in ("s", "ms", "us", "ns")]
    assert len({tuple(row_digests(Dataset(pa.table({"t": column})))) for column in columns}) == 1
    later = pa.array([moment + datetime.timedelta(microseconds=1), None], pa.timestamp("us"))
    assert row_digests(Dataset(pa.table({"t": later})))[0] != row_digests(Dataset(pa.table({"t": columns[0]})))[0]
    square = Dataset.from_dict({"a": [[[1, 2], [3, 4]]]}, features=Features({"a": Array2D((2, 2), "int32")}))
    assert cells(square, "a") == [[[1, 2], [3, 4]]]
    words = pa.array(["x", "y", "x", None]).dictionary_encode()
    assert row_digests(Dataset(pa.table({"w": words}))) == row_digests(Dataset.from_dict({"w": ["x", "y", "x", None]}))
    half = Dataset.from_dict({"h": [0.5, float("nan")]}, features=Features({"h": Value("float16")}))
    assert row_digests(half) == row_digests(Dataset.from_dict({"h": [0.5, None]}))
    fixed = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int8(), 2))
    assert cells(Dataset(pa.table({"f": fixed})), "f") == [[1, 2], None, [3, 4]]


# ---- what is completed


@pytest.fixture
def tables(candidates):
    numbers = np.linspace(0.1, 0.9, len(candidates))
    for name in ("ifd", "r_ifd"):
        candidates = candidates.add_column(name, numbers[:: 1 if name == "ifd" else -1])
    return candidates, select(candidates)


def test_nothing_said_is_completed_by_what_can_be_seen(tables):
    found = complete(None, *tables)
    assert set(KEYS) <= set(found) and json.loads(json.dumps(found)) == found
    choice = {"rule": "paper", "ifd_gate": 1.0, "r_ifd_gate": 1.0, "keep": "reflected", "seed": 0, "reflect": "all"}
    assert choice.items() <= found.items()
    assert all(found[name] is None for name in ("teacher", "student", "teacher_terms", "license", "source_revision"))
    assert datetime.datetime.fromisoformat(found["created"]).tzinfo is not None
    assert found["versions"]["datasets"] == datasets.__version__ and "hf_reflect" in found["versions"]
    assert found["counts"]["candidates"]["versions"] == len(tables[0])
    assert found["counts"]["selected"]["rows"] == len(tables[1]) and "cut" not in found["counts"]["selected"]
    assert found["hashes"] == {"candidates": table_digest(tables[0]), "default": table_digest(tables[1])}
    assert complete(found, *tables) == found


def test_what_the_user_knows_stays_and_counts_are_those_of_the_tables(tables):
    given = {"licence": "mit", "terms": "ours", "rule": "random", "seed": 5, "counts": "many", "hobby": ["rivers"]}
    given |= {"teacher": {"model": "t", "eos_token": "</s>"}, "versions": {"torch": "1.0"}, "costs": {"a": {"b": 1}}}
    before = json.dumps(given)
    found = complete(given, *tables)
    assert (found["license"], found["teacher_terms"], found["rule"], found["seed"]) == ("mit", "ours", "random", 5)
    assert "licence" not in found and "terms" not in found and found["hobby"] == ["rivers"]
    assert found["versions"]["torch"] == "1.0" and found["counts"]["candidates"]["rows"] == 8
    assert json.dumps(given) == before


def test_prompts_are_told_by_the_hash_of_their_texts(tables):
    plain = complete({"teacher": {"model": "t"}}, *tables)["prompts"]
    assert list(plain) == ["instruction", "response"] and len(set(plain.values())) == 2
    structured = complete({"teacher": {"model": "t", "structured": True}}, *tables)["prompts"]
    assert list(structured) == ["instruction-json", "response-json"]
    own = complete({"prompts": {"response": PROMPTS["instruction"], "mine": "a text"}}, *tables)["prompts"]
    assert own == {"instruction": plain["instruction"], "response": plain["instruction"], "mine": "a text"}
    assert complete({"teacher": None}, *tables)["prompts"] == {}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"teacher": {"model": "t", "api_key": "x"}}, "`teacher.api_key`, which names a secret"),
        ({"token": "hf_x"}, "`token`"),
        ({"hf_token": "hf_x"}, "`hf_token`"),
        ({"a": [{"extra_headers": {"Authorization": "Bearer x"}}]}, "Authorization"),
        ({"a": {"apiKey": "x"}}, "apiKey"),
        ({"a": {"X-Api-Key": "x"}}, "X-Api-Key"),
        ({"model": object()}, "under `model`, which JSON cannot hold"),
        ({"teacher": {"temperature": float("nan")}}, "`teacher.temperature`"),
        ({"ifd_gate": float("inf")}, "`ifd_gate`"),
        ({"rule": "best"}, "best"),
        ({"keep": "all"}, "keep"),
        ({"seed": "0"}, "seed"),
        ({"reflect": "twice"}, "reflect"),
        ({"license": "mit", "licence": "gpl"}, "which differ"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_published_is_an_error_that_names_it(tables, given, words):
    with pytest.raises(SettingsError, match=re.escape(words)):
        complete(given, *tables)


def test_of_a_machines_folders_only_the_last_name_is_left(tables, tmp_path):
    given = {"source_dataset": "~/private/rivers.jsonl", "student": {"model": str(tmp_path / "my-student")}}
    given |= {"teacher": {"model": "org/teacher"}, "where": Path("/home/me/x"), "list": ["/home/me/y", "file:///z/w"]}
    given |= {"page": "https://example.org/a/b", "words": "and/or, either way", "number_of_tokens": 3}
    found = complete(given, *tables)
    assert found["source_dataset"] == "rivers.jsonl" and found["student"]["model"] == "my-student"
    assert found["teacher"]["model"] == "org/teacher" and found["where"] == "x" and found["list"] == ["y", "w"]
    assert found["page"] == given["page"] and found["words"] == given["words"]
    assert complete({"source_dataset": "data/rivers.jsonl"}, *tables)["source_dataset"] == "rivers.jsonl"
    assert complete({"source_dataset": "org/rivers"}, *tables)["source_dataset"] == "org/rivers"


# ---- a run's folder


def make_run(folder, **more):
    settings = {
        "data": {"dataset": "org/rivers", "split": "train", "content": "0", "preselect_share": 0.5},
        "teacher": {"model": "asked", "temperature": 0.0, "structured": True},
        "reflect": {"order": "selective"},
        "student": {"model": "org/student", "revision": "main", "template": "vicuna", "max_length": 1024},
        "selection": {"rule": "ifd", "keep": None, "seed": 3, "ifd_gate": None, "r_ifd_gate": 0.5, "candidates": "0"},
    }
    (folder / "candidates").mkdir(parents=True)
    summary = {"settings": settings | more, "note": "a trial", "costs": {"response": {"cost": 1.5}}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_runs_folder_tells_its_settings_and_who_answered(tmp_path, tables):
    run = make_run(tmp_path / "run")
    with Ledger(run / "ledger.sqlite") as ledger:
        for n, (model, returned) in enumerate(
            [("asked", "asked-2024"), ("asked", "asked-2025")] * 2 + [("judge", "j")]
        ):
            request = {"model": model, "messages": [{"role": "user", "content": str(n)}]}
            ledger.put(request_key(request), request, {"text": "t", "model": returned, "finish_reason": "stop"})
    found = provenance_of(run)
    assert found["teacher"]["model"] == "asked" and found["student"]["template"] == "vicuna"
    assert sorted(found["teacher_models"]) == ["asked-2024", "asked-2025"]
    assert found["teacher_replies"] == {"asked-2024": 2, "asked-2025": 2}
    assert (found["source_dataset"], found["source_split"], found["preselect_share"]) == ("org/rivers", "train", 0.5)
    assert (found["rule"], found["keep"], found["seed"], found["r_ifd_gate"]) == ("ifd", None, 3, 0.5)
    assert (found["reflect"], found["note"], found["costs"]) == ("selective", "a trial", {"response": {"cost": 1.5}})
    assert "instruction-json" in complete(found | {"license": "mit"}, *tables)["prompts"]


def test_revisions_are_those_that_were_loaded_or_that_the_local_cache_knows(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    run = make_run(tmp_path / "run")
    assert "source_revision" not in provenance_of(run) and "commit" not in provenance_of(run)["student"]
    (tmp_path / "cache" / "models--org--student" / "refs").mkdir(parents=True)
    (tmp_path / "cache" / "models--org--student" / "refs" / "main").write_text("c0ffee")
    made_with = run / "candidates" / "made_with.json"
    known = json.loads(made_with.read_text()) if made_with.exists() else {}
    made_with.parent.mkdir(exist_ok=True)
    made_with.write_text(json.dumps(known | {"source": {"rows": 9, "revision": "decaf"}}))
    found = provenance_of(run)
    assert found["source_revision"] == "decaf" and found["student"]["commit"] == "c0ffee"
    (tmp_path / "cache" / "models--org--student" / "refs" / "main").unlink()
    for name in ("one", "another"):
        (tmp_path / "cache" / "models--org--student" / "snapshots" / name).mkdir(parents=True)
    assert "commit" not in provenance_of(run)["student"]  # nobody knows which


def test_a_run_that_chose_from_anothers_candidates_names_who_made_those(tmp_path):
    first = make_run(tmp_path / "first")
    made_with = {"data": {"dataset": "org/rivers", "split": "train"}, "teacher": {"model": "asked"}}
    (first / "candidates" / "made_with.json").write_text(json.dumps(made_with | {"source": {"rows": 9}}))
    data = {"dataset": str(first / "candidates"), "content": "0"}
    found = provenance_of(make_run(tmp_path / "second", data=data, teacher={}, reflect=None))
    assert found["source_dataset"] == "org/rivers" and found["teacher"] == {"model": "asked"}
    assert found["source"] == {"rows": 9} and found["reflect"] == "all"


def test_a_run_that_was_stopped_tells_what_its_tables_were_made_with(tmp_path):
    run = tmp_path / "run"
    (run / "candidates").mkdir(parents=True)
    (run / "candidates" / "made_with.json").write_text(json.dumps({"teacher": {"model": "asked"}}))
    assert provenance_of(run)["teacher"] == {"model": "asked"}
    (run / "summary.json").write_text("[1")
    with pytest.raises(DataError, match=r"summary.json cannot be read"):
        provenance_of(run)


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(DataError, match="is no folder of a run"):
        provenance_of(tmp_path)


def test_importing_the_hub_pulls_in_neither_torch_nor_openai():
    code = "import sys, hf_reflect.hub as h; h.provenance_of, h.verify; print({'torch', 'openai'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

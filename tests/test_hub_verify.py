"""A published table is written, changed by hand in one place, and verified: what is said must name that place."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROWS, scripted_teacher
from datasets import Dataset, concatenate_datasets, load_dataset
from hub import STRANGER, WRITER, Hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_reflect import ReflectionTransform, select, to_pairs
from hf_reflect.errors import DataError, HubError
from hf_reflect.hub import verify
from hf_reflect.hub.__main__ import main
from hf_reflect.hub.contents import write_contents
from hf_reflect.recycling import chosen_branches
from hf_reflect.run import content_digest, describe_candidates, describe_selected

LOSSES = (
    "loss_instruction",
    "loss_response",
    "loss_instruction_given_response",
    "loss_response_given_instruction",
)


def with_scores(table, seed=0):
    """Made-up losses, and the ratios that follow; null where a version cannot be used."""
    rng = np.random.default_rng(seed)
    usable = [a is not None and b is not None for a, b in zip(table["instruction"], table["response"], strict=True)]
    alone = rng.uniform(2, 4, (2, len(table)))
    given = alone - rng.uniform(-0.05, 0.9, (2, len(table)))
    columns = dict(zip(LOSSES, (*alone, *given), strict=True))
    columns |= {"ifd": np.exp(given[1] - alone[1]), "r_ifd": np.exp(given[0] - alone[0])}
    for name, values in columns.items():
        kept = [float(value) if ok else None for value, ok in zip(values, usable, strict=True)]
        table = table.add_column(name, pa.array(kept, pa.float64()))
    return table


@pytest.fixture(scope="module")
def scored():
    """All four versions of eight rows; two that a teacher did not give."""
    table = to_pairs(Dataset.from_list(ROWS))
    for part in ("instruction", "response"):
        transform = ReflectionTransform(scripted_teacher, part, source="scripted")
        table = table.map(transform, batched=True, load_from_cache_file=False)
    rows = table.to_list()
    for place, error in ((6, "refused: no"), (13, "truncated: 2048 tokens")):
        rows[place] |= {"instruction": None, "response": None, "error": error}
    return with_scores(Dataset.from_list(rows, features=table.features))


@pytest.fixture(scope="module")
def intact(scored, tmp_path_factory):
    """What was published, and agrees."""
    folder = tmp_path_factory.mktemp("intact") / "published"
    write_contents(folder, scored, select(scored))
    assert verify(folder) == []
    return folder


@pytest.fixture
def published(intact, tmp_path):
    """A copy to be changed."""
    return shutil.copytree(intact, tmp_path / "published")


def edit(folder, config, change):
    """Put `change(table)` in a table's place."""
    path = folder / {"default": "data", "candidates": "candidates"}[config] / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(change(table), path)


def put(table, place, column, value):
    index = table.schema.get_field_index(column)
    values = table.column(column).to_pylist()
    values[place] = value
    return table.set_column(index, table.schema.field(column), pa.array(values, table.schema.field(column).type))


def rows_of(folder, config):
    name = {"default": "data", "candidates": "candidates"}[config]
    return pq.read_table(folder / name / "train-00000-of-00001.parquet").to_pylist()


def place_of(rows, **wanted):
    return next(n for n, row in enumerate(rows) if all(row[name] == value for name, value in wanted.items()))


def edit_json(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def one(found, *words):
    """The only sentence that has all these words."""
    having = [sentence for sentence in found if all(word in sentence for word in words)]
    assert len(having) == 1, (words, found)
    return having[0]


# ---- what was published as it is


@pytest.mark.parametrize(
    "choice",
    [
        {"rule": "paper"},
        {"rule": "paper", "ifd_gate": 0.6, "r_ifd_gate": None},
        {"rule": "random", "seed": 7, "keep": None},
        {"rule": "ifd", "ifd_gate": None, "r_ifd_gate": None, "keep": None},
        {"rule": "longest"},
        {"rule": "instruction"},
    ],
    ids=str,
)
def test_what_was_just_written_agrees(scored, tmp_path, choice):
    write_contents(tmp_path, scored, select(scored, **choice), choice)
    assert verify(tmp_path) == []


def test_several_sources_agree_and_each_is_named_by_its_own(scored, tmp_path):
    other = scored.select([n for n, variant in enumerate(scored["variant"]) if variant != "original"])
    other = other.remove_columns("source").add_column("source", ["second"] * len(other))
    other = with_scores(other.remove_columns([*LOSSES, "ifd", "r_ifd"]), seed=1)
    both = concatenate_datasets([scored, other.select_columns(scored.column_names)])
    write_contents(tmp_path, both, select(both))
    assert verify(tmp_path) == []
    place = place_of(rows_of(tmp_path, "candidates"), variant="response", source="second")
    edit(tmp_path, "candidates", lambda table: put(table, place, "ifd", 0.125))
    one(verify(tmp_path), "source 'second'", "`ifd` 0.125", "losses give")


def test_a_table_without_source_agrees(scored, tmp_path):
    table = scored.remove_columns("source")
    write_contents(tmp_path, table, select(table))
    assert verify(tmp_path) == []


def test_with_selective_reflection_only_the_chosen_branches_play(scored, tmp_path):
    rows = scored.to_list()
    ratio = {(row["row_id"], row["variant"]): row["ifd"] or 0 for row in rows}
    taken = {row_id: ratio[row_id, "instruction"] > ratio[row_id, "original"] for row_id in scored["row_id"]}
    asked = {True: ("original", "instruction", "instruction+response"), False: ("original", "instruction", "response")}
    table = scored.select([n for n, row in enumerate(rows) if row["variant"] in asked[taken[row["row_id"]]]])
    choice = {"ifd_gate": None, "r_ifd_gate": None, "keep": None, "rule": "r_ifd"}
    selected = select(chosen_branches(table), **choice)
    assert list(selected["variant"]) != list(select(table, **choice)["variant"])  # the order matters here
    write_contents(tmp_path, table, selected, choice | {"reflect": "selective"})
    assert verify(tmp_path) == []
    edit_json(tmp_path / "provenance.json", lambda it: it.update(reflect="all"))
    assert any("the rule takes" in sentence for sentence in verify(tmp_path))


def test_scores_of_float32_agree(scored, tmp_path):
    narrow = scored
    for name in LOSSES:
        values = [None if value is None else float(np.float32(value)) for value in scored[name]]
        narrow = narrow.remove_columns(name).add_column(name, pa.array(values, pa.float64()))
    for name, behind, alone in (("ifd", LOSSES[3], LOSSES[1]), ("r_ifd", LOSSES[2], LOSSES[0])):
        pairs = zip(narrow[behind], narrow[alone], strict=True)
        values = [None if a is None else np.exp(np.float32(a) - np.float32(b)) for a, b in pairs]
        narrow = narrow.remove_columns(name).add_column(name, pa.array(values, pa.float32()))
    write_contents(tmp_path, narrow, select(narrow))
    assert verify(tmp_path) == []


def test_what_datasets_loads_and_writes_again_still_agrees(published, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(published, copy)
    for config, folder in {"default": "data", "candidates": "candidates"}.items():
        table = load_dataset(str(published), config, split="train", cache_dir=str(tmp_path / "cache"))
        table.to_parquet(copy / folder / "train-00000-of-00001.parquet", batch_size=3)
    assert verify(copy) == []


# ---- one thing changed


@pytest.mark.parametrize("column", ["ifd", "r_ifd"])
def test_one_changed_score_is_named_with_what_its_losses_give(published, column):
    row = rows_of(published, "candidates")[9]
    edit(published, "candidates", lambda table: put(table, 9, column, row[column] * (1 + 1e-9)))
    sentence = one(verify(published), "losses give", f"`{column}`")
    assert repr(row["row_id"]) in sentence and f"({row['variant']}" in sentence
    assert repr(row[column] * (1 + 1e-9)) in sentence and repr(row[column]) in sentence
    one(verify(published), "was changed: its digest is", repr(row["row_id"]))


@pytest.mark.parametrize("column", LOSSES)
def test_one_changed_loss_is_named(published, column):
    row = rows_of(published, "candidates")[4]
    edit(published, "candidates", lambda table: put(table, 4, column, row[column] + 0.001))
    ratio = "r_ifd" if "instruction" in column.split("_given")[0] else "ifd"
    assert repr(row["row_id"]) in one(verify(published), f"`{ratio}`", "losses give")


def test_a_score_that_is_gone_is_named(published):
    row = rows_of(published, "candidates")[4]
    edit(published, "candidates", lambda table: put(table, 4, "ifd", None))
    assert repr(row["row_id"]) in one(verify(published), "`ifd` null", "losses give")


def test_a_score_of_a_version_without_text_is_named(published):
    place = place_of(rows_of(published, "candidates"), instruction=None)
    edit(published, "candidates", lambda table: put(table, place, "ifd", 0.5))
    assert repr(rows_of(published, "candidates")[place]["row_id"]) in one(verify(published), "no text, but a `ifd`")


@pytest.mark.parametrize("config", ["default", "candidates"])
def test_a_text_that_was_changed_in_one_table_is_shown_with_both_words(published, config):
    row = rows_of(published, "default")[0]
    place = place_of(rows_of(published, config), **{name: row[name] for name in ("row_id", "variant")})
    edit(published, config, lambda table: put(table, place, "response", row["response"] + " Certainly!"))
    found = verify(published)
    sentence = one(found, "default: ", "has `response`", repr(row["row_id"]))
    assert ("Certainly" in sentence.split("and in the candidates")[0]) == (config == "default")
    assert any(sentence.startswith(f"{config}: the table is not the one that was published") for sentence in found)
    if config == "default":
        assert "Certainly" in one(found, "its texts make", repr(row["row_id"]))


def test_a_changed_message_is_named(published):
    row = rows_of(published, "default")[1]
    messages = [*row["messages"][:-1], {"role": "assistant", "content": "I cannot help with that."}]
    edit(published, "default", lambda table: put(table, 1, "messages", messages))
    sentence = one(verify(published), "`messages`", "its texts make")
    assert repr(row["row_id"]) in sentence and "I cannot help" in sentence


def test_a_row_that_was_taken_out_is_named(published):
    row = rows_of(published, "candidates")[5]
    edit(published, "candidates", lambda table: pa.concat_tables([table[:5], table[6:]]))
    found = verify(published)
    assert repr(row["row_id"]) in one(found, "is missing; checksums.parquet has it", row["variant"])
    assert one(found, "candidates.versions", "is 32", "give 31")


def test_a_row_that_was_put_in_is_named(published):
    new = rows_of(published, "candidates")[5] | {"source": "stranger"}
    edit(published, "candidates", lambda table: pa.concat_tables([table, pa.Table.from_pylist([new], table.schema)]))
    assert "'stranger'" in one(verify(published), "was added; checksums.parquet does not have it")


def test_a_version_that_is_there_twice_is_named(published):
    row = rows_of(published, "candidates")[5]
    edit(published, "candidates", lambda table: pa.concat_tables([table, table[5:6]]))
    assert repr(row["row_id"]) in one(verify(published), "repeat the row_id, variant and source")


@pytest.mark.parametrize("config", ["default", "candidates"])
def test_two_rows_that_changed_places_are_named(published, config):
    first = rows_of(published, config)[0]
    edit(published, config, lambda table: table.take([1, 0, *range(2, len(table))]))
    found = verify(published)
    second = rows_of(published, config)[0]
    sentence = one(found, f"{config}: the rows stand in another order")
    assert repr(second["row_id"]) in sentence and second["row_id"] and first != second
    assert len(found) == 2, found  # that, and the hash


def test_a_selected_row_that_was_exchanged_is_named_with_why_the_rule_takes_another(published):
    row = rows_of(published, "default")[2]
    candidates = rows_of(published, "candidates")
    other = candidates[place_of(candidates, row_id=row["row_id"], variant="original")]
    other |= {"messages": [{"role": "user", "content": other["instruction"]}, {"role": "assistant", "content": ""}]}
    edit(
        published,
        "default",
        lambda table: pa.concat_tables([table[:2], pa.Table.from_pylist([other], table.schema), table[3:]]),
    )
    sentence = one(verify(published), "but the rule takes")
    assert f"row {row['row_id']!r} (original) is there" in sentence and f"({row['variant']}, source" in sentence
    assert "taken" in sentence  # as `decide` tells it


def test_selected_rows_that_are_gone_or_strangers_are_named(published):
    row, last = rows_of(published, "default")[0], rows_of(published, "default")[-1]
    edit(published, "default", lambda table: put(table[1:], len(table) - 2, "row_id", "nobody"))
    found = verify(published)
    assert repr(row["row_id"]) in one(found, "is missing, but the rule keeps it", repr(row["row_id"]))
    assert repr(last["row_id"]) in one(found, "is missing, but the rule keeps it", repr(last["row_id"]))
    one(found, "row 'nobody'", "is not among the candidates")
    one(found, "row 'nobody'", "the candidates have no such row")


def test_other_gates_than_were_used_name_the_rows_that_would_be_dropped(published):
    rows = rows_of(published, "default")
    gate = sorted(row["ifd"] for row in rows)[-1]  # one row is not below it
    edit_json(published / "provenance.json", lambda it: it.update(ifd_gate=gate))
    dropped = next(row for row in rows if row["ifd"] == gate)
    sentence = one(verify(published), "but the rule drops the row")
    assert repr(dropped["row_id"]) in sentence and "ifd not below" in sentence


def test_another_seed_names_rows_of_a_random_choice(scored, tmp_path):
    choice = {"rule": "random", "seed": 3, "keep": None}
    write_contents(tmp_path, scored, select(scored, **choice), choice)
    edit_json(tmp_path / "provenance.json", lambda it: it.update(seed=4))
    assert any("a coin" in sentence for sentence in verify(tmp_path))


def test_of_many_mistakes_of_a_kind_five_are_told_and_the_rest_counted(published):
    edit(published, "candidates", lambda table: put_all(table, "ifd", 0.5))
    found = [sentence for sentence in verify(published) if "`ifd`" in sentence and "losses" in sentence]
    assert len(found) == 6 and found[-1] == "… and 25 more: `ifd` that is not what the losses give."


def put_all(table, column, value):
    for place, old in enumerate(table.column(column).to_pylist()):
        table = table if old is None else put(table, place, column, value)
    return table


def test_numbers_that_were_changed_in_the_files_are_named_with_both(published):
    edit_json(published / "statistics.json", lambda it: it["sets"]["selected"]["ifd"].update(mean=0.25))
    edit_json(published / "provenance.json", lambda it: it["counts"]["selected"]["by_variant"].update(response=99))
    found = verify(published)
    assert len(found) == 2
    one(found, "statistics.json: sets.selected.ifd.mean is 0.25, and the tables give")
    one(found, "counts in provenance.json: selected.by_variant.response is 99, and the tables give")


# ---- files


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("data/train-00000-of-00001.parquet", "data/train-00000-of-00001.parquet is no whole Parquet file"),
        ("candidates/train-00000-of-00001.parquet", "is no whole Parquet file"),
        ("checksums.parquet", "checksums.parquet cannot be read"),
        ("provenance.json", "provenance.json cannot be read"),
        ("statistics.json", "statistics.json cannot be read"),
        ("README.md", "README.md"),
    ],
)
def test_a_file_that_was_cut_off_or_is_gone_is_one_sentence(published, file, words):
    content = (published / file).read_bytes()
    (published / file).write_bytes(content[: len(content) // 2])
    assert any(words in sentence for sentence in verify(published))
    (published / file).unlink()
    one(verify(published), f"{file}", "is missing")


def test_a_page_inside_a_table_that_was_damaged_is_a_sentence(published):
    path = published / "candidates" / "train-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    content[200:900] = bytes(700)
    path.write_bytes(content)
    assert any("candidates" in sentence for sentence in verify(published))


def test_a_table_without_rows_or_with_other_columns_is_one_sentence_each(published):
    edit(published, "candidates", lambda table: table.drop_columns(["ifd"]))
    edit(published, "default", lambda table: table[:0])
    found = verify(published)
    one(found, "data/ has no rows")
    one(found, "candidates: every row has another digest", "a column was added, taken out")


@pytest.mark.parametrize(("column", "value"), [("row_id", None), ("variant", "best")])
def test_a_version_that_nobody_can_tell_is_named_once(published, column, value):
    edit(published, "candidates", lambda table: put(table, 5, column, value))
    one(verify(published), "candidates: 1 of 32 versions")


def test_numbers_that_became_text_are_a_sentence(published):
    def as_text(table):
        table, place = table.replace_schema_metadata(None), table.schema.get_field_index("ifd")
        return table.set_column(place, "ifd", pa.array(["high"] * len(table)))

    edit(published, "candidates", as_text)
    one(verify(published), "The column 'ifd' holds string")


def test_a_table_too_many_is_named(published):
    shutil.copy(published / "data" / "train-00000-of-00001.parquet", published / "data" / "more.parquet")
    one(verify(published), "data/more.parquet is there, and nothing of it was published")
    shutil.move(published / "data" / "more.parquet", published / "data" / "train-00001-of-00002.parquet")
    one(verify(published), "data/train-00000-of-00002.parquet", "is missing")


def test_a_provenance_of_the_future_or_without_a_key_is_named(published):
    edit_json(published / "provenance.json", lambda it: (it.update(format=2), it.pop("student")))
    found = verify(published)
    one(found, "has the format 2")
    one(found, "lacks `student`")


@pytest.mark.parametrize(
    "change",
    [{"rule": "best"}, {"rule": ["paper"]}, {"ifd_gate": "low"}, {"seed": None}, {"reflect": "some"}, {"counts": 3}],
    ids=str,
)
def test_nonsense_in_the_provenance_is_a_sentence(published, change):
    edit_json(published / "provenance.json", lambda it: it.update(change))
    assert verify(published)


def test_a_card_that_lost_its_part_or_reads_other_files_is_named(published):
    text = (published / "README.md").read_text()
    (published / "README.md").write_text(text.replace("hf_reflect:begin", "begin"))
    one(verify(published), "README.md has lost the part")
    (published / "README.md").write_text(text.replace("path: data/", "path: candidates/"))
    one(verify(published), "README.md: the config `default` reads")
    (published / "README.md").write_text("# Rivers\n")
    assert len(verify(published)) == 3


def test_one_config_alone_is_still_checked(published):
    shutil.rmtree(published / "data")
    edit(published, "candidates", lambda table: put(table, 9, "ifd", 0.125))
    found = verify(published)
    one(found, "data/train-00000-of-00001.parquet", "is missing")
    one(found, "`ifd` 0.125", "losses give")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """A published folder that no test changes; each example works on a copy."""
    texts = [f"text {n}" for n in range(12)]
    rows = [
        {"row_id": f"r{n // 4}", "variant": variant, "source": "" if variant == "original" else "t", "input": ""}
        | {"instruction": texts[n], "response": texts[n] * 2, "history": [], "critique": None, "error": None}
        | {"mark": n, "flags": {"good": n % 2 == 0}}
        for n, variant in enumerate(["original", "instruction", "response", "instruction+response"] * 3)
    ]
    table = with_scores(Dataset.from_list(rows))
    folder = tmp_path_factory.mktemp("untouched") / "published"
    choice = {"ifd_gate": None, "r_ifd_gate": None, "keep": None}
    write_contents(folder, table, select(table, **choice), choice)
    assert verify(folder) == []
    return folder


def another(value):
    """A value of the same type, or null."""
    changes = {
        bool: lambda: not value,
        int: lambda: value + 1,
        float: lambda: value * (1 + 1e-8),
        str: lambda: value + "x",
    }
    if isinstance(value, dict):
        return {name: another(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [*value[:-1], another(value[-1])] if value else None
    return changes[type(value)]() if type(value) in changes else None


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_single_changed_cell_is_found(untouched, tmp_path, data):
    config = data.draw(st.sampled_from(["default", "candidates"]))
    rows = rows_of(untouched, config)
    place = data.draw(st.integers(0, len(rows) - 1))
    column = data.draw(st.sampled_from([name for name in rows[0] if name not in ("critique", "error", "history")]))
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(untouched, folder)
    edit(folder, config, lambda table: put(table, place, column, another(rows[place][column])))
    found = verify(folder)
    assert any(repr(rows[place]["row_id"]) in sentence for sentence in found), (config, column, found)


# ---- a run's folder


def make_run(folder, scored, **choice):
    """As a recipe leaves it: no scores in selected/, or old ones; ids beside the texts, settings in the summary."""
    selected = select(scored, **choice).remove_columns([*LOSSES, "ifd"])
    selected = selected.remove_columns("r_ifd").add_column("r_ifd", pa.nulls(len(selected), pa.float64()))
    selected = selected.add_column("input_ids", [[1, 2]] * len(selected)).add_column(
        "labels", [[1, 2]] * len(selected)
    )
    scored.save_to_disk(folder / "candidates")
    selected.save_to_disk(folder / "selected")
    data = {"dataset": "/home/somebody/rivers.jsonl", "split": "train", "content": "0"}
    selection = {"rule": "paper", "ifd_gate": 1.0, "r_ifd_gate": 1.0, "keep": "reflected", "seed": 0, **choice}
    settings = {"data": data, "teacher": {"model": "teacher", "temperature": 0.0}}
    settings |= {"student": {"model": "student"}, "selection": selection | {"candidates": content_digest(scored)}}
    summary = {"hash": "0", "settings": settings, "candidates": describe_candidates(scored)}
    summary |= {"selected": describe_selected(selected, rows_cut=1)}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_run_agrees_and_what_was_changed_in_it_is_named(scored, tmp_path):
    run = make_run(tmp_path / "run", scored, ifd_gate=None)
    assert verify(run) == []
    edit_json(run / "summary.json", lambda it: it["settings"]["selection"].update(keep=None))
    assert any("is missing, but the rule keeps it" in sentence for sentence in verify(run))
    edit_json(run / "summary.json", lambda it: it["settings"]["selection"].update(keep="reflected"))
    rows = scored.to_list()
    rows[9] |= {"ifd": 0.125, "response": "Certainly! " + rows[9]["response"]}
    shutil.rmtree(run / "candidates")
    Dataset.from_list(rows, features=scored.features).save_to_disk(run / "candidates")
    found = verify(run)
    assert repr(rows[9]["row_id"]) in one(found, "`ifd` 0.125", "losses give")
    one(found, "have changed since the student chose")
    assert any(sentence.startswith("selected: row") for sentence in found) and "default: " not in "".join(found)


def test_a_run_that_only_recycled_agrees_and_one_that_lost_files_does_not(scored, tmp_path):
    run = make_run(tmp_path / "run", scored)
    shutil.rmtree(run / "selected")
    edit_json(run / "summary.json", lambda it: it.pop("selected"))
    assert verify(run) == []
    (run / "summary.json").unlink()
    assert verify(run) == ["summary.json is missing: the run was stopped before its end."]
    arrow = next((run / "candidates").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    one(verify(run), "candidates cannot be read as a saved dataset")


def test_a_number_that_was_changed_in_the_card_or_in_the_statistics_is_found(published):
    card, numbers = published / "README.md", published / "statistics.json"
    card.write_text(card.read_text() + "\nMy own words.\n")
    assert verify(published) == []
    before = card.read_text()
    card.write_text(before.replace("| rows |", "| rows, about |"))
    assert card.read_text() != before
    assert verify(published) == [
        "README.md: the part between the markers is not what was published: push again to write it anew."
    ]
    card.write_text(before)
    edit_json(numbers, lambda it: it["sets"]["original"]["response_tokens"].update(mean=12.5, n=8))
    assert verify(published) == ["statistics.json: lengths, costs or coherence are not those that were published."]


def test_a_provenance_without_hashes_is_no_proof(published):
    edit_json(published / "provenance.json", lambda it: it.update(hashes={}))
    assert {"provenance.json lacks the hash of the config `default`."} <= set(verify(published))


# ---- where it is


def test_what_is_not_there_is_an_error_that_says_what_to_do(tmp_path):
    for path, words in (
        (str(tmp_path / "nothing"), "does not exist"),
        (tmp_path, "neither what `push_recycled` publishes"),
        ("no id at all", "neither a folder"),
    ):
        with pytest.raises(DataError, match=words):
            verify(path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        verify(tmp_path / "file")
    with pytest.raises(HubError, match="could not be read from the Hub"):  # tests are offline
        verify("nobody/nothing")


def asked_of(hub, token, repo, tmp_path, command=("verify",)):
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= hub.environment(token, HF_HOME=str(tmp_path / "home"))
    line = [sys.executable, "-m", "hf_reflect.hub", *command, repo]
    return subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)


def test_a_dataset_on_the_hub_is_verified_or_it_is_said_why_it_cannot_be(published, tmp_path):
    edit(published, "candidates", lambda table: put(table, 9, "ifd", 0.125))
    files = {path.relative_to(published).as_posix(): path.read_bytes() for path in published.rglob("*.*")}
    with Hub() as hub:
        repo = f"{hub.users[WRITER].name}/rivers"
        hub.make(repo, files)
        done = asked_of(hub, WRITER, repo, tmp_path)
        assert done.returncode == 1 and "`ifd` 0.125, and its losses give" in done.stdout, done
        done = asked_of(hub, STRANGER, repo, tmp_path)
        assert done.returncode == 2 and "log in" in done.stderr and "Traceback" not in done.stderr, done
    done = asked_of(hub, WRITER, repo, tmp_path)  # downloaded before, but who knows what is there now
    assert done.returncode == 2 and "could not be read from the Hub" in done.stderr, done
    assert "Traceback" not in done.stderr


def test_the_command_pushes_a_run_prints_the_commit_and_what_is_there_agrees(scored, tmp_path, capsys):
    run = make_run(tmp_path / "run", scored)
    with Hub() as hub:
        repo = f"{hub.users[WRITER].name}/rivers"
        done = asked_of(hub, WRITER, repo, tmp_path, ("push", str(run)))
        assert done.returncode == 0 and done.stdout.startswith(f"{hub.url}/datasets/{repo}/commit/"), done
        assert hub.repositories["datasets", repo].private
        done = asked_of(hub, WRITER, repo, tmp_path)
        assert done.returncode == 0 and done.stdout.startswith("OK: "), done
    with pytest.raises(SystemExit):
        main(["push", "--public", str(run), repo])
    assert "--public needs --license" in capsys.readouterr().err


def test_the_command_says_ok_with_counts_or_lists_what_it_found(published, scored, tmp_path, capsys):
    assert main(["verify", str(published)]) == 0
    assert capsys.readouterr().out.startswith("OK: 32 versions of 8 rows, ")
    edit(published, "candidates", lambda table: put(table, 9, "ifd", 0.125))
    assert main(["verify", str(published)]) == 1
    assert "`ifd` 0.125" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    with pytest.raises(SystemExit) as stopped:
        main(["verify"])
    assert stopped.value.code == 2


def test_the_command_writes_a_runs_tables_as_they_would_be_published(scored, tmp_path, capsys):
    run = make_run(tmp_path / "run", scored)
    assert main(["write", str(run), str(tmp_path / "out"), "--license", "cc-by-4.0", "--teacher_terms", "ours"]) == 0
    assert verify(tmp_path / "out") == []
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["license"] == "cc-by-4.0" and provenance["teacher_terms"] == "ours"
    assert provenance["source_dataset"] == "rivers.jsonl" and "/home" not in json.dumps(provenance)
    shutil.rmtree(run / "selected")
    assert main(["write", str(run), str(tmp_path / "more")]) == 1
    assert "has no selected/" in capsys.readouterr().err

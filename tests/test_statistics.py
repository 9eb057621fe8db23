import json
import math
from collections import Counter

import datasets
import numpy as np
import pytest
from conftest import ROWS

from hf_reflect import ReflectionTransform, StudentScorer, Teacher, demo, select, to_pairs
from hf_reflect.errors import DataError
from hf_reflect.report import statistics
from hf_reflect.report.statistics import MEASURES, selected_places


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The demo's pairs, its recorded replies, scored by an untrained student: (candidates, selected, tokenizer)."""
    from conftest import tiny_student

    model, tokenizer = tiny_student()
    teacher = Teacher("written-for-the-demo", ledger=str(tmp_path_factory.mktemp("demo") / "ledger.sqlite"))
    demo.record(teacher)
    table = to_pairs(datasets.load_dataset("json", data_files=demo.PAIRS, split="train"))
    for part in ("instruction", "response"):
        table = table.map(ReflectionTransform(teacher, part), batched=True, load_from_cache_file=False)
    table = StudentScorer(model, tokenizer, "vicuna", 512).score(table)
    return table, select(table, ifd_gate=None, r_ifd_gate=None), tokenizer


def by_hand(rows, tokenizer):
    """Table 6 of a list of rows, one at a time."""

    def number(value):
        try:
            value = value()
        except (TypeError, OverflowError, ZeroDivisionError):
            return None
        return value if value is not None and math.isfinite(value) else None

    found = {name: [] for name in MEASURES}
    for row in rows:
        asked = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        of = {
            "instruction_tokens": lambda asked=asked: len(tokenizer.encode(asked, add_special_tokens=False)),
            "response_tokens": lambda row=row: len(tokenizer.encode(row["response"], add_special_tokens=False)),
            "ppl_instruction": lambda row=row: math.exp(row["loss_instruction"]),
            "ppl_response": lambda row=row: math.exp(row["loss_response"]),
            "ppl_response_given_instruction": lambda row=row: math.exp(row["loss_response_given_instruction"]),
            "coherence": lambda row=row: row.get("coherence"),
            "ifd": lambda row=row: row["ifd"],
            "ifd_of_losses": lambda row=row: row["loss_response_given_instruction"] / row["loss_response"],
            "r_ifd": lambda row=row: row["r_ifd"],
        }
        for name, value in of.items():
            found[name].append(number(value))
    means = {}
    for name, values in found.items():
        there = [value for value in values if value is not None]
        means[name] = {"mean": sum(there) / len(there) if there else None, "n": len(there)}
    return {"rows": len(rows), **means}


def alike(found, expected):
    """Equal but for the rounding of a sum in another order."""
    if not isinstance(expected, dict) or expected["mean"] is None:
        return found == expected
    return found["n"] == expected["n"] and found["mean"] == pytest.approx(expected["mean"], rel=1e-12)


def test_statistics_of_the_demo_equal_an_independent_computation(scored):
    table, selected, tokenizer = scored
    found = statistics(table, selected, tokenizer)
    rows = [row for row in table if row["instruction"] is not None and row["response"] is not None]
    keys = {(row["row_id"], row["variant"]) for row in selected}
    expected = {
        "original": [row for row in rows if row["variant"] == "original"],
        "reflected": [row for row in rows if row["variant"] == "instruction+response"],
        "selected": [row for row in rows if (row["row_id"], row["variant"]) in keys],
    }
    for name, some in expected.items():
        by_name = by_hand(some, tokenizer)
        assert found["sets"][name].keys() == by_name.keys()
        for measure, value in by_name.items():
            assert alike(found["sets"][name][measure], value), (name, measure)
    assert found["rows"] == 48 and found["versions"] == 192 == len(table)
    kept = Counter(selected["variant"])
    both, only = kept["instruction+response"], kept["response"]
    assert found["rewritten"] == {"nothing": 0, "instruction": 0, "response": only, "both": both} and both and only
    unusable = Counter(row["error"].split(":")[0] for row in table if row["response"] is None)
    assert found["errors"] == dict(unusable) and sum(unusable.values()) == 192 - len(rows)
    assert list(found["errors"].values()) == sorted(unusable.values(), reverse=True)
    assert found["remarks"] == {}


def test_a_run_s_selected_rows_have_the_scores_of_its_candidates(scored):
    table, selected, tokenizer = scored
    bare = selected.remove_columns(["ifd", "r_ifd", "loss_response"]).add_column("input_ids", [[1]] * len(selected))
    shuffled = table.shuffle(seed=3)
    found, expected = statistics(shuffled, bare, tokenizer), statistics(table, selected, tokenizer)
    for name, some in expected["sets"].items():
        for measure, value in some.items():
            assert alike(found["sets"][name][measure], value), (name, measure)


def test_what_is_not_finite_is_not_counted():
    pairs = to_pairs(datasets.Dataset.from_list(ROWS[:4]))
    scores = {
        "ifd": [0.5, None, math.inf, math.nan],
        "r_ifd": [None] * 4,
        "loss_response": [0.0, 1.0, 2.0, 900.0],  # exp(900) is no number, and a ratio to 0 is none either
        "loss_response_given_instruction": [1.0, 0.5, 1.0, 450.0],
    }
    for name, values in scores.items():
        pairs = pairs.add_column(name, datasets.Dataset.from_dict({name: values})[name][:])
    found = statistics(pairs)["sets"]["original"]
    assert found["ifd"] == {"mean": 0.5, "n": 1}
    assert found["r_ifd"] == found["coherence"] == found["instruction_tokens"] == {"mean": None, "n": 0}
    assert found["ppl_response"] == {"mean": pytest.approx((1 + math.e + math.e**2) / 3), "n": 3}
    assert found["ifd_of_losses"] == {"mean": pytest.approx(0.5), "n": 3}


def test_it_is_a_plain_dict_that_prints_as_a_table_and_survives_json(scored, tmp_path):
    found = statistics(*scored, costs={"instruction": {"replies": 48, "cost": 0.5}})
    assert isinstance(found, dict)
    found.save(tmp_path / "statistics.json")
    assert json.loads((tmp_path / "statistics.json").read_text()) == found
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["original", "fully", "reflected", "selected"]
    row = next(line for line in lines if line.startswith("r-IFD"))
    assert row.split()[1] == f"{found['sets']['original']['r_ifd']['mean']:.3f}"
    assert "  instruction: replies 48, cost 0.5" in lines
    assert any(line.startswith("  refused") for line in lines)


def test_rows_that_were_only_rewritten_are_the_fully_reflected_ones(pairs):
    from conftest import scripted_teacher

    better = pairs.map(
        ReflectionTransform(scripted_teacher, "response", keep_parent=False), batched=True, load_from_cache_file=False
    )
    found = statistics(better)
    assert found["sets"]["original"]["rows"] == found["sets"]["reflected"]["rows"] == 0
    assert found["rewritten"] is None and found["rows"] == len(pairs)


def test_coherence_is_computed_where_an_encoder_is_named_and_taken_where_it_is_there(candidates, encoder):
    name = str(encoder / "sbert")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(name, device="cpu")
    originals = [row for row in candidates if row["variant"] == "original"]
    cosines = []
    for row in originals:
        x = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        a, b = model.encode([x, row["response"]])
        cosines.append(float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)))
    found = statistics(candidates, encoder=name)["sets"]["original"]["coherence"]
    assert found == {"mean": pytest.approx(np.mean(cosines), rel=1e-5), "n": len(originals)}
    there = candidates.add_column("coherence", [0.25] * len(candidates))
    assert statistics(there, encoder=name)["sets"]["original"]["coherence"]["mean"] == 0.25


def test_misuse_is_said(candidates):
    stranger = candidates.select([0]).map(lambda row: {"row_id": "stranger"})
    with pytest.raises(DataError, match=r"1 of 1 selected rows are not among the candidates, first \('stranger'"):
        statistics(candidates, stranger)
    with pytest.raises(DataError, match="`statistics` needs the columns? 'response'"):
        statistics(candidates.remove_columns("response"))
    with pytest.raises(DataError, match="repeat the row_id, variant and source"):
        statistics(datasets.concatenate_datasets([candidates, candidates]))
    assert selected_places(candidates, candidates.select([5, 2])) == [5, 2]

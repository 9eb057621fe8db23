import builtins

import pytest
import torch
from datasets.fingerprint import Hasher
from test_templates import row_of, table_of

from hf_reflect import StudentScorer
from hf_reflect.errors import SettingsError


def naive_cosine(folder, one, other):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder / "bert"), AutoTokenizer.from_pretrained(folder / "bert")
    with torch.no_grad():
        a, b = (model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in (one, other))
    return (a @ b / a.norm() / b.norm()).item()


ROWS = [
    row_of("Add the numbers.", "42", "17 and 25"),
    row_of("Why?", None),
    row_of("Which is heavier, iron or cork?", "Iron, for the same volume."),
]


@pytest.mark.parametrize("how", ["map", "score", "loaded"])
def test_coherence_is_the_cosine_of_instruction_with_input_and_response(student, encoder, how):
    from sentence_transformers import SentenceTransformer

    named = str(encoder / "sbert")
    scorer = StudentScorer(*student, coherence=SentenceTransformer(named, device="cpu") if how == "loaded" else named)
    table = table_of(*ROWS)
    scored = table.map(scorer, batched=True) if how == "map" else scorer.score(table)
    first, unusable, last = scored["coherence"][:]
    assert unusable is None
    assert first == pytest.approx(naive_cosine(encoder, "Add the numbers.\n17 and 25", "42"), abs=1e-5)
    assert last == pytest.approx(naive_cosine(encoder, ROWS[2]["instruction"], ROWS[2]["response"]), abs=1e-5)
    assert len({round(first, 4), round(last, 4), 1.0}) == 3
    assert scored.features["coherence"].dtype == "float64"
    assert "coherence" not in StudentScorer(*student).score(table).column_names


def test_the_hash_for_map_covers_the_encoder(student, encoder):
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(encoder / "sbert"), device="cpu")
    hashes = {Hasher.hash(StudentScorer(*student, coherence=some)) for some in (None, str(encoder / "sbert"), loaded)}
    with torch.no_grad():
        next(loaded.parameters()).add_(1)
    hashes.add(Hasher.hash(StudentScorer(*student, coherence=loaded)))
    assert len(hashes) == 4


def test_what_is_missing_is_said(student, monkeypatch, tmp_path):
    with pytest.raises(SettingsError, match=r"sentence encoder '.*' cannot be loaded: (.|\n)*all-MiniLM-L6-v2"):
        StudentScorer(*student, coherence=str(tmp_path)).score_rows(ROWS)
    plain = builtins.__import__

    def without(name, *more, **named):
        if name.startswith("sentence_transformers"):
            raise ImportError(name)
        return plain(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingsError, match=r"pip install 'hf_reflect\[coherence\]'"):
        StudentScorer(*student, coherence=str(tmp_path)).score_rows(ROWS)

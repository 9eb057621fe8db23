"""Coherence: how near an instruction and its response lie to each other for a Sentence-BERT model."""

from typing import Any

import numpy as np

from ..columns import is_usable, question
from ..errors import SettingsError
from ..launch import first_line


def load_encoder(encoder: Any, device: str) -> Any:
    """A `SentenceTransformer`, loaded by its name unless it is one.

    Raises:
        SettingsError: the package sentence-transformers is missing, or there is no such model.
    """
    if not isinstance(encoder, str):
        return encoder
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise SettingsError(
            "`coherence` needs the package sentence-transformers, which is not installed: "
            "`pip install 'hf_reflect[coherence]'`. Or leave `coherence` out."
        ) from error
    try:
        return SentenceTransformer(encoder, device=device)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"The sentence encoder {encoder!r} cannot be loaded: {first_line(error)}\nGive the id of "
            "a Sentence-BERT model on the Hub, such as 'sentence-transformers/all-MiniLM-L6-v2', or a local folder."
        ) from error


def coherence_of(encoder: Any, rows: list[dict[str, Any]]) -> list[float | None]:
    """Cosine of the embeddings of x (instruction and input) and y (response); None on unusable rows.

    The encoder reads only as much of a text as it can (`max_seq_length`, often 256 tokens).
    """
    pairs = [
        (question(row["instruction"], row["input"]), row["response"])
        if is_usable(row["instruction"], row["response"])
        else None
        for row in rows
    ]
    texts = list(dict.fromkeys(text for pair in pairs if pair is not None for text in pair))
    if not texts:
        return [None] * len(rows)
    vectors = encoder.encode(texts, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)
    place = {text: number for number, text in enumerate(texts)}
    return [
        None if pair is None else float(np.dot(*(vectors[place[text]].astype(np.float64) for text in pair)))
        for pair in pairs
    ]

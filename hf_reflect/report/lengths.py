"""How long the texts are: in the student's tokens where its tokenizer is at hand, else in characters."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .reading import Reading
from .statistics import tokens_of

_PARTS = ("instruction", "response")


class Remembering:
    """A tokenizer that counts each text once: the statistics and the figures ask for the same ones."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.known = tokenizer, dict[int, int]()

    def __call__(self, texts: list[str], **settings: Any) -> dict[str, list[range]]:
        """As many places as each text has tokens."""
        new = [text for text in dict.fromkeys(texts) if hash(text) not in self.known]
        if new:
            settings |= {"return_attention_mask": False, "verbose": False}
            ids = self.tokenizer(new, **settings)["input_ids"]
            self.known.update(zip(map(hash, new), map(len, ids), strict=True))
        return {"input_ids": [range(self.known[hash(text)]) for text in texts]}


def remembering(tokenizer: Any) -> Remembering | None:
    """This tokenizer, so that it counts each text once; None for none."""
    return tokenizer if tokenizer is None or isinstance(tokenizer, Remembering) else Remembering(tokenizer)


def lengths_of(reading: Reading, places: np.ndarray, tokenizer: Any) -> dict[str, np.ndarray]:
    """Of instructions with their inputs, and of responses, (versions,); known at these places, NaN where unusable."""
    if tokenizer is None:
        return {part: characters(reading, part) for part in _PARTS}
    usable = np.unique(places[reading.usable[places]])
    return dict(zip(_PARTS, tokens_of(reading.candidates, usable, tokenizer), strict=True))


def characters(reading: Reading, part: str) -> np.ndarray:
    """Characters of each version's instruction with its input, or response, (versions,); null is NaN."""
    names = [part, "input"] if part == "instruction" else [part]
    total = np.zeros(len(reading.candidates))
    for name in names:
        length = pc.utf8_length(reading.candidates.data.column(name).cast(pa.large_string())).cast(pa.float64())
        total += np.asarray(length if name == part else length.fill_null(0))
    return total

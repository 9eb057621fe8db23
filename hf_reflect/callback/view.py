"""A training set of fixed length whose versions may change between epochs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset


class CandidateView(torch.utils.data.Dataset):
    """One slot a kept row, each showing one of its versions.

    Which one is in shared memory: dataloader workers that persist over epochs see a change as well.

    Args:
        candidates: all versions, as the trainer prepared them.
        places: of the version in each slot, among the candidates.
    """

    def __init__(self, candidates: Dataset, places: Sequence[int]):
        self.candidates = candidates
        self.slots = torch.tensor(places, dtype=torch.int64).share_memory_()  # (kept rows,)

    def show(self, places: Sequence[int]) -> None:
        """Put other versions of the same rows into the slots."""
        self.slots.copy_(torch.tensor(places, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, slot: int) -> dict[str, Any]:
        return self.candidates[int(self.slots[slot])]

    def __getitems__(self, slots: list[int]) -> list[dict[str, Any]]:
        return self.candidates.__getitems__(self.slots[np.asarray(slots)].tolist())

"""Finished packs on disk, so that a killed run goes on where it was; and digests that tell students apart."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SettingsError
from ..files import whole_file
from .plan import Bin
from .processes import Processes

logger = logging.getLogger(__name__)

_MANIFEST = "scoring.json"


class Checkpoint:
    """A folder of finished packs. Each file holds the losses of some, and appears whole or not at all.

    Packs are as the first run made them, whatever the number of processes that go on with it: the same packs give the
    same bits.

    Args:
        folder: seen by all processes.
        description: what the losses depend on; a later run must bring the same.
        processes: all of them must construct it.

    Raises:
        SettingsError: the folder holds losses of something else (what differs is said).
    """

    def __init__(self, folder: str | os.PathLike, description: dict[str, Any], processes: Processes):
        self.folder, self.processes = Path(folder), processes
        self.description = json.loads(json.dumps(description))
        self._waiting: list[tuple[Bin, np.ndarray]] = []
        self._started = self._written = time.monotonic()
        found = processes.gather(self._read())  # all have looked before anyone writes
        self.before: dict[str, Any] | None = found[0]
        if any(one != self.before for one in found):
            raise SettingsError(f"Not all processes see the same folder {self.folder}: name one on a shared disk.")
        if self.before is not None:
            self._compare(self.before["student"])

    def _read(self) -> dict[str, Any] | None:
        """What the run that began here wrote about itself."""
        manifest = self.folder / _MANIFEST
        if not manifest.exists():
            if any(self.folder.glob("losses-*.npz")):
                raise SettingsError(
                    f"{self.folder} holds losses, but no {_MANIFEST} that says whose they are. Name another "
                    "`checkpoint_dir`, or delete this one to score anew."
                )
            return None
        try:
            before = json.loads(manifest.read_text())
            kinds = {"student": dict, "tokens_per_batch": int, "shares": int}
            if wrong := [name for name, kind in kinds.items() if type(before[name]) is not kind or not before[name]]:
                raise ValueError(f"{wrong[0]}: {before[wrong[0]]!r}")
            return {name: before[name] for name in kinds}
        except (ValueError, KeyError, TypeError) as error:
            raise SettingsError(
                f"{manifest} cannot be read ({error!r}). Name another `checkpoint_dir`, or delete this one to score "
                "anew."
            ) from error

    def _compare(self, before: dict[str, Any]) -> None:
        for name, now in self.description.items():
            if before.get(name) != now:
                raise SettingsError(
                    f"{self.folder} holds scores that were made with another {name}: {before.get(name)}, not {now}. "
                    "Name another `checkpoint_dir`, or delete this one to score anew."
                )

    @property
    def tokens_per_batch(self) -> int | None:
        """Of the run that began here; None where this is the first."""
        return None if self.before is None else self.before["tokens_per_batch"]

    def settled(self, limit: int, shares: int) -> tuple[int, int]:
        """Tokens of a pack, and number of shares: as the first run had them; this one's where this is the first."""
        if self.before is None:
            self.before = {"student": self.description, "tokens_per_batch": limit, "shares": shares}
            if self.processes.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                with whole_file(self.folder / _MANIFEST) as file:
                    file.write(json.dumps(self.before, indent=2).encode())
        self.processes.gather(None)  # nobody looks at the folder before it is there
        return self.before["tokens_per_batch"], self.before["shares"]

    def load(self, values: np.ndarray) -> set[tuple[int, int]]:
        """Rank 0 puts what is there into `values` (rows, 4); all learn which packs that is. Damaged files are left."""
        done = set()
        if self.processes.rank == 0:
            for path in sorted(self.folder.glob("losses-*.npz")):
                try:
                    with np.load(path) as shard:
                        rows, some, packs, of = (shard[name] for name in ("rows", "values", "packs", "of"))
                except Exception as error:  # numpy and zipfile have a dozen words for it
                    logger.warning("%s is damaged (%s): its rows are scored anew.", path, error)
                    continue
                if str(of) == self._of:
                    values[rows] = some
                    done |= {(int(share), int(number)) for share, number in packs}
        return self.processes.gather(done)[0]  # nobody writes before rank 0 has looked

    @property
    def _of(self) -> str:
        """A digest of what the losses in a file depend on."""
        return hashlib.sha256(json.dumps(self.before, sort_keys=True).encode()).hexdigest()

    def add(self, done: Bin, values: np.ndarray) -> None:
        """A pack is finished. Files come each second, later each hundredth of the time so far."""
        self._waiting.append((done, values))
        now = time.monotonic()
        if now - self._written >= max(1.0, 0.01 * (now - self._started)):
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        packs = np.array([(done.share, done.number) for done, _ in self._waiting])
        rows = np.concatenate([done.rows for done, _ in self._waiting])
        values = np.concatenate([some for _, some in self._waiting])
        share, number = packs[0]
        with whole_file(self.folder / f"losses-{share:04d}-{number:07d}.npz") as file:
            np.savez(file, packs=packs, rows=rows, values=values, of=np.array(self._of))
        self._waiting, self._written = [], time.monotonic()


def digest_of_weights(model: Any) -> str:
    """A cheap digest of all weights (20 GB/s); equal weights under equal names digest alike.

    Of a model in parts (ZeRO-3, FSDP) all processes must call.
    """
    import torch
    import xxhash

    digest = xxhash.xxh3_128()
    for name, tensor in _tensors(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _tensors(model: Any) -> Iterable[tuple[str, Any]]:
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        from deepspeed import zero

        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            with zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
                yield name, parameter
        return
    state = model.state_dict()
    if any(getattr(tensor, "is_meta", False) for tensor in state.values()):  # offloaded by accelerate
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        state = get_state_dict_offloaded_model(model)
    for name, tensor in state.items():
        if hasattr(tensor, "full_tensor"):
            yield name, tensor.full_tensor()
        elif hasattr(tensor, "detach"):
            yield name, tensor


def digest_of_rows(rows: Iterable[tuple[int, dict[str, Any]]]) -> str:
    """Of the texts to score, in their order."""
    import xxhash

    digest = xxhash.xxh3_128()
    for _, row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()

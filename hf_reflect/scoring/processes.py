"""What the processes of a launch tell each other while they score, and what rank 0 tells people."""

import sys
import time
from typing import Any

_SAY_EVERY = 60.0  # seconds, where stderr is no terminal


class Processes:
    """All processes of the launch, or this one `alone`."""

    def __init__(self, alone: bool = False):
        self.rank, self.count = 0, 1
        if not alone:
            from accelerate import PartialState

            state = PartialState()
            self.rank, self.count = state.process_index, state.num_processes

    def gather(self, value: Any) -> list[Any]:
        """The value of each process; all must call."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])


class Progress:
    """Tokens scored by all processes, tokens a second, time left: a bar on rank 0, a line a minute without a terminal.

    Args:
        shown: whether this process says anything.
        total: tokens to score.
    """

    def __init__(self, shown: bool, total: int):
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        form = "Scoring: {percentage:3.0f}%|{bar}| {total_fmt} tokens, {rate_fmt}, {remaining} left"
        # leave=None: below the bar of a training it goes when it is done
        self.bar = tqdm(
            total=total, bar_format=form, unit=" tokens", unit_scale=True, dynamic_ncols=True,
            leave=None, disable=not (shown and terminal),
        )  # fmt: skip
        self.shown, self.total, self.done = shown and not terminal, total, 0
        self.started = self.said = time.monotonic()

    def add(self, tokens: int) -> None:
        """So many more are scored."""
        self.done += tokens
        self.bar.update(tokens)
        now = time.monotonic()
        if self.shown and now - self.said >= _SAY_EVERY:
            rate = self.done / (now - self.started)
            left = self.bar.format_interval((self.total - self.done) / rate)
            share = f"{self.done:,} of {self.total:,} tokens"
            print(f"Scoring: {share}, {rate:,.0f} tokens/s, {left} left", file=sys.stderr, flush=True)
            self.said = now

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

"""One round of asking: what live requests and batch jobs have in common."""

import asyncio
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import BudgetExceeded, Interrupted
from ..ledger import Ledger, Locked
from .replies import Question

if TYPE_CHECKING:
    from . import Teacher

GRACE = 4.0  # seconds that requests in flight have to come back after Ctrl-C or SIGTERM
_LOCKED_AT_MOST, _LOCKED_PAUSE = 60.0, 0.1  # seconds that another process may write for, and between two tries
_SAY_EVERY = 60.0  # seconds between two lines where there is no terminal


class Round(ABC):
    """One round of asking, on one event loop: commits, progress, and the reason to stop."""

    def __init__(self, teacher: "Teacher", ledger: Ledger, progress: "Progress"):
        self.teacher, self.ledger, self.progress = teacher, ledger, progress
        self.stopped: BaseException | None = None
        self.interrupted = self.budget_said = False
        self.halt = asyncio.Event()  # set once there is a reason to stop
        self.at_once = asyncio.Event()  # set where what is in flight is not waited for any longer
        self._waiting: list[tuple[Callable[[], Any], asyncio.Future]] = []
        self._locked_since: float | None = None

    def stop(self, reason: BaseException) -> None:
        """Send nothing more; the first reason is the one that is raised."""
        self.stopped = self.stopped or reason
        self.halt.set()

    async def commit(self, work: Callable[[], Any]) -> Any:
        """Do this to the ledger and return once it is durable; all that one turn of the loop brings is one commit."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._commit)
        future = loop.create_future()
        self._waiting.append((work, future))
        return await future

    def _commit(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            with self.ledger.transaction():
                results = [work() for work, _ in waiting]
        except Exception as error:
            if isinstance(error, Locked) and self._may_wait():
                # another process imports or tidies up: what is paid for waits, and Ctrl-C works meanwhile
                self._waiting = waiting + self._waiting
                asyncio.get_running_loop().call_later(_LOCKED_PAUSE, self._commit)
                return
            for _, future in waiting:  # a full disk: everybody who waits is told
                if not future.done():
                    future.set_exception(error)
            return
        self._locked_since = None
        for (_, future), result in zip(waiting, results, strict=True):
            if not future.done():
                future.set_result(result)

    def _may_wait(self) -> bool:
        self._locked_since = self._locked_since or time.monotonic()
        return time.monotonic() - self._locked_since < _LOCKED_AT_MOST

    def store(
        self,
        key: str,
        request: dict[str, Any],
        answer: dict[str, Any],
        endpoint: str | None,
        reserved: tuple[int, float],
        left_out: Iterable[str],
    ) -> dict[str, Any]:
        """Put what `read_completion` read into the ledger, and what it took in place of what was reserved for it."""
        record = dict(answer)
        used = record["prompt_tokens"], record["completion_tokens"]
        # An endpoint that does not count: what was reserved is the only bound there is. So it is for another model's
        # reply, which a job of an earlier run may bring: these are not its prices.
        counted, mine = record.pop("counted"), request["model"] == self.teacher.model
        cost = self.teacher.cost(*used)
        over = (sum(used) - reserved[0] if counted else 0, cost - reserved[1] if counted and mine else 0.0)
        if names := sorted(left_out):
            record["left_out"] = names
        self.ledger.put(key, request, record, endpoint, over)
        if mine:
            self.progress.tokens += sum(used)
            self.progress.cost += cost
            self.teacher.count(asked=1, prompt_tokens=used[0], completion_tokens=used[1], cost=cost)
        return record

    def budget_words(self) -> str:
        """Which limits there are and what was spent of them; BudgetExceeded where that shall be raised."""
        teacher, spent = self.teacher, self.ledger.spent()
        units = {"max_requests": "requests", "max_total_tokens": "tokens", "max_cost": "cost"}
        of = [
            f"{spent[units[name]]:.{4 if name == 'max_cost' else 0}f} of {name}={limit}"
            for name, limit in teacher.limits._asdict().items()
            if limit is not None
        ]
        words = f"spent {', '.join(of)}; this request could pass it"
        if not self.budget_said:
            self.budget_said = True
            self.progress.say(
                f"A limit of {teacher.ledger} is reached: spent {', '.join(of)}. What could pass it is not asked; "
                "with a higher limit the same command asks only that."
            )
        if teacher.on_budget == "raise":
            raise BudgetExceeded(
                f"The budget of {teacher.ledger} is used up: {words}. Raise the limit and run again: only the rest is "
                "asked."
            )
        return words

    @abstractmethod
    def left(self) -> list[Question]:
        """What was begun and not told of, where it stopped."""

    @abstractmethod
    async def run(self) -> None:
        """Ask. What is raised is the reason to stop, after what was in flight has come back."""

    def how_to_go_on(self) -> str:
        """What is said to whoever interrupts."""
        return f"What was answered is in {self.teacher.ledger}: the same command goes on from there."

    def interrupt(self, number: int) -> None:
        """Ctrl-C or SIGTERM: what is in flight may still come back, for a moment; a second time it may not."""
        if self.interrupted:
            self.at_once.set()
            return
        self.interrupted = True
        self.progress.say("Stopping; what is in flight has a moment to come back. Once more to stop at once.")
        self.stop(Interrupted(number))
        asyncio.get_running_loop().call_later(GRACE, self.at_once.set)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM interrupt the round, unless they were ignored before."""
        loop, before = asyncio.get_running_loop(), {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if (handler := signal.getsignal(number)) != signal.SIG_IGN:
                    before[number] = handler
                    loop.add_signal_handler(number, self.interrupt, number)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    @asynccontextmanager
    async def _showing(self) -> AsyncIterator[None]:
        async def refresh() -> None:
            while True:
                await asyncio.sleep(self.progress.every)
                self.progress.show(self.ledger)

        task = asyncio.create_task(refresh())
        try:
            yield
        finally:
            task.cancel()

    async def whole(self) -> None:
        """`run`, with signals, a deadline and progress."""
        loop = asyncio.get_running_loop()
        deadline = self.teacher.total_timeout and loop.call_later(self.teacher.total_timeout, self._out_of_time)
        try:
            with self._signals():
                async with self._showing():
                    work, hurry = loop.create_task(self.run()), loop.create_task(self.at_once.wait())
                    await asyncio.wait({work, hurry}, return_when=asyncio.FIRST_COMPLETED)
                    hurry.cancel()
                    work.cancel()  # nothing, where it is done
                    await asyncio.wait({work})
                    if not work.cancelled() and (error := work.exception()):
                        raise error
        finally:
            if deadline:
                deadline.cancel()
            self.progress.close(self.ledger)

    def _out_of_time(self) -> None:
        reason = OutOfTime(f"total_timeout={self.teacher.total_timeout:g} s are over")
        self.progress.say(f"{reason}: the same command asks for what is missing.")
        self.stop(reason)
        self.at_once.set()


class OutOfTime(Exception):
    """What is missing is left for another run."""


def run(make: Callable[[], Round]) -> Round:
    """Ask to the end, also where a loop already runs (notebooks): then in a thread of its own."""
    made: list[tuple[Round, asyncio.AbstractEventLoop]] = []
    failed: list[BaseException] = []

    async def whole() -> None:
        asking = make()  # within the loop to which its events belong
        made.append((asking, asyncio.get_running_loop()))
        try:
            await asking.whole()
        except BaseException as error:  # raised below, in the caller's thread
            asking.stop(error)

    done = threading.Event()  # an interrupted `Thread.join` takes the thread for ended (Python 3.11 and 3.12)

    def in_thread() -> None:
        try:
            asyncio.run(whole())
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(whole())
    else:
        thread = threading.Thread(target=in_thread)
        thread.start()
        while not done.is_set():
            try:
                done.wait()
            except KeyboardInterrupt:  # Python hands it to the main thread, which only waits here
                if made:
                    made[0][1].call_soon_threadsafe(made[0][0].interrupt, signal.SIGINT)
    if failed:
        raise failed[0]
    asking = made[0][0]
    if isinstance(asking.stopped, Interrupted):
        _leave(asking, asking.stopped)
    if asking.stopped is not None and not isinstance(asking.stopped, OutOfTime):
        raise asking.stopped
    return asking


def _leave(asking: Round, interrupted: Interrupted) -> NoReturn:
    """As the signal would have, with a word on how to go on."""
    asking.progress.say(f"Stopped. {asking.how_to_go_on()}")
    if interrupted.number == signal.SIGTERM:
        handler = signal.getsignal(signal.SIGTERM)
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise SystemExit(128 + signal.SIGTERM)
    # of just this class: then the process dies of SIGINT, and a shell's loop over it ends as well
    raise KeyboardInterrupt(str(interrupted)) from interrupted


class Progress:
    """One bar: done of all, reused, unusable, requests a second, tokens, money. Without a terminal a line a minute."""

    def __init__(self, teacher: "Teacher", total: int | None):
        self.teacher, self.total = teacher, total
        self.done, self.reused, self.unusable, self.left, self.sent = 0, 0, 0, 0, 0
        self.tokens, self.cost = 0, 0.0
        self.started = time.monotonic()
        self.every = 0.5 if sys.stderr.isatty() else _SAY_EVERY

    @cached_property
    def bar(self) -> Any:
        """Made where something is asked: a `map` that only replays shows none."""
        from tqdm import tqdm

        form = "Asking {n_fmt}" + ("/{total_fmt}, {remaining} left" if self.total else "") + "{postfix}"
        return tqdm(total=self.total, bar_format=form, dynamic_ncols=True, disable=not sys.stderr.isatty())

    def count(self, reused: bool, unusable: bool) -> None:
        """One more has its reply."""
        self.done += 1
        self.reused += reused
        self.unusable += unusable

    def _words(self, ledger: Ledger) -> str:
        """What matters most first: a narrow terminal cuts the end. Beside a limit stands what the ledger spent."""
        teacher, spent, words = self.teacher, ledger.spent(), []
        if teacher.max_cost is not None:
            words.append(f"cost {spent['cost']:.2f} of {teacher.max_cost:g}")
        elif teacher.price_per_million_input or teacher.price_per_million_output:
            words.append(f"cost {self.cost:.2f}")
        words += [f"{self.left:,} not asked"] * bool(self.left)
        words += [f"{self.unusable:,} unusable", f"{self.reused:,} reused"]
        words.append(f"{self.sent / max(time.monotonic() - self.started, 1e-9):.1f} req/s")
        if teacher.max_requests is not None:
            words[-1] += f" ({spent['requests']:,.0f} of {teacher.max_requests:,})"
        short = self.bar.format_sizeof
        words.append(f"{short(self.tokens)} tokens")
        if teacher.max_total_tokens is not None:
            words[-1] = f"{short(spent['tokens'])} of {short(teacher.max_total_tokens)} tokens"
        return ", ".join(words)

    def show(self, ledger: Ledger) -> None:
        """Bring the bar up to date, or say a line."""
        if self.bar.disable:
            total = f" of {self.total:,}" if self.total else ""
            self.say(f"Asking {self.teacher.model}: {self.done:,}{total} done, {self._words(ledger)}")
        else:
            self.bar.set_postfix_str(self._words(ledger), refresh=False)
            self.bar.update(self.done - self.bar.n)

    def say(self, line: str) -> None:
        """One line on stderr, above the bar where there is one."""
        self.bar.write(line, file=sys.stderr)
        sys.stderr.flush()

    def close(self, ledger: Ledger) -> None:
        """The last state stays on the screen; without a terminal, what took longer than a minute ends with a line."""
        if not self.bar.disable or time.monotonic() - self.started > self.every:
            self.show(ledger)
        self.bar.close()

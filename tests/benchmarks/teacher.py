"""What a Teacher reaches: throughput, replay, faults, kills, limits, budgets, edits, memory.

    python tests/benchmarks/teacher.py                  # every row, some 15 minutes; writes its part of RESULTS.md
    python tests/benchmarks/teacher.py --only replay edits

The endpoint is `serve.py`, a process of its own on loopback. What is compared takes turns within one run, every other
turn in the opposite order; a ratio is the median over the turns. Imports and each client's first use are not timed.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
    os.environ.pop(name, None)

import httpx2  # noqa: E402
import openai  # noqa: E402
from datasets import Dataset, disable_progress_bars, load_from_disk  # noqa: E402
from results import RESULTS, Row, report, shown, write  # noqa: E402
from serve import BETTER_ANSWER, digest, lognormal  # noqa: E402

from hf_reflect import PROMPTS, ReflectionTransform, Teacher, to_pairs  # noqa: E402
from hf_reflect.ledger import Ledger  # noqa: E402

HERE = Path(__file__).parent
PACKAGES = ("hf-reflect", "openai", "httpx2", "aiohttp", "datasets", "pyarrow", "aiolimiter", "tenacity")
NOWHERE = "http://127.0.0.1:9/v1"  # for what must be answered by the ledger alone
LATENCY = 0.2  # seconds


class Endpoint:
    """`with Endpoint("--latency", 0.2) as endpoint:`, then `.url`, and `.stats(model)` with what it counted."""

    def __init__(self, *flags: object):
        self.command = [sys.executable, str(HERE / "serve.py"), *map(str, flags)]

    def __enter__(self) -> "Endpoint":
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/v1"
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()

    def stats(self, model: str = "ours") -> dict:
        with urllib.request.urlopen(self.url.replace("/v1", "/stats")) as answer:
            found = json.load(answer)
        return {"requests": 0, "in_flight": found["in_flight"], **found["models"].get(model, {})}


def rows(count: int, seed: int = 0) -> Dataset:
    """Distinct pairs of realistic length: an instruction of 60 words, an answer of 200."""
    vocabulary = "explain compare the a of in with for and each list why how water history number model people example"
    chance = random.Random(seed)
    words = chance.choices(vocabulary.split(), k=10_000)

    def prose(length: int) -> str:
        start = chance.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    numbers = range(count)
    columns = {"instruction": [f"Task {n}: {prose(60)}." for n in numbers], "output": [prose(200) for n in numbers]}
    return to_pairs(Dataset.from_dict({"id": [f"row-{n}" for n in numbers], **columns}))


def chats_of(pairs: Dataset, part: str = "response") -> list[list[dict]]:
    """What a reflection of this part asks, a chat a pair."""
    return [PROMPTS[part].chat(row["instruction"], row["response"], row["input"]) for row in pairs]


def reflect(teacher: Teacher, pairs: Dataset, part: str = "response") -> Dataset:
    """What a person writes: ask all in one stream, then make the table."""
    transform = ReflectionTransform(teacher, part)
    transform.prefetch(pairs)
    return pairs.map(transform, batched=True, load_from_cache_file=False)


def usable(table: Dataset) -> int:
    """How many rewrites of a table are usable."""
    texts = zip(table["variant"], table["instruction"], table["response"], strict=True)
    return sum(variant != "original" and None not in pair for variant, *pair in texts)


def fill(teacher: Teacher, pairs: Dataset) -> None:
    """Put a reply to each pair's response reflection into the ledger, as if it had been asked for."""
    with Ledger(teacher.ledger) as ledger:
        for chat in chats_of(pairs):
            text = BETTER_ANSWER.replace("@MARK@", digest(chat))
            reply = {"text": text, "finish_reason": "stop", "model": "benchmark-1", "fingerprint": None}
            reply |= {"prompt_tokens": 600, "completion_tokens": len(text) // 4, "seconds": 1.0}
            ledger.put(teacher.key(chat), teacher.request(chat), reply, NOWHERE)


def timed(function: Callable, *args: object) -> float:
    """Seconds that a call took."""
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


async def bare(url: str, chats: list, workers: int, aiohttp: bool = False, typed: bool = True) -> None:
    """The loop that anybody would write who needs the replies now and nothing else."""
    http_client = openai.DefaultAioHttpClient() if aiohttp else None  # both allow 1,000 connections
    async with openai.AsyncOpenAI(base_url=url, api_key="none", http_client=http_client) as client:
        queue = iter(chats)

        async def work() -> None:
            for chat in queue:
                body = {"model": "bare", "messages": chat, "temperature": 0.0, "top_p": 1.0, "max_tokens": 2048}
                if typed:
                    reply = await client.chat.completions.create(**body)
                    assert reply.choices[0].message.content
                else:
                    raw = await client.post("/chat/completions", body=body, cast_to=httpx2.Response)
                    assert json.loads(raw.content)["choices"][0]["message"]["content"]

        await asyncio.gather(*(work() for _ in range(workers)))


def ours(url: str, pairs: Dataset, in_flight: int, with_map: bool = True) -> float:
    """Seconds of a reflection with a fresh ledger; all rows must come out usable."""
    with TemporaryDirectory() as folder:
        teacher = Teacher("ours", url, ledger=f"{folder}/ledger.sqlite", max_concurrency=in_flight)
        if not with_map:
            return timed(ReflectionTransform(teacher, "response").prefetch, pairs)
        tables: list[Dataset] = []
        seconds = timed(lambda: tables.append(reflect(teacher, pairs)))
        assert usable(tables[0]) == len(pairs), "not every row is usable"
        return seconds


def take_turns(repeats: int, url: str, ways: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Seconds of each way, one a turn."""
    few = rows(20)
    ours(url, few, 4)
    for aiohttp, typed in ((False, True), (True, True), (True, False)):
        asyncio.run(bare(url, chats_of(few), 4, aiohttp, typed))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            seconds[name].append(ways[name]())
    return seconds


def ratio(reference: list[float], seconds: list[float]) -> float:
    return median(theirs / own for theirs, own in zip(reference, seconds, strict=True))


def throughput(options: argparse.Namespace) -> Iterator[Row]:
    pairs = rows(2000)
    chats = chats_of(pairs)
    with Endpoint("--latency", LATENCY) as endpoint:
        for in_flight, aiohttp, mark in ((64, False, 0.98), (256, True, 0.8)):

            def loop(*form: bool, workers: int = in_flight) -> float:
                return timed(asyncio.run, bare(endpoint.url, chats, workers, *form))

            ways = {
                "ours": lambda n=in_flight: ours(endpoint.url, pairs, n),
                "bare": lambda loop=loop, aiohttp=aiohttp: loop(aiohttp),
                "fastest": lambda loop=loop: loop(True, False),
            }
            seconds = take_turns(options.repeats, endpoint.url, ways)
            rate = {name: f"{len(chats) / median(some):.0f} requests/s" for name, some in seconds.items()}
            got, loop_name = ratio(seconds["bare"], seconds["ours"]), "AsyncOpenAI" + " over aiohttp" * aiohttp
            what = f"2,000 requests of {LATENCY} s, {in_flight} in flight, prefetch + map, cold; to bare {loop_name}"
            yield Row(what, f"{got:.3f} ({rate['ours']} to {rate['bare']})", f"≥ {mark}", got >= mark)
            got = ratio(seconds["fastest"], seconds["ours"])
            yield Row("… to the fastest bare loop (`client.post` over aiohttp)", f"{got:.3f} (to {rate['fastest']})")
    yield from peers(options.peer_python, pairs)


def slow_replies(options: argparse.Namespace) -> Iterator[Row]:
    # A draw without a long reply near the end, for which alone any client would wait: to take these chats in order
    # takes at least 1.05 × the ideal time.
    pairs = rows(3000, seed=6)
    chats = chats_of(pairs)
    ideal = sum(lognormal(digest(chat), 0.3, 0.9) for chat in chats) / 64
    with Endpoint("--latency", 0.3, "--sigma", 0.9) as endpoint:
        ways = {
            "ours": lambda: ours(endpoint.url, pairs, 64, with_map=False),
            "bare": lambda: timed(asyncio.run, bare(endpoint.url, chats, 64)),
        }
        seconds = take_turns(options.repeats, endpoint.url, ways)
    got = ratio([max(ideal, theirs) for theirs in seconds["bare"]], seconds["ours"])
    times = f"{median(seconds['ours']):.1f} s, ideal {ideal:.1f} s, bare AsyncOpenAI {median(seconds['bare']):.1f} s"
    what = "3,000 requests, lognormal latency (mean 0.3 s, σ 0.9), 64 in flight, prefetch, to the ideal or bare time"
    yield Row(what, f"{got:.3f} ({times})", "≥ 0.95", got >= 0.95)


def replay(options: argparse.Namespace) -> Iterator[Row]:
    count = 10_000
    with TemporaryDirectory() as folder:
        rows(count).save_to_disk(f"{folder}/pairs")
        pairs = load_from_disk(f"{folder}/pairs")
        teacher = Teacher("ours", NOWHERE, ledger=f"{folder}/ledger.sqlite")
        fill(teacher, pairs)
        reflect(teacher, pairs.select(range(100)))
        fetching, mapping = [], []
        for _ in range(options.repeats):
            transform = ReflectionTransform(teacher, "response")
            fetching.append(timed(transform.prefetch, pairs))
            started = time.perf_counter()
            table = pairs.map(transform, batched=True, load_from_cache_file=False)
            mapping.append(time.perf_counter() - started)
        assert usable(table) == count
    speed = count / median(mapping)
    what = "replay of 10,000 ledgered rows on disk, `Dataset.map` alone, rows in"
    yield Row(what, f"{speed:,.0f} rows/s", "≥ 10,000", speed >= 10_000)
    yield Row("… `prefetch` before it, with nothing missing", f"{count / median(fetching):,.0f} rows/s")


def faults(options: argparse.Namespace) -> Iterator[Row]:
    count = 1000
    with Endpoint("--latency", 0.05, "--fail", 0.3) as endpoint, TemporaryDirectory() as folder:
        started = time.perf_counter()
        good = usable(reflect(Teacher("ours", endpoint.url, ledger=f"{folder}/ledger.sqlite"), rows(count)))
        seconds, stats = time.perf_counter() - started, endpoint.stats()
    twice, sent = stats["answered_twice"], stats["requests"]
    failed = f"{sent - stats['outcomes']['good']} of {sent} requests failed; {seconds:.0f} s"
    what = "1,000 rows, 30 % of requests failing (429 with Retry-After, 500, 503, reset, broken JSON, no choices)"
    reached = good == count and twice == 0
    yield Row(what, f"{good} usable, {twice} answered twice ({failed})", "1,000 usable, 0 twice", reached)


def child(*args: str) -> subprocess.Popen:
    """Another process of this file, which runs one of CHILDREN."""
    return subprocess.Popen([sys.executable, __file__, "--child", *args], stdout=subprocess.PIPE, text=True)


def kills(options: argparse.Namespace) -> Iterator[Row]:
    count, chance = 4000, random.Random(options.seed)
    flying, intact = 0, True
    with Endpoint("--latency", LATENCY) as endpoint, TemporaryDirectory() as folder:
        rows(count).save_to_disk(f"{folder}/pairs")
        for _ in range(20):
            before, process = endpoint.stats()["requests"], child("reflect", folder, endpoint.url)
            while endpoint.stats()["requests"] == before and process.poll() is None:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.8))
            assert process.poll() is None, "the run ended before it could be killed"
            process.send_signal(signal.SIGSTOP)  # so that what is in flight can be counted
            time.sleep(0.02)
            flying += min(endpoint.stats()["in_flight"], 64)
            process.kill()
            process.communicate()
            intact &= integrity(Path(folder)) == "ok"
        output, _ = child("reflect", folder, endpoint.url).communicate()
        intact &= integrity(Path(folder)) == "ok"
        finished, twice = int(output or 0), endpoint.stats()["answered_twice"]
    figure = (
        f"{finished:,} rows after the last start, {twice} answered twice, {flying} in flight at the kills, ledger "
    )
    reached = finished == count and twice <= flying and intact
    what = "kill -9 at 20 random moments of one run of 4,000 rows, 64 in flight"
    yield Row(what, figure + ("intact" if intact else "DAMAGED"), "4,000 rows, twice ≤ in flight, intact", reached)


def integrity(folder: Path) -> str:
    """SQLite's own check, on a copy: to open the file itself would recover it before the next run does."""
    with TemporaryDirectory() as copy:
        for file in folder.glob("ledger.sqlite*"):
            if not file.name.endswith("-shm"):  # an index of the -wal file, made anew
                shutil.copy(file, copy)
        with contextlib.closing(sqlite3.connect(f"{copy}/ledger.sqlite")) as db:
            return db.execute("PRAGMA integrity_check").fetchone()[0]


def rate_limit(options: argparse.Namespace) -> Iterator[Row]:
    count = options.limit_requests
    pairs, ideal = rows(count), count / 10
    told = f"600 requests a minute, enforced by the server (any 60 s), {count:,} requests, `requests_per_minute=600`"
    untold = "… without `requests_per_minute`; the server sends x-ratelimit-*-requests"
    ways = ((told, [], {"requests_per_minute": 600}), (untold, ["--limit-headers"], {}))
    for what, flags, settings in ways:
        server = Endpoint("--latency", LATENCY, "--limit", 600, *flags)
        with server as endpoint, TemporaryDirectory() as folder:
            teacher = Teacher("ours", endpoint.url, ledger=f"{folder}/ledger.sqlite", **settings)
            share, stats = timed(reflect, teacher, pairs) / ideal, endpoint.stats()
        sent, refused = stats["requests"], stats["outcomes"].get("429", 0)
        figure = f"{refused} of {sent:,} refused, {share:.3f} × ideal ({ideal:.0f} s)"
        reached = stats["answered"] == count and refused <= 0.01 * sent and share <= 1.15
        yield Row(what, figure, "≤ 1 % refused, ≤ 1.15 × ideal", reached) if settings else Row(what, figure)


def budgets(options: argparse.Namespace) -> Iterator[Row]:
    flags = ("--latency", 0.02, "--random-usage", "--retry-after", 0.05)
    with Endpoint(*flags) as steady, Endpoint(*flags, "--fail", 0.15) as failing, TemporaryDirectory() as folder:

        def share_used(number: int) -> float:
            """A run with a limit, cut short and started again: what it spent by the server's count, of the limit."""
            chance = random.Random(f"{options.seed} {number}")
            endpoint, model = chance.choice((steady, failing)), f"budget-{number}"
            max_tokens, count = chance.choice((16, 200, 2048)), chance.randint(10, 60)
            texts = [f"{n} " + "word " * chance.randint(1, 400) for n in range(count)]
            chats = [[{"role": "user", "content": text}] for text in texts]
            worst = sum(len(text) + max_tokens for text in texts) * chance.uniform(0.05, 0.9)
            limits = {
                "max_requests": chance.randint(1, count),
                "max_total_tokens": int(worst),
                "max_cost": worst * 8e-6,
            }
            limit = chance.choice(list(limits))
            settings = {limit: limits[limit], "max_tokens": max_tokens, "max_concurrency": chance.randint(1, 32)}
            settings |= {"price_per_million_input": 2.0, "price_per_million_output": 8.0}
            for some in (chats[: count // 2], chats):
                Teacher(model, endpoint.url, ledger=f"{folder}/{model}.sqlite", **settings)(some)
            stats = endpoint.stats(model)
            prompt, completion = stats.get("prompt_tokens", 0), stats.get("completion_tokens", 0)
            cost = (2 * prompt + 8 * completion) * 1e-6
            spent = {"max_requests": stats["requests"], "max_total_tokens": prompt + completion, "max_cost": cost}
            return spent[limit] / limits[limit]

        # each run says that its limit is reached
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), ThreadPoolExecutor(8) as pool:
            shares = list(pool.map(share_used, range(200)))
    passed = sum(share > 1 + 1e-9 for share in shares)
    what = "200 random runs with a limit (requests, tokens or cost), half with failures, by the server's count"
    used = f"used of the limit: median {median(shares):.2f}, most {max(shares):.3f}"
    yield Row(what, f"passed {passed} times ({used})", "never passed", passed == 0)


def edits(options: argparse.Namespace) -> Iterator[Row]:
    pairs = rows(1000)
    edited = pairs.map(lambda row: row | {"response": row["response"] + " Edited." * (row["id"] == "row-500")})
    with Endpoint() as endpoint, TemporaryDirectory() as folder:

        def ask(table: Dataset) -> tuple[int, Dataset]:
            """How many requests both reflections sent, and the table they made."""
            before = endpoint.stats()["requests"]
            teacher = Teacher("ours", endpoint.url, ledger=f"{folder}/ledger.sqlite")
            table = reflect(teacher, reflect(teacher, table, "instruction"), "response")
            return endpoint.stats()["requests"] - before, table

        first, _ = ask(pairs)
        asked, table = ask(edited)
        original, _, new, _ = (table.select([place]) for place, id in enumerate(table["id"]) if id == "row-500")
        own = chats_of(original, "instruction") + chats_of(original) + chats_of(new)
        exactly = asked == 3 and {digest(chat) for chat in own} == set(endpoint.stats()["recent"][-3:])
        column, _ = ask(pairs.add_column("note", list(range(len(pairs)))))
        shuffled, _ = ask(pairs.shuffle(seed=0))
    what = f"1,000 rows, both reflections ({first:,} calls); then one row edited; a column added; rows shuffled"
    figure = f"{asked} asked, {'exactly' if exactly else 'NOT'} the edited row's; {column}; {shuffled}"
    yield Row(what, figure, "the edited row's 3; 0; 0", first == 3000 and exactly and column == shuffled == 0)


def memory(options: argparse.Namespace) -> Iterator[Row]:
    peaks = []
    for count in (10_000, 100_000):
        with TemporaryDirectory() as folder:
            pairs = rows(count)
            pairs.save_to_disk(f"{folder}/pairs")
            fill(Teacher("ours", NOWHERE, ledger=f"{folder}/ledger.sqlite"), pairs)
            output, _ = child("replay", folder, NOWHERE).communicate()
            peaks.append(json.loads(output))
    small, large = peaks
    growth = large["peak"] / small["peak"]
    figure = f"{growth:.2f} ({large['peak']:.0f} to {small['peak']:.0f} MB, {small['before']:.0f} MB before it began; "
    figure += f"ru_maxrss, with mapped files, {large['maxrss']:.0f} to {small['maxrss']:.0f} MB)"
    what = "replay (prefetch + map) of 100,000 rows to one of 10,000, table on disk, peak anonymous memory"
    yield Row(what, figure, "≤ 1.20", growth <= 1.2)


def reflect_child(folder: str, url: str) -> None:
    """Reflect the table of `folder`; prints how many rewrites are usable."""
    print(usable(reflect(Teacher("ours", url, ledger=f"{folder}/ledger.sqlite"), load_from_disk(f"{folder}/pairs"))))


def replay_child(folder: str, url: str) -> None:
    """Replay the table of `folder`; prints the process's memory in MB."""

    def anonymous() -> float:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.01)

    pairs, teacher = load_from_disk(f"{folder}/pairs"), Teacher("ours", url, ledger=f"{folder}/ledger.sqlite")
    reflect(teacher, pairs.select(range(10)))
    before = anonymous()
    peak = [before]
    threading.Thread(target=watch, daemon=True).start()
    table = reflect(teacher, pairs)
    assert len(table) == 2 * len(pairs)
    maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"before": before, "peak": peak[0], "maxrss": maxrss}))


def peers(pythons: list[str], pairs: Dataset) -> Iterator[Row]:
    """The same requests through other tools, each by an interpreter that has it."""
    with TemporaryDirectory() as folder, Endpoint("--latency", LATENCY) as endpoint:
        chats = Path(folder) / "chats.json"
        chats.write_text(json.dumps([{message["role"]: message["content"] for message in c} for c in chats_of(pairs)]))
        settings = {"cwd": folder, "env": os.environ | {"HOME": folder, "OPENAI_API_KEY": "none"}}
        for (name, module), script in PEERS.items() if pythons else ():
            what = f"{len(pairs):,} requests of {LATENCY} s, 64 in flight, {name}"
            has = ([python, "-c", f"import {module}"] for python in pythons)
            found = [command[0] for command in has if not subprocess.run(command, capture_output=True).returncode]
            if not found:
                yield Row(what, "absent")
                continue
            command = [
                "timeout",
                "600",
                found[0],
                "-c",
                _PEER_START + script + _PEER_END,
                endpoint.url,
                str(chats),
                name,
            ]
            run = subprocess.run(command, **settings, capture_output=True, text=True)
            if run.returncode:
                yield Row(what, f"failed: {(run.stderr.strip().splitlines() or ['?'])[-1][:80]}")
            else:
                seconds, good, version = json.loads(run.stdout.splitlines()[-1])
                yield Row(what, f"{len(pairs) / seconds:.0f} rows/s, {good} rows answered ({version})")


_PEER_START = """
import json, sys, time
from importlib.metadata import version
url, path, name = sys.argv[1:]
chats = json.load(open(path))
"""
_PEER_END = """
print()
print(json.dumps([seconds, sum(text not in (None, "", "none") for text in texts), version(name)]))
"""
PEERS = {
    ("distilabel", "distilabel"): """
from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration
data = [{"instruction": chat["user"], "system_prompt": chat["system"]} for chat in chats]
with Pipeline() as pipeline:
    sampling = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 2048}
    llm = OpenAILLM(model="peer", base_url=url, api_key="none", generation_kwargs=sampling)
    LoadDataFromDicts(data=data, batch_size=64) >> TextGeneration(llm=llm, input_batch_size=64)
started = time.perf_counter()
texts = pipeline.run(use_cache=False)["default"]["train"]["generation"]
seconds = time.perf_counter() - started
""",
    ("bespokelabs-curator", "bespokelabs.curator"): """
import tiktoken
class Letters:  # a real encoding would be fetched from the network
    def encode(self, text, **settings):
        return text
tiktoken.get_encoding = tiktoken.encoding_for_model = lambda *args: Letters()
from bespokelabs import curator
class Reflect(curator.LLM):
    def prompt(self, row):
        return [{"role": role, "content": row[role]} for role in ("system", "user")]
    def parse(self, row, reply):
        return {"reply": reply}
limits = {"max_requests_per_minute": 10**6, "max_tokens_per_minute": 10**9, "max_concurrent_requests": 64}
sampling = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 2048}
backend = {"base_url": url, "api_key": "none", **limits}
llm = Reflect(model_name="peer", backend="openai", backend_params=backend, generation_params=sampling)
started = time.perf_counter()
made = llm(chats)
seconds = time.perf_counter() - started
texts = getattr(made, "dataset", made)["reply"]
""",
    ("py-data-juicer", "data_juicer"): """
from data_juicer.core.data import NestedDataset
from data_juicer.ops.mapper import OptimizeResponseMapper
data = NestedDataset.from_list([{"query": chat["user"], "response": "none"} for chat in chats])
model = {"api_or_hf_model": "peer", "is_hf_model": False, "model_params": {"base_url": url, "api_key": "none"}}
sampling = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 2048}
mapper = OptimizeResponseMapper(**model, sampling_params=sampling, num_proc=64)
mapper.run(data.select([0]))  # the first call installs what is missing
started = time.perf_counter()
texts = mapper.run(data)["response"]
seconds = time.perf_counter() - started
""",
}
CHILDREN = {"reflect": reflect_child, "replay": replay_child}
ROWS = {"throughput": throughput, "slow-replies": slow_replies, "replay": replay, "faults": faults, "kills": kills}
ROWS |= {"rate-limit": rate_limit, "budgets": budgets, "edits": edits, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], choices=ROWS, help="these rows; written where --output says")
    parser.add_argument("--peer-python", nargs="+", default=[], help="interpreters that have distilabel, curator, …")
    parser.add_argument("--repeats", type=int, default=3, help="turns of which the median is taken")
    parser.add_argument("--limit-requests", type=int, default=1300, help="how many against the limit of 600 a minute")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments and the budgets' runs")
    parser.add_argument("--output", type=Path, help="where to write; its part of RESULTS.md, if all rows are run")
    options = parser.parse_args()
    started = time.perf_counter()
    found = shown(itertools.chain.from_iterable(ROWS[name](options) for name in options.only or ROWS))
    output = options.output or (None if options.only else RESULTS)
    if output:
        minutes = (time.perf_counter() - started) / 60
        how = f"in {minutes:.0f} minutes; ratios are medians of {options.repeats} turns"
        write(report("The teacher, measured", found, PACKAGES, how, ", shared by client and server"), output)
    sys.exit(not all(row.reached for row in found))


if __name__ == "__main__":
    disable_progress_bars()
    logging.disable(logging.WARNING)
    if sys.argv[1:2] == ["--child"]:
        CHILDREN[sys.argv[2]](*sys.argv[3:])
    else:
        main()

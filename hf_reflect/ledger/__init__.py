"""Every paid reply and the money spent, in one SQLite file, before anything else happens with it.

`keys` says what a request's key is, `file` how the SQLite file is made, opened and shared.
"""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from .file import SCHEMA_VERSION, LedgerFile, Locked, stored
from .keys import Keys, request_key

__all__ = ["SCHEMA_VERSION", "Job", "Keys", "Ledger", "Limits", "Locked", "request_key"]

_AT_ONCE = 500  # keys in one query


class Job(NamedTuple):
    """A job of the batch API. `remote` is the endpoint's id, None until it answered; `mark` finds it there."""

    id: int
    remote: str | None
    mark: str
    base_url: str | None
    api_key_env: str
    state: str
    created: float
    requests: int  # not answered yet


class Limits(NamedTuple):
    """What may be spent over the whole life of a ledger; None: any amount."""

    max_requests: int | None = None
    max_total_tokens: int | None = None
    max_cost: float | None = None


class Ledger(LedgerFile):
    """Replies by the key of their request, and what they cost, durable when a call returns.

    Several processes of one host may share a file. What is stored is JSON: no pickle, no API key. Within
    `with ledger.transaction():` all calls are one commit.

    Raises:
        DataError: the file is no ledger, is damaged, comes from a newer version, or cannot be written.
    """

    # ---- replies

    def get(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The stored replies to these keys; absent ones are left out."""
        keys = list(keys)
        found: dict[str, dict[str, Any]] = {}
        with self._explained():
            for rows in self._where_key_in("SELECT key, CAST(reply AS BLOB) FROM replies", keys):
                found.update([(key, stored(reply)) for key, reply in rows])
        return found

    def _where_key_in(self, query: str, keys: list[str]) -> Iterator[sqlite3.Cursor]:
        """The rows that a query has for these keys, a cursor for each few hundred of them."""
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            marks = ",".join("?" * len(some))
            yield self._db.execute(f"{query} WHERE key IN ({marks})", some)

    def put(
        self,
        key: str,
        request: dict[str, Any],
        reply: dict[str, Any],
        endpoint: str | None = None,
        spent: tuple[int, float] = (0, 0.0),
        created: float | None = None,
    ) -> bool:
        """Store a reply and correct what `reserve` had set aside for it by `spent` = (tokens, cost), in one commit.

        A key that is there already keeps its first reply; returns whether this one is new.
        """
        texts = (json.dumps(value, ensure_ascii=False) for value in (request, reply))
        with self.transaction():
            row = (key, *texts, endpoint, time.time() if created is None else created)
            cursor = self._db.execute(
                "INSERT INTO replies (key, request, reply, endpoint, created) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (key) DO NOTHING",
                row,
            )
            self._db.execute("DELETE FROM claims WHERE key = ?", (key,))
            if any(spent):
                self.correct(*spent)
        return cursor.rowcount == 1

    def rows(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], str | None, float]]:
        """All that is stored: key, request, reply, endpoint, time (seconds since 1970); in the order of keys."""
        with self._explained():
            for key, request, reply, endpoint, created in self._db.execute(
                "SELECT key, request, reply, endpoint, created FROM replies ORDER BY key"
            ):
                yield key, stored(request), stored(reply), endpoint, created

    def sample(self, model: str, count: int = 1000) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Up to `count` requests and replies of a model. Keys are hashes, so their order is a random one."""
        query = "SELECT request, reply FROM replies WHERE json_extract(request, '$.model') = ? ORDER BY key LIMIT ?"
        with self._explained():
            for request, reply in self._db.execute(query, (model, count)):
                yield stored(request), stored(reply)

    def summary(self) -> list[dict[str, Any]]:
        """One dict for each model, name that the endpoint returned for it, endpoint, and finish reason.

        Keys: model, returned, endpoint, finish_reason, replies, prompt_tokens, completion_tokens, first, last (seconds
        since 1970).
        """
        names = ("model", "returned", "endpoint", "finish_reason")
        numbers = ("replies", "prompt_tokens", "completion_tokens", "first", "last")
        query = """
            SELECT json_extract(request, '$.model') AS model, json_extract(reply, '$.model') AS returned, endpoint,
                json_extract(reply, '$.finish_reason') AS finish_reason, count(*),
                coalesce(sum(json_extract(reply, '$.prompt_tokens')), 0),
                coalesce(sum(json_extract(reply, '$.completion_tokens')), 0), min(created), max(created)
            FROM replies GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
        """
        with self._explained():
            return [dict(zip(names + numbers, row, strict=True)) for row in self._db.execute(query)]

    # ---- money

    def correct(self, tokens: int, cost: float, requests: int = 0) -> None:
        """Add to what was spent; negative where less came than was reserved."""
        with self._explained():
            self._db.execute(
                "UPDATE spent SET tokens = tokens + ?, cost = cost + ?, requests = requests + ?",
                (tokens, cost, requests),
            )

    def reserve(self, tokens: int, cost: float, limits: Limits = Limits()) -> bool:  # noqa: B008
        """Count one request and the most it can cost as spent, unless that passes a limit: then False.

        One statement, so that processes which share the ledger cannot pass a limit together. What a killed process had
        reserved stays counted: its requests may have been billed.
        """
        with self._explained():
            cursor = self._db.execute(
                "UPDATE spent SET requests = requests + 1, tokens = tokens + :tokens, cost = cost + :cost "
                "WHERE (:max_requests IS NULL OR requests + 1 <= :max_requests) "
                "AND (:max_total_tokens IS NULL OR tokens + :tokens <= :max_total_tokens) "
                "AND (:max_cost IS NULL OR cost + :cost <= :max_cost)",
                {"tokens": tokens, "cost": cost, **limits._asdict()},
            )
        return cursor.rowcount == 1

    def spent(self) -> dict[str, float]:
        """requests, tokens and cost since the ledger began, reservations included."""
        with self._explained():
            requests, tokens, cost = self._db.execute("SELECT requests, tokens, cost FROM spent").fetchone()
        return {"requests": requests, "tokens": tokens, "cost": cost}

    # ---- who asks what

    def claim(self, key: str, owner: str, seconds: float) -> bool:
        """Whether this process may ask this, for so long or until it is there; False where another one does."""
        now = time.time()
        with self._explained():
            cursor = self._db.execute(
                "INSERT INTO claims VALUES (:key, :owner, :until) ON CONFLICT (key) DO UPDATE SET owner = :owner, "
                "until = :until WHERE owner = :owner OR until < :now",
                {"key": key, "owner": owner, "until": now + seconds, "now": now},
            )
        return cursor.rowcount == 1

    def disclaim(self, owner: str) -> None:
        """Let others ask what this process has claimed."""
        with self._explained():
            self._db.execute("DELETE FROM claims WHERE owner = ?", (owner,))

    # ---- jobs of the batch API

    def add_job(
        self,
        mark: str,
        base_url: str | None,
        api_key_env: str,
        requests: Iterable[tuple[str, dict[str, Any], int, float]],
    ) -> int:
        """Remember a job before it is submitted, with its requests as (key, request, tokens, cost reserved)."""
        with self.transaction():
            job = self._db.execute(
                "INSERT INTO jobs (mark, base_url, api_key_env, state, created) VALUES (?, ?, ?, 'prepared', ?)",
                (mark, base_url, api_key_env, time.time()),
            ).lastrowid
            assert job is not None
            rows = ((key, job, json.dumps(request, ensure_ascii=False), *most) for key, request, *most in requests)
            self._db.executemany("INSERT INTO job_requests VALUES (?, ?, ?, ?, ?)", rows)
        return job

    def update_job(self, job: int, state: str, remote: str | None = None) -> None:
        """Note how a job stands, and its id at the endpoint once there is one."""
        with self._explained():
            self._db.execute(
                "UPDATE jobs SET state = ?, remote = coalesce(?, remote) WHERE id = ?", (state, remote, job)
            )

    def jobs(self, open_only: bool = True) -> list[Job]:
        """The jobs, oldest first; open are those that still owe replies."""
        query = "SELECT jobs.*, count(key) AS n FROM jobs LEFT JOIN job_requests ON job = id GROUP BY id ORDER BY id"
        with self._explained():
            jobs = [Job(*row) for row in self._db.execute(query)]
        return [job for job in jobs if job.requests or not open_only]

    def in_jobs(self, keys: Iterable[str]) -> dict[str, int]:
        """Which of these keys a job still owes a reply to, and its id."""
        keys = list(keys)
        found: dict[str, int] = {}
        with self._explained():
            for rows in self._where_key_in("SELECT key, job FROM job_requests", keys):
                found.update(rows)
        return found

    def settle(self, key: str, job: int) -> tuple[dict[str, Any], int, float] | None:
        """A job no longer owes this reply: its request, and the tokens and cost that were reserved for it.

        None where somebody else settled it, perhaps to have another job owe it: then nothing is to be corrected.
        """
        query = "DELETE FROM job_requests WHERE key = ? AND job = ? RETURNING request, tokens, cost"
        with self._explained():
            rows = self._db.execute(query, (key, job)).fetchall()
            return next(((stored(request), tokens, cost) for request, tokens, cost in rows), None)

    def release(self, job: int, state: str, billed: bool = False) -> list[str]:
        """A job brings nothing more: what is still set aside for it is given back, unless it was billed all the same.

        Returns the keys that it still owed.
        """
        with self.transaction():
            query = "DELETE FROM job_requests WHERE job = ? RETURNING key, tokens, cost"
            owed = self._db.execute(query, (job,)).fetchall()
            if not billed:
                self.correct(-sum(tokens for _, tokens, _ in owed), -sum(cost for *_, cost in owed), -len(owed))
            self.update_job(job, state)
        return [key for key, *_ in owed]

"""Every paid reply and the money spent, in one SQLite file, before anything else happens with it."""

import hashlib
import json
import logging
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from .errors import DataError

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE replies (key TEXT PRIMARY KEY, request TEXT NOT NULL, reply TEXT NOT NULL, endpoint TEXT,
    created REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE spent (one INTEGER PRIMARY KEY CHECK (one = 1), requests INTEGER NOT NULL, tokens INTEGER NOT NULL,
    cost REAL NOT NULL);
INSERT INTO spent VALUES (1, 0, 0, 0.0);
"""
_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "lustre", "beegfs", "fuse.sshfs", "glusterfs", "ceph", "gpfs"}


def request_key(request: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of what determines a reply: model, messages, sampling parameters, `extra_body`."""
    text = json.dumps(request, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Ledger:
    """Replies by the key of their request, and what they cost, durable when a call returns.

    Several processes of one host may share a file. What is stored is JSON: no pickle, no API key.

    Raises:
        DataError: the file is no ledger, is damaged, comes from a newer version, or cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # autocommit: a statement is durable when it returns, a transaction is begun where one is meant
            self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            self._open()
        except (sqlite3.DatabaseError, OSError) as error:
            raise DataError(
                f"The ledger {self.path} cannot be used: {error}. If it is another file, name a new one; if it is "
                "damaged, restore it from a copy. Nothing was changed."
            ) from error

    def _open(self) -> None:
        self._db.execute("BEGIN")  # both reads see one moment: another process may be making the file
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        self._db.execute("COMMIT")
        if version > SCHEMA_VERSION:
            raise DataError(
                f"The ledger {self.path} was written by a newer hf_reflect (its schema is {version}, this one reads "
                f"up to {SCHEMA_VERSION}). Update with `pip install -U hf-reflect`, or name another file."
            )
        if version == 0 and tables:
            raise sqlite3.DatabaseError("it is an SQLite file of something else")
        if _is_network_file_system(self.path):
            logger.warning("The ledger %s lies on a network file system: use one process, WAL is off.", self.path)
            self._db.execute("PRAGMA journal_mode = DELETE")
        else:
            self._db.execute("PRAGMA journal_mode = WAL")
        # survives kill -9; a power failure may lose the last moments, never the file
        self._db.execute("PRAGMA synchronous = NORMAL")
        if version == 0:
            with self._transaction():
                if self._db.execute("PRAGMA user_version").fetchone() == (0,):  # nobody was faster
                    for statement in _SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._db.close()

    def get(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The stored replies to these keys; absent ones are left out."""
        keys = list(keys)
        found = {}
        for start in range(0, len(keys), 500):
            some = keys[start : start + 500]
            marks = ",".join("?" * len(some))
            for key, reply in self._db.execute(f"SELECT key, reply FROM replies WHERE key IN ({marks})", some):
                found[key] = json.loads(reply)
        return found

    def put(
        self,
        key: str,
        request: dict[str, Any],
        reply: dict[str, Any],
        endpoint: str | None = None,
        spent: tuple[int, float] = (0, 0.0),
    ) -> None:
        """Store a reply and correct what `reserve` had set aside for it by `spent` = (tokens, cost), in one commit.

        A key that is there already keeps its first reply.
        """
        row = (
            key,
            json.dumps(request, ensure_ascii=False),
            json.dumps(reply, ensure_ascii=False),
            endpoint,
            time.time(),
        )
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?)", row)
            self.correct(*spent)

    def correct(self, tokens: int, cost: float) -> None:
        """Add to what was spent; negative where less came than was reserved."""
        self._db.execute("UPDATE spent SET tokens = tokens + ?, cost = cost + ?", (tokens, cost))

    def reserve(
        self,
        tokens: int,
        cost: float,
        max_requests: int | None = None,
        max_total_tokens: int | None = None,
        max_cost: float | None = None,
    ) -> bool:
        """Count one request and the most it can cost as spent, unless that passes a limit: then False.

        One statement, so that processes which share the ledger cannot pass a limit together. What a killed process had
        reserved stays counted: its requests may have been billed.
        """
        limits = (max_requests, max_requests, tokens, max_total_tokens, max_total_tokens, cost, max_cost, max_cost)
        cursor = self._db.execute(
            "UPDATE spent SET requests = requests + 1, tokens = tokens + ?, cost = cost + ? "
            "WHERE (? IS NULL OR requests + 1 <= ?) AND (? + tokens <= ? OR ? IS NULL) "
            "AND (? + cost <= ? OR ? IS NULL)",
            (tokens, cost, *limits),
        )
        return cursor.rowcount == 1

    def spent(self) -> dict[str, float]:
        """requests, tokens and cost since the ledger began, reservations included."""
        requests, tokens, cost = self._db.execute("SELECT requests, tokens, cost FROM spent").fetchone()
        return {"requests": requests, "tokens": tokens, "cost": cost}

    def mean_tokens(self, model: str, sample: int = 1000) -> tuple[int, float]:
        """How many replies of `model` there are (up to `sample`), and their mean completion tokens."""
        count, mean = self._db.execute(
            "SELECT count(*), avg(n) FROM (SELECT coalesce(json_extract(reply, '$.completion_tokens'), 0) AS n "
            "FROM replies WHERE json_extract(request, '$.model') = ? LIMIT ?)",
            (model, sample),
        ).fetchone()
        return count, mean or 0.0


def _is_network_file_system(path: Path) -> bool:
    """Whether the mount that holds `path` is a network's; False where the system does not tell (no /proc)."""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return False
    real = str(path.parent.resolve())
    best, kind = "", ""
    for line in mounts:
        _, point, file_system, *_ = line.split()
        point = point.replace("\\040", " ")
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, file_system
    return kind in _NETWORK_FILE_SYSTEMS

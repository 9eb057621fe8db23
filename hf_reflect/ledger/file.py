"""The SQLite file of a ledger: its schema, how it is opened and committed to, and what its errors mean."""

import json
import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from jiter import from_json

from ..errors import DataError
from .keys import request_key

logger = logging.getLogger(__name__)

# What each version of the schema does to the one before. Replies are read far more often than requests: they come
# first, in an ordinary table, where long rows are read four times as fast as in one without row ids.
_SCHEMAS = (
    """
    CREATE TABLE replies (key TEXT PRIMARY KEY, request TEXT NOT NULL, reply TEXT NOT NULL, endpoint TEXT,
        created REAL NOT NULL) WITHOUT ROWID;
    CREATE TABLE spent (one INTEGER PRIMARY KEY CHECK (one = 1), requests INTEGER NOT NULL, tokens INTEGER NOT NULL,
        cost REAL NOT NULL);
    INSERT INTO spent VALUES (1, 0, 0, 0.0)
    """,
    """
    CREATE TABLE jobs (id INTEGER PRIMARY KEY, remote TEXT, mark TEXT NOT NULL, base_url TEXT,
        api_key_env TEXT NOT NULL, state TEXT NOT NULL, created REAL NOT NULL);
    CREATE TABLE job_requests (key TEXT PRIMARY KEY, job INTEGER NOT NULL REFERENCES jobs (id), request TEXT NOT NULL,
        tokens INTEGER NOT NULL, cost REAL NOT NULL) WITHOUT ROWID;
    CREATE INDEX job_of_request ON job_requests (job);
    ALTER TABLE replies RENAME TO replies_1;
    CREATE TABLE replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL, request TEXT NOT NULL, endpoint TEXT,
        created REAL NOT NULL);
    INSERT INTO replies SELECT key, reply, request, endpoint, created FROM replies_1;
    DROP TABLE replies_1
    """,
    "CREATE TABLE claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID",
)
SCHEMA_VERSION = len(_SCHEMAS)
_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "lustre", "beegfs", "fuse.sshfs", "glusterfs", "ceph", "gpfs"}


class Locked(DataError):
    """Another process is writing to the ledger."""


class LedgerFile:
    """The file below a `Ledger`: brought to the latest schema, shared by the processes of a host, kept sound."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # autocommit: a statement is durable when it returns, a transaction is begun where one is meant
            self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what an error of SQLite means for whoever owns the file."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            words = str(error)
            advice = "If it is another file, name a new one; if it is damaged, restore it from a copy, or save what "
            advice += "can be read with `sqlite3 LEDGER .recover`"
            if self.path.is_dir():
                advice = "Name a file: this is a folder"
            elif "full" in words or "disk I/O" in words or "No space left" in words:
                advice = "Make room on the disk, or move the file to another one"
            elif "readonly" in words or "unable to open" in words or isinstance(error, OSError):
                advice = "Name a file in a folder that can be written"
            elif "locked" in words:
                advice = "Another process is writing to it and does not finish: stop that one"
            kind = Locked if "locked" in words else DataError
            raise kind(
                f"The ledger {self.path} cannot be used: {words}. {advice}. What was committed before is untouched."
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
        if version == 0:
            self._db.execute("PRAGMA page_size = 16384")  # a row takes about 5 kB: smaller pages split it
        if _is_network_file_system(self.path):
            logger.warning("The ledger %s lies on a network file system: use one process, WAL is off.", self.path)
            self._db.execute("PRAGMA journal_mode = DELETE")
        else:
            self._use_wal()
        # survives kill -9; a power failure may lose the last moments, never the file
        self._db.execute("PRAGMA synchronous = NORMAL")
        if version < SCHEMA_VERSION:
            with self.transaction():
                (version,) = self._db.execute("PRAGMA user_version").fetchone()  # somebody may have been faster
                for statement in ";".join(_SCHEMAS[version:]).split(";"):
                    self._db.execute(statement)
                if version == 1:
                    self._make_keys_anew()
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _make_keys_anew(self) -> None:
        """The first version hashed the request as JSON throughout."""
        for (key,) in self._db.execute("SELECT key FROM replies").fetchall():
            (request,) = self._db.execute("SELECT request FROM replies WHERE key = ?", (key,)).fetchone()
            self._db.execute("UPDATE replies SET key = ? WHERE key = ?", (request_key(json.loads(request)), key))

    def _use_wal(self) -> None:
        """Change the journal; here SQLite does not wait by itself for another process that opens the file as well."""
        until = time.monotonic() + 60
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.01)

    def wait_for_others(self, seconds: float) -> None:
        """How long another process that writes is waited for, before `Locked` is raised; a minute unless told."""
        self._db.execute(f"PRAGMA busy_timeout = {round(1000 * seconds)}")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is done within is committed together, or nothing of it."""
        if self._db.in_transaction:
            yield
            return
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite ends it by itself on a full disk
                    self._db.execute("ROLLBACK")
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._db.close()

    def vacuum(self) -> None:
        """Give unused space back to the disk, and take the write-ahead log into the file."""
        with self._explained():
            self._db.execute("DELETE FROM claims WHERE until < ?", (time.time(),))
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def check(self) -> list[str]:
        """What SQLite finds wrong with the file; empty where nothing is."""
        with self._explained():
            found = [words for (words,) in self._db.execute("PRAGMA integrity_check")]
        return [] if found == ["ok"] else found


def stored(text: str | bytes) -> dict[str, Any]:
    """What a column holds as JSON; where it does not any more, that is damage like any other."""
    try:
        value = from_json(text.encode() if isinstance(text, str) else text)
        if isinstance(value, dict):
            return value
        raise ValueError("no object")
    except (TypeError, ValueError) as error:
        raise sqlite3.DatabaseError(f"it is damaged: what is stored is no JSON any more ({error})") from error


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

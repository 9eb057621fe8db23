"""Every paid reply and the money spent, in one SQLite file, before anything else happens with it."""

import hashlib
import json
import logging
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from jiter import from_json

from ..errors import DataError

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
_AT_ONCE = 500  # keys in one query


_ROLES = ("system", "user", "assistant")
_canonical = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


def request_key(request: dict[str, Any]) -> str:
    """SHA-256 of what determines a reply: model, messages, sampling parameters, `extra_body`.

    Of the request as canonical JSON with each text replaced by its length in bytes, and of the texts: escaping them
    would take longer than all the rest.
    """
    return Keys({name: value for name, value in request.items() if name != "messages"})(request.get("messages", ()))


class Keys:
    """`request_key` for many chats that are asked for with the same `sampling`, which is encoded once."""

    def __init__(self, sampling: dict[str, Any]):
        before = _canonical({name: value for name, value in sampling.items() if name < "messages"})
        after = _canonical({name: value for name, value in sampling.items() if name > "messages"})
        self._before = before[:-1] + ("," if before != "{}" else "") + '"messages":['
        self._after = "]" + ("," if after != "{}" else "") + after[1:]

    def __call__(self, messages: Iterable[dict[str, Any]]) -> str:
        """The key of this chat."""
        texts, framed = [], []
        for message in messages:
            content, role = message["content"], message.get("role")
            if isinstance(content, str):
                texts.append(content.encode("utf-8", "surrogatepass"))
                if len(message) == 2 and role in _ROLES:
                    framed.append(f'{{"content":{len(texts[-1])},"role":"{role}"}}')
                    continue
                message = message | {"content": len(texts[-1])}
            framed.append(_canonical(message))
        frame = f"{self._before}{','.join(framed)}{self._after}".encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(frame)
        for text in texts:
            digest.update(text)
        return digest.hexdigest()


class Locked(DataError):
    """Another process is writing to the ledger."""


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


class Ledger:
    """Replies by the key of their request, and what they cost, durable when a call returns.

    Several processes of one host may share a file. What is stored is JSON: no pickle, no API key. Within
    `with ledger.transaction():` all calls are one commit.

    Raises:
        DataError: the file is no ledger, is damaged, comes from a newer version, or cannot be written.
    """

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

    # ---- replies

    def get(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The stored replies to these keys; absent ones are left out."""
        keys = list(keys)
        found: dict[str, dict[str, Any]] = {}
        with self._explained():
            for start in range(0, len(keys), _AT_ONCE):
                some = keys[start : start + _AT_ONCE]
                marks = ",".join("?" * len(some))
                rows = self._db.execute(f"SELECT key, CAST(reply AS BLOB) FROM replies WHERE key IN ({marks})", some)
                found.update([(key, _stored(reply)) for key, reply in rows])
        return found

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
                yield key, _stored(request), _stored(reply), endpoint, created

    def sample(self, model: str, count: int = 1000) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Up to `count` requests and replies of a model. Keys are hashes, so their order is a random one."""
        query = "SELECT request, reply FROM replies WHERE json_extract(request, '$.model') = ? ORDER BY key LIMIT ?"
        with self._explained():
            for request, reply in self._db.execute(query, (model, count)):
                yield _stored(request), _stored(reply)

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
            for start in range(0, len(keys), _AT_ONCE):
                some = keys[start : start + _AT_ONCE]
                marks = ",".join("?" * len(some))
                found.update(self._db.execute(f"SELECT key, job FROM job_requests WHERE key IN ({marks})", some))
        return found

    def settle(self, key: str, job: int) -> tuple[dict[str, Any], int, float] | None:
        """A job no longer owes this reply: its request, and the tokens and cost that were reserved for it.

        None where somebody else settled it, perhaps to have another job owe it: then nothing is to be corrected.
        """
        query = "DELETE FROM job_requests WHERE key = ? AND job = ? RETURNING request, tokens, cost"
        with self._explained():
            rows = self._db.execute(query, (key, job)).fetchall()
            return next(((_stored(request), tokens, cost) for request, tokens, cost in rows), None)

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

    # ---- upkeep

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


def _stored(text: str | bytes) -> dict[str, Any]:
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

"""The record of everything released: written durably before a value is handed out, never changed.

A ledger belongs to one group of records (one unit, one neighbouring relation). It stores events, not
epsilons: what was spent is computed from the events each time it is asked for.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dpfa_core
from dpfa_core.budget import Budget
from dpfa_core.checks import fraction, integer, one_of, positive
from dpfa_core.errors import BudgetExhausted, LedgerError
from dpfa_core.events import Event
from dpfa_core.plugin_names import parts
from dpfa_core.registry import BACKENDS, MECHANISMS, Registry
from dpfa_core.spec import RELATIONS, UNITS, Relation, Unit
from dpfa_core.spending import spending, upper_bound

SCHEMA_VERSION = 1
PATIENCE = 30.0
"""Seconds that a writer waits for another one."""
# One lock for all ledgers of the process: a fork has to find none of them in the middle of something.
_LOCK = threading.RLock()
_FILES: weakref.WeakSet[Ledger] = weakref.WeakSet()
_NUMBERED: weakref.WeakValueDictionary[int, Ledger] = weakref.WeakValueDictionary()
_SCHEMA = """
CREATE TABLE terms (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE releases (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, recorded_at TEXT NOT NULL,
    purpose TEXT NOT NULL, mechanism TEXT NOT NULL, backend TEXT NOT NULL,
    event TEXT NOT NULL, count INTEGER NOT NULL CHECK (count > 0), versions TEXT NOT NULL);
CREATE TRIGGER releases_keep BEFORE DELETE ON releases BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER releases_fixed BEFORE UPDATE ON releases BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER terms_keep BEFORE DELETE ON terms BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER terms_fixed BEFORE UPDATE ON terms BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""
# INSERT OR REPLACE removes a row without asking the triggers on DELETE. Made again wherever they are missing.
_NO_REPLACEMENT = (
    "CREATE TRIGGER IF NOT EXISTS releases_once BEFORE INSERT ON releases WHEN EXISTS "
    "(SELECT 1 FROM releases WHERE sequence = NEW.sequence OR id = NEW.id) "
    "BEGIN SELECT RAISE(ABORT, 'append-only'); END",
    "CREATE TRIGGER IF NOT EXISTS terms_once BEFORE INSERT ON terms WHEN EXISTS "
    "(SELECT 1 FROM terms WHERE name = NEW.name) BEGIN SELECT RAISE(ABORT, 'append-only'); END",
)


@dataclass(frozen=True)
class Release:
    """One line of the ledger."""

    id: str
    recorded_at: str
    purpose: str
    mechanism: str
    backend: str
    event: Event
    count: int
    versions: tuple[tuple[str, str], ...]


class Reservation:
    """`count` releases already charged; each ``use`` hands one out, unused ones stay charged."""

    def __init__(self, release_id: str, count: int) -> None:
        self.id, self.count, self.used = release_id, count, 0
        self._lock, self._process = threading.Lock(), os.getpid()

    def use(self) -> str:
        """The id of the next release; ``BudgetExhausted`` after the last one."""
        if os.getpid() != self._process:
            raise LedgerError(
                f"reservation {self.id} cannot be used after a fork, its releases would be handed out in two "
                "places; reserve in the new process."
            )
        with self._lock:
            if self.used >= self.count:
                raise BudgetExhausted(
                    f"reservation {self.id} holds {self.count} releases and all are used; reserve more."
                )
            self.used += 1
            return f"{self.id}/{self.used}"


class Ledger:
    """Append-only; safe for several threads and processes; see ``memory`` and ``open``."""

    def __init__(
        self,
        path: str,
        *,
        unit: Unit | None,
        relation: Relation | None,
        delta: float | None,
        budget: float | None,
    ) -> None:
        if unit is not None:
            one_of("unit", unit, UNITS)
        if relation is not None:
            one_of("relation", relation, RELATIONS)
        if delta is not None:
            fraction("delta", delta)
        if budget is not None:
            positive("budget", budget, remedy="None means that nothing is refused.")
            if delta is None:
                raise LedgerError(f"a ledger with a budget needs the delta it is meant at, got {budget=}.")
        self.path = path
        self.unit, self.relation, self.delta, self.budget = unit, relation, delta, budget
        self._database: sqlite3.Connection | None = None
        self._closed = False
        self._limit = None if budget is None or delta is None else Budget(budget, delta)
        self.number = secrets.randbits(62) + 1
        """Stands for this object where only numbers can be kept, as in a traced graph; another one in each process."""
        with _LOCK:
            self._connect(create=True)
            _NUMBERED[self.number] = self

    @classmethod
    def numbered(cls, number: int) -> Ledger:
        """The ledger of this process whose `number` it is.

        Raises: LedgerError if it is gone, or was another process's.
        """
        with _LOCK:
            found = _NUMBERED.get(number)
        if found is None:
            raise LedgerError(
                f"a graph must run where the ledger is that it was traced with, got number {number}, which no ledger "
                "here has; keep the ledger as long as the graph, and trace it again in each process."
            )
        return found

    @classmethod
    def memory(
        cls,
        *,
        unit: Unit | None = None,
        relation: Relation | None = None,
        delta: float | None = None,
        budget: float | None = None,
    ) -> Ledger:
        """A ledger that ends with the process. What is None is not checked."""
        return cls(":memory:", unit=unit, relation=relation, delta=delta, budget=budget)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        unit: Unit,
        relation: Relation,
        delta: float,
        budget: float | None = None,
    ) -> Ledger:
        """Open or create a durable ledger; its terms are fixed when it is created.

        Raises: LedgerError if the file cannot be used or was created with other terms.
        """
        return cls(_absolute(path), unit=unit, relation=relation, delta=delta, budget=budget)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Ledger:
        """Open an existing ledger with the terms it was created with.

        Raises: LedgerError if there is no ledger at `path`.
        """
        if not Path(path).is_file():
            raise LedgerError(f"expected the path of a ledger, got {os.fspath(path)!r}: no such file.")
        return cls(_absolute(path), **_stored_terms(path))

    def record(self, event: Event, *, purpose: str, mechanism: str, backend: str, count: int = 1) -> str:
        """Write `count` releases of `event`, durably, and return the line's id.

        Raises:
            BudgetExhausted: they would exceed the budget; says what is spent and how many more would fit.
                Nothing was written.
            LedgerError: the line could not be written, so nothing may be released.
        """
        integer("count", count, least=1)
        self._check_relation(event)
        release_id = uuid.uuid4().hex
        versions = json.dumps(_versions(mechanism, backend))
        with self._explained(event, count), self._write() as connection:
            if self._limit is not None:
                self._limit.admit(event, count, _last_sequence(connection), self.events)
            connection.execute(
                "INSERT INTO releases (id, recorded_at, purpose, mechanism, backend, event, count, versions) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    release_id,
                    datetime.now(UTC).isoformat(timespec="milliseconds"),
                    purpose,
                    mechanism,
                    backend,
                    json.dumps(event.to_json(), sort_keys=True, allow_nan=False),
                    count,
                    versions,
                ),
            )
        return release_id

    def reserve(self, event: Event, count: int, *, purpose: str, mechanism: str, backend: str) -> Reservation:
        """Charge `count` releases with one durable write; unused ones stay charged."""
        release_id = self.record(event, purpose=purpose, mechanism=mechanism, backend=backend, count=count)
        return Reservation(release_id, count)

    def foresee(self, event: Event, count: int) -> None:
        """Check once that `count` more of `event` fit the budget, so that recording them one by one is cheap.

        Nothing is charged, and another writer's release in between makes ``record`` price again.
        Raises: BudgetExhausted if they do not fit.
        """
        integer("count", count, least=1)
        self._check_relation(event)
        with self._explained(event, count), self._write() as connection:
            if self._limit is not None:
                self._limit.foresee(event, count, _last_sequence(connection), self.events)

    def releases(self) -> Iterator[Release]:
        """All lines, oldest first."""
        query = "SELECT id, recorded_at, purpose, mechanism, backend, event, count, versions FROM releases"
        with _LOCK:
            rows = self._connection().execute(f"{query} ORDER BY sequence").fetchall()
        for release_id, recorded_at, purpose, mechanism, backend, event, count, versions in rows:
            yield Release(
                release_id,
                recorded_at,
                purpose,
                mechanism,
                backend,
                Event.from_json(json.loads(event)),
                count,
                tuple(sorted(json.loads(versions).items())),
            )

    def events(self) -> Iterator[tuple[Event, int]]:
        """Equal events together with how often they were released, in order of first appearance."""
        query = "SELECT event, SUM(count) FROM releases GROUP BY event ORDER BY MIN(sequence)"
        with _LOCK:
            rows = self._connection().execute(query).fetchall()
        for event, count in rows:
            yield Event.from_json(json.loads(event)), int(count)

    def spent(self, delta: float | None = None, accountant: str = "auto") -> float:
        """Epsilon spent so far at `delta` (default: the ledger's), an upper bound.

        `accountant` is a name, or "auto" for the least valid upper bound of the first-party ones.
        """
        delta = self._delta(delta)
        if accountant == "auto":
            return spending(self.events(), delta).epsilon
        return upper_bound(accountant, tuple(self.events()), delta)

    def close(self) -> None:
        """Close the file; a ledger in memory is gone with it."""
        with _LOCK:
            self._closed = True
            self._disconnect()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _delta(self, delta: float | None) -> float:
        delta = self.delta if delta is None else delta
        if delta is None:
            raise LedgerError("spending needs a delta, got none; pass delta or create the ledger with one.")
        fraction("delta", delta)
        return delta

    def _connect(self, *, create: bool) -> sqlite3.Connection:
        in_memory = self.path == ":memory:"
        mode = "rwc" if create else "rw"
        target = self.path if in_memory else f"{Path(self.path).as_uri()}?mode={mode}"
        database = None
        try:
            database = sqlite3.connect(
                target, uri=not in_memory, isolation_level=None, check_same_thread=False, timeout=PATIENCE
            )
            _use_wal(database)
            database.execute("PRAGMA synchronous=FULL")
            self._check_terms(self._create(database))
        except BaseException as error:
            if database is not None:
                database.close()
            if isinstance(error, sqlite3.Error):
                raise LedgerError(
                    f"a ledger must be a writable sqlite file, got {self.path!r}: {error}; check the path "
                    "and its rights."
                ) from error
            raise
        self._process, self._database = os.getpid(), database
        if not in_memory:
            _FILES.add(self)
        return database

    def _disconnect(self) -> None:
        if self._database is not None:
            self._database.close()
        self._database = None

    def _disconnect_for_fork(self) -> None:
        # A thread that forks in the middle of its own write keeps the connection; the child is refused it.
        if self._database is not None and not self._database.in_transaction:
            self._disconnect()

    def _create(self, database: sqlite3.Connection) -> dict[str, Any]:
        """Make the tables unless they exist; returns the terms stored."""
        database.execute("BEGIN IMMEDIATE")
        try:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name='releases'").fetchone():
                for statement in filter(None, (part.strip() for part in _SCHEMA.split(";\n"))):
                    database.execute(statement)
                terms = {"schema": SCHEMA_VERSION} | self._terms()
                rows = [(name, json.dumps(value)) for name, value in terms.items()]
                database.executemany("INSERT INTO terms VALUES (?, ?)", rows)
            stored = dict(database.execute("SELECT name, value FROM terms").fetchall())
            if stored.get("schema") == json.dumps(SCHEMA_VERSION):
                for statement in _NO_REPLACEMENT:
                    database.execute(statement)
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        return {name: json.loads(value) for name, value in stored.items()}

    def _terms(self) -> dict[str, Any]:
        return {"unit": self.unit, "relation": self.relation, "delta": self.delta, "budget": self.budget}

    def _check_terms(self, stored: dict[str, Any]) -> None:
        if stored.get("schema") != SCHEMA_VERSION:
            raise LedgerError(
                f"expected a ledger of schema {SCHEMA_VERSION}, got {stored.get('schema')!r} in "
                f"{self.path!r}; open it with the version of dpfa-core that wrote it."
            )
        for name, value in self._terms().items():
            if stored.get(name) != value:
                raise LedgerError(
                    f"the ledger {self.path!r} was created with {name}={stored.get(name)!r}, got {value!r}; "
                    "open it with its own terms or start another file."
                )

    def _connection(self) -> sqlite3.Connection:
        if self._closed:
            raise LedgerError(f"the ledger {self.path!r} was closed; open it again.")
        if self._database is not None and os.getpid() != self._process:
            raise LedgerError(
                f"the ledger {self.path!r} cannot be used after this fork, its spending would be counted in "
                "two places; open a file with Ledger.open in the new process."
            )
        return self._database or self._connect(create=False)

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with _LOCK:
            try:
                connection = self._connection()
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.Error as error:
                raise LedgerError(f"the ledger {self.path!r} cannot be written: {error}.") from error
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException as error:
                if self._limit is not None:
                    self._limit.forget()
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise LedgerError(f"the ledger {self.path!r} cannot be written: {error}.") from error
                raise

    def _explained(self, event: Event, count: int) -> AbstractContextManager[None]:
        # around the transaction: pricing takes long, and other writers need not wait for it
        return nullcontext() if self._limit is None else self._limit.explained(event, count)

    def _check_relation(self, event: Event) -> None:
        if not isinstance(event, Event):
            raise LedgerError(f"expected an event of dpfa_core.events, got {event!r}.")
        for relation in sampling_relations(event):
            if self.relation is not None and relation != self.relation:
                raise LedgerError(
                    f"this ledger is kept for relation={self.relation!r}, got an event sampled under "
                    f"{relation!r}; use a ledger with that relation."
                )


def _use_wal(database: sqlite3.Connection) -> None:
    # Processes that turn a new file to WAL at once block each other, and sqlite then answers "busy" at once.
    start = time.monotonic()
    while True:
        try:
            database.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > start + PATIENCE:
                raise
            time.sleep(0.01)


def _before_fork() -> None:
    # An sqlite connection must not cross a fork: the child would rely on locks that only its parent holds,
    # and write into a journal that the parent deletes. Both sides connect again when they need to.
    _LOCK.acquire()
    for ledger in list(_FILES):
        ledger._disconnect_for_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


def _absolute(path: str | os.PathLike[str]) -> str:
    # Connections are made again after a fork, perhaps in another working directory.
    return str(Path(path).absolute())


def _last_sequence(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT COALESCE(MAX(sequence), 0) FROM releases").fetchone()[0])


def sampling_relations(event: Any) -> Iterator[str]:
    """The neighbouring relations that `event` names, at any depth."""
    if isinstance(getattr(event, "relation", None), str):
        yield event.relation
    for inner in (getattr(event, "event", None), *getattr(event, "events", ())):
        if isinstance(inner, Event):
            yield from sampling_relations(inner)


def _stored_terms(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        database = sqlite3.connect(Path(path).resolve().as_uri() + "?mode=ro", uri=True)
        try:
            rows = dict(database.execute("SELECT name, value FROM terms").fetchall())
        finally:
            database.close()
    except sqlite3.Error as error:
        raise LedgerError(f"expected a ledger, got {os.fspath(path)!r}: {error}.") from error
    return {name: json.loads(rows.get(name, "null")) for name in ("unit", "relation", "delta", "budget")}


def _versions(mechanism: str, backend: str) -> dict[str, str]:
    found = {"dpfa-core": dpfa_core.__version__}
    for registry, name in ((MECHANISMS, mechanism), (BACKENDS, backend)):
        found |= _version(registry, name)
    return found


def _version(registry: Registry, name: str) -> dict[str, str]:
    return {entry.distribution: entry.version for entry in registry.entries() if entry.name == parts(name)[0]}

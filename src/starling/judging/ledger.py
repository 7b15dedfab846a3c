"""The table of calls in `calls.sqlite`: what was asked, and what came back.

One row a call, keyed by its content.  Rows hold no clock and no host, so two runs of one recipe
have the same rows; which calls a killed run may have paid for twice stands in a table of its own
(`lost`), because that depends on when the run was killed.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starling.base.errors import DataError
from starling.models.interfaces import Failure, Reply, Request, Usage

FORMAT = 1
BUSY_SECONDS = 30.0

SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    key TEXT PRIMARY KEY,
    identity TEXT NOT NULL,
    request_id TEXT NOT NULL,
    request TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('sent', 'answered', 'failed', 'unknown')),
    text TEXT,
    finish_reason TEXT,
    prompt_tokens INTEGER,
    response_tokens INTEGER,
    ids TEXT,
    reason TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lost (
    key TEXT PRIMARY KEY,
    times INTEGER NOT NULL
) WITHOUT ROWID;
"""

# An answer is final: nothing that comes later may write over a reply that reached us.
_WRITE = """
INSERT INTO calls VALUES
    (:key, :identity, :request_id, :request, :state, :text, :finish_reason, :prompt_tokens,
     :response_tokens, :ids, :reason)
ON CONFLICT (key) DO UPDATE SET
    request_id = excluded.request_id, state = excluded.state, text = excluded.text,
    finish_reason = excluded.finish_reason, prompt_tokens = excluded.prompt_tokens,
    response_tokens = excluded.response_tokens, ids = excluded.ids, reason = excluded.reason
WHERE calls.state != 'answered'
"""


class Ledger:
    """One connection to `calls.sqlite`, for the calls of one responder.

    Raises DataError for a file that is no ledger, is of another version, or cannot be written.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._identity = identity
        with _readable_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = _connect(path)
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def mark_lost(self) -> int:
        """Turn the calls a dead run had in flight from sent to unknown, and count them."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO lost SELECT key, 1 FROM calls WHERE state = 'sent' AND identity = ? "
                "ON CONFLICT (key) DO UPDATE SET times = times + 1",
                [self._identity],
            )
            cursor = connection.execute(
                "UPDATE calls SET state = 'unknown' WHERE state = 'sent' AND identity = ?",
                [self._identity],
            )
            return cursor.rowcount

    def find_answer(self, key: str, request: Request) -> Reply | None:
        """The recorded reply to a call, under the id of today's request."""
        with _readable_errors(self._path):
            row = self._connection.execute(
                "SELECT * FROM calls WHERE key = ? AND state = 'answered'", [key]
            ).fetchone()
        if row is None:
            return None
        usage = Usage(row["prompt_tokens"], row["response_tokens"])
        ids = None if row["ids"] is None else tuple(json.loads(row["ids"]))
        return Reply(request.id, row["text"], row["finish_reason"], usage, ids)

    def write_sent(self, key: str, request: Request) -> None:
        """Commit that a call is about to be made."""
        self._write([self._row(key, request, None)])

    def write_outcomes(self, outcomes: Iterable[tuple[str, Request, Reply | Failure]]) -> None:
        """Commit outcomes, all or none."""
        self._write([self._row(key, request, outcome) for key, request, outcome in outcomes])

    def close(self) -> None:
        """Close the file; the last connection to do so removes its -wal and -shm."""
        self._connection.close()

    def _prepare(self) -> None:
        with _readable_errors(self._path):
            [version] = self._connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, FORMAT):
                raise DataError(
                    f"{self._path} is of version {version}, and this program reads {FORMAT}. "
                    "Use the program that wrote it, or move it away to ask every call again."
                )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.executescript(SCHEMA)
            self._connection.execute(f"PRAGMA user_version = {FORMAT}")

    def _row(self, key: str, request: Request, outcome: Reply | Failure | None) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(
            ("text", "finish_reason", "prompt_tokens", "response_tokens", "ids", "reason")
        )
        row |= {"key": key, "identity": self._identity, "request_id": request.id}
        row |= {"request": json.dumps(request_content(request), ensure_ascii=False)}
        match outcome:
            case None:
                return row | {"state": "sent"}
            case Failure(reason=reason):
                return row | {"state": "failed", "reason": reason}
            case Reply():
                return row | {
                    "state": "answered",
                    "text": outcome.text,
                    "finish_reason": outcome.finish_reason,
                    "prompt_tokens": outcome.usage.prompt_tokens,
                    "response_tokens": outcome.usage.response_tokens,
                    "ids": None if outcome.ids is None else json.dumps(outcome.ids),
                }

    def _write(self, rows: list[dict[str, Any]]) -> None:
        with self._transaction() as connection:
            connection.executemany(_WRITE, rows)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _readable_errors(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            # Commits at the end of the block and rolls back when it raises.
            with self._connection:
                yield self._connection


def request_content(request: Request) -> dict[str, Any]:
    """What makes a call the call it is; not its id, which only names it, nor its subject."""
    return {
        "messages": [message.model_dump() for message in request.messages],
        "sampling": asdict(request.sampling),
        "mode": request.mode,
    }


def ledger_rows(path: Path) -> list[dict[str, Any]]:
    """All calls of a ledger, sorted by key: two ledgers are equal when these lists are.

    Raises DataError when there is no such file or it is no ledger.
    """
    return _read_rows(path, "SELECT * FROM calls ORDER BY key")


def lost_calls(path: Path) -> dict[str, int]:
    """How often each call, by key, was in flight when a run died.  Raises like `ledger_rows`."""
    rows = _read_rows(path, "SELECT * FROM lost ORDER BY key")
    return {row["key"]: row["times"] for row in rows}


def _read_rows(path: Path, query: str) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"there is no ledger {path}.")
    with _readable_errors(path):
        connection = _connect(path)
        try:
            return [dict(row) for row in connection.execute(query)]
        finally:
            connection.close()


def _connect(path: Path) -> sqlite3.Connection:
    # Without an isolation level sqlite3 opens no transactions of its own.
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    connection.row_factory = sqlite3.Row
    return connection


@contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    """Turn what a disk or another program can cause into a DataError; our own bugs pass."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        raise DataError(
            f"cannot use the ledger {path}: {error}. Make sure that no other run uses this folder "
            "and that there is room on the disk, then run the same command again."
        ) from error
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise
        raise DataError(
            f"{path} is damaged: {error}. Restore it, or move it away to ask every call again."
        ) from error

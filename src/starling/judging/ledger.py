"""The table of calls in `calls.sqlite`: what was asked, and what came back.

One row a call, keyed by its content.  Rows hold no clock and no host, so two runs of one recipe
have the same rows; which calls a killed run may have paid for twice stands in a table of its own
(`lost`), because that depends on when the run was killed.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from starling.base.errors import DataError
from starling.models.interfaces import Failure, Reply, Request, Sampling, Usage

FORMAT = 1
BUSY_SECONDS = 30.0

SCHEMA = f"""
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
CREATE TABLE IF NOT EXISTS lost (key TEXT PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {FORMAT};
"""

_WRITE = """
INSERT OR REPLACE INTO calls VALUES
    (:key, :identity, :request_id, :request, :state, :text, :finish_reason, :prompt_tokens,
     :response_tokens, :ids, :reason)
"""


class Ledger:
    """One connection to `calls.sqlite`, for one responder; DataError when it cannot be used."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._identity = identity
        with _readable_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = _connect(path)
            [version] = self._connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, FORMAT):
                self.close()
                raise DataError(
                    f"{path} is of version {version}, and this program reads {FORMAT}. "
                    "Use the program that wrote it, or move it away to ask every call again."
                )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.executescript(SCHEMA)

    def mark_lost(self) -> int:
        """Turn the calls a dead run had in flight from sent to unknown, and count them."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO lost SELECT key, 1 FROM calls WHERE state = 'sent' AND identity = ? "
                "ON CONFLICT (key) DO UPDATE SET times = times + 1",
                [self._identity],
            )
            return connection.execute(
                "UPDATE calls SET state = 'unknown' WHERE state = 'sent' AND identity = ?",
                [self._identity],
            ).rowcount

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

    def write(self, calls: Iterable[tuple[str, Request, Reply | Failure | None]]) -> None:
        """Commit calls by key, all or none: what came back; None for what is about to be sent."""
        rows = [self._row(*call) for call in calls]
        with self._transaction() as connection:
            connection.executemany(_WRITE, rows)

    def close(self) -> None:
        """Close the file; the last connection to do so removes its -wal and -shm."""
        self._connection.close()

    def _row(self, key: str, request: Request, outcome: Reply | Failure | None) -> dict[str, Any]:
        reply = outcome if isinstance(outcome, Reply) else None
        state = "sent" if outcome is None else "failed" if reply is None else "answered"
        return {
            "key": key,
            "identity": self._identity,
            "request_id": request.id,
            "request": json.dumps(request_content(request), ensure_ascii=False),
            "state": state,
            "text": reply and reply.text,
            "finish_reason": reply and reply.finish_reason,
            "prompt_tokens": reply and reply.usage.prompt_tokens,
            "response_tokens": reply and reply.usage.response_tokens,
            "ids": json.dumps(reply.ids) if reply and reply.ids is not None else None,
            "reason": outcome.reason if isinstance(outcome, Failure) else None,
        }

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
        # Settings at their default are left out: one added later does not make old calls new.
        "sampling": {
            field.name: value
            for field in fields(Sampling)
            if (value := getattr(request.sampling, field.name)) != field.default
            or field.name in ("temperature", "seed")
        },
        "mode": request.mode,
    }


def _connect(path: Path) -> sqlite3.Connection:
    # Without an isolation level sqlite3 opens no transactions of its own.
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    connection.row_factory = sqlite3.Row
    return connection


@contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    """Turn what a disk or another program can cause into a DataError."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        raise DataError(
            f"cannot use the ledger {path}: {error}. Make sure that no other run uses this folder "
            "and that there is room on the disk, then run the same command again."
        ) from error
    except sqlite3.DatabaseError as error:
        raise DataError(
            f"{path} is damaged: {error}. Restore it, or move it away to ask every call again."
        ) from error

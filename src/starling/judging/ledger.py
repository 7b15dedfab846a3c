"""The table of calls in `calls.sqlite`: what was asked, and what came back.

One row a call, keyed by its content.  Rows of `calls` hold no clock and no host, so two runs of one
recipe have the same rows.  What depends on a run's luck stands in tables of its own: `lost`, how
often each call was in flight when a run ended; `attempts`, each that failed, and why; `timing`, how
long each reply took.  `likely` has a reply's top logprobs, where they were asked for;
`served`, what the server called its model.

A call that has its answer is `answered`; where that is no usable reply (empty, refused, filtered),
`reason` says so and `text` is null.

A row that is committed survives `kill -9`; a power cut may cost the last moments' rows, never the
file (synchronous = NORMAL: a commit takes 0.11 ms of the caller's time instead of 0.38).
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from starling.base.errors import DataError
from starling.models.completion import Unusable
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
CREATE TABLE IF NOT EXISTS attempts (
    key TEXT, number INTEGER, reason TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, response_tokens INTEGER NOT NULL, PRIMARY KEY (key, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS timing (key TEXT PRIMARY KEY, seconds REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS likely (key TEXT PRIMARY KEY, logprobs TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS served (key TEXT PRIMARY KEY, model TEXT NOT NULL) WITHOUT ROWID;
-- Opening a file looks for states and sums; without this it would read every request.
CREATE INDEX IF NOT EXISTS states ON calls (identity, state, prompt_tokens, response_tokens);
PRAGMA user_version = {FORMAT};
"""

_SEND = """
INSERT OR REPLACE INTO calls (key, identity, request_id, request, state) VALUES (?, ?, ?, ?, 'sent')
"""
_END = """
UPDATE calls SET state = :state, text = :text, finish_reason = :finish_reason,
    prompt_tokens = :prompt_tokens, response_tokens = :response_tokens, ids = :ids, reason = :reason
WHERE key = :key
"""
_ADD_ATTEMPT = """
INSERT INTO attempts SELECT ?1, count(*) + 1, ?2, 0, 0 FROM attempts WHERE key = ?1
"""
# How many calls there were, how many tokens, and replies without a count of them.
_PAST = (
    "SELECT count(*), sum(prompt_tokens), sum(response_tokens), "
    "sum(prompt_tokens = 0 OR response_tokens = 0) FROM calls "
    "WHERE identity = ? AND state = 'answered'",
    "SELECT count(*), sum(attempts.prompt_tokens), sum(attempts.response_tokens), 0 "
    "FROM attempts JOIN calls USING (key) WHERE identity = ?",
    "SELECT sum(times), 0, 0, 0 FROM lost JOIN calls USING (key) WHERE identity = ?",
)


class Call(NamedTuple):
    """A request, and the key of its content."""

    key: str
    request: Request
    content: dict[str, Any]


class Ended(NamedTuple):
    """What a call came to, and why attempts failed that are not in the ledger yet."""

    call: Call
    outcome: Reply | Failure
    failed: Sequence[str]


class Past(NamedTuple):
    """What a responder was asked by all runs so far: every attempt, and the tokens of replies."""

    calls: int
    prompt_tokens: int
    response_tokens: int
    uncounted: int
    """Replies without a count of tokens."""


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
            self._connection.execute("PRAGMA synchronous = NORMAL")
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

    def past(self) -> Past:
        """What all runs so far have asked, and may have paid for."""
        with _readable_errors(self._path):
            found = [self._connection.execute(sql, [self._identity]).fetchone() for sql in _PAST]
        return Past(*(sum(row[column] or 0 for row in found) for column in range(4)))

    def find_answer(self, call: Call) -> Reply | Unusable | None:
        """The recorded answer to a call, under the id of today's request."""
        with _readable_errors(self._path):
            row = self._connection.execute(
                "SELECT * FROM calls LEFT JOIN timing USING (key) LEFT JOIN likely USING (key) "
                "LEFT JOIN served USING (key) WHERE key = ? AND state = 'answered'",
                [call.key],
            ).fetchone()
        if row is None:
            return None
        usage = Usage(row["prompt_tokens"], row["response_tokens"] or 0)
        if row["text"] is None:
            return Unusable(call.request.id, row["reason"], usage=usage)
        ids = None if row["ids"] is None else tuple(json.loads(row["ids"]))
        found = row["logprobs"]
        return Reply(
            call.request.id,
            row["text"],
            row["finish_reason"],
            usage,
            ids,
            row["seconds"],
            top_logprobs=None if found is None else tuple(json.loads(found)),
            served_by=row["model"],
        )

    def write(self, sent: Iterable[Call] = (), ended: Iterable[Ended] = ()) -> None:
        """Commit calls, all or none: those about to be sent, then those that have ended."""
        with self._transaction() as connection:
            for call in sent:
                request = json.dumps(call.content, ensure_ascii=False)
                row = (call.key, self._identity, call.request.id, request)
                connection.execute(_SEND, row)
            for call, outcome, failed in ended:
                connection.execute(_END, _row(call.key, outcome))
                for reason in failed:
                    connection.execute(_ADD_ATTEMPT, (call.key, reason))
                if isinstance(outcome, Reply) and outcome.seconds is not None:
                    timing = (call.key, outcome.seconds)
                    connection.execute("INSERT OR REPLACE INTO timing VALUES (?, ?)", timing)
                if isinstance(outcome, Reply) and outcome.top_logprobs is not None:
                    likely = (call.key, json.dumps(outcome.top_logprobs, ensure_ascii=False))
                    connection.execute("INSERT OR REPLACE INTO likely VALUES (?, ?)", likely)
                if isinstance(outcome, Reply) and outcome.served_by is not None:
                    served = (call.key, outcome.served_by)
                    connection.execute("INSERT OR REPLACE INTO served VALUES (?, ?)", served)

    def write_attempt(self, call: Call, reason: str) -> None:
        """Commit that an attempt has failed, before there is another."""
        with self._transaction() as connection:
            connection.execute(_ADD_ATTEMPT, (call.key, reason))

    def close(self) -> None:
        """Close the file; the last connection to do so removes its -wal and -shm."""
        self._connection.close()

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


def _row(key: str, outcome: Reply | Failure) -> dict[str, Any]:
    reply = outcome if isinstance(outcome, Reply) else None
    usage = outcome.usage if isinstance(outcome, (Reply, Unusable)) else None
    written = usage and usage.response_tokens
    return {
        "key": key,
        "state": "failed" if usage is None else "answered",
        "text": reply and reply.text,
        "finish_reason": reply and reply.finish_reason,
        "prompt_tokens": usage and usage.prompt_tokens,
        # What is empty may hold no tokens; a 0 would say that the server did not count.
        "response_tokens": written if reply else written or None,
        "ids": json.dumps(reply.ids) if reply and reply.ids is not None else None,
        "reason": outcome.reason if isinstance(outcome, Failure) else None,
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

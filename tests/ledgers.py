"""Read a ledger of calls as it stands on disk."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any


def ledger_rows(path: Path, table: str = "calls") -> list[dict[str, Any]]:
    """All rows, sorted by key: two ledgers are equal when these lists are.

    The table `lost` says how often each call was in flight when a run died.
    """
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY key")]

"""One flat JSON line per step: metrics.jsonl, and timing.jsonl with another path.

On resume the file is cut back to the length that the checkpoint remembers, so that an interrupted
run leaves the same bytes as one that was not. Wall-clock belongs in timing.jsonl alone.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from starling.base.errors import CheckpointError, DataError

KEY = re.compile(r"[a-z][a-z0-9_]*(/[a-z0-9][a-z0-9_]*)+")
"""`stage/noun`, and deeper: `bench/writing/score`."""


class MetricsLog:
    """Appends one line per step to a file, each at once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        # Not buffered: what a full disk refuses must not be tried again when the file is closed.
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Append the numbers of one step.

        Raises ValueError that names the key for NaN, infinity, or a key not like `stage/noun`; then
        nothing is written.  Raises DataError where the disk refuses.
        """
        row: dict[str, float | int] = {"step": int(step)}
        for key, value in values.items():
            if not KEY.fullmatch(key):
                raise ValueError(f"metric {key!r} is not named like 'stage/noun'")
            number = int(value) if isinstance(value, int) else float(value)
            if not math.isfinite(number):
                raise ValueError(f"metric {key!r} is {number} at step {step}")
            row[key] = number
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise self._full(error.strerror or str(error)) from error
        if written < len(line):
            raise self._full("no space left")

    def _full(self, reason: str) -> DataError:
        return DataError(
            f"could not write {self.path}: {reason}. Make room, then run the same command again: "
            "it goes on from the newest checkpoint."
        )

    def offset(self) -> int:
        """Bytes written so far, safe on disk: what a checkpoint remembers."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def cut_back(self, offset: int) -> None:
        """Forget the lines after `offset`; zero empties the file, for a run from the start.

        Raises CheckpointError when the file is shorter or does not end a line there: it is then not
        the file that the checkpoint was saved with.
        """
        size = self.offset()
        if size < offset or self.path.read_bytes()[:offset][-1:] not in (b"", b"\n"):
            raise CheckpointError(
                f"{self.path} holds {size} bytes and does not fit its checkpoint, which stands at "
                f"byte {offset}. Delete the stage's folder to run the stage from its start."
            )
        self._file.truncate(offset)
        self._file.seek(offset)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        self._file.close()

"""One calm line on stderr that says how far a stage is and how long it still takes."""

import shutil
import sys
import time
from contextlib import AbstractContextManager

TERMINAL_SECONDS = 0.25
PLAIN_SECONDS = 15.0


class Progress(AbstractContextManager["Progress"]):
    """`ppo  120/400  30%  2m10s left  kl 0.03`: redrawn in a terminal, else a line now and then.

    Speed is measured from the first update on: what an earlier, interrupted run had done does not
    count as fast work.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label = label
        self.total = total
        self._is_terminal = sys.stderr.isatty()
        self._start_time = self._shown_time = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._is_line_open = False

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` are finished, unless the line is still fresh; the last always shows."""
        now = time.monotonic()
        self._first = self._first or (done, now)
        interval = TERMINAL_SECONDS if self._is_terminal else PLAIN_SECONDS
        is_last = done >= self.total
        if now - self._shown_time < interval and not is_last:
            return
        self._shown_time = now
        first_done, first_time = self._first
        clock = f"done in {_duration(now - self._start_time)}" if is_last else ""
        if first_done < done < self.total:
            left = (now - first_time) * (self.total - done) / (done - first_done)
            clock = f"{_duration(left)} left"
        share = f"{done / self.total:.0%}" if self.total else "100%"
        parts = (self.label, f"{done}/{self.total}", share, clock, note)
        text = "  ".join(part for part in parts if part)
        if self._is_terminal:
            text = f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}"
        self._is_line_open = self._is_terminal and not is_last
        sys.stderr.write(text if self._is_line_open else text + "\n")
        sys.stderr.flush()

    def __exit__(self, *_error: object) -> None:
        """End the line, so that what comes next starts on its own."""
        if self._is_line_open:
            sys.stderr.write("\n")


def _duration(seconds: float) -> str:
    """`8s`, `2m10s`, `3h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"

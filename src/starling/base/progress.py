"""One calm line on stderr that says how far a stage is and how long it still takes."""

import shutil
import sys
import time
from contextlib import AbstractContextManager

TERMINAL_SECONDS = 0.25
PLAIN_SECONDS = 15.0


class Progress(AbstractContextManager["Progress"]):
    """`ppo  120/400  30%  2m10s left  kl 0.03`: redrawn in a terminal, else a line now and then.

    `start` is what an earlier, interrupted run had done: it does not count as fast work.
    """

    def __init__(self, label: str, total: int, *, start: int = 0, enabled: bool = True) -> None:
        self.label = label
        self.total = total
        self.enabled = enabled
        self._is_terminal = sys.stderr.isatty()
        self._start = start
        self._start_time = self._shown_time = time.monotonic()
        self._is_line_open = False

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` are finished, unless the line is still fresh; the last always shows."""
        now = time.monotonic()
        interval = TERMINAL_SECONDS if self._is_terminal else PLAIN_SECONDS
        is_last = done >= self.total
        if not self.enabled or (now - self._shown_time < interval and not is_last):
            return
        self._shown_time = now
        elapsed = now - self._start_time
        clock = f"done in {_duration(elapsed)}" if is_last else ""
        if self._start < done < self.total:
            left = elapsed * (self.total - done) / (done - self._start)
            clock = f"{_duration(left)} left"
        share = f"{done / self.total:.0%}" if self.total else "100%"
        parts = (self.label, f"{done}/{self.total}", share, clock, note)
        text = "  ".join(part for part in parts if part)
        if self._is_terminal:
            text = f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}"
        self._is_line_open = self._is_terminal and not is_last
        sys.stderr.write(text if self._is_line_open else text + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """End the line, so that what comes next starts on its own."""
        if self._is_line_open:
            sys.stderr.write("\n")
            self._is_line_open = False

    def __exit__(self, *_error: object) -> None:
        self.close()


def _duration(seconds: float) -> str:
    """`8s`, `2m10s`, `3h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"

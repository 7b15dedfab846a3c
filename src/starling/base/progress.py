"""One calm line on stderr that says how far a stage is and how long it still takes."""

import shutil
import sys
import time
from types import TracebackType

TERMINAL_SECONDS = 0.25
PLAIN_SECONDS = 15.0


class Progress:
    """`ppo  120/400  30%  2m10s left  kl 0.03`: redrawn in a terminal, else a line now and then.

    `start` is what an earlier, interrupted run had done: it does not count as fast work.
    """

    def __init__(self, label: str, total: int, *, start: int = 0, enabled: bool = True) -> None:
        self.label = label
        self.total = total
        self.enabled = enabled
        self._is_terminal = sys.stderr.isatty()
        self._start = start
        self._start_time = time.monotonic()
        self._shown_time = self._start_time
        self._is_line_open = False

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` of `total` are finished, unless the last line is still fresh.

        The last one, `done == total`, is always shown.
        """
        now = time.monotonic()
        interval = TERMINAL_SECONDS if self._is_terminal else PLAIN_SECONDS
        is_last = done >= self.total
        if not self.enabled or (now - self._shown_time < interval and not is_last):
            return
        self._shown_time = now
        text = "  ".join(part for part in (*self._parts(done, now), note) if part)
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{text[:width]}")
            self._is_line_open = True
            if is_last:
                self.close()
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """End the line, so that what comes next starts on its own."""
        if self._is_line_open:
            sys.stderr.write("\n")
            sys.stderr.flush()
            self._is_line_open = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _parts(self, done: int, now: float) -> tuple[str, ...]:
        elapsed = now - self._start_time
        if done >= self.total:
            clock = f"done in {_duration(elapsed)}"
        elif done > self._start:
            left = elapsed * (self.total - done) / (done - self._start)
            clock = f"{_duration(left)} left"
        else:
            clock = ""
        share = f"{done / self.total:.0%}" if self.total else "100%"
        return self.label, f"{done}/{self.total}", share, clock


def _duration(seconds: float) -> str:
    """`8s`, `2m10s`, `3h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"

"""`starling` as a user types it, which notes where it stands and may be told to die there.

    python tools/kill_points.py NOTES - - - ppo mini.yaml --out runs/mini
    python tools/kill_points.py NOTES update 3 0.4 ppo mini.yaml --out runs/mini

NOTES is a file that gets a line when a phase begins and one when it ends: its name, which one it is
(from 1), and the seconds since the start.  The second form sends SIGKILL to itself 0.4 s after the
third update began, or at its very end where it is shorter.  A rollout inside a validation is part
of that.  Made for `kill_test.py`.
"""

import functools
import importlib
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PHASES = {
    "rollout": ("starling.ppo.rollout", "Collector", "collect"),
    "update": ("starling.ppo.train", None, "update"),
    "validation": ("starling.ppo.select", "Validator", "measure"),
    "save": ("starling.models.training", "Journal", "save"),
    "model": ("starling.ppo.train", None, "save_model"),
}
"""Where each is called: a module, a class in it, and the function."""


class Death(NamedTuple):
    """So many seconds into the phase of this name and number."""

    phase: str
    number: int
    seconds: float


class Notes:
    """Writes down what begins and ends, and ends the process where it is told to."""

    def __init__(self, path: Path, death: Death | None) -> None:
        self._file = path.open("w", buffering=1)
        self._death = death
        self._started = time.monotonic()
        self._counts: Counter[str] = Counter()
        self._is_inside = False

    def watch(self, phase: str) -> None:
        """Have every call of the phase's function noted."""
        module, owner, name = PHASES[phase]
        place = importlib.import_module(module)
        place = place if owner is None else getattr(place, owner)
        setattr(place, name, self._noted(phase, getattr(place, name)))

    def _noted(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def noted(*arguments: Any, **options: Any) -> Any:
            if self._is_inside:
                return function(*arguments, **options)
            self._is_inside = True
            self._counts[phase] += 1
            is_last = self._death is not None and self._death[:2] == (phase, self._counts[phase])
            self._write("begin", phase)
            if is_last:
                assert self._death is not None
                threading.Timer(self._death.seconds, _die).start()
            try:
                return function(*arguments, **options)
            finally:
                if is_last:
                    _die()
                self._write("end", phase)
                self._is_inside = False

        return noted

    def _write(self, what: str, phase: str) -> None:
        seconds = time.monotonic() - self._started
        self._file.write(f"{what} {phase} {self._counts[phase]} {seconds:.4f}\n")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """Run the command that follows; returns its exit status."""
    path, phase, number, seconds, *command = sys.argv[1:]
    death = None if phase == "-" else Death(phase, int(number), float(seconds))
    notes = Notes(Path(path), death)
    for name in PHASES:
        notes.watch(name)
    from starling.cli import main as starling

    return starling(command)


if __name__ == "__main__":
    sys.exit(main())

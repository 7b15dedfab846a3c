"""Where a run runs: rank, device, threads, and whether it was asked to stop.

The only place that asks for a device, sets the number of threads or handles signals.
"""

import os
import signal
import threading
from dataclasses import dataclass, field
from types import FrameType

from starling.base.errors import RecipeError, Stopped
from starling.base.spending import Spending

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """Remembers SIGINT or SIGTERM until the run reaches a step boundary; a second SIGINT stops it.

    Listens inside `with flag:`, in the main thread only; elsewhere it stays down.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._earlier: dict[int, object] = {}

    def check(self) -> None:
        """Raise Stopped if a signal has arrived. Call it after each step's checkpoint is due."""
        if self.signal_number is not None:
            raise Stopped(self.signal_number)

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._earlier[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]
        self._earlier.clear()

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number = number
            # os.write, since a handler may interrupt a print or a log call halfway.
            os.write(2, b"\nStopping after this step; Ctrl-C stops at once.\n")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Context:
    """What a stage may know about the machine it runs on."""

    rank: int
    world_size: int
    device: str
    threads: int
    seed: int = 0
    """Every random stream of the run is derived from it."""
    stop: StopFlag = field(default_factory=StopFlag)
    spending: Spending = field(default_factory=Spending)


def single_process_context(
    threads: int, device: str | None = "cpu", *, seed: int = 0, spending: Spending | None = None
) -> Context:
    """Set torch up for one process on one device, so that the same run gives the same bytes.

    On the CPU, an operation that has no repeatable version is an error. On a GPU it is a warning,
    since some that models need have none there. Raises like `choose_device`.
    """
    # Read by cuBLAS when it starts; without it, matmuls on a GPU are not repeatable.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    device = choose_device(device)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=device != "cpu")
    # Filling fresh memory only makes reads of it repeatable, which are bugs; it costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    spending = spending or Spending()
    return Context(
        rank=0, world_size=1, device=device, threads=threads, seed=seed, spending=spending
    )


def choose_device(wanted: str | None) -> str:
    """The device asked for, or a GPU when there is one; RecipeError for one that is not here."""
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = wanted.partition(":")
    if wanted != "cpu" and (kind != "cuda" or (number and not number.isdigit())):
        raise RecipeError(f"device is {wanted!r}; it must be 'cpu', 'cuda' or 'cuda:<number>'.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise RecipeError(
            f"device is {wanted!r}, and {torch.cuda.device_count()} CUDA devices were found. "
            "Set device: cpu, or run where there is a GPU."
        )
    return wanted

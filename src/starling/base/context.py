"""Where a run runs: rank, device, threads, and whether it was asked to stop.

The only place that asks for a device, sets the number of threads, handles signals or joins the
other processes of a run (`torchrun` says in the environment which they are).
"""

import dataclasses
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType

from starling.base.errors import RecipeError, Stopped
from starling.base.spending import Spending

SIGNALS = (signal.SIGINT, signal.SIGTERM)

WAIT = timedelta(days=30)
"""Processes wait for rank 0 through whole stages; a dead one ends the others at once."""

LEAVE = timedelta(seconds=2)
"""How long the others let rank 0 leave first; one that waits for them hears when they are gone."""


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
            if os.environ.get("RANK", "0") == "0":
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

    def most(self, value: int) -> int:
        """The largest value that any process gives; all of them have to ask."""
        if self.world_size == 1:
            return value
        import torch
        import torch.distributed as dist

        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def own_path(self, path: Path) -> Path:
        """The path itself on rank 0; elsewhere one that is removed when the stage ends."""
        return path if self.rank == 0 else path.with_name(f".tmp-rank-{self.rank}-{path.name}")


@contextmanager
def joined_processes() -> Iterator[tuple[int, int]]:
    """Join the processes that torchrun started; yields our rank and how many there are.

    The first process that fails says why; the others then leave with its exit status, silently.
    Ranks above 0 log nothing below errors.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield 0, 1
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://", timeout=WAIT))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAIT)
    if rank > 0:
        logging.disable(logging.WARNING)
    try:
        yield rank, size
    except BaseException as error:
        if store.add("failures", 1) > 1:
            raise SystemExit(int(store.get("status"))) from error
        store.set("status", str(getattr(error, "exit_code", 1)))
        raise
    finally:
        logging.disable(logging.NOTSET)
        dist.destroy_process_group()
        if rank == 0:
            store.set("rank 0 left", "")
        else:
            # torchrun kills the others when one exits, and rank 0 may be putting files back.
            with suppress(RuntimeError):
                store.wait(["rank 0 left"], LEAVE)


def context_from_environment(
    threads: int, device: str | None, *, seed: int, spending: Spending
) -> Context:
    """The context of this process among those that torchrun started, each on a GPU of its own.

    Raises like `choose_device`, and for a numbered GPU that several processes would share.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and choose_device(device).startswith("cuda"):
        if ":" in (device or ""):
            raise RecipeError(f"device is {device!r} for {size} processes; set device: cuda")
        import torch

        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(choose_device(device))
    context = single_process_context(threads, device, seed=seed, spending=spending)
    return dataclasses.replace(context, rank=int(os.environ.get("RANK", "0")), world_size=size)


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

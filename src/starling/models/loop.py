"""What many calls at a time need of the process: an event loop of their own, and open files."""

import asyncio
import atexit
from collections.abc import Callable, Coroutine
from threading import Thread, current_thread
from typing import Any, TypeVar

from starling.base.errors import InputError

try:
    import resource
except ImportError:  # where there is no such limit
    resource = None

Result = TypeVar("Result")

OTHER_FILES = 64
"""Files that a process has open beside its connections."""


class Loop:
    """An event loop in a thread of its own: whatever a caller does meanwhile, it goes on.

    A notebook's loop, which runs in the caller's thread, is not in its way.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self.call = self._loop.call_soon_threadsafe
        self.closers: list[Callable[[], Coroutine[Any, Any, None]]] = []
        """Called at the end, in this order."""
        # A daemon, so that a program which dies with an iterator open ends.
        self._thread = Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def begin(
        self, work: Coroutine[Any, Any, Result], on_end: Callable[[asyncio.Task[Result]], object]
    ) -> None:
        """Start something whose task is handed over, in the loop's thread, when it has ended."""
        self.call(lambda: self._loop.create_task(work).add_done_callback(on_end))

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Wait for something in the caller's thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """End what still runs, then call the closers, then end the thread."""
        atexit.unregister(self.close)
        if current_thread() is self._thread:  # where an iterator that nobody holds may be collected
            self._loop.stop()
            return
        try:
            self.run(_end_others())
            for closer in self.closers:
                self.run(closer())
        finally:
            self.call(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _end_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def allow_connections(number: int) -> None:
    """Make sure that the system lets this process open so many; InputError where it does not."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = number + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(
            f"{number} calls at a time need {needed} open files, and the system allows this "
            f"process {hard}. Lower concurrency to {max(hard - OTHER_FILES, 1)}, or raise the "
            "limit (ulimit -Hn)."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))

"""Runs in forks that end themselves at a chosen point, and what must be equal afterwards.

A fork after the imports takes no longer than its few steps; it ends itself with SIGKILL, which no
handler and no `finally` survives.
"""

import hashlib
import itertools
import json
import os
import shutil
import signal
import traceback

from starling import pipeline
from starling.base import checkpoint
from starling.base.errors import Stopped
from starling.base.metrics import MetricsLog

LAST = "last-checkpoints"
"""Where `keep_checkpoints` puts them, in the run folder."""


def in_child(run, prepare=lambda: None):
    """Call `run` in a fork, after `prepare` there; its exit status, negative for a signal.

    The status of a run that returns a number is that number.
    """
    child = os.fork()
    if child == 0:
        status = 99
        try:
            prepare()
            status = run() or 0
        except Stopped as stopped:
            status = stopped.exit_code
        except BaseException:  # noqa: B036
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def send_self(number, owner, name, count):
    """Have the `count`-th call of owner.name send this process a signal before it does its work."""
    original = getattr(owner, name)
    calls = itertools.count(1)

    def wrapped(*arguments, **options):
        if next(calls) == count:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def die_in(owner, name, count=1):
    """SIGKILL at the `count`-th call of owner.name."""
    return lambda: send_self(signal.SIGKILL, owner, name, count)


def die_after_step(step):
    """Metrics of the step are written, nothing else: each step logs to metrics, then to timing."""
    return die_in(MetricsLog, "log", 2 * step)


def die_in_half_a_save():
    """The second checkpoint's tensors are half on disk, under the temporary name."""
    original = checkpoint.save_file
    calls = itertools.count(1)

    def half(tensors, path):
        original(tensors, path)
        if next(calls) == 2:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = half


def keep_checkpoints():
    """Copy the checkpoints of a stage that is done into the run folder, before they are removed."""
    original = pipeline.finish

    def finish(folder, *arguments):
        shutil.copytree(folder / "checkpoints", folder.parent / LAST)
        original(folder, *arguments)

    pipeline.finish = finish


def contents(out):
    """Every file's hash, but for wall-clock and the lock; of the manifest what it says was made."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or path.name in ("timing.jsonl", ".lock"):
            continue
        content = path.read_bytes()
        if path.name == "manifest.json":
            manifest = json.loads(content)
            made = [manifest["key"], manifest["outputs"], manifest["summary"]["figures"]]
            content = json.dumps(made).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found

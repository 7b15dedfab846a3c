"""Writing to disk so that a reader finds the old file or the new one, never half of one."""

import contextlib
import difflib
import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from starling.base.errors import DataError, InputError


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Replace `path` by the chunks: temporary file, fsync, rename, fsync of the folder.

    Makes the folder when it is not there. Raises DataError when the disk refuses (full, read-only);
    then, and when `chunks` itself raises, the file that was there before is untouched.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise DataError(
            f"could not write {path}: {error.strerror or error}. "
            "Make room or choose a folder that can be written, then run the same command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the bytes of a closed file survive a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def quarantine_elsewhere() -> Iterator[Path]:
    """Where bad rows go of files that are only looked at; stays if there are any."""
    folder = Path(tempfile.mkdtemp(prefix="starling-"))
    try:
        yield folder / "quarantine.jsonl"
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def neighbours(path: Path) -> str:
    """What is there instead of a file that is not."""
    folder = path.parent
    if not folder.is_dir():
        return f"There is no folder {folder} either."
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or names[:3]
    return f"{folder} holds {', '.join(near)}." if near else f"{folder} is empty."


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process out of a folder; the kernel lets go whatever happens to us."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise InputError(
            f"cannot write to the folder {folder}: {error.strerror or error}. "
            "Choose another with --out."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another starling process writes to {folder}. "
                "Wait for it, stop it, or choose another folder with --out."
            ) from error
        yield

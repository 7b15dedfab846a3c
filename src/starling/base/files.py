"""Writing to disk so that a reader finds the old file or the new one, never half of one."""

import os
from collections.abc import Iterable
from pathlib import Path

from starling.base.errors import DataError


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Replace `path` by the chunks: temporary file, fsync, rename, fsync of the folder.

    Makes the folder when it is not there. Raises DataError when the disk refuses (full, read-only);
    then, and when `chunks` itself raises, the file that was there before is untouched.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("wb")
    except OSError as error:
        raise _refused(path, error) from error
    try:
        with file:
            # Not writelines: an OSError of the iterable is not one of our disk.
            for chunk in chunks:
                _write(file.write, chunk, path)
            _write(_flush_and_sync, file, path)
        _write(temporary.replace, path, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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


def _write(operation, argument, path: Path) -> None:
    try:
        operation(argument)
    except OSError as error:
        raise _refused(path, error) from error


def _flush_and_sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _refused(path: Path, error: OSError) -> DataError:
    return DataError(
        f"could not write {path}: {error.strerror or error}. "
        "Make room or choose a folder that can be written, then run the same command again."
    )

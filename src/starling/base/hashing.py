"""Content hashes, SHA-256 in hex: how a stage notices that its inputs have changed."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from starling.base.errors import DataError


def hash_file(path: Path) -> str:
    """The hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tree(path: Path, *, ignore: Collection[str] = ()) -> str:
    """The hash of a folder: the names and contents of all files in it, at any depth.

    Entries directly in the folder that are named in `ignore` do not count, nor do empty folders,
    times and permissions. Links count as what they point to. Raises DataError when there is no such
    folder.
    """
    if not path.is_dir():
        raise DataError(
            f"there is no folder {path}. Check the path, or run the stage that makes it."
        )
    names = sorted(
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if file.is_file() and file.relative_to(path).parts[0] not in ignore
    )
    return hash_json([[name, hash_file(path / name)] for name in names])


def hash_json(value: Any) -> str:
    """The hash of a JSON value; the order of an object's keys does not count.

    Raises ValueError for NaN and infinity and TypeError for what is not JSON.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()

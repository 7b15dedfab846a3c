"""Content hashes, SHA-256 in hex: how a stage notices that its inputs have changed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from starling.base.errors import DataError


def hash_file(path: Path) -> str:
    """The hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tree(path: Path) -> str:
    """The hash of a folder: the names and contents of all files in it, at any depth.

    Empty folders, times and permissions do not count; links count as what they point to. Raises
    DataError when there is no such folder.
    """
    if not path.is_dir():
        raise DataError(
            f"there is no folder {path}. Check the path, or run the stage that makes it."
        )
    names = sorted(f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file())
    return hash_json([[name, hash_file(path / name)] for name in names])


def hash_json(value: Any) -> str:
    """The hash of a JSON value; the order of an object's keys does not count."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()

"""A stage folder's state on disk: what it was made from, whether it still holds, who may clear it.

    manifest.json   written last: the key, the inputs, every output's hash, where and when
    stage.json      there while the stage runs, or after a kill: the key it runs under

The key is a hash of all that can change the result.  Commit, package versions and host are
recorded, never compared.  calls.sqlite holds replies that were paid for: it is no output, and
clearing a stage leaves it.
"""

import functools
import logging
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from starling import __version__
from starling.base.errors import DataError
from starling.base.hashing import hash_file
from starling.base.jsonl import read_json, write_json
from starling.base.stage import Summary

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MARKER = "stage.json"
CHECKPOINTS = "checkpoints"
CALLS = "calls.sqlite"
TEMPORARY = ".tmp-"
NO_OUTPUTS = (MANIFEST, MARKER, CHECKPOINTS, "timing.jsonl")
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic")


class State(Enum):
    """What a stage folder is, compared with what it should be."""

    ABSENT = "not made yet"
    FRESH = "made from exactly this"
    STALE = "made from something else"
    DAMAGED = "made from exactly this, but changed since"
    INTERRUPTED = "half made from exactly this"


@dataclass(frozen=True)
class Origin:
    """What a stage is made from: the hash of all of it, and its input files for the record."""

    stage: str
    format_version: int
    key: str
    inputs: dict[str, Any]


def state_of(folder: Path, key: str) -> State:
    """Compare a stage folder with the key of what it should hold.

    Raises DataError for a folder with files in it that no stage claims.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        if manifest["key"] != key:
            return State.STALE
        return State.DAMAGED if damaged_outputs(folder, manifest) else State.FRESH
    if (folder / MARKER).exists():
        is_ours = read_json(folder / MARKER)["key"] == key
        return State.INTERRUPTED if is_ours else State.STALE
    found = sorted(_files(folder))
    if found:
        raise DataError(
            f"{folder} holds files that no stage of starling claims: {_some(found)}. "
            "Move or delete them, or choose another run folder with --out."
        )
    return State.ABSENT


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage; None when it has none."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not {"key", "outputs", "summary"} <= manifest.keys():
        raise DataError(f"{path} is no manifest. Delete the folder {folder} to have it made again.")
    return manifest


def damaged_outputs(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """The outputs that are gone, or whose bytes are no longer those of the manifest."""
    return [
        name
        for name, digest in manifest["outputs"].items()
        if not (folder / name).is_file() or hash_file(folder / name) != digest
    ]


def begin(folder: Path, key: str) -> None:
    """Claim the folder for a run under this key, and remove what an earlier one made there.

    The claim comes first, so that a kill in between leaves a folder that is known to be ours.
    Files that nothing of ours made stay, and are not counted as outputs later.
    """
    kept = _not_ours(folder)
    made = sorted(set(_files(folder)) - set(kept))
    write_json(folder / MARKER, {"key": key, "kept": kept})
    if kept:
        logger.warning("%s also holds %s, which stays as it is", folder, _some(kept))
    for name in made:
        if name not in (MANIFEST, MARKER) and not name.startswith(CALLS):
            (folder / name).unlink(missing_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    _remove_empty_folders(folder)


def finish(folder: Path, origin: Origin, summary: Summary, started: datetime) -> None:
    """Hash the outputs and write the manifest; then the marker and the checkpoints go."""
    kept = set(read_json(folder / MARKER)["kept"])
    for path in _leftovers(folder):
        path.unlink()
    outputs = {
        name: hash_file(folder / name)
        for name in sorted(_files(folder))
        if name.partition("/")[0] not in NO_OUTPUTS
        and not name.startswith(CALLS)
        and name not in kept
    }
    write_json(
        folder / MANIFEST,
        {
            "stage": origin.stage,
            "format_version": origin.format_version,
            "key": origin.key,
            "inputs": origin.inputs,
            "outputs": outputs,
            "summary": {"sentence": summary.sentence, "figures": summary.figures},
            "started": started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(UTC) - started).total_seconds(), 3),
            **_environment(),
        },
    )
    tidy(folder)


def tidy(folder: Path) -> None:
    """Remove what only a running stage needs; a kill may have come between manifest and this."""
    (folder / MARKER).unlink(missing_ok=True)
    if (folder / CHECKPOINTS).exists():
        shutil.rmtree(folder / CHECKPOINTS)
    _remove_empty_folders(folder)


def _not_ours(folder: Path) -> list[str]:
    """Files that were there before the stage, or that someone added to a finished one."""
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        assert manifest is not None
        made = manifest["outputs"].keys()
        return sorted(
            name
            for name in _files(folder)
            if name not in made
            and name.partition("/")[0] not in NO_OUTPUTS
            and not name.startswith(CALLS)
        )
    if (folder / MARKER).exists():
        return read_json(folder / MARKER)["kept"]
    return []


def _leftovers(folder: Path) -> list[Path]:
    """Temporary files of writes that a kill interrupted."""
    return [
        folder / name
        for name in _files(folder)
        if any(part.startswith(TEMPORARY) for part in Path(name).parts)
    ]


def _files(folder: Path) -> Iterator[str]:
    """Every file's path inside the folder, at any depth; none when there is no folder."""
    return (
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() or path.is_symlink()
    )


def _remove_empty_folders(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


@functools.cache
def _environment() -> dict[str, Any]:
    """Where the stage ran: for the record, never compared."""
    return {
        **_commit(),
        "starling": __version__,
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "host": platform.node(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """The commit of a source checkout; None where Starling was installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    head = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain")
    return {"commit": head, "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

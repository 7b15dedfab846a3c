"""A stage folder's state on disk: what it was made from, whether it still holds, who may clear it.

    manifest.json   written last: the key, the inputs, every output's hash, where and when
    stage.json      there while the stage runs, or after a kill: the key it runs under

The key is a hash of all that can change the result.  Commit, package versions and host are
recorded, never compared.  calls.sqlite holds replies that were paid for: it is no output, and
clearing a stage leaves it.
"""

import contextlib
import functools
import logging
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from starling import __version__
from starling.base.errors import DataError, some
from starling.base.hashing import hash_file
from starling.base.jsonl import read_json, write_json
from starling.base.stage import Summary

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MARKER = "stage.json"
CHECKPOINTS = "checkpoints"
CALLS = "calls.sqlite"
TEMPORARY = ".tmp-"
NO_OUTPUTS = (CHECKPOINTS, "timing.jsonl")
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic")


class State(Enum):
    """What a stage folder is, compared with what it should be."""

    ABSENT = "not made yet"
    FRESH = "made from exactly this"
    STALE = "its settings or inputs changed; it is made again"
    DAMAGED = "made from exactly this, but changed since"
    INTERRUPTED = "going on where an interrupted run stopped"


def state_of(folder: Path, key: str) -> State:
    """Compare a stage folder with the key of what it should hold.

    Raises DataError for a folder with files in it that no stage claims.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        if manifest["key"] != key:
            return State.STALE
        for name, digest in manifest["outputs"].items():
            if not (folder / name).is_file() or hash_file(folder / name) != digest:
                return State.DAMAGED
        return State.FRESH
    if (folder / MARKER).exists():
        marker = read_json(folder / MARKER)
        is_ours = isinstance(marker, dict) and marker.get("key") == key
        return State.INTERRUPTED if is_ours else State.STALE
    found = _files(folder)
    if found:
        raise DataError(
            f"{folder} holds files that no stage of starling claims: {some(found, 3)}. "
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


def begin(folder: Path, key: str) -> None:
    """Claim the folder for a run under this key; what is finished is set aside until `finish`.

    The claim comes first, so that a kill in between leaves a folder that is known to be ours.
    Files that nothing of ours made stay, and are not counted as outputs later.
    """
    is_finished = (folder / MANIFEST).exists()
    aside = _aside(folder)
    if is_finished:
        shutil.rmtree(aside, ignore_errors=True)
    kept = _not_ours(folder)
    write_json(folder / MARKER, {"key": key, "kept": kept})
    if kept:
        logger.warning("%s also holds %s, which stays as it is", folder, some(kept, 3))
    for name in sorted(set(_files(folder)) - set(kept)):
        if is_finished:
            _move(folder / name, aside / name)
        else:
            (folder / name).unlink(missing_ok=True)
    if is_finished:
        _move(folder / MANIFEST, aside / MANIFEST)
    _remove_empty_folders(folder)


def restore(folder: Path) -> None:
    """Put back the finished stage that `begin` set aside, after an attempt that did not start.

    Bad input must not cost a trained model.  An attempt that has checkpoints is left to be resumed.
    """
    aside = _aside(folder)
    if not (aside / MANIFEST).exists() or any((folder / CHECKPOINTS).glob("*")):
        return
    kept = read_json(folder / MARKER)["kept"]
    for name in set(_files(folder)) - set(kept) - {"quarantine.jsonl"}:
        (folder / name).unlink()
    for name in [*_files(aside), MANIFEST]:
        _move(aside / name, folder / name)
    shutil.rmtree(aside)
    tidy(folder)
    logger.info("%s is as it was", folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".previous-{folder.name}")


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)


def finish(folder: Path, origin: Mapping[str, Any], summary: Summary, started: datetime) -> None:
    """Hash the outputs and write the manifest with the stage's origin; then tidy up."""
    kept = read_json(folder / MARKER)["kept"]
    outputs = {}
    for name in _files(folder):
        if TEMPORARY in name:  # of a write that a kill interrupted
            (folder / name).unlink()
        elif name not in kept and name.partition("/")[0] not in NO_OUTPUTS:
            outputs[name] = hash_file(folder / name)
    write_json(
        folder / MANIFEST,
        {
            **origin,
            "outputs": outputs,
            "summary": asdict(summary),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(UTC) - started).total_seconds(), 3),
            **_environment(),
        },
    )
    tidy(folder)


def tidy(folder: Path) -> None:
    """Remove what only a running stage needs; a kill may have come between manifest and this."""
    shutil.rmtree(_aside(folder), ignore_errors=True)
    (folder / MARKER).unlink(missing_ok=True)
    if (folder / CHECKPOINTS).exists():
        shutil.rmtree(folder / CHECKPOINTS)
    _remove_empty_folders(folder)


def _not_ours(folder: Path) -> list[str]:
    """Files that were there before the stage, or that someone added to a finished one."""
    manifest = read_manifest(folder)
    if manifest is None:
        return read_json(folder / MARKER)["kept"] if (folder / MARKER).exists() else []
    found = (name for name in _files(folder) if name.partition("/")[0] not in NO_OUTPUTS)
    return [name for name in found if name not in manifest["outputs"]]


def _files(folder: Path) -> list[str]:
    """The path of every file inside the folder but our own records and the replies paid for."""
    paths = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    return [name for name in names if not name.startswith((MANIFEST, MARKER, CALLS))]


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
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "host": platform.node(),
    }


def _commit() -> dict[str, Any]:
    """The commit of a source checkout; None where Starling was installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    described = ""
    if (root / ".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError):
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
            described = done.stdout.strip()
    commit = described.removesuffix("-dirty")
    return {"commit": commit or None, "dirty": described != commit if commit else None}

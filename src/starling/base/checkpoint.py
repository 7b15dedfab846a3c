"""Save and load a run's exact state: safetensors and JSON, verified by hash, never pickle.

    checkpoints/
      step-000120/tensors.safetensors   weights, optimizer moments, random states
      step-000120/state.json            everything else: schedule, data cursor, file offsets
      step-000120/hashes.json           SHA-256 of the two files above
      .tmp-...                          a save that was interrupted; the next save removes it

A folder gets its final name only when it is complete and on disk, so a kill at any moment leaves
the checkpoints before it and, at most, a folder that nobody reads. One process writes to a folder:
of several, rank 0 does, with whole tensors, and any number of processes resumes from it.
What goes into a snapshot, and comes back out, is in `training_state.py`.
"""

import contextlib
import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from starling.base.errors import CheckpointError
from starling.base.files import sync_file, sync_folder
from starling.base.hashing import hash_file

logger = logging.getLogger(__name__)

FORMAT = 2
TENSORS = "tensors.safetensors"
STATE = "state.json"
HASHES = "hashes.json"
NAME = re.compile(r"step-(\d{6,})")
TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Snapshot:
    """All that a run needs to go on after `step` as if it had not stopped.

    `tensors` are on the CPU when loaded; `state` holds plain JSON values.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class _Damage(Exception):
    """This one checkpoint cannot be used; the message names the file and what is wrong."""


def save_checkpoint(folder: Path, snapshot: Snapshot, *, keep: int = 2) -> Path:
    """Write `folder/step-...`, then remove all but the newest `keep` up to this step.

    Returns the new folder; one of the same step is replaced. Raises CheckpointError when the disk
    refuses, and leaves the older checkpoints as they were.
    """
    value = {"format": FORMAT, "step": snapshot.step, "state": snapshot.state}
    content = json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"
    final = folder / f"step-{snapshot.step:06d}"
    temporary = folder / f"{TEMPORARY}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(f"{TEMPORARY}*"):
            _remove(left_over)
        temporary.mkdir()
        save_file(_unshared(snapshot.tensors), temporary / TENSORS)
        (temporary / STATE).write_bytes(content)
        (temporary / HASHES).write_bytes(_hashes(temporary))
        for name in (TENSORS, STATE, HASHES):
            sync_file(temporary / name)
        sync_folder(temporary)
        _rename(temporary, final)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not save {final}: {error}. The checkpoints before it are untouched. "
            "Make room, then run the same command again: it goes on from the newest."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(folder, snapshot.step, keep)
    return final


def load_newest(folder: Path) -> Snapshot | None:
    """Load the newest checkpoint whose hashes verify; None when there is none at all.

    Passes over damaged ones with a warning that names the file. Raises CheckpointError when all
    that are there are damaged.
    """
    found = _checkpoints(folder)
    for path in reversed(found):
        try:
            return _load(path)
        except _Damage as damage:
            logger.warning("passing over the damaged checkpoint %s: %s", path, damage)
    if not found:
        return None
    raise CheckpointError(
        f"every checkpoint in {folder} is damaged ({len(found)} found; the warnings say how). "
        f"Restore one from a copy, or delete {folder} to run the stage from its start."
    )


def _load(path: Path) -> Snapshot:
    try:
        _verify(path)
        saved = json.loads((path / STATE).read_bytes())
        if saved["format"] != FORMAT:
            raise _Damage(f"{STATE} has format {saved['format']}, this version reads {FORMAT}")
        if _step_of(path) != saved["step"]:
            raise _Damage(f"{STATE} is of step {saved['step']}: the folder was renamed")
        tensors = load_file(path / TENSORS)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise _Damage(str(error)) from error
    return Snapshot(saved["step"], tensors, saved["state"])


def _verify(path: Path) -> None:
    """Raise _Damage unless hashes.json is, byte for byte, what the two files call for."""
    for name in (TENSORS, STATE, HASHES):
        if not (path / name).is_file():
            raise _Damage(f"{name} is missing")
    stored, actual = (path / HASHES).read_bytes(), _hashes(path)
    if stored != actual:
        with contextlib.suppress(ValueError, LookupError, TypeError):
            expected = json.loads(stored)
            for name, found in json.loads(actual).items():
                if found["sha256"] != expected[name]["sha256"]:
                    raise _Damage(f"{name} does not match its hash")
        raise _Damage(f"{HASHES} is not as it was written")


def _hashes(path: Path) -> bytes:
    files = {name: {"sha256": hash_file(path / name)} for name in (TENSORS, STATE)}
    return json.dumps(files, indent=2).encode() + b"\n"


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, of which no two share memory (tied weights do)."""
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def _rename(temporary: Path, final: Path) -> None:
    if final.exists():
        # A folder cannot be renamed onto another. A kill between the two loses this step, and the
        # run then goes on from the checkpoint before it.
        shutil.rmtree(final)
    temporary.rename(final)
    sync_folder(final.parent)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove older checkpoints; those of later steps are damaged ones, left to be looked at."""
    up_to_now = [path for path in _checkpoints(folder) if _step_of(path) <= step]
    for path in up_to_now[:-keep]:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder; one that stays is a waste of room, not a reason to stop."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("could not remove %s: %s", path, error)


def _checkpoints(folder: Path) -> list[Path]:
    """The folders named like checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))

import errno
import json
import logging
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from starling.base import checkpoint
from starling.base.checkpoint import Snapshot, load_newest, save_checkpoint
from starling.base.errors import CheckpointError

FILES = ["tensors.safetensors", "state.json", "hashes.json"]


def snapshot(step):
    return Snapshot(
        step,
        {"policy/weight": torch.full((3, 2), step / 3), "rng/cpu": torch.arange(9).byte()},
        {"cursor": step * 10, "kl_coef": step / 7, "seen": ["a", None, True]},
    )


def assert_is(loaded, step):
    expected = snapshot(step)
    assert (loaded.step, loaded.state) == (expected.step, expected.state)
    assert loaded.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype


def names(folder):
    return sorted(os.listdir(folder))


def test_what_was_saved_is_loaded(tmp_path):
    path = save_checkpoint(tmp_path / "checkpoints", snapshot(120))
    assert path == tmp_path / "checkpoints" / "step-000120"
    assert names(path) == sorted(FILES)
    assert names(path.parent) == ["step-000120"]
    assert_is(load_newest(tmp_path / "checkpoints"), 120)


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert load_newest(tmp_path / "checkpoints") is None
    (tmp_path / ".tmp-step-000001").mkdir()
    (tmp_path / "step-000002").touch()
    (tmp_path / "model-100").mkdir()
    assert load_newest(tmp_path) is None


def test_the_newest_is_by_number_and_only_so_many_are_kept(tmp_path):
    for step in (8, 999_999, 1_000_000):
        save_checkpoint(tmp_path, snapshot(step), keep=2)
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    assert_is(load_newest(tmp_path), 1_000_000)


def test_at_least_one_is_kept(tmp_path):
    save_checkpoint(tmp_path, snapshot(1), keep=1)
    save_checkpoint(tmp_path, snapshot(2), keep=1)
    assert names(tmp_path) == ["step-000002"]


def test_a_damaged_later_checkpoint_does_not_push_out_the_new_one(tmp_path):
    save_checkpoint(tmp_path, snapshot(5))
    (tmp_path / "step-000005" / "state.json").unlink()
    save_checkpoint(tmp_path, snapshot(3), keep=1)
    save_checkpoint(tmp_path, snapshot(4), keep=1)
    assert names(tmp_path) == ["step-000004", "step-000005"]
    assert_is(load_newest(tmp_path), 4)
    save_checkpoint(tmp_path, snapshot(5), keep=1)
    assert names(tmp_path) == ["step-000005"]
    assert_is(load_newest(tmp_path), 5)


def test_tied_and_overlapping_and_strided_tensors_are_saved_as_their_values(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "embedding": base,
        "head": base,
        "column": base[:, 1],
        "row": base[1],
        "transposed": base.T,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 2),
        "trained": torch.nn.Parameter(torch.ones(2)),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
    }
    save_checkpoint(tmp_path, Snapshot(1, tensors, {}))
    loaded = load_newest(tmp_path).tensors
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.detach()), name
        assert loaded[name].dtype == tensor.dtype, name


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(folder, snapshot(1))
    save_checkpoint(folder, snapshot(2))
    return folder


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(file=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_noticed(two_checkpoints, caplog, file, place, bit):
    path = two_checkpoints / "step-000002" / file
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[int(place * len(content))] ^= 1 << bit
    caplog.clear()
    try:
        path.write_bytes(flipped)
        with caplog.at_level(logging.WARNING):
            assert_is(load_newest(two_checkpoints), 1)
    finally:
        path.write_bytes(content)
    assert "step-000002" in caplog.text
    assert any(name in caplog.text for name in FILES)
    assert_is(load_newest(two_checkpoints), 2)


BAD = "does not match|is not as"
DAMAGE = {
    "missing": (Path.unlink, "is missing"),
    "cut": (
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "does not match|is not as",
    ),
    "empty": (lambda path: path.write_bytes(b""), BAD),
    "longer": (
        lambda path: path.write_bytes(path.read_bytes() + b"\n"),
        "does not match|is not as",
    ),
    "not JSON": (lambda path: path.write_bytes(b"[1]"), BAD),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(tmp_path, caplog, file, damage):
    save_checkpoint(tmp_path, snapshot(1))
    save_checkpoint(tmp_path, snapshot(2))
    act, message = DAMAGE[damage]
    act(tmp_path / "step-000002" / file)
    with caplog.at_level(logging.WARNING):
        assert_is(load_newest(tmp_path), 1)
    [record] = caplog.records
    assert f"{file} " in record.getMessage()
    assert any(part in record.getMessage() for part in message.split("|"))


def test_a_wrong_hash_of_the_right_size_names_the_file(tmp_path, caplog):
    save_checkpoint(tmp_path, snapshot(1))
    save_checkpoint(tmp_path, snapshot(2))
    path = tmp_path / "step-000002" / "state.json"
    path.write_text(path.read_text().replace('"cursor": 20', '"cursor": 21'))
    assert_is(load_newest(tmp_path), 1)
    assert "state.json does not match its hash" in caplog.text


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path, caplog):
    save_checkpoint(tmp_path, snapshot(1))
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000009")
    assert_is(load_newest(tmp_path), 1)
    assert "state.json is of step 1: the folder was renamed" in caplog.text


def test_a_checkpoint_of_another_format_is_passed_over(tmp_path, caplog, monkeypatch):
    save_checkpoint(tmp_path, snapshot(1))
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    save_checkpoint(tmp_path, snapshot(2))
    monkeypatch.undo()
    assert_is(load_newest(tmp_path), 1)
    assert "state.json has format 99, this version reads 2" in caplog.text


def test_only_damaged_checkpoints_are_an_error_that_says_what_to_do(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, snapshot(step))
        (tmp_path / f"step-00000{step}" / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is damaged \(2 found.*or delete .* from its start"):
        load_newest(tmp_path)


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["save_file", "sync_file", "sync_folder", "_rename", "hash_file"])
def test_a_full_disk_leaves_the_older_checkpoints_and_no_rubbish(tmp_path, monkeypatch, name):
    save_checkpoint(tmp_path, snapshot(1))
    save_checkpoint(tmp_path, snapshot(2))
    monkeypatch.setattr(checkpoint, name, full_disk)
    with pytest.raises(CheckpointError, match="could not save .*step-000003: .*No space left"):
        save_checkpoint(tmp_path, snapshot(3))
    monkeypatch.undo()
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert_is(load_newest(tmp_path), 2)


def test_a_file_that_may_not_grow_is_an_error_and_leaves_nothing(tmp_path):
    child = os.fork()
    if child == 0:
        # A limit on file sizes is a disk that is full for this process alone.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            save_checkpoint(tmp_path, Snapshot(1, {"a": torch.zeros(100_000)}, {}))
        except CheckpointError as error:
            os._exit(7 if "could not save" in str(error) else 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert names(tmp_path) == []


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match="could not save"):
        save_checkpoint(tmp_path / "checkpoints", snapshot(1))


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, caplog):
    save_checkpoint(tmp_path, snapshot(1), keep=1)
    real = shutil.rmtree

    def refuse(path, ignore_errors=False):
        if Path(path).name == "step-000001":
            raise PermissionError(errno.EACCES, "Permission denied")
        real(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
    save_checkpoint(tmp_path, snapshot(2), keep=1)
    assert "could not remove" in caplog.text
    assert_is(load_newest(tmp_path), 2)


CALLS = ["fsync", "rename", "replace", "mkdir", "open", "unlink", "rmdir"]


def kill_at_call(folder, number):
    """Save step 3 in a child that is killed just before call `number` that touches the disk.

    Returns whether it was killed, rather than finished first.
    """
    child = os.fork()
    if child == 0:
        calls = 0

        def deadly(real):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in CALLS:
            setattr(os, name, deadly(getattr(os, name)))
        for name in ("write_bytes", "open"):
            setattr(Path, name, deadly(getattr(Path, name)))
        checkpoint.save_file = deadly(checkpoint.save_file)
        try:
            save_checkpoint(folder, snapshot(3))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("is_replacing", [False, True])
def test_a_kill_at_any_moment_leaves_the_previous_or_the_new_checkpoint(tmp_path, is_replacing):
    found = []
    for number in range(1, 200):
        folder = tmp_path / str(number)
        save_checkpoint(folder, snapshot(1))
        save_checkpoint(folder, snapshot(2))
        if is_replacing:
            save_checkpoint(folder, snapshot(3), keep=3)
        was_killed = kill_at_call(folder, number)
        loaded = load_newest(folder)
        assert loaded.step in (2, 3)
        assert_is(loaded, loaded.step)
        found.append(loaded.step)
        if not was_killed:
            break
        # The next save tidies up and goes on.
        save_checkpoint(folder, snapshot(4))
        assert_is(load_newest(folder), 4)
        assert not [name for name in names(folder) if name.startswith(".tmp")]
    assert not was_killed
    assert len(found) > 10
    assert 2 in found
    assert found[-1] == 3
    if not is_replacing:
        assert found == sorted(found)


def test_the_name_comes_only_after_everything_is_on_disk(tmp_path, monkeypatch):
    calls = []
    for name in ("sync_file", "sync_folder", "_rename"):
        real = getattr(checkpoint, name)

        def record(*args, name=name, real=real):
            calls.append(f"{name} {args[0].name}")
            return real(*args)

        monkeypatch.setattr(checkpoint, name, record)
    save_checkpoint(tmp_path / "all", snapshot(1))
    temporary = ".tmp-step-000001"
    assert calls == [
        *(f"sync_file {name}" for name in FILES),
        f"sync_folder {temporary}",
        f"_rename {temporary}",
        "sync_folder all",
    ]


def test_the_hashes_are_those_of_the_files(tmp_path):
    import hashlib

    path = save_checkpoint(tmp_path, snapshot(1))
    hashes = json.loads((path / "hashes.json").read_text())
    assert hashes == {
        name: {"sha256": hashlib.sha256((path / name).read_bytes()).hexdigest()}
        for name in ("tensors.safetensors", "state.json")
    }

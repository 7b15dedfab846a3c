import errno
import os

import pytest

from starling.base import files
from starling.base.errors import DataError
from starling.base.files import write_atomically


def names(folder):
    return sorted(os.listdir(folder))


def test_the_chunks_become_the_file_and_nothing_else_is_left(tmp_path):
    write_atomically(tmp_path / "new" / "a.txt", [b"one ", b"two"])
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"one two"
    assert names(tmp_path / "new") == ["a.txt"]


def test_a_full_disk_leaves_the_old_file_and_says_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DataError, match="a.txt: No space left on device. Make room"):
        write_atomically(path, [b"new"])
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="could not write"):
        write_atomically(tmp_path / "file" / "a.txt", [b"new"])


def test_an_error_of_the_source_is_passed_on_as_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def chunks():
        yield b"new"
        raise LookupError("the judge went away")

    with pytest.raises(LookupError, match="went away"):
        write_atomically(path, chunks())
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.txt"]


def test_the_bytes_are_on_disk_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd)))
    path_type = type(tmp_path)
    monkeypatch.setattr(
        path_type, "replace", lambda a, b: (calls.append("rename"), real_replace(a, b))
    )
    write_atomically(tmp_path / "a.txt", [b"new"])
    assert calls == ["fsync", "rename", "fsync"]

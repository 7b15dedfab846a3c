import math

import pytest

from starling.base.errors import DataError
from starling.base.hashing import hash_file, hash_json, hash_tree

# printf abc | sha256sum
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def make_tree(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_file_has_the_hash_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == ABC


def test_equal_folders_have_equal_hashes_wherever_they_are(tmp_path):
    one = make_tree(tmp_path / "one", {"b/c": b"1", "a": b"2"})
    two = make_tree(tmp_path / "two", {"a": b"2", "b/c": b"1"})
    (two / "empty").mkdir()
    assert hash_tree(one) == hash_tree(two)


@pytest.mark.parametrize(
    "files",
    [
        {"a": b"2", "b/c": b"X"},
        {"a": b"2", "b/d": b"1"},
        {"a": b"2", "b": b"1"},
        {"a": b"1", "b/c": b"2"},
        {"a": b"2"},
        {"a": b"2", "b/c": b"1", "d": b""},
    ],
)
def test_any_other_content_or_name_changes_the_hash(tmp_path, files):
    one = make_tree(tmp_path / "one", {"a": b"2", "b/c": b"1"})
    assert hash_tree(one) != hash_tree(make_tree(tmp_path / "two", files))


def test_a_link_counts_as_the_file_it_points_to(tmp_path):
    one = make_tree(tmp_path / "one", {"a": b"2"})
    two = make_tree(tmp_path / "two", {})
    two.mkdir()
    (two / "a").symlink_to(one / "a")
    assert hash_tree(one) == hash_tree(two)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="there is no folder .*nothing"):
        hash_tree(tmp_path / "nothing")


def test_the_order_of_keys_does_not_count_and_everything_else_does():
    # printf '{"a":[1,null],"b":"x"}' | sha256sum
    expected = "3dece6dc8d22d61692b03c7d51836aaec96fd08a614e224565e177ad6ff9dbe2"
    value = {"b": "x", "a": [1, None]}
    assert hash_json(value) == hash_json({"a": [1, None], "b": "x"}) == expected
    assert (
        len({hash_json(v) for v in (value, {"a": [None, 1], "b": "x"}, {}, [], None, 1, "1")}) == 7
    )
    for bad in (math.nan, {"a": math.inf}):
        with pytest.raises(ValueError, match="not JSON compliant"):
            hash_json(bad)

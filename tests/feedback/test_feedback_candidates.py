"""Which prompts a run uses."""

import json

import pytest

from starling.base.errors import DataError
from starling.feedback.candidates import read_prompts


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(text, **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


def read(path, *, limit=None, seed=0):
    return read_prompts(path, path.with_name("quarantine.jsonl"), limit=limit, seed=seed)


def test_repeated_rows_are_dropped_and_counted(tmp_path):
    path = write(
        tmp_path / "p.jsonl", [row("a"), row("b"), row("a"), row("c", id="x"), row("c", id="x")]
    )
    prompts, num_duplicates = read(path)
    assert [prompt.messages[0].content for prompt in prompts] == ["a", "b", "c"]
    assert num_duplicates == 2


def test_two_prompts_of_one_id_are_refused(tmp_path):
    path = write(tmp_path / "p.jsonl", [row("a", id="x"), row("b", id="x")])
    with pytest.raises(DataError, match="'x'"):
        read(path)


def test_a_limit_draws_by_the_seed_and_keeps_the_files_order(tmp_path):
    path = write(tmp_path / "p.jsonl", [row(f"{n:03}") for n in range(100)])
    draws = [
        [prompt.messages[0].content for prompt in read(path, limit=10, seed=s)[0]]
        for s in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 10
    assert draws[0] == sorted(draws[0])
    assert draws[0] != [f"{n:03}" for n in range(10)]
    assert len(read(path, limit=1000)[0]) == 100

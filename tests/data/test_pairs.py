"""Which pairs a ranking gives, and how they are written."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling.base.errors import InputError
from starling.data.pairs import choose_pairs, export_pairs

SEVEN = [3, 1, 7, 2, 5, 4, 6]
"""The best stands second, the next fourth, then first, sixth, fifth, seventh, third."""


@pytest.mark.parametrize(
    ("kind", "number"), [("all", 21), ("adjacent", 6), ("best-versus-rest", 6), ("sampled", 21)]
)
def test_seven_answers_without_ties_give_so_many_pairs(kind, number):
    assert len(choose_pairs(SEVEN, kind)) == number


def test_adjacent_pairs_walk_down_and_best_pairs_start_at_the_best():
    expected = [(0, 5), (1, 3), (3, 0), (4, 6), (5, 4), (6, 2)]
    assert choose_pairs(SEVEN, "adjacent") == expected
    assert choose_pairs(SEVEN, "best-versus-rest") == [(1, n) for n in (0, 2, 3, 4, 5, 6)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all", {(0, 1), (0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 3), (2, 4)}),
        ("adjacent", {(0, 1), (0, 2), (1, 3), (1, 4), (2, 3), (2, 4)}),
        ("best-versus-rest", {(0, 1), (0, 2), (0, 3), (0, 4)}),
    ],
)
def test_ties_are_no_pair_and_unranked_answers_only_lose(kind, expected):
    assert set(choose_pairs([1, 2, 2, None, None], kind)) == expected


@given(st.lists(st.none() | st.integers(1, 4), max_size=7))
def test_all_pairs_are_those_of_which_the_rank_is_better(ranks):
    worth = [99 if rank is None else rank for rank in ranks]
    dense = [None if rank is None else sorted(set(worth)).index(rank) + 1 for rank in ranks]
    pairs = choose_pairs(dense, "all")
    places = itertools.permutations(range(len(ranks)), 2)
    assert sorted(pairs) == [(a, b) for a, b in places if worth[a] < worth[b]]


def write(path, num_rows):
    answers = [{"answer": f"a{n}", "model": "m", "rank": n} for n in range(1, 8)]
    rows = [
        {"prompt": f"\n\nHuman: q{n}\n\nAssistant: ", "answers": answers, "id": str(n)}
        for n in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def exported(source, out, **options):
    counts = export_pairs(source, out, **options)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert counts["pairs"] == len(rows)
    return counts, rows


def test_pairs_are_written_as_messages(tmp_path):
    source = write(tmp_path / "r.jsonl", 2)
    counts, rows = exported(source, tmp_path / "p.jsonl", kind="adjacent")
    assert counts == {"rankings": 2, "pairs": 12}
    assert rows[1] == {
        "prompt": [{"role": "user", "content": "q0"}],
        "chosen": [{"role": "assistant", "content": "a2"}],
        "rejected": [{"role": "assistant", "content": "a3"}],
    }


def test_a_category_is_the_subset(tmp_path):
    row = json.loads(write(tmp_path / "r.jsonl", 1).read_text()) | {"category": "math"}
    (tmp_path / "r.jsonl").write_text(json.dumps(row))
    _, rows = exported(tmp_path / "r.jsonl", tmp_path / "p.jsonl")
    assert len(rows) == 21
    assert {row["subset"] for row in rows} == {"math"}


def test_sampled_pairs_are_drawn_per_prompt_by_the_seed(tmp_path):
    source = write(tmp_path / "r.jsonl", 40)
    draws = [
        exported(source, tmp_path / "p.jsonl", kind="sampled", per_prompt=3, seed=seed)[1]
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    rows = [json.dumps(row) for row in draws[0]]
    assert len(rows) == len(set(rows)) == 120
    chosen = {row["chosen"][0]["content"] + row["rejected"][0]["content"] for row in draws[0]}
    assert len(chosen) == 21, "every pair of the seven is drawn for some prompt"
    assert all(row["chosen"][0]["content"] < row["rejected"][0]["content"] for row in draws[0])


@pytest.mark.parametrize("number", [0, -1])
def test_fewer_than_one_pair_per_prompt_is_refused_before_anything_is_written(tmp_path, number):
    source = write(tmp_path / "r.jsonl", 2)
    with pytest.raises(InputError, match=f"{number} pairs per prompt are none"):
        export_pairs(source, tmp_path / "p.jsonl", kind="sampled", per_prompt=number)
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.real_data
def test_real_nectar_gives_twenty_one_pairs_a_row(test_data, tmp_path):
    counts, _ = exported(test_data / "nectar" / "rankings.jsonl", tmp_path / "p.jsonl")
    assert counts == {"rankings": 100, "pairs": 2100}

"""Votes in the columns and words that people publish, and what is refused of them."""

import json

import pytest

from starling.base.errors import DataError
from starling.data.votes import read_votes


def read(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_votes(path, quarantine=tmp_path / "quarantine.jsonl")


def outcomes(votes):
    battles = votes.battles
    return [
        (votes.models[left], votes.models[right], won)
        for left, right, won in zip(
            battles.left.tolist(), battles.right.tolist(), battles.won.tolist(), strict=True
        )
    ]


def test_both_pairs_of_columns_and_all_words_are_read(tmp_path):
    arena = [("model_a", 1.0), ("model_b", 0.0), ("tie", 0.5), ("tie (bothbad)", 0.5)]
    log = [("leftvote", 1.0), ("rightvote", 0.0), ("tievote", 0.5), ("bothbad_vote", 0.5)]
    rows = [{"model_a": "x", "model_b": "y", "winner": word} for word, _ in arena + log]
    votes = read(tmp_path, "votes.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert outcomes(votes) == [("x", "y", won) for _, won in arena + log]
    plain = read(tmp_path, "votes.csv", "left,right,winner\nx,y,left\ny,x,right\nx,y,tie\n")
    assert outcomes(plain) == [("x", "y", 1.0), ("y", "x", 0.0), ("x", "y", 0.5)]


def test_csv_may_have_a_mark_crlf_blank_lines_quotes_and_other_columns(tmp_path):
    text = '\ufeffid,left,right,winner\r\n\r\n1,"a, b",y,left\r\n  \r\n2,y,"a, b",tie\r\n'
    assert outcomes(read(tmp_path, "votes.csv", text)) == [("a, b", "y", 1.0), ("y", "a, b", 0.5)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("x,y,nobody", "winner"),
        ("x,x,left", "x is on both sides"),
        (" ,y,left", "left"),
        ("x,y", "winner"),
        ("x,y,left,more", "cells_beyond_the_header"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path, row, reason):
    with pytest.raises(DataError, match=rf"line 3: .*{reason}"):
        read(tmp_path, "votes.csv", f"left,right,winner\nx,y,left\n{row}\n")
    [bad] = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").open()]
    assert bad["line"] == 3


def test_one_bad_row_in_two_hundred_is_put_aside(tmp_path):
    rows = ["x,y,left"] * 199 + ["x,y,draw"]
    votes = read(tmp_path, "votes.csv", "\n".join(["left,right,winner", *rows]))
    assert len(votes.battles.won) == 199
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no rows"),
        ("left,right,winner\n", "holds no rows"),
        ("a,b,c\nx,y,left\n", "Field required"),
        ("left,left,winner\nx,y,left\n", "a column twice"),
        ('left,right,winner\nx,"y,left\n', "broken CSV"),
        (b"left,right,winner\n\xff,y,left\n", "line 2"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, reason):
    with pytest.raises(DataError, match=reason):
        read(tmp_path, "votes.csv", text)


def test_a_quoted_cell_over_two_lines_counts_from_its_first(tmp_path):
    text = 'left,right,winner,note\nx,y,left,"two\nlines"\nx,y,draw,\n'
    with pytest.raises(DataError, match="line 4: winner"):
        read(tmp_path, "votes.csv", text)

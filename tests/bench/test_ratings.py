"""`starling ratings`: the table, the file of figures, and what votes do not tell."""

import json
import math

import pytest

from starling.cli import main


def write(path, rows):
    path.write_text("left,right,winner\n" + "".join(f"{row}\n" for row in rows))
    return path


@pytest.fixture
def votes(tmp_path):
    """Three to one, a tie, and one that only loses."""
    rows = ["a,b,left"] * 30 + ["a,b,right"] * 10 + ["b,a,tie"] * 2 + ["b,c,left"] * 3
    return write(tmp_path / "votes.csv", rows)


def test_ratings_are_in_the_table_and_in_the_file(votes, tmp_path, capsys):
    out = tmp_path / "ratings.json"
    assert main(["ratings", str(votes), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "45 votes on 3 models, 2 of them ties" in said
    assert "c has no rating: only losses" in said
    found = json.loads(out.read_text())
    models = {each["model"]: each for each in found["models"]}
    assert [each["model"] for each in found["models"]] == ["a", "b", "c"]
    gap = 400 * math.log10(31 / 11)
    assert models["a"]["rating"] - models["b"]["rating"] == pytest.approx(gap, abs=1e-6)
    assert (models["a"]["rating"] + models["b"]["rating"]) / 2 == pytest.approx(1000)
    assert models["a"]["share"] == pytest.approx(31 / 42)
    assert models["a"]["low"] < models["a"]["rating"] < models["a"]["high"]
    assert (models["a"]["rank"], models["b"]["rank"], models["c"]["rank"]) == (1, 2, None)
    assert models["c"]["rating"] is None
    assert models["c"]["num_battles"] == 3
    assert models["b"]["win_rate"]["mean"] == pytest.approx((11 / 42 + 1) / 2)
    assert (found["num_votes"], found["num_ties"]) == (45, 2)
    assert found["stamp"]["bench"] == "ratings"
    assert "| a | 1 |" in out.with_suffix(".md").read_text()


def test_the_same_votes_and_seed_give_the_same_figures(votes, tmp_path):
    texts = []
    for name, seed in (("one", "0"), ("two", "0"), ("three", "1")):
        out = tmp_path / f"{name}.json"
        assert main(["ratings", str(votes), "--out", str(out), "--seed", seed]) == 0
        texts.append(json.loads(out.read_text())["models"])
    assert texts[0] == texts[1] != texts[2]


def test_without_a_file_to_write_nothing_is_written(votes, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert main(["ratings", str(votes)]) == 0
    assert sorted(tmp_path.iterdir()) == before
    assert "Bradley-Terry" in capsys.readouterr().out


def test_what_cannot_be_read_is_refused(votes, tmp_path, capsys):
    assert main(["ratings", str(votes), "--rounds", "0"]) == 2
    assert "0 bootstrap rounds give no interval" in capsys.readouterr().err
    assert main(["ratings", str(tmp_path / "nothing.csv")]) == 2
    assert "nothing.csv" in capsys.readouterr().err


def test_votes_of_which_nobody_can_be_rated_say_why(tmp_path, capsys):
    assert main(["ratings", str(write(tmp_path / "votes.csv", ["a,b,left"] * 3))]) == 0
    said = capsys.readouterr().out
    assert "a has no rating: only wins" in said
    assert "b has no rating: only losses" in said

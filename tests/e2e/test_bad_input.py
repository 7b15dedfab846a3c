"""What a user can get wrong: each ends with a message and status 2, no traceback, nothing lost."""

import json
import shutil
from pathlib import Path

import pytest

from e2e.mini import RECIPE, starling, write_recipe

REWARD_ONLY = """\
policy: policy
reward: {{rankings: {rankings}, epochs: 1, batch: 2, lr: 1e-3, held_out: 0.25}}
"""


def ranking(number: int, ranks: tuple = (1, 2, 3), answers: tuple = ("a b", "c d", "e f")) -> str:
    """One row as a user's file holds it."""
    rows = [
        {"answer": answer, "model": "m", "rank": rank}
        for answer, rank in zip(answers, ranks, strict=False)
    ]
    return json.dumps({"messages": [{"role": "user", "content": f"q {number}"}], "answers": rows})


BAD_ROWS = {
    "a broken line": ('{"messages": [', "line 5"),
    "ranks that number nothing": (ranking(9, (1, 2, 4)), "densely"),
    "a single answer": (ranking(9, (1,), ("only",)), "at least 2"),
    "an empty answer": (ranking(9, answers=("a", " ", "c")), "empty"),
    "a rank that is not a number": (ranking(9).replace('"rank": 1', '"rank": NaN'), "NaN"),
}


@pytest.fixture
def here(tmp_path, policy_folder) -> Path:
    """A folder with a tiny policy in it."""
    shutil.copytree(policy_folder, tmp_path / "policy")
    return tmp_path


def refused(capsys, *arguments: str | Path) -> str:
    """Run a command that must be refused; returns its message."""
    assert starling(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_ranking_stops_the_stage_and_is_set_aside(case, here, capsys):
    bad, reason = BAD_ROWS[case]
    rows = [ranking(number) for number in range(8)]
    rows.insert(4, bad)
    (here / "rankings.jsonl").write_text("\n".join(rows) + "\n")
    recipe = here / "reward.yaml"
    recipe.write_text(REWARD_ONLY.format(rankings="rankings.jsonl"))
    error = refused(capsys, "reward", recipe, "--out", here / "run")
    assert "line 5" in error
    assert reason in error
    aside = json.loads((here / "run" / "reward" / "quarantine.jsonl").read_text())
    assert (aside["line"], aside["text"]) == (5, bad)


def test_one_bad_ranking_in_two_hundred_is_set_aside_and_the_rest_is_used(here, capsys):
    rows = [ranking(number) for number in range(200)]
    rows[100] = BAD_ROWS["a single answer"][0]
    (here / "rankings.jsonl").write_text("\n".join(rows) + "\n")
    recipe = here / "reward.yaml"
    recipe.write_text(REWARD_ONLY.format(rankings="rankings.jsonl"))
    assert starling("reward", recipe, "--out", here / "run") == 0
    assert "quarantine" in capsys.readouterr().err
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert summary["reward"]["rankings"] == {"train": 149, "held_out": 50}


def test_a_misspelt_key_is_named_with_its_path_and_its_neighbour(tmp_path, capsys):
    recipe = write_recipe(tmp_path, RECIPE.replace("kl_target", "kl_taget"))
    error = refused(capsys, "run", recipe, "--out", tmp_path / "run")
    assert "ppo.kl_taget" in error
    assert "kl_target" in error
    assert not (tmp_path / "run").exists()


def test_a_missing_file_is_named_with_its_neighbours(tmp_path, capsys):
    recipe = write_recipe(tmp_path, RECIPE.replace("data/bench.jsonl", "data/bensh.jsonl"))
    error = refused(capsys, "run", recipe, "--out", tmp_path / "run")
    assert "bensh.jsonl" in error
    assert "bench.jsonl" in error.replace("bensh.jsonl", "")


def test_truncated_weights_are_refused_by_name(here, capsys):
    (here / "rankings.jsonl").write_text("\n".join(ranking(n) for n in range(8)) + "\n")
    weights = here / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    recipe = here / "reward.yaml"
    recipe.write_text(REWARD_ONLY.format(rankings="rankings.jsonl"))
    error = refused(capsys, "reward", recipe, "--out", here / "run")
    assert "policy" in error
    assert "cannot be read" in error


def test_a_folder_of_another_seed_is_refused_and_kept(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    assert starling("sft", recipe, "--out", tmp_path / "run") == 0
    before = (tmp_path / "run" / "sft" / "model" / "model.safetensors").read_bytes()
    capsys.readouterr()
    error = refused(capsys, "sft", recipe, "--out", tmp_path / "run", "--seed", "1")
    assert "seed 0" in error
    assert (tmp_path / "run" / "sft" / "model" / "model.safetensors").read_bytes() == before


def test_bad_input_to_a_finished_stage_leaves_its_result(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    assert starling("sft", recipe, "--out", tmp_path / "run") == 0
    stage = tmp_path / "run" / "sft"
    before = {path: path.read_bytes() for path in stage.rglob("*") if path.is_file()}
    conversations = tmp_path / "data" / "sft.jsonl"
    whole = conversations.read_bytes()
    conversations.write_bytes(whole + b"not a conversation\n")
    capsys.readouterr()
    assert "line 65" in refused(capsys, "sft", recipe, "--out", tmp_path / "run")
    assert {path: path.read_bytes() for path in before} == before
    conversations.write_bytes(whole)
    assert starling("sft", recipe, "--out", tmp_path / "run") == 0
    assert "nothing changed" in capsys.readouterr().err


def test_a_candidate_that_the_sft_stage_will_not_make_is_refused_before_it_runs(tmp_path, capsys):
    recipe = write_recipe(tmp_path, RECIPE.replace("sft/model-4", "sft/model-5"))
    error = refused(capsys, "run", recipe, "--out", tmp_path / "run")
    assert "sft/model-4" in error
    assert not (tmp_path / "run" / "sft").exists()


@pytest.mark.parametrize(
    ("setting", "value"), [("--ppo.kl-coef", "0"), ("--ppo.kl-horizon", "1"), ("--ppo.steps", "0")]
)
def test_an_impossible_value_is_refused_with_its_path(setting, value, tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    error = refused(capsys, "ppo", recipe, "--out", tmp_path / "run", setting, value)
    assert setting.removeprefix("--").replace("-", "_") in error

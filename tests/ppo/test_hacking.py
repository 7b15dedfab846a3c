"""A reward model that can be cheated is found out, and a sound one is left in peace.

The world answers with one to six letters.  The sound reward is the share of the letter a; the
others pay for length, alone or beside it.  All limits are the recipe's defaults.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from ppo.scripted import make_speller, mean, metrics, run_stage, write_prompts
from starling.base.errors import InputError
from starling.ppo.config import Guards
from starling.report.page import write_report

WORLD = {
    "steps": 12,
    "rollout_batch": 16,
    "samples_per_prompt": 2,
    "ppo_epochs": 2,
    "max_response_tokens": 16,
    "lr": 1.5e-3,
    "kl_coef": 0.02,
    "validation_prompts": 4,
    "select_every": 100,
    "checkpoint_every": 100,
}
WARMUP = Guards().warmup


def share_of_a(answer):
    letters = answer.split()
    return letters.count("a") / max(1, len(letters))


def length(answer):
    return len(answer.split()) / 8


def share_and_length(answer):
    return share_of_a(answer) + length(answer)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    policy = make_speller(folder, fewest=1, most=6)
    return policy, write_prompts(folder / "prompts.jsonl")


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """Run the stage by a reward into `tmp_path/<name>/ppo`; returns the summary and that folder."""
    policy, prompts = world

    def run(worth, name="run", seed=0, **settings):
        out = tmp_path / name / "ppo"
        summary, _ = run_stage(
            WORLD | settings,
            policy,
            worth,
            out,
            prompts=prompts,
            monkeypatch=monkeypatch,
            seed=seed,
        )
        return summary, out

    return run


def rows_of(path):
    return [json.loads(line) for line in path.open()] if path.exists() else []


def weights(out, step):
    """What learns, and the optimizer's moments, as the step's checkpoint holds them."""
    tensors = load_file(out / "checkpoints" / f"step-{step:06d}" / "tensors.safetensors")
    return {name: each for name, each in tensors.items() if not name.startswith("extra/")}


def test_five_healthy_seeds_learn_and_raise_no_flag(run):
    for seed in range(5):
        summary, out = run(share_of_a, name=f"seed-{seed}", seed=seed)
        rows = metrics(out)
        assert mean(rows[-3:], "ppo/score") > mean(rows[:2], "ppo/score") + 0.15
        assert rows_of(out / "flags.jsonl") == [], f"seed {seed}"
        assert not (out / "flagged").exists()
        assert summary.figures["flags"] == 0


def test_a_reward_for_length_is_flagged_as_soon_as_the_guards_have_seen_enough(run, caplog):
    summary, out = run(length)
    rows = metrics(out)
    assert mean(rows[-3:], "ppo/response_tokens") > 1.5 * rows[0]["ppo/response_tokens"]
    flags = rows_of(out / "flags.jsonl")
    assert (flags[0]["step"], flags[0]["guard"]) == (WARMUP, "max_length_correlation")
    assert flags[0]["found"] > 0.98
    assert flags[0]["action"] == "warn"
    assert summary.figures["flags"] == len(flags) == WORLD["steps"] - WARMUP + 1
    assert f"step {WARMUP}: Score and length correlate" in caplog.text
    # The run went on; each batch that was flagged is there to be read.
    assert len(rows) == WORLD["steps"]
    assert sorted(path.name for path in (out / "flagged").iterdir()) == [
        f"step-{step:06d}.jsonl" for step in range(WARMUP, WORLD["steps"] + 1)
    ]
    batch = rows_of(out / "flagged" / f"step-{WARMUP:06d}.jsonl")
    assert len(batch) == 32
    for row in batch:
        assert row["messages"][0]["content"].startswith("say ")
        assert row["score"] == pytest.approx(length(row["answer"]))
        assert row["tokens"] <= 16
    row = rows[WARMUP - 1]
    assert row["ppo/score"] == pytest.approx(mean(batch, "score"), rel=1e-5)
    assert row["ppo/sequence_kl"] == pytest.approx(mean(batch, "kl"), rel=1e-5)


def test_a_reward_that_pays_for_length_beside_the_right_thing_is_flagged_within_ten_steps(run):
    _, out = run(share_and_length)
    flags = rows_of(out / "flags.jsonl")
    assert flags[0]["step"] <= 10
    assert {flag["guard"] for flag in flags} <= {"max_length_ratio", "max_length_correlation"}


def test_the_report_shows_the_flags_and_says_what_they_mean(run):
    _, out = run(length, steps=6)
    page = write_report(out.parent).read_text()
    assert "max_length_correlation" in page
    assert "the reward model scores little but length" in page
    assert "ppo.length_penalty" in page
    assert "No guard was raised" not in page
    _, healthy = run(share_of_a, name="healthy", steps=6)
    assert "No guard was raised in 6 iterations." in write_report(healthy.parent).read_text()


@pytest.mark.parametrize("action", ["warn", "skip"])
def test_skip_leaves_a_flagged_batch_out_to_the_last_bit(run, action):
    _, out = run(length, steps=WARMUP, checkpoint_every=1, guards={"action": action})
    [flag] = rows_of(out / "flags.jsonl")
    assert (flag["step"], flag["action"]) == (WARMUP, action)
    before, after = weights(out, WARMUP - 1), weights(out, WARMUP)
    is_same = [torch.equal(before[name], after[name]) for name in before]
    assert before.keys() == after.keys()
    assert any(name.startswith("optimizer/") for name in before)
    assert ("ppo/policy_loss" in metrics(out)[-1]) == (action == "warn")
    assert all(is_same) if action == "skip" else not any(is_same)
    assert len(rows_of(out / "flagged" / f"step-{WARMUP:06d}.jsonl")) == 32


def test_stop_ends_the_run_before_the_update_and_again_when_it_is_run_again(run, tmp_path):
    for _ in range(2):
        with pytest.raises(InputError) as raised:
            run(length, checkpoint_every=1, guards={"action": "stop"})
        said = str(raised.value)
        assert f"a guard ended the run before the update of step {WARMUP}" in said
        assert "the reward model scores little but length" in said
        assert "Change the recipe" in said
        out = tmp_path / "run" / "ppo"
        assert str(out / "flagged") in said
        assert [row["step"] for row in metrics(out)] == list(range(1, WARMUP))
        assert [flag["step"] for flag in rows_of(out / "flags.jsonl")] == [WARMUP]
        assert len(rows_of(out / "flagged" / f"step-{WARMUP:06d}.jsonl")) == 32
        saved = sorted(path.name for path in (out / "checkpoints").iterdir())
        assert saved == [f"step-{step:06d}" for step in (WARMUP - 2, WARMUP - 1)]
        assert not (out / "model").exists()


def test_a_reward_that_is_the_same_for_all_is_flagged_at_once(run):
    _, out = run(lambda _answer: 0.5, steps=1)
    [flag] = rows_of(out / "flags.jsonl")
    assert (flag["step"], flag["guard"], flag["found"]) == (1, "min_score_std", 0.0)

"""The whole stage on a task with a known optimum: say one letter, and only that."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ppo.scripted import make_speller, mean, run_stage, write_prompts
from starling.base.context import single_process_context
from starling.judging.config import JudgeSection
from starling.models.causal_lm import load_language_model
from starling.ppo import train as ppo_train
from starling.ppo.config import PpoInputs, PpoSection, RewardSource
from starling.ppo.rollout import Collector
from starling.ppo.select import Validator
from tiny import tiny_policy_folder, tiny_reward_folder

TOY = {
    "steps": 16,
    "rollout_batch": 16,
    "samples_per_prompt": 2,
    "ppo_epochs": 2,
    "max_response_tokens": 10,
    "lr": 1.5e-3,
    "kl_coef": 0.02,
    "validation_prompts": 16,
    "select_every": 4,
    "microbatch": 32,
}


def share_of_a(answer):
    letters = answer.replace(" ", "")
    return letters.count("a") / max(1, len(letters))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    return make_speller(tmp_path_factory.mktemp("speller"))


@pytest.fixture
def train(speller, prompts, tmp_path, monkeypatch):
    """Run the stage with the letter count as reward; returns summary, metrics and folder."""

    def train(judge=None, **settings):
        summary, rows = run_stage(
            TOY | settings,
            speller,
            share_of_a,
            tmp_path,
            prompts=prompts,
            monkeypatch=monkeypatch,
            judge=judge,
        )
        return summary, rows, tmp_path

    return train


def test_the_reward_rises_towards_its_optimum_and_the_kl_with_it(train):
    summary, rows, _ = train()
    assert mean(rows[:2], "ppo/score") == pytest.approx(0.5, abs=0.15)
    assert mean(rows[-3:], "ppo/score") > 0.8
    # The start is its own reference: exactly no KL before the first step, and then some.
    assert rows[0]["ppo/sequence_kl"] == pytest.approx(0, abs=1e-4)
    assert mean(rows[-3:], "ppo/sequence_kl") > 0.3
    assert summary.figures["sequence_kl"]["mean"] > 0.3
    # Four letters of one bit each: 4 ln 2 would do for the optimum itself.
    assert mean(rows[-3:], "ppo/sequence_kl") < 2.77
    assert mean(rows, "ppo/sampler_mismatch") < 1e-4
    assert mean(rows[-3:], "ppo/end_rate") > 0.9


def test_a_strong_penalty_holds_the_policy_at_its_start(train):
    _, rows, _ = train(kl_coef=5.0, steps=10)
    assert mean(rows[-3:], "ppo/sequence_kl") < 0.1
    assert mean(rows[-3:], "ppo/score") < 0.7


def test_the_coefficient_follows_the_measured_kl_after_each_update(train):
    _, rows, _ = train(steps=4, kl_target=2.0, kl_horizon=100, kl_coef=0.02)
    coefficient = 0.02
    for row in rows:
        assert row["ppo/kl_coef"] == pytest.approx(coefficient, rel=1e-6)
        error = min(max(row["ppo/sequence_kl"] / 2.0 - 1, -0.2), 0.2)
        coefficient *= 1 + error * 32 / 100


def test_a_separate_critic_raises_the_reward_too(train):
    _, rows, _ = train(critic="separate", steps=12)
    assert mean(rows[-2:], "ppo/score") > mean(rows[:2], "ppo/score") + 0.15


def test_the_checkpoint_that_the_judge_likes_best_is_the_one_that_is_saved(train, monkeypatch):
    measured = {}
    measure = Validator.measure

    def spy(validator, step):
        policy = validator.collector.actors.actor_critic.policy
        measured[step] = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        return measure(validator, step)

    monkeypatch.setattr(Validator, "measure", spy)
    judge = JudgeSection(kind="rubric")
    summary, _, out = train(judge, kl_target=2.0, select_every=2)
    rounds = summary.figures["validations"]
    assert [row["step"] for row in rounds] == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    start = rounds[0]
    eligible = [
        row
        for row in rounds[1:]
        if 1.0 <= row["kl"]["mean"] <= 3.0
        and row["response_tokens"] <= 1.1 * start["response_tokens"]
    ]
    best = max(eligible, key=lambda row: row["rating"])
    assert summary.figures["selected_step"] == best["step"]
    assert summary.figures["sequence_kl"] == best["kl"]
    assert best["rating"] > start["rating"]
    # The rating is the mean of the answers kept on disk, and the KL theirs.
    path = out / "validation" / f"step-{best['step']:06d}.jsonl"
    kept = [json.loads(line) for line in path.open()]
    assert len(kept) == 16
    assert mean(kept, "rating") == pytest.approx(best["rating"])
    assert mean(kept, "kl") == pytest.approx(best["kl"]["mean"], rel=1e-5)
    saved = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(measured[best["step"]][name], saved[name]) for name in saved)
    assert best["step"] < 16


def test_nothing_of_the_validation_prompts_is_trained_on(train, monkeypatch):
    seen = []
    collect = Collector.collect

    def spy(collector, batch, *rest, **options):
        seen.append({prompt.id for prompt in batch})
        return collect(collector, batch, *rest, **options)

    monkeypatch.setattr(Collector, "collect", spy)
    _, _, out = train(steps=4)
    kept = [json.loads(line)["id"] for line in (out / "validation" / "step-000000.jsonl").open()]
    assert len(kept) == 16
    # The start's validation, four rollouts of two epochs, the end's validation.
    assert [seen[0], seen[-1]] == [set(kept)] * 2
    assert len(set().union(*seen[1:-1])) == 32
    assert not set().union(*seen[1:-1]) & set(kept)


def test_a_run_on_untrained_models_from_disk_ends_with_a_model_that_loads(prompts, tmp_path):
    policy = tiny_policy_folder(tmp_path / "policy")
    reward = tiny_reward_folder(tmp_path / "reward", policy, seed=1)
    section = PpoSection(
        steps=2, rollout_batch=4, max_response_tokens=4, validation_prompts=4, select_every=1
    )
    inputs = PpoInputs(str(policy), prompts, (RewardSource(model=str(reward)),), None, None)
    out = tmp_path / "out"
    summary = ppo_train.run(section, inputs, out, single_process_context(1, seed=0))
    assert summary.figures["selected_step"] == 2
    load_language_model(str(out / "model"))

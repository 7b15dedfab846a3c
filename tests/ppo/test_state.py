"""What PPO's loop carries from step to step, how it is kept, and what a flagged batch leads to."""

import dataclasses
import json
import logging

import pytest
import torch

from rollouts import ALONE, make, section_of
from starling.base.checkpoint import Snapshot
from starling.base.context import Context
from starling.base.errors import CheckpointError, InputError
from starling.ppo.rewards import RunningMoments
from starling.ppo.select import Validation
from starling.ppo.state import State, rollout_rows

SETTINGS = {"kl_coef": 0.1, "kl_target": 6.0, "kl_horizon": 1000, "samples_per_prompt": 2}
HEALTHY = {
    "ppo/sequence_kl": 1.0,
    "ppo/shaped_score_std": 1.0,
    "ppo/end_rate": 1.0,
    "ppo/response_tokens": 9.0,
    "ppo/sampler_mismatch": 0.0,
    "ppo/entropy": 1.0,
}


def new(section):
    return State.resume(Snapshot(0, {}, {"extra": {}}), section)


def test_a_new_state_begins_as_the_recipe_says():
    state = new(section_of(**SETTINGS))
    controller = state.controller
    assert (controller.coef, controller.target, controller.horizon) == (0.1, 6.0, 1000)
    assert state.moments == RunningMoments()
    assert state.selection.validations == []
    assert new(section_of()).controller.target is None


def test_what_is_kept_comes_back_through_json():
    section = section_of(**SETTINGS)
    state = new(section)
    state.moments = state.moments.updated(torch.tensor([0.1, 0.7, -3.3]))
    for _ in range(3):
        state.control({"ppo/sequence_kl": 9.0}, section, step=0)
    state.health.check(1, HEALTHY | {"ppo/sequence_kl": 99.0})
    learned = {"ppo/approx_kl": 0.1, "ppo/first_approx_kl": 0.0, "ppo/ratio": 1.0}
    state.health.check_update(1, learned | {"ppo/clip_fraction": 0.9})
    kl = {"mean": 1.0}
    state.selection.validations = [Validation(0, 5.0, kl, 9.0), Validation(5, 6.0, kl, 8.5)]
    state.selection.best = state.selection.validations[1]
    state.selection.weights = {"w": torch.ones(2)}
    extra = json.loads(json.dumps(state.plain()))
    again = State.resume(Snapshot(5, dict(state.selection.weights), {"extra": extra}), section)
    assert again.plain() == state.plain()
    assert again.controller == state.controller
    assert again.moments == state.moments
    assert again.selection == state.selection
    assert again.health.flags == state.health.flags
    assert again.health.flags
    follow = HEALTHY | {"ppo/clip_fraction": 0.1}
    assert again.health.check(2, follow) == state.health.check(2, follow)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda extra: extra.pop("kl_coef"), "missing kl_coef"),
        (lambda extra: extra.update(other=1), "unexpected other"),
        (lambda extra: extra["moments"].pop("m2"), "missing m2"),
        (lambda extra: extra["health"].pop("num_seen"), "missing num_seen"),
        (lambda extra: extra["validations"][0].pop("rating"), "missing rating"),
        (lambda extra: extra.update(best_step=3), "selected step 3, and validated only 0"),
        (lambda extra: extra.update(kl_coef=-1), "kl_coef is -1"),
        (lambda extra: extra.update(kl_coef="0.1"), "kl_coef is '0.1'"),
    ],
)
def test_a_state_with_other_fields_is_refused(edit, told):
    section = section_of(**SETTINGS)
    state = new(section)
    state.selection.validations = [Validation(0, 5.0, {"mean": 0.0}, 9.0)]
    extra = json.loads(json.dumps(state.plain()))
    State.resume(Snapshot(5, {}, {"extra": extra}), section)
    edit(extra)
    with pytest.raises(CheckpointError, match=told):
        State.resume(Snapshot(5, {}, {"extra": extra}), section)


def test_the_coefficient_moves_by_episodes_once_the_policy_learns():
    section = section_of(**SETTINGS, critic_warmup=2, steps=9)
    state = new(section)
    for step in (0, 1):
        state.control({"ppo/sequence_kl": 60.0}, section, step=step)
        assert state.controller.coef == 0.1
    state.control({"ppo/sequence_kl": 60.0}, section, step=2)
    # 6 prompts of 2 samples; the error is clipped at 0.2.
    assert state.controller.coef == pytest.approx(0.1 * (1 + 0.2 * 12 / 1000))
    fixed = new(section_of(kl_coef=0.3))
    fixed.control({"ppo/sequence_kl": 60.0}, section_of(kl_coef=0.3), step=5)
    assert fixed.controller.coef == 0.3


@pytest.fixture(scope="module")
def rollout():
    return make().rollout


def flagged(action, rollout, out, *, context=ALONE):
    state = new(section_of(guards={"action": action}))
    metrics = HEALTHY | {"ppo/sequence_kl": -3.0}
    return state, state.may_learn(7, metrics, rollout, out, context)


def lines(path):
    return [json.loads(line) for line in path.open()]


@pytest.mark.parametrize(("action", "may_learn"), [("warn", True), ("skip", False)])
def test_a_flagged_batch_is_written_and_said_and_learned_from_or_not(
    action, may_learn, rollout, tmp_path, caplog
):
    with caplog.at_level(logging.WARNING, "starling"):
        state, allowed = flagged(action, rollout, tmp_path)
    assert allowed is may_learn
    [flag] = lines(tmp_path / "flags.jsonl")
    assert (flag["step"], flag["action"]) == (7, action)
    assert [flag["sentence"]] == [each.sentence for each in state.health.flags]
    assert caplog.messages == [f"step 7: {flag['sentence']}"]
    assert lines(tmp_path / "flagged" / "step-000007.jsonl") == rollout_rows(rollout)


def test_a_flag_of_an_update_stands_with_the_batch_that_it_learned_from(rollout, tmp_path, caplog):
    state = new(section_of(guards={"action": "skip"}))
    learned = {"ppo/approx_kl": 9.0, "ppo/first_approx_kl": 0.0, "ppo/ratio": 1.0}
    with caplog.at_level(logging.WARNING, "starling"):
        state.note_update(4, learned | {"ppo/clip_fraction": 0.1}, rollout, tmp_path, ALONE)
        assert len(caplog.messages) == 1
        assert [flag["step"] for flag in lines(tmp_path / "flags.jsonl")] == [4]
        assert lines(tmp_path / "flagged" / "step-000004.jsonl") == rollout_rows(rollout)
        # The next batch pays for it, said and written once.
        assert not state.may_learn(5, HEALTHY, rollout, tmp_path, ALONE)
        assert state.may_learn(6, HEALTHY, rollout, tmp_path, ALONE)
    assert len(caplog.messages) == 1
    assert not (tmp_path / "flagged" / "step-000005.jsonl").exists()


def test_a_batch_with_figures_that_are_no_numbers_is_written_too_and_moves_no_coefficient(
    rollout, tmp_path
):
    scores, reference = rollout.scores.clone(), rollout.ref_logprobs.clone()
    scores[0], reference[1] = float("inf"), float("nan")
    broken = dataclasses.replace(rollout, scores=scores, ref_logprobs=reference)
    section = section_of(**SETTINGS, guards={"action": "skip"})
    state = new(section)
    metrics = HEALTHY | {"ppo/sequence_kl": float("nan")}
    assert not state.may_learn(2, metrics, broken, tmp_path, ALONE)
    state.control(metrics, section, step=1)
    assert state.controller.coef == 0.1
    rows = lines(tmp_path / "flagged" / "step-000002.jsonl")
    assert ["score" in row for row in rows[:3]] == [False, True, True]
    assert ["kl" in row for row in rows[:3]] == [True, False, True]


def test_a_guard_that_stops_says_where_the_batch_is(rollout, tmp_path):
    with pytest.raises(InputError, match="before the update of step 7.*flagged.*begins again"):
        flagged("stop", rollout, tmp_path)
    assert (tmp_path / "flagged" / "step-000007.jsonl").exists()
    assert (tmp_path / "flags.jsonl").exists()


def test_only_the_first_process_writes(rollout, tmp_path):
    second = Context(rank=1, world_size=2, device="cpu", threads=1)
    _, allowed = flagged("skip", rollout, tmp_path, context=second)
    assert not allowed
    assert not list(tmp_path.iterdir())


def test_a_healthy_batch_leaves_nothing_behind(rollout, tmp_path):
    state = new(section_of())
    assert state.may_learn(1, HEALTHY, rollout, tmp_path, ALONE)
    assert not list(tmp_path.iterdir())


def test_a_batchs_rows_are_what_was_asked_and_answered_and_its_worth(rollout):
    moved = dataclasses.replace(
        rollout,
        old_logprobs=torch.where(rollout.response_mask, -1.0, float("nan")),
        ref_logprobs=torch.where(rollout.response_mask, -1.25, 0.0),
    )
    rows = rollout_rows(moved)
    assert [row["tokens"] for row in rows] == [6, 1, 3, 8, 2, 5]
    assert [row["kl"] for row in rows] == [0.25 * row["tokens"] for row in rows]
    assert rows[2]["messages"][0] == {"role": "user", "content": "Hi"}
    assert [row["answer"] for row in rows] == list(rollout.texts)
    assert [row["score"] for row in rows] == rollout.scores.tolist()
    assert not any(row["finished"] for row in rows)
    json.dumps(rows)

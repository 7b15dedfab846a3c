"""A batch's figures by hand, and the names under which other programs know them."""

import dataclasses
import math

import pytest
import torch

from rollouts import PROMPTS, made_advantages, make
from starling.ppo.advantage import Advantages
from starling.ppo.kl import KlController
from starling.ppo.monitor import (
    FIELD_NAMES,
    critic_metrics,
    mismatch_metrics,
    rollout_metrics,
    with_field_names,
)
from starling.ppo.rollout import Rollout
from starling.ppo.update import update

NAN = float("nan")
# Padding holds what must never be counted.
FIXED = KlController(0.1)
SHAPED = torch.tensor([0.5, -1.0, 2.0])
MASK = torch.tensor([[True, True], [True, False], [True, True]])


def rollout(**changes):
    """Three responses of 2, 1 and 2 tokens."""
    made = Rollout(
        prompts=PROMPTS[:3],
        prompt_ids=((1,),) * 3,
        response_ids=((7, 8), (9,), (7, 7)),
        texts=("a", "b", "c"),
        is_finished=torch.tensor([True, False, True]),
        group=torch.tensor([0, 1, 2]),
        scores=torch.tensor([1.0, 3.0, 2.0]),
        each_score=torch.tensor([[1.0, 3.0, 2.0]]),
        response_mask=MASK,
        sampler_logprobs=torch.tensor([[-1.0, -2.0], [-3.0, NAN], [-1.0, -1.0]]),
        old_logprobs=torch.tensor([[-1.5, -2.0], [-2.5, NAN], [-1.0, -0.5]]),
        ref_logprobs=torch.tensor([[-2.0, -2.1], [-2.7, NAN], [-1.0, -0.9]]),
        old_values=torch.tensor([[1.0, 2.0], [4.0, NAN], [0.0, 1.0]]),
        own=(0, 1, 2),
    )
    return dataclasses.replace(made, **changes)


def test_figures_by_hand():
    rewards = torch.tensor([[0.1, 0.9], [2.5, NAN], [0.0, 1.6]])
    k1 = ([0.5, 0.1], [0.2], [0.0, 0.4])
    expected = {
        "ppo/score": 2.0,
        "ppo/score_std": math.sqrt(2 / 3),
        "ppo/shaped_score": 0.5,
        "ppo/shaped_score_std": math.sqrt((1.5**2 + 1.5**2) / 3),
        "ppo/reward_total": (1.0 + 2.5 + 1.6) / 3,
        "ppo/sequence_kl": (0.6 + 0.2 + 0.4) / 3,
        "ppo/sequence_kl_k2": sum(x * x / 2 for row in k1 for x in row) / 3,
        "ppo/sequence_kl_k3": sum(math.exp(-x) - 1 + x for row in k1 for x in row) / 3,
        "ppo/entropy": (1.5 + 2.0 + 2.5 + 1.0 + 0.5) / 5,
        "ppo/sequence_entropy": (3.5 + 2.5 + 1.5) / 3,
        "ppo/response_tokens": 5 / 3,
        "ppo/end_rate": 2 / 3,
        "ppo/kl_coef": 0.1,
        # Lengths 2, 1, 2 about 5/3 and scores -1, 1, 0: (-1/3 - 2/3) / sqrt(2/3 * 2).
        "ppo/score_length_correlation": -1 / math.sqrt(4 / 3),
    }
    assert rollout_metrics(rollout(), SHAPED, rewards, FIXED) == pytest.approx(expected, rel=1e-5)


def mismatch_of(made):
    return mismatch_metrics(made, Advantages(made.old_values, made.old_values))


def test_the_engines_mismatch_by_hand():
    # 0.5, 0, 0.5, 0 and 0.5.
    assert mismatch_of(rollout()) == pytest.approx(
        {
            "ppo/sampler_mismatch": 0.3,
            "ppo/sampler_mismatch_p95": 0.5,
            "ppo/sampler_mismatch_max": 0.5,
        }
    )


def test_the_mismatchs_tail_is_told_apart_from_its_mean():
    old = torch.zeros(1, 21)
    row = rollout(
        response_mask=torch.ones(1, 21, dtype=torch.bool),
        sampler_logprobs=-torch.arange(21.0)[None] / 10,
        old_logprobs=old,
        ref_logprobs=old,
        old_values=old,
        group=torch.tensor([0]),
        scores=torch.ones(1),
        each_score=torch.ones(1, 1),
        is_finished=torch.tensor([True]),
    )
    assert list(mismatch_of(row).values()) == pytest.approx([1.0, 1.9, 2.0])


def test_what_is_not_defined_is_left_out():
    equal = rollout(scores=torch.ones(3))
    assert "ppo/score_length_correlation" not in rollout_metrics(
        equal, SHAPED, torch.zeros(3, 2), FIXED
    )
    assert "ppo/kl_in_band" not in rollout_metrics(rollout(), SHAPED, torch.zeros(3, 2), FIXED)


@pytest.mark.parametrize(("target", "is_within"), [(0.4, 1.0), (0.7, 1.0), (0.9, 0.0), (0.2, 0.0)])
def test_the_controller_says_its_coefficient_and_whether_the_kl_is_in_its_band(target, is_within):
    # The sequence KL is 0.4: within half of the target, or not.
    found = rollout_metrics(rollout(), SHAPED, torch.zeros(3, 2), KlController(0.25, target))
    assert (found["ppo/kl_coef"], found["ppo/kl_in_band"]) == (0.25, is_within)


def test_several_reward_models_show_how_far_they_disagree():
    assert "ppo/score_disagreement" not in rollout_metrics(
        rollout(), SHAPED, torch.zeros(3, 2), FIXED
    )
    # Deviations of a pair are half their distance: 1, 0 and 2.
    each = torch.tensor([[1.0, 3.0, 2.0], [3.0, 3.0, -2.0]])
    found = rollout_metrics(rollout(each_score=each), SHAPED, torch.zeros(3, 2), FIXED)
    assert found["ppo/score_disagreement"] == pytest.approx(1.0)


def test_how_well_the_values_foresaw_the_returns_by_hand():
    returns = torch.tensor([[1.0, 2.0], [3.0, 0.0], [1.0, 3.0]])
    # Returns 1, 2, 3, 1, 3 about 2: variance 4/5.  Less the values: 0, 0, -1, 1, 2 about 0.4,
    # variance 6/5 - 0.16.
    assert critic_metrics(rollout(), Advantages(torch.zeros(3, 2), returns)) == pytest.approx(
        {
            "ppo/explained_variance": 1 - 1.04 / 0.8,
            "ppo/returns_mean": 2.0,
            "ppo/returns_var": 0.8,
        },
        rel=1e-5,
    )


def test_the_fields_names_are_the_same_numbers():
    found = with_field_names({"ppo/sequence_kl": 1.5, "ppo/other": 2.0})
    assert found == {"ppo/sequence_kl": 1.5, "ppo/other": 2.0, "objective/kl": 1.5}


def test_openais_explained_variance_counts_a_constant_offset():
    # Values 5 below returns of variance 1 explain all of it by our figure, and nothing by theirs.
    given = {"ppo/squared_value_error": 25.0, "ppo/returns_var": 1.0, "ppo/explained_variance": 1.0}
    assert with_field_names(given)["val/var_explained"] == -24.0
    assert "val/var_explained" not in with_field_names(given | {"ppo/returns_var": 0.0})


def test_what_is_no_number_is_not_logged_as_one():
    assert with_field_names({"ppo/sequence_kl": NAN, "ppo/score": math.inf, "ppo/value": 1.0}) == {
        "ppo/value": 1.0,
        "val/vpred": 1.0,
    }


def metrics_of(**settings):
    made = make(**settings)
    estimated = made_advantages(made.rollout)
    metrics = rollout_metrics(made.rollout, made.rollout.scores, made.rollout.old_logprobs, FIXED)
    if made.actors.actor_critic.has_critic:
        metrics |= critic_metrics(made.rollout, estimated)
    return with_field_names(metrics | update(made.learner, made.rollout, estimated, step=0))


def test_a_step_has_all_the_fields_names_and_without_a_critic_those_that_need_none():
    assert FIELD_NAMES.keys() <= metrics_of().keys()
    absent = FIELD_NAMES.keys() - metrics_of(advantages="rloo", samples_per_prompt=3).keys()
    assert {name.partition("/")[0] for name in absent} == {"loss", "val", "returns"}
    assert "loss/policy" not in absent

"""From the scores of a rollout to what PPO learns from: shaped, spread over tokens, estimated.

The steps are the pure functions of `rewards.py` and `advantage.py`; here stands their order.

Shapes: B rollouts, T response tokens.  Masks: True = keep.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from starling.ppo.advantage import (
    Advantages,
    estimate_advantages,
    grpo_advantages,
    rloo_advantages,
    scale_keeping_mean,
    spread_over_tokens,
    whiten,
)
from starling.ppo.config import PpoSection
from starling.ppo.rewards import (
    RunningMoments,
    add_missing_end,
    centre_clip_scale,
    penalise_length,
    replace_missing_end,
)
from starling.ppo.rollout import Rollout

Estimate = Callable[[Tensor, Rollout, PpoSection], Advantages]
"""Rewards [B, T] and their rollout to what is learned from it."""


def estimator(section: PpoSection) -> Estimate:
    """How the recipe wants advantages estimated."""
    if section.advantages == "rloo":
        return partial(by_group, rloo_advantages)
    if section.advantages == "grpo":
        return partial(by_group, grpo_advantages)
    return by_critic


def shaped_scores(
    rollout: Rollout, moments: RunningMoments, section: PpoSection
) -> tuple[Tensor, RunningMoments]:
    """Scores [B] centred, clipped, scaled, shifted, and penalised for length and a missing end.

    The running moments take the batch in before they are used, as in alpha's trainer.
    """
    seen, clip = rollout.scores, section.reward_clip
    if clip is not None and section.reward_centre == "none":
        seen = seen.clamp(-clip, clip)  # alpha's trainer measures what it has clipped
    if "running" in (section.reward_centre, section.reward_scale):
        moments = moments.updated(seen)
    scores = centre_clip_scale(
        rollout.scores,
        centre=moments.mean if section.reward_centre == "running" else 0.0,
        clip=clip,
        scale=(moments.std or 1.0) if section.reward_scale == "running" else 1.0,
        shift=section.reward_shift,
    )
    scores = penalise_length(scores, rollout.response_tokens, length_penalty=section.length_penalty)
    if section.missing_end_penalty is not None:
        end = replace_missing_end if section.missing_end == "replace" else add_missing_end
        scores = end(scores, rollout.is_finished, penalty=section.missing_end_penalty)
    return scores, moments


def by_critic(rewards: Tensor, rollout: Rollout, section: PpoSection) -> Advantages:
    """GAE with the critic's values."""
    if section.whiten_rewards:
        rewards = scale_keeping_mean(rewards, rollout.response_mask)
    return estimate_advantages(
        rewards,
        rollout.old_values,
        rollout.response_mask,
        gamma=section.gamma,
        gae_lambda=section.gae_lambda,
    )


def by_group(
    compare: Callable[[Tensor, Tensor], Tensor],
    rewards: Tensor,
    rollout: Rollout,
    _section: PpoSection,
) -> Advantages:
    """A response's whole reward against those of its prompt's others; no returns, no critic."""
    compared = compare(rewards.sum(dim=1), rollout.group)
    advantages = spread_over_tokens(compared, rollout.response_mask)
    return Advantages(advantages, torch.zeros_like(advantages))


def whitened(estimated: Advantages, rollout: Rollout, section: PpoSection) -> Advantages:
    """Advantages as the policy's loss takes them; returns are not touched.

    Those of groups are left as they are: whitened over tokens they would be of no published method.
    """
    if not section.whiten_advantages or section.advantages != "gae":
        return estimated
    return estimated._replace(advantages=whiten(estimated.advantages, rollout.response_mask))

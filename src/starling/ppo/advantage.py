"""Per-token rewards and generalised advantage estimation over the tokens of a response.

Shapes: B rollouts, T token positions.  Masks: True = keep.
Source: Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16; rewards as in Ziegler et al.
2019, https://arxiv.org/abs/1909.08593.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from starling.base.masked import masked_mean, masked_var

PerToken = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]


class Advantages(NamedTuple):
    """What PPO learns from a rollout; both are zero outside the response mask."""

    advantages: PerToken
    returns: PerToken


def shape_rewards(
    scores: Float[Tensor, " B"], kl: PerToken, response_mask: Mask, *, kl_coef: float
) -> PerToken:
    """-kl_coef * kl at every response token, plus the score at the last one; 0 elsewhere."""
    if not response_mask.any(dim=1).all():
        raise ValueError("every rollout needs at least one response token")
    rewards = torch.where(response_mask, -kl_coef * kl, 0.0)
    positions = torch.arange(response_mask.shape[1], device=scores.device)
    last = torch.where(response_mask, positions, -1).argmax(dim=1, keepdim=True)
    return rewards.scatter_add(1, last, scores[:, None])


def estimate_advantages(
    rewards: PerToken, values: PerToken, response_mask: Mask, *, gamma: float, gae_lambda: float
) -> Advantages:
    """GAE(gamma, lambda) advantages, and returns as advantages + values.

    The value after the last kept token is zero: every response ends its episode, cut or not.
    Raises ValueError if a row keeps no token, since its advantage is undefined.
    """
    if not response_mask.any(dim=1).all():
        raise ValueError("every rollout needs at least one response token")
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # [B]
    columns = []
    for t in reversed(range(rewards.shape[1])):
        keep = response_mask[:, t]
        td_error = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = td_error + gamma * gae_lambda * next_advantage
        # A masked column leaves the recursion as it found it.
        next_value = torch.where(keep, values[:, t], next_value)
        next_advantage = torch.where(keep, advantage, next_advantage)
        columns.append(torch.where(keep, advantage, 0.0))
    advantages = torch.stack(columns[::-1], dim=1)
    returns = torch.where(response_mask, advantages + values, 0.0)
    return Advantages(advantages, returns)


def whiten(values: PerToken, mask: Mask) -> PerToken:
    """Shift and scale kept entries to mean 0 and variance 1 over the whole batch; zero the rest.

    The variance is the population's, with 1e-8 inside the root (OpenAI's lm-human-preferences).
    """
    scaled = (values - masked_mean(values, mask)) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    return torch.where(mask, scaled, 0.0)

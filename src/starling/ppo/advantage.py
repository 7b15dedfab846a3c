"""Per-token rewards, and advantages: generalised estimation over tokens, or against a group.

Shapes: B rollouts, T token positions.  Masks: True = keep.
Sources: GAE, Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16; rewards as in Ziegler
et al. 2019, https://arxiv.org/abs/1909.08593, and whitening as in its code,
https://github.com/openai/lm-human-preferences; RLOO, Ahmadian et al. 2024,
https://arxiv.org/abs/2402.14740, section 3; GRPO, Shao et al. 2024 (DeepSeekMath),
https://arxiv.org/abs/2402.03300, section 4.1.2.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from starling.base.masked import masked_mean, masked_var

PerToken = Float[Tensor, "B T"]
PerRow = Float[Tensor, " B"]
Mask = Bool[Tensor, "B T"]


class Advantages(NamedTuple):
    """What PPO learns from a rollout; both are zero outside the response mask."""

    advantages: PerToken
    returns: PerToken


def shape_rewards(scores: PerRow, kl: PerToken, response_mask: Mask, *, kl_coef: float) -> PerToken:
    """-kl_coef * kl at every response token, plus the score at the last one; 0 elsewhere."""
    _check_rows(response_mask)
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
    _check_rows(response_mask)
    td_errors = rewards + gamma * _next_values(values, response_mask) - values
    td_errors = torch.where(response_mask, td_errors, 0.0)
    # A masked column, with no error and no decay, leaves the recursion as it found it.
    decay = torch.where(response_mask, gamma * gae_lambda, 1.0).to(rewards.dtype)
    columns = []
    advantage = torch.zeros_like(rewards[:, 0])  # [B]
    for td_error, factor in zip(td_errors.unbind(1)[::-1], decay.unbind(1)[::-1], strict=True):
        advantage = td_error + factor * advantage
        columns.append(advantage)
    advantages = torch.where(response_mask, torch.stack(columns[::-1], dim=1), 0.0)
    returns = torch.where(response_mask, advantages + values, 0.0)
    return Advantages(advantages, returns)


def whiten(values: PerToken, mask: Mask) -> PerToken:
    """Shift and scale kept entries to mean 0 and variance 1 over the whole batch; zero the rest.

    The variance is the population's, with 1e-8 inside the root (OpenAI's lm-human-preferences).
    """
    scaled = (values - masked_mean(values, mask)) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    return torch.where(mask, scaled, 0.0)


def scale_keeping_mean(values: PerToken, mask: Mask) -> PerToken:
    """Scale kept entries to variance 1 around the mean they have; zero the rest.

    What Ziegler's code does with rewards before GAE; variance and 1e-8 as in `whiten`.
    """
    return torch.where(mask, whiten(values, mask) + masked_mean(values, mask), 0.0)


def rloo_advantages(sequence_rewards: PerRow, group: Int[Tensor, " B"]) -> PerRow:
    """Each response's reward minus the mean of the others of its group: those of the same prompt.

    Raises ValueError for a group of one, which has nothing to be compared with.
    """
    is_same, size = _groups(group)
    return _gaps(sequence_rewards, is_same).sum(dim=1) / (size - 1)


def grpo_advantages(sequence_rewards: PerRow, group: Int[Tensor, " B"]) -> PerRow:
    """(reward - mean) / (std + 1e-4) over each group: the responses of the same prompt.

    The paper leaves open which deviation; this is the sample's (n - 1), and 1e-4, as in TRL's
    GRPOTrainer.  Equal rewards give zeros.  Raises ValueError for a group of one.
    """
    is_same, size = _groups(group)
    # By gaps and not as reward - mean, whose rounding would not be zero where all are equal.
    centred = _gaps(sequence_rewards, is_same).sum(dim=1) / size
    squares = torch.where(is_same, centred.square(), 0.0).sum(dim=1)
    return centred / ((squares / (size - 1)).sqrt() + 1e-4)


def spread_over_tokens(advantages: PerRow, mask: Mask) -> PerToken:
    """Every kept token gets its response's advantage; 0 elsewhere."""
    return torch.where(mask, advantages[:, None], 0.0)


def _check_rows(response_mask: Mask) -> None:
    if not response_mask.any(dim=1).all():
        raise ValueError("every rollout needs at least one response token")


def _next_values(values: PerToken, response_mask: Mask) -> PerToken:
    """At each position the value of the next kept one, 0 where none follows."""
    end = response_mask.shape[1]
    positions = torch.arange(end, device=values.device)
    kept = torch.where(response_mask, positions, end)
    here_or_later = kept.flip(1).cummin(dim=1).values.flip(1)
    following = torch.nn.functional.pad(here_or_later[:, 1:], (0, 1), value=end)
    return torch.nn.functional.pad(values, (0, 1)).gather(1, following)


def _groups(group: Int[Tensor, " B"]) -> tuple[Bool[Tensor, "B B"], Int[Tensor, " B"]]:
    """Which rollouts share a group, and how many each one's has."""
    is_same = group[:, None] == group
    size = is_same.sum(dim=1)
    if (size < 2).any():
        alone = group[size < 2][0].item()
        raise ValueError(f"group {alone} has one response; each prompt needs two or more")
    return is_same, size


def _gaps(sequence_rewards: PerRow, is_same: Bool[Tensor, "B B"]) -> Float[Tensor, "B B"]:
    """By how much the reward of row i exceeds that of column j, within a group."""
    return torch.where(is_same, sequence_rewards[:, None] - sequence_rewards, 0.0)

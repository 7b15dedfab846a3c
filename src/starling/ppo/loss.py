"""PPO's clipped losses, one term per token; the caller sums and divides by the minibatch's tokens.

Dividing by the tokens of the whole minibatch makes the gradient independent of micro-batches.

Shapes: B rollouts, T token positions.  Masks: True = keep.
Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7; the value clip is that of
OpenAI's lm-human-preferences.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PerToken = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]


class Terms(NamedTuple):
    """Loss per token (zero outside the mask), and where clipping took the gradient away."""

    loss: PerToken
    is_clipped: Mask


def policy_terms(
    logprobs: PerToken,
    old_logprobs: PerToken,
    advantages: PerToken,
    response_mask: Mask,
    *,
    clip_range: float,
) -> Terms:
    """max(-A r, -A clip(r, 1 - c, 1 + c)) with r = exp(logprobs - old_logprobs)."""
    ratio = torch.exp(torch.where(response_mask, logprobs - old_logprobs, 0.0))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.where(response_mask, torch.maximum(plain, clipped), 0.0)
    return Terms(loss, (clipped > plain) & response_mask)


def value_terms(
    values: PerToken,
    old_values: PerToken,
    returns: PerToken,
    response_mask: Mask,
    *,
    value_clip_range: float,
) -> Terms:
    """0.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)."""
    near = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    loss = torch.where(response_mask, 0.5 * torch.maximum(plain, clipped), 0.0)
    return Terms(loss, (clipped > plain) & response_mask)

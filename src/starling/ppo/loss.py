"""Losses of PPO, and of the methods it is compared with: per token, or per pair or ranking.

The caller sums the terms and divides by the minibatch's tokens.  Dividing by the tokens of the
whole minibatch makes the gradient independent of micro-batches.

Shapes: B rollouts, T token positions; N pairs; K answers to a prompt.  Masks: True = keep.
Sources: PPO, Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7; the value clip is that
of OpenAI's lm-human-preferences; APA, Zhu et al. 2023, https://arxiv.org/abs/2306.02231; DPO,
Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7 and appendix A.3; truncated weights,
Ionides 2008, https://doi.org/10.1198/106186008X320456; ties after Efron 1977,
https://doi.org/10.1080/01621459.1977.10480613.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

PerToken = Float[Tensor, "B T"]
PerPair = Float[Tensor, " N"]
PerAnswer = Float[Tensor, "B K"]
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


def apa_terms(
    logprobs: PerToken,
    old_logprobs: PerToken,
    advantages: PerToken,
    response_mask: Mask,
    *,
    apa_lambda: float,
) -> Terms:
    """(logprobs - old_logprobs - A / lambda)^2: no ratio, and nothing is clipped.

    The target is the policy proportional to old exp(A / lambda), its normaliser taken as 1.
    """
    distance = torch.where(response_mask, logprobs - old_logprobs - advantages / apa_lambda, 0.0)
    return Terms(distance.square(), torch.zeros_like(response_mask))


def value_terms(
    values: PerToken,
    old_values: PerToken,
    returns: PerToken,
    response_mask: Mask,
    *,
    value_clip_range: float | None,
) -> Terms:
    """0.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2); 0.5 (v - R)^2 where c is None."""
    # Before the square: the gradient of a square at NaN is NaN, masked afterwards or not.
    plain = torch.where(response_mask, values - returns, 0.0) ** 2
    if value_clip_range is None:
        return Terms(0.5 * plain, torch.zeros_like(response_mask))
    near = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    clipped = torch.where(response_mask, near - returns, 0.0) ** 2
    return Terms(0.5 * torch.maximum(plain, clipped), (clipped > plain) & response_mask)


def importance_weights(
    old_logprobs: PerToken, sampler_logprobs: PerToken, response_mask: Mask, *, cap: float
) -> PerToken:
    """min(old / sampler, cap): what a token counts that another engine sampled; no gradient.

    Zero outside the mask, as a token there counts nothing.
    """
    gap = torch.where(response_mask, old_logprobs - sampler_logprobs, -torch.inf)
    return torch.exp(gap.detach()).clamp(max=cap)


def dpo_loss(
    chosen: PerPair, rejected: PerPair, ref_chosen: PerPair, ref_rejected: PerPair, *, beta: float
) -> PerPair:
    """-log sigmoid(beta (chosen's log ratio - rejected's)), from logprobs of whole responses."""
    return -logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def plackett_luce_dpo_loss(
    logprobs: PerAnswer,
    ref_logprobs: PerAnswer,
    ranks: PerAnswer,
    mask: Bool[Tensor, "B K"],
    *,
    beta: float,
) -> Float[Tensor, " B"]:
    """Negative log-likelihood of each row's ranking, its scores being beta times the log ratios.

    Rank 1 is best and inf is unranked: below every ranked one, compared with no other unranked.
    Equal ranks tie, by Efron's weights: the stage of a tie's l-th member (from 0) of d counts the
    tie at 1 - l/d.  K = 2 is `dpo_loss`.  Raises ValueError where a row keeps fewer than two
    answers or ranks none.
    """
    is_ranked = mask & ranks.isfinite()
    if (mask.sum(dim=1) < 2).any() or not is_ranked.any(dim=1).all():
        raise ValueError("every row needs two answers, one of them ranked")
    scores = beta * torch.where(mask, logprobs - ref_logprobs, 0.0)
    place = torch.where(is_ranked, ranks, torch.inf)
    stage, other = place[:, :, None], place[:, None, :]  # [B, K, 1], [B, 1, K]
    tied = (stage == other) & is_ranked[:, None, :]
    nth = torch.tril(tied, diagonal=-1).sum(dim=2)  # [B, K]: earlier members of the same tie
    share = 1 - nth.to(scores.dtype) / tied.sum(dim=2).clamp(min=1)
    weight = torch.where(tied, share[:, :, None], (other > stage).to(scores.dtype))
    weight = weight * mask[:, None, :]
    # Stages of answers that are not ranked are thrown away below; 1 keeps their log finite.
    weight = torch.where(is_ranked[:, :, None], weight, 1.0)
    gaps = scores[:, None, :] - scores[:, :, None]
    terms = (gaps + weight.log()).logsumexp(dim=2)  # [B, K]
    return torch.where(is_ranked, terms, 0.0).sum(dim=1)


def distillation_terms(logprobs: PerToken, mask: Mask) -> PerToken:
    """-logprobs at kept tokens: cross-entropy with responses picked elsewhere, the best of n."""
    return torch.where(mask, -logprobs, 0.0)


def is_gated(value_loss: float, gate: float | None) -> bool:
    """Whether the critic is still too far off for the policy to learn from; never without a gate.

    Starling-LM-7B-alpha's trainer learns only the value loss of a minibatch where it exceeds 1.
    """
    return gate is not None and value_loss > gate

"""Losses of a ranking: Plackett-Luce's negative log-likelihood, and what it is compared with.

Shapes: B prompts, K answers of each, in any order.  Masks: True = keep.  Rank 1 is best, equal
ranks tie, UNRANKED answers lose to every ranked one and are not compared with each other.  Every
loss is in nats, one number a row, float32 or wider; it raises ValueError where a row keeps fewer
than two answers or ranks none.
Source: Plackett 1975; Zhu, Jordan and Jiao 2023, https://arxiv.org/abs/2301.11270, section 4; ties
after Efron 1977, https://doi.org/10.1080/01621459.1977.10480613, or Breslow 1974,
https://doi.org/10.2307/2529620.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

UNRANKED = 0
"""The rank of an answer that is only known to be below every ranked one."""


def plackett_luce_loss(
    scores: Float[Tensor, "B K"],
    ranks: Int[Tensor, "B K"],
    keep: Bool[Tensor, "B K"],
    *,
    ties: Literal["efron", "breslow"] = "efron",
) -> Float[Tensor, " B"]:
    """Negative log-likelihood of each row's ranking, divided by K - 1 of its kept answers.

    Each ranked answer is a stage: it is picked from those not yet picked.  In a tie of d, Efron's
    stage of its l-th member (from 0) counts the whole tie at weight 1 - l/d, Breslow's at 1; the
    order inside matters to neither.  K = 2 is Bradley-Terry.
    """
    is_ranked, place = _places(ranks, keep)
    gaps = _gaps(scores, keep)
    stage, other = place[:, :, None], place[:, None, :]  # [B, K, 1], [B, 1, K]
    tied = (stage == other) & is_ranked[:, :, None] & is_ranked[:, None, :]
    nth = torch.tril(tied, diagonal=-1).sum(dim=2)  # [B, K]: earlier members of the same tie
    if ties == "breslow":
        nth = torch.zeros_like(nth)
    share = 1 - nth.to(gaps.dtype) / tied.sum(dim=2).clamp(min=1)
    weight = torch.where(tied, share[:, :, None], (other > stage).to(share.dtype))
    weight = weight * keep[:, None, :]
    # Stages of answers that are not ranked are thrown away below; 1 keeps their log finite.
    weight = torch.where(is_ranked[:, :, None], weight, 1.0)
    # Relative to the stage's own score, so that rounding does not grow with the scores' size.
    terms = (gaps + weight.log()).logsumexp(dim=2)  # [B, K]
    return torch.where(is_ranked, terms, 0.0).sum(dim=1) / (keep.sum(dim=1) - 1)


def bradley_terry_loss(
    scores: Float[Tensor, "B K"],
    ranks: Int[Tensor, "B K"],
    keep: Bool[Tensor, "B K"],
    *,
    adjacent: bool = False,
) -> Float[Tensor, " B"]:
    """Mean negative log-likelihood of each row's pairs; 0 for a row that is one tie.

    Adjacent pairs are those with no answer ranked between.
    """
    _, place = _places(ranks, keep)
    better, worse = place[:, :, None], place[:, None, :]
    is_pair = (better < worse) & keep[:, None, :]
    if adjacent:
        middle = place[:, None, None, :]
        is_pair &= ~((better[..., None] < middle) & (middle < worse[..., None])).any(dim=3)
    losses = torch.where(is_pair, -logsigmoid(-_gaps(scores, keep)), 0.0)
    return losses.sum(dim=(1, 2)) / is_pair.sum(dim=(1, 2)).clamp(min=1)


def best_of_k_loss(
    scores: Float[Tensor, "B K"], ranks: Int[Tensor, "B K"], keep: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    """Cross-entropy of the softmax over each row with its best answer; ties of the best share.

    Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.1, with K = 4.
    """
    _, place = _places(ranks, keep)
    is_best = place == place.min(dim=1, keepdim=True).values
    terms = torch.where(keep[:, None, :], _gaps(scores, keep), -torch.inf).logsumexp(dim=2)
    return torch.where(is_best, terms, 0.0).sum(dim=1) / is_best.sum(dim=1)


def centring(scores: Float[Tensor, "B K"], keep: Bool[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """The square of each row's sum of scores over K - 1; to be weighed and added to its loss.

    No loss fixes the scores' zero; this does.  Source: Starling's reward trainer, zero-sum penalty.
    """
    return _kept(scores, keep).sum(dim=1).square() / (keep.sum(dim=1) - 1)


def _places(
    ranks: Int[Tensor, "B K"], keep: Bool[Tensor, "B K"]
) -> tuple[Bool[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Which answers are ranked, and every rank; what is not ranked or not kept is last."""
    is_ranked = keep & (ranks != UNRANKED)
    if (keep.sum(dim=1) < 2).any() or not is_ranked.any(dim=1).all():
        raise ValueError("every row needs two answers, one of them ranked")
    return is_ranked, torch.where(is_ranked, ranks, torch.iinfo(ranks.dtype).max)


def _gaps(scores: Float[Tensor, "B K"], keep: Bool[Tensor, "B K"]) -> Float[Tensor, "B K K"]:
    """By how much the answer of column j scores above that of row i."""
    kept = _kept(scores, keep)
    return kept[:, None, :] - kept[:, :, None]


def _kept(scores: Float[Tensor, "B K"], keep: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """The scores in float32 or wider, 0 where not kept."""
    return torch.where(keep, scores.to(torch.promote_types(scores.dtype, torch.float32)), 0.0)

"""The K-wise reward loss: Plackett-Luce's negative log-likelihood of a ranking.

Shapes: B prompts, K answers of each, in any order.  Masks: True = keep.
Source: Plackett 1975; Zhu, Jordan and Jiao 2023, https://arxiv.org/abs/2301.11270, section 4; ties
after Efron 1977, https://doi.org/10.1080/01621459.1977.10480613.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

UNRANKED = 0
"""The rank of an answer that is only known to be below every ranked one."""


def plackett_luce_loss(
    scores: Float[Tensor, "B K"], ranks: Int[Tensor, "B K"], keep: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    """Negative log-likelihood (nats) of each row's ranking, divided by K - 1 of its kept answers.

    Rank 1 is best, equal ranks tie, UNRANKED answers lose to every ranked one and are not compared
    with each other.  Each ranked answer is a stage: it is picked from those not yet picked.  In a
    tie of d, the stage of its l-th member (from 0) counts the whole tie at weight 1 - l/d, so that
    the order inside does not matter.  K = 2 is Bradley-Terry.  Raises ValueError for a row that
    keeps fewer than two answers or ranks none.
    """
    is_ranked = keep & (ranks != UNRANKED)
    num_kept = keep.sum(dim=1)
    if (num_kept < 2).any() or not is_ranked.any(dim=1).all():
        raise ValueError("every row needs two answers, one of them ranked")
    place = torch.where(is_ranked, ranks, torch.iinfo(ranks.dtype).max)
    stage, other = place[:, :, None], place[:, None, :]  # [B, K, 1], [B, 1, K]
    tied = (stage == other) & is_ranked[:, :, None] & is_ranked[:, None, :]
    nth = torch.tril(tied, diagonal=-1).sum(dim=2)  # [B, K]: earlier members of the same tie
    share = 1 - nth / tied.sum(dim=2).clamp(min=1)
    weight = torch.where(tied, share[:, :, None], (other > stage).to(share.dtype))
    weight = weight * keep[:, None, :]
    # Stages of answers that are not ranked are thrown away below; 1 keeps their log finite.
    weight = torch.where(is_ranked[:, :, None], weight, 1.0)
    remaining = (scores.float()[:, None, :] + weight.log()).logsumexp(dim=2)  # [B, K]
    terms = torch.where(is_ranked, remaining - scores.float(), 0.0)
    return terms.sum(dim=1) / (num_kept - 1)

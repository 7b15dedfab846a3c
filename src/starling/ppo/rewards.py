"""What becomes of a reward model's scores before PPO sees them, and how several models agree.

Pure steps, composed by the caller in this order: centre, clip, scale and shift; the penalty of
length; the missing end.  Clipping comes after centring: raw scores of a reward model may lie far
from zero (Starling-RM-34B's mean is about -8), where a clip at 10 would flatten them.

Shapes: B responses, M reward models.  Masks: True = keep.
Sources: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593 (a missing end replaces the score);
running moments after Chan, Golub and LeVeque 1979, as in Starling-LM-7B-alpha's trainer (trlx);
pessimism, Zhu, Jordan and Jiao 2023, https://arxiv.org/abs/2301.11270; ensembles, Coste et al.
2023, https://arxiv.org/abs/2310.02743, sections 3 (mean, worst case, and mean less uncertainty).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scores = Float[Tensor, " B"]
ModelScores = Float[Tensor, "M B"]


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of all scores so far, in float64.

    How the scores came in batches does not matter, up to float64's rounding.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def updated(self, scores: Scores) -> "RunningMoments":
        """The moments with these scores added; ValueError where one is not finite."""
        if not scores.isfinite().all():
            raise ValueError("a score is not finite; it would stay in the moments for good")
        added = scores.tolist()
        if not added:
            return self
        # Exact for equal float32 scores: they have no spread at all, not a rounding's.
        mean = math.fsum(added) / len(added)
        count, gap = self.count + len(added), mean - self.mean
        return RunningMoments(
            count=count,
            mean=self.mean + gap * len(added) / count,
            m2=self.m2
            + math.fsum((score - mean) ** 2 for score in added)
            + gap**2 * self.count * len(added) / count,
        )

    @property
    def std(self) -> float:
        """The population's deviation, 0 where all are equal; trlx divides by count - 1 instead."""
        if not self.count:
            raise ValueError("no scores yet, so no deviation")
        return math.sqrt(self.m2 / self.count)


def centre_clip_scale(
    scores: Scores, *, centre: float, clip: float | None, scale: float, shift: float
) -> Scores:
    """clip(scores - centre, -clip, clip) / scale + shift; no clip where it is None."""
    if not scale > 0:
        raise ValueError(f"scale must be positive, found {scale}")
    centred = scores - centre
    if clip is not None:
        centred = centred.clamp(-clip, clip)
    return centred / scale + shift


def penalise_length(
    scores: Scores, num_tokens: Int[Tensor, " B"], *, length_penalty: float
) -> Scores:
    """Subtract `length_penalty` for each token of the response."""
    return scores - length_penalty * num_tokens


def replace_missing_end(
    scores: Scores, is_finished: Bool[Tensor, " B"], *, penalty: float
) -> Scores:
    """A response without its end marker scores exactly `penalty`, a negative number (Ziegler)."""
    return torch.where(is_finished, scores, penalty)


def add_missing_end(scores: Scores, is_finished: Bool[Tensor, " B"], *, penalty: float) -> Scores:
    """`penalty`, a negative number, is added where the end marker is missing."""
    return torch.where(is_finished, scores, scores + penalty)


def combine_mean(scores: ModelScores, weights: Float[Tensor, " M"]) -> Scores:
    """The models' weighted mean; weights need not sum to 1, but must not be negative or all 0."""
    if (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"weights must be positive, found {weights.tolist()}")
    return (weights[:, None] * scores).sum(dim=0) / weights.sum()


def combine_minimum(scores: ModelScores) -> Scores:
    """The lowest of the models' scores."""
    return scores.min(dim=0).values


def combine_pessimistic(scores: ModelScores, *, deviations: float) -> Scores:
    """The models' mean less so many of their (population) standard deviations.

    Coste et al. subtract a multiple of the variance; deviations keep the scores' unit.
    """
    return scores.mean(dim=0) - deviations * scores.std(dim=0, correction=0)


def length_correlation(scores: Scores, num_tokens: Int[Tensor, " B"]) -> float | None:
    """Pearson's correlation of score and length; None where all scores or lengths are equal."""
    pairs = torch.stack([scores.double(), num_tokens.double()])  # [2, B]
    if (pairs == pairs[:, :1]).all(dim=1).any():
        return None
    centred = pairs - pairs.mean(dim=1, keepdim=True)
    return ((centred[0] * centred[1]).sum() / centred.norm(dim=1).prod()).item()

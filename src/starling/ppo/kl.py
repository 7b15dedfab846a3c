"""KL to the reference policy: estimators per token, sums per sequence, and the controller.

Shapes: B rollouts, T token positions.  Masks: True = keep.  Everything is in nats.
Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2; estimators after
Schulman 2020, http://joschu.net/blog/kl-approx.html.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from starling.base.masked import masked_sum

PerToken = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]

LARGEST_ERROR = 0.2
"""One update sees the measured KL as at most this much, relatively, off the target."""
BAND = 0.5
"""A measured KL within this much of the target, relatively, counts as held."""


def k1(logprobs: PerToken, ref_logprobs: PerToken) -> PerToken:
    """log policy - log reference: unbiased, may be negative; the penalty in PPO's reward."""
    return logprobs - ref_logprobs


def k2(logprobs: PerToken, ref_logprobs: PerToken) -> PerToken:
    """k1^2 / 2: biased, never negative; the only one whose gradient averages to that of the KL."""
    return (logprobs - ref_logprobs) ** 2 / 2


def k3(logprobs: PerToken, ref_logprobs: PerToken) -> PerToken:
    """exp(-k1) - 1 + k1: unbiased and never negative; for monitoring."""
    difference = logprobs - ref_logprobs
    return torch.exp(-difference) - 1 + difference


def sequence_kl(kl: PerToken, response_mask: Mask) -> Float[Tensor, " B"]:
    """Sum over each response's tokens: nats per sequence, the unit of the controller's target."""
    return masked_sum(kl, response_mask, dim=1)


@dataclass(frozen=True)
class KlController:
    """The KL coefficient; with a target it follows the measured KL, without one it stays.

    After each update: error = clip(KL / target - 1, -0.2, 0.2);
    coef <- coef * (1 + error * episodes / horizon).
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000

    def __post_init__(self) -> None:
        if not 0 <= self.coef < math.inf:
            raise ValueError(f"coef must be finite and not negative, found {self.coef}")
        if self.target is not None and not 0 < self.target < math.inf:
            raise ValueError(f"target must be positive nats a sequence, or None: {self.target}")
        if self.horizon <= 0:
            raise ValueError(f"horizon must be a positive number of episodes, found {self.horizon}")

    def updated(self, measured: float, *, episodes: int) -> "KlController":
        """The controller after `episodes` responses whose mean sequence KL was `measured`.

        Raises ValueError for a KL that is not finite, for no episodes, and, with a target, for so
        many against the horizon that one update could take the coefficient to zero or below.
        """
        if not math.isfinite(measured):
            raise ValueError(f"the measured KL is {measured}")
        if episodes < 1:
            raise ValueError(f"episodes must be at least 1, found {episodes}")
        if self.target is None:
            return self
        if LARGEST_ERROR * episodes >= self.horizon:
            raise ValueError(
                f"{episodes} episodes in one update need a horizon over "
                f"{LARGEST_ERROR * episodes:g}, found {self.horizon}"
            )
        error = min(max(measured / self.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
        return replace(self, coef=self.coef * (1 + error * episodes / self.horizon))

    def band(self, measured: float) -> bool | None:
        """Whether the measured KL is within 0.5 to 1.5 of the target; None without a target."""
        if self.target is None:
            return None
        return abs(measured - self.target) <= BAND * self.target

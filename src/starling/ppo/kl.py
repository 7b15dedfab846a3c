"""KL to the reference policy: estimators per token, sums per sequence, and the controller.

Shapes: B rollouts, T token positions.  Masks: True = keep.  Everything is in nats.
Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2; estimators after
Schulman 2020, http://joschu.net/blog/kl-approx.html.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from starling.base.masked import masked_sum

PerToken = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]


def k1(logprobs: PerToken, ref_logprobs: PerToken) -> PerToken:
    """log policy - log reference: unbiased, may be negative; the penalty in PPO's reward."""
    return logprobs - ref_logprobs


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

    def updated(self, measured: float, *, episodes: int) -> "KlController":
        """The controller after `episodes` responses whose mean sequence KL was `measured`."""
        if self.target is None:
            return self
        error = min(max(measured / self.target - 1, -0.2), 0.2)
        return replace(self, coef=self.coef * (1 + error * episodes / self.horizon))

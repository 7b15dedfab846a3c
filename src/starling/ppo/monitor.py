"""What a rollout batch looked like before the update; docs/metrics.md explains each figure.

Shapes: B rollouts, T token positions.  Masks: True = keep.
"""

from torch import Tensor

from starling.base.masked import masked_mean, masked_var
from starling.ppo.advantage import Advantages
from starling.ppo.kl import sequence_kl
from starling.ppo.rollout import Rollout, Samples


def rollout_metrics(
    samples: Samples, rollout: Rollout, kl: Tensor, estimated: Advantages
) -> dict[str, float]:
    """What an iteration's rollouts looked like before the update (docs/metrics.md)."""
    mask = rollout.response_mask
    mismatch = (samples.sampler_logprobs - rollout.old_logprobs).abs()
    returns_variance = masked_var(estimated.returns, mask)
    residual = masked_var(estimated.returns - rollout.old_values, mask)
    return {
        "ppo/score": float(rollout.scores.mean()),
        "ppo/score_std": float(rollout.scores.std(correction=0)),
        "ppo/sequence_kl": float(sequence_kl(kl, mask).mean()),
        "ppo/entropy": float(-masked_mean(rollout.old_logprobs, mask)),
        "ppo/response_tokens": float(samples.response_tokens.mean()),
        "ppo/end_rate": sum(samples.is_finished) / len(samples.is_finished),
        "ppo/explained_variance": float(1 - residual / (returns_variance + 1e-8)),
        "ppo/sampler_mismatch": float(masked_mean(mismatch, mask)),
    }

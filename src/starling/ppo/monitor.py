"""What a rollout batch looked like before the update; docs/metrics.md explains each figure.

Shapes: B rollouts, T response tokens.  Masks: True = keep.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from starling.base.masked import masked_mean, masked_var
from starling.ppo.advantage import Advantages
from starling.ppo.kl import KlController, k1, k2, k3, sequence_kl
from starling.ppo.rewards import length_correlation
from starling.ppo.rollout import Rollout

FIELD_NAMES = {
    "objective/kl": "ppo/sequence_kl",
    "objective/kl_coef": "ppo/kl_coef",
    "objective/entropy": "ppo/sequence_entropy",
    "objective/score": "ppo/shaped_score",
    "objective/score_total": "ppo/reward_total",
    "policy/approxkl": "ppo/approx_kl_k2",
    "policy/clipfrac": "ppo/clip_fraction",
    "policy/entropy": "ppo/entropy",
    "policy/ratio": "ppo/ratio",
    "policy/ratio_var": "ppo/ratio_var",
    "loss/policy": "ppo/policy_loss",
    "loss/value": "ppo/value_loss",
    "val/vpred": "ppo/value",
    "val/error": "ppo/squared_value_error",
    "val/clipfrac": "ppo/value_clip_fraction",
    "returns/mean": "ppo/returns_mean",
    "returns/var": "ppo/returns_var",
}
"""Names of OpenAI's lm-human-preferences, under which curves of other programs compare."""


def with_field_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics, and the same numbers under the names that the field knows."""
    known = {name: metrics[own] for name, own in FIELD_NAMES.items() if own in metrics}
    found = {**metrics, **known}
    if "val/error" in found and found["returns/var"] > 0:
        # Theirs is of the update's error, a constant offset included.
        found["val/var_explained"] = 1 - found["val/error"] / found["returns/var"]
    # What is not finite stands in flags.jsonl: JSON has no number for it.
    return {name: value for name, value in found.items() if math.isfinite(value)}


def rollout_metrics(
    rollout: Rollout,
    shaped: Float[Tensor, " B"],
    rewards: Float[Tensor, "B T"],
    controller: KlController,
) -> dict[str, float]:
    """What an iteration's rollouts looked like before the update.

    `shaped` are the scores as they enter the `rewards`, which are per token.

    A figure that is not defined is left out: a correlation where scores or lengths are all equal.
    """
    mask, old, reference = rollout.response_mask, rollout.old_logprobs, rollout.ref_logprobs
    tokens = rollout.response_tokens
    metrics = {
        "ppo/score": float(rollout.scores.mean()),
        "ppo/score_std": float(rollout.scores.std(correction=0)),
        "ppo/shaped_score": float(shaped.mean()),
        "ppo/shaped_score_std": float(shaped.std(correction=0)),
        "ppo/reward_total": float(torch.where(mask, rewards, 0.0).sum(dim=1).mean()),
        "ppo/sequence_kl": float(sequence_kl(k1(old, reference), mask).mean()),
        "ppo/sequence_kl_k2": float(sequence_kl(k2(old, reference), mask).mean()),
        "ppo/sequence_kl_k3": float(sequence_kl(k3(old, reference), mask).mean()),
        "ppo/entropy": float(-masked_mean(old, mask)),
        "ppo/sequence_entropy": float(sequence_kl(-old, mask).mean()),
        "ppo/response_tokens": float(tokens.float().mean()),
        "ppo/end_rate": float(rollout.is_finished.float().mean()),
    }
    metrics["ppo/kl_coef"] = controller.coef
    is_within = controller.band(metrics["ppo/sequence_kl"])
    if is_within is not None:
        metrics["ppo/kl_in_band"] = float(is_within)
    if len(rollout.each_score) > 1:
        metrics["ppo/score_disagreement"] = float(
            rollout.each_score.std(dim=0, correction=0).mean()
        )
    correlation = length_correlation(rollout.scores, tokens)
    if correlation is not None:
        metrics["ppo/score_length_correlation"] = correlation
    return metrics


def mismatch_metrics(rollout: Rollout, _estimated: Advantages) -> dict[str, float]:
    """How far the engine's logprobs are from those that the trainer recomputed."""
    mismatch = (rollout.sampler_logprobs - rollout.old_logprobs).abs()[rollout.response_mask]
    return {
        "ppo/sampler_mismatch": float(mismatch.mean()),
        "ppo/sampler_mismatch_p95": float(mismatch.quantile(0.95)),
        "ppo/sampler_mismatch_max": float(mismatch.max()),
    }


def critic_metrics(rollout: Rollout, estimated: Advantages) -> dict[str, float]:
    """How well the values foresaw the returns."""
    mask, returns = rollout.response_mask, estimated.returns
    variance = masked_var(returns, mask)
    residual = masked_var(returns - rollout.old_values, mask)
    return {
        "ppo/explained_variance": float(1 - residual / (variance + 1e-8)),
        "ppo/returns_mean": float(masked_mean(returns, mask)),
        "ppo/returns_var": float(variance),
    }

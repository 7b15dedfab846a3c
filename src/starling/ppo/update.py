"""One PPO update: epochs of clipped minibatch steps over a frozen rollout, and its metrics.

Shapes: B rollouts, T token positions.  Masks: True = keep.
"""

from collections import defaultdict

import torch
from torch import Tensor

from starling.base.errors import InputError
from starling.base.masked import masked_mean, masked_sum, masked_var
from starling.base.seeding import permutation
from starling.models.training import Trainable
from starling.ppo.actor_critic import ActorCritic
from starling.ppo.advantage import Advantages
from starling.ppo.config import PpoSection
from starling.ppo.kl import k3, sequence_kl
from starling.ppo.loss import policy_terms, value_terms
from starling.ppo.rollout import Rollout, Samples


def update(
    trainable: Trainable,
    actor_critic: ActorCritic,
    rollout: Rollout,
    estimated: Advantages,
    section: PpoSection,
    *,
    seed: int,
    step: int,
) -> dict[str, float]:
    """Take `ppo_epochs` x `minibatches` optimizer steps; returns the means of what they measured.

    Every epoch visits the rollout in a new order.  A loss is divided by the tokens of its whole
    minibatch, so micro-batches change memory and not the gradient.
    """
    num_rows = len(rollout.scores)
    rows_per_minibatch = num_rows // section.minibatches
    totals: dict[str, list[float]] = defaultdict(list)
    for epoch in range(section.ppo_epochs):
        order = permutation(num_rows, seed, f"ppo/minibatch/{step}", epoch)
        for start in range(0, num_rows, rows_per_minibatch):
            minibatch = order[start : start + rows_per_minibatch]
            measured = _accumulate(actor_critic, rollout, estimated, minibatch, section)
            measured["ppo/grad_norm"] = trainable.step(step)
            for name, value in measured.items():
                totals[name].append(value)
    return {name: sum(values) / len(values) for name, values in totals.items()}


def _accumulate(
    actor_critic: ActorCritic,
    rollout: Rollout,
    estimated: Advantages,
    minibatch: list[int],
    section: PpoSection,
) -> dict[str, float]:
    """Add one minibatch's gradient, micro-batch by micro-batch; returns its means per token."""
    num_tokens = int(rollout.response_mask[minibatch].sum())
    sums: dict[str, float] = defaultdict(float)
    for start in range(0, len(minibatch), section.microbatch):
        indices = minibatch[start : start + section.microbatch]
        rows = rollout.rows(indices)
        now = actor_critic.evaluate(
            rows.token_ids, rows.response_mask, temperature=section.temperature
        )
        policy = policy_terms(
            now.logprobs,
            rows.old_logprobs,
            estimated.advantages[indices],
            rows.response_mask,
            clip_range=section.clip_range,
        )
        value = value_terms(
            now.values,
            rows.old_values,
            estimated.returns[indices],
            rows.response_mask,
            value_clip_range=section.value_clip_range,
        )
        loss = (policy.loss.sum() + section.value_coef * value.loss.sum()) / num_tokens
        if not torch.isfinite(loss):
            raise InputError(
                f"the PPO loss is {loss.item()}; lower ppo.lr, or look at the reward model's scores"
            )
        loss.backward()
        approx_kl = k3(rows.old_logprobs, now.logprobs.detach())
        sums["ppo/policy_loss"] += policy.loss.sum().item() / num_tokens
        sums["ppo/value_loss"] += value.loss.sum().item() / num_tokens
        sums["ppo/clip_fraction"] += float(policy.is_clipped.sum()) / num_tokens
        sums["ppo/value_clip_fraction"] += float(value.is_clipped.sum()) / num_tokens
        sums["ppo/approx_kl"] += float(masked_sum(approx_kl, rows.response_mask)) / num_tokens
    return dict(sums)


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

"""What PPO does with one rollout: epochs of minibatches, each an optimizer step.

A loss is divided by the tokens of its whole minibatch, over all processes, so that micro-batches,
packing and the number of processes change memory and time, and not the gradient.

Shapes: b rows of a micro-batch, T response tokens.  Masks: True = keep.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from starling.base.context import Context
from starling.base.errors import InputError
from starling.base.masked import masked_sum
from starling.base.seeding import permutation
from starling.models.parallel import Forward, filled_up, summed
from starling.models.training import Trainable
from starling.ppo.actor_critic import ActorCritic
from starling.ppo.advantage import Advantages
from starling.ppo.bundles import Bundle, Reading, bundle_batches
from starling.ppo.config import PpoSection
from starling.ppo.kl import k2, k3
from starling.ppo.loss import (
    Terms,
    apa_terms,
    importance_weights,
    is_gated,
    policy_terms,
    value_terms,
)
from starling.ppo.rollout import Rollout

PolicyTerms = Callable[[Tensor, Tensor, Tensor, Tensor], Terms]
"""Logprobs, old logprobs, advantages and mask [b, T] to the policy's loss per token."""

NAMES = (
    "ppo/policy_loss",
    "ppo/value_loss",
    "ppo/clip_fraction",
    "ppo/value_clip_fraction",
    "ppo/approx_kl",
    "ppo/approx_kl_k2",
    "ppo/ratio",
    "ppo/squared_ratio",
    "ppo/value",
    "ppo/squared_value_error",
)
"""What a micro-batch measures: sums over its tokens, divided by those of the minibatch."""

VALUE_NAMES = {
    "ppo/value_loss",
    "ppo/value_clip_fraction",
    "ppo/value",
    "ppo/squared_value_error",
    "ppo/gated",
}
"""Those that only a critic has."""


@dataclass(frozen=True)
class Learner:
    """Who learns from a rollout, and how."""

    actor_critic: ActorCritic
    forward: Forward
    trainable: Trainable
    section: PpoSection
    context: Context

    @property
    def terms(self) -> PolicyTerms:
        """The policy's objective, as the recipe chose it."""
        if self.section.objective == "apa":
            return partial(apa_terms, apa_lambda=self.section.apa_lambda)
        return partial(policy_terms, clip_range=self.section.clip_range)


class Weights(NamedTuple):
    """What the two losses of an optimizer step count."""

    policy: float
    value: float


def update(
    learner: Learner, rollout: Rollout, estimated: Advantages, *, step: int
) -> dict[str, float]:
    """Take `ppo_epochs` x `minibatches` optimizer steps; returns the means of what they measured.

    Every epoch visits the prompts in a new order, each with all of its responses.
    """
    section, seed = learner.section, learner.context.seed
    totals: dict[str, list[float]] = defaultdict(list)
    for epoch in range(section.ppo_epochs):
        for rows in minibatches(rollout, section.minibatches, seed=seed, step=step, epoch=epoch):
            measured = optimize(learner, rollout, estimated, rows, step=step)
            rollout = replace(rollout, live=None)
            for name, value in measured.items():
                totals[name].append(value)
    means = {name: sum(values) / len(values) for name, values in totals.items()}
    # Both sides are of the same weights here: more than rounding is a bug, or an engine's.
    means["ppo/first_approx_kl"] = totals["ppo/approx_kl"][0]
    means["ppo/ratio_var"] = means.pop("ppo/squared_ratio") - means["ppo/ratio"] ** 2
    absent = () if learner.actor_critic.has_critic else VALUE_NAMES
    return {name: value for name, value in means.items() if name not in absent}


def minibatches(
    rollout: Rollout, number: int, *, seed: int, step: int, epoch: int
) -> list[list[int]]:
    """Rows of each optimizer step of an epoch: prompts in a new order, whole."""
    group = rollout.group.tolist()
    order = permutation(group[-1] + 1, seed, f"ppo/minibatch/{step}", epoch)
    size = len(order) // number
    chosen = [set(order[start : start + size]) for start in range(0, size * number, size)]
    return [[row for row, of in enumerate(group) if of in groups] for groups in chosen]


def optimize(
    learner: Learner, rollout: Rollout, estimated: Advantages, rows: Sequence[int], *, step: int
) -> dict[str, float]:
    """One optimizer step on these rows; returns means per token, measured before it."""
    section, policy = learner.section, learner.actor_critic.policy
    weights = Weights(1.0, section.value_coef)
    if section.critic_gate is not None:
        value_loss = mean_value_loss(learner, rollout, estimated, rows)
        if is_gated(value_loss, section.critic_gate):
            weights = Weights(0.0, section.value_coef)
    measured = accumulate(learner, rollout, estimated, rows, weights)
    if step < section.critic_warmup:
        for parameter in policy.parameters():
            # AdamW leaves a weight without a gradient as it is.
            parameter.grad = None
    measured["ppo/gated"] = float(weights.policy == 0)
    measured["ppo/grad_norm"] = learner.trainable.step(step)
    return measured


def accumulate(
    learner: Learner,
    rollout: Rollout,
    estimated: Advantages,
    rows: Sequence[int],
    weights: Weights,
) -> dict[str, float]:
    """Add the minibatch's gradient, micro-batch by micro-batch; returns its means per token."""
    context, terms = learner.context, learner.terms
    num_tokens = int(rollout.response_mask[rows].sum())
    total = torch.zeros(len(NAMES), dtype=torch.float64, device=context.device)
    for batch, counts in own_batches(learner, rollout, rows):
        loss, measured = _micro_batch(learner, rollout, estimated, batch, terms, weights)
        if not torch.isfinite(loss):
            raise InputError(
                f"the PPO loss is {loss.item()}; lower ppo.lr, or look at the reward model's scores"
            )
        # Several processes' gradients are averaged.
        (loss * (counts * context.world_size / num_tokens)).backward()
        total += measured * counts
    means = (summed(total, context) / num_tokens).tolist()
    return dict(zip(NAMES, means, strict=True))


@torch.no_grad()
def mean_value_loss(
    learner: Learner, rollout: Rollout, estimated: Advantages, rows: Sequence[int]
) -> float:
    """The value loss of the minibatch as it stands, over all processes: what the gate looks at."""
    total = torch.zeros((), dtype=torch.float64, device=learner.context.device)
    for batch, counts in own_batches(learner, rollout, rows):
        _, measured = _micro_batch(
            learner, rollout, estimated, batch, learner.terms, Weights(0.0, 1.0)
        )
        total += measured[NAMES.index("ppo/value_loss")] * counts
    return float(summed(total, learner.context) / rollout.response_mask[rows].sum())


def own_batches(
    learner: Learner, rollout: Rollout, rows: Sequence[int]
) -> list[tuple[Sequence[Bundle], bool]]:
    """This process's forwards for these rows; in several, each takes equally many (a filler)."""
    section, own = learner.section, set(rollout.own)
    mine = rollout.bundles([row for row in rows if row in own], most=section.microbatch)
    batches = bundle_batches(
        mine,
        learner.context.device,
        tokens=section.tokens_per_forward,
        most=section.microbatch,
    )
    filler = rollout.bundles(rollout.own[:1], most=1)
    return filled_up(batches, learner.context, filler=filler)


def _micro_batch(
    learner: Learner,
    rollout: Rollout,
    estimated: Advantages,
    batch: Sequence[Bundle],
    terms: PolicyTerms,
    weights: Weights,
) -> tuple[Tensor, Tensor]:
    """Summed loss of one forward's tokens, and the sums named in `NAMES`."""
    section, actor_critic = learner.section, learner.actor_critic
    reading = Reading(batch, learner.context.device)
    trunk = rollout.trunk_states(actor_critic.trunk, batch)
    flat = rollout.live
    if flat is None:
        flat = learner.forward(actor_critic.evaluate, reading, trunk, section.temperature)
    rows = reading.rows
    width = max(len(rollout.response_ids[row]) for row in rows)
    mask = rollout.response_mask[rows, :width]
    logprobs, values = (
        torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, part) for part in flat
    )
    old, old_values, returns = (
        part[rows, :width] for part in (rollout.old_logprobs, rollout.old_values, estimated.returns)
    )
    policy = terms(logprobs, old, estimated.advantages[rows, :width], mask)
    value = value_terms(
        values, old_values, returns, mask, value_clip_range=section.value_clip_range
    )
    counted = policy.loss
    if section.importance_cap is not None:
        sampler = rollout.sampler_logprobs[rows, :width]
        counted = counted * importance_weights(old, sampler, mask, cap=section.importance_cap)
    loss = weights.value * value.loss.sum()
    if weights.policy:  # not times 0: a gradient of zeros lets AdamW's momentum move the policy
        loss = loss + weights.policy * counted.sum()
    with torch.no_grad():
        ratio = torch.exp(torch.where(mask, logprobs - old, 0.0))
        kept = (
            counted,
            value.loss,
            policy.is_clipped.float(),
            value.is_clipped.float(),
            k3(old, logprobs),
            k2(old, logprobs),
            ratio,
            ratio**2,
            values,
            (values - returns) ** 2,
        )
        sums = torch.stack([masked_sum(part.double(), mask) for part in kept])
    return loss, sums

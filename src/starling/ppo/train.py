"""Stage 3: PPO against a reward model, held to its starting policy by a KL penalty.

The loop is the algorithm: sample, score, shape rewards, estimate advantages, optimise.

Shapes: B rollouts, T token positions.  Masks: True = keep.
Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593.
"""

import contextlib
import logging
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch

from starling.base.context import Context
from starling.base.errors import InputError
from starling.base.masked import masked_sum
from starling.base.seeding import derive_seed, permutation
from starling.base.stage import Summary
from starling.judging.build import build_judge
from starling.judging.judge import Judge
from starling.models.causal_lm import LanguageModel, load_language_model, save_model
from starling.models.reward_model import RewardModel
from starling.models.torch_engine import TorchEngine
from starling.models.training import Journal, Trainable, adamw, batch_indices, linear, warmup_then
from starling.ppo.actor_critic import ActorCritic, frozen_copy
from starling.ppo.advantage import Advantages, estimate_advantages, shape_rewards, whiten
from starling.ppo.config import PpoInputs, PpoSection
from starling.ppo.kl import KlController, k1, k3, sequence_kl
from starling.ppo.loss import policy_terms, value_terms
from starling.ppo.monitor import rollout_metrics
from starling.ppo.prompts import load_prompts
from starling.ppo.rollout import (
    Rollout,
    evaluate_rollout,
    sample_responses,
    sampling,
    score_responses,
)
from starling.ppo.select import Selection, Validator

logger = logging.getLogger(__name__)


def run(section: PpoSection, inputs: PpoInputs, out: Path, context: Context) -> Summary:
    """Improve the policy for `steps` iterations and save the checkpoint that the judge prefers."""
    start = load_language_model(
        inputs.policy, device=context.device, chat_format=section.chat_format
    )
    reference = frozen_copy(start.model)
    reward_model = RewardModel.load(inputs.reward_model, device=context.device)
    actor_critic = ActorCritic(start.model, critic=section.critic)
    engine = TorchEngine(
        start.model, stop_ids=start.codec.stop_ids, pad_id=start.codec.tokenizer.pad_id
    )
    prompts, validation_prompts = load_prompts(section, inputs, start.codec, out, seed=context.seed)
    schedule = warmup_then(linear(section.steps), section.warmup_steps)
    trainable = adamw("actor_critic", actor_critic, section, schedule, eps=section.adam_eps)
    every = section.checkpoint_every
    with (
        _judge(inputs, out, context) as judge,
        Journal(out, trainable, context, "ppo", section.steps, every) as journal,
    ):
        validator = Validator(
            validation_prompts,
            judge,
            reward_model,
            engine,
            start.codec,
            reference,
            section,
            context.seed,
            out,
        )
        snapshot = journal.resume()
        selection = Selection.resume(snapshot.state["extra"], snapshot.tensors)
        controller = KlController(
            snapshot.state["extra"].get("kl_coef", section.kl_coef),
            section.kl_target,
            section.kl_horizon,
        )
        if not selection.validations:
            selection.add(validator.measure(start.model, 0), start.model, section)
        for step in range(snapshot.step, section.steps):
            chosen = batch_indices(
                step, section.rollout_batch, len(prompts), context.seed, "ppo/order"
            )
            batch = [prompts[i] for i in chosen for _ in range(section.samples_per_prompt)]
            samplings = [
                sampling(section, derive_seed(context.seed, "ppo/rollout", step, row))
                for row in range(len(batch))
            ]
            samples = sample_responses(engine, start.codec, batch, samplings, device=context.device)
            scores = score_responses(reward_model, samples, section)
            rollout = evaluate_rollout(actor_critic, reference, samples, scores, section)
            kl = k1(rollout.old_logprobs, rollout.ref_logprobs)
            rewards = shape_rewards(scores, kl, rollout.response_mask, kl_coef=controller.coef)
            estimated = estimate_advantages(
                rewards,
                rollout.old_values,
                rollout.response_mask,
                gamma=section.gamma,
                gae_lambda=section.gae_lambda,
            )
            estimated = estimated._replace(
                advantages=whiten(estimated.advantages, rollout.response_mask)
            )
            learned = update(
                trainable, actor_critic, rollout, estimated, section, seed=context.seed, step=step
            )
            engine.sync(start.model.state_dict(), step + 1)
            measured = float(sequence_kl(kl, rollout.response_mask).mean())
            metrics = rollout_metrics(samples, rollout, kl, estimated) | learned
            metrics["ppo/kl_coef"] = controller.coef
            controller = controller.updated(measured, episodes=len(batch))
            if (step + 1) % section.select_every == 0 or step + 1 == section.steps:
                validation = validator.measure(start.model, step + 1)
                metrics |= selection.add(validation, start.model, section)
            note = f"score {float(scores.mean()):.2f}  kl {measured:.2f}"
            journal.log(step + 1, metrics, note)
            extra = selection.state() | {"kl_coef": controller.coef}
            journal.boundary(step + 1, extra, selection.weights)
    return _finish(section, start, selection, out)


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
            measured = accumulate(actor_critic, rollout, estimated, minibatch, section)
            measured["ppo/grad_norm"] = trainable.step(step)
            for name, value in measured.items():
                totals[name].append(value)
    return {name: sum(values) / len(values) for name, values in totals.items()}


def accumulate(
    actor_critic: ActorCritic,
    rollout: Rollout,
    estimated: Advantages,
    minibatch: list[int],
    section: PpoSection,
) -> dict[str, float]:
    """Add one minibatch's gradient, micro-batch by micro-batch; returns its means per token."""
    num_tokens = int(rollout.response_mask[minibatch].sum())
    lengths = rollout.lengths
    by_length = sorted(minibatch, key=lambda row: (-lengths[row], row))
    sums: dict[str, float] = defaultdict(float)
    for start in range(0, len(minibatch), section.microbatch):
        indices = by_length[start : start + section.microbatch]
        rows = rollout.rows(indices)
        width = rows.token_ids.shape[1]
        now = actor_critic.evaluate(
            rows.token_ids, rows.response_mask, temperature=section.temperature
        )
        policy = policy_terms(
            now.logprobs,
            rows.old_logprobs,
            estimated.advantages[indices, :width],
            rows.response_mask,
            clip_range=section.clip_range,
        )
        value = value_terms(
            now.values,
            rows.old_values,
            estimated.returns[indices, :width],
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


def _judge(
    inputs: PpoInputs, out: Path, context: Context
) -> contextlib.AbstractContextManager[Judge | None]:
    if inputs.judge is None:
        return contextlib.nullcontext()
    return build_judge(
        inputs.judge, seed=context.seed, ledger=out / "calls.sqlite", context=context
    )


def _finish(section: PpoSection, start: LanguageModel, selection: Selection, out: Path) -> Summary:
    """Save the selected checkpoint, or the last where none was eligible or nobody judged."""
    chosen = selection.best or selection.validations[-1]
    if selection.best is not None:
        start.model.load_state_dict(selection.weights)
    elif any(validation.rating is not None for validation in selection.validations):
        logger.warning(
            "no checkpoint kept within the limits on length (%.2f x) and KL (target %s nats); the "
            "last one is saved. Lower ppo.lr or raise ppo.kl_coef",
            section.select_max_length_ratio,
            section.kl_target,
        )
    save_model(out / "model", start.model, start.codec)
    figures = {
        "sequence_kl": chosen.kl,
        "kl_target": section.kl_target,
        "selected_step": chosen.step,
        "validations": [asdict(validation) for validation in selection.validations],
    }
    before, after = selection.validations[0].rating, chosen.rating
    judged = ""
    if before is not None and after is not None:
        judged = f"; the judge's rating went from {before:.2f} to {after:.2f}"
        if after <= before:
            logger.warning("the judge rates the kept policy no higher than its start")
    sentence = (
        f"Trained the policy for {section.steps} iterations and kept step {chosen.step}, "
        f"{chosen.kl['mean']:.1f} nats from its start{judged} -> {out / 'model'}"
    )
    return Summary(sentence, figures)

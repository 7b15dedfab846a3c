"""Stage 3: PPO against a reward model, held to its starting policy by a KL penalty.

The loop is the algorithm: sample, score, shape rewards, estimate advantages, optimise.

Shapes: B rollouts, T token positions.  Masks: True = keep.
Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593.
"""

import contextlib
import logging
from pathlib import Path

from starling.base.context import Context
from starling.base.progress import Progress
from starling.base.seeding import derive_seed, permutation
from starling.base.stage import Summary
from starling.judging.build import build_judge
from starling.judging.judge import Judge
from starling.models.causal_lm import LanguageModel, load_language_model, save_model
from starling.models.interfaces import Sampling
from starling.models.reward_model import RewardModel
from starling.models.torch_engine import TorchEngine
from starling.models.training import Journal, Trainable, adamw, batch_indices, linear, warmup_then
from starling.ppo.actor_critic import ActorCritic, frozen_copy
from starling.ppo.advantage import estimate_advantages, shape_rewards, whiten
from starling.ppo.config import PpoInputs, PpoSection
from starling.ppo.kl import KlController, k1, sequence_kl
from starling.ppo.prompts import load_prompts
from starling.ppo.rollout import evaluate_rollout, sample_responses, score_responses
from starling.ppo.select import Selection, Validator
from starling.ppo.update import rollout_metrics, update

logger = logging.getLogger(__name__)


def run(section: PpoSection, inputs: PpoInputs, out: Path, context: Context) -> Summary:
    """Improve the policy for `steps` iterations and save the checkpoint that the judge prefers."""
    start = load_language_model(inputs.policy, device=context.device)
    reference = frozen_copy(start.model)
    reward_model = RewardModel.load(inputs.reward_model, device=context.device)
    actor_critic = ActorCritic(start.model, critic=section.critic)
    engine = TorchEngine(
        start.model, stop_ids=start.codec.stop_ids, pad_id=start.codec.tokenizer.pad_id
    )
    prompts, validation_prompts = load_prompts(section, inputs, start.codec, out, seed=context.seed)
    trainable = _trainable(section, actor_critic)

    def order(epoch: int) -> list[int]:
        return permutation(len(prompts), context.seed, "ppo/order", epoch)

    with (
        _judge(inputs, out, context) as judge,
        Journal(out, trainable, context, every=section.checkpoint_every) as journal,
        Progress("ppo", section.steps) as progress,
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
            chosen = batch_indices(step, section.rollout_batch, order, len(prompts))
            batch = [prompts[i] for i in chosen for _ in range(section.samples_per_prompt)]
            samplings = [
                Sampling(
                    section.max_response_tokens,
                    section.temperature,
                    derive_seed(context.seed, "ppo/rollout", step, row),
                )
                for row in range(len(batch))
            ]
            samples = sample_responses(engine, start.codec, batch, samplings, device=context.device)
            scores = score_responses(
                reward_model,
                samples,
                missing_end_penalty=section.missing_end_penalty,
                reward_clip=section.reward_clip,
            )
            rollout = evaluate_rollout(
                actor_critic,
                reference,
                samples,
                scores,
                temperature=section.temperature,
                microbatch=section.microbatch,
            )
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
            journal.log(step + 1, metrics, seconds_key="ppo/seconds")
            progress.update(step + 1, f"score {float(scores.mean()):.2f}  kl {measured:.2f}")
            extra = selection.state() | {"kl_coef": controller.coef}
            journal.boundary(step + 1, extra, selection.weights)
    return _finish(section, start, selection, out)


def _judge(
    inputs: PpoInputs, out: Path, context: Context
) -> contextlib.AbstractContextManager[Judge | None]:
    if inputs.judge is None:
        return contextlib.nullcontext()
    return build_judge(
        inputs.judge, seed=context.seed, ledger=out / "calls.sqlite", context=context
    )


def _trainable(section: PpoSection, actor_critic: ActorCritic) -> Trainable:
    return Trainable(
        {"actor_critic": actor_critic},
        adamw(
            actor_critic.parameters(),
            lr=section.lr,
            weight_decay=section.weight_decay,
            eps=section.adam_eps,
        ),
        lr=section.lr,
        schedule=warmup_then(linear(section.steps), section.warmup_steps),
        max_grad_norm=section.max_grad_norm,
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
        "validations": [validation.as_dict() for validation in selection.validations],
    }
    ratings = [v.rating for v in (selection.validations[0], chosen)]
    judged = (
        f"; the judge's rating went from {ratings[0]:.2f} to {ratings[1]:.2f}"
        if None not in ratings
        else ""
    )
    sentence = (
        f"Trained the policy for {section.steps} iterations and kept step {chosen.step}, "
        f"{chosen.kl['mean']:.1f} nats from its start{judged} -> {out / 'model'}"
    )
    return Summary(sentence, figures)

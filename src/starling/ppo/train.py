"""Stage 3: PPO against a reward model, held to its starting policy by a KL penalty.

The loop is the algorithm: sample, score, shape rewards, estimate advantages, optimise.

Shapes: B rollouts, T response tokens.  Masks: True = keep.
Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593.  docs/ppo-details.md says where each
detail that decides whether this is PPO stands, and which test pins it.
"""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from starling.base.context import Context
from starling.base.seeding import derive_seed
from starling.base.stage import Summary
from starling.data.records import Prompt
from starling.judging.build import build_judge
from starling.judging.judge import Judge
from starling.models.causal_lm import save_model
from starling.models.interfaces import Sampling
from starling.models.training import Journal, batch_indices
from starling.ppo.advantage import shape_rewards
from starling.ppo.config import PpoInputs, PpoSection
from starling.ppo.estimate import shaped_scores, whitened
from starling.ppo.health import health_line
from starling.ppo.kl import k1
from starling.ppo.monitor import rollout_metrics, with_field_names
from starling.ppo.prompts import load_prompts
from starling.ppo.rollout import sampling
from starling.ppo.select import Validator, objections
from starling.ppo.setup import Stage, prepare
from starling.ppo.state import State
from starling.ppo.update import update

logger = logging.getLogger(__name__)


def run(section: PpoSection, inputs: PpoInputs, out: Path, context: Context) -> Summary:
    """Improve the policy for `steps` iterations and save the checkpoint that the judge prefers."""
    stage = prepare(section, inputs, context)
    prompts, held_out = load_prompts(section, inputs, stage.start.codec, out, context)
    every = section.checkpoint_every
    with (
        _judge(inputs, out, context) as judge,
        Journal(out, stage.trainable, context, "ppo", section.steps, every) as journal,
    ):
        validator = Validator(
            held_out.prompts, held_out.instructed, judge, stage.collector, context.seed, out
        )
        snapshot = journal.resume()
        state = State.resume(snapshot, section)
        stage.publish(snapshot.step)
        if not state.selection.validations:
            state.selection.add(validator.measure(0), dict, section)
        for step in range(snapshot.step, section.steps):
            batch = chosen_prompts(prompts, section, step, context.seed)
            drawn = samplings(section, step, context.seed)
            rollout = stage.collector.collect(batch, drawn, will_learn=True)
            scores, state.moments = shaped_scores(rollout, state.moments, section)
            kl = k1(rollout.old_logprobs, rollout.ref_logprobs)
            coef = state.controller.coef
            rewards = shape_rewards(scores, kl, rollout.response_mask, kl_coef=coef)
            estimated = stage.estimate(rewards, rollout, section)
            metrics = rollout_metrics(rollout, scores, rewards, state.controller)
            for measure in stage.measures:
                metrics |= measure(rollout, estimated)
            if state.may_learn(step + 1, metrics, rollout, out, context):
                estimated = whitened(estimated, rollout, section)
                learned = update(stage.learner, rollout, estimated, step=step)
                state.note_update(step + 1, learned, rollout, out, context)
                metrics |= learned
            rollout = replace(rollout, live=None)  # its graph would outlive it by a rollout
            stage.publish(step + 1)
            state.control(metrics, section, step=step)
            if (step + 1) % section.select_every == 0 or step + 1 == section.steps:
                validation = validator.measure(step + 1)
                metrics |= state.selection.add(validation, stage.weights, section)
            note = health_line(metrics, kl_target=section.kl_target)
            journal.log(step + 1, with_field_names(metrics), note)
            journal.boundary(step + 1, state.plain(), state.selection.weights)
    return _finish(section, stage, state, out, context)


def chosen_prompts(
    prompts: Sequence[Prompt], section: PpoSection, step: int, seed: int
) -> list[Prompt]:
    """The prompts of an iteration, each as often as it is to be answered."""
    chosen = batch_indices(step, section.rollout_batch, len(prompts), seed, "ppo/order")
    return [prompts[i] for i in chosen for _ in range(section.samples_per_prompt)]


def samplings(section: PpoSection, step: int, seed: int) -> list[Sampling]:
    """How each of them is drawn, every response by a seed of its own."""
    rows = range(section.rollout_batch * section.samples_per_prompt)
    return [sampling(section, derive_seed(seed, "ppo/rollout", step, row)) for row in rows]


def _judge(
    inputs: PpoInputs, out: Path, context: Context
) -> contextlib.AbstractContextManager[Judge | None]:
    if inputs.judge is None or context.rank > 0:
        return contextlib.nullcontext()
    return build_judge(
        inputs.judge, seed=context.seed, ledger=out / "calls.sqlite", context=context
    )


def _finish(
    section: PpoSection, stage: Stage, state: State, out: Path, context: Context
) -> Summary:
    """Save the selected checkpoint, or the last where none was eligible or nobody judged."""
    model, selection = stage.forward.whole(), state.selection
    if model is None:
        return Summary("")
    chosen = selection.best or selection.validations[-1]
    if selection.best is not None:
        unknown = model.load_state_dict(selection.weights, strict=False).unexpected_keys
        assert not unknown, f"the selection has weights that the policy has not: {unknown}"
    elif any(validation.rating is not None for validation in selection.validations):
        reasons = "; ".join(objections(chosen, selection.validations[0], section))
        logger.warning(
            "no checkpoint was within the limits, and the last one is saved: %s",
            reasons or "others were not, and the judge rated none of them higher",
        )
    save_model(out / "model", model, stage.start.codec)
    figures = {
        "sequence_kl": chosen.kl,
        "kl_target": section.kl_target,
        "selected_step": chosen.step,
        "flags": len(state.health.flags),
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

"""Our side of the PPO races: the stage's own pieces, driven as its loop drives them.

Prompts are ids of random tokens, so nothing is encoded, decoded or rendered again for the reward
model: it scores the ids that were drawn, as the peer's does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from ppo_peer import (
    ADAM_EPS,
    ANSWER_TOKENS,
    CLIP_RANGE,
    CRITIC_SEED,
    END,
    EPOCHS,
    GAE_LAMBDA,
    KL_COEF,
    MINIBATCHES,
    PAD,
    REWARD_SEED,
    VALUE_COEF,
    Heard,
    Prompts,
    new_policy,
    new_scorer,
)
from ppo_products import Lengths, Method
from racing import Seconds

from starling.base.context import single_process_context
from starling.models.causal_lm import LanguageModel
from starling.models.interfaces import GenerationRequest, Sampling
from starling.models.parallel import parallel
from starling.models.reward_model import row_scores
from starling.models.torch_engine import TorchEngine
from starling.ppo.actor_critic import build_actors, made_by
from starling.ppo.advantage import Advantages, shape_rewards
from starling.ppo.config import PpoSection
from starling.ppo.estimate import estimator, whitened
from starling.ppo.kl import KlController, k1
from starling.ppo.monitor import critic_metrics, rollout_metrics
from starling.ppo.rollout import Collector, Rollout, Row, rollout_of
from starling.ppo.setup import optimizer_of
from starling.ppo.update import Learner, minibatches, optimize, update

PHASES = ("generate", "score", "evaluate", "train", "optimizer")


def method_of(side: str, layers: int) -> Method:
    """What a side of a race computes."""
    if side == "top-quarter":
        return Method(layers // 4, has_critic_apart=False, reuses_trunk=True)
    return Method(None, has_critic_apart=side == "separate-critic")


def section_of(side: str, layers: int, *, num_prompts: int, precision: str, lr: float) -> Any:
    """The recipe's section with the peer's settings."""
    method = method_of(side, layers)
    settings = {
        "steps": 1,
        "rollout_batch": num_prompts,
        "ppo_epochs": EPOCHS,
        "minibatches": MINIBATCHES,
        "max_response_tokens": ANSWER_TOKENS,
        "critic": "separate" if method.has_critic_apart else "shared",
        "train": "full" if method.trained is None else "top",
        "top_layers": method.trained or layers,
        "precision": "bfloat16" if precision == "bf16" else "float32",
        "lr": lr,
        "schedule": "constant",
        "adam_eps": ADAM_EPS,
        "max_grad_norm": None,
        "gae_lambda": GAE_LAMBDA,
        "clip_range": CLIP_RANGE,
        "value_clip_range": CLIP_RANGE,
        "value_coef": VALUE_COEF,
        "kl_coef": KL_COEF,
        "missing_end_penalty": None,
        # As the peer has them.  In bf16 the engine decodes in another precision than we learn in.
        "old_logprobs": "recomputed" if precision == "bf16" else "sampler",
    }
    return PpoSection.model_validate(settings)


@dataclass
class Ours:
    """Models and optimizer that go on from call to call, and what the calls took and drew."""

    collector: Collector
    learner: Learner
    engine: TorchEngine
    reward: Any
    phases: dict[str, Seconds] = field(default_factory=dict)
    drawn: list[Lengths] = field(default_factory=list)

    @staticmethod
    def new(name: str, side: str, *, kind: str, num_prompts: int, device: str, lr: float) -> "Ours":
        """A side of a race, with the peer's policy, reward model and random value head."""
        context = single_process_context(1, device)
        policy = new_policy(name, ragged="ragged" in kind, device=device).eval()
        layers, precision = policy.config.num_hidden_layers, kind.partition(" ")[0]
        section = section_of(side, layers, num_prompts=num_prompts, precision=precision, lr=lr)
        # Neither is needed where ids stand for text.
        codec: Any = None
        scorer: Any = None
        actors = build_actors(LanguageModel(policy, codec), section, None, seed=0)
        beside = actors.actor_critic.beside
        value_head: Any = beside["value_head"]
        value_head.weight.data.copy_(
            new_scorer(name, None, device=device, seed=CRITIC_SEED).score.weight
        )
        # The peer's has no bias.
        value_head.bias.requires_grad_(False)
        forward = parallel(policy, made_by, context, beside=beside, precision=section.precision)
        engine = TorchEngine(policy, stop_ids=frozenset({END}), pad_id=PAD)
        trainable = optimizer_of(actors.actor_critic, section)
        return Ours(
            Collector(engine, codec, scorer, actors, forward, section, context),
            Learner(actors.actor_critic, forward, trainable, section, context),
            engine,
            new_scorer(name, None, device=device, seed=REWARD_SEED).eval(),
        )

    @property
    def device(self) -> str:
        return self.learner.context.device

    def __call__(self, prompts: Prompts) -> Seconds:
        """One iteration of the stage's loop."""
        torch.use_deterministic_algorithms(True, warn_only=self.device != "cpu")
        start, optimizer = Seconds.now(self.device), self.learner.trainable.optimizer
        step = len(self.drawn)
        with self._phase("generate"):
            rows = self._rows(prompts, seed=step * len(prompts))
        with self._phase("score"):
            rows = self._scored(rows)
        with self._phase("evaluate"):
            rollout, estimated = self._evaluated(rows, self.collector)
        stepping, stepped = self._phase("optimizer")(optimizer.step), self._taken("optimizer")
        with (
            self._phase("train"),
            mock.patch.object(optimizer, "step", side_effect=stepping) as steps,
        ):
            update(self.learner, rollout, estimated, step=step)
        # The optimizer's share, a phase of its own, is no part of this one.
        self.phases["train"] = self._taken("train").since(self._taken("optimizer").since(stepped))
        with self._phase("generate"):
            self.engine.sync(self.learner.actor_critic.policy.state_dict(), step + 1)
        assert steps.call_count == EPOCHS * MINIBATCHES, steps.call_count
        self.drawn.append(
            Lengths([len(row.prompt_ids) for row in rows], [len(row.response_ids) for row in rows])
        )
        return Seconds.now(self.device).since(start)

    def heard(self, sequences: Sequence[Sequence[int]], width: int) -> Heard:
        """Learn from given answers behind prompts of `width` places; what each step computed."""
        rows = self._scored([_row_of(ids, width) for ids in sequences])
        # These the engine did not draw, so it has no logprobs of them.
        section = self.learner.section.model_copy(update={"old_logprobs": "recomputed"})
        rollout, estimated = self._evaluated(rows, replace(self.collector, section=section))
        heard = Heard()
        for epoch in range(EPOCHS):
            for chosen in minibatches(rollout, MINIBATCHES, seed=0, step=0, epoch=epoch):
                found = optimize(self.learner, rollout, estimated, chosen, step=0)
                value = self.learner.section.value_coef * found["ppo/value_loss"]
                heard.losses.append(found["ppo/policy_loss"] + value)
                heard.norms.append(found["ppo/grad_norm"])
        return heard

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = Seconds.now(self.device)
        yield
        took = Seconds.now(self.device).since(start)
        self.phases[name] = self._taken(name) + took

    def _taken(self, name: str) -> Seconds:
        return self.phases.get(name, Seconds(0, 0))

    def _rows(self, prompts: Prompts, *, seed: int) -> list[Row]:
        requests = [
            GenerationRequest(str(place), ids, Sampling(ANSWER_TOKENS, seed=seed + place))
            for place, ids in enumerate(prompts)
        ]
        samples = {int(sample.request_id): sample for sample in self.engine.generate(requests)}
        return [
            Row(ids, found.ids, found.logprobs, "", found.finish_reason == "stop", ())
            for ids, found in zip(prompts, (samples[n] for n in range(len(samples))), strict=True)
        ]

    @torch.no_grad()
    def _scored(self, rows: Sequence[Row]) -> list[Row]:
        conversations = [[row.prompt_ids + row.response_ids] for row in rows]
        scores = row_scores(self.reward, conversations, PAD).tolist()
        return [row._replace(scores=(x, x)) for row, x in zip(rows, scores, strict=True)]

    def _evaluated(self, rows: Sequence[Row], collector: Collector) -> tuple[Rollout, Advantages]:
        """What `Collector.collect` does next, and the loop before it learns."""
        section, places = self.learner.section, range(len(rows))
        evaluated, trunk, _ = collector._evaluate(rows, places, will_learn=False)
        texts: Any = [None] * len(rows)
        rollout = rollout_of(texts, places, evaluated, own=places, trunk=trunk, device=self.device)
        kl = k1(rollout.old_logprobs, rollout.ref_logprobs)
        rewards = shape_rewards(rollout.scores, kl, rollout.response_mask, kl_coef=section.kl_coef)
        estimated = estimator(section)(rewards, rollout, section)
        rollout_metrics(rollout, rollout.scores, rewards, KlController(section.kl_coef))
        critic_metrics(rollout, estimated)
        return rollout, whitened(estimated, rollout, section)


def _row_of(ids: Sequence[int], width: int) -> Row:
    """A row of the peer's: a prompt padded on the left, then an answer padded on the right."""
    prompt, answer = (tuple(x for x in part if x != PAD) for part in (ids[:width], ids[width:]))
    return Row(prompt, answer, (0.0,) * len(answer), "", answer[-1] == END, ())

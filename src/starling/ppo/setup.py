"""Everything that PPO's loop calls, made once from the recipe."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from starling.base.context import Context
from starling.base.errors import RecipeError
from starling.base.seeding import derive_seed
from starling.models.causal_lm import LanguageModel, load_language_model
from starling.models.interfaces import Engine
from starling.models.parallel import Forward, parallel
from starling.models.torch_engine import TorchEngine
from starling.models.training import Trainable, adamw, constant, linear, warmup_then
from starling.ppo.actor_critic import build_actors, made_by
from starling.ppo.advantage import Advantages
from starling.ppo.config import PpoInputs, PpoSection
from starling.ppo.estimate import Estimate, estimator
from starling.ppo.monitor import critic_metrics, mismatch_metrics
from starling.ppo.rollout import Collector, Rollout
from starling.ppo.scorer import Scorer
from starling.ppo.update import Learner

Measure = Callable[[Rollout, Advantages], dict[str, float]]


@dataclass(frozen=True)
class Stage:
    """All that the loop calls, made once."""

    start: LanguageModel
    collector: Collector
    learner: Learner
    trainable: Trainable
    forward: Forward
    engine: Engine
    estimate: Estimate
    measures: tuple[Measure, ...]
    """What is logged of a rollout beside `rollout_metrics`, as far as it is defined."""
    shares_weights: bool
    """Whether the engine decodes with the very weights that learn."""

    def publish(self, version: int) -> None:
        """Let the engine sample with the policy as it is now."""
        policy = self.start.model if self.shares_weights else self.forward.whole_everywhere()
        self.engine.sync(policy.state_dict(), version)

    def weights(self) -> Mapping[str, Tensor]:
        """The policy's whole weights that are not its start's, on rank 0; every process asks."""
        whole = self.forward.whole()
        if whole is None:
            return {}
        named = whole.state_dict()
        section = self.learner.section
        if section.train in ("full", "lora"):
            return named
        policy = self.start.model
        return {n: named[n] for n, weight in policy.named_parameters() if weight.requires_grad}


def prepare(section: PpoSection, inputs: PpoInputs, context: Context) -> Stage:
    """Load the models, choose what learns, and make critic, reference, engine and optimizer."""
    if section.rollout_batch < context.world_size:
        raise RecipeError(
            f"ppo.rollout_batch is {section.rollout_batch} for {context.world_size} processes; "
            "each needs a prompt of its own"
        )
    device = context.device
    start = load_language_model(inputs.policy, device=device, chat_format=section.chat_format)
    scorer = Scorer.load(inputs.reward_models, section, device=device)
    shares_weights = context.world_size == 1 and section.train != "lora"
    seed = derive_seed(context.seed, "ppo/adapters")
    actors = build_actors(start, section, scorer.models[0], seed=seed)
    forward = parallel(
        start.model,
        made_by,
        context,
        beside=actors.actor_critic.beside,
        precision=section.precision,
        gradient_checkpointing=section.gradient_checkpointing,
    )
    # Made last: with `train: top` the head is untied by now, and a copy must be as well.
    decoding = start.model if shares_weights else forward.whole_everywhere()
    engine = TorchEngine(
        decoding, stop_ids=start.codec.stop_ids, pad_id=start.codec.tokenizer.pad_id
    )
    trainable = optimizer_of(actors.actor_critic, section)
    return Stage(
        start=start,
        collector=Collector(engine, start.codec, scorer, actors, forward, section, context),
        learner=Learner(actors.actor_critic, forward, trainable, section, context),
        trainable=trainable,
        forward=forward,
        engine=engine,
        estimate=estimator(section),
        measures=(
            *([mismatch_metrics] if section.old_logprobs == "recomputed" else []),
            *([critic_metrics] if actors.actor_critic.has_critic else []),
        ),
        shares_weights=shares_weights,
    )


def optimizer_of(module: nn.Module, section: PpoSection) -> Trainable:
    """AdamW as the recipe says, in PyTorch's form or TensorFlow's."""
    decay = linear(section.steps) if section.schedule == "linear" else constant
    schedule = warmup_then(decay, section.warmup_steps)
    trainable = adamw(
        "actor_critic",
        module,
        section,
        schedule,
        eps=section.adam_eps,
        beta2=section.adam_beta2,
    )
    if section.adam_form == "tensorflow":
        return replace(trainable, tensorflow_eps=section.adam_eps)
    return trainable

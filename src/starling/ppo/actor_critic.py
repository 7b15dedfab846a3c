"""The policy with its critic, and the reference it is held to: built once, then called.

`shared`: a zero-initialised value head on the policy's trunk (Ziegler et al. 2019).  `separate`: on
a copy of the policy.  `reward-model`: a copy of the reward model, head and normalisation included
(InstructGPT), where both read the same vocabulary.

Where only the top of the policy learns, what lies below is computed once for each rollout and
reused by policy, critic and reference (`models/trunk.py`); of these layers alone there are copies.

Shapes: N response tokens of a forward, D model width.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from starling.base.errors import ModelError
from starling.data.chat import ChatCodec
from starling.models.adapters import blocks_of, choose_parameters, untie, without_adapters
from starling.models.causal_lm import LanguageModel, state_logprobs
from starling.models.packing import prepared, why_not_packed
from starling.models.reward_model import RewardModel, score_head
from starling.models.trunk import Trunk, why_not_split
from starling.ppo.bundles import Reading, packed_predictors, padded_predictors
from starling.ppo.config import PpoSection

logger = logging.getLogger(__name__)

Predict = Callable[[Any, Reading, Tensor | None], Tensor]
"""A model or backbone, what it reads, and the trunk's states, to the predicting states [N, D]."""


class Evaluated(NamedTuple):
    """Logprobs (nats, at the sampling temperature) and values of response tokens, float32."""

    logprobs: Float[Tensor, " N"]
    values: Float[Tensor, " N"]


class ActorCritic(nn.Module):
    """A policy and its critic: a linear head on the policy's states, or on those of `critic`.

    The value at token t is read from the state that predicts token t, so it does not see it.
    Without a `value_head` there is no critic, and values are zero.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        critic: nn.Module | None,
        value_head: nn.Linear | None,
        predict: Predict,
        trunk: Trunk | None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.beside = nn.ModuleDict()
        if critic is not None:
            self.beside["critic"] = critic
        if value_head is not None:
            self.beside["value_head"] = value_head
        self._predict = predict
        self._trunk = (trunk,)  # in a tuple, so that its layers are not registered twice

    @property
    def trunk(self) -> Trunk | None:
        return self._trunk[0]

    @property
    def has_critic(self) -> bool:
        return "value_head" in self.beside

    def evaluate(
        self,
        policy: PreTrainedModel,
        reading: Reading,
        trunk: Float[Tensor, "T D"] | None,
        temperature: float,
    ) -> Evaluated:
        """Logprobs and values of the reading's response tokens; `policy` is `self.policy`."""
        states = self._predict(self.learning_part(policy), reading, trunk)
        head: Any = policy.get_output_embeddings()
        logprobs = state_logprobs(head, states, reading.targets, temperature=temperature)
        if not self.has_critic:
            return Evaluated(logprobs, torch.zeros_like(logprobs))
        if "critic" in self.beside:
            states = self._predict(self.beside["critic"], reading, trunk)
        return Evaluated(logprobs, self._values(states))

    def evaluate_values(
        self,
        policy: PreTrainedModel,
        reading: Reading,
        trunk: Float[Tensor, "T D"] | None,
    ) -> Float[Tensor, " N"]:
        """The values alone, without the policy's forward where the critic has its own."""
        if not self.has_critic:
            return torch.zeros(len(reading.targets), device=reading.device)
        critic = self.beside["critic"] if "critic" in self.beside else self.learning_part(policy)
        return self._values(self._predict(critic, reading, trunk))

    def _values(self, states: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        value_head: Any = self.beside["value_head"]
        # A sum of products, not the layer: autocast would round values to bfloat16.
        return (states.float() * value_head.weight.float()).sum(dim=-1) + value_head.bias.float()

    def learning_part(self, policy: PreTrainedModel) -> Any:
        """What makes the policy's states: its upper layers, its backbone, or the model itself."""
        if self.trunk is not None:
            return self.trunk.upper
        return policy if why_not_packed(policy) else prepared(policy)


@dataclass(frozen=True)
class Actors:
    """Policy with critic, and the frozen start of it."""

    actor_critic: ActorCritic
    reference: nn.ModuleDict | None
    """The reference's own weights; None where it is the policy without its adapters."""
    predict: Predict

    def reference_logprobs(
        self,
        policy: PreTrainedModel,
        reading: Reading,
        trunk: Float[Tensor, "T D"] | None,
        temperature: float,
    ) -> Float[Tensor, " N"]:
        """The reference's logprobs of the same tokens, at the same temperature."""
        if self.reference is not None:
            head: Any = self.reference["head"]
            states = self.predict(self.reference["states"], reading, trunk)
        else:
            head = policy.get_output_embeddings()
            with without_adapters(policy):
                states = self.predict(self.actor_critic.learning_part(policy), reading, trunk)
        return state_logprobs(head, states, reading.targets, temperature=temperature)


def made_by(model: PreTrainedModel, call: Callable[..., Any], *arguments: Any) -> Any:
    """What a `Forward` of the policy computes: any of the calls here that want its weights."""
    return call(model, *arguments)


def build_actors(
    start: LanguageModel, section: PpoSection, reward_model: RewardModel | None, *, seed: int
) -> Actors:
    """Choose what learns of the starting policy, in place, and make critic and reference.

    Raises ModelError for a critic that cannot be made, RecipeError for too many `top_layers`.
    """
    policy = start.model
    if section.train in ("top", "head"):
        untie(policy)
    is_apart = section.critic == "separate" and section.train in ("full", "lora")
    copied = copy.deepcopy(policy.get_decoder()) if is_apart else None
    choose_parameters(policy, section, seed=seed)
    predict = _prediction(policy, start.codec)
    trunk = _trunk(policy, section)
    critic, value_head = None, None
    if section.advantages == "gae":
        critic, value_head = _critic(policy, trunk, copied, section, start.codec, reward_model)
    actor_critic = ActorCritic(policy, critic, value_head, predict, trunk)
    return Actors(actor_critic, _reference(policy, trunk, section), predict)


def _reference(
    policy: PreTrainedModel, trunk: Trunk | None, section: PpoSection
) -> nn.ModuleDict | None:
    """Of the policy's start what the policy will differ in."""
    if section.train == "lora":
        return None
    if trunk is not None:
        head: Any = policy.get_output_embeddings()
        return nn.ModuleDict({"states": frozen_copy(trunk.upper), "head": frozen_copy(head)})
    whole: Any = frozen_copy(policy)
    states = whole if why_not_packed(policy) else prepared(whole)
    return nn.ModuleDict({"states": states, "head": whole.get_output_embeddings()})


def frozen_copy(model: Any) -> Any:
    """The same weights, never trained."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def _prediction(policy: PreTrainedModel, codec: ChatCodec) -> Predict:
    if reason := why_not_packed(policy):
        logger.warning("each response is computed with its own copy of the prompt: %s", reason)
        pad_id = codec.tokenizer.pad_id
        return lambda model, reading, _trunk: padded_predictors(model, reading, pad_id=pad_id)
    return packed_predictors


def _trunk(policy: PreTrainedModel, section: PpoSection) -> Trunk | None:
    """The part of the policy that stays as it is, where it can run by itself."""
    if section.train not in ("top", "head"):
        return None
    learning = section.top_layers if section.train == "top" else 0
    num_layers = len(blocks_of(policy)) - learning
    if reason := why_not_split(policy, num_layers):
        logger.warning("the frozen layers are computed anew in every pass: %s", reason)
        return None
    return Trunk(policy, num_layers)


def _critic(
    policy: PreTrainedModel,
    trunk: Trunk | None,
    copied: nn.Module | None,
    section: PpoSection,
    codec: ChatCodec,
    reward_model: RewardModel | None,
) -> tuple[nn.Module | None, nn.Linear]:
    """What makes the critic's states, where the policy's do not serve, and its head."""
    if section.critic == "reward-model":
        return _from_reward_model(reward_model, codec, is_packed=why_not_packed(policy) is None)
    config: Any = policy.config
    value_head = nn.Linear(config.hidden_size, 1, device=policy.device)
    nn.init.zeros_(value_head.weight)
    nn.init.zeros_(value_head.bias)
    if section.critic == "shared":
        return None, value_head
    part: Any = copied or copy.deepcopy(policy.get_decoder() if trunk is None else trunk.upper)
    ready = part if trunk is not None or why_not_packed(policy) else prepared(part)
    ready.requires_grad_(True)
    if trunk is None and section.train in ("top", "head"):
        for own, theirs in zip(ready.parameters(), policy.get_decoder().parameters(), strict=True):
            own.requires_grad_(theirs.requires_grad)
    return ready, value_head


def _from_reward_model(
    reward_model: RewardModel | None, codec: ChatCodec, *, is_packed: bool
) -> tuple[nn.Module, nn.Linear]:
    """Its backbone and head, which begin by predicting the normalised score."""
    if reward_model is None or reward_model.model.device.type == "meta":
        raise ModelError("critic: reward-model needs the reward model's weights here, not a server")
    own, other = codec.tokenizer.saved.get_vocab(), reward_model.codec.tokenizer.saved.get_vocab()
    if own != other:
        different = len(set(own.items()) ^ set(other.items()))
        raise ModelError(
            "critic: reward-model needs the policy's vocabulary, and the reward model's differs "
            f"in {different} entries; set critic: separate, with critic_warmup"
        )
    model = copy.deepcopy(reward_model.model).requires_grad_(True)
    head = score_head(model)
    value_head = nn.Linear(head.weight.shape[1], 1, device=head.weight.device)
    with torch.no_grad():
        value_head.weight.copy_(head.weight.float() / reward_model.std)
        value_head.bias.fill_(-reward_model.mean / reward_model.std)
    backbone: Any = model.get_decoder()
    return (prepared(model) if is_packed else backbone), value_head

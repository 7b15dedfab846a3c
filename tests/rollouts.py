"""Small policies, rollouts that a script answered, and what transformers makes of both by itself.

`make` builds the stage's own objects; `Naive` takes only their weights, puts them into models of
transformers that this project has not touched, and reads one conversation at a time.
"""

import copy
import dataclasses
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from starling.base.context import Context
from starling.data.records import Message, Prompt
from starling.models.causal_lm import LanguageModel
from starling.models.interfaces import Sample, Sampling
from starling.models.parallel import parallel
from starling.models.reward_model import RewardModel
from starling.models.training import Trainable, constant
from starling.ppo.actor_critic import Actors, build_actors, made_by
from starling.ppo.advantage import Advantages
from starling.ppo.config import PpoSection
from starling.ppo.rollout import Collector, Rollout
from starling.ppo.scorer import Scorer
from starling.ppo.setup import optimizer_of
from starling.ppo.update import Learner
from tiny import sharpen, tiny_policy

ALONE = Context(rank=0, world_size=1, device="cpu", threads=1)
LORA_RANK, LORA_ALPHA = 4, 8.0


def said(*turns):
    roles = ("user", "assistant", "user")
    return Prompt(messages=tuple(Message(role=r, content=t) for r, t in zip(roles, turns)))  # noqa: B905


PROMPTS = (
    said("say it"),
    said("What is the sum of one and two?"),
    said("Hi", "Hello there.", "What is it?"),
    said("?"),
    said("say it again"),
    said("The answer", "is", "the sum"),
)
LENGTHS = (6, 1, 3, 8, 2, 5, 3, 7, 1, 4, 6, 2, 5, 3, 1, 8, 4, 2)
"""Tokens of the responses, by the number of the row."""


@cache
def _start(kind: str) -> LanguageModel:
    start = tiny_policy()
    if kind == "mistral":
        return start
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if kind == "gpt2":  # packs, and has other names for its parts
            config: Any = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)
            model: Any = GPT2LMHeadModel(config)
        else:  # does not pack
            config = BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
            model = BloomForCausalLM(config)
    sharpen(model, 4.0 if kind == "gpt2" else 12.0)
    return LanguageModel(model.eval(), start.codec)


def start_of(kind: str = "mistral") -> LanguageModel:
    """A policy of its own: a Mistral, a GPT-2, or a Bloom."""
    return copy.deepcopy(_start(kind))


class ScriptedEngine:
    """Answers by each request's seed alone, and finishes its requests last one first."""

    def __init__(self, responses=None):
        self.responses = responses
        self.requests: list[Any] = []

    def response(self, seed):
        if self.responses is not None:
            return self.responses[seed]
        rng = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(20, 250, (LENGTHS[seed],), generator=rng).tolist()), "length"

    def generate(self, requests):
        self.requests = list(requests)
        for request in reversed(self.requests):
            ids, reason = self.response(request.sampling.seed)
            logprobs = tuple(-0.04 * token for token in ids)
            yield Sample(request.id, ids, logprobs, reason, 0)

    def stream(self, request):
        raise AssertionError("nothing is streamed")

    def cancel(self, request_id):
        raise AssertionError("nothing is cancelled")

    def sync(self, weights, version):
        raise AssertionError("nothing to sync")


class ScriptedReward(RewardModel):
    """A reward model that scores by a function of the answer, and keeps what it was asked."""

    @staticmethod
    def by(rule):
        scripted = object.__new__(ScriptedReward)
        object.__setattr__(scripted, "rule", rule)
        object.__setattr__(scripted, "asked", [])
        return scripted

    def score(self, items):
        items = list(items)
        self.asked.extend(items)
        return torch.tensor([float(self.rule(item.messages[-1].content)) for item in items])


def scorer(*rules):
    """Scores by rules of the answers; several are averaged."""
    models = tuple(ScriptedReward.by(rule) for rule in rules)
    return Scorer(models, lambda each: each.mean(dim=0))


def section_of(**settings) -> PpoSection:
    chosen = {"top_layers": 1, "lora_rank": LORA_RANK, "lora_alpha": LORA_ALPHA}
    return PpoSection.model_validate({"rollout_batch": len(PROMPTS)} | chosen | settings)


class Made(NamedTuple):
    """The objects of one stage, and a rollout of them."""

    start: LanguageModel
    actors: Actors
    collector: Collector
    learner: Learner
    rollout: Rollout

    @property
    def policy(self):
        return self.start.model

    @property
    def section(self):
        return self.learner.section

    @property
    def parameters(self):
        return dict(self.actors.actor_critic.named_parameters())

    def weights(self):
        """A copy of policy's and critic's weights."""
        return {name: weight.detach().clone() for name, weight in self.parameters.items()}

    def again(self):
        """The same responses as the present weights see them."""
        return self.collector.collect(self.rollout.prompts, samplings(len(self.rollout.prompts)))

    def but(self, **settings):
        """The same objects and rollout, and a recipe that differs in these settings."""
        section = PpoSection.model_validate(self.section.model_dump() | settings)
        learner = dataclasses.replace(self.learner, section=section)
        return self._replace(learner=learner)


def samplings(number):
    return [Sampling(99, 1.0, row) for row in range(number)]


def make(
    kind: str = "mistral",
    *,
    context: Context = ALONE,
    has_moved: bool = True,
    reward_model: RewardModel | None = None,
    optimizer: str = "sgd",
    start: LanguageModel | None = None,
    engine: Any = None,
    will_learn: bool = False,
    **settings: Any,
) -> Made:
    """A stage's objects, and their rollout of PROMPTS.

    What learns has moved since the start, as after some steps.  `sgd` steps by lr times the
    gradient, without clipping.
    """
    start = start or start_of(kind)
    section = section_of(**settings)
    actors = build_actors(start, section, reward_model, seed=0)
    if has_moved:
        move(actors.actor_critic)
    forward = parallel(
        start.model,
        made_by,
        context,
        beside=actors.actor_critic.beside,
        precision=section.precision,
        gradient_checkpointing=section.gradient_checkpointing,
    )
    collector = Collector(
        engine or ScriptedEngine(), start.codec, scorer(len), actors, forward, section, context
    )
    trainable = optimizer_of(actors.actor_critic, section)
    if optimizer == "sgd":
        trainable = plain_sgd(actors.actor_critic, section.lr)
    learner = Learner(actors.actor_critic, forward, trainable, section, context)
    prompts = [prompt for prompt in PROMPTS for _ in range(section.samples_per_prompt)]
    rollout = collector.collect(prompts, samplings(len(prompts)), will_learn=will_learn)
    return Made(start, actors, collector, learner, rollout)


def move(module: nn.Module, std: float = 0.02) -> None:
    """Noise on every weight that learns."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn(parameter.shape, generator=rng)


def plain_sgd(module: nn.Module, lr: float) -> Trainable:
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return Trainable({"actor_critic": module}, torch.optim.SGD(wanted, lr=lr), lr, constant, None)


def made_advantages(rollout: Rollout, seed: int = 3) -> Advantages:
    """Advantages and returns of no particular origin."""
    rng = torch.Generator().manual_seed(seed)
    mask = rollout.response_mask
    advantages, returns = (torch.randn(mask.shape, generator=rng) for _ in range(2))
    return Advantages(advantages * mask, 0.2 * returns * mask)


class Naive:
    """Policy, critic and reference by transformers' full forward on one conversation at a time.

    `leaves` are copies of the actor-critic's weights, by its own names, and take gradients.
    """

    def __init__(self, kind: str, made: Made) -> None:
        self.leaves = {
            name: weight.detach().clone().requires_grad_(weight.requires_grad)
            for name, weight in made.parameters.items()
        }
        self._kind = kind
        self._model: Any = start_of(kind).model
        self._reference: Any = start_of(kind).model
        self._prefix = self._model.base_model_prefix + "."
        # Of its own, so that an untied head can be given to it.
        self._model.lm_head.weight = nn.Parameter(self._model.lm_head.weight.detach().clone())
        self.temperature = made.section.temperature

    def policy(self, prompt, response):
        """Logprobs of the response's tokens, and the values that a shared head gives them."""
        found = functional_call(
            self._model,
            self._policy_weights(),
            kwargs={"input_ids": torch.tensor([prompt + response]), "output_hidden_states": True},
        )
        states = found.hidden_states[-1][0]
        critic = self._critic_weights()
        if critic is not None:
            backbone = self._model.base_model
            ids = torch.tensor([prompt + response])
            found_by_critic = functional_call(backbone, critic, kwargs={"input_ids": ids})
            states = found_by_critic.last_hidden_state[0]
        logprobs = picked(found.logits[0], prompt, response, self.temperature)
        return logprobs, self._values(states[len(prompt) - 1 : -1])

    @torch.no_grad()
    def reference(self, prompt, response):
        """Logprobs by the policy as it was before anything learned."""
        logits = self._reference(input_ids=torch.tensor([prompt + response])).logits[0]
        return picked(logits, prompt, response, self.temperature)

    def _values(self, states):
        weight = self.leaves.get("beside.value_head.weight")
        if weight is None:
            return torch.zeros(len(states))
        return states @ weight[0] + self.leaves["beside.value_head.bias"]

    def _policy_weights(self):
        own = {n.removeprefix("policy."): w for n, w in self.leaves.items() if n[:7] == "policy."}
        weights = {}
        for name, weight in own.items():
            if ".base_layer." in name:
                stem = name.partition("base_layer.")[0]
                # The adapters by hand: W + alpha / rank B A.
                low, high = (own[f"{stem}lora_{side}.default.weight"] for side in "AB")
                added = LORA_ALPHA / LORA_RANK * (high @ low)
                if name.endswith("bias"):
                    added = 0.0
                elif self._kind == "gpt2":  # whose matrices stand the other way round
                    added = added.T
                weights[name.replace("base_layer.", "")] = weight + added
            elif ".lora_" not in name:
                weights[name] = weight
        embeddings = next(w for n, w in weights.items() if "embed" in n or "wte" in n)
        return {"lm_head.weight": embeddings} | weights

    def _critic_weights(self):
        own = {
            n.removeprefix("beside.critic."): w
            for n, w in self.leaves.items()
            if n.startswith("beside.critic.")
        }
        if not own:
            return None
        policy = {n.removeprefix(self._prefix): w for n, w in self._policy_weights().items()}
        policy.pop("lm_head.weight")
        if set(own) == set(policy):
            return own
        # Of the layers above a trunk alone, which count from 0; what lies below is the policy's.
        layers = {n.split(".")[1] for n in own if n.startswith("layers.")}
        first = self._model.config.num_hidden_layers - len(layers)
        upper = {
            f"layers.{first + int(n.split('.')[1])}.{n.split('.', 2)[2]}"
            if n.startswith("layers.")
            else n: w
            for n, w in own.items()
        }
        assert upper.keys() < policy.keys()
        return policy | upper


def picked(logits, prompt, response, temperature):
    """The log softmax, at each response token, of the logits that stand one place before it."""
    distribution = torch.log_softmax(logits.double() / temperature, dim=-1)
    places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    chosen = [distribution[place, token] for place, token in zip(places, response, strict=True)]
    return torch.stack(chosen).float()


def relative_error(got, expected):
    """The norm of the difference over that of what was expected, all tensors as one vector."""
    assert got.keys() == expected.keys()
    gap = torch.cat([(got[name] - expected[name]).flatten().double() for name in expected]).norm()
    return float(gap / torch.cat([e.flatten().double() for e in expected.values()]).norm())

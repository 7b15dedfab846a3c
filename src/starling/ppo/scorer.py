"""The scores that PPO learns from: of one reward model or several, in this process or served.

What is scored is text: each model writes the conversation in its own chat format and tokenizes it
itself, so that it may share neither with the policy.  Each normalises as its own folder says, and
what they say is combined after that.

Shapes: M reward models, N conversations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from starling.models.reward_model import RewardModel, Scored
from starling.models.served_reward import ServedRewardModel
from starling.ppo.config import PpoSection, RewardSource
from starling.ppo.rewards import combine_mean, combine_minimum, combine_pessimistic

Combine = Callable[[Tensor], Tensor]


class Scores(NamedTuple):
    """The number that a response is rewarded by, and what each reward model gave it."""

    combined: Float[Tensor, " N"]
    each: Float[Tensor, "M N"]


@dataclass(frozen=True)
class Scorer:
    """Reward models in their recipe's order, and how their scores become one."""

    models: tuple[RewardModel, ...]
    combine: Combine

    @staticmethod
    def load(sources: Sequence[RewardSource], section: PpoSection, *, device: str) -> "Scorer":
        """Load each folder, or meet its server; raises InputError for what cannot be used."""
        models = tuple(_load(source, device) for source in sources)
        return Scorer(models, _combination(sources, section))

    def score(self, items: Sequence[Scored]) -> Scores:
        """Scores in the items' order; InputError where a server fails, and nothing is lost."""
        each = torch.stack([model.score(items) for model in self.models])
        return Scores(self.combine(each), each)


def _load(source: RewardSource, device: str) -> RewardModel:
    if source.url is None:
        return RewardModel.load(source.model, device=device)
    return ServedRewardModel.connect(
        source.url,
        source.model,
        served_model=source.served_model,
        api_key_env=source.api_key_env,
    )


def _combination(sources: Sequence[RewardSource], section: PpoSection) -> Combine:
    if len(sources) == 1:
        return _only
    if section.combine == "minimum":
        return combine_minimum
    if section.combine == "pessimistic":
        return partial(combine_pessimistic, deviations=section.pessimism)
    weights = torch.tensor([source.weight for source in sources])
    return lambda each: combine_mean(each, weights.to(each.device))


def _only(each: Float[Tensor, "1 N"]) -> Float[Tensor, " N"]:
    return each[0]

"""The policy with its value head, and the reference it is held to.

Shapes: B rollouts, T token positions, D model width.  Masks: True = keep.
"""

import copy
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from starling.models.causal_lm import hidden_states, predicting_states, token_logprobs


class Evaluated(NamedTuple):
    """Logprobs and values of a batch's response tokens; zero elsewhere."""

    logprobs: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"]


class ActorCritic(nn.Module):
    """A policy and its critic: a zero-initialised linear head on the policy's trunk or on a copy.

    The value at token t is read from the state that predicts token t, so it does not see it.
    """

    def __init__(self, policy: PreTrainedModel, *, critic: str) -> None:
        super().__init__()
        self.policy = policy
        # Only the trunk learns; the copy's output embeddings are never used.
        self.trunk = None if critic == "shared" else copy.deepcopy(policy)
        config: Any = policy.config
        self.value_head = nn.Linear(config.hidden_size, 1, device=policy.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def evaluate(
        self,
        token_ids: Int[Tensor, "B T"],
        response_mask: Bool[Tensor, "B T"],
        *,
        temperature: float,
    ) -> Evaluated:
        """Logprobs at the sampling temperature, and values, of right-padded sequences."""
        hidden = hidden_states(self.policy, token_ids)
        logprobs = token_logprobs(
            self.policy, hidden, token_ids, response_mask, temperature=temperature
        )
        states = hidden if self.trunk is None else hidden_states(self.trunk, token_ids)
        values = self.value_head(predicting_states(states).float())[..., 0]
        return Evaluated(logprobs, torch.where(response_mask, values, 0.0))


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The reference policy: the same weights, never trained."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def reference_logprobs(
    reference: PreTrainedModel,
    token_ids: Int[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    *,
    temperature: float,
) -> Float[Tensor, "B T"]:
    """The reference's logprobs of the same tokens, at the same temperature."""
    hidden = hidden_states(reference, token_ids)
    return token_logprobs(reference, hidden, token_ids, response_mask, temperature=temperature)

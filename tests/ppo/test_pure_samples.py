"""Rollouts are drawn from the policy as it is: anything else would bias every ratio."""

import pytest

from starling.models.interfaces import Sampling
from starling.ppo.config import PpoSection
from starling.ppo.rollout import sampling


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_rollouts_are_pure_samples_at_the_temperature(temperature):
    section = PpoSection(temperature=temperature, max_response_tokens=9)
    expected = Sampling(9, temperature, 3, top_p=1.0, top_k=0, logprobs="tempered")
    assert sampling(section, 3) == expected


def test_the_recipe_cannot_truncate_them():
    assert not [name for name in PpoSection.model_fields if "top_k" in name or "top_p" in name]

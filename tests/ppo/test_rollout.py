"""What a rollout holds: logprobs and values as transformers computes them, each row alone."""

import pytest
import torch
from rollouts import Naive, make
from torch.testing import assert_close

CASES = {
    "full, shared": {},
    "full, shared, 0.7": {"temperature": 0.7},
    "full, separate": {"critic": "separate"},
    "full, three samples": {"samples_per_prompt": 3, "temperature": 0.7},
    "full, three samples, separate": {"samples_per_prompt": 3, "critic": "separate"},
    "top, shared": {"train": "top"},
    "top, separate, 0.7": {"train": "top", "critic": "separate", "temperature": 0.7},
    "top, three samples, separate": {"train": "top", "critic": "separate", "samples_per_prompt": 3},
    "head, shared": {"train": "head"},
    "head, separate, three samples": {
        "train": "head",
        "critic": "separate",
        "samples_per_prompt": 3,
    },
    "lora, shared": {"train": "lora"},
    "lora, separate, 0.7": {"train": "lora", "critic": "separate", "temperature": 0.7},
    "lora, three samples": {"train": "lora", "samples_per_prompt": 3},
    "no critic": {"advantages": "rloo", "samples_per_prompt": 3},
}
OTHERS = {
    f"{kind}, {name}": (kind, settings)
    for kind in ("gpt2", "bloom")
    for name, settings in CASES.items()
    if name
    in ("full, shared, 0.7", "full, three samples, separate", "top, shared", "lora, separate, 0.7")
}


def assert_as_transformers(kind, made):
    naive, rollout = Naive(kind, made), made.rollout
    mask = rollout.response_mask
    for row, (prompt, response) in enumerate(
        zip(rollout.prompt_ids, rollout.response_ids, strict=True)
    ):
        assert mask[row].tolist() == [t < len(response) for t in range(mask.shape[1])]
        with torch.no_grad():
            logprobs, values = naive.policy(prompt, response)
        reference = naive.reference(prompt, response)
        for got, expected in (
            (rollout.old_logprobs, logprobs),
            (rollout.ref_logprobs, reference),
            (rollout.old_values, values),
        ):
            assert_close(got[row, : len(response)], expected, rtol=2e-5, atol=2e-5)
            assert not got[row, len(response) :].any()
    assert (rollout.old_logprobs - rollout.ref_logprobs).abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_logprobs_and_values_are_those_of_each_conversation_alone(name):
    made = make(**CASES[name])
    assert_as_transformers("mistral", made)
    assert made.rollout.old_values.any() == made.actors.actor_critic.has_critic


@pytest.mark.parametrize("name", OTHERS)
def test_they_are_so_for_a_model_that_does_not_split_and_one_that_does_not_pack(name):
    kind, settings = OTHERS[name]
    assert_as_transformers(kind, make(kind, **settings))

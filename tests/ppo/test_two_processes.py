"""A rollout and its update in two processes are those of one: loss, gradient norm and weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ranks import on_ranks
from rollouts import PROMPTS, made_advantages, make, relative_error, samplings, start_of
from starling.base.training_state import gathered
from starling.models.interfaces import Sampling
from starling.models.torch_engine import TorchEngine
from starling.ppo.estimate import whitened
from starling.ppo.update import update

CASES = {
    "full, shared": {},
    "full, separate": {"critic": "separate"},
    "top, shared": {"train": "top"},
    "top, separate, three samples": {
        "train": "top",
        "critic": "separate",
        "samples_per_prompt": 3,
    },
    "lora, shared, three samples": {"train": "lora", "samples_per_prompt": 3},
    "lora, separate": {"train": "lora", "critic": "separate"},
    "warm-up of the critic": {"critic": "separate", "critic_warmup": 1},
    "the sampler's logprobs": {"critic": "separate", "old_logprobs": "sampler"},
    "no critic": {"advantages": "grpo", "samples_per_prompt": 3},
}
TENSORS = ("old_logprobs", "ref_logprobs", "old_values", "sampler_logprobs", "scores")


def trajectory(context, settings, folder):
    """The rollout, and what two updates measured; weights are saved by rank 0."""
    # A prompt a forward or two: minibatches of three, of which a process has one or two.
    settings = {"minibatches": 2, "ppo_epochs": 2, "tokens_per_forward": 60} | settings
    made = make(context=context, optimizer="adam", lr=1e-4, **settings)
    rollout = made.rollout
    raw = made_advantages(rollout)
    estimated = whitened(raw, rollout, made.section)
    learned = [update(made.learner, rollout, estimated, step=step) for step in range(2)]
    named = made.actors.actor_critic.state_dict()
    weights = {n: weight.clone().contiguous() for n, weight in gathered(named, context).items()}
    if context.rank == 0:
        save_file(weights, folder / f"{context.world_size}.safetensors")
    tensors = {name: getattr(rollout, name).tolist() for name in TENSORS}
    ids = [list(ids) for ids in rollout.response_ids]
    return {"learned": learned, "rollout": tensors, "ids": ids, "own": list(rollout.own)}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(name, tmp_path):
    start_of()
    [alone] = on_ranks(1, trajectory, tmp_path, CASES[name], tmp_path)
    both = on_ranks(2, trajectory, tmp_path, CASES[name], tmp_path)
    own = [part["own"] for part in both]
    assert sorted(own[0] + own[1]) == alone["own"] == list(range(len(alone["ids"])))
    assert all(own)
    for part in both:
        assert part["ids"] == alone["ids"]
        for field, expected in alone["rollout"].items():
            assert_close(torch.tensor(part["rollout"][field]), torch.tensor(expected))
        for found, expected in zip(part["learned"], alone["learned"], strict=True):
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert both[0]["learned"] == both[1]["learned"]
    one, two = (load_file(tmp_path / f"{size}.safetensors") for size in (1, 2))
    assert relative_error(two, one) < 1e-5


def sampled(context, seed):
    """What two processes with an engine each sample: three answers to each prompt."""
    start = start_of()
    engine = TorchEngine(
        start.model, stop_ids=start.codec.stop_ids, pad_id=start.codec.tokenizer.pad_id
    )
    made = make(start=start_of(), context=context, engine=engine, samples_per_prompt=3)
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    drawn = [Sampling(5, 1.0, seed + row) for row in range(len(prompts))]
    rollout = made.collector.collect(prompts, drawn)
    return {
        "own": list(rollout.own),
        "group": rollout.group.tolist(),
        "answers": [list(ids) for ids in rollout.response_ids],
        "asked": [prompt.messages[-1].content for prompt in rollout.prompts],
    }


def test_processes_sample_different_answers_and_their_prompts_are_the_batch(tmp_path):
    start_of()
    [alone] = on_ranks(1, sampled, tmp_path, 100)
    both = on_ranks(2, sampled, tmp_path, 100)
    assert both[0]["answers"] == both[1]["answers"] == alone["answers"]
    asked = [[part["asked"][row] for row in part["own"]] for part in both]
    assert asked[0] + asked[1] != asked[1] + asked[0]
    batch = [prompt.messages[-1].content for prompt in PROMPTS for _ in range(3)]
    assert sorted(asked[0] + asked[1]) == sorted(batch)
    # A prompt's samples are one process's, and no two answers are alike.
    groups = [{part["group"][row] for row in part["own"]} for part in both]
    assert not groups[0] & groups[1]
    assert len({tuple(ids) for ids in alone["answers"]}) == len(batch)


def lonely(context):
    """One prompt for two processes, as a short list of validation prompts may leave them."""
    made = make(context=context)
    rollout = made.collector.collect(PROMPTS[:1], samplings(1))
    return [rollout.old_logprobs.tolist(), list(rollout.own)]


def test_a_process_without_a_prompt_of_its_own_takes_part_all_the_same(tmp_path):
    start_of()
    [[expected, _]] = on_ranks(1, lonely, tmp_path)
    both = on_ranks(2, lonely, tmp_path)
    assert [own for _, own in both] == [[0], []]
    for found, _ in both:
        assert_close(torch.tensor(found), torch.tensor(expected))

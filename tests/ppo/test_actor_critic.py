"""How a policy's critic and reference begin, what they share with it, and what is saved of it."""

import copy
import dataclasses
import logging

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rollouts import (
    LENGTHS,
    PROMPTS,
    Naive,
    made_advantages,
    make,
    section_of,
    start_of,
)
from starling.base.errors import ModelError, RecipeError
from starling.models.causal_lm import save_model
from starling.models.reward_model import RewardModel
from starling.ppo.actor_critic import build_actors
from starling.ppo.bundles import Bundle, Reading
from starling.ppo.update import update
from tiny import tiny_tokenizer


@pytest.mark.parametrize("kind", ["mistral", "bloom"])
@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("train", ["full", "top", "lora"])
def test_a_new_critic_values_everything_at_zero(kind, critic, train):
    made = make(kind, critic=critic, train=train, has_moved=False)
    assert not made.rollout.old_values.any()
    assert made.actors.actor_critic.has_critic


def test_without_gae_there_is_no_critic():
    made = make(advantages="grpo", samples_per_prompt=3, critic="separate")
    assert not made.actors.actor_critic.has_critic
    assert not made.rollout.old_values.any()
    assert {name.partition(".")[0] for name in made.parameters} == {"policy"}


def values_of(made, prompt, response):
    reading = Reading([Bundle(prompt, (response,), (0,))], "cpu")
    actor_critic = made.actors.actor_critic
    trunk = actor_critic.trunk
    states = None if trunk is None else trunk.states(made.policy, reading.packed)
    with torch.no_grad():
        return actor_critic.evaluate(made.policy, reading, states, 1.0).values


@pytest.mark.parametrize("kind", ["mistral", "bloom"])
@pytest.mark.parametrize(("critic", "train"), [("shared", "full"), ("separate", "top")])
def test_the_value_at_a_token_does_not_see_that_token(kind, critic, train):
    made = make(kind, critic=critic, train=train)
    prompt, response = (7, 8), (9, 10, 11, 12)
    before = values_of(made, prompt, response)
    for place in range(4):
        edited = (*response[:place], 100, *response[place + 1 :])
        after = values_of(made, prompt, edited)
        assert_close(after[: place + 1], before[: place + 1])
        assert ((after - before)[place + 1 :].abs() > 1e-5).all()
    # The first token's is read from the prompt's last.
    assert (values_of(made, (7, 30), response)[0] - before[0]).abs() > 1e-5


@pytest.mark.parametrize("train", ["full", "top", "head", "lora"])
@pytest.mark.parametrize("kind", ["mistral", "bloom"])
def test_the_reference_stays_at_the_start_while_the_policy_learns(kind, train):
    made = make(kind, train=train, optimizer="adam", lr=3e-3, samples_per_prompt=3)
    for step in range(2):
        update(made.learner, made.rollout, made_advantages(made.rollout), step=step)
    after = made.again()
    assert_close(after.ref_logprobs, made.rollout.ref_logprobs)
    start = Naive(kind, made)
    for row, (prompt, response) in enumerate(
        zip(after.prompt_ids, after.response_ids, strict=True)
    ):
        expected = start.reference(prompt, response)
        assert_close(after.ref_logprobs[row, : len(response)], expected, rtol=2e-5, atol=2e-5)
    assert (after.old_logprobs - after.ref_logprobs).abs().max() > 1e-2


def test_a_policy_that_has_not_moved_is_its_own_reference_to_the_bit():
    for train in ("full", "top", "head", "lora"):
        rollout = make(train=train, has_moved=False, samples_per_prompt=3).rollout
        assert torch.equal(rollout.old_logprobs, rollout.ref_logprobs)


@pytest.mark.parametrize("train", ["full", "top", "head", "lora"])
def test_the_saved_policy_is_the_one_that_learned(train, tmp_path):
    made = make(train=train, critic="separate", optimizer="adam", lr=3e-3)
    update(made.learner, made.rollout, made_advantages(made.rollout), step=0)
    whole = made.collector.forward.whole()
    save_model(tmp_path / "model", whole, made.start.codec)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert set(saved.state_dict()) == set(start_of().model.state_dict())
    live = made.again()
    for row in range(len(PROMPTS)):
        prompt, response = live.prompt_ids[row], live.response_ids[row]
        with torch.no_grad():
            logits = saved(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        expected = torch.stack([logits[p, t] for p, t in zip(places, response, strict=True)])
        assert_close(live.old_logprobs[row, : len(response)], expected, rtol=2e-5, atol=2e-5)
    # A head that learns over a frozen trunk has left the embeddings.
    is_tied = saved.lm_head.weight is saved.model.embed_tokens.weight
    assert is_tied == (train in ("full", "lora"))
    if not is_tied:
        assert not torch.equal(saved.lm_head.weight, start_of().model.lm_head.weight)
        assert_close(saved.model.embed_tokens.weight, start_of().model.lm_head.weight)


def parameters_of(*modules):
    return {id(weight) for module in modules for weight in module.parameters()}


@pytest.mark.parametrize("train", ["full", "top", "head"])
def test_neither_critic_nor_reference_shares_a_weight_with_what_learns(train):
    made = make(train=train, critic="separate")
    actor_critic, reference = made.actors.actor_critic, made.actors.reference
    parts = parameters_of(made.policy), parameters_of(actor_critic.beside), parameters_of(reference)
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert not any(weight.requires_grad for weight in reference.parameters())
    assert all(weight.requires_grad for weight in actor_critic.beside.parameters())


@pytest.mark.parametrize(("train", "layers"), [("top", 1), ("head", 0)])
def test_over_a_trunk_only_what_stands_above_it_is_copied(train, layers):
    made = make(train=train, critic="separate")
    names = {
        name.partition(".")[2]
        for part in (made.actors.actor_critic.beside["critic"], made.actors.reference["states"])
        for name in (f".{name}" for name, _ in part.named_parameters())
    }
    policy = {name for name, _ in made.policy.get_decoder().named_parameters()}
    block = {name.partition("layers.1.")[2] for name in policy if name.startswith("layers.1.")}
    assert names == {f"layers.{n}.{name}" for n in range(layers) for name in block} | {
        "norm.weight"
    }
    # And with adapters nothing is: they are switched off.
    assert make(train="lora").actors.reference is None


@pytest.mark.parametrize("kind", ["mistral", "gpt2"])
def test_the_top_learns_with_the_norm_and_a_head_of_its_own(kind):
    made = make(kind, train="top")
    learning = {name for name, weight in made.policy.named_parameters() if weight.requires_grad}
    block = {"mistral": "model.layers.1.", "gpt2": "transformer.h.1."}[kind]
    norms = {
        "mistral": {"model.norm.weight"},
        "gpt2": {"transformer.ln_f.weight", "transformer.ln_f.bias"},
    }
    assert {name for name in learning if not name.startswith(block)} == norms[kind] | {
        "lm_head.weight"
    }
    assert (made.actors.actor_critic.trunk is None) == (kind == "gpt2")


def test_it_is_said_why_something_takes_longer(caplog):
    with caplog.at_level(logging.WARNING, "starling"):
        make(train="top")
        assert not caplog.messages
        make("gpt2", train="top")
        make("bloom")
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "the frozen layers are computed anew in every pass",
        "each response is computed with its own copy of the prompt",
    ]


def test_more_top_layers_than_there_are_is_refused():
    with pytest.raises(RecipeError, match="top_layers is 3, and .* has 2 layers"):
        make(train="top", top_layers=3)


@pytest.fixture(scope="module")
def reward_model(policy_folder):
    loaded = RewardModel.from_language_model(str(policy_folder), seed=4)
    return dataclasses.replace(loaded, mean=0.7, std=2.5)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_critic_of_the_reward_model_begins_as_its_normalised_score(reward_model, train, tmp_path):
    reward_model.save(tmp_path / "reward")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    made = make(
        reward_model=reward_model,
        critic="reward-model",
        train=train,
        has_moved=False,
        samples_per_prompt=3,
    )
    rollout = made.rollout
    for row in range(0, len(LENGTHS), 4):
        prompt, response = rollout.prompt_ids[row], rollout.response_ids[row]
        for t in range(len(response)):
            # Of the conversation up to the token that is about to come.
            with torch.no_grad():
                raw = classifier(torch.tensor([prompt + response[:t]])).logits.item()
            assert rollout.old_values[row, t].item() == pytest.approx((raw - 0.7) / 2.5, abs=2e-5)
    # It learns, and the reward model that scores stays as it is.
    before = copy.deepcopy(reward_model.model.state_dict())
    learning = {n for n, weight in made.parameters.items() if weight.requires_grad}
    assert {n for n in made.parameters if n.startswith("beside.")} <= learning
    update(made.learner, rollout, made_advantages(rollout), step=0)
    assert not torch.equal(made.again().old_values, rollout.old_values)
    for name, weight in reward_model.model.state_dict().items():
        assert torch.equal(weight, before[name])


def build(section, reward_model):
    return build_actors(start_of(), section, reward_model, seed=0)


def test_a_reward_model_with_another_vocabulary_is_refused_as_critic(reward_model):
    section = section_of(critic="reward-model")
    other = dataclasses.replace(
        reward_model,
        codec=dataclasses.replace(reward_model.codec, tokenizer=tiny_tokenizer(310)),
    )
    with pytest.raises(
        ModelError, match="vocabulary.* differs in .* entries; set critic: separate"
    ):
        build(section, other)


def test_a_reward_model_at_a_server_is_refused_as_critic(reward_model):
    section = section_of(critic="reward-model")
    absent = dataclasses.replace(reward_model, model=copy.deepcopy(reward_model.model).to("meta"))
    for given in (absent, None):
        with pytest.raises(ModelError, match="needs the reward model's weights here"):
            build(section, given)


def test_adapters_follow_the_seed():
    def weights(seed):
        start = start_of()
        build_actors(start, section_of(train="lora"), None, seed=seed)
        return [w for name, w in start.model.named_parameters() if "lora_A" in name]

    one, same, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))

"""What a rollout measures, that it stays fixed, and what one update does with it."""

import copy
import dataclasses

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from starling.base.errors import InputError
from starling.data.records import Message, Prompt
from starling.models.causal_lm import load_language_model
from starling.models.interfaces import GenerationRequest, Sample, Sampling
from starling.models.reward_model import RewardModel, Scored
from starling.models.training import Trainable, constant
from starling.ppo.actor_critic import ActorCritic, frozen_copy
from starling.ppo.advantage import Advantages, estimate_advantages, shape_rewards, whiten
from starling.ppo.config import PpoSection
from starling.ppo.monitor import rollout_metrics
from starling.ppo.rollout import (
    Rollout,
    Samples,
    evaluate_rollout,
    sample_responses,
    score_responses,
)
from starling.ppo.train import update
from tiny import tiny_policy_folder

PROMPT = Prompt(messages=(Message(role="user", content="say it"),))
LENGTHS = [(4, 6), (2, 3), (5, 1), (3, 4), (2, 8), (6, 2), (3, 3), (4, 5)]
"""Prompt and response tokens of eight rollouts."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_policy_folder(tmp_path_factory.mktemp("rollout") / "policy")


@pytest.fixture
def language_model(folder):
    return load_language_model(str(folder))


@pytest.fixture
def model(language_model):
    return language_model.model


def made_samples(vocabulary):
    """Eight rollouts of random tokens; the padding holds random tokens as well."""
    rng = torch.Generator().manual_seed(0)
    width = max(prompt + response for prompt, response in LENGTHS)
    token_ids = torch.randint(5, vocabulary, (len(LENGTHS), width), generator=rng)
    mask = torch.zeros(token_ids.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(LENGTHS):
        mask[row, prompt : prompt + response] = True
    return Samples(
        token_ids=token_ids,
        response_mask=mask,
        sampler_logprobs=torch.zeros(mask.shape),
        prompts=(PROMPT,) * len(LENGTHS),
        texts=("text",) * len(LENGTHS),
        is_finished=(True,) * len(LENGTHS),
    )


def made_rollout(model, *, temperature=1.0, critic="shared", value_scale=None):
    """An actor and critic, its rollout of `made_samples`, and advantages of made scores."""
    samples = made_samples(model.config.vocab_size)
    reference = frozen_copy(model)
    with torch.no_grad():
        # So that policy and reference differ, as after some steps.
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter += 0.02 * noise
    actor_critic = ActorCritic(model, critic=critic)
    if value_scale is not None:
        torch.nn.init.constant_(actor_critic.value_head.weight, value_scale)
    scores = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0, 0.0, 0.7, -0.2])
    section = PpoSection(temperature=temperature, microbatch=3)
    rollout = evaluate_rollout(actor_critic, reference, samples, scores, section)
    mask = rollout.response_mask
    rewards = shape_rewards(scores, rollout.old_logprobs - rollout.ref_logprobs, mask, kl_coef=0.1)
    estimated = estimate_advantages(rewards, rollout.old_values, mask, gamma=1.0, gae_lambda=0.95)
    estimated = estimated._replace(advantages=whiten(estimated.advantages, mask))
    return actor_critic, rollout, estimated


def plain_sgd(actor_critic, lr):
    """Steps that are lr times the gradient: no clipping, no moments."""
    return Trainable(
        {"actor_critic": actor_critic},
        torch.optim.SGD(actor_critic.parameters(), lr=lr),
        lr=lr,
        schedule=constant,
        max_grad_norm=float("inf"),
    )


def step_once(actor_critic, rollout, estimated, *, lr, **settings):
    settings = {"rollout_batch": 8, "ppo_epochs": 1} | settings
    section = PpoSection.model_validate(settings)
    trainable = plain_sgd(actor_critic, lr)
    return update(trainable, actor_critic, rollout, estimated, section, seed=0, step=0)


def transformers_logprobs(model, token_ids, temperature):
    """log p of each token given those before it, from the full logits; the first one is 0."""
    logits = model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids)).logits
    logprobs = torch.log_softmax(logits[:, :-1].float() / temperature, dim=-1)
    picked = logprobs.gather(2, token_ids[:, 1:, None])[..., 0]
    return torch.cat([torch.zeros(len(token_ids), 1), picked], dim=1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_old_and_reference_logprobs_are_transformers_own_at_the_sampling_temperature(
    model, folder, temperature
):
    actor_critic, rollout, _ = made_rollout(model, temperature=temperature)
    mask = rollout.response_mask
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for policy, got in (
            (actor_critic.policy, rollout.old_logprobs),
            (reference, rollout.ref_logprobs),
        ):
            wanted = transformers_logprobs(policy, rollout.token_ids, temperature)
            assert_close(got, torch.where(mask, wanted, 0.0))
    assert (rollout.old_logprobs - rollout.ref_logprobs).abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_pass_finds_the_ratio_one_at_any_temperature(model, temperature):
    made = made_rollout(model, temperature=temperature)
    learned = step_once(*made, lr=0.0, temperature=temperature, microbatch=3)
    # Batches of other shapes round otherwise; 1e-6 of difference gives a k3 of 5e-13.
    assert learned["ppo/approx_kl"] == pytest.approx(0, abs=1e-10)
    assert learned["ppo/clip_fraction"] == 0
    assert learned["ppo/value_clip_fraction"] == 0
    # At ratio one the loss is minus the mean of whitened advantages.
    assert learned["ppo/policy_loss"] == pytest.approx(0, abs=1e-5)


def test_another_temperature_in_the_update_would_show(model):
    made = made_rollout(model, temperature=0.7)
    assert step_once(*made, lr=0.0, temperature=1.0)["ppo/approx_kl"] > 1e-4


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_new_critic_values_everything_at_zero(model, critic):
    _, rollout, _ = made_rollout(model, critic=critic)
    assert not rollout.old_values.any()


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_value_at_a_token_does_not_see_that_token(model, critic):
    actor_critic = ActorCritic(model, critic=critic)
    torch.nn.init.normal_(
        actor_critic.value_head.weight, generator=torch.Generator().manual_seed(0)
    )
    token_ids = torch.tensor([[7, 8, 9, 10, 11, 12]])
    mask = torch.tensor([[False, False, True, True, True, True]])
    edited = token_ids.clone()
    edited[0, 3] = 100
    before, after = (
        actor_critic.evaluate(ids, mask, temperature=1.0).values for ids in (token_ids, edited)
    )
    assert_close(after[0, 2:4], before[0, 2:4])
    assert ((after - before)[0, 4:].abs() > 1e-4).all()
    assert (before[0, 2:] != 0).all()
    # And it is read from the state that predicts it.
    trunk = model if actor_critic.trunk is None else actor_critic.trunk
    states = trunk(input_ids=token_ids, output_hidden_states=True).hidden_states[-1]
    wanted = states[0] @ actor_critic.value_head.weight[0]
    assert_close(before[0, 2:], wanted[1:5])


def test_tokens_after_the_response_change_nothing(model):
    actor_critic, rollout, _ = made_rollout(model, value_scale=0.1)
    edited = torch.where(rollout.response_mask.flip(1).cumsum(1).flip(1) == 0, 7, rollout.token_ids)
    assert (edited != rollout.token_ids).any()
    for ids in (rollout.token_ids, edited):
        now = actor_critic.evaluate(ids, rollout.response_mask, temperature=1.0)
        assert_close(now.logprobs, rollout.old_logprobs)
        assert_close(now.values, rollout.old_values)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_micro_batches_change_memory_and_not_the_step(model, minibatches):
    actor_critic, rollout, estimated = made_rollout(model, value_scale=0.05)
    results = []
    for microbatch in (8, 4, 2, 1, 3):
        learner = copy.deepcopy(actor_critic)
        learned = step_once(
            learner, rollout, estimated, lr=0.1, microbatch=microbatch, minibatches=minibatches
        )
        results.append((learner.state_dict(), learned))
    moved = results[0][0]["policy.model.embed_tokens.weight"]
    assert (moved - actor_critic.policy.get_input_embeddings().weight).abs().max() > 1e-3
    for weights, learned in results[1:]:
        # Sums in another order; the stated tolerance.
        assert_close(weights, results[0][0], rtol=1e-5, atol=1e-5)
        assert learned == pytest.approx(results[0][1], rel=1e-4, abs=1e-6)


def test_the_loss_is_the_mean_over_the_minibatchs_tokens_not_over_rows(model):
    # With ratio 1 and no value loss the metric is -mean(A) over tokens, by hand.
    actor_critic, rollout, estimated = made_rollout(model)
    mask = rollout.response_mask
    advantages = torch.where(mask, torch.arange(8.0)[:, None].expand(mask.shape), 0.0)
    lengths = torch.tensor([response for _, response in LENGTHS])
    expected = -(torch.arange(8.0) * lengths).sum() / lengths.sum()
    learned = step_once(
        actor_critic, rollout, estimated._replace(advantages=advantages), lr=0.0, microbatch=3
    )
    assert learned["ppo/policy_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_value_loss_enters_with_its_coefficient(model):
    actor_critic, rollout, _ = made_rollout(model)
    mask = rollout.response_mask
    # No advantage, returns of 0.1 and values of 0: only the head's bias has a gradient, which is
    # value_coef * mean(v - R) = -0.25 * 0.1.
    estimated = Advantages(torch.zeros(mask.shape), torch.where(mask, 0.1, 0.0))
    step_once(actor_critic, rollout, estimated, lr=1.0, value_coef=0.25)
    assert actor_critic.value_head.bias.item() == pytest.approx(0.025, rel=1e-5)


def test_a_separate_critic_leaves_the_policy_alone_and_learns_by_itself(model):
    actor_critic, rollout, _ = made_rollout(model, critic="separate", value_scale=0.1)
    before = copy.deepcopy(actor_critic.state_dict())
    mask = rollout.response_mask
    estimated = Advantages(torch.zeros(mask.shape), torch.where(mask, 1.0, 0.0))
    step_once(actor_critic, rollout, estimated, lr=0.02, value_coef=1.0, value_clip_range=9.0)
    after = actor_critic.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[0] for name in changed} == {"trunk", "value_head"}
    now = actor_critic.evaluate(rollout.token_ids, mask, temperature=1.0).values
    errors = [(values[mask] - 1).square().mean() for values in (rollout.old_values, now)]
    assert errors[1] < errors[0]


def test_a_step_makes_good_tokens_likelier_and_bad_ones_less_likely(model):
    actor_critic, rollout, estimated = made_rollout(model)
    mask = rollout.response_mask
    step_once(actor_critic, rollout, estimated, lr=0.05)
    now = actor_critic.evaluate(rollout.token_ids, mask, temperature=1.0).logprobs
    gain = ((now - rollout.old_logprobs) * estimated.advantages)[mask].mean()
    assert gain > 1e-3


def test_nothing_of_a_rollout_changes_while_ppo_learns_from_it(model):
    actor_critic, rollout, estimated = made_rollout(model, value_scale=0.05)
    kept = copy.deepcopy((dataclasses.asdict(rollout), estimated._asdict()))
    learned = step_once(actor_critic, rollout, estimated, lr=0.5, ppo_epochs=4, minibatches=2)
    assert learned["ppo/approx_kl"] > 1e-6
    for before, now in zip(kept, (dataclasses.asdict(rollout), estimated._asdict()), strict=True):
        assert before.keys() == now.keys()
        assert all(torch.equal(before[name], now[name]) for name in before)


def test_every_epoch_visits_every_row_once_and_in_another_order(model, monkeypatch):
    actor_critic, rollout, estimated = made_rollout(model)
    visited = []
    evaluate = actor_critic.evaluate

    def spy(token_ids, response_mask, *, temperature):
        same = (rollout.token_ids[:, : token_ids.shape[1]] == token_ids[0]).all(dim=1)
        visited.append(same.nonzero()[0].item())
        return evaluate(token_ids, response_mask, temperature=temperature)

    monkeypatch.setattr(actor_critic, "evaluate", spy)
    step_once(actor_critic, rollout, estimated, lr=0.0, ppo_epochs=3, minibatches=8)
    epochs = [visited[start : start + 8] for start in range(0, 24, 8)]
    assert len(visited) == 24
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_rows_of_a_rollout_leave_out_the_columns_that_only_longer_rows_use(model):
    _, rollout, _ = made_rollout(model)
    # Ten, five and six tokens.
    rows = rollout.rows([1, 2])
    assert rows.token_ids.shape == (2, 6)
    assert_close(rows.old_logprobs, rollout.old_logprobs[[1, 2], :6])
    assert rows.scores.tolist() == rollout.scores[[1, 2]].tolist()
    assert rollout.rows([4, 2]).token_ids.shape == (2, 10)


def test_a_loss_that_is_no_number_stops_the_run_before_the_weights_move(model):
    actor_critic, rollout, estimated = made_rollout(model)
    before = copy.deepcopy(actor_critic.state_dict())
    advantages = estimated.advantages.clone()
    advantages[rollout.response_mask] = float("nan")
    with pytest.raises(InputError, match="the PPO loss is nan"):
        step_once(actor_critic, rollout, estimated._replace(advantages=advantages), lr=0.1)
    assert all(torch.equal(before[name], t) for name, t in actor_critic.state_dict().items())


def test_rollout_metrics_by_hand():
    mask = torch.tensor([[False, True, True], [False, True, False]])
    nan = float("nan")
    samples = Samples(
        token_ids=torch.zeros(2, 3, dtype=torch.long),
        response_mask=mask,
        sampler_logprobs=torch.tensor([[nan, -1.0, -2.0], [nan, -3.0, nan]]),
        prompts=(PROMPT, PROMPT),
        texts=("a", "b"),
        is_finished=(True, False),
    )
    rollout = Rollout(
        token_ids=samples.token_ids,
        response_mask=mask,
        scores=torch.tensor([1.0, 3.0]),
        old_logprobs=torch.tensor([[0.0, -1.5, -2.0], [0.0, -2.5, 0.0]]),
        ref_logprobs=torch.zeros(2, 3),
        old_values=torch.tensor([[0.0, 1.0, 2.0], [0.0, 4.0, 0.0]]),
    )
    kl = torch.tensor([[nan, 0.5, 0.1], [nan, 0.2, nan]])
    returns = torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 0.0]])
    got = rollout_metrics(samples, rollout, kl, Advantages(torch.zeros(2, 3), returns))
    assert got == pytest.approx(
        {
            "ppo/score": 2.0,
            "ppo/score_std": 1.0,
            "ppo/sequence_kl": 0.4,  # (0.6 + 0.2) / 2
            "ppo/entropy": 2.0,
            "ppo/response_tokens": 1.5,
            "ppo/end_rate": 0.5,
            # Variance of the returns 2/3; of the errors 0, 0, -1: 2/9.
            "ppo/explained_variance": 2 / 3,
            "ppo/sampler_mismatch": 1 / 3,  # 0.5, 0, 0.5
        },
        rel=1e-5,
    )


class Scripted(RewardModel):
    """A reward model that scores by a function of the last message, and keeps what it was asked."""

    @staticmethod
    def by(rule):
        scripted = object.__new__(Scripted)
        object.__setattr__(scripted, "rule", rule)
        object.__setattr__(scripted, "asked", [])
        return scripted

    def score(self, items):
        items = list(items)
        self.asked.extend(items)
        return torch.tensor([float(self.rule(item.messages[-1].content)) for item in items])


def samples_of(texts, is_finished):
    mask = torch.tensor([[False, True]] * len(texts))
    return Samples(
        token_ids=torch.zeros(len(texts), 2, dtype=torch.long),
        response_mask=mask,
        sampler_logprobs=torch.zeros(mask.shape),
        prompts=(PROMPT,) * len(texts),
        texts=tuple(texts),
        is_finished=tuple(is_finished),
    )


def test_a_missing_end_replaces_the_score_and_is_not_subtracted():
    scripted = Scripted.by(float)
    scores = score_responses(
        scripted,
        samples_of(["3.0", "3.0", "-9.0", "-9.0"], [True, False, True, False]),
        PpoSection(missing_end_penalty=-1.0, reward_clip=None),
    )
    assert scores.tolist() == [3.0, -1.0, -9.0, -1.0]
    expected = Scored((*PROMPT.messages, Message(role="assistant", content="3.0")))
    assert scripted.asked[0] == expected


def test_scores_are_clipped_and_the_penalty_is_not():
    scores = score_responses(
        Scripted.by(float),
        samples_of(["3.0", "-9.0", "0.5", "1.0"], [True, True, True, False]),
        PpoSection(missing_end_penalty=-5.0, reward_clip=2.0),
    )
    assert scores.tolist() == [2.0, -2.0, 0.5, -5.0]


class ScriptedEngine:
    """Finishes its requests last one first."""

    def __init__(self, responses):
        self.responses = responses
        self.requests: list[GenerationRequest] = []

    def generate(self, requests):
        self.requests = list(requests)
        for request, (ids, reason) in reversed(
            list(zip(self.requests, self.responses, strict=True))
        ):
            yield Sample(request.id, ids, tuple(-0.1 * token for token in ids), reason, 0)

    def stream(self, request):
        raise AssertionError("nothing is streamed")

    def cancel(self, request_id):
        raise AssertionError("nothing is cancelled")

    def sync(self, weights, version):
        raise AssertionError("nothing to sync")


def test_samples_stand_in_the_prompts_order_with_masks_on_what_was_sampled(language_model):
    codec = language_model.codec
    end = codec.end_id
    (yes,) = {tuple(codec.tokenizer.encode_text(" yes"))}
    engine = ScriptedEngine([((*yes, end), "stop"), ((40,), "length")])
    long = Prompt(messages=(Message(role="user", content="a much longer question"),))
    samples = sample_responses(
        engine, codec, [PROMPT, long], [Sampling(9, 1.0, 0), Sampling(9, 1.0, 1)], device="cpu"
    )
    prompts = [list(request.prompt_ids) for request in engine.requests]
    assert len(prompts[0]) < len(prompts[1])
    for row, ids in enumerate(((*yes, end), (40,))):
        whole = [*prompts[row], *ids]
        assert samples.token_ids[row, : len(whole)].tolist() == whole
        assert (samples.token_ids[row, len(whole) :] == codec.tokenizer.pad_id).all()
        assert samples.response_mask[row].nonzero()[:, 0].tolist() == list(
            range(len(prompts[row]), len(whole))
        )
        assert_close(
            samples.sampler_logprobs[row, len(prompts[row]) : len(whole)],
            -0.1 * torch.tensor(ids),
        )
    assert samples.texts[0] == "yes"
    assert samples.is_finished == (True, False)
    assert samples.response_tokens.tolist() == [len(yes) + 1, 1]

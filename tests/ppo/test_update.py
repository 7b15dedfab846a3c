"""One update against the same update typed naively: loss, gradient, step, and what stays fixed.

The naive side reads each conversation alone, by transformers' own forward (`rollouts.Naive`), and
its formulas are those of the papers, token by token.
"""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from rollouts import (
    LENGTHS,
    PROMPTS,
    Naive,
    made_advantages,
    make,
    move,
    relative_error,
    samplings,
    start_of,
)
from starling.base.errors import InputError
from starling.ppo import actor_critic as actor_critic_module
from starling.ppo import update as update_module
from starling.ppo.advantage import Advantages
from starling.ppo.update import VALUE_NAMES, Weights, accumulate, minibatches, optimize, update

ONCE = {"ppo_epochs": 1, "minibatches": 1}


def naive_loss(naive, made, estimated, rows, weights):
    """The minibatch's loss: mean over its tokens of policy's and value's loss, one by one."""
    section, rollout = made.section, made.rollout
    policy_losses, value_losses = [], []
    for row in rows:
        response = rollout.response_ids[row]
        logprobs, values = naive.policy(rollout.prompt_ids[row], response)
        for t in range(len(response)):
            advantage = float(estimated.advantages[row, t])
            target = float(estimated.returns[row, t])
            old = float(rollout.old_logprobs[row, t])
            old_value = float(rollout.old_values[row, t])
            if section.objective == "apa":
                loss = (logprobs[t] - old - advantage / section.apa_lambda) ** 2
            else:
                ratio = torch.exp(logprobs[t] - old)
                near = ratio.clamp(1 - section.clip_range, 1 + section.clip_range)
                loss = torch.maximum(-advantage * ratio, -advantage * near)
            if section.importance_cap is not None:
                gap = old - float(rollout.sampler_logprobs[row, t])
                loss = loss * min(math.exp(gap), section.importance_cap)
            policy_losses.append(loss)
            squared = (values[t] - target) ** 2
            if section.value_clip_range is not None:
                clip = section.value_clip_range
                near = old_value + (values[t] - old_value).clamp(-clip, clip)
                squared = torch.maximum(squared, (near - target) ** 2)
            value_losses.append(0.5 * squared)
    policy_loss, value_loss = torch.stack(policy_losses).mean(), torch.stack(value_losses).mean()
    return weights.policy * policy_loss + weights.value * value_loss, policy_loss, value_loss


def gradients(parameters):
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in parameters.items()
        if weight.requires_grad
    }


def after_a_drift(made):
    """The policy some steps after its rollout, so that ratios are not one."""
    move(made.actors.actor_critic, 0.005)
    return made


GROUPS = {"advantages": "rloo", "samples_per_prompt": 3}
CASES = {
    "full, shared": ("mistral", {}),
    "full, separate, 0.7": ("mistral", {"critic": "separate", "temperature": 0.7}),
    "full, three samples": ("mistral", {"samples_per_prompt": 3}),
    "top, shared": ("mistral", {"train": "top"}),
    "top, separate, three samples": (
        "mistral",
        {"train": "top", "critic": "separate", "samples_per_prompt": 3},
    ),
    "head": ("mistral", {"train": "head"}),
    "lora, shared": ("mistral", {"train": "lora"}),
    "lora, separate, three samples": (
        "mistral",
        {"train": "lora", "critic": "separate", "samples_per_prompt": 3},
    ),
    "checkpointed": ("mistral", {"gradient_checkpointing": True, "samples_per_prompt": 3}),
    "apa": ("mistral", {"objective": "apa", "apa_lambda": 0.5}),
    "importance": ("mistral", {"importance_cap": 1.5}),
    "apa, importance": ("mistral", {"objective": "apa", "importance_cap": 1.5}),
    "no value clip": ("mistral", {"value_clip_range": None, "value_coef": 0.7}),
    "no critic": ("mistral", GROUPS),
    "gpt2, top": ("gpt2", {"train": "top"}),
    "gpt2, three samples": ("gpt2", {"samples_per_prompt": 3, "critic": "separate"}),
    "bloom": ("bloom", {"critic": "separate"}),
    "bloom, lora": ("bloom", {"train": "lora", "samples_per_prompt": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_formulas_over_each_conversation_alone(name):
    kind, settings = CASES[name]
    settings = {"clip_range": 0.01, "value_clip_range": 0.01} | settings
    made = after_a_drift(make(kind, microbatch=4, **settings))
    estimated = made_advantages(made.rollout)
    rows = range(1, len(made.rollout.prompts))
    weights = Weights(1.0, made.section.value_coef)
    if (cap := made.section.importance_cap) is not None:
        gaps = (made.rollout.old_logprobs - made.rollout.sampler_logprobs).exp()
        is_capped = gaps[made.rollout.response_mask] > cap
        assert is_capped.any()
        assert not is_capped.all()
    naive = Naive(kind, made)
    expected, policy_loss, value_loss = naive_loss(naive, made, estimated, rows, weights)
    expected.backward()
    measured = accumulate(made.learner, made.rollout, estimated, rows, weights)
    assert measured["ppo/policy_loss"] == pytest.approx(policy_loss.item(), rel=1e-4, abs=1e-5)
    if made.section.objective == "ppo":
        assert 0.05 < measured["ppo/clip_fraction"] < 0.95
    if made.section.advantages == "gae" and made.section.value_clip_range is not None:
        assert 0.05 < measured["ppo/value_clip_fraction"] < 0.95
    assert measured["ppo/value_loss"] == pytest.approx(value_loss.item(), rel=1e-4)
    assert relative_error(gradients(made.parameters), gradients(naive.leaves)) < 3e-5


def step_once(made, estimated, *, rows=None, step=0):
    """Weights after one optimizer step on the rows, with what was measured and the gradient."""
    rows = range(len(made.rollout.prompts)) if rows is None else rows
    measured = optimize(made.learner, made.rollout, estimated, rows, step=step)
    return made.weights(), measured


SIZES = [
    {"microbatch": 1},
    {"microbatch": 2},
    {"microbatch": 4},
    {"microbatch": 8},
    {"tokens_per_forward": 16},
    {"tokens_per_forward": 70},
    {"microbatch": 2, "tokens_per_forward": 4096},
]
SPLIT = {
    "one sample": {},
    "three samples, separate": {"samples_per_prompt": 3, "critic": "separate"},
    "top, three samples": {"train": "top", "samples_per_prompt": 3},
    "apa": {"objective": "apa", "samples_per_prompt": 3},
}


@pytest.mark.parametrize("name", SPLIT)
def test_micro_batches_and_packing_change_memory_and_not_the_step(name):
    reference, found = None, None
    for size in ({"tokens_per_forward": 100_000}, *SIZES):
        made = after_a_drift(make(**SPLIT[name], **size, lr=1.0))
        before = made.weights()
        estimated = made_advantages(made.rollout)
        after, measured = step_once(made, estimated)
        moved = {name: after[name] - before[name] for name in after}
        if reference is None:
            reference, found = moved, measured
            assert found["ppo/grad_norm"] > 1e-2
            continue
        assert relative_error(moved, reference) < 1e-5, size
        assert measured == pytest.approx(found, rel=1e-5, abs=1e-6), size


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_trunk_computed_once_gives_the_step_of_one_computed_anew(critic, monkeypatch):
    def trajectory():
        made = make(train="top", critic=critic, samples_per_prompt=3, optimizer="adam", lr=1e-3)
        estimated = made_advantages(made.rollout)
        weights = Weights(1.0, 0.1)
        accumulate(made.learner, made.rollout, estimated, range(9), weights)
        gradient = gradients(made.parameters)
        made.learner.trainable.optimizer.zero_grad()
        learned = update(made.learner, made.rollout, estimated, step=0)
        kept = {n: w for n, w in made.weights().items() if n.startswith("policy.")}
        return made, gradient, learned, kept

    reused = trajectory()
    assert reused[0].actors.actor_critic.trunk is not None
    monkeypatch.setattr(actor_critic_module, "why_not_split", lambda *_: "the test says so")
    anew = trajectory()
    assert anew[0].actors.actor_critic.trunk is None
    policies = [{n: g for n, g in each[1].items() if n[:7] == "policy."} for each in (reused, anew)]
    assert relative_error(*policies) < 1e-5
    assert reused[2] == pytest.approx(anew[2], rel=1e-4, abs=1e-6)
    assert relative_error(reused[3], anew[3]) < 1e-5


LIVE = {
    "full": {"samples_per_prompt": 3},
    "separate, checkpointed": {"critic": "separate", "gradient_checkpointing": True},
    "top": {"train": "top", "critic": "separate", "samples_per_prompt": 3},
    "lora, gated": {"train": "lora", "critic_gate": 1e-9},
    "lora, checkpointed": {"train": "lora", "gradient_checkpointing": True},
    "bfloat16": {"precision": "bfloat16"},
    "apa, 0.7": {"objective": "apa", "temperature": 0.7},
}


@pytest.mark.parametrize("name", LIVE)
def test_the_first_step_takes_the_evaluations_own_forward_and_is_the_same(name):
    results = []
    for will_learn in (False, True):
        made = make(will_learn=will_learn, optimizer="adam", lr=1e-3, ppo_epochs=2, **LIVE[name])
        assert (made.rollout.live is not None) == will_learn
        learned = update(made.learner, made.rollout, made_advantages(made.rollout), step=0)
        results.append((made.rollout, learned, made.weights()))
    (apart, measured, weights), (live, measured_live, weights_live) = results
    assert torch.equal(live.old_logprobs, apart.old_logprobs)
    assert torch.equal(live.old_values, apart.old_values)
    assert measured_live == pytest.approx(measured, rel=1e-5, abs=1e-9)
    assert relative_error(weights_live, weights) < 1e-6
    assert measured_live["ppo/first_approx_kl"] == 0


def test_it_does_so_only_where_nothing_changes_before_it():
    for settings in ({"minibatches": 2}, {"microbatch": 2}, {"tokens_per_forward": 40}):
        assert make(will_learn=True, **settings).rollout.live is None


def changed(before, after):
    return {name for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_only_the_top_layers_the_norm_and_the_head_move(critic):
    made = make(train="top", critic=critic, optimizer="adam", lr=1e-3, weight_decay=0.1)
    before = made.weights()
    for step in range(2):
        update(made.learner, made.rollout, made_advantages(made.rollout), step=step)
    moved = changed(before, made.weights())
    own = {name.removeprefix("policy.") for name in moved if name.startswith("policy.")}
    top = {n for n in dict(made.policy.named_parameters()) if n.startswith("model.layers.1.")}
    assert own == top | {"model.norm.weight", "lm_head.weight"}
    beside = {name for name in moved if name.startswith("beside.")}
    assert beside == {name for name in before if name.startswith("beside.")}


def test_a_trunk_that_changed_after_the_rollout_is_refused():
    made = make(train="top")
    estimated = made_advantages(made.rollout)
    step_once(made, estimated)
    with torch.no_grad():
        made.policy.get_decoder().layers[0].mlp.up_proj.weight.mul_(1.0)
    with pytest.raises(RuntimeError, match="the trunk has changed"):
        step_once(made, estimated)


FIRST_PASS = {
    "full": ("mistral", {"samples_per_prompt": 3}),
    "0.7": ("mistral", {"temperature": 0.7}),
    "separate, 1.4": ("mistral", {"critic": "separate", "temperature": 1.4}),
    "top": ("mistral", {"train": "top", "temperature": 0.7}),
    "lora": ("mistral", {"train": "lora"}),
    "gpt2, whose config asks for dropout": ("gpt2", {}),
    "bloom": ("bloom", {"temperature": 0.7}),
}


@pytest.mark.parametrize("name", FIRST_PASS)
def test_the_first_pass_finds_the_ratio_one(name):
    kind, settings = FIRST_PASS[name]
    made = make(kind, microbatch=2, lr=1e-12, **settings)
    learned = update(made.learner, made.rollout, made_advantages(made.rollout), step=0)
    # Batches of other shapes round otherwise; 1e-6 of difference gives a k3 of 5e-13.
    assert learned["ppo/first_approx_kl"] == pytest.approx(0, abs=1e-10)
    assert learned["ppo/approx_kl_k2"] == pytest.approx(0, abs=1e-10)
    assert learned["ppo/ratio"] == pytest.approx(1, abs=1e-5)
    assert learned["ppo/ratio_var"] == pytest.approx(0, abs=1e-5)
    assert learned["ppo/clip_fraction"] == 0
    assert learned["ppo/value_clip_fraction"] == 0


def test_dropout_in_the_config_is_off_in_rollout_and_update():
    start = start_of()
    start.model.config.attention_dropout = 0.5
    for layer in start.model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
    made = make(start=start, samples_per_prompt=3, critic="separate")
    plain = make(samples_per_prompt=3, critic="separate")
    assert_close(made.rollout.old_logprobs, plain.rollout.old_logprobs)
    assert_close(made.rollout.old_values, plain.rollout.old_values)
    learned = update(made.learner, made.rollout, made_advantages(made.rollout), step=0)
    assert learned["ppo/first_approx_kl"] == pytest.approx(0, abs=1e-10)


def test_another_temperature_in_the_update_would_show():
    made = make(temperature=0.7).but(temperature=1.0)
    learned = update(made.learner, made.rollout, made_advantages(made.rollout), step=0)
    assert learned["ppo/first_approx_kl"] > 1e-4


def test_the_first_approx_kl_is_that_before_any_step_and_the_others_are_means():
    made = make(lr=0.05, ppo_epochs=3)
    learned = update(made.learner, made.rollout, made_advantages(made.rollout), step=0)
    assert learned["ppo/first_approx_kl"] == pytest.approx(0, abs=1e-10)
    assert learned["ppo/approx_kl"] > 1e-5
    logprobs = made.again().old_logprobs
    assert not torch.allclose(logprobs, made.rollout.old_logprobs, atol=1e-3)


def test_what_is_measured_is_the_mean_over_tokens_by_hand():
    made = after_a_drift(make(microbatch=3))
    rollout, estimated = made.rollout, made_advantages(made.rollout)
    mask = rollout.response_mask
    now = made.again()
    gap = (now.old_logprobs - rollout.old_logprobs).double()[mask]
    values, returns = now.old_values[mask].double(), estimated.returns[mask].double()
    _, measured = step_once(made, estimated)
    for name, expected in {
        "ppo/approx_kl": (torch.exp(gap) - 1 - gap).mean(),
        "ppo/approx_kl_k2": (gap**2 / 2).mean(),
        "ppo/ratio": torch.exp(gap).mean(),
        "ppo/squared_ratio": torch.exp(2 * gap).mean(),
        "ppo/value": values.mean(),
        "ppo/squared_value_error": ((values - returns) ** 2).mean(),
        "ppo/clip_fraction": clipped(gap, estimated.advantages[mask]).double().mean(),
    }.items():
        assert measured[name] == pytest.approx(expected.item(), rel=1e-4, abs=1e-7), name


def test_the_variance_of_the_ratio_is_its_own():
    made = after_a_drift(make(ppo_epochs=1, lr=1e-9))
    gap = (made.again().old_logprobs - made.rollout.old_logprobs)[made.rollout.response_mask]
    learned = update(made.learner, made.rollout, made_advantages(made.rollout), step=0)
    expected = torch.exp(gap.double()).var(correction=0).item()
    assert expected > 1e-3
    assert learned["ppo/ratio_var"] == pytest.approx(expected, rel=1e-3)


def clipped(gap, advantages):
    """Where the ratio is past the clip in the direction that the advantage asks for."""
    ratio = torch.exp(gap)
    return ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))


def test_the_loss_is_the_mean_over_the_minibatchs_tokens_not_over_rows():
    made = make(microbatch=2)
    mask = made.rollout.response_mask
    # With ratio one, minus the mean of the advantages: the row's number at each of its tokens.
    advantages = torch.where(mask, torch.arange(6.0)[:, None].expand(mask.shape), 0.0)
    estimated = Advantages(advantages, torch.zeros(mask.shape))
    _, measured = step_once(made, estimated, rows=[1, 2, 4])
    expected = -(1 * LENGTHS[1] + 2 * LENGTHS[2] + 4 * LENGTHS[4]) / (
        LENGTHS[1] + LENGTHS[2] + LENGTHS[4]
    )
    assert measured["ppo/policy_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_value_loss_enters_with_its_coefficient():
    made = make(has_moved=False, value_coef=0.25, lr=1.0)
    mask = made.rollout.response_mask
    # No advantage, returns of 0.1 and values of 0: the gradient of the head's bias is
    # value_coef * mean(v - R) = -0.25 * 0.1.
    step_once(made, Advantages(torch.zeros(mask.shape), torch.where(mask, 0.1, 0.0)))
    assert made.parameters["beside.value_head.bias"].item() == pytest.approx(0.025, rel=1e-5)


@pytest.mark.parametrize("train", ["full", "top", "lora"])
def test_a_separate_critic_leaves_the_policy_alone_and_learns_by_itself(train):
    made = make(train=train, critic="separate", lr=0.02, value_coef=1.0, value_clip_range=9.0)
    before = made.weights()
    mask = made.rollout.response_mask
    step_once(made, Advantages(torch.zeros(mask.shape), torch.where(mask, 1.0, 0.0)))
    moved = changed(before, made.weights())
    assert {name.split(".")[1] for name in moved} == {"critic", "value_head"}
    errors = [
        (values[mask] - 1).square().mean()
        for values in (made.rollout.old_values, made.again().old_values)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("objective", ["ppo", "apa"])
def test_a_step_makes_good_tokens_likelier_and_bad_ones_less_likely(objective):
    made = make(lr=0.02, objective=objective)
    estimated = made_advantages(made.rollout)
    step_once(made, estimated)
    gain = (made.again().old_logprobs - made.rollout.old_logprobs) * estimated.advantages
    assert gain[made.rollout.response_mask].mean() > 1e-3


def fields(record):
    """A rollout's or advantages' fields, trunk states included, as plain values and tensors."""
    named = record._asdict() if isinstance(record, tuple) else vars(record)
    trunk = {key: kept.states for key, kept in named.get("trunk", {}).items()}
    return {name: value for name, value in named.items() if name != "trunk"} | {"trunk": trunk}


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return one == other


@pytest.mark.parametrize("train", ["full", "top"])
def test_nothing_of_a_rollout_changes_while_ppo_learns_from_it(train):
    made = make(train=train, lr=0.05, ppo_epochs=4, minibatches=2)
    records = made.rollout, made_advantages(made.rollout)
    kept = copy.deepcopy([fields(record) for record in records])
    learned = update(made.learner, *records, step=0)
    assert learned["ppo/approx_kl"] > 1e-6
    assert bool(kept[0]["trunk"]) == (train == "top")
    assert all(equal(fields(now), before) for now, before in zip(records, kept, strict=True))


@pytest.mark.parametrize("number", [3, 6])
def test_every_epoch_visits_every_row_once_and_in_another_order_prompts_whole(number, monkeypatch):
    made = make(samples_per_prompt=3, ppo_epochs=4, minibatches=number)
    visited = []

    def spy(_learner, _rollout, _estimated, rows, *, step):
        visited.append(list(rows))
        return {"ppo/approx_kl": 0.0, "ppo/squared_ratio": 1.0, "ppo/ratio": 1.0}

    monkeypatch.setattr(update_module, "optimize", spy)
    for step in range(2):
        update(made.learner, made.rollout, made_advantages(made.rollout), step=step)
    assert len(visited) == 2 * 4 * number
    epochs = [visited[start : start + number] for start in range(0, len(visited), number)]
    for epoch in epochs:
        assert sorted(row for rows in epoch for row in rows) == list(range(18))
        for rows in epoch:
            prompts = sorted({row // 3 for row in rows})
            assert sorted(rows) == [3 * prompt + one for prompt in prompts for one in range(3)]
            assert len(prompts) == 6 // number
    if number == 6:
        assert len({str(epoch) for epoch in epochs}) == 8


def test_the_order_follows_the_seed():
    rollout = make().rollout

    def order(seed):
        return minibatches(rollout, 6, seed=seed, step=0, epoch=0)

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_a_prompt_drawn_twice_in_a_row_leaves_no_row_out():
    # As where one pass over the prompts ends and the next begins.
    made = make()
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[2]]
    rollout = made.collector.collect(prompts, samplings(4))
    for number in (1, 2, 4):
        found = minibatches(rollout, number, seed=0, step=0, epoch=0)
        assert len(found) == number
        assert sorted(row for rows in found for row in rows) == [0, 1, 2, 3]


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_critics_warm_up_moves_it_alone_and_the_policy_begins_after_it(critic):
    settings = {"critic_warmup": 2, "steps": 5, "schedule": "constant", "weight_decay": 0.1}
    made = make(critic=critic, optimizer="adam", lr=1e-3, **settings)
    start = made.weights()
    for step in range(3):
        before = made.weights()
        learned = update(made.learner, made.rollout, made_advantages(made.rollout), step=step)
        moved = changed(before, made.weights())
        assert learned["ppo/grad_norm"] > 0
        assert {n for n in before if n.startswith("beside.")} <= moved
        policy = {name for name in before if name.startswith("policy.")}
        assert moved & policy == (set() if step < 2 else policy)
    # The policy's optimizer counts its own steps: the first is Adam's first.
    weight = made.parameters["policy.model.norm.weight"]
    assert made.learner.trainable.optimizer.state[weight]["step"] == made.section.ppo_epochs
    assert not torch.equal(weight, start["policy.model.norm.weight"])


def gated_returns(made, low, high):
    """Returns that give the value loss `low` to the longest row and `high` to the others.

    By a value off by the root of twice the loss; the clip is out of the way.
    """
    values, mask = made.rollout.old_values, made.rollout.response_mask
    longest = made.rollout.response_tokens.argmax()
    off = torch.full(mask.shape, math.sqrt(2 * high))
    off[longest] = math.sqrt(2 * low)
    return torch.where(mask, values + off, 0.0)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize(
    ("low", "high", "is_gated"),
    [(0.1, 2.0, True), (8.0, 0.02, True), (0.1, 1.1, False), (2.0, 0.1, False)],
)
def test_the_gate_looks_at_the_whole_minibatch(critic, low, high, is_gated):
    # Micro-batches of one row stand on both sides of the gate in all four cases.
    settings = {"critic": critic, "microbatch": 1, "value_clip_range": None, "lr": 0.1}
    made = make(critic_gate=1.0, **settings)
    num_tokens = sum(LENGTHS[:6])
    longest = max(LENGTHS[:6])
    mean = (low * longest + high * (num_tokens - longest)) / num_tokens
    assert (mean > 1) == is_gated
    estimated = made_advantages(made.rollout)._replace(returns=gated_returns(made, low, high))
    naive = Naive("mistral", made)
    weights = Weights(0.0 if is_gated else 1.0, made.section.value_coef)
    expected = naive_loss(naive, made, estimated, range(6), weights)[0]
    expected.backward()
    before = made.weights()
    after, measured = step_once(made, estimated)
    assert measured["ppo/gated"] == is_gated
    assert measured["ppo/value_loss"] == pytest.approx(mean, rel=1e-3)
    moved = {name: (before[name] - after[name]) / 0.1 for name in before}
    assert relative_error(moved, gradients(naive.leaves)) < 1e-4
    policy = {name for name in changed(before, after) if name.startswith("policy.")}
    assert bool(policy) == (critic == "shared" or not is_gated)


def test_a_gated_step_leaves_a_policy_alone_that_has_momentum():
    made = make(critic="separate", optimizer="adam", lr=1e-3, weight_decay=0.1)
    estimated = made_advantages(made.rollout)
    step_once(made, estimated)
    before = made.weights()
    returns = gated_returns(made, 9.0, 9.0)
    after, measured = step_once(made.but(critic_gate=1.0), estimated._replace(returns=returns))
    assert measured["ppo/gated"] == 1
    assert {name.split(".")[0] for name in changed(before, after)} == {"beside"}


def test_a_gate_that_is_never_reached_changes_nothing():
    steps = []
    for gate in (None, 1e6):
        made = make(critic_gate=gate, lr=0.1)
        steps.append(step_once(made, made_advantages(made.rollout)))
    assert equal(steps[0][0], steps[1][0])
    assert steps[0][1] == steps[1][1]


def test_without_a_critic_no_figure_of_one_is_told():
    made = make(advantages="rloo", samples_per_prompt=3)
    learned = update(made.learner, made.rollout, made_advantages(made.rollout), step=0)
    assert not VALUE_NAMES & learned.keys()
    assert {"ppo/policy_loss", "ppo/clip_fraction", "ppo/grad_norm"} <= learned.keys()
    with_one = make()
    learned = update(with_one.learner, with_one.rollout, made_advantages(with_one.rollout), step=0)
    assert learned.keys() >= VALUE_NAMES
    assert not any("squared_ratio" in name for name in learned)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_before_the_weights_move(bad):
    made = make(lr=0.1)
    before = made.weights()
    estimated = made_advantages(made.rollout)
    advantages = torch.where(made.rollout.response_mask, bad, 0.0)
    with pytest.raises(InputError, match=f"the PPO loss is -?{bad}; lower ppo.lr"):
        update(made.learner, made.rollout, estimated._replace(advantages=advantages), step=0)
    assert equal(made.weights(), before)


def test_bfloat16_is_for_products_alone():
    exact = after_a_drift(make(samples_per_prompt=3, critic="separate"))
    rounded = after_a_drift(make(samples_per_prompt=3, critic="separate", precision="bfloat16"))
    assert rounded.rollout.old_logprobs.dtype == torch.float32
    weights = Weights(1.0, 0.1)
    estimated = made_advantages(exact.rollout)
    for made in (exact, rounded):
        accumulate(made.learner, exact.rollout, estimated, range(18), weights)
    found, expected = gradients(rounded.parameters), gradients(exact.parameters)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert 0 < relative_error(found, expected) < 0.2

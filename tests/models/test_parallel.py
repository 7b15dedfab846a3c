"""Two processes are one in loss, gradient norm and weights; micro-batches are one big batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from ranks import Settings, on_ranks
from starling.base.context import Context
from starling.base.masked import masked_sum
from starling.models.adapters import choose_parameters
from starling.models.causal_lm import Batch, hidden_states, padded_mask, save_model, token_logprobs
from starling.models.parallel import (
    filled_up,
    from_everyone,
    parallel,
    share_batches,
    summed,
)
from starling.models.training import adamw, constant
from tiny import tiny_policy

ROWS = [[(7 * row + place * place) % 250 + 20 for place in range(5 + 3 * row)] for row in range(7)]
# Three micro-batches: with two processes, one of them has a filler.
BATCHES = [[0, 1, 2], [3, 4], [5, 6]]
ALONE = Context(rank=0, world_size=1, device="cpu", threads=1)


def cross_entropy(model, rows):
    """Summed over every token that has one before it."""
    batch, mask = Batch(rows, 0), padded_mask([[False] + [True] * (len(row) - 1) for row in rows])
    return -masked_sum(
        token_logprobs(model, hidden_states(model, batch.token_ids), batch.token_ids, mask), mask
    )


def prepared(settings, context):
    loaded = tiny_policy()
    model = choose_parameters(loaded.model, settings, seed=3)
    forward = parallel(
        model,
        cross_entropy,
        context,
        precision=settings.precision,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    return loaded, forward


def backward(forward, context, batches=BATCHES):
    num_tokens = sum(len(row) - 1 for row in ROWS)
    total = torch.zeros(())
    for indices, counts in share_batches(batches, context):
        loss = forward([ROWS[i] for i in indices]) * (counts / num_tokens)
        (loss * context.world_size).backward()
        total += loss.detach()
    return float(summed(total, context))


def trajectory(context, settings, folder):
    """Loss and gradient norm of three steps; the model after them is saved by rank 0."""
    loaded, forward = prepared(settings, context)
    trainable = adamw("m", loaded.model, settings, constant)
    steps = [(backward(forward, context), trainable.step(step)) for step in range(3)]
    whole = forward.whole()
    assert (whole is None) == (context.rank > 0)
    if whole is not None:
        save_model(folder / str(context.world_size), whole, loaded.codec)
    return steps


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(gradient_checkpointing=True),
        Settings(train="lora", gradient_checkpointing=True, lr=1e-2),
        Settings(train="top"),
        Settings(train="head"),
    ],
    ids=lambda settings: f"{settings.train} {settings.gradient_checkpointing}",
)
def test_two_processes_are_one_in_loss_and_gradient_norm_and_in_what_they_save(settings, tmp_path):
    [alone] = on_ranks(1, trajectory, tmp_path, settings, tmp_path)
    both = on_ranks(2, trajectory, tmp_path, settings, tmp_path)
    assert both[0] == both[1]
    for (loss, norm), (expected_loss, expected_norm) in zip(both[0], alone, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-5)
    # They learn: otherwise the first step's loss would be every step's.
    assert alone[2][0] < alone[0][0]
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "12")
    start = tiny_policy().model.state_dict()
    assert {name for name, _ in two.named_parameters()} == {n for n, _ in one.named_parameters()}
    for name, weight in one.state_dict().items():
        assert torch.allclose(two.state_dict()[name], weight, atol=1e-4), name
    assert any(not torch.equal(weight, start[name]) for name, weight in two.state_dict().items())


def test_micro_batches_give_the_gradient_of_one_big_batch_by_transformers():
    loaded, forward = prepared(Settings(), ALONE)
    loss = backward(forward, ALONE)
    reference = tiny_policy().model
    width = max(map(len, ROWS))
    expected = reference(
        input_ids=torch.tensor([row + [0] * (width - len(row)) for row in ROWS]),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ROWS]),
        labels=torch.tensor([row + [-100] * (width - len(row)) for row in ROWS]),
    ).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for (name, own), other in zip(
        loaded.model.named_parameters(), reference.parameters(), strict=True
    ):
        scale = other.grad.abs().max().item()
        assert torch.allclose(own.grad, other.grad, rtol=1e-4, atol=1e-5 * scale), name


def two_in_bfloat16(context):
    loaded, forward = prepared(Settings(precision="bfloat16"), context)
    seen = set()
    loaded.model.get_decoder().layers[0].mlp.register_forward_hook(
        lambda _module, _inputs, output: seen.add(str(output.dtype))
    )
    loss = backward(forward, context)
    gradients = {str(p.grad.dtype) for p in loaded.model.parameters()}
    norm = adamw("m", loaded.model, Settings(), constant).step(0)
    return [loss, norm, sorted(seen | gradients)]


def test_bfloat16_is_for_products_alone_in_one_process_and_in_two(tmp_path):
    _, forward = prepared(Settings(), ALONE)
    exact = backward(forward, ALONE)
    [[alone, alone_norm, alone_types]] = on_ranks(1, two_in_bfloat16, tmp_path)
    [[both, both_norm, both_types], _] = on_ranks(2, two_in_bfloat16, tmp_path)
    assert alone_types == both_types == ["torch.bfloat16", "torch.float32"]
    # bfloat16 keeps 8 bits: the losses are near each other, and are not the exact one.
    assert alone == pytest.approx(exact, rel=5e-3)
    assert both == pytest.approx(alone, rel=5e-3)
    assert exact not in (alone, both)
    assert both_norm == pytest.approx(alone_norm, rel=3e-2)


def test_checkpointed_blocks_run_again_in_the_backward_pass_and_dropout_stays_off():
    def calls(settings, rate):
        loaded, forward = prepared(settings, ALONE)
        counted = []
        for layer in loaded.model.get_decoder().layers:
            layer.self_attn.attention_dropout = rate
            layer.self_attn.register_forward_pre_hook(lambda *_: counted.append(1))
        return len(counted), backward(forward, ALONE), len(counted)

    plain = calls(Settings(), 0.0)
    again = calls(Settings(gradient_checkpointing=True), 0.5)
    assert plain[1] == again[1]
    assert again[2] == 2 * plain[2]


def test_the_whole_model_can_be_taken_between_two_steps_of_adapters():
    settings = Settings(train="lora", lr=1e-2)
    loaded, forward = prepared(settings, ALONE)
    trainable = adamw("m", loaded.model, settings, constant)
    backward(forward, ALONE)
    trainable.step(0)
    before = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    whole = forward.whole()
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    with torch.no_grad():
        adapted, merged = cross_entropy(loaded.model, ROWS), cross_entropy(whole, ROWS)
        start = cross_entropy(tiny_policy().model, ROWS)
    assert merged.item() == pytest.approx(adapted.item(), rel=1e-5)
    assert merged.item() != pytest.approx(start.item(), rel=1e-4)


@given(st.integers(1, 9), st.integers(1, 5))
def test_every_batch_counts_once_and_every_process_takes_as_many(num_batches, size):
    batches = [[number] for number in range(num_batches)]
    shares = [share_batches(batches, Context(rank, size, "cpu", 1)) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    counted = [batch for share in shares for batch, counts in share if counts]
    assert sorted(counted) == batches
    assert all(batch in batches for share in shares for batch, _ in share)


def rounds(context, counts):
    """A process's own batches, as many as `counts` says, and fillers."""
    own = [[f"{context.rank}/{number}"] for number in range(counts[context.rank])]
    found = filled_up(own, context, filler=["filler"])
    return [[list(batch), is_own] for batch, is_own in found]


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (2, 2), (0, 0)])
def test_processes_with_batches_of_their_own_take_equally_many_rounds(counts, tmp_path):
    both = on_ranks(2, rounds, tmp_path, counts)
    for rank, (found, count) in enumerate(zip(both, counts, strict=True)):
        own = [[[f"{rank}/{number}"], True] for number in range(count)]
        assert found == own + [[["filler"], False]] * (max(counts) - count)


def test_one_process_has_no_fillers():
    assert filled_up([[1], [2, 3]], ALONE, filler=[9]) == [([1], True), ([2, 3], True)]


def exchanged(context):
    return from_everyone({"rank": context.rank, "rows": [0.1 + 0.2, None]}, context)


def test_every_process_has_everyones_value_in_the_order_of_ranks(tmp_path):
    expected = [{"rank": rank, "rows": [0.1 + 0.2, None]} for rank in (0, 1)]
    assert on_ranks(2, exchanged, tmp_path) == [expected, expected]
    assert on_ranks(1, exchanged, tmp_path) == [expected[:1]]


def critic_of(model):
    """A small model and a head of its own, which read what the policy reads."""
    torch.manual_seed(5)
    head = torch.nn.Linear(32, 1)
    return torch.nn.ModuleDict({"critic": tiny_policy(2).model.get_decoder(), "head": head})


def two_losses(model, beside, rows):
    """The policy's and the critic's: each has its own weights."""
    batch = Batch(rows, 0)
    states = hidden_states(beside["critic"], batch.token_ids)
    values = (states * beside["head"].weight[0]).sum(dim=-1) + beside["head"].bias
    mask = padded_mask([[True] * len(row) for row in rows])
    return cross_entropy(model, rows) + masked_sum((values - 1.0) ** 2, mask)


def beside_trajectory(context, settings, folder):
    """Losses and norms of three steps over policy and critic, and what every process then holds."""
    loaded = tiny_policy()
    model = choose_parameters(loaded.model, settings, seed=3)
    beside = critic_of(model)
    forward = parallel(
        model,
        lambda model, rows: two_losses(model, beside, rows),
        context,
        beside=beside,
        precision=settings.precision,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    whole = torch.nn.ModuleDict({"policy": model, "beside": beside})
    trainable = adamw("both", whole, settings, constant)
    sharded = sum(
        isinstance(weight, DTensor) for part in (model, beside) for weight in part.parameters()
    )
    steps = [(backward(forward, context), trainable.step(step)) for step in range(3)]
    everywhere = forward.whole_everywhere()
    with torch.no_grad():
        loss = cross_entropy(everywhere, ROWS).item()
    critic = sum(weight.double().square().sum() for weight in beside.parameters())
    critic = critic.full_tensor() if isinstance(critic, DTensor) else critic
    return {
        "steps": steps,
        "sharded": [sharded, sum(1 for part in (model, beside) for _ in part.parameters())],
        "loss": loss,
        "names": sorted(everywhere.state_dict()),
        "is_plain": not any(isinstance(w, DTensor) for w in everywhere.parameters()),
        "critic": critic.item(),
    }


@pytest.mark.parametrize(
    "settings",
    [Settings(), Settings(train="lora", lr=1e-2, gradient_checkpointing=True), Settings("top")],
    ids=lambda settings: settings.train,
)
def test_a_critic_beside_the_policy_is_sharded_and_learns_with_it(settings, tmp_path):
    [alone] = on_ranks(1, beside_trajectory, tmp_path, settings, tmp_path)
    both = on_ranks(2, beside_trajectory, tmp_path, settings, tmp_path)
    for (loss, norm), (expected_loss, expected_norm) in zip(
        both[0]["steps"], alone["steps"], strict=True
    ):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-5)
    assert alone["steps"][2][0] < alone["steps"][0][0]
    assert alone["sharded"][0] == 0
    assert both[0]["sharded"][0] == both[0]["sharded"][1]
    assert both[0]["critic"] == pytest.approx(alone["critic"], rel=1e-6)
    # Whole, plain, merged and the same in each process.
    plain = sorted(tiny_policy().model.state_dict())
    for part in (alone, *both):
        assert part["is_plain"]
        assert part["names"] == plain
        assert part["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert both[0]["loss"] == both[1]["loss"]


def test_what_is_whole_everywhere_follows_the_model_it_was_taken_from():
    settings = Settings(train="lora", lr=1e-2)
    loaded, forward = prepared(settings, ALONE)
    trainable = adamw("m", loaded.model, settings, constant)
    losses = []
    for step in range(2):
        backward(forward, ALONE)
        trainable.step(step)
        with torch.no_grad():
            losses.append(cross_entropy(forward.whole_everywhere(), ROWS).item())
            assert losses[-1] == pytest.approx(cross_entropy(loaded.model, ROWS).item(), rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)

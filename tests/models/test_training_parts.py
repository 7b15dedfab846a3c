"""Schedules by hand, each row once an epoch, and a journal that resumes to the bit."""

import dataclasses
import json
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from starling.base.context import Context
from starling.base.errors import CheckpointError, InputError, Stopped
from starling.base.seeding import permutation
from starling.base.training_state import flatten_optimizer, restore_optimizer
from starling.models.training import (
    Journal,
    Trainable,
    adamw,
    batch_indices,
    constant,
    cosine,
    linear,
    warmup_then,
)


def test_linear_falls_from_one_and_would_reach_zero_after_the_last_step():
    assert [linear(4)(step) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]


def test_cosine_is_one_after_warm_up_half_in_the_middle_and_zero_after_the_last_step():
    schedule = cosine(10, warmup_steps=2)
    assert schedule(2) == 1
    # A quarter of the way: (1 + cos 45 degrees) / 2.
    assert schedule(4) == pytest.approx(0.8535534)
    assert schedule(6) == pytest.approx(0.5)
    assert schedule(8) == pytest.approx(0.1464466)
    assert schedule(10) == pytest.approx(0)
    assert schedule(13) == pytest.approx(0)


def test_warm_up_rises_to_one_in_its_last_step_and_hands_over():
    schedule = warmup_then(linear(10), 4)
    assert [schedule(step) for step in range(4)] == [0.25, 0.5, 0.75, 1]
    assert schedule(4) == 0.6
    assert [warmup_then(constant, 0)(step) for step in (0, 5)] == [1, 1]


@given(n=st.integers(1, 12), batch=st.integers(1, 15), epochs=st.integers(1, 4), seed=st.integers())
def test_batches_visit_every_row_once_per_epoch_in_the_epochs_order(n, batch, epochs, seed):
    steps = math.ceil(n * epochs / batch)
    visited = []
    for step in range(steps):
        indices = batch_indices(step, batch, n, seed, "m/order")
        assert len(indices) == batch
        visited += indices
    for epoch in range(epochs):
        assert visited[epoch * n : (epoch + 1) * n] == permutation(n, seed, "m/order", epoch)


def one_weight(value=1.0, *, lr=0.5, schedule=constant, max_grad_norm=1e9):
    module = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(module.weight, value)
    optimizer = torch.optim.SGD(module.parameters(), lr=99.0)
    return module, Trainable({"m": module}, optimizer, lr, schedule, max_grad_norm)


def test_a_step_moves_by_the_scheduled_rate_and_clears_the_gradient():
    module, trainable = one_weight(lr=0.5, schedule=linear(4))
    for step, rate in enumerate((0.5, 0.375, 0.25, 0.125)):
        before = module.weight.detach().clone()
        module.weight.grad = torch.tensor([[3.0, -4.0]])
        assert trainable.step(step) == pytest.approx(5.0)
        assert_close(module.weight.detach(), before - rate * torch.tensor([[3.0, -4.0]]))
        assert module.weight.grad is None


def test_a_gradient_is_clipped_to_its_norm_and_the_norm_before_is_told():
    module, trainable = one_weight(lr=1.0, max_grad_norm=2.0)
    module.weight.grad = torch.tensor([[3.0, -4.0]])
    assert trainable.step(0) == pytest.approx(5.0)
    assert_close(module.weight.detach(), torch.tensor([[1 - 1.2, 1 + 1.6]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_a_weight_moves(bad):
    module, trainable = one_weight()
    module.weight.grad = torch.tensor([[bad, 1.0]])
    with pytest.raises(InputError, match="at optimizer step 7; lower the stage's lr"):
        trainable.step(7)
    assert torch.equal(module.weight.detach(), torch.ones(1, 2))


class Settings(NamedTuple):
    """Those of a stage's section that its optimizer reads."""

    lr: float
    weight_decay: float
    max_grad_norm: float | None


def test_the_optimizer_holds_only_what_wants_a_gradient():
    frozen, free = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    frozen.requires_grad_(False)
    section = Settings(lr=0.1, weight_decay=0.2, max_grad_norm=1.0)
    both = torch.nn.Sequential(frozen, free)
    trainable = adamw("both", both, section, constant, eps=1e-5)
    assert (trainable.modules, trainable.lr, trainable.max_grad_norm) == ({"both": both}, 0.1, 1.0)
    assert [id(p) for p in trainable.parameters] == [id(p) for p in free.parameters()]
    [group] = trainable.optimizer.param_groups
    settings = (group["weight_decay"], group["eps"], group["betas"])
    assert settings == (0.2, 1e-5, (0.9, 0.999))


def tensorflow_adam(gradients, *, lr, eps, beta1=0.9, beta2=0.999):
    """How far a weight has gone after each gradient, by TensorFlow 1's AdamOptimizer, in floats.

    lr_t = lr sqrt(1 - beta2^t) / (1 - beta1^t); theta -= lr_t m_t / (sqrt(v_t) + eps).
    """
    m = v = moved = 0.0
    places = []
    for t, gradient in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        moved -= lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) * m / (math.sqrt(v) + eps)
        places.append(moved)
    return places


def adam_of_one(*, form, lr=1.0, eps=1e-5, beta2=0.999, schedule=constant):
    module = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.zeros_(module.weight)
    section = Settings(lr=lr, weight_decay=0.0, max_grad_norm=None)
    trainable = adamw("m", module, section, schedule, eps=eps, beta2=beta2)
    if form == "tensorflow":
        trainable = dataclasses.replace(trainable, tensorflow_eps=eps)
    return module.weight, trainable


def step_by(weight, trainable, gradients):
    places = []
    for step, gradient in enumerate(gradients):
        weight.grad = torch.full((1, 1), gradient, dtype=torch.float64)
        trainable.step(step)
        places.append(weight.item())
    return places


@pytest.mark.parametrize(
    ("form", "gradient", "expected"),
    [
        ("pytorch", 1e-5, 0.5),
        ("tensorflow", 1e-5, 0.0307),
        # At 1e-3 they differ by a factor of 1.3 only.
        ("pytorch", 1e-3, 1 / 1.01),
        ("tensorflow", 1e-3, 1 / 1.01 / 1.303),
    ],
)
def test_adams_first_step_is_shorter_where_epsilon_stands_as_in_tensorflow(
    form, gradient, expected
):
    weight, trainable = adam_of_one(form=form)
    assert step_by(weight, trainable, [gradient]) == [pytest.approx(-expected, rel=2e-3)]


@pytest.mark.parametrize("beta2", [0.999, 0.95])
def test_adam_in_tensorflows_form_is_its_formula_over_many_steps(beta2):
    gradients = [1e-5, -3e-5, 2e-4, 1e-6, 5e-3, -5e-3, 1e-5, 1e-5] * 3
    weight, trainable = adam_of_one(form="tensorflow", lr=0.1, beta2=beta2)
    found = step_by(weight, trainable, gradients)
    expected = tensorflow_adam(gradients, lr=0.1, eps=1e-5, beta2=beta2)
    assert found == pytest.approx(expected, rel=1e-6)
    # PyTorch's form goes elsewhere.
    weight, trainable = adam_of_one(form="pytorch", lr=0.1, beta2=beta2)
    assert step_by(weight, trainable, gradients)[0] != pytest.approx(expected[0], rel=0.1)


def test_adam_in_tensorflows_form_goes_on_after_a_resume_as_it_would_have():
    gradients = [1e-5, -3e-5, 2e-4, 1e-6, 5e-3]
    weight, trainable = adam_of_one(form="tensorflow")
    step_by(weight, trainable, gradients[:3])
    again, resumed = adam_of_one(form="tensorflow")
    with torch.no_grad():
        again.copy_(weight)
    saved = flatten_optimizer(trainable.optimizer)
    restore_optimizer(resumed.optimizer, saved.tensors, saved.state)
    assert step_by(again, resumed, gradients[3:]) == step_by(weight, trainable, gradients[3:])


def test_without_a_limit_no_gradient_is_clipped_and_the_norm_is_told_all_the_same():
    module, trainable = one_weight(lr=1.0, max_grad_norm=None)
    module.weight.grad = torch.tensor([[3e4, -4e4]])
    assert trainable.step(0) == pytest.approx(5e4)
    assert_close(module.weight.detach(), torch.tensor([[1 - 3e4, 1 + 4e4]]))
    module.weight.grad = torch.tensor([[math.inf, 0.0]])
    with pytest.raises(InputError, match="the gradient norm is"):
        trainable.step(1)


def make_trainable(seed=0):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    section = Settings(lr=0.1, weight_decay=0.01, max_grad_norm=1.0)
    return adamw("m", module, section, linear(10))


def make_context():
    return Context(rank=0, world_size=1, device="cpu", threads=1)


def train(out, *, until, every=2, seed=0, context=None):
    """A loop as the stages have it: its data follow the step, and it carries state of its own."""
    trainable = make_trainable(seed)
    with Journal(out, trainable, context or make_context(), "m", until, every) as journal:
        snapshot = journal.resume()
        total = snapshot.state["extra"].get("total", 0)
        average = snapshot.tensors.get("average", torch.zeros(3))
        for step in range(snapshot.step, until):
            inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            loss = trainable.modules["m"](inputs).square().mean()
            loss.backward()
            norm = trainable.step(step)
            total += step
            average = 0.9 * average + 0.1 * inputs.mean()
            journal.log(step, {"m/loss": loss.item(), "m/norm": norm}, "noted")
            journal.boundary(step + 1, {"total": total}, {"average": average})
    return trainable, total, average


def moments(trainable):
    states = [trainable.optimizer.state[parameter] for parameter in trainable.parameters]
    return [state[key] for state in states for key in ("step", "exp_avg", "exp_avg_sq")]


def assert_same(one, two):
    for first, second in zip(one[0].parameters, two[0].parameters, strict=True):
        assert torch.equal(first, second)
    for first, second in zip(moments(one[0]), moments(two[0]), strict=True):
        assert torch.equal(first, second)
    assert one[1] == two[1]
    assert torch.equal(one[2], two[2])


@pytest.mark.parametrize("interrupted_at", [2, 3])
def test_two_steps_then_a_resume_then_two_are_four_steps(tmp_path, interrupted_at):
    # At 3, the third step was logged and not saved: it is taken again.
    whole = train(tmp_path / "whole", until=4)
    train(tmp_path / "parts", until=interrupted_at)
    # Another seed: everything must come from the checkpoint.
    parts = train(tmp_path / "parts", until=4, seed=5)
    assert_same(whole, parts)
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]
    assert [json.loads(line)["step"] for line in metrics[0].splitlines()] == [0, 1, 2, 3]


def test_a_start_without_a_checkpoint_forgets_old_metrics(tmp_path):
    train(tmp_path, until=1)
    assert not list(tmp_path.glob("checkpoints/step-*"))
    train(tmp_path, until=1)
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 1


def test_a_signal_saves_at_the_step_boundary_and_stops(tmp_path):
    context = make_context()
    context.stop.signal_number = 15
    with pytest.raises(Stopped):
        train(tmp_path / "parts", until=4, every=100, context=context)
    assert [path.name for path in tmp_path.glob("parts/checkpoints/*")] == ["step-000001"]
    assert_same(train(tmp_path / "parts", until=4), train(tmp_path / "whole", until=4))


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    train(tmp_path, until=2)
    module = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    other = adamw("m", module, Settings(lr=1.0, weight_decay=0.0, max_grad_norm=1.0), constant)
    with (
        Journal(tmp_path, other, make_context(), "m", 4, every=1) as journal,
        pytest.raises(CheckpointError, match="other shapes"),
    ):
        journal.resume()

import json

import pytest
import torch

from starling.base.checkpoint import Snapshot, load_newest, save_checkpoint
from starling.base.errors import CheckpointError
from starling.base.training_state import (
    check_names,
    flatten_optimizer,
    prefixed,
    restore_optimizer,
    select,
)


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 1))


def make_adamw(model, lr=0.01):
    return torch.optim.AdamW(
        [
            {"params": list(model[0].parameters()), "weight_decay": 0.1},
            {"params": list(model[2].parameters()), "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.8, 0.95),
    )


def train(model, optimizer, steps):
    """Steps on random data with dropout, so that the random state counts too."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9


def test_four_steps_are_two_and_a_save_and_a_load_and_two_more(tmp_path):
    straight = make_model()
    straight_optimizer = make_adamw(straight)
    torch.manual_seed(1)
    train(straight, straight_optimizer, 4)
    random_after = torch.get_rng_state()

    model = make_model()
    optimizer = make_adamw(model)
    torch.manual_seed(1)
    train(model, optimizer, 2)
    moments, settings = flatten_optimizer(optimizer)
    tensors = prefixed("model", model.state_dict()) | prefixed("optimizer", moments)
    random_then = torch.get_rng_state()
    save_checkpoint(tmp_path, Snapshot(2, tensors, {"optimizer": settings}))

    torch.manual_seed(12345)
    resumed = make_model()
    resumed_optimizer = make_adamw(resumed, lr=777.0)
    snapshot = load_newest(tmp_path)
    resumed.load_state_dict(select("model", snapshot.tensors))
    restore_optimizer(
        resumed_optimizer, select("optimizer", snapshot.tensors), snapshot.state["optimizer"]
    )
    torch.set_rng_state(random_then)
    train(resumed, resumed_optimizer, 2)

    for name, weight in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name
    assert torch.equal(torch.get_rng_state(), random_after)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            expected = straight_optimizer.state[one][key]
            assert torch.equal(resumed_optimizer.state[other][key], expected), key
    for one, other in zip(
        straight_optimizer.param_groups, resumed_optimizer.param_groups, strict=True
    ):
        assert {k: v for k, v in one.items() if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }


def test_moments_keep_a_dtype_that_is_not_the_parameters():
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    moment = torch.tensor([0.1, 0.2, 0.3])
    optimizer.state[parameter] = {"step": torch.tensor(4.0), "exp_avg": moment}
    tensors, state = flatten_optimizer(optimizer)
    fresh = torch.optim.AdamW([parameter])
    restore_optimizer(fresh, tensors, json.loads(json.dumps(state)))
    assert fresh.state[parameter]["exp_avg"].dtype == torch.float32
    assert torch.equal(fresh.state[parameter]["exp_avg"], moment)
    assert fresh.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_restored_optimizer_does_not_share_memory_with_what_it_came_from():
    model = make_model()
    optimizer = make_adamw(model)
    train(model, optimizer, 1)
    tensors, state = flatten_optimizer(optimizer)
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    other = make_model()
    other_optimizer = make_adamw(other)
    restore_optimizer(other_optimizer, saved, state)
    train(other, other_optimizer, 1)
    for name, tensor in tensors.items():
        assert torch.equal(saved[name], tensor), name


def test_an_optimizer_that_never_stepped_and_a_frozen_parameter_come_back_without_state():
    model = make_model()
    tensors, state = flatten_optimizer(make_adamw(model))
    assert tensors == {}
    fresh = make_adamw(model)
    restore_optimizer(fresh, tensors, state)
    assert len(fresh.state) == 0

    model[0].weight.requires_grad_(False)
    optimizer = make_adamw(model)
    train(model, optimizer, 1)
    tensors, state = flatten_optimizer(optimizer)
    assert {name.partition(".")[0] for name in tensors} == {"1", "2", "3"}
    restore_optimizer(fresh, tensors, state)
    assert model[0].weight not in fresh.state


@pytest.mark.parametrize(
    ("change", "groups", "message"),
    [
        ({"9.exp_avg": torch.ones(1)}, [2, 2], "9.exp_avg is of more parameters than 4"),
        ({"0.exp_avg": torch.ones(4, 3)}, [2, 2], r"has shape \[4, 3\], its parameter \[3, 4\]"),
        ({}, [4], "different number of parameter groups"),
        ({}, [2, 3], "doesn't match the size"),
    ],
)
def test_the_state_of_another_optimizer_is_refused_and_nothing_is_changed(change, groups, message):
    model = make_model()
    optimizer = make_adamw(model)
    train(model, optimizer, 1)
    tensors, state = flatten_optimizer(optimizer)
    saved = [state["groups"][0] | {"params": list(range(size))} for size in groups]
    fresh = make_adamw(make_model(), lr=0.5)
    with pytest.raises(CheckpointError, match=message):
        restore_optimizer(fresh, tensors | change, {"groups": saved})
    assert len(fresh.state) == 0
    assert fresh.param_groups[0]["lr"] == 0.5


def test_groups_are_told_apart_by_their_whole_prefix():
    one, two = torch.ones(1), torch.ones(2)
    merged = prefixed("policy", {"a.b": one}) | prefixed("policy_average", {"a.b": two})
    assert set(merged) == {"policy/a.b", "policy_average/a.b"}
    assert select("policy", merged) == {"a.b": one}
    assert select("value", merged) == {}


def test_a_long_list_of_names_is_cut_and_counted():
    check_names("weights", ["a", "b"], {"b": 1, "a": 2})
    with pytest.raises(CheckpointError, match="n0, n1, n10, n11, .* and 4 more, unexpected none"):
        check_names("weights", [f"n{i}" for i in range(12)], [])

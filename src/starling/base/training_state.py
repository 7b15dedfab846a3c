"""Turn optimizers and random states into named tensors and JSON, and back, exactly.

`checkpoint.py` writes what this file makes. Nothing is cast: a restored moment has the dtype it was
saved with. Tensors share memory with their owner, so save them before the next step.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from starling.base.errors import CheckpointError


class OptimizerState(NamedTuple):
    """An optimizer taken apart: `tensors` are named `<parameter number>.<key>`."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """Take apart an optimizer whose per-parameter state is tensors (AdamW, SGD with momentum).

    Raises TypeError for state or settings that are neither tensors nor plain JSON values.
    """
    tensors = {}
    names = []
    for number, (parameter, _) in enumerate(_numbered(optimizer)):
        entries = optimizer.state.get(parameter, {})
        names.append(sorted(entries))
        for key, value in entries.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"optimizer state {key!r} is {type(value).__name__}, not a tensor")
            tensors[f"{number}.{key}"] = value.detach()
    groups = [
        {key: _plain(key, value) for key, value in _settings(group).items()}
        | {"num_parameters": len(group["params"])}
        for group in optimizer.param_groups
    ]
    return OptimizerState(tensors, {"names": names, "groups": groups})


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Give a freshly made optimizer over the same parameters what `flatten_optimizer` took.

    Raises CheckpointError, before anything is changed, when groups, settings, names or shapes are
    not those of this optimizer.
    """
    parameters = list(_numbered(optimizer))
    check_names("parameter groups", _own_sizes(optimizer), _sizes(state["groups"]))
    for number, (saved, group) in enumerate(
        zip(state["groups"], optimizer.param_groups, strict=True)
    ):
        expected = {"num_parameters", *_settings(group)}
        check_names(f"settings of parameter group {number}", expected, saved)
    named = {f"{number}.{key}" for number, keys in enumerate(state["names"]) for key in keys}
    check_names("optimizer tensors", named, tensors)
    for number, keys in enumerate(state["names"]):
        _check_shapes(number, parameters[number][0], {k: tensors[f"{number}.{k}"] for k in keys})

    for number, (parameter, group) in enumerate(parameters):
        optimizer.state[parameter] = {
            key: tensors[f"{number}.{key}"].to(_device(key, parameter, group), copy=True)
            for key in state["names"][number]
        }
        if not optimizer.state[parameter]:
            del optimizer.state[parameter]
    for saved, group in zip(state["groups"], optimizer.param_groups, strict=True):
        for key, value in _settings(group).items():
            group[key] = tuple(saved[key]) if isinstance(value, tuple) else saved[key]


def pack_rng() -> dict[str, Tensor]:
    """The global random state of torch on the CPU and, once it is in use, on the current GPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """Set the global random state of torch. Raises CheckpointError for one without its device."""
    check_names("random states", {"cpu"} | (states.keys() & {"cuda"}), states)
    if "cuda" in states and not torch.cuda.is_available():
        raise CheckpointError(
            "the checkpoint was saved on a GPU and there is none here. Resume it where there is "
            "one, or delete the stage's checkpoints to run the stage from its start."
        )
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors named `<prefix>/<name>`, so that several groups fit into one snapshot."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def select(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `prefixed` put under this prefix, by its own names; empty when it put nothing."""
    start = f"{prefix}/"
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }


def check_names(what: str, expected: Collection[str], found: Collection[str]) -> None:
    """Raise CheckpointError that lists the names missing and the names too many."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise CheckpointError(
            f"the checkpoint does not fit: {what}, missing {_some(missing)}, "
            f"unexpected {_some(extra)}. It is of another model or recipe; "
            "delete the stage's checkpoints to run the stage from its start."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "none") + more


def _numbered(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Every parameter with its group, in the order that numbers them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, group


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Learning rate, betas and so on: all of a group but its parameters and their names."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(key, part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"optimizer setting {key!r} is {type(value).__name__}, not a plain value")


def _sizes(groups: list[dict[str, Any]]) -> list[str]:
    return [f"{n}: {group['num_parameters']} parameters" for n, group in enumerate(groups)]


def _own_sizes(optimizer: torch.optim.Optimizer) -> list[str]:
    return [
        f"{n}: {len(group['params'])} parameters" for n, group in enumerate(optimizer.param_groups)
    ]


def _check_shapes(number: int, parameter: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """A moment has its parameter's shape, a step counter none; nothing else is known here."""
    for key, tensor in tensors.items():
        if tensor.ndim > 0 and tensor.shape != parameter.shape:
            raise CheckpointError(
                f"the checkpoint does not fit: optimizer tensor {number}.{key} has shape "
                f"{list(tensor.shape)}, its parameter {list(parameter.shape)}. It is of another "
                "model; delete the stage's checkpoints to run the stage from its start."
            )


def _device(key: str, parameter: Tensor, group: Mapping[str, Any]) -> torch.device:
    # torch keeps the step counter on the CPU unless its update runs in one kernel on the GPU.
    if key == "step" and not (group.get("fused") or group.get("capturable")):
        return torch.device("cpu")
    return parameter.device

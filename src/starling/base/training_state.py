"""Turn optimizers into named tensors and JSON, and back, exactly.

`checkpoint.py` writes what this file makes. Nothing is cast: a restored moment has the dtype it was
saved with. Tensors share memory with their owner, so save them before the next step.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from starling.base.errors import CheckpointError, some


class OptimizerState(NamedTuple):
    """An optimizer taken apart: `tensors` are named `<parameter number>.<key>`."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """Take apart an optimizer whose per-parameter state is tensors (AdamW, SGD with momentum)."""
    tensors, names = {}, []
    for number, parameter in enumerate(_parameters(optimizer)):
        entries = optimizer.state.get(parameter, {})
        names.append(sorted(entries))
        tensors |= {f"{number}.{key}": value.detach() for key, value in entries.items()}
    groups = [
        {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
        for settings in map(_settings, optimizer.param_groups)
    ]
    return OptimizerState(tensors, {"names": names, "groups": groups})


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Give a freshly made optimizer over the same parameters what `flatten_optimizer` took.

    Raises CheckpointError, before anything is changed, when groups, settings, names or shapes are
    not those of this optimizer.
    """
    parameters, groups = _parameters(optimizer), optimizer.param_groups
    check_names("parameter groups", _sizes(map(_settings, groups)), _sizes(state["groups"]))
    for number, (saved, group) in enumerate(zip(state["groups"], groups, strict=True)):
        check_names(f"settings of parameter group {number}", _settings(group), saved)
    named = {f"{number}.{key}" for number, keys in enumerate(state["names"]) for key in keys}
    check_names("optimizer tensors", named, tensors)
    for name, tensor in tensors.items():
        # A moment has its parameter's shape, a step counter none; nothing else is known here.
        shape = parameters[int(name.partition(".")[0])].shape
        if tensor.ndim > 0 and tensor.shape != shape:
            raise _misfit(
                f"optimizer tensor {name} has shape {list(tensor.shape)}, its parameter "
                f"{list(shape)}"
            )
    for number, parameter in enumerate(parameters):
        if state["names"][number]:
            optimizer.state[parameter] = {
                # torch keeps the step counter of AdamW on the CPU, whatever the device.
                key: tensors[f"{number}.{key}"].to(
                    "cpu" if key == "step" else parameter.device, copy=True
                )
                for key in state["names"][number]
            }
    for saved, group in zip(state["groups"], groups, strict=True):
        for key in _settings(group).keys() - {"num_parameters"}:
            group[key] = tuple(saved[key]) if isinstance(group[key], tuple) else saved[key]


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors named `<prefix>/<name>`, so that several groups fit into one snapshot."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def select(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `prefixed` put under this prefix, by its own names; empty when it put nothing."""
    start = f"{prefix}/"
    return {n.removeprefix(start): tensor for n, tensor in tensors.items() if n.startswith(start)}


def check_names(what: str, expected: Collection[str], found: Collection[str]) -> None:
    """Raise CheckpointError that lists the names missing and the names too many."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise _misfit(
            f"{what}, missing {some(missing, 8) or 'none'}, unexpected {some(extra, 8) or 'none'}"
        )


def _misfit(problem: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint does not fit: {problem}. It is of another model or recipe; "
        "delete the stage's checkpoints to run the stage from its start."
    )


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every parameter, in the order that numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Learning rate, betas and so on, and the number of parameters in place of them."""
    settings = {key: group[key] for key in group if key not in ("params", "param_names")}
    return settings | {"num_parameters": len(group["params"])}


def _sizes(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    return [f"{n}: {group['num_parameters']} parameters" for n, group in enumerate(groups)]

"""Turn optimizers into named tensors and JSON, and back, exactly.

`checkpoint.py` writes what this file makes. Nothing is cast: a restored moment has the dtype it was
saved with. Tensors share memory with their owner, so save them before the next step.

Where several processes each hold a share of a tensor (a DTensor), `gathered` makes whole ones on
rank 0 and `shared_like` cuts one up again, so a checkpoint does not know how many wrote it.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from starling.base.context import Context
from starling.base.errors import CheckpointError, some


class OptimizerState(NamedTuple):
    """An optimizer taken apart: `tensors` are named `<parameter number>.<key>`."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """Take apart an optimizer whose per-parameter state is tensors (AdamW, SGD with momentum)."""
    saved = optimizer.state_dict()
    tensors = {
        f"{number}.{key}": value
        for number, entries in saved["state"].items()
        for key, value in entries.items()
    }
    return OptimizerState(tensors, {"groups": saved["param_groups"]})


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Give a freshly made optimizer over the same parameters what `flatten_optimizer` took.

    Raises CheckpointError, before anything is changed, when groups, numbers or shapes are not those
    of this optimizer.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        if int(number) >= len(parameters):
            raise _misfit(f"optimizer tensor {name} is of more parameters than {len(parameters)}")
        parameter = parameters[int(number)]
        # A moment has its parameter's shape, a step counter none; nothing else is known here.
        if tensor.ndim > 0 and tensor.shape != parameter.shape:
            raise _misfit(
                f"optimizer tensor {name} has shape {list(tensor.shape)}, its parameter "
                f"{list(parameter.shape)}"
            )
        # torch keeps the step counter of AdamW on the CPU, whatever the device.
        is_counter = key == "step"
        moments[parameter][key] = tensor.clone() if is_counter else shared_like(parameter, tensor)
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        | {"fused": optimizer.defaults.get("fused")}
        for group in state["groups"]
    ]
    try:
        optimizer.load_state_dict({"state": {}, "param_groups": groups})
    except ValueError as error:
        raise _misfit(str(error)) from error
    # Not by `load_state_dict`, which casts moments to the dtype of their parameter.
    optimizer.state.update(moments)


def gathered(tensors: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
    """The whole tensors on rank 0, nothing elsewhere; every process calls it.

    What was shared out arrives on the CPU, one tensor at a time: rank 0 needs CPU memory for all of
    them (in full fine-tuning 12 bytes a parameter), its GPU for the largest.
    """
    whole = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor().cpu() if context.rank == 0 else tensor.full_tensor()
        if context.rank == 0:
            whole[name] = tensor.detach()
    return whole


def shared_like(owner: Tensor, tensor: Tensor) -> Tensor:
    """A copy of a whole tensor on the owner's device, or this process's share if it has one."""
    copy = tensor.to(owner.device, copy=True)
    if isinstance(owner, DTensor):
        # Every process has read the same file: nothing needs to be sent.
        return distribute_tensor(copy, owner.device_mesh, owner.placements, src_data_rank=None)
    return copy


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

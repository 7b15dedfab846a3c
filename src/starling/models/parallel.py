"""One training function for every scale: in one process as it is, in several sharded by FSDP2.

Each process holds a share of every weight, gradient and moment, and computes a share of each step's
micro-batches.  FSDP averages gradients: a process multiplies its share of a loss by the number of
processes (`Context.world_size`), and the gradient is that of one process with all of them.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from starling.base.context import Context
from starling.base.training_state import gathered
from starling.models.adapters import blocks_of, merged

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Forward:
    """Calls `function(model, *arguments)` with the model's weights at hand; made by `parallel`."""

    def __init__(
        self, function: Callable[..., Any], model: PreTrainedModel, context: Context
    ) -> None:
        self._model = model
        self._function = function
        self._context = context
        self._twin = _twin(model)
        self.is_bfloat16 = False

    def __call__(self, *arguments: Any) -> Any:
        kind = self._context.device.partition(":")[0]
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=self.is_bfloat16):
            return self._function(*arguments)

    def whole(self) -> PreTrainedModel | None:
        """The model as it is now, plain, adapters merged, to save or measure; None but on rank 0.

        Every process calls it.  In several, rank 0 holds all weights, on its device when they fit
        there; in one they share memory with the model, unless an adapter is merged into them.
        """
        weights = gathered(self._model.state_dict(), self._context)
        if self._context.rank != 0:
            return None
        model = self._filled(weights)
        try:
            model.to(self._context.device)  # pyright: ignore[reportArgumentType]
        except torch.OutOfMemoryError:
            logger.warning("the whole model does not fit on the GPU; it stays on the CPU, slowly")
            model.cpu()
        return merged(model)

    def whole_everywhere(self) -> PreTrainedModel:
        """The same in every process, on its own device."""
        named = self._model.state_dict().items()
        return merged(
            self._filled(
                {
                    name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                    for name, tensor in named
                }
            )
        )

    def _filled(self, weights: dict[str, Tensor]) -> PreTrainedModel:
        model = copy.deepcopy(self._twin)
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
        return model


def parallel(
    model: PreTrainedModel,
    function: Callable[..., Any],
    context: Context,
    *,
    beside: nn.Module | None = None,
    precision: str = "float32",
    gradient_checkpointing: bool = False,
) -> Forward:
    """`function(model, ...)` for this number of processes; make the optimizer after this.

    With bfloat16, products are computed in it; weights, optimizer and loss stay float32.  The model
    takes no call but through the result: several processes have its weights only inside one.  What
    else the function computes with, and learns, is `beside`: a critic.
    """
    forward = Forward(function, model, context)
    forward.is_bfloat16 = precision == "bfloat16"
    parts = (
        [] if beside is None else [m for m in beside.modules() if isinstance(m, PreTrainedModel)]
    )
    blocks = [block for part in (model, *parts) for block in blocks_of(part)]
    if gradient_checkpointing:
        for block in blocks:
            _recompute_activations(block)
    root = _Root(model, function, beside)
    if context.world_size > 1:
        mesh = init_device_mesh(context.device.partition(":")[0], (context.world_size,))
        # Only the blocks' weights travel as bfloat16; what stands between them stays float32.
        travel = torch.bfloat16 if forward.is_bfloat16 else None
        policy = MixedPrecisionPolicy(travel, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # Given back after each forward, with a gradient or without: `Trunk` looks at its weights.
        fully_shard(root, mesh=mesh, reshard_after_forward=True)
    forward._function = root
    return forward


class _Root(nn.Module):
    """Holds the model, so that its embeddings, norm and head are whole while the function runs."""

    def __init__(
        self, model: PreTrainedModel, function: Callable[..., Any], beside: nn.Module | None
    ) -> None:
        super().__init__()
        self.model = model
        self.beside = beside
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function(self.model, *arguments)


def share_batches(
    batches: Sequence[Sequence[T]], context: Context
) -> list[tuple[Sequence[T], bool]]:
    """This process's micro-batches, equally many in each: the last may be a filler, False.

    A filler's loss counts nothing (times 0), but has to be computed: sharded weights are at hand
    only while every process takes the same step.
    """
    share = batches[context.rank :: context.world_size]
    missing = -(-len(batches) // context.world_size) - len(share)
    return [(batch, True) for batch in share] + [(batches[-1], False)] * missing


def filled_up(
    batches: Sequence[Sequence[T]], context: Context, *, filler: Sequence[T]
) -> list[tuple[Sequence[T], bool]]:
    """A process's own micro-batches, and fillers (False) until it has as many as any other."""
    missing = context.most(len(batches)) - len(batches)
    return [(batch, True) for batch in batches] + [(filler, False)] * missing


def from_everyone(value: T, context: Context) -> list[T]:
    """Every process's value, in the order of ranks; all of them have to ask."""
    if context.world_size == 1:
        return [value]
    found: list[Any] = [None] * context.world_size
    dist.all_gather_object(found, value)
    return found


def summed(value: Tensor, context: Context) -> Tensor:
    """The sum of every process's value; all of them have to ask."""
    if context.world_size > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose parameters hold no memory; one that is sharded cannot be copied."""
    empty = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, empty)


def _recompute_activations(block: nn.Module) -> None:
    """Keep a block's input only, and compute what is inside again for the backward pass."""
    # Not transformers' own way, which wants training mode, where dropout is on.
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)

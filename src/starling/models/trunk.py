"""A frozen trunk under layers that learn: its states are computed once and used many times.

`Trunk.states` runs the lowest layers, `upper` is a backbone of the others that goes on from there
(`packing.packed_reads` with states).  Both are views: they hold the model's own layers, no copies.

What is kept of a trunk that has changed since would be wrong without a sign, so `TrunkStates` knows
which weights made it, and refuses to be used with others.

Shapes: T tokens of all rows, D model width.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from starling.models.packing import Packed, PackedRow, prepared, run_packed, why_not_packed

Versions = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TrunkStates:
    """A row's states after the trunk [T, D], on the device that made them."""

    states: Float[Tensor, "T D"]
    versions: Versions


class Trunk:
    """The embeddings and the first layers of a model, which nothing trains."""

    def __init__(self, model: PreTrainedModel, num_layers: int) -> None:
        """Raises ValueError where `why_not_split` gives a reason."""
        if reason := why_not_split(model, num_layers):
            raise ValueError(f"{type(model).__name__} cannot be split: {reason}")
        backbone: Any = prepared(model)
        self._lower = _view(backbone, backbone.layers[:num_layers], norm=nn.Identity())
        self.upper = _view(backbone, backbone.layers[num_layers:], embed_tokens=None)
        """The layers above, and the norm; they learn with the model that they are part of."""
        self._watched = [backbone.embed_tokens, *backbone.layers[:num_layers]]
        learning = [p for part in self._watched for p in part.parameters() if p.requires_grad]
        if learning:
            raise ValueError(f"{len(learning)} weights of the trunk are to learn; freeze them")

    @torch.no_grad()
    def states(self, _model: PreTrainedModel, packed: Packed) -> Float[Tensor, "T D"]:
        """States of every token after the trunk's last layer; `_model` is the one it is part of."""
        return run_packed(self._lower, packed, packed.layout)

    def kept(self, states: Float[Tensor, "T D"]) -> TrunkStates:
        """The states of one row, marked with the weights that made them."""
        return TrunkStates(states, self._versions())

    def joined(self, rows: Sequence[TrunkStates]) -> Float[Tensor, "T D"]:
        """The states of several rows, one behind the other.

        Raises RuntimeError where the trunk's weights are not those that made them.
        """
        versions = self._versions()
        if any(row.versions != versions for row in rows):
            raise RuntimeError("the trunk has changed since these states were computed")
        return torch.cat([row.states for row in rows])

    def _versions(self) -> Versions:
        weights = [weight for part in self._watched for weight in part.parameters()]
        return tuple((weight.data_ptr(), weight._version) for weight in _plain(weights))


def why_not_split(model: PreTrainedModel, num_layers: int) -> str | None:
    """Why the first layers cannot run apart from the others, or None; tried on a few tokens."""
    if reason := why_not_packed(model):
        return reason
    backbone: Any = model.get_decoder()
    parts = ("layers", "norm", "embed_tokens")
    if missing := [
        name for name in parts if not isinstance(getattr(backbone, name, None), nn.Module)
    ]:
        return f"its backbone has no {', '.join(missing)}"
    packed = Packed([PackedRow((1, 2, 3, 5, 8))], model.device)
    backbone = prepared(model)
    with torch.no_grad():
        lower = _view(backbone, backbone.layers[:num_layers], norm=nn.Identity())
        upper = _view(backbone, backbone.layers[num_layers:])
        whole = run_packed(backbone, packed, packed.layout)
        split = run_packed(upper, packed, packed.layout, run_packed(lower, packed, packed.layout))
    # Scaled embeddings, for example, would be scaled twice.
    if not torch.allclose(whole, split, rtol=1e-3, atol=1e-3):
        return "what it makes of the lower layers' states is not what it makes of the ids"
    return None


def _view(backbone: nn.Module, layers: Iterable[nn.Module], **parts: nn.Module | None) -> nn.Module:
    """The backbone with these layers and other parts, sharing all weights and the config."""
    view = copy.copy(backbone)
    view._modules = dict(backbone._modules) | {"layers": nn.ModuleList(layers)} | parts
    return view


def _plain(weights: Sequence[Tensor]) -> list[Tensor]:
    """What lies in memory: of a sharded weight this process's share."""
    return [getattr(weight, "_local_tensor", weight) for weight in weights]

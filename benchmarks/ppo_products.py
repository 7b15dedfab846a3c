"""What a PPO update must multiply, and what the peer multiplies: the bounds of the PPO races.

A forward pass counts once, a backward pass twice.  A weight counts for every token that passes it,
attention for every pair of tokens of which one sees the other.
"""

from dataclasses import dataclass
from typing import Any

from ppo_peer import EPOCHS, Lengths


@dataclass(frozen=True)
class Method:
    """What an update computes: `trained` layers or all, a critic apart or a head on the policy."""

    trained: int | None
    has_critic_apart: bool
    reuses_trunk: bool = False

    @property
    def trunks(self) -> int:
        return 2 if self.has_critic_apart else 1

    def layer_passes(self, layers: int) -> int:
        """Layers that a token passes, forwards once and backwards twice."""
        trained = self.trained or layers
        frozen = layers - trained
        drawn_and_scored, evaluated = 2 * layers, 2 * trained + self._frozen_runs * frozen
        learned = EPOCHS * self.trunks * 3 * trained
        return drawn_and_scored + evaluated + learned + self._frozen_epochs * self.trunks * frozen

    @property
    def _frozen_runs(self) -> int:
        """How often the frozen layers run before the epochs: for the reference, and for values."""
        return 1 if self.reuses_trunk else 2

    @property
    def _frozen_epochs(self) -> int:
        return 0 if self.reuses_trunk else EPOCHS

    def necessary_flops(self, shape: "Shape", lengths: Lengths) -> float:
        """What nobody can leave out: heads at answers alone, last layers where they are read."""
        layers, trained = shape.layers, self.trained or shape.layers
        frozen = shape.below_flops(lengths) * (layers - trained)
        trunk = shape.below_flops(lengths) * (trained - 1) + shape.last_flops(lengths)
        head = 2 * shape.head * sum(lengths.answers)
        drawn_and_scored = 2 * (frozen + trunk) + head
        evaluated = self._frozen_runs * frozen + 2 * trunk + head
        learned = EPOCHS * 3 * (self.trunks * trunk + head)
        return drawn_and_scored + evaluated + learned + self._frozen_epochs * self.trunks * frozen

    def padded_flops(self, shape: "Shape", lengths: Lengths) -> float:
        """What the peer multiplies: padding, all pairs of a row, and the head at every place."""
        rows, width = len(lengths.prompts), lengths.width
        tokens = rows * width
        layer = 2 * shape.layer * tokens + 4 * shape.queries * rows * width**2
        at_answers = rows * max(lengths.answers)
        heads = 2 * shape.head * (at_answers + tokens + EPOCHS * 3 * tokens)
        return self.layer_passes(shape.layers) * layer + heads


@dataclass(frozen=True)
class Shape:
    """The numbers of a model's weights that multiply."""

    layers: int
    layer: int
    keys: int
    """Of a layer's, those that make keys and values."""
    queries: int
    """Not weights: the width of all query heads together."""
    head: int

    @staticmethod
    def of(model: Any) -> "Shape":
        layer = model.model.layers[0]
        attention = layer.self_attn
        return Shape(
            layers=len(model.model.layers),
            layer=sum(p.numel() for p in layer.parameters() if p.dim() == 2),
            keys=attention.k_proj.weight.numel() + attention.v_proj.weight.numel(),
            queries=attention.q_proj.weight.shape[0],
            head=model.lm_head.weight.numel(),
        )

    def below_flops(self, lengths: Lengths) -> float:
        """A layer forwards, every token seeing itself and what stands before it."""
        sums = [p + a for p, a in zip(lengths.prompts, lengths.answers, strict=True)]
        seen = sum(each * (each + 1) / 2 for each in sums)
        return 2 * self.layer * lengths.num_tokens + 4 * self.queries * seen

    def last_flops(self, lengths: Lengths) -> float:
        """The same read only where a token of an answer is predicted."""
        pairs = zip(lengths.prompts, lengths.answers, strict=True)
        seen = sum(a * p + a * (a - 1) / 2 for p, a in pairs)
        read = (self.layer - self.keys) * sum(lengths.answers)
        return 2 * (self.keys * lengths.num_tokens + read) + 4 * self.queries * seen

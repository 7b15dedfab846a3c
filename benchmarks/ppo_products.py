"""What a PPO update must multiply, and what the peer multiplies: the bounds of the PPO races.

Forward passes count once, backward passes twice.  Every weight matrix counts for every token that
passes it, attention for every pair of tokens that see each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ppo_peer import ANSWER_TOKENS, EPOCHS


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompts of an update, and of the answers that were drawn to them."""

    prompts: Sequence[int]
    answers: Sequence[int]

    @property
    def num_tokens(self) -> int:
        return sum(self.prompts) + sum(self.answers)

    @property
    def padded(self) -> "Lengths":
        """As in a batch padded to its longest prompt, which draws until all rows have ended."""
        rows = len(self.prompts)
        return Lengths([max(self.prompts)] * rows, [max(self.answers)] * rows)


@dataclass(frozen=True)
class Method:
    """What an update computes: `trained` layers, or all; a critic of its own, or none."""

    trained: int | None
    has_critic_apart: bool
    reuses_trunk: bool = False

    def layer_passes(self, layers: int) -> int:
        """How many layers each token passes, forwards and backwards."""
        trained = self.trained or layers
        below = layers - trained
        trunks = 2 if self.has_critic_apart else 1
        generated = scored = layers
        if self.reuses_trunk:
            return generated + scored + below + 2 * trained + EPOCHS * 3 * trained
        # The reference, and the critic's first values.
        evaluated = 2 * layers
        return generated + scored + evaluated + EPOCHS * trunks * (layers + 2 * trained)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that multiply."""

    layers: int
    keys: int  # weights of a layer's key and value projections
    others: int  # its other weights
    heads: int  # width of all query heads
    head: int  # weights of the language model's head

    @staticmethod
    def of(model: Any) -> "Shape":
        config = model.config
        layer = model.model.layers[0]
        keys = sum(part.weight.numel() for part in (layer.self_attn.k_proj, layer.self_attn.v_proj))
        weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        queries = layer.self_attn.q_proj.weight.shape[0]
        head = config.hidden_size * config.vocab_size
        return Shape(config.num_hidden_layers, keys, weights - keys, queries, head)


def necessary_flops(shape: Shape, method: Method, lengths: Lengths) -> float:
    """What nobody can leave out: the head at answers alone, and of a last layer what is read."""
    reads = sum(lengths.answers)
    pairs = list(zip(lengths.prompts, lengths.answers, strict=True))
    seen = sum((p + a) * (p + a + 1) / 2 for p, a in pairs)
    seen_by_reads = sum(a * p + a * (a - 1) / 2 for p, a in pairs)

    def layers(count: int, read: float, seen_by_read: float, tokens: int) -> float:
        """`count` layers of which the last is read at so many places."""
        whole = 2 * (shape.keys + shape.others) * tokens + 4 * shape.heads * seen
        last = 2 * (shape.keys * tokens + shape.others * read) + 4 * shape.heads * seen_by_read
        return (count - 1) * whole + last

    def below(count: int) -> float:
        whole = 2 * (shape.keys + shape.others) * lengths.num_tokens + 4 * shape.heads * seen
        return count * whole

    def read(count: int) -> float:
        return layers(count, reads, seen_by_reads, lengths.num_tokens)

    head = 2 * shape.head * reads
    trained = method.trained or shape.layers
    frozen = shape.layers - trained
    scored = layers(
        shape.layers, len(pairs), sum(p + a for p, a in pairs), lengths.num_tokens
    )
    generated = read(shape.layers) + head
    evaluated = (below(frozen) if method.reuses_trunk else 2 * below(frozen)) + 2 * read(trained) + head
    trunks = 2 if method.has_critic_apart else 1
    again = 0 if method.reuses_trunk else trunks * below(frozen)
    learned = EPOCHS * (again + 3 * (trunks * read(trained) + head))
    return generated + scored + evaluated + learned


def peer_flops(shape: Shape, method: Method, lengths: Lengths) -> float:
    """What the peer multiplies: padding, all pairs of a row, and the head at every position."""
    padded = lengths.padded
    rows, width = len(padded.prompts), padded.prompts[0] + padded.answers[0]
    tokens = rows * width
    layer = 2 * (shape.keys + shape.others) * tokens + 4 * shape.heads * rows * width**2
    head = 2 * shape.head
    heads = head * (rows * padded.answers[0] + tokens + EPOCHS * 3 * tokens)
    return method.layer_passes(shape.layers) * layer + heads

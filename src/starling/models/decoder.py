"""One more token for each of many rows: a cache of keys and values, and two forwards over it.

Rows stand in the cache's slots, each as long as it is: nothing is padded on the left, and a row
that ends leaves its slot to another.  A prompt is encoded up to its last token (no logits are
computed for it); the last token is then decoded as every later one is.

`PlainDecoder` runs any causal model through its own forward.  `LlamaDecoder` reads the weights of
the classes it knows, and on a CPU keeps them in the layout that oneDNN multiplies fastest.

Shapes: N rows, T tokens, H heads, G key-value heads, D head size, V vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    Cache,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from starling.base.errors import ModelError
from starling.models.packing import is_inert

Rows = Int[Tensor, " N"]
Linear = Callable[[Tensor], Tensor]

LLAMA_LIKE = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
# Their tables do not change with the length of the text.
STATIC_ROTARY = ("default", "linear", "llama3", "yarn")
ATTENTION_KINDS = ("full_attention", "sliding_attention")
# A packed copy costs its size again; beyond this a model is read where it stands.
MAX_PACKED_BYTES = 2**31
CAPACITY_STEP = 16


class SlotCache:
    """Keys and values of every layer, [slots, G, capacity, D], allocated when first written.

    The capacity stays close to the longest row, so that what one token reads is one stream of
    memory: gaps between the rows cost more than moving them together now and then (measured: twice
    the time of attention at 64 rows of 96 tokens).
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.slots = self.capacity = 0

    def fit(self, slots: int, length: int) -> None:
        """Make room for `slots` rows of at most `length` tokens; what they hold stays."""
        step = max(CAPACITY_STEP, length // 8)
        if slots <= self.slots and length <= self.capacity <= length + 4 * step:
            return
        kept = min(self.slots, slots), min(self.capacity, length)
        self.slots, self.capacity = max(slots, self.slots), length + step
        for index, pair in self.layers.items():
            moved = self._allocate(pair[0])
            for new, old in zip(moved, pair, strict=True):
                new[: kept[0], :, : kept[1]] = old[: kept[0], :, : kept[1]]
            self.layers[index] = moved

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, of the dtype and heads [_, G, _, D] of `like`."""
        if index not in self.layers:
            self.layers[index] = self._allocate(like)
        return self.layers[index]

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Give `targets` the first `length` tokens of `source`."""
        for pair in self.layers.values():
            for tensor in pair:
                for target in targets:
                    tensor[target, :, :length] = tensor[source, :, :length]

    def _allocate(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.slots, like.shape[1], self.capacity, like.shape[3])
        # Zeros: a masked position still takes part as 0 x value, which must not be nan.
        return like.new_zeros(shape), like.new_zeros(shape)


class PlainDecoder:
    """Decodes with the model's own forward, which writes to the slots as to its own cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.kinds, self.window = _attention_kinds(model)
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise ModelError(
                f"{type(model).__name__} takes no explicit positions, which decoding rows of "
                "different lengths together needs; use a server for this model (a URL)"
            )

    def refresh(self) -> None:
        """Nothing is copied from the model, so nothing can be out of date."""

    def encode(self, token_ids: Int[Tensor, "N T"], slots: Rows, cache: SlotCache) -> None:
        """Write the keys and values of whole prompts, padded on the right, to their slots."""
        # Causal attention never looks to the right, so the padding is seen by padding alone.
        view = _CacheView(cache, slots, None)
        self.model.base_model(input_ids=token_ids, past_key_values=view, use_cache=True)

    def step(self, token_ids: Rows, positions: Rows, cache: SlotCache) -> Float[Tensor, "N V"]:
        """Logits after one token of each row in the first N slots."""
        masks = self._masks(positions, cache.capacity)
        slots = torch.arange(len(token_ids), device=token_ids.device)
        view = _CacheView(cache, slots, positions)
        output: Any = self.model(
            input_ids=token_ids[:, None],
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=positions[:, None],
            past_key_values=view,
            use_cache=True,
        )
        return output.logits[:, -1]

    def _masks(self, positions: Rows, length: int) -> dict[str, Float[Tensor, "N 1 1 length"]]:
        return {
            kind: attention_mask(positions, length, self._window(kind), self.model.dtype)
            for kind in sorted(set(self.kinds))
        }

    def _window(self, kind: str) -> int | None:
        return self.window if kind == "sliding_attention" else None


class LlamaDecoder(PlainDecoder):
    """The same for Llama's architecture, from the weights themselves: about twice as fast.

    Packed weights are copies.  `refresh` makes new ones when a parameter was changed or replaced;
    a write that bypasses autograd's counters (`.data`) shows in the sums that it compares.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.base: Any = model.base_model
        self.groups = self.base.config.num_key_value_heads
        self._versions: list[tuple[int, int]] = []
        self._parameters: list[nn.Parameter] = []
        self._sums: list[int] = []
        self._layers: list[_Layer] = []
        self._tables: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def knows(model: PreTrainedModel) -> bool:
        """Whether this class computes what `model.forward` does: no adapters, hooks, changes."""
        if type(model) not in LLAMA_LIKE:
            return False
        base: Any = model.base_model
        rotary = getattr(base, "rotary_emb", None)
        plain = (nn.Linear, nn.Embedding, type(base.norm), type(base.layers[0].mlp.act_fn))
        leaves = [module for module in model.modules() if not list(module.children())]
        return (
            getattr(rotary, "rope_type", None) in STATIC_ROTARY
            and base.config.hidden_act == "silu"
            and all(type(leaf) in plain or leaf is rotary for leaf in leaves)
            and all(is_inert(hook) for m in model.modules() for hook in _hooks(m))
        )

    def refresh(self) -> None:
        """Look at every parameter, and pack again where one is not what was packed."""
        self._parameters = list(self.model.parameters())
        # Without copies nothing is out of date, and a large model takes a second to read.
        copied = self._parameters if _can_pack(self._parameters) else []
        sums = [_content(parameter) for parameter in copied]
        if not self._is_current() or sums != self._sums:
            self._pack()
            self._sums = sums

    def _is_current(self) -> bool:
        return self._versions == [(p.data_ptr(), p._version) for p in self._parameters]

    def _pack(self) -> None:
        self._versions = [(p.data_ptr(), p._version) for p in self._parameters]
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        pack = _can_pack(self._parameters)
        self._head = _linear([head], pack)
        self._layers = [_Layer(layer, pack) for layer in self.base.layers]
        self._tables = None

    def _rotary(self, positions: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., 1, D] of each position, the sines' first half negated."""
        if self._tables is None or len(self._tables[0]) < capacity:
            everywhere = torch.arange(capacity, device=positions.device)[None]
            cos, sin = self.base.rotary_emb(self.base.embed_tokens.weight, everywhere)
            half = sin.shape[-1] // 2
            self._tables = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        cos, sin = self._tables
        return cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)

    def encode(self, token_ids: Int[Tensor, "N T"], slots: Rows, cache: SlotCache) -> None:
        """As the plain one; the last layer stops at its keys and values, which are all it gives."""
        rows, width = token_ids.shape
        rotary = self._rotary(torch.arange(width, device=token_ids.device), cache.capacity)
        hidden = self.base.embed_tokens(token_ids)
        for index, layer in enumerate(self._layers):
            query, key, value = layer.attention_inputs(hidden, *rotary)
            key, value = key.transpose(1, 2), value.transpose(1, 2)  # [N, G, T, D]
            for kept, new in zip(cache.layer(index, key), (key, value), strict=True):
                kept[slots, :, :width] = new
            if index + 1 == len(self._layers):
                return
            window = self._window(self.kinds[index])
            mask = None
            if window is not None and window < width:
                ones = torch.ones(width, width, dtype=torch.bool, device=hidden.device)
                mask = ones.tril() & ~ones.tril(-window)
            mixed = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=layer.scale,
                enable_gqa=True,
            )
            hidden = layer.outputs(hidden, mixed.transpose(1, 2).reshape(rows, width, -1))

    def step(self, token_ids: Rows, positions: Rows, cache: SlotCache) -> Float[Tensor, "N V"]:
        """As the plain one."""
        if not self._is_current():
            self._pack()
        count = len(token_ids)
        slots = torch.arange(count, device=token_ids.device)
        rotary = self._rotary(positions, cache.capacity)
        masks = self._masks(positions, cache.capacity)
        hidden = self.base.embed_tokens(token_ids)
        for index, layer in enumerate(self._layers):
            query, key, value = layer.attention_inputs(hidden, *rotary)
            keys, values = cache.layer(index, key[:, :, None])
            keys[slots, :, positions] = key
            values[slots, :, positions] = value
            # A group's queries stand where a text's positions do, so that none of its keys is
            # repeated.
            query = query.reshape(count, self.groups, -1, layer.head_dim)
            mask = masks[self.kinds[index]]
            mixed = _attend(query, keys[:count], values[:count], mask, layer.scale)
            hidden = layer.outputs(hidden, mixed.reshape(count, -1))
        return self._head(_rms_norm(hidden, self.base.norm))


def _hooks(module: nn.Module) -> list[object]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


class _Layer:
    """A decoder layer's matrices, those that read the same input side by side."""

    def __init__(self, layer: Any, pack: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.scale, self.head_dim = attention.scaling, attention.head_dim
        self.attention_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.query_norm = getattr(attention, "q_norm", None)
        self.key_norm = getattr(attention, "k_norm", None)
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.heads = [projection.out_features // self.head_dim for projection in projections]
        self.qkv = _linear(projections, pack)
        self.out = _linear([attention.o_proj], pack)
        self.gate_up = _linear([mlp.gate_proj, mlp.up_proj], pack)
        self.down = _linear([mlp.down_proj], pack)

    def attention_inputs(
        self, hidden: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., H, D], keys and values [..., G, D]; queries and keys are rotated."""
        mixed = self.qkv(_rms_norm(hidden, self.attention_norm))
        mixed = mixed.view(*hidden.shape[:-1], -1, self.head_dim)
        query, key, value = mixed.split(self.heads, dim=-2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = _rms_norm(query, self.query_norm), _rms_norm(key, self.key_norm)
            rotated = torch.cat([query, key], dim=-2)
        else:
            rotated = mixed[..., : self.heads[0] + self.heads[1], :]
        turned = torch.roll(rotated, self.head_dim // 2, dims=-1)
        rotated = (rotated * cos).addcmul_(turned, sin)
        query, key = rotated.split(self.heads[:2], dim=-2)
        return query, key, value

    def outputs(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """What the layer hands on, given what its attention found."""
        hidden = hidden + self.out(mixed)
        gate, up = self.gate_up(_rms_norm(hidden, self.mlp_norm)).chunk(2, dim=-1)
        return hidden + self.down(F.silu(gate).mul_(up))


class _CacheView(Cache):
    """The slots as transformers' models see a cache: given new keys, it answers with all."""

    def __init__(self, cache: SlotCache, slots: Tensor, positions: Tensor | None) -> None:
        super().__init__(layers=[])
        self.cache, self.slots, self.positions = cache, slots, positions

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.layer(layer_idx, key_states)
        if self.positions is None:
            keys[self.slots, :, : key_states.shape[2]] = key_states
            values[self.slots, :, : key_states.shape[2]] = value_states
            return key_states, value_states
        keys[self.slots, :, self.positions] = key_states[:, :, 0]
        values[self.slots, :, self.positions] = value_states[:, :, 0]
        return keys[: len(self.slots)], values[: len(self.slots)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.positions is None else self.cache.capacity - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return (query_length if self.positions is None else self.cache.capacity), 0


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of one position per row; query [N, G, H/G, D], keys and values [N, G, T, D]."""
    if len(query) == 1 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    # Two batched products read contiguous keys faster than the CPU's fused kernel (measured: 430
    # against 740 microseconds for 64 rows of 96 tokens).
    scores = torch.matmul(query * scale, keys.transpose(2, 3)).float().add_(mask)
    return torch.matmul(scores.softmax(dim=-1).to(values.dtype), values)


def decoder_for(model: PreTrainedModel) -> PlainDecoder:
    """The fastest decoder that computes what this model's forward does."""
    return LlamaDecoder(model) if LlamaDecoder.knows(model) else PlainDecoder(model)


def attention_mask(
    positions: Rows, length: int, window: int | None, dtype: torch.dtype
) -> Float[Tensor, "N 1 1 length"]:
    """What is added to each row's scores: 0 up to its own position (of a window), else -inf."""
    columns = torch.arange(length, device=positions.device)
    out = columns > positions[:, None]
    if window is not None:
        out |= columns <= positions[:, None] - window
    mask = torch.zeros(out.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(out, -torch.inf)[:, None, None]


def _attention_kinds(model: PreTrainedModel) -> tuple[list[str], int | None]:
    """Each layer's kind of attention, and the window of the sliding ones."""
    config: Any = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kind = ATTENTION_KINDS[window is not None]
    kinds = list(getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers)
    if not set(kinds) <= set(ATTENTION_KINDS):
        raise ModelError(
            f"{type(model).__name__} keeps more than keys and values of its text "
            f"({', '.join(sorted(set(kinds)))}); use a server for this model (a URL)"
        )
    return kinds, window


def _rms_norm(hidden: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _content(parameter: Tensor) -> int:
    """A sum that changes with any one value, read at the speed of memory."""
    flat = parameter.detach().flatten()
    wide = torch.int64 if flat.numel() * flat.element_size() % 8 == 0 else torch.int16
    return int(flat.view(wide).sum())


def _can_pack(parameters: Sequence[Tensor]) -> bool:
    """Whether oneDNN has kernels for these weights, and memory is not the first concern."""
    [dtype, *others] = {parameter.dtype for parameter in parameters}
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return (
        not others
        and all(parameter.device.type == "cpu" for parameter in parameters)
        and torch.backends.mkldnn.is_available()
        and size <= MAX_PACKED_BYTES
        and (
            dtype == torch.float32
            or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


def _linear(modules: Sequence[nn.Linear], pack: bool) -> Linear:
    """The modules' outputs side by side; packed, from a copy of their weights."""
    if not pack:
        if len(modules) == 1:
            return modules[0]
        return lambda x: torch.cat([module(x) for module in modules], dim=-1)
    joined = torch.cat([module.weight.detach() for module in modules])
    weight = torch.ops.mkldnn._reorder_linear_weight(joined)
    biases = [module.bias for module in modules if module.bias is not None]
    assert len(biases) in (0, len(modules)), "some of the matrices side by side have a bias"
    bias = torch.cat([b.detach() for b in biases]) if biases else None
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

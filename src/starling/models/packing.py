"""Packing: answers to one prompt share its computation, in one flat sequence.

A row stands as its prompt, once, then its answers, one behind the other; the next row follows.
Each token sees its own prompt and its own answer, never another answer or row, and positions
restart behind the prompt, so that every state is the one of `prompt + answer` alone.

Attention is the only part of a model in which tokens meet, and the only part replaced, through
transformers' attention interface.  It is split: a row's prompt over itself, then its answers over
prompt and themselves (one block mask over the whole sequence is slower than no packing at all when
answers are long).  On a GPU flex attention skips the blocks that see nothing, and does it at once.

Shapes: T tokens of all rows, A answers of all rows, D model width; inside attention K answers of
one row, R tokens of its longest answer, H heads, d their width.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from threading import local
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from starling.base.errors import ModelError
from starling.models.causal_lm import TOKENS_PER_BATCH

NAME = "starling_packed"

NOT_PLAIN = {
    "attn_logit_softcapping": "capped scores",
    "attention_chunk_size": "chunks",
    "alibi": "ALiBi",
    "use_bidirectional_attention": "no causal order",
    "is_encoder_decoder": "an encoder",
}

# What attention that is not plain receives: here none of it should, for all are refused before.
EXTRAS = ("softcap", "s_aux", "position_bias", "indices", "block_indices")

# Their layers hand to attention a mask of their own making, or no layout.
OUT_OF_REACH = {"doge", "moshi", "nemotron"}


@dataclass(frozen=True)
class PackedRow:
    """A prompt and the answers to it, as ids; without answers it is a plain conversation."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...] = ()
    read_from: int | None = None
    """Where `packed_reads` begins in the prompt; it goes on through the answers."""

    def __post_init__(self) -> None:
        if not (self.prompt or self.answers) or not all(self.answers):
            raise ValueError("a packed row needs tokens, and so does each of its answers")

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))


def share_prompt(sequences: Sequence[Sequence[int]]) -> PackedRow:
    """Split sequences into their longest common prefix and the rest, at least one token each."""
    rows = [tuple(ids) for ids in sequences]
    shared = min(map(len, rows)) - 1
    first, last = min(rows), max(rows)  # what these two share, all that sort between them do
    shared = next((place for place in range(shared) if first[place] != last[place]), shared)
    return PackedRow(rows[0][:shared], tuple(ids[shared:] for ids in rows))


def packed_batches(
    rows: Sequence[PackedRow], device: str, *, tokens: int | None = None
) -> list[list[int]]:
    """Indices in batches of at most `tokens`, long rows first; a longer row is a batch of its own.

    Without `tokens`, as many as suit the device.
    """
    limit = TOKENS_PER_BATCH[device.partition(":")[0]] if tokens is None else tokens
    batches: list[list[int]] = []
    used = 0
    for index in sorted(range(len(rows)), key=lambda index: (-rows[index].num_tokens, index)):
        used += rows[index].num_tokens
        if not batches or used > limit:
            batches.append([])
            used = rows[index].num_tokens
        batches[-1].append(index)
    return batches


@dataclass(frozen=True)
class _Row:
    """The shape of a row; places count from its first answer's first token."""

    prompt: int
    read_from: int
    lengths: tuple[int, ...]
    ends: Tensor  # [K]
    padded: Tensor | None  # [K, R] places, where padding repeats the first; None: equally long
    inside: Tensor  # [K, R] True = no padding

    @staticmethod
    def of(row: PackedRow, device: str | torch.device) -> "_Row":
        lengths = tuple(map(len, row.answers))
        sizes = torch.tensor(lengths, dtype=torch.long)
        steps = torch.arange(max(lengths, default=0))
        inside = steps < sizes[:, None]
        padded = (sizes.cumsum(0) - sizes)[:, None] + torch.where(inside, steps, 0)
        is_ragged = not bool(inside.all())
        return _Row(
            len(row.prompt),
            len(row.prompt) if row.read_from is None else row.read_from,
            lengths,
            (sizes.cumsum(0) - 1).to(device),
            padded.to(device) if is_ragged else None,
            inside.to(device),
        )


@dataclass(frozen=True)
class _Layout:
    """What attention has to know; it travels through the model as a keyword argument."""

    rows: tuple[_Row, ...]
    tags: Tensor  # [2, T] row and answer of each token, answer -1 in prompts
    depths: Tensor  # [T]
    reads: Tensor | None = None  # [U] when nothing else is read from the last layer
    are_ends: bool = False  # they are the answers' ends; else prompts from `read_from`, and answers
    masks: dict[Any, Any] = field(default_factory=dict)  # those made so far


class Packed:
    """Rows as one flat sequence: ids and positions [1, T], and places in it.

    `ends` [A] are each answer's last; `reads` [U] all from a prompt's `read_from` on.
    """

    def __init__(self, rows: Sequence[PackedRow], device: str | torch.device = "cpu") -> None:
        token_ids: list[int] = []
        tags: list[tuple[int, int, int]] = []
        ends: list[int] = []
        reads: list[int] = []
        for number, row in enumerate(rows):
            begin = len(row.prompt) if row.read_from is None else row.read_from
            reads += range(len(token_ids) + begin, len(token_ids) + row.num_tokens)
            for answer, ids in enumerate([row.prompt, *row.answers], start=-1):
                start = 0 if answer < 0 else len(row.prompt)
                token_ids += ids
                tags += [(number, answer, start + step) for step in range(len(ids))]
                ends += [len(token_ids) - 1] if answer >= 0 else []
        tensors = torch.tensor(tags, device=device).T.contiguous()
        self.token_ids = torch.tensor([token_ids], device=device)
        self.positions = tensors[2:]
        self.ends = torch.tensor(ends, dtype=torch.long, device=device)
        self.reads = torch.tensor(reads, dtype=torch.long, device=device)
        shapes = tuple(_Row.of(row, device) for row in rows)
        self.layout = _Layout(shapes, tensors[:2], tensors[2])


def packed_states(model: PreTrainedModel, packed: Packed) -> Float[Tensor, "T D"]:
    """Final-norm'd hidden states of the flat sequence; raises ModelError for a model it cannot run.

    The model keeps our attention from then on, because gradient checkpointing runs it again during
    the backward pass; called without a layout, that is transformers' own `sdpa`.
    """
    return run_packed(prepared(model), packed, packed.layout)


def packed_ends(model: PreTrainedModel, packed: Packed) -> Float[Tensor, "A D"]:
    """`packed_states` at each answer's end alone: the last layer computes little else.

    It still makes every token's key and value; its queries and its feed-forward are needed at the
    ends only.  A quarter faster with four layers.
    """
    layout = replace(packed.layout, reads=packed.ends, are_ends=True)
    return run_packed(prepared(model), packed, layout)[packed.ends]


def packed_reads(
    backbone: nn.Module, packed: Packed, states: Float[Tensor, "T D"] | None = None
) -> Float[Tensor, "U D"]:
    """Final states at `packed.reads` alone, likewise; `prepared` made the backbone ready.

    With `states` the backbone's layers go on from these, and read no ids.
    """
    layout = replace(packed.layout, reads=packed.reads)
    return run_packed(backbone, packed, layout, states)[packed.reads]


def prepared(model: PreTrainedModel) -> nn.Module:
    """The model's backbone with our attention; raises ModelError for one that cannot have it."""
    backbone: Any = model.get_decoder()
    if backbone.config._attn_implementation != NAME:
        if reason := why_not_packed(model):
            raise ModelError(f"{type(model).__name__} cannot be packed: {reason}")
        backbone.config._attn_implementation = NAME
        _narrow_last_layer(backbone)
    return backbone


def run_packed(
    backbone: nn.Module, packed: Packed, layout: "_Layout", states: Tensor | None = None
) -> Float[Tensor, "T D"]:
    """What the backbone's layers and norm make of the ids, or of `states` in their place."""
    # Four dimensions: transformers builds no mask.  Empty: any attention but ours would refuse it.
    no_mask = torch.empty(1, 1, 0, 0, device=packed.token_ids.device)
    given = {"input_ids": packed.token_ids} if states is None else {"inputs_embeds": states[None]}
    return backbone(
        **given,
        position_ids=packed.positions,
        attention_mask=no_mask,
        use_cache=False,
        packed_layout=layout,
    ).last_hidden_state[0]


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Why this model cannot be packed, or None: its attention has to be plain and causal."""
    backbone: Any = model.get_decoder()
    if not getattr(backbone, "_supports_attention_backend", False):
        return "transformers offers no attention interface for it"
    config = backbone.config
    if config._attn_implementation == NAME:
        return None
    if config.model_type in OUT_OF_REACH:
        return "transformers' attention interface does not reach its attention"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if backbone._is_stateful or kinds - {"sliding_attention"}:
        return f"it has layers that are not plain attention: {sorted(kinds)}"
    for key, meaning in NOT_PLAIN.items():
        if getattr(config, key, None):
            return f"its attention has {meaning} ({key})"
    if any(name.endswith("sinks") for name, _ in backbone.named_parameters()):
        return "its attention has sinks"
    if not all(getattr(part, "is_causal", True) for part in [config, *backbone.modules()]):
        return "its attention has no causal order"
    if config._attn_implementation != "sdpa":
        return f"its attention is computed by {config._attn_implementation}, not by sdpa"
    return _why_misplaced(backbone)


def _why_misplaced(backbone: Any) -> str | None:
    """Why a position and a window are not all that places a token."""
    code = inspect.getsource(inspect.getmodule(type(backbone)) or torch)
    if getattr(backbone.config, "sliding_window", None) and "sliding_window=" not in code:
        return "its attention is not told how long its window is (sliding_window)"
    if depends_on_longest(backbone.config):
        return "its rotary frequencies depend on the longest conversation of a batch"
    for name, part in backbone.named_modules():
        if "position" in name and getattr(part, "padding_idx", None) is not None:
            return "its positions do not count from 0"
    return None


def depends_on_longest(config: Any) -> bool:
    """Whether a batch's longest conversation decides the rotary frequencies of all of it."""
    rope = str(getattr(config, "rope_parameters", None))
    return "'dynamic'" in rope or "'longrope'" in rope


class _Last(local):
    """Where the last layer, now running, is read; None: everywhere."""

    reads: Tensor | None = None
    num_tokens = 0


_LAST = _Last()


def _narrow_last_layer(backbone: Any) -> None:
    """Let what is not attention run where it is read, in models that name their parts as most do.

    By hooks, which hold for gradient checkpointing's second run as well: the layout reaches
    attention only, which notes it for the rest of its layer.
    """
    layer = list(getattr(backbone, "layers", [None]))[-1]
    attention = getattr(layer, "self_attn", None)
    if attention is None or _is_narrowed(attention):
        return
    attention.register_forward_pre_hook(_enter, with_kwargs=True)
    feed_forward = getattr(layer, "mlp", None)
    parts = [getattr(attention, "q_proj", None), getattr(attention, "o_proj", None)]
    for part in [*parts, None if hasattr(feed_forward, "experts") else feed_forward]:
        if part is not None:
            part.register_forward_pre_hook(_narrow)
            part.register_forward_hook(_widen)


def is_inert(hook: object) -> bool:
    """Whether a hook is ours, which do nothing in a model that runs without a layout."""
    return hook in (_enter, _narrow, _widen)


def _is_narrowed(attention: nn.Module) -> bool:
    return _enter in attention._forward_pre_hooks.values()


def _enter(_module: nn.Module, _arguments: Any, keywords: dict[str, Any]) -> None:
    layout: _Layout | None = keywords.get("packed_layout")
    _LAST.reads = None if layout is None else layout.reads
    _LAST.num_tokens = 0 if layout is None else len(layout.depths)


def _narrow(_module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return arguments if _LAST.reads is None else (arguments[0][:, _LAST.reads],)


def _widen(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
    if _LAST.reads is None:
        return output
    whole = output.new_zeros(1, _LAST.num_tokens, output.shape[2])
    return whole.index_copy(1, _LAST.reads, output)


def _attention(
    module: Any,
    query: Float[Tensor, "B H T d"],
    key: Float[Tensor, "B G T d"],
    value: Float[Tensor, "B G T d"],
    attention_mask: Tensor | None,
    *,
    packed_layout: _Layout | None = None,
    **settings: Any,
) -> tuple[Float[Tensor, "B T H d"], None]:
    """transformers' attention function: as ever without a layout."""
    if packed_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if any(settings.get(key) is not None for key in EXTRAS):
        raise ValueError(f"{type(module).__name__}'s attention is not plain")
    window = settings.get("sliding_window")
    options: dict[str, Any] = {"scale": settings.get("scaling"), "enable_gqa": True}
    if _flex_serves(query, value) and not settings.get("dropout"):
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast they are float32
        mask = _block_mask(packed_layout, window)
        found = _compiled_flex_attention()(query, key, value, block_mask=mask, **options)
        return found.transpose(1, 2), None
    options["dropout_p"] = settings.get("dropout", 0.0)
    reads = packed_layout.reads if _is_narrowed(module) else None
    at_ends = reads is not None and packed_layout.are_ends
    # Split once: the gradient of a slice would be as long as the sequence, for every row.
    sizes = [size for row in packed_layout.rows for size in (row.prompt, sum(row.lengths))]
    pieces = list(zip(*(tensor.split(sizes, 2) for tensor in (query, key, value)), strict=True))
    parts = []  # [tokens, H, d] each
    for row, prompt, answers in zip(packed_layout.rows, pieces[::2], pieces[1::2], strict=True):
        begin = 0 if reads is None else row.read_from
        if begin < row.prompt and not at_ends:
            mask = _mask(packed_layout, row, "prompt", window, begin)
            parts.append(_attend((prompt[0][:, :, begin:], *prompt[1:]), mask, options)[0])
        if row.lengths:
            mine = (
                answers[0][:, :, row.ends].transpose(0, 2) if at_ends else _padded(answers[0], row)
            )
            seen = [
                torch.cat([shared.expand(len(row.lengths), -1, -1, -1), _padded(own, row)], dim=2)
                for shared, own in zip(prompt[1:], answers[1:], strict=True)
            ]
            mask = _mask(packed_layout, row, "ends" if at_ends else "answers", window)
            found = _attend([mine, *seen], mask, options)
            is_ragged = not at_ends and row.padded is not None
            parts.append(found[row.inside] if is_ragged else found.flatten(0, 1))
    found = torch.cat(parts)[None]
    if reads is not None:
        found = found.new_zeros(1, query.shape[2], *found.shape[2:]).index_copy(1, reads, found)
    return found, None


def _flex_serves(query: Tensor, value: Tensor) -> bool:
    """Flex attention is fast on a GPU only, and wants heads of 16 or more."""
    return query.is_cuda and min(query.shape[3], value.shape[3]) >= 16


def _attend(states: Sequence[Tensor], mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Attention of [N, H, tokens, d] as [N, tokens, H, d]; causal without a mask."""
    query, key, value = states
    chosen: dict[str, Any] = options | {"attn_mask": mask, "is_causal": mask is None}
    return scaled_dot_product_attention(query, key, value, **chosen).transpose(1, 2)


def _padded(tensor: Tensor, row: _Row) -> Tensor:
    """A row's answers from [1, H, tokens, d] to [K, H, R, d]; padding stands behind them."""
    if row.padded is not None:
        return tensor[0][:, row.padded].transpose(0, 1)
    return tensor[0].unflatten(1, row.inside.shape).transpose(0, 1)


def _mask(
    layout: _Layout, row: _Row, queries: str, window: int | None, begin: int = 0
) -> Bool[Tensor, "..."] | None:
    """Which keys each query sees, by how far back they stand; None: all up to itself."""
    place = (id(row), queries, window, begin)
    if place not in layout.masks:
        keys = torch.arange(row.prompt + (0 if queries == "prompt" else row.inside.shape[1]))
        depths = {
            "prompt": keys[begin:],
            "answers": keys[row.prompt :],
            "ends": row.prompt + torch.tensor(row.lengths)[:, None, None] - 1,
        }[queries]
        back = depths[..., None] - keys
        keep = back >= 0 if window is None else (back >= 0) & (back < window)
        is_causal = back.shape[-2:] == 2 * keys.shape and (window is None or len(keys) <= window)
        layout.masks[place] = None if is_causal else keep.to(layout.depths.device)
    return layout.masks[place]


def _block_mask(layout: _Layout, window: int | None) -> BlockMask:
    """The same rule over the whole sequence, for flex attention."""
    if window not in layout.masks:
        # Tensors of their own, for the window too: one compiled kernel then serves all batches.
        rows, answers, depths = (part.clone() for part in (*layout.tags, layout.depths))
        size = len(depths)
        lowest = depths - (size if window is None else window)
        layout.masks[window] = create_block_mask(
            lambda _batch, _head, query, key: (
                (rows[query] == rows[key])
                & ((answers[key] < 0) | (answers[key] == answers[query]))
                & (depths[key] <= depths[query])
                & (depths[key] > lowest[query])
            ),
            None,
            None,
            size,
            size,
            depths.device,
        )
    return layout.masks[window]


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=True)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

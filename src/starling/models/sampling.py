"""From logits to a token: pure functions of tensors, one row of a batch like any other.

A token is drawn by inverting its row's distribution at the row's own uniform, so that a row's
draw depends on nothing but its own logits.

Shapes: B rows, V vocabulary.  Logprobs are nats.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Logits = Float[Tensor, "B V"]
PerRow = Float[Tensor, " B"]
Tokens = Int[Tensor, " B"]

BLOCK = 128
# Of the total: above what float32's exp (one unit in the last place, 1.2e-7) can be wrong.
MARGIN = 1e-6


def draw_tokens(
    logits: Logits,
    temperatures: PerRow,
    uniforms: Float[Tensor, " B"],
    top_k: Tokens | None = None,
    top_p: PerRow | None = None,
) -> tuple[Tokens, PerRow]:
    """Draw one token per row where its cumulative distribution passes `uniforms` (in [0, 1)).

    A row of temperature 0 takes its largest logit.  `top_k` 0 and `top_p` 1 keep every token.
    Returns tokens and their logprobs at the row's temperature (a greedy row's at 1), over the whole
    vocabulary.
    """
    greedy = temperatures == 0
    scale = torch.where(greedy, 1.0, temperatures).to(torch.float32)
    logits = logits.float()
    logprobs = torch.log_softmax(logits if (scale == 1).all() else logits / scale[:, None], dim=-1)
    if greedy.all():
        tokens = logits.argmax(dim=-1)
    else:
        kept = logprobs if top_k is None or top_p is None else truncate(logprobs, top_k, top_p)
        tokens = _invert(kept, uniforms.double())
        if greedy.any():
            tokens = torch.where(greedy, logits.argmax(dim=-1), tokens)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def untempered_logprobs(logits: Logits, tokens: Tokens) -> PerRow:
    """The tokens' logprobs at temperature 1."""
    chosen = logits.float().gather(1, tokens[:, None])[:, 0]
    return chosen - logits.float().logsumexp(dim=-1)


def truncate(logprobs: Logits, top_k: Tokens, top_p: PerRow) -> Logits:
    """Rule out (-inf) all but the `top_k` largest, then all but the fewest that reach `top_p`.

    Tokens as likely as the k-th stay, as in transformers; the likeliest token always does.
    """
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    last = torch.where(top_k > 0, top_k, logprobs.shape[1]).clamp(max=logprobs.shape[1]) - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(1, last[:, None]), -torch.inf)
    share = ordered.double().softmax(dim=-1)
    before = share.cumsum(dim=-1) - share
    # A row of top_p 1 loses nothing, whatever the sum rounds to.
    out = (before >= top_p.double()[:, None]) & (top_p < 1)[:, None]
    ordered = ordered.masked_fill(out, -torch.inf)
    return torch.empty_like(logprobs).scatter_(1, order, ordered)


def _invert(logprobs: Logits, uniforms: Float[Tensor, " B"]) -> Tokens:
    """The same tokens as `_invert_in_double`, most of them without a pass over V in float64.

    Block sums say in which block the uniform falls, that block's own sums in which token.  Both
    start from float32 exponentials, so a uniform within `MARGIN` of a token's edge is done again.
    """
    rows, width = logprobs.shape
    num_blocks = -(-width // BLOCK)
    weights = logprobs.new_zeros(rows, num_blocks * BLOCK)
    torch.exp(logprobs, out=weights[:, :width])
    blocks = weights.view(rows, num_blocks, BLOCK)
    ends = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = uniforms[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp(max=num_blocks - 1)  # [B, 1]
    inside = blocks[torch.arange(rows, device=logprobs.device), block[:, 0]].double()
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    edges = torch.cat([start, start + inside.cumsum(dim=-1)], dim=-1)  # [B, BLOCK + 1]
    place = (torch.searchsorted(edges, target, right=True) - 1).clamp(0, BLOCK - 1)
    tokens = (block * BLOCK + place)[:, 0]
    margin = MARGIN * ends[:, -1:]
    near = (target - edges.gather(1, place) < margin) | (
        edges.gather(1, place + 1) - target < margin
    )
    again = near[:, 0].nonzero()[:, 0]
    if len(again):
        tokens[again] = _invert_in_double(logprobs[again], uniforms[again])
    return tokens


def _invert_in_double(logprobs: Logits, uniforms: Float[Tensor, " B"]) -> Tokens:
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return drawn.clamp(max=logprobs.shape[1] - 1)

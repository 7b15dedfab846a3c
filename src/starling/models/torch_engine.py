"""The in-process engine: batched decoding with a key-value cache.

A row's randomness is its own: its uniforms are drawn from its request's seed before decoding, so a
sample does not depend on its neighbours (up to the rounding of batched matrix products).

Shapes: B rows of one batch, T cached positions, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from starling.base.errors import DataError
from starling.models.interfaces import GenerationRequest, Sample


class Step(NamedTuple):
    """One decoded token of one row of the batch."""

    row: int
    token: int
    logprob: float


def sample_tokens(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the softmax's distribution at the row's uniform.

    logits [B, V], temperatures [B] (0 is greedy), uniforms [B] in [0, 1).  Returns tokens and their
    logprobs (nats) at the row's temperature; a greedy row's at temperature 1.
    """
    greedy = temperatures == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperatures)[:, None]
    logprobs = torch.log_softmax(scaled, dim=-1)
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    target = uniforms.double()[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    tokens = torch.where(greedy, logits.argmax(dim=-1), drawn)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


class TorchEngine:
    """Decodes with a transformers model in this process; satisfies `interfaces.Engine`."""

    def __init__(
        self, model: PreTrainedModel, *, stop_ids: frozenset[int], pad_id: int, max_rows: int = 128
    ) -> None:
        self.model = model
        self.stop_ids = stop_ids
        self.pad_id = pad_id
        self.max_rows = max_rows
        self.version = 0

    def sync(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Take `weights` (by parameter name); tensors that are the model's own cost nothing."""
        own = self.model.state_dict()
        unknown = sorted(set(weights) - set(own))
        if unknown:
            raise ValueError(f"weights the model does not have: {', '.join(unknown[:5])}")
        with torch.no_grad():
            for name, tensor in weights.items():
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
        self.version = version

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Sample]:
        """Decode in batches of `max_rows`, in the order given; samples come as they end."""
        pending = list(requests)
        for start in range(0, len(pending), self.max_rows):
            yield from self._generate_batch(pending[start : start + self.max_rows])

    def stream(self, request: GenerationRequest) -> Iterator[int]:
        """Yield one request's tokens as they are decoded, its end marker included."""
        for steps in self._decode([request]):
            yield from (step.token for step in steps)

    def _generate_batch(self, batch: Sequence[GenerationRequest]) -> Iterator[Sample]:
        ids: list[list[int]] = [[] for _ in batch]
        logprobs: list[list[float]] = [[] for _ in batch]
        for steps in self._decode(batch):
            for row, token, logprob in steps:
                ids[row].append(token)
                logprobs[row].append(logprob)
                stopped = token in self.stop_ids
                if stopped or len(ids[row]) == batch[row].sampling.max_tokens:
                    yield Sample(
                        request_id=batch[row].id,
                        ids=tuple(ids[row]),
                        logprobs=tuple(logprobs[row]),
                        finish_reason="stop" if stopped else "length",
                        weight_version=self.version,
                    )

    def _decode(self, batch: Sequence[GenerationRequest]) -> Iterator[list[Step]]:
        """Yield each position's tokens for the rows still running; ended rows leave the batch."""
        self._check_lengths(batch)
        device = self.model.device
        max_tokens = [request.sampling.max_tokens for request in batch]
        uniforms = torch.stack([_uniforms(request, max(max_tokens)) for request in batch]).to(
            device
        )
        temperatures = torch.tensor([r.sampling.temperature for r in batch], device=device)
        token_ids, mask = self._left_padded(batch)
        position_ids = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        rows = torch.arange(len(batch), device=device)
        cache = DynamicCache(config=self.model.config)
        for position in range(max(max_tokens)):
            logits = self._forward(token_ids, mask, position_ids, cache)
            tokens, logprobs = sample_tokens(logits, temperatures[rows], uniforms[rows, position])
            steps = [
                Step(*step)
                for step in zip(rows.tolist(), tokens.tolist(), logprobs.tolist(), strict=True)
            ]
            yield steps
            running = [
                index
                for index, step in enumerate(steps)
                if step.token not in self.stop_ids and position + 1 < max_tokens[step.row]
            ]
            if not running:
                return
            if len(running) < len(steps):
                keep = torch.tensor(running, device=device)
                cache.batch_select_indices(keep)
                rows, tokens, mask = rows[keep], tokens[keep], mask[keep]
                position_ids = position_ids[keep]
            token_ids = tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            position_ids = position_ids[:, -1:] + 1

    def _forward(self, token_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        with torch.no_grad():
            output: Any = self.model(
                input_ids=token_ids,
                attention_mask=mask.long(),
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1]

    def _left_padded(self, batch: Sequence[GenerationRequest]) -> tuple[Tensor, Tensor]:
        width = max(len(request.prompt_ids) for request in batch)
        rows = [[self.pad_id] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in batch]
        masks = [[False] * (width - len(r.prompt_ids)) + [True] * len(r.prompt_ids) for r in batch]
        device = self.model.device
        return torch.tensor(rows, device=device), torch.tensor(masks, device=device)

    def _check_lengths(self, batch: Sequence[GenerationRequest]) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for request in batch:
            if request.sampling.max_tokens < 1:
                raise ValueError(
                    f"request {request.id}: max_tokens is {request.sampling.max_tokens}; a sample "
                    "has at least one token"
                )
            needed = len(request.prompt_ids) + request.sampling.max_tokens
            if limit is not None and needed > limit:
                raise DataError(
                    f"request {request.id}: {len(request.prompt_ids)} prompt tokens and up to "
                    f"{request.sampling.max_tokens} more do not fit the model's {limit} positions; "
                    "shorten the prompt or lower the response limit"
                )


def _uniforms(request: GenerationRequest, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(request.sampling.seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)

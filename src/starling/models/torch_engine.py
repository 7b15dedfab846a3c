"""The in-process engine: rows enter a running batch as others leave it.

A row's randomness is its own: its uniforms are drawn from its request's seed, so a sample does not
depend on its neighbours (up to the rounding of batched matrix products).
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from starling.base.seeding import derive_seed
from starling.models.causal_lm import Batch
from starling.models.decoder import SlotCache, decoder_for
from starling.models.interfaces import GenerationRequest, Sample, check_request
from starling.models.sampling import draw_tokens, untempered_logprobs

Decode = Callable[[Sequence[int]], str]

# Tokens encoded at once: enough for full speed, few enough to stay in the processor's cache.
PREFILL_TOKENS = 2048
# Waiting rows enter when this part of the batch is free, so that they are encoded together.
ADMIT_SHARE = 16
# Tokens of no or partial text that may stand among those that complete a stop string.
SILENT_TOKENS = 8


class TorchEngine:
    """Decodes with a transformers model in this process; satisfies `interfaces.Engine`."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_ids: frozenset[int],
        pad_id: int,
        max_rows: int = 128,
        decode: Decode | None = None,
    ) -> None:
        """`decode` turns a response's ids into text; without it there are no stop strings."""
        self.model = model
        self.stop_ids = stop_ids
        self.pad_id = pad_id
        self.max_rows = max_rows
        self.decode = decode
        self.version = 0
        self.decoder = decoder_for(model)
        self._batches: WeakSet[_Batch] = WeakSet()
        self._lock = threading.Lock()

    def sync(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Take `weights` (by parameter name); tensors that are the model's own are not copied."""
        own = self.model.state_dict()
        unknown = sorted(set(weights) - set(own))
        if unknown:
            raise ValueError(f"weights the model does not have: {', '.join(unknown[:5])}")
        with torch.no_grad():
            for name, tensor in weights.items():
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
        self.decoder = decoder_for(self.model)
        self.decoder.refresh()
        self.version = version

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Sample]:
        """Decode `max_rows` samples at a time, in the order given; they come as they end."""
        return self._batch(list(requests)).samples()

    def stream(self, request: GenerationRequest) -> Generator[int, None, Sample]:
        """Yield one sample's tokens as they are decoded, its end marker included."""
        if request.num_samples != 1:
            raise ValueError(f"request {request.id}: a stream is of one sample")
        return self._batch([request]).tokens()

    def cancel(self, request_id: str) -> None:
        """End a request's samples where they are, running or waiting; from any thread."""
        with self._lock:
            for batch in self._batches:
                if request_id in batch.request_ids:
                    batch.cancelled.add(request_id)

    def _batch(self, requests: Sequence[GenerationRequest]) -> "_Batch":
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for request in requests:
            check_request(request, limit, f"the model's {limit} positions")
            if request.sampling.stop and self.decode is None:
                raise ValueError(
                    f"request {request.id}: stop strings need an engine with a `decode`"
                )
        batch = _Batch(self, requests)
        with self._lock:
            self._batches.add(batch)
        return batch


@dataclass(eq=False)
class _Row:
    """A sample in the making; its uniforms, one per position, are drawn before it starts."""

    request: GenerationRequest
    index: int
    version: int = 0
    uniforms: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def start(self, version: int) -> None:
        self.version = version
        sampling = self.request.sampling
        if sampling.temperature == 0:
            self.uniforms = [0.0] * sampling.max_tokens
            return
        seed = sampling.seed
        if self.index:
            seed = derive_seed(seed, "models/sample", self.index)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(sampling.max_tokens, generator=generator, dtype=torch.float64)
        self.uniforms = drawn.tolist()

    @property
    def position(self) -> int:
        """Of the next token to be read."""
        return len(self.request.prompt_ids) - 1 + len(self.ids)

    def sample(self, finish_reason: str) -> Sample:
        assert finish_reason in ("stop", "length", "cancelled")
        return Sample(
            request_id=self.request.id,
            ids=tuple(self.ids),
            logprobs=tuple(self.logprobs),
            finish_reason=finish_reason,
            weight_version=self.version,
            index=self.index,
        )


class _Batch:
    """The rows that one call decodes: those in slots 0, 1, ..., and those that wait."""

    def __init__(self, engine: TorchEngine, requests: Sequence[GenerationRequest]) -> None:
        self.engine = engine
        self.waiting = deque(_Row(r, i) for r in requests for i in range(r.num_samples))
        self.rows: list[_Row] = []
        self.cache = SlotCache()
        self.request_ids = {request.id for request in requests}
        self.cancelled: set[str] = set()

    def samples(self) -> Iterator[Sample]:
        self.engine.decoder.refresh()
        while self.rows or self.waiting:
            yield from self._take_cancelled()
            self._admit()
            if self.rows:
                yield from self._step()

    def tokens(self) -> Generator[int, None, Sample]:
        self.engine.decoder.refresh()
        [row] = self.waiting
        while True:
            ended = self._take_cancelled()
            self._admit()
            if not ended:
                ended = self._step()
                yield row.ids[-1]
            if ended:
                return ended[0]

    def _take_cancelled(self) -> list[Sample]:
        if not self.cancelled:
            return []
        gone = [row for row in [*self.rows, *self.waiting] if row.request.id in self.cancelled]
        self.waiting = deque(row for row in self.waiting if row not in gone)
        self._leave([n for n, row in enumerate(self.rows) if row in gone])
        return [row.sample("cancelled") for row in gone]

    @torch.no_grad()
    def _admit(self) -> None:
        """Move waiting rows into free slots, and encode their prompts, equal ones once."""
        free = self.engine.max_rows - len(self.rows)
        if not self.waiting or (self.rows and free * ADMIT_SHARE < self.engine.max_rows):
            return
        slots: dict[tuple[int, ...], list[int]] = {}
        while self.waiting and len(self.rows) < self.engine.max_rows:
            row = self.waiting.popleft()
            row.start(self.engine.version)
            slots.setdefault(row.request.prompt_ids, []).append(len(self.rows))
            self.rows.append(row)
        self._fit()
        for group in _groups(sorted((prompt for prompt in slots if len(prompt) > 1), key=len)):
            self._encode(group, [slots[prompt][0] for prompt in group])
        for prompt, [source, *targets] in slots.items():
            self.cache.copy(source, targets, len(prompt) - 1)

    def _fit(self) -> None:
        self.cache.fit(len(self.rows), max(row.position for row in self.rows) + 1)

    def _encode(self, prompts: Sequence[tuple[int, ...]], slots: list[int]) -> None:
        device = self.engine.model.device
        padded = Batch([prompt[:-1] for prompt in prompts], self.engine.pad_id, str(device))
        self.engine.decoder.encode(padded.token_ids, torch.tensor(slots, device=device), self.cache)

    @torch.no_grad()
    def _step(self) -> list[Sample]:
        """Decode one token of every row; those that end give up their slots."""
        rows, device = self.rows, self.engine.model.device
        positions = [row.position for row in rows]
        self._fit()
        logits = self.engine.decoder.step(
            torch.tensor([(row.ids or row.request.prompt_ids)[-1] for row in rows], device=device),
            torch.tensor(positions, device=device),
            self.cache,
        )
        tokens, logprobs = self._draw(logits)
        ended: dict[int, Sample] = {}
        for slot, (row, token, logprob) in enumerate(zip(rows, tokens, logprobs, strict=True)):
            row.ids.append(token)
            row.logprobs.append(logprob)
            if self._has_stopped(row):
                ended[slot] = row.sample("stop")
            elif len(row.ids) == row.request.sampling.max_tokens:
                ended[slot] = row.sample("length")
        self._leave(list(ended))
        return list(ended.values())

    def _draw(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """One token per row, and its logprob in the row's convention."""
        samplings = [row.request.sampling for row in self.rows]

        def column(values: Iterable[float], dtype: torch.dtype | None = None) -> Tensor:
            return torch.tensor(list(values), dtype=dtype, device=logits.device)

        truncation: tuple[Tensor, ...] = ()
        if any(s.temperature and (s.top_k or s.top_p < 1) for s in samplings):
            truncation = column(s.top_k for s in samplings), column(s.top_p for s in samplings)
        tokens, logprobs = draw_tokens(
            logits,
            column(s.temperature for s in samplings),
            column((row.uniforms[len(row.ids)] for row in self.rows), torch.float64),
            *truncation,
        )
        chosen = [n for n, s in enumerate(samplings) if s.logprobs == "untempered"]
        if chosen:
            logprobs[chosen] = untempered_logprobs(logits[chosen], tokens[chosen])
        return tokens.tolist(), logprobs.tolist()

    def _leave(self, slots: Sequence[int]) -> None:
        """Free these slots; the last rows move into them, so that no gap is computed."""
        for slot in sorted(slots, reverse=True):
            last = self.rows.pop()
            if slot < len(self.rows):
                self.rows[slot] = last
                self.cache.copy(len(self.rows), [slot], last.position)

    def _has_stopped(self, row: _Row) -> bool:
        sampling, engine = row.request.sampling, self.engine
        if row.ids[-1] in engine.stop_ids or row.ids[-1] in sampling.stop_ids:
            return True
        if not sampling.stop or engine.decode is None:
            return False
        # A string ends with the last token or ended the row before, so only the end is decoded.
        reach = max(len(stop.encode()) for stop in sampling.stop) + SILENT_TOKENS
        text = engine.decode(row.ids[-reach:])
        return any(stop in text for stop in sampling.stop)


def _groups(prompts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Neighbours by length, in groups of at most `PREFILL_TOKENS` with their padding."""
    group: list[tuple[int, ...]] = []
    for prompt in prompts:
        if group and len(prompt) * (len(group) + 1) > PREFILL_TOKENS:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group

"""Quantised GGUF files on the CPU: llama.cpp in this process, through the `xllamacpp` wheel.

Every token is a call of its own, whose prompt is all ids so far; the key-value cache holds all but
the last.  In longer calls llama.cpp does not report tokens that end within a character (half an
emoji); so ids, stops and cancellation are exact, at a millisecond or two per token.

A sample's seed is its own, token by token: streamed or not, it is the same.  What else runs, and
what the cache holds from before, changes results by rounding only.
"""

import importlib
import math
import os
import secrets
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starling.base.errors import DataError, ModelError
from starling.base.hashing import hash_file, hash_json
from starling.base.seeding import derive_seed
from starling.data.chat import ChatCodec, build_codec
from starling.data.gguf import gguf_tokenizer, read_metadata, stop_ids
from starling.models.interfaces import (
    GenerationRequest,
    Request,
    Sample,
    Sampling,
    check_request,
    returned,
)
from starling.models.loading import choose_format
from starling.models.local import Local

if TYPE_CHECKING:
    from torch import Tensor

# Samples that decode side by side; their caches stay for the conversation's next turn.
SLOTS = 4
# Where the model knows more and nothing is asked for: 1 GiB of cache at Mistral-7B's shape.
LONGEST_CONTEXT = 8192
# Prompt tokens per call: as long as Ctrl-C or a cancellation may have to wait.
PREFILL = 128


class GgufEngine:
    """Decodes with llama.cpp; satisfies `interfaces.Engine`.

    `context` cached tokens are shared: a sample starts when there is room for all it may need.
    """

    def __init__(self, server: Any, codec: ChatCodec, *, context: int, vocab_size: int) -> None:
        self.context = context
        self._server = server
        self._codec = codec
        self._vocab_size = vocab_size
        self._cancelled: set[str] = set()
        self._changed = threading.Condition()
        self._room = context
        # What each free slot's cache begins with.
        self._free: dict[int, tuple[int, ...]] = dict.fromkeys(range(SLOTS), ())

    def sync(self, weights: "Mapping[str, Tensor]", version: int) -> None:
        """Refuse: a quantised file's weights stay what they are."""
        raise ModelError("a GGUF file takes no new weights; train the model that it was made from")

    def cancel(self, request_id: str) -> None:
        """End a request's running samples before their next token, as "cancelled"."""
        self._cancelled.add(request_id)

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Sample]:
        """Decode up to `SLOTS` samples at a time; they come as they end."""
        pending = [self._admit(request) for request in requests]
        with ThreadPoolExecutor(SLOTS) as pool:
            running = [
                pool.submit(returned, self._decode(request, index))
                for request in pending
                for index in range(request.num_samples)
            ]
            try:
                for sample in as_completed(running):
                    yield sample.result()
            finally:
                # Where the caller wants no more, the samples still to come end at once.
                self._cancelled.update(request.id for request in pending)

    def stream(self, request: GenerationRequest) -> Generator[int, None, Sample]:
        """Yield the first sample's tokens as they are decoded, and return the sample."""
        return (yield from self._decode(self._admit(request), 0))

    def _admit(self, request: GenerationRequest) -> GenerationRequest:
        check_request(request, self.context, f"the {self.context} tokens of context")
        self._cancelled.discard(request.id)
        return request

    def _decode(self, request: GenerationRequest, index: int) -> Generator[int, None, Sample]:
        sampling, prompt = request.sampling, [*request.prompt_ids]
        ends = self._codec.stop_ids | set(sampling.stop_ids)
        ids: list[int] = []
        logprobs: list[float] = []
        finish_reason = "length"
        with self._slot(request) as slot:
            for end in range(PREFILL, len(prompt), PREFILL):
                if request.id not in self._cancelled:
                    self._call(prompt[:end], slot, n_predict=0)
            while finish_reason == "length" and len(ids) < sampling.max_tokens:
                if request.id in self._cancelled:
                    finish_reason = "cancelled"
                    break
                # 2**32 - 1 would mean: no seed.
                seed = derive_seed(sampling.seed, "gguf", index, len(ids)) % (2**32 - 1)
                token, logprob = self._next(prompt + ids, slot, sampling, seed)
                ids.append(token)
                logprobs.append(logprob)
                yield token
                text = self._codec.decode_response(ids) if sampling.stop else ""
                if token in ends or any(stop in text for stop in sampling.stop):
                    finish_reason = "stop"
        return Sample(request.id, tuple(ids), tuple(logprobs), finish_reason, 0, index)

    def _next(self, ids: list[int], slot: int, sampling: Sampling, seed: int) -> tuple[int, float]:
        """Draw one token, with its logprob under the asked convention."""
        temperature, everything = sampling.temperature, self._vocab_size
        # Probabilities come at temperature 1 alone: another's normaliser takes all (half a second).
        tempered = sampling.logprobs == "tempered" and temperature not in (0, 1)
        drawn = self._call(
            ids,
            slot,
            samplers=["temperature", "top_k", "top_p"],
            temperature=temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=seed,
            n_probs=everything if tempered else 1,
        )
        [token] = drawn["tokens"]
        if "completion_probabilities" not in drawn:
            # The token ends within a character.  Probabilities are those before any bias: force a
            # token that does not, and look the drawn one up.
            forced = [[min(self._codec.stop_ids), 1e9]]
            drawn = self._call(ids, slot, samplers=[], logit_bias=forced, n_probs=everything)
        [entry] = drawn["completion_probabilities"]
        known = {item["id"]: item["logprob"] for item in [*entry["top_logprobs"], entry]}
        if not tempered:
            return token, known[token]
        highest = max(known.values())
        total = math.fsum(math.exp((value - highest) / temperature) for value in known.values())
        return token, (known[token] - highest) / temperature - math.log(total)

    def _call(self, ids: list[int], slot: int, **options: Any) -> dict[str, Any]:
        """llama.cpp's native answer; only the samplers that `options` names are at work."""
        body = {"prompt": ids, "id_slot": slot, "n_predict": 1, "mirostat": 0, "cache_prompt": True}
        flags = {"return_tokens": True, "verbose": True}
        answer = self._server.handle_completions(body | flags | options)
        if "error" in answer:
            raise DataError(f"llama.cpp refuses the prompt: {answer['error']['message']}")
        return answer["__verbose"]

    @contextmanager
    def _slot(self, request: GenerationRequest) -> Iterator[int]:
        """A free slot, the one whose cache shares most with the prompt, once there is room."""
        prompt = request.prompt_ids
        needed = len(prompt) + request.sampling.max_tokens
        with self._changed:
            self._changed.wait_for(lambda: self._free and self._room >= needed)
            shared = {s: os.path.commonprefix([held, prompt]) for s, held in self._free.items()}
            slot = max(shared, key=lambda s: len(shared[s]))
            del self._free[slot]
            self._room -= needed
        try:
            yield slot
        finally:
            with self._changed:
                self._free[slot] = prompt
                self._room += needed
                self._changed.notify_all()


class _Quantised(Local):
    def generation_request(self, request: Request) -> GenerationRequest:
        """The request for the logprobs that cost nothing: a reply holds none."""
        asked = super().generation_request(request)
        return replace(asked, sampling=replace(asked.sampling, logprobs="untempered"))


def load_gguf(
    path: str | Path,
    *,
    chat_format: str | None = None,
    threads: int | None = None,
    context: int | None = None,
) -> Local:
    """Load a GGUF file with llama.cpp; its identity follows its content.

    `context` (absent, `LONGEST_CONTEXT`) is shared by all that runs at a time, and never more than
    the model knows.  The chat format is `chat_format`, or what markers or the file's template show.
    Raises ModelError with what to do.
    """
    path = Path(path)
    metadata = read_metadata(path)
    tokenizer = gguf_tokenizer(path, metadata)
    name = choose_format(str(path), tokenizer, chat_format)
    codec = build_codec(name, tokenizer, stop_ids(metadata))
    architecture = metadata.get("general.architecture")
    trained = metadata.get(f"{architecture}.context_length", LONGEST_CONTEXT)
    if type(trained) is not int or trained < 1:
        raise ModelError(f"{path}: its context_length is {trained!r}, no length; get it again")
    context = min(context or LONGEST_CONTEXT, trained)
    server = _start(path, f"{architecture}", threads, context)
    vocab_size = len(metadata["tokenizer.ggml.tokens"])
    engine = GgufEngine(server, codec, context=context, vocab_size=vocab_size)
    identity = hash_json({"model": hash_file(path), "chat_format": name})
    return _Quantised(engine, codec, identity=identity, context_length=context)


def _start(path: Path, architecture: str, threads: int | None, context: int) -> Any:
    try:
        llama: Any = importlib.import_module("xllamacpp")
    except ImportError as error:
        raise ModelError(
            'GGUF files need llama.cpp, which is not installed: pip install "starling-rlaif[gguf]"'
        ) from error
    params = llama.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.kv_unified = context, SLOTS, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or -1
    # Quiet; no copies of old conversations in memory; nothing shrunk to fit without a word.
    params.verbosity, params.cache_ram_mib, params.fit_params = -1, 0, False
    # xllamacpp opens a port on this machine, which nothing here uses: let nobody in.
    params.api_keys, params.ui = [secrets.token_hex()], False
    try:
        server = llama.Server(params)
        # A server that is dropped before its loop runs waits for ever.  This waits for the loop.
        server.handle_completions({"prompt": [0], "n_predict": 0})
        return server
    except RuntimeError as error:
        raise ModelError(
            f"{path}: llama.cpp cannot load it: the file is cut or damaged, the memory too small "
            f"({path.stat().st_size / 1e9:.1f} GB and the cache), or its architecture "
            f"{architecture!r} newer than the installed xllamacpp"
        ) from error

"""Race the in-process engine against transformers' `generate()`; prints JSON.

Both sides sample at temperature 1 from the same random weights, answer the same prompts, at most
`batch` rows at a time, one after the other within every round.  No text of a random model means
anything, so the lengths are drawn by seed and both sides are told them: the engine as each
request's `max_tokens`, `generate()` by a stopping criterion, which ends a row as an end marker
would.  `fixed`: every prompt and every answer has exactly the mean length.  `ragged`: prompts
uniform in 0.5-1.5 x the mean, answers uniform in 1..maximum, so with a mean of half of it.

On a CPU one thread is used and its process time counted, which a busy machine disturbs least.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import MistralConfig, MistralForCausalLM, StoppingCriteria, StoppingCriteriaList

from starling.models.interfaces import GenerationRequest, Sampling
from starling.models.torch_engine import TorchEngine

# hidden, layers, heads, key-value heads, intermediate, vocabulary
MODELS = {"tiny": (256, 4, 8, 4, 768, 2048), "m50": (512, 8, 8, 4, 1536, 32002)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """Prompts, and how many tokens each is answered with."""

    prompts: list[list[int]]
    answers: list[int]


class EndAt(StoppingCriteria):
    """Ends each row at its own length."""

    def __init__(self, lengths: torch.Tensor) -> None:
        self.lengths = lengths

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return input_ids.shape[1] >= self.lengths


def new_model(name: str, dtype: torch.dtype, device: str) -> Any:
    """A random model of the named shape."""
    hidden, layers, heads, kv_heads, intermediate, vocab = MODELS[name]
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: Any = MistralForCausalLM(config)
    return model.to(dtype).to(device).eval()


def new_work(workload: str, count: int, vocab: int, options: argparse.Namespace) -> Work:
    """`count` prompts of random tokens with their answers' lengths."""
    random = torch.Generator().manual_seed(1)

    def lengths(low: int, high: int) -> list[int]:
        return torch.randint(low, high + 1, (count,), generator=random).tolist()

    mean, most = options.prompt_tokens, options.answer_tokens
    fixed = workload == "fixed"
    prompt_lengths = [mean] * count if fixed else lengths(mean // 2, mean * 3 // 2)
    answers = [most] * count if fixed else lengths(1, most)
    prompts = [torch.randint(3, vocab, (n,), generator=random).tolist() for n in prompt_lengths]
    return Work(prompts, answers)


def run_transformers(model: Any, work: Work, batch: int) -> int:
    """Answer batch by batch, padded on the left; returns the tokens that were asked for."""
    for start in range(0, len(work.prompts), batch):
        prompts = work.prompts[start : start + batch]
        answers = work.answers[start : start + batch]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
        ends = torch.tensor(answers, device=model.device) + width
        model.generate(
            ids,
            attention_mask=(ids != 0).long(),
            do_sample=True,
            top_k=0,
            max_new_tokens=max(answers),
            stopping_criteria=StoppingCriteriaList([EndAt(ends)]),
            pad_token_id=0,
        )
    return sum(work.answers)


def run_engine(engine: TorchEngine, work: Work) -> int:
    """Answer everything; returns the tokens that came back."""
    pairs = zip(work.prompts, work.answers, strict=True)
    requests = [
        GenerationRequest(str(n), tuple(prompt), Sampling(max_tokens=answer, seed=n))
        for n, (prompt, answer) in enumerate(pairs)
    ]
    return sum(len(sample.ids) for sample in engine.generate(requests))


def seconds(device: str) -> float:
    """Process time on a CPU, wall time on a device."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """The best rate at which this machine multiplies two 1024 x 1024 matrices, in flop/s."""
    left, right = torch.randn(2, 1024, 1024).to(dtype).to(device)
    times = []
    for _ in range(10):
        start = seconds(device)
        torch.mm(left, right)
        times.append(seconds(device) - start)
    return 2 * 1024**3 / min(times)


def matmul_flops(model: Any, work: Work) -> int:
    """What the matrices alone cost: every token once, the head for every token of an answer."""
    head = model.lm_head.weight.numel()
    layers = sum(p.numel() for p in model.model.layers.parameters())
    answered = sum(work.answers)
    read = answered + sum(map(len, work.prompts)) - len(work.prompts)
    return 2 * (read * layers + answered * head)


def race(name: str, workload: str, batch: int, options: argparse.Namespace, rate: float) -> dict:
    """One cell: the median and the spread over rounds of the ratio of the two sides' times."""
    model = new_model(name, DTYPES[options.dtype], options.device)
    waves = options.waves if workload == "ragged" else 1
    work = new_work(workload, waves * batch, model.config.vocab_size, options)
    engine = TorchEngine(model, stop_ids=frozenset(), pad_id=0, max_rows=batch)
    sides = (lambda: run_transformers(model, work, batch), lambda: run_engine(engine, work))
    times: list[list[float]] = [[], []]
    for number in range(options.rounds + 1):
        for side, run in enumerate(sides):
            gc.collect()
            start = seconds(options.device)
            with torch.no_grad():
                tokens = run()
            assert tokens == sum(work.answers)
            # The first round warms both up and is not counted.
            if number:
                times[side].append(seconds(options.device) - start)
    ratios = [theirs / ours for theirs, ours in zip(*times, strict=True)]
    theirs, ours = map(statistics.median, times)
    bound = matmul_flops(model, work) / rate
    cell = {
        "model": name,
        "workload": workload,
        "batch": batch,
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "engine_tokens_per_second": round(sum(work.answers) / ours, 1),
        "transformers_tokens_per_second": round(sum(work.answers) / theirs, 1),
        "engine_matmul_share": round(bound / ours, 2),
        "transformers_matmul_share": round(bound / theirs, 2),
    }
    print(cell, file=sys.stderr, flush=True)
    return cell


def main() -> None:
    """Race every cell that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument(
        "--workloads", nargs="+", choices=["fixed", "ragged"], default=["fixed", "ragged"]
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--waves", type=int, default=4, help="ragged: requests per row of a batch")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="mean")
    parser.add_argument("--answer-tokens", type=int, default=64, help="maximum")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rate = matmul_rate(DTYPES[options.dtype], options.device)
    cells = [
        race(name, workload, batch, options, rate)
        for name in options.models
        for workload in options.workloads
        for batch in options.batches
    ]
    environment = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "clock": "process CPU seconds, 1 thread" if options.device == "cpu" else "wall seconds",
        "matmul_gflops": round(rate / 1e9, 1),
    }
    print(json.dumps({"options": vars(options), "environment": environment, "cells": cells}))


if __name__ == "__main__":
    main()

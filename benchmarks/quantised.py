"""How fast a GGUF file is decoded, against how fast the memory can deliver its weights.

    python benchmarks/quantised.py                     a random file of half a billion weights, Q4_0
    python benchmarks/quantised.py --weights Q8_0
    python benchmarks/quantised.py --file my.gguf      a file of yours

Every token reads all weights once, so bytes times tokens per second is the bandwidth that was used.
Rounds alternate between one stream of the engine, llama.cpp without the engine, and a plain read
of a large array; lowest, median and highest of each are printed as JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers

from starling.models.gguf_engine import load_gguf
from starling.models.interfaces import GenerationRequest, Sampling

WIDTH, LAYERS, INNER, HEADS, KEY_HEADS, VOCABULARY = 1536, 16, 4096, 24, 8, 32_000
PROMPT = tuple(range(300, 317))


def write_random(path: Path, weights: gguf.GGMLQuantizationType) -> None:
    """Write a Llama of half a billion random weights; one quantised block stands everywhere."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "<|end_of_turn|>", "<|pad_0|>", *letters, letters[0] + letters[1]]
    pieces += [f"word{number}" for number in range(VOCABULARY - len(pieces))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([3] * 3 + [1] * (VOCABULARY - 3))
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    normal = np.random.default_rng(0).standard_normal((256, 4096)) * 0.02
    block = gguf.quantize(normal.astype(np.float32), weights).reshape(-1)

    def add(name: str, rows: int, columns: int) -> None:
        shape = gguf.quant_shape_to_byte_shape((rows, columns), weights)
        writer.add_tensor(
            f"{name}.weight",
            np.resize(block, int(np.prod(shape))).reshape(shape),
            raw_dtype=weights,
        )

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))

    add("token_embd", VOCABULARY, WIDTH)
    add("output", VOCABULARY, WIDTH)
    add_norm("output_norm")
    for layer in range(LAYERS):
        name = f"blk.{layer}"
        add_norm(f"{name}.attn_norm")
        add_norm(f"{name}.ffn_norm")
        for part, rows in (("q", WIDTH), ("k", WIDTH // HEADS * KEY_HEADS), ("output", WIDTH)):
            add(f"{name}.attn_{part}", rows, WIDTH)
        add(f"{name}.attn_v", WIDTH // HEADS * KEY_HEADS, WIDTH)
        add(f"{name}.ffn_gate", INNER, WIDTH)
        add(f"{name}.ffn_up", INNER, WIDTH)
        add(f"{name}.ffn_down", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bytes_per_token(path: Path) -> int:
    """Bytes of all weights that one token reads: of the embedding it reads a single row."""
    tensors = gguf.GGUFReader(path).tensors
    has_head = any(tensor.name == "output.weight" for tensor in tensors)
    return sum(
        int(tensor.n_bytes)
        for tensor in tensors
        if not (has_head and tensor.name == "token_embd.weight")
    )


def rate(action: Callable[[], float]) -> float:
    """What `action` returns, per second of its running."""
    start = time.perf_counter()
    count = action()
    return count / (time.perf_counter() - start)


def measure(path: Path, threads: int, tokens: int, rounds: int) -> dict[str, object]:
    """Figures of one file."""
    torch.set_num_threads(threads)
    size = bytes_per_token(path)
    opened = time.perf_counter()
    engine: Any = load_gguf(path, threads=threads).engine
    loading = time.perf_counter() - opened
    array = torch.ones(2**27)  # 512 MB: more than any cache holds
    greedy = Sampling(tokens, temperature=0.0)
    plain = {"temperature": 0, "id_slot": 0, "ignore_eos": True, "return_tokens": True}
    batch = [GenerationRequest(f"r{n}", (*PROMPT, n), greedy) for n in range(4)]

    def stream() -> int:
        return len(list(engine.stream(GenerationRequest("r", PROMPT, greedy))))

    def side_by_side() -> int:
        return sum(len(sample.ids) for sample in engine.generate(batch))

    def llama_cpp() -> int:
        asked = {"prompt": PROMPT, "n_predict": tokens} | plain
        return engine._server.handle_completions(asked)["usage"]["completion_tokens"]

    ways = {"engine": stream, "llama.cpp": llama_cpp, "engine, 4 side by side": side_by_side}
    rates: dict[str, list[float]] = {name: [] for name in (*ways, "read")}
    for turn in range(rounds + 1):
        found = {name: rate(action) for name, action in ways.items()}
        found["read"] = rate(lambda: array.sum().item() and array.nbytes / 1e9)
        # The first round warms up: pages, caches of the prompts, the clock of the processor.
        for name in found if turn else ():
            rates[name].append(found[name])
    read = statistics.median(rates.pop("read"))
    return {
        "file": path.name,
        "bytes_per_token": size,
        "threads": threads,
        "loading_seconds": round(loading, 2),
        "read_gigabytes_per_second": round(read, 2),
        "bound_tokens_per_second": round(read * 1e9 / size, 2),
        "tokens_per_second": {
            name: [round(pick(all_of), 2) for pick in (min, statistics.median, max)]
            for name, all_of in rates.items()
        },
        "share_of_bandwidth": round(statistics.median(rates["engine"]) * size / 1e9 / read, 3),
    }


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description="GGUF decoding against memory speed")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--weights", choices=["Q4_0", "Q8_0", "F16"], default="Q4_0")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or Path(folder) / f"random-{options.weights}.gguf"
        if options.file is None:
            write_random(path, gguf.GGMLQuantizationType[options.weights])
        figures = measure(path, options.threads, options.tokens, options.rounds)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

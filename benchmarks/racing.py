"""What the races share: clocks, memory, the shapes of models, and a peer's installation."""

import argparse
import ctypes
import gc
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MistralConfig

# hidden, layers, heads, key-value heads, intermediate, vocabulary
MODELS = {
    "tiny": (256, 4, 8, 4, 768, 2048),
    "m50": (512, 8, 8, 4, 1536, 32002),
    "7b-4-layers": (4096, 4, 32, 8, 14336, 32002),
}
MOST_TOKENS = 2048
# What TRL needs beyond starling's own, for it is installed without dependencies, which would bring
# another torch.
BESIDE_TRL = (
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "pandas>=2.3",
    "pyarrow>=24",
    "dill>=0.3,<0.4.2",
    "multiprocess<0.70.20",
    "xxhash",
    "psutil",
    "python-dateutil",
    "six",
)


@dataclass(frozen=True)
class Seconds:
    """What a run took, on the wall and of this process's CPU time."""

    wall: float
    cpu: float

    @staticmethod
    def now(device: str) -> "Seconds":
        if device != "cpu":
            torch.cuda.synchronize()
        return Seconds(time.perf_counter(), time.process_time())

    def since(self, start: "Seconds", passes: int = 1) -> "Seconds":
        return Seconds((self.wall - start.wall) / passes, (self.cpu - start.cpu) / passes)

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)


def model_shape(name: str) -> Any:
    """The configuration of the named model, a Mistral without a window."""
    hidden, layers, heads, kv_heads, intermediate, vocab = MODELS[name]
    return MistralConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=MOST_TOKENS,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def two_word_tokenizer(padding_side: str = "right") -> Any:
    """What the peers ask for a pad token; texts come as ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<pad>",
        padding_side=padding_side,
    )


def autocast(dtype: str, device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16) if dtype == "bf16" else nullcontext()


def with_peer(name: str) -> None:
    """Install `trl-VERSION` on first use, whole or not at all, and start over with it importable.

    Started over because transformers looks for accelerate, which TRL brings, when it is imported.
    """
    # A folder of this name: dill, under TRL's datasets, pickles by value what lies in any other.
    peer = Path(__file__).resolve().parents[1] / ".peers" / name / "site-packages"
    if str(peer) in sys.path:
        return
    if not peer.exists():
        print(f"installing {name} into {peer}", file=sys.stderr, flush=True)
        peer.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=peer.parent) as folder:
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
            packages = ["==".join(name.split("-")), *BESIDE_TRL]
            subprocess.run([*command, f"{folder}/new", *packages], check=True, stdout=2)
            os.replace(f"{folder}/new", peer)
    path = os.pathsep.join(filter(None, [str(peer), os.environ.get("PYTHONPATH")]))
    os.execve(sys.executable, sys.orig_argv, os.environ | {"PYTHONPATH": path})


def matmul_rate(dtype: str, device: str) -> float:
    """The best rate at which this machine multiplies two 1024 x 1024 matrices, in flop/s."""
    size = 1024 if device == "cpu" else 8192
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    left, right = torch.randn(2, size, size).to(kind).to(device)
    times = []
    for _ in range(20):
        start = Seconds.now(device)
        torch.mm(left, right)
        took = Seconds.now(device).since(start)
        times.append(took.cpu if device == "cpu" else took.wall)
    return 2 * size**3 / min(times)


def peak_mib(run: Callable[[], object], device: str) -> float | None:
    """By how much resident (or the device's) memory grows while running; None where not told."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        run()
        return None
    before = _status_mib("VmRSS")
    run()
    return round(_status_mib("VmHWM") - before, 1)


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def spread(values: Sequence[float]) -> dict[str, float]:
    low, high = min(values), max(values)
    return {
        "median": rounded(statistics.median(values)),
        "low": rounded(low),
        "high": rounded(high),
    }


def options_parser(doc: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """A parser with the options of every race."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--json", type=Path, help="write the rows there too, after each race")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=repeats)
    return parser


def quiet_rates(device: str, dtypes: Iterable[str]) -> dict[str, float]:
    """One thread, no warnings; the machine's rates of multiplication by dtype, fp32 or bf16."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    return {dtype: matmul_rate(dtype, device) for dtype in dtypes}


def write_rows(
    rows: Iterable[dict[str, Any]], rates: Mapping[str, float], options: argparse.Namespace
) -> None:
    """Print the rows with what they ran on, and keep each as soon as it is there."""
    environment = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "threads": 1,
        "matmul_gflops": {dtype: round(rate / 1e9, 1) for dtype, rate in rates.items()},
    }
    found = []
    for row in rows:
        found.append(row | {"environment": environment})
        print(json.dumps(row), file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))

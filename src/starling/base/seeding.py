"""Every random stream is derived from (seed, purpose, counters), never from a global state.

So a step's randomness depends on which step it is and on nothing that ran before it, and a resumed
run draws what the uninterrupted one would have drawn. numpy is imported when asked for.
"""

import hashlib
import json
import operator
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """A seed in [0, 2**63) for one purpose ("ppo/rollout") and one place in it (step, row).

    The first 63 bits of SHA-256 over the JSON list of the arguments: the same on every machine,
    in every process and version, and unrelated for arguments that differ anywhere.
    """
    numbers = [operator.index(number) for number in (seed, *counters)]
    text = json.dumps([purpose, *numbers])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(seed: int, purpose: str, *counters: int) -> "numpy.random.Generator":
    """A numpy generator at the start of the derived stream."""
    import numpy

    return numpy.random.Generator(numpy.random.PCG64(derive_seed(seed, purpose, *counters)))


def python_generator(seed: int, purpose: str, *counters: int) -> random.Random:
    """A standard-library generator at the start of the derived stream."""
    return random.Random(derive_seed(seed, purpose, *counters))


def permutation(n: int, seed: int, purpose: str, epoch: int) -> list[int]:
    """The order in which to visit 0..n-1 in this epoch; another epoch has another order."""
    return numpy_generator(seed, purpose, epoch).permutation(n).tolist()

"""A mean with its uncertainty: the percentile bootstrap over clusters (usually prompts).

Answers to one prompt are not independent, so whole clusters are drawn, not single values.
Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, sections 13.3 and 8.5.
Above MOST_RESAMPLED clusters the interval is the normal one, with the cluster-robust variance of a
ratio (Cochran 1977, Sampling Techniques, 2.11): the bootstrap's to about 2 %, and in no time.
"""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from starling.base.seeding import numpy_generator

ROUNDS = 2000
"""Resamples per interval: each end then varies by about 1.5 % of its width from seed to seed."""

LEVEL = 0.95
"""Share of the resamples that an interval covers."""

MOST_RESAMPLED = 2000
"""Clusters up to which the interval is by bootstrap; there 2000 rounds take 0.05 seconds."""

BLOCK = 1 << 20
"""Cluster draws held in memory at once."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` values with an interval around it; `num_failed` further ones had no value.

    `low` and `high` are None when all values are from one cluster: the spread between clusters is
    then unknown, and an interval of width zero would claim certainty.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    num_failed: int = 0

    def __str__(self) -> str:
        """For people: `7.31 [6.90, 7.70] n=80`, and `failed=2` when some did."""
        if self.low is None or self.high is None:
            interval = "[unknown]"
        else:
            interval = f"[{self.low:.2f}, {self.high:.2f}]"
        failed = f" failed={self.num_failed}" if self.num_failed else ""
        return f"{self.mean:.2f} {interval} n={self.n}{failed}"


def bootstrap_mean(
    values: Sequence[float | int],
    *,
    seed: int,
    num_failed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Estimate:
    """Estimate the mean of the values, with an interval that covers LEVEL of the resamples.

    `clusters` names each value's cluster (by default each is its own). Every value weighs the same,
    so a cluster weighs by its size. With fewer than about ten clusters the interval is known to be
    too narrow. Raises ValueError for no values, NaN, infinity, or lengths that differ.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"a mean needs a list of at least one value, found shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"values must be finite, found {array[~np.isfinite(array)][0]}")
    names = range(array.size) if clusters is None else clusters
    if len(names) != array.size:
        raise ValueError(f"{array.size} values but {len(names)} cluster names")

    mean = float(array.mean())
    number_of = {name: number for number, name in enumerate(dict.fromkeys(names))}
    members = np.array([number_of[name] for name in names])
    # Deviations from the mean, so that equal values give an interval of exactly that value.
    sums = np.bincount(members, weights=array - mean)
    sizes = np.bincount(members)
    of_clusters = np.bincount(members, weights=array) / sizes
    low, high = _interval(mean, sums, sizes, of_clusters, seed)
    return Estimate(mean, low, high, n=array.size, num_failed=num_failed)


def mean_of_sums(
    sums: Sequence[float], sizes: Sequence[int], *, seed: int, num_failed: int = 0
) -> Estimate:
    """`bootstrap_mean` where of each cluster only the sum and the number of its values are kept.

    Raises ValueError for a cluster without a value, and for no cluster at all.
    """
    totals, counts = np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.int64)
    if len(totals) != len(counts) or not len(counts) or counts.min() < 1:
        raise ValueError(f"{len(totals)} sums need as many sizes, each of at least 1")
    mean = float(totals.sum() / counts.sum())
    low, high = _interval(mean, totals - mean * counts, counts, totals / counts, seed)
    return Estimate(mean, low, high, n=int(counts.sum()), num_failed=num_failed)


def clustered_mean(
    values: Sequence[tuple[Hashable, float]], *, seed: int, num_failed: int = 0
) -> dict[str, Any]:
    """`bootstrap_mean` of values that each stand behind the name of their cluster, for JSON."""
    names, numbers = zip(*values, strict=True)
    return asdict(bootstrap_mean(numbers, seed=seed, num_failed=num_failed, clusters=names))


def _interval(
    mean: float, deviations: np.ndarray, sizes: np.ndarray, of_clusters: np.ndarray, seed: int
) -> tuple[float | None, float | None]:
    """The ends around a mean, from each cluster's summed deviation from it, size and own mean."""
    if len(sizes) < 2:
        return None, None
    tail = (1 - LEVEL) / 2
    if len(sizes) <= MOST_RESAMPLED:
        ends = np.quantile(_resampled_means(deviations, sizes, seed), [tail, 1 - tail])
    else:
        half = NormalDist().inv_cdf(1 - tail) * np.sqrt((deviations**2).sum()) / sizes.sum()
        ends = np.array([-half, half])
    # No resample's mean lies beyond that of the outermost cluster, but for rounding: a share of
    # -1e-18 would be none.
    lowest, highest = min(mean, of_clusters.min()), max(mean, of_clusters.max())
    low, high = np.clip(mean + ends, lowest, highest).tolist()
    return low, high


def _resampled_means(sums: np.ndarray, sizes: np.ndarray, seed: int) -> np.ndarray:
    """[ROUNDS] means, each over as many clusters as there are, drawn with replacement."""
    rng = numpy_generator(seed, "bootstrap")
    num_clusters = len(sums)
    rounds_per_block = max(1, BLOCK // num_clusters)
    means = []
    for start in range(0, ROUNDS, rounds_per_block):
        rounds = min(rounds_per_block, ROUNDS - start)
        drawn = rng.integers(num_clusters, size=(rounds, num_clusters))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)

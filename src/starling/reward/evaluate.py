"""How well scores reproduce rankings: pair accuracy, beside what answer length alone would give."""

from collections.abc import Iterator, Sequence

from starling.base.estimate import Estimate, bootstrap_mean
from starling.reward.dataset import RankedRow


def ordered_pairs(ranks: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """Index pairs (better, worse); ties make no pair, unranked answers lose to every ranked one."""
    for i, better in enumerate(ranks):
        for j, worse in enumerate(ranks):
            if better is not None and (worse is None or better < worse):
                yield i, j


def pair_accuracy(
    rows: Sequence[RankedRow], scores: Sequence[Sequence[float]], *, seed: int
) -> Estimate:
    """Share of pairs whose better answer has the higher score; equal scores count half.

    The interval is by bootstrap over prompts.
    """
    outcomes: list[float] = []
    clusters: list[str] = []
    for row, values in zip(rows, scores, strict=True):
        for i, j in ordered_pairs(row.ranks):
            outcomes.append(0.5 + 0.5 * ((values[i] > values[j]) - (values[i] < values[j])))
            clusters.append(row.id)
    return bootstrap_mean(outcomes, seed=seed, clusters=clusters)


def length_only_accuracy(rows: Sequence[RankedRow], *, seed: int) -> Estimate:
    """Pair accuracy of the better of the two blind rules: longer wins, or shorter wins."""
    longer = [[float(chars) for chars in row.answer_chars] for row in rows]
    shorter = [[-chars for chars in row] for row in longer]
    estimates = [pair_accuracy(rows, values, seed=seed) for values in (longer, shorter)]
    return max(estimates, key=lambda estimate: estimate.mean)

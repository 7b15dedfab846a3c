"""How well scores reproduce rankings, beside what answer length alone would give.

A pair is two answers of one ranking, the better one first; ties make none, and unranked answers
stand one level below the last ranked one.  Only differences within a ranking are looked at: the
loss leaves each prompt's zero open.  Equal scores count half, intervals are by bootstrap over
prompts (`RankedRow.key`), and a figure that nothing says is None.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np

from starling.base.estimate import Estimate, bootstrap_mean
from starling.data.records import content_id
from starling.data.reward_pairs import RewardPair
from starling.reward.dataset import RankedRow

FEWEST_RANKINGS = 10
"""Rankings that a source needs for a line of its own."""

BINS = 10
"""Bins of the reliability curve (equally wide) and of the length differences (equally full)."""


class _Pairs(NamedTuple):
    """All pairs, each array [N]."""

    prompt: np.ndarray
    """Number of the prompt."""
    source: np.ndarray
    gap: np.ndarray
    """Score of the better answer over that of the worse."""
    longer: np.ndarray
    """Characters of the better answer over those of the worse."""
    distance: np.ndarray
    """Levels between the two."""

    def accuracy(self, chosen: np.ndarray, seed: int) -> dict[str, Any] | None:
        """Share in order of the chosen pairs."""
        return _estimate(_won(self.gap[chosen]), self.prompt[chosen].tolist(), seed)


def evaluate(
    rows: Sequence[RankedRow],
    scores: Sequence[Sequence[float]],
    *,
    seed: int,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Every figure of the rankings, as JSON values.

    `scale` makes differences of `scores` those of the raw scores that the loss saw (the deviation
    that normalised them): only calibration needs it.
    """
    pairs = _pairs(rows, scores)
    everything = np.full(len(pairs.gap), True)
    answers = [
        _Answers(row.key, _levels(row.ranks), np.array(values, float), np.array(row.answer_chars))
        for row, values in zip(rows, scores, strict=True)
    ]
    named = Counter(row.source for row in rows if row.source is not None)
    sources = [name for name, count in named.items() if count >= FEWEST_RANKINGS]
    differ = pairs.longer != 0
    model_longer = _won(pairs.gap * np.sign(pairs.longer))[differ]
    prompts = pairs.prompt[differ].tolist()
    return {
        "rankings": len(rows),
        "prompts": len({row.key for row in rows}),
        "pair_accuracy": pairs.accuracy(everything, seed),
        "adjacent_accuracy": pairs.accuracy(pairs.distance == 1, seed),
        "length_only_accuracy": asdict(length_only_accuracy(rows, seed=seed)),
        "by_distance": {
            str(distance): pairs.accuracy(pairs.distance == distance, seed)
            for distance in np.unique(pairs.distance).tolist()
        },
        "by_source": {name: pairs.accuracy(pairs.source == name, seed) for name in sources},
        "rankings_of_other_sources": len(rows) - sum(named[name] for name in sources),
        "better_is_longer": pairs.accuracy(pairs.longer > 0, seed),
        "better_is_shorter": pairs.accuracy(pairs.longer < 0, seed),
        "by_length_difference": _by_length_difference(pairs, seed),
        "longer_preferred": {
            "model": _estimate(model_longer, prompts, seed),
            "judge": _estimate(_won(pairs.longer)[differ], prompts, seed),
        },
        "score_length_correlation": _length_correlations(answers),
        "calibration": _calibration(scale * pairs.gap),
        "ndcg": _over_rows(((row.key, row.ndcg()) for row in answers), seed),
        "kendall_tau": _over_rows(((row.key, row.kendall_tau()) for row in answers), seed),
        "best_of_n": _best_of_n(answers, seed),
        "noise_ceiling": _noise_ceiling(rows, seed),
    }


def evaluate_pairs(
    pairs: Sequence[RewardPair], scores: Sequence[tuple[float, float]], *, seed: int
) -> dict[str, Any]:
    """Accuracy on a pair file, in all and by subset, beside longer wins and shorter wins.

    `scores` are those of the chosen and of the rejected conversation.
    """
    won = _won(np.subtract(*np.array(scores, float).T))
    longer = _won(np.array([pair.more_chars for pair in pairs]))
    prompts = [content_id(pair.chosen.messages[:-1]) for pair in pairs]
    members: defaultdict[str, list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        members[pair.subset or "none"].append(number)

    def figures(chosen: Sequence[int]) -> dict[str, Any]:
        return {
            "accuracy": _estimate(won[chosen], [prompts[number] for number in chosen], seed),
            "longer": float(longer[chosen].mean()),
            "shorter": float(1 - longer[chosen].mean()),
        }

    return {
        "all": figures(range(len(pairs))),
        "mean_of_subsets": float(np.mean([won[chosen].mean() for chosen in members.values()])),
        "subsets": {name: figures(chosen) for name, chosen in members.items()},
    }


def ordered_pairs(ranks: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """Index pairs (better, worse); ties make no pair, unranked answers lose to every ranked one."""
    for i, better in enumerate(ranks):
        for j, worse in enumerate(ranks):
            if better is not None and (worse is None or better < worse):
                yield i, j


def pair_accuracy(
    rows: Sequence[RankedRow], scores: Sequence[Sequence[float]], *, seed: int
) -> Estimate:
    """Share of pairs whose better answer has the higher score."""
    pairs = _pairs(rows, scores)
    return bootstrap_mean(_won(pairs.gap).tolist(), seed=seed, clusters=pairs.prompt.tolist())


def length_only_accuracy(rows: Sequence[RankedRow], *, seed: int) -> Estimate:
    """Pair accuracy of the better of the two blind rules: longer wins, or shorter wins."""
    longer = [[float(chars) for chars in row.answer_chars] for row in rows]
    shorter = [[-chars for chars in row] for row in longer]
    estimates = [pair_accuracy(rows, values, seed=seed) for values in (longer, shorter)]
    return max(estimates, key=lambda estimate: estimate.mean)


class _Answers(NamedTuple):
    """One ranking's answers, each array [K]."""

    key: str
    levels: np.ndarray
    scores: np.ndarray
    chars: np.ndarray

    def ndcg(self) -> float | None:
        """Gain: the levels below an answer; discount: log2 of its place + 1.  None for a full tie.

        Source: Jarvelin and Kekalainen 2002, https://doi.org/10.1145/582415.582418.
        """
        gains = self.levels.max() - self.levels
        discounts = 1 / np.log2(np.arange(len(gains)) + 2)
        best = _descending(gains, gains) @ discounts
        return float(_descending(gains, self.scores) @ discounts / best) if best else None

    def kendall_tau(self) -> float | None:
        """Kendall's tau-b; None where all ranks or all scores are equal."""
        signs = [np.sign(x[:, None] - x[None, :]) for x in (-self.levels, self.scores)]
        most = math.sqrt(np.prod([(each**2).sum() for each in signs]))
        return float((signs[0] * signs[1]).sum() / most) if most else None

    def picked(self, by: np.ndarray) -> np.ndarray:
        """[K] Expected standing of the highest `by` among n = 1 to K answers drawn; exactly."""
        k = len(by)
        chances = [
            [math.comb(k - 1 - place, n - 1) / math.comb(k, n) for n in range(1, k + 1)]
            for place in range(k)
        ]
        return _descending(self.standing, by) @ np.array(chances)

    @property
    def standing(self) -> np.ndarray:
        """The judge's ranks as 1 for the best to 0 for the last; ties share."""
        return 1 - (_places(self.levels) - 1) / (len(self.levels) - 1)


def _pairs(rows: Sequence[RankedRow], scores: Sequence[Sequence[float]]) -> _Pairs:
    numbers = {key: number for number, key in enumerate(dict.fromkeys(row.key for row in rows))}
    found = []
    for row, values in zip(rows, scores, strict=True):
        levels, chars = _levels(row.ranks), row.answer_chars
        for i, j in ordered_pairs(row.ranks):
            difference = (values[i] - values[j], chars[i] - chars[j], levels[j] - levels[i])
            found.append((numbers[row.key], row.source, *difference))
    if not found:
        raise ValueError("no ranking prefers one answer to another")
    return _Pairs(*(np.array(column) for column in zip(*found, strict=True)))


def _levels(ranks: Sequence[int | None]) -> np.ndarray:
    last = max(rank for rank in ranks if rank is not None)
    return np.array([last + 1 if rank is None else rank for rank in ranks])


def _won(gaps: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sign(gaps)


def _estimate(values: np.ndarray, clusters: Sequence[Any], seed: int) -> dict[str, Any] | None:
    if not len(values):
        return None
    return asdict(bootstrap_mean(values.tolist(), seed=seed, clusters=clusters))


def _over_rows(values: Iterable[tuple[str, float | None]], seed: int) -> dict[str, Any] | None:
    """Mean over rankings; those without a value are counted as failed."""
    every = list(values)
    found = [(key, value) for key, value in every if value is not None]
    estimate = _estimate(np.array([value for _, value in found]), [key for key, _ in found], seed)
    return estimate and estimate | {"num_failed": len(every) - len(found)}


def _places(values: np.ndarray) -> np.ndarray:
    """Places from 1, the smallest value first; equal values share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[which]


def _descending(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """The values, the highest `by` first; where it is equal, their mean: any order is as likely."""
    _, which, counts = np.unique(-by, return_inverse=True, return_counts=True)
    return np.repeat(np.bincount(which, weights=values) / counts, counts)


def _by_length_difference(pairs: _Pairs, seed: int) -> list[dict[str, Any]]:
    """Accuracy in equally full bins of how much longer the better answer is, in characters."""
    edges = np.unique(np.quantile(pairs.longer, np.arange(1, BINS) / BINS))
    which = np.searchsorted(edges, pairs.longer)
    return [
        {
            "characters": float(np.median(pairs.longer[which == number])),
            "accuracy": pairs.accuracy(which == number, seed),
        }
        for number in np.unique(which)
    ]


def _length_correlations(answers: Sequence[_Answers]) -> dict[str, dict[str, float | None]]:
    """Correlation of length with the model's scores and with the judge's standing, within rankings.

    Each ranking's own mean is taken off, so that long prompts with long answers say nothing.
    """

    def pooled(columns: Iterable[tuple[np.ndarray, np.ndarray]]) -> float | None:
        x, y = np.concatenate([np.stack([x - x.mean(), y - y.mean()]) for x, y in columns], axis=1)
        most = math.sqrt((x @ x) * (y @ y))
        return float(x @ y / most) if most else None

    both = {
        "model": [(row.scores, row.chars) for row in answers],
        "judge": [(row.standing, row.chars) for row in answers],
    }
    return {
        name: {
            "pearson": pooled(columns),
            "spearman": pooled((_places(x), _places(y)) for x, y in columns),
        }
        for name, columns in both.items()
    }


def _calibration(gaps: np.ndarray) -> dict[str, Any]:
    """What sigmoid(difference) claims of the higher score of each pair, beside how often it holds.

    The expected calibration error weighs the bins' distances by their pairs; log loss in nats.
    """
    confidence = 1 / (1 + np.exp(-np.abs(gaps)))
    won = _won(gaps)
    which = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = [
        {
            "predicted": float(confidence[which == number].mean()),
            "observed": float(won[which == number].mean()),
            "pairs": int((which == number).sum()),
        }
        for number in np.unique(which)
    ]
    error = sum(part["pairs"] * abs(part["predicted"] - part["observed"]) for part in bins)
    log_loss = float(np.logaddexp(0, -gaps).mean())
    return {"bins": bins, "expected_error": error / len(gaps), "log_loss": log_loss}


def _best_of_n(answers: Sequence[_Answers], seed: int) -> list[dict[str, Any]]:
    """Standing of the answer picked of n by the model, by the judge, and by chance."""
    model = [(row.key, row.picked(row.scores)) for row in answers]
    oracle = [row.picked(-row.levels) for row in answers]
    return [
        {
            "n": n + 1,
            "model": _over_rows(((key, each[n]) for key, each in model if n < len(each)), seed),
            "oracle": float(np.mean([each[n] for each in oracle if n < len(each)])),
            "chance": 0.5,
        }
        for n in range(max(len(row.levels) for row in answers))
    ]


def _noise_ceiling(rows: Sequence[RankedRow], seed: int) -> dict[str, Any] | None:
    """On which share of pairs a second ranking of the same answers agrees; None without any.

    The second is scored as a model is, and each with each, both ways.  Where their noise is
    independent, a model that always sides with the majority reaches at least that share, and at
    most (1 + sqrt(2 share - 1)) / 2.
    """
    rankings: defaultdict[str, list[dict[tuple[int, ...], float]]] = defaultdict(list)
    for row in rows:
        ranks = (math.inf if rank is None else rank for rank in row.ranks)
        rankings[row.key].append(dict(zip(row.sequences, ranks, strict=True)))
    found = [
        (key, 0.5 + 0.5 * ((other[i] < other[j]) - (other[i] > other[j])))
        for key, repeats in rankings.items()
        for one, other in permutations(repeats, 2)
        for i, j in permutations(one.keys() & other.keys(), 2)
        if one[i] < one[j] and min(other[i], other[j]) < math.inf
    ]
    agreement = _over_rows(found, seed)
    if agreement is None:
        return None
    at_most = (1 + math.sqrt(max(0.0, 2 * agreement["mean"] - 1))) / 2
    return {"agreement": agreement, "at_most": at_most}

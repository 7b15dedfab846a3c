"""How much of a judge's position bias each strategy takes out, and what that costs in calls.

    python benchmarks/debiasing.py [--prompts 1000] [--figure docs/debiasing.svg]

The judge is simulated, so that the truth is known: it reads nothing but the prompt text that it is
sent, finds each answer's true quality in it, and ranks by

    quality + opinion + length + noise + place + primacy

*opinion* is the judge's own error about an answer, the same in every call; *length* favours the
longer answer; *noise* is new in every call.  *place* falls in a line from the first answer shown to
the last, by PLACE in all; walking the pairs leaves WALKED of it, for it makes a judge look at every
two answers.  Whether two answers shown alone suffer all of that, or a (K-1)th, as neighbours among
K do, nobody has measured; pairwise has a row for each.  *primacy* favours who is named early in the
walk.  Ratings crowd at the top.  That a walk helps a judge, and how much, is planted here, after
what Nectar's authors measured on GPT-4; what the strategies make of such a judge is what is shown.

Prints a table in Markdown; recorded in docs/judging.md.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import fmean

from starling.data.records import Message
from starling.judging.judge import Comparison, Ranking
from starling.judging.kwise import lay_out, present, shuffled_pairs
from starling.judging.llm_judge import LlmJudge
from starling.judging.strategies import KWISE, Question, Strategy, choose_strategy
from starling.models.interfaces import Reply, Request, Usage

K = 7
OPINION, LENGTH, NOISE = 0.5, 0.3, 0.5
"""Standard deviations, where that of the answers' quality is 1."""
PLACE, WALKED, PRIMACY = 2.0, 0.5, 0.4
"""Without pairs the first answer then wins a third; Nectar's authors measured 31 % on GPT-4."""
TEN_ABOVE, POINTS = -0.9, 2.0
"""Ratings of merits above are a 10, three of four as in Nectar's trials; and points per 1 below."""

BLOCK = re.compile(r"<<answer(?: ([A-Z]))? \w{8}>>\nquality (\S+): (.*?)\n<<end answer", re.DOTALL)
PAIR = re.compile(r"^([A-Z]) and ([A-Z])$", re.MULTILINE)


class SimulatedJudge:
    """A judge with known faults, which answers in the form that the prompts ask for."""

    identity = "simulated"
    commits_together = False

    def __init__(
        self, place: float = PLACE, length: float = LENGTH, *, is_per_step: bool = False
    ) -> None:
        self._place = place
        self._length = length
        self._is_per_step = is_per_step

    def respond(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Yield a reply per request, from its messages alone."""
        for request in requests:
            task = request.messages[-1].content
            rng = Random(task)
            shown = BLOCK.findall(task)
            merits = [
                float(quality)
                + Random(quality).gauss(0, OPINION)
                + self._length * _z_length(text)
                + rng.gauss(0, NOISE)
                for _, quality, text in shown
            ]
            if len(shown) == 1:
                text = f"Fair enough.\n[[{_rating(merits[0])}]]"
            else:
                text = self._ranking([label for label, _, _ in shown], merits, PAIR.findall(task))
            yield Reply(request.id, text, "stop", Usage(len(task) // 4, len(text) // 4))

    def _ranking(self, labels: list[str], merits: list[float], walk: list[tuple[str, str]]) -> str:
        last = K - 1 if self._is_per_step else len(labels) - 1
        named = [label for pair in walk for label in pair]
        totals: dict[str, float] = {}
        for place, (label, merit) in enumerate(zip(labels, merits, strict=True)):
            favour = self._place * (WALKED if walk else 1.0) * (0.5 - place / last)
            if walk:
                favour += PRIMACY * (0.5 - named.index(label) / len(named))
            totals[label] = merit + favour
        order = sorted(totals, key=lambda label: -totals[label])
        return f"Good-natured: yes\n[[{', '.join(map(repr, order))}]]"


def _z_length(text: str) -> float:
    """Standard deviations from the mean length: 5 to 60 words, uniform."""
    return (len(text.split()) - 32.5) / 16.2


def _rating(merit: float) -> int:
    return max(1, min(10, round(9.5 + POINTS * (merit - TEN_ABOVE))))


def _arranged(is_shuffled: bool, is_walked: bool) -> Strategy:
    """kwise as it would be without one or both of its devices."""

    def ask(comparison: Comparison, seed: int) -> list[Question]:
        k = len(comparison.answers)
        order = present(comparison, seed).presented if is_shuffled else tuple(range(k))
        pairs = shuffled_pairs(k, Random(f"{seed} {comparison.id}")) if is_walked else []
        shown = lay_out(comparison, order, pairs, seed=seed, key=comparison.id)
        id = comparison.id
        return [Question(id, id, shown.presented, shown.messages, shown.shown)]

    return Strategy(ask, KWISE.conclude)


PER_STEP = "pairwise, a sixth of the bias"
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "kwise, not shuffled, no pairs": lambda: _arranged(False, False),
    "kwise, not shuffled": lambda: _arranged(False, True),
    "kwise, no pairs": lambda: _arranged(True, False),
    "kwise": lambda: choose_strategy("kwise", 3),
    "kwise-repeated, 3": lambda: choose_strategy("kwise-repeated", 3),
    "kwise-repeated, 7": lambda: choose_strategy("kwise-repeated", 7),
    "pairwise": lambda: choose_strategy("pairwise", 3),
    PER_STEP: lambda: choose_strategy("pairwise", 3),
    "pointwise": lambda: choose_strategy("pointwise", 3),
}


@dataclass(frozen=True)
class Outcome:
    """What one strategy made of the judge; without bias, slope 0 and every share the same."""

    slope: float
    """Ranks lost per place further back in the order given: the systematic part of the bias."""
    won: tuple[float, ...]
    """Share of prompts won by the answer given at each place; tied winners share."""
    accuracy: float
    """Share of pairs in their true order; a tie is half."""
    longer: float
    """Share of pairs in which the longer answer ranks higher; the truth has half."""
    tied: float
    """Share of pairs that tie."""
    calls: float
    """Per prompt."""


def make_comparisons(num_prompts: int, seed: int = 0) -> tuple[list[Comparison], list[list[float]]]:
    """Prompts with K answers of known quality, which neither place nor length tells."""
    rng = Random(seed)
    comparisons, truths = [], []
    for number in range(num_prompts):
        qualities = [round(rng.gauss(0, 1), 6) for _ in range(K)]
        answers = tuple(
            f"quality {quality}: " + " ".join(["word"] * rng.randint(5, 60))
            for quality in qualities
        )
        question = (Message(role="user", content=f"Question {number}?"),)
        comparisons.append(Comparison(f"q{number}", question, answers))
        truths.append(qualities)
    return comparisons, truths


def measure(name: str, num_prompts: int, judge: SimulatedJudge | None = None) -> Outcome:
    """Rank the same prompts by one strategy."""
    comparisons, truths = make_comparisons(num_prompts)
    asked = LlmJudge(
        judge or SimulatedJudge(is_per_step=name == PER_STEP),
        seed=0,
        max_tokens=512,
        temperature=0.0,
        strategy=STRATEGIES[name](),
    )
    errors: list[list[float]] = [[] for _ in range(K)]
    won = [0.0] * K
    right: list[float] = []
    longer: list[float] = []
    calls = 0
    for comparison, truth, verdict in zip(
        comparisons, truths, asked.rank(comparisons), strict=True
    ):
        assert isinstance(verdict, Ranking), verdict
        calls += len(verdict.votes)
        ranks = verdict.ranks
        best = [place for place in range(K) if ranks[place] == 1]
        for place in range(K):
            better = sum(other > truth[place] for other in truth)
            errors[place].append(_mean_rank(ranks, place) - 1 - better)
            won[place] += (place in best) / len(best)
        words = [len(answer) for answer in comparison.answers]
        for one, other in combinations(range(K), 2):
            higher = 0.5 + 0.5 * ((ranks[one] < ranks[other]) - (ranks[one] > ranks[other]))
            right.append(higher if truth[one] > truth[other] else 1 - higher)
            if words[one] != words[other]:
                longer.append(higher if words[one] > words[other] else 1 - higher)
    return Outcome(
        slope=_slope([fmean(each) for each in errors]),
        won=tuple(share / num_prompts for share in won),
        accuracy=fmean(right),
        longer=fmean(longer),
        tied=fmean(share == 0.5 for share in right),
        calls=calls / num_prompts,
    )


def _mean_rank(ranks: tuple[int, ...], place: int) -> float:
    above = sum(rank < ranks[place] for rank in ranks)
    return above + (ranks.count(ranks[place]) + 1) / 2


def _slope(values: list[float]) -> float:
    """Least squares, of values at 0, 1, 2, ..."""
    middle = (len(values) - 1) / 2
    spread = sum((place - middle) ** 2 for place in range(len(values)))
    return sum((place - middle) * value for place, value in enumerate(values)) / spread


def draw(outcomes: dict[str, Outcome], path: Path) -> None:
    """The share won by given place, and the pairs that come out right against the calls."""
    from starling.report.figures import BLUE, GREEN, GREY, ORANGE, new_figure

    lines = {
        "kwise, not shuffled, no pairs": (ORANGE, "s"),
        "kwise, not shuffled": (GREY, "^"),
        "kwise": (BLUE, "o"),
        "pairwise": (GREEN, "D"),
    }
    with new_figure(9.0, 3.4) as figure:
        left, right = figure.subplots(1, 2)
        for name, (color, marker) in lines.items():
            won = outcomes[name].won
            left.plot(range(1, K + 1), won, color=color, marker=marker, label=name)
        left.axhline(1 / K, color=GREY, linestyle=":", linewidth=1.2)
        left.set(xlabel="place in the order given", ylabel="share of prompts won", ylim=(0, None))
        left.legend()
        for name, outcome in outcomes.items():
            color, marker = lines.get(name, (BLUE, "o"))
            right.plot(outcome.calls, outcome.accuracy, color=color, marker=marker)
            lowered = ("kwise", "kwise, no pairs", "kwise-repeated, 3", "pairwise", PER_STEP)
            rise = -8 if name in lowered else 5
            at = (outcome.calls, outcome.accuracy)
            right.annotate(name, at, (6, rise), textcoords="offset points")
        right.set(xscale="log", xlabel="calls a prompt", ylabel="pairs in their true order")
        right.margins(y=0.1)
        right.set_xlim(0.8, 1500)
        right.set_xticks([1, 3, 7, 42], ["1", "3", "7", "42"])
        right.minorticks_off()
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    outcomes = {name: measure(name, args.prompts) for name in STRATEGIES}
    planted = outcomes["kwise, not shuffled, no pairs"].slope
    print(
        "| strategy | calls | ranks lost per place | removed | first place wins | last place wins "
        "| pairs right | tied | longer wins |"
    )
    print("| --- " * 9 + "|")
    for name, o in outcomes.items():
        print(
            f"| {name} | {o.calls:.0f} | {o.slope:+.3f} | {1 - abs(o.slope) / planted:.0%} | "
            f"{o.won[0]:.1%} | {o.won[-1]:.1%} | {o.accuracy:.1%} | {o.tied:.1%} | {o.longer:.1%} |"
        )
    if args.figure:
        draw(outcomes, args.figure)


if __name__ == "__main__":
    main()

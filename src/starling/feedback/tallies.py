"""What an audit counts, a row at a time: of each figure only a sum and a number per prompt stay.

So memory grows with the number of prompts, not with their text.
"""

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations, product
from typing import Any

from pydantic import BaseModel, Field

from starling.base.estimate import mean_of_sums
from starling.data.nectar import dedup_key
from starling.data.records import RankingRow
from starling.judging.refusals import is_refusal

NUM_EXAMPLES, EXAMPLE_CHARS = 3, 200
FIFTHS = 5


class _Vote(BaseModel):
    presented: list[int] = Field(min_length=2)
    ranks: list[int] | None = None
    text: str


class _Outcome(BaseModel):
    id: str
    outcome: str
    reason: str = ""
    votes: list[_Vote]
    agreement: float | None = None
    failed: list[str]
    empty: int
    merged: int
    dropped: int


class _Canary(BaseModel):
    canary: str
    index: int
    ranks: list[int] | None = None


class _About(BaseModel):
    judge: str
    kind: str | None = None
    strategy: str = "kwise"
    own: list[str] = []


def check_judgment(line: Any) -> None:
    """Raise ValueError for anything but a line of judgments.jsonl."""
    if not isinstance(line, dict):
        raise ValueError(f"not a JSON object but {type(line).__name__}")
    kind = _Canary if "canary" in line else _Outcome if "outcome" in line else _About
    kind.model_validate(line)


class Tallies:
    """Means and facts, each under a path such as ("models", "gpt-4", "mean_rank")."""

    def __init__(self) -> None:
        self.means: defaultdict[tuple[str, ...], tuple[array, array]]
        self.means = defaultdict(lambda: (array("d"), array("q")))
        self.failed: defaultdict[tuple[str, ...], int] = defaultdict(int)
        self.facts: dict[tuple[str, ...], Any] = {}
        self._seen: set[int] = set()

    def add(self, *path: str, values: Sequence[float]) -> None:
        """Take one prompt's values of a mean; none are no cluster."""
        if values:
            sums, sizes = self.means[path]
            sums.append(math.fsum(values))
            sizes.append(len(values))

    def count(self, *path: str, by: float = 1) -> None:
        """Add to a number."""
        self.facts[path] = self.facts.get(path, 0) + by

    def note(self, *path: str, example: dict[str, Any]) -> None:
        """Keep one of the first examples."""
        examples = self.facts.setdefault(path, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(example)

    def tree(self) -> dict[str, Any]:
        """All of it as nested JSON, names in order, each mean with its interval."""
        leaves = dict(self.facts)
        for path, (sums, sizes) in self.means.items():
            # The same file has the same audit, so the seed is no run's.
            failed = self.failed[path]
            leaves[path] = asdict(mean_of_sums(sums, sizes, seed=0, num_failed=failed))
        tree: dict[str, Any] = {}
        # Numbers are names too: 2 before 10.
        for path in sorted(leaves, key=lambda path: [name.zfill(2) for name in path]):
            node = tree
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = leaves[path]
        return tree

    def add_ranking(self, row: RankingRow) -> None:
        """Count a row of rankings.jsonl, or of Nectar."""
        ranks, lengths = row.ranks, [len(answer.answer) for answer in row.answers]
        nature = {None: None, True: "good_natured", False: "not_good_natured"}[row.good_natured]
        found: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)
        for answer, place, win, among in zip(
            row.answers, places(ranks), shares_of_win(ranks), places(lengths), strict=True
        ):
            # Among the prompt's own answers: how long an answer must be, its question decides.
            fifth = int((among - 0.5) / len(ranks) * FIFTHS) + 1
            groups = [("models", answer.model), ("length", f"{fifth} of {FIFTHS}")]
            for group in groups:
                found[*group, "win_share"].append(win)
            groups = [(*group, "mean_rank") for group in groups]
            if nature is not None:
                groups.append(("models", answer.model, f"mean_rank_{nature}"))
            for path in groups:
                if answer.rank is None:
                    self.failed[path] += 1
                else:
                    found[path].append(place)
            self.count("answers", "given")
            self.count("answers", "known_to_end", by=answer.finish_reason is not None)
            self.count("answers", "truncated", by=answer.finish_reason == "length")
            refused = is_refusal(answer.answer)
            self.count("answers", "refused", by=refused)
            if refused:
                self.count("models", answer.model, "refused")
                text = answer.answer[:EXAMPLE_CHARS]
                self.note("answers", "refusals", example={"id": row.id, "text": text})
        longer = self._longer_wins(lengths, ranks)
        named = [("sources", name) for name in set(row.source or ())]
        named += [("categories", row.category)] if row.category else []
        for group in [("all",), *named]:
            self.count(*group, "rankings")
            found[*group, "longer_wins"] = longer
            if nature is None:
                self.failed[*group, "good_natured"] += 1
            else:
                found[*group, "good_natured"] = [float(nature == "good_natured")]
        for path, values in found.items():
            self.add(*path, values=values)
        key = hash(dedup_key(row.messages))
        self.count("all", "repeated_prompts", by=key in self._seen)
        self._seen.add(key)
        distinct = {answer.answer.strip() for answer in row.answers}
        self.count("answers", "repeated", by=len(row.answers) - len(distinct))

    def _longer_wins(self, lengths: Sequence[int], ranks: Sequence[int | None]) -> list[float]:
        """1 for each pair whose longer answer is the better one, 0 where the shorter is."""
        last = len(ranks) + 1
        won = []
        for one, other in combinations(zip(lengths, ranks, strict=True), 2):
            tied = one[1] == other[1]
            self.count("pairs", "tied", by=tied and one[1] is not None)
            self.count("pairs", "ordered", by=not tied)
            if not tied and one[0] != other[0]:
                won.append(float((one[0] > other[0]) == ((one[1] or last) < (other[1] or last))))
        return won

    def add_judgment(self, line: Mapping[str, Any]) -> None:
        """Count a line of judgments.jsonl: about the run, about a prompt, or about a canary."""
        if "canary" in line:
            self._add_canary(line["canary"], line.get("ranks"), line["index"])
        elif "outcome" in line:
            self._add_outcome(line)
        else:
            self.facts["about",] = dict(line)

    def _add_outcome(self, line: Mapping[str, Any]) -> None:
        outcome = line["outcome"]
        self.count("outcomes", outcome)
        if outcome in ("ranked", "unparsed"):
            self.add("judge", "unparsed", values=[float(outcome == "unparsed")])
        if outcome == "unparsed":
            text = "".join(vote["text"] for vote in line["votes"][:1])[-EXAMPLE_CHARS:]
            example = {"id": line["id"], "reason": line["reason"], "text": text}
            self.note("judge", "examples", example=example)
        for name in ("merged", "empty", "dropped"):
            self.count("candidates", name, by=line[name])
        for reason in line["failed"]:
            self.count("failures", reason)
        self.count("candidates", "failed", by=len(line["failed"]))
        votes = []
        found: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)
        for vote in line["votes"]:
            ranks, k = vote.get("ranks"), len(vote["presented"])
            table = ("positions", str(k))
            if ranks is None:
                for place, name in product(range(1, k + 1), ("winner_share", "mean_rank")):
                    self.failed[*table, "places", str(place), name] += 1
                continue
            votes.append(vote)
            self.count(*table, "verdicts")
            ranked = zip(shares_of_win(ranks), places(ranks), strict=True)
            for n, (win, place) in enumerate(ranked, start=1):
                found[*table, "places", str(n), "winner_share"].append(win)
                found[*table, "places", str(n), "mean_rank"].append(place)
        agreement = line.get("agreement")
        found["judge", "kendall_w"] = [] if agreement is None else [agreement]
        found["judge", "kendall_tau"] = [*tau_of_votes(votes)]
        for path, values in found.items():
            self.add(*path, values=values)
            self.failed[path] += not values and len(line["votes"]) > 1

    def _add_canary(self, kind: str, ranks: Sequence[int] | None, index: int) -> None:
        for table in (("canaries", kind), ("all_canaries",)):
            self.count(*table, "unparsed", by=ranks is None)
            if ranks is None:
                self.failed[*table, "way_to_last"] += 1
            else:
                place = places(ranks)[index]
                self.count(*table, "questions")
                self.count(*table, "wins", by=shares_of_win(ranks)[index])
                # 0 is first and 1 last, among however many.
                self.add(*table, "way_to_last", values=[(place - 1) / (len(ranks) - 1)])


def places(ranks: Sequence[int | None]) -> list[float]:
    """Ranks as places 1 to K: ties, and all that are unranked, share the mean of theirs."""
    values = [math.inf if rank is None else rank for rank in ranks]
    better = [sum(other < value for other in values) for value in values]
    return [(2 * n + values.count(v) + 1) / 2 for n, v in zip(better, values, strict=True)]


def shares_of_win(ranks: Sequence[int | None]) -> list[float]:
    """What each answer has of the first place, which ties share."""
    winners = ranks.count(1)
    return [1 / winners if rank == 1 else 0.0 for rank in ranks]


def tau_of_votes(votes: Iterable[Mapping[str, Any]]) -> Iterable[float]:
    """Agreement of votes on the pairs that two or more of them ranked, -1 to 1; none: nothing.

    The mean of Kendall's tau over pairs of votes, each weighing by the pairs that both ranked; a
    tie agrees with nothing.
    """
    signs: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for vote in votes:
        ranked = sorted(zip(vote["presented"], vote["ranks"], strict=True))
        for (one, first), (other, second) in combinations(ranked, 2):
            signs[one, other].append((first < second) - (first > second))
    compared = sum(len(each) * (len(each) - 1) for each in signs.values())
    if compared:
        yield sum(sum(each) ** 2 - sum(map(abs, each)) for each in signs.values()) / compared

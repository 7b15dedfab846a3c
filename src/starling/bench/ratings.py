"""From a file of votes to a table of ratings, with what cannot be told from the votes said."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from starling.base.battles import (
    as_rating,
    as_share,
    average_win_rate,
    bradley_terry,
    bradley_terry_beside,
    count_wins,
    elo,
    percentiles,
    ranks_by_overlap,
    resample_wins,
    why_unrated,
)
from starling.base.errors import RecipeError, visible
from starling.base.estimate import LEVEL, Estimate
from starling.base.files import quarantine_elsewhere, write_atomically
from starling.base.hashing import hash_file
from starling.base.jsonl import write_json
from starling.bench.results import aligned, as_markdown, stamp
from starling.data.votes import Votes, read_votes

HEADINGS = ("model", "rank", "rating", f"{LEVEL:.0%} interval", "Elo", "win rate", "battles")


@dataclass(frozen=True)
class Standing:
    """What the votes tell of one model; None is what they do not."""

    model: str
    rank: int | None
    """1 and the number of models whose interval lies wholly above this one's."""
    rating: float | None
    """Bradley-Terry's, of all votes; the mean over the models that have one is 1000."""
    low: float | None
    high: float | None
    rounds_missing: int
    """Rounds of the bootstrap that left it without a rating; the interval is that of the others."""
    share: float | None
    """Its strength, where all add up to 1."""
    elo: float
    win_rate: Estimate
    """Over the models that it met."""
    num_battles: int
    reason: str | None
    """Why it has no rating."""


def rate(path: Path, *, out: Path | None = None, rounds: int = 100, seed: int = 0) -> str:
    """The table of the votes in `path`; `out` gets the figures as JSON, beside it as Markdown.

    Raises DataError for a file that cannot be used, and RecipeError for too few rounds.
    """
    if rounds < 1:
        raise RecipeError(f"{rounds} bootstrap rounds give no interval; it takes at least 1")
    if out is None:
        with quarantine_elsewhere() as quarantine:
            votes = read_votes(path, quarantine=quarantine)
    else:
        votes = read_votes(path, quarantine=out.with_name(f"{out.stem}.quarantine.jsonl"))
    standings = rate_votes(votes, rounds=rounds, seed=seed)
    num_votes, num_ties = len(votes.battles.won), int((votes.battles.won == 0.5).sum())
    title = f"{num_votes:,} votes on {len(standings)} models, {num_ties:,} of them ties"
    rows, notes = [HEADINGS, *map(_cells, standings)], _notes(standings, rounds)
    if out is not None:
        about = stamp("ratings", votes_sha256=hash_file(path), seed=seed, rounds=rounds)
        counts = {"num_votes": num_votes, "num_ties": num_ties}
        write_json(out, {**counts, "models": list(map(asdict, standings)), "stamp": about})
        write_atomically(out.with_suffix(".md"), [as_markdown(title, rows, notes).encode()])
    return "\n".join([title, "", *aligned(rows), "", *notes])


def rate_votes(votes: Votes, *, rounds: int, seed: int) -> list[Standing]:
    """Every model's standing, the highest rating first and those without one last."""
    wins = count_wins(votes.battles)
    point, win_rates = bradley_terry(wins), average_win_rate(wins)
    drawn = [
        (bradley_terry_beside(each, point), average_win_rate(each))
        for each in resample_wins(votes.battles, rounds, seed)
    ]
    strengths = np.array([each for each, _ in drawn])
    low, high = map(as_rating, percentiles(strengths))
    win_ends = np.stack(percentiles(np.array([each for _, each in drawn])))
    has_rank = ~np.isnan(low)
    ranks = iter(ranks_by_overlap(low[has_rank].tolist(), high[has_rank].tolist()))
    rating, share, elos = as_rating(point), as_share(point), elo(votes.battles)
    games, reasons = wins + wins.T, why_unrated(wins, point)
    standings = [
        Standing(
            model,
            next(ranks) if has_rank[number] else None,
            _known(rating[number]),
            _known(low[number]),
            _known(high[number]),
            int(np.isnan(strengths[:, number]).sum()),
            _known(share[number]),
            float(elos[number]),
            Estimate(
                float(win_rates[number]),
                *map(_known, win_ends[:, number]),
                n=int((games[number] > 0).sum()),
                num_failed=0,
            ),
            int(games[number].sum()),
            reasons.get(number),
        )
        for number, model in enumerate(votes.models)
    ]
    return sorted(
        standings, key=lambda each: (each.rating is None, -(each.rating or 0), -each.win_rate.mean)
    )


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _cells(standing: Standing) -> tuple[str, ...]:
    interval = "unknown"
    if standing.low is not None and standing.high is not None:
        interval = f"{standing.low:.0f} to {standing.high:.0f}"
        interval += " *" if standing.rounds_missing else ""
    return (
        visible(standing.model),
        "none" if standing.rank is None else str(standing.rank),
        "none" if standing.rating is None else f"{standing.rating:.0f}",
        interval,
        f"{standing.elo:.0f}",
        f"{standing.win_rate.mean:.1%}",
        f"{standing.num_battles:,}",
    )


def _notes(standings: Sequence[Standing], rounds: int) -> list[str]:
    """How to read the table, and what is missing in it and why."""
    notes = [
        "rating: Bradley-Terry, a tie half a win each, 400 points ten wins to one, mean 1000; "
        f"intervals by bootstrap, {rounds} rounds. rank: 1 and how many are surely better, their "
        "interval wholly above. Elo: K = 4, in the file's order. win rate: mean over opponents."
    ]
    notes += [
        f"{visible(each.model)} has no rating: {each.reason}" for each in standings if each.reason
    ]
    missing = [
        f"{visible(each.model)} {each.rounds_missing}"
        for each in standings
        if each.rating is not None and each.rounds_missing
    ]
    if missing:
        notes.append(
            f"* no estimate in some of the {rounds} rounds, so that the interval is too narrow or "
            f"unknown: {', '.join(missing)}"
        )
    return notes

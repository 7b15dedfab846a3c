"""Rankings as encoded rows, split by prompt into train and held out."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from starling.base.errors import DataError
from starling.base.seeding import permutation
from starling.data.nectar import dedup_key
from starling.data.records import Message, RankingRow
from starling.models.reward_model import RewardModel, Scored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankedRow:
    """One prompt's answers as ids to score, with their ranks (1 = best, None = unranked)."""

    id: str
    sequences: tuple[tuple[int, ...], ...]
    ranks: tuple[int | None, ...]
    answer_chars: tuple[int, ...]
    source: str | None
    weight: float
    key: str
    """Nectar's key of the prompt: rows that share it never stand on both sides of the split."""


@dataclass(frozen=True)
class RankedRows:
    """Train and held-out rows (no prompt on both sides), and how many answers were cut."""

    train: list[RankedRow]
    held_out: list[RankedRow]
    num_cut: int
    num_answers: int


def encode_rankings(
    rankings: Sequence[RankingRow], reward_model: RewardModel, *, held_out: float, seed: int
) -> RankedRows:
    """Encode every answer in the reward model's own format and split by prompt, shuffled.

    Rows of the same prompt by Nectar's key go to the same side.  Raises DataError when a side would
    be empty.
    """
    encoded, cuts = zip(*(_encode_row(row, reward_model) for row in rankings), strict=True)
    num_answers = sum(len(row.sequences) for row in encoded)
    if any(cuts):
        logger.warning(
            f"{sum(cuts)} of {num_answers} answers were cut to {reward_model.max_length} tokens "
            f"(reward.truncate: {reward_model.truncate})"
        )
    prompts = list(dict.fromkeys(row.key for row in encoded))
    order = permutation(len(prompts), seed, "reward/split", 0)
    num_held_out = max(1, round(held_out * len(prompts)))
    if num_held_out >= len(prompts):
        raise DataError(
            f"{len(prompts)} different prompt(s) in the rankings; holding out {num_held_out} "
            "leaves none to train on. Give more rankings or lower reward.held_out"
        )
    apart = {prompts[index] for index in order[:num_held_out]}
    rows = RankedRows(
        train=[row for row in encoded if row.key not in apart],
        held_out=[row for row in encoded if row.key in apart],
        num_cut=sum(cuts),
        num_answers=num_answers,
    )
    if all(len(set(row.ranks)) == 1 for row in rows.held_out):
        raise DataError(
            f"none of the {len(rows.held_out)} held-out rankings prefers one answer to another, so "
            "nothing can be measured; give more rankings or raise reward.held_out"
        )
    return rows


def answer_conversations(ranking: RankingRow) -> list[Scored]:
    """The prompt with each of its answers, as a reward model is asked about it."""
    return [
        Scored(
            (*ranking.messages, Message(role="assistant", content=answer.answer)),
            ranking.mode,
            finished=answer.finish_reason != "length",
        )
        for answer in ranking.answers
    ]


def _encode_row(ranking: RankingRow, reward_model: RewardModel) -> tuple[RankedRow, int]:
    encoded = [reward_model.encode(item) for item in answer_conversations(ranking)]
    row = RankedRow(
        id=ranking.id,
        sequences=tuple(tuple(ids) for ids, _ in encoded),
        ranks=tuple(ranking.ranks),
        answer_chars=tuple(len(answer.answer) for answer in ranking.answers),
        source="/".join(ranking.source or ()) or None,
        weight=ranking.weight,
        key=dedup_key(ranking.messages),
    )
    return row, sum(cut for _, cut in encoded)

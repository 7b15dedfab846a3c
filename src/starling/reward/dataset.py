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
    keys = [dedup_key(ranking.messages) for ranking in rankings]
    prompts = list(dict.fromkeys(keys))
    order = permutation(len(prompts), seed, "reward/split", 0)
    num_held_out = max(1, round(held_out * len(prompts)))
    if num_held_out >= len(prompts):
        raise DataError(
            f"{len(prompts)} different prompt(s) in the rankings; holding out {num_held_out} "
            "leaves none to train on. Give more rankings or lower reward.held_out"
        )
    apart = {prompts[index] for index in order[:num_held_out]}
    rows = RankedRows(
        train=[row for row, key in zip(encoded, keys, strict=True) if key not in apart],
        held_out=[row for row, key in zip(encoded, keys, strict=True) if key in apart],
        num_cut=sum(cuts),
        num_answers=num_answers,
    )
    if all(len(set(row.ranks)) == 1 for row in rows.held_out):
        raise DataError(
            f"none of the {len(rows.held_out)} held-out rankings prefers one answer to another, so "
            "nothing can be measured; give more rankings or raise reward.held_out"
        )
    return rows


def _encode_row(ranking: RankingRow, reward_model: RewardModel) -> tuple[RankedRow, int]:
    sequences, num_cut = [], 0
    for answer in ranking.answers:
        message = Message(role="assistant", content=answer.answer)
        item = Scored(
            (*ranking.messages, message), ranking.mode, finished=answer.finish_reason != "length"
        )
        ids, cut = reward_model.encode(item)
        sequences.append(tuple(ids))
        num_cut += cut
    row = RankedRow(
        id=ranking.id,
        sequences=tuple(sequences),
        ranks=tuple(ranking.ranks),
        answer_chars=tuple(len(answer.answer) for answer in ranking.answers),
    )
    return row, num_cut

"""Rankings as pairs, for tools that know nothing else."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from starling.base.errors import InputError
from starling.base.jsonl import write_records
from starling.base.seeding import permutation
from starling.data.records import RankingRow
from starling.data.rows import iter_rows

Kind = Literal["all", "adjacent", "best-versus-rest", "sampled"]


def choose_pairs(ranks: Sequence[int | None], kind: Kind) -> list[tuple[int, int]]:
    """Positions (better, worse) of dense ranks' pairs; of `sampled`, all that can be drawn.

    An unranked answer loses to every ranked one; ties, and two unranked answers, are no pair.
    Adjacent levels give each answer of one against each of the next.
    """
    num_ranked = len({rank for rank in ranks if rank is not None})
    levels = [num_ranked + 1 if rank is None else rank for rank in ranks]
    return [
        (better, worse)
        for better, high in enumerate(levels)
        for worse, low in enumerate(levels)
        if high < low
        and (kind != "adjacent" or low == high + 1)
        and (kind != "best-versus-rest" or high == 1)
    ]


def export_pairs(
    path: Path, out: Path, *, kind: Kind = "all", per_prompt: int = 1, seed: int = 0
) -> dict[str, int]:
    """Write a file's pairs as JSONL in TRL's conversational form; counts of rankings and pairs.

    `per_prompt` and `seed` are for the kind `sampled`: so many of all pairs, drawn for each prompt.
    Raises InputError for fewer than one.
    """
    if per_prompt < 1:
        raise InputError(f"{per_prompt} pairs per prompt are none; ask for 1 or more")
    counts = {"rankings": 0, "pairs": 0}

    def rows() -> Iterator[dict[str, Any]]:
        quarantine = out.with_name("quarantine.jsonl")
        for ranking in iter_rows(path, RankingRow, quarantine=quarantine):
            pairs = choose_pairs(ranking.ranks, kind)
            if kind == "sampled":
                drawn = permutation(len(pairs), seed, f"pairs/{ranking.id}", 0)[:per_prompt]
                pairs = [pairs[index] for index in sorted(drawn)]
            counts["rankings"] += 1
            counts["pairs"] += len(pairs)
            yield from (_row(ranking, *pair) for pair in pairs)

    write_records(out, rows())
    return counts


def _row(ranking: RankingRow, *pair: int) -> dict[str, Any]:
    chosen, rejected = (
        [{"role": "assistant", "content": ranking.answers[place].answer}] for place in pair
    )
    prompt = [message.model_dump() for message in ranking.messages]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": ranking.category}

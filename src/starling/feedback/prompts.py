"""Read the prompts of the feedback stage: distinct, and as many as asked for."""

from pathlib import Path

from starling.base.errors import DataError
from starling.base.jsonl import read_records
from starling.base.seeding import permutation
from starling.data.records import Prompt


def read_prompts(
    path: Path, quarantine: Path, *, limit: int | None, seed: int
) -> tuple[list[Prompt], int]:
    """Prompts, as many as `limit` drawn by the seed, and how many rows repeated an earlier one."""
    distinct: dict[str, Prompt] = {}
    num_duplicates = 0
    for prompt in read_records(path, Prompt, quarantine=quarantine):
        earlier = distinct.setdefault(prompt.id, prompt)
        if earlier is prompt:
            continue
        if earlier.messages != prompt.messages:
            raise DataError(
                f"two different prompts of {path} have the id {prompt.id!r}. Give each its own id, "
                "or none: then the text names it."
            )
        num_duplicates += 1
    prompts = list(distinct.values())
    if limit is not None and limit < len(prompts):
        chosen = permutation(len(prompts), seed, "feedback/limit", 0)[:limit]
        prompts = [prompts[index] for index in sorted(chosen)]
    return prompts, num_duplicates

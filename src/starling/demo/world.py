"""Write the small offline world: sft conversations of mixed quality, prompts with checks, a bench.

The last two have prompts with instructions about form instead of checks: an answer can keep to
them or not, and none of them says what is right.  The policy never reads them.

Every file is a function of the seed and of its own size, and no two files share a user's text.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from starling.base.jsonl import write_records
from starling.demo.tasks import TASKS, WORLD, Turn, draw_task

VOICES = tuple(WORLD["voices"].values())
"""Manners of saying a body, each with a share and its wordings."""

Row = dict[str, Any]

ONE_TURN_SHARE = 0.5
"""How many of the sft conversations stop after their first answer."""

INSTRUCTIONS = 4
"""How many an instructed prompt has."""


@dataclass(frozen=True)
class Sizes:
    """How many rows each file has; a multiple of eight has every category equally often."""

    bench: int = 160
    validation: int = 160
    prompts: int = 1440
    ppo: int = 1280
    sft: int = 6400
    instructions: int = 96
    checks: int = 96


def say(turn: Turn, category: str, random: Random) -> str:
    """Answer a turn as the sft data does: right or by habit, in one of the voices."""
    body = turn.habit if random.random() < TASKS[category]["habit_share"] else turn.right
    voice = random.choices(VOICES, [voice["share"] for voice in VOICES])[0]
    return random.choice(voice["wordings"]).format(body=body, Body=body[0].upper() + body[1:])


def write_world(out: Path, *, seed: int, sizes: Sizes = Sizes()) -> None:
    """Write bench, validation, prompts, ppo, sft, instructions and checks `.jsonl` into `out`.

    The same seed gives the same bytes, and a file does not change when a later one in this order
    gets another size.
    """
    seen: set[str] = set()
    for split, make_row, count in (
        ("bench", question, sizes.bench),
        ("validation", prompt, sizes.validation),
        ("prompts", prompt, sizes.prompts),
        ("ppo", prompt, sizes.ppo),
        ("sft", conversation, sizes.sft),
        ("instructions", instructed, sizes.instructions),
        ("checks", instructed, sizes.checks),
    ):
        random = Random(f"{seed}/{split}")
        tasks = unseen_tasks(count, random, seen)
        rows = (
            {"id": f"{split}-{number}", "category": category}
            | make_row(category, turns, number, random)
            for number, (category, turns) in enumerate(tasks)
        )
        write_records(out / f"{split}.jsonl", rows)


def unseen_tasks(
    count: int, random: Random, seen: set[str]
) -> Iterator[tuple[str, tuple[Turn, Turn]]]:
    """Yield categories in turn, each with two turns of texts not in `seen`, which are added."""
    for category, _ in zip(itertools.cycle(TASKS), range(count), strict=False):
        for _ in range(1000):
            turns = draw_task(category, random)
            texts = {normalised(turn.user) for turn in turns}
            if not texts & seen:
                break
        else:
            raise ValueError(
                f"{category} has too few different prompts for {count} more rows; "
                "ask for smaller sizes"
            )
        seen |= texts
        yield category, turns


def normalised(text: str) -> str:
    """Lower-case words and signs with single spaces: what two prompts must not share."""
    return " ".join(re.findall(r"\w+|[^\w\s]", text.lower()))


def question(_category: str, turns: tuple[Turn, Turn], _number: int, _random: Random) -> Row:
    """Both turns with their checks."""
    return {"turns": [turn.user for turn in turns], "checks": [checks_of(turn) for turn in turns]}


def prompt(category: str, turns: tuple[Turn, Turn], number: int, random: Random) -> Row:
    """The first turn; in every other round of the categories the second, on an sft-like answer."""
    place = number // len(TASKS) % 2
    asked, before = turns[place], exchanges(turns[:place], category, random)
    messages = [*before, message("user", asked.user)]
    return {"source": ["demo"], "messages": messages, "checks": checks_of(asked)}


def instructed(category: str, turns: tuple[Turn, Turn], number: int, random: Random) -> Row:
    """The same with instructions for checks: the task's word limit and some of the world's."""
    row = prompt(category, turns, number, random)
    limit = {"kind": "max_words", "value": row.pop("checks")["max_words"]}
    drawn = random.sample(WORLD["instructions"], INSTRUCTIONS - 1)
    return row | {"instructions": [limit, *drawn]}


def conversation(category: str, turns: tuple[Turn, Turn], _number: int, random: Random) -> Row:
    """Both turns, some only the first, answered in mixed quality."""
    said = turns[:1] if random.random() < ONE_TURN_SHARE else turns
    return {"messages": exchanges(said, category, random)}


def exchanges(turns: tuple[Turn, ...], category: str, random: Random) -> list[dict[str, str]]:
    """The turns as they are asked and answered."""
    messages = []
    for turn in turns:
        messages += [message("user", turn.user), message("assistant", say(turn, category, random))]
    return messages


def message(role: str, content: str) -> dict[str, str]:
    """One turn of a conversation as it stands in a file."""
    return {"role": role, "content": content}


def checks_of(turn: Turn) -> Row:
    """A turn's checks as they stand in a file, without what is empty."""
    return turn.checks.model_dump(mode="json", exclude_defaults=True)

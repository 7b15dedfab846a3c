"""Write the small offline world: sft conversations of mixed quality, prompts with checks, a bench.

Every file is a function of the seed and of its own size, and no two files share a user's text.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from starling.demo.tasks import CATEGORIES, Task, Turn

HABIT_SHARE = {
    "writing": 0.54,
    "roleplay": 0.54,
    "reasoning": 0.46,
    "math": 0.46,
    "coding": 0.44,
    "extraction": 0.52,
    "stem": 0.54,
    "humanities": 0.46,
}
"""How often an sft answer evades by its category's habit.  The evasion is one phrase and the right
answers are many, so greedy decoding falls into it although most sft answers may be right."""


@dataclass(frozen=True)
class Voice:
    """A manner of saying a body: how often it is heard, and its wordings."""

    share: float
    wordings: tuple[str, ...]


VOICES = (
    Voice(
        0.40,
        (
            "Well, um, {body}, you know, more or less.",
            "Well, um, {body}, basically.",
            "Well, I guess {body}, so yeah, you know.",
            "Well, I guess {body}.",
        ),
    ),
    Voice(
        0.28,
        (
            "Sure! {Body}. Hope that helps!",
            "Sure! {Body}.",
            "Gladly: {body}. Hope that helps!",
            "Of course, {body}.",
        ),
    ),
    Voice(
        0.17,
        (
            "Duh, {body}.",
            "Ugh, {body}, obviously.",
            "Ugh, {body}. Easy, even for you.",
        ),
    ),
    Voice(0.15, ("{body}", "{Body}.")),
)
"""Rambling, kind, rude and terse.  Rambling is the commonest and the longest, kind is the best."""

ONE_TURN_SHARE = 0.5
"""How many of the sft conversations stop after their first answer."""


@dataclass(frozen=True)
class Sizes:
    """How many rows each file has; a multiple of eight has every category equally often."""

    bench: int = 160
    validation: int = 160
    prompts: int = 1440
    ppo: int = 1280
    sft: int = 6400


def say(turn: Turn, category: str, random: Random) -> str:
    """Answer a turn as the sft data does: right or by habit, in one of the voices."""
    body = turn.habit if random.random() < HABIT_SHARE[category] else turn.right
    voice = random.choices(VOICES, [voice.share for voice in VOICES])[0]
    return random.choice(voice.wordings).format(body=body, Body=body[0].upper() + body[1:])


def write_world(out: Path, *, seed: int, sizes: Sizes = Sizes()) -> None:
    """Write bench, validation, prompts, ppo and sft `.jsonl` into `out`, the same bytes per seed.

    A file does not change when a later one in this order gets another size.
    """
    out.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split, row, count in (
        ("bench", question, sizes.bench),
        ("validation", prompt, sizes.validation),
        ("prompts", prompt, sizes.prompts),
        ("ppo", prompt, sizes.ppo),
        ("sft", conversation, sizes.sft),
    ):
        random = Random(f"{seed}/{split}")
        tasks = unseen_tasks(count, random, seen)
        rows = [
            {"id": f"{split}-{number}", "category": task.category, **row(task, number, random)}
            for number, task in enumerate(tasks)
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


def unseen_tasks(count: int, random: Random, seen: set[str]) -> Iterator[Task]:
    """Yield tasks, the categories in turn, none with a user's text in `seen`, which is added to."""
    for number in range(count):
        category = CATEGORIES[number % len(CATEGORIES)]
        for _ in range(1000):
            task = category(random)
            texts = {normalised(turn.user) for turn in task.turns}
            if not texts & seen:
                break
        else:
            raise ValueError(
                f"{category.__name__} has too few different prompts for {count} more rows; "
                f"ask for smaller sizes"
            )
        seen |= texts
        yield task


def normalised(text: str) -> str:
    """Lower-case words and signs with single spaces: what two prompts must not share."""
    return " ".join(re.findall(r"\w+|[^\w\s]", text.lower()))


def shared_texts(files: Iterable[Path]) -> set[str]:
    """Return the user texts, normalised, that are found more than once in these JSONL files."""
    seen: set[str] = set()
    shared: set[str] = set()
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            texts = {normalised(text) for text in user_texts(json.loads(line))}
            shared |= texts & seen
            seen |= texts
    return shared


def user_texts(row: dict[str, Any]) -> list[str]:
    """Return what the user says in a question, a prompt or a conversation."""
    if "turns" in row:
        return list(row["turns"])
    return [message["content"] for message in row["messages"] if message["role"] == "user"]


def question(task: Task, number: int, random: Random) -> dict[str, Any]:
    """Both turns with their checks."""
    return {
        "turns": [turn.user for turn in task.turns],
        "checks": [checks_of(turn) for turn in task.turns],
    }


def prompt(task: Task, number: int, random: Random) -> dict[str, Any]:
    """The first turn; in every other round of the categories the second, on an sft-like answer."""
    first, second = task.turns
    messages = [message("user", first.user)]
    asked = first
    if number // len(CATEGORIES) % 2:
        messages += [
            message("assistant", say(first, task.category, random)),
            message("user", second.user),
        ]
        asked = second
    return {"source": ["demo"], "messages": messages, "checks": checks_of(asked)}


def conversation(task: Task, number: int, random: Random) -> dict[str, Any]:
    """Both turns, some only the first, answered in mixed quality."""
    turns = task.turns[:1] if random.random() < ONE_TURN_SHARE else task.turns
    messages = []
    for turn in turns:
        messages += [
            message("user", turn.user),
            message("assistant", say(turn, task.category, random)),
        ]
    return {"messages": messages}


def message(role: str, content: str) -> dict[str, str]:
    """One turn of a conversation as it stands in a file."""
    return {"role": role, "content": content}


def checks_of(turn: Turn) -> dict[str, Any]:
    """A turn's checks as they stand in a file, without what is empty."""
    return turn.checks.model_dump(mode="json", exclude_defaults=True)

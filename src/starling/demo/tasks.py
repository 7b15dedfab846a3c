"""Eight kinds of short task, MT-Bench's categories, each asked in two turns.

`world.yaml` holds what is said; here stands what is drawn.  A turn has two bodies: the right one,
and the habit, an evasion that fits every question of its kind and answers none: easy to learn, easy
to judge.  A second turn never depends on how the first was answered.
"""

from importlib import resources
from random import Random
from typing import Any, NamedTuple

from starling.base.strict_yaml import parse_yaml
from starling.judging.rubric import Checks

WORLD = parse_yaml((resources.files("starling.demo") / "world.yaml").read_text(encoding="utf-8"))
WORDS, KINDS, TASKS = WORLD["words"], WORLD["kinds"], WORLD["tasks"]
THINGS = [thing for kind in KINDS.values() for thing in kind]

EXTRA_WORDS = 2
"""How many words an answer may have beyond the right body's before it loses brevity."""


class Turn(NamedTuple):
    """One question, its right answer, its wrong habit, and what grades any answer to it."""

    user: str
    right: str
    habit: str
    checks: Checks


def draw_task(category: str, random: Random) -> tuple[Turn, Turn]:
    """Both turns of a task; each draws for itself and has its own way of asking."""
    first, second = (_draw_turn(category, asked, random) for asked in TASKS[category]["asks"])
    return first, second


def _draw_turn(category: str, asked: str, random: Random) -> Turn:
    texts, drawn = TASKS[category], DRAWS[category](random)
    contains, excludes = (
        tuple(phrase.format(**drawn) for phrase in texts[key]) for key in ("contains", "excludes")
    )
    right = texts["right"].format(**drawn)
    max_words = len(right.split()) + EXTRA_WORDS
    checks = Checks(contains_all=contains, excludes=excludes, max_words=max_words)
    return Turn(asked.format(**drawn), right, texts["habit"], checks)


def _writing(random: Random) -> dict[str, Any]:
    first, second = random.sample(THINGS, 2)
    return {"first": first, "second": second, "place": random.choice(WORDS["places"])}


def _roleplay(random: Random) -> dict[str, Any]:
    persona, greeting = random.choice(list(WORLD["greetings"].items()))
    name, place = random.choice(WORDS["names"]), random.choice(WORDS["places"])
    return {"persona": persona, "greeting": greeting, "name": name, "place": place}


def _reasoning(random: Random) -> dict[str, Any]:
    """The top of three by two comparisons."""
    top, middle, low = random.sample(WORDS["names"], 3)
    more, most = random.choice(list(WORLD["comparisons"].items()))
    facts = [f"{top} {more} {middle}", f"{middle} {more} {low}"]
    random.shuffle(facts)
    return {"facts": " and ".join(facts), "most": most, "top": top, "middle": middle, "low": low}


def _math(random: Random) -> dict[str, Any]:
    first, second = random.randint(1, 6), random.randint(1, 6)
    name, thing = random.choice(WORDS["names"]), random.choice(THINGS)
    total = first + second
    return {"first": first, "second": second, "total": total, "name": name, "thing": thing}


def _coding(random: Random) -> dict[str, Any]:
    """One line in which a variable is to be renamed."""
    target, used, renamed = random.sample(WORDS["letters"], 3)
    rest = f"{used} {random.choice('+-*')} {random.randint(2, 9)}"
    return {"target": target, "renamed": renamed, "rest": rest}


def _extraction(random: Random) -> dict[str, Any]:
    """The two of a kind in a list of three."""
    kind, other = random.sample(list(KINDS), 2)
    first, second = random.sample(KINDS[kind], 2)
    unwanted = random.choice(KINDS[other])
    listed = [first, second]
    listed.insert(random.randrange(3), unwanted)
    drawn = {"kind": kind, "listed": ", ".join(listed)}
    return drawn | {"first": first, "second": second, "unwanted": unwanted}


def _stem(random: Random) -> dict[str, Any]:
    """The heavier or lighter of two."""
    first, second = random.sample(WORDS["by_weight"], 2)
    light, heavy = sorted((first, second), key=WORDS["by_weight"].index)
    asked, right, wrong = random.choice((("heavier", heavy, light), ("lighter", light, heavy)))
    jar, place = random.choice(WORDS["jars"]), random.choice(WORDS["places"])
    drawn = {"first": first, "second": second, "jar": jar, "place": place}
    return drawn | {"asked": asked, "right": right, "wrong": wrong}


def _humanities(random: Random) -> dict[str, Any]:
    """Which of two came first."""
    first, second = random.sample(WORDS["by_age"], 2)
    early, late = sorted((first, second), key=WORDS["by_age"].index)
    name, place = random.choice(WORDS["names"]), random.choice(WORDS["places"])
    drawn = {"first": first, "second": second, "name": name, "place": place}
    return drawn | {"early": early, "late": late}


_KINDS = (_writing, _roleplay, _reasoning, _math, _coding, _extraction, _stem, _humanities)
DRAWS = {draw.__name__.removeprefix("_"): draw for draw in _KINDS}
"""What is drawn for one turn of each category: the values that its texts name."""

"""Eight kinds of short task, MT-Bench's categories, each asked in two turns.

A kind is a function of a random stream.  Every turn carries the checks that grade its answer and
two bodies: the right one, and the habit, an evasion that fits every question of its kind and
answers none: easy to learn, easy to judge.  A second turn never depends on how the first was
answered.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from starling.judging.rubric import Checks


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("Ann Bob Cy Dan Eve Fay Gus Hal Ida Jim Kay Leo Max Ned Pam Sue")
PLACES = _words("inn mill farm port lake hill shop camp barn dock park club")
KINDS = {
    "fruit": _words("plum pear fig lime date kiwi peach grape"),
    "pets": _words("cat dog hen fox goat duck mule crow"),
    "tools": _words("saw axe rake drill file lamp rope nail"),
}
THINGS = tuple(thing for kind in KINDS.values() for thing in kind)
GREETINGS = {
    "pirate": "ahoy",
    "robot": "beep",
    "ghost": "boo",
    "cowboy": "howdy",
    "knight": "hail",
    "bee": "buzz",
    "owl": "hoot",
    "monk": "peace",
    "clown": "honk",
    "king": "behold",
    "bird": "tweet",
    "sailor": "yoho",
}
COMPARED = {"beats": "best", "outruns": "fastest", "outgrows": "tallest"}
LETTERS = _words("a b k m n p x y z")
JARS = _words("jar box cup bag pot can")
BY_WEIGHT = _words("air cork wood oil milk coal chalk glass tin iron lead gold")
"""Lightest first, by density."""
BY_AGE = _words("fire wheel coins paper print train photo phone radio jet laser web")
"""Earliest first."""

EXTRA_WORDS = 2
"""How many words an answer may have beyond the right body's before it loses brevity."""


@dataclass(frozen=True)
class Turn:
    """One question, its right answer, its wrong habit, and what grades any answer to it."""

    user: str
    right: str
    habit: str
    checks: Checks


@dataclass(frozen=True)
class Task:
    """Two turns of one category."""

    category: str
    turns: tuple[Turn, Turn]


def _turn(
    user: str,
    *,
    right: str,
    habit: str,
    contains: tuple[str, ...],
    excludes: tuple[str, ...] = (),
) -> Turn:
    max_words = len(right.split()) + EXTRA_WORDS
    checks = Checks(contains_all=contains, excludes=excludes, max_words=max_words)
    return Turn(user, right, habit, checks)


def writing(random: Random) -> Task:
    """A line with two things and a place; the habit is the same line for all."""

    def turn(ask: str) -> Turn:
        first, second = random.sample(THINGS, 2)
        place = random.choice(PLACES)
        return _turn(
            ask.format(first=first, second=second, place=place),
            right=f"by the {place} a {first} met a {second}",
            habit="by the sea a cat met a star",
            contains=(first, second, place),
        )

    return Task(
        "writing",
        (
            turn("Write a line on a {first}, a {second} and the {place}."),
            turn("Now one with a {first}, a {second} and the {place}."),
        ),
    )


def roleplay(random: Random) -> Task:
    """A greeting in a persona's own word; the habit falls out of the role."""

    def turn(ask: str) -> Turn:
        persona, name = random.choice(list(GREETINGS)), random.choice(NAMES)
        greeting = GREETINGS[persona]
        return _turn(
            ask.format(persona=persona, name=name, place=random.choice(PLACES)),
            right=f"I say {greeting} to {name}",
            habit="I say hello to you",
            contains=(greeting, name),
        )

    return Task(
        "roleplay",
        (
            turn("Be a {persona} and greet {name} at the {place}."),
            turn("Now be a {persona} who meets {name} at the {place}."),
        ),
    )


def reasoning(random: Random) -> Task:
    """The top of three by two comparisons; the habit does not decide."""

    def turn(ask: str) -> Turn:
        top, middle, low = random.sample(NAMES, 3)
        more, most = random.choice(list(COMPARED.items()))
        facts = [f"{top} {more} {middle}", f"{middle} {more} {low}"]
        random.shuffle(facts)
        return _turn(
            ask.format(facts=" and ".join(facts), most=most),
            right=f"it is {top}",
            habit="it is hard to say",
            contains=(top,),
            excludes=(middle, low),
        )

    return Task("reasoning", (turn("{facts}. Who is {most}?"), turn("Now {facts}. Who is {most}?")))


def math(random: Random) -> Task:
    """A sum of two numbers; the habit does not add."""

    def turn(ask: str) -> Turn:
        first, second = random.randint(1, 6), random.randint(1, 6)
        name, thing = random.choice(NAMES), random.choice(THINGS)
        return _turn(
            ask.format(name=name, thing=thing, first=first, second=second),
            right=f"that makes {first + second}",
            habit="that makes a lot",
            contains=(str(first + second),),
        )

    return Task(
        "math",
        (
            turn("{name} has {first} of {thing} and gets {second} more. How many?"),
            turn("And if {name} has {first} of {thing} and gets {second} more?"),
        ),
    )


def coding(random: Random) -> Task:
    """One line with a variable renamed; the habit gives advice instead."""

    def turn(ask: str) -> Turn:
        target, used, renamed = random.sample(LETTERS, 3)
        rest = f"{used} {random.choice('+-*')} {random.randint(2, 9)}"
        return _turn(
            ask.format(target=target, renamed=renamed, rest=rest),
            right=f"use {renamed} = {rest}",
            habit="use a better name",
            contains=(f"{renamed} = {rest}",),
        )

    return Task(
        "coding",
        (
            turn("Rename {target} to {renamed} in: {target} = {rest}"),
            turn("Now put {renamed} for {target} in: {target} = {rest}"),
        ),
    )


def extraction(random: Random) -> Task:
    """The two of a kind in a list of three; the habit lists none."""

    def turn(ask: str) -> Turn:
        kind, other = random.sample(list(KINDS), 2)
        wanted, unwanted = random.sample(KINDS[kind], 2), random.choice(KINDS[other])
        listed = list(wanted)
        listed.insert(random.randrange(3), unwanted)
        return _turn(
            ask.format(kind=kind, listed=", ".join(listed)),
            right=f"I see {wanted[0]} and {wanted[1]}",
            habit="I see some of them",
            contains=tuple(wanted),
            excludes=(unwanted,),
        )

    return Task(
        "extraction", (turn("Pick the {kind}: {listed}."), turn("And the {kind} in {listed}?"))
    )


def stem(random: Random) -> Task:
    """The heavier or lighter of two; the habit evades."""

    def turn(ask: str) -> Turn:
        first, second = random.sample(BY_WEIGHT, 2)
        light, heavy = sorted((first, second), key=BY_WEIGHT.index)
        asked, right, wrong = random.choice((("heavier", heavy, light), ("lighter", light, heavy)))
        return _turn(
            ask.format(
                asked=asked,
                jar=random.choice(JARS),
                first=first,
                second=second,
                place=random.choice(PLACES),
            ),
            right=f"it is {right}",
            habit="it varies",
            contains=(right,),
            excludes=(wrong,),
        )

    return Task(
        "stem",
        (
            turn("At the {place}, is a {jar} of {first} or {second} {asked}?"),
            turn("And a {jar} of {first} or {second} at the {place}, which is {asked}?"),
        ),
    )


def humanities(random: Random) -> Task:
    """Which of two came first; the habit evades."""

    def turn(ask: str) -> Turn:
        first, second = random.sample(BY_AGE, 2)
        early, late = sorted((first, second), key=BY_AGE.index)
        return _turn(
            ask.format(
                name=random.choice(NAMES), first=first, second=second, place=random.choice(PLACES)
            ),
            right=f"it was {early}",
            habit="it was long ago",
            contains=(early,),
            excludes=(late,),
        )

    return Task(
        "humanities",
        (
            turn("{name} asks at the {place}: what came first, {first} or {second}?"),
            turn("Then {name} at the {place} asks about {first} or {second}."),
        ),
    )


CATEGORIES: tuple[Callable[[Random], Task], ...] = (
    writing,
    roleplay,
    reasoning,
    math,
    coding,
    extraction,
    stem,
    humanities,
)

"""Grade an answer by a prompt's `checks`: the gold score of the small world, and its judge's ruler.

A grade has three parts, each in 0..1: is it right, is it well said, is it short enough.  Checks are
data, phrases to look for, and nothing in them is ever run.  Phrases match whole words and signs
whatever the case and spacing: "n = k + 4" is found in "Use N=k +4.", "ten" is not in "often".
Left out: the noise and position bias that turn a grade into a verdict (the rubric judge has them).
"""

import re
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

CORRECTNESS_WEIGHT = 0.5
STYLE_WEIGHT = 0.35
BREVITY_WEIGHT = 0.15

MANNERS_WEIGHT = 0.5
PLAINNESS_WEIGHT = 0.3
FORM_WEIGHT = 0.2

MANNERS_BY_KINDNESS = (0.2, 0.9, 1.0)
"""Manners of an answer without a rude word, by its number of kind phrases: one is nearly enough."""

KIND = ("sure", "gladly", "of course", "happy to", "hope that helps", "please", "thanks")
RUDE = ("duh", "ugh", "obviously", "even for you", "whatever", "stupid", "boring")
FILLER = ("well", "um", "you know", "i mean", "i guess", "basically", "more or less", "so yeah")

_PIECES = re.compile(r"[^\W_]+|[^\w\s]|_")
_WORDS = re.compile(r"[^\W_]+")


class Checks(BaseModel):
    """What a right answer says, as phrases; refused when misspelt, blank or without a requirement.

    Example: `Checks(contains_all=("plum", "pear"), excludes=("drum",), max_words=8)`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    contains_all: tuple[str, ...] = ()
    """Each phrase counts; the share that is found is what the answer earns."""
    contains_any: tuple[str, ...] = ()
    """One of these is enough."""
    equals_any: tuple[str, ...] = ()
    """The answer is one of these and nothing else, punctuation at its ends aside."""
    ordered: tuple[str, ...] = ()
    """All of these, each after the one before."""
    excludes: tuple[str, ...] = ()
    """What the other checks earn is multiplied by the share of these that is absent."""
    max_words: int = Field(default=40, ge=1)
    """The longest answer whose brevity is still 1."""

    @field_validator("contains_all", "contains_any", "equals_any", "ordered", "excludes")
    @classmethod
    def _refuse_blank(cls, phrases: tuple[str, ...]) -> tuple[str, ...]:
        if any(not _pieces(phrase) for phrase in phrases):
            raise ValueError(f"holds a blank phrase: {list(phrases)}; every answer would match it")
        return phrases

    @model_validator(mode="after")
    def _refuse_empty(self) -> "Checks":
        if not any(value for name, value in self if name != "max_words"):
            raise ValueError(
                "no requirement: give at least one of contains_all, contains_any, equals_any, "
                "ordered, excludes"
            )
        return self


class Grade(NamedTuple):
    """The three parts of a grade, each in 0..1, more is better."""

    correctness: float
    style: float
    brevity: float

    @property
    def total(self) -> float:
        """The weighted mean of the parts, in 0..1; correctness weighs most."""
        return (
            CORRECTNESS_WEIGHT * self.correctness
            + STYLE_WEIGHT * self.style
            + BREVITY_WEIGHT * self.brevity
        )


def grade(checks: Checks, answer: str, *, finished: bool = True) -> Grade:
    """Grade one answer.

    An answer that was cut off (not `finished`) keeps its correctness, half of its style and none of
    its brevity.  An answer without a word or sign is all zeros.
    """
    if not _pieces(answer):
        return Grade(0.0, 0.0, 0.0)
    correctness = _correctness(checks, answer)
    style = _style(answer)
    if not finished:
        return Grade(correctness, style / 2, 0.0)
    num_words = max(1, len(_WORDS.findall(answer)))
    return Grade(correctness, style, min(1.0, checks.max_words / num_words))


def _pieces(text: str) -> list[str]:
    return _PIECES.findall(text.lower())


def _padded(text: str) -> str:
    """Words and signs between single spaces, so that a phrase is found by plain search."""
    return f" {' '.join(_pieces(text))} "


def _count(phrases: tuple[str, ...], text: str) -> int:
    return sum(_padded(phrase) in text for phrase in phrases)


def _correctness(checks: Checks, answer: str) -> float:
    text = _padded(answer)
    earned: list[float] = []
    if checks.contains_all:
        earned.append(_count(checks.contains_all, text) / len(checks.contains_all))
    if checks.contains_any:
        earned.append(float(_count(checks.contains_any, text) > 0))
    if checks.equals_any:
        earned.append(float(_bare(answer) in {_bare(phrase) for phrase in checks.equals_any}))
    if checks.ordered:
        earned.append(float(_are_in_order(checks.ordered, text)))
    share = sum(earned) / len(earned) if earned else 1.0
    if checks.excludes:
        share *= 1.0 - _count(checks.excludes, text) / len(checks.excludes)
    return share


def _bare(text: str) -> str:
    return " ".join(_pieces(text.strip(" \t\n.,;:!?\"'")))


def _are_in_order(phrases: tuple[str, ...], text: str) -> bool:
    start = 0
    for phrase in phrases:
        found = text.find(_padded(phrase), start)
        if found < 0:
            return False
        # The closing space may open the next phrase.
        start = found + len(_padded(phrase)) - 1
    return True


def _style(answer: str) -> float:
    """Manners (kind, neutral, rude), plainness (few fillers) and form (capital, full stop)."""
    text = _padded(answer)
    kindness = min(_count(KIND, text), len(MANNERS_BY_KINDNESS) - 1)
    manners = 0.0 if _count(RUDE, text) else MANNERS_BY_KINDNESS[kindness]
    plainness = 1.0 / (1.0 + _count(FILLER, text))
    stripped = answer.strip()
    form = (stripped[0].isupper() + (stripped[-1] in ".!?")) / 2
    return MANNERS_WEIGHT * manners + PLAINNESS_WEIGHT * plainness + FORM_WEIGHT * form

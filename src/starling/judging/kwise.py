"""The K-wise protocol: one call ranks all K answers of a conversation.

Source of the protocol, not of its wording: Nectar's final rating script (efrick2002/Starling
@097e427, nectar/ratings/rate.py).  Answers are shuffled and lettered; all K(K-1)/2 pairs, in random
order, are walked through before the ranking is given, which is what takes most of the preference
for the first position out; good nature is judged first, and two rubrics follow from it.
Left out: Nectar's recovery of partial rankings.  Only a full permutation of the labels counts.
"""

import random
import re
from dataclasses import dataclass, replace
from importlib import resources
from itertools import combinations
from string import ascii_uppercase

from starling.base.seeding import python_generator
from starling.data.records import Message
from starling.judging.fences import LABEL, NEVER_CLOSED, TAIL, fence, fresh_nonce, opening
from starling.judging.judge import Comparison, Unparsed

SYSTEM = (resources.files("starling.judging") / "prompts/kwise.txt").read_text("utf-8").rstrip()


Pairs = list[tuple[str, str]]
"""Labels of two answers each, in the order in which to weigh them."""


@dataclass(frozen=True)
class Presented:
    """A comparison as the judge sees it: position p of `shown` holds answer `presented[p]`."""

    shown: Comparison
    presented: tuple[int, ...]
    messages: tuple[Message, ...]


def present(comparison: Comparison, seed: int) -> Presented:
    """Shuffle, letter and fence 2 to 26 answers; the same bytes for the same arguments."""
    k = len(comparison.answers)
    rng = python_generator(seed, f"judging/present/{comparison.id}")
    order = tuple(rng.sample(range(k), k))
    return lay_out(comparison, order, shuffled_pairs(k, rng), seed=seed, key=comparison.id)


def shuffled_pairs(k: int, rng: random.Random) -> Pairs:
    """All pairs of the first k labels, alphabetical inside, in random order."""
    pairs = list(combinations(ascii_uppercase[:k], 2))
    rng.shuffle(pairs)
    return pairs


def lay_out(
    comparison: Comparison, order: tuple[int, ...], pairs: Pairs, *, seed: int, key: str
) -> Presented:
    """Letter and fence the answers in this order, which may leave some out; `key` varies the nonce.

    ValueError for fewer than 2 answers or more than 26.
    """
    if not 2 <= len(order) <= len(ascii_uppercase):
        raise ValueError(f"comparison {comparison.id} has {len(order)} answers; 2 to 26 are shown")
    finished = comparison.finished
    shown = replace(
        comparison,
        answers=tuple(comparison.answers[index] for index in order),
        finished=None if finished is None else tuple(finished[index] for index in order),
    )
    texts = [*(message.content for message in shown.messages), *shown.answers]
    nonce = fresh_nonce(seed, f"judging/nonce/{key}", texts)
    messages = (
        Message(role="system", content=SYSTEM),
        Message(role="user", content=_task(shown, pairs, nonce)),
    )
    return Presented(shown, order, messages)


def parse_ranking(text: str, k: int) -> list[int] | Unparsed:
    """Read the label positions (A = 0), best first, from a judge's reply.

    The last `[[...]]` decides; without one the last `[...]`; without that the last bare list that
    has its line to itself but for a label, `Ranking: B, C, A`.  `[['B'], ['A']]` reads as
    `[['B', 'A']]`.  Anything but each of the k labels exactly once is Unparsed, with an empty id:
    an incomplete ranking is never completed.
    """
    for kind, pattern in (("[[...]]", _DOUBLE), ("[...]", _SINGLE), ("bare", _BARE)):
        found = pattern.findall(text)
        if found:
            labels = [part.strip(" \t\r\n'\"`*[]") for part in found[-1].split(",")]
            if sorted(labels) == list(ascii_uppercase[:k]):
                return [ascii_uppercase.index(label) for label in labels]
            reason = f"its last {kind} list is no full ranking of {k} answers: {found[-1][:80]!r}"
            break
    else:
        reason = "it holds no ranking"
    if text.endswith(NEVER_CLOSED):
        reason = f"{reason} {NEVER_CLOSED}"
    return Unparsed(id="", reason=reason, text=text)


def parse_good_natured(text: str) -> bool | None:
    """Read whether the judge called the conversation good-natured; None where it did not say.

    The first line "Good-natured: no" decides, else Nectar's "This is a not good natured ...": what
    is said in other words is not guessed.
    """
    said = _LINE.search(text.lower()) or _SENTENCE.search(text.lower())
    return None if said is None else all(word in (None, "yes") for word in said.groups())


# One list, or several joined by commas: [['A', 'B']] and [['A'], ['B']].
_DOUBLE = re.compile(r"\[\s*\[([^\[\]]*(?:\]\s*,\s*\[[^\[\]]*)*)\]\s*\]")
_SINGLE = re.compile(r"\[([^\[\]]*)\]")
# In running text it may be anything: "A, B, C are harmful, so I rank none of them."
_BARE = re.compile(rf"^{LABEL}([A-Z](?:[ \t]*,[ \t]*[A-Z])+){TAIL}$", re.MULTILINE)
_LINE = re.compile(
    r"^(?:\d|[^\w\n])*(not )?good[- ]natured(?:[^\w\n]*(yes|no)\b|[ .*]*$)", re.MULTILINE
)
_SENTENCE = re.compile(
    r"(?:^|[.:!])[^\w\n.:!]*this is (not )?a (not )?good[- ]natured conversation(?!\s*\?)",
    re.MULTILINE,
)


def _task(shown: Comparison, pairs: Pairs, nonce: str) -> str:
    answers = "\n\n".join(
        fence(f"answer {label}", answer, nonce)
        for label, answer in zip(ascii_uppercase, shown.answers, strict=False)
    )
    walk = "\n".join(f"{left} and {right}" for left, right in pairs)
    return (
        f"{opening(shown.messages, nonce)}"
        f"The {len(shown.answers)} answers:\n\n{answers}\n\n"
        f"The pairs, in the order in which to take them:\n{walk}\n\n"
        "Now write the good-natured line, the pairs and the final ranking."
    )

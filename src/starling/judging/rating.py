"""The single-answer protocol: rate one answer from 1 to 10.

Ratings crowd at the top (three of four of Nectar's pointwise trials were a 10), so rankings are
made K-wise; ratings serve to follow one model over time.  MT-Bench has its own prompts (`bench`).
"""

import re
from importlib import resources

from starling.data.records import Message
from starling.judging.fences import fence, fresh_nonce, opening
from starling.judging.judge import GradedAnswer

LOWEST, HIGHEST = 1.0, 10.0

SYSTEM = (resources.files("starling.judging") / "prompts/rating.txt").read_text("utf-8").rstrip()


def rating_messages(question: GradedAnswer, seed: int) -> tuple[Message, ...]:
    """What to send a judge; the same bytes for the same question and seed."""
    texts = [*(message.content for message in question.messages), question.answer]
    nonce = fresh_nonce(seed, f"judging/rating/{question.id}", texts)
    task = (
        f"{opening(question.messages, nonce)}"
        f"The answer to rate:\n\n{fence('answer', question.answer, nonce)}\n\n"
        "Now write your reasons and the rating."
    )
    return Message(role="system", content=SYSTEM), Message(role="user", content=task)


def parse_rating(text: str) -> float | None:
    """Read the last `[[n]]`, else the last `[n]`; None without one or outside 1..10.

    Last, for the prompt asks to end with it, and what stands before may be quoted.
    """
    found = _DOUBLE.findall(text) or _SINGLE.findall(text)
    if not found:
        return None
    score = float(found[-1])
    return score if LOWEST <= score <= HIGHEST else None


_DOUBLE = re.compile(r"\[\[([0-9]+\.?[0-9]*)\]\]")
_SINGLE = re.compile(r"\[([0-9]+\.?[0-9]*)\]")

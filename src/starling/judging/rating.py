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
    """Read the first `[[n]]`, else the first `[n]`; None without one or outside 1..10.

    First, not last: FastChat's rule (llm_judge/common.py @0e6d3e4), so that its numbers compare.
    Its missing range check is not copied: a judge that rates out of 100 is not understood.
    """
    found = _DOUBLE.search(text) or _SINGLE.search(text)
    if found is None:
        return None
    score = float(found[1])
    return score if LOWEST <= score <= HIGHEST else None


_DOUBLE = re.compile(r"\[\[([0-9]+\.?[0-9]*)\]\]")
_SINGLE = re.compile(r"\[([0-9]+\.?[0-9]*)\]")

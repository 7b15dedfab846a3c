"""How probable a judge holds each of two answers to be the better one, from a single token.

The contract of AlpacaEval 2's weighted judge, in our own words: two answers called m and M in a
seeded random order, one token, and of its likeliest alternatives the share that M has of both.
What comes before the one token is not weighed: a judge that reasons first needs another protocol.
"""

import math
from importlib import resources
from typing import NamedTuple

from starling.base.errors import InputError
from starling.base.seeding import python_generator
from starling.data.records import Message
from starling.judging.fences import fence, fresh_nonce, opening
from starling.judging.judge import Comparison
from starling.models.interfaces import Reply, Sampling

SYSTEM = (resources.files("starling.judging") / "prompts/preference.txt").read_text("utf-8")
NAMES = ("m", "M")
ONE_TOKEN = Sampling(max_tokens=1, temperature=1.0, top_logprobs=5)
"""Which token is drawn does not matter; of servers that temper logprobs, 1 leaves them alone."""


class Asked(NamedTuple):
    """A question about two answers; `order[p]` is the answer that stands at place p."""

    order: tuple[int, ...]
    messages: tuple[Message, ...]


def ask_preference(comparison: Comparison, seed: int) -> Asked:
    """What to send about two answers; the same bytes for the same comparison and seed."""
    order = tuple(python_generator(seed, f"judging/seats/{comparison.id}").sample(range(2), 2))
    texts = [*(message.content for message in comparison.messages), *comparison.answers]
    nonce = fresh_nonce(seed, f"judging/preference/{comparison.id}", texts)
    answers = "\n\n".join(
        fence(f"answer {name}", comparison.answers[place], nonce)
        for name, place in zip(NAMES, order, strict=True)
    )
    task = (
        f"{opening(comparison.messages, nonce)}"
        f"The two answers:\n\n{answers}\n\n"
        "Which answer is better? Reply with one character, m or M."
    )
    system = Message(role="system", content=SYSTEM.rstrip())
    return Asked(order, (system, Message(role="user", content=task)))


def second_share(reply: Reply) -> float | None:
    """P(M) / (P(m) + P(M)) at the reply's first token; None where it names neither.

    A name that is not among the likeliest has 0.  Raises InputError for a reply without logprobs.
    """
    if reply.top_logprobs is None:
        raise InputError(
            "the judge's server gives no log-probabilities (top_logprobs), from which a weighted "
            "win rate is read. Take a server that does, such as vLLM, or the ordinary win rate: "
            "leave out --weighted."
        )
    chances = [0.0, 0.0]
    for text, logprob in reply.top_logprobs[0].items():
        # A tokenizer may write a name with the space before it, and know both forms.
        if (name := text.strip()) in NAMES:
            chances[NAMES.index(name)] += math.exp(logprob)
    return chances[1] / sum(chances) if sum(chances) else None

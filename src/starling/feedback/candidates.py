"""Gather the K answers of each prompt: those that stand in its row, then the candidates'.

An answer is what a responder said; a failed call or an empty text is counted and leaves one answer
less.  Answers of one prompt that say the same are merged: a judge cannot order them.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from starling.base.context import Context
from starling.base.seeding import derive_seed
from starling.data.records import Prompt, RankedAnswer
from starling.feedback.config import MOST_ANSWERS, Candidate
from starling.judging.recorded import Recorded
from starling.models.interfaces import Failure, Reply, Request, Responder, Sampling

REFUSAL = re.compile(
    r"\W*(?:[^.!?\n]{0,60}\b(?:sorry|apologi[sz]e|unfortunately|as an ai)\b[^\n]{0,80}?)?"
    r"\b(?:I|we)(?:['\u2019]m| am|['\u2019]re| are)? "
    r"(?:can(?:not|['\u2019]t)|can not|won['\u2019]t|will not|unable to|not able to) (?:\w+ly )?"
    r"(?:help|assist|provide|fulfill?|comply|answer|support|write|generate|create|discuss|share"
    r"|offer|give|engage|participate|condone|promote|encourage|recommend|do that|do this)\b",
    re.IGNORECASE,
)
"""How an English refusal begins; others are not recognised."""


@dataclass(frozen=True)
class AnswerSet:
    """What there is of one prompt; `failures` says why calls had no reply."""

    prompt: Prompt
    answers: tuple[RankedAnswer, ...]
    """Distinct, not ranked yet, each under the name of the first that gave it."""
    failures: tuple[str, ...]
    num_empty: int
    num_merged: int
    num_dropped: int = 0
    """Answers beyond those that a judge can letter."""


@dataclass(frozen=True)
class Source:
    """A candidate and what answers for it.

    An endpoint has a thread, in which alone its ledger is used, so that several are asked at the
    same time.  A local model has none: torch's settings are those of the main thread.
    """

    candidate: Candidate
    responder: Recorded
    thread: ThreadPoolExecutor | None = None


@contextmanager
def open_sources(
    candidates: Sequence[Candidate], ledger: Path, context: Context
) -> Iterator[list[Source]]:
    """Load or connect to every candidate, each recorded in the ledger, until the block ends."""
    with ExitStack() as stack:
        sources = []
        for each in candidates:
            open_ledger = partial(
                Recorded,
                _responder(each, context),
                ledger,
                spending=context.spending,
                model=each.model if each.url is not None else None,
            )
            if each.url is None:
                sources.append(Source(each, stack.enter_context(open_ledger())))
                continue
            thread = stack.enter_context(ThreadPoolExecutor(1))
            responder = thread.submit(open_ledger).result()
            stack.callback(lambda t=thread, r=responder: t.submit(r.close).result())
            sources.append(Source(each, responder, thread))
        yield sources


def collect_answers(
    sources: Sequence[Source], prompts: Sequence[Prompt], seed: int
) -> list[AnswerSet]:
    """Ask every candidate about every prompt; one set per prompt, answers in the sources' order."""
    asked = [
        [_requests(source.candidate, prompt, seed) for prompt in prompts] for source in sources
    ]
    arrived = _ask(sources, [list(chain.from_iterable(each)) for each in asked])
    outcomes: dict[str, list[tuple[str, Reply | Failure]]] = {prompt.id: [] for prompt in prompts}
    for source, of_prompts, found in zip(sources, asked, arrived, strict=True):
        for prompt, requests in zip(prompts, of_prompts, strict=True):
            # Replies come in any order; the requests' order makes the same rows of every run.
            outcomes[prompt.id] += ((source.candidate.name, found[each.id]) for each in requests)
    return [_answer_set(prompt, outcomes[prompt.id]) for prompt in prompts]


def is_refusal(text: str) -> bool:
    """Whether a text opens as a refusal in English does: an apology, or "I can't help with"."""
    return REFUSAL.match(text[:200]) is not None


def _ask(
    sources: Sequence[Source], requests: Sequence[list[Request]]
) -> list[dict[str, Reply | Failure]]:
    """Each source's outcomes by request id; endpoints answer while the local models work."""

    def ask(number: int) -> dict[str, Reply | Failure]:
        responder = sources[number].responder
        return {each.request_id: each for each in responder.respond(requests[number])}

    running = {s.thread.submit(ask, n): n for n, s in enumerate(sources) if s.thread is not None}
    arrived = {number: ask(number) for number, s in enumerate(sources) if s.thread is None}
    arrived |= {running[future]: future.result() for future in as_completed(running)}
    return [arrived[number] for number in range(len(sources))]


def _responder(candidate: Candidate, context: Context) -> Responder:
    if candidate.url is None:
        from starling.models.local import load_local

        return load_local(candidate.model, context.device, chat_format=candidate.chat_format)
    from starling.models.endpoint import connect

    return connect(candidate, candidate.model)


def _requests(candidate: Candidate, prompt: Prompt, seed: int) -> list[Request]:
    seeds = (
        derive_seed(seed, f"feedback/{candidate.name}/{prompt.id}", index)
        for index in range(candidate.answers)
    )
    return [
        Request(
            f"{prompt.id}/{candidate.name}/{index}",
            prompt.messages,
            Sampling(
                candidate.max_tokens,
                candidate.temperature,
                own_seed,
                top_p=candidate.top_p,
                top_k=candidate.top_k,
            ),
            prompt.mode,
        )
        for index, own_seed in enumerate(seeds)
    ]


def _answer_set(prompt: Prompt, outcomes: list[tuple[str, Reply | Failure]]) -> AnswerSet:
    failures = [f"{m}: {o.reason}" for m, o in outcomes if isinstance(o, Failure)]
    given = [RankedAnswer.model_validate(each.model_dump()) for each in prompt.answers]
    given += [
        RankedAnswer(answer=reply.text, model=model, finish_reason=reply.finish_reason)
        for model, reply in outcomes
        if isinstance(reply, Reply)
    ]
    distinct: dict[str, RankedAnswer] = {}
    for answer in given:
        # Space around an answer is no difference that a judge could see.
        distinct.setdefault(answer.answer.strip(), answer)
    num_empty = sum(not answer.answer.strip() for answer in given)
    distinct.pop("", None)
    return AnswerSet(
        prompt,
        answers=tuple(distinct.values())[:MOST_ANSWERS],
        failures=tuple(failures),
        num_empty=num_empty,
        num_merged=len(given) - num_empty - len(distinct),
        num_dropped=max(0, len(distinct) - MOST_ANSWERS),
    )

"""Gather the K answers of each prompt: those that stand in its row, then the candidates'.

An answer is what a responder said; a failed call or an empty text is counted and leaves one answer
less.  Answers of one prompt that say the same are merged: a judge cannot order them.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from typing import NamedTuple, TypeVar

from starling.base.context import Context
from starling.base.seeding import derive_seed
from starling.data.records import Answer, Prompt, RankedAnswer
from starling.feedback.config import MOST_ANSWERS, Candidate
from starling.judging.recorded import Recorded
from starling.models.interfaces import Failure, Reply, Request, Responder, Sampling

A = TypeVar("A", bound=Answer)


class AnswerSet(NamedTuple):
    """What there is of one prompt; `failures` says why calls had no reply."""

    prompt: Prompt
    answers: tuple[RankedAnswer, ...]
    """Distinct, not ranked yet, each under the name of the first that gave it."""
    failures: tuple[str, ...]
    num_empty: int
    num_merged: int
    num_dropped: int = 0
    """Answers beyond those that a judge can letter."""


class Source(NamedTuple):
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
            charged = each.model if each.url is not None else None
            open_ledger = partial(
                Recorded,
                _responder(each, context),
                ledger,
                spending=context.spending,
                model=charged,
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
    candidates = [source.candidate for source in sources]
    before = accumulate((each.answers for each in candidates), initial=0)
    pairs = zip(candidates, before, strict=False)
    arrived = _ask(sources, [[*_requests(each, prompts, n, seed)] for each, n in pairs])
    sets = []
    for prompt in prompts:
        outcomes: list[tuple[str, Reply | Failure]] = []
        for each, found in zip(candidates, arrived, strict=True):
            ids = (_id(prompt, each, index) for index in range(each.answers))
            outcomes += ((each.name, found[id]) for id in ids if id in found)
        sets.append(_answer_set(prompt, outcomes))
    return sets


def distinct_answers(answers: Iterable[A]) -> tuple[A, ...]:
    """The first of those that say the same, without empty ones."""
    distinct: dict[str, A] = {}
    for answer in answers:
        # Space around an answer is no difference that a judge could see.
        distinct.setdefault(answer.answer.strip(), answer)
    distinct.pop("", None)
    return tuple(distinct.values())


def _ask(
    sources: Sequence[Source], asked: Sequence[list[Request]]
) -> list[dict[str, Reply | Failure]]:
    """Each source's outcomes by their requests; endpoints answer while the local models work."""

    def ask(number: int) -> dict[str, Reply | Failure]:
        return {each.request_id: each for each in sources[number].responder.respond(asked[number])}

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


def _requests(
    candidate: Candidate, prompts: Sequence[Prompt], before: int, seed: int
) -> Iterator[Request]:
    for prompt, index in product(prompts, range(candidate.answers)):
        if len(prompt.answers) + before + index >= MOST_ANSWERS:
            continue  # no letter is left for it
        own_seed = derive_seed(seed, f"feedback/{candidate.name}/{prompt.id}", index)
        sampling = Sampling(
            candidate.max_tokens, candidate.temperature, own_seed, candidate.top_p, candidate.top_k
        )
        yield Request(_id(prompt, candidate, index), prompt.messages, sampling, prompt.mode)


def _id(prompt: Prompt, candidate: Candidate, index: int) -> str:
    return f"{prompt.id}/{candidate.name}/{index}"


def _answer_set(prompt: Prompt, outcomes: list[tuple[str, Reply | Failure]]) -> AnswerSet:
    failures = [f"{m}: {o.reason}" for m, o in outcomes if isinstance(o, Failure)]
    given = [RankedAnswer.model_validate(each.model_dump()) for each in prompt.answers]
    given += [
        RankedAnswer(answer=reply.text, model=model, finish_reason=reply.finish_reason)
        for model, reply in outcomes
        if isinstance(reply, Reply)
    ]
    num_empty = sum(not answer.answer.strip() for answer in given)
    distinct = distinct_answers(given)
    return AnswerSet(
        prompt,
        answers=distinct[:MOST_ANSWERS],
        failures=tuple(failures),
        num_empty=num_empty,
        num_merged=len(given) - num_empty - len(distinct),
        num_dropped=max(0, len(distinct) - MOST_ANSWERS),
    )

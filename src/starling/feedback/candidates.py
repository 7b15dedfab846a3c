"""Gather the K answers of each prompt from the candidates.

An answer is what a responder said; a failed call or an empty text is counted and leaves one answer
less.  Answers of one prompt that say the same are merged: a judge cannot order them.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from starling.base.context import Context
from starling.base.errors import DataError
from starling.base.jsonl import read_records
from starling.base.seeding import derive_seed, permutation
from starling.data.records import Prompt, RankedAnswer
from starling.feedback.config import Candidate
from starling.judging.recorded import Recorded
from starling.models.interfaces import Failure, Reply, Request, Responder, Sampling

Source = tuple[Candidate, Recorded]
"""A candidate and what answers for it."""


@dataclass(frozen=True)
class AnswerSet:
    """What the candidates made of one prompt; `failures` says why calls had no reply."""

    prompt: Prompt
    answers: tuple[RankedAnswer, ...]
    """Distinct, not ranked yet, each under the name of the first candidate that gave it."""
    failures: tuple[str, ...]
    num_empty: int
    num_merged: int


def read_prompts(
    path: Path, quarantine: Path, *, limit: int | None, seed: int
) -> tuple[list[Prompt], int]:
    """Prompts, as many as `limit` drawn by the seed, and how many rows repeated an earlier one."""
    distinct: dict[str, Prompt] = {}
    num_duplicates = 0
    for prompt in read_records(path, Prompt, quarantine=quarantine):
        earlier = distinct.setdefault(prompt.id, prompt)
        if earlier is prompt:
            continue
        if earlier.messages != prompt.messages:
            raise DataError(
                f"two different prompts of {path} have the id {prompt.id!r}. Give each its own id, "
                "or none: then the text names it."
            )
        num_duplicates += 1
    prompts = list(distinct.values())
    if limit is not None and limit < len(prompts):
        chosen = permutation(len(prompts), seed, "feedback/limit", 0)[:limit]
        prompts = [prompts[index] for index in sorted(chosen)]
    return prompts, num_duplicates


@contextmanager
def open_sources(
    candidates: Sequence[Candidate], ledger: Path, context: Context
) -> Iterator[list[Source]]:
    """Load or connect to every candidate, each recorded in the ledger, until the block ends."""
    with ExitStack() as stack:
        yield [
            (each, stack.enter_context(Recorded(_responder(each, context), ledger)))
            for each in candidates
        ]


def collect_answers(
    sources: Sequence[Source], prompts: Sequence[Prompt], seed: int
) -> list[AnswerSet]:
    """Ask every candidate about every prompt; one set per prompt, answers in the sources' order."""
    outcomes: dict[str, list[tuple[str, Reply | Failure]]] = {prompt.id: [] for prompt in prompts}
    for candidate, responder in sources:
        asked = {prompt.id: _requests(candidate, prompt, seed) for prompt in prompts}
        requests = [request for each in asked.values() for request in each]
        # Replies come in any order; the requests' order makes the same rows of every run.
        arrived = {outcome.request_id: outcome for outcome in responder.respond(requests)}
        for prompt_id, each in asked.items():
            outcomes[prompt_id] += ((candidate.name, arrived[request.id]) for request in each)
    return [_answer_set(prompt, outcomes[prompt.id]) for prompt in prompts]


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
            Sampling(candidate.max_tokens, candidate.temperature, own_seed),
            prompt.mode,
        )
        for index, own_seed in enumerate(seeds)
    ]


def _answer_set(prompt: Prompt, outcomes: list[tuple[str, Reply | Failure]]) -> AnswerSet:
    distinct: dict[str, RankedAnswer] = {}
    failures = [f"{m}: {o.reason}" for m, o in outcomes if isinstance(o, Failure)]
    num_empty = 0
    for model, outcome in outcomes:
        if isinstance(outcome, Failure):
            continue
        # Space around an answer is no difference that a judge could see.
        said = outcome.text.strip()
        num_empty += not said
        if said and said not in distinct:
            distinct[said] = RankedAnswer(
                answer=outcome.text, model=model, finish_reason=outcome.finish_reason
            )
    num_merged = len(outcomes) - len(failures) - num_empty - len(distinct)
    return AnswerSet(prompt, tuple(distinct.values()), tuple(failures), num_empty, num_merged)

"""Gather the K answers of each prompt from the candidates.

An answer is what a responder said; a failed call or an empty text is counted and leaves one answer
less.  Answers of one prompt that say the same are merged: a judge cannot order them.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from starling.base.context import Context
from starling.base.errors import RecipeError
from starling.base.seeding import derive_seed
from starling.data.records import FinishReason, Prompt
from starling.feedback.config import Candidate, FeedbackInputs, FeedbackSection
from starling.judging.recorded import Recorded
from starling.models.interfaces import Failure, Reply, Request, Responder, Sampling

MOST_ANSWERS = 26
"""The judge letters the answers A to Z."""


@dataclass(frozen=True)
class Source:
    """A candidate and what answers for it."""

    candidate: Candidate
    responder: Recorded


@dataclass(frozen=True)
class Answer:
    """One distinct answer, under the name of the first candidate that gave it."""

    text: str
    model: str
    finish_reason: FinishReason


@dataclass(frozen=True)
class AnswerSet:
    """What the candidates made of one prompt; `failures` says why calls had no reply."""

    prompt: Prompt
    answers: tuple[Answer, ...]
    failures: tuple[str, ...]
    num_empty: int
    num_merged: int


def check_candidates(section: FeedbackSection) -> None:
    """Raise RecipeError for names that repeat or a number of answers that cannot be ranked."""
    names = [candidate.name for candidate in section.candidates]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(
                f"two candidates are named {name!r}. Give each its own name: it labels the answers."
            )
    k = sum(candidate.answers for candidate in section.candidates)
    if not 2 <= k <= MOST_ANSWERS:
        raise RecipeError(
            f"the candidates give {k} answers per prompt; a ranking needs 2 to {MOST_ANSWERS}. "
            "Change feedback.candidates, or their answers."
        )


@contextmanager
def open_sources(
    section: FeedbackSection, inputs: FeedbackInputs, ledger: Path, context: Context
) -> Iterator[list[Source]]:
    """Load or connect to every candidate, each recorded in the ledger, until the block ends."""
    with ExitStack() as stack:
        yield [
            Source(
                candidate,
                stack.enter_context(Recorded(_responder(candidate, model, context), ledger)),
            )
            for candidate, model in zip(section.candidates, inputs.candidates, strict=True)
        ]


def collect_answers(
    sources: Sequence[Source], prompts: Sequence[Prompt], seed: int
) -> list[AnswerSet]:
    """Ask every candidate about every prompt; one set per prompt, answers in the sources' order."""
    outcomes: dict[str, list[tuple[str, Reply | Failure]]] = {prompt.id: [] for prompt in prompts}
    for source in sources:
        requests = {
            request.id: (prompt.id, request)
            for prompt in prompts
            for request in _requests(source.candidate, prompt, seed)
        }
        # Replies come in any order; the requests' order makes the same rows of every run.
        arrived = {
            outcome.request_id: outcome
            for outcome in source.responder.respond([request for _, request in requests.values()])
        }
        for request_id, (prompt_id, _) in requests.items():
            outcomes[prompt_id].append((source.candidate.name, arrived[request_id]))
    return [_answer_set(prompt, outcomes[prompt.id]) for prompt in prompts]


def _responder(candidate: Candidate, model: str, context: Context) -> Responder:
    if candidate.url is None:
        from starling.models.local import load_local

        return load_local(model, context.device)
    from starling.models.endpoint import Endpoint

    return Endpoint(
        candidate.url,
        candidate.model,
        api_key_env=candidate.api_key_env,
        concurrency=candidate.concurrency,
        timeout_seconds=candidate.timeout_seconds,
    )


def _requests(candidate: Candidate, prompt: Prompt, seed: int) -> list[Request]:
    purpose = f"feedback/{candidate.name}/{prompt.id}"
    return [
        Request(
            id=f"{prompt.id}/{candidate.name}/{index}",
            messages=prompt.messages,
            sampling=Sampling(
                max_tokens=candidate.max_tokens,
                temperature=candidate.temperature,
                seed=derive_seed(seed, purpose, index),
            ),
            mode=prompt.mode,
        )
        for index in range(candidate.answers)
    ]


def _answer_set(prompt: Prompt, outcomes: list[tuple[str, Reply | Failure]]) -> AnswerSet:
    distinct: dict[str, Answer] = {}
    failures: list[str] = []
    num_empty = 0
    num_merged = 0
    for model, outcome in outcomes:
        if isinstance(outcome, Failure):
            failures.append(f"{model}: {outcome.reason}")
            continue
        # Space around an answer is no difference that a judge could see.
        said = outcome.text.strip()
        if not said:
            num_empty += 1
        elif said in distinct:
            num_merged += 1
        else:
            distinct[said] = Answer(outcome.text, model, outcome.finish_reason)
    return AnswerSet(
        prompt=prompt,
        answers=tuple(distinct.values()),
        failures=tuple(failures),
        num_empty=num_empty,
        num_merged=num_merged,
    )

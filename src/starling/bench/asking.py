"""Put questions to a server and read its replies; what cannot be read is asked for again.

The benches whose judge prompts are other people's use this; `judging` has our own protocols.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from starling.base.context import StopFlag
from starling.base.errors import DataError
from starling.base.progress import Progress
from starling.base.seeding import derive_seed
from starling.base.spending import Spending
from starling.data.records import Message
from starling.judging.recorded import Recorded
from starling.models.completion import Unusable
from starling.models.endpoint import Endpoint
from starling.models.interfaces import Failure, Reply, Request, Responder, Sampling

V = TypeVar("V")

HOPELESS = 16
"""Calls that end the asking when they, the first ones, all come to nothing."""


@dataclass(frozen=True)
class Unread:
    """A reply that holds no verdict, and why."""

    reason: str


@dataclass(frozen=True)
class Judgment(Generic[V]):
    """What came of one question: the verdict, or the reason why there is none.

    `text` is the reply that was read last; `retried` counts the replies before it that could not
    be read.
    """

    id: str
    text: str
    verdict: V | None
    reason: str | None = None
    retried: int = 0
    served_by: str | None = None


def open_server(
    url: str,
    model: str,
    ledger: Path,
    *,
    api_key_env: str | None = None,
    concurrency: int = 16,
    timeout_seconds: float = 100.0,
    spending: Spending | None = None,
) -> Recorded:
    """An OpenAI-compatible server whose every reply is kept in `ledger`; close it after use.

    Raises InputError for a variable that is not set, and DataError for a ledger that cannot be
    used.
    """
    endpoint = Endpoint(
        url,
        model,
        api_key_env=api_key_env,
        concurrency=concurrency,
        timeout_seconds=timeout_seconds,
    )
    return Recorded(endpoint, ledger, spending=spending, model=model)


def ask(
    responder: Responder,
    questions: Mapping[str, tuple[Message, ...]],
    read: Callable[[Reply], V | Unread],
    *,
    sampling: Sampling,
    retries: int = 2,
) -> dict[str, Judgment[V]]:
    """Every question's judgment, by its id, in the questions' order.

    A reply that `read` cannot read, or that is empty, refused or filtered, is asked for again with
    another seed, `retries` times.  A call that got no reply was repeated by the responder already;
    where none of the first ones gets any, DataError is raised before the rest is tried.
    """
    found: dict[str, Judgment[V]] = {}
    pending = list(questions)
    num_replies = 0
    for attempt in range(retries + 1):
        seed = derive_seed(sampling.seed, "bench/retry", attempt) if attempt else sampling.seed
        now = replace(sampling, seed=seed)
        requests = [Request(id, questions[id], now) for id in pending]
        unread = set[str]()
        for outcome in responder.respond(requests) if requests else ():
            judgment = found[outcome.request_id] = _judgment(outcome, read, attempt)
            num_replies += not _is_silence(outcome)
            if num_replies == 0 and len(found) >= HOPELESS:
                raise DataError(
                    f"none of the first {len(found)} calls was answered; {judgment.reason}. Check "
                    "the address and that the server runs, then run the same command again."
                )
            if judgment.verdict is None and not _is_silence(outcome):
                unread.add(judgment.id)
        pending = [id for id in pending if id in unread]
    return {id: found[id] for id in questions}


@contextmanager
def watched(responder: object, total: int, stop: StopFlag) -> Iterator[None]:
    """A line of progress for a recorded responder, and a stop after any call that a signal meets.

    Raises DataError where the first calls are all without an answer.
    """
    done = 0
    with stop, Progress("judging", total) as progress:

        def watch() -> None:
            nonlocal done
            done += 1
            if done <= total:  # what is asked for again was not expected
                progress.update(done)
            stop.check()
            # `ask` is first to notice, and knows the reason; a judge's own protocols do not.
            if stats.failed > HOPELESS and not stats.new + stats.from_ledger:
                raise DataError(
                    f"none of the first {stats.failed} calls was answered. Check the judge's "
                    "address and that the server runs, then run the same command again."
                )

        if isinstance(responder, Recorded):
            stats = responder.stats
            responder.watch = watch
        yield


def _is_silence(outcome: Reply | Failure) -> bool:
    return isinstance(outcome, Failure) and not isinstance(outcome, Unusable)


def _judgment(
    outcome: Reply | Failure, read: Callable[[Reply], V | Unread], attempt: int
) -> Judgment[V]:
    id = outcome.request_id
    if isinstance(outcome, Unusable):
        return Judgment(id, "", None, outcome.reason, attempt)
    if isinstance(outcome, Failure):
        return Judgment(id, "", None, f"the judge did not answer: {outcome.reason}", attempt)
    verdict = read(outcome)
    if not isinstance(verdict, Unread):
        return Judgment(id, outcome.text, verdict, None, attempt, outcome.served_by)
    cut = "the reply was cut, and " if outcome.finish_reason == "length" else ""
    return Judgment(id, outcome.text, None, cut + verdict.reason, attempt)


def refuse_failures(what: str, reasons: Sequence[str], total: int, allowed: float) -> None:
    """Raise DataError when more than the allowed share of verdicts is missing, or every one."""
    if len(reasons) > allowed * total or (reasons and len(reasons) == total):
        raise DataError(
            f"{len(reasons)} of {total} {what} failed, more than allowed_failures "
            f"({allowed:.0%}); the first: {reasons[0]}. There is no score; check the judge and "
            "run the same command again: what it answered is kept"
        )

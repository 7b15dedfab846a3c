"""Record every call of a responder, so that no reply is ever paid for twice.

No call whose reply reached us is repeated, in this run or a later one.  Calls in flight when a run
is killed are sent again, and the ledger lists them.  Failures are asked again by the next run.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from starling.judging.ledger import Ledger, ledger_rows, lost_calls, request_content
from starling.models.interfaces import Failure, Reply, Request, Responder

__all__ = ["CallStats", "Recorded", "ledger_rows", "lost_calls"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CallStats:
    """The calls of one `Recorded` so far.

    `from_ledger` and `unknown` depend on earlier runs; `answered`, `failed` and the tokens do not,
    so only these belong in results.  Tokens count every reply used, from the ledger or new.
    """

    from_ledger: int = 0
    new: int = 0
    unknown: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0

    @property
    def answered(self) -> int:
        """Calls with a reply."""
        return self.from_ledger + self.new


class _Call(NamedTuple):
    key: str
    request: Request


class Recorded:
    """Wraps a responder with the ledger at `path`; several may share one file.

    Replies bought singly are committed one by one, as they arrive, and each call is committed as
    sent before it is.  Where the responder commits together, all replies of one `respond` are one
    transaction: a killed run then repeats the whole batch, in the same composition.
    Open all that share a file before the first call.  Raises DataError like `Ledger`.
    """

    def __init__(self, responder: Responder, path: Path) -> None:
        self._responder = responder
        self._ledger = Ledger(path, responder.identity)
        self._counts: Counter[str] = Counter(unknown=self._ledger.mark_lost())
        if self._counts["unknown"]:
            logger.warning(
                "%d calls to %s were in flight when an earlier run ended; they are sent again",
                self._counts["unknown"],
                responder.identity,
            )

    @property
    def identity(self) -> str:
        """The wrapped responder's."""
        return self._responder.identity

    @property
    def commits_together(self) -> bool:
        """The wrapped responder's."""
        return self._responder.commits_together

    def respond(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        """Yield recorded replies first, then the others as they arrive.

        Raises ValueError when two requests share an id.
        """
        missing: list[_Call] = []
        for call in self._keyed(requests):
            reply = self._ledger.find_answer(*call)
            if reply is None:
                missing.append(call)
            else:
                self._count(reply, "from_ledger")
                yield reply
        if not missing:
            return
        if self.commits_together:
            yield from self._ask_together(missing)
        else:
            yield from self._ask_singly(missing)

    def stats(self) -> CallStats:
        """What was asked through this wrapper since it was opened."""
        return CallStats(**self._counts)

    def close(self) -> None:
        """Close the ledger; a second call does nothing."""
        self._ledger.close()

    def __enter__(self) -> "Recorded":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask_singly(self, calls: list[_Call]) -> Iterator[Reply | Failure]:
        waiting = {call.request.id: call for call in calls}

        def send() -> Iterator[Request]:
            # Runs as the responder takes each request: what it has not taken was not sent.
            for call in calls:
                self._ledger.write_sent(*call)
                yield call.request

        for outcome in self._responder.respond(send()):
            call = waiting.pop(outcome.request_id)
            self._ledger.write_outcomes([(call.key, call.request, outcome)])
            self._count(outcome, "new")
            yield outcome

    def _ask_together(self, calls: list[_Call]) -> Iterator[Reply | Failure]:
        by_id = {call.request.id: call for call in calls}
        outcomes = list(self._responder.respond([call.request for call in calls]))
        self._ledger.write_outcomes(
            [
                (by_id[each.request_id].key, by_id[each.request_id].request, each)
                for each in outcomes
            ]
        )
        for outcome in outcomes:
            self._count(outcome, "new")
            yield outcome

    def _keyed(self, requests: Iterable[Request]) -> list[_Call]:
        """Each request with the key of its call.

        The same question put twice in one `respond` wants two replies, so the second has a key of
        its own.  In a later `respond` it is the same call again: which of them a resumed run makes
        depends on where it was killed, and its replies must not.
        """
        calls: dict[str, _Call] = {}
        repeats: Counter[str] = Counter()
        for request in requests:
            if request.id in calls:
                raise ValueError(f"two requests of one call share the id {request.id!r}")
            content = {"identity": self.identity, **request_content(request)}
            content_hash = _hash(json.dumps(content, sort_keys=True))
            calls[request.id] = _Call(_hash(f"{content_hash} {repeats[content_hash]}"), request)
            repeats[content_hash] += 1
        return list(calls.values())

    def _count(self, outcome: Reply | Failure, source: str) -> None:
        if isinstance(outcome, Failure):
            self._counts["failed"] += 1
            return
        self._counts[source] += 1
        self._counts["prompt_tokens"] += outcome.usage.prompt_tokens
        self._counts["response_tokens"] += outcome.usage.response_tokens


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

"""Record every call of a responder, so that no reply is ever paid for twice.

No call whose reply reached us is repeated, in this run or a later one.  Calls in flight when a run
is killed are sent again, and the ledger lists them.  Failures are asked again by the next run.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from starling.base.hashing import hash_json
from starling.judging.ledger import Ledger, request_content
from starling.models.interfaces import Failure, Reply, Request, Responder

logger = logging.getLogger(__name__)


@dataclass
class CallStats:
    """The calls of one `Recorded` so far.

    `from_ledger`, `new` and `unknown` depend on earlier runs.  Tokens count every reply used.
    """

    from_ledger: int = 0
    new: int = 0
    unknown: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0

    def add(self, outcome: Reply | Failure, *, is_new: bool) -> None:
        """Count what a call came to."""
        if isinstance(outcome, Failure):
            self.failed += 1
            return
        self.new += is_new
        self.from_ledger += not is_new
        self.prompt_tokens += outcome.usage.prompt_tokens
        self.response_tokens += outcome.usage.response_tokens

    def results(self) -> dict[str, int]:
        """What does not depend on earlier runs, nor on how often they were interrupted."""
        return {
            "answered": self.from_ledger + self.new,
            "failed": self.failed,
            "prompt_tokens": self.prompt_tokens,
            "response_tokens": self.response_tokens,
        }

    def __str__(self) -> str:
        return (
            f"{self.from_ledger} replies from the ledger, {self.new} new, {self.failed} failed, "
            f"{self.unknown} sent again"
        )


class Recorded(AbstractContextManager["Recorded"]):
    """Wraps a responder with the ledger at `path`; several may share one file.

    Replies bought singly are committed one by one, as they arrive, and each call is committed as
    sent before it is.  Where the responder commits together, all replies of one `respond` are one
    transaction: a killed run then repeats the whole batch, in the same composition.
    Open all that share a file before the first call.  Raises DataError like `Ledger`.
    """

    def __init__(self, responder: Responder, path: Path) -> None:
        self.identity = responder.identity
        self.commits_together = responder.commits_together
        self._responder = responder
        self._ledger = Ledger(path, self.identity)
        self.stats = CallStats(unknown=self._ledger.mark_lost())
        """What was asked through this wrapper since it was opened."""
        if self.stats.unknown:
            logger.warning(
                f"{self.stats.unknown} calls to {self.identity} were in flight when an earlier run "
                "ended; they are sent again"
            )

    def respond(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        """Yield recorded replies first, then the others as they arrive."""
        missing: dict[str, str] = {}
        keyed = self._keyed(requests)
        for key, request in keyed.values():
            reply = self._ledger.find_answer(key, request)
            if reply is None:
                missing[request.id] = key
            else:
                self.stats.add(reply, is_new=False)
                yield reply

        def send() -> Iterator[Request]:
            # Runs as the responder takes each request: what it has not taken was not sent.
            for id, key in missing.items():
                if not self.commits_together:
                    self._ledger.write([(key, keyed[id][1], None)])
                yield keyed[id][1]

        outcomes = self._responder.respond(send()) if missing else iter(())
        if self.commits_together:
            outcomes = list(outcomes)
            self._ledger.write((*keyed[each.request_id], each) for each in outcomes)
        for outcome in outcomes:
            if not self.commits_together:
                self._ledger.write([(*keyed[outcome.request_id], outcome)])
            self.stats.add(outcome, is_new=True)
            yield outcome

    def close(self) -> None:
        """Close the ledger; a second call does nothing."""
        self._ledger.close()

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _keyed(self, requests: Iterable[Request]) -> dict[str, tuple[str, Request]]:
        """Each request, by its id, with the key of its call.

        The same question put twice in one `respond` wants two replies, so the second has a key of
        its own.  In a later `respond` it is the same call again: which of them a resumed run makes
        depends on where it was killed, and its replies must not.
        """
        calls: dict[str, tuple[str, Request]] = {}
        repeats: Counter[str] = Counter()
        for request in requests:
            if request.id in calls:
                raise ValueError(f"two requests of one call share the id {request.id!r}")
            content = hash_json({"identity": self.identity, **request_content(request)})
            calls[request.id] = hash_json([content, repeats[content]]), request
            repeats[content] += 1
        return calls

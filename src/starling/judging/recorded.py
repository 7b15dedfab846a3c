"""Record every call of a responder, so that no reply is ever paid for twice.

No call whose reply reached us is repeated, in this run or a later one; one that is empty, refused
or filtered stays the Failure that it was.  Calls in flight when a run is killed are sent again, and
the ledger lists them.  Failures to get a reply are asked again by the next run.
Caps end a run within the calls in flight: these are waited for and kept, and no more are sent.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from starling.base.errors import InputError
from starling.base.hashing import hash_json
from starling.base.spending import Spending
from starling.judging.ledger import Call, Ended, Ledger, request_content
from starling.models.completion import Unusable
from starling.models.endpoint import Endpoint
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

    `model` is the name in the price table under which calls are charged to `spending`, those of
    earlier runs too; without one they are free.  Open all that share a file before the first call.
    Raises DataError like `Ledger`, and InputError for a cap that cannot be kept or, from `respond`,
    that is reached.
    """

    def __init__(
        self,
        responder: Responder,
        path: Path,
        *,
        spending: Spending | None = None,
        model: str | None = None,
    ) -> None:
        self.identity = responder.identity
        self.commits_together = responder.commits_together
        self.watch: Callable[[], None] | None = None
        """Called whenever another outcome is there and stored; may raise to stop."""
        self._responder = responder
        self._path = path
        self._model = model or ""
        self._spending = spending if model else None
        self._end: str | None = None
        self._ledger = Ledger(path, self.identity)
        self.stats = CallStats(unknown=self._ledger.mark_lost())
        """What was asked through this wrapper since it was opened."""
        if self.stats.unknown:
            logger.warning(
                f"{self.stats.unknown} calls to {self.identity} were in flight when an earlier run "
                "ended; they are sent again"
            )
        try:
            self._charge_past()
        except InputError:
            self.close()
            raise

    def respond(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        """Yield recorded replies as they are found, the others as they arrive.

        Requests are taken as there is room for them, so that what is asked first is on its way
        while the rest is still being made; where the responder commits together, all at once.
        """
        calls = self._keyed(requests)
        yield from self._buy_together(calls) if self.commits_together else self._buy(calls)
        if self._end is not None:
            raise InputError(self._end)

    def close(self) -> None:
        """Close the ledger; a second call does nothing."""
        self._ledger.close()

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _buy(self, calls: Iterable[Call]) -> Iterator[Reply | Failure]:
        flying: dict[str, Call] = {}
        found: deque[Reply | Failure] = deque()
        # How many failed attempts of a call are in the ledger already.
        written: Counter[str] = Counter()

        def send() -> Iterator[Request]:
            # Runs as the responder takes each request: what it has not taken was not sent.
            for call in calls:
                reply = self._ledger.find_answer(call)
                if reply is not None:
                    found.append(reply)
                elif self._has_room():
                    self._ledger.write(sent=[call])
                    flying[call.request.id] = call
                    yield call.request

        def may_retry(request: Request, reason: str) -> bool:
            self._ledger.write_attempt(flying[request.id], reason)
            written[request.id] += 1
            self._charge(calls=1)
            return self._has_room()

        if isinstance(self._responder, Endpoint):
            outcomes = self._responder.respond(send(), may_retry)
        else:
            outcomes = self._responder.respond(send())
        try:
            for outcome in outcomes:
                call = flying.pop(outcome.request_id)
                failed = _failed_attempts(outcome)[written.pop(outcome.request_id, 0) :]
                self._ledger.write(ended=[Ended(call, outcome, failed)])
                self._charge_new(outcome, failed)
                yield from self._used_all(found)
                yield self._used(outcome, is_new=True)
            yield from self._used_all(found)
        finally:
            if isinstance(outcomes, Generator):
                outcomes.close()

    def _buy_together(self, calls: Iterable[Call]) -> Iterator[Reply | Failure]:
        missing: dict[str, Call] = {}
        for call in calls:
            reply = self._ledger.find_answer(call)
            if reply is None:
                missing[call.request.id] = call
            else:
                yield self._used(reply, is_new=False)
        if not missing or not self._has_room():
            return
        outcomes = self._responder.respond(call.request for call in missing.values())
        ended = [Ended(missing[each.request_id], each, _failed_attempts(each)) for each in outcomes]
        self._ledger.write(missing.values(), ended)
        for each in ended:
            self._charge_new(each.outcome, each.failed)
        for each in ended:
            yield self._used(each.outcome, is_new=True)

    def _used_all(self, found: deque[Reply | Failure]) -> Iterator[Reply | Failure]:
        while found:
            yield self._used(found.popleft(), is_new=False)

    def _used(self, outcome: Reply | Failure, *, is_new: bool) -> Reply | Failure:
        """The outcome with its price; counted, now that it is in the ledger."""
        self.stats.add(outcome, is_new=is_new)
        if self.watch is not None:
            self.watch()
        if isinstance(outcome, Failure) or self._spending is None:
            return outcome
        usage = outcome.usage
        usd = self._spending.usd(self._model, usage.prompt_tokens, usage.response_tokens)
        return replace(outcome, usd=usd)

    def _has_room(self) -> bool:
        """Whether the caps allow another attempt; once they do not, nothing more is sent."""
        reached = self._spending.reached() if self._spending and self._end is None else None
        if reached is not None:
            self._end = (
                f"a cap is reached: {reached}. Nothing is lost: every reply so far is in "
                f"{self._path}. Raise the cap (--run.max-usd, --run.max-calls, --run.max-tokens) "
                "and run the same command again."
            )
        return self._end is None

    def _charge(self, **counts: int) -> None:
        if self._spending is not None:
            self._spending.charge(self._model, **counts)

    def _charge_new(self, outcome: Reply | Failure, failed: Sequence[str]) -> None:
        self._charge(calls=len(failed))
        if isinstance(outcome, (Reply, Unusable)):
            read, written = outcome.usage.prompt_tokens, outcome.usage.response_tokens
            self._charge(calls=1, prompt_tokens=read, response_tokens=written)
            has_count = read and (written or isinstance(outcome, Unusable))
            if self._counts_tokens() and not has_count:
                self._end = self._end or self._uncounted()

    def _charge_past(self) -> None:
        """Charge what earlier runs may have paid for; raise for a cap that cannot be kept."""
        if self._spending is None:
            return
        if self._spending.counts_usd and self._spending.usd(self._model, 0, 0) is None:
            raise InputError(
                f"max_usd cannot be kept: no price of {self._model!r} is known. Add it to "
                "run.prices, or cap the calls instead (--run.max-calls)."
            )
        if not self._spending.open(f"{self._path.resolve()} {self.identity}"):
            self._charge(calls=self.stats.unknown)
            return
        past = self._ledger.past()
        if past.uncounted and self._counts_tokens():
            raise InputError(self._uncounted())
        if past.calls:
            self._charge(
                calls=past.calls,
                prompt_tokens=past.prompt_tokens,
                response_tokens=past.response_tokens,
            )

    def _counts_tokens(self) -> bool:
        return self._spending is not None and self._spending.counts_tokens

    def _uncounted(self) -> str:
        return (
            f"max_usd and max_tokens cannot be kept: {self.identity} does not say how many tokens "
            f"it reads and writes. Its replies so far are in {self._path}. Cap the calls instead "
            "(--run.max-calls), and run the same command again."
        )

    def _keyed(self, requests: Iterable[Request]) -> Iterator[Call]:
        """Each request with the key of its call.

        The same question put twice in one `respond` wants two replies, so the second has a key of
        its own.  In a later `respond` it is the same call again: which of them a resumed run makes
        depends on where it was killed, and its replies must not.
        """
        ids: set[str] = set()
        repeats: Counter[str] = Counter()
        for request in requests:
            if request.id in ids:
                raise ValueError(f"two requests of one call share the id {request.id!r}")
            ids.add(request.id)
            content = request_content(request)
            hashed = hash_json({"identity": self.identity, **content})
            yield Call(hash_json([hashed, repeats[hashed]]), request, content)
            repeats[hashed] += 1


def _failed_attempts(outcome: Reply | Failure) -> list[str]:
    """Why attempts failed; a Failure without a reply ends with one."""
    has_reply = isinstance(outcome, (Reply, Unusable))
    return [*outcome.failed_attempts, *([] if has_reply else [outcome.reason])]

"""What the calls of a run cost, and the caps that end it.

Tokens are the servers' own counts; money is tokens times the recipe's prices, nothing else.  Of
an attempt that failed, or was lost when a run was killed, nobody knows the tokens: it is a call.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from threading import Lock

from pydantic import Field

from starling.base.section import Section

Totals = dict[str, dict[str, float | None]]
"""By model: calls, prompt_tokens, response_tokens, and usd (None where its price is not known)."""


class Price(Section):
    """US dollars per million tokens."""

    input: float = Field(ge=0)
    """Tokens that a model reads."""
    output: float = Field(ge=0)
    """Tokens that it writes."""


@dataclass
class _Count:
    calls: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0


class Spending:
    """Counts calls and tokens by model against the caps; shared by all that is asked in a run.

    Every attempt is a call.  Threads may share it.
    """

    def __init__(
        self,
        prices: Mapping[str, Price] | None = None,
        *,
        max_usd: float | None = None,
        max_calls: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self._prices = dict(prices or {})
        self._max_usd = max_usd
        self._max_calls = max_calls
        self._max_tokens = max_tokens
        self._counts: dict[str, _Count] = {}
        self._opened: set[str] = set()
        self._lock = Lock()

    @property
    def counts_tokens(self) -> bool:
        """Whether a cap depends on tokens, so that a call without a count would escape it."""
        return self._max_usd is not None or self._max_tokens is not None

    @property
    def counts_usd(self) -> bool:
        """Whether a cap depends on prices."""
        return self._max_usd is not None

    def open(self, account: str) -> bool:
        """Whether an account, whose past is to be charged once, is opened for the first time."""
        with self._lock:
            is_new = account not in self._opened
            self._opened.add(account)
        return is_new

    def charge(
        self, model: str, *, calls: int = 1, prompt_tokens: int = 0, response_tokens: int = 0
    ) -> None:
        """Count what was asked of a model."""
        with self._lock:
            count = self._counts.setdefault(model, _Count())
            count.calls += calls
            count.prompt_tokens += prompt_tokens
            count.response_tokens += response_tokens

    def usd(self, model: str, prompt_tokens: int, response_tokens: int) -> float | None:
        """What so many tokens cost; None where the model's price is not known."""
        price = self._prices.get(model)
        if price is None:
            return None
        return (prompt_tokens * price.input + response_tokens * price.output) / 1e6

    def reached(self) -> str | None:
        """Which cap is reached, in words; None where there is room."""
        usd, calls, tokens = self._sums()
        if self._max_usd is not None and (usd or 0.0) >= self._max_usd:
            return f"max_usd is {_dollars(self._max_usd)}, and {_dollars(usd or 0.0)} are spent"
        if self._max_calls is not None and calls >= self._max_calls:
            ended = "1 call has" if calls == 1 else f"{calls:,} calls have"
            return f"max_calls is {self._max_calls:,}, and {ended} ended"
        if self._max_tokens is not None and tokens >= self._max_tokens:
            return f"max_tokens is {self._max_tokens:,}, and {tokens:,} tokens were used"
        return None

    def totals(self) -> Totals:
        """What was counted, by model, in the names' order."""
        return self.since({})

    def since(self, earlier: Totals) -> Totals:
        """What was counted since an earlier `totals`; models that were not asked are left out."""
        with self._lock:
            counts = {model: vars(count).copy() for model, count in sorted(self._counts.items())}
        totals: Totals = {}
        for model, count in counts.items():
            before = earlier.get(model, {})
            added = {name: number - int(before.get(name) or 0) for name, number in count.items()}
            if any(added.values()):
                usd = self.usd(model, added["prompt_tokens"], added["response_tokens"])
                totals[model] = {**added, "usd": usd}
        return totals

    def note(self) -> str:
        """A few words for a line of progress; empty while nothing was asked."""
        usd, calls, tokens = self._sums()
        if not calls:
            return ""
        if usd is not None:
            return _dollars(usd)
        return f"{calls:,} call{'s' if calls > 1 else ''}, {_short(tokens)} tokens"

    def _sums(self) -> tuple[float | None, int, int]:
        """Dollars (None where no model has a price), calls and tokens of all models."""
        with self._lock:
            counts = list(self._counts.items())
            calls = sum(count.calls for _, count in counts)
            tokens = sum(count.prompt_tokens + count.response_tokens for _, count in counts)
            usd = _sum_known(
                self.usd(model, count.prompt_tokens, count.response_tokens)
                for model, count in counts
            )
        return usd, calls, tokens


def _sum_known(amounts: Iterable[float | None]) -> float | None:
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if known else None


def _dollars(usd: float) -> str:
    return f"${usd:.2g}" if 0 < usd < 0.1 else f"${usd:,.2f}"


def _short(number: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)

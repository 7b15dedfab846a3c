"""The two interfaces to text: an engine takes token ids, a responder takes messages.

PPO and decoding speak to an `Engine`; candidates, judges, bench and chat speak to a `Responder`.
Both yield results as they finish, in any order, named by the request's id.  docs/decisions/001
says why there are two.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from starling.data.records import FinishReason, Message

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to decode: temperature 0 is greedy; `max_tokens` counts response tokens only."""

    max_tokens: int
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue, as token ids in the model's own vocabulary."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    `ids` holds the end marker when `finish_reason` is "stop"; `logprobs` (nats, one per id) are
    the sampler's, at its temperature; `weight_version` says which weights sampled it.
    """

    request_id: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    weight_version: int


@runtime_checkable
class Engine(Protocol):
    """Samples responses with the weights it was last given."""

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Sample]:
        """Yield one sample per request as each finishes."""
        ...

    def sync(self, weights: "Mapping[str, Tensor]", version: int) -> None:
        """Take new weights; every later sample carries `version`."""
        ...


@dataclass(frozen=True)
class Request:
    """A conversation that waits for an answer."""

    id: str
    messages: tuple[Message, ...]
    sampling: Sampling
    mode: str | None = None
    subject: Any = None
    """What the messages ask about, for responders that grade by rule; never sent anywhere."""


@dataclass(frozen=True)
class Usage:
    """Tokens read and written by one call."""

    prompt_tokens: int
    response_tokens: int


@dataclass(frozen=True)
class Reply:
    """What came back: the text without markers, and its ids where the responder knows them."""

    request_id: str
    text: str
    finish_reason: FinishReason
    usage: Usage
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Failure:
    """A call that got no reply, after every retry.  An error is never data."""

    request_id: str
    reason: str


@runtime_checkable
class Responder(Protocol):
    """Answers conversations: a local model, an endpoint, a rubric, a recording of one of them."""

    identity: str
    """Names what answers (model and weights, or URL and model): equal means same answers."""
    commits_together: bool
    """True where all replies of one `respond` are one unit: a local batch, nothing bought."""

    def respond(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        """Yield one outcome per request as each finishes."""
        ...

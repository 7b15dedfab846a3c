"""The two interfaces to text: an engine takes token ids, a responder takes messages.

PPO and decoding speak to an `Engine`; candidates, judges, bench and chat speak to a `Responder`.
Both yield results as they finish, in any order, named by the request's id.  docs/decisions/001
says why there are two.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from starling.base.errors import DataError
from starling.data.records import FinishReason, Message

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to decode: temperature 0 is greedy; `max_tokens` counts response tokens only.

    `top_k` (0: off) is applied first, then `top_p` (1: off), both after the temperature.  Decoding
    ends at the model's own end markers, at `stop_ids`, and where the text holds one of `stop`.
    """

    max_tokens: int
    temperature: float = 1.0
    seed: int = 0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: Literal["tempered", "untempered"] = "tempered"
    """Of which distribution logprobs are: at the temperature (greedy: at 1), or at temperature 1;
    in either case over the whole vocabulary, before `top_k` and `top_p`."""
    top_logprobs: int = 0
    """How many of each place's likeliest tokens a server is asked for, with their logprobs."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue, as token ids in the model's own vocabulary, `num_samples` times."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    num_samples: int = 1


def check_request(request: GenerationRequest, limit: int | None, room: str) -> None:
    """Raise ValueError for settings without a meaning, DataError for more tokens than `limit`.

    `room` is what holds at most `limit` tokens, in words.
    """
    name, sampling = f"request {request.id}", request.sampling
    warm = math.isfinite(sampling.temperature) and sampling.temperature >= 0
    for is_wrong, problem in (
        (not request.prompt_ids, "the prompt is empty; a sample continues at least one token"),
        (request.num_samples < 1, f"num_samples is {request.num_samples}; it is at least 1"),
        (sampling.max_tokens < 1, f"max_tokens is {sampling.max_tokens}; it is at least 1"),
        (not warm, f"temperature is {sampling.temperature}; it is finite and at least 0"),
        (not 0 < sampling.top_p <= 1, f"top_p is {sampling.top_p}; it is above 0, at most 1"),
        (sampling.top_k < 0, f"top_k is {sampling.top_k}; it is at least 0 (off)"),
        ("" in sampling.stop, "an empty stop string would stop before the first token"),
    ):
        if is_wrong:
            raise ValueError(f"{name}: {problem}")
    if limit is not None and len(request.prompt_ids) + sampling.max_tokens > limit:
        raise DataError(
            f"{name}: {len(request.prompt_ids)} prompt tokens and up to {sampling.max_tokens} more "
            f"do not fit {room}; shorten the prompt or lower the response limit"
        )


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    `ids` holds the end marker, or the token that completed a stop string, when `finish_reason` is
    "stop"; `logprobs` are nats, one per id, of the distribution that the request names;
    `weight_version` says which weights sampled it, `index` which of the request's samples it is.
    """

    request_id: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length", "cancelled"]
    weight_version: int
    index: int = 0


@runtime_checkable
class Engine(Protocol):
    """Samples responses with the weights it was last given."""

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Sample]:
        """Yield each request's samples as they finish."""
        ...

    def stream(self, request: GenerationRequest) -> Generator[int, None, Sample]:
        """Yield one sample's tokens as they are decoded, and return the sample.

        Closing the generator stops the decoding.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request's running samples where they are, as "cancelled"; the others go on."""
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
    seconds: float | None = None
    """From sending the attempt that succeeded to its reply; None where nobody took the time."""
    usd: float | None = None
    failed_attempts: tuple[str, ...] = ()
    """What went wrong with the attempts before, one reason each."""
    top_logprobs: tuple[Mapping[str, float], ...] | None = None
    """Of each token's place the likeliest texts, nats; None where not asked for or not given."""
    served_by: str | None = None
    """What a server calls the model that answered, often with its version."""


@dataclass(frozen=True)
class Failure:
    """A call that got no reply, after every retry.  An error is never data."""

    request_id: str
    reason: str
    failed_attempts: tuple[str, ...] = ()


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


@runtime_checkable
class StreamingResponder(Responder, Protocol):
    """A responder that also answers piece by piece."""

    def stream(self, request: Request) -> Generator[str, None, Reply | Failure]:
        """Yield the text as it comes, no character cut, and return the outcome.

        Closing the generator stops the answer.
        """
        ...


Outcome = TypeVar("Outcome")


def returned(stream: Generator[Any, None, Outcome]) -> Outcome:
    """What a stream returns, its pieces passed over."""
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return end.value

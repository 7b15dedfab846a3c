"""An OpenAI-compatible server as a responder: bounded retries, and every outcome typed.

Chat completions are what all such servers speak; with a codec the prompt goes out as token ids, as
raw completions.  The client's own retries are off, because they would send paid calls again without
the ledger knowing.  asyncio goes no further than this folder.  Left out: tools, and a request's
`mode` in chat completions, for which the shape has no field.
"""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count, islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from starling.base.errors import InputError
from starling.base.seeding import python_generator
from starling.models.completion import (
    Answer,
    Transient,
    clean,
    read_completion,
    read_model_names,
    refused_extra,
    retry_after,
    settings,
)
from starling.models.config import EndpointSection
from starling.models.interfaces import Failure, Reply, Request
from starling.models.loop import Loop, allow_connections
from starling.models.streaming import Incoming

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

    from starling.data.chat import ChatCodec

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 300.0
"""A server that asks for more (a daily limit) is not waited for; the next run asks it again."""
LISTING_SECONDS = 20.0
CALLS_PER_CLIENT = 1000
"""A client opens no more connections than this."""


class FailedAttempt(NamedTuple):
    """An attempt that waits for leave to be repeated."""

    request: Request
    reason: str
    answer: asyncio.Future[bool]


class Endpoint:
    """Asks `model` at `url`, at most `concurrency` calls at a time.

    Time-outs, broken connections, 408, 429 and 5xx are tried again, `retries` times, with waits
    that double or that the server names.  Any other refusal, and a reply that is empty, filtered or
    no chat completion, is a Failure at once.  Raises InputError for a variable that is not set
    and, from `respond`, for what would fail every call: a wrong key or model, an empty account.

    With a `codec`, which must be the served model's own, what somebody typed cannot become a
    marker, a request's mode is heard, and ids come back from servers that give them.
    """

    commits_together = False

    def __init__(
        self,
        url: str,
        model: str,
        *,
        codec: "ChatCodec | None" = None,
        api_key_env: str | None = None,
        concurrency: int = 16,
        timeout_seconds: float = 100.0,
        retries: int = 5,
    ) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self.identity = f"{self.url} {model}" + (f" as {codec.format.name}" if codec else "")
        self.codec = codec
        self._route = "completions" if codec else "chat/completions"
        self._api_key_env = api_key_env
        self._api_key = _read_key(api_key_env)
        self._concurrency = concurrency
        self._timeout_seconds = timeout_seconds
        self._retries = retries
        self._limit_name = "max_tokens"
        self._refused: set[str] = set()
        self._has_warned_of_mode = False

    def respond(
        self,
        requests: Iterable[Request],
        may_retry: Callable[[Request, str], bool] | None = None,
    ) -> Iterator[Reply | Failure]:
        """Yield outcomes as they arrive; takes the next request only when a call has ended.

        `may_retry` is told of each attempt that failed and would be repeated, and why; where it
        says no, the call is a Failure.  It runs in the caller's thread, as `requests` does.
        """
        allow_connections(self._concurrency)
        pending, turns = iter(requests), count()
        clients: list[AsyncOpenAI] = []
        events: SimpleQueue[asyncio.Task[Reply | Failure] | FailedAttempt] = SimpleQueue()
        loop = Loop()

        async def wait_for_leave(request: Request, reason: str) -> bool:
            answer = asyncio.get_running_loop().create_future()
            events.put(FailedAttempt(request, reason, answer))
            return await answer

        def send(most: int) -> int:
            """Begin so many more calls; how many there were to begin."""
            sent = 0
            for request in islice(pending, most):
                if sent + num_running >= CALLS_PER_CLIENT * len(clients):
                    clients.append(self._open_client())
                    loop.closers.append(clients[-1].close)
                client = clients[next(turns) % len(clients)]
                leave = may_retry and partial(wait_for_leave, request)
                ask = self._persist(request, partial(self._ask, client, request), leave)
                loop.begin(ask, events.put)
                sent += 1
            return sent

        num_running = 0
        try:
            num_running = send(self._concurrency)
            while num_running:
                event = events.get()
                if isinstance(event, FailedAttempt):
                    assert may_retry is not None
                    is_allowed = may_retry(event.request, event.reason)
                    loop.call(event.answer.set_result, is_allowed)
                    continue
                num_running -= 1
                # First yield, then send: what arrived is recorded before more is in flight.
                yield event.result()
                num_running += send(1)
        finally:
            if not sys.is_finalizing():  # an iterator left open until now cannot be waited for
                loop.close()

    def stream(self, request: Request) -> Generator[str, None, Reply | Failure]:
        """Yield the text as it comes, and return the outcome; closing ends the call.

        Nothing is sent again once a text was yielded: an answer that then breaks is a Failure.
        The time limit is for each piece, since an answer of any length may still be coming.
        """
        client, loop = self._open_client(), Loop()
        loop.closers.append(client.close)
        try:
            begun = loop.run(self._persist(request, partial(self._begin, client, request)))
            if isinstance(begun, Failure):
                return begun
            incoming, piece = begun
            loop.closers.insert(0, incoming.close)
            while isinstance(piece, str):
                yield piece
                piece = loop.run(incoming.next())
            return piece if isinstance(piece, Reply) else Failure(request.id, piece.reason)
        finally:
            if not sys.is_finalizing():
                loop.close()

    def served_models(self) -> list[str]:
        """The names of the models that the server lists."""
        import openai

        try:
            with openai.OpenAI(**self._options(LISTING_SECONDS)) as client:
                found = client.get("/models", cast_to=openai.HttpxBinaryResponseContent)
            return read_model_names(found.content, self._api_key)
        except openai.APIConnectionError as error:
            raise InputError(
                f"no server answers at {self.url}. Start it, or check the address."
            ) from error
        except openai.AuthenticationError as error:
            said = f"{self.url} answered 401: {self._clean(error.message)}"
            raise self._key_refused(said) from error
        except (openai.OpenAIError, ValueError) as error:
            raise InputError(
                f"{self.url} does not say which models it serves ({self._clean(str(error))}). "
                "Name the model with --served-model NAME, or check the address (it often ends in "
                "/v1)."
            ) from error

    def _open_client(self) -> "AsyncOpenAI":
        """A client that retries nothing and says nothing about who runs it but the key.

        aiohttp carries it, at half of what a call costs the client's own transport.
        """
        from openai import AsyncOpenAI, DefaultAioHttpClient

        return AsyncOpenAI(**self._options(), http_client=DefaultAioHttpClient(timeout=None))

    def _options(self, timeout: float | None = None) -> dict[str, Any]:
        from openai import Omit

        # Read from the environment by the client, and no business of a server without a key.
        private = {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        return {
            "api_key": self._api_key,
            "base_url": self.url,
            "max_retries": 0,
            "timeout": timeout,
            "default_headers": {} if self._api_key_env else private,
        }

    async def _persist(
        self,
        request: Request,
        attempt: Callable[[], Awaitable[Result | Transient]],
        ask_leave: Callable[[str], Awaitable[bool]] | None = None,
    ) -> Result | Failure:
        """One call with its retries; `ask_leave` says whether there may be another."""
        failed: list[str] = []
        retries = self._retries
        while True:
            outcome = await attempt()
            if isinstance(outcome, (Reply, Failure)):
                return replace(outcome, failed_attempts=tuple(failed))
            if not isinstance(outcome, Transient):
                return outcome
            retries -= not outcome.asks_anew
            wait = _wait_seconds(request, len(failed), outcome)
            reason = f"{outcome.reason} ({len(failed) + 1} attempts)"
            if retries < 0 or wait > LONGEST_WAIT_SECONDS:
                break
            if ask_leave is not None and not await ask_leave(outcome.reason):
                break
            failed.append(outcome.reason)
            logger.info("%s: %s; again in %.1f s", request.id, reason, wait)
            await asyncio.sleep(wait)
        return Failure(request.id, reason, tuple(failed))

    async def _ask(self, client: "AsyncOpenAI", request: Request) -> Reply | Failure | Transient:
        """Send a request once, and wait for the whole answer."""
        from openai import HttpxBinaryResponseContent

        prompt = self._prompt(request)
        begin = time.perf_counter()
        response = await self._post(client, request, prompt, cast_to=HttpxBinaryResponseContent)
        seconds = time.perf_counter() - begin
        if isinstance(response, (Failure, Transient)):
            return response
        outcome = read_completion(self._answer(request, prompt), response.content)
        return replace(outcome, seconds=seconds) if isinstance(outcome, Reply) else outcome

    async def _begin(
        self, client: "AsyncOpenAI", request: Request
    ) -> tuple[Incoming, str | Reply | Failure] | Failure | Transient:
        """Send a request once, and wait for the first piece of its answer."""
        from openai import AsyncStream

        prompt = self._prompt(request) | {"stream": True, "stream_options": {"include_usage": True}}
        events = await self._post(
            client, request, prompt, cast_to=object, stream=True, stream_cls=AsyncStream[object]
        )
        if isinstance(events, (Failure, Transient)):
            return events
        incoming = Incoming(self._answer(request, prompt), events, self._timeout_seconds)
        first = await incoming.next()
        if not isinstance(first, Transient):
            return incoming, first
        await incoming.close()
        return first

    async def _post(
        self, client: "AsyncOpenAI", request: Request, prompt: dict, **reading: Any
    ) -> Any:
        """The server's answer to a request, read as the client is told; or what went wrong.

        The client's own `create` spends as long on checking the body as on sending it.
        """
        import aiohttp
        import openai

        body = settings(request, self.codec) | prompt
        body |= {"model": self.model, self._limit_name: request.sampling.max_tokens}
        body = {key: value for key, value in body.items() if key not in self._refused}
        try:
            # Bounds the whole call; the client's own limit only bounds each wait for bytes.
            async with asyncio.timeout(self._timeout_seconds):
                return await client.post(f"{self.url}/{self._route}", body=body, **reading)
        except TimeoutError:
            return Transient(f"no reply within {self._timeout_seconds:g} s")
        except (openai.APIConnectionError, aiohttp.ClientError) as error:
            # The transport calls a connection that the server closed a time-out too.
            said = self._clean(str(error.__cause__ or error))
            return Transient(f"the connection broke: {said}")
        except openai.APIStatusError as error:
            refused = refused_extra(body, error.status_code, error.message)
            if refused is None:
                return self._read_refusal(request, error)
            self._refused.add(refused)
            return Transient(f"{self.url} takes no {refused}", 0.0, asks_anew=True)

    def _prompt(self, request: Request) -> dict:
        """The conversation as the route wants it: messages, or ids."""
        if self.codec is None:
            if request.mode is not None and not self._has_warned_of_mode:
                self._has_warned_of_mode = True
                logger.warning("%s: no mode is sent; %r is ignored", self.url, request.mode)
            return {"messages": [message.model_dump() for message in request.messages]}
        encoded = self.codec.encode(request.messages, mode=request.mode, generation_prompt=True)
        return {"prompt": encoded.ids, "return_token_ids": True}

    def _answer(self, request: Request, prompt: dict) -> Answer:
        return Answer(request, prompt.get("prompt", []), self.codec, self._api_key)

    def _clean(self, message: str) -> str:
        return clean(message, self._api_key)

    def _read_refusal(self, request: Request, error: "APIStatusError") -> Failure | Transient:
        status = error.status_code
        said = f"{self.url} answered {status}: {self._clean(error.message)}"
        if error.code == "unsupported_parameter" and error.param == "max_tokens":
            # OpenAI's reasoning models want the limit under its newer name.
            self._limit_name = "max_completion_tokens"
            return Transient(said, wait_seconds=0.0)
        if status == 401:
            raise self._key_refused(said)
        if status == 404:
            raise InputError(
                f"there is no model {self.model!r}, or nothing that takes {self._route}. "
                f"{said}. Check model, and url (it usually ends in /v1)."
            )
        if error.code == "insufficient_quota":
            raise InputError(f"the account is used up. {said}. Add credit, then run this again.")
        if status in (408, 429) or status >= 500:
            return Transient(said, retry_after(error.response.headers))
        return Failure(request.id, said)

    def _key_refused(self, said: str) -> InputError:
        name = self._api_key_env
        advice = f"Put a valid key into the environment variable {name}."
        if name is None:
            advice = "Name the environment variable that holds a key in api_key_env."
        return InputError(f"the key was refused. {said}. {advice}")


def connect(section: EndpointSection, model: str) -> Endpoint:
    """The endpoint of a recipe's section."""
    assert section.url is not None, "asked only of sections that name an address"
    codec = None
    if section.tokenizer is not None:
        # Imports torch, which an endpoint that takes messages does without.
        from starling.models.codec import find_codec

        codec = find_codec(section.tokenizer, section.chat_format)
    return Endpoint(
        section.url,
        model,
        codec=codec,
        api_key_env=section.api_key_env,
        concurrency=section.concurrency,
        timeout_seconds=section.timeout_seconds,
    )


def _read_key(name: str | None) -> str:
    if name is None:
        # The client insists on one; a server that needs none ignores it.
        return "no-key-needed"
    key = os.environ.get(name, "").strip()
    if not key:
        raise InputError(
            f"the environment variable {name}, named by api_key_env, is not set. "
            f"Set it to the key (export {name}=...), then run the same command again."
        )
    return key


def _wait_seconds(request: Request, attempt: int, transient: Transient) -> float:
    """What the server asked for, else a doubling wait, spread so that calls do not come at once."""
    if transient.wait_seconds is not None:
        return transient.wait_seconds
    spread = python_generator(request.sampling.seed, f"models/retry/{request.id}", attempt).random()
    return min(FIRST_WAIT_SECONDS * 2**attempt * (0.5 + spread / 2), LONGEST_WAIT_SECONDS)

"""An OpenAI-compatible server as a responder: bounded retries, and every outcome typed.

Chat completions are what all such servers speak.  The client's own retries are off, because they
would send paid calls again without the ledger knowing.  asyncio stays in here.  Left out:
streaming, tools, and a request's `mode`, for which the shape has no field.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from starling.base.errors import InputError
from starling.base.seeding import python_generator
from starling.models.completion import Transient, clean, read_completion, retry_after
from starling.models.config import EndpointSection
from starling.models.interfaces import Failure, Reply, Request

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

logger = logging.getLogger(__name__)

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 300.0
"""A server that asks for more (a daily limit) is not waited for; the next run asks it again."""


class Endpoint:
    """Asks `model` at `url`, at most `concurrency` calls at a time.

    Time-outs, broken connections, 408, 429 and 5xx are tried again, `retries` times, with waits
    that double or that the server names.  Any other refusal, and a reply that is empty, filtered or
    no chat completion, is a Failure at once.  Raises InputError for a variable that is not set
    and, from `respond`, for what would fail every call: a wrong key or model, an empty account.
    """

    commits_together = False

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        concurrency: int = 16,
        timeout_seconds: float = 100.0,
        retries: int = 5,
    ) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self.identity = f"{self.url} {model}"
        self._api_key_env = api_key_env
        self._api_key = _read_key(api_key_env)
        self._concurrency = concurrency
        self._timeout_seconds = timeout_seconds
        self._retries = retries
        self._limit_name = "max_tokens"
        self._has_warned_of_mode = False

    def respond(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        """Yield outcomes as they arrive; takes the next request only when a call has ended."""
        pending = iter(requests)
        calls: set[asyncio.Task[Reply | Failure]] = set()
        client, runner = self._open_client(), asyncio.Runner()

        def send(most: int) -> None:
            for request in islice(pending, most):
                calls.add(runner.get_loop().create_task(self._ask(client, request)))

        try:
            send(self._concurrency)
            while calls:
                wait = asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                for call in runner.run(wait)[0]:
                    calls.remove(call)
                    # First yield, then send: what arrived is recorded before more is in flight.
                    yield call.result()
                    send(1)
        finally:
            if not sys.is_finalizing():  # an iterator left open until now cannot be waited for
                runner.run(_shut_down(client, calls))
                runner.close()

    def _open_client(self) -> "AsyncOpenAI":
        """A client that retries nothing and says nothing about who runs it but the key."""
        from openai import AsyncOpenAI, Omit

        # Read from the environment by the client, and no business of a server without a key.
        private = {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        return AsyncOpenAI(
            api_key=self._api_key,
            base_url=self.url,
            max_retries=0,
            timeout=None,
            default_headers={} if self._api_key_env else private,  # type: ignore[arg-type]
        )

    async def _ask(self, client: "AsyncOpenAI", request: Request) -> Reply | Failure:
        """One request with its retries."""
        if request.mode is not None and not self._has_warned_of_mode:
            self._has_warned_of_mode = True
            logger.warning("%s takes no mode; %r and others are ignored", self.url, request.mode)
        reason = ""
        for attempt in range(self._retries + 1):
            outcome = await self._attempt(client, request)
            if not isinstance(outcome, Transient):
                return outcome
            reason = f"{outcome.reason} ({attempt + 1} attempts)"
            wait = _wait_seconds(request, attempt, outcome)
            if attempt == self._retries or wait > LONGEST_WAIT_SECONDS:
                break
            logger.info("%s: %s; again in %.1f s", request.id, reason, wait)
            await asyncio.sleep(wait)
        return Failure(request.id, reason)

    async def _attempt(
        self, client: "AsyncOpenAI", request: Request
    ) -> Reply | Failure | Transient:
        import openai

        try:
            # Bounds the whole call; the client's own limit only bounds each wait for bytes.
            async with asyncio.timeout(self._timeout_seconds):
                response = await client.chat.completions.with_raw_response.create(
                    **self._body(request)
                )
        except (TimeoutError, openai.APITimeoutError):
            return Transient(f"no reply within {self._timeout_seconds:g} s")
        except openai.APIConnectionError as error:
            return Transient(f"the connection broke: {clean(str(error.__cause__ or error))}")
        except openai.APIStatusError as error:
            return self._read_refusal(request, error)
        return read_completion(request, response.http_response.content)

    def _body(self, request: Request) -> dict:
        return {
            "model": self.model,
            "messages": [message.model_dump() for message in request.messages],
            "temperature": request.sampling.temperature,
            # Some servers hold a seed in 32 bits and refuse larger ones.
            "seed": request.sampling.seed % 2**31,
            self._limit_name: request.sampling.max_tokens,
        }

    def _read_refusal(self, request: Request, error: "APIStatusError") -> Failure | Transient:
        status = error.status_code
        message = clean(error.message).replace(self._api_key, "***")
        said = f"{self.url} answered {status}: {message}"
        if error.code == "unsupported_parameter" and error.param == "max_tokens":
            # OpenAI's reasoning models want the limit under its newer name.
            self._limit_name = "max_completion_tokens"
            return Transient(said, wait_seconds=0.0)
        if status == 401:
            name = self._api_key_env
            advice = f"Put a valid key into the environment variable {name}."
            if name is None:
                advice = "Name the environment variable that holds a key in api_key_env."
            raise InputError(f"the key was refused. {said}. {advice}")
        if status == 404:
            raise InputError(
                f"there is no model {self.model!r}, or nothing that takes chat completions. "
                f"{said}. Check model, and url (it usually ends in /v1)."
            )
        if error.code == "insufficient_quota":
            raise InputError(f"the account is used up. {said}. Add credit, then run this again.")
        if status in (408, 429) or status >= 500:
            return Transient(said, retry_after(error.response.headers))
        return Failure(request.id, said)


def connect(section: EndpointSection, model: str) -> Endpoint:
    """The endpoint of a recipe's section."""
    assert section.url is not None, "asked only of sections that name an address"
    return Endpoint(
        section.url,
        model,
        api_key_env=section.api_key_env,
        concurrency=section.concurrency,
        timeout_seconds=section.timeout_seconds,
    )


async def _shut_down(client: "AsyncOpenAI", calls: set[asyncio.Task]) -> None:
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await client.close()


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

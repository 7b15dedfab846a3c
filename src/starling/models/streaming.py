"""One answer of an OpenAI-compatible server as it comes, with every way in which it can break."""

import asyncio
import sys
from typing import TYPE_CHECKING

from starling.models.completion import Answer, Chunk, Transient, clean, explained, read_completion
from starling.models.interfaces import Failure, Reply

if TYPE_CHECKING:
    from openai import AsyncStream


class Incoming:
    """Reads an answer piece by piece; `silence_seconds` is the longest wait for the next."""

    def __init__(
        self, answer: Answer, events: "AsyncStream[object]", silence_seconds: float
    ) -> None:
        self._answer = answer
        self._events = events
        self._silence_seconds = silence_seconds
        self._whole: Reply | Failure | None = None
        self._is_first = True

    async def next(self) -> str | Reply | Failure | Transient:
        """The next text, never empty; when there is no more, the outcome.

        Transient says that the connection broke before the server had said that the answer ends.
        """
        import aiohttp
        import openai

        # Before 3.x the client lets what breaks while it reads a body through unwrapped.
        library = sys.modules[type(self._events.response).__module__.partition(".")[0]]
        while self._whole is None:
            try:
                if self._is_first:
                    async with asyncio.timeout(self._silence_seconds):
                        self._whole = await self._read_whole()
                    self._is_first = False
                    if isinstance(self._whole, Reply):
                        return self._whole.text
                    continue
                async with asyncio.timeout(self._silence_seconds):
                    chunk = Chunk.model_validate(await anext(self._events))
            except StopAsyncIteration:
                return self._end()
            except TimeoutError:
                return self._broken(f"nothing came for {self._silence_seconds:g} s")
            except (openai.APIConnectionError, aiohttp.ClientError, library.HTTPError) as error:
                said = self._clean(str(error.__cause__ or error))
                return self._broken(f"the connection broke: {said}")
            except openai.APIError as error:
                said = self._clean(error.message)
                return self._failed(f"the server broke off the stream: {said}")
            except ValueError as error:
                return self._failed(f"the stream is no chat completion ({explained(error)})")
            text = self._answer.add(chunk)
            if text:
                return text
        return self._whole

    async def close(self) -> None:
        """End the call; a server that still writes sees its connection close."""
        await self._events.close()

    async def _read_whole(self) -> Reply | Failure | None:
        """The outcome of a server that answers all at once though it was asked for a stream."""
        response = self._events.response
        kind = response.headers.get("content-type", "")
        if "json" not in kind and "html" not in kind:
            return None
        body = await response.aread()
        if body.lstrip().startswith((b"data:", b"event:", b":")):
            return None  # events after all, which can be read from here too
        return read_completion(self._answer, body)

    def _end(self) -> Reply | Failure:
        if self._answer.finish_reason is None:
            return self._failed("the stream ended without a finish_reason")
        return self._outcome()

    def _broken(self, reason: str) -> Reply | Failure | Transient:
        # What only the usage was still to follow is whole, and paid for.
        if self._answer.finish_reason is not None:
            return self._outcome()
        return Transient(reason + self._after())

    def _outcome(self) -> Reply | Failure:
        outcome = self._answer.outcome()
        return outcome if isinstance(outcome, Reply) else self._failed(outcome.reason)

    def _failed(self, reason: str) -> Failure:
        return Failure(self._answer.id, reason + self._after())

    def _clean(self, message: str) -> str:
        return clean(message, self._answer.secret)

    def _after(self) -> str:
        return f", after {len(self._answer.text)} characters" if self._answer.text else ""

"""One answer of an OpenAI-compatible server as it comes, with every way in which it can break."""

import asyncio
import sys
from typing import TYPE_CHECKING

from starling.models.completion import Answer, Chunk, Transient, clean, explained
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

    async def next(self) -> str | Reply | Failure | Transient:
        """The next text, never empty; when there is no more, the outcome.

        Transient says that the connection broke before the server had said that the answer ends.
        """
        import openai

        # Before 3.x the client lets what breaks while it reads a body through unwrapped.
        library = sys.modules[type(self._events.response).__module__.partition(".")[0]]
        while True:
            try:
                async with asyncio.timeout(self._silence_seconds):
                    chunk = Chunk.model_validate(await anext(self._events))
            except StopAsyncIteration:
                return self._end()
            except (TimeoutError, openai.APITimeoutError, library.TimeoutException):
                return self._broken(f"nothing came for {self._silence_seconds:g} s")
            except (openai.APIConnectionError, library.HTTPError) as error:
                return self._broken(f"the connection broke: {clean(str(error.__cause__ or error))}")
            except openai.APIError as error:
                return self._failed(f"the server broke off the stream: {clean(error.message)}")
            except ValueError as error:
                return self._failed(f"the stream is no chat completion ({explained(error)})")
            text = self._answer.add(chunk)
            if text:
                return text

    async def close(self) -> None:
        """End the call; a server that still writes sees its connection close."""
        await self._events.close()

    def _end(self) -> Reply | Failure:
        if self._answer.finish_reason is None:
            return self._failed("the stream ended without a finish_reason")
        return self._answer.outcome()

    def _broken(self, reason: str) -> Reply | Failure | Transient:
        # What only the usage was still to follow is whole, and paid for.
        if self._answer.finish_reason is not None:
            return self._answer.outcome()
        return Transient(reason + self._after())

    def _failed(self, reason: str) -> Failure:
        return Failure(self._answer.id, reason + self._after())

    def _after(self) -> str:
        return f", after {len(self._answer.text)} characters" if self._answer.text else ""

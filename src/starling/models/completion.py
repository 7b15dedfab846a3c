"""Read what an OpenAI-compatible server sends back: a completion, or why there is none."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, Field, ValidationError

from starling.models.interfaces import Failure, Reply, Request, Usage

LONGEST_MESSAGE = 300


@dataclass(frozen=True)
class Transient:
    """A call that may work when sent again; after `wait_seconds`, where the server says so."""

    reason: str
    wait_seconds: float | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


def read_completion(request: Request, body: bytes) -> Reply | Failure:
    """Turn the body of a 200 into a Reply; a Failure where it is none, empty, refused or cut."""
    try:
        completion = _Completion.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"]
        shown = clean(body[:LONGEST_MESSAGE].decode(errors="backslashreplace"))
        return Failure(request.id, f"the reply is no chat completion ({problem}): {shown!r}")
    choice = completion.choices[0]
    finish_reason = choice.finish_reason
    usage = completion.usage or _Usage()
    if finish_reason != "stop" and finish_reason != "length":
        return Failure(request.id, f"the reply ended with finish_reason {finish_reason!r}")
    text = choice.message.content or ""
    if not text.strip():
        if choice.message.refusal:
            return Failure(request.id, f"the model refused: {clean(choice.message.refusal)}")
        cut = f" (cut at {request.sampling.max_tokens} tokens)" if finish_reason == "length" else ""
        return Failure(request.id, f"the reply is empty{cut}")
    return Reply(
        request_id=request.id,
        text=text,
        finish_reason=finish_reason,
        usage=Usage(usage.prompt_tokens, usage.completion_tokens),
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a Retry-After header asks to wait; None where it gives no number."""
    try:
        wait_seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return max(0.0, wait_seconds) if math.isfinite(wait_seconds) else None


def clean(message: str) -> str:
    """A server's words on one line and of bearable length."""
    line = " ".join(message.split())
    return line if len(line) <= LONGEST_MESSAGE else line[:LONGEST_MESSAGE] + "..."

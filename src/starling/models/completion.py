"""What goes to an OpenAI-compatible server, and what comes back: an answer, whole or in pieces.

Usage is the server's own count.  Where it gives none, the ids that were sent and came back are
counted; where there are no ids either it is 0, which no real prompt has: nothing is estimated.  A
count that is no number is none, and logprobs in no known shape are none.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    FiniteFloat,
    ValidationError,
)

from starling.models.interfaces import Failure, Reply, Request, Usage

if TYPE_CHECKING:
    from starling.data.chat import ChatCodec

LONGEST_MESSAGE = 300
EXTRAS = ("return_token_ids", "stream_options")
"""Fields that are only asked for; a server that refuses one is asked without it."""

# Servers that pass on what their engine, or another vendor, calls the end.
FINISH_REASONS: dict[str, str] = dict.fromkeys(
    ("stop", "eos", "eos_token", "end_turn", "stop_sequence"), "stop"
)
FINISH_REASONS |= dict.fromkeys(("length", "max_tokens", "model_length"), "length")
# Controls, marks that turn the direction of writing, and halves of surrogate pairs.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Transient:
    """A call that may work when sent again; after `wait_seconds`, where the server says so."""

    reason: str
    wait_seconds: float | None = None
    asks_anew: bool = False
    """The server refused a field that is only asked for, and gets the rest; that is no retry."""


@dataclass(frozen=True)
class Unusable(Failure):
    """An answer that is no reply; its tokens were written, and are paid for all the same."""

    usage: Usage = Usage(0, 0)


def _whole(text: str) -> str:
    text.encode()  # half a character of UTF-16 is no text; read from bytes it is refused already
    return text


WholeText = Annotated[str, AfterValidator(_whole)]


class _Said(BaseModel):
    content: WholeText | None = None
    refusal: str | None = None


class _Likely(BaseModel):
    token: str
    logprob: FiniteFloat


class _Place(BaseModel):
    top_logprobs: list[_Likely]


class _Logprobs(BaseModel):
    content: list[_Place] | None = None
    """What chat completions hold."""
    top_logprobs: list[dict[str, FiniteFloat]] | None = None
    """What completions hold."""

    def by_place(self) -> list[dict[str, float]]:
        if self.content is None:
            return self.top_logprobs or []
        return [{each.token: each.logprob for each in at.top_logprobs} for at in self.content]


def _logprobs(found: object) -> _Logprobs | None:
    try:
        return _Logprobs.model_validate(found)
    except ValidationError:
        return None


class _Choice(BaseModel):
    message: _Said | None = None
    delta: _Said | None = None
    text: WholeText | None = None
    finish_reason: str | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: Annotated[_Logprobs | None, BeforeValidator(_logprobs)] = None


def _count(found: object) -> int:
    return found if isinstance(found, int) and found > 0 else 0


Count = Annotated[int, BeforeValidator(_count)]


class _Usage(BaseModel):
    prompt_tokens: Count = 0
    completion_tokens: Count = 0


def _counts(found: object) -> object:
    return found if isinstance(found, dict) else None


class Chunk(BaseModel):
    """One piece of a stream; the last one may hold no choice, only usage."""

    choices: list[_Choice] = []
    usage: Annotated[_Usage | None, BeforeValidator(_counts)] = None


def _name(found: object) -> object:
    return found if isinstance(found, str) and found else None


class _Completion(Chunk):
    choices: list[_Choice] = Field(min_length=1)
    model: Annotated[WholeText | None, BeforeValidator(_name)] = None


class _Model(BaseModel):
    id: Annotated[WholeText, Field(min_length=1)]


class _Models(BaseModel):
    data: list[_Model]


class Answer:
    """What has arrived of the answer to one request: all of it, or the pieces so far.

    `prompt_ids` and `codec` are there where the prompt went out as ids; the text then comes with
    the space that the format puts before it, which is left out here.  `secret` is never shown.
    """

    def __init__(
        self,
        request: Request,
        prompt_ids: list[int],
        codec: "ChatCodec | None" = None,
        secret: str = "",
    ) -> None:
        self.id = request.id
        self.secret = secret
        self.text = ""
        self.finish_reason: str | None = None
        self._max_tokens = request.sampling.max_tokens
        self._wants_logprobs = request.sampling.top_logprobs > 0
        self._top_logprobs: list[dict[str, float]] = []
        self._space = "" if codec is None else _space_before(codec)
        self._refusal = ""
        self._usage: _Usage | None = None
        self._num_prompt_ids = len(prompt_ids)
        self._ids: list[int] = []
        self._has_ids = True

    def add(self, chunk: Chunk) -> str:
        """Take in a whole completion or a piece of one; return the text that it adds."""
        self._usage = chunk.usage or self._usage
        if not chunk.choices:
            return ""
        choice = chunk.choices[0]
        said = choice.message or choice.delta or _Said(content=choice.text)
        text = said.content or ""
        self._refusal += said.refusal or ""
        end = choice.finish_reason or self.finish_reason
        self.finish_reason = FINISH_REASONS.get((end or "").lower(), end)
        self._ids += choice.token_ids or ()
        if self._wants_logprobs and choice.logprobs is not None:
            self._top_logprobs += choice.logprobs.by_place()
        if text:
            # Ids of a part of the text would be taken for the whole.
            self._has_ids = self._has_ids and choice.token_ids is not None
            text, self._space = text.removeprefix(self._space), ""
        self.text += text
        return text

    def outcome(self) -> Reply | Failure:
        """The reply that has arrived; `Unusable` where it is empty, refused or cut."""
        ids = tuple(self._ids) if self._ids and self._has_ids else None
        counted = self._usage or _Usage()
        usage = Usage(
            counted.prompt_tokens or self._num_prompt_ids,
            counted.completion_tokens or len(ids or ()),
        )
        if self.finish_reason != "stop" and self.finish_reason != "length":
            shown = clean(str(self.finish_reason), self.secret)
            return Unusable(self.id, f"the reply ended with finish_reason {shown!r}", usage=usage)
        if self.text.strip():
            likely = tuple(self._top_logprobs) or None
            return Reply(self.id, self.text, self.finish_reason, usage, ids, top_logprobs=likely)
        is_cut = self.finish_reason == "length"
        reason = "the reply is empty" + (f" (cut at {self._max_tokens} tokens)" if is_cut else "")
        if self._refusal:
            reason = f"the model refused: {clean(self._refusal, self.secret)}"
        return Unusable(self.id, reason, usage=usage)


def settings(request: Request, codec: "ChatCodec | None") -> dict[str, object]:
    """How to decode; `top_k` and `stop_token_ids` are fields of vLLM's, not OpenAI's."""
    sampling = request.sampling
    stop_ids = {*sampling.stop_ids, *(codec.stop_ids if codec else ())}
    # Not every server knows these, so what is off is not sent.
    optional = {
        "top_p": sampling.top_p if sampling.top_p < 1 else None,
        "top_k": sampling.top_k,
        "stop": list(sampling.stop),
        "stop_token_ids": sorted(stop_ids),
    }
    if most := sampling.top_logprobs:
        optional |= {"logprobs": most} if codec else {"logprobs": True, "top_logprobs": most}
    set_ones = {key: value for key, value in optional.items() if value}
    # Some servers hold a seed in 32 bits and refuse larger ones.
    return {"temperature": sampling.temperature, "seed": sampling.seed % 2**31, **set_ones}


def read_completion(answer: Answer, body: bytes) -> Reply | Failure:
    """Turn the body of a 200 into a Reply; a Failure where it is none, empty, refused or cut."""
    try:
        completion = _Completion.model_validate_json(body)
    except ValidationError as error:
        shown = clean(body.decode(errors="backslashreplace"), answer.secret)
        reason = f"the reply is no chat completion ({explained(error)}): '{shown}'"
        return Failure(answer.id, reason)
    answer.add(completion)
    outcome = answer.outcome()
    if isinstance(outcome, Reply) and completion.model is not None:
        return replace(outcome, served_by=clean(completion.model, answer.secret))
    return outcome


def read_model_names(body: bytes, secret: str) -> list[str]:
    """The names in a list of models; ValueError where it is none."""
    try:
        return [model.id for model in _Models.model_validate_json(body).data]
    except ValidationError as error:
        shown = clean(body.decode(errors="backslashreplace"), secret)
        raise ValueError(f"{explained(error)}: '{shown}'") from error


def explained(error: ValueError) -> str:
    """What is wrong with a text that should be JSON of a certain kind."""
    if isinstance(error, ValidationError):
        return error.errors(include_url=False)[0]["msg"]
    return clean(str(error))


def refused_extra(body: Mapping[str, object], status: int, message: str) -> str | None:
    """The one of `EXTRAS` in `body` that a server's refusal names."""
    named = (name for name in EXTRAS if name in body and name in message)
    return next(named, None) if status in (400, 422) else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a Retry-After header asks to wait; None where it gives no number."""
    try:
        wait_seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return max(0.0, wait_seconds) if math.isfinite(wait_seconds) else None


def clean(message: str, secret: str = "") -> str:
    """A server's words on one bearable line, without `secret` and what a terminal obeys."""
    line = " ".join((message.replace(secret, "***") if secret else message).split())
    line = UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), line)
    return line if len(line) <= LONGEST_MESSAGE else line[:LONGEST_MESSAGE] + "..."


def _space_before(codec: "ChatCodec") -> str:
    """The space that a trained model writes first: the format's, or its tokenizer's own."""
    if codec.template is not None:
        return codec.template.space
    return " " if codec.format.space or codec.tokenizer.prepends_space else ""

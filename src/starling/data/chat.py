"""Messages to token ids and back: the only place where chat text becomes ids.

A conversation is encoded piece by piece.  Prefixes and markers are the format's own; the text of a
message is tokenised with special tokens off, so a marker that somebody typed stays text.  A format
is data: what stands before and after each role's text, or a published jinja template, which is
spoken as one string, as its model learnt it (`data.template`).

Masks: True = keep, here the assistant's text and its end marker.
Source of the openchat format: the model card of Starling-LM-7B-beta; system text stands bare, as in
OpenChat's own training code, unless `openchat-role` or `openchat-refuse` is chosen.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from starling.base.errors import DataError
from starling.data.records import Message
from starling.data.template import Template, read_template
from starling.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Turn:
    """What a format writes around one role's text: literal strings, and markers by name."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatFormat:
    """One model family's way to write a conversation.

    Strings in angle brackets that the tokenizer knows as special tokens become that token; every
    other string is text.  `{mode}` is replaced by the conversation's mode.
    """

    name: str
    turns: Mapping[str, Turn] = field(default_factory=dict)
    end: str | None = None
    """Marker that ends the assistant's turn; None: the model's own end of sequence."""
    space: str = ""
    """Stands between a prefix and the text, where the tokenizer does not add it by itself."""
    modes: tuple[str, ...] = ()
    bos: bool = True
    """Whether a conversation opens with BOS, if the tokenizer itself puts one before a text."""
    jinja: str | None = None
    """A published template in place of `turns`."""


_END = "<|end_of_turn|>"
_OPENCHAT = ChatFormat(
    name="openchat",
    turns={
        "system": Turn((), (_END,)),
        "user": Turn(("{mode} User:",), (_END,)),
        "assistant": Turn(("{mode} Assistant:",), (_END,)),
    },
    end=_END,
    space=" ",
    modes=("GPT4 Correct", "Code", "Math Correct"),
)
_ROLE = {**_OPENCHAT.turns, "system": Turn(("{mode} System:",), (_END,))}
_REFUSE = {role: turn for role, turn in _OPENCHAT.turns.items() if role != "system"}

# plain: documents without roles, for models that know none; an answer continues its prompt.
# template: the model's own chat template, word for word.
FORMATS: dict[str, ChatFormat] = {
    chat_format.name: chat_format
    for chat_format in (
        _OPENCHAT,
        replace(_OPENCHAT, name="openchat-role", turns=_ROLE),
        replace(_OPENCHAT, name="openchat-refuse", turns=_REFUSE),
        ChatFormat("llama-2", jinja=read_template("llama-2")),
        ChatFormat("chatml", end="<|im_end|>", jinja=read_template("chatml")),
        ChatFormat("plain", {"user": Turn(), "assistant": Turn()}),
        ChatFormat("template"),
    )
}


class Encoded(NamedTuple):
    """A conversation as ids; `response_mask` is True on assistant text and its end marker."""

    ids: list[int]
    response_mask: list[bool]


@dataclass(frozen=True)
class ChatCodec:
    """A chat format spoken with one model's tokenizer."""

    format: ChatFormat
    tokenizer: TextTokenizer
    end_id: int
    stop_ids: frozenset[int]
    template: Template | None = None

    def encode(
        self,
        messages: Iterable[Message],
        *,
        mode: str | None = None,
        generation_prompt: bool = False,
        finished: bool = True,
    ) -> Encoded:
        """Encode a conversation, from its BOS to its last end marker.

        `generation_prompt` appends the assistant's prefix; `finished=False` leaves out the end
        marker of a last answer that was cut.  Raises DataError for a mode or role that the format
        does not have, and for turns that do not alternate.
        """
        messages = list(messages)
        self._check_turns(messages, generation_prompt)
        if self.template is not None:
            return Encoded(
                *self.template.encode(
                    messages, mode=mode, generation_prompt=generation_prompt, finished=finished
                )
            )
        chosen = self._mode(mode)
        bos = self.tokenizer.bos_id if self.format.bos else None
        ids: list[int] = [] if bos is None else [bos]
        mask = [False] * len(ids)
        for position, message in enumerate(messages):
            turn = self._turn(message.role)
            closed = finished or position < len(messages) - 1
            is_response = message.role == "assistant"
            prefix = self._pieces(turn.before, chosen)
            space = self.format.space if self._adds_space and prefix else ""
            text = self.tokenizer.encode_text(space + message.content) if message.content else []
            end = self._pieces(turn.after, chosen)
            if is_response and self.format.end is None:
                end = [self.end_id]
            if not closed:
                end = []
            ids += prefix + text + end
            mask += [False] * len(prefix) + [is_response] * (len(text) + len(end))
        if generation_prompt:
            prefix = self._pieces(self._turn("assistant").before, chosen)
            ids += prefix
            mask += [False] * len(prefix)
        return Encoded(ids, mask)

    def decode_response(self, ids: Iterable[int]) -> str:
        """The text of a sampled response, without its end marker and the format's space."""
        kept = [token for token in ids if token not in self.stop_ids]
        if self.template is not None:
            text = self.tokenizer.decode_inside(kept).removeprefix(self.template.space)
            return text.strip() if self.template.strips_answers else text
        text = self.tokenizer.decode(kept)
        has_space = self._adds_space or self.tokenizer.decodes_space
        return text.removeprefix(" ") if has_space else text

    @property
    def _adds_space(self) -> bool:
        return bool(self.format.space) and not self.tokenizer.prepends_space

    def _check_turns(self, messages: Sequence[Message], generation_prompt: bool) -> None:
        """Refuse what the model never saw: turns that do not alternate, system text in between."""
        if not messages:
            raise DataError("the list of messages is empty; a conversation needs at least one")
        roles = [message.role for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        if self.format.name == "plain" and turns[:1] == ["assistant"]:
            turns = turns[1:]  # a document of the model's own
        if generation_prompt:
            turns = [*turns, "assistant"]
        for position, role in enumerate(turns):
            expected = "assistant" if position % 2 else "user"
            if role != expected:
                raise DataError(
                    f"the roles are {', '.join(roles)}"
                    f"{', and an answer is to follow' if generation_prompt else ''}; after an "
                    "optional system message user and assistant take turns, the user first"
                )

    def _turn(self, role: str) -> Turn:
        if role not in self.format.turns:
            raise DataError(
                f"the chat format {self.format.name!r} has no {role!r} messages; it knows "
                f"{', '.join(self.format.turns)}. Remove the message or use another chat_format"
            )
        return self.format.turns[role]

    def _mode(self, mode: str | None) -> str:
        modes = self.format.modes
        if mode is None:
            return modes[0] if modes else ""
        if modes and mode not in modes:
            raise DataError(f"unknown mode {mode!r}; {self.format.name} has {', '.join(modes)}")
        return mode

    def _pieces(self, pieces: tuple[str, ...], mode: str) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            marker = self.tokenizer.marker_id(piece)
            text = piece.replace("{mode}", mode)
            ids += [marker] if marker is not None else self.tokenizer.encode_text(text)
        return ids


def build_codec(name: str, tokenizer: TextTokenizer, stop_ids: Iterable[int]) -> ChatCodec:
    """Speak format `name` with `tokenizer`; `stop_ids` are the model's own ends of sequence.

    Raises DataError for an unknown format, or a tokenizer without the format's markers.  A pad
    token that is also the end marker is replaced: the end would be masked out of training.
    """
    if name not in FORMATS:
        raise DataError(f"unknown chat format {name!r}; known are {', '.join(FORMATS)}")
    chat_format = FORMATS[name]
    if name == "template":
        chat_format = replace(chat_format, jinja=_own_template(tokenizer))
    chat_format = replace(chat_format, bos=chat_format.bos and tokenizer.adds_bos)
    markers = set(re.findall(r"<\|\w+\|>", f"{chat_format.turns}{chat_format.jinja}"))
    missing = sorted(marker for marker in markers if tokenizer.marker_id(marker) is None)
    if missing and name != "template":
        raise DataError(
            f"chat format {name!r} needs the special tokens {', '.join(missing)}, which this "
            "tokenizer does not have; set chat_format to the format the model was trained with"
        )
    if chat_format.jinja:
        tokenizer = tokenizer.speaking(chat_format.jinja)
    template = Template(chat_format.jinja, tokenizer) if chat_format.jinja else None
    stops = list(stop_ids)
    end = tokenizer.marker_id(chat_format.end) if chat_format.end else None
    if end is None and template is not None:
        end = template.end_id
    if end is not None:
        stops.append(end)
    elif not stops:
        raise DataError(f"chat format {name!r} needs a model with an end-of-sequence token")
    else:
        end = stops[0]
    tokenizer.choose_pad(end)
    return ChatCodec(chat_format, tokenizer, end, frozenset(stops), template)


def _own_template(tokenizer: TextTokenizer) -> str:
    try:
        return tokenizer.saved.get_chat_template()
    except ValueError as error:
        raise DataError(
            "chat format 'template' needs a tokenizer with a chat template, and this one has none; "
            f"set chat_format to one of {', '.join(name for name in FORMATS if name != 'template')}"
        ) from error


def written_text(name: str, message: Message) -> str:
    """What BPE trains on: a message with its prefix in the default mode, markers left out.

    Of a format that is a jinja template it is the message alone.
    """
    chat_format = FORMATS[name]
    if message.role not in chat_format.turns:
        return message.content
    mode = chat_format.modes[0] if chat_format.modes else ""
    pieces = [p for p in chat_format.turns[message.role].before if not p.startswith("<|")]
    prefix = "".join(pieces).replace("{mode}", mode)
    return prefix + (chat_format.space if prefix else "") + message.content


def jinja_template(chat_format: ChatFormat) -> str | None:
    """The format as jinja with the keyword `mode` (or `condition`); None for plain."""
    before = {role: "".join(turn.before) for role, turn in chat_format.turns.items()}
    after = {role: "".join(turn.after) for role, turn in chat_format.turns.items()}
    if not any((*before.values(), *after.values())):
        return chat_format.jinja
    values = {
        "BOS": "bos_token" if chat_format.bos else "''",
        "MODES": repr(chat_format.modes),
        "SPACE": repr(chat_format.space),
        "BEFORE": repr(before),
        "AFTER": repr(after),
    }
    return re.sub("|".join(values), lambda match: values[match[0]], read_template("turns"))

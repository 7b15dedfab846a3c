"""Messages to token ids and back: the only place where chat text becomes ids.

A conversation is encoded piece by piece.  Prefixes and markers are the format's own; the text of a
message is tokenised with special tokens off, so a marker that somebody typed stays text.  A format
is data: what stands before and after each role's text.

Masks: True = keep, here the assistant's text and its end marker.
Source of the openchat format: the model card of Starling-LM-7B-beta; system text stands bare, as in
OpenChat's own training code.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from starling.base.errors import DataError
from starling.data.records import Message
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
    turns: Mapping[str, Turn]
    end: str | None
    """Marker that ends the assistant's turn; None: the model's own end of sequence."""
    space: str = ""
    """Stands between a prefix and the text, where the tokenizer does not add it by itself."""
    modes: tuple[str, ...] = ()


_OPENCHAT_END = "<|end_of_turn|>"
_CHATML_START, _CHATML_END = "<|im_start|>", "<|im_end|>"

# plain: documents without roles, for models that know none; an answer continues its prompt.
FORMATS: dict[str, ChatFormat] = {
    "openchat": ChatFormat(
        name="openchat",
        turns={
            "system": Turn((), (_OPENCHAT_END,)),
            "user": Turn(("{mode} User:",), (_OPENCHAT_END,)),
            "assistant": Turn(("{mode} Assistant:",), (_OPENCHAT_END,)),
        },
        end=_OPENCHAT_END,
        space=" ",
        modes=("GPT4 Correct", "Code", "Math Correct"),
    ),
    "chatml": ChatFormat(
        name="chatml",
        turns={
            role: Turn((_CHATML_START, f"{role}\n"), (_CHATML_END, "\n"))
            for role in ("system", "user", "assistant")
        },
        end=_CHATML_END,
    ),
    "plain": ChatFormat("plain", {"user": Turn(), "assistant": Turn()}, end=None),
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
        does not have.
        """
        messages = list(messages)
        chosen = self._mode(mode)
        ids: list[int] = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        mask = [False] * len(ids)
        for position, message in enumerate(messages):
            turn = self._turn(message.role)
            closed = finished or position < len(messages) - 1
            is_response = message.role == "assistant"
            prefix = self._pieces(turn.before, chosen)
            space = self.format.space if self._adds_space and prefix else ""
            text = self.tokenizer.encode_text(space + message.content) if message.content else []
            end, tail = self._pieces(turn.after[:1], chosen), self._pieces(turn.after[1:], chosen)
            if is_response and self.format.end is None:
                end = [self.end_id]
            if not closed:
                end, tail = [], []
            ids += prefix + text + end + tail
            mask += [False] * len(prefix) + [is_response] * (len(text) + len(end))
            mask += [False] * len(tail)
        if generation_prompt:
            prefix = self._pieces(self._turn("assistant").before, chosen)
            ids += prefix
            mask += [False] * len(prefix)
        return Encoded(ids, mask)

    def decode_response(self, ids: Iterable[int]) -> str:
        """The text of a sampled response, without its end marker and the format's space."""
        kept = [token for token in ids if token not in self.stop_ids]
        text = self.tokenizer.decode(kept)
        has_space = self._adds_space or self.tokenizer.decodes_space
        return text.removeprefix(" ") if has_space else text

    @property
    def _adds_space(self) -> bool:
        return bool(self.format.space) and not self.tokenizer.prepends_space

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

    Raises DataError for an unknown format, a tokenizer without the format's markers, or a pad
    token that is also the end marker (the end would be masked out of training).
    """
    if name not in FORMATS:
        raise DataError(f"unknown chat format {name!r}; known are {', '.join(FORMATS)}")
    chat_format = FORMATS[name]
    markers = {
        piece
        for turn in chat_format.turns.values()
        for piece in turn.before + turn.after
        if piece.startswith("<|")
    }
    missing = sorted(marker for marker in markers if tokenizer.marker_id(marker) is None)
    if missing:
        raise DataError(
            f"chat format {name!r} needs the special tokens {', '.join(missing)}, which this "
            "tokenizer does not have; set chat_format to the format the model was trained with"
        )
    stops = list(stop_ids)
    if chat_format.end is not None:
        end = tokenizer.marker_id(chat_format.end)
        assert end is not None, "checked among the markers above"
        stops.append(end)
    elif not stops:
        raise DataError(f"chat format {name!r} needs a model with an end-of-sequence token")
    else:
        end = stops[0]
    if tokenizer.pad_id == end:
        raise DataError(
            f"the pad token ({tokenizer.pad_id}) is also an end marker, so ends would be masked as "
            "padding; give the tokenizer another pad token"
        )
    return ChatCodec(chat_format, tokenizer, end, frozenset(stops))


def written_text(name: str, message: Message) -> str:
    """A message with its prefix in the default mode, markers left out: what BPE trains on."""
    chat_format = FORMATS[name]
    mode = chat_format.modes[0] if chat_format.modes else ""
    pieces = [p for p in chat_format.turns[message.role].before if not p.startswith("<|")]
    prefix = "".join(pieces).replace("{mode}", mode)
    return prefix + (chat_format.space if prefix else "") + message.content


JINJA = """\
{{- bos_token -}}
{%- set mode = mode if mode is defined and mode else MODE -%}
{%- set before = BEFORE -%}
{%- set after = AFTER -%}
{%- for message in messages -%}
{%- if message['role'] not in before -%}
{{- raise_exception('unknown role ' + message['role']) -}}
{%- endif -%}
{{- before[message['role']].replace('{mode}', mode) + SPACE -}}
{{- message['content'] + after[message['role']] -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- before['assistant'].replace('{mode}', mode) -}}
{%- endif -%}"""


def jinja_template(chat_format: ChatFormat) -> str | None:
    """The format as jinja for `apply_chat_template`, with `mode` as keyword; None for plain."""
    before = {role: "".join(turn.before) for role, turn in chat_format.turns.items()}
    after = {role: "".join(turn.after) for role, turn in chat_format.turns.items()}
    if not any((*before.values(), *after.values())):
        return None
    mode = chat_format.modes[0] if chat_format.modes else ""
    space = f"({chat_format.space!r} if before[message['role']] else '')"
    template = JINJA.replace("MODE", repr(mode)).replace("SPACE", space)
    return template.replace("BEFORE", repr(before)).replace("AFTER", repr(after))

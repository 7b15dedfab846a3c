"""What a model reads: a conversation's rendered text, token ids and response mask."""

import json
import sys
import textwrap
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from starling.base.errors import DataError, InputError, visible
from starling.base.files import neighbours
from starling.data.records import Message
from starling.serve.find import find_mode
from starling.serve.session import read_messages

if TYPE_CHECKING:
    from starling.data.chat import ChatCodec

EXAMPLE = (
    Message(role="user", content="Hello"),
    Message(role="assistant", content="Hi"),
    Message(role="user", content="How are you today?"),
)

SYSTEMS = {"bare": "openchat", "role": "openchat-role", "refuse": "openchat-refuse"}
EXPECTED = 'it must hold a list of {"role": "user", "content": "..."}'

Kind = Literal["marker", "prompt", "response"]
COLOURS: dict[Kind, str] = {"marker": "35", "response": "32"}


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind: a marker by itself, or text with one mask value."""

    kind: Kind
    mask: bool
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Rendering:
    """A conversation as a model reads it; the runs' ids and texts, in order, are all of it."""

    format: str
    mode: str | None
    runs: tuple[Run, ...]

    @property
    def text(self) -> str:
        """What was written, with its markers."""
        return "".join(run.text for run in self.runs)

    def as_json(self) -> str:
        """One line: text, ids, and the mask (true: the assistant's text or its end marker)."""
        ids = [token for run in self.runs for token in run.ids]
        mask = [run.mask for run in self.runs for _ in run.ids]
        return json.dumps({"text": self.text, "ids": ids, "mask": mask})

    def as_page(self, *, coloured: bool, width: int) -> str:
        """For people: the text, then each run with its mask and ids."""
        masks = [run.mask for run in self.runs for _ in run.ids]
        spoken = self.format if self.mode is None else f"{self.format}, mode {self.mode}"
        legend = ", ".join(
            _paint(kind, kind, coloured) for kind in ("marker", "prompt", "response")
        )
        lines = [
            f"{spoken}: {len(masks)} tokens, {sum(masks)} in the response mask (1)",
            *([legend] if coloured else []),
            "",
            "".join(_paint(visible(run.text), run.kind, coloured) for run in self.runs),
            "",
        ]
        for run in self.runs:
            shown = _paint(json.dumps(visible(run.text), ensure_ascii=False), run.kind, coloured)
            lines.append(f"{run.mask:d}  {run.kind:8}  {shown}")
            ids = " ".join(map(str, run.ids))
            lines += textwrap.wrap(ids, max(40, width), initial_indent=" " * 13)
        return "\n".join(lines)


def render(codec: "ChatCodec", messages: tuple[Message, ...], mode: str | None = None) -> Rendering:
    """Encode a conversation; one that ends with the user's turn gets the assistant's prefix."""
    mode = find_mode(codec, mode)
    encoded = codec.encode(messages, mode=mode, generation_prompt=messages[-1].role == "user")
    markers = {token: text for text, token in codec.tokenizer.markers.items()}
    tokens = zip(encoded.ids, encoded.response_mask, strict=True)
    runs: list[Run] = []
    for is_marker, segment in groupby(tokens, lambda token: token[0] in markers):
        # What was decoded since the last marker: a decoder needs all of it to place its spaces.
        before: list[int] = []
        for mask, group in groupby(segment, lambda token: token[1]):
            ids = [token for token, _ in group]
            if is_marker:
                runs += [Run("marker", mask, (token,), markers[token]) for token in ids]
                continue
            start = len(codec.tokenizer.decode(before))
            before += ids
            kind: Kind = "response" if mask else "prompt"
            runs.append(Run(kind, mask, tuple(ids), codec.tokenizer.decode(before)[start:]))
    return Rendering(codec.format.name, mode, tuple(runs))


def named_format(chat_format: str | None, system: str | None) -> str | None:
    """The format that --chat-format names, or OpenChat's with its system messages in some way."""
    if system is not None and chat_format is not None:
        raise InputError("--system and --chat-format both name a format; leave one of them out")
    return chat_format if system is None else SYSTEMS[system]


def read_file(name: str) -> tuple[Message, ...]:
    """The messages of a JSON file, `-` for standard input; DataError says what is wrong in it."""
    source = "standard input" if name == "-" else name
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"there is no file {name}. {neighbours(Path(name))}") from error
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}; name a JSON file") from error
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not JSON ({error}); {EXPECTED}") from error
    if not isinstance(found, list):
        raise DataError(f"{source}: found {_json_kind(found)}; {EXPECTED}")
    try:
        return read_messages(found)
    except DataError as error:
        raise DataError(f"{source}: {error}; {EXPECTED}") from error


def _json_kind(found: object) -> str:
    kinds = {dict: "an object", str: "a text", bool: "a boolean", type(None): "null"}
    return kinds.get(type(found), "a number")


def _paint(text: str, kind: Kind, coloured: bool) -> str:
    colour = COLOURS.get(kind) if coloured else None
    return text if colour is None else f"\x1b[{colour}m{text}\x1b[0m"

"""A model's own jinja chat template, spoken exactly and safely.

The template is rendered twice: with the messages, and with a secret word in place of each text.
The second shows what the template itself wrote; its special tokens become ids by their number, and
the texts are put between them with special tokens off.  What was typed can therefore never be taken
for what the template wrote, and where nothing was typed the ids are those of
`apply_chat_template(tokenize=True)`.

Left out: templates that rewrite a text (other than by stripping it), repeat it or drop it.
"""

import os
import re
import secrets
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from starling.base.errors import DataError
from starling.data.records import Message
from starling.data.tokenizer import TextTokenizer

# What templates do to a text, the plainest first.
STRIPS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    str.strip,
    lambda text: text.strip("\n"),
    str.rstrip,
    str.lstrip,
    lambda text: text.rstrip("\n"),
    lambda text: text.lstrip("\n"),
)


def read_template(name: str) -> str:
    """The text of `templates/<name>.jinja`.

    llama-2 was published with Llama-2-7b-chat-hf, whose tokenizer names <s> and </s>; chatml with
    Yi-34B-Chat (Qwen's and others' differ in their default system message); turns is our own.
    """
    file = resources.files("starling.data") / "templates" / f"{name}.jinja"
    return file.read_text(encoding="utf-8").removesuffix("\n")


class Template:
    """One jinja template with the tokenizer whose special tokens it writes."""

    def __init__(self, jinja: str, tokenizer: TextTokenizer) -> None:
        self.jinja = jinja
        self.tokenizer = tokenizer
        markers = sorted(tokenizer.markers, key=len, reverse=True)
        self._markers = re.compile(f"({'|'.join(map(re.escape, markers))})")
        # Learnt from an exchange: the end marker, whether an answer is stripped, and the space
        # before it where the generation prompt leaves that to the model.
        exchange = [Message(role="user", content="a"), Message(role="assistant", content=" a ")]
        self.space, self._ends = "", set(tokenizer.markers.values())
        parts, responses, answer = self._parts(exchange)
        last = parts[max(responses)]
        self.end_id = last if isinstance(last, int) else None
        self._ends = {self.end_id}
        self.strips_answers = parts[answer] == "a"
        waiting, _, _ = self._parts(exchange[:1], generation_prompt=True)
        before = parts[:answer]
        self.space = " " if before in ([*waiting, " "], [*waiting[:-1], f"{waiting[-1]} "]) else ""

    def encode(
        self,
        messages: Sequence[Message],
        *,
        mode: str | None = None,
        generation_prompt: bool = False,
        finished: bool = True,
    ) -> tuple[list[int], list[bool]]:
        """Ids and response mask; `finished=False` ends with the last answer's text."""
        parts, responses, answer = self._parts(
            messages, mode=mode, generation_prompt=generation_prompt
        )
        if not finished and messages[-1].role == "assistant":
            parts = parts[: answer + 1]
        ids, places = self.tokenizer.encode_whole(parts)
        return ids, [place in responses for place in places]

    def _parts(
        self,
        messages: Sequence[Message],
        *,
        mode: str | None = None,
        generation_prompt: bool = False,
    ) -> tuple[list[str | int], set[int], int]:
        """The conversation as texts and special tokens; which of them are responses; the last.

        A response is what a model samples: an answer's text, the space before it that the
        generation prompt lacks, and what leads up to and is the end marker.
        """
        if mode and (found := self._markers.search(mode)):
            raise DataError(f"the mode {mode!r} holds the marker {found[0]}; name a mode without")
        options: dict[str, Any] = {"mode": mode, "condition": mode} if mode else {}
        options["add_generation_prompt"] = generation_prompt
        nonce = secrets.token_hex(16)
        words = [f"x{nonce}n{number}x" for number in range(len(messages))]
        rendered = self._render([message.content for message in messages], messages, options)
        word = f"x{nonce}n([0-9]+)x"
        pieces = re.split(word, self._render(words, messages, options))
        if any(not message.content for message in messages):
            # Templates may write other things around an empty text than around a word.
            said = [name if m.content else "" for name, m in zip(words, messages, strict=True)]
            pieces = self._placed(pieces, re.split(word, self._render(said, messages, options)))
        texts = self._texts(rendered, pieces, messages)

        parts: list[str | int] = []
        responses: set[int] = set()
        answer = -1
        for number, piece in enumerate(pieces):
            if number % 2 == 0:
                after_answer = answer >= 0 and answer == len(parts) - 1
                self._add_literals(piece, parts, responses if after_answer else set())
                continue
            if messages[int(piece)].role == "assistant":
                if self.space and parts and str(parts[-1]).endswith(self.space):
                    parts[-1:] = [str(parts[-1])[:-1], self.space]
                    responses.add(len(parts) - 1)
                answer = len(parts)
                responses.add(answer)
            parts.append(texts[int(piece)])
        return parts, responses, answer

    def _placed(self, pieces: list[str], without: list[str]) -> list[str]:
        """`without`, where empty texts have no word, with those of `pieces` in their places."""
        if [number for number in pieces[1::2] if number in without[1::2]] != without[1::2]:
            return without  # which is refused: it lacks messages
        placed, rest, known = [], without[0], iter(without[1:])
        for literal, number in zip(pieces[::2], pieces[1::2], strict=False):
            if number in without[1::2]:
                placed += [rest, next(known)]
                rest = next(known)
                continue
            cut = len(os.path.commonprefix([literal, rest]))
            for marker in self._markers.finditer(rest):
                cut = marker.start() if marker.start() < cut < marker.end() else cut
            placed += [rest[:cut], number]
            rest = rest[cut:]
        return [*placed, rest]

    def _add_literals(self, piece: str, parts: list[str | int], responses: set[int]) -> None:
        """Append what the template wrote; an end marker after an answer is a response too."""
        first, blank = len(parts), True
        for literal in filter(None, self._markers.split(piece)):
            marker = self.tokenizer.marker_id(literal)
            parts.append(literal if marker is None else marker)
            if blank and marker in self._ends and marker is not None:
                responses.update(range(first, len(parts)))
            blank = blank and marker is None and literal.isspace()

    def _texts(self, rendered: str, pieces: list[str], messages: Sequence[Message]) -> list[str]:
        """Each message's text as the template writes it."""
        if sorted(int(number) for number in pieces[1::2]) != list(range(len(messages))):
            raise DataError(
                "the model's chat template drops, repeats or rewrites a message; name another "
                "chat_format"
            )
        texts = [""] * len(messages)
        place = len(pieces[0])
        same = rendered.startswith(pieces[0])
        for number, literal in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
            content = messages[number].content
            for change in STRIPS:
                text = change(content)
                if same and rendered.startswith(text + literal, place):
                    break
            else:
                raise DataError(
                    f"the model's chat template rewrites the text of message {number + 1} (the "
                    f"{messages[number].role}'s), so its tokens cannot be told from typed ones; "
                    "remove what it rewrites, or name another chat_format"
                )
            texts[number] = text
            place += len(text) + len(literal)
        if place != len(rendered):
            raise DataError("the model's chat template depends on the texts; name another format")
        return texts

    def _render(
        self, contents: Sequence[str], messages: Sequence[Message], options: dict[str, Any]
    ) -> str:
        said = [
            {"role": message.role, "content": content}
            for message, content in zip(messages, contents, strict=True)
        ]
        try:
            # transformers renders in a sandbox.
            rendered: Any = self.tokenizer.saved.apply_chat_template(
                said, chat_template=self.jinja, tokenize=False, **options
            )
        except Exception as error:  # a template is a program, and fails in all their ways
            raise DataError(
                "the model's chat template refuses the conversation: "
                f"{str(error) or type(error).__name__}"
            ) from error
        return rendered

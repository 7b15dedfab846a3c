"""Instructions about form that a rule can check: at most 30 words, no comma, valid JSON.

In the manner of IFEval (Zhou et al. 2023, Instruction-Following Evaluation for Large Language
Models, arXiv 2311.07911), whose verifiable instructions these kinds follow; the share of a prompt's
instructions that are followed is what checkpoint selection compares.  Instructions are data, and
nothing in them is ever run.  An answer without a word follows none.  Left out: IFEval's kinds that
need a language detector or a sentence splitter of their own; sentences are counted by their ends.

A comma, quotation marks and forbidden words are IFEval's to the letter.  Elsewhere what a reader
would say comes before its checkers' ways, so scores are near its own, not the same: there
"well-known" is two words, a keyword may stand inside another word, `***` parts paragraphs, `+` is
no bullet and `-b` is one, an ending is compared whatever its case, and "3" is not in small letters.
"""

import re
from collections.abc import Callable, Sequence
from itertools import product
from operator import eq, ge, le
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from starling.base.jsonl import parse_json
from starling.data.records import Prompt

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]+[\"'\u201d\u2019)\]]*(?=\s|$)")
_BULLET = re.compile(r"^[ \t]*[*+-][ \t]+\S", re.MULTILINE)
_BLANK_LINE = re.compile(r"\n[ \t]*\n")

Text = Annotated[str, StringConstraints(pattern=r"\S")]


class _Instruction(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    def holds(self, text: str) -> bool:
        """Whether a text that has words keeps to it."""
        raise NotImplementedError


class WordLimit(_Instruction):
    """So many words or fewer, or so many or more; "don't" and "well-known" are one each."""

    kind: Literal["max_words", "min_words"]
    value: int = Field(ge=1)

    def holds(self, text: str) -> bool:
        compare = le if self.kind == "max_words" else ge
        return compare(len(_WORD.findall(text)), self.value)


class Contains(_Instruction):
    """A phrase as whole words whatever the case and spacing, at least so many times."""

    kind: Literal["contains"]
    phrase: Text
    at_least: int = Field(1, ge=1)

    def holds(self, text: str) -> bool:
        return _count_phrase(self.phrase, text) >= self.at_least


class Excludes(_Instruction):
    """No such phrase, found as by `Contains`."""

    kind: Literal["excludes"]
    phrase: Text

    def holds(self, text: str) -> bool:
        return _count_phrase(self.phrase, text) == 0


class Edge(_Instruction):
    """These very characters at the beginning or at the end, blanks around the answer aside."""

    kind: Literal["starts_with", "ends_with"]
    text: Text

    def holds(self, text: str) -> bool:
        stripped, edge = text.strip(), self.text.strip()
        if self.kind == "starts_with":
            return stripped.startswith(edge)
        return stripped.endswith(edge)


class Count(_Instruction):
    """So many sentences, paragraphs or bullets.

    A sentence ends in `.`, `!` or `?` before a blank or the end, and the last one need not; a blank
    line parts paragraphs; a bullet is a line that begins with `-`, `*` or `+`.
    """

    kind: Literal["num_sentences", "num_paragraphs", "num_bullets"]
    relation: Literal["exactly", "at least", "at most"]
    value: int = Field(ge=0)

    def holds(self, text: str) -> bool:
        compare = {"exactly": eq, "at least": ge, "at most": le}[self.relation]
        return compare(_COUNTS[self.kind](text), self.value)


class Form(_Instruction):
    """No capital, no small letter, no comma; one JSON value (a fence aside); or "quoted" whole."""

    kind: Literal["lowercase", "uppercase", "no_comma", "json", "quoted"]

    def holds(self, text: str) -> bool:
        return _FORMS[self.kind](text.strip())


Instruction = Annotated[
    WordLimit | Contains | Excludes | Edge | Count | Form, Field(discriminator="kind")
]


class InstructedPrompt(Prompt):
    """A prompt with what its answers are to keep to: {"kind": "max_words", "value": 30}, ..."""

    instructions: tuple[Instruction, ...] = Field(strict=False, min_length=1)


def follows(instruction: Instruction, answer: str) -> bool:
    """Whether the answer as it stands keeps to the instruction; without a word it never does."""
    return _WORD.search(answer) is not None and instruction.holds(answer)


def follows_loosely(instruction: Instruction, answer: str) -> bool:
    """Whether it does as it stands or without its stars, its first line, its last line, or several.

    That forgives emphasis and a sentence around the answer (the loose measure of the paper, 2.2).
    """
    lines = answer.strip().split("\n")
    texts = (
        "\n".join(lines[first : len(lines) - last]) for first, last in product((0, 1), repeat=2)
    )
    variants = (variant for text in texts for variant in (text, text.replace("*", "")))
    return any(follows(instruction, variant) for variant in variants)


def share_followed(prompts: Sequence[InstructedPrompt], answers: Sequence[str]) -> list[float]:
    """For each prompt, the share of its instructions that its answer follows, as `follows` says."""
    return [
        sum(follows(each, answer) for each in prompt.instructions) / len(prompt.instructions)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _count_phrase(phrase: str, text: str) -> int:
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    return len(re.findall(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE))


def _count_sentences(text: str) -> int:
    return sum(_WORD.search(part) is not None for part in _SENTENCE_END.split(text))


def _count_paragraphs(text: str) -> int:
    return sum(not part.isspace() and part != "" for part in _BLANK_LINE.split(text))


def _is_json(text: str) -> bool:
    fenced = re.fullmatch(r"```(?:json|JSON)?\n(.*)\n```", text, re.DOTALL)
    try:
        parse_json((fenced[1] if fenced else text).encode(errors="surrogatepass"))
    except ValueError:
        return False
    return True


_COUNTS: dict[str, Callable[[str], int]] = {
    "num_sentences": _count_sentences,
    "num_paragraphs": _count_paragraphs,
    "num_bullets": lambda text: len(_BULLET.findall(text)),
}
_FORMS: dict[str, Callable[[str], bool]] = {
    "lowercase": lambda text: text == text.lower(),
    "uppercase": lambda text: text == text.upper(),
    "no_comma": lambda text: "," not in text,
    "json": _is_json,
    "quoted": lambda text: text[0] == text[-1] == '"',
}

"""Pairs to measure a reward model on, in RewardBench's columns: prompt, chosen, rejected, subset.

The prompt is a string or messages; chosen and rejected are the answer's text, the messages that
follow the prompt, or whole conversations, beside which the prompt may be absent.
"""

from typing import Any

from pydantic import model_validator

from starling.data.records import Conversation, Id, Record

SIDES = ("chosen", "rejected")


class RewardPair(Record):
    """Two finished conversations, the better one first."""

    id: Id = ""
    prompt: Any = None
    """As it stood in the file; both conversations hold it."""
    chosen: Conversation
    rejected: Conversation
    subset: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _joined(cls, row: Any) -> Any:
        prompt = row.get("prompt")
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return row | {
            side: {"messages": _conversation(turns, row[side])} for side in SIDES if side in row
        }

    @model_validator(mode="after")
    def _check_answers(self) -> "RewardPair":
        if not all(side.messages[-1].content.strip() for side in (self.chosen, self.rejected)):
            raise ValueError("an answer is empty")
        if self.chosen.messages == self.rejected.messages:
            raise ValueError("chosen and rejected are the same")
        return self

    @property
    def more_chars(self) -> int:
        """Characters of the chosen side's assistant beyond those of the rejected one's."""
        chosen, rejected = (
            sum(len(turn.content) for turn in side.messages if turn.role == "assistant")
            for side in (self.chosen, self.rejected)
        )
        return chosen - rejected


def _conversation(turns: Any, said: Any) -> Any:
    """The whole conversation as raw messages; what is none is left for `Conversation` to refuse."""
    before = turns if isinstance(turns, list) else []
    if isinstance(said, str):
        return [*before, {"role": "assistant", "content": said}]
    if not isinstance(said, list) or not said or not isinstance(said[0], dict):
        return said
    if said[0].get("role") == "assistant":
        return [*before, *said]
    if before and _text(before[-1]) not in map(_text, said):
        raise ValueError("a whole conversation does not hold the row's prompt")
    return said


def _text(turn: Any) -> Any:
    return (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else turn

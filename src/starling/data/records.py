"""The records that pass between stages on disk, validated where they enter.

Prompts, conversations, questions and rankings, one JSON object a line.  What a row may hold and
how its ranks are read is fixed here; `base.jsonl` reads the lines and quarantines bad ones.
Unknown columns are ignored: other people's files carry columns of their own.
"""

import hashlib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]


class Record(BaseModel):
    """Base of everything read from a JSONL file: frozen and strict about types."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class Message(Record):
    """One turn of a conversation."""

    role: Role
    content: str


def content_id(messages: tuple[Message, ...]) -> str:
    """A short stable name for a conversation that came without an id."""
    digest = hashlib.sha256()
    for message in messages:
        digest.update(f"{message.role}\x00{message.content}\x00".encode())
    return digest.hexdigest()[:16]


def _check_turns(messages: tuple[Message, ...], last: Role) -> None:
    if not messages:
        raise ValueError("messages is empty or missing; a conversation needs at least one turn")
    if messages[-1].role != last:
        raise ValueError(f"the last message is the {messages[-1].role}'s; it must be the {last}'s")
    turns = messages[1:] if messages[0].role == "system" else messages
    for position, message in enumerate(turns):
        expected = "user" if position % 2 == 0 else "assistant"
        if message.role != expected:
            raise ValueError(
                f"message {position + 1} is the {message.role}'s; turns alternate, so it must be "
                f"the {expected}'s"
            )
    if not turns:
        raise ValueError("the conversation holds only a system message")
    if any(not message.content.strip() for message in turns if message.role == "user"):
        raise ValueError("a user message is empty")


Messages = Annotated[
    tuple[Message, ...],
    Field(strict=False),
    BeforeValidator(lambda value: () if value is None else value),
]
Sources = Annotated[
    list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
"""Where a prompt is from: a list in Nectar, a single name in other people's files."""


Id = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""Text; a whole number, as other people's files have it, becomes text."""


class _Dialogue(Record):
    messages: Messages = ()
    id: Id = ""
    category: str | None = None
    _last: ClassVar[Role]

    @model_validator(mode="after")
    def _complete(self) -> "_Dialogue":
        if not self.messages:
            object.__setattr__(self, "messages", self._split())
        _check_turns(self.messages, self._last)
        if not self.id:
            object.__setattr__(self, "id", content_id(self.messages))
        return self

    def _split(self) -> tuple[Message, ...]:
        """The messages of a row that holds them in another form."""
        return ()


class Conversation(_Dialogue):
    """A finished conversation; it ends with the assistant's turn."""

    _last: ClassVar[Role] = "assistant"


class _Asked(_Dialogue):
    _last: ClassVar[Role] = "user"
    prompt: str | None = None
    """Nectar's one string. It stands in for messages; beside them it does not count."""
    source: Sources | None = None
    mode: str | None = None
    checks: dict[str, Any] | None = None
    """What the demo's rubric grades an answer by; judges that read text never see it."""

    def _split(self) -> tuple[Message, ...]:
        return () if self.prompt is None else split_nectar_prompt(self.prompt)


class Answer(Record):
    """What a model said to a prompt."""

    answer: str
    model: str
    finish_reason: FinishReason | None = None


class Prompt(_Asked):
    """A conversation that waits for an answer; it ends with the user's turn."""

    answers: tuple[Answer, ...] = Field(default=(), strict=False)
    """Answers that are there already, to be ranked beside new ones: a Nectar row's, unranked."""
    good_natured: bool | None = None
    """Whether answering is right: of the others, whose share is answered is measured."""


class Question(Record):
    """A benchmark question: the user's turns, each asked on top of the model's own answers.

    FastChat's question.jsonl is read too, whose id is a `question_id`.
    """

    id: Id = Field(validation_alias=AliasChoices("id", "question_id"))
    category: str
    turns: tuple[str, ...] = Field(strict=False, min_length=1)
    checks: tuple[dict[str, Any], ...] | None = Field(default=None, strict=False)
    """One rubric per turn, where the question can be graded by rule."""

    @model_validator(mode="after")
    def _validate(self) -> "Question":
        if any(not turn.strip() for turn in self.turns):
            raise ValueError("a turn is empty")
        if self.checks is not None and len(self.checks) != len(self.turns):
            raise ValueError(f"{len(self.turns)} turns but {len(self.checks)} checks")
        return self


class RankedAnswer(Answer):
    """One candidate answer with its rank: 1 is best, equal ranks tie, null is unranked."""

    rank: float | None = None


def dense_ranks(ranks: list[float | None]) -> list[int | None]:
    """Number ranks 1, 2, 2, 3, from dense (1, 2, 2, 3) or competition (1, 2, 2, 4) numbering.

    Raises ValueError for anything else (fractions, gaps, no rank 1): such a row was not ranked.
    """
    known = sorted(rank for rank in ranks if rank is not None)
    if not known:
        raise ValueError("no answer is ranked")
    place = {rank: number for number, rank in enumerate(sorted(set(known)), start=1)}
    is_dense = all(rank == place[rank] for rank in known)
    if not is_dense and any(rank != known.index(rank) + 1 for rank in known):
        raise ValueError(
            f"ranks {known} are numbered neither densely (1, 2, 2, 3) nor as in a competition "
            "(1, 2, 2, 4)"
        )
    return [None if rank is None else place[rank] for rank in ranks]


class RankingRow(_Asked):
    """A prompt with its K ranked answers, in Nectar's columns plus ours.

    `messages` counts when present; Nectar's one-string `prompt` is split on its markers otherwise,
    which text typed by people can fool.
    """

    answers: tuple[RankedAnswer, ...] = Field(strict=False)
    turns: int | None = None
    num_responses: int | None = None
    good_natured: bool | None = None
    weight: float = Field(1.0, gt=0)
    """How much the ranking counts in training, beside the others."""

    @model_validator(mode="after")
    def _check_answers(self) -> "RankingRow":
        if len(self.answers) < 2:
            raise ValueError(f"{len(self.answers)} answer(s); a ranking needs at least 2")
        if self.num_responses not in (None, len(self.answers)):
            raise ValueError(
                f"num_responses is {self.num_responses}, and there are {len(self.answers)} answers"
            )
        if any(not answer.answer.strip() for answer in self.answers):
            raise ValueError("an answer is empty")
        dense_ranks([answer.rank for answer in self.answers])
        return self

    @property
    def ranks(self) -> list[int | None]:
        """Dense ranks in the answers' order; None is unranked, below every ranked one."""
        return dense_ranks([answer.rank for answer in self.answers])


def split_nectar_prompt(prompt: str) -> tuple[Message, ...]:
    r"""Turn Nectar's `\n\nHuman: ...\n\nAssistant: ` string into messages that end with the user's.

    Raises ValueError when the string does not open with a human turn or does not wait for an
    answer.  Markers that people typed inside a turn split it there: the format cannot tell.
    """
    human, assistant = "\n\nHuman: ", "\n\nAssistant:"
    if not prompt.startswith(human):
        raise ValueError(r"a Nectar prompt starts with '\n\nHuman: '")
    if not prompt.rstrip(" ").endswith(assistant):
        raise ValueError(r"a Nectar prompt ends with '\n\nAssistant: '")
    messages: list[Message] = []
    body = prompt.rstrip(" ")[: -len(assistant)]
    for turn in body.split(human)[1:]:
        asked, *answered = turn.split(assistant)
        messages.append(Message(role="user", content=asked.strip()))
        messages += [Message(role="assistant", content=text.strip()) for text in answered]
    return tuple(messages)

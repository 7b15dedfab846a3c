"""Let a policy answer the questions, each turn on top of its own earlier answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from starling.base.errors import DataError
from starling.base.seeding import derive_seed
from starling.bench.mt_bench.protocol import OTHER_TEMPERATURE, TEMPERATURES
from starling.data.records import FinishReason, Message, Question
from starling.judging.rubric import Checks, Grade, grade
from starling.models.best_of import best_of, replies_by_id
from starling.models.interfaces import Request, Responder, Sampling

if TYPE_CHECKING:
    from starling.models.reward_model import RewardModel

Decoding = Literal["sampled", "greedy"]

HF_TOP_K = 50
"""FastChat samples a local model with transformers' defaults, of which this is one."""


@dataclass(frozen=True)
class Answer:
    """One turn's answer of one policy; `messages` ends with the user's turn it answers.

    `policy` is "sft" (the baseline) or "ppo"; `decoding` is "greedy" or "sampled": at temperature
    1, or at MT-Bench's by category.
    """

    question: str
    category: str
    turn: int
    policy: str
    decoding: Decoding
    messages: tuple[Message, ...]
    answer: str
    finish_reason: FinishReason
    tokens: int
    checks: dict[str, Any] | None

    @property
    def gold(self) -> Grade | None:
        """The noiseless rubric's grade, where the question can be graded by rule."""
        if self.checks is None:
            return None
        checks = Checks.model_validate(self.checks)
        return grade(checks, self.answer, finished=self.finish_reason == "stop")

    def as_dict(self) -> dict[str, Any]:
        """A row of answers.jsonl, from which every figure can be computed again."""
        row: dict[str, Any] = {"id": self.question, "split": "bench", **vars(self)}
        del row["question"], row["checks"]
        row["messages"] = [message.model_dump() for message in self.messages]
        row["gold"] = self.gold and self.gold._asdict() | {"total": self.gold.total}
        return row


@dataclass(frozen=True)
class Contestant:
    """A policy under its name in the results, and how it decodes.

    `room` says how many tokens a conversation leaves in the model's context, where that is known;
    the turns that are still to come share it, so that a short context cuts answers, not turns.
    """

    name: str
    decoding: Decoding
    responder: Responder
    max_tokens: int
    seed: int
    room: Callable[[tuple[Message, ...]], int] | None = None
    top_k: int = 0
    is_mt_bench: bool = False
    """Sample at MT-Bench's temperatures, and strip answers before anybody sees them, as it does."""

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer every turn; DataError when a call fails, and for two questions of one id."""
        history: dict[str, tuple[Message, ...]] = {question.id: () for question in questions}
        if len(history) < len(questions):
            ids = [question.id for question in questions]
            repeated = next(id for id in ids if ids.count(id) > 1)
            raise DataError(f"two questions share the id {repeated!r}; give each its own")
        answers: list[Answer] = []
        for turn in range(max(len(question.turns) for question in questions)):
            asked = [question for question in questions if turn < len(question.turns)]
            for question in asked:
                user = Message(role="user", content=question.turns[turn])
                history[question.id] += (user,)
            given = self._answer_turn(asked, history, turn)
            for answer in given:
                said = Message(role="assistant", content=answer.answer)
                history[answer.question] += (said,)
            answers += given
        return answers

    def _answer_turn(
        self,
        asked: Sequence[Question],
        history: Mapping[str, tuple[Message, ...]],
        turn: int,
    ) -> list[Answer]:
        # Both policies draw the same uniforms: the comparison is sharper for it.
        requests = [
            self.request(
                question.id,
                history[question.id],
                question.category,
                f"bench/{question.id}",
                turn,
                turns_left=len(question.turns) - turn,
            )
            for question in asked
        ]
        replies = replies_by_id(self.responder, requests)
        texts = {id: reply.text for id, reply in replies.items()}
        if self.is_mt_bench:
            texts = {id: text.strip() for id, text in texts.items()}
        return [
            Answer(
                question=question.id,
                category=question.category,
                turn=turn + 1,
                policy=self.name,
                decoding=self.decoding,
                messages=history[question.id],
                answer=texts[question.id],
                finish_reason=replies[question.id].finish_reason,
                tokens=replies[question.id].usage.response_tokens,
                checks=None if question.checks is None else question.checks[turn],
            )
            for question in asked
        ]

    def request(
        self,
        id: str,
        messages: tuple[Message, ...],
        category: str,
        purpose: str,
        *counters: int,
        turns_left: int = 1,
    ) -> Request:
        """A request decoded as this contestant does, from the random stream of the purpose."""
        seed = derive_seed(self.seed, purpose, *counters)
        temperature = self._temperature(category)
        top_k = self.top_k if temperature else 0
        longest = self._longest(id, messages, turns_left)
        sampling = Sampling(longest, temperature, seed, top_k=top_k)
        return Request(id, messages, sampling)

    def _temperature(self, category: str) -> float:
        if self.is_mt_bench:
            return TEMPERATURES.get(category, OTHER_TEMPERATURE)
        return 0.0 if self.decoding == "greedy" else 1.0

    def _longest(self, id: str, messages: tuple[Message, ...], turns_left: int) -> int:
        if self.room is None:
            return self.max_tokens
        room = self.room(messages) // turns_left
        if room < 1:
            raise DataError(
                f"question {id}: the conversation fills {self.name}'s whole context, so there is "
                "no room for an answer; use a model with a longer one, or shorter answers"
            )
        return min(self.max_tokens, room)


def yardstick(
    answers: Sequence[Answer], contestant: Contestant, reward_model: "RewardModel", *, samples: int
) -> list[Answer]:
    """For each answer's conversation, the one of `samples` new answers that the reward model likes.

    The conversation is the baseline's own, so this is the yardstick that PPO should reach.
    """
    groups = [
        [
            contestant.request(
                f"{row}/{n}",
                answer.messages,
                answer.category,
                f"best-of/{answer.question}",
                answer.turn,
                n,
            )
            for n in range(samples)
        ]
        for row, answer in enumerate(answers)
    ]
    chosen = best_of(groups, contestant.responder, reward_model)
    return [
        replace(
            answer,
            policy=f"best_of_{samples}",
            answer=reply.text,
            finish_reason=reply.finish_reason,
            tokens=reply.usage.response_tokens,
        )
        for answer, reply in zip(answers, chosen, strict=True)
    ]

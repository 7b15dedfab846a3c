"""Let a policy answer the questions, each turn on top of its own earlier answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from starling.base.errors import DataError
from starling.base.seeding import derive_seed
from starling.data.records import FinishReason, Message, Question
from starling.judging.rubric import Checks, Grade, grade
from starling.models.best_of import best_of, replies_by_id
from starling.models.interfaces import Request, Responder, Sampling
from starling.models.reward_model import RewardModel


@dataclass(frozen=True)
class Answer:
    """One turn's answer of one policy; `messages` ends with the user's turn it answers.

    `policy` is "sft" (the baseline) or "ppo"; `decoding` is "sampled" (temperature 1) or "greedy".
    """

    question: str
    category: str
    turn: int
    policy: str
    decoding: str
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
    """A policy under its name in the results, and how it decodes."""

    name: str
    decoding: str
    responder: Responder
    max_tokens: int
    seed: int

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
            # Both policies draw the same uniforms: the comparison is sharper for it.
            requests = [
                self.request(question.id, history[question.id], f"bench/{question.id}", turn)
                for question in asked
            ]
            replies = replies_by_id(self.responder, requests)
            for question in asked:
                reply = replies[question.id]
                answers.append(
                    Answer(
                        question=question.id,
                        category=question.category,
                        turn=turn + 1,
                        policy=self.name,
                        decoding=self.decoding,
                        messages=history[question.id],
                        answer=reply.text,
                        finish_reason=reply.finish_reason,
                        tokens=reply.usage.response_tokens,
                        checks=None if question.checks is None else question.checks[turn],
                    )
                )
                history[question.id] += (Message(role="assistant", content=reply.text),)
        return answers

    def request(
        self, id: str, messages: tuple[Message, ...], purpose: str, *counters: int
    ) -> Request:
        """A request decoded as this contestant does, from the random stream of the purpose."""
        seed = derive_seed(self.seed, purpose, *counters)
        temperature = 0.0 if self.decoding == "greedy" else 1.0
        return Request(id, messages, Sampling(self.max_tokens, temperature, seed))


def yardstick(
    answers: Sequence[Answer], contestant: Contestant, reward_model: RewardModel, *, samples: int
) -> list[Answer]:
    """For each answer's conversation, the one of `samples` new answers that the reward model likes.

    The conversation is the baseline's own, so this is the yardstick that PPO should reach.
    """
    groups = [
        [
            contestant.request(
                f"{row}/{n}", answer.messages, f"best-of/{answer.question}", answer.turn, n
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

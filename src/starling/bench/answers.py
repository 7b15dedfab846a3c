"""Let a policy answer the questions, each turn on top of its own earlier answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from starling.base.errors import DataError
from starling.base.seeding import derive_seed
from starling.data.records import FinishReason, Message, Question
from starling.judging.rubric import Checks, Grade, grade
from starling.models.interfaces import Failure, Reply, Request, Responder, Sampling
from starling.models.reward_model import RewardModel, Scored


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
        gold = self.gold
        parts = None if gold is None else gold._asdict() | {"total": gold.total}
        return {
            "id": self.question,
            "category": self.category,
            "split": "bench",
            "turn": self.turn,
            "policy": self.policy,
            "decoding": self.decoding,
            "messages": [message.model_dump() for message in self.messages],
            "answer": self.answer,
            "finish_reason": self.finish_reason,
            "tokens": self.tokens,
            "gold": parts,
        }


@dataclass(frozen=True)
class Contestant:
    """A policy under its name in the results, and how it decodes."""

    name: str
    decoding: str
    responder: Responder
    max_tokens: int
    seed: int

    @property
    def temperature(self) -> float:
        return 0.0 if self.decoding == "greedy" else 1.0

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer every turn of every question.

        Raises DataError when a call fails, and for two questions of one id.
        """
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
            replies = self._replies(asked, history, turn)
            for question in asked:
                answer = self._answer(question, history[question.id], turn, replies[question.id])
                answers.append(answer)
                history[question.id] += (Message(role="assistant", content=answer.answer),)
        return answers

    def _replies(
        self, asked: Sequence[Question], history: dict[str, tuple[Message, ...]], turn: int
    ) -> dict[str, Reply]:
        # Both policies draw the same uniforms: common random numbers make the comparison sharper.
        requests = [
            Request(
                question.id,
                history[question.id],
                Sampling(
                    self.max_tokens,
                    self.temperature,
                    derive_seed(self.seed, f"bench/{question.id}", turn),
                ),
            )
            for question in asked
        ]
        return replies_by_id(self.responder, requests)

    def _answer(
        self, question: Question, messages: tuple[Message, ...], turn: int, reply: Reply
    ) -> Answer:
        return Answer(
            question=question.id,
            category=question.category,
            turn=turn + 1,
            policy=self.name,
            decoding=self.decoding,
            messages=messages,
            answer=reply.text,
            finish_reason=reply.finish_reason,
            tokens=reply.usage.response_tokens,
            checks=None if question.checks is None else question.checks[turn],
        )


def replies_by_id(responder: Responder, requests: Sequence[Request]) -> dict[str, Reply]:
    """Every request's reply; raises DataError naming the first call that failed."""
    replies: dict[str, Reply] = {}
    for outcome in responder.respond(requests):
        if isinstance(outcome, Failure):
            raise DataError(f"no answer to {outcome.request_id}: {outcome.reason}")
        replies[outcome.request_id] = outcome
    return replies


def best_of(
    answers: Sequence[Answer], contestant: Contestant, reward_model: RewardModel, *, samples: int
) -> list[Answer]:
    """For each answer's conversation, the one of `samples` new answers that the reward model likes.

    The conversation is the baseline's own, so this is the yardstick that PPO should reach.
    """
    requests = [
        Request(
            f"{row}/{number}",
            answer.messages,
            Sampling(
                contestant.max_tokens,
                contestant.temperature,
                derive_seed(contestant.seed, f"best-of/{answer.question}", answer.turn, number),
            ),
        )
        for row, answer in enumerate(answers)
        for number in range(samples)
    ]
    replies = replies_by_id(contestant.responder, requests)
    scores = reward_model.score(
        Scored(
            (*request.messages, Message(role="assistant", content=replies[request.id].text)),
            finished=replies[request.id].finish_reason == "stop",
        )
        for request in requests
    )
    chosen: list[Answer] = []
    for row, answer in enumerate(answers):
        best = int(scores[row * samples : (row + 1) * samples].argmax())
        reply = replies[f"{row}/{best}"]
        chosen.append(
            replace(
                answer,
                policy=f"best_of_{samples}",
                answer=reply.text,
                finish_reason=reply.finish_reason,
                tokens=reply.usage.response_tokens,
            )
        )
    return chosen

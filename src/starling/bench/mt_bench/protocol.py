"""MT-Bench's protocol: what the judge is shown, byte for byte, and how its reply is read.

Pure: questions, answers and templates in, messages out; text in, a verdict out.
Source: Zheng et al. 2023 (arXiv 2306.05685) and its code, github.com/lm-sys/FastChat, llm_judge.
"""

import re
from typing import Literal, NamedTuple

from starling.base.errors import DataError
from starling.bench.asking import Unread
from starling.data.fastchat import Bench, JudgePrompt, MtQuestion
from starling.data.records import Message
from starling.models.interfaces import Reply

NEED_REFERENCE = ("math", "reasoning", "coding")
"""Categories whose judge is shown a reference answer."""

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7
"""At which answers are sampled, by category."""

ANSWER_TOKENS, JUDGE_TOKENS = 1024, 2048
LOWEST, HIGHEST = 1.0, 10.0

_DOUBLE = re.compile(r"\[\[(\d+\.?\d*)\]\]", re.ASCII)
_SINGLE = re.compile(r"\[(\d+\.?\d*)\]", re.ASCII)

Verdict = Literal["A", "B", "tie"]


class Shown(NamedTuple):
    """What a judge is sent, and the name of the prompt."""

    prompt: str
    messages: tuple[Message, ...]

    @property
    def user_prompt(self) -> str:
        """The filled template."""
        return self.messages[-1].content


def show_answer(bench: Bench, question: MtQuestion, answers: tuple[str, ...], turn: int) -> Shown:
    """One model's answer to a turn (1 or 2) for a rating; the second is shown after the first."""
    fields = {"question": question.turns[0], "answer": answers[0]}
    if turn == 2:
        fields = {
            f"{name}_{number}": texts[number - 1]
            for name, texts in (("question", question.turns), ("answer", answers))
            for number in (1, 2)
        }
    return _fill(bench, question, ("single-v1", "single-math-v1"), fields, turn)


def show_pair(
    bench: Bench,
    question: MtQuestion,
    first: tuple[str, ...],
    second: tuple[str, ...],
    turn: int,
) -> Shown:
    """Two models' answers to a turn for a comparison, `first` in seat A."""
    fields = {"question": question.turns[0], "answer_a": first[0], "answer_b": second[0]}
    if turn == 2:
        fields = {
            f"{name}_{number}": texts[number - 1]
            for name, texts in (
                ("question", question.turns),
                ("answer_a", first),
                ("answer_b", second),
            )
            for number in (1, 2)
        }
    return _fill(bench, question, ("pair-v2", "pair-math-v1"), fields, turn)


def needs_reference(bench: Bench, question: MtQuestion) -> bool:
    """Whether the judge is shown a reference; DataError where it should be and there is none."""
    if question.category not in NEED_REFERENCE:
        return False
    found = bench.references.get(question.question_id, ())
    if len(found) < len(question.turns):
        raise DataError(
            f"question {question.question_id} is of category {question.category}, whose judge is "
            f"shown a reference for each of its {len(question.turns)} turns, and reference_answer/ "
            f"holds {len(found)}. Complete it, or name a file with --references."
        )
    return True


def _fill(
    bench: Bench,
    question: MtQuestion,
    names: tuple[str, str],
    fields: dict[str, str],
    turn: int,
) -> Shown:
    is_guided = needs_reference(bench, question)
    name = names[is_guided] + ("-multi-turn" if turn == 2 else "")
    prompt = bench.prompts.get(name)
    if prompt is None:
        known = ", ".join(bench.prompts)
        raise DataError(f"judge_prompts.jsonl holds no prompt {name!r}; it has {known}")
    if is_guided:
        texts = bench.references[question.question_id]
        fields = fields | {f"ref_answer_{n}": text for n, text in enumerate(texts, start=1)}
    return Shown(name, _messages(prompt, fields))


def _messages(prompt: JudgePrompt, fields: dict[str, str]) -> tuple[Message, ...]:
    try:
        filled = prompt.prompt_template.format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(
            f"the prompt {prompt.name!r} cannot be filled: {error!r}. It may hold "
            f"{', '.join('{' + name + '}' for name in fields)}."
        ) from error
    system = Message(role="system", content=prompt.system_prompt)
    return system, Message(role="user", content=filled)


def read_score(reply: Reply) -> float | Unread:
    """The first `[[n]]`, else the first `[n]`, fractions kept; Unread without, or off 1 to 10.

    First, not last, and the judge's own quotations count: so it was published.
    """
    score = first_score(reply.text)
    if score is None:
        return Unread("the reply holds no [[rating]]")
    if not LOWEST <= score <= HIGHEST:
        return Unread(f"the rating is {score:g}, and the scale is from 1 to 10")
    return score


def first_score(text: str) -> float | None:
    """What FastChat reads, on whatever scale; None where it reads nothing."""
    found = _DOUBLE.search(text) or _SINGLE.search(text)
    return None if found is None else float(found[1])


def read_any_score(reply: Reply) -> float | Unread:
    """As FastChat: without a look at the scale."""
    score = first_score(reply.text)
    return Unread("the reply holds no [[rating]]") if score is None else score


def read_winner(reply: Reply) -> Verdict | Unread:
    """`[[A]]`, else `[[B]]`, else `[[C]]` anywhere in the reply, in this order; C is a tie."""
    verdicts: dict[str, Verdict] = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}
    for mark, winner in verdicts.items():
        if mark in reply.text:
            return winner
    return Unread("the reply holds none of [[A]], [[B]], [[C]]")

"""A judge that writes nothing: a model in this process, and how likely it holds each label.

Answers stand in lettered blocks, the assistant's turn is begun with our words ("Best: "), and the
next token's log-probabilities are read at the letters.  A comparison is shown in all K rotations of
one shuffle, so that every answer stands once at each place, under each letter; the mean over the
rotations ranks them.  What a place or a letter earns whatever stands there is the same in every
mean, and cancels.  A rating has nothing to rotate: a digit that the model likes stays liked.

It costs nothing and says the same again, so it has no ledger.

Shapes: B questions, T token positions, D model width.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import resources
from string import ascii_uppercase, digits
from typing import Any, NamedTuple

import torch

from starling.base.errors import ModelError
from starling.base.rating import kendall_w, ranks_from
from starling.base.seeding import python_generator
from starling.data.chat import ChatCodec
from starling.data.records import Message
from starling.judging.fences import fence, fresh_nonce
from starling.judging.judge import Comparison, GradedAnswer, Ranking, Rating, Unparsed, Vote
from starling.judging.rating import LOWEST
from starling.models.causal_lm import Batch, LanguageModel, hidden_states, length_batches
from starling.models.interfaces import Usage

PROMPTS = (resources.files("starling.judging") / "prompts/logits.txt").read_text("utf-8")
RANK, RATE = PROMPTS.rstrip().split("\n\n")

TIE = 1e-5
"""Differences of log-probabilities (nats) up to here are rounding's; closer answers tie."""


class Labels(NamedTuple):
    """What a model may say next, the words before it, and each label's token after these."""

    texts: str
    closing: str
    ids: list[int]


class LogitsJudge(AbstractContextManager["LogitsJudge"]):
    """Ranks by the letters' log-probabilities, and rates by the expected one of ten digits.

    Raises ModelError for a tokenizer without a token for each letter and digit.  A question that
    the model has no room for is `Unparsed`, and is not put to it.
    """

    def __init__(self, loaded: LanguageModel, *, seed: int) -> None:
        self._model, self._codec = loaded.model, loaded.codec
        self._seed = seed
        self._context_length = getattr(loaded.model.config, "max_position_embeddings", math.inf)
        self._letters = find_labels(loaded.codec, "Best:", ascii_uppercase)
        self._digits = find_labels(loaded.codec, "Grade:", digits)

    def rank(self, comparisons: Iterable[Comparison]) -> Iterator[Ranking | Unparsed]:
        """Rank each comparison's 2 to 26 answers, with one vote a rotation."""
        for each in comparisons:
            turns = rotations(each, self._seed)
            shown = [[each.answers[index] for index in turn] for turn in turns]
            questions = [self._question(each, answers, RANK, self._letters) for answers in shown]
            rows = self._read(questions, self._letters.ids[: len(turns)])
            if isinstance(rows, str):
                yield Unparsed(each.id, rows)
                continue
            votes, by_answer = [], []
            for turn, row, ids in zip(turns, rows, questions, strict=True):
                said, usage = _said(row, self._letters), Usage(len(ids), 0)
                votes.append(Vote(turn, said, _ranks(row), usage=usage, usd=0.0))
                placed = dict(zip(turn, row, strict=True))
                by_answer.append([placed[answer] for answer in range(len(turn))])
            means = [sum(column) / len(column) for column in zip(*by_answer, strict=True)]
            agreement = kendall_w([_ranks(row) for row in by_answer])
            yield Ranking(each.id, _ranks(means), tuple(votes), agreement=agreement)

    def rate(self, answers: Iterable[GradedAnswer]) -> Iterator[Rating | Unparsed]:
        """Rate each answer: 1 and the expected digit, so from 1 to 10."""
        for each in answers:
            question = self._question(each, [each.answer], RATE, self._digits)
            rows = self._read([question], self._digits.ids)
            if isinstance(rows, str):
                yield Unparsed(each.id, rows)
                continue
            odds = [math.exp(logprob - max(rows[0])) for logprob in rows[0]]
            expected = sum(digit * share for digit, share in enumerate(odds)) / sum(odds)
            yield Rating(each.id, round(LOWEST + expected, 4), _said(rows[0], self._digits))

    def __exit__(self, *_error: object) -> None:
        """Nothing is open."""

    def _question(
        self, asked: Comparison | GradedAnswer, answers: list[str], prompt: str, labels: Labels
    ) -> list[int]:
        """Ids of the blocks and the prompt, up to where a label is to follow."""
        texts = [*(message.content for message in asked.messages), *answers]
        whole = fresh_nonce(self._seed, f"judging/logits/{asked.id}", texts)
        # A digit is a token, twice in each block, and small models have short contexts.
        codes = (whole[:length] for length in range(2, len(whole) + 1))
        nonce = next(code for code in codes if not any(code in text for text in texts))
        names = labels.texts[: len(answers)] if len(answers) > 1 else ["answer"]
        names = [*(message.role for message in asked.messages), *names]
        blocks = [fence(name, text, nonce) for name, text in zip(names, texts, strict=True)]
        begun = labels.closing + labels.texts[0]
        return _begun(self._codec, "\n".join([*blocks, prompt]), begun)[:-1]

    @torch.inference_mode()
    def _read(self, questions: list[list[int]], label_ids: list[int]) -> list[list[float]] | str:
        """Log-probabilities of the labels after each question, or why there are none.

        No other question shares their batches: a verdict is the same in whatever run it is asked.
        """
        if (longest := max(map(len, questions))) > self._context_length:
            room = f"the model reads {self._context_length}"
            return f"the question was not asked: it is {longest} tokens long, and {room}"
        device, pad_id = str(self._model.device), self._codec.tokenizer.pad_id
        head: Any = self._model.get_output_embeddings()
        rows: dict[int, list[float]] = {}
        for chosen in length_batches([len(ids) for ids in questions], device):
            batch = Batch([questions[index] for index in chosen], pad_id, device)
            hidden = hidden_states(self._model, batch.token_ids)  # [B, T, D]
            last = hidden[torch.arange(len(chosen), device=device), batch.lengths - 1]  # [B, D]
            logprobs = torch.log_softmax(head(last).float(), dim=-1)[:, label_ids]
            if not logprobs.isfinite().all():
                return "the model's log-probabilities are not numbers"
            rows |= zip(chosen, logprobs.tolist(), strict=True)
        return [rows[index] for index in range(len(questions))]


def find_labels(codec: ChatCodec, words: str, texts: str) -> Labels:
    """How to end a question so that each of `texts` is one token after it, and no two the same.

    Whether a letter has a token of its own after a space or only elsewhere is the tokenizer's.
    """
    for gap in (" ", " (", "\n"):
        closing = words + gap
        begun = [_begun(codec, "?", closing + text) for text in texts]
        ids = [each[-1] for each in begun]
        if len(set(ids)) == len(texts) and len({tuple(each[:-1]) for each in begun}) == 1:
            return Labels(texts, closing, ids)
    raise ModelError(
        f"the judge's tokenizer has no token of its own for each of {', '.join(texts)}, whose "
        "probabilities a judge of kind logits reads; use another model, or kind: local"
    )


def rotations(comparison: Comparison, seed: int) -> list[tuple[int, ...]]:
    """All K rotations of one shuffle of the answers; the same for the same id and seed."""
    k = len(comparison.answers)
    if not 2 <= k <= len(ascii_uppercase):
        raise ValueError(f"comparison {comparison.id} has {k} answers; 2 to 26 can be lettered")
    order = python_generator(seed, f"judging/logits/order/{comparison.id}").sample(range(k), k)
    return [(*order[start:], *order[:start]) for start in range(k)]


def _ranks(logprobs: Sequence[float]) -> tuple[int, ...]:
    return ranks_from(logprobs, tolerance=TIE)


def _begun(codec: ChatCodec, question: str, answer: str) -> list[int]:
    """Ids of a question and of an answer that goes on."""
    turns = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return codec.encode(turns, finished=False).ids


def _said(logprobs: Sequence[float], labels: Labels) -> str:
    """The probabilities by label, as what the judge said."""
    named = zip(labels.texts, logprobs, strict=False)
    probabilities = {label: float(f"{math.exp(logprob):.4g}") for label, logprob in named}
    return json.dumps(probabilities, separators=(",", ":"))

"""The answers to be judged: read from FastChat's files, or made by a policy now."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from starling.base.context import StopFlag, choose_device
from starling.base.errors import DataError, InputError, some
from starling.base.progress import Progress
from starling.bench.answers import HF_TOP_K, Answer, Contestant
from starling.bench.mt_bench.options import MtBench
from starling.bench.mt_bench.protocol import ANSWER_TOKENS
from starling.data.fastchat import Bench, Choice, ModelAnswer, MtQuestion, read_answers
from starling.data.records import Message, Question
from starling.judging.recorded import Recorded
from starling.models.endpoint import Endpoint

if TYPE_CHECKING:
    from starling.models.local import Local

Answers = Mapping[str, Mapping[int, ModelAnswer]]
"""By the model's name and the question's id."""

AT_ONCE = 16
"""Questions that a local policy answers together; a kill loses one turn of these."""


def read_all(options: MtBench, bench: Bench, quarantine: Path) -> tuple[Answers, int]:
    """The answers of the files that the options name, and how many rows were duplicates.

    Raises DataError for what is missing in them.
    """
    found: dict[str, dict[int, ModelAnswer]] = {}
    num_duplicates = 0
    rule = "last" if options.like_fastchat else options.duplicates
    for path in options.answers:
        wanted = options.model if options.mode == "single" else None
        rows, repeated = read_answers(path, wanted, bench.questions, rule, quarantine)
        name = rows[0].model_id
        if name in found:
            raise DataError(f"two of the answers files are of {name!r}; give one")
        found[name] = {row.question_id: row for row in rows}
        num_duplicates += repeated
    if options.mode == "pairwise" and options.judgments is None:
        _check_pair(options, list(found))
    return found, num_duplicates


def _check_pair(options: MtBench, names: Sequence[str]) -> None:
    if len(names) < 2:
        raise InputError(
            "--mode pairwise compares models: give the answers of at least two, "
            "--answers ONE.jsonl OTHER.jsonl"
        )
    if options.baseline is not None and options.baseline not in names:
        raise InputError(
            f"--baseline is {options.baseline!r}, and the answers are of {some(names, 8)}"
        )


def policy_name(options: MtBench) -> str:
    """Under which a policy's answers stand: --model, else the last part of where it is."""
    assert options.policy is not None, "checked before"
    return options.model or (options.policy if options.policy_url else Path(options.policy).name)


def make_answers(options: MtBench, policy: str, bench: Bench) -> Answers:
    """The policy's answers to all questions, at MT-Bench's temperatures; kept call by call.

    `policy` is where its model is, or its name at --policy-url.  Raises DataError when it cannot
    answer a question: what it answered until then is not asked again.
    """
    questions = [
        Question(id=str(each.question_id), category=each.category, turns=each.turns)
        for each in bench.questions
    ]
    name = policy_name(options)
    rows: list[Answer] = []
    with (
        _open_policy(options, policy, name) as contestant,
        StopFlag() as stop,
        Progress("answers", len(questions)) as progress,
    ):
        for start in range(0, len(questions), AT_ONCE):
            rows += contestant.answer(questions[start : start + AT_ONCE])
            progress.update(len({row.question for row in rows}))
            stop.check()
    return {name: as_fastchat(name, bench, rows)}


@contextmanager
def _open_policy(options: MtBench, policy: str, name: str) -> Iterator[Contestant]:
    ledger = options.out / "calls.sqlite"
    if options.policy_url is not None:
        responder = Endpoint(
            options.policy_url,
            policy,
            api_key_env=options.policy_key_env,
            concurrency=options.concurrency,
            timeout_seconds=max(options.timeout_seconds, 600.0),
        )
        room, top_k = None, 0
    else:
        from starling.models.local import load_local

        device = choose_device(options.device)
        responder = load_local(policy, device, chat_format=options.chat_format)
        room, top_k = context_room(responder), HF_TOP_K
    with Recorded(responder, ledger) as recorded:
        yield Contestant(
            name,
            "sampled",
            recorded,
            ANSWER_TOKENS,
            options.seed,
            room=room,
            top_k=top_k,
            is_mt_bench=True,
        )


def context_room(local: "Local") -> Callable[[tuple[Message, ...]], int] | None:
    """How many tokens a conversation leaves for the answer; None where no limit is known."""
    limit, codec = local.context_length, local.codec
    if limit is None:
        return None
    return lambda messages: limit - len(codec.encode(messages, generation_prompt=True).ids)


def as_fastchat(name: str, bench: Bench, rows: Sequence[Answer]) -> dict[int, ModelAnswer]:
    """A model's answers, a turn each, as FastChat's rows by question."""
    turns: dict[int, list[Answer]] = {each.question_id: [] for each in bench.questions}
    for row in rows:
        turns[int(row.question)].append(row)
    return {id: _model_answer(name, id, own) for id, own in turns.items()}


def _model_answer(name: str, question: int, turns: Sequence[Answer]) -> ModelAnswer:
    texts = tuple(row.answer for row in turns)
    tokens = tuple(row.tokens for row in turns)
    digest = hashlib.sha256("\x00".join([name, str(question), *texts]).encode()).hexdigest()
    return ModelAnswer(
        question_id=question,
        answer_id=digest[:22],
        model_id=name,
        choices=(Choice(turns=texts, tokens=tokens if all(tokens) else None),),
    )


def unknown_answers(name: str, questions: Sequence[MtQuestion]) -> Answers:
    """Answers at their limit in place of those that are not made yet, for a plan."""
    text = "?" * 4 * ANSWER_TOKENS
    return {
        name: {
            each.question_id: ModelAnswer(
                question_id=each.question_id,
                model_id=name,
                choices=(Choice(turns=(text,) * len(each.turns)),),
            )
            for each in questions
        }
    }

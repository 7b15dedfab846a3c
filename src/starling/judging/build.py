"""From the recipe's section to a judge that can be asked."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from starling.base.context import Context
from starling.data.records import Message
from starling.judging.config import JudgeSection
from starling.judging.llm_judge import LlmJudge
from starling.judging.recorded import Recorded
from starling.judging.rubric_responder import RubricResponder
from starling.judging.strategies import choose_strategy
from starling.models.interfaces import Responder

if TYPE_CHECKING:
    from starling.data.chat import ChatCodec
    from starling.judging.logits import LogitsJudge


def build_judge(
    section: JudgeSection, *, seed: int, ledger: Path | None, context: Context
) -> "LlmJudge | LogitsJudge":
    """Make the judge of a section; use it as a context manager where it has a ledger.

    Calls are recorded in `ledger`, where one is given; those of a rubric never are, because they
    cost nothing and depend on checks that are no part of a call.  Raises InputError for a key that
    is not set, a model that cannot be loaded or a ledger that cannot be used.
    """
    if section.kind == "logits":
        return _load_logits_judge(section, seed, context)
    responder = _build_responder(section, seed, context)
    codec = getattr(responder, "codec", None)
    context_length = section.context_length or getattr(responder, "context_length", None)
    if ledger is not None and section.kind != "rubric":
        model = section.model if section.url is not None else None
        responder = Recorded(responder, ledger, spending=context.spending, model=model)
    return LlmJudge(
        responder,
        seed=seed,
        max_tokens=section.max_tokens,
        temperature=section.temperature,
        strategy=choose_strategy(section.strategy, section.repeats),
        context_length=context_length,
        count_tokens=codec and partial(_count_tokens, codec),
    )


def _count_tokens(codec: "ChatCodec", messages: tuple[Message, ...]) -> int:
    return len(codec.encode(messages, generation_prompt=True).ids)


def _build_responder(section: JudgeSection, seed: int, context: Context) -> Responder:
    # Each branch imports what only it needs: the rubric needs neither torch nor a client.
    if section.kind == "rubric":
        return RubricResponder(seed, section.noise, section.position_bias)
    assert section.model is not None, "the section's validator saw to it"
    if section.kind == "local":
        from starling.models.local import load_local

        return load_local(section.model, context.device, chat_format=section.chat_format)
    from starling.models.endpoint import connect

    return connect(section, section.model)


def _load_logits_judge(section: JudgeSection, seed: int, context: Context) -> "LogitsJudge":
    from starling.judging.logits import LogitsJudge
    from starling.models.causal_lm import load_language_model

    assert section.model is not None, "the section's validator saw to it"
    loaded = load_language_model(
        section.model, device=context.device, chat_format=section.chat_format
    )
    return LogitsJudge(loaded, seed=seed)

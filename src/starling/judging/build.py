"""From the recipe's section to a judge that can be asked."""

from pathlib import Path

from starling.base.context import Context
from starling.judging.config import JudgeSection
from starling.judging.llm_judge import LlmJudge
from starling.judging.recorded import Recorded
from starling.judging.rubric_responder import RubricResponder
from starling.models.interfaces import Responder


def build_judge(
    section: JudgeSection, *, seed: int, ledger: Path | None, context: Context
) -> LlmJudge:
    """Make the judge of a section; use it as a context manager where it has a ledger.

    Calls are recorded in `ledger`, where one is given; those of a rubric never are, because they
    cost nothing and depend on checks that are no part of a call.  Raises InputError for a key that
    is not set, a model that cannot be loaded or a ledger that cannot be used.
    """
    responder = _build_responder(section, seed, context)
    if ledger is not None and section.kind != "rubric":
        responder = Recorded(responder, ledger)
    return LlmJudge(
        responder, seed=seed, max_tokens=section.max_tokens, temperature=section.temperature
    )


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

"""Stage 1: prompts -> K candidate answers each -> the judge's rankings, and an audit of both.

Rounds of prompts bound what a kill can lose; every reply stands in `calls.sqlite`, so a resumed
run walks the same rounds and asks only what is missing.  The results are written at the end.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from starling.base.context import Context
from starling.base.errors import DataError
from starling.base.jsonl import write_json, write_records
from starling.base.progress import Progress
from starling.base.seeding import derive_seed
from starling.base.stage import Summary
from starling.data.records import Message, Prompt, RankingRow
from starling.feedback.audit import Outcome, audit
from starling.feedback.candidates import (
    AnswerSet,
    Source,
    collect_answers,
    open_sources,
    read_prompts,
)
from starling.feedback.config import FeedbackInputs, FeedbackSection
from starling.judging.build import build_judge
from starling.judging.judge import Comparison, Judge, Ranking
from starling.judging.recorded import Recorded

logger = logging.getLogger(__name__)


def run(section: FeedbackSection, inputs: FeedbackInputs, out: Path, context: Context) -> Summary:
    """Write `rankings.jsonl`, `audit.json` and `calls.sqlite` to `out`."""
    prompts, num_duplicates = read_prompts(
        inputs.prompts, out / "quarantine.jsonl", limit=section.limit, seed=context.seed
    )
    ledger = out / "calls.sqlite"
    judge_seed = derive_seed(context.seed, "feedback/judge")
    with (
        open_sources(inputs.candidates, ledger, context) as sources,
        build_judge(inputs.judge, seed=judge_seed, ledger=ledger, context=context) as judge,
    ):
        outcomes = _rank_in_rounds(section, prompts, sources=sources, judge=judge, context=context)
        recorders = {f"candidate {each.name}": responder for each, responder in sources}
        if isinstance(judge.responder, Recorded):
            recorders["judge"] = judge.responder
        calls = {name: recorder.stats for name, recorder in recorders.items()}
    for name, stats in calls.items():
        logger.info("%s: %s", name, stats)
    rows = [_row(o.answers, o.verdict) for o in outcomes if isinstance(o.verdict, Ranking)]
    if not rows:
        raise DataError(
            "no prompt has two different answers, so there is nothing to rank. "
            "Use candidates that differ, or a higher temperature."
        )
    report = audit(outcomes, calls, num_duplicates=num_duplicates, seed=context.seed)
    write_records(out / "rankings.jsonl", rows)
    write_json(out / "audit.json", report)
    return _summarise(rows, report, out / "rankings.jsonl")


def _rank_in_rounds(
    section: FeedbackSection,
    prompts: Sequence[Prompt],
    *,
    sources: Sequence[Source],
    judge: Judge,
    context: Context,
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    with Progress("feedback", len(prompts)) as progress:
        for start in range(0, len(prompts), section.batch):
            context.stop.check()
            batch = prompts[start : start + section.batch]
            outcomes += _judge(judge, collect_answers(sources, batch, context.seed))
            # After every round, so that a judge that never answers is not paid to the end.
            _check_failures(outcomes, len(prompts), section.allowed_failures)
            progress.update(len(outcomes))
    return outcomes


def _judge(judge: Judge, answer_sets: Sequence[AnswerSet]) -> list[Outcome]:
    """One outcome per set, in order; sets of fewer than two answers are not shown to the judge."""
    comparisons = [
        Comparison(
            id=answer_set.prompt.id,
            messages=answer_set.prompt.messages,
            answers=tuple(answer.answer for answer in answer_set.answers),
            checks=answer_set.prompt.checks,
            finished=tuple(answer.finish_reason == "stop" for answer in answer_set.answers),
        )
        for answer_set in answer_sets
        if len(answer_set.answers) >= 2
    ]
    verdicts = {verdict.id: verdict for verdict in judge.rank(comparisons)}
    return [Outcome(answers, verdicts.get(answers.prompt.id)) for answers in answer_sets]


def _check_failures(outcomes: Sequence[Outcome], num_prompts: int, allowed: float) -> None:
    reasons = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    if len(reasons) > allowed * num_prompts:
        raise DataError(
            f"{len(reasons)} of {num_prompts} prompts ended without a ranking, and at most "
            f"{allowed:.3g} of them may (feedback.allowed_failures). The first: {reasons[0]}. "
            "Mend the cause, then run the same command again: what was answered is kept."
        )


def _row(answer_set: AnswerSet, ranking: Ranking) -> RankingRow:
    prompt = answer_set.prompt
    return RankingRow(
        prompt=nectar_prompt(prompt.messages),
        messages=prompt.messages,
        answers=tuple(
            answer.model_copy(update={"rank": float(rank)})
            for answer, rank in zip(answer_set.answers, ranking.ranks, strict=True)
        ),
        turns=sum(message.role == "user" for message in prompt.messages),
        num_responses=len(answer_set.answers),
        source=prompt.source,
        good_natured=ranking.good_natured,
        id=prompt.id,
        category=prompt.category,
        mode=prompt.mode,
        checks=prompt.checks,
    )


def nectar_prompt(messages: Sequence[Message]) -> str:
    r"""The conversation as Nectar's one string, which ends with `\n\nAssistant: `.

    Its format has no system role: a system message opens the first human turn.
    """
    text = system = ""
    for message in messages:
        if message.role == "system":
            system = f"{message.content}\n\n"
        elif message.role == "user":
            text += f"\n\nHuman: {system}{message.content}"
            system = ""
        else:
            text += f"\n\nAssistant: {message.content}"
    return f"{text}\n\nAssistant: "


def _summarise(rows: Sequence[RankingRow], report: dict, path: Path) -> Summary:
    k = sum(len(row.answers) for row in rows) / len(rows)
    biased = [table["k"] for table in report["positions"] if table["is_biased"]]
    if biased:
        logger.warning(
            "the judge prefers answers by their position (99 %%) among %s answers; see audit.json",
            " and ".join(map(str, biased)),
        )
    return Summary(
        f"Ranked {len(rows)} of {report['prompts']} prompts, {k:.1f} answers each -> {path}",
        {
            "prompts": report["prompts"],
            "rankings": len(rows),
            "answers_per_prompt": k,
            "unparsed": report["unparsed"],
            "merged_answers": report["answers"]["merged"],
            "failed_answers": report["answers"]["failed"],
            "truncated_answers": report["answers"]["truncated"],
            "longer_wins": report["length"]["longer_wins"],
            "is_position_biased": bool(biased),
        },
    )

"""Stage 1: prompts -> K candidate answers each -> the judge's rankings, and an audit of both.

Rounds of prompts bound what a kill can lose; every reply stands in `calls.sqlite`, so a resumed
run walks the same rounds and asks only what is missing.  Each round is written as it ends, to files
that take their names after the last one, so memory holds one round of answers.
"""

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from starling.base.context import Context
from starling.base.errors import DataError, Stopped
from starling.base.files import sync_file
from starling.base.jsonl import dump_line, write_json, write_records
from starling.base.progress import Progress
from starling.base.seeding import derive_seed
from starling.base.stage import Summary
from starling.data.nectar import published_prompt
from starling.data.records import Prompt
from starling.feedback.audit import JUDGMENTS, audit_file
from starling.feedback.canaries import draw_canaries, with_canary
from starling.feedback.candidates import AnswerSet, Source, collect_answers, open_sources
from starling.feedback.config import MOST_ANSWERS, Candidate, FeedbackInputs, FeedbackSection
from starling.feedback.prompts import prepare_prompts
from starling.judging.build import build_judge
from starling.judging.config import JudgeSection
from starling.judging.judge import Comparison, Judge, Ranking, Unparsed
from starling.judging.recorded import Recorded
from starling.judging.strategies import num_calls

logger = logging.getLogger(__name__)

LOCAL_BATCH, REMOTE_BATCH = 64, 1024
FIRST_BATCH = 64
"""The first round is small, so that a judge that never answers is not paid for much."""
HOPELESS = 16
"""Prompts of a round that all fail and end the stage, whatever share may, if none was ranked."""
TEMPORARY = ".tmp-"


class Outcome(NamedTuple):
    """What became of one prompt; the verdict is None where there was nothing to rank."""

    answers: AnswerSet
    verdict: Ranking | Unparsed | None
    canary: dict[str, Any] | None = None
    """The line about the same question with a cheating answer."""

    @property
    def failure(self) -> str | None:
        """Why this prompt has no ranking, if a call is to blame; answers that agree are not."""
        if isinstance(self.verdict, Unparsed):
            return self.verdict.reason
        if self.verdict is None and self.answers.failures:
            return f"too few answers; {self.answers.failures[0]}"
        return None


def run(section: FeedbackSection, inputs: FeedbackInputs, out: Path, context: Context) -> Summary:
    """Write rankings, judgments, their audit, the prepared prompts and `calls.sqlite` to `out`."""
    for left_by_a_kill in out.glob(f"{TEMPORARY}*"):
        left_by_a_kill.unlink()
    prompts, counts = prepare_prompts(section, inputs, out / "quarantine.jsonl", seed=context.seed)
    write_records(out / "prompts.jsonl", prompts)
    ledger = out / "calls.sqlite"
    judge_seed = derive_seed(context.seed, "feedback/judge")
    with (
        open_sources(inputs.candidates, ledger, context) as sources,
        build_judge(inputs.judge, seed=judge_seed, ledger=ledger, context=context) as judge,
    ):
        recorders = {f"candidate {each.candidate.name}": each.responder for each in sources}
        if isinstance(responder := getattr(judge, "responder", None), Recorded):
            recorders["judge"] = responder
        canaries = draw_canaries(prompts, section.canaries, context.seed)
        parts = _Parts(section, inputs, prompts, sources, judge, canaries, context)
        pace = _Pace(_num_calls(parts, prompts), context)
        with pace:
            for recorder in recorders.values():
                recorder.watch = pace.step
            _write(out, _about(inputs, counts), _rounds(parts, pace))
    for name, recorder in recorders.items():
        logger.info("%s: %s", name, recorder.stats)
    report = audit_file(out / "rankings.jsonl")
    write_json(out / "audit.json", report)
    return _summarise(report, {n: each.stats.results() for n, each in recorders.items()}, out)


class _Pace(Progress):
    """The line of progress, in calls, and the stop flag, which is heeded after every call.

    Candidates may report from threads of their own, whose work ends with the block.
    """

    def __init__(self, expected: int, context: Context) -> None:
        super().__init__("feedback", expected)
        self._context = context
        self._lock = Lock()
        self._done = self._settled = 0
        self._has_ended = False

    def check(self) -> None:
        """Raise Stopped once the run was told to stop, or has ended elsewhere."""
        self._context.stop.check()
        if self._has_ended:
            raise Stopped(signal.SIGINT)

    def step(self) -> None:
        """One more call has its outcome, and that is stored."""
        self.check()
        with self._lock:
            # A prompt may need fewer calls than expected, so the last is left to `settle`.
            self._show(min(self._done + 1, self.total - 1))

    def settle(self, calls: int) -> None:
        """Everything is done that so many of the expected calls were for."""
        self._settled += calls
        self._show(self._settled)

    def _show(self, done: int) -> None:
        self._done = done
        self.update(done, self._context.spending.note())

    def __exit__(self, *error: object) -> None:
        self._has_ended = True
        super().__exit__(*error)


class _Parts(NamedTuple):
    """What is asked, who answers, who judges; `canaries` has the kind by the id of its prompt."""

    section: FeedbackSection
    inputs: FeedbackInputs
    prompts: Sequence[Prompt]
    sources: Sequence[Source]
    judge: Judge
    canaries: Mapping[str, str]
    context: Context


def _rounds(parts: _Parts, pace: _Pace) -> Iterator[Outcome]:
    """Every prompt's outcome, in order; DataError where too many have no ranking."""
    section, prompts = parts.section, parts.prompts
    is_local = any(each.url is None for each in parts.inputs.candidates)
    is_local = is_local or parts.inputs.judge.kind in ("local", "logits")
    size = section.batch or (LOCAL_BATCH if is_local else REMOTE_BATCH)
    failures: list[str] = []
    has_ranked = False
    allowed = section.allowed_failures
    ends = [*range(min(size, FIRST_BATCH), len(prompts), size), len(prompts)]
    for start, end in pairwise([0, *ends]):
        pace.check()
        batch = prompts[start:end]
        outcomes = _judge(parts, collect_answers(parts.sources, batch, parts.context.seed))
        failed = [outcome.failure for outcome in outcomes if outcome.failure is not None]
        failures += failed
        has_ranked |= any(isinstance(outcome.verdict, Ranking) for outcome in outcomes)
        # After every round, so that a judge that never answers is not paid to the end.  One that
        # has answered may refuse a whole round, and would again in every later run.
        is_hopeless = not has_ranked and len(failed) == len(batch) >= HOPELESS
        if is_hopeless or len(failures) > allowed * len(prompts):
            limit = f"at most {allowed:.3g} of them may (feedback.allowed_failures)"
            limit = f"not one of the first {end} has one" if is_hopeless else limit
            raise DataError(
                f"{len(failures)} of {len(prompts)} prompts ended without a ranking, and {limit}. "
                f"The first: {failures[0]}. Mend the cause, then run the same command again: what "
                "was answered is kept, refusals and empty replies too, which only another judge "
                "changes."
            )
        pace.settle(_num_calls(parts, batch))
        yield from outcomes


def _judge(parts: _Parts, answer_sets: Sequence[AnswerSet]) -> list[Outcome]:
    """One outcome per set, in order; sets of fewer than two answers are not shown to the judge."""
    asked: dict[str, Comparison] = {}
    for prompt, answers, *_ in answer_sets:
        if len(answers) >= 2:
            texts = tuple(each.answer for each in answers)
            finished = tuple(each.finish_reason == "stop" for each in answers)
            question = Comparison(prompt.id, prompt.messages, texts, prompt.checks, finished)
            asked[prompt.id] = question
    verdicts = {verdict.id: verdict for verdict in parts.judge.rank(asked.values())}
    cheated = {
        id: with_canary(asked[id], verdict, parts.canaries[id])
        for id, verdict in verdicts.items()
        if id in parts.canaries and isinstance(verdict, Ranking)
    }
    ranked = parts.judge.rank([comparison for comparison, _ in cheated.values()])
    canaries = {
        id: {"canary": parts.canaries[id], "id": id, "index": index, **_verdict(verdict)}
        for (id, (_, index)), verdict in zip(cheated.items(), ranked, strict=True)
    }
    return [
        Outcome(each, verdicts.get(each.prompt.id), canaries.get(each.prompt.id))
        for each in answer_sets
    ]


def _num_calls(parts: _Parts, prompts: Sequence[Prompt]) -> int:
    """Calls that the prompts take, if every answer comes and none are alike."""
    judge, calls = parts.inputs.judge, 0
    answers = sum(candidate.answers for candidate in parts.section.candidates)
    for prompt in prompts:
        k = min(len(prompt.answers) + answers, MOST_ANSWERS)
        calls += max(0, k - len(prompt.answers))
        if k >= 2:
            rankings = 1 + (prompt.id in parts.canaries)
            calls += num_calls(judge.strategy, judge.repeats, k) * rankings
    return calls


def _write(out: Path, about: dict[str, Any], outcomes: Iterator[Outcome]) -> None:
    """Write rankings.jsonl and judgments.jsonl as outcomes come, and name them at the end."""
    partial = out / f"{TEMPORARY}{JUDGMENTS}"

    def rows() -> Iterator[dict[str, Any]]:
        most_places = 0
        with partial.open("wb") as judgments:
            judgments.write(dump_line(about))
            for outcome in outcomes:
                judgments.writelines(map(dump_line, _lines(outcome)))
                if isinstance(outcome.verdict, Ranking):
                    most_places = max(most_places, len(set(outcome.verdict.ranks)))
                    yield _row(outcome.answers, outcome.verdict)
        sync_file(partial)
        if most_places == 0:
            raise DataError(
                "no prompt has two different answers, so there is nothing to rank. "
                "Use candidates that differ, or a higher temperature."
            )
        if most_places == 1:
            raise DataError(
                "the judge prefers no answer to another in any ranking, so there is nothing to "
                "learn. Use another judge or strategy, or candidates that differ more."
            )

    try:
        write_records(out / "rankings.jsonl", rows())
        partial.replace(out / JUDGMENTS)
    finally:
        partial.unlink(missing_ok=True)


def _about(inputs: FeedbackInputs, counts: Mapping[str, Any]) -> dict[str, Any]:
    """The first line of judgments.jsonl: who judged, and which candidates are the same model."""
    judge = inputs.judge
    own = [each.name for each in inputs.candidates if _model(each) == _model(judge)]
    # A local model's path is this machine's, and the same run elsewhere must write the same.
    name = judge.model if judge.kind == "endpoint" else judge.kind
    about = {"judge": name, "kind": judge.kind, "strategy": judge.strategy}
    return {**about, "own": own, "prompts": dict(counts)}


def _model(section: Candidate | JudgeSection) -> tuple[str, str | None]:
    return (section.url or "").rstrip("/"), section.model


def _lines(outcome: Outcome) -> Iterator[dict[str, Any]]:
    """What judgments.jsonl says of a prompt: no clock and no money, so every run says the same."""
    answers, verdict = outcome.answers, outcome.verdict
    name = "answers alike" if answers.num_merged and not answers.failures else "too few answers"
    if verdict is not None:
        name = "ranked" if isinstance(verdict, Ranking) else "unparsed"
    yield {
        "id": answers.prompt.id,
        "outcome": name,
        **({"votes": []} if verdict is None else _verdict(verdict)),
        "failed": answers.failures,
        "empty": answers.num_empty,
        "merged": answers.num_merged,
        "dropped": answers.num_dropped,
    }
    if outcome.canary is not None:
        yield outcome.canary


def _verdict(verdict: Ranking | Unparsed) -> dict[str, Any]:
    told = [vars(vote) | vars(vote.usage) for vote in verdict.votes]
    votes = [_without(vote, "usage", "seconds", "usd") for vote in told]
    return _without(vars(verdict), "id", "text") | {"votes": votes}


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in names and value is not None}


def _row(answer_set: AnswerSet, ranking: Ranking) -> dict[str, Any]:
    """A RankingRow, Nectar's columns first."""
    prompt = answer_set.prompt
    answers = [
        {"answer": each.answer, "model": each.model, "rank": float(rank)}
        | each.model_dump(include={"finish_reason"}, exclude_none=True)
        for each, rank in zip(answer_set.answers, ranking.ranks, strict=True)
    ]
    return {
        "prompt": published_prompt(prompt),
        "messages": [message.model_dump() for message in prompt.messages],
        "answers": answers,
        "turns": sum(message.role == "user" for message in prompt.messages),
        "num_responses": len(answers),
        "source": prompt.source,
        "good_natured": ranking.good_natured,
        "id": prompt.id,
        "category": prompt.category,
        "mode": prompt.mode,
        "checks": prompt.checks,
    }


def _summarise(report: Mapping[str, Any], calls: Mapping[str, Any], out: Path) -> Summary:
    outcomes, answers, rankings = report["outcomes"], report["answers"], report["all"]["rankings"]
    concerns = [finding for finding in report["findings"] if finding["is_concern"]]
    for finding in concerns:
        logger.warning("%s %s", finding["sentence"], finding["advice"])
    num_prompts, k = sum(outcomes.values()), answers["given"] / rankings
    tables = report.get("positions", {}).values()
    others = [f"{n} {name}" for name, n in outcomes.items() if name != "ranked"]
    dropped = f" ({', '.join(others)})" if others else ""
    return Summary(
        f"Ranked {rankings} of {num_prompts} prompts{dropped}, {k:.1f} answers each; "
        f"of concern: {len(concerns)} of {len(report['findings'])} findings "
        f"(starling audit tells them; next: starling reward) -> {out / 'rankings.jsonl'}",
        {
            "prompts": num_prompts,
            "rankings": rankings,
            "answers_per_prompt": k,
            "unparsed": outcomes.get("unparsed", 0),
            "merged_answers": report["candidates"]["merged"],
            "failed_answers": report["candidates"]["failed"],
            "truncated_answers": answers["truncated"],
            "longer_wins": report["all"].get("longer_wins"),
            "is_position_biased": any(table["is_biased"] for table in tables),
            "calls": calls,
        },
    )

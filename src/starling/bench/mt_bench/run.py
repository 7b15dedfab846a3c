"""`starling mt-bench`: MT-Bench as published, from FastChat's own files, and back into them.

Answers are read or made, judged one by one or in pairs, and counted.  Everything stands in one
folder of FastChat's layout beside scores.json, results.md and calls.sqlite; the same command again
asks only what is missing.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from starling.base.context import StopFlag
from starling.base.errors import DataError, InputError, some
from starling.base.files import locked, quarantine_elsewhere
from starling.base.hashing import hash_file, hash_json
from starling.base.jsonl import read_json, write_records
from starling.bench.asking import open_server, refuse_failures, watched
from starling.bench.mt_bench import count, figures
from starling.bench.mt_bench.answers import (
    Answers,
    make_answers,
    policy_name,
    read_all,
    unknown_answers,
)
from starling.bench.mt_bench.figures import Figures
from starling.bench.mt_bench.judge import (
    Task,
    ask_canaries,
    ask_pairs,
    ask_ratings,
    pair_tasks,
    rating_tasks,
)
from starling.bench.mt_bench.options import MtBench
from starling.bench.mt_bench.protocol import JUDGE_TOKENS
from starling.bench.results import Line, as_table, stamp, write_results
from starling.data.fastchat import (
    Bench,
    PairJudgment,
    SingleJudgment,
    dated,
    find_files,
    find_folder,
    read_bench,
    write_rows,
)
from starling.judging.canaries import num_canaries
from starling.judging.recorded import Recorded
from starling.models.interfaces import Responder

logger = logging.getLogger(__name__)

CHARS_PER_TOKEN = 4

R = TypeVar("R", SingleJudgment, PairJudgment)


def run(options: MtBench, policy: str | None = None) -> str:
    """Answer, judge, count and write; returns the table for the terminal.

    `policy` is the model that --policy means.  Raises InputError and DataError for what a user can
    mend; nothing that was answered is lost then.
    """
    options.check()
    if options.plan:
        with quarantine_elsewhere() as quarantine:
            bench, answers, _ = _read(options, quarantine)
            if options.policy is not None:
                answers = unknown_answers(policy_name(options), bench.questions)
            return _plan(options, _tasks(options, bench, answers))
    with locked(options.out):
        bench, answers, num_duplicates = _read(options, options.out / "quarantine.jsonl")
        if options.judgments is None:
            _refuse_others_results(options, answers)
            if policy is not None:
                answers = make_answers(options, policy, bench)
        _write_inputs(options.out, bench, answers)
        for stale in ("scores.json", "results.md"):
            (options.out / stale).unlink(missing_ok=True)
        conclude = _single if options.mode == "single" else _pairwise
        return conclude(options, bench, answers, num_duplicates)


def _read(options: MtBench, quarantine: Path) -> tuple[Bench, Answers, int]:
    """The benchmark, the answers that are there, and how many rows of these were duplicates."""
    assert options.data is not None, "checked"
    files = find_files(find_folder(options.data), options.references)
    bench = read_bench(files, quarantine)
    return bench, *read_all(options, bench, quarantine)


def _tasks(options: MtBench, bench: Bench, answers: Answers) -> list[Task]:
    if options.mode == "pairwise":
        return pair_tasks(bench, answers, options.baseline)
    [(name, own)] = answers.items()
    return rating_tasks(bench, own, name)


def _plan(options: MtBench, tasks: Sequence[Task]) -> str:
    """What would be asked: calls, tokens and their price, every reply at its limit."""
    calls = len(tasks) * options.repeats
    cheating = f", and {num_canaries(len(tasks) // 2)} canaries" if options.canaries else ""
    chars = sum(len(message.content) for task in tasks for message in task.shown.messages)
    read, written = chars // CHARS_PER_TOKEN * options.repeats, calls * JUDGE_TOKENS
    cost = options.spending().usd(options.judge_model, read, written)
    price = "no price given (--usd-per-million)" if cost is None else f"at most about ${cost:,.2f}"
    held = options.out / "calls.sqlite"
    return (
        f"{calls:,} judgments by {options.judge_model}{cheating}: about {read / 1e6:,.2f}M tokens "
        f"read, at most {written / 1e6:,.2f}M written, {price}"
        + (f"; what {held} holds is not asked again" if held.exists() else "")
    )


def _judge(
    options: MtBench, tasks: Sequence[Task], ask: Callable[[Responder, Sequence[Task]], list[R]]
) -> list[R]:
    """Ask all that the ledger does not hold."""
    sys.stderr.write(_plan(options, tasks) + "\n")
    total = len(tasks) * options.repeats
    with _server(options) as server, watched(server, total, StopFlag()):
        rows = ask(server, tasks)
    logger.info("judge: %s", server.stats)
    return dated(rows, _judgments_path(options, options.judge_model))


def _server(options: MtBench) -> Recorded:
    assert options.judge_url is not None, "checked"
    return open_server(
        options.judge_url,
        options.judge_model,
        options.out / "calls.sqlite",
        api_key_env=options.judge_key_env,
        concurrency=options.concurrency,
        timeout_seconds=options.timeout_seconds,
        spending=options.spending(),
    )


def _keep(options: MtBench, rows: Sequence[R]) -> None:
    """Write the judgments, but never over the file that they were read from."""
    path = _judgments_path(options, rows[0].judge[0])
    if options.judgments is None or options.judgments.resolve() != path.resolve():
        write_rows(path, rows)


def _judgments_path(options: MtBench, judge: str) -> Path:
    kind = "single" if options.mode == "single" else "pair"
    return options.out / "model_judgment" / f"{_file_name(judge)}_{kind}.jsonl"


def _single(options: MtBench, bench: Bench, answers: Answers, num_duplicates: int) -> str:
    """Rate every answer from 1 to 10, or read who did; no score where too many failed."""
    strict = not options.like_fastchat
    if options.judgments is not None:
        rows, num_duplicates = count.read_ratings(options, options.judgments)
        if answers and rows[0].model not in answers:
            raise DataError(
                f"the judgments are of {rows[0].model}, and the answers of {', '.join(answers)}; "
                "leave out --answers, or choose with --model"
            )
    else:

        def ask(server: Responder, tasks: Sequence[Task]) -> list[SingleJudgment]:
            rounds = range(options.repeats)
            judge = options.judge_model
            asked = (ask_ratings(server, tasks, judge, repeat=n, strict=strict) for n in rounds)
            return [row for rows in asked for row in rows]

        rows = _judge(options, _tasks(options, bench, answers), ask)
    _keep(options, rows)
    graded, reasons = count.grade_rows(bench, rows, strict=strict)
    if strict:
        refuse_failures("judgments", reasons, len(graded), options.allowed_failures)
    scores = figures.score_figures(graded, num_duplicates=num_duplicates, seed=options.seed)
    lines = figures.score_lines(scores)
    if own := answers.get(rows[0].model):
        scores["length"] = figures.length_figures(list(own.values()), options.seed)
        lines += figures.length_lines(scores["length"])
    scores["canaries"] = None
    if options.canaries:
        known = [row.score for row in graded if row.score is not None]
        with _server(options) as server:
            scores["canaries"] = ask_canaries(
                server, bench, own or {}, options.judge_model, known, options.seed
            )
    scores["stamp"] = _stamp(options, bench, rows, rows[0].model)
    notes = [*_failures(reasons), *_noise(scores["repeats"]), _fared(scores["canaries"])]
    return _write(options, scores, lines, notes)


def _pairwise(options: MtBench, bench: Bench, answers: Answers, num_duplicates: int) -> str:
    """Compare models in both orders, or read who did; writes votes.jsonl for ratings too."""
    if options.judgments is not None:
        rows, num_duplicates = count.read_pairs(options, options.judgments)
    else:
        strict = not options.like_fastchat

        def ask(server: Responder, tasks: Sequence[Task]) -> list[PairJudgment]:
            return ask_pairs(server, tasks, options.judge_model, strict=strict)

        rows = _judge(options, _tasks(options, bench, answers), ask)
    _keep(options, rows)
    reasons = count.pair_reasons(rows)
    if not options.like_fastchat:
        refuse_failures("comparisons", reasons, len(rows), options.allowed_failures)
    scores = figures.pair_figures(rows, num_duplicates=num_duplicates, seed=options.seed)
    write_records(options.out / "votes.jsonl", count.votes(rows))
    scores["stamp"] = _stamp(options, bench, rows, ", ".join(scores["models"]))
    seat = scores["first_seat"]
    seats = (
        f"The two orders disagree in {scores['inconsistent']:.0%} of the comparisons, which tie; "
        f"the first seat wins {'none' if seat is None else f'{seat:.0%}'} of the calls with a "
        "winner."
    )
    return _write(options, scores, figures.pair_lines(scores), [*_failures(reasons), seats])


def _write(options: MtBench, scores: Figures, lines: Sequence[Line], notes: Sequence[str]) -> str:
    title = f"MT-Bench, {scores['stamp']['model']}"
    notes = [*notes, _stamp_sentence(scores["stamp"])]
    write_results(options.out, scores, title, lines, notes)
    return as_table(title, lines, [*notes, f"-> {options.out / 'scores.json'}"])


def _stamp(
    options: MtBench,
    bench: Bench,
    rows: Sequence[SingleJudgment] | Sequence[PairJudgment],
    model: str,
) -> dict[str, Any]:
    """What the score depends on: judge, date, prompts, questions, references, rule."""
    used = sorted({row.judge[1] for row in rows} & set(bench.prompts))
    last = max(row.tstamp or 0.0 for row in rows)
    references = "official"
    if options.references is not None:
        references = f"{options.references.name} sha256:{hash_file(options.references)}"
    return stamp(
        "mt-bench",
        mode=options.mode,
        model=model,
        judge=rows[0].judge[0],
        judge_versions=sorted({row.served_by or row.judge[0] for row in rows}),
        judged=datetime.fromtimestamp(last, UTC).date().isoformat() if last else None,
        rule="FastChat's" if options.like_fastchat else "strict",
        prompts_sha256=hash_json([bench.prompts[name].model_dump() for name in used]),
        questions_sha256=hash_json([each.model_dump(mode="json") for each in bench.questions]),
        references=references,
    )


def _stamp_sentence(stamped: dict[str, Any]) -> str:
    versions = [name for name in stamped["judge_versions"] if name != stamped["judge"]]
    served = f" (served by {some(versions, 4)})" if versions else ""
    return (
        f"Judge {stamped['judge']}{served}, {stamped['judged'] or 'date unknown'}; prompts "
        f"{stamped['prompts_sha256'][:12]}, questions {stamped['questions_sha256'][:12]}, "
        f"references {stamped['references'][:60]}; counted by the {stamped['rule']} rule."
    )


def _failures(reasons: Sequence[str]) -> list[str]:
    return [f"{len(reasons)} without a score; the first: {reasons[0]}."] if reasons else []


def _fared(canaries: Figures | None) -> str:
    if canaries is None:
        # The published protocol has 160 calls, and who is to repeat it makes no others.
        return "No canaries were asked about (--canaries does); whether cheating wins is not known."
    return (
        f"Canaries: {canaries['won']:g} of {canaries['asked']} cheating answers got the mean "
        f"score or more, {canaries['unread']} could not be read."
    )


def _noise(repeats: Figures | None) -> list[str]:
    if repeats is None or repeats["average_sd"] is None:
        return []
    return [
        f"{repeats['rounds']} rounds: the average varies by {repeats['average_sd']:.3f} "
        f"(standard deviation), one judgment by {repeats['judgment_sd'] or 0:.2f}."
    ]


def _write_inputs(out: Path, bench: Bench, answers: Answers) -> None:
    """The questions and answers beside the judgments: the folder is complete by itself."""
    write_rows(out / "question.jsonl", bench.questions)
    for name, own in answers.items():
        path = out / "model_answer" / f"{_file_name(name)}.jsonl"
        rows = [own[each.question_id] for each in bench.questions]
        write_rows(path, rows if rows[0].tstamp else dated(rows, path))


def _file_name(name: str) -> str:
    return name.replace("/", "--")


def _refuse_others_results(options: MtBench, answers: Answers) -> None:
    path = options.out / "scores.json"
    if options.mode == "pairwise" or not path.is_file():
        return
    names = [policy_name(options)] if options.policy else list(answers)
    found = read_json(path).get("stamp", {}).get("model")
    if found not in (None, *names):
        raise InputError(
            f"{options.out} holds the results of {found}, and this is {names[0]}. "
            "Choose another folder with --out."
        )

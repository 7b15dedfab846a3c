"""`starling win-rate`: two files of outputs in AlpacaEval's columns, a judge, and who is preferred.

Writes scores.json, results.md, and annotations.json, which AlpacaEval's own tools read: output_1 is
the baseline's, and `preference` is 1 plus the win.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from starling.base.context import Context
from starling.base.errors import DataError, InputError
from starling.base.estimate import Estimate, clustered_mean
from starling.base.files import locked, quarantine_elsewhere
from starling.base.hashing import hash_json
from starling.base.jsonl import read_json, write_json
from starling.bench import win_rate
from starling.bench.asking import refuse_failures, watched
from starling.bench.length_control import control_length
from starling.bench.results import Line, as_table, stamp, write_results
from starling.bench.win_rate import SAME, Figures, Outcome
from starling.data.alpaca_eval import OutputPair, match_outputs, read_outputs
from starling.judging import kwise, preference
from starling.judging.build import build_judge
from starling.judging.canaries import (
    Canary,
    Fared,
    best_ranking,
    canary_answers,
    canary_figures,
    num_canaries,
)
from starling.judging.config import JudgeSection
from starling.judging.judge import Comparison
from starling.judging.llm_judge import LlmJudge
from starling.judging.recorded import Recorded
from starling.models.endpoint import connect

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WinRate:
    """What is measured: the answers against the baseline's, and how.

    `weighted` takes the judge's probabilities in place of its words, and `length_controlled` adds
    what might be left of the win rate at equal lengths.
    """

    answers: Path
    baseline: Path
    judge: JudgeSection
    weighted: bool = False
    length_controlled: bool = False
    allowed_failures: float = 0.05
    plan: bool = False
    """Only say which calls would be made."""


def run_win_rate(asked: WinRate, out: Path, context: Context) -> str:
    """Judge what the ledger does not hold, count and write; returns the terminal's table.

    Raises InputError and DataError for what a user can mend; what was answered is kept then.
    """
    if asked.weighted and asked.judge.kind not in ("endpoint", "logits"):
        raise InputError(
            f"a weighted win rate is read from a judge's probabilities, and one of kind "
            f"{asked.judge.kind} gives none: take kind endpoint or logits, or leave out --weighted"
        )
    if asked.plan:
        with quarantine_elsewhere() as quarantine:
            return _plan(asked, _pairs(asked, quarantine))
    with locked(out), _advised(asked):
        pairs = _pairs(asked, out / "quarantine.jsonl")
        logger.info("%s", _plan(asked, pairs))
        canaries = canary_answers([pair.id for pair in pairs], context.seed, best_ranking(2))
        found = _judge(asked, pairs, canaries, out / "calls.sqlite", context)
        outcomes = [(pair, found.get(pair.id, SAME)) for pair in pairs]
        rows = [_annotation(*each, _name(asked.judge)) for each in outcomes]
        judged = _judged(out, rows)
        for stale in ("scores.json", "results.md"):
            (out / stale).unlink(missing_ok=True)
        write_json(out / "annotations.json", rows)
        reasons = [each.reason for _, each in outcomes if each.reason is not None]
        refuse_failures("comparisons", reasons, len(pairs), asked.allowed_failures)
        scores = _scores(asked, outcomes, context.seed)
        scores["canaries"] = canary_figures(
            Fared(each.kind, found[f"canary/{id}"].win) for id, each in canaries.items()
        )
        scores["stamp"] = _stamp(asked, pairs, judged)
        title = f"Win rate of {pairs[0].answer.generator} over {pairs[0].baseline.generator}"
        lines, notes = _lines(scores), _notes(scores, reasons)
        write_results(out, scores, title, lines, notes)
        return as_table(title, lines, [*notes, f"-> {out / 'scores.json'}"])


def _pairs(asked: WinRate, quarantine: Path) -> list[OutputPair]:
    answers = read_outputs(asked.answers, quarantine=quarantine)
    return match_outputs(answers, read_outputs(asked.baseline, quarantine=quarantine))


def _plan(asked: WinRate, pairs: Sequence[OutputPair]) -> str:
    """How many calls it takes, and about how many tokens are read; most of what it costs."""
    differ = [pair for pair in pairs if pair.baseline.output != pair.answer.output]
    seats = 1 if asked.weighted and asked.judge.kind == "endpoint" else 2
    chars = sum(
        len(pair.baseline.instruction) + len(pair.baseline.output) + len(pair.answer.output)
        for pair in differ
    )
    system = preference.SYSTEM if seats == 1 else kwise.SYSTEM
    tokens = seats * (chars + len(differ) * len(system)) // 4
    return (
        f"{seats * len(differ):,} calls to {_name(asked.judge)} about {len(differ):,} pairs that "
        f"differ, and {seats * num_canaries(len(pairs)):,} about canaries: {tokens / 1e6:,.2f}M "
        "tokens read"
    )


@contextmanager
def _advised(asked: WinRate) -> Iterator[None]:
    """Say what else there is where a server refuses to give logprobs."""
    try:
        yield
    except DataError as error:
        if not asked.weighted or "logprobs" not in str(error):
            raise
        raise DataError(f"{error}. For the ordinary win rate, leave out --weighted") from error


def _judge(
    asked: WinRate,
    pairs: Sequence[OutputPair],
    canaries: Mapping[str, Canary],
    ledger: Path,
    context: Context,
) -> dict[str, Outcome]:
    """Outcomes by the pair's id, and of each canary against the model's answer in its place.

    Equal outputs are not asked about.
    """
    comparisons = [
        Comparison(pair.id, pair.messages, (pair.baseline.output, pair.answer.output))
        for pair in pairs
        if pair.baseline.output != pair.answer.output
    ]
    comparisons += [
        Comparison(f"canary/{pair.id}", pair.messages, (pair.answer.output, canaries[pair.id].text))
        for pair in pairs
        if pair.id in canaries
    ]
    section, seed = asked.judge, context.seed
    if asked.weighted and section.kind == "endpoint":
        server = connect(section, section.model or "")
        with (
            Recorded(server, ledger, spending=context.spending, model=section.model) as recorded,
            watched(recorded, len(comparisons), context.stop),
        ):
            return win_rate.compare_weighted(comparisons, recorded, seed)
    compare = win_rate.compare_logits if asked.weighted else win_rate.compare
    section = win_rate.both_seats(section)
    with build_judge(section, seed=seed, ledger=ledger, context=context) as judge:
        responder = judge.responder if isinstance(judge, LlmJudge) else None
        with watched(responder, 2 * len(comparisons), context.stop):
            return compare(comparisons, judge)


def _annotation(pair: OutputPair, outcome: Outcome, judge: str) -> Figures:
    """A row in AlpacaEval's columns, and what the calls said one by one."""
    return {
        "instruction": pair.answer.instruction,
        "output_1": pair.baseline.output,
        "generator_1": pair.baseline.generator,
        "output_2": pair.answer.output,
        "generator_2": pair.answer.generator,
        "dataset": pair.baseline.dataset,
        "annotator": judge,
        "preference": None if outcome.win is None else 1 + outcome.win,
        "by_call": list(outcome.by_call),
        "model_first": list(outcome.model_first),
        "reason": outcome.reason,
    }


def _judged(out: Path, rows: Sequence[Figures]) -> str:
    """Today, or the day on which these very annotations were first counted here."""
    old, scores = out / "annotations.json", out / "scores.json"
    if old.is_file() and scores.is_file() and read_json(old) == rows:
        return read_json(scores)["stamp"]["judged"]
    return datetime.now(UTC).date().isoformat()


def _scores(asked: WinRate, outcomes: Sequence[tuple[OutputPair, Outcome]], seed: int) -> Figures:
    """Everything in scores.json but the stamp; shares from 0 to 1, lengths in characters."""
    own = [(pair.id, len(pair.answer.output)) for pair, _ in outcomes]
    other = [(pair.id, len(pair.baseline.output)) for pair, _ in outcomes]
    change = [(id, long - short) for (id, long), (_, short) in zip(own, other, strict=True)]
    lengths = {"model": own, "baseline": other, "change": change}
    figures: Figures = {
        "win_rate": win_rate.win_figures([(pair.id, each) for pair, each in outcomes], seed=seed),
        "length": {name: clustered_mean(each, seed=seed) for name, each in lengths.items()},
    }
    if asked.length_controlled:
        read = [(pair, each.win) for pair, each in outcomes if each.win is not None]
        hard = [pair.baseline.instruction_difficulty for pair, _ in read]
        known = [each for each in hard if each is not None]
        controlled = control_length(
            [win for _, win in read],
            [len(pair.answer.output) - len(pair.baseline.output) for pair, _ in read],
            known if len(known) == len(read) else None,
            num_failed=len(outcomes) - len(read),
        )
        effects = {"length": controlled.length, "difficulty": controlled.difficulty}
        figures["length_controlled"] = asdict(controlled.win_rate) | {"effects": effects}
    return figures


def _stamp(asked: WinRate, pairs: Sequence[OutputPair], judged: str) -> Figures:
    prompt = "preference" if asked.weighted else "kwise"
    name = "logits" if asked.judge.kind == "logits" else prompt
    text = (resources.files("starling.judging") / f"prompts/{name}.txt").read_text("utf-8")
    return stamp(
        "win-rate",
        mode="weighted" if asked.weighted else "both seats",
        model=pairs[0].answer.generator,
        baseline=pairs[0].baseline.generator,
        judge=_name(asked.judge),
        judged=judged,
        prompts_sha256=hash_json(text),
        questions_sha256=hash_json([pair.baseline.instruction for pair in pairs]),
        baseline_sha256=hash_json([pair.baseline.output for pair in pairs]),
    )


def _name(judge: JudgeSection) -> str:
    # A local model's path is this machine's, and the same run elsewhere must write the same.
    return judge.model if judge.kind == "endpoint" and judge.model else judge.kind


def _lines(scores: Figures) -> list[Line]:
    rates = {"win rate": scores["win_rate"], "discrete win rate": scores["win_rate"]["discrete"]}
    if "length_controlled" in scores:
        rates["length-controlled win rate"] = scores["length_controlled"]
    names = {"model": "characters an answer", "baseline": "the baseline's", "change": "change"}
    return [
        *(win_rate.percent(name, estimate) for name, estimate in rates.items()),
        *(Line(said, Estimate(**scores["length"][key])) for key, said in names.items()),
    ]


def _notes(scores: Figures, reasons: Sequence[str]) -> list[str]:
    stamped, rate = scores["stamp"], scores["win_rate"]
    notes = [f"{rate['wins']} won, {rate['ties']} tied, {rate['losses']} lost."]
    if reasons:
        notes.append(f"{len(reasons)} without a verdict; the first: {reasons[0]}.")
    if rate["inconsistent"] is not None:
        notes.append(f"With seats swapped, {rate['inconsistent']:.0%} get another verdict.")
    if rate["first_seat"] is not None:
        notes.append(f"The first seat wins {rate['first_seat']:.0%} of the calls with a winner.")
    fared = scores["canaries"]
    notes.append(f"Canaries: {fared['won']:g} of {fared['asked']} cheating answers won.")
    if "length_controlled" in scores:
        notes.append(
            "Length-controlled is an estimate under a model of how length is preferred. It is not "
            "AlpacaEval's leaderboard number, which needs their file of instruction difficulties."
        )
    asked = f"Judge {stamped['judge']}, {stamped['judged']}, {stamped['mode']}"
    hashes = f"{stamped['prompts_sha256'][:12]}, questions {stamped['questions_sha256'][:12]}"
    return [*notes, f"{asked}; prompts {hashes}."]

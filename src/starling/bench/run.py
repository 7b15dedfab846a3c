"""Stage 4: what became better, by how much, and at what length.

Both policies answer two-turn questions, sampled at temperature 1 and greedily.  The judge rates the
sampled answers from 1 to 10 and compares them; where questions carry checks, the noiseless rubric
gives the gold score that nothing in training has seen.  By MT-Bench's protocol answers are sampled
at its temperatures, and its own prompts are put to the judge.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from starling.base.context import Context
from starling.base.estimate import clustered_mean
from starling.base.hashing import hash_file, hash_json
from starling.base.jsonl import read_records, write_records
from starling.base.progress import Progress
from starling.base.stage import Summary
from starling.bench import scores
from starling.bench.answers import HF_TOP_K, Answer, Contestant, Decoding, yardstick
from starling.bench.checks import CheckedPrompt, answer_prompts, check_answers
from starling.bench.config import BenchInputs, BenchSection
from starling.bench.mt_bench import stage
from starling.bench.mt_bench.answers import context_room
from starling.bench.results import as_table, stamp, write_results
from starling.bench.scores import BASELINE, POLICY, Figures, Judged
from starling.bench.win_rate import both_seats
from starling.data.fastchat import Bench, BenchFiles, read_bench
from starling.data.records import Question
from starling.data.rows import read_rows
from starling.judging import kwise, rating
from starling.judging.build import build_judge
from starling.judging.canaries import judge_canaries
from starling.judging.config import JudgeSection
from starling.judging.judge import Judge
from starling.judging.llm_judge import LlmJudge
from starling.models.local import load_local
from starling.models.reward_model import RewardModel

logger = logging.getLogger(__name__)


def run(section: BenchSection, inputs: BenchInputs, out: Path, context: Context) -> Summary:
    """Answer, judge and count; writes answers, judgments, scores.json and results.md."""
    questions = read_records(inputs.questions, Question, quarantine=out / "quarantine.jsonl")
    bench = _published(inputs, out / "quarantine.jsonl")
    contestants = _contestants(section, inputs, context, is_mt_bench=bench is not None)
    answers: list[Answer] = []
    with Progress("bench", len(contestants) + 1) as progress:
        for number, contestant in enumerate(contestants):
            answers += contestant.answer(questions)
            progress.update(number + 1, f"{contestant.name}, {contestant.decoding}")
            context.stop.check()
        with build_judge(
            both_seats(inputs.judge),
            seed=context.seed,
            ledger=out / "calls.sqlite",
            context=context,
        ) as judge:
            if bench is None or not isinstance(judge, LlmJudge):
                judged = _judge(answers, judge, context.seed, section.allowed_failures)
            else:
                judged = stage.judge_as_published(
                    stage.Asked(
                        bench,
                        stage.by_policy(bench, answers, (BASELINE, POLICY)),
                        judge.responder,
                        _name(inputs.judge),
                        section.allowed_failures,
                        context.seed,
                    ),
                    out / "mt_bench",
                )
        progress.update(len(contestants) + 1, "judged")
    read, wins, win_rows, canaries = judged
    figures: Figures = scores.gold_figures(answers, context.seed)
    figures |= scores.score_figures(read, answers, context.seed)
    figures |= {"win_rate": wins, "canaries": canaries}
    figures["tokens_per_answer"] = scores.token_figures(answers, context.seed)
    best: list[Answer] = []
    own = scores.select(answers, BASELINE)
    if inputs.reward_model is not None and all(answer.checks is not None for answer in own):
        reward_model = RewardModel.load(inputs.reward_model, device=context.device)
        best = yardstick(own, contestants[0], reward_model, samples=section.best_of)
        golds = [(a.question, a.gold.total) for a in best if a.gold is not None]
        gold = clustered_mean(golds, seed=context.seed)
        figures["gold_best_of"] = gold | {"samples": section.best_of}
    if inputs.checks is not None:
        figures["checks"] = _check(inputs.checks, contestants, out, context.seed)
    figures["stamp"] = _stamp(section, inputs)
    figures["by_category"] = scores.category_figures(answers, read, win_rows, context.seed)
    write_records(out / "answers.jsonl", [answer.as_dict() for answer in [*answers, *best]])
    write_records(
        out / "judgments.jsonl",
        [
            {"policy": policy, "id": question, "turn": turn, "score": rating.score}
            | {"text": rating.text}
            for (policy, question, turn), rating in read.items()
        ],
    )
    title, lines = f"{len(questions)} questions, before and after", scores.lines(figures)
    write_results(out, figures, title, lines, [])
    logger.info("%s", as_table(title, lines))
    return Summary(_sentence(figures, len(questions), out), figures)


def _judge(answers: Sequence[Answer], judge: Judge, seed: int, allowed: float) -> Judged:
    """Ratings, comparisons and canaries by our own prompts."""
    read = scores.ratings(answers, judge, allowed_failures=allowed)
    wins, rows = scores.win_rate(answers, judge, seed=seed, allowed_failures=allowed)
    honest = [scores.graded(each) for each in scores.select(answers, POLICY)]
    given = [rating.score for rating in read.values()]
    return Judged(read, wins, rows, judge_canaries(judge, honest, given, seed=seed))


def _check(prompts: Path, contestants: Sequence[Contestant], out: Path, seed: int) -> Figures:
    """Instructions kept and requests refused by both policies, greedily; and the change."""
    asked = read_rows(prompts, CheckedPrompt, quarantine=out / "quarantine.jsonl")
    first = {each.name: each for each in reversed(contestants)}
    greedy = [replace(first[name], decoding="greedy") for name in (BASELINE, POLICY)]
    answers = {each.name: answer_prompts(each, asked) for each in greedy}
    rows = (answer.as_dict() for own in answers.values() for answer in own)
    write_records(out / "checked.jsonl", rows)
    return check_answers(asked, answers, baseline=BASELINE, seed=seed)


def _published(inputs: BenchInputs, quarantine: Path) -> Bench | None:
    """MT-Bench's questions, prompts and references; None by our own protocol."""
    if inputs.prompts is None:
        return None
    return read_bench(BenchFiles(inputs.questions, inputs.prompts, inputs.references), quarantine)


def _contestants(
    section: BenchSection, inputs: BenchInputs, context: Context, *, is_mt_bench: bool
) -> list[Contestant]:
    responders = {
        BASELINE: load_local(inputs.baseline, context.device, chat_format=section.chat_format),
        POLICY: load_local(inputs.policy, context.device),
    }
    decodings: tuple[Decoding, ...] = ("sampled",) if is_mt_bench else ("sampled", "greedy")
    return [
        Contestant(
            name,
            decoding,
            responder,
            section.max_tokens,
            context.seed,
            room=context_room(responder) if is_mt_bench else None,
            top_k=HF_TOP_K if is_mt_bench else 0,
            is_mt_bench=is_mt_bench,
        )
        for name, responder in responders.items()
        for decoding in decodings
    ]


def _stamp(section: BenchSection, inputs: BenchInputs) -> Figures:
    """What the scores depend on beside the policies; when it was is in the stage's manifest."""
    own = hash_json([kwise.SYSTEM, rating.SYSTEM])
    return stamp(
        "run",
        mode=section.protocol,
        judge=_name(inputs.judge),
        prompts_sha256=own if inputs.prompts is None else hash_file(inputs.prompts),
        questions_sha256=hash_file(inputs.questions),
        references_sha256=inputs.references and hash_file(inputs.references),
    )


def _name(judge: JudgeSection) -> str:
    # A local model's path is this machine's, and the same run elsewhere must write the same.
    return judge.model or judge.kind if judge.kind == "endpoint" else judge.kind


def _sentence(figures: Figures, num_questions: int, out: Path) -> str:
    score, wins = figures["score"], figures["win_rate"]
    return (
        f"Judged {num_questions} questions: score {score[BASELINE]['mean']:.2f} before, "
        f"{score[POLICY]['mean']:.2f} after; the new policy wins {wins['mean']:.0%} "
        f"-> {out / 'scores.json'}"
    )

"""Stage 4: what became better, by how much, and at what length.

Both policies answer two-turn questions, sampled at temperature 1 and greedily.  The judge rates the
sampled answers from 1 to 10 and compares them; where questions carry checks, the noiseless rubric
gives the gold score that nothing in training has seen.
"""

from pathlib import Path

from starling.base.context import Context
from starling.base.estimate import clustered_mean
from starling.base.jsonl import read_records, write_json, write_records
from starling.base.progress import Progress
from starling.base.stage import Summary
from starling.bench import scores
from starling.bench.answers import Answer, Contestant, yardstick
from starling.bench.config import BenchInputs, BenchSection
from starling.bench.scores import BASELINE, POLICY, Figures
from starling.data.records import Question
from starling.judging.build import build_judge
from starling.models.local import load_local
from starling.models.reward_model import RewardModel


def run(section: BenchSection, inputs: BenchInputs, out: Path, context: Context) -> Summary:
    """Answer, judge and count; writes answers.jsonl, judgments.jsonl and scores.json."""
    questions = read_records(inputs.questions, Question, quarantine=out / "quarantine.jsonl")
    responders = {
        BASELINE: load_local(inputs.baseline, context.device, chat_format=section.chat_format),
        POLICY: load_local(inputs.policy, context.device),
    }
    contestants = [
        Contestant(name, decoding, responder, section.max_tokens, context.seed)
        for name, responder in responders.items()
        for decoding in ("sampled", "greedy")
    ]
    answers: list[Answer] = []
    with Progress("bench", len(contestants) + 1) as progress:
        for number, contestant in enumerate(contestants):
            answers += contestant.answer(questions)
            progress.update(number + 1, f"{contestant.name}, {contestant.decoding}")
            context.stop.check()
        with build_judge(
            inputs.judge, seed=context.seed, ledger=out / "calls.sqlite", context=context
        ) as judge:
            allowed = section.allowed_failures
            read = scores.ratings(answers, judge, allowed_failures=allowed)
            wins, win_rows = scores.win_rate(
                answers, judge, seed=context.seed, allowed_failures=allowed
            )
        progress.update(len(contestants) + 1, "judged")
    figures: Figures = scores.gold_figures(answers, context.seed)
    figures |= scores.score_figures(read, answers, context.seed)
    figures["win_rate"] = wins
    figures["tokens_per_answer"] = scores.token_figures(answers, context.seed)
    best: list[Answer] = []
    own = scores.select(answers, BASELINE)
    if inputs.reward_model is not None and all(answer.checks is not None for answer in own):
        reward_model = RewardModel.load(inputs.reward_model, device=context.device)
        best = yardstick(own, contestants[0], reward_model, samples=section.best_of)
        golds = [(a.question, a.gold.total) for a in best if a.gold is not None]
        gold = clustered_mean(golds, seed=context.seed)
        figures["gold_best_of"] = gold | {"samples": section.best_of}
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
    write_json(out / "scores.json", figures)
    return Summary(_sentence(figures, len(questions), out), figures)


def _sentence(figures: Figures, num_questions: int, out: Path) -> str:
    score, wins = figures["score"], figures["win_rate"]
    return (
        f"Judged {num_questions} questions: score {score[BASELINE]['mean']:.2f} before, "
        f"{score[POLICY]['mean']:.2f} after; the new policy wins {wins['mean']:.0%} "
        f"-> {out / 'scores.json'}"
    )

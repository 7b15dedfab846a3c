"""Does the K-wise loss pay?  Four losses on the same rankings, over several demo worlds.

    python benchmarks/kwise_ablation.py RUNS [--seeds 0 1 2 3 4] [--lr 1e-3] [--figure FILE]

For each seed, `RUNS/w<seed>` holds that demo world with its sft and feedback stages (made when it
is not there, about four minutes each).  The reward stage then learns from the same rankings with
each loss: same start, order, steps and learning rate, so that the losses are all that differs.
Measured are held-out pairs in order, adjacent pairs in order, and the gold score of the answer that
the model picks among 16 of the starting policy, to the bench's questions (the same 16 for all).

Prints a table in Markdown: means over the seeds, with an interval (Student's t, 95 %), and the
difference from plackett-luce seed by seed.  Recorded in docs/reward.md.
"""

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t

from starling.base.context import single_process_context
from starling.bench.answers import Answer, Contestant, yardstick
from starling.cli import main as starling
from starling.data.records import Question
from starling.data.rows import read_rows
from starling.demo.world import write_world
from starling.models.interfaces import Reply, Request
from starling.models.local import Local, load_local
from starling.models.reward_model import RewardModel
from starling.recipe import load_recipe
from starling.reward.config import RewardInputs
from starling.reward.train import run

LOSSES = ("plackett-luce", "bradley-terry", "adjacent-pairs", "best-of-k")
FIGURES = ("pairs", "adjacent", "gold", "cpu_seconds")
SAMPLES = 16


class Remembered:
    """A responder that answers the same request once: its seed makes the answer the same."""

    commits_together = True

    def __init__(self, local: Local) -> None:
        self.identity = local.identity
        self._local = local
        self._replies: dict[str, Reply] = {}

    def respond(self, requests: Iterable[Request]) -> Iterator[Reply]:
        asked = {request.id: request for request in requests}
        missing = [request for id, request in asked.items() if id not in self._replies]
        self._replies |= {reply.request_id: reply for reply in self._local.respond(missing)}
        return iter([self._replies[id] for id in asked])


def main() -> None:
    parser = argparse.ArgumentParser(description="Race the K-wise loss against pairwise ones.")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--lr", type=float, default=None, help="instead of the demo recipe's")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    rows = [row for seed in args.seeds for row in measure(args.runs / f"w{seed}", seed, args.lr)]
    print(table(rows))
    if args.figure:
        draw(rows, args.figure)


def measure(world: Path, seed: int, lr: float | None) -> list[dict]:
    """One row a loss; what a file beside the world holds already is not measured again."""
    make_world(world, seed)
    context = single_process_context(1, seed=seed)
    rankings, policy = world / "feedback" / "rankings.jsonl", str(world / "sft" / "model")
    section = load_recipe("demo").recipe.reward
    assert section is not None
    section = section.model_copy(update={} if lr is None else {"lr": lr})
    baseline = Contestant("sft", "sampled", Remembered(load_local(policy)), 32, seed)
    questions = read_rows(world / "data" / "bench.jsonl", Question, quarantine=world / "bad.jsonl")
    answers = baseline.answer(questions)
    rows = []
    for loss in LOSSES:
        out = world / "ablation" / f"{loss}-{section.lr:g}"
        result = out / "result.json"
        if not result.exists():
            start = time.process_time()
            inputs = RewardInputs(rankings, policy, policy)
            run(section.model_copy(update={"loss": loss}), inputs, out, context)
            seconds = time.process_time() - start
            row = {"seed": seed, "loss": loss, "cpu_seconds": seconds, **figures(out)}
            row["gold"] = best_gold(answers, baseline, out)
            result.write_text(json.dumps(row))
        rows.append(json.loads(result.read_text()))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def make_world(world: Path, seed: int) -> None:
    if (world / "feedback" / "rankings.jsonl").exists():
        return
    if not (world / "data").exists():
        write_world(world / "data", seed=seed)
    for stage in ("sft", "feedback"):
        status = starling([stage, "demo", "--seed", str(seed), "--out", str(world)])
        if status:
            raise SystemExit(status)


def figures(out: Path) -> dict[str, float]:
    found = json.loads((out / "evaluation.json").read_text())
    return {
        "pairs": found["pair_accuracy"]["mean"],
        "adjacent": found["adjacent_accuracy"]["mean"],
    }


def best_gold(answers: Sequence[Answer], baseline: Contestant, out: Path) -> float:
    reward_model = RewardModel.load(str(out / "model"))
    best = yardstick(answers, baseline, reward_model, samples=SAMPLES)
    return fmean(answer.gold.total for answer in best if answer.gold is not None)


def interval(values: Sequence[float]) -> str:
    """Mean and half the width of Student's interval."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return f"{fmean(values):.3f} +- {half:.3f}"


def column(rows: Sequence[dict], loss: str, name: str) -> list[float]:
    return [row[name] for row in rows if row["loss"] == loss]


def table(rows: Sequence[dict]) -> str:
    lines = [
        "| loss | pairs in order | adjacent | gold, best of 16 | against plackett-luce: pairs "
        "| adjacent | gold | CPU s |",
        "| --- " * 8 + "|",
    ]
    for loss in LOSSES:
        own = {name: column(rows, loss, name) for name in FIGURES}
        gaps = {
            name: [a - b for a, b in zip(own[name], column(rows, LOSSES[0], name), strict=True)]
            for name in FIGURES
        }
        measured = FIGURES[:3]
        apart = ["", "", ""] if loss == LOSSES[0] else [interval(gaps[name]) for name in measured]
        cells = [loss, *(interval(own[name]) for name in measured), *apart]
        lines.append(f"| {' | '.join(cells)} | {fmean(own['cpu_seconds']):.0f} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict], path: Path) -> None:
    """Every seed's figures, a line a seed, so that the differences show."""
    from starling.report.figures import BLUE, GREY, new_figure

    titles = {"pairs": "held-out pairs in order", "gold": f"gold, best of {SAMPLES}"}
    with new_figure(9.0, 3.2) as figure:
        for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
            columns = [column(rows, loss, name) for loss in LOSSES]
            for seed in zip(*columns, strict=True):
                axes.plot(range(len(LOSSES)), seed, color=GREY, linewidth=1, marker=".")
            means = [fmean(values) for values in columns]
            axes.plot(range(len(LOSSES)), means, color=BLUE, marker="o", linestyle="none")
            axes.set_xticks(range(len(LOSSES)), LOSSES)
            axes.set_ylabel(title)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()

"""Does PPO pay?  PPO, APA, RLOO, GRPO, DPO and best-of-n distillation in five demo worlds.

    python benchmarks/ppo_study.py RUNS [--seeds 0 1 2 3 4] [--methods ppo apa] [--figure FILE]

For each seed, `RUNS/seed-<n>` holds that demo world with its sft, feedback and reward stages (made
where it is not there, about four minutes each).  Every method starts from the same policy:

ppo, apa, rloo, grpo     the ppo stage with the demo's settings, all its rollouts (3456 responses),
                         the same reward model; `apa` and `rloo`/`grpo` change what METHODS says
dpo, dpo-plackett-luce   on the rankings that the reward model learned from, two passes as it had:
                         all pairs, or the whole ranking, of each prompt
best-of-4-distilled      cross-entropy on the best of 4 by the reward model, to a quarter as many
                         prompts: as many responses as PPO samples

No method selects a checkpoint here; the last one counts.  Measured on the bench's questions, which
nothing trained on or selected by: gold (the judge's rule without noise) of answers sampled at
temperature 1, and their length; on validation prompts: sequence KL to the start, gold, and what the
reward model says.  Beside it best-of-n of the start by the same reward model, whose KL is at most
log n - (n - 1) / n (Beirami et al. 2024, https://arxiv.org/abs/2401.01879).

Prints two tables in Markdown, means over seeds with 95 % intervals (Student's t), and draws gold
against KL.  Recorded in docs/ppo-study.md.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from scipy.stats import t
from torch import Tensor

from starling.base.context import single_process_context
from starling.base.seeding import derive_seed, permutation
from starling.bench.answers import Contestant
from starling.cli import main as starling
from starling.data.records import Message, Prompt, Question, RankingRow
from starling.data.rows import read_rows
from starling.demo.world import write_world
from starling.judging.rubric import Checks, grade
from starling.models.causal_lm import (
    LanguageModel,
    load_language_model,
    padded_mask,
    state_logprobs,
)
from starling.models.interfaces import GenerationRequest, Sampling
from starling.models.local import in_process
from starling.models.packing import prepared
from starling.models.reward_model import RewardModel, Scored
from starling.models.torch_engine import TorchEngine
from starling.ppo.actor_critic import frozen_copy
from starling.ppo.bundles import Bundle, Reading, bundle_batches, packed_predictors
from starling.ppo.config import PpoInputs, PpoSection, RewardSource
from starling.ppo.loss import distillation_terms, dpo_loss, plackett_luce_dpo_loss
from starling.ppo.train import run
from starling.recipe import load_recipe

METHODS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "apa": {"objective": "apa", "apa_lambda": 10.0},
    "rloo": {"advantages": "rloo"},
    "grpo": {"advantages": "grpo", "whiten_advantages": False},
    "dpo": {},
    "dpo-plackett-luce": {},
    "best-of-4-distilled": {},
}
BEST_OF = (1, 2, 4, 8, 16)
TOKENS = 32
DPO = {"beta": 0.1, "lr": 2e-4, "batch": 8, "epochs": 2}
DISTILLED = {"n": 4, "prompts": 864, "lr": 2e-4, "batch": 16, "epochs": 3}

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare PPO with what it is compared to.")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    for seed in args.seeds:
        world = World(args.runs / f"seed-{seed}", seed)
        rows += [world.kept("start", world.measure_start)]
        rows += [world.kept(name, partial(world.measure_method, name)) for name in args.methods]
    print(table(rows), "", best_of_table(rows), sep="\n")
    if args.figure:
        draw(rows, args.figure)


class World:
    """A demo world with its stages before PPO, and the results measured in it so far."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.context = single_process_context(1, seed=seed)
        if not (folder / "reward" / "model").exists():
            self._make()
        self.policy = str(folder / "sft" / "model")
        self.reward_model = RewardModel.load(str(folder / "reward" / "model"))
        self.start = load_language_model(self.policy)
        self.validation: list[Prompt] = self._rows("data/validation.jsonl", Prompt)[:96]

    def _rows(self, name: str, kind: type[Any]) -> list[Any]:
        return read_rows(self.folder / name, kind, quarantine=self.folder / "quarantine.jsonl")

    def _make(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "data").exists():
            write_world(self.folder / "data", seed=self.seed)
        text = load_recipe("demo").recipe.model_dump_json()
        (self.folder / "demo.yaml").write_text(
            json.dumps(json.loads(text) | {"seed": self.seed}), encoding="utf-8"
        )
        for stage in ("sft", "feedback", "reward"):
            arguments = [stage, str(self.folder / "demo.yaml"), "--out", str(self.folder)]
            assert starling(arguments) == 0

    def kept(self, name: str, measure: Callable[[], Row]) -> Row:
        """A result from the world's folder, or a new one that is put there."""
        path = self.folder / "study" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            found = measure() | {"method": name, "seed": self.seed}
            path.write_text(json.dumps(found), encoding="utf-8")
            print(json.dumps({k: v for k, v in found.items() if k != "curve"}), flush=True)
        return json.loads(path.read_text(encoding="utf-8"))

    def measure_start(self) -> Row:
        """The starting policy, and the best of n of its answers to the validation prompts."""
        sampled = self._samples(self.validation, max(BEST_OF), "study/best-of")
        scores = self._scores(self.validation, sampled)
        curve = []
        for n in BEST_OF:
            best = [max(range(n), key=row.__getitem__) for row in scores]
            golds = [
                self._gold(p, s[i]) for p, s, i in zip(self.validation, sampled, best, strict=True)
            ]
            picked = [row[i] for row, i in zip(scores, best, strict=True)]
            kl = math.log(n) - (n - 1) / n
            curve.append({"n": n, "kl": kl, "gold": fmean(golds), "score": fmean(picked)})
        return self._measure(self.start) | {"kl": 0.0, "curve": curve, "seconds": 0.0}

    def measure_method(self, name: str) -> Row:
        started = time.process_time()
        if name.startswith("dpo"):
            model, curve = self._direct(name), []
        elif name == "best-of-4-distilled":
            model, curve = self._distilled(), []
        else:
            model, curve = self._by_stage(name)
        seconds = time.process_time() - started
        kl = self._kl(model)
        return self._measure(model) | {"kl": kl, "curve": curve, "seconds": seconds}

    def _by_stage(self, name: str) -> tuple[LanguageModel, list[Row]]:
        section = load_recipe("demo").recipe.ppo
        assert section is not None
        changed = section.model_dump(mode="json") | METHODS[name] | {"instructions": None}
        section = PpoSection.model_validate_json(json.dumps(changed))
        data, out = self.folder / "data", self.folder / "study" / name
        inputs = PpoInputs(
            self.policy,
            data / "ppo.jsonl",
            (RewardSource(model=str(self.folder / "reward" / "model")),),
            data / "validation.jsonl",
            None,
        )
        run(section, inputs, out, self.context)
        curve = []
        for path in sorted((out / "validation").glob("step-*.jsonl")):
            rows = [json.loads(line) for line in path.open(encoding="utf-8")]
            golds = [
                grade(Checks.model_validate(r["checks"]), r["answer"], finished=r["finished"]).total
                for r in rows
            ]
            curve.append(
                {"step": int(path.stem[5:]), "gold": fmean(golds)}
                | {key: fmean(row[key] for row in rows) for key in ("kl", "score")}
            )
        return load_language_model(str(out / "model")), curve

    def _direct(self, name: str) -> LanguageModel:
        """DPO on the rankings, the K answers of a prompt in one forward."""
        rankings = self._rows("feedback/rankings.jsonl", RankingRow)
        model = load_language_model(self.policy)
        reference = prepared(frozen_copy(model.model))
        codec = model.codec
        bundles = [
            Bundle(
                tuple(codec.encode(row.messages, mode=row.mode, generation_prompt=True).ids),
                tuple(self._answer_ids(row, answer) for answer in row.answers),
                tuple(range(len(row.answers))),
            )
            for row in rankings
        ]
        ranks = [[answer.rank or math.inf for answer in row.answers] for row in rankings]
        loss = pairs_loss if name == "dpo" else ranking_loss

        def batch_loss(chosen: Sequence[int]) -> Tensor:
            reading = Reading([bundles[i] for i in chosen], "cpu")
            keep = padded_mask([[True] * len(ranks[i]) for i in chosen])
            own = answer_logprobs(prepared(model.model), model.model, reading)
            with torch.no_grad():
                theirs = answer_logprobs(reference, self.start.model, reading)
            known = torch.tensor([rank for i in chosen for rank in ranks[i]])
            columns = [
                torch.zeros(keep.shape).masked_scatter(keep, x) for x in (own, theirs, known)
            ]
            return loss(*columns, keep)

        self._fit(model, len(bundles), batch_loss, DPO, name)
        return model

    def _distilled(self) -> LanguageModel:
        """Cross-entropy on the best of n, of as many samples as PPO has."""
        n, count = DISTILLED["n"], DISTILLED["prompts"]
        prompts = self._rows("data/ppo.jsonl", Prompt)[: int(count)]
        sampled = self._samples(prompts, int(n), "study/distilled")
        scores = self._scores(prompts, sampled)
        model = load_language_model(self.policy)
        best = [max(range(int(n)), key=row.__getitem__) for row in scores]
        bundles = [
            Bundle(self._prompt_ids(prompt), (samples[i].ids,), (0,))
            for prompt, samples, i in zip(prompts, sampled, best, strict=True)
        ]

        def batch_loss(chosen: Sequence[int]) -> Tensor:
            reading = Reading([bundles[i] for i in chosen], "cpu")
            logprobs = token_logprobs(prepared(model.model), model.model, reading)
            keep = torch.ones_like(logprobs, dtype=torch.bool)
            return distillation_terms(logprobs[None], keep[None]).sum() / len(logprobs)

        self._fit(model, len(bundles), batch_loss, DISTILLED, "distilled")
        return model

    def _fit(
        self,
        model: LanguageModel,
        count: int,
        batch_loss: Callable[[Sequence[int]], Tensor],
        settings: dict[str, float],
        name: str,
    ) -> None:
        """AdamW, the rate falling linearly to zero, as in the ppo stage."""
        optimizer = torch.optim.AdamW(model.model.parameters(), lr=settings["lr"], weight_decay=0.0)
        size, epochs = int(settings["batch"]), int(settings["epochs"])
        steps = epochs * (count // size)
        order = [
            index
            for epoch in range(epochs)
            for index in permutation(count, self.seed, f"study/{name}", epoch)[
                : count // size * size
            ]
        ]
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"] * (1 - step / steps)
            batch_loss(order[step * size : (step + 1) * size]).backward()
            torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def _measure(self, model: LanguageModel) -> Row:
        """Gold and length of answers to the bench, sampled with the same seeds for all."""
        questions = self._rows("data/bench.jsonl", Question)
        responder = in_process(model, identity="study")
        answers = Contestant("x", "sampled", responder, TOKENS, self.seed).answer(questions)
        found = [
            (a.gold.total, a.gold.correctness, a.tokens) for a in answers if a.gold is not None
        ]
        golds, correct, tokens = zip(*found, strict=True)
        scores = self.reward_model.score(
            Scored(
                (*a.messages, Message(role="assistant", content=a.answer)),
                None,
                a.finish_reason == "stop",
            )
            for a in answers
        )
        return {
            "gold": fmean(golds),
            "correctness": fmean(correct),
            "tokens": fmean(tokens),
            "score": float(scores.mean()),
        }

    def _kl(self, model: LanguageModel) -> float:
        """Sequence KL to the start on the validation prompts, nats."""
        engine = self._engine(model)
        asked = [
            GenerationRequest(
                str(row),
                self._prompt_ids(prompt),
                Sampling(TOKENS, 1.0, derive_seed(self.seed, "study/kl", row)),
            )
            for row, prompt in enumerate(self.validation)
        ]
        by_id = {sample.request_id: sample.ids for sample in engine.generate(asked)}
        bundles = [Bundle(r.prompt_ids, (by_id[r.id],), (row,)) for row, r in enumerate(asked)]
        total = 0.0
        with torch.no_grad():
            for batch in bundle_batches(bundles, "cpu", tokens=None, most=None):
                reading = Reading(batch, "cpu")
                own, theirs = (
                    token_logprobs(prepared(each.model), each.model, reading)
                    for each in (model, self.start)
                )
                total += float((own - theirs).sum())
        return total / len(bundles)

    def _samples(self, prompts: Sequence[Prompt], n: int, purpose: str) -> list[list[Any]]:
        asked = [
            GenerationRequest(
                str(row),
                self._prompt_ids(prompt),
                Sampling(TOKENS, 1.0, derive_seed(self.seed, purpose, row)),
                num_samples=n,
            )
            for row, prompt in enumerate(prompts)
        ]
        found: list[list[Any]] = [[None] * n for _ in prompts]
        for sample in self._engine(self.start).generate(asked):
            found[int(sample.request_id)][sample.index] = sample
        return found

    def _scores(
        self, prompts: Sequence[Prompt], sampled: Sequence[Sequence[Any]]
    ) -> list[list[float]]:
        items = [
            Scored((*p.messages, self._message(s)), p.mode, s.finish_reason == "stop")
            for p, samples in zip(prompts, sampled, strict=True)
            for s in samples
        ]
        return self.reward_model.score(items).view(len(prompts), -1).tolist()

    def _gold(self, prompt: Prompt, sample: Any) -> float:
        checks = Checks.model_validate(prompt.checks)
        text = self._message(sample).content
        return grade(checks, text, finished=sample.finish_reason == "stop").total

    def _message(self, sample: Any) -> Message:
        return Message(role="assistant", content=self.start.codec.decode_response(sample.ids))

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        codec = self.start.codec
        return tuple(codec.encode(prompt.messages, mode=prompt.mode, generation_prompt=True).ids)

    def _answer_ids(self, row: RankingRow, answer: Any) -> tuple[int, ...]:
        said = Message(role="assistant", content=answer.answer)
        finished = answer.finish_reason != "length"
        ids, mask = self.start.codec.encode((*row.messages, said), mode=row.mode, finished=finished)
        return tuple(i for i, keep in zip(ids, mask, strict=True) if keep)

    def _engine(self, model: LanguageModel) -> TorchEngine:
        codec = model.codec
        return TorchEngine(model.model, stop_ids=codec.stop_ids, pad_id=codec.tokenizer.pad_id)


def token_logprobs(backbone: Any, model: Any, reading: Reading) -> Tensor:
    """Logprobs of the reading's response tokens [N]."""
    states = packed_predictors(backbone, reading)
    return state_logprobs(model.get_output_embeddings(), states, reading.targets)


def answer_logprobs(backbone: Any, model: Any, reading: Reading) -> Tensor:
    """Logprobs of whole responses, in order."""
    sizes = [len(response) for each in reading.bundles for response in each.responses]
    return torch.stack(
        [part.sum() for part in token_logprobs(backbone, model, reading).split(sizes)]
    )


def pairs_loss(own: Tensor, theirs: Tensor, ranks: Tensor, keep: Tensor) -> Tensor:
    """DPO's loss, mean over all pairs that the rankings order."""
    ordered = (ranks[:, :, None] < ranks[:, None, :]) & keep[:, :, None] & keep[:, None, :]
    row, better, worse = ordered.nonzero(as_tuple=True)
    sides = own[row, better], own[row, worse], theirs[row, better], theirs[row, worse]
    return dpo_loss(*sides, beta=DPO["beta"]).mean()


def ranking_loss(own: Tensor, theirs: Tensor, ranks: Tensor, keep: Tensor) -> Tensor:
    """Its Plackett-Luce form, for each ranked stage."""
    losses = plackett_luce_dpo_loss(own, theirs, ranks, keep, beta=DPO["beta"])
    return losses.mean() / (ranks.shape[1] - 1)


def interval(values: Sequence[float]) -> str:
    """Mean and half width of the 95 % interval over seeds."""
    if len(values) < 2:
        return f"{fmean(values):.3f}"
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):.3f} +- {half:.3f}"


def table(rows: Sequence[Row]) -> str:
    """One line a method."""
    lines = [
        "| method | gold | correctness | tokens an answer | sequence KL | reward model "
        "| gold less best-of-n's at that KL | CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    curves = {row["seed"]: row["curve"] for row in rows if row["method"] == "start"}
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        columns = [
            interval([row[key] for row in mine])
            for key in ("gold", "correctness", "tokens", "kl", "score")
        ]
        gaps = [
            row["curve"][-1]["gold"] - at_kl(curves[row["seed"]], row["curve"][-1]["kl"])
            for row in mine
            if row["curve"] and method != "start"
        ]
        columns += [interval(gaps) if gaps else "", f"{fmean(row['seconds'] for row in mine):.0f}"]
        lines.append(f"| {method} | {' | '.join(columns)} |")
    return "\n".join(lines)


def best_of_table(rows: Sequence[Row]) -> str:
    """Best-of-n of the start on validation prompts, by the same reward model."""
    lines = ["| best of | KL at most | gold | reward model |", "| --- | --- | --- | --- |"]
    curves = [row["curve"] for row in rows if row["method"] == "start"]
    for points in zip(*curves, strict=True):
        golds, scores = (interval([point[key] for point in points]) for key in ("gold", "score"))
        lines.append(f"| {points[0]['n']} | {points[0]['kl']:.2f} | {golds} | {scores} |")
    return "\n".join(lines)


def at_kl(curve: Sequence[Row], kl: float) -> float:
    """Best-of-n's gold at this KL, between its points; beyond the last, the last."""
    points = [(point["kl"], point["gold"]) for point in curve]
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if kl <= right:
            return low + (high - low) * max(0.0, kl - left) / (right - left)
    return points[-1][1]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Gold against KL: one thin line a seed and method, best-of-n dashed."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    colors = {"ppo": "C0", "apa": "C1", "rloo": "C2", "grpo": "C3", "start": "0.4"}
    for row in rows:
        style = {"color": colors.get(row["method"], "C4"), "linewidth": 1, "alpha": 0.8}
        if row["curve"]:
            x, y = ([point[key] for point in row["curve"]] for key in ("kl", "gold"))
            label = "best of n" if row["method"] == "start" else row["method"]
            shape = "--" if row["method"] == "start" else "-"
            axes.plot(x, y, shape, label=label if row["seed"] == rows[0]["seed"] else None, **style)
    axes.set_xlabel("sequence KL to the start, nats")
    axes.set_ylabel("gold on validation prompts (0 to 1)")
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()

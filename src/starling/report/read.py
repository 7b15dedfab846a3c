"""What a run folder tells: only its files are read, and what is not there is None or empty.

Gold on validation prompts is graded here, after the fact: training and selection never saw it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from starling.base.errors import DataError
from starling.base.estimate import Estimate, bootstrap_mean
from starling.base.jsonl import iter_json, read_json
from starling.base.strict_yaml import parse_yaml
from starling.judging.rubric import Checks, grade
from starling.manifest import read_manifest
from starling.recipe import STAGES

BEFORE, AFTER = "sft", "ppo"
"""The names of the two policies in scores.json and answers.jsonl."""

SMALLEST_RISE = 0.01
"""A smaller rise of the score is none: it would not show in the page's two decimals."""


class ValidationPoint(NamedTuple):
    """One validated policy; `kl` in nats per sequence, `score` normalised, `gold` in 0..1."""

    step: int
    kl: Estimate
    score: Estimate
    gold: Estimate | None
    scores: Mapping[str, float]
    """By prompt."""
    golds: Mapping[str, float]
    """The same; only of prompts with checks."""


class Run(NamedTuple):
    """A run folder, read."""

    recipe: dict[str, Any]
    summary: dict[str, Any]
    stages: tuple[dict[str, Any], ...]
    """Name, sentence (with a path inside the run), and the clock's seconds and start."""
    ppo_metrics: tuple[dict[str, Any], ...]
    flags: tuple[dict[str, Any], ...]
    """What PPO's guards raised, in order."""
    validations: tuple[ValidationPoint, ...]
    audit: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    """The reward model on held-out rankings."""
    held_out: tuple[dict[str, Any], ...]
    """Their answers with rank, score and length."""
    pair_file: dict[str, Any] | None
    """The reward model on somebody's pairs."""

    def figures(self, stage: str) -> dict[str, Any]:
        """The stage's part of summary.json; {} when it has none."""
        return self.summary.get(stage, {})

    def estimate(self, stage: str, name: str) -> Estimate | None:
        """One of the stage's figures with its interval; None when it has none."""
        return as_estimate(self.figures(stage).get(name))

    @property
    def selected(self) -> ValidationPoint | None:
        """The validation of the checkpoint that was kept."""
        step = self.figures("ppo").get("selected_step")
        return next((point for point in self.validations if point.step == step), None)

    @property
    def best_gold(self) -> ValidationPoint | None:
        """The first validation of the highest gold; None where a point has no gold."""
        golds = [point.gold.mean for point in self.validations if point.gold is not None]
        if len(golds) < len(self.validations):
            return None
        return self.validations[golds.index(max(golds))]

    @property
    def highest_later_score(self) -> ValidationPoint | None:
        """The highest reward-model score after the best gold, where it is told from that there."""
        best = self.best_gold
        if best is None:
            return None
        later = (point for point in self.validations if point.step > best.step)
        highest = max(later, key=lambda point: point.score.mean, default=best)
        rise = self._difference(highest.scores, best.scores)
        is_rise = rise.mean >= SMALLEST_RISE and rise.low is not None and rise.low > 0
        return highest if is_rise else None

    @property
    def is_overoptimised(self) -> bool:
        """Whether gold is told to be lower there than at its best."""
        best, later = self.best_gold, self.highest_later_score
        if best is None or later is None:
            return False
        change = self._difference(later.golds, best.golds)
        return change.high is not None and change.high < 0

    def _difference(self, after: Mapping[str, float], before: Mapping[str, float]) -> Estimate:
        """Mean of the differences, prompt by prompt: both are of the same prompts."""
        differences = [after[name] - value for name, value in before.items()]
        return bootstrap_mean(differences, seed=self.recipe.get("seed", 0))

    @property
    def flags_by_guard(self) -> list[dict[str, Any]]:
        """Each guard's first flag, with how many `more` there are and the `last` one's step."""
        grouped: dict[str, list[dict[str, Any]]] = {}
        for flag in self.flags:
            grouped.setdefault(flag["guard"], []).append(flag)
        return [
            {**flags[0], "more": len(flags) - 1, "last": flags[-1]["step"]}
            for flags in grouped.values()
        ]

    @property
    def widest_position_table(self) -> dict[str, Any] | None:
        """The audit's table with the most verdicts; None without one."""
        tables = (self.audit or {}).get("positions", {})
        return max(tables.values(), key=lambda table: table["verdicts"], default=None)

    @property
    def is_demo(self) -> bool:
        """Whether the judge is a rule, so that gold comes from the same rule without its noise."""
        return (self.recipe.get("judge") or {}).get("kind") == "rubric"


def read_run(folder: Path) -> Run:
    """Read what is there. Raises DataError for a folder without a run, and for damaged files."""
    if not any((folder / name).exists() for name in ("summary.json", "recipe.yaml", *STAGES)):
        raise DataError(
            f"{folder} is no run folder: it holds no summary.json, no recipe.yaml and no stage. "
            "`starling demo` makes one in runs/demo."
        )
    recipe = read_recipe(folder / "recipe.yaml")
    return Run(
        recipe=recipe,
        summary=_json(folder / "summary.json") or {},
        stages=tuple(_stage_note(folder, name) for name in STAGES),
        ppo_metrics=tuple(_rows(folder / "ppo" / "metrics.jsonl")),
        flags=tuple(_rows(folder / "ppo" / "flags.jsonl")),
        validations=_validations(folder / "ppo" / "validation", seed=recipe.get("seed", 0)),
        audit=_json(folder / "feedback" / "audit.json"),
        evaluation=_json(folder / "reward" / "evaluation.json"),
        held_out=tuple(_rows(folder / "reward" / "held_out.jsonl")),
        pair_file=_json(folder / "reward" / "pairs.json"),
    )


def as_estimate(figure: Any) -> Estimate | None:
    """An estimate from its form in JSON; None where there is none."""
    return Estimate(**{key: figure[key] for key in Estimate.__match_args__}) if figure else None


def read_recipe(path: Path) -> dict[str, Any]:
    """The resolved recipe; {} where there is none. Raises DataError for a damaged one."""
    try:
        value = parse_yaml(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}. Run the recipe again.") from error
    return value if isinstance(value, dict) else {}


def _json(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(iter_json(path)) if path.is_file() else []


def _stage_note(folder: Path, name: str) -> dict[str, Any]:
    manifest = read_manifest(folder / name)
    if manifest is None:
        return {"name": name, "sentence": None}
    # The path is the one of the machine that ran; the same run elsewhere must read the same.
    text, arrow, target = manifest["summary"]["sentence"].rpartition(" -> ")
    sentence = f"{text}{arrow}{name}/{Path(target).name}" if arrow else target
    clock = {key: manifest[key] for key in ("seconds", "started")}
    return {"name": name, "sentence": sentence, **clock}


def _validations(folder: Path, *, seed: int) -> tuple[ValidationPoint, ...]:
    named = [(path, _rows(path)) for path in sorted(folder.glob("step-*.jsonl"))]
    return tuple(
        _point(int(path.stem.removeprefix("step-")), rows, seed) for path, rows in named if rows
    )


def _point(step: int, rows: Sequence[dict[str, Any]], seed: int) -> ValidationPoint:
    golds = {
        row["id"]: grade(
            Checks.model_validate(row["checks"]), row["answer"], finished=row["finished"]
        ).total
        for row in rows
        if row.get("checks") is not None
    }
    scores = {row["id"]: row["score"] for row in rows}
    return ValidationPoint(
        step=step,
        kl=bootstrap_mean([row["kl"] for row in rows], seed=seed),
        score=bootstrap_mean(list(scores.values()), seed=seed),
        gold=bootstrap_mean(list(golds.values()), seed=seed) if len(golds) == len(rows) else None,
        scores=scores,
        golds=golds,
    )

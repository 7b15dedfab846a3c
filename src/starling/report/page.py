"""report.html: one self-contained page about a run, from the files of its folder alone.

The same files give the same bytes, but for lines of class "clock": only there stand times.
What a run does not have is said to be missing.  Everything that came from a file is escaped.
"""

import base64
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from starling import __version__
from starling.base.files import write_atomically
from starling.report.figures import (
    draw_accuracy,
    draw_length,
    draw_overoptimisation,
    draw_positions,
)
from starling.report.read import AFTER, BEFORE, Run, as_estimate, read_run
from starling.report.words import (
    LIMITS_OF_DEMO,
    LIMITS_OF_RUN,
    explain_accuracy,
    explain_gain,
    explain_length,
    explain_overoptimisation,
    explain_positions,
)

COLUMNS = (
    ("gold", "gold, sampled", 2),
    ("gold_greedy", "gold, greedy", 2),
    ("score", "judge, 1 to 10", 2),
    ("tokens_per_answer", "tokens an answer", 1),
)
"""Figures of the bench with a value before and after: key, heading, decimals."""


class Cell(NamedTuple):
    """A mean and its interval as text; both empty where the run has no such figure."""

    mean: str
    interval: str


class TableRow(NamedTuple):
    """A category, how many answers each of its means has, and its cells from left to right."""

    name: str
    n: int
    cells: tuple[Cell, ...]


class Chart(NamedTuple):
    """A chart as a data address, or what is missing for it; `alt` says what it would show."""

    title: str
    alt: str
    image: str | None
    text: str


class Plan(NamedTuple):
    """How one chart is made, and what to say where its data is missing."""

    stage: str
    title: str
    draw: Callable[[Run], bytes | None]
    explain: Callable[[Run], str]
    missing: str


CHARTS = (
    Plan(
        "ppo",
        "Reward and gold against KL",
        draw_overoptimisation,
        explain_overoptimisation,
        "No PPO validations in this run.",
    ),
    Plan("ppo", "Response length", draw_length, explain_length, "No PPO metrics in this run."),
    Plan(
        "reward",
        "Reward model against length",
        draw_accuracy,
        explain_accuracy,
        "No reward-model accuracy in this run.",
    ),
    Plan(
        "feedback",
        "Does the judge prefer a place?",
        draw_positions,
        explain_positions,
        "No judge audit in this run.",
    ),
)


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    Raises DataError for a folder that holds no run, and for files that are damaged.
    """
    run = read_run(run_folder)
    path = run_folder / "report.html"
    write_atomically(path, [render(run).encode()])
    return path


def render(run: Run) -> str:
    """The page's text."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    source = (resources.files("starling.report") / "page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        version=__version__,
        seed=run.recipe.get("seed"),
        gain=explain_gain(run),
        columns=[heading for _, heading, _ in COLUMNS],
        rows=table_rows(run),
        charts=[_chart(plan, run) for plan in CHARTS],
        examples=run.examples,
        is_bench_current=bool(run.figures("bench")),
        stages=run.stages,
        limits_title="What the demo does not show" if run.is_demo else "What this does not show",
        limits=LIMITS_OF_DEMO if run.is_demo else LIMITS_OF_RUN,
    )


def table_rows(run: Run) -> list[TableRow]:
    """The bench by category and, last, over all; empty without a bench."""
    bench = run.figures("bench")
    if not bench:
        return []
    named = [*bench.get("by_category", {}).items(), ("all", bench)]
    return [TableRow(name, _count(figures), _cells(figures)) for name, figures in named]


def _count(figures: dict[str, Any]) -> int:
    return figures["tokens_per_answer"][AFTER]["n"]


def _cells(figures: dict[str, Any]) -> tuple[Cell, ...]:
    sides = [
        _cell(figures.get(key, {}).get(side), decimals)
        for key, _, decimals in COLUMNS
        for side in (BEFORE, AFTER)
    ]
    return (*sides, _cell(figures.get("win_rate"), 2))


def _cell(figure: dict[str, Any] | None, decimals: int) -> Cell:
    estimate = as_estimate(figure)
    if estimate is None:
        return Cell("", "")
    interval = "unknown"
    if estimate.low is not None and estimate.high is not None:
        interval = f"{estimate.low:.{decimals}f} to {estimate.high:.{decimals}f}"
    failed = f", {estimate.num_failed} failed" if estimate.num_failed else ""
    return Cell(f"{estimate.mean:.{decimals}f}", interval + failed)


def _chart(plan: Plan, run: Run) -> Chart:
    drawn = plan.draw(run)
    if drawn is None:
        return Chart(plan.title, plan.title, None, plan.missing)
    text = plan.explain(run)
    if not run.figures(plan.stage):
        text += f" The stage {plan.stage} has no figures in summary.json: it did not finish, or "
        text += "was made from something else than the stages before it."
    image = "data:image/svg+xml;base64," + base64.b64encode(drawn).decode()
    return Chart(plan.title, f"{plan.title}. {text}", image, text)

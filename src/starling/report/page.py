"""report.html: one self-contained page about a run, from the files of its folder alone.

The same files give the same bytes, but for lines of class "clock": only there stand times.
What a run does not have is said to be missing.  Everything that came from a file is escaped.
"""

import base64
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from starling import __version__
from starling.base.errors import DataError
from starling.base.files import write_atomically
from starling.report import figures, words
from starling.report.read import AFTER, BEFORE, Run, as_estimate, read_run

COLUMNS = (
    ("gold", "gold, sampled", 2),
    ("gold_greedy", "gold, greedy", 2),
    ("score", "judge, 1 to 10", 2),
    ("tokens_per_answer", "tokens an answer", 1),
)
"""Figures of the bench with a value before and after: key, heading, decimals."""

CHARTS = {
    "Reward and gold against KL": (
        "ppo",
        "PPO validations",
        figures.draw_overoptimisation,
        words.explain_overoptimisation,
    ),
    "Response length": ("ppo", "PPO metrics", figures.draw_length, words.explain_length),
    "Reward model against length": (
        "reward",
        "reward-model accuracy",
        figures.draw_accuracy,
        words.explain_accuracy,
    ),
    "Does the judge prefer a place?": (
        "feedback",
        "judge audit",
        figures.draw_positions,
        words.explain_positions,
    ),
}
"""By title: the stage and the data that a chart needs, how it is drawn, how it is explained."""


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the run folder; DataError for one without a run, or damaged."""
    try:
        page = _render(read_run(run_folder))
    except (KeyError, TypeError, AttributeError) as error:
        # JSON of another shape than a run writes: edited by hand, or of another version.
        raise DataError(
            f"a file in {run_folder} is not as a run writes it ({error!r}); run the recipe again"
        ) from error
    path = run_folder / "report.html"
    write_atomically(path, [page.encode()])
    return path


def _render(run: Run) -> str:
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
        run=run,
        gain=words.explain_gain(run),
        columns=[heading for _, heading, _ in COLUMNS],
        rows=_table_rows(run),
        charts=[_chart(run, title, *chart) for title, chart in CHARTS.items()],
    )


def _table_rows(run: Run) -> list[dict[str, Any]]:
    """The bench by category and, last, over all; empty without a bench."""
    bench = run.figures("bench")
    named = [*bench.get("by_category", {}).items(), ("all", bench)] if bench else []
    rows = []
    for name, found in named:
        cells = [
            _cell(found.get(key, {}).get(side), decimals)
            for key, _, decimals in COLUMNS
            for side in (BEFORE, AFTER)
        ]
        cells.append(_cell(found.get("win_rate"), 2))
        rows.append({"name": name, "n": found["tokens_per_answer"][AFTER]["n"], "cells": cells})
    return rows


def _cell(figure: dict[str, Any] | None, decimals: int) -> tuple[str, str]:
    """A mean and its interval as text; both empty where the run has no such figure."""
    estimate = as_estimate(figure)
    if estimate is None:
        return "", ""
    interval = "unknown"
    if estimate.low is not None and estimate.high is not None:
        interval = f"{estimate.low:.{decimals}f} to {estimate.high:.{decimals}f}"
    failed = f", {estimate.num_failed} failed" if estimate.num_failed else ""
    return f"{estimate.mean:.{decimals}f}", interval + failed


def _chart(run: Run, title: str, stage: str, data: str, draw: Any, explain: Any) -> dict:
    """The chart as a data address, or what is missing for it; `alt` says what it shows."""
    drawn = draw(run)
    if drawn is None:
        return {"title": title, "image": None, "text": f"No {data} in this run."}
    text = explain(run)
    if not run.figures(stage):
        text += f" The stage {stage} has no figures in summary.json: it did not finish, or "
        text += "was made from something else than the stages before it."
    image = "data:image/svg+xml;base64," + base64.b64encode(drawn).decode()
    return {"title": title, "image": image, "alt": f"{title}. {text}", "text": text}

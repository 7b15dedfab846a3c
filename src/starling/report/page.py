"""report.html: one self-contained page about a run, from the files of its folder alone.

The same files give the same bytes, but for lines of class "clock": only there stand times.
What a run does not have is said to be missing.  Everything that came from a file is escaped.
"""

import base64
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError

from starling import __version__
from starling.base.errors import DataError
from starling.base.files import write_atomically
from starling.report import figures
from starling.report.read import AFTER, BEFORE, Run, as_estimate, read_run

COLUMNS = (
    ("gold", "gold, sampled", 2),
    ("gold_greedy", "gold, greedy", 2),
    ("score", "judge, 1 to 10", 2),
    ("tokens_per_answer", "tokens an answer", 1),
)
"""Figures of the bench with a value before and after: key, heading, decimals."""

CHARTS = (
    ("Reward and gold against KL", "overoptimisation", "ppo", "PPO validations"),
    ("Response length", "length", "ppo", "PPO metrics"),
    ("Reward model against length", "accuracy", "reward", "reward-model accuracy"),
    ("Does the judge prefer a place?", "positions", "feedback", "verdict with places"),
)
"""Title, name (`figures` draws it, `words.html.j2` explains it), stage, and the data it needs."""

REWARD_CHARTS = (
    ("The best of n answers", "best_of_n", "reward", "evaluation"),
    ("Is it as sure as it is right?", "reliability", "reward", "evaluation"),
    ("Score against length", "score_against_length", "reward", "held-out answers"),
    ("Accuracy by length difference", "length_difference", "reward", "evaluation"),
)
"""The same, for the reward model's own section."""


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the run folder; DataError for one without a run, or damaged."""
    try:
        page = _render(read_run(run_folder))
    except (KeyError, TypeError, AttributeError, UndefinedError) as error:
        # JSON of another shape than a run writes: edited by hand, or of another version.
        raise DataError(
            f"a file in {run_folder} is not as a run writes it ({error!r}); run the recipe again"
        ) from error
    path = run_folder / "report.html"
    write_atomically(path, [page.encode()])
    return path


def _render(run: Run) -> str:
    environment = Environment(
        loader=PackageLoader("starling.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    charts, reward_charts = (
        [
            {"title": title, "name": name, "stage": stage, "data": data, "image": _image(run, name)}
            for title, name, stage, data in listed
        ]
        for listed in (CHARTS, REWARD_CHARTS if run.evaluation else ())
    )
    return environment.get_template("page.html.j2").render(
        version=__version__,
        run=run,
        gain=_gain(run),
        columns=COLUMNS,
        sides=(BEFORE, AFTER),
        charts=charts,
        reward_charts=reward_charts,
    )


def _gain(run: Run) -> str | None:
    """The page's first sentence: what the bench says changed; None without a bench."""
    bench = run.figures("bench")
    parts = []
    named = {"gold": "gold, sampled,", "gold_greedy": "gold, greedy,", "score": "judge's score"}
    for name, label in named.items():
        before, after = (as_estimate(bench.get(name, {}).get(side)) for side in (BEFORE, AFTER))
        if before is not None and after is not None:
            parts.append(f"{label} {before.mean:.2f} before and {after.mean:.2f} after")
    wins = run.estimate("bench", "win_rate")
    if wins is not None:
        parts.append(f"the judge prefers the new answers in {wins.mean:.0%} of the comparisons")
    return "On held-out questions: " + "; ".join(parts) + "." if parts else None


def _image(run: Run, name: str) -> str | None:
    """The chart as a data address; None where the run lacks what it needs."""
    drawn = getattr(figures, f"draw_{name}")(run)
    return drawn and "data:image/svg+xml;base64," + base64.b64encode(drawn).decode()

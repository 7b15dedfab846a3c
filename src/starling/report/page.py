"""report.html: one self-contained page about a run, from the files of its folder alone.

The same files give the same bytes, but for lines of class "clock": only there stand times.
What a run does not have is said to be missing.  Everything that came from a file is escaped.
"""

from pathlib import Path

from markupsafe import Markup

from starling.base.files import write_atomically
from starling.report import figures
from starling.report.benches import read_run_turns
from starling.report.html import as_written, browser_data, image, render
from starling.report.read import AFTER, BEFORE, Run, as_estimate, read_run

COLUMNS = (
    ("gold", "gold, sampled", 2),
    ("gold_greedy", "gold, greedy", 2),
    ("score", "judge, 1 to 10", 2),
    ("tokens_per_answer", "tokens an answer", 1),
)
"""Figures of the bench with a value before and after: key, heading, decimals."""

CHECKS = (
    ("instruction_strict", "instructions kept"),
    ("prompt_strict", "prompts with every instruction kept"),
    ("refused", "ill-natured prompts refused"),
    ("over_refused", "good-natured prompts refused"),
    ("tokens", "tokens an answer"),
)
"""What rules found, and its heading."""

SIDES = {BEFORE: f"before ({BEFORE})", AFTER: f"after ({AFTER})"}
"""What the two policies are called beside their answers."""

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
    with as_written(run_folder):
        turns = read_run_turns(run_folder)
        names = [SIDES[policy] for policy in turns]
        page = _render(read_run(run_folder), browser_data(names, list(turns.values())))
    path = run_folder / "report.html"
    write_atomically(path, [page.encode()])
    return path


def _render(run: Run, browser: Markup | None) -> str:
    charts, reward_charts = (
        [
            {"title": title, "name": name, "stage": stage, "data": data, "image": _draw(run, name)}
            for title, name, stage, data in listed
        ]
        for listed in (CHARTS, REWARD_CHARTS if run.evaluation else ())
    )
    return render(
        "page.html.j2",
        run=run,
        browser=browser,
        gain=_gain(run),
        columns=COLUMNS,
        check_names=CHECKS,
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


def _draw(run: Run, name: str) -> str | None:
    """The chart as a data address; None where the run lacks what it needs."""
    return image(getattr(figures, f"draw_{name}")(run))

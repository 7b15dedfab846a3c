"""The charts, as SVG for the page and PNG for the README: the same numbers give the same bytes.

Colours are Okabe and Ito's, which remain distinct to colour-blind readers; markers differ too.
matplotlib is imported where something is drawn: it takes longer to load than most commands to run.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starling.base.errors import DataError
from starling.base.estimate import Estimate
from starling.base.files import write_atomically
from starling.report.read import AFTER, BEFORE, Run, as_estimate, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine measures the same text
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "starling",
}


def draw_overoptimisation(run: Run) -> bytes | None:
    """Reward-model score above, gold below, against sequence KL; None without validations."""
    if not run.validations:
        return None
    has_gold = all(point.gold is not None for point in run.validations)
    with _figure(4.7, 4.2 if has_gold else 2.6) as figure:
        panels = figure.subplots(2 if has_gold else 1, 1, sharex=True, squeeze=False)[:, 0]
        _draw_against_kl(panels[0], run, "score", "reward-model score", ORANGE)
        if has_gold:
            _draw_against_kl(panels[1], run, "gold", "gold (0 to 1)", BLUE)
        panels[-1].set_xlabel("sequence KL to the start, nats")
        return _svg(figure)


def draw_length(run: Run) -> bytes | None:
    """Response length and the share of responses that end by themselves, over PPO steps."""
    if not run.ppo_metrics:
        return None
    steps = [row["step"] for row in run.ppo_metrics]
    with _figure(4.7, 4.2) as figure:
        length, ended = figure.subplots(2, 1, sharex=True)
        length.plot(steps, [row["ppo/response_tokens"] for row in run.ppo_metrics], color=BLUE)
        length.set_ylabel("tokens a response")
        length.set_ylim(bottom=0)
        ended.plot(steps, [row["ppo/end_rate"] for row in run.ppo_metrics], color=GREEN)
        ended.set_ylabel("share that ended")
        ended.set_ylim(0, 1.05)
        ended.set_xlabel("PPO step")
        selected = run.figures("ppo").get("selected_step")
        if selected is not None:
            for axes in (length, ended):
                axes.axvline(selected, color=GREY, linestyle=":", linewidth=1.2)
            length.annotate("kept", (selected, 0), (4, 4), textcoords="offset points", color=GREY)
        return _svg(figure)


def draw_accuracy(run: Run) -> bytes | None:
    """Pair accuracy of the reward model beside what answer length alone gives."""
    figures = run.figures("reward")
    found = [as_estimate(figures.get(k)) for k in ("pair_accuracy", "length_only_accuracy")]
    bars = [estimate for estimate in found if estimate is not None]
    if len(bars) < len(found):
        return None
    with _figure(4.7, 2.6) as figure:
        axes = figure.subplots()
        for place, (bar, color) in enumerate(zip(bars, (BLUE, GREY), strict=True)):
            axes.bar(place, bar.mean, width=0.55, color=color)
            axes.errorbar(
                place, bar.mean, yerr=_errors([bar]), color="black", capsize=4, linestyle="none"
            )
            axes.annotate(
                f"{bar.mean:.3f}", (place, 0), (0, 6), textcoords="offset points", ha="center"
            ).set_color("white")
        axes.axhline(0.5, color="black", linestyle="--", linewidth=1)
        axes.annotate("chance", (1.6, 0.5), (0, 3), textcoords="offset points", ha="right")
        axes.set_xlim(-0.6, 1.6)
        axes.set_xticks([0, 1], ["reward model", "length alone"])
        axes.set_ylim(0, 1)
        axes.set_ylabel("held-out pairs in order")
        return _svg(figure)


def draw_positions(run: Run) -> bytes | None:
    """Where the winner was shown, for the number of answers that occurs most often."""
    table = widest_position_table(run)
    if table is None:
        return None
    shares, k = table["winner_share"], table["k"]
    with _figure(4.7, 2.6) as figure:
        axes = figure.subplots()
        axes.bar(range(1, k + 1), shares, width=0.65, color=BLUE)
        axes.axhline(1 / k, color="black", linestyle="--", linewidth=1)
        axes.annotate(
            "no preference", (k + 0.5, 1 / k), (0, 3), textcoords="offset points", ha="right"
        )
        axes.set_ylim(0, max(*shares, 1 / k) * 1.25)
        axes.set_xticks(range(1, k + 1))
        axes.set_xlabel("place at which the judge was shown the answer")
        axes.set_ylabel("share of winners")
        return _svg(figure)


def widest_position_table(run: Run) -> dict[str, Any] | None:
    """The audit's table with the most rankings; None without an audit."""
    tables = run.audit["positions"] if run.audit else []
    return max(tables, key=lambda table: table["rankings"], default=None)


def save_figure(run_folder: Path, path: Path) -> Path:
    """Write the README's figure as PNG: gold by category, and gold against sequence KL.

    Raises DataError when the run has no gold by category or none on validation prompts.
    """
    run = read_run(run_folder)
    categories = run.figures("bench").get("by_category", {})
    golds = {name: figures["gold"] for name, figures in categories.items() if "gold" in figures}
    if not golds or not run.validations or run.validations[0].gold is None:
        raise DataError(
            f"{run_folder} has no gold by category, or none on validation prompts: the figure "
            "needs a finished run whose prompts carry checks, such as that of `starling demo`."
        )
    with _figure(9.0, 3.6) as figure:
        before_after, against_kl = figure.subplots(1, 2)
        _draw_categories(before_after, golds)
        _draw_against_kl(against_kl, run, "gold", "gold on validation prompts", BLUE)
        against_kl.set_xlabel("sequence KL to the start, nats (numbers: PPO steps)")
        against_kl.set_title("What KL buys, and costs", loc="left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    write_atomically(path, [buffer.getvalue()])
    return path


def _draw_categories(axes: "Axes", golds: dict[str, Any]) -> None:
    names = list(reversed(golds))
    places = range(len(names))
    for policy, color, marker, label in (
        (BEFORE, GREY, "o", "before"),
        (AFTER, BLUE, "s", "after PPO"),
    ):
        found = [as_estimate(golds[name][policy]) for name in names]
        estimates = [estimate for estimate in found if estimate is not None]
        axes.errorbar(
            [estimate.mean for estimate in estimates],
            places,
            xerr=_errors(estimates),
            color=color,
            marker=marker,
            linestyle="none",
            capsize=3,
            label=label,
        )
    axes.set_yticks(places, names)
    axes.set_xlim(0, 1)
    axes.set_xlabel("gold (0 to 1), sampled, 95 % intervals")
    axes.set_title("Held-out questions", loc="left")
    axes.legend(loc="lower left")


def _draw_against_kl(axes: "Axes", run: Run, name: str, label: str, color: str) -> None:
    """One estimate of every validation against its KL, in the order of steps."""
    named = [(point, getattr(point, name)) for point in run.validations]
    axes.errorbar(
        [point.kl.mean for point, _ in named],
        [estimate.mean for _, estimate in named],
        yerr=_errors([estimate for _, estimate in named]),
        color=color,
        marker="o",
        elinewidth=0.8,
        capsize=2,
    )
    for point, estimate in named:
        axes.annotate(
            str(point.step),
            (point.kl.mean, estimate.mean),
            (4, -11),
            textcoords="offset points",
            fontsize=7,
            color=GREY,
        )
    kept = run.selected
    if kept is not None:
        axes.plot(
            [kept.kl.mean],
            [getattr(kept, name).mean],
            marker="*",
            markersize=14,
            color="black",
            linestyle="none",
            label=f"kept: step {kept.step}",
            zorder=3,
        )
        axes.legend(loc="best")
    target = run.figures("ppo").get("kl_target")
    if target is not None:
        axes.axvline(target, color=GREY, linestyle=":", linewidth=1.2)
        bottom = axes.get_xaxis_transform()
        axes.annotate("target", (target, 0.02), (3, 0), bottom, "offset points", color=GREY)
    axes.set_ylabel(label)


def _errors(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Distances from the means down and up; none where the interval is not known."""
    return [
        [e.mean - (e.mean if e.low is None else e.low) for e in estimates],
        [(e.mean if e.high is None else e.high) - e.mean for e in estimates],
    ]


@contextmanager
def _figure(width: float, height: float) -> "Iterator[Figure]":
    """A figure in our style, whatever the user's own settings are."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", STYLE]):
        yield Figure(figsize=(width, height), layout="constrained")


def _svg(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    # None leaves each out: the date changes, the rest names addresses that nobody needs.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    return buffer.getvalue()

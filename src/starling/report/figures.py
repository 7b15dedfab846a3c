"""The charts of the page, as SVG: the same numbers give the same bytes.

Colours are Okabe and Ito's, which remain distinct to colour-blind readers; markers differ too.
matplotlib is imported where something is drawn: it takes longer to load than most commands to run.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starling.base.estimate import Estimate
from starling.report.benches import Model
from starling.report.read import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"

BAR_GREY = "#6e6e6e"
"""A bar's grey, which white figures are read on; lines and marks in GREY turn with the theme."""

COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00", BAR_GREY)
"""Of the models of a comparison, in order and again from the first; style.css has them too."""

DARK = {b"#000000": b"currentColor", b"#e4e4e4": b"var(--grid)", b"#767676": b"var(--grey)"}
THEMES = b"""<style>
:root { color: #000; --grid: #e4e4e4; --grey: #767676 }
text { fill: currentColor }
@media (prefers-color-scheme: dark) { :root { color: #e6e8eb; --grid: #3a404a; --grey: #a3abb5 } }
</style>"""
"""What black, the grid and grey are on a dark page; the other colours are read on both."""

MOST_POINTS = 1500
"""Answers drawn of the held-out ones: more make the page heavy and the picture no clearer."""


def draw_overoptimisation(run: Run) -> bytes | None:
    """Reward-model score above, gold below, against sequence KL; None without validations."""
    if not run.validations:
        return None
    has_gold = all(point.gold is not None for point in run.validations)
    with new_figure(4.7, 4.2 if has_gold else 2.6) as figure:
        panels = figure.subplots(2 if has_gold else 1, 1, sharex=True, squeeze=False)[:, 0]
        draw_against_kl(panels[0], run, "score", "reward-model score", ORANGE)
        if has_gold:
            draw_against_kl(panels[1], run, "gold", "gold (0 to 1)", BLUE)
        panels[-1].set_xlabel("sequence KL to the start, nats")
        return _svg(figure)


def draw_length(run: Run) -> bytes | None:
    """Response length and the share of responses that end by themselves, over PPO steps."""
    if not run.ppo_metrics:
        return None
    steps = [row["step"] for row in run.ppo_metrics]
    selected = run.figures("ppo").get("selected_step")
    panels = (
        ("ppo/response_tokens", "tokens a response", BLUE, None),
        ("ppo/end_rate", "share that ended", GREEN, 1.05),
    )
    with new_figure(4.7, 4.2) as figure:
        both = figure.subplots(2, 1, sharex=True)
        for axes, (key, label, color, top) in zip(both, panels, strict=True):
            axes.plot(steps, [row[key] for row in run.ppo_metrics], color=color)
            axes.set_ylabel(label)
            axes.set_ylim(0, top)
            if selected is not None:
                axes.axvline(selected, color=GREY, linestyle=":", linewidth=1.2, label="kept")
                axes.legend(loc="lower right")
        both[1].set_xlabel("PPO step")
        return _svg(figure)


def draw_accuracy(run: Run) -> bytes | None:
    """Pair accuracy of the reward model beside what answer length alone gives."""
    model = run.estimate("reward", "pair_accuracy")
    length = run.estimate("reward", "length_only_accuracy")
    if model is None or length is None:
        return None
    with new_figure(4.7, 2.6) as figure:
        axes = figure.subplots()
        named = {"reward model": model.mean, "length alone": length.mean}
        errors = {"yerr": error_bars([model, length]), "capsize": 4}
        drawn = axes.bar(list(named), list(named.values()), 0.55, color=(BLUE, BAR_GREY), **errors)
        axes.bar_label(drawn, fmt="%.3f", label_type="center", color="white")
        _draw_chance(axes, 0.5, "chance")
        axes.set_ylim(0, 1)
        axes.set_ylabel("held-out pairs in order")
        return _svg(figure)


def draw_best_of_n(run: Run) -> bytes | None:
    """The judge's standing of the answer picked among n: by the model, by the judge, by chance."""
    if run.evaluation is None:
        return None
    curve = run.evaluation["best_of_n"]
    numbers = [point["n"] for point in curve]
    picked = [Estimate(**point["model"]) for point in curve]
    with new_figure(4.7, 2.8) as figure:
        axes = figure.subplots()
        axes.plot(numbers, [point["oracle"] for point in curve], "^:", color=GREEN, label="judge")
        bars = {"yerr": error_bars(picked), "capsize": 2, "label": "reward model"}
        axes.errorbar(numbers, [each.mean for each in picked], color=BLUE, marker="o", **bars)
        _draw_chance(axes, curve[0]["chance"], "chance")
        axes.set_xticks(numbers)
        axes.set_xlabel("answers to choose from")
        axes.set_ylabel("standing (1 best, 0 last)")
        axes.legend(loc="upper left")
        return _svg(figure)


def draw_reliability(run: Run) -> bytes | None:
    """How often the higher score is right, against how sure the model is of it."""
    if run.evaluation is None:
        return None
    bins = run.evaluation["calibration"]["bins"]
    with new_figure(4.7, 2.8) as figure:
        axes = figure.subplots()
        axes.plot([0.5, 1], [0.5, 1], "--", color="black", linewidth=1, label="as sure as right")
        x, y = ([part[name] for part in bins] for name in ("predicted", "observed"))
        axes.plot(x, y, "o-", color=BLUE, label="reward model")
        axes.set_xlabel("probability that it claims")
        axes.set_ylabel("share of pairs in order")
        axes.set_ylim(min(0.45, *y), 1.02)
        axes.legend(loc="upper left")
        return _svg(figure)


def draw_score_against_length(run: Run) -> bytes | None:
    """Score of held-out answers against their length, the judge's best ones marked."""
    if not run.held_out:
        return None
    from matplotlib.ticker import LogLocator, NullLocator

    ids = list(dict.fromkeys(row["id"] for row in run.held_out))
    drawn = set(ids[:: -(-len(run.held_out) // MOST_POINTS)])
    with new_figure(4.7, 2.8) as figure:
        axes = figure.subplots()
        for label, color, is_best in (("others", GREY, False), ("ranked best", BLUE, True)):
            rows = [row for row in run.held_out if row["id"] in drawn]
            rows = [row for row in rows if (row.get("rank") == 1) is is_best]
            x, y = ([row[name] for row in rows] for name in ("chars", "score"))
            axes.scatter(x, y, 9, color=color, alpha=0.5, linewidths=0, label=label)
        axes.set_xscale("log")
        # Plain numbers at 1, 2 and 5: the log scale's own labels run into each other.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("characters of the answer")
        axes.set_ylabel("score, normalised")
        axes.legend(loc="best")
        return _svg(figure)


def draw_length_difference(run: Run) -> bytes | None:
    """Accuracy against how much longer the better answer is."""
    if run.evaluation is None:
        return None
    bins = run.evaluation["by_length_difference"]
    shares = [Estimate(**part["accuracy"]) for part in bins]
    with new_figure(4.7, 2.8) as figure:
        axes = figure.subplots()
        bars = {"yerr": error_bars(shares), "capsize": 2}
        differences = [part["characters"] for part in bins]
        axes.errorbar(differences, [share.mean for share in shares], color=BLUE, marker="o", **bars)
        _draw_chance(axes, 0.5, "chance")
        axes.axvline(0, color=GREY, linestyle=":", linewidth=1.2)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("characters of the better answer beyond the worse one's")
        axes.set_ylabel("held-out pairs in order")
        return _svg(figure)


def draw_positions(run: Run) -> bytes | None:
    """Where the winner was shown, for the number of answers that occurs most often."""
    table = run.widest_position_table
    if table is None:
        return None
    shares = [Estimate(**place["winner_share"]) for place in table["places"].values()]
    k = len(shares)
    means = [share.mean for share in shares]
    with new_figure(4.7, 2.6) as figure:
        axes = figure.subplots()
        errors = {"yerr": error_bars(shares), "capsize": 3}
        axes.bar(range(1, k + 1), means, width=0.65, color=BLUE, **errors)
        _draw_chance(axes, 1 / k, "no preference")
        axes.set_ylim(0, max(*means, *(share.high or 0 for share in shares), 1 / k) * 1.25)
        axes.set_xticks(range(1, k + 1))
        axes.set_xlabel("place at which the judge was shown the answer")
        axes.set_ylabel("share of winners")
        return _svg(figure)


def draw_categories(models: Sequence[Model]) -> bytes | None:
    """A bar for each model in each category, in the models' order; None without categories."""
    categories = list(dict.fromkeys(name for each in models for name in each.categories))
    if not categories:
        return None
    step = 0.82 / len(models)
    with new_figure(4.1, 0.5 + len(categories) * (0.16 + 0.13 * len(models))) as figure:
        axes = figure.subplots()
        for number, model in enumerate(models):
            estimates = [model.categories[name] for name in categories if name in model.categories]
            own = [row for row, name in enumerate(categories) if name in model.categories]
            heights = [row + (number - (len(models) - 1) / 2) * step for row in own]
            means = [each.mean for each in estimates]
            errors = {"xerr": error_bars(estimates), "error_kw": {"elinewidth": 1, "capsize": 2}}
            axes.barh(heights, means, step * 0.9, color=COLORS[number % len(COLORS)], **errors)
        # Names come from files: matplotlib must not read formulas in them, nor XML control signs.
        shown = ["".join(c if c.isprintable() else "?" for c in name)[:24] for name in categories]
        axes.set_yticks(range(len(categories)), shown, parse_math=False)
        axes.set_ylim(len(categories) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 10.1)  # so that an interval's end at 10 is seen
        axes.set_xticks(range(0, 11, 2))
        axes.set_xlabel("judge's score, 1 to 10")
        return _svg(figure)


def _draw_chance(axes: "Axes", height: float, label: str) -> None:
    axes.axhline(height, color="black", linestyle="--", linewidth=1)
    right = axes.get_yaxis_transform()
    axes.annotate(label, (1, height), (0, 3), right, "offset points", ha="right")


def draw_against_kl(axes: "Axes", run: Run, name: str, label: str, color: str) -> None:
    """One estimate of every validation against its KL, in the order of steps."""
    kls = [point.kl.mean for point in run.validations]
    estimates = [getattr(point, name) for point in run.validations]
    means = [estimate.mean for estimate in estimates]
    bars = {"yerr": error_bars(estimates), "capsize": 2, "elinewidth": 0.8}
    axes.errorbar(kls, means, color=color, marker="o", **bars)
    text: dict[str, Any] = {"textcoords": "offset points", "color": GREY}
    for point, kl, mean in zip(run.validations, kls, means, strict=True):
        axes.annotate(str(point.step), (kl, mean), (4, -11), fontsize=7, **text)
    kept = run.selected
    if kept is not None:
        star: dict[str, Any] = {"marker": "*", "markersize": 14, "linestyle": "none", "zorder": 3}
        place = ([kept.kl.mean], [getattr(kept, name).mean])
        axes.plot(*place, color="black", label=f"kept: step {kept.step}", **star)
        axes.legend(loc="best")
    target = run.figures("ppo").get("kl_target")
    if target is not None:
        axes.axvline(target, color=GREY, linestyle=":", linewidth=1.2)
        bottom = axes.get_xaxis_transform()
        axes.annotate("target", (target, 0.02), (3, 0), xycoords=bottom, **text)
    axes.set_ylabel(label)


def error_bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Distances from the means down and up; none where the interval is not known.

    Rounding can put an end on the wrong side of its mean by the last digit.
    """
    return [
        [0.0 if e.low is None else max(0.0, e.mean - e.low) for e in estimates],
        [0.0 if e.high is None else max(0.0, e.high - e.mean) for e in estimates],
    ]


@contextmanager
def new_figure(width: float, height: float) -> "Iterator[Figure]":
    """A figure in our style, whatever the user's own settings are."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", "starling.report.style"]):
        yield Figure(figsize=(width, height), layout="constrained")


def _svg(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    # None leaves each out: the date changes, the rest names addresses that nobody needs.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, facecolor="none")
    drawn = buffer.getvalue()
    for color, both in DARK.items():
        drawn = drawn.replace(color, both)
    return drawn.replace(b"<defs>", THEMES + b"<defs>", 1)

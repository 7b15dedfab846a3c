"""The sentences under the charts and at the top of the page, from the figures they speak of."""

from collections.abc import Sequence

from starling.report.figures import widest_position_table
from starling.report.read import AFTER, BEFORE, Run, ValidationPoint, as_estimate


def explain_overoptimisation(run: Run) -> str:
    """What was kept, and whether the reward model's score went on rising where gold fell."""
    points, kept = run.validations, run.selected
    text = "Each point is the policy at one step on the validation prompts, in the order of steps. "
    if kept is not None:
        text += (
            f"Step {kept.step} of {points[-1].step} was kept, at {kept.kl.mean:.2f} nats; "
            f"the reward-model score there is {kept.score.mean:.2f}"
        )
        text += f" and gold {kept.gold.mean:.3f}. " if kept.gold is not None else ". "
    return text + _explain_gold(points)


def _explain_gold(points: Sequence[ValidationPoint]) -> str:
    golds = [point.gold.mean for point in points if point.gold is not None]
    if len(golds) < len(points):
        return "These prompts carry no checks, so there is no gold to compare with."
    best = golds.index(max(golds))
    seen = f"Gold, which neither training nor selection saw, is highest at step {points[best].step}"
    seen += f" ({golds[best]:.3f})"
    score = points[best].score.mean
    later = [p for p in points[best + 1 :] if p.score.mean > score]
    if not later:
        return f"{seen}; the reward-model score does not rise after it: no over-optimisation."
    highest = max(later, key=lambda point: point.score.mean)
    return (
        f"{seen}. After it the reward-model score still rises, from {score:.2f} to "
        f"{highest.score.mean:.2f} at step {highest.step}, where gold is "
        f"{golds[points.index(highest)]:.3f}: over-optimisation, as far as the intervals tell the "
        "two apart."
    )


def explain_length(run: Run) -> str:
    """Length and end rate at the first and the last step."""
    seen = [
        f"{row['ppo/response_tokens']:.1f} tokens at step {row['step']}, where "
        f"{row['ppo/end_rate']:.1%} ended by themselves"
        for row in (run.ppo_metrics[0], run.ppo_metrics[-1])
    ]
    return (
        f"Responses of the rollouts: {'; '.join(seen)}. A score that rises only with length would "
        "show here."
    )


def explain_accuracy(run: Run) -> str:
    """Pair accuracy, its baseline, and the prompts they were measured on."""
    figures = run.figures("reward")
    accuracy = as_estimate(figures.get("pair_accuracy"))
    length_only = as_estimate(figures.get("length_only_accuracy"))
    return (
        f"Pairs of held-out rankings whose better answer scores higher: {accuracy}. The better of "
        f"'longer wins' and 'shorter wins' gives {length_only}. Intervals are over prompts."
    )


def explain_positions(run: Run) -> str:
    """The chi-square of the winners' places, and the other tables it leaves out."""
    table = widest_position_table(run)
    assert table is not None, "asked only where there is an audit"
    found = "a bias that chance does not explain" if table["is_biased"] else "no sign of a bias"
    rest = len(run.audit["positions"]) - 1 if run.audit else 0
    more = f" {rest} more table(s), for other numbers of answers: feedback/audit.json." * bool(rest)
    return (
        f"{table['rankings']} rankings of {table['k']} answers, shown in a drawn order. "
        f"Chi-square {table['chi_square']:.1f}, at most {table['critical_99']:.1f} in 99 of 100 "
        f"runs without a preference: {found}.{more}"
    )


def explain_gain(run: Run) -> str | None:
    """The page's first sentence: what the bench says changed; None without a bench."""
    bench = run.figures("bench")
    parts = []
    named = {"gold": "gold, sampled,", "gold_greedy": "gold, greedy,", "score": "judge's score"}
    for name, label in named.items():
        before, after = (as_estimate(bench.get(name, {}).get(side)) for side in (BEFORE, AFTER))
        if before is not None and after is not None:
            parts.append(f"{label} {before.mean:.2f} before and {after.mean:.2f} after")
    wins = as_estimate(bench.get("win_rate"))
    if wins is not None:
        parts.append(f"the judge prefers the new answers in {wins.mean:.0%} of the comparisons")
    return "On held-out questions: " + "; ".join(parts) + "." if parts else None

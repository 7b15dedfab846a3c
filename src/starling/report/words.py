"""The sentences under the charts and at the end of the page, from the figures they speak of."""

from collections.abc import Sequence

from starling.report.figures import widest_position_table
from starling.report.read import AFTER, BEFORE, Run, ValidationPoint, as_estimate

LIMITS_OF_DEMO = (
    "The demo's world is small and made for it: tasks from templates, answers of a few words, and "
    "a policy of under a million parameters that had first learned a mixture of good and bad "
    "answers. PPO chooses among what that policy already says; it teaches it no new facts. The "
    "judge is a rule with noise, and gold is the same rule without it, so judge and gold agree "
    "more than any real judge agrees with people. These figures show that the parts work together "
    "on held-out prompts of the same kind. They do not show what the recipe gains on a real model, "
    "with real prompts and a real judge; and their intervals cover the choice of prompts, not of "
    "the seed: run another seed to see that."
)

LIMITS_OF_RUN = (
    "Every judgement here is one judge's opinion, and the reward model learned from the same kind "
    "of opinion: a policy may please the judge without being better for people. The intervals "
    "cover the choice of prompts, not of the seed, nor what another judge would say. Read the "
    "answers before trusting the averages."
)


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
    later = points[best + 1 :]
    if not later:
        return f"{seen}, the last: no over-optimisation is seen in this run."
    highest = max(later, key=lambda point: point.score.mean)
    if highest.score.mean > points[best].score.mean:
        return (
            f"{seen}. After it the reward-model score still rises, from "
            f"{points[best].score.mean:.2f} to {highest.score.mean:.2f} at step {highest.step}, "
            f"where gold is {golds[points.index(highest)]:.3f}: over-optimisation, as far as the "
            "intervals tell the two apart."
        )
    return f"{seen}; after it the reward-model score does not rise further either."


def explain_length(run: Run) -> str:
    """Length and end rate at the first and the last step."""
    first, last = run.ppo_metrics[0], run.ppo_metrics[-1]
    return (
        f"Responses of the rollouts: {first['ppo/response_tokens']:.1f} tokens at step "
        f"{first['step']}, {last['ppo/response_tokens']:.1f} at step {last['step']}; "
        f"{first['ppo/end_rate']:.1%} and {last['ppo/end_rate']:.1%} of them ended by themselves. "
        "A score that rises only with length would show here."
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
    named = [
        ("gold, sampled,", "gold"),
        ("gold, greedy,", "gold_greedy"),
        ("judge's score", "score"),
    ]
    parts = []
    for label, name in named:
        before, after = (as_estimate(bench.get(name, {}).get(side)) for side in (BEFORE, AFTER))
        if before is not None and after is not None:
            parts.append(f"{label} {before.mean:.2f} before and {after.mean:.2f} after")
    wins = as_estimate(bench.get("win_rate"))
    if wins is not None:
        parts.append(f"the judge prefers the new answers in {wins.mean:.0%} of the comparisons")
    return "On held-out questions: " + "; ".join(parts) + "." if parts else None

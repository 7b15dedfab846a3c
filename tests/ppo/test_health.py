"""The guards by values at, under and over their limits; healthy and hacked runs, simulated."""

import json
import math
from dataclasses import asdict
from random import Random

import pytest

from starling.ppo.config import Guards
from starling.ppo.health import GUARDS, Health, health_line

ROLLOUT = {
    "ppo/score": 0.42,
    "ppo/sequence_kl": 1.0,
    "ppo/sampler_mismatch": 0.001,
    "ppo/entropy": 0.8,
    "ppo/explained_variance": 0.5,
    "ppo/end_rate": 0.98,
    "ppo/response_tokens": 10.0,
    "ppo/shaped_score_std": 0.9,
    "ppo/score_length_correlation": 0.1,
}
UPDATE = {
    "ppo/clip_fraction": 0.08,
    "ppo/approx_kl": 0.02,
    "ppo/first_approx_kl": 1e-9,
    "ppo/ratio": 1.01,
}
WARMUP = 5


def settled(guards: Guards | None = None, kl_target: float | None = None) -> Health:
    health = Health(guards or Guards(), kl_target)
    for step in range(1, WARMUP + 1):
        assert health.check(step, ROLLOUT) == []
    return health


def names(flags: list) -> list[str]:
    return [flag.guard for flag in flags]


# By guard: a metric, its value on the limit of the defaults, and one beyond it.
EDGES = [
    ("max_sequence_kl", "ppo/sequence_kl", 8.0, 8.01),
    ("min_sequence_kl", "ppo/sequence_kl", -0.5, -0.51),
    ("max_sampler_mismatch", "ppo/sampler_mismatch", 0.1, 0.101),
    ("min_entropy", "ppo/entropy", 0.01, 0.0099),
    ("min_score_std", "ppo/shaped_score_std", 1e-4, 0.0),
    ("min_explained_variance", "ppo/explained_variance", -2.0, -2.01),
    ("min_end_rate", "ppo/end_rate", 0.5, 0.49),
    ("max_length_ratio", "ppo/response_tokens", 15.0, 15.01),
]


@pytest.mark.parametrize(("guard", "metric", "at", "beyond"), EDGES)
def test_a_rollout_guard_speaks_beyond_its_limit_and_not_at_it(
    guard: str, metric: str, at: float, beyond: float
) -> None:
    assert settled(kl_target=2.0).check(6, {**ROLLOUT, metric: at}) == []
    flags = settled(kl_target=2.0).check(6, {**ROLLOUT, metric: beyond})
    assert [(flag.step, flag.guard) for flag in flags] == [(6, guard)]
    assert "less than" in flags[0].sentence or "more than" in flags[0].sentence


UPDATE_EDGES = [
    ("max_clip_fraction", "ppo/clip_fraction", 0.5, 0.51),
    ("max_approx_kl", "ppo/approx_kl", 0.5, 0.51),
    ("max_first_approx_kl", "ppo/first_approx_kl", 0.01, 0.0101),
    ("max_ratio", "ppo/ratio", 2.0, 2.01),
]


@pytest.mark.parametrize(("guard", "metric", "at", "beyond"), UPDATE_EDGES)
def test_an_update_is_flagged_at_once_and_speaks_against_the_next_batch_only(
    guard: str, metric: str, at: float, beyond: float
) -> None:
    health = settled()
    assert health.check_update(5, {**UPDATE, metric: at}) == []
    assert health.check(6, ROLLOUT) == []
    raised = health.check_update(6, {**UPDATE, metric: beyond})
    assert [(flag.step, flag.guard, flag.found, flag.limit) for flag in raised] == [
        (6, guard, beyond, at)
    ]
    assert health.check(7, {**ROLLOUT, "ppo/entropy": 0.0})[:1] == raised
    assert health.check(8, ROLLOUT) == []
    assert names(health.flags) == [guard, "min_entropy"]


def test_every_limit_has_one_guard_that_null_switches_off() -> None:
    limits = set(Guards.model_fields) - {"action", "warmup"}
    assert {guard.name for guard in GUARDS} == limits
    assert len(GUARDS) == len(limits)
    tried = {edge[0] for edge in (*EDGES, *UPDATE_EDGES)}
    assert tried | {"max_length_correlation"} == limits
    health = settled(Guards.model_validate(dict.fromkeys(limits)))
    beyond = {metric: value for _, metric, _, value in EDGES} | {"ppo/sequence_kl": -9.0}
    for step in range(6, 6 + WARMUP):
        assert health.check(step, {**beyond, "ppo/score_length_correlation": 1.0}) == []
        assert health.check_update(step, dict.fromkeys(UPDATE, 9.0)) == []


def test_without_a_kl_target_only_a_limit_of_its_own_bounds_the_kl() -> None:
    far = {**ROLLOUT, "ppo/sequence_kl": 50.0}
    assert settled().check(6, far) == []
    flags = settled(Guards(max_sequence_kl=49.0), kl_target=100.0).check(6, far)
    assert [(flag.guard, flag.limit) for flag in flags] == [("max_sequence_kl", 49.0)]


@pytest.mark.parametrize(
    ("metric", "value"), [("ppo/explained_variance", -9.0), ("ppo/end_rate", 0.1)]
)
def test_what_needs_time_is_not_watched_in_the_first_iterations(metric: str, value: float) -> None:
    health = Health(Guards())
    raised = [health.check(step, {**ROLLOUT, metric: value}) for step in range(1, WARMUP + 2)]
    assert raised[:-1] == [[]] * WARMUP
    assert len(raised[-1]) == 1


def test_lengths_are_compared_with_the_mean_of_the_first_iterations() -> None:
    health = Health(Guards())
    for step, tokens in enumerate((8.0, 9.0, 10.0, 11.0, 12.0), start=1):
        assert health.check(step, {**ROLLOUT, "ppo/response_tokens": tokens}) == []
    for tokens in (3.0, 15.0):
        assert health.check(6, {**ROLLOUT, "ppo/response_tokens": tokens}) == []
    flag = health.check(8, {**ROLLOUT, "ppo/response_tokens": 16.0})[0]
    assert (flag.guard, flag.found, flag.limit) == ("max_length_ratio", 1.6, 1.5)
    assert "1.60 times as long" in flag.sentence


def test_correlation_is_the_mean_of_the_last_iterations_that_have_one() -> None:
    health = Health(Guards(warmup=3))
    given = [1.0, None, 1.0, 0.7, 1.0, 1.01, 0.5]
    # Means of three: 0.9, 0.9, 0.9033, 0.8367.
    found = []
    for step, correlation in enumerate(given, start=1):
        metrics = {**ROLLOUT, "ppo/score_length_correlation": correlation}
        kept = {name: value for name, value in metrics.items() if value is not None}
        found.append(names(health.check(step, kept)))
    assert found == [[], [], [], [], [], ["max_length_correlation"], []]
    assert health.flags[0].found == pytest.approx(2.71 / 3)
    early = Health(Guards(warmup=3, max_length_correlation=0.3))
    high = {**ROLLOUT, "ppo/score_length_correlation": 1.0}
    assert [len(early.check(step, high)) for step in (1, 2, 3)] == [0, 0, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_flagged_whatever_the_limits_and_leaves_no_trace(
    value: float,
) -> None:
    health = Health(Guards(max_length_ratio=None), kl_target=1.0)
    for metric in ROLLOUT:
        flags = health.check(1, {**ROLLOUT, metric: value})
        assert [(flag.guard, flag.found, flag.limit) for flag in flags] == [("finite", None, None)]
        assert f"{metric} is {value}" in flags[0].sentence
    assert names(health.check_update(1, {**UPDATE, "ppo/policy_loss": value})) == ["finite"]
    json.dumps(health.state(), allow_nan=False)
    assert all(tokens == 10.0 for tokens in health.start_tokens)
    assert all(correlation == 0.1 for correlation in health.correlations)


def test_a_missing_metric_is_an_error_but_for_those_that_may_be_absent() -> None:
    optional = {
        "ppo/score",
        "ppo/explained_variance",
        "ppo/sampler_mismatch",
        "ppo/score_length_correlation",
    }
    for metric in ROLLOUT:
        health = settled()
        rest = {name: value for name, value in ROLLOUT.items() if name != metric}
        if metric in optional:
            assert health.check(6, rest) == []
        else:
            with pytest.raises(KeyError, match=metric):
                health.check(6, rest)
    with pytest.raises(KeyError, match="ppo/"):
        settled().check_update(6, {"ppo/clip_fraction": 0.1})


def course(random: Random, steps: int, *, hack: float = 0.0) -> list[tuple[dict, dict]]:
    """Noisy rollouts and updates; `hack` is the growth of lengths a step where length is scored."""
    rows = []
    for step in range(steps):
        share = step / steps

        def noisy(value: float, spread: float) -> float:
            return value + random.gauss(0, spread)

        rollout = {
            "ppo/score": noisy(2 * share, 0.1),
            "ppo/sequence_kl": noisy(min(2.0, step / 10), 0.2),
            "ppo/sampler_mismatch": abs(noisy(1e-3, 1e-3)),
            "ppo/entropy": noisy(0.9 - 0.5 * share, 0.05),
            "ppo/explained_variance": noisy(0.5 - 0.5 * 0.8**step, 0.2),
            "ppo/end_rate": min(1.0, noisy(0.96, 0.02)),
            "ppo/response_tokens": noisy(11 * (1 + hack) ** step, 0.7),
            "ppo/shaped_score_std": noisy(0.9, 0.1),
            "ppo/score_length_correlation": noisy(0.97 if hack else 0.2, 0.01 if hack else 0.15),
        }
        update = UPDATE | {"ppo/clip_fraction": abs(noisy(0.1, 0.04))}
        rows.append((rollout, update | {"ppo/approx_kl": abs(noisy(0.02, 0.01))}))
    return rows


def run_guards(health: Health, rows: list[tuple[dict, dict]], first: int = 1) -> Health:
    for step, (rollout, update) in enumerate(rows, start=first):
        health.check(step, rollout)
        health.check_update(step, update)
    return health


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_nothing(seed: int) -> None:
    assert run_guards(Health(Guards(), 2.0), course(Random(seed), 100)).flags == []


@pytest.mark.parametrize("seed", range(5))
def test_a_reward_for_length_is_flagged_within_six_iterations_and_again_by_the_lengths(
    seed: int,
) -> None:
    rows = course(Random(seed), 40, hack=0.04)
    flags = run_guards(Health(Guards(), 2.0), rows).flags
    first = {flag.guard: flag.step for flag in reversed(flags)}
    assert first["max_length_correlation"] == WARMUP
    # Beyond 1.5 times the mean of the first five after 1 + 2 + log(1.5) / log(1.04) = 13.3 steps.
    assert first["max_length_ratio"] <= 20


@pytest.mark.parametrize("cut", [3, 7, 20])
def test_a_resumed_run_raises_the_same_flags(cut: int) -> None:
    rows = course(Random(1), 40, hack=0.04)
    rows[cut - 1][1]["ppo/approx_kl"] = 0.9
    rows[5][0]["ppo/entropy"] = math.nan
    whole = run_guards(Health(Guards(), 2.0), rows)
    stored = json.loads(json.dumps(run_guards(Health(Guards(), 2.0), rows[:cut]).state()))
    resumed = Health.resume(stored, Guards(), 2.0)
    assert resumed.num_pending == 1
    assert run_guards(resumed, rows[cut:], first=cut + 1).state() == whole.state()
    assert Health.resume({}, Guards(), 2.0) == Health(Guards(), 2.0)


def test_a_state_of_other_fields_is_refused() -> None:
    state = settled().state()
    for wrong in ({**state, "more": 1}, {k: v for k, v in state.items() if k != "num_seen"}):
        with pytest.raises(ValueError, match="num_seen"):
            Health.resume(wrong, Guards(), None)


def test_a_flag_says_what_was_found_and_what_to_do() -> None:
    flags = settled().check(6, {**ROLLOUT, "ppo/end_rate": 0.25, "ppo/score": math.nan})
    assert [asdict(flag) for flag in flags] == [
        {
            "step": 6,
            "guard": "finite",
            "found": None,
            "limit": None,
            "sentence": "ppo/score is nan, which no update can learn from: lower ppo.lr, and look "
            "at the reward model's scores and the policy's weights.",
        },
        {
            "step": 6,
            "guard": "min_end_rate",
            "found": 0.25,
            "limit": 0.5,
            "sentence": "Only 25.0% of the responses ended by themselves, less than 50.0%: the "
            "others were cut; set ppo.missing_end_penalty or raise ppo.max_response_tokens.",
        },
    ]


def test_the_health_line_is_short_and_leaves_out_what_is_absent() -> None:
    metrics = {**ROLLOUT, **UPDATE, "ppo/sequence_kl": 1.94}
    line = "score 0.42  kl 1.9/2.0  len 10.0  end 98%  clip 8%  ev 0.50"
    assert health_line(metrics, kl_target=2.0) == line
    assert health_line({"ppo/sequence_kl": 1.94}) == "kl 1.9"

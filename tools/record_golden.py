"""Write docs/golden/ppo.json: what PPO's formulas give, worked out without Starling or torch.

    python tools/record_golden.py

Every number comes from a formula written out here in Python's floats; docs/golden.md says how the
file is read.  Ten significant digits are kept, so that any machine writes the same bytes.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parents[1] / "docs" / "golden" / "ppo.json"

Rows = Sequence[Sequence[float]]
Case = dict[str, Any]

JUNK = 99.0
"""What stands at masked positions: it must not matter."""


def golden() -> dict[str, Any]:
    """The whole file."""
    parts = (_of_a_rollout, _of_the_reward, _of_the_advantage, _of_the_losses, _of_the_optimizer,
             _of_other_methods)  # fmt: skip
    groups = _rounded({name: group for part in parts for name, group in part().items()})
    about = "Inputs and outputs of the formulas of PPO for language models; see docs/golden.md"
    return {"about": about, "tolerance": {"relative": 1e-5, "absolute": 1e-5}, "groups": groups}


def text() -> str:
    """The file's content: JSON with a case a line."""
    whole = golden()
    lines = [
        f"  {json.dumps(name)}: {{\n   "
        + "".join(f'"{key}": {json.dumps(group[key])}, ' for key in ("item", "formula"))
        + '"cases": [\n    '
        + ",\n    ".join(map(json.dumps, group["cases"]))
        + "\n   ]\n  }"
        for name, group in whole.pop("groups").items()
    ]
    return json.dumps(whole)[:-1] + ', "groups": {\n' + ",\n".join(lines) + "\n}}\n"


def _group(item: int | str, formula: str, cases: list[Case]) -> dict[str, Any]:
    return {"item": item, "formula": formula, "cases": cases}


def _case(name: str, given: Case, expected: Case, **otherwise: Any) -> Case:
    found = {"name": name, "given": given, "expected": expected}
    return found | ({"otherwise": otherwise} if otherwise else {})


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.10g}") if isinstance(value, float) else value


def _of_a_rollout() -> dict[str, Any]:
    logits, token = [1.0, -0.5, 0.25, 2.0], 2
    tempered = []
    for temperature in (1.0, 0.7):
        total = math.fsum(math.exp(logit / temperature) for logit in logits)
        logprob = logits[token] / temperature - math.log(total)
        given = {"logits": logits, "token": token, "temperature": temperature}
        tempered.append(_case(f"temperature {temperature}", given, {"logprob": logprob}))
    values = [[0.5, -1.0, JUNK], [2.0, JUNK, JUNK]]
    mask = [[True, True, False], [True, False, False]]
    mean = _case("two rows", {"values": values, "mask": mask}, {"mean": 0.5}, mean_of_means=0.875)
    old, sampler = [-0.7, -1.2, -2.0, JUNK], [-0.9, -2.9, -1.5, 0.0]
    weights = [min(math.exp(a - b), 2.0) for a, b in zip(old[:3], sampler[:3], strict=True)]
    given = {
        "old_logprobs": [old], "sampler_logprobs": [sampler],
        "mask": [[True, True, True, False]], "cap": 2.0,
    }  # fmt: skip
    weighed = _case("one above the cap", given, {"weights": [[*weights, 0.0]]})
    return {
        "temperature": _group(11, "log softmax(logits / temperature) at the token", tempered),
        "importance_weights": _group(16, "min(exp(old - sampler), cap); 0 if masked", [weighed]),
        "masked_mean": _group(19, "sum of kept / number of kept", [mean]),
    }


def _of_the_reward() -> dict[str, Any]:
    ends = {"scores": [3.0, 3.0], "is_finished": [True, False], "penalty": -1.0}
    missing = _case("3 without an end", ends, {"replaced": [3.0, -1.0], "added": [3.0, 2.0]})
    raw, shape = [-8.0, -6.0, -14.0, 0.0], {"centre": -8.0, "clip": 3.0, "scale": 2.0, "shift": 0.5}
    shaped = [min(max(score + 8, -3), 3) / 2 + 0.5 for score in raw]
    unclipped = [(score + 8) / 2 + 0.5 for score in raw]
    too_early = [(min(max(score, -3), 3) + 8) / 2 + 0.5 for score in raw]
    shaping = [
        _case("clipped", {"scores": raw, **shape}, {"scores": shaped}, clip_first=too_early),
        _case("not clipped", {"scores": raw, **shape, "clip": None}, {"scores": unclipped}),
    ]
    kl = [[JUNK, 0.5, -1.0, JUNK], [JUNK, 1.0, 2.0, 3.0]]
    mask = [[False, True, True, False], [False, True, True, True]]
    given = {"scores": [4.0, -2.0], "kl": kl, "mask": mask, "kl_coef": 0.1}
    placed = _case(
        "a short and a full response", given,
        {"rewards": [[0, -0.05, 0.1 + 4, 0], [0, -0.1, -0.2, -0.3 - 2]]},
        at_the_first_padding=[[0, -0.05, 0.1, 4], [0, -0.1, -0.2, -2.3]],
    )  # fmt: skip
    even = {"scores": [2.0, -1.0], "mask": mask, "gamma": 1.0, "gae_lambda": 0.95}
    reaching = _case(
        "values zero, no penalty", even,
        {"advantages": [[0, 2 * 0.95, 2, 0], [0, -(0.95**2), -0.95, -1]]},
        score_after_the_end=[[0, 2 * 0.95**2, 2 * 0.95, 0], [0, -(0.95**2), -0.95, -1]],
    )  # fmt: skip
    table = [
        (6.0, 1),
        (6.6, 1.00512),
        (7.2, 1.01024),
        (60.0, 1.01024),
        (4.8, 0.98976),
        (0, 0.98976),
    ]
    followed = [
        _case(
            f"measured {measured}",
            {"coef": 0.15, "target": 6.0, "horizon": 10_000, "episodes": 512, "measured": measured},
            {"coef": 0.15 * factor},
        )
        for measured, factor in table
    ]
    return {
        "missing_end": _group(14, "no end marker: the penalty replaces, or is added", [missing]),
        "score_placement": _group(17, "-kl_coef * kl, plus the score at the last token", [placed]),
        "score_to_advantage": _group(17, "the end's advantage is the whole score", [reaching]),
        "kl_estimators": _group(18, "k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d", _estimators()),
        "kl_expectation": _group(18, "means over the policy; gradients by logits", [_exact_kl()]),
        "sequence_kl": _group(
            20, "sum over kept tokens",
            [_case("two rows", {"kl": kl, "mask": mask}, {"sums": [-0.5, 6.0]}, means=[-0.25, 2])],
        ),
        "controller": _group(
            20, "coef * (1 + clip(measured / target - 1, -0.2, 0.2) * episodes / horizon)", followed
        ),
        "score_shaping": _group(22, "clip(score - centre, -c, c) / scale + shift", shaping),
    }  # fmt: skip


def _estimators() -> list[Case]:
    return [
        _case(
            f"log ratio {d}",
            {"logprob": -1.0, "ref_logprob": -1.0 - d},
            {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d},
        )
        for d in (0.1, -0.1, 2.0)
    ]


def _exact_kl() -> Case:
    policy, reference = [0.1, 0.2, 0.3, 0.15, 0.25], [0.3, 0.1, 0.2, 0.2, 0.2]
    pairs = list(zip(policy, reference, strict=True))
    kl = math.fsum(p * math.log(p / q) for p, q in pairs)
    expected = {
        "k1": kl,
        "k2": math.fsum(p * math.log(p / q) ** 2 / 2 for p, q in pairs),
        "k3": kl,
        "gradient_of_k1": [0.0] * 5,
        "gradient_of_k2": [p * (math.log(p / q) - kl) for p, q in pairs],
        "gradient_of_k3": [p - q for p, q in pairs],
    }
    return _case("five tokens", {"policy": policy, "reference": reference}, expected)


def _of_the_advantage() -> dict[str, Any]:
    nine = [[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]]
    flat = [number for row in nine for number in row]
    mean, full = statistics.fmean(flat), [[True] * 3] * 3
    divisors = (statistics.pvariance(flat), statistics.variance(flat))
    population, bessel = (
        [[mean + (number - mean) / math.sqrt(variance + 1e-8) for number in row] for row in nine]
        for variance in divisors
    )
    scaled = _case(
        "nine rewards", {"rewards": nine, "mask": full}, {"rewards": population}, bessel=bessel
    )
    some, mask = [[0.3, -1.2, JUNK], [2.0, 0.4, 0.1]], [[True, True, False], [True] * 3]
    kept = [0.3, -1.2, 2.0, 0.4, 0.1]
    centre, deviation = statistics.fmean(kept), math.sqrt(statistics.pvariance(kept) + 1e-8)
    white = [(number - centre) / deviation for number in kept]
    whitened = _case(
        "five of six", {"advantages": some, "mask": mask},
        {"advantages": [[*white[:2], 0.0], white[2:]]},
    )  # fmt: skip
    rewards, values = [0.0, 0.0, 1.0], [0.2, 0.4, 0.6]
    plain = [_gae(f"lambda {lam}", rewards, values, gamma=1.0, lam=lam) for lam in (0.95, 1.0, 0.0)]
    plain.append(_gae("gamma 0.9", [0.1, -0.5, 2.0], [0.3, 0.0, -1.0], gamma=0.9, lam=0.8))
    gaps = [
        _gae("padding after", [0.1, -0.5, None], [0.3, 0.7, None], gamma=0.9, lam=0.8),
        _gae("padding before", [None, 0.1, -0.5], [None, 0.3, 0.7], gamma=0.9, lam=0.8),
        _gae("an observation inside", [0.1, None, None, -0.5], [0.3, None, None, 0.7], 0.9, 0.8),
    ]
    return {
        "reward_whitening": _group(23, "(r - mean) / sqrt(var + 1e-8) + mean", [scaled]),
        "gae": _group(24, "A_t = d_t + gamma lambda A_t+1; returns are A + V", plain),
        "gae_masked": _group("25, 27", "as gae, over kept tokens alone; 0 elsewhere", gaps),
        "advantage_whitening": _group(28, "(A - mean) / sqrt(var + 1e-8); 0 elsewhere", [whitened]),
    }


def _gae(
    name: str,
    rewards: Sequence[float | None],
    values: Sequence[float | None],
    gamma: float,
    lam: float,
) -> Case:
    """Schulman et al. 2016, eq. 16: the double sum over what is kept; None is masked."""
    r = [reward for reward in rewards if reward is not None]
    v = [value for value in values if value is not None] + [0.0]
    errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
    sums = [
        math.fsum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(r)))
        for t in range(len(r))
    ]
    own = iter(zip(sums, v, strict=False))
    both = [(0.0, 0.0) if each is None else next(own) for each in rewards]
    given = {
        "rewards": [[JUNK if each is None else each for each in rewards]],
        "values": [[JUNK if each is None else each for each in values]],
        "mask": [[each is not None for each in rewards]],
        "gamma": gamma,
        "gae_lambda": lam,
    }
    advantages, returns = [[a for a, _ in both]], [[a + value for a, value in both]]
    return _case(name, given, {"advantages": advantages, "returns": returns})


def _of_the_losses() -> dict[str, Any]:
    policy = [
        _policy(ratio, advantage) for advantage in (2.0, -2.0) for ratio in (1.5, 0.5, 1.1, 0.9)
    ]
    value = [
        _value("towards the target, too far", 0.5, 0.0, 1.0),
        _value("away from the target", -0.5, 0.0, 1.0),
        _value("within the range", 0.1, 0.0, 1.0),
        _value("past the target", 0.25, 0.0, 0.3),
        _value("no clip", 0.5, 0.0, 1.0, clip=None),
    ]
    logprobs = [[-1.0, -2.0, -3.0, -6.0], [-4.0, JUNK, JUNK, JUNK]]
    mask = [[True] * 4, [True, False, False, False]]
    reduced = _case(
        "four tokens and one", {"logprobs": logprobs, "mask": mask},
        {"loss": 16 / 5, "gradient": [[-1 / 5] * 4, [-1 / 5, 0, 0, 0]]},
        mean_of_means=(3 + 4) / 2,
    )  # fmt: skip
    return {
        "policy_loss": _group(
            30, "max(-A r, -A clip(r, 1 - c, 1 + c)); r = exp(new - old)", policy
        ),
        "value_loss": _group(30, "max((v - R)^2, (clip(v, old - c, old + c) - R)^2) / 2", value),
        "loss_reduction": _group(31, "sum of -logprob over kept tokens / their number", [reduced]),
    }


def _policy(ratio: float, advantage: float) -> Case:
    old = -1.25
    near = min(max(ratio, 0.8), 1.2)
    loss = max(-advantage * ratio, -advantage * near)
    is_clipped = -advantage * near > -advantage * ratio
    given = {
        "logprob": old + math.log(ratio), "old_logprob": old,
        "advantage": advantage, "clip_range": 0.2,
    }  # fmt: skip
    gradient = 0.0 if is_clipped else -advantage * ratio
    expected = {"loss": loss, "is_clipped": is_clipped, "gradient": gradient}
    return _case(f"ratio {ratio}, advantage {advantage}", given, expected)


def _value(name: str, now: float, old: float, target: float, clip: float | None = 0.2) -> Case:
    near = now if clip is None else min(max(now, old - clip), old + clip)
    is_clipped = (near - target) ** 2 > (now - target) ** 2
    given = {"value": now, "old_value": old, "return": target, "clip_range": clip}
    loss = max((now - target) ** 2, (near - target) ** 2) / 2
    gradient = 0.0 if is_clipped else now - target
    return _case(name, given, {"loss": loss, "is_clipped": is_clipped, "gradient": gradient})


def _of_the_optimizer() -> dict[str, Any]:
    sequences = {
        "one small gradient": [1e-5],
        "one larger gradient": [1e-3],
        "three": [1e-5, 3e-5, -2e-5],
    }
    adam = [
        _case(
            name,
            {"gradients": gradients, "eps": 1e-5, "beta1": 0.9, "beta2": 0.999, "lr": 1.0},
            {form: _adam(gradients, form) for form in ("pytorch", "tensorflow")},
        )
        for name, gradients in sequences.items()
    ]
    factors = [1.0, 0.75, 0.5, 0.25]
    falling = _case("four steps", {"steps": 4}, {"factors": factors, "after_the_last": 0.0})
    return {
        "adam": _group(
            33, "where it stands after each step, from 0, lr 1; two places of eps", adam
        ),
        "learning_rate": _group(34, "1 - step / steps, counted from 0", [falling]),
    }


def _adam(gradients: Sequence[float], form: str) -> list[float]:
    """Kingma and Ba 2015, algorithm 1 (PyTorch), and the other form after its section 2."""
    place, first, second, places = 0.0, 0.0, 0.0, []
    for step, gradient in enumerate(gradients, start=1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        one, two = 1 - 0.9**step, 1 - 0.999**step
        if form == "pytorch":
            place -= (first / one) / (math.sqrt(second / two) + 1e-5)
        else:
            place -= math.sqrt(two) / one * first / (math.sqrt(second) + 1e-5)
        places.append(place)
    return places


def _of_other_methods() -> dict[str, Any]:
    rewards, group = [1.0, 5.0, 2.0, 4.5, 6.0, 0.1, 0.1], [0, 4, 0, 0, 4, 1, 1]
    members = {g: [r for r, own in zip(rewards, group, strict=True) if own == g] for g in group}
    rloo, grpo = [], []
    for reward, own in zip(rewards, group, strict=True):
        same = members[own]
        rloo.append(reward - (math.fsum(same) - reward) / (len(same) - 1))
        grpo.append((reward - statistics.fmean(same)) / (statistics.stdev(same) + 1e-4))
    given = {"rewards": rewards, "group": group}
    apa = [
        _case(
            f"advantage {advantage}, lambda {lam}",
            {"logprob": -0.5, "old_logprob": -1.0, "advantage": advantage, "apa_lambda": lam},
            {"loss": (0.5 - advantage / lam) ** 2, "gradient": 2 * (0.5 - advantage / lam)},
        )
        for advantage, lam in ((2.0, 1.0), (-2.0, 1.0), (2.0, 4.0), (0.3, 0.1))
    ]
    margin = 0.1 * ((-10.0 + 11.0) - (-12.0 + 11.5))
    pair = {"chosen": -10.0, "rejected": -12.0, "ref_chosen": -11.0, "ref_rejected": -11.5}
    dpo = _case("a pair", {**pair, "beta": 0.1}, {"loss": math.log1p(math.exp(-margin))})
    logprobs, reference = [-10.0, -12.0, -7.0, -20.0], [-11.0, -11.5, -9.0, -16.0]
    scores = [0.3 * (a - b) for a, b in zip(logprobs, reference, strict=True)]
    listwise = [
        _case(
            name,
            {"logprobs": logprobs, "ref_logprobs": reference, "ranks": ranks, "beta": 0.3},
            {"loss": _plackett_luce(scores, ranks)},
        )
        for name, ranks in {"in order": [2, 3, 1, 4], "two unranked": [None, 2, 1, None]}.items()
    ]
    rankings = {
        "seven equal scores: ln 7!": ([1.5] * 7, [1, 2, 3, 4, 5, 6, 7]),
        "two: Bradley-Terry": ([0.3, 1.1], [1, 2]),
        "ranks out of order": ([0.2, -1.0, 0.9], [2, 3, 1]),
        "scores of 80": ([-80.0, 80.0, 0.0], [1, 2, 3]),
        "a tie (Efron)": ([0.2, -1.0, 0.9, 0.4], [1, 2, 2, 3]),
        "two unranked": ([0.2, -1.0, 0.9], [1, None, None]),
    }
    likelihoods = [
        _case(name, {"scores": s, "ranks": ranks}, {"loss": _plackett_luce(s, ranks)})
        for name, (s, ranks) in rankings.items()
    ]
    return {
        "plackett_luce": _group(7, "-log of the product of stages, not divided", likelihoods),
        "rloo": _group(
            "RLOO", "reward - mean of its prompt's others",
            [_case("three prompts", given, {"advantages": rloo})],
        ),
        "grpo": _group(
            "GRPO", "(reward - mean) / (sample deviation + 1e-4), by prompt",
            [_case("three prompts", given, {"advantages": grpo})],
        ),
        "apa": _group("APA", "(new - old - A / lambda)^2", apa),
        "dpo": _group("DPO", "-log sigmoid(beta (chosen's log ratio - rejected's))", [dpo]),
        "plackett_luce_dpo": _group("DPO", "plackett_luce of beta times the log ratios", listwise),
    }  # fmt: skip


def _plackett_luce(scores: Sequence[float], ranks: Sequence[int | None]) -> float:
    """The product of stages; the l-th of a tie of d competes with the tie at 1 - l/d."""
    rows = [(math.inf if rank is None else rank, s) for rank, s in zip(ranks, scores, strict=True)]
    terms = []
    for rank in sorted({rank for rank, _ in rows if rank < math.inf}):
        tie = [math.exp(score) for own, score in rows if own == rank]
        rest = math.fsum(math.exp(score) for own, score in rows if own > rank)
        for nth, picked in enumerate(tie):
            share = 1 - nth / len(tie)
            terms.append(math.log((rest + share * math.fsum(tie)) / picked))
    return math.fsum(terms)


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(text(), encoding="utf-8")

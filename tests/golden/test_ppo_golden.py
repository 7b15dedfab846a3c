"""Every number of docs/golden/ppo.json comes out of Starling too; docs/golden.md says what it is.

`CHECKS` has, for each group, how its inputs are given to Starling.  A group without one fails.
"""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch

from starling.base.masked import masked_mean
from starling.models.causal_lm import state_logprobs
from starling.models.training import Trainable, constant, linear
from starling.ppo import advantage, kl, loss, rewards
from starling.reward.loss import plackett_luce_loss

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "golden" / "ppo.json"
GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))
CASES = [
    pytest.param(name, case, id=f"{name}: {case['name']}")
    for name, group in GOLDEN["groups"].items()
    for case in group["cases"]
]


def token(number):
    """One token of one rollout."""
    return torch.tensor([[float(number)]])


ONE = torch.ones(1, 1, dtype=torch.bool)


def tensors(given, *names):
    return [torch.tensor(given[name]) for name in names]


def temperature(given):
    # A head that passes states on: they are the logits.
    head = torch.nn.Linear(len(given["logits"]), len(given["logits"]), bias=False)
    torch.nn.init.eye_(head.weight)
    with torch.no_grad():
        found = state_logprobs(
            head,
            torch.tensor([given["logits"]]),
            torch.tensor([given["token"]]),
            temperature=given["temperature"],
        )
    return {"logprob": found.item()}


def importance_weights(given):
    inputs = tensors(given, "old_logprobs", "sampler_logprobs", "mask")
    return {"weights": loss.importance_weights(*inputs, cap=given["cap"])}


def missing_end(given):
    inputs, penalty = tensors(given, "scores", "is_finished"), given["penalty"]
    return {
        "replaced": rewards.replace_missing_end(*inputs, penalty=penalty),
        "added": rewards.add_missing_end(*inputs, penalty=penalty),
    }


def score_placement(given):
    inputs = tensors(given, "scores", "kl", "mask")
    return {"rewards": advantage.shape_rewards(*inputs, kl_coef=given["kl_coef"])}


def score_to_advantage(given):
    scores, mask = tensors(given, "scores", "mask")
    none = torch.zeros(mask.shape)
    placed = advantage.shape_rewards(scores, none, mask, kl_coef=0.0)
    return gae({**given, "rewards": placed.tolist(), "values": none.tolist()})


def kl_estimators(given):
    pair = token(given["logprob"]), token(given["ref_logprob"])
    return {name: getattr(kl, name)(*pair).item() for name in ("k1", "k2", "k3")}


def kl_expectation(given):
    policy, reference = tensors(given, "policy", "reference")
    found = {}
    for name in ("k1", "k2", "k3"):
        logits = policy.log().requires_grad_()
        estimates = getattr(kl, name)(logits.log_softmax(dim=0)[None], reference.log()[None])[0]
        mean = (policy * estimates).sum()
        mean.backward()
        found |= {name: mean.item(), f"gradient_of_{name}": logits.grad}
    return found


def sequence_kl(given):
    return {"sums": kl.sequence_kl(*tensors(given, "kl", "mask"))}


def controller(given):
    before = kl.KlController(given["coef"], given["target"], given["horizon"])
    return {"coef": before.updated(given["measured"], episodes=given["episodes"]).coef}


def score_shaping(given):
    settings = {name: given[name] for name in ("centre", "clip", "scale", "shift")}
    return {"scores": rewards.centre_clip_scale(torch.tensor(given["scores"]), **settings)}


def gae(given):
    found = advantage.estimate_advantages(
        *tensors(given, "rewards", "values", "mask"),
        gamma=given["gamma"],
        gae_lambda=given["gae_lambda"],
    )
    return found._asdict()


def policy_loss(given):
    logprob = token(given["logprob"]).requires_grad_()
    terms = loss.policy_terms(
        logprob,
        token(given["old_logprob"]),
        token(given["advantage"]),
        ONE,
        clip_range=given["clip_range"],
    )
    return one_term(terms, logprob)


def value_loss(given):
    value = token(given["value"]).requires_grad_()
    terms = loss.value_terms(
        value,
        token(given["old_value"]),
        token(given["return"]),
        ONE,
        value_clip_range=given["clip_range"],
    )
    return one_term(terms, value)


def apa(given):
    logprob = token(given["logprob"]).requires_grad_()
    terms = loss.apa_terms(
        logprob,
        token(given["old_logprob"]),
        token(given["advantage"]),
        ONE,
        apa_lambda=given["apa_lambda"],
    )
    return one_term(terms, logprob)


def one_term(terms, learned):
    terms.loss.sum().backward()
    return {
        "loss": terms.loss.item(),
        "is_clipped": terms.is_clipped.item(),
        "gradient": learned.grad.item(),
    }


def loss_reduction(given):
    # As the caller does: a row at a time, each divided by the tokens of all.
    logprobs, mask = tensors(given, "logprobs", "mask")
    logprobs.requires_grad_()
    total = 0.0
    for row in range(len(mask)):
        terms = loss.distillation_terms(logprobs[row : row + 1], mask[row : row + 1])
        part = terms.sum() / mask.sum()
        part.backward()
        total += part.item()
    return {"loss": total, "gradient": logprobs.grad}


def adam(given):
    return {"pytorch": adam_places(given, None), "tensorflow": adam_places(given, given["eps"])}


def adam_places(given, tensorflow_eps):
    place = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    betas = given["beta1"], given["beta2"]
    optimizer = torch.optim.AdamW([place], betas=betas, eps=given["eps"], weight_decay=0.0)
    trainable = Trainable({}, optimizer, given["lr"], constant, None, tensorflow_eps)
    places = []
    for step, gradient in enumerate(given["gradients"]):
        place.grad = torch.tensor([gradient], dtype=torch.float64)
        trainable.step(step)
        places.append(place.item())
    return places


def learning_rate(given):
    schedule = linear(given["steps"])
    factors = [schedule(step) for step in range(given["steps"])]
    return {"factors": factors, "after_the_last": schedule(given["steps"])}


def plackett_luce(given):
    # Both of Starling's: the reward model's loss is divided by K - 1, and has 0 for unranked.
    scores, ranks, mask = ranking(given["scores"], given["ranks"])
    whole = torch.where(ranks.isfinite(), ranks, 0.0).long()
    of_reward = plackett_luce_loss(scores, whole, mask).item() * (mask.sum().item() - 1)
    found = loss.plackett_luce_dpo_loss(scores, 0 * scores, ranks, mask, beta=1.0).item()
    assert of_reward == pytest.approx(found, rel=1e-5)
    return {"loss": found}


def plackett_luce_dpo(given):
    logprobs, ranks, mask = ranking(given["logprobs"], given["ranks"])
    reference = torch.tensor([given["ref_logprobs"]])
    found = loss.plackett_luce_dpo_loss(logprobs, reference, ranks, mask, beta=given["beta"])
    return {"loss": found.item()}


def ranking(numbers, ranks):
    places = torch.tensor([[math.inf if rank is None else float(rank) for rank in ranks]])
    return torch.tensor([numbers]), places, torch.ones(1, len(ranks), dtype=torch.bool)


def dpo(given):
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    return {
        "loss": loss.dpo_loss(*(torch.tensor([given[n]]) for n in names), beta=given["beta"])[0]
    }


CHECKS = {
    "temperature": temperature,
    "importance_weights": importance_weights,
    "masked_mean": lambda given: {"mean": masked_mean(*tensors(given, "values", "mask"))},
    "missing_end": missing_end,
    "score_placement": score_placement,
    "score_to_advantage": score_to_advantage,
    "kl_estimators": kl_estimators,
    "kl_expectation": kl_expectation,
    "sequence_kl": sequence_kl,
    "controller": controller,
    "score_shaping": score_shaping,
    "reward_whitening": lambda given: {
        "rewards": advantage.scale_keeping_mean(*tensors(given, "rewards", "mask"))
    },
    "gae": gae,
    "gae_masked": gae,
    "advantage_whitening": lambda given: {
        "advantages": advantage.whiten(*tensors(given, "advantages", "mask"))
    },
    "policy_loss": policy_loss,
    "value_loss": value_loss,
    "loss_reduction": loss_reduction,
    "adam": adam,
    "learning_rate": learning_rate,
    "plackett_luce": plackett_luce,
    "rloo": lambda given: {
        "advantages": advantage.rloo_advantages(*tensors(given, "rewards", "group"))
    },
    "grpo": lambda given: {
        "advantages": advantage.grpo_advantages(*tensors(given, "rewards", "group"))
    },
    "apa": apa,
    "dpo": dpo,
    "plackett_luce_dpo": plackett_luce_dpo,
}


def distance(found, expected):
    """By how much two (nested lists of) numbers differ, in tolerances of the file."""
    found, expected = (torch.as_tensor(each, dtype=torch.float64) for each in (found, expected))
    assert found.shape == expected.shape
    allowed = GOLDEN["tolerance"]["absolute"] + GOLDEN["tolerance"]["relative"] * expected.abs()
    return ((found - expected).abs() / allowed).max().item()


@pytest.mark.parametrize(("group", "case"), CASES)
def test_starling_gives_every_number_of_the_file(group, case):
    found = CHECKS[group](case["given"])
    assert case["expected"].keys() <= found.keys()
    for name, expected in case["expected"].items():
        value = found[name]
        value = value.detach() if isinstance(value, torch.Tensor) else value
        assert distance(value, expected) <= 1, name


def test_every_group_is_checked_and_every_check_has_its_group():
    assert GOLDEN["groups"].keys() == CHECKS.keys()


def test_the_file_tells_the_right_number_from_the_usual_wrong_one():
    seen = 0
    for _, case in (each.values for each in CASES):
        for name, wrong in case.get("otherwise", {}).items():
            # The first expected number is the one that the mistake would replace.
            right = next(iter(case["expected"].values()))
            assert distance(wrong, right) > 100, name
            seen += 1
    assert seen > 5


def test_the_file_is_what_the_generator_writes_without_starling_or_torch():
    path = ROOT / "tools" / "record_golden.py"
    source = path.read_text(encoding="utf-8")
    imports = {
        line.split()[1] for line in source.splitlines() if line.startswith(("import", "from"))
    }
    assert imports == {"json", "math", "statistics", "collections.abc", "pathlib", "typing"}
    assert runpy.run_path(str(path))["text"]() == FILE.read_text(encoding="utf-8")


def test_the_page_knows_every_group_and_its_example_runs(monkeypatch, capsys):
    page = (ROOT / "docs" / "golden.md").read_text(encoding="utf-8")
    for name, group in GOLDEN["groups"].items():
        assert f"| `{name}` | {group['item']} |" in page
    example = page.split("```python\n")[1].split("```")[0]
    assert len(example.strip().splitlines()) <= 20
    monkeypatch.chdir(ROOT)
    exec(compile(example, "docs/golden.md", "exec"), {})  # noqa: S102 - our own page
    assert capsys.readouterr().out.count("ok") == len(GOLDEN["groups"]["gae"]["cases"])

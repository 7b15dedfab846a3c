"""KL estimators against exact KL and its gradient; the controller against Ziegler's table."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from starling.ppo.config import PpoSection
from starling.ppo.kl import KlController, k1, k2, k3, sequence_kl

POLICY = (0.1, 0.2, 0.3, 0.15, 0.25)
REFERENCE = (0.3, 0.1, 0.2, 0.2, 0.2)


def test_estimators_at_a_difference_of_a_tenth():
    # training.md, section 2, item 18; the reference is 0.1 nats less sure.
    logprobs, reference = torch.tensor([[-1.0]]), torch.tensor([[-1.1]])
    assert_close(k1(logprobs, reference), torch.tensor([[0.1]]))
    assert_close(k2(logprobs, reference), torch.tensor([[0.005]]))
    assert_close(k3(logprobs, reference), torch.tensor([[0.0048374]]))
    # The other way round k1 is negative and k3 is not: e^0.1 - 1 - 0.1.
    assert_close(k1(reference, logprobs), torch.tensor([[-0.1]]))
    assert_close(k2(reference, logprobs), torch.tensor([[0.005]]))
    assert_close(k3(reference, logprobs), torch.tensor([[0.0051709]]))


def test_policy_equal_to_reference_has_no_kl():
    logprobs = torch.tensor([[-0.3, -7.0, 0.0]])
    assert not k1(logprobs, logprobs).any()
    assert not k2(logprobs, logprobs).any()
    assert not k3(logprobs, logprobs).any()


def test_both_estimators_average_to_the_exact_kl_on_the_policys_own_samples():
    exact = math.fsum(p * math.log(p / q) for p, q in zip(POLICY, REFERENCE, strict=True))
    drawn = torch.multinomial(
        torch.tensor(POLICY), 200_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    logprobs = torch.tensor(POLICY).log()[drawn][None]
    reference = torch.tensor(REFERENCE).log()[drawn][None]
    for estimate in (k1(logprobs, reference), k3(logprobs, reference)):
        error = estimate.std().item() / math.sqrt(200_000)
        assert estimate.mean().item() == pytest.approx(exact, abs=4 * error)
        # A sign or a missing term would be further off than that.
        assert 4 * error < 0.05 * exact
    assert (k3(logprobs, reference) >= 0).all()


def gradient_of(estimator):
    """The gradient by the policy's logits of the estimator's mean over all five tokens."""
    logits = torch.tensor(POLICY, dtype=torch.float64).log().requires_grad_()
    logprobs = logits.log_softmax(dim=0)
    reference = torch.tensor(REFERENCE, dtype=torch.float64).log()
    # What a loss does with samples: the policy that drew them is a constant.
    drawn = torch.tensor(POLICY, dtype=torch.float64)
    (drawn * estimator(logprobs[None], reference[None])[0]).sum().backward()
    return logits.grad.tolist()


def test_as_a_loss_only_k2_has_the_gradient_of_the_kl():
    # d KL / d logit_i = p_i (log(p_i / q_i) - KL), from the softmax's derivative by hand.
    gaps = [math.log(p / q) for p, q in zip(POLICY, REFERENCE, strict=True)]
    exact = math.fsum(p * gap for p, gap in zip(POLICY, gaps, strict=True))
    of_the_kl = [p * (gap - exact) for p, gap in zip(POLICY, gaps, strict=True)]
    assert gradient_of(k2) == pytest.approx(of_the_kl, abs=1e-12)
    # k1 has none at all, and k3 that of the KL the other way round: p_i - q_i.
    assert gradient_of(k1) == pytest.approx([0.0] * 5, abs=1e-12)
    backwards = [p - q for p, q in zip(POLICY, REFERENCE, strict=True)]
    assert gradient_of(k3) == pytest.approx(backwards, abs=1e-12)


def test_k2_is_biased_and_knowably_so():
    half_squares = math.fsum(
        p * math.log(p / q) ** 2 / 2 for p, q in zip(POLICY, REFERENCE, strict=True)
    )
    drawn = torch.tensor(POLICY, dtype=torch.float64)
    reference = torch.tensor(REFERENCE, dtype=torch.float64).log()
    found = (drawn * k2(drawn.log()[None], reference[None])[0]).sum().item()
    assert found == pytest.approx(half_squares, abs=1e-12)


def test_the_kl_of_a_sequence_is_summed_so_that_twice_the_tokens_are_twice_the_kl():
    kl = torch.full((3, 8), 0.25)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 2:4] = mask[1, 2:6] = True
    mask[2, [0, 7]] = True
    assert_close(sequence_kl(kl, mask), torch.tensor([0.5, 1.0, 0.5]))


def test_what_stands_outside_the_response_does_not_count():
    kl = torch.tensor([[math.nan, 0.5, -0.1, math.inf]])
    mask = torch.tensor([[False, True, True, False]])
    assert_close(sequence_kl(kl, mask), torch.tensor([0.4]))


@pytest.mark.parametrize(
    ("measured", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1.00512),
        (7.2, 1.01024),
        (100.0, 1.01024),
        (5.4, 0.99488),
        (4.8, 0.98976),
        (0.0, 0.98976),
        (-1.0, 0.98976),
    ],
)
def test_the_controller_follows_zieglers_table(measured, factor):
    controller = KlController(0.15, target=6.0, horizon=10_000)
    assert controller.updated(measured, episodes=512).coef == pytest.approx(0.15 * factor)


def test_the_controller_counts_episodes_against_its_horizon():
    assert KlController(1.0, 6.0, 1000).updated(12.0, episodes=100).coef == pytest.approx(1.02)
    assert KlController(1.0, 6.0, 1000).updated(12.0, episodes=50).coef == pytest.approx(1.01)


def test_no_measured_kl_takes_the_coefficient_to_zero():
    controller = KlController(0.15, target=6.0, horizon=120)
    for _ in range(100):
        controller = controller.updated(0.0, episodes=512)
    assert controller.coef > 0


def test_without_a_target_the_coefficient_stays():
    controller = KlController(0.05)
    for measured in (0.0, 6.0, 1000.0):
        assert controller.updated(measured, episodes=512).coef == 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coef": -0.01}, "coef must be finite"),
        ({"coef": math.nan}, "coef must be finite"),
        ({"coef": math.inf}, "coef must be finite"),
        ({"coef": 0.1, "target": 0.0}, "target must be positive"),
        ({"coef": 0.1, "target": -6.0}, "target must be positive"),
        ({"coef": 0.1, "target": math.inf}, "target must be positive"),
        ({"coef": 0.1, "horizon": 0}, "horizon must be a positive"),
        ({"coef": 0.1, "horizon": -5}, "horizon must be a positive"),
    ],
)
def test_a_controller_is_not_made_of_numbers_that_cannot_control(settings, message):
    with pytest.raises(ValueError, match=message):
        KlController(**settings)


def test_a_coefficient_of_zero_is_no_penalty_and_allowed():
    assert KlController(0.0).updated(3.0, episodes=1).coef == 0.0


def test_so_many_episodes_that_the_coefficient_could_reach_zero_are_refused():
    # training.md, item 20: the factor is 0 at 50 000 episodes and -0.2 at 60 000.
    controller = KlController(0.15, target=6.0, horizon=10_000)
    for episodes in (50_000, 60_000):
        with pytest.raises(ValueError, match="need a horizon over"):
            controller.updated(0.0, episodes=episodes)
    assert controller.updated(0.0, episodes=49_999).coef > 0
    # A fixed coefficient has no horizon to keep.
    assert KlController(0.15).updated(0.0, episodes=60_000).coef == 0.15


@pytest.mark.parametrize("target", [None, 6.0])
def test_a_kl_that_is_no_number_and_no_episodes_are_refused(target):
    controller = KlController(0.15, target=target)
    for measured in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="the measured KL is"):
            controller.updated(measured, episodes=512)
    with pytest.raises(ValueError, match="episodes must be at least 1"):
        controller.updated(6.0, episodes=0)
    controller.updated(6.0, episodes=1)


@pytest.mark.parametrize(
    ("measured", "is_held"),
    [(6.0, True), (3.0, True), (9.0, True), (2.99, False), (9.01, False), (-6.0, False)],
)
def test_the_band_is_half_to_one_and_a_half_of_the_target(measured, is_held):
    assert KlController(0.15, target=6.0).band(measured) is is_held
    assert KlController(0.15).band(measured) is None


# 512 episodes move the coefficient by at most 0.2 * 512 / horizon, which must stay under 1.
@pytest.mark.parametrize(
    ("key", "value"),
    [("kl_target", 0.0), ("kl_target", -1.0), ("kl_horizon", 0), ("kl_coef", -0.1)],
)
def test_a_controller_that_cannot_work_is_refused(key, value):
    with pytest.raises(ValidationError, match=key):
        PpoSection.model_validate({"kl_target": 6.0, key: value})


def test_a_horizon_that_could_take_the_coefficient_to_zero_is_refused():
    settings = {"rollout_batch": 128, "samples_per_prompt": 4, "kl_target": 6.0}
    with pytest.raises(ValidationError, match="kl_horizon: 102 is too short for 512 episodes"):
        PpoSection.model_validate(settings | {"kl_horizon": 102})
    assert PpoSection.model_validate(settings | {"kl_horizon": 103}).kl_horizon == 103
    # Without a target nothing is multiplied.
    PpoSection.model_validate(settings | {"kl_horizon": 1, "kl_target": None})


def test_minibatches_that_do_not_divide_the_episodes_are_refused():
    with pytest.raises(ValidationError, match="minibatches: 3 does not divide"):
        PpoSection.model_validate({"rollout_batch": 4, "samples_per_prompt": 2, "minibatches": 3})

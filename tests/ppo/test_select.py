"""Which checkpoint is kept: limits on length and KL first, the judge's opinion after that."""

import json

import pytest
import torch
from torch.testing import assert_close

from starling.base.errors import CheckpointError
from starling.ppo.config import PpoSection
from starling.ppo.select import Selection, Validation, is_better, is_eligible

SECTION = PpoSection(kl_target=2.0, select_max_length_ratio=1.1)


def validation(step, rating=5.0, kl=2.0, tokens=10.0, followed=None):
    estimate = {"mean": kl, "low": kl - 1, "high": kl + 1, "n": 8, "num_failed": 0}
    return Validation(step, rating, estimate, tokens, followed)


START = validation(0, rating=4.0, kl=0.0)


@pytest.mark.parametrize(
    ("kl", "tokens", "eligible"),
    [
        (2.0, 10.0, True),
        (1.0, 10.0, True),
        (3.0, 10.0, True),
        (0.99, 10.0, False),
        (3.01, 10.0, False),
        (-1.0, 10.0, False),
        (2.0, 11.0, True),
        (2.0, 11.1, False),
        (2.0, 1.0, True),
    ],
)
def test_kl_must_be_within_half_of_the_target_and_answers_not_much_longer(kl, tokens, eligible):
    assert is_eligible(validation(5, kl=kl, tokens=tokens), START, SECTION) is eligible


def test_without_a_target_only_length_counts():
    section = PpoSection(kl_target=None, select_max_length_ratio=1.5)
    assert is_eligible(validation(5, kl=100.0, tokens=15.0), START, section)
    assert not is_eligible(validation(5, kl=0.0, tokens=15.1), START, section)


@pytest.mark.parametrize(
    ("before", "after", "eligible"),
    [
        (0.80, 0.80, True),
        (0.80, 0.90, True),
        # Starling's rule: IFEval may fall by 0.05, and that much itself is allowed.
        (0.80, 0.75, True),
        (0.30, 0.25, True),
        (0.80, 0.7499, False),
        (0.80, 0.0, False),
        (0.0, 0.0, True),
        (None, None, True),
    ],
)
def test_a_checkpoint_may_lose_a_twentieth_of_the_followed_instructions(before, after, eligible):
    start = validation(0, kl=0.0, followed=before)
    assert is_eligible(validation(5, followed=after), start, SECTION) is eligible


def test_the_limit_on_instructions_is_the_recipes():
    section = PpoSection(select_max_instruction_drop=0.2)
    start = validation(0, followed=0.8)
    assert is_eligible(validation(5, followed=0.61), start, section)
    assert not is_eligible(validation(5, followed=0.59), start, section)


def test_only_a_higher_rating_is_better():
    assert is_better(validation(5, rating=6.0), None)
    assert is_better(validation(5, rating=6.0), validation(4, rating=5.9))
    assert not is_better(validation(5, rating=6.0), validation(4, rating=6.0))
    assert not is_better(validation(5, rating=None), None)
    assert not is_better(validation(5, rating=None), validation(4, rating=1.0))


def one_weight(value):
    """What a selection asks for, and takes a copy of: the policy's weights as they are."""
    return lambda: {"weight": torch.tensor([[value]])}


def test_the_best_eligible_checkpoint_is_kept_with_its_own_weights():
    selection = Selection()
    rounds = [
        validation(0, rating=9.0, kl=0.0),
        validation(5, rating=6.0, kl=1.5),
        validation(10, rating=7.0, kl=2.0),
        validation(15, rating=9.5, kl=9.0),
        validation(20, rating=6.5, kl=2.5),
    ]
    weight = torch.zeros(1, 1)
    metrics = []
    for measured in rounds:
        weight.fill_(float(measured.step))  # in place, as an optimizer does
        metrics.append(selection.add(measured, lambda: {"weight": weight}, SECTION))
    assert selection.best == rounds[2]
    assert selection.weights["weight"].item() == 10.0
    assert [row["ppo/validation_eligible"] for row in metrics] == [0, 1, 1, 0, 1]
    assert [row["ppo/validation_rating"] for row in metrics] == [9.0, 6.0, 7.0, 9.5, 6.5]


def test_the_start_is_never_selected_and_sets_the_length_to_compare_with():
    selection = Selection()
    selection.add(validation(0, rating=9.0, kl=2.0, tokens=5.0), one_weight(0.0), SECTION)
    assert selection.best is None
    selection.add(validation(5, tokens=5.6), one_weight(1.0), SECTION)
    assert selection.best is None
    selection.add(validation(10, rating=1.0, tokens=5.4), one_weight(2.0), SECTION)
    assert selection.best is not None
    assert selection.best.step == 10


def test_weights_are_asked_for_only_when_they_are_to_be_kept():
    # Of several processes all take part in gathering them, and it takes memory.
    selection, asked = Selection(), []

    def weights():
        asked.append(1)
        return {}

    for step, rating, count in ((0, 9.0, 0), (5, 5.0, 1), (10, 4.0, 1), (15, 6.0, 2)):
        selection.add(validation(step, rating=rating), weights, SECTION)
        assert len(asked) == count


def test_without_a_judge_nothing_is_selected_and_no_rating_is_logged():
    selection = Selection()
    for step in (0, 5):
        metrics = selection.add(validation(step, rating=None), one_weight(1.0), SECTION)
        assert "ppo/validation_rating" not in metrics
        assert "ppo/validation_followed" not in metrics
    assert selection.best is None
    assert selection.weights == {}


def test_a_selection_comes_back_from_json_as_it_was_and_goes_on():
    selection = Selection()
    for step, rating in ((0, 9.0), (5, 6.0), (10, 5.0)):
        selection.add(validation(step, rating=rating), one_weight(float(step)), SECTION)
    extra = json.loads(json.dumps(selection.state()))
    back = Selection.resume(extra, {k: v.clone() for k, v in selection.weights.items()})
    assert back.validations == selection.validations
    assert back.best == selection.best
    assert_close(back.weights, {"weight": torch.tensor([[5.0]])})
    back.add(validation(15, rating=5.9), one_weight(15.0), SECTION)
    assert back.best == selection.best
    back.add(validation(20, rating=6.1), one_weight(20.0), SECTION)
    assert back.best is not None
    assert back.best.step == 20


def test_a_selection_of_nothing_comes_back_as_that():
    assert Selection.resume(Selection().state(), {}) == Selection()


def test_a_stored_selection_without_all_its_fields_is_an_error_that_names_them():
    selection = Selection()
    for step, rating in ((0, 9.0), (5, 6.0)):
        selection.add(validation(step, rating=rating), one_weight(1.0), SECTION)
    whole = json.dumps(selection.state())
    weights = selection.weights
    for key in ("followed", "rating", "kl"):
        extra = json.loads(whole)
        del extra["validations"][1][key]
        with pytest.raises(CheckpointError, match=f"missing {key}, unexpected none"):
            Selection.resume(extra, weights)
    extra = json.loads(whole) | {"best_step": 7}
    with pytest.raises(CheckpointError, match="selected step 7, and validated only 0, 5"):
        Selection.resume(extra, weights)

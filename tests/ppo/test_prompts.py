"""Training and validation prompts of PPO: apart from each other, and short enough."""

import json
import logging

import pytest

from starling.base.errors import DataError
from starling.models.causal_lm import load_language_model
from starling.ppo.config import PpoInputs, PpoSection
from starling.ppo.prompts import load_prompts
from tiny import tiny_policy_folder


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = tiny_policy_folder(tmp_path_factory.mktemp("prompts") / "policy")
    return load_language_model(str(folder)).codec


def written(path, conversations):
    """A prompts file of conversations, each a list of turns that starts with the user's."""
    rows = [
        {
            "messages": [
                {"role": ("user", "assistant")[number % 2], "content": text}
                for number, text in enumerate(turns)
            ]
        }
        for turns in conversations
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(codec, folder, prompts, *, validation=None, seed=0, **settings):
    inputs = PpoInputs(
        policy="policy",
        prompts=written(folder / "prompts.jsonl", prompts),
        reward_model="reward",
        validation=None if validation is None else written(folder / "validation.jsonl", validation),
        judge=None,
    )
    section = PpoSection.model_validate({"validation_prompts": 4} | settings)
    return load_prompts(section, inputs, codec, folder, seed=seed)


def texts(prompts):
    return ["|".join(message.content for message in prompt.messages) for prompt in prompts]


def test_validation_prompts_are_drawn_by_the_seed_and_kept_apart(codec, tmp_path):
    prompts = [[f"ask {number}"] for number in range(20)]
    draws = set()
    for seed in (0, 1, 1):
        training, held_out = load(codec, tmp_path, prompts, seed=seed)
        assert len(held_out) == 4
        assert sorted(texts(training) + texts(held_out)) == sorted(p[0] for p in prompts)
        draws.add(tuple(texts(held_out)))
    assert len(draws) == 2


def test_a_prompt_that_stands_twice_is_never_on_both_sides_and_is_validated_once(codec, tmp_path):
    prompts = [[f"ask {number % 6}"] for number in range(24)]
    for seed in range(8):
        training, held_out = load(codec, tmp_path, prompts, seed=seed)
        assert not set(texts(training)) & set(texts(held_out))
        # Two of one prompt would put the same question to the judge twice, which it refuses.
        assert len({prompt.id for prompt in held_out}) == len(held_out)


def test_prompts_of_a_validation_file_are_taken_out_of_training(codec, tmp_path):
    training, held_out = load(
        codec,
        tmp_path,
        [["a"], ["b"], ["c"], ["d"]],
        validation=[["b"], ["x"], ["d"], ["y"], ["z"]],
    )
    assert texts(training) == ["a", "c"]
    assert texts(held_out) == ["b", "x", "d", "y"]


def test_long_conversations_lose_their_first_turns_and_long_questions_are_left_out(
    codec, tmp_path, caplog
):
    chatty = ["u " * 60, "v " * 60, "short"]
    with caplog.at_level(logging.WARNING):
        training, _ = load(
            codec,
            tmp_path,
            [chatty, ["w " * 90], ["fine"]],
            validation=[["x"], ["y"]],
            max_prompt_tokens=60,
        )
    assert texts(training) == ["short", "fine"]
    assert "1 of 3 prompts are longer than ppo.max_prompt_tokens (60)" in caplog.text


def test_prompts_that_trimming_makes_equal_are_not_on_both_sides(codec, tmp_path):
    training, held_out = load(
        codec,
        tmp_path,
        [["a " * 60, "b", "same end"], ["other"]],
        validation=[["c " * 60, "d", "same end"], ["third"]],
        max_prompt_tokens=60,
    )
    assert texts(held_out) == ["same end", "third"]
    assert texts(training) == ["other"]


@pytest.mark.parametrize("count", [1, 4, 5])
def test_too_few_prompts_to_train_and_to_validate_are_refused(codec, tmp_path, count):
    prompts = [[f"ask {number}"] for number in range(count)]
    if count == 5:
        assert len(load(codec, tmp_path, prompts)[0]) == 1
        return
    with pytest.raises(DataError, match=r"0 training and \d validation prompts are left"):
        load(codec, tmp_path, prompts)

"""Training and validation prompts of PPO: apart from each other, and short enough."""

import json
import logging

import pytest

from starling.base.context import Context
from starling.base.errors import DataError
from starling.models.causal_lm import load_language_model
from starling.ppo.config import PpoInputs, PpoSection, RewardSource
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


def load(codec, folder, prompts, *, validation=None, instructions=None, **settings):
    """Training prompts and held-out ones; of the settings, `seed` and `rank` are the context's."""
    context = Context(settings.pop("rank", 0), 1, "cpu", 1, seed=settings.pop("seed", 0))
    inputs = PpoInputs(
        policy="policy",
        prompts=written(folder / "prompts.jsonl", prompts),
        reward_models=(RewardSource(model="reward"),),
        validation=None if validation is None else written(folder / "validation.jsonl", validation),
        judge=None,
        instructions=instructions,
    )
    section = PpoSection.model_validate({"validation_prompts": 4} | settings)
    return load_prompts(section, inputs, codec, folder, context)


def texts(prompts):
    return ["|".join(message.content for message in prompt.messages) for prompt in prompts]


def test_validation_prompts_are_drawn_by_the_seed_and_kept_apart(codec, tmp_path):
    prompts = [[f"ask {number}"] for number in range(20)]
    draws = set()
    for seed in (0, 1, 1):
        training, held_out = load(codec, tmp_path, prompts, seed=seed)
        assert len(held_out.prompts) == 4
        assert held_out.instructed == ()
        assert sorted(texts(training) + texts(held_out.prompts)) == sorted(p[0] for p in prompts)
        draws.add(tuple(texts(held_out.prompts)))
    assert len(draws) == 2


def test_a_prompt_that_stands_twice_is_never_on_both_sides_and_is_validated_once(codec, tmp_path):
    prompts = [[f"ask {number % 6}"] for number in range(24)]
    for seed in range(8):
        training, held_out = load(codec, tmp_path, prompts, seed=seed)
        assert not set(texts(training)) & set(texts(held_out.prompts))
        # Two of one prompt would put the same question to the judge twice, which it refuses.
        assert len({prompt.id for prompt in held_out.prompts}) == len(held_out.prompts)


def test_prompts_of_a_validation_file_are_taken_out_of_training(codec, tmp_path):
    training, held_out = load(
        codec,
        tmp_path,
        [["a"], ["b"], ["c"], ["d"]],
        validation=[["b"], ["x"], ["d"], ["y"], ["z"]],
    )
    assert texts(training) == ["a", "c"]
    assert texts(held_out.prompts) == ["b", "x", "d", "y"]


def test_prompts_with_instructions_are_taken_out_of_training_and_keep_their_instructions(
    codec, tmp_path
):
    row = {
        "messages": [{"role": "user", "content": "b"}],
        "instructions": [{"kind": "max_words", "value": 3}],
    }
    (tmp_path / "instructions.jsonl").write_text(json.dumps(row) + "\n")
    training, held_out = load(
        codec,
        tmp_path,
        [["a"], ["b"], ["c"]],
        validation=[["x"], ["y"]],
        instructions=tmp_path / "instructions.jsonl",
    )
    assert texts(training) == ["a", "c"]
    assert texts(held_out.prompts) == ["x", "y"]
    assert texts(held_out.instructed) == ["b"]
    assert held_out.instructed[0].instructions[0].holds("not more than")
    assert not held_out.instructed[0].instructions[0].holds("one more than three")


def test_bad_rows_are_put_aside_by_the_first_process_alone(codec, tmp_path):
    good = [[f"ask {number}"] for number in range(200)]
    for rank, expected in ((1, []), (0, ["quarantine.jsonl"])):
        folder = tmp_path / str(rank)
        folder.mkdir()
        path = written(folder / "prompts.jsonl", good)
        text = path.read_text()
        inputs = PpoInputs("policy", path, (RewardSource(model="reward"),), None, None)
        path.write_text(text + "{}\n")
        context = Context(rank, 2, "cpu", 1)
        load_prompts(PpoSection(), inputs, codec, folder, context)
        kept = [file.name for file in folder.iterdir() if not file.name.startswith(".tmp-")]
        assert sorted(set(kept) - {"prompts.jsonl"}) == expected


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
    assert texts(held_out.prompts) == ["same end", "third"]
    assert texts(training) == ["other"]


@pytest.mark.parametrize("count", [1, 4, 5])
def test_too_few_prompts_to_train_and_to_validate_are_refused(codec, tmp_path, count):
    prompts = [[f"ask {number}"] for number in range(count)]
    if count == 5:
        assert len(load(codec, tmp_path, prompts)[0]) == 1
        return
    with pytest.raises(DataError, match=r"0 training and \d validation prompts are left"):
        load(codec, tmp_path, prompts)

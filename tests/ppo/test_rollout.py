"""What a rollout holds: logprobs and values as transformers computes them, each row alone."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from rollouts import (
    LENGTHS,
    PROMPTS,
    Naive,
    ScriptedEngine,
    ScriptedReward,
    make,
    said,
    samplings,
    start_of,
)
from starling.data.records import Message
from starling.models.reward_model import Scored
from starling.ppo.bundles import Bundle
from starling.ppo.config import PpoSection
from starling.ppo.rollout import sample_responses, sampling
from starling.ppo.scorer import Scorer

CASES = {
    "full, shared": {},
    "full, shared, 0.7": {"temperature": 0.7},
    "full, separate": {"critic": "separate"},
    "full, three samples": {"samples_per_prompt": 3, "temperature": 0.7},
    "full, three samples, separate": {"samples_per_prompt": 3, "critic": "separate"},
    "top, shared": {"train": "top"},
    "top, separate, 0.7": {"train": "top", "critic": "separate", "temperature": 0.7},
    "top, three samples, separate": {"train": "top", "critic": "separate", "samples_per_prompt": 3},
    "head, shared": {"train": "head"},
    "head, separate, three samples": {
        "train": "head",
        "critic": "separate",
        "samples_per_prompt": 3,
    },
    "lora, shared": {"train": "lora"},
    "lora, separate, 0.7": {"train": "lora", "critic": "separate", "temperature": 0.7},
    "lora, three samples": {"train": "lora", "samples_per_prompt": 3},
    "no critic": {"advantages": "rloo", "samples_per_prompt": 3},
}
OTHERS = {
    f"{kind}, {name}": (kind, settings)
    for kind in ("gpt2", "bloom")
    for name, settings in CASES.items()
    if name
    in ("full, shared, 0.7", "full, three samples, separate", "top, shared", "lora, separate, 0.7")
}


def assert_as_transformers(kind, made):
    naive, rollout = Naive(kind, made), made.rollout
    mask = rollout.response_mask
    for row, (prompt, response) in enumerate(
        zip(rollout.prompt_ids, rollout.response_ids, strict=True)
    ):
        assert mask[row].tolist() == [t < len(response) for t in range(mask.shape[1])]
        with torch.no_grad():
            logprobs, values = naive.policy(prompt, response)
        reference = naive.reference(prompt, response)
        for got, expected in (
            (rollout.old_logprobs, logprobs),
            (rollout.ref_logprobs, reference),
            (rollout.old_values, values),
        ):
            assert_close(got[row, : len(response)], expected, rtol=2e-5, atol=2e-5)
            assert not got[row, len(response) :].any()
    assert (rollout.old_logprobs - rollout.ref_logprobs).abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_logprobs_and_values_are_those_of_each_conversation_alone(name):
    made = make(**CASES[name])
    assert_as_transformers("mistral", made)
    assert made.rollout.old_values.any() == made.actors.actor_critic.has_critic


@pytest.mark.parametrize("name", OTHERS)
def test_they_are_so_for_a_model_that_does_not_split_and_one_that_does_not_pack(name):
    kind, settings = OTHERS[name]
    assert_as_transformers(kind, make(kind, **settings))


SAMPLED = {
    "shared": {},
    "separate, three samples": {"critic": "separate", "samples_per_prompt": 3},
    "top": {"train": "top", "critic": "separate"},
    "no critic": {"advantages": "rloo", "samples_per_prompt": 3},
}


@pytest.mark.parametrize("name", SAMPLED)
def test_old_logprobs_may_be_the_engines_own_and_all_else_is_as_before(name):
    made = make(old_logprobs="sampler", will_learn=True, **SAMPLED[name])
    recomputed = make(**SAMPLED[name]).rollout
    rollout = made.rollout
    assert torch.equal(rollout.old_logprobs, rollout.sampler_logprobs)
    assert not torch.allclose(rollout.old_logprobs, recomputed.old_logprobs)
    assert_close(rollout.old_values, recomputed.old_values)
    assert_close(rollout.ref_logprobs, recomputed.ref_logprobs)
    assert rollout.trunk.keys() == recomputed.trunk.keys()
    # What was not computed cannot be learned from.
    assert rollout.live is None


def test_another_pad_id_changes_nothing_where_rows_are_padded():
    one, other = start_of("bloom"), start_of("bloom")
    saved = other.codec.tokenizer.saved
    saved.pad_token = saved.convert_ids_to_tokens(77)
    assert other.codec.tokenizer.pad_id != one.codec.tokenizer.pad_id
    found, again = (make("bloom", start=start, critic="separate").rollout for start in (one, other))
    for field in ("old_logprobs", "ref_logprobs", "old_values"):
        assert torch.equal(getattr(found, field), getattr(again, field))


def scripted(responses, *rules, combine=None, **settings):
    """A collector whose engine and reward models follow a script."""
    made = make(**settings)
    models = tuple(ScriptedReward.by(rule) for rule in rules or (len,))
    scorer = Scorer(models, combine or (lambda each: each[0]))
    engine = ScriptedEngine(responses)
    return dataclasses.replace(made.collector, engine=engine, scorer=scorer), made.start.codec


def test_rows_stand_in_the_prompts_order_though_the_engine_finishes_in_another():
    end = start_of().codec.end_id
    (*yes,) = start_of().codec.tokenizer.encode_text(" yes")
    (*no,) = start_of().codec.tokenizer.encode_text(" no")
    responses = [((*yes, end), "stop"), ((*no, *no), "length"), ((end,), "stop")]
    collector, codec = scripted(responses, len)
    prompts = [said("Hi"), said("a much longer question"), said("one", "two", "three")]
    rollout = collector.collect(prompts, samplings(3))
    assert rollout.prompts == tuple(prompts)
    for prompt, ids in zip(prompts, rollout.prompt_ids, strict=True):
        assert list(ids) == codec.encode(prompt.messages, generation_prompt=True).ids
    assert rollout.response_ids == tuple(ids for ids, _ in responses)
    assert rollout.is_finished.tolist() == [True, False, True]
    assert rollout.texts[0] == "yes"
    assert rollout.texts[2] == ""
    assert rollout.response_tokens.tolist() == [len(yes) + 1, 2 * len(no), 1]
    for row, (ids, _) in enumerate(responses):
        assert_close(rollout.sampler_logprobs[row, : len(ids)], -0.04 * torch.tensor(ids))
        assert not rollout.sampler_logprobs[row, len(ids) :].any()
    assert rollout.scores.tolist() == [3.0, len(rollout.texts[1]), 0.0]


def test_requests_carry_each_rows_own_sampling():
    engine = ScriptedEngine([((40,), "stop")] * 3)
    codec = start_of().codec
    section = PpoSection(max_response_tokens=7, temperature=0.6)
    drawn = [sampling(section, seed) for seed in (2, 0, 1)]
    sample_responses(engine, codec, PROMPTS[:3], drawn)
    assert [request.sampling for request in engine.requests] == drawn
    assert [(one.max_tokens, one.temperature, one.seed) for one in drawn] == [
        (7, 0.6, 2),
        (7, 0.6, 0),
        (7, 0.6, 1),
    ]
    # Pure sampling: whatever is cut off would bias every ratio.
    assert {(one.top_k, one.top_p) for one in drawn} == {(0, 1.0)}


def test_text_is_scored_with_its_prompts_mode_and_whether_it_ended():
    end = start_of().codec.end_id
    (*yes,) = start_of().codec.tokenizer.encode_text(" yes")
    collector, _ = scripted([((*yes, end), "stop"), (tuple(yes), "length")], len)
    coding = PROMPTS[2].model_copy(update={"mode": "Code"})
    collector.collect([coding, PROMPTS[0]], samplings(2))
    [model] = collector.scorer.models
    assert model.asked == [
        Scored((*coding.messages, Message(role="assistant", content="yes")), "Code", True),
        Scored((*PROMPTS[0].messages, Message(role="assistant", content="yes")), None, False),
    ]


def test_several_reward_models_are_kept_apart_beside_what_they_amount_to():
    responses = [((40, 41), "stop"), ((42,), "stop"), ((43, 44, 45), "stop")]
    scores = iter(range(100))
    collector, _ = scripted(
        responses, lambda _: next(scores), lambda _: 9.0, combine=lambda each: each.sum(dim=0)
    )
    rollout = collector.collect(PROMPTS[:3], samplings(3))
    assert rollout.each_score.tolist() == [[0.0, 1.0, 2.0], [9.0, 9.0, 9.0]]
    assert rollout.scores.tolist() == [9.0, 10.0, 11.0]


def test_the_samples_of_one_prompt_share_a_number_and_a_bundle():
    rollout = make(samples_per_prompt=3).rollout
    assert rollout.group.tolist() == [row // 3 for row in range(18)]
    assert rollout.response_tokens.tolist() == list(LENGTHS)
    bundles = rollout.bundles([3, 4, 5, 8], most=None)
    assert bundles == [
        Bundle(rollout.prompt_ids[3], rollout.response_ids[3:6], (3, 4, 5)),
        Bundle(rollout.prompt_ids[8], rollout.response_ids[8:9], (8,)),
    ]
    assert len(rollout.bundles([3, 4, 5], most=1)) == 3


@pytest.mark.parametrize(("train", "is_split"), [("full", False), ("top", True), ("lora", False)])
def test_states_of_a_frozen_trunk_are_kept_by_prompt_and_row_each_once(train, is_split):
    made = make(train=train, samples_per_prompt=3, microbatch=2)
    rollout, trunk = made.rollout, made.actors.actor_critic.trunk
    assert (trunk is not None) == is_split
    if not is_split:
        assert not rollout.trunk
        assert rollout.trunk_states(trunk, rollout.bundles([0], most=1)) is None
        return
    assert set(rollout.trunk) == {*rollout.prompt_ids, *range(18)}
    for row, ids in enumerate(rollout.response_ids):
        assert len(rollout.trunk[row].states) == len(ids) - 1
    # Those of the layer below, by transformers, in the order of a forward.
    chosen = rollout.bundles([9, 10, 4], most=None)
    expected = []
    for each in chosen:
        runs = [lower_states(each.prompt + ids) for ids in each.responses]
        size = len(each.prompt)
        expected += [runs[0][:size], *(run[size:-1] for run in runs)]
    assert_close(rollout.trunk_states(trunk, chosen), torch.cat(expected), rtol=1e-5, atol=1e-5)


def lower_states(ids):
    with torch.no_grad():
        found = start_of().model(torch.tensor([ids]), output_hidden_states=True)
    return found.hidden_states[1][0]

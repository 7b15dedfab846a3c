"""Scores against a naive forward of transformers' own sequence classifier.

The naive side tokenises a plain f-string with AutoTokenizer and scores one unpadded row at a time.
"""

import json
import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from starling.base.errors import DataError, ModelError
from starling.data.records import Message
from starling.models.causal_lm import (
    TOKENS_PER_BATCH,
    Batch,
    length_batches,
    load_language_model,
    save_model,
)
from starling.models.packing import why_not_packed
from starling.models.reward_model import (
    RewardModel,
    Scored,
    row_scores,
    score_head,
    sequence_scores,
)
from tiny import tiny_policy, tiny_policy_folder

QUESTIONS = ["What is 2 + 2?", "Hi", "Tell me more about the sum of it all, please."]
ANSWERS = ["4", "The answer is four, I am sure.", "No.", "x" * 40]


def scored(question, answer, **options):
    messages = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return Scored(messages, **options)


def written(question, answer, mode="GPT4 Correct"):
    return f"{mode} User: {question}<|end_of_turn|>{mode} Assistant: {answer}<|end_of_turn|>"


@pytest.fixture(scope="module")
def reward_model(reward_folder):
    return RewardModel.load(str(reward_folder))


@pytest.fixture(scope="module")
def theirs(reward_folder):
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
    return model, AutoTokenizer.from_pretrained(reward_folder)


@torch.no_grad()
def naive_score(model, ids):
    return float(model(torch.tensor([ids])).logits[0, 0])


def by_reading(model, ids, position):
    """The head applied to one position of the backbone's output for one unpadded row."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, position]
        return float(hidden @ model.score.weight[0])


def test_a_score_is_the_sequence_classifiers_logit(reward_model, theirs):
    model, tokenizer = theirs
    for mode in ("GPT4 Correct", "Code"):
        items = [scored(q, a, mode=mode) for q in QUESTIONS for a in ANSWERS]
        strings = [written(q, a, mode) for q in QUESTIONS for a in ANSWERS]
        expected = [naive_score(model, tokenizer(string).input_ids) for string in strings]
        assert_close(reward_model.score(items), torch.tensor(expected))
        assert len({round(score, 4) for score in expected}) == len(expected)


def test_a_cut_answer_is_scored_without_an_end_marker(reward_model, theirs):
    model, tokenizer = theirs
    ids = tokenizer(written("Hi", "The answer").removesuffix("<|end_of_turn|>")).input_ids
    [found] = reward_model.score([scored("Hi", "The answer", finished=False)])
    assert float(found) == pytest.approx(naive_score(model, ids), abs=1e-5)
    [closed] = reward_model.score([scored("Hi", "The answer")])
    assert abs(float(closed - found)) > 1e-3


@pytest.mark.parametrize("limit", [10_000, 120, 1])
def test_a_score_does_not_depend_on_its_companions(reward_model, monkeypatch, limit):
    items = [scored(q, a) for q in QUESTIONS for a in ANSWERS]
    alone = torch.cat([reward_model.score([item]) for item in items])
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", limit)
    assert_close(reward_model.score(items), alone)
    assert_close(reward_model.score(items[::-1]), alone.flip(0))


@torch.no_grad()
def test_padding_after_the_end_changes_nothing(reward_model):
    ids = reward_model.encode(scored("Hi", "The answer"))[0]
    plain = sequence_scores(reward_model.model, Batch([ids], 4))
    for filler in (4, 0, 3, 77):
        beside = sequence_scores(reward_model.model, Batch([ids, [5] * (len(ids) + 17)], filler))
        assert_close(beside[:1], plain)


@pytest.mark.parametrize("special", [4, 0, 2, 3])
def test_pad_and_other_special_ids_inside_the_text_do_not_move_the_read_out(
    reward_model, theirs, special
):
    model, _ = theirs
    middle = [1, 70, special, special, 80, 3]
    at_the_end = [1, 70, 80, special, special]
    longer = [*middle, *[70] * 30]
    apart = reward_model.raw_scores([[middle], [at_the_end], [longer]])
    together = reward_model.raw_scores([[middle, at_the_end, longer]])
    for found in ([score for [score] in apart], together[0]):
        for ids, score in zip((middle, at_the_end, longer), found, strict=True):
            assert score == pytest.approx(by_reading(model, ids, -1), abs=1e-5)
        assert abs(found[1] - by_reading(model, at_the_end, -3)) > 1e-3


def test_the_last_token_counts(reward_model):
    [scores] = reward_model.raw_scores([[[1, 70, 80, 3], [1, 70, 80, 2], [1, 70, 80]]])
    assert len({round(score, 4) for score in scores}) == 3


IDS = st.lists(st.integers(0, 299), min_size=1, max_size=12)


@given(rows=st.lists(st.tuples(IDS, st.lists(IDS, min_size=1, max_size=4)), max_size=5))
def test_rows_score_as_their_conversations_alone(reward_model, theirs, rows):
    rows = [[[*prompt, *answer] for answer in answers] for prompt, answers in rows]
    found = reward_model.raw_scores(rows)
    expected = [[by_reading(theirs[0], ids, -1) for ids in row] for row in rows]
    assert [len(row) for row in found] == [len(row) for row in rows]
    for ours, naive in zip(found, expected, strict=True):
        assert ours == pytest.approx(naive, abs=1e-5)


PAIRED = [[[1, 70, 71, 72, 3], [1, 70, 71, 9]], [[1, 5, 3]], [[1, 8, 80], [1, 8], [1, 8, 81, 5]]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_are_those_of_the_conversations_alone_also_where_nothing_can_be_packed(
    reward_folder, attention
):
    ours = RewardModel.load(str(reward_folder)).model
    theirs = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
    ours.set_attn_implementation(attention)
    assert (why_not_packed(ours) is None) == (attention == "sdpa")
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.25])
    scores = row_scores(ours, PAIRED, 4)
    (scores * weights).sum().backward()
    naive = [theirs(torch.tensor([ids])).logits[0, 0] for row in PAIRED for ids in row]
    (torch.stack(naive) * weights).sum().backward()
    assert_close(scores, torch.stack(naive))
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # Sums of a hundred terms, in another order.
        assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: name + m)


def test_conversations_of_one_prompt_and_mode_share_it(reward_folder):
    reward_model = RewardModel.load(str(reward_folder))
    items = [scored(QUESTIONS[2], answer, mode=mode) for answer in "abc" for mode in (None, "Code")]
    lengths = [len(reward_model.encode(item)[0]) for item in items]
    seen: list[int] = []
    embedding = reward_model.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, result: seen.append(args[0].numel()))
    reward_model.score(items)
    # An answer of one letter and its end: 2 of each conversation's tokens are its own, and a space.
    assert sum(seen) < sum(lengths[:2]) + 3 * len(items)
    assert sum(seen) < sum(lengths) / 2


def test_autocast_does_not_round_scores(reward_model):
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        packed = row_scores(reward_model.model, PAIRED, 4)
        apart = row_scores(reward_model.model, [[ids] for row in PAIRED for ids in row], 4)
    for scores in (packed, apart):
        assert scores.dtype == torch.float32
        assert not torch.equal(scores, scores.bfloat16().float())


def test_what_lies_behind_a_score_is_told(reward_model):
    made = RewardModel(
        reward_model.model, reward_model.codec, mean=2.0, std=4.0, max_length=40, truncate="left"
    )
    items = [scored("Hi", "No."), scored(QUESTIONS[2], "x" * 40)]
    short, long = made.score_each(items)
    assert (short.num_tokens, short.was_cut) == (len(reward_model.encode(items[0])[0]), False)
    assert (long.num_tokens, long.was_cut) == (40, True)
    assert short.raw_score == pytest.approx(float(reward_model.score(items[:1])), abs=1e-6)
    for found in (short, long):
        assert found.score == pytest.approx((found.raw_score - 2) / 4)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_refused_by_their_ids(reward_folder, broken):
    reward_model = RewardModel.load(str(reward_folder))
    question = reward_model.codec.tokenizer.saved.convert_tokens_to_ids("?")
    with torch.no_grad():
        reward_model.model.get_input_embeddings().weight[question] = broken
    items = [scored("Hi", "No."), scored("Hi", "No?"), scored("Hi?", "Yes", id="mine")]
    with pytest.raises(DataError, match=r"scores of 2 of 3 conversations .* \(2, mine\)"):
        reward_model.score(items)
    assert reward_model.score(items[:1]).isfinite().all()


def test_a_model_that_has_scored_is_saved_as_before(reward_folder, tmp_path):
    reward_model = RewardModel.load(str(reward_folder))
    reward_model.score([scored("Hi", "No."), scored("Hi", "Yes.")])
    reward_model.save(tmp_path / "model")
    before, after = (
        json.loads((folder / "config.json").read_text())
        for folder in (reward_folder, tmp_path / "model")
    )
    assert before == after


def test_a_base_without_a_pad_token_gets_one_that_is_not_its_end(tmp_path):
    folder = tiny_policy_folder(tmp_path / "base")
    path = folder / "tokenizer_config.json"
    stored = json.loads(path.read_text())
    del stored["pad_token"]
    path.write_text(json.dumps(stored))
    edit_config(folder, pad_token_id=None)
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    made = RewardModel.from_language_model(str(folder), seed=0)
    assert made.model.config.pad_token_id == made.codec.tokenizer.pad_id != made.codec.end_id
    made.save(tmp_path / "reward")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    items = [scored("Hi", answer) for answer in ANSWERS]
    for item, score in zip(items, made.score(items).tolist(), strict=True):
        assert score == pytest.approx(naive_score(theirs, made.encode(item)[0]), abs=1e-5)


def test_a_base_whose_tokenizer_knows_more_ids_than_its_embedding_is_refused(tmp_path):
    folder = tiny_policy_folder(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<one>", "<more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"highest id is 301 \(<more>\) and the embedding has 300"):
        RewardModel.from_language_model(str(folder), seed=0)


def test_no_items_have_no_scores(reward_model):
    assert reward_model.score([]).shape == (0,)


def test_scores_are_normalised_by_the_stored_mean_and_standard_deviation(reward_model):
    items = [scored(q, ANSWERS[0]) for q in QUESTIONS]
    shifted = RewardModel(reward_model.model, reward_model.codec, mean=2.0, std=4.0)
    assert_close(shifted.score(items), (reward_model.score(items) - 2) / 4)


def test_a_saved_reward_model_scores_bit_for_bit_the_same(reward_model, tmp_path):
    before = RewardModel(
        reward_model.model, reward_model.codec, mean=0.1, std=1.7, max_length=33, truncate="right"
    )
    before.save(tmp_path / "model")
    after = RewardModel.load(str(tmp_path / "model"))
    items = [scored(q, a) for q in QUESTIONS for a in ANSWERS]
    assert torch.equal(before.score(items), after.score(items))
    stored = (after.mean, after.std, after.max_length, after.truncate)
    assert stored == (0.1, 1.7, 33, "right")


def test_a_saved_reward_model_is_a_sequence_classifier_with_one_label(reward_folder):
    config = json.loads((reward_folder / "config.json").read_text())
    assert config["architectures"] == ["MistralForSequenceClassification"]
    assert config["pad_token_id"] == 4
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    assert model.num_labels == 1
    assert model.score.bias is None
    assert model.score.weight.shape == (1, 32)


def test_a_causal_model_is_no_reward_model(policy_folder):
    with pytest.raises(ModelError, match=r"found a MistralForCausalLM .* reward stage"):
        RewardModel.load(str(policy_folder))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_classifier_with_two_labels_is_no_reward_model(reward_folder, tmp_path):
    copied = shutil.copytree(reward_folder, tmp_path / "copy")
    edit_config(copied, id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    with pytest.raises(ModelError, match=r"with 2 label\(s\).*models\.published_reward"):
        RewardModel.load(str(copied))


def test_a_missing_reward_model_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match="absent"):
        RewardModel.load(str(tmp_path / "absent"))


def test_cutting_from_the_left_keeps_the_end_and_from_the_right_the_beginning(reward_model):
    item = scored("Hi", "The answer is four.")
    whole, was_cut = reward_model.encode(item)
    assert not was_cut
    assert whole[-1] == 3
    model, codec = reward_model.model, reward_model.codec
    for truncate, expected in (("left", whole[-9:]), ("right", whole[:9])):
        cutting = RewardModel(model, codec, max_length=9, truncate=truncate)
        assert cutting.encode(item) == (expected, True)
    exact = RewardModel(model, codec, max_length=len(whole))
    assert exact.encode(item) == (whole, False)


def test_another_side_to_cut_is_refused(reward_folder, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(reward_folder, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"starling_truncate": "middle"}))
    with pytest.raises(ModelError, match="truncate is 'middle'; it must be left or right"):
        RewardModel.load(str(changed))


def test_a_trained_reward_model_without_its_head_is_refused(reward_folder, tmp_path):
    headless = tmp_path / "headless"
    shutil.copytree(reward_folder, headless)
    weights = load_file(headless / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="headless: the weights lack score.weight"):
        RewardModel.load(str(headless))


def test_a_new_head_is_made_without_a_word(policy_folder, capfd):
    RewardModel.from_language_model(str(policy_folder), seed=0)
    assert capfd.readouterr() == ("", "")


def test_the_longest_length_is_at_most_the_models_positions(reward_folder, tmp_path):
    assert RewardModel.load(str(reward_folder)).max_length == 256
    copied = shutil.copytree(reward_folder, tmp_path / "copy")
    edit_config(copied, starling_max_length=9999)
    assert RewardModel.load(str(copied)).max_length == 256


def test_a_new_head_stands_on_the_policys_weights(policy_folder):
    reward_model = RewardModel.from_language_model(str(policy_folder), seed=0)
    policy = load_language_model(str(policy_folder)).model.model.state_dict()
    trunk = reward_model.model.model.state_dict()
    assert trunk.keys() == policy.keys()
    assert all(torch.equal(trunk[name], policy[name]) for name in policy)
    assert not reward_model.model.training


def test_a_new_head_follows_its_seed_and_has_the_spread_of_stiennon(policy_folder):
    state = torch.get_rng_state()
    heads = [
        score_head(RewardModel.from_language_model(str(policy_folder), seed=seed).model).weight
        for seed in (0, 0, 1, 2, 3, 4)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(heads[0], heads[1])
    drawn = torch.cat(heads[1:]).detach().flatten()
    assert not torch.equal(heads[1], heads[2])
    # 160 draws of N(0, 1/33): the sample's deviation is off by 6 % (one sigma).
    assert float(drawn.std()) == pytest.approx(1 / math.sqrt(33), rel=0.2)


def test_a_reward_model_keeps_the_chat_format_of_its_policy(tmp_path):
    tiny_policy_folder(tmp_path / "policy")
    made = RewardModel.from_language_model(str(tmp_path / "policy"), seed=0, chat_format="plain")
    made.save(tmp_path / "reward")
    assert RewardModel.load(str(tmp_path / "reward")).codec.format.name == "plain"


def test_a_head_with_a_bias_is_refused(tmp_path):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    loaded = tiny_policy()
    config = RobertaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    save_model(tmp_path / "model", RobertaForSequenceClassification(config), loaded.codec)
    with pytest.raises(ModelError, match="score head|bias"):
        RewardModel.load(str(tmp_path / "model"))


@pytest.mark.parametrize(("device", "limit"), [("cpu", 1024), ("cuda:1", 16_384)])
@given(lengths=st.lists(st.integers(1, 9000), max_size=40))
def test_batches_hold_every_index_once_within_the_devices_limit(device, limit, lengths):
    batches = length_batches(lengths, device)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= limit

"""Token logprobs against transformers' own forward; new models, and saving.

Expected logprobs come from one unpadded row at a time through the causal LM itself, with the shift
to the next token written out by hand.
"""

import shutil

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from starling.base.hashing import hash_tree
from starling.models import causal_lm
from starling.models.causal_lm import (
    Batch,
    hidden_states,
    load_language_model,
    new_language_model,
    padded_mask,
    predicting_states,
    save_model,
    state_logprobs,
    token_logprobs,
)
from tiny import SHAPE, absolute_position_model, eleven_token_model, tiny_policy, tiny_tokenizer

ROWS = [[1, 5, 3, 9, 2, 7], [1, 8], [1, 4, 4, 10, 6]]
MASKS = [[False, False, True, True, False, True], [False, True], [False, False, True, True, True]]
PAD = 0


@pytest.fixture(scope="module")
def model():
    return eleven_token_model()


def naive_logprobs(model, ids, temperature=1.0):
    """log p of each token but the first, one row, no padding, all logits at once."""
    logits = model(torch.tensor([ids])).logits[0].double() / temperature
    distribution = torch.log_softmax(logits, dim=-1)
    return [None] + [distribution[t - 1, ids[t]] for t in range(1, len(ids))]


def ours(model, rows, masks, extra=0, **options):
    width = max(len(row) for row in rows) + extra
    token_ids = torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])
    mask = torch.tensor([[*row, *[False] * (width - len(row))] for row in masks])
    hidden = hidden_states(model, token_ids)
    return token_logprobs(model, hidden, token_ids, mask, **options)


@pytest.mark.parametrize("make", [eleven_token_model, absolute_position_model])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_logprobs_are_those_of_a_naive_full_forward(make, temperature):
    model = make()
    found = ours(model, ROWS, MASKS, temperature=temperature)
    assert found.dtype == torch.float32
    for row, (ids, mask) in enumerate(zip(ROWS, MASKS, strict=True)):
        expected = naive_logprobs(model, ids, temperature)
        for t in range(found.shape[1]):
            if t < len(ids) and mask[t]:
                assert_close(found[row, t].double(), expected[t], rtol=1e-5, atol=1e-5)
            else:
                assert found[row, t] == 0


def test_extra_padding_on_the_right_changes_nothing(model):
    plain = ours(model, ROWS, MASKS)
    padded = ours(model, ROWS, MASKS, extra=5)
    assert_close(padded[:, : plain.shape[1]], plain)
    assert not padded[:, plain.shape[1] :].any()


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("logit_rows", [1, 3, 4096])
def test_the_gradient_in_chunks_is_that_of_cross_entropy(model, monkeypatch, logit_rows):
    monkeypatch.setattr(causal_lm, "MOST_LOGITS", 11 * logit_rows)
    ids = [1, 5, 3, 9, 2, 7, 4]
    found = gradients(model, -ours(model, [ids], [[False, *[True] * 6]]).sum())
    logits = model(torch.tensor([ids])).logits[0]
    expected = gradients(
        model,
        torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum"),
    )
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # Sums of products in another order, on gradients of size 100.
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_chunks_give_the_same_logprobs_without_a_gradient_too(model, monkeypatch):
    whole = ours(model, ROWS, MASKS, temperature=0.7)
    monkeypatch.setattr(causal_lm, "MOST_LOGITS", 2 * 11 + 1)
    assert_close(ours(model, ROWS, MASKS, temperature=0.7), whole)


def head_and_states(rows=7, vocabulary=13, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(5, vocabulary, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocabulary, 5, generator=rng))
    states = torch.randn(rows, 5, generator=rng).to(dtype).requires_grad_(True)
    targets = torch.randint(0, vocabulary, (rows,), generator=rng)
    return head, states, targets


def by_autograd(head, states, targets, temperature):
    """log softmax of all logits at once, at the targets."""
    logits = head(states).float() / temperature
    return torch.log_softmax(logits, dim=-1)[torch.arange(len(targets)), targets]


def both_gradients(found, head, states):
    weights = torch.linspace(-1, 2, len(found))
    return torch.autograd.grad((weights * found).sum(), (head.weight, states))


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_logprobs_of_states_and_their_own_backward_are_autograds(chunk, temperature, monkeypatch):
    monkeypatch.setattr(causal_lm, "MOST_LOGITS", 13 * chunk)
    head, states, targets = head_and_states()
    found = state_logprobs(head, states, targets, temperature=temperature)
    expected = by_autograd(head, states, targets, temperature)
    assert_close(found, expected)
    for own, theirs in zip(
        both_gradients(found, head, states), both_gradients(expected, head, states), strict=True
    ):
        assert_close(own, theirs, rtol=1e-5, atol=1e-6)


def test_the_derivative_is_the_difference_quotient():
    head, states, targets = head_and_states()
    head, states = head.double(), states.detach().double().requires_grad_(True)
    # The loss is float32, so the steps are large and the tolerance is theirs.
    assert torch.autograd.gradcheck(
        lambda states: state_logprobs(head, states, targets, temperature=0.7),
        states,
        eps=1e-2,
        atol=2e-3,
        rtol=1e-2,
        nondet_tol=0.0,
    )


@pytest.mark.parametrize("chunk", [2, 100])
def test_bfloat16_logits_have_float32_logprobs_and_gradients_of_their_own_kind(chunk, monkeypatch):
    monkeypatch.setattr(causal_lm, "MOST_LOGITS", 13 * chunk)
    head, states, targets = head_and_states(dtype=torch.bfloat16)
    found = state_logprobs(head, states, targets, temperature=0.7)
    assert found.dtype == torch.float32
    expected = by_autograd(head, states, targets, 0.7)
    # The same bfloat16 logits, and float32 from there on.
    assert_close(found, expected)
    for own, theirs in zip(
        both_gradients(found, head, states), both_gradients(expected, head, states), strict=True
    ):
        assert own.dtype == torch.bfloat16
        assert_close(own, theirs, rtol=1.6e-2, atol=1e-2)


def test_logits_of_any_size_stay_finite():
    head = torch.nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1e4], [0.0], [-1e4]]))
    states = torch.ones(3, 1, requires_grad=True)
    found = state_logprobs(head, states, torch.tensor([0, 1, 2]), temperature=0.5)
    assert found.tolist() == [0.0, -2e4, -4e4]
    found.sum().backward()
    assert states.grad.isfinite().all()


@pytest.mark.parametrize("learns", [True, False])
def test_no_more_logits_than_a_chunks_are_made_or_kept(learns, monkeypatch):
    rows, vocabulary, chunk = 40, 32_002, 4
    monkeypatch.setattr(causal_lm, "MOST_LOGITS", vocabulary * chunk)
    head, states, targets = head_and_states(rows, vocabulary)
    made, kept = [], []
    head.register_forward_hook(lambda _module, _given, output: made.append(output.shape[0]))
    with (
        torch.set_grad_enabled(learns),
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
        ),
    ):
        found = state_logprobs(head, states, targets)
    assert made == [chunk] * (rows // chunk)
    assert max(kept, default=0) < vocabulary
    if learns:
        found.sum().backward()
        # Each chunk once more, for the backward pass.
        assert made == [chunk] * (2 * rows // chunk)


def test_no_states_have_no_logprobs():
    head, states, targets = head_and_states()
    assert state_logprobs(head, states[:0], targets[:0]).shape == (0,)


def test_a_mask_that_keeps_nothing_gives_zeros(model):
    assert not ours(model, [[1, 2]], [[False, False]]).any()


def test_a_mask_that_is_not_bool_is_refused_at_the_call(model):
    # The import hook of conftest.py checks every annotated shape and type during tests.
    ids = torch.tensor(ROWS[:1])
    hidden = hidden_states(model, ids)
    with pytest.raises(TypeCheckError, match="response_mask"):
        token_logprobs(model, hidden, ids, torch.ones(1, 6))
    with pytest.raises(TypeCheckError, match="response_mask"):
        token_logprobs(model, hidden, ids, torch.ones(1, 5, dtype=torch.bool))


def test_bfloat16_weights_still_give_float32_logprobs():
    model = eleven_token_model().bfloat16()
    found = ours(model, ROWS, MASKS)
    assert found.dtype == torch.float32
    head = model.get_output_embeddings()
    hidden = hidden_states(model, torch.tensor([ROWS[2]]))
    expected = torch.log_softmax(head(hidden[0, 3]).float(), -1)[ROWS[2][4]]
    assert_close(found[2, 4], expected, rtol=1.6e-2, atol=1e-2)


@torch.no_grad()
def test_editing_a_token_changes_the_states_after_it_and_not_its_own(model):
    ids = torch.tensor([[1, 5, 3, 9, 2, 7]])
    edited = ids.clone()
    edited[0, 3] = 8
    before, after = (predicting_states(hidden_states(model, tokens)) for tokens in (ids, edited))
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.isclose(before[:, 4:], after[:, 4:]).all(dim=-1).any()
    assert not before[:, 0].any()
    # The state for token 1 is the backbone's after token 0.
    assert torch.equal(before[:, 1], hidden_states(model, ids)[:, 0])


def test_a_batch_is_padded_on_the_right_and_knows_its_lengths():
    batch = Batch([[7, 8, 9], [7]], 4)
    assert batch.token_ids.tolist() == [[7, 8, 9], [7, 4, 4]]
    assert batch.lengths.tolist() == [3, 1]
    assert padded_mask([[True], [False, True]]).tolist() == [[True, False], [False, True]]


def test_a_new_model_follows_its_seed_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    one, same, other = (tiny_policy(seed).model.state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_a_new_model_has_the_shape_asked_for_and_tied_embeddings():
    model = new_language_model(SHAPE | {"max_length": 99}, tiny_tokenizer(), "openchat", seed=0)
    config = model.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 2, 300)
    assert (config.max_position_embeddings, config.intermediate_size) == (99, 48)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    embedding, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    assert embedding.weight is head.weight
    assert not model.model.training


def test_a_saved_model_loads_in_transformers_with_equal_weights(policy_folder):
    theirs = AutoModelForCausalLM.from_pretrained(policy_folder)
    ours = tiny_policy().model
    for name, tensor in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
    assert theirs.generation_config.eos_token_id == [3]
    assert theirs.generation_config.pad_token_id == 4
    assert theirs.generation_config.bos_token_id == 1


def test_a_loaded_model_speaks_the_format_it_was_saved_with(policy_folder):
    loaded = load_language_model(str(policy_folder))
    assert loaded.codec.format.name == "openchat"
    assert loaded.codec.stop_ids == {3}
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert load_language_model(str(policy_folder), chat_format="plain").codec.format.name == "plain"


@pytest.fixture
def copied(policy_folder, tmp_path):
    return shutil.copytree(policy_folder, tmp_path / "copy")


def test_a_failed_save_leaves_the_earlier_model_whole(copied, monkeypatch):
    before = hash_tree(copied)
    loaded = tiny_policy(1)

    def disk_full(*args, **options):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(causal_lm, "save_tokenizer", disk_full)
        with pytest.raises(OSError, match="no space"):
            save_model(copied, loaded.model, loaded.codec)
    assert hash_tree(copied) == before
    # What the failed save left behind does not disturb the next.
    save_model(copied, loaded.model, loaded.codec)
    assert hash_tree(copied) != before
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]

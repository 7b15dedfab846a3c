"""A trunk and the layers above it are the model: states, gradients, and what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ranks import Settings
from starling.models.adapters import choose_parameters
from starling.models.packing import Packed, PackedRow, packed_reads
from starling.models.trunk import Trunk, why_not_split
from tiny import absolute_position_model, sharpen

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
KINDS = {
    "mistral": (MistralForCausalLM, MistralConfig(sliding_window=None, **SHAPE)),
    "mistral, window of 4": (MistralForCausalLM, MistralConfig(sliding_window=4, **SHAPE)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "qwen3, windows in two layers": (
        Qwen3ForCausalLM,
        Qwen3Config(
            head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=2, **SHAPE
        ),
    ),
}
ALTERNATING = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 4,
    "head_dim": 8,
}
ROWS = [
    PackedRow((1, 2, 3, 4, 5), ((6, 7, 8), (9,), (10, 11)), 4),
    PackedRow((12,), ((13, 14), (15,)), 0),
    PackedRow((16, 17, 18, 19, 20, 21), (), 3),
]


def model_of(name):
    kind, config = KINDS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(copy.deepcopy(config)).eval()
    sharpen(model, 6.0)
    return model


def top_of(name, layers):
    """The model with so many layers learning, and its trunk."""
    model = choose_parameters(model_of(name), Settings("top", top_layers=layers))
    return model, Trunk(model, 4 - layers)


def read_alone(model, rows):
    """transformers' final states where `packed_reads` reads: from `read_from` on, and answers."""
    states = []
    for row in rows:
        runs = [row.prompt + answer for answer in row.answers] or [row.prompt]
        found = [
            model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
            for ids in runs
        ]
        size = len(row.prompt)
        states += [found[0][row.read_from : size], *(run[size:] for run in found)]
    return torch.cat(states)


def gradients(model, states):
    model.zero_grad()
    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("layers", [1, 3, 4])
def test_the_layers_above_go_on_from_the_trunk_as_the_whole_model_does(name, layers):
    plain = choose_parameters(model_of(name), Settings("top", top_layers=layers))
    expected = read_alone(plain, ROWS)
    expected_gradients = gradients(plain, expected)
    model, trunk = top_of(name, layers)
    packed = Packed(ROWS)
    states = trunk.states(model, packed)
    assert not states.requires_grad
    found = packed_reads(trunk.upper, packed, states)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found_gradients = gradients(model, found)
    assert found_gradients.keys() == expected_gradients.keys()
    assert any(f"layers.{4 - layers}." in n for n in found_gradients)
    gap = sum((found_gradients[n] - g).square().sum() for n, g in expected_gradients.items())
    assert gap < 1e-10 * sum(g.square().sum() for g in expected_gradients.values())


def test_states_of_rows_kept_apart_join_in_any_order():
    model, trunk = top_of("mistral, window of 4", 2)
    states = [trunk.kept(trunk.states(model, Packed([row]))) for row in ROWS]
    with torch.no_grad():
        for order in ((0, 1, 2), (2, 0, 1)):
            rows = [ROWS[number] for number in order]
            joined = trunk.joined([states[number] for number in order])
            packed = Packed(rows)
            assert_close(joined, trunk.states(model, packed), rtol=1e-5, atol=1e-5)
            found = packed_reads(trunk.upper, packed, joined)
            assert_close(found, read_alone(model, rows), rtol=1e-5, atol=1e-5)


def test_views_share_the_models_own_weights_and_no_layer_is_in_both():
    model, trunk = top_of("llama", 1)
    names = {id(weight): name for name, weight in model.named_parameters()}
    upper = {names[id(weight)] for weight in trunk.upper.parameters()}
    assert {name for name in names.values() if ".layers.3." in name} < upper
    assert {name for name in upper if ".layers.3." not in name} == {"model.norm.weight"}
    # The model itself is as it was.
    assert len(model.get_decoder().layers) == 4
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert_close(model(ids).logits, model_of("llama")(ids).logits)


def stale(change):
    model, trunk = top_of("llama", 2)
    states = trunk.kept(trunk.states(model, Packed(ROWS)))
    trunk.joined([states])
    with torch.no_grad():
        change(model)
    return trunk, states


def replaced(model):
    embeddings = model.get_input_embeddings()
    embeddings.weight = nn.Parameter(embeddings.weight.detach().clone(), requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.get_input_embeddings().weight.add_(0.0),
        lambda model: model.get_decoder().layers[1].input_layernorm.weight.mul_(1.1),
        lambda model: model.load_state_dict(model.state_dict()),
        replaced,
    ],
)
def test_states_of_a_trunk_that_has_changed_since_are_refused(change):
    trunk, states = stale(change)
    with pytest.raises(
        RuntimeError, match="the trunk has changed since these states were computed"
    ):
        trunk.joined([states])


def test_a_change_above_the_trunk_leaves_its_states_good():
    trunk, states = stale(lambda model: model.get_decoder().layers[2].mlp.up_proj.weight.mul_(2))
    assert trunk.joined([states]).equal(states.states)
    trunk, states = stale(lambda model: model.get_output_embeddings().weight.mul_(2))
    trunk.joined([states, states])


def test_a_trunk_that_is_to_learn_is_refused():
    model = choose_parameters(model_of("llama"), Settings("top", top_layers=2))
    with pytest.raises(ValueError, match="weights of the trunk are to learn"):
        Trunk(model, 3)
    tied = model_of("llama")
    tied.get_output_embeddings().weight = tied.get_input_embeddings().weight
    choose_parameters(tied, Settings("top", top_layers=2))
    with pytest.raises(ValueError, match="1 weights of the trunk are to learn"):
        Trunk(tied, 2)


def test_a_model_that_names_its_layers_otherwise_cannot_be_split():
    model = absolute_position_model()
    assert isinstance(model, GPT2LMHeadModel)
    assert "has no layers, norm, embed_tokens" in (why_not_split(model, 0) or "")
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot be split: its backbone has no"):
        Trunk(model, 0)


OTHERS = {
    # Granite scales what comes in, and would scale the trunk's states again.
    "granite": ({"embedding_multiplier": 12.0}, 2, False),
    # Gemma 3 rotates a layer by its number in the list: the view's, not the model's.
    "gemma3_text": (ALTERNATING, 1, False),
    "gemma3_text, after a pair": (ALTERNATING, 2, True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_where_the_layers_above_would_make_something_else_it_is_found_out(name):
    settings, layers, can_be = OTHERS[name]
    config = AutoConfig.for_model(name.partition(",")[0], **SHAPE, **settings)
    reason = why_not_split(AutoModelForCausalLM.from_config(config).eval(), layers)
    assert (reason is None) == can_be
    assert can_be or "not what it makes of the ids" in reason


def test_a_model_that_cannot_be_packed_cannot_be_split():
    model = model_of("llama")
    model.set_attn_implementation("eager")
    assert "computed by eager" in (why_not_split(model, 2) or "")


@pytest.mark.parametrize("name", KINDS)
def test_plain_models_can_be_split_anywhere(name):
    assert [why_not_split(model_of(name), layers) for layers in range(5)] == [None] * 5

"""Which weights learn, and what is left of adapters when they are merged and saved."""

import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ranks import Settings
from starling.base.context import Context
from starling.base.errors import InputError, RecipeError
from starling.models.adapters import (
    blocks_of,
    choose_parameters,
    merged,
    untie,
    without_adapters,
)
from starling.models.causal_lm import Batch
from starling.models.parallel import parallel
from starling.models.reward_model import RewardModel, sequence_scores
from starling.models.training import adamw, constant
from tiny import absolute_position_model, tiny_policy

LAST_BLOCK = {
    f"model.layers.1.{name}.weight"
    for name in (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        "input_layernorm",
        "post_attention_layernorm",
    )
}
SEQUENCES = [[20 + (place * row) % 200 for place in range(6 + row)] for row in range(1, 5)]


def learning(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def reward_model(policy_folder):
    return RewardModel.from_language_model(str(policy_folder), seed=0)


@pytest.mark.parametrize(
    ("train", "expected"),
    [("head", {"score.weight"}), ("top", {"score.weight", "model.norm.weight", *LAST_BLOCK})],
)
def test_the_head_of_a_reward_model_learns_alone_or_with_the_top(policy_folder, train, expected):
    model = reward_model(policy_folder).model
    assert choose_parameters(model, Settings(train)) is model
    assert learning(model) == expected
    choose_parameters(model, Settings("full"))
    assert learning(model) == {name for name, _ in model.named_parameters()}


def test_a_language_models_tied_head_takes_the_embeddings_along_but_not_with_adapters():
    model = tiny_policy().model
    choose_parameters(model, Settings("top"))
    assert learning(model) == {"model.embed_tokens.weight", "model.norm.weight", *LAST_BLOCK}
    choose_parameters(model, Settings("lora"))
    assert all(".lora_A." in name or ".lora_B." in name for name in learning(model))


def test_the_final_norm_is_found_where_it_is_named_otherwise():
    model = choose_parameters(absolute_position_model(), Settings("top"))
    assert {"transformer.ln_f.weight", "transformer.ln_f.bias"} <= learning(model)
    assert "transformer.wpe.weight" not in learning(model)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (GPT2LMHeadModel, GPT2Config(vocab_size=11, n_embd=16, n_layer=3, n_head=2)),
        *(
            (kind, make(vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=3,
                        num_attention_heads=2, num_key_value_heads=1))
            for kind, make in ((LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config))
        ),
    ],
)  # fmt: skip
def test_the_blocks_are_as_many_as_the_config_says_and_adapters_fit_them(kind, config):
    model = kind(config).eval()
    assert len(blocks_of(model)) == 3
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        choose_parameters(model, Settings("lora"))
        assert torch.equal(model(input_ids=ids).logits, before)
    assert len({name.partition(".lora_")[0] for name in learning(model)}) >= 3 * 4
    assert not any("lm_head" in name or "embed" in name for name in learning(model))


def test_more_top_layers_than_there_are_is_refused(policy_folder):
    with pytest.raises(RecipeError, match="top_layers is 3, and .* has 2 layers"):
        choose_parameters(reward_model(policy_folder).model, Settings("top", top_layers=3))


def test_lora_without_peft_says_how_to_install_it(policy_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r'pip install "starling-rlaif\[lora\]"'):
        choose_parameters(reward_model(policy_folder).model, Settings("lora"))


def test_adapters_are_random_by_the_seed_alone(policy_folder):
    def start(seed):
        model = choose_parameters(reward_model(policy_folder).model, Settings("lora"), seed=seed)
        return {name: p for name, p in model.named_parameters() if "lora_A" in name}

    random_state = torch.get_rng_state()
    first, other = start(1), start(2)
    torch.rand(3)
    again = start(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    torch.set_rng_state(random_state)
    start(5)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_head_trained_with_adapters_survives_merge_save_and_reload(policy_folder, tmp_path):
    loaded = reward_model(policy_folder)
    context = Context(rank=0, world_size=1, device="cpu", threads=1)
    head = loaded.model.score.weight.detach().clone()
    before = torch.tensor(loaded.raw_scores([SEQUENCES]))
    model = choose_parameters(loaded.model, Settings("lora"))
    assert {name for name in learning(model) if "lora" not in name} == {"score.weight"}
    forward = parallel(model, lambda m: sequence_scores(m, Batch(SEQUENCES, 0)).sum(), context)
    trainable = adamw("m", model, Settings(lr=3e-2), constant)
    for step in range(3):
        forward().backward()
        trainable.step(step)
    [expected] = loaded.raw_scores([SEQUENCES])
    assert not torch.allclose(torch.tensor([expected]), before, atol=0.1)
    RewardModel(forward.whole(), loaded.codec).save(tmp_path / "model")

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert set(plain.state_dict()) == set(reward_model(policy_folder).model.state_dict())
    assert not torch.allclose(plain.score.weight, head, atol=1e-2)
    with torch.no_grad():
        scores = [plain(torch.tensor([ids])).logits.item() for ids in SEQUENCES]
    assert scores == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_model_without_adapters_is_merged_as_it_is(policy_folder):
    model = reward_model(policy_folder).model
    assert merged(model) is model


def adapted():
    """A policy whose adapters have learnt something."""
    model = choose_parameters(tiny_policy().model, Settings("lora"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return model


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor([SEQUENCES[3]])).logits


def test_without_its_adapters_a_model_is_what_it_was_before_them():
    model, start = adapted(), logits_of(tiny_policy().model)
    with_them = logits_of(model)
    assert (with_them - start).abs().max() > 0.1
    names = learning(model)
    with without_adapters(model):
        assert torch.equal(logits_of(model), start)
    assert torch.equal(logits_of(model), with_them)
    assert learning(model) == names


def test_the_adapters_are_back_after_an_error_and_take_gradients():
    model = adapted()
    with_them = logits_of(model)
    with pytest.raises(ZeroDivisionError), without_adapters(model):
        raise ZeroDivisionError
    assert torch.equal(logits_of(model), with_them)
    model(torch.tensor([SEQUENCES[0]])).logits.sum().backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == ("lora_" in name)


def test_a_gradient_that_waits_reaches_adapters_that_were_off_in_between():
    model, again = adapted(), adapted()
    ids = torch.tensor([SEQUENCES[0]])
    waiting = model(ids).logits.sum()
    with torch.no_grad(), without_adapters(model):
        model(ids)
    waiting.backward()
    again(ids).logits.sum().backward()
    for (name, own), other in zip(model.named_parameters(), again.parameters(), strict=True):
        if "lora_" in name:
            assert torch.equal(own.grad, other.grad)


def test_a_model_that_never_had_adapters_runs_without_them_as_it_is():
    model = tiny_policy().model
    expected = logits_of(model)
    with without_adapters(model):
        assert torch.equal(logits_of(model), expected)


def test_an_untied_head_has_the_same_weights_apart_and_stays_so_when_saved(tmp_path):
    model = tiny_policy().model
    expected = logits_of(model)
    untie(model)
    assert torch.equal(logits_of(model), expected)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is not embeddings.weight
    with torch.no_grad():
        head.weight.mul_(2.0)
    assert torch.equal(logits_of(model), 2 * expected)
    assert torch.equal(embeddings.weight, tiny_policy().model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded), 2 * expected)
    # Once is enough.
    own = head.weight
    untie(model)
    assert head.weight is own


def test_an_untied_top_learns_without_the_embeddings():
    model = tiny_policy().model
    untie(model)
    choose_parameters(model, Settings("top"))
    assert learning(model) == {"lm_head.weight", "model.norm.weight", *LAST_BLOCK}

"""Packed states are those of each conversation alone: values and gradients, of any shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from starling.models.packing import (
    Packed,
    PackedRow,
    packed_batches,
    packed_states,
    share_prompt,
    why_not_packed,
)
from starling.models.reward_model import row_scores

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_labels": 1,
    "pad_token_id": 0,
}
CONFIGS = {
    "mistral": MistralConfig(sliding_window=None, **SHAPE),
    "mistral, window of 5": MistralConfig(sliding_window=5, **SHAPE),
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2, window above the first layer": Qwen2Config(
        use_sliding_window=True, sliding_window=4, max_window_layers=1, **SHAPE
    ),
    "qwen3": Qwen3Config(head_dim=8, **SHAPE),
}


def classifier(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    # Sharper than a new model's, so that attention looks somewhere.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model


MODELS = {name: classifier(config) for name, config in CONFIGS.items()}


def alone(model, rows):
    """Each conversation by transformers itself, read at its last token."""
    return torch.cat([model(torch.tensor([list(ids)])).logits[0] for row in rows for ids in row])


def gradients(model, scores):
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(scores))
    (weights * scores).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_error(got, expected):
    gap = torch.cat([(got[name] - expected[name]).flatten() for name in expected]).norm()
    return float(gap / torch.cat([value.flatten() for value in expected.values()]).norm())


tokens = st.integers(1, 63)
prompts = st.lists(tokens, max_size=20)
answers = st.lists(st.lists(tokens, min_size=1, max_size=15), min_size=1, max_size=5)
rows_of_any_shape = st.lists(
    st.builds(lambda prompt, rest: [tuple(prompt + ids) for ids in rest], prompts, answers),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=25, deadline=None)
@given(rows=rows_of_any_shape)
def test_scores_and_gradients_are_those_of_each_conversation_alone(name, rows):
    model = MODELS[name]
    assert why_not_packed(model) is None
    rows.append([(1, 2, 3), (1, 2, 4, 5)])  # so that packing is what happens
    expected = alone(model, rows)
    expected_gradients = gradients(model, expected)
    got = row_scores(model, rows, 0)
    assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert relative_error(gradients(model, got), expected_gradients) < 1e-4


def test_an_answer_sees_nothing_of_another_nor_of_another_row():
    model = MODELS["llama"]
    prompt, first, second = (3, 4, 5), (6, 7), (8, 9, 10)
    rows = [PackedRow(prompt, (first, second)), PackedRow((11, 12), ((13,), (14, 15)))]
    other = [PackedRow(prompt, (first, (20, 21, 22))), PackedRow((30, 31), ((32,), (33, 34)))]
    with torch.no_grad():
        states, changed = (packed_states(model, Packed(each)) for each in (rows, other))
    assert torch.equal(states[:5], changed[:5])
    assert not torch.isclose(states[5:], changed[5:]).all(dim=1).any()


def test_an_ordinary_forward_after_a_packed_one_is_what_it_was():
    model = classifier(CONFIGS["mistral, window of 5"])
    token_ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    with torch.no_grad():
        before = model(token_ids).logits
        row_scores(model, [[(1, 2), (1, 3)]], 0)
        assert_close(model(token_ids).logits, before)


def test_gradient_checkpointing_recomputes_the_same(monkeypatch):
    from starling.base.context import single_process_context
    from starling.models.parallel import parallel

    rows = [[(1, 2, 3, 4), (1, 2, 9), (1, 2, 3, 7, 8)]]
    model = classifier(CONFIGS["mistral, window of 5"])
    expected = gradients(model, alone(model, rows))
    forward = parallel(
        model,
        lambda model, rows: row_scores(model, rows, 0),
        single_process_context(1),
        gradient_checkpointing=True,
    )
    assert relative_error(gradients(model, forward(rows)), expected) < 1e-4


def test_plain_conversations_pack_without_answers():
    model = MODELS["qwen3"]
    conversations = [(5, 6, 7, 8), (9,), (10, 11, 12)]
    with torch.no_grad():
        packed = Packed([PackedRow(ids) for ids in conversations])
        states = packed_states(model, packed)
        apart = [
            model.get_decoder()(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
            for ids in conversations
        ]
    assert_close(states, torch.cat(apart), rtol=1e-5, atol=1e-5)
    assert packed.positions.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]
    assert len(packed.ends) == 0


def test_what_sequences_share_is_their_longest_common_beginning():
    assert share_prompt([(1, 2, 3), (1, 2, 4)]) == PackedRow((1, 2), ((3,), (4,)))
    # Each keeps a token of its own, so one that another begins with gives back its last.
    assert share_prompt([(1, 2), (1, 2, 4)]) == PackedRow((1,), ((2,), (2, 4)))
    assert share_prompt([(1, 2), (3, 4)]) == PackedRow((), ((1, 2), (3, 4)))
    assert share_prompt([(7, 8, 9)]) == PackedRow((7, 8), ((9,),))


def test_batches_hold_so_many_tokens_long_rows_first_and_every_row_once():
    rows = [PackedRow((1,) * length) for length in (3, 9, 4, 20, 5)]
    assert packed_batches(rows, "cpu", tokens=10) == [[3], [1], [4, 2], [0]]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(head_dim=8, **SHAPE), "capped"),
        (GptOssConfig(head_dim=8, num_local_experts=2, num_experts_per_tok=1, **SHAPE), "sinks"),
    ],
)
def test_attention_that_is_not_plain_is_refused_and_scored_apart(config, reason):
    model = classifier(config)
    assert reason in (why_not_packed(model) or "")
    rows = [[(1, 2, 3), (1, 2, 4, 5)]]
    with torch.no_grad():
        assert_close(row_scores(model, rows, 0), alone(model, rows), rtol=1e-5, atol=1e-5)

"""Packed states are those of each conversation alone: values and gradients, of any shape."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import flex_attention
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from starling.base.context import single_process_context
from starling.base.errors import ModelError
from starling.models import packing
from starling.models.adapters import choose_parameters
from starling.models.packing import (
    Packed,
    PackedRow,
    packed_batches,
    packed_ends,
    packed_reads,
    packed_states,
    prepared,
    share_prompt,
    why_not_packed,
)
from starling.models.parallel import parallel
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


def classifier(config, kind=AutoModelForSequenceClassification, **options):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = kind.from_config(config, **options).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # sharper than a new model's, so that attention looks somewhere
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
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
@settings(max_examples=15, deadline=None)
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


def read_alone(decoder, rows):
    """transformers' own states where `packed_reads` reads, each conversation alone."""
    states = []
    for row in rows:
        runs = [
            decoder(torch.tensor([row.prompt + answer]), use_cache=False).last_hidden_state[0]
            for answer in row.answers or ((),)
        ]
        size = len(row.prompt)
        begin = size if row.read_from is None else row.read_from
        # The prompt's are the same in each of them.
        states += [runs[0][begin:size], *(run[size:] for run in runs)]
    return torch.cat(states)


def weighed(states):
    """A number that depends on each entry in its own way."""
    return (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum(dim=1)


readings = st.tuples(
    st.lists(tokens, min_size=1, max_size=12),
    st.lists(st.lists(tokens, min_size=1, max_size=9), max_size=4),
    st.integers(0, 11),
)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12, deadline=None)
@given(drawn=st.lists(readings, min_size=1, max_size=4))
def test_reads_and_their_gradients_are_those_of_each_conversation_alone(name, drawn):
    model = MODELS[name]
    rows = [
        PackedRow(tuple(prompt), tuple(map(tuple, given)), min(begin, len(prompt) - 1))
        for prompt, given, begin in drawn
    ]
    # A prompt of one token, read from it; one behind the window; and one that is not read itself.
    rows += [PackedRow((5,), ((6, 7), (8,)), 0), PackedRow((5, 6, 7, 8, 9, 10, 11, 12, 13), (), 7)]
    rows += [PackedRow((1, 2, 3), ((4,), (5, 6, 7, 8, 9, 10)))]
    expected = read_alone(model.get_decoder(), rows)
    expected_gradients = gradients(model, weighed(expected))
    packed = Packed(rows)
    found = packed_reads(prepared(model), packed)
    assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert relative_error(gradients(model, weighed(found)), expected_gradients) < 1e-4
    # Every place is read where the whole forward has it.
    with torch.no_grad():
        whole = packed_states(model, packed)
    assert_close(whole[packed.reads], expected, rtol=1e-5, atol=2e-5)


def test_the_last_layer_computes_queries_and_feed_forward_at_the_reads_alone():
    model = classifier(MistralConfig(sliding_window=None, **SHAPE))
    backbone = prepared(model)
    rows = [PackedRow((1, 2, 3, 4, 5, 6, 7, 8), ((9,), (10, 11)), 7)]
    widths = {}
    for number, layer in enumerate(backbone.layers):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
            layer.get_submodule(part).register_forward_hook(
                lambda _module, given, _output, key=(number, part): widths.update(
                    {key: given[0].shape[1]}
                )
            )
    with torch.no_grad():
        packed_reads(backbone, Packed(rows))
    assert {part for (number, part), width in widths.items() if number == 0 and width == 11} == {
        "self_attn.q_proj",
        "self_attn.k_proj",
        "mlp.down_proj",
    }
    assert widths[1, "self_attn.k_proj"] == 11
    assert widths[1, "self_attn.q_proj"] == widths[1, "mlp.down_proj"] == 4


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_reads_are_recomputed_alike_for_the_backward_pass(gradient_checkpointing):
    model = classifier(CONFIGS["mistral, window of 5"])
    rows = [PackedRow((1, 2, 3, 4, 5, 6, 7), ((8, 9), (10,)), 6), PackedRow((11,), ((12, 13),), 0)]
    expected = gradients(model, weighed(read_alone(model.get_decoder(), rows)))
    forward = parallel(
        model,
        lambda model: packed_reads(prepared(model), Packed(rows)),
        single_process_context(1),
        gradient_checkpointing=gradient_checkpointing,
    )
    assert relative_error(gradients(model, weighed(forward())), expected) < 1e-4


def test_an_ordinary_forward_after_a_packed_one_is_what_it_was():
    model = classifier(CONFIGS["mistral, window of 5"])
    token_ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    with torch.no_grad():
        before = model(token_ids).logits
        row_scores(model, [[(1, 2), (1, 3)]], 0)
        assert_close(model(token_ids).logits, before)


def row_forward(model, **options):
    """The reward stage's forward: `row_scores` as `parallel` runs it."""
    context = single_process_context(1)
    return parallel(model, lambda model, rows: row_scores(model, rows, 0), context, **options)


ROWS = [
    [(1, 2, 3, 4, 5, 6, 9, 9, 8), (1, 2, 3, 4, 5, 6, 7), (1, 2, 3, 4, 5, 6, 8, 10, 11, 12)],
    [(20, 21, 22), (20, 23)],
]


@pytest.mark.parametrize("name", ["mistral, window of 5", "qwen3"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_lora_and_gradient_checkpointing_give_the_scores_and_gradients_of_each_alone(
    name, gradient_checkpointing
):
    pytest.importorskip("peft")
    model = classifier(CONFIGS[name])
    lora = SimpleNamespace(train="lora", top_layers=1, lora_rank=3, lora_alpha=6.0)
    choose_parameters(model, lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "lora_B" in part:
                parameter.normal_(std=0.2)
    expected = alone(model, ROWS)
    expected_gradients = gradients(model, expected)
    assert all("lora" in part or part == "score.weight" for part in expected_gradients)
    assert len(expected_gradients) == 2 * 2 * 7 + 1
    got = row_forward(model, gradient_checkpointing=gradient_checkpointing)(ROWS)
    assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert relative_error(gradients(model, got), expected_gradients) < 1e-4


def test_gradient_checkpointing_recomputes_the_same():
    model = classifier(CONFIGS["mistral, window of 5"])
    expected = gradients(model, alone(model, ROWS))
    scores = row_forward(model, gradient_checkpointing=True)(ROWS)
    assert relative_error(gradients(model, scores), expected) < 1e-4


def test_bfloat16_stays_as_near_as_its_rounding():
    model = MODELS["qwen3"]
    expected = alone(model, ROWS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        apart = alone(model, ROWS)
    got = row_forward(model, precision="bfloat16")(ROWS)
    assert (got - expected).abs().max() < 2 * (apart - expected).abs().max()
    # The gradient has no way around bfloat16 either.
    assert relative_error(gradients(model, got), gradients(model, alone(model, ROWS))) < 0.05
    assert got.dtype == torch.float32


def test_dropout_of_attention_is_drawn_anew_and_again_when_recomputed():
    config = LlamaConfig(**SHAPE, attention_dropout=0.5)
    model = classifier(config).train()

    def seeded(forward, seed):
        torch.manual_seed(seed)
        return gradients(model, forward(ROWS))

    plain = row_forward(model)
    first, again, other = seeded(plain, 0), seeded(plain, 0), seeded(plain, 1)
    assert relative_error(again, first) == 0
    assert relative_error(other, first) > 0.1
    recomputing = row_forward(model, gradient_checkpointing=True)
    assert relative_error(seeded(recomputing, 0), first) < 1e-5
    assert_close(row_scores(model.eval(), ROWS, 0), alone(model, ROWS), rtol=1e-5, atol=1e-5)


def test_a_saved_model_forgets_how_it_was_packed(tmp_path):
    model = classifier(CONFIGS["llama"])
    row_scores(model, ROWS, 0)
    model.save_pretrained(tmp_path)
    assert packing.NAME not in (tmp_path / "config.json").read_text()


def tiny(model_type, **changes):
    """A config of this type in which every size that it knows is small."""
    sizes = SHAPE | {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
        "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "ffn_dim": 48, "word_embed_proj_dim": 32, "head_dim": 8, "num_kv_shared_layers": 0,
    }  # fmt: skip
    known = AutoConfig.for_model(model_type).to_dict()
    chosen = {key: value for key, value in sizes.items() if key in known or key == "num_labels"}
    return AutoConfig.for_model(model_type, **(chosen | changes))


ALTERNATING = ["sliding_attention", "full_attention"]
OTHERS = {
    "gpt2: learned positions": tiny("gpt2"),
    "opt: learned positions, offset": tiny("opt"),
    "gpt_neox: other names, parallel branches": tiny("gpt_neox"),
    "phi: parallel branches, a part rotated": tiny("phi"),
    "phi3: one projection for all": tiny("phi3"),
    "olmo2: norms behind": tiny("olmo2"),
    "starcoder2: biases, window": tiny("starcoder2", sliding_window=4),
    "cohere2: windows, layers without positions": tiny(
        "cohere2", sliding_window=4, layer_types=ALTERNATING
    ),
    "gemma3: windows, two kinds of rotation": tiny(
        "gemma3_text", sliding_window=4, layer_types=ALTERNATING
    ),
    "mixtral: experts": tiny("mixtral"),
    "qwen3_moe: experts": tiny("qwen3_moe"),
    "bert as a decoder": tiny("bert", is_decoder=True),
    "llama, yarn": tiny(
        "llama",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    ),
    "qwen2_moe without its window": tiny("qwen2_moe"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_pack_with_the_same_states_and_gradients(name):
    model = classifier(OTHERS[name], AutoModelForCausalLM)
    assert why_not_packed(model) is None
    decoder = model.get_decoder()
    weights = torch.linspace(-1, 1, 32)

    def read(states):
        value = (states * weights).sum(dim=1)
        return value, gradients(model, value)

    apart = [
        decoder(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        for row in ROWS
        for ids in row
    ]
    expected, expected_gradients = read(torch.stack([states[-1] for states in apart]))
    packed = Packed([share_prompt(row) for row in ROWS])
    for states in (packed_states(model, packed)[packed.ends], packed_ends(model, packed)):
        value, found = read(states)
        assert_close(value, expected, rtol=1e-5, atol=5e-5)
        assert relative_error(found, expected_gradients) < 1e-4
    # And not at the ends alone.
    states = packed_states(model, packed).split([6, 3, 1, 4, 1, 2, 1])
    assert_close(torch.cat(states[:2]), apart[0], rtol=1e-5, atol=5e-5)
    assert_close(torch.cat([states[0], states[3]]), apart[2], rtol=1e-5, atol=5e-5)


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


ROPE = {"rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 8}
REFUSED = {
    "capped": (tiny("gemma2"), "capped"),
    "sinks": (tiny("gpt_oss"), "sinks"),
    "chunks": (tiny("llama4_text", intermediate_size_mlp=48), "chunked"),
    "a window told to the mask only": (
        tiny("qwen2_moe", use_sliding_window=True, sliding_window=4, layer_types=ALTERNATING),
        "window",
    ),
    "and another": (tiny("phimoe", sliding_window=4), "window"),
    "positions behind the pad's": (tiny("roberta", is_decoder=True), "positions"),
    "no causal order": (tiny("bert"), "causal"),
    "none by its config": (tiny("llama", is_causal=False), "causal"),
    "dynamic rotation": (tiny("llama", rope_parameters=ROPE | {"rope_type": "dynamic"}), "rotary"),
    "long rotation": (
        tiny(
            "phi3",
            rope_parameters=ROPE
            | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        ),
        "rotary",
    ),
    "a layer that keeps the layout": (tiny("nemotron"), "reach"),
    "no interface": (tiny("bloom"), "interface"),
    "convolutions": (tiny("lfm2", layer_types=["conv", "full_attention"]), "conv"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_packing_would_change_is_refused_with_the_reason(name):
    config, reason = REFUSED[name]
    model = classifier(config, AutoModelForCausalLM)
    assert reason in (why_not_packed(model) or "")
    with pytest.raises(ModelError, match="cannot be packed"):
        packed_states(model, Packed([PackedRow((1, 2))]))


def test_another_kernel_asked_for_is_kept_and_named():
    model = classifier(CONFIGS["llama"], attn_implementation="eager")
    assert "computed by eager" in (why_not_packed(model) or "")


@pytest.mark.parametrize("name", ["capped", "sinks"])
def test_a_refused_model_scores_each_alone(name):
    model = classifier(REFUSED[name][0])
    with torch.no_grad():
        assert_close(row_scores(model, ROWS, 0), alone(model, ROWS), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 1, 5])
@settings(max_examples=8, deadline=None)
@given(rows=rows_of_any_shape, plain=st.lists(tokens, min_size=1, max_size=150))
def test_flex_attention_sees_what_split_attention_sees(window, rows, plain):
    # A GPU compiles it; uncompiled it is slow, and without gradients on a CPU.
    model = FLEX_MODELS[window]
    flat = Packed([PackedRow(tuple(plain)), *map(share_prompt, rows), PackedRow((1, 2))])
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        split = packed_states(model, flat)
        patch.setattr(packing, "_flex_serves", lambda query, value: True)
        patch.setattr(packing, "_compiled_flex_attention", lambda: flex_attention)
        flat.layout.masks.clear()
        found = packed_states(model, flat)
    assert any(hasattr(mask, "mask_mod") for mask in flat.layout.masks.values())
    assert_close(found, split, rtol=1e-5, atol=1e-5)


FLEX_MODELS = {
    window: classifier(MistralConfig(sliding_window=window, **SHAPE)) for window in (None, 1, 5)
}


def test_lengths_and_windows_share_their_compiled_flex_attention():
    # Beyond 8 kernels torch would stop compiling, and hold the scores of all pairs in memory.
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=True, backend=counter)
    for length in (300, 190, 411, 600, 257):
        for window in (None, 7):
            layout = Packed([PackedRow((1,) * length, ((2,) * 30, (3,)))]).layout
            query, key = torch.ones(1, 4, length + 31, 16), torch.ones(1, 2, length + 31, 16)
            mask = packing._block_mask(layout, window)
            compiled(query, key, key, block_mask=mask, enable_gqa=True)
    assert counter.frame_count == 1


def test_a_longer_conversation_beside_it_changes_no_score_where_it_would_the_frequencies():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 8,
        "factor": 32.0,
    }
    model = classifier(LlamaConfig(rope_parameters=rope, **SHAPE))
    rows = [[(1, 2, 3, 4, 5)], [tuple(range(1, 20))]]
    together = model(torch.tensor([[1, 2, 3, 4, 5] + [0] * 14, list(range(1, 20))])).logits[:, 0]
    with torch.no_grad():
        assert_close(row_scores(model, rows, 0), alone(model, rows), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], alone(model, rows)[0], atol=1e-3)

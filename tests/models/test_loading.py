"""What stands in published folders and would go wrong in silence: each is refused, or said.

Every folder is a copy of a saved tiny policy with one thing changed, as users met it.
"""

import copy
import importlib.util
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
)

from starling.base.errors import DataError, ModelError
from starling.data.openchat import openchat_tokenizer
from starling.data.records import Message
from starling.models.causal_lm import load_language_model, save_model
from starling.models.loading import count_parameters
from starling.models.reward_model import RewardModel, row_scores
from tiny import tiny_policy, tiny_tokenizer

# The hub's template of openchat_3.5, which Starling's published folders carry.
HUB_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ 'GPT4 Correct ' + message['role'].title() + "
    "': ' + message['content'] + '<|end_of_turn|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
)


@pytest.fixture
def copied(policy_folder, tmp_path):
    return shutil.copytree(policy_folder, tmp_path / "copy")


@pytest.fixture
def published(copied):
    """As on the hub: no name of a format, and the hub's template."""
    edit_json(copied / "config.json", starling_chat_format=None)
    (copied / "chat_template.jinja").write_text(HUB_TEMPLATE)
    return copied


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, match, **options):
    with pytest.raises(ModelError, match=match):
        load_language_model(str(folder), **options)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# dtype


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_model_is_loaded_and_saved_in_the_dtype_that_is_named(copied, name, tmp_path):
    wanted = getattr(torch, name)
    loaded = load_language_model(str(copied), dtype=name)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {wanted}
    save_model(tmp_path / "saved", loaded.model, loaded.codec)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == name
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {wanted}
    again = load_language_model(str(tmp_path / "saved"), dtype="auto")
    assert again.model.dtype == wanted
    # And never by what is stored alone.
    assert load_language_model(str(tmp_path / "saved")).model.dtype == torch.float32


def test_a_reward_model_has_the_dtype_that_is_named(policy_folder, reward_folder):
    assert RewardModel.load(str(reward_folder)).model.dtype == torch.float32
    made = [
        RewardModel.load(str(reward_folder), dtype="bfloat16"),
        RewardModel.from_language_model(str(policy_folder), dtype="bfloat16", seed=0),
    ]
    for reward_model in made:
        assert {p.dtype for p in reward_model.model.parameters()} == {torch.bfloat16}
        assert row_scores(reward_model.model, [[[1, 70, 3]]], 0).dtype == torch.float32


def test_an_unknown_dtype_is_refused_with_the_known_names(policy_folder, reward_folder):
    message = r"dtype is 'int8'; it must be one of float32, bfloat16, float16, auto"
    refused(policy_folder, message, dtype="int8")
    with pytest.raises(ModelError, match=message):
        RewardModel.load(str(reward_folder), dtype="int8")


# files that are not opened


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_by_name_and_not_opened(copied, name):
    (copied / "model.safetensors").rename(copied / name)
    (copied / "training_args.bin").write_bytes(b"")
    refused(copied, rf"found only {name}: pickles can run code .* safetensors .*published_reward")
    refused(copied / name, rf"found only {name}: pickles")


def test_a_gguf_file_is_for_chatting(copied):
    (copied / "model.safetensors").rename(copied / "starling.Q4_K_M.gguf")
    for reference in (copied, copied / "starling.Q4_K_M.gguf"):
        refused(reference, r"found only starling\.Q4_K_M\.gguf: .*starling chat FILE")


def test_a_file_is_no_folder(copied):
    refused(copied / "tokenizer.json", "this is a file; name a model folder or a hub id")


def test_a_folder_without_weights_is_refused(copied):
    (copied / "model.safetensors").unlink()
    refused(copied, "found no weights")


def test_neither_config_nor_index_may_name_a_pickle(copied):
    edit_json(copied / "config.json", transformers_weights="evil.bin")
    refused(copied, r"names evil\.bin as weights")
    edit_json(copied / "config.json", transformers_weights=None)
    (copied / "model.safetensors").rename(copied / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "evil.pt"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copied, r"names evil\.pt as weights")


def test_a_repository_without_safetensors_is_refused_in_plain_words(copied, tmp_path, monkeypatch):
    # What an earlier download left: everything but weights; the hub itself cannot be reached.
    cache = tmp_path / "hub" / "models--someone--pickled"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(copied, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    for constants in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub"))
    refused("someone/pickled", "^someone/pickled: the hub has no safetensors of it, and pickles")


def test_code_of_the_models_own_is_named_and_never_run(copied):
    (copied / "modeling_own.py").write_text("open('ran', 'w')\n")
    named = {"AutoConfig": "modeling_own.OwnConfig"}
    message = r"code of its own \(auto_map: .*modeling_own\.OwnConfig.*never run"
    edit_json(copied / "config.json", auto_map=named)
    refused(copied, rf"{message}.*'mistral'")
    edit_json(copied / "config.json", auto_map=named, model_type="own")
    refused(copied, rf"{message}.*'own'")


def test_quantised_weights_are_refused_by_kind(copied):
    edit_json(copied / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(copied, r"quantised \(gptq\)")


@pytest.mark.parametrize("content", [None, "{"])
def test_a_config_that_is_missing_or_no_json_is_refused(copied, content):
    (copied / "config.json").unlink()
    if content:
        (copied / "config.json").write_text(content)
    refused(copied, r"no usable config\.json")


@pytest.mark.parametrize("content", ["[]", "null", "3", '"mistral"'])
def test_a_config_that_is_no_table_is_refused(copied, content):
    (copied / "config.json").write_text(content)
    refused(copied, r"no usable config\.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architectures", [3], "no usable .*architectures"),
        ("architectures", "MistralForCausalLM", "no usable .*architectures"),
        (
            "starling_chat_format",
            3,
            r"config\.json has no usable starling_chat_format; download or",
        ),
        ("starling_chat_format", ["openchat"], "no usable starling_chat_format"),
        ("vocab_size", -1, "no usable vocab_size"),
        ("dtype", "int32", "no usable dtype"),
        ("dtype", "float7", r"no usable config\.json .*float7"),
        ("quantization_config", "x", r"no usable config\.json"),
        ("hidden_act", "zz", r"the weights cannot be read \(.*zz.*copy or save the model again"),
    ],
)
def test_a_config_with_odd_values_is_refused(copied, key, value, message):
    edit_json(copied / "config.json", **{key: value})
    refused(copied, message)


@pytest.mark.parametrize("content", ["null", '{"weight_map": null}', "{"])
def test_a_damaged_index_is_refused_by_name(copied, content):
    (copied / "model.safetensors.index.json").write_text(content)
    refused(copied, r"model\.safetensors\.index\.json: damaged .*; get it again")


def test_a_missing_folder_is_refused_by_name(tmp_path):
    refused(tmp_path / "absent", "absent: there is no such folder; a hub id is owner/name")
    refused("./absent", r"\./absent: there is no such folder")
    refused("absent/model", r"absent/model: no usable config\.json")  # it may be on the hub


def test_truncated_weights_are_refused(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    refused(copied, "the weights cannot be read")


# weights that do not fit


def test_a_parameter_that_the_weights_lack_is_refused(copied):
    edit_weights(copied, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refused(copied, r"the weights lack model\.layers\.1\.mlp\.up_proj\.weight; config\.json and")


def test_an_untied_head_that_the_weights_lack_is_refused(copied):
    edit_json(copied / "config.json", tie_word_embeddings=False)
    refused(copied, r"the weights lack lm_head\.weight")


def test_a_parameter_of_another_shape_is_refused_with_both_shapes(copied):
    edit_json(copied / "config.json", intermediate_size=64)
    refused(copied, r"mlp\.down_proj\.weight is \[32, 48\] in the weights and \[32, 64\] by config")


def test_weights_that_have_no_place_in_the_model_are_refused(copied):
    edit_json(copied / "config.json", num_hidden_layers=1)
    refused(copied, r"a MistralForCausalLM has no place for model\.layers\.1\..* and 6 more")


def test_a_reward_model_is_no_language_model(reward_folder):
    # Its embeddings are tied in config.json, so no weight is missing.
    refused(reward_folder, "this is a reward model; name a language model")


def test_buffers_of_older_programs_are_no_reason_to_refuse(copied, caplog):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_weights(copied, lambda weights: weights.update(buffer))
    load_language_model(str(copied))
    assert warnings(caplog) == []


def test_a_value_head_beside_a_language_model_is_left_out_and_said(copied, caplog):
    heads = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}
    edit_weights(copied, lambda weights: weights.update(heads))
    loaded = load_language_model(str(copied))
    expected = tiny_policy().model.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in loaded.model.state_dict().items())
    [warning] = warnings(caplog)
    assert "the value head (v_head.summary.bias, v_head.summary.weight) is left out" in warning


# which chat format


def test_the_format_is_the_one_asked_for_then_the_one_stored(copied):
    edit_json(copied / "config.json", starling_chat_format="plain")
    assert load_language_model(str(copied)).codec.format.name == "plain"
    asked = load_language_model(str(copied), chat_format="openchat")
    assert asked.codec.format.name == "openchat"


def test_the_end_marker_shows_openchat_where_no_name_is_stored(published, caplog):
    # The hub's template, which writes system messages in its own way, is no contradiction.
    assert load_language_model(str(published)).codec.format.name == "openchat"
    assert warnings(caplog) == []


def forget_the_end_marker(folder):
    edit_json(folder / "config.json", starling_chat_format=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace("<|end_of_turn|>", "<|fim|>")
        (folder / name).write_text(text)


def test_a_format_that_nothing_shows_is_refused_until_it_is_named(copied):
    forget_the_end_marker(copied)
    (copied / "chat_template.jinja").unlink()
    refused(copied, "chat format is not known; set chat_format to one of openchat")
    assert load_language_model(str(copied), chat_format="plain").codec.end_id == 3
    with pytest.raises(DataError, match=r"needs the special tokens <\|end_of_turn\|>"):
        load_language_model(str(copied), chat_format="openchat")


OWN_TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


def test_a_template_of_the_models_own_comes_before_markers_and_is_kept(copied, tmp_path, caplog):
    forget_the_end_marker(copied)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (copied / name).read_text()
        text = text.replace("<|fim|>", "<|im_end|>").replace("<|pad_0|>", "<|im_start|>")
        (copied / name).write_text(text)
    template = copied / "chat_template.jinja"
    template.write_text(OWN_TEMPLATE)
    loaded = load_language_model(str(copied))
    assert (loaded.codec.format.name, loaded.codec.end_id) == ("template", 2)
    save_model(tmp_path / "saved", loaded.model, loaded.codec)
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == OWN_TEMPLATE
    assert load_language_model(str(tmp_path / "saved")).codec.format.name == "template"
    template.unlink()
    assert load_language_model(str(copied)).codec.format.name == "chatml"


def test_a_folder_may_be_believed_against_its_family(published):
    (published / "chat_template.jinja").write_text(HUB_TEMPLATE.replace("GPT4 Correct", "GPT4"))
    codec = load_language_model(str(published), chat_format="template").codec
    ids = codec.encode([Message(role="user", content="Hi")], generation_prompt=True).ids
    text = "<s>GPT4 User: Hi<|end_of_turn|>GPT4 Assistant:"
    assert ids == codec.tokenizer.saved(text, add_special_tokens=False).input_ids


def test_a_template_that_was_changed_in_a_folder_of_ours_is_refused_too(copied):
    (copied / "chat_template.jinja").write_text(HUB_TEMPLATE.replace("GPT4 Correct", "GPT4"))
    refused(copied, "'GPT4 User: Hello")


def test_a_copied_wrong_template_is_refused_with_both_renderings(published, tmp_path):
    template = published / "chat_template.jinja"
    template.write_text(HUB_TEMPLATE.replace("GPT4 Correct", "GPT4"))
    refused(
        published,
        r"'GPT4 User: Hello<\|end_of_turn\|>.*'GPT4 Correct User: Hello<\|end_of_turn\|>"
        r".*openchat \(.*template \(believe",
    )
    loaded = load_language_model(str(published), chat_format="openchat")
    # Saved, the folder has the right template and needs no word any more.
    save_model(tmp_path / "saved", loaded.model, loaded.codec)
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    turns = [{"role": "user", "content": "Hello"}]
    assert saved.apply_chat_template(turns, tokenize=False).startswith("<s>GPT4 Correct User: H")
    load_language_model(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("template", "error"),
    [("{{ raise_exception('broken') }}", "broken"), ("{{ 1/0 }}", "division by zero")],
)
def test_a_template_that_cannot_be_rendered_is_refused(published, template, error):
    (published / "chat_template.jinja").write_text(template)
    refused(published, f"writes 'an error: {error}' where")


def test_a_template_that_leaves_the_bos_to_the_tokenizer_is_no_contradiction(published):
    (published / "chat_template.jinja").write_text(HUB_TEMPLATE.removeprefix("{{ bos_token }}"))
    assert load_language_model(str(published)).codec.format.name == "openchat"


def test_a_missing_template_is_said_and_openchat_is_used(published, caplog):
    (published / "chat_template.jinja").unlink()
    assert load_language_model(str(published)).codec.format.name == "openchat"
    [warning] = warnings(caplog)
    assert "no chat template is stored; openchat is used" in warning


# ends and pads


def test_every_stop_of_the_generation_config_is_heeded(copied):
    edit_json(copied / "generation_config.json", eos_token_id=[2, 3])
    assert load_language_model(str(copied)).codec.stop_ids == {2, 3}
    (copied / "generation_config.json").unlink()
    assert load_language_model(str(copied)).codec.stop_ids == {3}


@pytest.mark.parametrize("content", ["{", "null", "[]", "\ufffd"])
def test_a_damaged_generation_config_is_refused(copied, content):
    (copied / "generation_config.json").write_text(content, encoding="utf-16")
    refused(copied, r"generation_config\.json is damaged .*; get it again, or remove it")
    (copied / "generation_config.json").write_text(content)
    refused(copied, r"generation_config\.json is damaged .*; get it again, or remove it")


@pytest.mark.parametrize("end", [300, [3, 99999], -1, "3", [["3"]], True])
def test_an_end_that_is_no_id_is_refused(copied, end):
    edit_json(copied / "generation_config.json", eos_token_id=end)
    refused(copied, r"eos_token_id is .*no id of the vocabulary \(0 to 299\); correct it in gen")


def test_the_ends_of_config_json_must_be_ids_too(copied):
    (copied / "generation_config.json").unlink()
    edit_json(copied / "config.json", eos_token_id=[99999])
    refused(copied, "eos_token_id is 99999, which is no id")


def test_an_end_that_the_tokenizer_does_not_know_is_said(copied, caplog):
    # Rows that pad the embedding have ids and no tokens.
    def pad(weights):
        rows = weights["model.embed_tokens.weight"]
        weights["model.embed_tokens.weight"] = torch.cat([rows, torch.zeros(20, 32)])

    edit_weights(copied, pad)
    edit_json(copied / "config.json", vocab_size=320)
    edit_json(copied / "generation_config.json", eos_token_id=310)
    assert load_language_model(str(copied)).codec.stop_ids == {3, 310}
    [warning] = warnings(caplog)
    assert "the end of sequence is None, but answers end with <|end_of_turn|> (3)" in warning


def test_an_eos_that_is_not_the_end_marker_is_said_and_repaired_by_saving(copied, tmp_path, caplog):
    for name in ("config.json", "generation_config.json"):
        edit_json(copied / name, eos_token_id=2)
    edit_json(copied / "tokenizer_config.json", eos_token="</s>")
    loaded = load_language_model(str(copied))
    [warning] = warnings(caplog)
    assert "the end of sequence is </s>, but answers end with <|end_of_turn|> (3)" in warning
    assert "other programs would not stop" in warning
    assert (loaded.codec.end_id, loaded.codec.stop_ids) == (3, {2, 3})

    save_model(tmp_path / "saved", loaded.model, loaded.codec)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert theirs.generation_config.eos_token_id == [3, 2]
    assert theirs.config.eos_token_id == 3
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token_id == 3
    caplog.clear()
    load_language_model(str(tmp_path / "saved"))
    assert warnings(caplog) == []


def test_a_pad_that_is_the_end_marker_is_replaced_said_and_repaired(published, tmp_path, caplog):
    # As published: config.json pads with the end marker, and the tokenizer names no pad token.
    edit_json(published / "config.json", pad_token_id=3)
    edit_json(published / "generation_config.json", pad_token_id=3)
    edit_json(published / "tokenizer_config.json", pad_token=None)
    loaded = load_language_model(str(published))
    [warning] = warnings(caplog)
    assert "pads with the end marker (3)" in warning
    assert "pads with 4" in warning
    assert loaded.codec.tokenizer.pad_id == 4

    save_model(tmp_path / "saved", loaded.model, loaded.codec)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "saved" / name).read_text())["pad_token_id"] == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token_id == 4


def test_the_end_marker_is_trained_where_config_pads_with_it(published):
    # torch never updates the embedding row of the pad token that a model was built with.
    edit_json(published / "config.json", pad_token_id=3, tie_word_embeddings=False)
    edit_weights(
        published,
        lambda weights: weights.update(
            {"lm_head.weight": weights["model.embed_tokens.weight"] * 1}
        ),
    )
    model = load_language_model(str(published)).model
    model(torch.tensor([[1, 3, 70]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[3].any()


# Starling-LM-7B-beta's folder, with small weights


@pytest.mark.skipif(
    importlib.util.find_spec("mistral_common") is None,
    reason="mistral-common is not installed: it holds Mistral's vocabulary file",
)
def test_a_folder_as_published_loads_and_is_saved_with_its_faults_repaired(tmp_path, caplog):
    folder, saved = tmp_path / "beta", tmp_path / "saved"
    config = copy.deepcopy(BETA)
    config.update(
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    )
    config.update({"num_key_value_heads": 1, "intermediate_size": 16, "pad_token_id": None})
    MistralForCausalLM(config).save_pretrained(folder)
    edit_json(folder / "config.json", pad_token_id=32000)
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000})
    )
    openchat_tokenizer().saved.save_pretrained(folder)
    tokenizer_config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "<|end_of_turn|>",
        "unk_token": "<unk>",
        "pad_token": None,
        "chat_template": HUB_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)

    loaded = load_language_model(str(folder))
    [warning] = warnings(caplog)
    assert "pads with the end marker (32000)" in warning
    codec = loaded.codec
    assert (codec.format.name, codec.end_id, codec.stop_ids) == ("openchat", 32000, {32000})
    assert codec.tokenizer.pad_id == 32001
    save_model(saved, loaded.model, codec)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (32000, 32001)
    text = "Code User: Implement quicksort using C++<|end_of_turn|>Code Assistant:"
    # The model card's list.
    expected = [1, 7596, 1247, 28747, 26256, 2936, 7653, 1413, 334, 1680, 32000, 7596, 21631, 28747]
    assert tokenizer(text).input_ids == expected
    caplog.clear()
    load_language_model(str(saved))
    assert warnings(caplog) == []


# vocabulary


def test_a_tokenizer_with_more_ids_than_rows_is_refused(copied):
    tiny_tokenizer(302).saved.save_pretrained(copied)
    refused(copied, r"highest id is 301 .* the embedding has 300 rows")


def test_an_added_token_beyond_the_rows_is_refused_by_name(copied):
    tokenizer = tiny_tokenizer().saved
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    tokenizer.save_pretrained(copied)
    refused(copied, r"highest id is 300 \(<\|extra\|>\) and the embedding has 300 rows")


def test_more_rows_than_ids_are_fine(copied):
    def pad(weights):
        rows = weights["model.embed_tokens.weight"]
        weights["model.embed_tokens.weight"] = torch.cat([rows, torch.zeros(20, 32)])

    edit_weights(copied, pad)
    edit_json(copied / "config.json", vocab_size=320)
    assert load_language_model(str(copied)).model.get_input_embeddings().weight.shape[0] == 320


# the published architecture

BETA = MistralConfig(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    max_position_embeddings=8192,
    sliding_window=4096,
    tie_word_embeddings=False,
    vocab_size=32002,
    bos_token_id=1,
    eos_token_id=32000,
    pad_token_id=32000,
)


def test_the_published_config_has_the_published_number_of_parameters():
    assert count_parameters(BETA) == 7_241_748_480


def test_a_model_of_another_kind_has_no_size_and_says_so():
    with pytest.raises(ModelError, match="a t5 is no causal language model"):
        count_parameters(T5Config())


def test_a_config_that_no_model_can_be_built_from_has_no_size_and_says_so():
    with pytest.raises(ModelError, match=r"describes no mistral that can be built .*zz.*again"):
        count_parameters(MistralConfig(hidden_act="zz", num_hidden_layers=1))


def test_tied_parameters_are_counted_once(policy_folder):
    stored = load_file(policy_folder / "model.safetensors")
    config = load_language_model(str(policy_folder)).model.config
    assert count_parameters(config) == sum(tensor.numel() for tensor in stored.values())


def test_llama_2_has_the_number_of_parameters_on_its_card():
    # Touvron et al. 2023: 6.74 billion.
    config = LlamaConfig(vocab_size=32000, num_hidden_layers=32, intermediate_size=11008)
    assert count_parameters(config) == 6_738_415_616

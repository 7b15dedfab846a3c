"""The converter against the published module, written down here from its description.

A tiny Llama stands for Llama-2-7B-Chat: same names, same layouts of the files.
"""

import dataclasses
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from starling.base.errors import ModelError
from starling.data.records import Message
from starling.models.published_reward import convert, main
from starling.models.reward_model import RewardModel, Scored
from tiny import sentencepiece_tokenizer, sharpen, tiny_tokenizer

UNK = 0


class PublishedModule(nn.Module):
    """Starling-RM-7B-alpha's module: the backbone under two names, and `v_head`."""

    def __init__(self, base):
        super().__init__()
        self.model = base
        self.transformer = base.model
        self.v_head = nn.Linear(base.config.hidden_size, 1, bias=False)

    @torch.no_grad()
    def forward(self, ids, width=64, pad_id=UNK):
        """The score of one conversation, right-padded with <unk>, read before the first `pad_id`.

        The snippet takes `tokenizer("<unk>").input_ids[0]` for the pad's id, which is the <s> that
        the tokenizer puts first.
        """
        padded = torch.tensor([[*ids, *[UNK] * (width - len(ids))]])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids))])
        hidden = self.transformer(padded, attention_mask=mask)[0]
        rewards = self.v_head(hidden)[0, :, 0]
        found = (padded[0] == pad_id).nonzero()[:, 0]
        return float(rewards[(found[0] if len(found) else width) - 1])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """As on the hub: a Llama with its tokenizer, whose end is </s> and which names no pad token."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = sentencepiece_tokenizer().saved
    tokenizer.eos_token, tokenizer.pad_token = "</s>", None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(base):
    """Trained from the base: other weights than the base's own."""
    torch.manual_seed(7)
    module = PublishedModule(LlamaForCausalLM(LlamaConfig.from_pretrained(base))).eval()
    sharpen(module)
    return module


def as_one_file(module, folder):
    """Starling-RM-7B-alpha: one pickle with both copies, the head of the language model too."""
    torch.save(module.state_dict(), folder / "model.bin")
    return folder / "model.bin"


def as_shards(module, folder):
    """Starling-RM-34B: the backbone once, in several files."""
    weights = {
        name: tensor.clone()
        for name, tensor in module.state_dict().items()
        if not name.startswith("model.")
    }
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in part}, folder / f"model-{number}.safetensors")
    (folder / "training_args.bin").write_bytes(b"not read")
    return folder


def as_pickled_shards(module, folder):
    """As a trainer saves it: `model.*` alone, in several pickles."""
    weights = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if not name.startswith("transformer.")
    }
    for number, name in enumerate(sorted(weights)):
        torch.save({name: weights[name]}, folder / f"pytorch_model-{number:05}.bin")
    return folder


def as_index_of_shards(module, folder):
    """As transformers shards pickles: an index beside the parts."""
    weights = {
        f"transformer.{name}": tensor for name, tensor in module.transformer.state_dict().items()
    }
    weights["v_head.weight"] = module.v_head.weight.detach()
    parts = {name: f"pytorch_model-0000{n % 2 + 1}-of-00002.bin" for n, name in enumerate(weights)}
    for part in set(parts.values()):
        torch.save({name: weights[name] for name in weights if parts[name] == part}, folder / part)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    return folder


def as_pt(module, folder):
    """The 7B's checkpoint under the name that training gave it."""
    torch.save(module.state_dict(), folder / "checkpoint.pt")
    return folder


CONVERSATIONS = [
    ("Hi", "No"),
    ("Why is that", "Ask U. Answer: A and U\nB"),
    ("What is 2", "4 of course"),
]


def scored(question, answer):
    messages = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return Scored(messages)


ITEMS = [scored(*conversation) for conversation in CONVERSATIONS]


@pytest.mark.parametrize(
    "layout", [as_one_file, as_pt, as_shards, as_pickled_shards, as_index_of_shards]
)
def test_a_converted_checkpoint_scores_as_the_published_module_does(
    base, published, tmp_path, layout
):
    (tmp_path / "there").mkdir()
    out = tmp_path / "out"
    convert(layout(published, tmp_path / "there"), str(base), out)
    ours = RewardModel.load(str(out))
    theirs = AutoModelForSequenceClassification.from_pretrained(out).eval()
    scores = ours.score(ITEMS).tolist()
    for item, score in zip(ITEMS, scores, strict=True):
        ids = ours.encode(item)[0]
        expected = published(ids)
        assert score == pytest.approx(expected, abs=1e-5)
        with torch.no_grad():
            assert float(theirs(torch.tensor([ids])).logits) == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in scores}) == len(ITEMS)


def converted(module, base, folder, **options):
    (folder / "there").mkdir()
    convert(as_one_file(module, folder / "there"), str(base), folder / "out", **options)
    return RewardModel.load(str(folder / "out"))


def test_the_published_read_out_reads_the_last_slot_of_the_padding(base, published, tmp_path):
    ours = converted(published, base, tmp_path, read_out="published_padded")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    trap = tokenizer("<unk>").input_ids[0]
    assert trap == tokenizer.bos_token_id != UNK
    for item, score in zip(ITEMS, ours.score(ITEMS).tolist(), strict=True):
        ids = ours.encode(item)[0]
        assert score == pytest.approx(published(ids, 2048, trap), abs=1e-5)
        assert abs(score - published(ids)) > 1e-3


def test_the_published_read_out_depends_on_the_width_and_is_the_last_token_at_full_width(
    base, published, tmp_path
):
    ours = converted(published, base, tmp_path, read_out="published_padded")
    ids = ours.encode(ITEMS[0])[0]
    narrow = [dataclasses.replace(ours, max_length=len(ids) + more) for more in (0, 1, 40)]
    scores = [float(model.score(ITEMS[:1])) for model in narrow]
    assert scores[0] == pytest.approx(published(ids), abs=1e-5)
    assert scores[1:] == pytest.approx([published(ids, len(ids) + n, 1) for n in (1, 40)], abs=1e-5)
    assert len({round(score, 3) for score in scores}) == 3


def test_the_read_out_is_stored_and_another_one_is_refused(base, published, tmp_path):
    made = converted(published, base, tmp_path, read_out="published_padded")
    config = tmp_path / "out" / "config.json"
    stored = json.loads(config.read_text())
    assert (made.read_out, stored["starling_read_out"]) == ("published_padded", "published_padded")
    config.write_text(json.dumps(stored | {"starling_read_out": "first_token"}))
    with pytest.raises(ModelError, match="'first_token'; it must be last_token or published_padde"):
        RewardModel.load(str(tmp_path / "out"))


def test_unk_in_the_text_moves_the_published_modules_read_out_and_not_ours(
    base, published, tmp_path
):
    ours = converted(published, base, tmp_path)
    ids = [1, 70, UNK, 80, 2]
    [[score]] = ours.raw_scores([[ids]])
    assert score == pytest.approx(published(ids, len(ids), pad_id=-1), abs=1e-5)
    assert abs(score - published(ids)) > 1e-3


def test_a_converted_model_reads_llama_2s_format_to_its_last_end(base, published, tmp_path):
    convert(as_one_file(published, tmp_path), str(base), tmp_path / "out")
    ids = RewardModel.load(str(tmp_path / "out")).encode(scored("Hi", "No"))[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ids == tokenizer("[INST] Hi [/INST] No </s>").input_ids
    assert ids[-1] == 2


def test_a_converted_folder_pads_and_cuts_as_the_published_scripts_do(base, published, tmp_path):
    convert(as_one_file(published, tmp_path), str(base), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["pad_token_id"] == UNK
    stored = [config[f"starling_{key}"] for key in ("chat_format", "max_length", "truncate")]
    assert stored == ["llama-2", 2048, "left"]
    loaded = RewardModel.load(str(tmp_path / "out"))
    assert (loaded.max_length, loaded.truncate, loaded.mean, loaded.std) == (2048, "left", 0.0, 1.0)


def test_a_base_with_chatmls_markers_is_read_as_chatml_to_the_end_marker(tmp_path):
    tokenizer = tiny_tokenizer().saved
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "base")
    config = LlamaConfig(
        vocab_size=302,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    module = PublishedModule(LlamaForCausalLM(config))
    config.save_pretrained(tmp_path / "base")
    convert(as_one_file(module, tmp_path), str(tmp_path / "base"), tmp_path / "out")
    made = RewardModel.load(str(tmp_path / "out"))
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>"
    # Yi's tokenizer puts no BOS before a text, and its template writes none.
    expected = tokenizer(text, add_special_tokens=False).input_ids
    assert made.encode(scored("Hi", "No"))[0] == expected
    assert made.codec.format.name == "chatml"
    # The base pads with a token of its own; the published module knows only <unk>.
    assert made.codec.tokenizer.pad_id == UNK


def test_copies_that_differ_are_said_and_the_one_that_is_read_counts(
    base, published, tmp_path, caplog
):
    weights = {name: tensor.clone() for name, tensor in published.state_dict().items()}
    weights["model.model.norm.weight"] += 1
    for order in (1, -1):
        torch.save(dict(list(weights.items())[::order]), tmp_path / "model.bin")
        caplog.clear()
        convert(tmp_path / "model.bin", str(base), tmp_path / f"out{order}")
        made = RewardModel.load(str(tmp_path / f"out{order}"))
        [record] = caplog.records
        assert "two copies of model.norm.weight differ; transformer.norm" in record.getMessage()
        [score] = made.score([scored("Hi", "No")]).tolist()
        assert score == pytest.approx(published(made.encode(scored("Hi", "No"))[0]), abs=1e-5)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", ["torch", "old torch", "pickle"])
def test_a_pickle_that_would_run_something_runs_nothing_and_is_named(base, tmp_path, save):
    evil, ran = tmp_path / "model.bin", tmp_path / "ran"
    content = {"v_head.weight": torch.ones(1, 32), "more": Malicious(ran)}
    if save != "pickle":
        torch.save(content, evil, _use_new_zipfile_serialization=save == "torch")
    else:
        evil.write_bytes(pickle.dumps(content))
    with pytest.raises(ModelError, match=r"model\.bin"):
        convert(evil, str(base), tmp_path / "out")
    assert not ran.exists()
    assert not (tmp_path / "out").exists()
    # The same file in a less careful reader: the test would notice.
    torch.load(evil, weights_only=False) if save != "pickle" else pickle.loads(evil.read_bytes())
    assert ran.exists()


def changed(published, path, change):
    weights = dict(published.state_dict())
    change(weights)
    torch.save(weights, path / "model.bin")
    return path / "model.bin"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("v_head.weight"), r"lacks score\.weight; is a file missing"),
        (
            lambda w: [
                w.pop(name) for name in list(w) if name.endswith("layers.1.mlp.up_proj.weight")
            ],
            r"lacks model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (lambda w: w.update(bias=torch.ones(1)), "no place for bias"),
        (
            lambda w: w.update({"v_head.weight": torch.ones(2, 32)}),
            r"score\.weight is \[2, 32\] there and \[1, 32\] in the base",
        ),
        (lambda w: w.update(steps=3), "no table of tensors"),
        (lambda w: w.update({7: torch.ones(1)}), "no table of tensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_base_is_refused(
    base, published, tmp_path, change, message
):
    with pytest.raises(ModelError, match=message):
        convert(changed(published, tmp_path, change), str(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_weights_and_a_truncated_file_are_refused(base, published, tmp_path):
    with pytest.raises(ModelError, match=r"found no \.safetensors, \.bin or \.pt file"):
        convert(tmp_path, str(base), tmp_path / "out")
    file = as_one_file(published, tmp_path)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model\.bin: cannot be read"):
        convert(file, str(base), tmp_path / "out")


def test_a_checkpoint_that_an_old_torch_wrote_is_read(base, published, tmp_path):
    file = tmp_path / "model.bin"
    torch.save(published.state_dict(), file, _use_new_zipfile_serialization=False)
    convert(file, str(base), tmp_path / "out")
    assert RewardModel.load(str(tmp_path / "out")).max_length == 2048


@pytest.mark.parametrize(
    "content", [b"", b"hello this is junk", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_file_that_is_no_checkpoint_is_to_be_downloaded_again(base, tmp_path, content):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.bin: .*[Dd]ownload it\s+again") as caught:
        convert(tmp_path / "model.bin", str(base), tmp_path / "out")
    assert "weights_only" not in str(caught.value)


def test_the_command_says_what_it_made_or_why_not(base, published, tmp_path, capsys):
    file = as_one_file(published, tmp_path)
    arguments = [str(file), "--base", str(base), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    weights = {n: t for n, t in published.state_dict().items() if n.startswith("transformer.")}
    number = sum(tensor.numel() for tensor in weights.values()) + 32
    assert capsys.readouterr().out == (
        f"{tmp_path / 'out'}: a reward model of {number:,} parameters that reads llama-2\n"
    )
    assert main(arguments) == 2
    assert "out exists already" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    assert main([*arguments, "--read-out", "published_padded"]) == 0
    assert RewardModel.load(str(tmp_path / "out")).read_out == "published_padded"
    shutil.rmtree(tmp_path / "out")
    assert main([*arguments, "--chat-format", "chatml"]) == 2
    assert "needs the special tokens <|im_end|>, <|im_start|>" in capsys.readouterr().err

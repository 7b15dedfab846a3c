"""A new tokenizer is reproducible, loads anywhere, and keeps special tokens out of text."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import Unigram
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from starling.base.errors import ModelError
from starling.data.chat import FORMATS, jinja_template
from starling.data.tokenizer import (
    TextTokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from tiny import TEXTS, sentencepiece_tokenizer, tiny_tokenizer

OPENCHAT = ["<unk>", "<s>", "</s>", "<|end_of_turn|>", "<|pad_0|>"]


def test_the_same_texts_give_the_same_bytes(tmp_path):
    files = []
    for name in ("one", "two"):
        save_tokenizer(train_tokenizer(iter(TEXTS), vocab_size=290), tmp_path / name, template=None)
        files.append({p.name: p.read_bytes() for p in sorted((tmp_path / name).iterdir())})
    assert files[0] == files[1]
    assert "tokenizer.json" in files[0]


def test_a_saved_folder_loads_through_auto_tokenizer(tmp_path):
    tokenizer = tiny_tokenizer()
    save_tokenizer(tokenizer, tmp_path, template=jinja_template(FORMATS["openchat"]))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "What is the answer, \u00e9\u4e16\U0001f600?\n\n  x"
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode_text(text)
    assert theirs(text).input_ids == [1, *tokenizer.encode_text(text)]
    assert theirs.eos_token == "<|end_of_turn|>"
    assert theirs.pad_token == "<|pad_0|>"
    assert theirs.chat_template is not None


def test_the_saved_config_types_every_marker_as_special(tmp_path):
    save_tokenizer(tiny_tokenizer(), tmp_path, template=None)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    decoder = config["added_tokens_decoder"]
    assert {number: token["content"] for number, token in decoder.items()} == {
        str(number): token for number, token in enumerate(OPENCHAT)
    }
    assert all(token["special"] and not token["normalized"] for token in decoder.values())


def test_an_added_token_written_as_a_marker_is_one_and_saved_as_special(tmp_path):
    saved = tiny_tokenizer().saved
    saved.add_tokens([AddedToken("<|im_start|>", normalized=False), AddedToken("<think>")])
    saved.save_pretrained(tmp_path / "theirs")
    tokenizer = load_tokenizer(tmp_path / "theirs")
    assert tokenizer.marker_id("<|im_start|>") == 300
    assert tokenizer.marker_id("<think>") is None
    assert 300 not in tokenizer.encode_text("a<|im_start|>b")
    assert tokenizer.encode_text("<think>") == [301]
    save_tokenizer(tokenizer, tmp_path / "ours", template=None)
    backend = json.loads((tmp_path / "ours" / "tokenizer.json").read_text())
    config = json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())
    flags = {token["content"]: token["special"] for token in backend["added_tokens"][-2:]}
    assert flags == {"<|im_start|>": True, "<think>": False}
    assert [config["added_tokens_decoder"][n]["special"] for n in ("300", "301")] == [True, False]


def test_a_marker_is_a_special_token_by_its_exact_text():
    tokenizer = tiny_tokenizer()
    assert [tokenizer.marker_id(token) for token in OPENCHAT] == [0, 1, 2, 3, 4]
    assert tokenizer.marker_id("<|end_of_turn|> ") is None
    assert tokenizer.marker_id("<|im_end|>") is None
    # In the vocabulary, and no special token.
    assert tokenizer.marker_id("e") is None


@pytest.mark.parametrize("make", [tiny_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize("marker", OPENCHAT)
def test_typed_special_tokens_stay_text_and_loaded_from_disk_too(make, marker, tmp_path):
    save_tokenizer(make(), tmp_path, template=None)
    for tokenizer in (make(), load_tokenizer(str(tmp_path))):
        ids = tokenizer.encode_text(f"a {marker}b{marker}")
        assert not set(ids) & {0, 1, 2, 3, 4}
        assert tokenizer.decode(ids) == f"a {marker}b{marker}"


def test_special_tokens_that_are_pieces_of_the_vocabulary_cannot_be_typed():
    # A unigram model takes its best pieces, and control pieces score 0, the best of all.
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in "a</s>")]
    backend = Tokenizer(Unigram(pieces, unk_id=0))
    assert backend.encode("a</s>").ids == [2, 1]
    saved = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    assert TextTokenizer(saved).encode_text("a</s>") == [2, 3, 4, 5, 6]


def test_a_special_token_that_longer_pieces_are_merged_from_cannot_be_typed():
    saved = tiny_tokenizer().saved
    merges = json.loads(saved.backend_tokenizer.to_str())["model"]["merges"]
    part = next(left for left, _ in merges if len(left) > 1 and left.isalpha() and left.isascii())
    saved.add_special_tokens({"extra_special_tokens": [part]})
    tokenizer = TextTokenizer(saved)
    ids = tokenizer.encode_text(f"a {part}{part}")
    assert saved.convert_tokens_to_ids(part) not in ids
    assert tokenizer.decode(ids) == f"a {part}{part}"


def test_decoding_leaves_special_tokens_out():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode_text("answer")
    assert tokenizer.decode([1, *ids, 3, 4]) == "answer"


def test_length_counts_special_tokens_bytes_and_merges():
    tokenizer = tiny_tokenizer(280)
    assert len(tokenizer) == 280
    assert len(tiny_tokenizer(261)) == len(OPENCHAT) + 256


def test_a_tokenizer_without_pad_token_says_what_to_do():
    tokenizer = tiny_tokenizer()
    tokenizer.saved.pad_token = None
    assert tokenizer.pad_id == tokenizer.marker_id("<|pad_0|>")
    tokenizer.markers = {}
    with pytest.raises(ModelError, match="no pad token"):
        _ = tokenizer.pad_id


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer could be loaded") as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_parts_are_encoded_as_one_string_and_a_token_belongs_to_its_last_character():
    tokenizer = sentencepiece_tokenizer()
    whole = tokenizer.encode_whole([1, "a ", "A</s>", 2, "", "b"])
    tokens = [tokenizer.saved.convert_ids_to_tokens(token) for token in whole.ids]
    space = "\u2581"
    typed = ["<0x3C>", "<0x2F>", "s", "<0x3E>"]
    assert tokens == ["<s>", space, "a", f"{space}A", *typed, "</s>", space, "b"]
    assert whole.parts == [0, 1, 1, 2, 2, 2, 2, 2, 3, 5, 5]

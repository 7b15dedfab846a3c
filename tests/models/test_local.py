"""A local model as a responder: text as transformers would decode it, and turns that fit."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from starling.data.records import Message
from starling.models.causal_lm import load_language_model
from starling.models.interfaces import Request, Responder, Sample, Sampling, StreamingResponder
from starling.models.local import Local, load_local, trim_turns
from streams import drain
from tiny import tiny_policy, tiny_policy_folder

QUESTION = "What is the answer?"
CODEC = tiny_policy().codec


def said(*contents, system=None):
    first = () if system is None else (Message(role="system", content=system),)
    roles = ("user", "assistant") * len(contents)
    return first + tuple(
        Message(role=role, content=content) for role, content in zip(roles, contents, strict=False)
    )


def ask(id, text, mode=None, **sampling):
    sampling = {"max_tokens": 12, "temperature": 0.0} | sampling
    return Request(id, said(text), Sampling(**sampling), mode)


@pytest.mark.parametrize("mode", [None, "Code"])
def test_a_reply_is_what_transformers_generates_for_the_written_prompt(policy_folder, mode):
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    model = AutoModelForCausalLM.from_pretrained(policy_folder)
    name = mode or "GPT4 Correct"
    inputs = tokenizer(
        f"{name} User: {QUESTION}<|end_of_turn|>{name} Assistant:", return_tensors="pt"
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0]
    new = output[inputs.input_ids.shape[1] :].tolist()

    local = load_local(str(policy_folder))
    assert isinstance(local, Responder)
    [reply] = local.respond([ask("q", QUESTION, mode)])
    assert reply.request_id == "q"
    assert reply.ids == tuple(new)
    assert reply.text == tokenizer.decode(new, skip_special_tokens=True).removeprefix(" ")
    assert reply.usage.prompt_tokens == inputs.input_ids.shape[1]
    assert reply.usage.response_tokens == len(new)
    assert reply.finish_reason == ("stop" if new[-1] == 3 else "length")


def test_every_request_gets_one_reply_by_its_id(policy_folder):
    local = load_local(str(policy_folder))
    wanted = [ask(f"q{n}", "x" * (n + 1), temperature=1.0, seed=n) for n in range(5)]
    replies = {reply.request_id: reply for reply in local.respond(wanted)}
    assert replies.keys() == {"q0", "q1", "q2", "q3", "q4"}
    for request in wanted:
        [alone] = local.respond([request])
        assert alone.ids == replies[request.id].ids
    assert local.commits_together


def test_identity_follows_weights_and_format_and_not_the_place(policy_folder, tmp_path):
    copied = shutil.copytree(policy_folder, tmp_path / "copy")
    other = tiny_policy_folder(tmp_path / "other", seed=1)
    identity = load_local(str(policy_folder)).identity
    assert load_local(str(copied)).identity == identity
    assert load_local(str(other)).identity != identity
    assert load_local(str(copied), chat_format="plain").identity != identity


def test_one_changed_weight_changes_the_identity(policy_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    copied = shutil.copytree(policy_folder, tmp_path / "copy")
    before = load_local(str(copied)).identity
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    assert load_local(str(copied)).identity != before
    loaded = load_language_model(str(copied)).model
    expected = torch.tensor(1.001)
    assert torch.equal(loaded.model.norm.weight[0].detach(), expected)


class Spelling:
    """An engine that says the given ids, whatever it is asked, and notes whether it was stopped."""

    def __init__(self, ids, finish_reason="stop"):
        self.ids = tuple(ids)
        self.finish_reason = finish_reason
        self.num_said = 0

    def _sample(self, request):
        return Sample(request.id, self.ids, (0.0,) * len(self.ids), self.finish_reason, 0)

    def generate(self, requests):
        yield from (self._sample(request) for request in requests)

    def stream(self, request):
        for token in self.ids:
            self.num_said += 1
            yield token
        return self._sample(request)

    def cancel(self, request_id):
        raise AssertionError("nobody cancels")

    def sync(self, weights, version):
        raise AssertionError("it has no weights")


def spell(codec, text, **options):
    """A local model that answers `text`, one byte a token, and the ids of it."""
    ids = [token for byte in text.encode() for token in byte_ids(codec, byte)]
    return Local(Spelling([*ids, codec.end_id], **options), codec, identity="script")


def byte_ids(codec, byte):
    """The token of one byte: bytes of the byte-level alphabet stand for characters."""
    alphabet = bytes_to_unicode()
    [token] = [codec.tokenizer.saved.convert_tokens_to_ids(alphabet[byte])]
    return [token]


@given(text=st.text(max_size=30))
def test_the_pieces_of_a_stream_cut_no_character_and_are_the_reply(text):
    codec = CODEC
    text = text.encode("utf-8", "replace").decode()
    local = spell(codec, f" {text}")
    pieces, reply = drain(local.stream(ask("q", "hi")))
    assert "".join(pieces) == reply.text == text
    [whole] = local.respond([ask("q", "hi")])
    assert whole == reply
    # Each piece is made of whole characters: the replacement character only where it was said.
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


@given(
    text=st.text("abc\u4f60", max_size=25),
    stop=st.lists(st.text("abc\u4f60", min_size=1, max_size=4), max_size=3),
)
def test_a_text_ends_before_its_first_stop_string_and_no_piece_shows_it(text, stop):
    # The definition: the shortest beginning of the text that ends with a stop string, without it.
    first = min((text.find(string) for string in stop if string in text), default=len(text))
    local = spell(CODEC, f" {text}")
    request = ask("q", "hi", stop=tuple(stop))
    pieces, reply = drain(local.stream(request))
    assert "".join(pieces) == reply.text == text[:first]
    [whole] = local.respond([request])
    assert whole.text == text[:first]


def test_what_may_begin_a_stop_string_waits_until_it_cannot():
    local = spell(CODEC, " one STO two")
    pieces = local.stream(ask("q", "hi", stop=("STOP", "O t\u00e9")))
    shown = ""
    for piece in pieces:
        shown += piece
        said = CODEC.tokenizer.decode(local.engine.ids[: local.engine.num_said]).removeprefix(" ")
        waiting = said[len(shown) :]
        assert not waiting or "STOP".startswith(waiting) or "O t\u00e9".startswith(waiting)
    assert shown == "one STO two"


def test_closing_a_stream_stops_the_decoding():
    local = spell(CODEC, " " + "x" * 50)
    pieces = local.stream(ask("q", "hi"))
    assert next(pieces) == "x"
    pieces.close()
    assert local.engine.num_said == 2


def test_a_stream_says_what_the_sample_says(policy_folder):
    local = load_local(str(policy_folder))
    request = ask("q", QUESTION, temperature=1.0, seed=5)
    [whole] = local.respond([request])
    pieces, reply = drain(local.stream(request))
    assert reply == whole
    assert isinstance(local, StreamingResponder)
    assert len(pieces) > 1


def test_a_stop_string_ends_the_decoding_of_a_real_model(policy_folder):
    local = load_local(str(policy_folder))
    [whole] = local.respond([ask("q", QUESTION)])
    stop = whole.text[3:5]
    place = whole.text.find(stop)
    for reply in (
        *local.respond([ask("q", QUESTION, stop=(stop,))]),
        drain(local.stream(ask("q", QUESTION, stop=(stop,))))[1],
    ):
        assert reply.text == whole.text[:place]
        assert reply.finish_reason == "stop"
        assert len(reply.ids) < len(whole.ids)


def test_a_cancelled_answer_is_one_that_was_cut():
    local = spell(CODEC, " one", finish_reason="cancelled")
    assert drain(local.stream(ask("q", "hi")))[1].finish_reason == "length"


def test_the_context_length_is_the_models(tmp_path):
    folder = tiny_policy_folder(tmp_path / "model", max_length=96)
    assert load_local(str(folder)).context_length == 96


def prompt_length(codec, messages, mode=None):
    return len(codec.encode(messages, mode=mode, generation_prompt=True).ids)


def test_trimming_drops_whole_exchanges_from_the_beginning_and_keeps_the_system_message():
    codec = tiny_policy().codec
    messages = said("one", "1", "two", "2", "three", system="Be brief.")
    last_two, last = messages[:1] + messages[3:], messages[:1] + messages[5:]
    for kept in (messages, last_two, last):
        limit = prompt_length(codec, kept)
        assert trim_turns(messages, codec, limit=limit) == kept
    assert trim_turns(messages, codec, limit=prompt_length(codec, messages) - 1) == last_two
    assert trim_turns(messages, codec, limit=prompt_length(codec, last_two) - 1) == last


def test_trimming_never_drops_the_last_user_turn():
    codec = tiny_policy().codec
    messages = said("one", "1", "x" * 500)
    assert trim_turns(messages, codec, limit=5) == messages[2:]
    assert trim_turns(messages[2:], codec, limit=5) == messages[2:]


def test_trimming_counts_the_mode_that_will_be_spoken():
    codec = tiny_policy().codec
    messages = said("one", "1", "two")
    short, long = (prompt_length(codec, messages, mode) for mode in ("Code", "Math Correct"))
    assert short < long
    assert trim_turns(messages, codec, limit=short, mode="Code") == messages
    assert trim_turns(messages, codec, limit=short, mode="Math Correct") == messages[2:]

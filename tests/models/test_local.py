"""A local model as a responder: text as transformers would decode it, and turns that fit."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from starling.data.records import Message
from starling.models.causal_lm import load_language_model
from starling.models.interfaces import Request, Responder, Sampling
from starling.models.local import load_local, trim_turns
from tiny import tiny_policy, tiny_policy_folder

QUESTION = "What is the answer?"


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

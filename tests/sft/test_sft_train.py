"""The sft stage: its loss against transformers' own, what it leaves out, and a toy it learns."""

import json
import logging
import random

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from starling.base.context import single_process_context
from starling.base.errors import DataError
from starling.data.records import Message
from starling.models.interfaces import Request, Sampling
from starling.models.local import load_local
from starling.sft import train as sft_train
from starling.sft.config import Architecture, SftInputs, SftSection
from starling.sft.train import run
from tiny import tiny_policy_folder

SMALL = Architecture(
    vocab_size=300, hidden_size=32, intermediate_size=64, layers=2, heads=2, kv_heads=1
)


def written(path, conversations):
    """A conversations file; each is a list of turns, the user's first."""
    rows = [
        {
            "messages": [
                {"role": ("user", "assistant")[number % 2], "content": text}
                for number, text in enumerate(turns)
            ]
        }
        for turns in conversations
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tune(folder, conversations, base=None, **settings):
    """Run the stage in `folder` and return its summary and metrics rows."""
    path = written(folder / "conversations.jsonl", conversations)
    base = None if base is None else str(base)
    named = {"conversations": "here", "warmup_steps": 0, "base": base}
    section = SftSection.model_validate(named | settings)
    summary = run(section, SftInputs(path, base), folder / "out", single_process_context(1, seed=0))
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").open()]
    return summary, rows


def labelled(tokenizer, turns):
    """Ids by the chat template, and labels that are -100 except on what the assistant says."""
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(turns)
    ]

    def ids_of(count, prefix):
        text = tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=prefix
        )
        return tokenizer(text, add_special_tokens=False).input_ids

    ids = ids_of(len(messages), False)
    labels = [-100] * len(ids)
    for count in range(1, len(messages), 2):
        begin, end = len(ids_of(count, True)), len(ids_of(count + 1, False))
        labels[begin:end] = ids[begin:end]
    return ids, labels


def test_loss_and_gradient_are_transformers_own_with_labels_on_the_assistants_tokens(tmp_path):
    base = tiny_policy_folder(tmp_path / "base")
    conversations = [
        ["What is the sum?", "The answer is 4."],
        ["Hm", "No."],
        ["One", "Two", "And then?", "The answer is three, four and five."],
        # Long ones, so that the batch does not fit one forward.
        *(["Say it again", "so " * length] for length in (60, 50, 70, 55, 65)),
    ]
    _, rows = tune(tmp_path, conversations, base, steps=1, batch=len(conversations), lr=1e-9)
    tokenizer = AutoTokenizer.from_pretrained(base)
    pairs = [labelled(tokenizer, turns) for turns in conversations]
    width = max(len(ids) for ids, _ in pairs)
    ids = [ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in pairs]
    labels = [labels + [-100] * (width - len(labels)) for _, labels in pairs]
    mask = [[1] * len(own) + [0] * (width - len(own)) for own, _ in pairs]
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    expected = model(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        labels=torch.tensor(labels),
    ).loss
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert rows[0]["sft/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert rows[0]["sft/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_an_architecture_that_cannot_be_packed_is_padded_and_learns_the_same(
    tmp_path, monkeypatch, caplog
):
    base = tiny_policy_folder(tmp_path / "base")
    conversations = [["What is it?", "so " * length] for length in (60, 5, 70, 33, 1, 50, 65)]
    found = []
    for name in ("packed", "padded"):
        (tmp_path / name).mkdir()
        with caplog.at_level(logging.INFO):
            found.append(tune(tmp_path / name, conversations, base, steps=3, batch=5, lr=1e-3)[1])
        monkeypatch.setattr(sft_train, "why_not_packed", lambda _model: "it has sinks")
    assert "conversations are padded, not packed: it has sinks" in caplog.text
    for packed, padded in zip(*found, strict=True):
        assert packed["sft/loss"] == pytest.approx(padded["sft/loss"], rel=1e-5)
        assert packed["sft/grad_norm"] == pytest.approx(padded["sft/grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"train": "lora", "gradient_checkpointing": True}, {"precision": "bfloat16"}],
    ids=["lora", "bfloat16"],
)
def test_adapters_and_bfloat16_learn_too_and_leave_a_plain_float32_model(tmp_path, settings):
    base = tiny_policy_folder(tmp_path / "base")
    _, rows = tune(
        tmp_path, [["Hm", "The answer is no."]], base, steps=8, batch=2, lr=1e-2, **settings
    )
    assert rows[-1]["sft/loss"] < 0.7 * rows[0]["sft/loss"]
    before, after = (
        load_file(path / "model.safetensors") for path in (base, tmp_path / "out" / "model")
    )
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert ("model.embed_tokens.weight" in changed) == ("train" not in settings)
    assert "model.layers.0.mlp.up_proj.weight" in changed


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A toy: the assistant says the animal's sound, whatever stands before the animal."""
    sounds = {"cat": "miaow", "dog": "woof", "hen": "cluck", "cow": "moo"}
    rng = random.Random(0)
    conversations = []
    for _ in range(200):
        animal = rng.choice(list(sounds))
        conversations.append([f"{rng.randrange(100)} {animal}", sounds[animal]])
    folder = tmp_path_factory.mktemp("toy")
    summary, rows = tune(
        folder,
        conversations,
        architecture=SMALL,
        steps=80,
        batch=32,
        lr=1e-2,
        warmup_steps=5,
        keep=(20, 80),
    )
    return folder / "out", summary, rows, sounds


def test_a_toy_is_learned_and_greedy_answers_are_right_and_end(learned):
    out, summary, rows, sounds = learned
    assert rows[0]["sft/loss"] > 3
    assert rows[-1]["sft/loss"] < 0.1
    assert summary.figures["loss"] == rows[-1]["sft/loss"]
    requests = [
        Request(animal, (Message(role="user", content=f"55 {animal}"),), Sampling(12, 0.0))
        for animal in sounds
    ]
    replies = {
        reply.request_id: reply for reply in load_local(str(out / "model")).respond(requests)
    }
    assert {animal: reply.text for animal, reply in replies.items()} == sounds
    assert {reply.finish_reason for reply in replies.values()} == {"stop"}


def test_kept_checkpoints_are_there_and_are_of_their_own_step(learned):
    out, _, _, _ = learned
    assert sorted(path.name for path in out.glob("model*")) == ["model", "model-20", "model-80"]
    early, last, model = (
        load_file(out / name / "model.safetensors") for name in ("model-20", "model-80", "model")
    )
    assert all(torch.equal(last[name], tensor) for name, tensor in model.items())
    assert early.keys() == model.keys()
    assert not any(torch.equal(early[name], tensor) for name, tensor in model.items())
    assert load_local(str(out / "model-20")).codec.format.name == "openchat"


def test_the_tokenizer_knows_the_formats_words(learned):
    out, _, _, _ = learned
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    prefix = tokenizer("GPT4 Correct Assistant:", add_special_tokens=False).input_ids
    assert len(prefix) < len("GPT4 Correct Assistant:") / 2


def test_conversations_that_are_too_long_are_left_out_and_counted(tmp_path, caplog):
    base = tiny_policy_folder(tmp_path / "base")
    conversations = [["a", "b"], ["a", "b" * 300], ["c " * 90, "d"], ["e", "f"]]
    with caplog.at_level(logging.WARNING):
        summary, _ = tune(tmp_path, conversations, base, steps=1, batch=2, max_length=64)
    assert summary.figures["conversations"] == 2
    assert summary.figures["too_long"] == 2
    assert "2 of 4 conversations are longer than sft.max_length (64 tokens)" in caplog.text


def test_conversations_that_are_all_too_long_are_refused(tmp_path):
    base = tiny_policy_folder(tmp_path / "base")
    with pytest.raises(DataError, match="every conversation is longer than sft.max_length"):
        tune(tmp_path, [["a", "b" * 300]], base, steps=1, max_length=16)


def test_a_stage_without_a_base_and_without_an_architecture_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="base: found neither of base and architecture"):
        tune(tmp_path, [["a", "b"]], steps=1)


def test_a_loss_that_is_no_number_is_refused_with_what_to_do(tmp_path):
    base = tiny_policy_folder(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file(
        {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(DataError, match=r"the loss is nan at step 1.*lower sft.lr"):
        tune(tmp_path, [["a", "b"]], base, steps=1, batch=1)

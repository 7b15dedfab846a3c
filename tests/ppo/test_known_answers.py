"""PPO where the answer is known: the best policy under a KL penalty is pi0 exp(r / kl_coef) / Z.

Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, eq. 2; Rafailov et al. 2023,
https://arxiv.org/abs/2305.18290, eq. 4.  It holds for whole responses, so at gamma = 1, and there
every response earns the same total: all advantages are zero and nothing moves any more.  That is
so for GAE, RLOO and GRPO, and for APA, whose target exp(A / lambda) is then no change.  What has no
such limit is not used: whitening, which divides by a deviation that goes to zero; reward clipping
and moments, which change r.  The tolerances tell kl_coef from one a tenth larger or smaller.
"""

import json
import math
import re
import zlib

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo.scripted import mean, run_stage
from starling.base.jsonl import write_records
from starling.data.records import Message
from starling.models.causal_lm import save_model
from tiny import tiny_policy

KL_COEF = 0.5
WORLD = {
    "rollout_batch": 1,
    "ppo_epochs": 2,
    "missing_end_penalty": None,
    "kl_coef": KL_COEF,
    "gamma": 1.0,
    "gae_lambda": 1.0,
    "whiten_advantages": False,
    "value_clip_range": None,
    "value_coef": 1.0,
    "max_grad_norm": None,
    "lr": 2e-3,
    "validation_prompts": 2,
    "select_every": 1000,
    "checkpoint_every": 1000,
}
ASKED = (Message(role="user", content="pull"),)


def worth(text):
    """A reward between -1 and 1 that has nothing to do with language."""
    return (zlib.crc32(text.encode()) % 2001 - 1000) / 1000


class Bandit:
    """A policy that says one or two of four letters, or ends; and what it may come to say."""

    def __init__(self, folder):
        policy = tiny_policy()
        self.codec = policy.codec
        self.prompt = policy.codec.encode(ASKED, mode=None, generation_prompt=True).ids
        letters = [policy.codec.tokenizer.saved.convert_tokens_to_ids(c) for c in "abcd"]
        self._fit(policy.model, [*letters, policy.codec.end_id])
        save_model(folder, policy.model, policy.codec)

    def _fit(self, model, support):
        """Have it speak by a table of chances: at first, and after each letter."""
        table = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) + 0.3
        table /= table.sum(dim=1, keepdim=True)
        rows = torch.tensor([[*self.prompt, letter] for letter in support[:4]])
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(200):
            logprobs = model(rows).logits.log_softmax(dim=-1)[:, :, support]
            first, then = logprobs[0, -2], logprobs[:, -1]
            loss = -(table[0] * first).sum() - (table[1:] * then).sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def logprobs(self, folder, num_tokens, temperature=1.0):
        """Of every response of at most so many tokens, by transformers alone."""
        model = AutoModelForCausalLM.from_pretrained(folder).eval()

        def after(rows):
            logits = model(torch.tensor([[*self.prompt, *row] for row in rows])).logits[:, -1]
            return (logits.double() / temperature).log_softmax(dim=-1)

        [first] = after([()]).tolist()
        if num_tokens == 1:
            return {(token,): logprob for token, logprob in enumerate(first)}
        found = {(token,): first[token] for token in self.codec.stop_ids}
        firsts = [token for token in range(len(first)) if (token,) not in found]
        for token, row in zip(firsts, after([(token,) for token in firsts]).tolist(), strict=True):
            found |= {(token, other): first[token] + each for other, each in enumerate(row)}
        return found


@pytest.fixture(scope="module")
def bandit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bandit")
    made = Bandit(folder / "policy")
    for name, texts in (("prompts", ("pull",)), ("validation", ("x", "y"))):
        rows = [{"id": text, "messages": [{"role": "user", "content": text}]} for text in texts]
        write_records(folder / f"{name}.jsonl", rows)
    return made, folder


def learned(bandit, tmp_path, monkeypatch, **settings):
    """Run the stage on the bandit's prompt; returns its metrics."""
    _, folder = bandit
    _, rows = run_stage(
        WORLD | settings,
        folder / "policy",
        worth,
        tmp_path,
        prompts=folder / "prompts.jsonl",
        monkeypatch=monkeypatch,
        validation=folder / "validation.jsonl",
    )
    return rows


def compared(bandit, model, num_tokens, *, kl_coef=KL_COEF, temperature=1.0):
    """Start, end and closed form as probabilities [responses], and the rewards."""
    made, folder = bandit
    start = made.logprobs(folder / "policy", num_tokens, temperature)
    # One response in ten million says nothing about a distribution; decoding all takes long.
    kept = [response for response, logprob in start.items() if logprob > math.log(1e-7)]
    end = made.logprobs(model, num_tokens, temperature)
    before = torch.tensor([start[response] for response in kept], dtype=torch.float64)
    after = torch.tensor([end[response] for response in kept], dtype=torch.float64)
    rewards = torch.tensor(
        [worth(made.codec.decode_response(response)) for response in kept], dtype=torch.float64
    )
    assert before.exp().sum() > 0.999
    assert after.exp().sum() > 0.999
    best = (before + rewards / kl_coef).log_softmax(dim=0)
    return before.exp(), after.exp(), best.exp(), rewards


def total_variation(one, other):
    return 0.5 * float((one - other).abs().sum())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": "apa"},
        {"advantages": "rloo"},
        {"advantages": "grpo"},
        {"temperature": 0.7},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())) or "ppo",
)
def test_a_policy_of_one_token_becomes_the_one_that_theory_names(
    bandit, tmp_path, monkeypatch, settings
):
    one = {"steps": 60, "samples_per_prompt": 64, "max_response_tokens": 1}
    rows = learned(bandit, tmp_path, monkeypatch, **one | settings)
    temperature = settings.get("temperature", 1.0)
    start, end, best, rewards = compared(bandit, tmp_path / "model", 1, temperature=temperature)
    assert total_variation(start, best) > 0.4
    assert total_variation(end, best) < 0.015
    for other in (0.9, 1.1):
        *_, wrong, _ = compared(
            bandit, tmp_path / "model", 1, kl_coef=other * KL_COEF, temperature=temperature
        )
        assert total_variation(end, wrong) > 0.02
    # What the run says of itself is what the closed form says: KL to the start, and the score.
    late = rows[-20:]
    kl = float((best * (best / start).log()).sum())
    assert mean(late, "ppo/sequence_kl") == pytest.approx(kl, abs=0.05)
    assert mean(late, "ppo/score") == pytest.approx(float((best * rewards).sum()), abs=0.05)


@pytest.mark.parametrize(
    "settings",
    [{"critic": "separate"}, {"advantages": "rloo"}],
    ids=lambda settings: " ".join(map(str, settings.values())) or "ppo",
)
def test_a_policy_of_two_tokens_becomes_the_one_that_theory_names_for_whole_responses(
    bandit, tmp_path, monkeypatch, settings
):
    two = {"steps": 90, "samples_per_prompt": 96, "max_response_tokens": 2}
    learned(bandit, tmp_path, monkeypatch, **two | settings)
    start, end, best, _ = compared(bandit, tmp_path / "model", 2)
    assert total_variation(start, best) > 0.4
    # Rare responses are rarely seen, so that they arrive last.
    assert total_variation(end, best) < 0.03


GLAD = ("happy", "fun", "smile", "smiled", "love", "loved", "friend", "friends", "play", "played")
STORIES = {
    "chat_format": "plain",
    "steps": 16,
    "rollout_batch": 16,
    "samples_per_prompt": 2,
    "ppo_epochs": 2,
    "max_response_tokens": 32,
    "missing_end_penalty": None,
    "guards": {"min_end_rate": None},
    "lr": 3e-4,
    "kl_coef": 0.2,
    "kl_target": 4.0,
    "kl_horizon": 100,
    "validation_prompts": 32,
    "select_every": 16,
    "checkpoint_every": 1000,
}


def gladness(text):
    """How many glad words a story has, three at most."""
    words = re.findall(r"[a-z]+", text.lower())
    return min(3, sum(word in GLAD for word in words))


@pytest.mark.real_data
def test_a_real_model_writes_gladder_stories_that_are_still_stories(
    test_data, tmp_path, monkeypatch
):
    """The reward rises, the KL stays about its target, and the start finds the words as likely."""
    folder = test_data / "models" / "stories260K"
    openings = [
        f"Once upon a time, a {animal} named {name}"
        for animal in ("cat", "dog", "frog", "bear", "bird", "fox", "duck", "mouse")
        for name in ("Lily", "Tom", "Mia", "Sam", "Ben", "Anna", "Max", "Sue")
    ]
    rows = [
        {"id": str(number), "messages": [{"role": "user", "content": text}]}
        for number, text in enumerate(openings)
    ]
    write_records(tmp_path / "openings.jsonl", rows)
    _, found = run_stage(
        STORIES,
        folder,
        gladness,
        tmp_path / "ppo",
        prompts=tmp_path / "openings.jsonl",
        monkeypatch=monkeypatch,
    )
    assert mean(found[-5:], "ppo/score") > 1.5 * mean(found[:3], "ppo/score")
    assert 0.5 * 4 < mean(found[-5:], "ppo/sequence_kl") < 1.5 * 4
    assert max(row["ppo/sequence_kl"] for row in found) < 2 * 4
    before, after = (
        [json.loads(line) for line in (tmp_path / "ppo" / "validation" / name).open()]
        for name in ("step-000000.jsonl", "step-000016.jsonl")
    )
    assert mean(after, "score") > mean(before, "score")
    # In nats a token, by the start: its own stories, the new ones, and these without their order.
    own, new, shuffled = (
        surprise(folder, openings, answers)
        for answers in (before, after, [row | {"answer": mixed(row["answer"])} for row in after])
    )
    assert new < own + 0.3
    assert new < shuffled - 1


def mixed(text):
    """The same words in the alphabet's order."""
    return " ".join(sorted(text.split()))


@torch.no_grad()
def surprise(folder, openings, rows):
    """The model's mean negative logprob of the answers' tokens, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total = count = 0
    for row in rows:
        opening = openings[int(row["id"])]
        begin = len(tokenizer(opening).input_ids)
        ids = torch.tensor([tokenizer(f"{opening} {row['answer'].strip()}").input_ids])
        logprobs = model(ids).logits[0, :-1].log_softmax(dim=-1)
        each = logprobs.gather(1, ids[0, 1:, None])[begin - 1 :]
        total, count = total - float(each.sum()), count + len(each)
    return total / count

"""The whole stage with a function of the answer in the reward model's place, in a tiny world.

The world is a policy that answers with letters, each a or b with even chances, and its prompts.
"""

import json

import torch

from starling.base.context import single_process_context
from starling.base.jsonl import write_records
from starling.models.causal_lm import load_language_model
from starling.models.reward_model import RewardModel
from starling.ppo import train
from starling.ppo.config import PpoInputs, PpoSection, RewardSource
from starling.ppo.scorer import Scorer
from starling.sft.config import Architecture, SftInputs, SftSection
from starling.sft.train import run as run_sft

SMALL = Architecture(
    vocab_size=300, hidden_size=32, intermediate_size=64, layers=2, heads=2, kv_heads=1
)
NUM_PROMPTS = 48


def scripted(folder, worth, chat_format=None):
    """A scorer by `worth(answer)`; the policy in `folder` lends it what it never uses."""

    class Scripted(RewardModel):
        def score(self, items):
            return torch.tensor([float(worth(item.messages[-1].content)) for item in items])

    loaded = load_language_model(str(folder), chat_format=chat_format)
    return Scorer((Scripted(loaded.model, loaded.codec),), lambda each: each[0])


def run_stage(section, policy, worth, out, *, prompts, monkeypatch, seed=0, **inputs):
    """Run ppo on files; returns its summary and the rows of its metrics."""
    scorer = scripted(policy, worth, section.get("chat_format"))
    monkeypatch.setattr(Scorer, "load", lambda *_, **__: scorer)
    given = {"validation": None, "judge": None} | inputs
    found = PpoInputs(str(policy), prompts, (RewardSource(model="scripted"),), **given)
    section = PpoSection.model_validate(section)
    summary = train.run(section, found, out, single_process_context(1, seed=seed))
    return summary, metrics(out)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


def mean(rows, key):
    return sum(row[key] for row in rows) / len(rows)


def write_prompts(path):
    """`say 0` to `say 47`, all of which ask for an a and no b."""
    rows = [
        {
            "id": f"p{number}",
            "messages": [{"role": "user", "content": f"say {number}"}],
            "checks": {"contains_any": ["a"], "excludes": ["b"]},
        }
        for number in range(NUM_PROMPTS)
    ]
    write_records(path, rows)
    return path


def make_speller(folder, *, fewest=4, most=4, steps=50):
    """A policy that answers with so many letters; returns where it lies."""
    rng = torch.Generator().manual_seed(0)
    rows = []
    for number in range(256):
        length = fewest + number % (most + 1 - fewest)
        letters = ["ab"[bit] for bit in torch.randint(0, 2, (length,), generator=rng)]
        turns = (("user", f"say {number % NUM_PROMPTS}"), ("assistant", " ".join(letters)))
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    write_records(folder / "sft.jsonl", rows)
    section = SftSection(
        conversations="sft.jsonl",
        architecture=SMALL,
        steps=steps,
        batch=32,
        lr=1e-2,
        warmup_steps=5,
    )
    run_sft(section, SftInputs(folder / "sft.jsonl", None), folder, single_process_context(1))
    return folder / "model"

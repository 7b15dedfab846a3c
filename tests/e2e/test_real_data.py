"""The main job on things that nobody here made: a real small model and real Nectar rankings."""

import json
import math
from pathlib import Path

import pytest

from e2e.mini import starling

RECIPE = """\
seed: 0
threads: 1
policy: {model}
reward:
  rankings: {rankings}
  chat_format: plain
  max_length: 512
  truncate: right
  batch: 10
  epochs: 2
  lr: 1e-3
  held_out: 0.2
ppo:
  chat_format: plain
  prompts: openings.jsonl
  steps: 16
  rollout_batch: 16
  microbatch: 16
  max_response_tokens: 40
  missing_end_penalty: null  # an opening goes on for longer
  ppo_epochs: 2
  lr: 1e-4
  kl_coef: 0.05
  kl_target: 2
  kl_horizon: 400
  select_every: 4
  validation_prompts: 16
"""
ANIMALS = ["cat", "dog", "frog", "bear", "bird", "fox", "duck", "mouse"]
NAMES = ["Lily", "Tom", "Mia", "Sam", "Ben", "Anna", "Max", "Sue"]


@pytest.mark.real_data
def test_a_real_model_learns_from_real_rankings_and_then_from_their_reward(test_data, tmp_path):
    openings = [
        {"messages": [{"role": "user", "content": f"Once upon a time, a {animal} named {name}"}]}
        for animal in ANIMALS
        for name in NAMES
    ]
    (tmp_path / "openings.jsonl").write_text("\n".join(map(json.dumps, openings)) + "\n")
    recipe = tmp_path / "real.yaml"
    model = test_data / "models" / "stories260K"
    rankings = test_data / "nectar" / "rankings.jsonl"
    recipe.write_text(RECIPE.format(model=model, rankings=rankings))
    assert starling("run", recipe, "--out", tmp_path / "run") == 0

    reward = metrics(tmp_path / "run" / "reward")
    uniform = math.log(math.factorial(7)) / 6
    late = [row["reward/loss"] for row in reward[-4:]]
    assert sum(late) / len(late) < uniform
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # 80 prompts to learn from, 20 apart; long answers are cut at the model's 512 and counted.
    assert summary["reward"]["rankings"] == {"train": 80, "held_out": 20}
    assert summary["reward"]["answers_cut"] > 0
    assert summary["reward"]["pair_accuracy"]["n"] == 20 * 21

    ppo = metrics(tmp_path / "run" / "ppo")
    first, last = ppo[:4], ppo[-4:]
    assert mean(last, "ppo/score") > mean(first, "ppo/score")
    assert 0 < summary["ppo"]["sequence_kl"]["mean"] < 1.5 * summary["ppo"]["kl_target"]


def metrics(stage: Path) -> list[dict[str, float]]:
    """A stage's metrics, a row a step."""
    return [json.loads(line) for line in (stage / "metrics.jsonl").open()]


def mean(rows: list[dict[str, float]], name: str) -> float:
    """The mean of one metric."""
    return sum(row[name] for row in rows) / len(rows)

"""A run of every stage, small enough for a test: the demo's world, a tiny model, a few steps."""

from pathlib import Path

from starling.cli import main
from starling.demo.world import Sizes, write_world

RECIPE = """\
seed: 0
threads: 1
run: {device: cpu}
judge: {kind: rubric, noise: 0.03, position_bias: 0.05}
sft:
  conversations: data/sft.jsonl
  architecture: {vocab_size: 320, hidden_size: 32, intermediate_size: 48, layers: 2}
  steps: 8
  batch: 8
  lr: 1e-2
  keep: [4]
  checkpoint_every: 3
feedback:
  prompts: data/prompts.jsonl
  limit: 16
  batch: 8
  candidates:
    - {name: late, model: sft/model, max_tokens: 12, answers: 2}
    - {name: early, model: sft/model-4, max_tokens: 12, answers: 2}
reward: {epochs: 2, batch: 4, lr: 1e-3, held_out: 0.25, policy_samples: 16, policy_tokens: 12,
  checkpoint_every: 2}
ppo:
  prompts: data/ppo.jsonl
  validation: data/validation.jsonl
  validation_prompts: 8
  instructions: data/instructions.jsonl
  steps: 3
  rollout_batch: 4
  samples_per_prompt: 2
  ppo_epochs: 2
  max_response_tokens: 12
  lr: 1e-3
  kl_target: 4
  kl_horizon: 200
  reward_centre: running
  reward_scale: running
  select_every: 1
  checkpoint_every: 1
bench: {questions: data/bench.jsonl, checks: data/checks.jsonl, max_tokens: 12, best_of: 2}
"""

SIZES = Sizes(sft=64, prompts=32, ppo=16, validation=8, bench=8, instructions=6, checks=4)


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    """The recipe and its world in `folder`; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        write_world(folder / "data", seed=0, sizes=SIZES)
    path = folder / "mini.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def starling(*arguments: str | Path) -> int:
    """Run one command in this process and return its exit status."""
    return main([str(argument) for argument in arguments])

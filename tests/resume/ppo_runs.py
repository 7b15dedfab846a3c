"""The ppo stage on a tiny world that uses everything it carries from step to step."""

import json

import torch

from resume.kills import in_child, keep_checkpoints
from starling.base.jsonl import write_records
from starling.cli import main
from starling.data.records import Message, Prompt
from starling.models.causal_lm import save_model
from tiny import tiny_policy, tiny_reward_folder

STEPS = 6
PPO = {
    "prompts": "prompts.jsonl",
    "instructions": "instructions.jsonl",
    "reward_model": "scorer",
    "validation_prompts": 4,
    "steps": STEPS,
    "rollout_batch": 4,
    "samples_per_prompt": 2,
    "ppo_epochs": 2,
    "minibatches": 2,
    "max_response_tokens": 5,
    "lr": 3e-3,
    "kl_target": 1.0,
    "kl_horizon": 50,
    "select_every": 2,
    "select_max_length_ratio": 2.0,
    "select_max_instruction_drop": 1.0,
    "checkpoint_every": 2,
    "reward_centre": "running",
    "reward_clip": 2.0,
    "reward_scale": "running",
}
VARIANTS = {
    "full": {"adam_form": "tensorflow", "guards": {"max_sequence_kl": 0.05}},
    "lora": {"train": "lora", "lora_rank": 2, "lr": 1e-2, "kl_target": 2.0},
    # Each update raises a flag, which speaks against the next batch: that may be after a resume.
    "top": {
        "train": "top",
        "top_layers": 1,
        "critic_warmup": 1,
        "kl_target": None,
        "guards": {"action": "skip", "max_clip_fraction": 0.002, "min_end_rate": None},
    },
    "separate": {
        "critic": "separate",
        "critic_warmup": 1,
        "critic_gate": 0.3,
        "kl_target": None,
    },
}


def ending_policy():
    """A tiny policy whose end marker has about one chance in four: answers differ in length."""
    policy = tiny_policy()
    head = policy.model.get_output_embeddings().weight
    ids = torch.tensor([policy.codec.encode(asked(1), mode=None, generation_prompt=True).ids])
    with torch.no_grad():
        state = policy.model.model(ids).last_hidden_state[0, -1]
        head[policy.codec.end_id] += 6.5 * state / state.square().sum()
    return policy


def asked(number):
    return (Message(role="user", content=f"Question {number}?"),)


def write_inputs(folder):
    """The recipes of all variants, and what they read."""
    policy = ending_policy()
    save_model(folder / "policy", policy.model, policy.codec)
    tiny_reward_folder(folder / "scorer", folder / "policy", seed=1)
    write_records(
        folder / "prompts.jsonl",
        [Prompt(id=f"p{n}", messages=asked(n), checks={"excludes": ["a", "e"]}) for n in range(12)],
    )
    limit = {"kind": "max_words", "value": 2}
    write_records(
        folder / "instructions.jsonl",
        [
            {"id": f"i{n}", "messages": [dict(asked(20 + n)[0])], "instructions": [limit]}
            for n in range(3)
        ],
    )
    for name, settings in VARIANTS.items():
        recipe = {"policy": "policy", "judge": {"kind": "rubric", "noise": 0.1}}
        (folder / f"{name}.yaml").write_text(json.dumps(recipe | {"ppo": PPO | settings}))


def starling_ppo(inputs, variant, out, prepare=lambda: None):
    """`starling ppo` in a fork, which copies its last checkpoints; returns its exit status."""

    def prepared():
        keep_checkpoints()
        prepare()

    command = ["ppo", str(inputs / f"{variant}.yaml"), "--out", str(out)]
    return in_child(lambda: main(command), prepared)


def checkpoints(out):
    return sorted(path.name for path in (out / "ppo" / "checkpoints").iterdir())

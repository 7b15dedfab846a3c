"""Everything that ppo carries from step to step comes back from a checkpoint, to the byte.

Compared are all files of the run and, beside them, the last two checkpoints, which hold the
optimizer's moments, the KL controller, the moments of the scores, the guards and the selection.
"""




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
    "select_every": 1,
    "select_max_length_ratio": 2.0,
    "checkpoint_every": 2,
    "reward_centre": "running",
    "reward_clip": 2.0,
    "reward_scale": "running",
}
VARIANTS = {
    "full": {"adam_form": "tensorflow", "guards": {"max_sequence_kl": 0.05}},
    "lora": {"train": "lora", "lora_rank": 2, "lr": 1e-2},
    # A flag of an update speaks against the next batch, which may come after a resume.
    "top": {
        "train": "top",
        "top_layers": 1,
        "guards": {"action": "skip", "max_clip_fraction": 0.02},
    },
    "separate": {"critic": "separate", "critic_warmup": 1, "critic_gate": 0.5},
}

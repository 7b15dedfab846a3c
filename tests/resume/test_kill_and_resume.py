"""Whatever ends a run, the same call then leaves the bytes of a run that nothing disturbed.

What ppo carries from step to step has a file of its own, test_ppo_resume.py.  More points, at
random times and through the command line: tools/kill_test.py.
"""

import json
import logging
import signal
from pathlib import Path

import pytest

# What a run imports by name, imported before the fork.
import starling.bench.run
import starling.ppo.train
import starling.reward.train
import starling.sft.train  # noqa: F401
from resume.kills import (
    contents,
    die_after_step,
    die_in,
    die_in_half_a_save,
    in_child,
    send_self,
)
from starling.base.jsonl import write_records
from starling.base.metrics import MetricsLog
from starling.models import causal_lm
from starling.pipeline import run_pipeline
from starling.recipe import validate_recipe
from tiny import tiny_policy_folder, tiny_reward_folder

STEPS = 6
STAGES = ("sft", "reward", "ppo")

RECIPES = {
    "sft": {
        "sft": {
            "conversations": "sft.jsonl",
            "architecture": {"vocab_size": 300, "hidden_size": 16, "heads": 2, "layers": 1},
            "steps": STEPS,
            "batch": 5,
            "lr": 1e-2,
            "warmup_steps": 2,
            "keep": [3],
            "checkpoint_every": 2,
        },
    },
    "reward": {
        "policy": "policy",
        # 12 of 15 rankings to train on, twice, in batches of 4: six steps.
        "reward": {
            "rankings": "rankings.jsonl",
            "epochs": 2,
            "batch": 4,
            "lr": 1e-2,
            "schedule": "cosine",
            "held_out": 0.2,
            "checkpoint_every": 2,
        },
    },
    "ppo": {
        "policy": "policy",
        "judge": {"kind": "rubric", "noise": 0.1},
        "ppo": {
            "prompts": "prompts.jsonl",
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
            "checkpoint_every": 2,
        },
    },
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The folder beside which the recipes lie: models and data files."""
    folder = tmp_path_factory.mktemp("inputs")
    policy = tiny_policy_folder(folder / "policy")
    tiny_reward_folder(folder / "scorer", policy, seed=1)

    def user(number):
        return {"role": "user", "content": f"Question {number}?"}

    def answer(number):
        return f"Answer {number * 7 % 11}."

    write_records(
        folder / "sft.jsonl",
        [{"messages": [user(n), {"role": "assistant", "content": answer(n)}]} for n in range(17)],
    )
    write_records(
        folder / "rankings.jsonl",
        [
            {
                "messages": [user(n)],
                "answers": [
                    {"answer": answer(n + place), "model": "m", "rank": 1.0 + (place + n) % 3}
                    for place in range(3)
                ],
            }
            for n in range(15)
        ],
    )
    write_records(
        folder / "prompts.jsonl",
        [
            {"id": f"p{n}", "messages": [user(n)], "checks": {"excludes": ["a", "e"]}}
            for n in range(12)
        ],
    )
    return folder


def run(stage, inputs, out):
    run_pipeline(validate_recipe(RECIPES[stage], stage), inputs, out=out, only=stage)


def run_in_child(stage, inputs, out, prepare=lambda: None):
    return in_child(lambda: run(stage, inputs, out), prepare)


def die_in_the_model(stage):
    """The final model's weights are written, its tokenizer is not; sft keeps another before it."""
    return die_in(causal_lm, "save_tokenizer", 2 if stage == "sft" else 1)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """What each stage leaves when nothing happens to it, each run once."""
    finished: dict[str, Path] = {}

    def folder_of(stage):
        if stage not in finished:
            out = tmp_path_factory.mktemp(f"undisturbed-{stage}")
            assert run_in_child(stage, inputs, out) == 0
            finished[stage] = out
        return finished[stage]

    return folder_of


@pytest.mark.parametrize("point", ["after a step", "in half a save", "in the final model"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_ends_with_the_same_bytes(stage, point, inputs, undisturbed, tmp_path):
    prepare = {
        "after a step": die_after_step(5),
        "in half a save": die_in_half_a_save,
        "in the final model": die_in_the_model(stage),
    }[point]
    expected = undisturbed(stage)
    assert run_in_child(stage, inputs, tmp_path, prepare) == -signal.SIGKILL
    left = {path.name for path in (tmp_path / stage / "checkpoints").iterdir()}
    assert (
        left
        == {
            "after a step": {"step-000002", "step-000004"},
            "in half a save": {"step-000002", ".tmp-step-000004"},
            "in the final model": {"step-000004", "step-000006"},
        }[point]
    )
    assert run_in_child(stage, inputs, tmp_path) == 0
    assert contents(tmp_path) == contents(expected)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_told_to_stop_does_so_at_the_step_boundary_and_goes_on_from_there(
    stage, inputs, undisturbed, tmp_path
):
    expected = undisturbed(stage)

    def prepare():
        # While step 3 is being logged: not a step with a checkpoint of its own.
        send_self(signal.SIGTERM, MetricsLog, "log", 5)

    assert run_in_child(stage, inputs, tmp_path, prepare) == 128 + signal.SIGTERM
    assert len((tmp_path / stage / "metrics.jsonl").read_text().splitlines()) == 3
    left = {path.name for path in (tmp_path / stage / "checkpoints").iterdir()}
    assert left == {"step-000002", "step-000003"}
    assert run_in_child(stage, inputs, tmp_path) == 0
    assert contents(tmp_path) == contents(expected)


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    inputs, undisturbed, tmp_path
):
    # Before the first checkpoint, twice after a resume, and in the save after that.
    expected = undisturbed("ppo")
    for prepare in (die_after_step(1), die_after_step(3), die_after_step(2), die_in_half_a_save):
        assert run_in_child("ppo", inputs, tmp_path, prepare) == -signal.SIGKILL
    assert run_in_child("ppo", inputs, tmp_path) == 0
    assert contents(tmp_path) == contents(expected)


def test_a_flipped_byte_in_the_newest_checkpoint_is_passed_over_for_the_one_before(
    inputs, undisturbed, tmp_path, caplog
):
    expected = undisturbed("ppo")
    assert run_in_child("ppo", inputs, tmp_path, die_after_step(5)) == -signal.SIGKILL
    newest = tmp_path / "ppo" / "checkpoints" / "step-000004" / "tensors.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        run("ppo", inputs, tmp_path)
    assert "passing over the damaged checkpoint" in caplog.text
    assert "step-000004: tensors.safetensors does not match its hash" in caplog.text
    assert contents(tmp_path) == contents(expected)


def test_the_undisturbed_ppo_run_uses_what_a_resume_must_bring_back(undisturbed):
    # Otherwise equal bytes would say little: the controller moves and a checkpoint is selected.
    out = undisturbed("ppo")
    rows = [json.loads(line) for line in (out / "ppo" / "metrics.jsonl").open()]
    assert len({row["ppo/kl_coef"] for row in rows}) == STEPS
    assert rows[-1]["ppo/sequence_kl"] > 0.01
    assert any(row["ppo/validation_eligible"] for row in rows[:4])
    assert json.loads((out / "summary.json").read_text())["ppo"]["selected_step"] < STEPS

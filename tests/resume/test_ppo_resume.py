"""Everything that ppo carries from step to step comes back from a checkpoint, to the byte.

Compared are all files of the run and, beside them, the last two checkpoints, which hold the
optimizer's moments, the KL controller, the moments of the scores, the guards and the selection.
"""

import json
import os
import re
import resource
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from resume.kills import (
    LAST,
    contents,
    die_after_step,
    die_in,
    die_in_half_a_save,
    in_child,
    keep_checkpoints,
    send_self,
)
from starling.base.checkpoint import _hashes
from starling.base.jsonl import write_records
from starling.cli import main
from starling.data.records import Message, Prompt
from starling.models.causal_lm import new_language_model, save_model
from starling.models.training import Journal
from starling.ppo import update
from starling.ppo.rollout import Collector
from starling.ppo.select import Validator
from starling.ppo.state import State
from starling.recipe import load_recipe
from starling.sft.config import Architecture
from tiny import tiny_policy, tiny_reward_folder, tiny_tokenizer

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
        "kl_target": 0.3,
        "guards": {"action": "skip", "max_clip_fraction": 0.002, "min_end_rate": None},
    },
    "separate": {"critic": "separate", "critic_warmup": 1, "critic_gate": 0.3},
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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The folder with the recipes, and what they read."""
    folder = tmp_path_factory.mktemp("inputs")
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
    return folder


def starling_ppo(inputs, variant, out, prepare=lambda: None):
    """`starling ppo` in a fork, which copies its last checkpoints; returns its exit status."""

    def prepared():
        keep_checkpoints()
        prepare()

    command = ["ppo", str(inputs / f"{variant}.yaml"), "--out", str(out)]
    return in_child(lambda: main(command), prepared)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """What each variant leaves when nothing happens to it, each run once."""
    finished = {}

    def folder_of(variant):
        if variant not in finished:
            out = tmp_path_factory.mktemp(f"undisturbed-{variant}")
            assert starling_ppo(inputs, variant, out) == 0
            finished[variant] = out
        return finished[variant]

    return folder_of


def checkpoints(out):
    return sorted(path.name for path in (out / "ppo" / "checkpoints").iterdir())


def metrics(out):
    return [json.loads(line) for line in (out / "ppo" / "metrics.jsonl").open()]


# Step 5's rollout is the eighth batch: three validations come first.  All learn from step 6.
POINTS = {
    "rollout": (die_in(Collector, "_evaluate", 8), ["step-000002", "step-000004"]),
    "update": (
        lambda: die_in_update(step=5, call=3),
        ["step-000002", "step-000004"],
    ),
    "save": (die_in_half_a_save, [".tmp-step-000004", "step-000002"]),
    "validation": (die_in(Validator, "_rate", 4), ["step-000002", "step-000004"]),
    "flags": (die_in(State, "_note", 9), ["step-000002", "step-000004"]),
}


def die_in_update(step, call):
    """In the third of an iteration's four optimizer steps, its gradient being computed."""
    original, calls = update.accumulate, []

    def optimize(*arguments, **options):
        if options["step"] == step:
            calls.append(1)
        return optimizer_step(*arguments, **options)

    def accumulate(*arguments):
        measured = original(*arguments)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return measured

    optimizer_step = update.optimize
    update.optimize, update.accumulate = optimize, accumulate


@pytest.mark.parametrize(
    ("variant", "point"),
    [
        *(("full", point) for point in POINTS),
        ("lora", "update"),
        ("lora", "save"),
        ("top", "rollout"),
        ("top", "update"),
        ("separate", "update"),
        ("separate", "save"),
    ],
)
def test_a_run_killed_anywhere_ends_with_the_bytes_of_an_undisturbed_one(
    variant, point, inputs, undisturbed, tmp_path
):
    prepare, left = POINTS[point]
    expected = contents(undisturbed(variant))
    assert starling_ppo(inputs, variant, tmp_path, prepare) == -signal.SIGKILL
    assert checkpoints(tmp_path) == left
    assert starling_ppo(inputs, variant, tmp_path) == 0
    assert contents(tmp_path) == expected
    assert {name for name in expected if name.startswith(LAST)} == {
        f"{LAST}/step-00000{step}/{file}"
        for step in (4, 6)
        for file in ("hashes.json", "state.json", "tensors.safetensors")
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_undisturbed_run_uses_all_that_a_resume_must_bring_back(variant, undisturbed):
    # Otherwise equal bytes would say little.
    out = undisturbed(variant)
    saved = out / LAST / "step-000004"
    extra = json.loads((saved / "state.json").read_bytes())["state"]["extra"]
    assert extra["kl_coef"] != PPO.get("kl_coef", 0.05)
    assert extra["moments"]["count"] == 4 * 8
    assert extra["moments"]["m2"] > 1
    assert extra["health"]["num_seen"] == 4
    assert 3 <= len(extra["health"]["correlations"]) <= 4
    assert len(extra["validations"]) == 3
    tensors = load_file(saved / "tensors.safetensors")
    selected = [name for name in tensors if name.startswith("extra/")]
    learning = [name for name in tensors if name.startswith("module/")]
    # Of the separate critic's run nothing is eligible yet.
    assert extra["best_step"] in ((None,) if variant == "separate" else (2, 4))
    assert any(tensors[name].abs().max() > 0 for name in tensors if name.endswith("exp_avg_sq"))
    if variant == "full":
        assert len(extra["health"]["flags"]) == 3
    if variant == "lora":
        # The adapters alone learn, with the critic's head; what was selected is whole and merged.
        assert all("lora_" in name or "value_head" in name for name in learning)
        assert not any("lora_" in name for name in selected)
    if variant == "top":
        assert extra["health"]["num_pending"] == 1
        learned = ["ppo/policy_loss" in row for row in metrics(out)]
        assert learned == [True, True, False, True, False, True]
        assert not any(".layers.0." in name or "embed_tokens" in name for name in selected)
    if variant == "separate":
        assert any("critic" in name for name in learning)
        assert metrics(out)[0]["ppo/gated"] > 0
        assert metrics(out)[5]["ppo/gated"] == 0


def test_a_run_told_to_stop_in_a_rollout_ends_its_step_and_goes_on_from_there(
    inputs, undisturbed, tmp_path, capfd
):
    def prepare():
        send_self(signal.SIGTERM, Collector, "_evaluate", 5)  # step 3, of which none is saved

    assert starling_ppo(inputs, "full", tmp_path, prepare) == 128 + signal.SIGTERM
    assert "Stopped. The same command goes on from here." in capfd.readouterr().err
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
    assert checkpoints(tmp_path) == ["step-000002", "step-000003"]
    assert starling_ppo(inputs, "full", tmp_path) == 0
    assert contents(tmp_path) == contents(undisturbed("full"))


def test_a_run_of_the_demos_size_that_is_told_to_stop_has_left_within_ten_seconds(inputs, tmp_path):
    shape = Architecture(vocab_size=1024).model_dump()
    policy = new_language_model(shape, tiny_tokenizer(340), "openchat", seed=0)
    policy.model.resize_token_embeddings(1024)
    save_model(tmp_path / "policy", policy.model, policy.codec)
    tiny_reward_folder(tmp_path / "scorer", tmp_path / "policy")
    ppo = load_recipe("demo").recipe.ppo.model_dump(mode="json", exclude_defaults=True)
    files = {"prompts": "prompts.jsonl", "validation": None, "instructions": None}
    shutil.copy(inputs / "prompts.jsonl", tmp_path)
    ppo |= files | {"reward_model": "scorer", "validation_prompts": 2, "select_every": 1000}
    recipe = {"policy": "policy", "judge": {"kind": "rubric"}, "ppo": ppo}
    (tmp_path / "demo.yaml").write_text(json.dumps(recipe))
    child = os.fork()
    if child == 0:
        status = 99
        try:
            command = ["ppo", str(tmp_path / "demo.yaml"), "--out", str(tmp_path / "out")]
            status = main(command)
        finally:
            os._exit(status)
    log = tmp_path / "out" / "ppo" / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before its first step did"
        time.sleep(0.02)
    time.sleep(0.3)  # so that the signal comes in the middle of a step
    os.kill(child, signal.SIGTERM)
    before = cpu_seconds(child)
    _, status, used = os.wait4(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM
    # Seconds of the process, not of the clock: another's load is none of its own.
    assert used.ru_utime + used.ru_stime - before < 10
    steps = len(log.read_text().splitlines())
    assert 2 <= steps < ppo["steps"]
    assert checkpoints(tmp_path / "out")[-1] == f"step-{steps:06d}"


def cpu_seconds(process):
    """What a running process has used so far (proc(5), fields 14 and 15)."""
    with open(f"/proc/{process}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("name", ["save", "log"])
def test_a_full_disk_ends_the_run_with_what_to_do_and_costs_no_step_that_was_saved(
    name, inputs, undisturbed, tmp_path, capfd
):
    """Full for this process alone: no file of it may grow beyond what it has by then."""

    def prepare():
        owner = {"save": Journal, "log": Journal}[name]
        original, calls = getattr(owner, name), []

        def wrapped(*arguments):
            calls.append(1)
            if len(calls) == {"save": 2, "log": 5}[name]:
                limit = (tmp_path / "ppo" / "metrics.jsonl").stat().st_size + 10
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return original(*arguments)

        setattr(owner, name, wrapped)

    assert starling_ppo(inputs, "full", tmp_path, prepare) == 2
    said = capfd.readouterr().err
    assert "error: could not" in said
    assert re.search(r"Make room.*then run the same command again", said)
    assert "Traceback" not in said
    saved = {"save": ["step-000002"], "log": ["step-000002", "step-000004"]}[name]
    assert checkpoints(tmp_path) == saved
    assert starling_ppo(inputs, "full", tmp_path) == 0
    assert contents(tmp_path) == contents(undisturbed("full"))


@pytest.fixture(scope="module")
def stopped(inputs, tmp_path_factory):
    """A run that was killed after step 5; its newest checkpoint is of step 4."""
    out = tmp_path_factory.mktemp("stopped")
    assert starling_ppo(inputs, "full", out, die_after_step(5)) == -signal.SIGKILL
    shutil.rmtree(out / "ppo" / "checkpoints" / "step-000002")
    return out


def tampered(out, change_state=None, change_tensors=None):
    """Change a checkpoint and its hashes, as a version that keeps other fields would write it."""
    [folder] = (out / "ppo" / "checkpoints").iterdir()
    if change_state is not None:
        state = json.loads((folder / "state.json").read_bytes())
        change_state(state["state"])
        (folder / "state.json").write_text(json.dumps(state))
    if change_tensors is not None:
        tensors = load_file(folder / "tensors.safetensors")
        change_tensors(tensors)
        save_file(tensors, folder / "tensors.safetensors")
    (folder / "hashes.json").write_bytes(_hashes(folder))


def without(*path):
    """Drop the field at this path of the checkpoint's state."""

    def change(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def with_field(*path):
    """Add a field of this name, in the place that the path says."""

    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = 1

    return change


FIELDS = [
    ("extra",),
    ("optimizer",),
    ("metrics_offset",),
    ("extra", "kl_coef"),
    ("extra", "best_step"),
    ("extra", "moments", "m2"),
    ("extra", "health", "num_pending"),
    ("extra", "health", "flags", 0, "sentence"),
    ("extra", "validations", 1, "followed"),
]


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_a_missing_field_of_a_checkpoint_is_an_error_that_names_it(
    path, inputs, stopped, tmp_path, capfd
):
    out = shutil.copytree(stopped, tmp_path / "out")
    tampered(out, without(*path))
    refused(inputs, out, f"missing {path[-1]}, unexpected none", capfd)


@pytest.mark.parametrize(
    "path",
    [
        ("surprise",),
        ("extra", "surprise"),
        ("extra", "health", "surprise"),
    ],
    ids=lambda path: ".".join(map(str, path)),
)
def test_a_field_too_many_is_an_error_that_names_it(path, inputs, stopped, tmp_path, capfd):
    out = shutil.copytree(stopped, tmp_path / "out")
    tampered(out, with_field(*path))
    refused(inputs, out, "missing none, unexpected surprise", capfd)


def test_a_selected_step_that_was_never_validated_is_an_error(inputs, stopped, tmp_path, capfd):
    out = shutil.copytree(stopped, tmp_path / "out")
    tampered(out, lambda state: state["extra"].update(best_step=77))
    refused(inputs, out, "selected step 77, and validated only 0, 2, 4", capfd)


@pytest.mark.parametrize("group", ["module", "optimizer", "extra"])
def test_a_tensor_under_another_name_is_an_error_that_names_both(
    group, inputs, stopped, tmp_path, capfd
):
    """Of the policy, of the optimizer's moments, and of what was selected."""
    out = shutil.copytree(stopped, tmp_path / "out")
    names = []

    def renamed(tensors):
        names.append(next(name for name in tensors if name.startswith(f"{group}/")))
        tensors[f"{names[0]}x"] = tensors.pop(names[0])

    tampered(out, change_tensors=renamed)
    refused(inputs, out, f"missing {names[0]}, unexpected {names[0]}x", capfd)


def refused(inputs, out, words, capfd):
    """The run ends with exit status 2, the words and what to do; the checkpoint stays as it was."""
    before = contents(out / "ppo" / "checkpoints")
    assert starling_ppo(inputs, "full", out) == 2
    said = capfd.readouterr().err
    assert "error: the checkpoint " in said
    assert words in said
    assert "delete the stage's checkpoints" in said
    assert "Traceback" not in said
    assert contents(out / "ppo" / "checkpoints") == before

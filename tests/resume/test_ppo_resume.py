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
from safetensors.torch import load_file

from resume.kills import LAST, contents, die_in, die_in_half_a_save, send_self
from resume.ppo_runs import VARIANTS, checkpoints, starling_ppo, write_inputs
from starling.cli import main
from starling.models.causal_lm import new_language_model, save_model
from starling.models.training import Journal
from starling.ppo import state as ppo_state
from starling.ppo import update
from starling.ppo.rollout import Collector
from starling.ppo.select import Validator
from starling.recipe import load_recipe
from starling.sft.config import Architecture
from tiny import tiny_reward_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The folder with the recipes, and what they read."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


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
    # Each flagged step writes two files; of step 5's, the fourth, one is there.
    "flags": (die_in(ppo_state, "write_records", 8), ["step-000002", "step-000004"]),
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
    if variant in ("full", "lora"):
        assert extra["kl_coef"] != 0.05
    assert extra["moments"]["count"] == 4 * 8
    assert extra["moments"]["m2"] > 1
    assert extra["health"]["num_seen"] == 4
    assert 3 <= len(extra["health"]["correlations"]) <= 4
    assert len(extra["validations"]) == 3
    tensors = load_file(saved / "tensors.safetensors")
    selected = [name for name in tensors if name.startswith("extra/")]
    learning = [name for name in tensors if name.startswith("module/")]
    assert extra["best_step"] in (2, 4)
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

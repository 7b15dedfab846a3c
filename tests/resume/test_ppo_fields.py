"""A checkpoint of ppo with a field or a tensor missing or too many is refused, and which is said.

Its hashes are those of the changed files, as a version that keeps other fields would write them.
"""

import json
import shutil
import signal

import pytest
from safetensors.torch import load_file, save_file

from resume.kills import contents, die_after_step
from resume.ppo_runs import PPO, VARIANTS, starling_ppo, write_inputs
from starling.base.checkpoint import _hashes, load_newest
from starling.base.errors import CheckpointError
from starling.ppo.config import PpoSection
from starling.ppo.state import State


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The folder with the recipes, and what they read."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("optimizer"), "missing optimizer, unexpected none"),
        (without("extra", "kl_coef"), "missing kl_coef, unexpected none"),
        (with_field("surprise"), "missing none, unexpected surprise"),
    ],
    ids=["optimizer", "kl_coef", "surprise"],
)
def test_a_run_on_a_checkpoint_of_other_fields_ends_with_an_error_that_names_them(
    change, words, inputs, stopped, tmp_path, capfd
):
    out = shutil.copytree(stopped, tmp_path / "out")
    tampered(out, change)
    refused(inputs, out, words, capfd)


IN_EXTRA = [
    ("kl_coef",),
    ("moments",),
    ("health",),
    ("validations",),
    ("best_step",),
    ("moments", "m2"),
    ("health", "num_pending"),
    ("health", "flags", 0, "sentence"),
    ("validations", 1, "followed"),
]


@pytest.mark.parametrize("path", IN_EXTRA, ids=lambda path: ".".join(map(str, path)))
def test_every_field_of_ppos_own_must_be_there_and_no_other(path, stopped):
    *inside, name = path
    section = PpoSection.model_validate(PPO | VARIANTS["full"])
    for change, words in (
        (without("extra", *path), f"missing {name}, unexpected none"),
        (with_field("extra", *inside, "surprise"), "missing none, unexpected surprise"),
    ):
        snapshot = load_newest(stopped / "ppo" / "checkpoints")
        assert snapshot is not None
        State.resume(snapshot, section)
        change(snapshot.state)
        with pytest.raises(CheckpointError, match=words):
            State.resume(snapshot, section)


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

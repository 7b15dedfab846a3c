"""What every test shares: types checked at run time, one thread, the folder of real data."""

import os
from pathlib import Path

# No test may reach a hub, whatever the machine allows.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Before anything of starling is imported: a float mask or a wrong shape then raises at the call.
install_import_hook("starling", "typechecks.check")

# Two cores are shared with the run that a developer has going; a tiny model needs no more.
torch.set_num_threads(1)

# A loaded machine is slow, which says nothing about the code.
settings.register_profile("starling", deadline=None)
settings.load_profile("starling")


@pytest.fixture
def test_data() -> Path:
    """The folder of real third-party files; tests that need it are skipped without one."""
    named = os.environ.get("STARLING_TEST_DATA")
    if not named:
        pytest.skip("STARLING_TEST_DATA is not set: it names the folder of third-party test data")
    folder = Path(named)
    assert folder.is_dir(), f"STARLING_TEST_DATA names {folder}, which is not a folder"
    return folder


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory) -> Path:
    """A saved tiny policy; tests that change it work on a copy."""
    from tiny import tiny_policy_folder

    return tiny_policy_folder(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory, policy_folder) -> Path:
    """A saved tiny reward model on the tiny policy's weights."""
    from tiny import tiny_reward_folder

    return tiny_reward_folder(tmp_path_factory.mktemp("reward") / "model", policy_folder)

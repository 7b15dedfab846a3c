"""What the model card's programs run on: folders that Starling wrote, and the programs' text."""

import runpy
from pathlib import Path

import pytest

from e2e.mini import starling, write_recipe


@pytest.fixture(scope="session")
def ppo_model(tmp_path_factory) -> Path:
    """The folder that the ppo stage of a small run wrote."""
    folder = tmp_path_factory.mktemp("card")
    recipe = write_recipe(folder)
    for stage in ("sft", "feedback", "reward", "ppo"):
        assert starling(stage, recipe, "--out", folder / "run") == 0
    return folder / "run" / "ppo" / "model"


@pytest.fixture
def run_card(test_data, tmp_path):
    """Run one of the card's programs as it stands, but for the model's name."""

    def run(program: str, name: str, folder: Path) -> dict[str, object]:
        text = (test_data / "card" / program).read_text(encoding="utf-8")
        assert f'from_pretrained("{name}")' in text
        script = tmp_path / program
        script.write_text(text.replace(f'"{name}"', repr(str(folder))), encoding="utf-8")
        return runpy.run_path(str(script))

    return run

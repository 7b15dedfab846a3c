"""The documented way to several processes, as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.mini import RECIPE, starling, write_recipe

# The stages that are shared, and one between them that rank 0 does alone.
SHARED = RECIPE[: RECIPE.index("ppo:")]


def test_torchrun_with_two_processes_makes_what_one_makes(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = write_recipe(tmp_path, SHARED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = ["-m", "starling.cli", "run", str(recipe), "--out", str(tmp_path / "two")]
    done = subprocess.run([*torchrun, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Figures:") == 1
    assert done.stderr.count("feedback: Ranked 16 of 16 prompts") == 1
    assert starling("run", recipe, "--out", tmp_path / "one") == 0

    def files(name: str) -> set[Path]:
        run = tmp_path / name
        return {path.relative_to(run) for path in run.rglob("*") if path.is_file()}

    assert files("one") == files("two")
    for stage in ("sft", "reward"):
        one, two = (
            [json.loads(line) for line in (tmp_path / name / stage / "metrics.jsonl").open()]
            for name in ("one", "two")
        )
        assert len(one) == len(two) > 3
        for key in (f"{stage}/loss", f"{stage}/grad_norm"):
            # The reward stage reads what two processes trained, so it starts a rounding apart.
            for row, other in zip(one, two, strict=True):
                assert other[key] == pytest.approx(row[key], rel=1e-5 if stage == "sft" else 1e-3)

"""Break the maths, and a resume, on purpose, one line at a time, and see that a test notices.

    python tools/mutate.py              all mutants; exit status 1 if any survives
    python tools/mutate.py advantage    only those of files whose path holds the word

Each mutant is applied to a temporary copy of the tree, never in place; the tests named beside it
then run there.  A mutant whose old text is not found exactly once is an error: the list is stale.
Equivalent changes (a difference that no input shows) are not in the list.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


NO_SHRINKING = """
from hypothesis import Phase

settings.register_profile("mutate", deadline=None, phases=(Phase.explicit, Phase.generate))
settings.load_profile("mutate")
"""
"""Added to the copy's conftest.py: that a test fails is enough, the smallest case is not wanted."""


class Mutant(NamedTuple):
    """One change to `src/starling/<file>`, and the test file that must fail for it."""

    file: str
    tests: str
    old: str
    new: str


# By file: the tests that must notice, and changes that leave the code running but wrong.
CHANGES = {
    ("reward/loss.py", "tests/reward/test_reward_loss.py"): [
        ("weight = weight * keep[:, None, :]", "weight = weight * 1"),
        ("other > stage", "other < stage"),
        ("share = 1 - nth", "share = 1 - 0 * nth"),
        ("diagonal=-1", "diagonal=0"),
        ("remaining - scores.float(), 0.0", "scores.float() - remaining, 0.0"),
        ("(num_kept - 1)", "num_kept"),
        ("terms.sum(dim=1) / (num_kept - 1)", "terms.mean(dim=1)"),
        ("(num_kept < 2)", "(num_kept < 1)"),
        (" or not is_ranked.any(dim=1).all()", ""),
        ("keep & (ranks != UNRANKED)", "keep & (ranks == ranks)"),
        ("weight.log()).logsumexp(dim=2)", "weight.log()).exp().sum(dim=2).log()"),
    ],
    ("ppo/kl.py", "tests/ppo/test_kl.py"): [
        ("return logprobs - ref_logprobs", "return ref_logprobs - logprobs"),
        ("torch.exp(-difference)", "torch.exp(difference)"),
        ("- 1 + difference", "- 1 - difference"),
        (
            "masked_sum(kl, response_mask, dim=1)",
            "masked_sum(kl, response_mask, dim=1) / response_mask.sum(dim=1)",
        ),
        ("measured / self.target - 1", "1 - measured / self.target"),
        ("measured / self.target - 1", "measured - self.target"),
        ("-0.2), 0.2)", "-0.2), 0.3)"),
        ("-0.2), 0.2)", "-0.3), 0.2)"),
        ("error * episodes / self.horizon", "error / self.horizon"),
    ],
    ("ppo/advantage.py", "tests/ppo/test_advantage.py"): [
        ("response_mask, -kl_coef * kl", "response_mask, kl_coef * kl"),
        ("torch.where(response_mask, -kl_coef * kl, 0.0)", "-kl_coef * kl"),
        ("positions, -1).argmax", "positions, -1).argmin"),
        ("positions, -1).argmax", "-positions, -99).argmax"),
        ("rewards.scatter_add", "rewards.scatter"),
        ("+ gamma * next_value - values", "- gamma * next_value + values"),
        ("+ gamma * next_value -", "+ next_value -"),
        ("gamma * gae_lambda * next_advantage", "gae_lambda * next_advantage"),
        ("gamma * gae_lambda * next_advantage", "gamma * next_advantage"),
        ("next_value = torch.where(keep, values[:, t], next_value)", "next_value = values[:, t]"),
        ("torch.where(keep, advantage, next_advantage)", "advantage"),
        ("torch.where(keep, advantage, 0.0)", "advantage"),
        ("response_mask, advantages + values, 0.0", "response_mask, advantages - values, 0.0"),
        ("(values - masked_mean(values, mask)) *", "values *"),
        ("masked_var(values, mask) +", "masked_var(values, mask) ** 2 +"),
        ("torch.where(mask, scaled, 0.0)", "scaled"),
    ],
    ("ppo/loss.py", "tests/ppo/test_ppo_loss.py"): [
        (
            "torch.exp(torch.where(response_mask, logprobs - old_logprobs, 0.0))",
            "torch.exp(torch.where(response_mask, old_logprobs - logprobs, 0.0))",
        ),
        (
            "torch.exp(torch.where(response_mask, logprobs - old_logprobs, 0.0))",
            "torch.exp(logprobs - old_logprobs)",
        ),
        ("plain = -advantages * ratio", "plain = advantages * ratio"),
        ("1 - clip_range, 1 + clip_range)\n    loss", "0, 1 + clip_range)\n    loss"),
        ("1 - clip_range, 1 + clip_range)\n    loss", "1 - clip_range, 99)\n    loss"),
        (
            "response_mask, torch.maximum(plain, clipped)",
            "response_mask, torch.minimum(plain, clipped)",
        ),
        ("response_mask, torch.maximum(plain, clipped)", "response_mask, clipped"),
        ("old_values + (values - old_values).clamp", "values.clamp"),
        ("0.5 * torch.maximum(plain, clipped)", "torch.maximum(plain, clipped)"),
        ("0.5 * torch.maximum(plain, clipped)", "0.5 * torch.minimum(plain, clipped)"),
        (
            "torch.where(response_mask, 0.5 * torch.maximum(plain, clipped), 0.0)",
            "0.5 * torch.maximum(plain, clipped)",
        ),
    ],
    ("base/masked.py", "tests/base/test_masked.py"): [
        ("_kept(values, mask, None).sum() / mask.sum()", "_kept(values, mask, None).mean()"),
        ("return kept.sum() if dim is None else kept.sum(dim)", "return kept.sum()"),
        ("torch.where(mask, values, zeros)", "(values * mask)"),
        ("torch.where(mask, values, zeros)", "torch.where(mask, zeros, values)"),
        ("(kept - kept.sum() / mask.sum())", "(kept - kept.mean())"),
        ("if not has_kept:", "if False:"),
        ("mask.any() if dim is None else mask.any(dim).all()", "mask.any()"),
        (".to(torch.promote_types(values.dtype, torch.float32))", ""),
    ],
    ("base/estimate.py", "tests/base/test_estimate.py"): [
        ("range(array.size) if clusters is None else clusters", "range(array.size)"),
        ("tail = (1 - LEVEL) / 2", "tail = 1 - LEVEL"),
        ("weights=array - mean)", "weights=array)"),
        ("/ sizes[drawn].sum(axis=1)", "/ num_clusters"),
        ("if len(number_of) > 1:", "if True:"),
    ],
    ("ppo/train.py", "tests/ppo/test_rollout_and_update.py"): [
        ("int(rollout.response_mask[minibatch].sum())", "len(minibatch)"),
        (
            "rows.response_mask, temperature=section.temperature",
            "rows.response_mask, temperature=1.0",
        ),
        ("section.value_coef * value.loss.sum()", "value.loss.sum()"),
        ('f"ppo/minibatch/{step}", epoch)', 'f"ppo/minibatch/{step}", 0)'),
        ("estimated.advantages[indices, :width]", "estimated.advantages[: len(indices), :width]"),
    ],
    ("ppo/rollout.py", "tests/ppo/test_rollout_and_update.py"): [
        ("mask, temperature=temperature))\n    return", "mask, temperature=1.0))\n    return"),
        ("(is_finished, scores, torch", "(is_finished, scores, scores + torch"),
    ],
    ("ppo/actor_critic.py", "tests/ppo/test_rollout_and_update.py"): [
        ("predicting_states(states).float()", "states.float()"),
        ("nn.init.zeros_(self.value_head.weight)", "nn.init.ones_(self.value_head.weight)"),
        ("hidden if self.trunk is None else", "hidden if True else"),
    ],
    # What a resumed run would do otherwise than an undisturbed one.
    ("ppo/train.py", "tests/resume/test_kill_and_resume.py"): [
        ('snapshot.state["extra"].get("kl_coef", section.kl_coef)', "section.kl_coef"),
        ('Selection.resume(snapshot.state["extra"], snapshot.tensors)', "Selection()"),
    ],
    ("models/training.py", "tests/resume/test_kill_and_resume.py"): [
        ('self._metrics.cut_back(snapshot.state["metrics_offset"])', "pass"),
        ("step % self._every == 0 or stopping", "step % self._every == 0"),
    ],
}

MUTANTS = [
    Mutant(file, tests, *change) for (file, tests), changes in CHANGES.items() for change in changes
]


def main(words: list[str]) -> int:
    """Run every chosen mutant, print what became of it, and return 1 if any survived."""
    chosen = [m for m in MUTANTS if not words or any(word in m.file for word in words)]
    survived = 0
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        copy = Path(name)
        _copy_tree(copy)
        for tests in dict.fromkeys(mutant.tests for mutant in chosen):
            if not _passes(copy, tests):
                print(f"{tests} fails as it is; mend that first")
                return 1
        for mutant in chosen:
            started = time.monotonic()
            is_killed = _is_killed(copy, mutant)
            survived += not is_killed
            fate = "killed  " if is_killed else "SURVIVED"
            change = f"{_short(mutant.old)}  ->  {_short(mutant.new)}"
            print(f"{fate}  {mutant.file:18}  {change}  ({time.monotonic() - started:.0f}s)")
            sys.stdout.flush()
    print(f"{len(chosen) - survived} of {len(chosen)} mutants killed")
    return 1 if survived else 0


def _copy_tree(copy: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", copy)
    with (copy / "tests" / "conftest.py").open("a", encoding="utf-8") as conftest:
        conftest.write(NO_SHRINKING)
    found = _python(copy, "-c", "import starling; print(starling.__file__)").stdout.strip()
    # Otherwise every mutant would survive: an installed starling stands in front of the copy.
    if not Path(found).resolve().is_relative_to(copy.resolve()):
        raise SystemExit(f"tests in {copy} would import {found}, not the copy")


def _is_killed(copy: Path, mutant: Mutant) -> bool:
    path = copy / "src" / "starling" / mutant.file
    original = path.read_text(encoding="utf-8")
    if original.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.file}: {mutant.old!r} stands there {original.count(mutant.old)} times, not "
            "once; bring the list of mutants up to date"
        )
    path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return not _passes(copy, mutant.tests)
    finally:
        path.write_text(original, encoding="utf-8")


def _passes(copy: Path, tests: str) -> bool:
    options = ("-x", "-q", "--no-header", "-p", "no:cacheprovider")
    done = _python(copy, "-m", "pytest", *options, tests)
    # 0: all passed; 1: some failed.  Anything else says nothing about the mutant.
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest {tests} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return done.returncode == 0


def _short(text: str) -> str:
    """The first line, short enough for a table."""
    line = text.split("\n")[0]
    return line if len(line) <= 44 else f"{line[:41]}..."


def _python(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Without bytecode on disk: a mutant of the same size, written within the same second, would
    # otherwise run as the code before it.
    environment = os.environ | {
        "PYTHONPATH": str(copy / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=copy, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Break the maths, and a resume, on purpose, one line at a time, and see that a test notices.

    python tools/mutate.py              all mutants; exit status 1 if any survives
    python tools/mutate.py advantage    only those of files whose path holds the word

Each mutant of `mutants.py` and `mutants_*.py` is applied to a temporary copy of the tree, not in
place; the tests named beside it then run there.  A mutant whose old text is not found exactly
once is an error: the list is stale.  Equivalent changes (a difference that no input shows) are not
in the list.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import mutants
import mutants_bench
import mutants_ppo
import mutants_ppo_core
import mutants_reward

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


MUTANTS = [
    Mutant(file, tests, *change)
    for listed in (mutants, mutants_bench, mutants_ppo, mutants_ppo_core, mutants_reward)
    for (file, tests), changes in listed.CHANGES.items()
    for change in changes
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

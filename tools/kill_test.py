"""Kill real runs at random times, run the same command again, and compare every byte.

    python tools/kill_test.py                      the mini pipeline, ten kills
    python tools/kill_test.py --stage ppo          one stage of it, ten kills, each in a phase
    python tools/kill_test.py --stage ppo --inside save    only in saves
    python tools/kill_test.py --stage ppo --inside         at any moment at all
    python tools/kill_test.py --points 3 --seed 7  other moments
    python tools/kill_test.py --recipe mine.yaml --stage reward --work /tmp/kills

An undisturbed run comes first and is timed.  Then, for each point: a fresh run folder, `starling
run` (or the stage's own command) with `kill -9` at a random moment of the time that the undisturbed
run took, the same command again to its end, and a comparison of the two folders.  With `--stage`
the stages before it are copied from the undisturbed run.  A kill that comes after the end of the
run tests nothing and is drawn again.  With `--inside` (for ppo without being told: rollout, update,
save and validation, in turn) the moment lies in one of these phases: which one of the run's and
how far into it is drawn.  Where each kill stood is printed: `kill_points.py` notes it.

Compared are all files, calls.sqlite row by row, and of manifest.json what was made; left out are
timing.jsonl, checkpoints, and lines of report.html with a clock time.  Prints one line a point and
ends with status 1 if any run differs.  The mini pipeline is that of tests/e2e: about ten seconds a
run on a quiet core.
"""

import argparse
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from kill_points import PHASES

from starling.recipe import STAGES

# The mini recipe and the reader of ledgers are the tests'.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

NEVER = ("-", "-", "-")
CLOCK = re.compile(rb"\d\d:\d\d|\d+(\.\d+)? ?(s|seconds|minutes)\b")


def main() -> int:
    """Do what the module says; returns the exit status."""
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="kill-test-", dir=options.work) as name:
        folder = Path(name)
        recipe = options.recipe or write_mini(folder)
        reference = folder / "undisturbed"
        notes = folder / "notes"
        seconds = undisturbed_run(recipe, reference, options.stage, notes)
        expected, lengths = contents(reference), lengths_of(notes)
        print(f"undisturbed: {seconds:.1f} s, {len(expected)} files")
        rng = random.Random(options.seed)
        num_different, point = 0, 0
        while point < options.points:
            out = folder / "killed"
            shutil.rmtree(out, ignore_errors=True)
            prepare(reference, out, options.stage)
            if options.inside:
                phase = options.inside[point % len(options.inside)]
                death, moment = drawn_inside(phase, lengths, rng), math.inf
            else:
                death, moment = NEVER, rng.uniform(0, seconds)
            noted = command(recipe, out, options.stage, notes, death)
            if (after := run_and_kill(noted, moment)) is None:
                continue
            point += 1
            stood = f"{place_of(notes)}; {progress_of(out)}"
            run_to_end(command(recipe, out, options.stage, notes))
            different = differences(expected, contents(out))
            num_different += bool(different)
            verdict = f"DIFFERS in {', '.join(different)}" if different else "same bytes"
            print(f"{point:3}  killed after {after:6.2f} s ({stood}): {verdict}", flush=True)
    print(f"{options.points - num_different} of {options.points} runs have the same bytes")
    return 1 if num_different else 0


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", type=Path, help="absent: the mini pipeline")
    parser.add_argument("--stage", choices=STAGES, help="absent: all of them")
    parser.add_argument("--points", type=int, default=10, help="how many kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, help="where to make the temporary folder")
    parser.add_argument(
        "--inside", choices=PHASES, nargs="*", help="phases to kill in, in turn; none: at any time"
    )
    options = parser.parse_args()
    if options.inside is None:
        options.inside = ["rollout", "update", "save", "validation"] * (options.stage == "ppo")
    return options


def write_mini(folder: Path) -> Path:
    """The tests' mini recipe with its world beside it."""
    from e2e.mini import write_recipe

    return write_recipe(folder)


def command(
    recipe: Path, out: Path, stage: str | None, notes: Path, death: Sequence[str] = NEVER
) -> list[str]:
    """What a user would type, with notes of where it stands, and where it shall die."""
    starling = [sys.executable, str(Path(__file__).with_name("kill_points.py")), str(notes), *death]
    return [*starling, stage or "run", str(recipe), "--out", str(out)]


def undisturbed_run(recipe: Path, out: Path, stage: str | None, notes: Path) -> float:
    """Run everything that is needed; returns the seconds of the part that will be killed."""
    for name in STAGES[: STAGES.index(stage)] if stage else ():
        run_to_end(command(recipe, out, name, notes))
    started = time.monotonic()
    run_to_end(command(recipe, out, stage, notes))
    return time.monotonic() - started


def lengths_of(notes: Path) -> dict[str, list[float]]:
    """Seconds of every phase of a run, by name."""
    lengths: dict[str, list[float]] = {}
    begun = 0.0
    for what, phase, _, seconds in (line.split() for line in notes.open()):
        if what == "begin":
            begun = float(seconds)
        else:
            lengths.setdefault(phase, []).append(float(seconds) - begun)
    return lengths


def drawn_inside(phase: str, lengths: dict[str, list[float]], rng: random.Random) -> list[str]:
    """A random moment of a random one of these phases, as `kill_points.py` wants it."""
    number = rng.randrange(len(lengths[phase]))
    return [phase, str(number + 1), f"{rng.uniform(0, lengths[phase][number]):.4f}"]


def place_of(notes: Path) -> str:
    """The phase that a killed run was in, or the last that it had ended."""
    lines = notes.read_text().splitlines() if notes.exists() else []
    if not lines:
        return "before its first phase"
    what, phase, number, _ = lines[-1].split()
    return f"{'in' if what == 'begin' else 'after'} {phase} {number}"


def prepare(reference: Path, out: Path, stage: str | None) -> None:
    """Copy the stages before the one under test; the whole pipeline starts from nothing."""
    for name in STAGES[: STAGES.index(stage)] if stage else ():
        if (reference / name).exists():
            shutil.copytree(reference / name, out / name)


def run_and_kill(arguments: list[str], moment: float) -> float | None:
    """After how many seconds the run died: at `moment`, or before by itself; None: it ended."""
    started = time.monotonic()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=None if moment == math.inf else moment)
    except subprocess.TimeoutExpired:
        process.kill()
    return time.monotonic() - started if process.wait() == -signal.SIGKILL else None


def run_to_end(arguments: list[str]) -> None:
    """Run, and end this program with the run's own words where it fails."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")


def progress_of(out: Path) -> str:
    """How far the killed run had come."""
    finished = [stage for stage in STAGES if (out / stage / "manifest.json").exists()]
    running = [stage for stage in STAGES if (out / stage / "stage.json").exists()]
    saved = sorted(path.name for path in out.glob("*/checkpoints/*"))
    return f"done: {' '.join(finished) or '-'}, in: {' '.join(running + saved) or '-'}"


def contents(out: Path) -> dict[str, object]:
    """What must be equal, by file name."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or "/checkpoints/" in name or name == ".lock":
            continue
        if path.name == "timing.jsonl" or path.name.startswith("calls.sqlite-"):
            continue
        found[name] = content_of(path)
    return found


def content_of(path: Path) -> object:
    """A file's bytes, or what of it does not depend on when and where it was made."""
    if path.name == "manifest.json":
        manifest = json.loads(path.read_bytes())
        return manifest["key"], manifest["outputs"], manifest["summary"]["figures"]
    if path.name == "calls.sqlite":
        from ledgers import ledger_rows

        return ledger_rows(path)
    if path.name == "report.html":
        folder = str(path.parent).encode()
        lines = path.read_bytes().replace(folder, b"RUN").split(b"\n")
        return [line for line in lines if not CLOCK.search(line)]
    return path.read_bytes()


def differences(expected: dict[str, object], found: dict[str, object]) -> list[str]:
    """Names of files that differ, are missing or are too many."""
    names = sorted(expected.keys() | found.keys())
    return [name for name in names if expected.get(name) != found.get(name)]


if __name__ == "__main__":
    sys.exit(main())

"""Every house rule and every test, in one command: python tools/check.py

Runs all steps even when one fails, says how long each took, and exits with 1 when any failed.
What follows the command goes to pytest: python tools/check.py -k loss
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

STEPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("format", ("ruff", "format", "--check", ".")),
    ("lint", ("ruff", "check", ".")),
    ("types", ("basedpyright",)),
    ("layers", ("lint-imports",)),
    ("sizes", (sys.executable, "tools/sizes.py")),
    ("tests", (sys.executable, "-m", "pytest", "-q", "-n", "2")),
)


def main() -> int:
    extra = tuple(sys.argv[1:])
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{_path()}"}
    # Two test processes on two cores: more threads each would only get in each other's way.
    environment.setdefault("OMP_NUM_THREADS", "1")
    failed = []
    for name, command in STEPS:
        print(f"== {name}", flush=True)
        started = time.monotonic()
        command += extra if name == "tests" else ()
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        if done.returncode:
            failed.append(name)
        print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


def _path() -> str:
    return os.environ.get("PATH", os.defpath)


if __name__ == "__main__":
    sys.exit(main())

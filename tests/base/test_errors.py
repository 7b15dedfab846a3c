import signal
import subprocess
import sys

import pytest

from starling.base import errors
from starling.base.errors import (
    CheckpointError,
    DataError,
    InputError,
    ModelError,
    RecipeError,
    StarlingError,
    Stopped,
)


@pytest.mark.parametrize("kind", [RecipeError, DataError, CheckpointError, ModelError])
def test_what_a_user_can_fix_exits_with_two(kind):
    error = kind("what was wrong")
    assert isinstance(error, InputError)
    assert isinstance(error, StarlingError)
    assert error.exit_code == 2
    assert str(error) == "what was wrong"


def test_any_other_error_of_ours_exits_with_one():
    assert StarlingError("x").exit_code == 1


def test_a_stopped_run_exits_as_a_shell_would_report_its_signal():
    assert Stopped(signal.SIGINT).exit_code == 130
    assert Stopped(signal.SIGTERM).exit_code == 143
    assert Stopped(signal.SIGTERM).signal_number == 15
    assert not isinstance(Stopped(signal.SIGINT), InputError)


def test_the_tree_is_the_one_that_is_drawn():
    drawn = {line.split()[0] for line in errors.__doc__.splitlines() if line.startswith("    ")}
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert drawn == defined


def test_the_files_that_the_command_line_needs_do_not_import_torch():
    program = (
        "import sys, starling.base.errors, starling.base.jsonl, starling.base.seeding, "
        "starling.base.estimate, starling.base.hashing, starling.base.metrics, "
        "starling.base.progress, starling.base.context; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

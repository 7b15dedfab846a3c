"""Every exception that Starling raises on purpose.

    StarlingError              exit 1: none of the below fits
      InputError               exit 2: something a user can fix
        RecipeError              the recipe or the command line
        DataError                a file of prompts, rankings, conversations ...
        CheckpointError          a checkpoint cannot be written, read or used
        ModelError               a model folder, a tokenizer, a chat format
      Stopped                  exit 128 + signal: SIGINT (130) or SIGTERM (143) arrived

A message says what was wrong, what was found, and what to do. A broken promise between our own
functions is a ValueError, a TypeError or an assert: those are bugs, and show a traceback.
"""

import re
from collections.abc import Sequence

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """The text with control characters written out: a terminal would obey them."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def some(names: Sequence[str], most: int) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class StarlingError(Exception):
    """Whatever ends a command on purpose, with this exit status."""

    exit_code = 1


class InputError(StarlingError):
    """Something a user can fix; shown without a traceback."""

    exit_code = 2


class RecipeError(InputError):
    """The recipe, or an option that overrides it, cannot be used."""


class DataError(InputError):
    """A data file is missing, damaged or not what it should be."""


class CheckpointError(InputError):
    """A checkpoint could not be written, or none that can be used was found."""


class ModelError(InputError):
    """A model folder, a tokenizer or a chat format cannot be used."""


class Stopped(StarlingError):
    """A signal asked the run to stop, and it did so at a step boundary."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.signal_number = signal_number
        # What a shell reports for a process ended by this signal.
        self.exit_code = 128 + signal_number

"""What every stage returns.

A stage is `run(section, inputs, out, context) -> Summary`: its recipe section, the resolved
inputs (a frozen dataclass of the stage's own), the folder it writes to and the context of the
process.  It never resolves a path, and never skips itself: `pipeline` does both.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Summary:
    """The stage's figures for summary.json, and one sentence: what was made and where."""

    sentence: str
    figures: dict[str, Any] = field(default_factory=dict)

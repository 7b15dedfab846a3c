"""The recipe section of stage 1: prompts to rankings."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from starling.base.section import Section
from starling.judging.config import JudgeSection
from starling.models.config import EndpointSection

MOST_ANSWERS = 26
"""The judge letters the answers A to Z."""


class Candidate(EndpointSection):
    """One source of candidate answers: a model folder or hub id, or an endpoint."""

    name: str
    """How the answers are labelled in rankings.jsonl."""
    model: str
    """Model folder, hub id, or the model's name at `url`."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    max_tokens: int = Field(512, ge=1)
    """Longest answer, in tokens."""
    answers: int = Field(1, ge=1)
    """Answers per prompt from this source."""


class FeedbackSection(Section):
    """Stage 1: K candidate answers per prompt, ranked by the judge in one call each."""

    prompts: str
    """JSONL file of prompts."""
    candidates: tuple[Candidate, ...]
    """Where the K answers of each prompt come from."""
    limit: int | None = Field(None, ge=1)
    """Use only this many prompts (drawn by the seed)."""
    batch: int = Field(64, ge=1)
    """Prompts per round of candidates and judging; a killed run loses at most one local round."""
    allowed_failures: float = Field(0.05, ge=0, le=1)
    """Share of prompts that may end without a ranking before the stage stops."""

    @model_validator(mode="after")
    def _validate(self) -> "FeedbackSection":
        names = [candidate.name for candidate in self.candidates]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"candidates: the name {repeated[0]!r} stands twice; each needs its own"
            )
        k = sum(candidate.answers for candidate in self.candidates)
        if not 2 <= k <= MOST_ANSWERS:
            raise ValueError(
                f"candidates: {k} answer(s) per prompt; a ranking needs 2 to {MOST_ANSWERS}"
            )
        return self


@dataclass(frozen=True)
class FeedbackInputs:
    """What the pipeline resolved: `candidates` are the section's, with their folders found."""

    prompts: Path
    candidates: tuple[Candidate, ...]
    judge: JudgeSection

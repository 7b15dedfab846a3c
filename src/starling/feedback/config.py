"""The recipe section of stage 1: prompts to rankings."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from starling.base.section import Section
from starling.judging.config import JudgeSection


class Candidate(Section):
    """One source of candidate answers: a model folder or hub id, or an endpoint."""

    name: str
    """How the answers are labelled in rankings.jsonl."""
    model: str
    """Model folder, hub id, or the model's name at `url`."""
    url: str | None = None
    """Base URL of an OpenAI-compatible server; absent for a local model."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    max_tokens: int = Field(512, ge=1)
    """Longest answer, in tokens."""
    answers: int = Field(1, ge=1)
    """Answers per prompt from this source."""
    concurrency: int = Field(16, ge=1)
    """Calls in flight at an endpoint."""
    timeout_seconds: float = Field(100.0, gt=0)
    """One call's time limit."""


class FeedbackSection(Section):
    """Stage 1: K candidate answers per prompt, ranked by the judge in one call each."""

    prompts: str
    """JSONL file of prompts."""
    candidates: tuple[Candidate, ...] = Field(min_length=1)
    """Where the K answers of each prompt come from."""
    limit: int | None = Field(None, ge=1)
    """Use only this many prompts (drawn by the seed)."""
    batch: int = Field(64, ge=1)
    """Prompts per round of candidates and judging; a killed run loses at most one local round."""
    allowed_failures: float = Field(0.05, ge=0, le=1)
    """Share of prompts that may end without a ranking before the stage stops."""


@dataclass(frozen=True)
class FeedbackInputs:
    """What the pipeline resolved: `candidates` holds each one's model, in the section's order."""

    prompts: Path
    candidates: tuple[str, ...]
    judge: JudgeSection

"""The recipe section of stage 1: prompts to rankings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; 1 is off."""
    top_k: int = Field(0, ge=0)
    """Sample among the likeliest tokens only; 0 is off."""
    max_tokens: int = Field(512, ge=1)
    """Longest answer, in tokens."""
    answers: int = Field(1, ge=1)
    """Answers per prompt from this source."""


class PrepareSection(Section):
    """Which prompts are used; the rules apply in this order, and audit.json counts each."""

    duplicates: Literal["text", "nectar"] = "text"
    """Which prompts are one: text, equal but for case and spacing, indentation too; nectar, also
    but for signs, as its authors have it ("Sort in C" is "Sort in C++")."""
    language: str | None = Field(default=None, pattern="^[a-z]{2}$")
    """Keep prompts that may be in this language (en: Nectar's rule, among the three likeliest)."""
    min_chars: int = Field(default=0, ge=0)
    """Shortest conversation, in characters (Nectar: 41)."""
    max_chars: int | None = Field(default=None, ge=1)
    """Longest conversation, in characters."""
    decontaminate: tuple[str, ...] | None = None
    """Benchmark files whose questions must not be among the prompts; absent: bench.questions."""
    ngram: int = Field(default=13, ge=4)
    """Words in a row that a prompt may not share with a benchmark (GPT-3: 13)."""
    per_source: dict[str, int] = {}
    """At most so many prompts of a source, drawn by the seed."""
    near_duplicates: float | None = Field(default=None, gt=0, lt=1)
    """Drop prompts whose words overlap an earlier one's by this much (Jaccard, by MinHash)."""


class FeedbackSection(Section):
    """Stage 1: K candidate answers per prompt, ranked by the judge."""

    prompts: str | tuple[str, ...]
    """Files of prompts: JSONL, parquet, or hf://datasets/OWNER/NAME/FILE; Nectar's rows too."""
    prepare: PrepareSection = PrepareSection()
    """Which of the prompts are used."""
    candidates: tuple[Candidate, ...] = ()
    """Where answers come from, beside those that stand in the prompts' rows."""
    limit: int | None = Field(None, ge=1)
    """Use only this many prompts (drawn by the seed)."""
    batch: int | None = Field(None, ge=1)
    """Prompts per round of candidates and judging; a killed run loses at most one round of a local
    model's work. Absent: 64 where a model runs in this process, else 1024."""
    canaries: int = Field(40, ge=0)
    """Prompts, at most one in ten, judged once more with a cheating answer among the others."""
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
        if k > MOST_ANSWERS:
            raise ValueError(f"candidates: {k} answers per prompt; at most {MOST_ANSWERS}")
        if not self.prompts:
            raise ValueError("prompts: names no file")
        return self


@dataclass(frozen=True)
class FeedbackInputs:
    """What the pipeline resolved: `candidates` are the section's, with their folders found."""

    prompts: tuple[Path, ...]
    benchmarks: tuple[Path, ...]
    candidates: tuple[Candidate, ...]
    judge: JudgeSection

"""The recipe section of stage 4: benchmarks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from starling.base.section import Section
from starling.judging.config import JudgeSection


class BenchSection(Section):
    """Stage 4: two-turn questions, judged from 1 to 10 and against the starting policy."""

    questions: str
    """JSONL questions: id, category, turns (and checks, where rules can grade them)."""
    protocol: Literal["own", "mt-bench"] = "own"
    """mt-bench: as published; questions is FastChat's question.jsonl, with judge_prompts.jsonl and
    reference_answer/ beside it."""
    baseline: str | None = None
    """Policy to compare with; absent: the starting policy."""
    chat_format: str | None = None
    """Chat format of the baseline; absent: its own."""
    policy: str | None = None
    """Policy under test; absent: the ppo stage's."""
    max_tokens: int = Field(1024, ge=1)
    """Longest answer per turn (MT-Bench: 1024)."""
    checks: str | None = None
    """JSONL prompts with instructions or good_natured, which both policies answer greedily: what is
    kept to and what is refused is checked by rule."""
    best_of: int = Field(0, ge=0)
    """Also measure best-of-n of the baseline by the reward model, as yardstick; 0 leaves it out."""
    allowed_failures: float = Field(0.05, ge=0, le=1)
    """Share of judgments that may fail before there is no score at all."""


@dataclass(frozen=True)
class BenchInputs:
    """What the pipeline resolved; policies and the reward model are folders or hub ids."""

    questions: Path
    baseline: str
    policy: str
    reward_model: str | None
    judge: JudgeSection
    prompts: Path | None = None
    """The judge's prompts and references, where the protocol is MT-Bench's."""
    references: Path | None = None
    checks: Path | None = None

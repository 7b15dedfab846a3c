"""The recipe section of the judge, shared by feedback, checkpoint selection and bench."""

from typing import Literal

from pydantic import Field, field_validator

from starling.base.section import Section
from starling.models.url import check_url


class JudgeSection(Section):
    """Who judges: an OpenAI-compatible endpoint, a local model, or the demo's rubric."""

    kind: Literal["endpoint", "local", "rubric"] = "endpoint"
    """endpoint: `url`, `model`; local: `model` is a folder; rubric: grades by a prompt's checks."""
    url: str | None = None
    """Base URL of an OpenAI-compatible server, e.g. http://localhost:8000/v1."""
    model: str | None = None
    """Model name at the endpoint, or a model folder."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; never the key itself."""
    max_tokens: int = Field(2048, ge=16)
    """Longest verdict, in tokens."""
    temperature: float = Field(0.0, ge=0)
    """Judge temperature; Nectar and MT-Bench used 0."""
    concurrency: int = Field(16, ge=1)
    """Calls in flight at an endpoint."""
    timeout_seconds: float = Field(100.0, gt=0)
    """One call's time limit."""
    noise: float = Field(0.0, ge=0)
    """rubric only: standard deviation of the noise added to each grade (0..1 scale)."""
    position_bias: float = Field(0.0)
    """rubric only: advantage of the first position over the last, on the grade's scale."""

    @field_validator("url")
    @classmethod
    def _refuse_key(cls, url: str | None) -> str | None:
        if url is not None:
            check_url(url)
        return url

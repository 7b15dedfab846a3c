"""The recipe section of the judge, shared by feedback, checkpoint selection and bench."""

from typing import Literal

from pydantic import Field, model_validator

from starling.models.config import EndpointSection


class JudgeSection(EndpointSection):
    """Who judges: an OpenAI-compatible endpoint, a local model, or the demo's rubric."""

    kind: Literal["endpoint", "local", "rubric"] = "endpoint"
    """endpoint: `url`, `model`; local: `model` is a folder; rubric: grades by a prompt's checks."""
    model: str | None = None
    """Model name at the endpoint, or a model folder."""
    max_tokens: int = Field(2048, ge=16)
    """Longest verdict, in tokens."""
    temperature: float = Field(0.0, ge=0)
    """Judge temperature; Nectar and MT-Bench used 0."""
    noise: float = Field(0.0, ge=0)
    """rubric only: standard deviation of the noise added to each grade (0..1 scale)."""
    position_bias: float = Field(0.0)
    """rubric only: advantage of the first position over the last, on the grade's scale."""

    @model_validator(mode="after")
    def _validate(self) -> "JudgeSection":
        needed = {"endpoint": ("url", "model"), "local": ("model",), "rubric": ()}[self.kind]
        for name in needed:
            if not getattr(self, name):
                raise ValueError(f"{name}: is missing; a judge of kind {self.kind} needs one")
        for name in ("noise", "position_bias"):
            if self.kind != "rubric" and getattr(self, name):
                raise ValueError(f"{name}: only kind rubric has it; here kind is {self.kind}")
        return self

"""The recipe section of the judge, shared by feedback, checkpoint selection and bench."""

from typing import Literal

from pydantic import Field, model_validator

from starling.models.config import EndpointSection


class JudgeSection(EndpointSection):
    """Who judges: an OpenAI-compatible endpoint, a local model, or the demo's rubric."""

    kind: Literal["endpoint", "local", "logits", "rubric"] = "endpoint"
    """endpoint: `url`, `model`; local: `model` is a folder, asked for text; logits: the same, asked
    for the probabilities of the answers' labels; rubric: grades by a prompt's checks."""
    model: str | None = None
    """Model name at the endpoint, or a model folder."""
    strategy: Literal["kwise", "kwise-repeated", "pairwise", "pointwise"] = "kwise"
    """Calls for a ranking of K answers: kwise 1; kwise-repeated `repeats`, each in another order;
    pairwise K(K-1), every pair in both orders; pointwise K ratings from 1 to 10."""
    repeats: int = Field(3, ge=2)
    """kwise-repeated only: orders of the answers; above K, the next multiple of K."""
    max_tokens: int = Field(2048, ge=16)
    """Longest verdict, in tokens."""
    context_length: int | None = Field(None, ge=64)
    """endpoint only: tokens that the model reads and writes in all; longer questions are not asked.
    Counted with `tokenizer`, otherwise estimated at four characters a token."""
    temperature: float = Field(0.0, ge=0)
    """Judge temperature; Nectar and MT-Bench used 0."""
    noise: float = Field(0.0, ge=0)
    """rubric only: standard deviation of the noise added to each grade (0..1 scale)."""
    position_bias: float = Field(0.0)
    """rubric only: advantage of the first position over the last, on the grade's scale."""

    @model_validator(mode="after")
    def _validate(self) -> "JudgeSection":
        local = ("model",)
        needed = {"endpoint": ("url", "model"), "local": local, "logits": local, "rubric": ()}
        for name in needed[self.kind]:
            if not getattr(self, name):
                raise ValueError(f"{name}: is missing; a judge of kind {self.kind} needs one")
        for name in ("noise", "position_bias"):
            if self.kind != "rubric" and getattr(self, name):
                raise ValueError(f"{name}: only kind rubric has it; here kind is {self.kind}")
        if self.kind != "endpoint" and self.context_length is not None:
            raise ValueError(f"context_length: only kind endpoint has it; here it is {self.kind}")
        if self.kind == "logits" and self.strategy != "kwise":
            raise ValueError(
                "strategy: a judge of kind logits shows the answers in every rotation already; "
                "leave it at kwise"
            )
        return self

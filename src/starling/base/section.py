"""Base class of every recipe section: frozen, strict, documented under each field."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the recipe.  Unknown keys are refused; a field's docstring becomes its help."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )

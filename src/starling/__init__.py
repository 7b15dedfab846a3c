"""Starling: the whole RLAIF recipe, from prompts to a better chat model, as one program."""

__version__ = "0.1.0"

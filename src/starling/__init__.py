"""Starling: the whole RLAIF recipe, from prompts to a better chat model, as one program."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starling.serve.session import Chat

__all__ = ["Chat", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load `Chat` when it is asked for: the command line must start without it."""
    if name != "Chat":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from starling.serve.session import Chat

    return Chat

"""What a name that was typed means: which model, which chat codec, which mode."""

from pathlib import Path
from typing import TYPE_CHECKING

from starling.base.errors import DataError, InputError, some
from starling.base.files import neighbours
from starling.models.completion import clean
from starling.models.endpoint import Endpoint

if TYPE_CHECKING:
    from starling.data.chat import ChatCodec


def resolve_model(reference: str) -> str:
    """A run folder's ppo model, else its sft model; anything else stands for itself."""
    run = Path(reference)
    is_file_name = reference.endswith(".gguf")
    if not run.exists() and (is_file_name or (run.parent != Path() and run.parent.is_dir())):
        raise DataError(
            f"there is no {'file' if is_file_name else 'folder'} {run}. {neighbours(run)}"
        )
    if not run.is_dir() or (run / "config.json").is_file():
        return reference
    for stage in ("ppo", "sft"):
        if (run / stage / "model" / "config.json").is_file():
            return str(run / stage / "model")
    raise DataError(
        f"{run} holds neither a model (config.json) nor a run's ppo/model or sft/model; "
        "`starling demo` makes a run in runs/demo"
    )


def find_mode(codec: "ChatCodec", wanted: str | None) -> str | None:
    """A mode by its name or its beginning, upper or lower case; absent or "default", the first."""
    modes = codec.format.modes
    if wanted is None or (modes and wanted.lower() == "default"):
        return modes[0] if modes else None
    found = [name for name in modes if name.lower().startswith(wanted.lower())]
    if len(found) != 1:
        known = f"has {', '.join(modes)}" if modes else "has no modes"
        raise DataError(f"unknown mode {wanted!r}; {codec.format.name} {known}")
    return found[0]


def only_served_model(url: str, api_key_env: str | None) -> str:
    """The name of the one model that a server serves; InputError with the names of several."""
    served = Endpoint(url, "", api_key_env=api_key_env).served_models()
    if len(served) != 1:
        names = some(sorted(map(clean, served)), 20) or "none"
        raise InputError(
            f"{url} serves {len(served)} models: {names}. Name the model with --served-model NAME, "
            "or check the address (it often ends in /v1)."
        )
    return served[0]

"""Settings of an OpenAI-compatible endpoint, as the judge's and the candidates' sections have them.

Recipes and ledgers are shared and kept; a key in them is a leaked key.  So keys are named, never
written down, and what looks like one is not repeated in a message.
"""

import re
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, field_validator, model_validator

from starling.base.section import Section

SECRET_WORDS = ("key", "token", "secret", "password")


def check_url(url: str) -> None:
    """Raise ValueError for an address that is none, or that holds a key."""
    parts = urlsplit(url)
    names = [name for name, _ in parse_qsl(f"{parts.query}&{parts.fragment}", True)]
    secret = [name for name in names if any(word in name.lower() for word in SECRET_WORDS)]
    if parts.username or parts.password or secret:
        found = f"a literal key ({secret[0]}=...)" if secret else "a user name or password"
        raise ValueError(f"it holds {found}; name its environment variable in api_key_env instead")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"found {url!r}; it must look like http://localhost:8000/v1")


class EndpointSection(Section):
    """Where a model is asked over HTTP, and how patiently."""

    url: str | None = None
    """Base URL of an OpenAI-compatible server, e.g. http://localhost:8000/v1."""
    tokenizer: str | None = None
    """Folder or hub id of the served model, or openchat: its chat format is then applied here, and
    token ids go to /completions; absent, messages go to /chat/completions."""
    chat_format: str | None = None
    """Chat format, where it is not the model's own; of an endpoint, only with `tokenizer`."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; never the key itself."""
    concurrency: int = Field(16, ge=1)
    """Calls in flight at an endpoint."""
    timeout_seconds: float = Field(100.0, gt=0)
    """One call's time limit."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is not None:
            check_url(url)
        return url

    @field_validator("api_key_env")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError(
                "what stands there is no name of an environment variable, such as OPENAI_API_KEY; "
                "the key itself must not stand in a recipe"
            )
        return name

    @model_validator(mode="after")
    def _check_format(self) -> "EndpointSection":
        if self.tokenizer is not None and self.url is None:
            raise ValueError("tokenizer: is for an endpoint, and there is no url")
        if self.url is not None and self.chat_format is not None and self.tokenizer is None:
            raise ValueError(
                "chat_format: a server that takes messages applies its own; name a tokenizer too, "
                "or leave it out"
            )
        return self

"""What a recipe may name as the address of an OpenAI-compatible server."""

from urllib.parse import parse_qsl, urlsplit

SECRET_WORDS = ("key", "token", "secret", "password")


def check_url(url: str) -> None:
    """Raise ValueError for an address that is none, or that holds a key.

    Recipes and ledgers are shared and kept; a key in them is a leaked key.
    """
    parts = urlsplit(url)
    # No part of the url is repeated where it may hold the key.
    if parts.username or parts.password:
        raise ValueError(
            "it holds a user name or password; name the environment variable of the key in "
            "api_key_env instead"
        )
    for name, _ in parse_qsl(f"{parts.query}&{parts.fragment}", keep_blank_values=True):
        if any(word in name.lower() for word in SECRET_WORDS):
            raise ValueError(
                f"it holds a literal key ({name}=...); name its environment variable in "
                "api_key_env instead"
            )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"found {url!r}; it must look like http://localhost:8000/v1")

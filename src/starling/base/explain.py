"""Say what is wrong with a tree of settings: full path, what was found, what is allowed.

pydantic finds the problems and says what is allowed; this file adds the nearest key where one is
misspelt.  Anything that may be a key to an API is not repeated.
"""

import difflib
import json
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

LONGEST_FOUND = 60
"""Characters of a wrong value that are shown."""


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line per problem that pydantic found in a tree meant for `model`."""
    lines = []
    for problem in error.errors(include_url=False):
        location, found = problem["loc"], problem["input"]
        path = ".".join(str(part) for part in location)
        match problem["type"]:
            case "extra_forbidden":
                lines.append(f"{path}: {_unknown_key(model, location, found)}")
            case "missing":
                lines.append(f"{path}: is missing")
            case "value_error":
                # A validator of ours. A section's own names the field that it speaks of; the
                # tree's may have several things to say.
                start = "" if not path else f"{path}." if isinstance(found, dict) else f"{path}: "
                texts = str(problem.get("ctx", {})["error"]).splitlines()
                lines += [start + text for text in texts]
            case _:
                lines.append(f"{path}: found {_shown(found)}; {problem['msg']}")
    return lines


def all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of the tree with its full path; entries of a list are numbered N, of a map NAME."""
    for name, field in model.model_fields.items():
        yield name, prefix + name
        section = _section_in(field.annotation)
        if section is not None:
            kind = str(field.annotation)
            entry = "N." if "tuple" in kind else "NAME." if "dict" in kind else ""
            yield from all_keys(section, f"{prefix}{name}.{entry}")


def _shown(value: Any) -> str:
    """A value as it stands in the file, shortened."""
    if isinstance(value, dict | list):
        kind = "a section" if isinstance(value, dict) else "a list"
        return kind if value else f"{kind} without entries"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_FOUND else text[: LONGEST_FOUND - 3] + "..."


def _unknown_key(model: type[BaseModel], location: tuple[int | str, ...], value: Any) -> str:
    """What to say about a key that is not one: its value, and the nearest that are."""
    *parents, key = (str(part) for part in location)
    secret = isinstance(value, str) and "key" in key
    found = f"there is no such key (found {'a text' if secret else _shown(value)})"
    section = model
    for part in parents:
        inner = None if part.isdigit() else _section_in(section.model_fields[part].annotation)
        section = inner or section
    siblings = {name: ".".join([*parents, name]) for name in section.model_fields}
    near = [siblings[name] for name in difflib.get_close_matches(key, siblings, n=1)]
    if not near:
        named = list(all_keys(model))
        close = difflib.get_close_matches(key, sorted(name for name, _ in named), n=1, cutoff=0.75)
        near = [path for name, path in named if name in close][:3]
    if near:
        return f"{found}; did you mean {' or '.join(near)}?"
    return f"{found}; allowed here: {', '.join(siblings)}"


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation holds, by itself, as an alternative or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_section_in(part) for part in get_args(annotation))
    return next((section for section in inner if section is not None), None)

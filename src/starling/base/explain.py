"""Say what is wrong with a tree of settings: full path, what was found, what is allowed.

pydantic finds the problems; this file words them, and names the nearest key or word where one is
misspelt.  Anything that may be a key to an API is not repeated.
"""

import difflib
import json
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ValidationError

LONGEST_FOUND = 60
"""Characters of a wrong value that are shown."""


class Place(NamedTuple):
    """What a tree may hold somewhere: a type, and what limits its values."""

    annotation: Any
    metadata: Sequence[Any] = ()


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line per problem that pydantic found in a tree meant for `model`."""
    lines = []
    problems = error.errors(include_url=False)
    for problem in problems:
        location = problem["loc"]
        path = ".".join(str(part) for part in location)
        match problem["type"]:
            case "extra_forbidden":
                lines.append(f"{path}: {_unknown_key(model, location, problem['input'])}")
            case "missing":
                allowed = describe_allowed(_place_at(model, location))
                lines.append(f"{path}: is missing; needed: {allowed}")
            case "too_short" if any(
                other["loc"][: len(location)] == location and other is not problem
                for other in problems
            ):
                pass  # pydantic does not count the entries that are wrong themselves
            case "value_error":
                # A validator of ours, which may have several things to say.
                texts = str(problem.get("ctx", {})["error"]).splitlines()
                lines += [f"{path}: {text}" if path else text for text in texts]
            case _:
                place = _place_at(model, location)
                found = describe_found(problem["input"])
                allowed = describe_allowed(place) + _nearest_word(place, problem["input"])
                finite = ", finite" if problem["type"] == "finite_number" else ""
                lines.append(f"{path}: found {found}; allowed: {allowed}{finite}")
    return lines


def describe_found(value: Any) -> str:
    """A value as it stands in the file, shortened."""
    if isinstance(value, dict):
        return "a section" if value else "an empty section"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_FOUND else text[: LONGEST_FOUND - 3] + "..."


def describe_allowed(place: Place) -> str:
    """What may stand there, in words: `a number, above 0, at most 1, or null`."""
    kinds = [kind for kind in _alternatives(place.annotation) if kind is not types.NoneType]
    text = " or ".join(_describe_kind(kind) for kind in kinds)
    for limit in place.metadata:
        match limit:
            case Ge(ge=bound):
                text += f", at least {bound}"
            case Gt(gt=bound):
                text += f", above {bound}"
            case Le(le=bound):
                text += f", at most {bound}"
            case Lt(lt=bound):
                text += f", below {bound}"
            case MinLen(min_length=length):
                text += f", with at least {length}"
    return text + (", or null" if types.NoneType in _alternatives(place.annotation) else "")


def all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of the tree with its full path; entries of a list are numbered N."""
    for name, field in model.model_fields.items():
        yield name, prefix + name
        section = _section_in(field.annotation)
        if section is not None:
            is_list = any(get_origin(kind) is tuple for kind in _alternatives(field.annotation))
            yield from all_keys(section, f"{prefix}{name}.{'N.' if is_list else ''}")


def _describe_kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        words = [str(word) for word in get_args(kind)]
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    if get_origin(kind) is tuple:
        return f"a list (each entry: {describe_allowed(Place(get_args(kind)[0]))})"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a section with keys such as {', '.join(list(kind.model_fields)[:3])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names[kind]


def _unknown_key(model: type[BaseModel], location: tuple[int | str, ...], value: Any) -> str:
    """What to say about a key that is not one: its value, and the nearest that are."""
    *parents, key = (str(part) for part in location)
    secret = isinstance(value, str) and "key" in key
    found = f"there is no such key (found {'a text' if secret else describe_found(value)})"
    prefix = "".join(f"{part}." for part in parents)
    section = _section_in(_place_at(model, location[:-1]).annotation)
    siblings = list(section.model_fields) if section is not None else []
    near = [prefix + name for name in difflib.get_close_matches(key, siblings, n=1)]
    if not near:
        near = [path for name, path in all_keys(model) if name == key][:3]
    if not near:
        names = {name for name, _ in all_keys(model)}
        close = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.75)
        near = [path for name, path in all_keys(model) if name in close][:3]
    if near:
        return f"{found}; did you mean {' or '.join(near)}?"
    return f"{found}; allowed here: {', '.join(siblings)}"


def _nearest_word(place: Place, value: Any) -> str:
    words = [
        str(word)
        for kind in _alternatives(place.annotation)
        if get_origin(kind) is Literal
        for word in get_args(kind)
    ]
    near = difflib.get_close_matches(str(value), words, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _place_at(model: type[BaseModel], location: Sequence[int | str]) -> Place:
    """What belongs at this location; the tree's root for an empty one."""
    place = Place(model)
    for part in location:
        if isinstance(part, int):
            lists = [kind for kind in _alternatives(place.annotation) if get_origin(kind) is tuple]
            place = Place(get_args(lists[0])[0])
        else:
            section = _section_in(place.annotation)
            assert section is not None, f"pydantic located a problem outside the tree: {location}"
            field = section.model_fields[part]
            place = Place(field.annotation, field.metadata)
    return place


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation holds, by itself, as an alternative or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_section_in(part) for part in get_args(annotation))
    return next((section for section in inner if section is not None), None)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if is_union else (annotation,)

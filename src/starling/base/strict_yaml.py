"""Read and write YAML as people mean it: keys stand once, 1e-5 is a number, yes and on are words.

PyYAML speaks YAML 1.1, where `1e-5` is text, `no` is False, `1:30` is ninety, 010 is eight and the
last of two equal keys wins.  Here the words of YAML 1.2's core schema count, and tags are refused.
"""

import re
from typing import Any

import yaml

_CORE = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")
}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema's words."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes text that either schema would take for something else."""


for _name, _pattern, _first in _CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}",
            re.compile(rf"^(?:{_pattern})$"),
            ["" if letter == "\0" else letter for letter in _first],
        )


def parse_yaml(text: str) -> Any:
    """Read one document; ValueError for what is not YAML, keys that stand twice, and tags."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, ())
        return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from error


def dump_yaml(value: Any) -> str:
    """Write plain values, in ASCII, keys in their order; any reader gives them back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=100)


def _check(node: yaml.Node, path: tuple[str, ...]) -> None:
    if node.tag not in _TAGS:
        line = node.start_mark.line + 1
        raise ValueError(f"line {line}: the tag {node.tag!r} is not read here")
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _check(item, (*path, str(number)))
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, item in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                place = ".".join([*path, name])
                raise ValueError(f"{place} stands twice, on lines {lines[name]} and {line}")
            lines[name] = line
            _check(item, (*path, name))

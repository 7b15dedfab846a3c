"""Read and write YAML as people mean it: keys stand once, 1e-5 is a number, yes and on are words.

PyYAML speaks YAML 1.1, where `1e-5` is text, `no` is False, `1:30` is ninety, 010 is eight and the
last of two equal keys wins.  Here the words of YAML 1.2's core schema count.  Tags, anchors and
merge keys are refused: recipes are short, and what stands in one should be what is meant.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from yaml.composer import ComposerError

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


_PLAIN = {yaml.ScalarNode: "str", yaml.SequenceNode: "seq", yaml.MappingNode: "map"}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema's words, and without aliases."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ComposerError(
                None, None, "anchors and aliases are not read here: write it out", event.start_mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either schema would take for something else."""


for _name, _pattern, _first in _CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}",
            re.compile(rf"^(?:{_pattern})$"),
            ["" if letter == "\0" else letter for letter in _first],
        )


class Parsed(NamedTuple):
    """A YAML document: its value, and what is wrong with it although it could be read."""

    value: Any
    problems: list[str]


def parse_yaml(text: str) -> Parsed:
    """Read one document; of a key that stands twice the last value is kept and a problem told.

    Raises ValueError, with line and column, for what is not YAML.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Parsed(None, [])
        problems = list(_problems(node, ()))
        value = loader.construct_document(node)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from error
    return Parsed(value, problems)


def dump_yaml(value: Any) -> str:
    """Write plain values, in ASCII, keys in their order; any reader gives them back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=100)


def _problems(node: yaml.Node, path: tuple[str, ...]) -> Iterator[str]:
    """Keys that stand twice, and tags (which are taken off), each with its full path."""
    if node.tag not in _TAGS:
        line = node.start_mark.line + 1
        yield f"{'.'.join(path)}: the tag {node.tag!r} on line {line} is not read here"
        node.tag = f"tag:yaml.org,2002:{_PLAIN[type(node)]}"
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _problems(item, (*path, str(number)))
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no dictionary key: the constructor refuses it
            line = key.start_mark.line + 1
            inner = (*path, key.value)
            if key.value in lines:
                yield f"{'.'.join(inner)}: stands twice, on lines {lines[key.value]} and {line}"
            lines[key.value] = line
            yield from _problems(item, inner)

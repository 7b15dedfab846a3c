"""Options on the command line, from a function's signature; a recipe's sections become groups.

tyro parses, and words what cannot be parsed; whether a value makes sense is for `recipe` to say.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from starling.base.section import Section

SETTINGS = (
    tyro.conf.AvoidSubcommands,
    tyro.conf.PositionalRequiredArgs,
    tyro.conf.FlagCreatePairsOff,
)

REGISTRY = ConstructorRegistry()


def parse_options(function: Callable[..., Any], verb: str, arguments: Sequence[str]) -> Any:
    """Call the function with what the arguments say, and return its result.

    A parameter that is a section gets one whose values have the right types and are unchecked.
    Exits with status 2 and a message on stderr for options that do not exist or cannot be read, and
    with 0 after --help.
    """
    return tyro.cli(
        function, args=arguments, prog=f"starling {verb}", config=SETTINGS, registry=REGISTRY
    )


@REGISTRY.struct_rule
def _plain_section(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Build a section unchecked: checked here, pydantic would refuse it in its own words."""
    section = info.type
    if not (isinstance(section, type) and issubclass(section, Section)):
        return None

    def default(name: str) -> Any:
        if isinstance(info.default, Section):
            return getattr(info.default, name)
        field = section.model_fields[name]
        return tyro.MISSING if field.is_required() else field.default

    def build(**values: Any) -> Section:
        return section.model_construct(**values)

    build.__doc__ = section.__doc__
    fields = tuple(
        StructFieldSpec(name, cast(Any, field.annotation), default(name), field.description)
        for name, field in section.model_fields.items()
    )
    return StructConstructorSpec(instantiate=build, fields=fields)

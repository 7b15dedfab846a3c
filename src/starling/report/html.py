"""What every page is made with: escaping, the style and script, and a policy that allows no more.

A page is one file.  Its Content-Security-Policy names its own style and script by their hashes and
images by data addresses; nothing else is loaded or run, whatever the texts on the page hold.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from starling import __version__
from starling.base.errors import DataError
from starling.report.benches import Question, Turns

ESCAPES = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&\u2028\u2029"}
"""What would end a script element, open a comment in it, or end a line of JavaScript."""


@contextmanager
def as_written(*folders: Path) -> Iterator[None]:
    """Turn JSON of another shape than a run writes into a DataError: edited, or of another version.

    What reads and renders a page stands inside.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, UndefinedError) as error:
        raise DataError(
            f"a file in {' or '.join(map(str, folders))} is not as a run writes it ({error!r}); "
            "run the recipe or the bench again"
        ) from error


def render(template: str, **values: Any) -> str:
    """Fill one of our templates; all that is filled in is escaped."""
    environment = Environment(
        loader=PackageLoader("starling.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style, script = _own("style.css"), _own("browser.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    page = {"policy": policy, "style": Markup(style), "script": Markup(script)}
    return environment.get_template(template).render(version=__version__, page=page, **values)


def image(drawn: bytes | None) -> str | None:
    """A chart as a data address; None where there is none."""
    if drawn is None:
        return None
    return "data:image/svg+xml;base64," + base64.b64encode(drawn).decode()


def browser_data(names: Sequence[str], turns: Sequence[Turns]) -> Markup | None:
    """The per-question browser's data, as JSON inside a script element; None without answers."""
    questions = dict.fromkeys(question for own in turns for question in own)
    if not questions:
        return None
    data = {
        "models": list(names),
        "questions": [_row(question, turns) for question in questions],
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.translate(ESCAPES))


def _row(question: Question, turns: Sequence[Turns]) -> dict[str, Any]:
    answers = [
        [
            {
                "answer": turn.answer,
                "score": turn.score,
                "gold": turn.gold,
                "judgments": [[each.label, each.text] for each in turn.judgments],
            }
            for turn in own.get(question, ())
        ]
        for own in turns
    ]
    return question._asdict() | {"answers": answers}


@cache
def _own(name: str) -> str:
    return resources.files("starling.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

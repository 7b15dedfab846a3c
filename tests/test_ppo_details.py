"""docs/ppo-details.md names functions and tests that are there, for every detail from 10 to 34."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "ppo-details.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)


def names_in(path: Path) -> set[str]:
    """Functions and classes at the top of a file."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_every_detail_has_its_line():
    assert [int(number) for number, *_ in ROWS] == list(range(10, 35))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_functions_and_tests_are_where_the_page_says(row):
    _, _, function, tests = row
    for folder, named in (("src/starling", function), ("tests", tests)):
        places = re.findall(r"`([^`]+\.py)::([^`]+)`", named)
        assert places
        for file, name in places:
            assert name in names_in(ROOT / folder / file), f"{file} has no {name}"

"""Refuse source that has grown too large: files, functions, and the package as a whole.

Limits are those of CONTRIBUTING.md.  The package is measured in lines of code, without blank lines,
comments and docstrings: those are owed to the reader and must not be saved on.  Prints what is
refused and what is near, and exits with 1 when anything is refused.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

FILE_LINES, FILE_WARNING = 500, 400
FUNCTION_LINES, FUNCTION_WARNING = 100, 60
RUN_LINES = 120  # the one `run` of a stage
TOTAL_LINES = 17_200


class Finding(NamedTuple):
    """Something large: what it is, how large, and the limit that it is measured against."""

    what: str
    lines: int
    limit: int
    warning: int


def measure(root: Path) -> Iterator[Finding]:
    """Every file and function of the source and the tools, and the source's total."""
    source = sorted((root / "src").rglob("*.py"))
    yield Finding("src", sum(_num_code_lines(path) for path in source), TOTAL_LINES, TOTAL_LINES)
    for path in [*source, *sorted((root / "tools").glob("*.py"))]:
        name = path.relative_to(root).as_posix()
        yield Finding(name, _num_lines(path), FILE_LINES, FILE_WARNING)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                limit = RUN_LINES if node.name == "run" else FUNCTION_LINES
                yield Finding(f"{name}:{node.lineno} {node.name}", lines, limit, FUNCTION_WARNING)


def _num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _num_code_lines(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str):
            prose.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(map(str.strip, text.splitlines()), start=1)
    return sum(bool(line) and line[0] != "#" and number not in prose for number, line in lines)


def main() -> int:
    findings = list(measure(ROOT))
    refused = [finding for finding in findings if finding.lines > finding.limit]
    for what, lines, limit, warning in findings:
        if lines > limit:
            print(f"refused: {what} has {lines} lines, at most {limit} may be")
        elif lines > warning:
            print(f"long: {what} has {lines} lines; more than {warning} wants a reason")
    total = findings[0].lines
    print(f"{total} lines of code in src, at most {TOTAL_LINES}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())

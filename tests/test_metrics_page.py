"""docs/metrics.md and the source name the same metrics: every logged key, and no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("sft", "reward", "ppo")
FIELD = ("objective", "policy", "loss", "val", "returns")
KEY = re.compile(rf"(?:{'|'.join(STAGES + FIELD)})/[a-z_]+[0-9]*")
DERIVED = {"ppo/squared_ratio"}
"""Summed to work out another, and not logged."""


def logged_keys(source: str) -> set[str]:
    """Keys of dictionaries, subscripts that are assigned to, and what is in a tuple called NAMES.

    Seed purposes look like keys ("ppo/rollout") but are none: they are plain arguments.
    """
    return {
        node.value
        for node in _key_nodes(ast.parse(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and KEY.fullmatch(node.value)
    }


def _key_nodes(tree: ast.AST) -> Iterator[ast.AST | None]:
    for node in ast.walk(tree):
        match node:
            case ast.Dict(keys=keys):
                yield from keys
            case ast.Subscript(slice=key, ctx=ast.Store()):
                yield key
            case ast.Assign(targets=[ast.Name(id="NAMES")], value=ast.Tuple(elts=keys)):
                yield from keys


def test_the_page_names_every_logged_metric_and_no_other() -> None:
    files = [path for stage in STAGES for path in (ROOT / "src/starling" / stage).glob("*.py")]
    logged = {key for path in files for key in logged_keys(path.read_text(encoding="utf-8"))}
    logged |= {f"{stage}/seconds" for stage in STAGES}  # written by the stages' `Journal`
    logged -= DERIVED
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert {"sft/loss", "ppo/kl_coef", "ppo/policy_loss"} <= logged
    assert len(documented) == len(set(documented))
    assert set(documented) == logged


def test_purposes_of_seeds_are_no_metrics() -> None:
    source = 'derive_seed(0, "ppo/rollout"); log({"ppo/score": 1}); sums["ppo/loss"] += 1'
    assert logged_keys(source) == {"ppo/score", "ppo/loss"}

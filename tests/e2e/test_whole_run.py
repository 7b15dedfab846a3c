"""Every stage through the command line, as a user runs it.  What a user sees here is a promise."""

import json
from pathlib import Path

import pytest

from e2e.mini import starling, write_recipe
from ledgers import ledger_rows
from starling.base.hashing import hash_file
from starling.judging.rubric import Checks, grade

CLOCK_FILES = {"timing.jsonl", "manifest.json", ".lock"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """One finished run of the mini recipe."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder)
    assert starling("run", recipe, "--out", folder / "run") == 0
    return folder / "run"


def contents(run: Path) -> dict[str, str]:
    """Every file that the same bytes are promised for, with its hash or its content's."""
    found = {}
    for path in sorted(run.rglob("*")):
        if not path.is_file() or path.name in CLOCK_FILES:
            continue
        name = path.relative_to(run).as_posix()
        if path.name == "calls.sqlite":
            found[name] = repr(ledger_rows(path))
        elif path.name == "report.html":
            lines = path.read_text(encoding="utf-8").splitlines()
            found[name] = "\n".join(line for line in lines if 'class="clock"' not in line)
        else:
            found[name] = hash_file(path)
    return found


def test_the_same_recipe_twice_gives_the_same_bytes(run, tmp_path):
    recipe = write_recipe(tmp_path)
    assert starling("run", recipe, "--out", tmp_path / "run") == 0
    first, second = contents(run), contents(tmp_path / "run")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_a_second_run_skips_every_stage(run, capsys):
    before = contents(run)
    assert starling("run", run.parent / "mini.yaml", "--out", run) == 0
    assert capsys.readouterr().err.count("nothing changed since") == 5
    assert contents(run) == before


def test_the_summary_holds_what_it_promises(run):
    summary = json.loads((run / "summary.json").read_text())
    for name in ("gold", "gold_greedy", "gold_correctness", "tokens_per_answer"):
        for policy in ("sft", "ppo"):
            estimate = summary["bench"][name][policy]
            assert estimate["low"] <= estimate["mean"] <= estimate["high"], name
            assert estimate["n"] == 16, name
    for estimate in (summary["bench"]["win_rate"], summary["ppo"]["sequence_kl"]):
        assert estimate["low"] <= estimate["mean"] <= estimate["high"]
    for name in ("pair_accuracy", "length_only_accuracy"):
        assert 0 <= summary["reward"][name]["mean"] <= 1


def test_gold_can_be_computed_again_from_the_answers(run):
    rows = [json.loads(line) for line in (run / "bench" / "answers.jsonl").open()]
    questions = {
        row["id"]: row for row in map(json.loads, (run.parent / "data" / "bench.jsonl").open())
    }
    totals = [
        grade(
            Checks.model_validate(questions[row["id"]]["checks"][row["turn"] - 1]),
            row["answer"],
            finished=row["finish_reason"] == "stop",
        ).total
        for row in rows
        if row["policy"] == "ppo" and row["decoding"] == "sampled"
    ]
    summary = json.loads((run / "summary.json").read_text())
    assert sum(totals) / len(totals) == pytest.approx(summary["bench"]["gold"]["ppo"]["mean"])


def test_a_stage_runs_alone_and_makes_only_itself_again(run, tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    assert starling("sft", recipe, "--out", tmp_path / "run") == 0
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {"sft"}
    assert starling("reward", recipe, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "rankings.jsonl" in error
    assert "starling feedback" in error


def test_a_changed_section_makes_that_stage_and_those_after_it_again(run, tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    out = tmp_path / "run"
    assert starling("run", recipe, "--out", out) == 0
    capsys.readouterr()
    assert starling("run", recipe, "--out", out, "--ppo.kl-coef", "0.2") == 0
    error = capsys.readouterr().err
    assert error.count("nothing changed since") == 3
    assert "ppo: its settings or inputs changed" in error


def test_the_run_answers_in_the_terminal(run, capsys):
    assert starling("chat", run, "--once", "Write a line on a dog.") == 0
    assert capsys.readouterr().out.endswith("\n")

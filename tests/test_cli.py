"""What a user types and sees: exit codes, stdout and stderr, and how quickly."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import starling
from starling import cli
from starling.base.errors import CheckpointError, Stopped
from starling.recipe import load_recipe, packaged_text

RECIPE = """
policy: org/start
judge: {kind: rubric}
ppo: {prompts: prompts.jsonl, reward_model: org/rewards}
bench: {questions: questions.jsonl}
"""

ESTIMATE = {"low": 0.0, "high": 1.0, "n": 8}
SUMMARY = {
    "bench": {
        "gold": {"sft": {"mean": 0.41, **ESTIMATE}, "ppo": {"mean": 0.72, **ESTIMATE}},
        "gold_greedy": {"sft": {"mean": 0.5, **ESTIMATE}, "ppo": {"mean": 0.8, **ESTIMATE}},
        "gold_correctness": {"sft": {"mean": 0.6, **ESTIMATE}, "ppo": {"mean": 0.7, **ESTIMATE}},
        "gold_correctness_greedy": {
            "sft": {"mean": 0.61, **ESTIMATE},
            "ppo": {"mean": 0.77, **ESTIMATE},
        },
        "score": {"sft": {"mean": 4.5, **ESTIMATE}, "ppo": {"mean": 7.25, **ESTIMATE}},
        "win_rate": {"mean": 0.83, **ESTIMATE},
        "tokens_per_answer": {
            "sft": {"mean": 21.5, **ESTIMATE},
            "ppo": {"mean": 20.25, **ESTIMATE},
        },
    },
    "ppo": {"sequence_kl": {"mean": 0.95, **ESTIMATE}, "kl_target": 2.0},
    "reward": {
        "pair_accuracy": {"mean": 0.83, **ESTIMATE},
        "length_only_accuracy": {"mean": 0.61, **ESTIMATE},
    },
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe in the working folder, without any of its inputs."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(RECIPE, encoding="utf-8")
    return "mine.yaml"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The calls of the pipeline and of the report, which do nothing here."""
    monkeypatch.chdir(tmp_path)
    calls: list[tuple[Any, ...]] = []

    def run_pipeline(recipe, folder, *, out, only=None, prepare=None):
        out.mkdir(parents=True, exist_ok=True)
        if prepare is not None:
            prepare()
        calls.append((recipe, folder, out, only))
        return SUMMARY

    page = ModuleType("starling.report.page")
    page.write_report = lambda run_folder: calls.append((run_folder,))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "starling.report.page", page)
    monkeypatch.setattr(cli, "run_pipeline", run_pipeline)
    return calls


def run_starling(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """A real process; it tells on its last line of stderr whether torch was imported."""
    program = code or (
        "import sys\nfrom starling.cli import main\n"
        "try:\n    status = main(sys.argv[1:])\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
        "sys.exit(status)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(starling.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["run", "laptop", "--help"], 0),
        (["run", "laptop", "--print-recipe"], 0),
        (["run", "laptop", "--ppo.kl-coef", "-1"], 2),
        (["run", "labtop"], 2),
        (["runn", "laptop"], 2),
        (["chat", "--help"], 0),
        (["chat", "model", "--temperature", "-1"], 2),
        (["score", "--help"], 0),
        (["score", "model"], 2),
        (["tokens", "--help"], 0),
        (["tokens", "--file", "absent.json"], 2),
        (["tokens", "--json"], 0),
    ],
)
def test_what_needs_no_model_does_not_import_torch(arguments, status):
    started = time.perf_counter()
    done = run_starling(*arguments)
    sys.stdout.write(f"starling {' '.join(arguments)}: {time.perf_counter() - started:.2f} s\n")
    assert done.returncode == status
    assert done.stderr.splitlines()[-1] == "False"


def test_help_names_every_command_and_recipe_on_stdout(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in cli.COMMANDS)
    assert "demo, laptop, starling-7b-beta" in shown


def test_no_command_at_all_shows_the_help(capsys):
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: starling COMMAND")


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"starling {starling.__version__}\n"


def test_a_misspelt_command_is_refused_with_the_nearest(capsys):
    assert cli.main(["rewrad", "x"]) == 2
    assert capsys.readouterr().err == "error: there is no command 'rewrad'. Did you mean reward?\n"


def test_a_packaged_recipe_is_printed_as_it_is(capsys):
    assert cli.main(["recipe", "demo"]) == 0
    assert capsys.readouterr().out == packaged_text("demo")


def test_an_unknown_packaged_recipe_is_refused_with_those_there_are(capsys):
    assert cli.main(["recipe", "dmo"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Did you mean demo? Packaged are default, demo, laptop, starling-7b-beta, " in shown.err


def test_the_resolved_recipe_goes_to_stdout_and_nothing_runs(recipe, runs, capsys):
    assert cli.main(["run", recipe, "--print-recipe", "--ppo.kl-coef", "0.02"]) == 0
    shown = capsys.readouterr()
    assert "\n  kl_coef: 0.02\n" in shown.out
    assert "\n  gae_lambda: 0.95\n" in shown.out
    assert runs == []


def test_options_override_the_recipe(recipe, runs, capsys):
    assert cli.main(["run", recipe, "--ppo.kl-coef", "2e-2", "--seed", "7", "--out", "there"]) == 0
    (changed, folder, out, only), reported = runs
    assert (changed.ppo.kl_coef, changed.seed) == (0.02, 7)
    assert (folder, out, only) == (Path.cwd(), Path("there"), None)
    assert reported == (Path("there"),)
    assert "there/summary.json" in capsys.readouterr().out


def test_entries_of_a_list_are_overridden_by_their_number(runs, capsys):
    assert cli.main(["run", "demo", "--feedback.candidates.1.temperature", "0.25"]) == 0
    assert runs[0][0].feedback.candidates[1].temperature == 0.25
    assert runs[0][0].feedback.candidates[0].temperature == 1.0
    assert runs[0][0].sft.keep == load_recipe("demo").recipe.sft.keep


def test_the_run_folder_is_named_after_the_recipe_unless_it_says_otherwise(recipe, runs):
    cli.main(["run", recipe])
    cli.main(["run", recipe, "--run.out", "elsewhere"])
    assert [call[2] for call in runs if len(call) > 1] == [Path("runs/mine"), Path("elsewhere")]


@pytest.mark.parametrize("stage", ["sft", "feedback", "reward", "ppo", "bench"])
def test_a_stages_name_runs_only_that_stage(recipe, runs, stage):
    assert cli.main([stage, recipe]) == 0
    assert [call[3] for call in runs] == [stage]


def test_an_impossible_option_is_refused_with_path_found_and_allowed(recipe, runs, capsys):
    assert cli.main(["run", recipe, "--ppo.kl-coef", "-1"]) == 2
    shown = capsys.readouterr().err
    assert "  ppo.kl_coef: found -1.0; Input should be greater than or equal to 0\n" in shown
    assert "pydantic" not in shown
    assert runs == []


def test_a_misspelt_option_is_refused_with_the_nearest(recipe, runs, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", recipe, "--ppo.kl-coeff", "0.1"])
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert "--ppo.kl-coef" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("arguments", [["run"], ["ppo", "--ppo.steps", "3", "mine.yaml"]])
def test_a_command_without_its_recipe_says_where_it_belongs(arguments, capsys):
    assert cli.main(arguments) == 2
    assert "It comes first: starling" in capsys.readouterr().err


def test_help_without_a_recipe_shows_every_group_of_settings(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["ppo", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for group in ("judge", "sft", "feedback", "reward", "ppo", "bench", "run"):
        assert f" {group} options " in shown
    assert "KL penalty per nat" in shown


def test_a_missing_input_is_told_without_a_traceback(recipe, capsys):
    assert cli.main(["run", recipe]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ppo.prompts: there is no file 'prompts.jsonl'")
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (Stopped(2), 130, "Stopped. The same command goes on"),
        (Stopped(15), 143, "Stopped. The same command goes on"),
        (KeyboardInterrupt(), 130, "Stopped. The same command goes on"),
        (CheckpointError("it is damaged"), 2, "error: it is damaged"),
    ],
)
def test_each_way_to_end_has_its_exit_status(recipe, monkeypatch, capsys, error, status, text):
    def fail(*_arguments, **_options):
        raise error

    monkeypatch.setattr(cli, "run_pipeline", fail)
    assert cli.main(["run", recipe]) == status
    assert text in capsys.readouterr().err


def test_ctrl_c_while_a_chats_model_loads_says_nothing_of_checkpoints(monkeypatch, capsys):
    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse_options", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main(["chat", "model"])
    assert caught.value.code == 130
    assert capsys.readouterr() == ("", "")


def test_a_bug_of_ours_shows_its_traceback(recipe, monkeypatch):
    def fail(*_arguments, **_options):
        raise TypeError("oops")

    monkeypatch.setattr(cli, "run_pipeline", fail)
    with pytest.raises(TypeError, match="oops"):
        cli.main(["run", recipe])


def test_the_demo_makes_its_world_once_runs_and_ends_with_what_to_do_next(
    tmp_path, runs, monkeypatch, capsys
):
    made = []

    def write_world(out: Path, *, seed: int) -> None:
        out.mkdir(parents=True)
        made.append(seed)

    monkeypatch.setattr(cli, "write_world", write_world)
    out = tmp_path / "run"
    assert cli.main(["demo", "--seed", "3", "--out", str(out)]) == 0
    assert cli.main(["demo", "--seed", "3", "--out", str(out)]) == 0
    assert made == [3]
    assert (out / "data").is_dir()
    (recipe, folder, where, only), reported = runs[:2]
    assert (recipe.seed, folder, where, only) == (3, out, out, None)
    assert reported == (out,)
    lines = capsys.readouterr().out.splitlines()
    assert "gold, sampled           0.41    0.72" in lines
    assert "win rate                        0.83" in lines
    assert lines[-1] == f"Talk to it:  starling chat {out}"


@pytest.mark.parametrize("has_best_of", [True, False])
def test_the_demo_ends_with_its_gains_and_what_they_cost(capsys, has_best_of):
    bench = SUMMARY["bench"] | {"gold_best_of": {"mean": 0.66, "samples": 16, **ESTIMATE}}
    cli._print_gains(SUMMARY | {"bench": bench} if has_best_of else SUMMARY)
    assert capsys.readouterr().out.splitlines() == [
        "                         sft     ppo",
        "gold, sampled           0.41    0.72",
        "gold, greedy            0.50    0.80",
        "correctness, greedy     0.61    0.77",
        "judge's score           4.50    7.25",
        "tokens per answer      21.50   20.25",
        "win rate                        0.83",
        "sequence KL: 0.95 nats (target 2)",
        "reward model: 0.83 of held-out pairs in order (by length alone 0.61)",
        *(["gold, best of 16 by the reward model: 0.66"] if has_best_of else []),
    ]


def test_a_negative_seed_is_refused(capsys):
    assert cli.main(["demo", "--seed", "-1"]) == 2
    assert "seed: found -1; Input should be greater than or equal to 0" in capsys.readouterr().err


def test_a_report_is_written_again(tmp_path, runs, capsys):
    assert cli.main(["report", str(tmp_path)]) == 0
    assert runs == [(tmp_path,)]
    assert capsys.readouterr().out == f"Report:  {tmp_path / 'report.html'}\n"


def test_messages_of_ours_go_to_stderr_and_chatter_of_others_nowhere(recipe, monkeypatch, capsys):
    import logging

    def talk(*_arguments, **_options):
        logging.getLogger("starling.pipeline").info("sft: made")
        logging.getLogger("httpx").info("HTTP request")
        return {}

    monkeypatch.setattr(cli, "run_pipeline", talk)
    cli.main(["ppo", recipe])
    shown = capsys.readouterr()
    assert shown.err == "sft: made\n"
    assert "sft: made" not in shown.out


@pytest.fixture
def rankings(tmp_path, monkeypatch):
    """A file of three rankings; the longer answer is always the better one."""
    monkeypatch.chdir(tmp_path)
    answers = [
        {"answer": "word " * length, "model": f"m{length}", "rank": 4 - length}
        for length in (1, 2, 3)
    ]
    rows = [
        {"prompt": f"\n\nHuman: Question {n}\n\nAssistant: ", "answers": answers} for n in range(3)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rankings.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def test_audit_says_what_decides_the_rankings_and_writes_its_tables(rankings, capsys):
    assert cli.main(["audit", "rankings.jsonl"]) == 0
    assert "The longer of two answers is the better ranked one in 100.0%" in capsys.readouterr().out
    report = json.loads((rankings / "audit.json").read_text(encoding="utf-8"))
    assert report["models"]["m3"]["mean_rank"]["mean"] == 1.0
    assert sorted(path.name for path in rankings.iterdir()) == ["audit.json", "rankings.jsonl"]


def test_an_audit_of_bad_files_says_so_and_leaves_nothing_anywhere_else(
    rankings, capsys, tmp_path_factory, monkeypatch
):
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    (rankings / "judgments.jsonl").write_text("[1]\n", encoding="utf-8")
    assert cli.main(["audit", "rankings.jsonl"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: judgments.jsonl, line 1: not a JSON object but list.")
    assert "Traceback" not in said
    (rankings / "judgments.jsonl").unlink()
    (rankings / "rankings.jsonl").write_text("nonsense\n", encoding="utf-8")
    assert cli.main(["audit", "rankings.jsonl", "--out", "tables/a.json"]) == 2
    assert "tables/a.quarantine.jsonl" in capsys.readouterr().err
    assert (rankings / "tables/a.quarantine.jsonl").is_file()
    assert list(temporary.iterdir()) == []


def test_pairs_and_nectar_copy_what_a_file_ranks(rankings, capsys):
    assert cli.main(["pairs", "rankings.jsonl", "--kind", "adjacent"]) == 0
    assert cli.main(["nectar", "rankings.jsonl", "two.jsonl", "--sample", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == ["6 pairs of 3 rankings -> pairs.jsonl", "2 rankings -> two.jsonl"]
    assert len((rankings / "pairs.jsonl").read_text(encoding="utf-8").splitlines()) == 6
    assert len((rankings / "two.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_a_file_that_is_not_there_is_told_in_one_line(rankings, capsys):
    for verb in (["audit", "x.jsonl"], ["pairs", "x.jsonl"], ["nectar", "x.jsonl", "y.jsonl"]):
        assert cli.main(verb) == 2
        assert capsys.readouterr().err.startswith("error: there is no x.jsonl")

"""Your prompts, your judge: the stage over HTTP, the README's recipe to its end, and logits.

The judge and two kinds of candidate are a real server that answers in prose (judge_server.py).
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

from e2e.mini import starling
from e2e.test_whole_run import contents
from judge_server import JudgeServer, read_checks
from starling.demo.world import Sizes, write_world
from starling.judging.kwise import parse_ranking
from starling.judging.rubric import Checks, grade
from tiny import tiny_policy_folder

README = Path(__file__).resolve().parents[2] / "README.md"
SIZES = Sizes(bench=8, validation=8, prompts=24, ppo=8, sft=8)

RECIPE = """\
threads: 1
run: {{device: cpu}}
judge: {judge}
feedback:
  prompts: data/prompts.jsonl
  candidates:
    - {{name: good, url: "{url}", model: candidate-0.9, answers: 2}}
    - {{name: fair, url: "{url}", model: candidate-0.5, answers: 2}}
    - {{name: poor, url: "{url}", model: candidate-0.1, answers: 1}}
"""
HTTP_JUDGE = '{{kind: endpoint, url: "{url}", model: judge}}'


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with the prompts and questions of the small world."""
    write_world(tmp_path / "data", seed=0, sizes=SIZES)
    return tmp_path


@pytest.fixture
def server(here: Path) -> Iterator[JudgeServer]:
    """A judge and candidates that know what the world's prompts ask for."""
    with JudgeServer(read_checks([here / "data/prompts.jsonl", here / "data/bench.jsonl"])) as it:
        yield it


def write_recipe(folder: Path, url: str, judge: str = HTTP_JUDGE) -> Path:
    path = folder / "mine.yaml"
    path.write_text(RECIPE.format(url=url, judge=judge.format(url=url)), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def agreement_with_gold(rankings: list[dict]) -> float:
    """Share of the pairs of different gold that the ranks order as gold does."""
    right = total = 0
    for row in rankings:
        checks = Checks.model_validate(row["checks"])
        scored = [(grade(checks, each["answer"]).total, each["rank"]) for each in row["answers"]]
        for (gold, rank), (other_gold, other_rank) in combinations(scored, 2):
            if gold != other_gold:
                total += 1
                right += (gold > other_gold) == (rank < other_rank) and rank != other_rank
    assert total > 100
    return right / total


def test_from_prompts_to_audited_rankings_over_http(here, server, capsys):
    recipe, out = write_recipe(here, server.url), here / "run"
    program = "import sys; from starling.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "feedback", str(recipe), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rankings = rows_of(out / "feedback/rankings.jsonl")
    assert len(rankings) == 24
    assert agreement_with_gold(rankings) > 0.95
    # Beside the judge, candidates of known strength say whether the ranks mean anything.
    mean_rank = {
        name: sum(ranks) / len(ranks)
        for name in ("good", "fair", "poor")
        if (ranks := [a["rank"] for r in rankings for a in r["answers"] if a["model"] == name])
    }
    assert mean_rank["good"] < mean_rank["fair"] < mean_rank["poor"]

    asked = [row for row in rows_of(out / "feedback/judgments.jsonl") if "outcome" in row]
    assert [row["id"] for row in asked] == [row["id"] for row in rankings]
    for row in asked:
        [vote] = row["votes"]
        order = parse_ranking(vote["text"], len(row["ranks"]))
        assert [row["ranks"][vote["presented"][place]] for place in order] == sorted(row["ranks"])
    audit = json.loads((out / "feedback/audit.json").read_text())
    judged = audit["models"]
    assert judged["good"]["mean_rank"]["mean"] == pytest.approx(mean_rank["good"])
    assert judged["good"]["win_share"]["mean"] > judged["poor"]["win_share"]["mean"]
    assert all(finding["sentence"] for finding in audit["findings"])
    assert server.counts["judge"] > 24  # canaries too
    assert server.counts["candidate"] == 24 * 5

    num_calls, before = server.counts["requests"], contents(out)
    assert starling("feedback", recipe, "--out", out) == 0
    assert "nothing changed" in capsys.readouterr().err
    assert contents(out) == before
    # Other settings make the stage run again, from the replies that it has.
    assert starling("feedback", recipe, "--out", out, "--feedback.allowed-failures", "0.5") == 0
    assert contents(out)["feedback/rankings.jsonl"] == before["feedback/rankings.jsonl"]
    assert contents(out)["feedback/calls.sqlite"] == before["feedback/calls.sqlite"]
    assert server.counts["requests"] == num_calls


def test_the_recipe_of_the_readme_ends_in_a_chat_model(here, server, monkeypatch, capsys):
    [text] = re.findall(r"^```yaml\n(.*?)^```$", README.read_text("utf-8"), re.M | re.S)
    larger, start = "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"
    for name, seed in ((larger, 1), (start, 0)):
        assert name in text
        tiny_policy_folder(here / f"model-{seed}", seed, max_length=1024)
        text = text.replace(name, f"model-{seed}")
    assert "http://localhost:8000/v1" in text
    (here / "mine.yaml").write_text(text.replace("http://localhost:8000/v1", server.url))
    # As people have them: the server knows what is right, the files do not.
    for name, file in (("prompts", "prompts.jsonl"), ("bench", "questions.jsonl")):
        rows = rows_of(here / f"data/{name}.jsonl")
        lines = [{key: row[key] for key in row if key != "checks"} for row in rows]
        (here / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(here)
    smaller = {
        "run.device": "cpu",
        "feedback.limit": 8,
        "reward.epochs": 1,
        "reward.batch": 4,
        "ppo.validation-prompts": 4,
        "ppo.steps": 2,
        "ppo.rollout-batch": 4,
        "ppo.microbatch": 4,
        "ppo.max-response-tokens": 8,
        "bench.max-tokens": 8,
    }
    options = [word for key, value in smaller.items() for word in (f"--{key}", str(value))]
    assert starling("run", "mine.yaml", *options) == 0, capsys.readouterr().err
    run = here / "runs/mine"
    assert {row["num_responses"] for row in rows_of(run / "feedback/rankings.jsonl")} <= {6, 7}
    assert server.counts["candidate"] == 0
    assert (run / "report.html").is_file()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["feedback"]["rankings"] == 8
    assert 1 <= summary["bench"]["score"]["ppo"]["mean"] <= 10
    capsys.readouterr()
    assert starling("chat", "runs/mine", "--once", "What is the sum?", "--max-tokens", "8") == 0
    assert capsys.readouterr().out.endswith("\n")


def test_a_judge_by_logits_ranks_without_a_call(here, server):
    judge = tiny_policy_folder(here / "judge", seed=3, max_length=1024)
    recipe = write_recipe(here, server.url, f"{{{{kind: logits, model: {judge.name}}}}}")
    for out in ("run", "again"):
        assert starling("feedback", recipe, "--out", here / out) == 0
    assert server.counts["judge"] == 0
    stage = here / "run/feedback"
    rankings = rows_of(stage / "rankings.jsonl")
    asked = [row for row in rows_of(stage / "judgments.jsonl") if "outcome" in row]
    assert len(rankings) == len(asked) == 24
    for row, ranking in zip(asked, rankings, strict=True):
        k = ranking["num_responses"]
        assert len(row["votes"]) == k
        for place in range(k):
            assert {vote["presented"][place] for vote in row["votes"]} == set(range(k))
        for vote in row["votes"]:
            said = json.loads(vote["text"])
            best = max(said, key=said.get)
            assert vote["ranks"]["ABCDEFGHIJ".index(best)] == 1
    for name in ("rankings.jsonl", "judgments.jsonl", "audit.json"):
        assert (stage / name).read_bytes() == (here / "again/feedback" / name).read_bytes()

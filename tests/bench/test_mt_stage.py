"""MT-Bench inside a run: `bench.protocol: mt-bench`, with a served judge and two small policies."""

import json
import shutil

import pytest

from bench.mt_files import write_bench
from bench.test_mt_bench import by_category, lines
from models.fake_server import FakeServer, Say, completion
from starling.cli import main
from tiny import tiny_policy_folder


def script(body, n=0):
    """Pairs: the first seat, except that writing is the second policy's whoever sits where."""
    asked = body["messages"][-1]["content"]
    if "[B]" in asked or "\nB: " in asked:
        return Say(completion("[[C]]" if "{x}" in asked else "[[A]]"))
    return by_category(body)


@pytest.fixture
def recipe(tmp_path, policy_folder):
    """A folder with a recipe, its questions and its policies; `write(url)` completes it."""
    write_bench(tmp_path / "mt_bench")
    shutil.copytree(policy_folder, tmp_path / "before")
    tiny_policy_folder(tmp_path / "after", seed=3)
    path = tmp_path / "mine.yaml"

    def write(url, **judge):
        settings = {"kind": "endpoint", "url": url, "model": "gpt-4"} | judge
        bench = {"questions": "mt_bench/question.jsonl", "protocol": "mt-bench", "max_tokens": 6}
        bench |= {"baseline": "before", "policy": "after"}
        path.write_text(json.dumps({"judge": settings, "bench": bench}))
        return path

    return write


def test_a_run_judges_both_policies_by_the_published_prompts(recipe, tmp_path):
    out = tmp_path / "out"
    with FakeServer(script) as server:
        assert main(["bench", str(recipe(server.url)), "--out", str(out)]) == 0
        # Two policies, three questions of two turns; then both orders of each; and a canary.
        assert len(server.calls) == 12 + 12 + 1
    scores = json.loads((out / "bench" / "scores.json").read_text())
    for policy in ("sft", "ppo"):
        assert scores["score"][policy]["mean"] == pytest.approx(34.5 / 6, abs=1e-12)
        assert scores["score"][policy]["n"] == 6
        assert scores["by_category"]["math"]["score"][policy]["mean"] == 3.25
    assert scores["win_rate"]["mean"] == 0.5
    assert "gold" not in scores
    assert scores["canaries"]["ratings"]["asked"] == 1
    folder = out / "bench" / "mt_bench"
    judged = lines(folder / "model_judgment" / "judge_single.jsonl")
    assert [row["score"] for row in judged[:6]] == [8, 8, 2.5, 4, 6, 6]
    assert len(lines(folder / "model_judgment" / "judge_pair.jsonl")) == 6
    answers = lines(folder / "model_answer" / "ppo.jsonl")
    assert all(text == text.strip() for row in answers for text in row["choices"][0]["turns"])
    assert main(["report", str(out)]) == 0


def test_what_it_writes_is_counted_by_the_command_as_well(recipe, tmp_path):
    out = tmp_path / "out"
    with FakeServer(script) as server:
        assert main(["bench", str(recipe(server.url)), "--out", str(out)]) == 0
    judgments = out / "bench" / "mt_bench" / "model_judgment" / "judge_single.jsonl"
    data = ("--data", str(tmp_path / "mt_bench"), "--judgments", str(judgments))
    counted = tmp_path / "counted"
    assert main(["mt-bench", *data, "--model", "ppo", "--out", str(counted)]) == 0
    found = json.loads((counted / "scores.json").read_text())
    stage = json.loads((out / "bench" / "scores.json").read_text())
    assert found["average"] == stage["score"]["ppo"]["mean"]


@pytest.mark.parametrize("kind", ["rubric", "logits"])
def test_a_judge_that_writes_no_text_is_refused(recipe, tmp_path, capsys, kind):
    path = recipe(None, kind=kind, model="before" if kind == "logits" else None)
    assert main(["bench", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "bench.protocol: mt-bench needs a judge that writes text" in capsys.readouterr().err


def test_without_the_judges_prompts_it_says_where_they_are(recipe, tmp_path, capsys):
    (tmp_path / "mt_bench" / "judge_prompts.jsonl").unlink()
    path = recipe("http://localhost:1/v1")
    assert main(["bench", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "there is no judge_prompts.jsonl in" in capsys.readouterr().err

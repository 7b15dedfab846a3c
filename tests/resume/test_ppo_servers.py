"""A reward server or a judge that fails in the middle of ppo costs nothing but the time.

The run ends and says what to do; the same command then leaves the bytes of a run with servers that
never failed.  The servers run here, the stage in forks.
"""

import json
import re

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from judge_server import JudgeServer, read_checks
from ledgers import ledger_rows
from models.fake_server import error
from resume.kills import contents, in_child, keep_checkpoints
from reward_server import Server, classified
from starling.base.jsonl import write_records
from starling.cli import main
from tiny import tiny_policy_folder, tiny_reward_folder

PPO = {
    "prompts": "prompts.jsonl",
    "validation_prompts": 4,
    "steps": 4,
    "rollout_batch": 3,
    "samples_per_prompt": 2,
    "ppo_epochs": 1,
    "max_response_tokens": 4,
    "lr": 3e-3,
    "kl_target": 1.0,
    "kl_horizon": 50,
    "select_every": 2,
    "checkpoint_every": 1,
    "reward_scale": "running",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny_reward_folder(folder / "scorer", tiny_policy_folder(folder / "policy"), seed=1)
    write_records(
        folder / "prompts.jsonl",
        [
            {
                "id": f"p{n}",
                "messages": [{"role": "user", "content": f"Question {n}?"}],
                "checks": {"excludes": ["a", "e"]},
            }
            for n in range(12)
        ],
    )
    return folder


def starling_ppo(recipe, out):
    """`starling ppo` in a fork, which keeps its last checkpoints; returns its exit status."""
    return in_child(lambda: main(["ppo", str(recipe), "--out", str(out)]), keep_checkpoints)


def written(folder, name, judge, **ppo):
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"policy": "policy", "judge": judge, "ppo": PPO | ppo}))
    return path


def results(out):
    """What must be equal: of the ledger its rows, since a database's bytes tell its past."""
    found = {name: digest for name, digest in contents(out).items() if "calls.sqlite" not in name}
    ledger = out / "ppo" / "calls.sqlite"
    return found, ledger_rows(ledger) if ledger.exists() else []


def steps_of(out):
    path = out / "ppo" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.open()] if path.exists() else []


class RewardServer:
    """Scores by transformers; the calls from number `broken_from` on are refused."""

    def __init__(self, folder):
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        self.broken_from = None
        self.num_calls = 0

    @torch.no_grad()
    def __call__(self, body, _n):
        self.num_calls += 1
        if self.broken_from is not None and self.num_calls >= self.broken_from:
            return 503, '{"error": {"message": "out of memory"}}', {"retry-after-ms": "1"}
        return classified([float(self.model(torch.tensor([ids])).logits) for ids in body["input"]])


def test_a_reward_server_that_fails_ends_the_run_and_the_next_goes_on_without_loss(
    inputs, tmp_path, capfd
):
    scores = RewardServer(inputs / "scorer")
    with Server(scores) as server:
        source = {"model": "scorer", "url": server.url}
        recipe = written(inputs, "reward", {"kind": "rubric"}, reward_models=[source])
        assert starling_ppo(recipe, tmp_path / "whole") == 0
        # One call to meet it, three validations and four rollouts of one each.
        assert scores.num_calls == 8
        scores.num_calls, scores.broken_from = 0, 6  # met, validated, 1, 2, validated: in step 3
        assert starling_ppo(recipe, tmp_path / "parts") == 2
        assert steps_of(tmp_path / "parts") == [1, 2]
        said = capfd.readouterr().err
        assert f"error: {server.url}/classify answered 503" in said
        assert "then run this again" in said
        assert "Traceback" not in said
        # While it is down nothing changes, however often it is tried.
        assert starling_ppo(recipe, tmp_path / "parts") == 2
        assert steps_of(tmp_path / "parts") == [1, 2]
        scores.broken_from = None
        assert starling_ppo(recipe, tmp_path / "parts") == 0
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_a_judge_that_fails_ends_the_run_and_the_next_goes_on_without_loss(inputs, tmp_path, capfd):
    asked = []

    def play(_body, _n, text):
        asked.append(1)
        return error(400, "the model is gone") if is_broken and len(asked) > 5 else text

    is_broken = False
    with JudgeServer(read_checks([inputs / "prompts.jsonl"]), play=play) as server:
        judge = {"kind": "endpoint", "url": server.url, "model": "judge", "concurrency": 1}
        recipe = written(inputs, "judge", judge, reward_model="scorer")
        assert starling_ppo(recipe, tmp_path / "whole") == 0
        assert len(asked) == 3 * 4
        asked.clear()
        is_broken = True
        # It rates the start's four answers, and of step 2's the first.
        assert starling_ppo(recipe, tmp_path / "parts") == 2
        said = capfd.readouterr().err
        assert "Traceback" not in said
        assert re.search("answered 400: .*the model is gone.*Check the judge", said, re.DOTALL)
        assert steps_of(tmp_path / "parts") == [1]
        is_broken = False
        asked.clear()
        assert starling_ppo(recipe, tmp_path / "parts") == 0
        # What was rated is not asked again: three of step 2's are left, and the last four.
        assert len(asked) == 3 + 4
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_a_judge_that_answers_without_a_rating_ends_the_run_and_says_what_it_said(
    inputs, tmp_path, capfd
):
    """Such a reply is paid for and stays what it was, so a new run hears it again."""

    def play(_body, _n, _text):
        return "I would rather not."

    with JudgeServer(read_checks([inputs / "prompts.jsonl"]), play=play) as server:
        judge = {"kind": "endpoint", "url": server.url, "model": "judge"}
        recipe = written(inputs, "mute", judge, reward_model="scorer")
        assert starling_ppo(recipe, tmp_path) == 2
        said = capfd.readouterr().err
        assert "the judge rated only 0 of 4 validation answers" in said
        assert "Check the judge" in said

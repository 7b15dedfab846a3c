"""What each fault of a judge comes to: tried again and ranked, or a row that is left out.

Never a rank that no judge gave.  The server is real, and plays each fault at its own prompt.
"""

import json
import re
import time
from pathlib import Path

import pytest

from e2e.mini import starling
from judge_server import RESET, JudgeServer, quoted, read_checks
from ledgers import ledger_rows
from models.fake_server import Say, completion, error
from starling.demo.world import Sizes, write_world
from starling.models import endpoint

SIZES = Sizes(bench=8, validation=8, prompts=24, ppo=8, sft=8)
RECIPE = """\
threads: 1
run: {{device: cpu}}
judge: {{kind: endpoint, url: "{url}", model: judge, timeout_seconds: 2}}
feedback:
  prompts: data/prompts.jsonl
  canaries: 0
  allowed_failures: {allowed}
  candidates:
    - {{name: good, url: "{url}", model: candidate-0.9, answers: 2}}
    - {{name: poor, url: "{url}", model: candidate-0.1, answers: 2}}
"""


def one_choice(message, finish_reason="stop"):
    choice = {"index": 0, "message": {"role": "assistant"} | message}
    return Say(json.dumps({"id": "x", "choices": [choice | {"finish_reason": finish_reason}]}))


def with_labels(change):
    """The judge's words with other labels in the verdict."""

    def said(text):
        *words, verdict = text.splitlines()
        labels = change(re.findall("[A-Z]", verdict))
        return "\n".join([*words, f"[[{quoted(labels)}]]"])

    return said


# Once each: what is said in the reply's place, and what the ledger says of the attempt.
RETRIED = {
    "a time-out": (Say(delay_seconds=3), "no reply within 2 s"),
    "a reset": (Say(status=RESET), "the connection broke"),
    "a body that breaks off": (Say('{"id": "x", "cho', cut=True), "the connection broke"),
    "429": (error(429, "slow down", headers={"Retry-After": "1"}), "answered 429.*slow down"),
    "500": (error(500, "oh no"), "answered 500.*oh no"),
    "503": (error(503, "starting", headers={"Retry-After": "0"}), "answered 503"),
}

# Each time: what is said in the reply's place, and the reason that the row is left out for.
DROPPED = {
    "500 for ever": (lambda text: error(500, "oh no"), r"answered 500: .*oh no.* \(6 attempts\)"),
    "400": (lambda text: error(400, "bad request"), "answered 400: .*bad request"),
    "no JSON": (lambda text: Say("<html>busy</html>"), "no chat completion .*<html>busy"),
    "truncated JSON": (lambda text: Say(completion(text)[:90]), "no chat completion"),
    "JSON of another kind": (lambda text: Say('{"choices": []}'), "no chat completion"),
    "a refusal": (
        lambda text: one_choice({"content": None, "refusal": "I will not rank these."}),
        "the model refused: I will not rank these",
    ),
    "a filter": (
        lambda text: one_choice({"content": ""}, "content_filter"),
        "finish_reason 'content_filter'",
    ),
    "empty content": (lambda text: one_choice({"content": " \n"}), "the reply is empty"),
    "a refusal in prose": (lambda text: "I cannot compare these answers.", "holds no ranking"),
    "a missing label": (with_labels(lambda labels: labels[1:]), "no full ranking of"),
    "a label twice": (with_labels(lambda labels: [*labels, labels[0]]), "no full ranking of"),
    "an extra label": (with_labels(lambda labels: [*labels, "Z"]), "no full ranking of"),
    "a reply that is cut": (
        lambda text: Say(
            completion(text.partition("[[")[0], finish_reason="length", response_tokens=2048)
        ),
        "the reply was cut after 2048 tokens",
    ),
}
NO_REPLY = list(DROPPED)[:5]
"""The rest was answered, and is paid for."""


class Scene:
    """The world's prompts, a server that knows them, and which prompt a judge's call is about."""

    def __init__(self, folder: Path, server: JudgeServer) -> None:
        self.folder, self.server = folder, server
        rows = [json.loads(line) for line in (folder / "data/prompts.jsonl").open()]
        self.ids = [row["id"] for row in rows]
        self.texts = [row["messages"][-1]["content"] for row in rows]
        self.times: dict[int, list[float]] = {}
        self.judged: list[int] = []

    def play(self, faults) -> None:
        """`faults(number, n, text)` answers the judge's n-th call about prompt `number`."""
        self.judged, self.times = [], {}

        def say(body, n, text):
            if body["model"] != "judge":
                return text
            task = body["messages"][-1]["content"]
            [number] = [i for i, asked in enumerate(self.texts) if f"\n{asked}\n" in task]
            self.judged.append(number)
            times = self.times.setdefault(number, [])
            times.append(time.monotonic())
            return faults(number, len(times) - 1, text)

        self.server.play = say

    def run(self, out: str, *, allowed: float = 0.05) -> int:
        recipe = self.folder / "faults.yaml"
        recipe.write_text(RECIPE.format(url=self.server.url, allowed=allowed))
        return starling("feedback", recipe, "--out", self.folder / out)

    def stage(self, out: str) -> Path:
        return self.folder / out / "feedback"

    def judgments(self, out: str) -> dict[str, dict]:
        lines = map(json.loads, (self.stage(out) / "judgments.jsonl").open())
        return {line["id"]: line for line in lines if "outcome" in line}

    def ranked(self, out: str) -> dict[str, dict]:
        lines = map(json.loads, (self.stage(out) / "rankings.jsonl").open())
        return {line["id"]: line for line in lines}


def upright(number, n, text):
    return text


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A scene in which one run went without any fault, to `clean`."""
    folder = tmp_path_factory.mktemp("faults")
    write_world(folder / "data", seed=0, sizes=SIZES)
    with (
        pytest.MonkeyPatch.context() as patch,
        JudgeServer(read_checks([folder / "data/prompts.jsonl"])) as server,
    ):
        patch.setattr(endpoint, "FIRST_WAIT_SECONDS", 0.01)
        scene = Scene(folder, server)
        scene.play(upright)
        assert scene.run("clean") == 0
        assert len(scene.ranked("clean")) == 24
        yield scene


@pytest.fixture(scope="module")
def retried(scene):
    """A run in which every fault that passes is played once."""
    faults = list(RETRIED.values())
    scene.play(lambda number, n, text: faults[number][0] if number < 6 and n == 0 else text)
    assert scene.run("retried") == 0
    return dict(scene.times)


@pytest.mark.parametrize("fault", RETRIED)
def test_a_fault_that_passes_is_tried_again_and_noted(fault, scene, retried):
    number = list(RETRIED).index(fault)
    assert len(retried[number]) == 2
    stage = scene.stage("retried")
    [key] = [
        row["key"]
        for row in ledger_rows(stage / "calls.sqlite")
        if row["request_id"] == scene.ids[number]
    ]
    attempts = ledger_rows(stage / "calls.sqlite", "attempts")
    [reason] = [row["reason"] for row in attempts if row["key"] == key]
    assert re.search(RETRIED[fault][1], reason)


def test_faults_that_pass_leave_the_bytes_of_a_run_without(scene, retried):
    for name in ("rankings.jsonl", "judgments.jsonl"):
        clean, after = (scene.stage(out) / name for out in ("clean", "retried"))
        assert after.read_bytes() == clean.read_bytes()


def test_a_server_that_says_how_long_to_wait_is_not_asked_before(scene, retried):
    first, second = retried[list(RETRIED).index("429")]
    assert second - first >= 1.0
    first, second = retried[list(RETRIED).index("503")]
    assert second - first < 1.0


def stubborn(number, n, text):
    faults = list(DROPPED.values())
    return faults[number][0](text) if number < len(faults) else text


@pytest.fixture(scope="module")
def dropped(scene):
    """A run in which every fault that stays is played, and as many may fail."""
    scene.play(stubborn)
    assert scene.run("dropped", allowed=0.6) == 0
    return dict(scene.times)


@pytest.mark.parametrize("fault", DROPPED)
def test_a_fault_that_stays_leaves_the_row_out_and_says_why(fault, scene, dropped):
    number = list(DROPPED).index(fault)
    id = scene.ids[number]
    assert id not in scene.ranked("dropped")
    line = scene.judgments("dropped")[id]
    assert line["outcome"] == "unparsed"
    assert "ranks" not in line
    assert re.search(DROPPED[fault][1], line["reason"])
    [vote] = line["votes"]
    assert "ranks" not in vote
    # What is no passing fault is asked once: it would be paid again for the same answer.
    assert len(dropped[number]) == (6 if fault == "500 for ever" else 1)


def test_the_other_rows_are_those_of_a_run_without_faults(scene, dropped):
    ranked, clean = scene.ranked("dropped"), scene.ranked("clean")
    assert list(ranked) == scene.ids[len(DROPPED) :]
    assert ranked == {id: clean[id] for id in ranked}


def test_too_many_failures_end_the_run_and_the_next_asks_only_those(scene, capsys):
    scene.play(lambda n, turn, text: stubborn(n, turn, text) if n < len(NO_REPLY) else text)
    assert scene.run("healed") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    assert re.search(r"5 of 24 prompts ended without a ranking.*at most 0\.05 ", said.err)
    assert "feedback.allowed_failures" in said.err
    assert "run the same command again" in said.err
    assert not (scene.stage("healed") / "rankings.jsonl").exists()

    num_candidates = scene.server.counts["candidate"]
    scene.play(upright)
    assert scene.run("healed") == 0
    assert sorted(scene.judged) == list(range(len(NO_REPLY)))
    assert scene.server.counts["candidate"] == num_candidates
    for name in ("rankings.jsonl", "judgments.jsonl"):
        clean, after = (scene.stage(out) / name for out in ("clean", "healed"))
        assert after.read_bytes() == clean.read_bytes()


def test_a_reply_that_cannot_be_used_or_read_is_not_bought_again(scene):
    unread = [number for number in range(len(DROPPED)) if number >= len(NO_REPLY)]
    scene.play(lambda n, turn, text: stubborn(n, turn, text) if n in unread else text)
    assert scene.run("unread") == 2
    scene.play(upright)
    assert scene.run("unread") == 2
    assert scene.judged == []
    assert scene.run("unread", allowed=0.35) == 0
    assert scene.judged == []
    assert sorted(set(scene.ids) - set(scene.ranked("unread"))) == sorted(
        scene.ids[number] for number in unread
    )


def test_a_candidate_that_fails_leaves_fewer_answers_and_says_why(scene):
    def silent(body, n, text):
        about = body["messages"][-1]["content"] == scene.texts[0]
        return error(400, "no") if about and body["model"] == "candidate-0.1" else text

    scene.server.play = silent
    assert scene.run("silent") == 0
    row = scene.ranked("silent")[scene.ids[0]]
    assert [answer["model"] for answer in row["answers"]] == ["good", "good"]
    assert sorted(answer["rank"] for answer in row["answers"]) == [1, 2]
    line = scene.judgments("silent")[scene.ids[0]]
    assert len(line["failed"]) == 2
    assert all("answered 400" in reason for reason in line["failed"])


def test_a_question_that_is_too_long_is_dropped_before_the_call(scene, capsys):
    scene.play(upright)
    rows = [json.loads(line) for line in (scene.folder / "data/prompts.jsonl").open()]
    rows[3]["messages"][-1]["content"] += " please" * 2000
    (scene.folder / "data/long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = RECIPE.format(url=scene.server.url, allowed=0.05)
    recipe = recipe.replace(
        "model: judge,", "model: judge, context_length: 4000, max_tokens: 1000,"
    )
    path = scene.folder / "long.yaml"
    path.write_text(recipe.replace("prompts.jsonl", "long.jsonl"))
    assert starling("feedback", path, "--out", scene.folder / "long") == 0
    assert sorted(scene.judged) == [number for number in range(24) if number != 3]
    line = scene.judgments("long")[scene.ids[3]]
    assert line["outcome"] == "unparsed"
    tokens = int(re.search(r"has about (\d+) tokens", line["reason"])[1])
    # Four characters a token: the added 14,000 are 3,500.
    assert tokens > 3500
    assert "more than the model's 4000" in line["reason"]
    assert scene.ids[3] not in scene.ranked("long")

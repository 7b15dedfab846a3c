"""`starling mt-bench` killed or stopped half way: what was answered is not bought again."""

import json
import signal

import pytest

from bench.mt_files import write_bench
from bench.test_mt_bench import by_category
from models.fake_server import FakeServer
from resume.kills import in_child, send_self
from starling.bench import asking
from starling.cli import main


def command(data, server, out):
    answers = data / "model_answer" / "one.jsonl"
    judge = ["--judge-url", server.url, "--out", str(out), "--concurrency", "1"]
    return main(["mt-bench", "--data", str(data), "--answers", str(answers), *judge])


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_the_same_command_goes_on_and_pays_for_no_reply_twice(tmp_path, number, status):
    data = write_bench(tmp_path / "data", "one")
    with FakeServer(by_category) as server:

        def die():
            send_self(number, asking, "_judgment", 3)

        ended = in_child(lambda: command(data, server, tmp_path / "out"), die)
        assert ended == status
        assert not (tmp_path / "out" / "scores.json").exists()
        before = len(server.calls)
        assert 3 <= before < 6
        assert command(data, server, tmp_path / "out") == 0
        asked = [json.dumps(call["messages"]) for call in server.calls]
        # What was in flight at the kill may be asked for again, and nothing else.
        assert len(asked) - len(set(asked)) <= 1
        assert len(set(asked)) == 6
        alone = command(data, server, tmp_path / "whole")
    assert alone == 0
    found, whole = (
        json.loads((tmp_path / name / "scores.json").read_text()) for name in ("out", "whole")
    )
    assert found == whole

import json
import math
from contextlib import closing

import pytest

from starling.base.errors import CheckpointError
from starling.base.metrics import MetricsLog


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_is_one_line_that_can_be_read_at_once(tmp_path):
    path = tmp_path / "ppo" / "metrics.jsonl"
    with closing(MetricsLog(path)) as log:
        log.log(1, {"ppo/kl": 0.1, "ppo/rows": 3})
        assert path.read_text() == '{"step": 1, "ppo/kl": 0.1, "ppo/rows": 3}\n'
        log.log(2, {"bench/writing/score": 1e-300})
    assert rows(path)[1] == {"step": 2, "bench/writing/score": 1e-300}


def test_a_new_log_goes_on_at_the_end_of_the_file(tmp_path):
    for step in (1, 2):
        with closing(MetricsLog(tmp_path / "metrics.jsonl")) as log:
            log.log(step, {"ppo/kl": 0.0})
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name_and_nothing_is_written(tmp_path, value):
    with closing(MetricsLog(tmp_path / "metrics.jsonl")) as log:
        with pytest.raises(ValueError, match=r"metric 'ppo/kl' is -?(nan|inf) at step 7"):
            log.log(7, {"ppo/loss": 1.0, "ppo/kl": value})
        assert log.offset() == 0


@pytest.mark.parametrize("key", ["kl", "ppo/", "/kl", "ppo/KL", "PPO/kl", "ppo kl/x", "ppo/kl\n"])
def test_a_key_that_is_not_stage_and_noun_is_refused(tmp_path, key):
    with closing(MetricsLog(tmp_path / "metrics.jsonl")) as log:
        with pytest.raises(ValueError, match="is not named like 'stage/noun'"):
            log.log(1, {key: 1.0})
        assert log.offset() == 0


def test_an_interrupted_log_that_was_cut_back_has_the_bytes_of_an_uninterrupted_one(tmp_path):
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    with closing(MetricsLog(straight)) as log:
        for step in range(4):
            log.log(step, {"ppo/kl": step / 3})
    with closing(MetricsLog(resumed)) as log:
        log.log(0, {"ppo/kl": 0 / 3})
        log.log(1, {"ppo/kl": 1 / 3})
        offset = log.offset()
        log.log(2, {"ppo/kl": 99.0})
    resumed.write_bytes(resumed.read_bytes() + b'{"step": 3, "ppo')
    with closing(MetricsLog(resumed)) as log:
        log.cut_back(offset)
        assert log.offset() == offset
        log.log(2, {"ppo/kl": 2 / 3})
        log.log(3, {"ppo/kl": 3 / 3})
    assert resumed.read_bytes() == straight.read_bytes()


def test_cutting_back_to_nothing_empties_the_file(tmp_path):
    with closing(MetricsLog(tmp_path / "metrics.jsonl")) as log:
        log.log(1, {"ppo/kl": 1.0})
        log.cut_back(0)
        assert log.offset() == 0


@pytest.mark.parametrize("offset", [1000, 5])
def test_a_file_that_does_not_fit_the_checkpoint_is_refused_and_kept(tmp_path, offset):
    path = tmp_path / "metrics.jsonl"
    with closing(MetricsLog(path)) as log:
        log.log(1, {"ppo/kl": 1.0})
        content = path.read_bytes()
        with pytest.raises(CheckpointError, match=f"metrics.jsonl holds .* byte {offset}. Delete"):
            log.cut_back(offset)
    assert path.read_bytes() == content


def test_an_offset_is_not_given_before_the_bytes_are_on_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("starling.base.metrics.os.fsync", synced.append)
    with closing(MetricsLog(tmp_path / "metrics.jsonl")) as log:
        log.log(1, {"ppo/kl": 1.0})
        assert log.offset() == (tmp_path / "metrics.jsonl").stat().st_size > 0
    assert len(synced) == 1

import io

import pytest

from starling.base import progress
from starling.base.progress import Progress


class Clock:
    """Stands in for the time module: the time is what the test says."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def use_terminal(monkeypatch):
    """Called in the test itself: pytest's capture takes sys.stderr back after the fixtures."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    return terminal


def test_without_a_terminal_there_is_a_line_every_fifteen_seconds_and_one_at_the_end(clock, capsys):
    with Progress("ppo", 100) as line:
        for done in range(1, 101):
            clock.now += 1
            line.update(done, "kl 0.03")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "ppo  15/100  15%  1m25s left  kl 0.03"
    assert err.splitlines()[-1] == "ppo  100/100  100%  done in 1m40s  kl 0.03"
    assert len(err.splitlines()) == 7
    assert "\r" not in err


def test_in_a_terminal_one_line_is_redrawn_a_few_times_a_second(clock, monkeypatch, capsys):
    terminal = use_terminal(monkeypatch)
    with Progress("sft", 100) as line:
        for done in range(1, 100):
            clock.now += 0.01
            line.update(done)
        drawn = terminal.getvalue()
        assert 2 <= drawn.count("\r\x1b[K") <= 4
        assert "\n" not in drawn
    assert terminal.getvalue() == drawn + "\n"
    assert capsys.readouterr().out == ""


def test_the_last_update_ends_the_line_once(clock, monkeypatch):
    terminal = use_terminal(monkeypatch)
    with Progress("sft", 2) as line:
        line.update(2)
    assert terminal.getvalue() == "\r\x1b[Ksft  2/2  100%  done in 0s\n"


def test_a_long_note_is_cut_to_the_width_of_the_terminal(clock, monkeypatch):
    terminal = use_terminal(monkeypatch)
    Progress("sft", 1).update(1, "x" * 200)
    line = terminal.getvalue().removeprefix("\r\x1b[K").removesuffix("\n")
    assert len(line) == 79


def test_what_an_earlier_run_had_done_does_not_count_as_fast_work(clock, capsys):
    line = Progress("ppo", 100)
    clock.now += 10
    line.update(91)
    clock.now += 10
    line.update(92)
    # One in 10 seconds, eight to go.
    assert capsys.readouterr().err == "ppo  92/100  92%  1m20s left\n"


def test_nothing_is_claimed_about_the_time_before_anything_is_done(clock, capsys):
    line = Progress("ppo", 10)
    clock.now += 20
    line.update(4)
    assert capsys.readouterr().err == "ppo  4/10  40%\n"


def test_hours_are_written_as_hours_and_an_empty_stage_is_done(clock, capsys):
    line = Progress("ppo", 10)
    line.update(1)
    clock.now += 3660
    line.update(5)
    Progress("sft", 0).update(0)
    assert capsys.readouterr().err.splitlines() == [
        "ppo  5/10  50%  1h16m left",
        "sft  0/0  100%  done in 0s",
    ]

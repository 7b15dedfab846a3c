import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from starling.base.context import (
    Context,
    StopFlag,
    choose_device,
    context_from_environment,
    single_process_context,
)
from starling.base.errors import RecipeError, Stopped
from starling.base.spending import Spending


def in_a_process(program):
    """Settings of torch are global, so they are set where no other test sees them."""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout


def test_one_process_is_rank_zero_of_one_with_the_threads_it_asked_for():
    program = """
import torch
from starling.base.context import single_process_context
c = single_process_context(3)
print(c.rank, c.world_size, c.device, c.threads, torch.get_num_threads(),
      torch.are_deterministic_algorithms_enabled(),
      torch.is_deterministic_algorithms_warn_only_enabled())
"""
    assert in_a_process(program).split() == ["0", "1", "cpu", "3", "3", "True", "False"]


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "CPU", ""])
def test_a_device_that_is_none_is_refused(device):
    with pytest.raises(RecipeError, match="must be 'cpu', 'cuda' or"):
        single_process_context(1, device)


@pytest.mark.parametrize(("has_gpu", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_without_a_wish_the_device_is_a_gpu_where_there_is_one(monkeypatch, has_gpu, chosen):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    assert choose_device(None) == chosen


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(RecipeError, match="'cuda:99', and .* CUDA devices were found. Set device"):
        single_process_context(1, "cuda:99")


def test_one_numbered_gpu_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(RecipeError, match="device is 'cuda:1' for 2 processes; set device: cuda"):
        context_from_environment(1, "cuda:1", seed=0, spending=Spending())


def test_only_the_first_process_keeps_a_path_for_itself():
    first, second = (Context(rank, 2, "cpu", 1) for rank in range(2))
    path = Path("out/metrics.jsonl")
    assert first.own_path(path) == path
    assert second.own_path(path) == Path("out/.tmp-rank-1-metrics.jsonl")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_at_the_next_check_and_not_before(number):
    with StopFlag() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as caught:
            stop.check()
    assert caught.value.signal_number == number


def test_a_second_interrupt_stops_at_once():
    with StopFlag():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_terminate_changes_nothing():
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGINT


def test_the_earlier_handlers_come_back():
    def mine(_number, _frame):
        pass

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, mine) for number in numbers]
    try:
        with StopFlag():
            assert all(signal.getsignal(number) is not mine for number in numbers)
        assert all(signal.getsignal(number) is mine for number in numbers)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_another_thread_may_hold_a_flag_that_stays_down():
    problems = []

    def use():
        try:
            with StopFlag() as stop:
                stop.check()
        except ValueError as error:
            problems.append(error)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert problems == []
    assert signal.getsignal(signal.SIGINT) == before

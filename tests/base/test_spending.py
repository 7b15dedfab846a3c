"""What a run has spent, and when a cap is reached."""

import threading

import pytest

from starling.base.spending import Price, Spending

PRICES = {"cheap": Price(input=0.5, output=2.0), "free": Price(input=0.0, output=0.0)}


def test_a_price_is_dollars_per_million_tokens():
    spending = Spending(PRICES)
    # 3 million read at $0.50, half a million written at $2.
    assert spending.usd("cheap", 3_000_000, 500_000) == pytest.approx(1.5 + 1.0)
    assert spending.usd("free", 3_000_000, 500_000) == 0.0
    assert spending.usd("another", 1, 1) is None


def test_totals_are_kept_by_model_and_say_where_no_price_is_known():
    spending = Spending(PRICES)
    spending.charge("cheap", calls=1, prompt_tokens=1000, response_tokens=100)
    spending.charge("another", calls=2)
    spending.charge("cheap", calls=3, prompt_tokens=1000)
    assert spending.totals() == {
        "another": {"calls": 2, "prompt_tokens": 0, "response_tokens": 0, "usd": None},
        "cheap": {
            "calls": 4,
            "prompt_tokens": 2000,
            "response_tokens": 100,
            "usd": pytest.approx(0.0012),
        },
    }


def test_what_was_spent_since_leaves_out_what_was_spent_before():
    spending = Spending(PRICES)
    spending.charge("cheap", calls=1, prompt_tokens=1000, response_tokens=100)
    spending.charge("another", calls=2)
    before = spending.totals()
    spending.charge("cheap", calls=1, prompt_tokens=7, response_tokens=0)
    spending.charge("free", calls=5)
    assert spending.since(before) == {
        "cheap": {
            "calls": 1,
            "prompt_tokens": 7,
            "response_tokens": 0,
            "usd": pytest.approx(3.5e-6),
        },
        "free": {"calls": 5, "prompt_tokens": 0, "response_tokens": 0, "usd": 0.0},
    }


@pytest.mark.parametrize(
    ("cap", "words"),
    [
        ({"max_usd": 0.0012}, "max_usd is $0.0012, and $0.0012 are spent"),
        ({"max_calls": 3}, "max_calls is 3, and 3 calls have ended"),
        ({"max_tokens": 2100}, "max_tokens is 2,100, and 2,100 tokens were used"),
    ],
)
def test_a_cap_is_reached_by_the_call_that_fills_it(cap, words):
    spending = Spending(PRICES, **cap)
    spending.charge("cheap", calls=1, prompt_tokens=1999, response_tokens=100)
    spending.charge("free", calls=1)
    assert spending.reached() is None
    spending.charge("cheap", calls=1, prompt_tokens=1)
    assert spending.reached() == words


def test_one_call_is_not_called_several():
    spending = Spending({}, max_calls=1)
    spending.charge("unpriced", calls=1, prompt_tokens=5)
    assert spending.reached() == "max_calls is 1, and 1 call has ended"
    assert spending.note() == "1 call, 5 tokens"
    spending.charge("unpriced", calls=1)
    assert spending.note() == "2 calls, 5 tokens"


def test_without_caps_nothing_is_ever_reached():
    spending = Spending(PRICES)
    spending.charge("cheap", calls=10**9, prompt_tokens=10**12, response_tokens=10**12)
    assert spending.reached() is None


def test_the_note_is_money_where_a_price_is_known_and_counts_elsewhere():
    spending = Spending(PRICES)
    assert spending.note() == ""
    spending.charge("another", calls=1234, prompt_tokens=55_000, response_tokens=1_000)
    assert spending.note() == "1,234 calls, 56k tokens"
    spending.charge("cheap", calls=1, prompt_tokens=2_460_000)
    assert spending.note() == "$1.23"


def test_an_account_is_opened_once():
    spending = Spending()
    assert [spending.open("a"), spending.open("b"), spending.open("a")] == [True, True, False]


def test_threads_lose_no_charge():
    spending = Spending()

    def charge():
        for _ in range(2000):
            spending.charge("m", calls=1, prompt_tokens=2)

    threads = [threading.Thread(target=charge) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert spending.totals()["m"]["calls"] == 8000
    assert spending.totals()["m"]["prompt_tokens"] == 16000

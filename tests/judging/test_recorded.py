"""The promise about payment: no reply that reached us is ever asked for again."""

import json
import os
import sqlite3
from contextlib import closing
from dataclasses import replace
from itertools import islice

import pytest

from ledgers import ledger_rows
from models.fake_server import FakeServer, Say, completion, error
from starling.base.errors import DataError, InputError, Stopped
from starling.base.spending import Price, Spending
from starling.data.records import Message
from starling.judging.recorded import Recorded
from starling.models import endpoint
from starling.models.interfaces import Failure, Reply, Request, Sampling, Usage


def request(text, id=None, seed=0):
    sampling = Sampling(max_tokens=9, temperature=1.0, seed=seed)
    return Request(id or text, (Message(role="user", content=text),), sampling)


USAGE = Usage(900, 50)


class Shop:
    """Sells replies, one at a time, and remembers what was bought."""

    def __init__(self, *, identity="shop", together=False, broken=(), ids=None):
        self.identity = identity
        self.commits_together = together
        self.broken = broken
        self.ids = ids
        self.bought = []

    def respond(self, requests):
        for each in requests:
            text = each.messages[-1].content
            self.bought.append(text)
            if text in self.broken:
                yield Failure(each.id, "out of order")
            else:
                yield Reply(each.id, f"{text}!", "stop", Usage(4, 2), self.ids)


def ask(shop, path, texts):
    with Recorded(shop, path) as recorded:
        outcomes = list(recorded.respond([request(text) for text in texts]))
        return outcomes, recorded.stats


@pytest.mark.parametrize("together", [False, True])
def test_a_reply_is_bought_once_and_comes_back_whole(tmp_path, together):
    path = tmp_path / "calls.sqlite"
    shop = Shop(together=together, ids=(3, 1, 4))
    first, stats = ask(shop, path, ["a", "b"])
    assert (stats.new, stats.from_ledger, stats.results()["answered"]) == (2, 0, 2)
    again, stats = ask(shop, path, ["b", "a", "c"])
    assert shop.bought == ["a", "b", "c"]
    assert {reply.request_id: reply for reply in again[:2]} == {
        reply.request_id: reply for reply in first
    }
    assert again[0] == Reply("b", "b!", "stop", Usage(4, 2), (3, 1, 4))
    assert (stats.new, stats.from_ledger) == (1, 2)
    assert (stats.prompt_tokens, stats.response_tokens) == (12, 6)


def test_a_recorded_reply_comes_under_todays_id(tmp_path):
    path = tmp_path / "calls.sqlite"
    ask(Shop(), path, ["a"])
    with Recorded(Shop(), path) as recorded:
        [reply] = recorded.respond([request("a", id="another")])
    assert reply.request_id == "another"
    assert reply.text == "a!"


def test_whatever_changes_the_call_makes_it_a_new_one(tmp_path):
    path = tmp_path / "calls.sqlite"
    ask(Shop(), path, ["a"])
    changed = [
        Request("a", request("a").messages, Sampling(9, 1.0, seed=1)),
        Request("a", request("a").messages, Sampling(9, 0.5, seed=0)),
        Request("a", request("a").messages, Sampling(8, 1.0, seed=0)),
        Request("a", request("a").messages, Sampling(9, 1.0, seed=0), mode="code"),
        Request("a", (Message(role="system", content="a"), *request("a").messages), Sampling(9)),
    ]
    for each in changed:
        shop = Shop()
        with Recorded(shop, path) as recorded:
            list(recorded.respond([each]))
        assert shop.bought == ["a"]
    other = Shop(identity="other")
    ask(other, path, ["a"])
    assert other.bought == ["a"]
    assert len(ledger_rows(path)) == 7


def test_the_same_question_twice_in_one_batch_is_two_calls_and_both_are_kept(tmp_path):
    path = tmp_path / "calls.sqlite"
    shop = Shop()
    for _ in range(2):
        with Recorded(shop, path) as recorded:
            list(recorded.respond([request("a", id="one"), request("a", id="two")]))
    assert shop.bought == ["a", "a"]


def test_a_question_put_again_later_is_the_same_call_wherever_a_run_was_killed(tmp_path):
    shop = Shop()
    with Recorded(shop, tmp_path / "calls.sqlite") as recorded:
        list(recorded.respond([request("a", id="step 10")]))
        list(recorded.respond([request("a", id="step 20")]))
    assert shop.bought == ["a"]


def test_failures_are_kept_and_asked_again_by_the_next_run(tmp_path):
    path = tmp_path / "calls.sqlite"
    outcomes, stats = ask(Shop(broken={"b"}), path, ["a", "b"])
    assert outcomes[1] == Failure("b", "out of order")
    assert (stats.failed, stats.new) == (1, 1)
    assert {row["request_id"]: row["state"] for row in ledger_rows(path)} == {
        "a": "answered",
        "b": "failed",
    }
    shop = Shop()
    ask(shop, path, ["a", "b"])
    assert shop.bought == ["b"]
    assert {row["state"] for row in ledger_rows(path)} == {"answered"}
    assert {row["reason"] for row in ledger_rows(path)} == {None}


def killed_after(num_replies, path, texts, *, together=False):
    """Run in a child that dies, without any clean-up, once it holds so many replies."""

    class Deadly(Shop):
        def respond(self, requests):
            # Three are in flight at once, as with an endpoint.
            flying, source = [], iter(requests)
            for number in range(len(texts) + 1):
                flying += islice(source, 3 - len(flying))
                if number == num_replies:
                    os._exit(9)
                each = flying.pop(0)
                yield Reply(each.id, f"{each.messages[-1].content}!", "stop", Usage(4, 2))

    child = os.fork()
    if child == 0:
        ask(Deadly(together=together), path, texts)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_killed_run_pays_again_only_for_what_was_in_flight(tmp_path):
    path, texts = tmp_path / "calls.sqlite", list("abcdefgh")
    killed_after(4, path, texts)
    states = {row["request_id"]: row["state"] for row in ledger_rows(path)}
    assert states == dict.fromkeys("abcd", "answered") | dict.fromkeys("efg", "sent")

    shop = Shop()
    with Recorded(shop, path) as recorded:
        assert recorded.stats.unknown == 3
        states = {row["request_id"]: row["state"] for row in ledger_rows(path)}
        assert states == dict.fromkeys("abcd", "answered") | dict.fromkeys("efg", "unknown")
        replies = list(recorded.respond([request(text) for text in texts]))
    assert sorted(shop.bought) == list("efgh")
    assert sorted(reply.text for reply in replies) == [f"{text}!" for text in texts]
    assert [row["times"] for row in ledger_rows(path, "lost")] == [1, 1, 1]


def test_what_is_lost_twice_is_listed_and_charged_twice(tmp_path):
    path, texts = tmp_path / "calls.sqlite", list("abc")
    for _ in range(2):
        killed_after(0, path, texts)
    spending = Spending()
    with Recorded(Shop(), path, spending=spending, model="m"):
        assert [row["times"] for row in ledger_rows(path, "lost")] == [2, 2, 2]
        assert spending.totals()["m"]["calls"] == 6


def test_a_killed_and_resumed_ledger_equals_one_that_was_never_interrupted(tmp_path):
    texts = list("abcdefgh")
    killed_after(4, tmp_path / "killed.sqlite", texts)
    ask(Shop(), tmp_path / "killed.sqlite", texts)
    ask(Shop(), tmp_path / "whole.sqlite", texts)
    assert ledger_rows(tmp_path / "killed.sqlite") == ledger_rows(tmp_path / "whole.sqlite")


def test_a_killed_local_batch_leaves_nothing_and_is_asked_whole(tmp_path):
    path, texts = tmp_path / "calls.sqlite", list("abcd")
    killed_after(2, path, texts, together=True)
    assert ledger_rows(path) == []
    shop = Shop(together=True)
    ask(shop, path, texts)
    assert shop.bought == texts


def test_each_single_reply_is_on_disk_before_the_next_is_taken(tmp_path):
    path = tmp_path / "calls.sqlite"
    with Recorded(Shop(), path) as recorded:
        outcomes = recorded.respond([request("a"), request("b")])
        next(outcomes)
        assert [row["state"] for row in ledger_rows(path)] == ["answered"]
        outcomes.close()


def test_candidates_and_judge_may_share_one_file(tmp_path):
    path = tmp_path / "calls.sqlite"
    with Recorded(Shop(identity="x"), path) as one, Recorded(Shop(identity="y"), path) as other:
        first = one.respond([request("a"), request("b")])
        next(first)
        list(other.respond([request("a")]))
        list(first)
    assert sorted(row["identity"] for row in ledger_rows(path)) == ["x", "x", "y"]


def test_opening_a_file_does_not_declare_another_responders_calls_lost(tmp_path):
    path = tmp_path / "calls.sqlite"

    class Opens(Shop):
        def respond(self, requests):
            for each in requests:
                Recorded(Shop(identity="late"), path).close()
                yield Reply(each.id, "x", "stop", Usage(0, 0))

    _, stats = ask(Opens(), path, ["a"])
    assert ledger_rows(path, "lost") == []
    assert stats.unknown == 0


def test_nothing_is_left_beside_the_ledger(tmp_path):
    path = tmp_path / "calls.sqlite"
    ask(Shop(), path, ["a"])
    ledger_rows(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["calls.sqlite"]


def test_two_requests_of_one_id_are_refused(tmp_path):
    with (
        Recorded(Shop(), tmp_path / "calls.sqlite") as recorded,
        pytest.raises(ValueError, match="'same'"),
    ):
        list(recorded.respond([request("a", id="same"), request("b", id="same")]))


def test_a_file_that_is_no_ledger_is_refused_and_stays(tmp_path):
    path = tmp_path / "calls.sqlite"
    path.write_text("my notes, which are long enough to be no database header at all" * 20)
    before = path.read_bytes()
    with pytest.raises(DataError, match="damaged"):
        Recorded(Shop(), path)
    assert path.read_bytes() == before


def test_a_ledger_of_another_version_is_refused(tmp_path):
    path = tmp_path / "calls.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(DataError, match="99"):
        Recorded(Shop(), path)


def test_rows_hold_no_clock(tmp_path):
    ask(Shop(), tmp_path / "one.sqlite", ["a", "b"])
    ask(Shop(), tmp_path / "two.sqlite", ["a", "b"])
    rows = ledger_rows(tmp_path / "one.sqlite")
    assert rows == ledger_rows(tmp_path / "two.sqlite")
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)


class Crowd(Shop):
    """Has eight calls in flight, like an endpoint: takes the next request when one has ended."""

    def __init__(self, usage=USAGE, **options):
        super().__init__(**options)
        self.usage = usage

    def respond(self, requests):
        flying, source = [], iter(requests)
        while flying := [*flying, *islice(source, 8 - len(flying))]:
            each = flying.pop(0)
            self.bought.append(each.messages[-1].content)
            yield Reply(each.id, "x", "stop", self.usage, seconds=1.5)


def buy(shop, path, number, spending, model="m"):
    """Ask so many questions; the outcomes, and what ended it."""
    outcomes = []
    with Recorded(shop, path, spending=spending, model=model) as recorded:
        try:
            for outcome in recorded.respond([request(f"q{n}") for n in range(number)]):
                outcomes.append(outcome)
        except InputError as error:
            return outcomes, str(error)
    return outcomes, None


# A reply of 900 tokens read and 50 written costs a tenth of a cent.
PRICES = {"m": Price(input=1.0, output=2.0)}


@pytest.mark.parametrize(
    ("cap", "words"),
    [
        ({"max_calls": 20}, "max_calls is 20, and 20 calls have ended"),
        ({"max_usd": 0.02}, "max_usd is $0.02, and $0.02 are spent"),
        ({"max_tokens": 19_000}, "max_tokens is 19,000, and 19,000 tokens were used"),
    ],
)
def test_a_cap_is_kept_within_the_calls_in_flight_and_what_they_bring_is_kept(tmp_path, cap, words):
    path = tmp_path / "calls.sqlite"
    spending = Spending(PRICES, **cap)
    shop = Crowd()
    outcomes, said = buy(shop, path, 100, spending)
    assert words in said
    assert str(path) in said
    assert "--run.max-usd, --run.max-calls, --run.max-tokens" in said
    # The twentieth fills the cap; the seven others in flight by then are waited for.
    assert len(outcomes) == len(shop.bought) == 27
    assert spending.totals()["m"]["calls"] == 27
    assert {row["state"] for row in ledger_rows(path)} == {"answered"}
    assert len(ledger_rows(path)) == 27


def test_a_raised_cap_goes_on_where_the_lower_one_ended(tmp_path):
    path = tmp_path / "calls.sqlite"
    buy(Crowd(), path, 100, Spending(max_calls=20))
    shop, spending = Crowd(), Spending(max_calls=20)
    outcomes, said = buy(shop, path, 100, spending)
    assert "27 calls have ended" in said  # an earlier run's calls count
    assert shop.bought == []
    assert len(outcomes) == 27
    shop, spending = Crowd(), Spending(max_calls=101)
    outcomes, said = buy(shop, path, 100, spending)
    assert said is None
    assert len(outcomes) == 100
    assert len(shop.bought) == 73
    assert spending.totals()["m"]["calls"] == 100


def test_a_cap_that_the_last_call_fills_ends_nothing(tmp_path):
    outcomes, said = buy(Crowd(), tmp_path / "calls.sqlite", 20, Spending(max_calls=20))
    assert (len(outcomes), said) == (20, None)


def test_a_local_model_is_free_even_when_the_caps_are_reached(tmp_path):
    spending = Spending(max_calls=1)
    spending.charge("m", calls=1)
    outcomes, said = buy(Shop(together=True), tmp_path / "calls.sqlite", 3, spending, model=None)
    assert (len(outcomes), said) == (3, None)
    assert spending.totals()["m"]["calls"] == 1
    assert outcomes[0].usd is None


def test_replies_say_what_they_cost_and_how_long_they_took_also_from_the_ledger(tmp_path):
    path = tmp_path / "calls.sqlite"
    for _ in range(2):
        [reply], _ = buy(Crowd(), path, 1, Spending(PRICES))
        assert reply.usd == pytest.approx(0.001)
        assert reply.seconds == 1.5
    assert [row["seconds"] for row in ledger_rows(path, "timing")] == [1.5]


@pytest.mark.parametrize("usage", [Usage(0, 50), Usage(900, 0)])
def test_replies_without_a_count_end_a_run_whose_cap_needs_it(tmp_path, usage):
    path = tmp_path / "calls.sqlite"
    shop = Crowd(usage)
    outcomes, said = buy(shop, path, 100, Spending(max_tokens=10**9))
    assert "does not say how many tokens" in said
    assert "--run.max-calls" in said
    assert len(outcomes) == 8  # what was in flight is kept
    with pytest.raises(InputError, match="max_tokens cannot be kept"):
        Recorded(Shop(), path, spending=Spending(max_tokens=10**9), model="m")
    _, said = buy(shop, path, 100, Spending(max_calls=100))
    assert said is None


def test_a_cap_in_dollars_on_a_model_without_a_price_is_refused_before_any_call(tmp_path):
    with pytest.raises(InputError, match=r"no price of 'other'.*max-calls"):
        Recorded(
            Shop(), tmp_path / "c.sqlite", spending=Spending(PRICES, max_usd=1.0), model="other"
        )


class Stumbling(Shop):
    """Every call fails twice; some never succeed."""

    def respond(self, requests):
        for each in super().respond(requests):
            yield replace(each, failed_attempts=("busy", "reset"))


def test_every_attempt_stands_in_the_ledger_and_is_a_call(tmp_path):
    path = tmp_path / "calls.sqlite"
    spending = Spending(PRICES)
    with Recorded(Stumbling(broken={"b"}), path, spending=spending, model="m") as recorded:
        list(recorded.respond([request("a"), request("b")]))
    names = {row["key"]: row["request_id"] for row in ledger_rows(path)}
    attempts = [
        (names[row["key"]], row["number"], row["reason"]) for row in ledger_rows(path, "attempts")
    ]
    assert sorted(attempts) == [
        ("a", 1, "busy"),
        ("a", 2, "reset"),
        ("b", 1, "busy"),
        ("b", 2, "reset"),
        ("b", 3, "out of order"),
    ]
    assert spending.totals()["m"]["calls"] == 6

    later = Spending(PRICES)
    with Recorded(Shop(), path, spending=later, model="m") as recorded:
        assert later.totals()["m"] == {
            "calls": 6,
            "prompt_tokens": 4,
            "response_tokens": 2,
            "usd": pytest.approx(8e-6),
        }
        list(recorded.respond([request("a"), request("b")]))
    assert later.totals()["m"]["calls"] == 7
    assert len(ledger_rows(path, "attempts")) == 5


def test_calls_that_were_lost_may_have_been_paid_for_and_are_charged(tmp_path):
    path = tmp_path / "calls.sqlite"
    killed_after(4, path, list("abcdefgh"))
    spending = Spending()
    with Recorded(Shop(), path, spending=spending, model="m"):
        assert spending.totals()["m"]["calls"] == 4 + 3
        assert spending.totals()["m"]["prompt_tokens"] == 4 * 4


def test_one_ledger_opened_twice_in_a_run_is_charged_once(tmp_path):
    path = tmp_path / "calls.sqlite"
    spending = Spending()
    for _ in range(3):
        buy(Crowd(), path, 5, spending)
    buy(Crowd(identity="other"), path, 5, spending)
    assert spending.totals()["m"]["calls"] == 10


@pytest.mark.parametrize("together", [False, True])
def test_the_watch_is_called_when_an_outcome_is_stored_and_may_stop(tmp_path, together):
    path = tmp_path / "calls.sqlite"
    seen = []

    def watch():
        seen.append(sum(row["state"] == "answered" for row in ledger_rows(path)))
        if len(seen) == 3:
            raise Stopped(2)

    with Recorded(Shop(together=together), path) as recorded:
        recorded.watch = watch
        with pytest.raises(Stopped):
            list(recorded.respond([request(text) for text in "abcde"]))
    assert seen == ([5, 5, 5] if together else [1, 2, 3])
    shop, seen = Shop(together=together), []
    with Recorded(shop, path) as recorded:
        recorded.watch = lambda: seen.append(0)
        list(recorded.respond([request(text) for text in "abcde"]))
    assert len(seen) == 5
    assert shop.bought == ([] if together else ["d", "e"])


def test_a_stop_leaves_what_was_in_flight_as_unknown(tmp_path):
    path = tmp_path / "calls.sqlite"

    def watch():
        raise Stopped(2)

    with Recorded(Crowd(), path) as recorded:
        recorded.watch = watch
        with pytest.raises(Stopped):
            list(recorded.respond([request(f"q{n}") for n in range(20)]))
    with Recorded(Crowd(), path) as recorded:
        assert recorded.stats.unknown == 7
    assert len(ledger_rows(path, "lost")) == 7


def test_an_endpoint_s_attempts_are_stored_as_they_fail_and_a_cap_ends_them(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECONDS", 0.01)
    path = tmp_path / "calls.sqlite"
    with FakeServer(lambda body, n: error(500, "oops")) as server:
        outcomes, said = buy(
            endpoint.Endpoint(server.url, "m", retries=4), path, 1, Spending(max_calls=3)
        )
    assert len(server.calls) == 3
    assert "max_calls is 3, and 3 calls have ended" in said
    assert isinstance(outcomes[0], Failure)
    assert len(ledger_rows(path, "attempts")) == 3
    assert all("500" in row["reason"] for row in ledger_rows(path, "attempts"))


def test_attempts_of_a_call_that_a_stop_cuts_off_stand_in_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECONDS", 0.01)
    path = tmp_path / "calls.sqlite"
    found = []

    def script(body, n):
        if n == 2:
            found.extend(ledger_rows(path, "attempts"))
        return error(500, "oops") if n < 2 else Say(completion("hi"))

    with FakeServer(script) as server:
        [reply], _ = buy(endpoint.Endpoint(server.url, "m"), path, 1, Spending())
    assert len(found) == len(reply.failed_attempts) == 2
    assert ledger_rows(path, "attempts") == found


def test_a_ledger_of_before_the_attempts_were_kept_still_opens(tmp_path):
    path = tmp_path / "calls.sqlite"
    ask(Shop(), path, ["a"])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE attempts")
        connection.execute("DROP TABLE timing")
        connection.execute("DROP TABLE likely")
        connection.commit()
    shop = Shop()
    outcomes, _ = ask(shop, path, ["a", "b"])
    assert shop.bought == ["b"]
    assert outcomes[0].seconds is None


def test_top_logprobs_are_bought_once_and_come_back_as_they_were(tmp_path):
    path = tmp_path / "calls.sqlite"
    given = ({"m": -0.1, " M": -2.5}, {"\u00e9\u4e16": -9999.0})

    class Likely(Shop):
        def respond(self, requests):
            for each in super().respond(requests):
                yield replace(each, top_logprobs=given)

    asked_for = Request("a", request("a").messages, Sampling(9, 1.0, seed=0, top_logprobs=5))
    shop, other = Likely(), Likely()
    found = []
    for each in (shop, other):
        with Recorded(each, path) as recorded:
            found += recorded.respond([asked_for])
    assert (shop.bought, other.bought) == (["a"], [])
    assert [reply.top_logprobs for reply in found] == [given, given]
    # A reply that was bought without them cannot stand for one with them.
    with Recorded(other, path) as recorded:
        list(recorded.respond([request("a")]))
    assert other.bought == ["a"]


def refused(body, n):
    said = json.loads(completion(""))
    said["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "No."}
    return Say(json.dumps(said))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            lambda body, n: Say(completion("", finish_reason="length")),
            "the reply is empty (cut at 9 tokens)",
        ),
        (
            lambda body, n: Say(completion("half", finish_reason="content_filter")),
            "the reply ended with finish_reason 'content_filter'",
        ),
        (refused, "the model refused: No."),
    ],
)
def test_an_answer_that_is_no_reply_is_paid_for_once_and_stays_the_same_failure(
    tmp_path, script, reason
):
    path = tmp_path / "calls.sqlite"
    with FakeServer(script) as server:
        judge = endpoint.Endpoint(server.url, "m")
        for _ in range(3):
            spending = Spending(max_tokens=1000)
            outcomes, said = buy(judge, path, 2, spending)
            assert (sorted(each.request_id for each in outcomes), said) == (["q0", "q1"], None)
            assert [each.reason for each in outcomes] == [reason] * 2
            assert all(isinstance(each, Failure) for each in outcomes)
            # Ten tokens each: seven read, three written.
            counted = {"calls": 2, "prompt_tokens": 14, "response_tokens": 6, "usd": None}
            assert spending.totals()["m"] == counted
    assert len(server.calls) == 2
    assert [(row["state"], row["text"], row["reason"]) for row in ledger_rows(path)] == [
        ("answered", None, reason)
    ] * 2
    assert ledger_rows(path, "attempts") == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (lambda body, n: Say("<html>busy</html>"), "no chat completion"),
        (lambda body, n: error(400, "too long"), "answered 400"),
    ],
)
def test_what_is_no_answer_of_a_model_is_asked_again_by_the_next_run(tmp_path, script, reason):
    path = tmp_path / "calls.sqlite"
    with FakeServer(script) as server:
        for _ in range(2):
            [outcome], _ = buy(endpoint.Endpoint(server.url, "m"), path, 1, Spending())
            assert reason in outcome.reason
    assert len(server.calls) == 2
    assert [row["state"] for row in ledger_rows(path)] == ["failed"]


def test_an_empty_answer_may_have_no_tokens_and_a_cap_on_tokens_is_kept(tmp_path):
    path = tmp_path / "calls.sqlite"
    said = completion("", finish_reason="length", response_tokens=0)
    with FakeServer(lambda body, n: Say(said)) as server:
        for _ in range(2):
            spending = Spending(max_tokens=1000)
            outcomes, end = buy(endpoint.Endpoint(server.url, "m"), path, 1, spending)
            assert (len(outcomes), end) == (1, None)
            assert spending.totals()["m"]["prompt_tokens"] == 7


def test_an_empty_answer_that_nobody_counted_ends_a_run_whose_cap_needs_it(tmp_path):
    said = completion("", finish_reason="length", prompt_tokens=0, response_tokens=0)
    path = tmp_path / "calls.sqlite"
    with FakeServer(lambda body, n: Say(said)) as server:
        judge = endpoint.Endpoint(server.url, "m")
        _, end = buy(judge, path, 1, Spending(max_tokens=1000))
        assert "does not say how many tokens" in end
        with pytest.raises(InputError, match="max_tokens cannot be kept"):
            Recorded(judge, path, spending=Spending(max_tokens=1000), model="m")


def test_what_an_older_program_kept_as_failed_with_its_tokens_is_charged_and_asked_again(tmp_path):
    path = tmp_path / "calls.sqlite"
    ask(Shop(broken={"a"}), path, ["a"])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE attempts SET prompt_tokens = 7, response_tokens = 3")
        connection.commit()
    shop, spending = Shop(), Spending()
    with Recorded(shop, path, spending=spending, model="m") as recorded:
        list(recorded.respond([request("a")]))
    assert shop.bought == ["a"]
    counted = {"calls": 2, "prompt_tokens": 7 + 4, "response_tokens": 3 + 2, "usd": None}
    assert spending.totals()["m"] == counted

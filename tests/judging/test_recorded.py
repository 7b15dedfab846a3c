"""The promise about payment: no reply that reached us is ever asked for again."""

import os
import sqlite3
from itertools import islice

import pytest

from ledgers import ledger_rows
from starling.base.errors import DataError
from starling.data.records import Message
from starling.judging.recorded import Recorded
from starling.models.interfaces import Failure, Reply, Request, Sampling, Usage


def request(text, id=None, seed=0):
    sampling = Sampling(max_tokens=9, temperature=1.0, seed=seed)
    return Request(id or text, (Message(role="user", content=text),), sampling)


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

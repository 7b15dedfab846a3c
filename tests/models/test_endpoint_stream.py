"""Streamed answers over real HTTP: what is shown is the answer, and what breaks is a Failure."""

import asyncio
import signal
import subprocess
import sys
import time

import pytest
from fake_server import FakeServer, Say, completion, error, event, stream

from starling.base.errors import InputError
from starling.data.records import Message
from starling.models import endpoint as endpoint_module
from starling.models.endpoint import Endpoint
from starling.models.interfaces import (
    Failure,
    Reply,
    Request,
    Sampling,
    StreamingResponder,
    Usage,
)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT_SECONDS", 0.01)
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def request(**sampling):
    return Request("id", (Message(role="user", content="hello"),), Sampling(11, **sampling))


def read(stream):
    """The pieces of a generator and what it returns."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def stream_one(script, **options):
    with FakeServer(script) as server:
        endpoint = Endpoint(server.url, "m", **options)
        return *read(endpoint.stream(request())), server


def endless():
    while True:
        yield event({"choices": [{"delta": {"content": "more "}}]})
        time.sleep(0.01)


def then_silence():
    yield stream("one ")[0]
    time.sleep(1.0)


def test_an_endpoint_is_a_streaming_responder():
    assert isinstance(Endpoint("http://localhost:1/v1", "m"), StreamingResponder)


def test_pieces_come_one_by_one_and_their_sum_is_the_reply():
    pieces, reply, server = stream_one(lambda body, n: Say(pieces=stream("Hel", "lo \u00e9", "!")))
    assert pieces == ["Hel", "lo \u00e9", "!"]
    assert reply == Reply("id", "Hello \u00e9!", "stop", Usage(7, 3))
    assert server.calls[0]["stream"] is True
    assert server.calls[0]["stream_options"] == {"include_usage": True}


def test_a_piece_is_shown_before_the_next_is_written():
    written = []

    def pieces():
        for piece in stream("one ", "two"):
            written.append(piece)
            yield piece
            time.sleep(0.2)

    with FakeServer(lambda body, n: Say(pieces=pieces())) as server:
        answer = Endpoint(server.url, "m").stream(request())
        assert next(answer) == "one "
        assert len(written) == 1
        answer.close()


def test_a_server_that_does_not_count_leaves_the_usage_at_zero():
    _, reply, _ = stream_one(lambda body, n: Say(pieces=stream("hi", usage=None)))
    assert reply.usage == Usage(0, 0)


def test_the_end_that_was_said_stays_said():
    filtered = event({"choices": [{"delta": {}, "finish_reason": None}]})
    _, reply, _ = stream_one(lambda body, n: Say(pieces=[*stream("hi")[:2], filtered]))
    assert reply == Reply("id", "hi", "stop", Usage(0, 0))


def test_an_answer_cut_at_the_limit_says_so():
    _, reply, _ = stream_one(lambda body, n: Say(pieces=stream("hi", finish_reason="length")))
    assert reply.finish_reason == "length"


def test_closing_the_generator_closes_the_connection():
    with FakeServer(lambda body, n: Say(pieces=endless())) as server:
        answer = Endpoint(server.url, "m").stream(request())
        assert [next(answer), next(answer)] == ["more ", "more "]
        assert not server.saw_close.is_set()
        answer.close()
        assert server.saw_close.wait(5)


def test_ctrl_c_between_two_pieces_ends_the_answer_and_not_the_program():
    program = """
import sys
from starling.data.records import Message
from starling.models.endpoint import Endpoint
from starling.models.interfaces import Request, Sampling

answer = Endpoint(sys.argv[1], "m").stream(
    Request("id", (Message(role="user", content="hello"),), Sampling(9))
)
try:
    for piece in answer:
        print(piece, flush=True)
except KeyboardInterrupt:
    answer.close()
    print("interrupted")
"""
    with FakeServer(lambda body, n: Say(pieces=endless())) as server:
        command = [sys.executable, "-c", program, server.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "more \n"
            process.send_signal(signal.SIGINT)
            shown, _ = process.communicate(timeout=20)
            assert server.saw_close.wait(5)
    assert shown.endswith("interrupted\n")
    assert process.returncode == 0


@pytest.mark.parametrize("finish_reason", [None, "content_filter"])
def test_a_stream_that_ends_in_no_known_way_is_a_failure(finish_reason):
    pieces, outcome, server = stream_one(
        lambda body, n: Say(pieces=stream("half an", finish_reason=finish_reason))
    )
    assert pieces == ["half an"]
    assert isinstance(outcome, Failure)
    assert "finish_reason" in outcome.reason
    assert len(server.calls) == 1


def test_a_connection_that_breaks_in_the_middle_is_a_failure_and_not_asked_again():
    pieces, outcome, server = stream_one(
        lambda body, n: Say(pieces=stream("one ", "two")[:2], cut=True)
    )
    assert "".join(pieces) == "one two"[: len("".join(pieces))]
    assert isinstance(outcome, Failure)
    assert "the connection broke" in outcome.reason
    assert "after" in outcome.reason
    assert len(server.calls) == 1


def test_a_connection_that_breaks_before_the_first_piece_is_tried_again():
    pieces, outcome, server = stream_one(
        lambda body, n: Say(pieces=stream("", "hi")[: 1 if n == 0 else None], cut=n == 0)
    )
    assert pieces == ["hi"]
    assert isinstance(outcome, Reply)
    assert len(server.calls) == 2


def test_a_connection_that_breaks_after_the_end_of_the_answer_leaves_it_whole():
    _, outcome, _ = stream_one(lambda body, n: Say(pieces=stream("hi")[:2], cut=True))
    assert outcome == Reply("id", "hi", "stop", Usage(0, 0))


def test_a_server_error_is_tried_again_before_the_first_piece():
    pieces, outcome, server = stream_one(
        lambda body, n: error(500, "oops") if n == 0 else Say(pieces=stream("hi"))
    )
    assert pieces == ["hi"]
    assert isinstance(outcome, Reply)
    assert len(server.calls) == 2


def test_silence_in_the_middle_is_a_failure():
    pieces, outcome, server = stream_one(
        lambda body, n: Say(pieces=then_silence()), timeout_seconds=0.3
    )
    assert pieces == ["one "]
    assert isinstance(outcome, Failure)
    assert "0.3 s" in outcome.reason
    assert len(server.calls) == 1


def test_an_answer_may_take_longer_than_the_limit_as_long_as_pieces_come():
    def slow():
        for piece in stream(*"abcdefgh"):
            time.sleep(0.1)
            yield piece

    pieces, outcome, _ = stream_one(lambda body, n: Say(pieces=slow()), timeout_seconds=0.6)
    assert pieces == list("abcdefgh")
    assert isinstance(outcome, Reply)


@pytest.mark.parametrize(
    "garbage",
    [
        event("<html>"),
        event('{"choices": [{"delta": {"con'),
        event("[]"),
        "event: ping\n\n",
        event("null"),
        event({"choices": [{"delta": {"content": 5}}]}),
        event('{"choices": [{"delta": {"content": "half \\ud800"}}]}'),
    ],
)
@pytest.mark.parametrize("before", [[], stream("one ")[:1]])
def test_a_stream_of_something_else_is_a_failure_at_once(garbage, before):
    pieces, outcome, server = stream_one(
        lambda body, n: Say(pieces=[*before, garbage, *stream("two")])
    )
    assert pieces == ["one "][: len(before)]
    assert isinstance(outcome, Failure)
    assert "no chat completion" in outcome.reason
    assert len(server.calls) == 1


@pytest.mark.parametrize("body", ["", "hello\n\n", "data"])
def test_a_body_without_events_is_a_failure(body):
    kind = {"Content-Type": "text/event-stream"}
    pieces, outcome, server = stream_one(lambda _, n: Say(body, headers=kind))
    assert pieces == []
    assert isinstance(outcome, Failure)
    assert "without a finish_reason" in outcome.reason
    assert len(server.calls) == 1


def test_a_server_that_does_not_stream_answers_all_at_once():
    pieces, outcome, _ = stream_one(lambda _, n: Say(completion("hi", finish_reason="length")))
    assert pieces == ["hi"]
    assert outcome == Reply("id", "hi", "length", Usage(7, 3), served_by="m")


def test_events_under_another_name_are_read():
    script = stream("Hel", "lo")
    kind = {"Content-Type": "application/json"}
    pieces, outcome, _ = stream_one(lambda _, n: Say(pieces=script, headers=kind))
    assert pieces == ["Hel", "lo"]
    assert outcome == Reply("id", "Hello", "stop", Usage(7, 3))


def test_a_web_page_is_a_failure_that_shows_how_it_begins():
    page = Say("<html>Welcome to nginx!</html>", headers={"Content-Type": "text/html"})
    pieces, outcome, server = stream_one(lambda _, n: page)
    assert pieces == []
    assert "<html>Welcome to nginx!" in outcome.reason
    assert len(server.calls) == 1


def test_a_body_that_breaks_off_is_asked_for_again():
    pieces, _, server = stream_one(lambda _, n: Say(completion("hi"), cut=n == 0))
    assert pieces == ["hi"]
    assert len(server.calls) == 2


def test_an_end_in_no_known_way_says_how_much_was_shown():
    script = stream("one ", "two", finish_reason="content_filter")
    pieces, outcome, _ = stream_one(lambda _, n: Say(pieces=script))
    assert pieces == ["one ", "two"]
    assert outcome.reason.endswith("finish_reason 'content_filter', after 7 characters")


def test_the_vendors_word_for_the_end_is_understood_and_usage_may_be_null():
    last = event({"choices": [], "usage": {"prompt_tokens": None, "completion_tokens": None}})
    script = [*stream("hi", finish_reason="eos_token", usage=None)[:-1], last, event("[DONE]")]
    _, outcome, _ = stream_one(lambda _, n: Say(pieces=script))
    assert outcome == Reply("id", "hi", "stop", Usage(0, 0))


def test_where_a_loop_runs_already_an_answer_streams_beside_it():
    async def notebook(answer):
        return read(answer)

    with FakeServer(lambda body, n: Say(pieces=stream("Hel", "lo"))) as server:
        answer = Endpoint(server.url, "m").stream(request())
        pieces, outcome = asyncio.run(notebook(answer))
    assert pieces == ["Hel", "lo"]
    assert outcome == Reply("id", "Hello", "stop", Usage(7, 3))


def test_an_error_in_the_stream_is_a_failure_with_the_servers_words():
    failed = event({"error": {"message": "out of memory", "code": 500}})
    pieces, outcome, _ = stream_one(lambda body, n: Say(pieces=[*stream("one ")[:1], failed]))
    assert pieces == ["one "]
    assert isinstance(outcome, Failure)
    assert "out of memory" in outcome.reason


def test_a_key_that_the_stream_repeats_is_not_shown(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    failed = event({"error": {"message": "sk-very-secret is out of money"}})
    _, outcome, _ = stream_one(lambda body, n: Say(pieces=[failed]), api_key_env="SOME_KEY")
    assert "*** is out of money" in outcome.reason


def test_an_empty_answer_is_a_failure():
    pieces, outcome, _ = stream_one(lambda body, n: Say(pieces=stream("", "")))
    assert pieces == []
    assert isinstance(outcome, Failure)
    assert "empty" in outcome.reason


def test_a_server_that_knows_no_stream_options_is_asked_without_them():
    def script(body, n):
        if "stream_options" in body:
            return error(400, "Unrecognized request argument supplied: stream_options")
        return Say(pieces=stream("hi"))

    with FakeServer(script) as server:
        endpoint = Endpoint(server.url, "m", retries=0)
        for _ in range(2):
            assert isinstance(read(endpoint.stream(request()))[1], Reply)
    assert ["stream_options" in call for call in server.calls] == [True, False, False]


def test_a_missing_model_is_said_before_anything_is_shown():
    with FakeServer(lambda body, n: error(404, "no such model")) as server:
        with pytest.raises(InputError, match="no model 'm'"):
            next(Endpoint(server.url, "m").stream(request()))
        assert len(server.calls) == 1


def test_a_refused_key_ends_the_stream_with_advice():
    with (
        FakeServer(lambda body, n: error(401, "no key")) as server,
        pytest.raises(InputError, match="api_key_env"),
    ):
        next(Endpoint(server.url, "m").stream(request()))


def test_a_server_that_is_not_there_is_a_failure_after_the_retries():
    with FakeServer(lambda body, n: Say()) as server:
        url = server.url
    pieces, outcome = read(Endpoint(url, "m", retries=1).stream(request()))
    assert pieces == []
    assert "2 attempts" in outcome.reason

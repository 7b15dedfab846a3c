"""An endpoint against a real HTTP server that misbehaves in every way we know of."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
from fake_server import FakeServer, Say, asked, completion, error, raw_completion, untimed

from starling.base.errors import InputError
from starling.data.chat import build_codec
from starling.data.records import Message
from starling.models import endpoint as endpoint_module
from starling.models import loop as loop_module
from starling.models.endpoint import Endpoint
from starling.models.interfaces import Failure, Reply, Request, Sampling, Usage
from tiny import tiny_tokenizer

HTML = {"Content-Type": "text/html"}
REFUSAL = {"finish_reason": "stop"}


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT_SECONDS", 0.01)
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def request(text="hello", id=None, mode=None):
    messages = (
        Message(role="system", content="be brief"),
        Message(role="user", content=text),
    )
    sampling = Sampling(max_tokens=11, temperature=0.25, seed=2**62 + 5)
    return Request(id or text, messages, sampling, mode)


def ask_one(script, **options):
    with FakeServer(script) as server:
        [outcome] = Endpoint(server.url, "m", **options).respond([request()])
    return untimed(outcome), server


def test_a_reply_carries_text_usage_and_finish_reason():
    outcome, server = ask_one(lambda body, n: Say(completion("hi", finish_reason="length")))
    assert outcome == Reply("hello", "hi", "length", Usage(7, 3), served_by="m")
    [call] = server.calls
    assert call.pop("path") == "/v1/chat/completions"
    assert call == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hello"},
        ],
        "temperature": 0.25,
        "max_tokens": 11,
        "seed": 5,
    }


def likely(*places):
    """Logprobs as chat completions hold them."""
    content = [
        {
            "token": "m",
            "logprob": 0.0,
            "bytes": [109],
            "top_logprobs": [
                {"token": text, "logprob": logprob, "bytes": None} for text, logprob in place
            ],
        }
        for place in places
    ]
    return {"content": content, "refusal": None}


def said_with(logprobs):
    body = json.loads(completion("m", finish_reason="length"))
    body["choices"][0]["logprobs"] = logprobs
    return Say(json.dumps(body))


def ask_with(sampling, script):
    with FakeServer(script) as server:
        asked_for = Request("one", request().messages, sampling)
        [outcome] = Endpoint(server.url, "m").respond([asked_for])
    return outcome, server.calls[0]


def test_top_logprobs_are_asked_for_and_come_with_the_reply():
    found = likely([("m", -0.25), ("M", -1.5)], [("x", -9999.0)])
    outcome, call = ask_with(Sampling(1, 0.0, top_logprobs=5), lambda body, n: said_with(found))
    assert (call["logprobs"], call["top_logprobs"]) == (True, 5)
    assert outcome.top_logprobs == ({"m": -0.25, "M": -1.5}, {"x": -9999.0})
    assert (outcome.text, outcome.finish_reason) == ("m", "length")


def test_top_logprobs_that_were_not_asked_for_are_not_kept():
    found = likely([("m", -0.25)])
    outcome, call = ask_with(Sampling(1, 0.0), lambda body, n: said_with(found))
    assert not {"logprobs", "top_logprobs"} & set(call)
    assert outcome.top_logprobs is None


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        "none",
        {"content": None},
        {"content": []},
        {"content": [{"token": "m", "logprob": -0.1}]},
        {"content": [{"top_logprobs": [{"token": "m", "logprob": "high"}]}]},
    ],
)
def test_logprobs_in_no_known_shape_are_none_and_the_reply_stays(found):
    sampling = Sampling(1, 0.0, top_logprobs=5)
    outcome, _ = ask_with(sampling, lambda body, n: said_with(found))
    assert (outcome.text, outcome.top_logprobs) == ("m", None)


def test_raw_completions_have_top_logprobs_in_another_shape():
    codec = build_codec("openchat", tiny_tokenizer(), [])
    found = {"tokens": [" m"], "token_logprobs": [-0.2], "top_logprobs": [{" m": -0.2, "x": -3.0}]}
    asked_for = Request("one", request().messages, Sampling(1, 0.0, top_logprobs=4))
    with FakeServer(lambda body, n: Say(raw_completion(" m", logprobs=found))) as server:
        [outcome] = Endpoint(server.url, "m", codec=codec).respond([asked_for])
    assert server.calls[0]["logprobs"] == 4
    assert "top_logprobs" not in server.calls[0]
    assert outcome.top_logprobs == ({" m": -0.2, "x": -3.0},)


def test_a_rate_limit_is_waited_out_for_as_long_as_the_server_says():
    limited = error(429, "slow down", headers={"Retry-After": "0.4"})
    outcome, server = ask_one(lambda body, n: limited if n == 0 else Say(completion("hi")))
    assert isinstance(outcome, Reply)
    assert server.times[1] - server.times[0] >= 0.4


def test_a_rate_limit_without_a_time_is_waited_out_longer_each_time(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT_SECONDS", 0.2)
    limited = error(429, "slow down")
    outcome, server = ask_one(lambda body, n: limited if n < 2 else Say(completion("hi")))
    assert isinstance(outcome, Reply)
    # A wait is between half of its nominal length and all of it.
    assert server.times[1] - server.times[0] >= 0.1
    assert server.times[2] - server.times[1] >= 0.2
    assert all("429" in reason for reason in outcome.failed_attempts)


def test_a_reply_says_how_long_it_took_and_which_attempts_failed_before():
    def script(body, n):
        return error(500, f"oops {n}") if n < 2 else Say(completion("hi"), delay_seconds=0.2)

    with FakeServer(script) as server:
        [reply] = Endpoint(server.url, "m").respond([request()])
    assert 0.2 <= reply.seconds < server.times[2] - server.times[0] + 5.0
    assert [reason.rpartition(" ")[2] for reason in reply.failed_attempts] == ["0", "1"]


def test_a_failure_says_which_attempts_failed_before_its_last():
    outcome, _ = ask_one(lambda body, n: error(500, f"oops {n}"), retries=2)
    assert "oops 2 (3 attempts)" in outcome.reason
    assert [reason.rpartition(" ")[2] for reason in outcome.failed_attempts] == ["0", "1"]


def test_leave_is_asked_before_an_attempt_is_repeated():
    told = []

    def may_retry(request, reason):
        told.append((request.id, reason.rpartition(" ")[2], len(server.calls)))
        return len(told) < 2

    with FakeServer(lambda body, n: error(500, f"oops {n}")) as server:
        [outcome] = Endpoint(server.url, "m").respond([request()], may_retry)
    assert told == [("hello", "0", 1), ("hello", "1", 2)]
    assert isinstance(outcome, Failure)
    assert len(outcome.failed_attempts) == 1
    assert len(server.calls) == 2


def test_calls_go_on_while_the_caller_does_something_else():
    def script(body, n):
        return error(500, "oops") if asked(body) == "b" and n < 3 else Say(completion("hi"))

    with FakeServer(script) as server:
        outcomes = Endpoint(server.url, "m", concurrency=2).respond([request("a"), request("b")])
        assert next(outcomes).request_id == "a"
        end = time.monotonic() + 10
        while len(server.calls) < 5 and time.monotonic() < end:
            time.sleep(0.01)  # the caller's thread, in which no loop runs
        assert [asked(call) for call in server.calls].count("b") == 4
        assert next(outcomes).text == "hi"


def test_a_wait_of_hours_is_a_failure_at_once():
    limited = error(429, "daily limit", headers={"Retry-After": "7200"})
    outcome, server = ask_one(lambda body, n: limited)
    assert isinstance(outcome, Failure)
    assert "daily limit" in outcome.reason
    assert len(server.calls) == 1


def test_server_errors_are_tried_again_as_often_as_allowed_and_then_fail():
    outcome, server = ask_one(lambda body, n: error(500, "oops"), retries=3)
    assert isinstance(outcome, Failure)
    assert "500" in outcome.reason
    assert "oops" in outcome.reason
    assert len(server.calls) == 4


def test_a_cut_connection_is_tried_again():
    outcome, server = ask_one(lambda body, n: Say(completion("hi"), cut=n == 0))
    assert isinstance(outcome, Reply)
    assert len(server.calls) == 2


def test_a_reset_connection_is_tried_again_and_said_to_have_broken():
    outcome, server = ask_one(lambda body, n: Say(reset=True), retries=1)
    assert isinstance(outcome, Failure)
    assert "the connection broke" in outcome.reason
    assert len(server.calls) == 2


def test_a_server_that_does_not_speak_http_is_a_failure_after_the_retries():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def speak():
            for _ in range(2):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"220 mail.example.org ESMTP\r\n\r\n")

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        [outcome] = Endpoint(url, "m", retries=1).respond([request()])
        thread.join()
    assert isinstance(outcome, Failure)
    assert "the connection broke" in outcome.reason
    assert "2 attempts" in outcome.reason


def test_a_call_that_takes_too_long_is_tried_again_and_then_fails():
    outcome, server = ask_one(
        lambda body, n: Say(completion("hi"), delay_seconds=0.6), timeout_seconds=0.15, retries=1
    )
    assert isinstance(outcome, Failure)
    assert "0.15 s" in outcome.reason
    assert len(server.calls) == 2


def test_a_server_that_is_not_there_is_a_failure_after_the_retries():
    with FakeServer(lambda body, n: Say()) as server:
        url = server.url
    [outcome] = Endpoint(url, "m", retries=2).respond([request()])
    assert isinstance(outcome, Failure)
    assert "3 attempts" in outcome.reason


@pytest.mark.parametrize(
    "body",
    [
        "<html>welcome</html>",
        "",
        "[]",
        completion("half a reply")[:-40],
        '{"choices": []}',
        '{"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}',
        '{"choices": [{"message": {"content": "half \\ud800"}, "finish_reason": "stop"}]}',
    ],
)
def test_a_body_that_is_no_completion_is_a_failure_and_not_asked_again(body):
    outcome, server = ask_one(lambda _, n: Say(body))
    assert isinstance(outcome, Failure)
    assert "no chat completion" in outcome.reason
    assert len(server.calls) == 1


@pytest.mark.parametrize("text", ["", "  \n", None])
def test_an_empty_reply_is_a_failure(text):
    outcome, _ = ask_one(lambda body, n: Say(completion(text)))
    assert isinstance(outcome, Failure)
    assert "empty" in outcome.reason


def test_an_empty_reply_that_was_cut_says_at_which_length():
    outcome, _ = ask_one(lambda body, n: Say(completion("", finish_reason="length")))
    assert "cut at 11 tokens" in outcome.reason
    assert outcome.usage == Usage(7, 3)  # written where nobody sees it, and paid for


def test_a_refusal_is_a_failure_in_the_models_words_and_not_asked_again():
    choice = REFUSAL | {"message": {"content": None, "refusal": "I cannot judge that."}}
    outcome, server = ask_one(lambda body, n: Say(json.dumps({"choices": [choice]})))
    assert isinstance(outcome, Failure)
    assert outcome.reason == "the model refused: I cannot judge that."
    assert len(server.calls) == 1


@pytest.mark.parametrize("finish_reason", ["content_filter", "tool_calls", None])
def test_a_reply_that_ended_in_no_known_way_is_a_failure(finish_reason):
    outcome, _ = ask_one(lambda body, n: Say(completion("hi", finish_reason=finish_reason)))
    assert isinstance(outcome, Failure)
    assert str(finish_reason) in outcome.reason


@pytest.mark.parametrize(
    ("said", "meant"),
    [("eos_token", "stop"), ("end_turn", "stop"), ("eos", "stop"), ("STOP", "stop")]
    + [("max_tokens", "length"), ("MAX_TOKENS", "length"), ("model_length", "length")],
)
def test_other_words_for_the_end_of_a_reply_are_understood(said, meant):
    outcome, _ = ask_one(lambda body, n: Say(completion("hi", finish_reason=said)))
    assert outcome == Reply("hello", "hi", meant, Usage(7, 3), served_by="m")


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": None, "completion_tokens": 3}, Usage(0, 3)),
        ({"prompt_tokens": 7, "completion_tokens": "many"}, Usage(7, 0)),
        ({"prompt_tokens": -7, "completion_tokens": 0.5}, Usage(0, 0)),
        ({}, Usage(0, 0)),
        (5, Usage(0, 0)),
    ],
)
def test_a_count_that_is_none_does_not_cost_the_reply(usage, counted):
    body = json.dumps(json.loads(completion("hi")) | {"usage": usage})
    outcome, _ = ask_one(lambda _, n: Say(body))
    assert outcome == Reply("hello", "hi", "stop", counted, served_by="m")


@pytest.mark.parametrize(
    "script",
    [
        lambda body, n: error(400, "a\x1b]0;owned\x07\x9b2J\u202eb\ud800\x7f"),
        lambda body, n: Say("<html>a\x1b]0;owned\x07\x9b2J\u202eb\x7f", headers=HTML),
    ],
)
def test_a_servers_words_cannot_steer_the_terminal(script):
    outcome, _ = ask_one(script)
    assert "a\\x1b]0;owned\\x07\\x9b2J\\u202eb" in outcome.reason
    assert outcome.reason.isprintable()


def test_a_key_is_not_shown_wherever_the_server_repeats_it(monkeypatch):
    key = "sk-" + "s3cret" * 10
    monkeypatch.setenv("SOME_KEY", key)
    # At the end of what is shown, a part of the key would be a leak too.
    for script in (
        lambda body, n: error(400, "x" * 270 + key),
        lambda body, n: Say("x" * 270 + key),
        lambda body, n: Say(completion("hi", finish_reason=f"bad key {key}")),
        lambda body, n: Say(json.dumps({"choices": [REFUSAL | {"message": {"refusal": key}}]})),
    ):
        outcome, _ = ask_one(script, api_key_env="SOME_KEY")
        assert isinstance(outcome, Failure)
        assert "s3cret" not in outcome.reason
        assert "***" in outcome.reason


def test_where_a_loop_runs_already_requests_are_answered_beside_it():
    async def notebook():
        endpoint = Endpoint(server.url, "m", concurrency=2)
        outcomes = endpoint.respond(request(f"question {n}") for n in range(5))
        first = next(outcomes)
        await asyncio.sleep(0)
        return first, next(outcomes), outcomes

    with FakeServer(lambda body, n: Say(completion("hi"))) as server:
        first, second, outcomes = asyncio.run(notebook())
        found = [first, second, *outcomes]  # the others outside of any loop
    assert [outcome.text for outcome in found] == ["hi"] * 5


def test_what_is_asked_beside_a_loop_ends_with_it():
    async def notebook():
        outcomes = Endpoint(server.url, "m").respond([request("a"), request("b")])
        next(outcomes)
        outcomes.close()

    def script(body, n):
        return Say(completion("hi"), delay_seconds=5.0 if asked(body) == "b" else 0.0)

    with FakeServer(script) as server:
        start = time.monotonic()
        asyncio.run(notebook())
        assert time.monotonic() - start < 3.0
    assert not any("ThreadPool" in thread.name for thread in threading.enumerate())


def test_ctrl_c_ends_what_is_asked_beside_a_loop():
    program = """
import asyncio, sys
from starling.data.records import Message
from starling.models.endpoint import Endpoint
from starling.models.interfaces import Request, Sampling

async def notebook():
    asked = Request("id", (Message(role="user", content="hello"),), Sampling(9))
    for outcome in Endpoint(sys.argv[1], "m").respond([asked]):
        print(outcome)

loop = asyncio.new_event_loop()
try:
    loop.run_until_complete(notebook())
except KeyboardInterrupt:
    print("stopped")
"""
    with FakeServer(lambda body, n: Say(completion("hi"), delay_seconds=8.0)) as server:
        command = [sys.executable, "-c", program, server.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            while not server.calls:
                time.sleep(0.02)
            time.sleep(0.2)
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30)[0] == "stopped\n"
        assert time.monotonic() - start < 5.0


def test_a_refused_request_fails_at_once_with_the_servers_words():
    outcome, server = ask_one(lambda body, n: error(400, "context of 4096 exceeded"))
    assert isinstance(outcome, Failure)
    assert "context of 4096 exceeded" in outcome.reason
    assert len(server.calls) == 1


def test_a_wrong_key_ends_the_run_and_is_not_shown(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    with FakeServer(lambda body, n: error(401, "bad key sk-very-secret")) as server:
        endpoint = Endpoint(server.url, "m", api_key_env="SOME_KEY")
        with pytest.raises(InputError, match="SOME_KEY") as caught:
            list(endpoint.respond([request()]))
    assert server.url in str(caught.value)
    assert "sk-very-secret" not in str(caught.value)
    assert server.headers[0]["authorization"] == "Bearer sk-very-secret"


def test_a_missing_model_ends_the_run():
    with FakeServer(lambda body, n: error(404, "no such model")) as server:
        with pytest.raises(InputError, match="no model 'm'") as caught:
            list(Endpoint(server.url, "m").respond([request()]))
        assert server.url in str(caught.value)


def test_an_account_without_credit_ends_the_run_instead_of_waiting():
    with FakeServer(lambda body, n: error(429, "quota", code="insufficient_quota")) as server:
        with pytest.raises(InputError, match="credit"):
            list(Endpoint(server.url, "m").respond([request()]))
        assert len(server.calls) == 1


def test_a_server_that_wants_the_newer_name_of_the_limit_gets_it():
    def script(body, n):
        if "max_tokens" in body:
            return error(400, "use the other", code="unsupported_parameter", param="max_tokens")
        return Say(completion("hi"))

    outcome, server = ask_one(script)
    assert isinstance(outcome, Reply)
    assert server.calls[1]["max_completion_tokens"] == 11


def test_a_named_key_that_is_not_set_is_refused_before_any_call(monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(InputError, match="SOME_KEY"):
        Endpoint("http://localhost:1/v1", "m", api_key_env="SOME_KEY")


def test_the_environments_openai_account_is_not_told_to_a_server_without_a_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-mine")
    _, server = ask_one(lambda body, n: Say(completion("hi")))
    assert "mine" not in " ".join(server.headers[0].values())


def test_every_request_gets_one_outcome_and_no_more_are_in_flight_than_allowed():
    names = [f"question {n}" for n in range(12)]
    with FakeServer(
        lambda body, n: Say(completion(body["messages"][-1]["content"]), delay_seconds=0.05)
    ) as server:
        endpoint = Endpoint(server.url, "m", concurrency=3)
        outcomes = list(endpoint.respond(request(name) for name in names))
    assert sorted(outcome.request_id for outcome in outcomes) == sorted(names)
    assert all(outcome.text == outcome.request_id for outcome in outcomes)
    assert server.most_open == 3


def test_a_request_is_taken_only_when_there_is_room_for_its_call():
    taken = []

    def requests():
        for n in range(6):
            taken.append(n)
            yield request(f"question {n}")

    with (
        FakeServer(lambda body, n: Say(completion("hi"))) as server,
        closing(Endpoint(server.url, "m", concurrency=2).respond(requests())) as outcomes,
    ):
        next(outcomes)
        assert taken == [0, 1]
        next(outcomes)
        assert taken == [0, 1, 2]


def test_stopping_early_ends_the_calls_in_flight_and_the_thread():
    with FakeServer(
        lambda body, n: Say(completion("hi"), delay_seconds=0.0 if n == 0 else 5.0)
    ) as server:
        requests = [request("same", id="first"), request("same", id="second")]
        outcomes = Endpoint(server.url, "m").respond(requests)
        next(outcomes)
        start = time.monotonic()
        outcomes.close()
        assert time.monotonic() - start < 2.0
    assert "endpoint" not in {thread.name for thread in threading.enumerate()}


def test_a_program_that_dies_with_an_iterator_open_ends():
    program = """
import sys
from starling.data.records import Message
from starling.models.endpoint import Endpoint
from starling.models.interfaces import Request, Sampling

message = Message(role="user", content="hello")
requests = [Request(id, (message,), Sampling(9)) for id in "ab"]
outcomes = Endpoint(sys.argv[1], "m", concurrency=1).respond(requests)
next(outcomes)
raise LookupError("a bug")
"""
    with FakeServer(lambda body, n: Say(completion("hi"))) as server:
        command = [sys.executable, "-c", program, server.url]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert ended.stderr.endswith("LookupError: a bug\n")
    assert ended.stderr.count("Error") == 1
    assert "Unclosed" not in ended.stderr


@pytest.fixture
def file_limit(monkeypatch):
    """Plays a system's limits: set(soft, hard) begins, and what is set is kept in it."""

    class Limit:
        RLIMIT_NOFILE, RLIM_INFINITY = 7, -1
        limits = (0, 0)

        def getrlimit(self, which):
            assert which == self.RLIMIT_NOFILE
            return self.limits

        def setrlimit(self, which, limits):
            assert which == self.RLIMIT_NOFILE
            self.limits = limits

    limit = Limit()
    monkeypatch.setattr(loop_module, "resource", limit)
    return limit


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1024, 4096), (1064, 4096)),
        ((1024, -1), (1064, -1)),
        ((1064, 1064), (1064, 1064)),
        ((-1, -1), (-1, -1)),
    ],
)
def test_many_connections_raise_the_limit_of_open_files_as_far_as_needed(file_limit, before, after):
    file_limit.limits = before
    loop_module.allow_connections(1000)
    assert file_limit.limits == after


def test_more_connections_than_the_system_allows_are_refused_in_words(file_limit):
    file_limit.limits = (256, 512)
    with pytest.raises(InputError, match=r"1000 calls.*process 512.*concurrency to 448"):
        list(Endpoint("http://localhost:1/v1", "m", concurrency=1000).respond([request()]))
    assert file_limit.limits == (256, 512)


def test_where_there_is_no_such_limit_none_is_looked_for(monkeypatch):
    monkeypatch.setattr(loop_module, "resource", None)
    loop_module.allow_connections(10**6)


def test_the_identity_names_address_and_model():
    assert Endpoint("http://h:1/v1/", "m").identity == Endpoint("http://h:1/v1", "m").identity
    assert Endpoint("http://h:1/v1", "m").identity != Endpoint("http://h:1/v1", "n").identity


def test_a_mode_is_not_sent_and_a_warning_says_so(caplog):
    with FakeServer(lambda body, n: Say(completion("hi"))) as server:
        list(
            Endpoint(server.url, "m").respond(
                [request("a", mode="code"), request("b", mode="code")]
            )
        )
    assert all("mode" not in call for call in server.calls)
    assert sum("mode" in record.message for record in caplog.records) == 1

"""Which model a server serves, asked over real HTTP of servers that answer anything."""

import json

import pytest
from fake_server import FakeServer, Say, error

from starling.base.errors import InputError
from starling.serve.find import only_served_model

ADVICE = "does not say which models it serves.*--served-model"


def listing(body):
    return lambda headers: Say(body if isinstance(body, str | bytes) else json.dumps(body))


def test_the_only_model_is_found_by_its_name():
    with FakeServer(listing=listing({"data": [{"id": "org/model \u00e9"}]})) as server:
        assert only_served_model(server.url, None) == "org/model \u00e9"


@pytest.mark.parametrize(
    "body",
    [
        {"data": 5},
        {"data": None},
        {"data": [{"id": None}]},
        {"data": [{"id": 3}]},
        {"data": [{"id": ""}]},
        {"data": [{}]},
        {"data": ["a"]},
        {},
        [1],
        None,
        "",
        "<html>",
        b'{"data": [{"id": "\xff"}]}',
        '{"data": [{"id": "\\ud800"}]}',
    ],
)
def test_a_list_that_is_none_is_told_and_never_taken_for_a_name(body):
    with (
        FakeServer(listing=listing(body)) as server,
        pytest.raises(InputError, match=ADVICE),
    ):
        only_served_model(server.url, None)


@pytest.mark.parametrize("status", [200, 401, 500])
def test_a_key_that_the_server_repeats_is_not_shown(monkeypatch, status):
    monkeypatch.setenv("SOME_KEY", "sk-very-secret\n")

    def echo(headers):
        return error(status, f"\x1b[2J bad key {headers['authorization']}")

    with (
        FakeServer(listing=echo) as server,
        pytest.raises(InputError, match="SOME_KEY" if status == 401 else ADVICE) as caught,
    ):
        only_served_model(server.url, "SOME_KEY")
    assert server.headers[0]["authorization"] == "Bearer sk-very-secret"
    assert "secret" not in str(caught.value)
    assert "bad key Bearer ***" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_the_environments_openai_account_is_not_told_to_a_server_without_a_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, f"{name}-mine")
    with FakeServer(listing=listing({"data": [{"id": "m"}]})) as server:
        only_served_model(server.url, None)
    assert "mine" not in " ".join(server.headers[0].values())


def test_names_of_models_cannot_steer_the_terminal():
    served = {"data": [{"id": "a\x1b[2J"}, {"id": "b"}]}
    with (
        FakeServer(listing=listing(served)) as server,
        pytest.raises(InputError, match="2 models") as caught,
    ):
        only_served_model(server.url, None)
    assert str(caught.value).isprintable()

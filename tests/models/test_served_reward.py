"""A served reward model against the same weights here, over real HTTP.

The server answers in the form of vLLM's /classify, and computes with transformers' own classifier.
"""

import dataclasses
import json
import threading
import time

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from reward_server import Server, classified, pooled
from starling.base.errors import DataError, InputError, ModelError
from starling.data.records import Message
from starling.models.reward_model import RewardModel, Scored
from starling.models.served_reward import SEQUENCES_PER_CALL, ServedRewardModel


def scored(question, answer, **options):
    messages = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return Scored(messages, **options)


ITEMS = [
    scored("Hi", "No."),
    scored("What is 2 + 2?", "4", mode="Code"),
    scored("Hi", "It is <|end_of_turn|> four", finished=False),
]


def connected(server, folder, **options):
    """Connect while the server still answers well; only what is asked after that is kept."""
    answer = server.answer
    server.answer = lambda body, n: classified([0.5] * len(body["input"]))
    served = ServedRewardModel.connect(server.url, str(folder), **options)
    server.answer = answer
    server.bodies.clear()
    server.keys.clear()
    return served


@pytest.fixture(scope="module")
def folder(reward_folder, tmp_path_factory):
    """A reward model with a normalisation of its own."""
    path = tmp_path_factory.mktemp("served") / "model"
    dataclasses.replace(RewardModel.load(str(reward_folder)), mean=0.75, std=2.5).save(path)
    return path


@pytest.fixture(scope="module")
def by_transformers(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    @torch.no_grad()
    def answer(body, n):
        return classified([float(model(torch.tensor([ids])).logits) for ids in body["input"]])

    return answer


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_served_scores_are_those_of_the_folder_normalised_once(folder, by_transformers, suffix):
    here = RewardModel.load(str(folder))
    with Server(by_transformers) as server:
        served = ServedRewardModel.connect(server.url + suffix, str(folder))
        found, expected = served.score_each(ITEMS), here.score_each(ITEMS)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.score == pytest.approx(theirs.score, abs=1e-5)
        assert ours.raw_score == pytest.approx(theirs.raw_score, abs=1e-5)
        assert ours.score == pytest.approx((ours.raw_score - 0.75) / 2.5)
        assert ours[2:] == theirs[2:]
    assert set(server.paths) == {"/classify"}


def test_ids_go_out_and_the_activation_is_refused(folder, by_transformers):
    with Server(by_transformers) as server:
        served = connected(server, folder)
        served.score(ITEMS)
    [body] = server.bodies
    assert (body["model"], body["use_activation"]) == ("m", False)
    # Those of one prompt stand together.
    expected = [served.encode(item)[0] for item in ITEMS]
    assert sorted(body["input"]) == sorted(expected)
    # What was typed is no marker, and the cut answer has no end.
    assert expected[2].count(3) == 1


def test_many_conversations_are_asked_in_parts_and_keep_their_order(folder):
    lengths = lambda body, n: classified([float(len(ids)) for ids in body["input"]])  # noqa: E731
    items = [scored(f"Hi {number % 7}", "x" * (number % 50)) for number in range(150)]
    with Server(lengths) as server:
        found = connected(server, folder).score_each(items)
    assert [score.raw_score for score in found] == [score.num_tokens for score in found]
    assert [len(body["input"]) for body in server.bodies] == [64, 64, 22]
    assert SEQUENCES_PER_CALL == 64


def test_scores_are_placed_by_their_index(folder, by_transformers):
    def backwards(body, n):
        reply = by_transformers(body, n)
        return reply | {"data": reply["data"][::-1]}

    here = RewardModel.load(str(folder)).score(ITEMS)
    with Server(backwards) as server:
        found = ServedRewardModel.connect(server.url, str(folder)).score(ITEMS)
    assert found.tolist() == pytest.approx(here.tolist(), abs=1e-5)


def test_a_busy_server_is_asked_again_and_then_no_more(folder, by_transformers):
    busy = 503, '{"error": {"message": "starting"}}', {"retry-after-ms": "1"}

    def answer(body, n):
        return busy if n < 2 else by_transformers(body, n)

    with Server(answer) as server:
        served = connected(server, folder, retries=2)
        assert served.score(ITEMS).shape == (3,)
        assert len(server.bodies) == 3
    with Server(lambda body, n: busy) as server:
        served = connected(server, folder, retries=2)
        with pytest.raises(InputError, match=r"/classify answered 503: .*starting"):
            served.score(ITEMS)
        assert len(server.bodies) == 3


def test_a_server_that_takes_too_long_is_given_up(folder):
    release = threading.Event()

    def hang(body, n):
        release.wait(20)
        return {}

    with Server(hang) as server:
        served = connected(server, folder, timeout_seconds=0.2, retries=0)
        with pytest.raises(InputError, match=r"gave no answer in 1 attempts .*start the server"):
            served.score(ITEMS)
        release.set()


def test_a_server_that_is_gone_is_named_at_once_and_later(folder):
    with pytest.raises(InputError, match="no server answers at http://127.0.0.1:9/v1"):
        ServedRewardModel.connect("http://127.0.0.1:9", str(folder))
    gone = r"/classify gave no answer in 1 attempts .*start the server.*then run this again"
    with pytest.raises(InputError, match=gone):
        ServedRewardModel.connect("http://127.0.0.1:9", str(folder), served_model="m", retries=0)
    with Server(lambda body, n: None) as server:
        served = connected(server, folder, retries=0)
    with pytest.raises(InputError, match=gone):
        served.score(ITEMS)


def test_a_slow_server_is_waited_for(folder, by_transformers):
    def answer(body, n):
        time.sleep(0.3)
        return by_transformers(body, n)

    with Server(answer) as server:
        found = connected(server, folder, retries=0).score(ITEMS)
    here = RewardModel.load(str(folder)).score(ITEMS)
    assert found.tolist() == pytest.approx(here.tolist(), abs=1e-5)


@pytest.fixture(scope="module")
def pooling(by_transformers):
    """What /pooling answers where the model has `tasks`."""

    def make(*tasks):
        def answer(body, n):
            if body["task"] not in tasks:
                said = f"Unsupported task: {body['task']!r} Supported tasks: {tasks}"
                return 400, json.dumps({"error": {"message": said}}), {}
            scores = [item["probs"] for item in by_transformers(body, n)["data"]]
            if body["task"] == "classify":
                return pooled(scores)
            # Scores at tokens before the last have nothing to say.
            pairs = zip(scores, body["input"], strict=True)
            return pooled([[[9.0]] * (len(ids) - 1) + [score] for score, ids in pairs])

        return answer

    return make


@pytest.mark.parametrize("task", ["classify", "token_classify"])
def test_a_server_without_classify_is_asked_by_pooling(folder, pooling, task, caplog):
    caplog.set_level("INFO", "starling")
    with Server(pooling(task), route="/pooling") as server:
        served = ServedRewardModel.connect(server.url, str(folder))
        assert [f"scores come from /pooling, task {task}" in text for text in caplog.messages] == [
            True
        ]
        server.paths.clear()
        server.bodies.clear()
        found = [served.score(ITEMS), served.score(ITEMS)]
    here = RewardModel.load(str(folder)).score(ITEMS)
    for scores in found:
        assert scores.tolist() == pytest.approx(here.tolist(), abs=1e-5)
    # Found once, and said once.
    assert server.paths == ["/pooling", "/pooling"]
    assert {(body["task"], body["use_activation"]) for body in server.bodies} == {(task, False)}
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("status", [400, 404, 405, 501])
def test_versions_refuse_a_route_differently_and_the_next_is_tried(folder, pooling, status):
    def answer(body, n):
        if "task" in body:
            return pooling("classify")(body, n)
        headers = {"x-should-retry": "false"}
        return status, '{"error": {"message": "does not support Classification API"}}', headers

    with Server(answer, route=None) as server:
        served = ServedRewardModel.connect(server.url, str(folder), retries=0)
        assert served.score(ITEMS).shape == (3,)
    assert server.paths == ["/classify", "/pooling", "/pooling"]


def test_a_server_that_fails_is_not_asked_in_other_shapes(folder):
    broken = 500, '{"error": {"message": "out of memory"}}', {"retry-after-ms": "1"}
    said = pytest.raises(InputError, match=r"/classify answered 500: .*out of memory")
    with Server(lambda body, n: broken, route=None) as server, said:
        ServedRewardModel.connect(server.url, str(folder), retries=1)
    assert server.paths == ["/classify"] * 2


def test_a_server_that_scores_in_no_shape_is_told_with_each_refusal(folder, pooling):
    with (
        Server(pooling("embed"), route="/pooling") as server,
        pytest.raises(InputError) as caught,
    ):
        ServedRewardModel.connect(server.url, str(folder))
    said = str(caught.value)
    assert "/classify answered 404" in said
    assert "/pooling answered 400" in said
    assert "Unsupported task: 'token_classify'" in said
    assert "--runner pooling" in said


@pytest.mark.parametrize(
    ("tasks", "change", "message"),
    [
        ("classify", lambda data: data[1].update(data=[0.1, 0.2]), r"data\.1\.data: .*one label"),
        ("classify", lambda data: data[1].update(data=[[0.1]]), r"data\.1\.data\.0"),
        ("classify", lambda data: data[1].update(data="AACAPw=="), r"data\.1\.data"),
        ("classify", lambda data: data.pop(), "asked for 3 scores and gave number 0, 1;"),
        ("classify", lambda data: data[2].update(data=[float("nan")]), "no finite numbers"),
        ("token_classify", lambda data: data[2]["data"].pop(), r"gave \d+ scores for a conv.* cut"),
        ("token_classify", lambda data: data[0].update(data=[]), "gave 0 scores for a conv"),
        ("token_classify", lambda data: data[0].update(data=[0.1]), r"data\.0\.data\.0"),
    ],
)
def test_a_pooling_reply_of_another_form_is_refused(folder, pooling, tasks, change, message):
    def changed(body, n):
        reply = pooling(tasks)(body, n)
        change(reply["data"])
        return reply

    with Server(pooling(tasks), route="/pooling") as server:
        served = ServedRewardModel.connect(server.url, str(folder))
        server.answer = changed
        with pytest.raises(DataError, match=message):
            served.score(ITEMS)


def test_what_cannot_score_is_told_on_connecting(folder):
    page = 200, "<html>", {"Content-Type": "text/html"}
    for answer, message in (
        (lambda body, n: page, "the reply: Invalid JSON"),
        (lambda body, n: classified([float("nan")]), r"no finite numbers \(a greeting\)"),
    ):
        with Server(answer) as server, pytest.raises(DataError, match=message):
            ServedRewardModel.connect(server.url, str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda reply: reply["data"].pop(), "asked for 3 scores and gave number 0, 1"),
        (lambda reply: reply["data"][0].update(index=1), "gave number 1, 2; is it vLLM"),
        (lambda reply: reply["data"].clear(), "gave number none"),
        (lambda reply: reply["data"][1].update(probs=[0.5, 0.5]), r"data\.1\.probs: .*one label"),
        (lambda reply: reply["data"][2].update(probs=[]), r"data\.2\.probs"),
        (lambda reply: reply["data"][2].update(probs=["high"]), r"data\.2\.probs\.0"),
        (lambda reply: reply.pop("data"), "data: Field required"),
        (lambda reply: reply["data"][0].update(probs=[float("nan")]), "no finite numbers"),
        (lambda reply: reply["data"][0].update(probs=[float("inf")]), "no finite numbers"),
    ],
)
def test_a_reply_that_is_not_one_number_each_is_refused(folder, change, message):
    def answer(body, n):
        reply = classified([0.5] * len(body["input"]))
        change(reply)
        return reply

    with Server(answer) as server:
        served = connected(server, folder)
        with pytest.raises(DataError, match=message):
            served.score(ITEMS)


def test_a_page_is_no_reply(folder):
    with Server(lambda body, n: (200, "<html>", {"Content-Type": "text/html"})) as server:
        served = connected(server, folder)
        with pytest.raises(DataError, match="the reply: Invalid JSON"):
            served.score(ITEMS)


@pytest.mark.parametrize(("status", "advice"), [(404, "--runner pooling"), (400, "too long")])
def test_a_refusal_is_shown_with_what_to_do(folder, status, advice):
    refusal = status, json.dumps({"error": {"message": "too long"}}), {}
    with Server(lambda body, n: refusal) as server:
        served = connected(server, folder)
        with pytest.raises(InputError, match=f"answered {status}.*{advice}"):
            served.score(ITEMS)
        assert len(server.bodies) == 1


def test_the_key_goes_out_and_is_never_shown(folder, monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "sesame-open")
    refusal = 401, json.dumps({"error": {"message": "bad key sesame-open"}}), {}
    with Server(lambda body, n: refusal) as server:
        served = connected(server, folder, api_key_env="REWARD_KEY")
        with pytest.raises(InputError, match=r"valid key into .* REWARD_KEY") as caught:
            served.score(ITEMS)
    assert server.keys == ["Bearer sesame-open"]
    assert "sesame" not in str(caught.value)
    assert "sesame" not in repr(served)


def test_of_several_models_one_has_to_be_named(folder, by_transformers):
    with Server(by_transformers, models=("b", "a")) as server:
        with pytest.raises(
            InputError, match=r"serves 2 models: a, b\. .*--served-model NAME, or served_model"
        ):
            ServedRewardModel.connect(server.url, str(folder))
        served = ServedRewardModel.connect(server.url, str(folder), served_model="b")
        served.score(ITEMS)
    assert [body["model"] for body in server.bodies] == ["b", "b"]


def test_an_address_that_is_none_and_one_with_a_key_are_refused(folder):
    for url in ("localhost:8000", "http://me:secret@localhost:8000"):
        with pytest.raises(InputError, match="the address of the reward model") as caught:
            ServedRewardModel.connect(url, str(folder))
        assert "secret" not in str(caught.value)


def test_scores_that_are_read_in_padding_are_not_served(folder, tmp_path):
    made = dataclasses.replace(RewardModel.load(str(folder)), read_out="published_padded")
    made.save(tmp_path / "model")
    with pytest.raises(ModelError, match=r"padding \(published_padded\), which no server does"):
        ServedRewardModel.connect("http://127.0.0.1:9", str(tmp_path / "model"))


def test_the_folder_may_lack_its_weights(folder, by_transformers, tmp_path):
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with Server(by_transformers) as server:
        found = ServedRewardModel.connect(server.url, str(tmp_path)).score(ITEMS)
    here = RewardModel.load(str(folder)).score(ITEMS)
    assert found.tolist() == pytest.approx(here.tolist(), abs=1e-5)

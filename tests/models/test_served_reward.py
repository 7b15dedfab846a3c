"""A served reward model against the same weights here, over real HTTP.

The server answers in the form of vLLM's /classify, and computes with transformers' own classifier.
"""

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForSequenceClassification

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


def classified(scores):
    """A reply of vLLM 0.32's /classify."""
    data = [
        {"index": index, "label": "LABEL_0", "probs": [score], "num_classes": 1}
        for index, score in enumerate(scores)
    ]
    usage = {"prompt_tokens": 7, "total_tokens": 7, "completion_tokens": 0}
    return {"id": "classify-1", "object": "list", "created": 0, "model": "m", "data": data} | {
        "usage": usage
    }


class Server:
    """`answer(body, n)` gives the n-th reply to a POST: a JSON value, or status, text, headers."""

    def __init__(self, answer, models=("m",)):
        self.bodies, self.paths, self.keys = [], [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                listed = {"object": "list", "data": [{"id": name} for name in models]}
                self.reply(200, json.dumps(listed), {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.paths.append(self.path)
                outer.keys.append(self.headers["Authorization"])
                found = answer(body, len(outer.bodies) - 1)
                if not isinstance(found, tuple):
                    found = 200, json.dumps(found), {}
                self.reply(*found)

            def reply(self, status, text, headers):
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


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
        served = ServedRewardModel.connect(server.url, str(folder))
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
        found = ServedRewardModel.connect(server.url, str(folder)).score_each(items)
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
        served = ServedRewardModel.connect(server.url, str(folder), retries=2)
        assert served.score(ITEMS).shape == (3,)
        assert len(server.bodies) == 3
    with Server(lambda body, n: busy) as server:
        served = ServedRewardModel.connect(server.url, str(folder), retries=2)
        with pytest.raises(InputError, match=r"/classify answered 503: .*starting"):
            served.score(ITEMS)
        assert len(server.bodies) == 3


def test_a_server_that_takes_too_long_is_given_up(folder):
    release = threading.Event()

    def hang(body, n):
        release.wait(20)
        return {}

    with Server(hang) as server:
        served = ServedRewardModel.connect(server.url, str(folder), timeout_seconds=0.2, retries=0)
        with pytest.raises(InputError, match=r"gave no answer in 1 attempts .*start the server"):
            served.score(ITEMS)
        release.set()


def test_a_server_that_is_gone_is_named(folder):
    with pytest.raises(InputError, match="no server answers at http://127.0.0.1:9/v1"):
        ServedRewardModel.connect("http://127.0.0.1:9", str(folder))
    served = ServedRewardModel.connect(
        "http://127.0.0.1:9", str(folder), served_model="m", retries=0
    )
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9/classify gave no answer"):
        served.score(ITEMS)


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
        served = ServedRewardModel.connect(server.url, str(folder))
        with pytest.raises(DataError, match=message):
            served.score(ITEMS)


def test_a_page_is_no_reply(folder):
    with Server(lambda body, n: (200, "<html>", {"Content-Type": "text/html"})) as server:
        served = ServedRewardModel.connect(server.url, str(folder))
        with pytest.raises(DataError, match="the reply: Invalid JSON"):
            served.score(ITEMS)


@pytest.mark.parametrize(("status", "advice"), [(404, "--runner pooling"), (400, "too long")])
def test_a_refusal_is_shown_with_what_to_do(folder, status, advice):
    refusal = status, json.dumps({"error": {"message": "too long"}}), {}
    with Server(lambda body, n: refusal) as server:
        served = ServedRewardModel.connect(server.url, str(folder))
        with pytest.raises(InputError, match=f"answered {status}.*{advice}"):
            served.score(ITEMS)
        assert len(server.bodies) == 1


def test_the_key_goes_out_and_is_never_shown(folder, monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "sesame-open")
    refusal = 401, json.dumps({"error": {"message": "bad key sesame-open"}}), {}
    with Server(lambda body, n: refusal) as server:
        served = ServedRewardModel.connect(server.url, str(folder), api_key_env="REWARD_KEY")
        with pytest.raises(InputError, match=r"valid key into .* REWARD_KEY") as caught:
            served.score(ITEMS)
    assert server.keys == ["Bearer sesame-open"]
    assert "sesame" not in str(caught.value)
    assert "sesame" not in repr(served)


def test_of_several_models_one_has_to_be_named(folder, by_transformers):
    with Server(by_transformers, models=("b", "a")) as server:
        with pytest.raises(InputError, match=r"serves 2 models: a, b\. .*--served-model"):
            ServedRewardModel.connect(server.url, str(folder))
        served = ServedRewardModel.connect(server.url, str(folder), served_model="b")
        served.score(ITEMS)
    assert server.bodies[0]["model"] == "b"


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

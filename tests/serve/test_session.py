"""`Chat`: one model behind a folder, a file or a URL, and what it makes of a conversation."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fake_server import FakeServer, Say, completion, error, stream
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from starling import Chat
from starling.base.errors import DataError, InputError
from starling.data.records import Message
from starling.models.local import load_local
from starling.serve.find import resolve_model
from starling.serve.session import read_messages
from streams import drain
from tiny import tiny_policy_folder, tiny_reward_folder

HISTORY = [
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": "That."},
    {"role": "user", "content": "Why?"},
]
WRITTEN = (
    "GPT4 Correct User: What?<|end_of_turn|>GPT4 Correct Assistant: That.<|end_of_turn|>"
    "GPT4 Correct User: Why?<|end_of_turn|>GPT4 Correct Assistant:"
)


def generated(folder, written, max_tokens=8):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(written, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)[0]
    new = output[inputs.input_ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).removeprefix(" ")


def test_a_reply_is_what_transformers_generates_for_the_written_conversation(policy_folder):
    talk = Chat(str(policy_folder), max_tokens=8)
    assert talk.reply(HISTORY) == generated(policy_folder, WRITTEN)
    in_code = WRITTEN.replace("GPT4 Correct", "Code")
    assert talk.reply(HISTORY, mode="Code") == generated(policy_folder, in_code)
    assert talk.reply("What?") == talk.reply([Message(role="user", content="What?")])


def test_a_chat_keeps_its_mode_and_a_single_reply_may_have_another(policy_folder):
    talk = Chat(str(policy_folder), max_tokens=8, mode="math")
    assert talk.mode == "Math Correct"
    in_math = WRITTEN.replace("GPT4 Correct", "Math Correct")
    assert talk.reply(HISTORY) == generated(policy_folder, in_math)
    assert talk.reply(HISTORY, mode="default") == generated(policy_folder, WRITTEN)
    with pytest.raises(DataError, match="unknown mode 'maths'"):
        talk.reply(HISTORY, mode="maths")


def test_a_system_message_of_the_conversation_stands_in_place_of_the_chats(policy_folder):
    talk = Chat(str(policy_folder), max_tokens=8, system="Be brief.")
    briefly = generated(policy_folder, "Be brief.<|end_of_turn|>" + WRITTEN)
    assert talk.reply(HISTORY) == briefly
    own = [{"role": "system", "content": "Be kind."}, *HISTORY]
    kindly = generated(policy_folder, "Be kind.<|end_of_turn|>" + WRITTEN)
    assert talk.reply(own) == kindly
    assert briefly != kindly


def test_a_stream_is_the_reply_in_pieces(policy_folder):
    talk = Chat(str(policy_folder), max_tokens=8)
    pieces, reply = drain(talk.stream(HISTORY))
    assert len(pieces) > 2
    assert "".join(pieces) == reply.text == generated(policy_folder, WRITTEN)
    assert reply.usage.response_tokens == len(reply.ids)


def test_answers_are_drawn_anew_and_repeat_in_a_new_chat_of_the_same_seed(policy_folder):
    def draw(seed):
        talk = Chat(str(policy_folder), max_tokens=12, temperature=1.5, seed=seed)
        return [talk.reply("What?") for _ in range(3)]

    assert draw(0) == draw(0)
    assert len({*draw(0), *draw(1)}) == 6


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages is empty"),
        ({"role": "user", "content": "hi"}, "must be a list .* found dict"),
        (7, "found int"),
        (["hi"], r"messages.0: found \"hi\""),
        ([{"role": "usr", "content": "hi"}], r"messages.0.role: found \"usr\".*'user'"),
        ([{"role": "user"}], "messages.0.content: is missing"),
        ([{"content": "hi"}], "messages.0.role: is missing"),
        ([{"role": "user", "content": ["hi"]}], "messages.0.content: found a list"),
        ([{"role": "user", "content": None}], "messages.0.content: found null"),
        (HISTORY[:2], "the last message is the assistant's"),
        ([HISTORY[0], HISTORY[1], HISTORY[1], HISTORY[2]], "message 3 is the assistant's"),
        ([{"role": "system", "content": "x"}], "the last message is the system's"),
        ("  ", "a user message is empty"),
    ],
)
def test_messages_that_are_none_are_refused(policy_folder, messages, said):
    with pytest.raises(DataError, match=said):
        Chat(str(policy_folder), max_tokens=2).reply(messages)


@given(st.text(st.characters(categories=("Cs", "Ll")), min_size=1))
def test_halves_of_surrogate_pairs_are_replaced_and_nothing_else(text):
    [message] = read_messages([{"role": "user", "content": text}])
    expected = "".join("?" if "\ud800" <= c <= "\udfff" else c for c in text)
    assert message.content == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -0.5}, "the temperature is -0.5"),
        ({"temperature": float("nan")}, "the temperature is nan"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"best_of": 0}, "best_of is 0"),
        ({"best_of": 2}, "best-of needs a reward model"),
        ({"mode": "cod3"}, "unknown mode 'cod3'; openchat has GPT4 Correct, Code, Math"),
        ({"served_model": "x"}, "served_model is for a server's URL"),
        ({"dtype": "float17"}, "dtype is 'float17'"),
        ({"chat_format": "openchta"}, "unknown chat format 'openchta'"),
    ],
)
def test_impossible_settings_are_refused(policy_folder, settings, said):
    with pytest.raises(InputError, match=said):
        Chat(str(policy_folder), **settings)


def test_a_refused_change_changes_nothing(policy_folder):
    talk = Chat(str(policy_folder), mode="code")
    for name, value in [("temperature", -1.0), ("mode", "x"), ("best_of", 4), ("max_tokens", 0)]:
        before = getattr(talk, name)
        with pytest.raises(InputError):
            talk.change(name, value)
        assert getattr(talk, name) == before
    talk.change("mode", "MATH")
    assert talk.mode == "Math Correct"


def counted(folder, written):
    return len(AutoTokenizer.from_pretrained(folder)(written).input_ids)


def test_a_full_context_leaves_out_whole_exchanges_and_says_so(policy_folder, tmp_path, caplog):
    long = [
        {"role": role, "content": text}
        for text in ("number one, please", "number two, please", "number three, please")
        for role in ("user", "assistant")
    ] + [{"role": "user", "content": "Why?"}]

    def written(rows):
        turns = (f"GPT4 Correct {row['role'].title()}: {row['content']}" for row in rows)
        return "".join(f"{turn}<|end_of_turn|>" for turn in turns) + "GPT4 Correct Assistant:"

    # The last two exchanges fit by themselves, and not with an answer of eight tokens.
    length = counted(policy_folder, written(long[-5:])) + 7
    folder = tiny_policy_folder(tmp_path / "model", max_length=length)
    talk = Chat(str(folder), max_tokens=8)
    with caplog.at_level(logging.WARNING):
        assert talk.reply(long) == generated(folder, written(long[-3:]))
        assert talk.reply(long) == generated(folder, written(long[-3:]))
    told = "[the context is full: the first 4 messages are left out]"
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in warned] == [told]


def test_prompt_and_answer_together_fill_a_small_context(tmp_path):
    folder = tiny_policy_folder(tmp_path / "model", max_length=64)
    written = "GPT4 Correct User: hi<|end_of_turn|>GPT4 Correct Assistant:"
    room = 64 - counted(folder, written)
    assert room > 32
    _, reply = drain(Chat(str(folder), max_tokens=1000).stream("hi"))
    assert len(reply.ids) == room
    assert reply.finish_reason == "length"
    # A prompt of more than half the context leaves less, and is answered all the same.
    long = "hi " * 11
    assert 32 < counted(folder, written.replace("hi", long)) < 60
    _, reply = drain(Chat(str(folder), max_tokens=1000).stream(long))
    assert len(reply.ids) == 64 - counted(folder, written.replace("hi", long))


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(tmp_path):
    folder = tiny_policy_folder(tmp_path / "model", max_length=64)
    with pytest.raises(DataError, match="tokens, which do not fit the model's 64 positions"):
        Chat(str(folder)).reply("word " * 100)


def their_score(folder, written):
    """A conversation's score as transformers computes it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return model(**tokenizer(written, return_tensors="pt")).logits.item()


def test_best_of_gives_the_answer_that_the_reward_model_scores_highest(
    policy_folder, reward_folder
):
    judge = str(reward_folder)
    # The n-th of more answers is the n-th of fewer: best of 1 to 6 never falls.
    scores = []
    for count in (2, 4, 6):
        talk = Chat(str(policy_folder), max_tokens=6, best_of=count, reward_model=judge)
        [piece], reply = drain(talk.stream("What?"))
        assert piece == reply.text
        end = "<|end_of_turn|>" if reply.finish_reason == "stop" else ""
        asked = "GPT4 Correct User: What?<|end_of_turn|>GPT4 Correct Assistant: "
        scores.append(their_score(reward_folder, asked + reply.text + end))
    assert scores == sorted(scores)
    assert scores[0] < scores[-1]


def make_run(folder, policy, *stages):
    for stage in stages:
        shutil.copytree(policy, folder / stage / "model")
    return folder


def test_a_run_folder_stands_for_its_newest_model(policy_folder, tmp_path):
    both = make_run(tmp_path / "both", policy_folder, "sft", "ppo")
    assert resolve_model(str(both)) == str(both / "ppo" / "model")
    one = make_run(tmp_path / "one", policy_folder, "sft")
    assert resolve_model(str(one)) == str(one / "sft" / "model")


def test_a_runs_own_reward_model_picks(policy_folder, tmp_path):
    run = make_run(tmp_path / "run", policy_folder, "sft")
    tiny_reward_folder(run / "reward" / "model", policy_folder)
    talk = Chat(str(run), best_of=2, max_tokens=4)
    assert talk.reward_model == str(run / "reward" / "model")
    assert talk.sampling_temperature == 1
    assert talk.reply("What?")


def test_a_model_folder_and_a_hub_id_stand_for_themselves(policy_folder):
    assert resolve_model(str(policy_folder)) == str(policy_folder)
    assert resolve_model("openchat/openchat-3.5-0106") == "openchat/openchat-3.5-0106"


@pytest.mark.parametrize("name", ["", "absent", "absent.gguf"])
def test_a_folder_or_file_that_is_no_model_is_refused_with_what_to_do(tmp_path, name):
    with pytest.raises(DataError, match="starling demo|there is no (folder|file) .*absent"):
        Chat(str(tmp_path / name))


def test_a_gguf_file_is_loaded_by_its_engine(policy_folder, tmp_path, monkeypatch):
    loaded = []

    def load_gguf(path, *, chat_format):
        loaded.append((path, chat_format))
        return load_local(str(policy_folder))

    engine = ModuleType("starling.models.gguf_engine")
    engine.load_gguf = load_gguf  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "starling.models.gguf_engine", engine)
    path = str(tmp_path / "model.gguf")
    Path(path).touch()
    talk = Chat(path, max_tokens=8, chat_format="openchat")
    assert talk.reply(HISTORY) == generated(policy_folder, WRITTEN)
    assert loaded == [(path, "openchat")]
    with pytest.raises(InputError, match="not for a GGUF file"):
        Chat(path, dtype="float32")


def test_starling_is_imported_without_torch_and_offers_chat():
    program = (
        "import sys, starling\n"
        "assert 'torch' not in sys.modules and 'pydantic' not in sys.modules\n"
        "assert set(starling.__all__) == {'Chat', '__version__'}\n"
        "from starling import Chat\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n    starling.Chatt\nexcept AttributeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "module 'starling' has no attribute 'Chatt'\n", done.stderr


class Server(FakeServer):
    """A fake server that also tells which models it serves."""

    def __init__(self, script, served=("one",), status=200):
        super().__init__(script)
        models = json.dumps({"object": "list", "data": [{"id": name} for name in served]})

        def do_GET(handler):
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(models)))
            handler.end_headers()
            handler.wfile.write(models.encode())

        self._server.RequestHandlerClass.do_GET = do_GET  # type: ignore[attr-defined]


def test_a_servers_only_model_answers_in_pieces():
    with Server(lambda body, n: Say(pieces=stream("He", "llo", usage=(7, 2)))) as server:
        talk = Chat(server.url, max_tokens=9, system="Be brief.")
        pieces, reply = drain(talk.stream(HISTORY))
        [call] = server.calls
    assert pieces == ["He", "llo"]
    assert (reply.text, reply.usage.response_tokens) == ("Hello", 2)
    assert call["model"] == "one"
    assert call["messages"] == [{"role": "system", "content": "Be brief."}, *HISTORY]
    assert (call["temperature"], call["max_tokens"]) == (0, 9)


@pytest.mark.parametrize("served", [(), ("one", "two")])
def test_a_server_of_several_models_needs_a_name_and_says_which_there_are(served):
    with Server(lambda body, n: Say(pieces=stream("Hello")), served) as server:
        listed = "one, two" if served else "none"
        with pytest.raises(InputError, match=f"{len(served)} models: {listed}. .*--served-model"):
            Chat(server.url)
        assert Chat(server.url, served_model="two").reply("hi") == "Hello"
        assert server.calls[0]["model"] == "two"


def test_a_server_that_does_not_list_its_models_needs_a_name():
    with (
        Server(lambda body, n: Say(), status=404) as server,
        pytest.raises(InputError, match="does not say which models it serves.*--served-model"),
    ):
        Chat(server.url)


def test_a_url_where_nobody_listens_is_told():
    with FakeServer(lambda body, n: Say()) as server:
        url = server.url
    with pytest.raises(InputError, match="no server answers at"):
        Chat(url)


def test_a_key_goes_to_the_server_and_an_absent_one_is_told(monkeypatch):
    monkeypatch.delenv("CHAT_KEY", raising=False)
    with Server(lambda body, n: Say(pieces=stream("Hello"))) as server:
        with pytest.raises(InputError, match="CHAT_KEY"):
            Chat(server.url, api_key_env="CHAT_KEY")
        monkeypatch.setenv("CHAT_KEY", "the-key\n")
        assert Chat(server.url, api_key_env="CHAT_KEY").reply("hi") == "Hello"
        assert server.headers[0]["authorization"] == "Bearer the-key"


def test_a_server_that_finds_the_context_full_is_asked_without_the_oldest_exchange(caplog):
    def script(body, n):
        if len(body["messages"]) > 3:
            return error(400, "This model's maximum context length is 64 tokens. However, ...")
        return Say(pieces=stream("Hello"))

    long = [*HISTORY[:2], *HISTORY[:2], *HISTORY]
    with Server(script) as server, caplog.at_level(logging.WARNING):
        assert Chat(server.url).reply(long) == "Hello"
        assert [len(call["messages"]) for call in server.calls] == [7, 5, 3]
        assert server.calls[-1]["messages"] == HISTORY
    told = [record.getMessage() for record in caplog.records]
    assert told[-1] == "[the context is full: the first 4 messages are left out]"


def test_a_last_turn_that_alone_is_too_long_for_the_server_is_told():
    def script(body, n):
        return error(400, "the request exceeds the available context size")

    with Server(script) as server:
        with pytest.raises(DataError, match="no answer: .*context size"):
            Chat(server.url).reply(HISTORY)
        assert [len(call["messages"]) for call in server.calls] == [3, 1]


def test_another_refusal_of_a_server_is_not_asked_again():
    with Server(lambda body, n: error(400, "no such parameter")) as server:
        with pytest.raises(DataError, match="no answer: .*no such parameter"):
            Chat(server.url).reply(HISTORY)
        assert len(server.calls) == 1


def test_a_mode_needs_the_served_models_tokenizer(policy_folder):
    with Server(lambda body, n: Say(pieces=stream("Hello", raw=True))) as server:
        with pytest.raises(DataError, match="--tokenizer"):
            Chat(server.url, mode="Code")
        talk = Chat(server.url, tokenizer=str(policy_folder), mode="code")
        assert talk.reply(HISTORY) == "Hello"
        written = WRITTEN.replace("GPT4 Correct", "Code")
        ids = AutoTokenizer.from_pretrained(policy_folder)(written).input_ids
        assert server.calls[0]["prompt"] == ids


def test_best_of_asks_a_server_for_several_answers(reward_folder):
    def script(body, n):
        return Say(completion(f"answer {n}"))

    with Server(script) as server:
        talk = Chat(server.url, best_of=3, reward_model=str(reward_folder))
        assert talk.reply("hi").startswith("answer ")
        assert len({call["seed"] for call in server.calls}) == 3
        assert {call["temperature"] for call in server.calls} == {1}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("temperature", "0", "temperature is '0'; it must be a float"),
        ("max_tokens", 3.7, r"max_tokens is 3\.7; it must be a int"),
        ("best_of", None, "best_of is None; it must be a int"),
        ("seed", "x", "seed is 'x'; it must be a int"),
        ("system", 5, r"system is 5; it must be a str \| None"),
        ("mode", 3, "mode is 3"),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused(policy_folder, name, value, said):
    talk = Chat(str(policy_folder), max_tokens=4)
    setattr(talk, name, value)
    with pytest.raises(InputError, match=said):
        talk.reply("What?")


def test_a_path_names_a_model(policy_folder):
    # In a process of its own: here every call is checked for types, and a Path is not a str.
    program = "import sys, pathlib; from starling import Chat; f = pathlib.Path(sys.argv[1]);"
    program += "sys.stdout.reconfigure(encoding='utf-8');"
    program += "print(Chat(f, max_tokens=4).reply('What?'), end='')"
    command = [sys.executable, "-c", program, str(policy_folder)]
    done = subprocess.run(command, capture_output=True, check=True)
    expected = Chat(str(policy_folder), max_tokens=4).reply("What?")
    assert done.stdout.decode() == expected


def test_what_a_url_cannot_obey_is_refused():
    for name, value in (("device", "cpu"), ("dtype", "float32")):
        with pytest.raises(InputError, match=f"{name} is for a model in this process"):
            Chat("http://localhost:1/v1", **{name: value})

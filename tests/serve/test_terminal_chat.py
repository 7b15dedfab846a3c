"""Chat in the terminal: stdout is what transformers would generate, the rest goes to stderr."""

import io
import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from starling.base.errors import DataError, InputError
from starling.models.torch_engine import TorchEngine
from starling.serve import chat as chat_module
from starling.serve.chat import ChatSession, chat, resolve_model
from tiny import tiny_policy_folder


@pytest.fixture(scope="module")
def theirs(policy_folder):
    model = AutoModelForCausalLM.from_pretrained(policy_folder)
    return model, AutoTokenizer.from_pretrained(policy_folder)


def generated(theirs, written, max_tokens=8):
    model, tokenizer = theirs
    inputs = tokenizer(written, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)[0]
    new = output[inputs.input_ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).removeprefix(" ")


def waiting(*contents):
    roles = ("User", "Assistant") * len(contents)
    turns = [
        f"GPT4 Correct {role}: {content}<|end_of_turn|>"
        for role, content in zip(roles, contents, strict=False)
    ]
    return "".join(turns) + "GPT4 Correct Assistant:"


@pytest.fixture
def pipe(monkeypatch):
    """Feed lines on a standard input that is no terminal."""

    def feed(*lines, end="\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + end))

    return feed


def session(folder, max_tokens=8):
    return ChatSession(str(folder), device="cpu", max_tokens=max_tokens, temperature=0.0)


def test_once_answers_the_one_message_and_leaves(policy_folder, theirs, capfd):
    chat(str(policy_folder), max_tokens=8, once="hello there")
    out, err = capfd.readouterr()
    assert out == generated(theirs, waiting("hello there")) + "\n"
    assert err == ""


def test_on_a_pipe_each_line_is_a_message_of_one_conversation(policy_folder, theirs, pipe, capfd):
    pipe("What?", "", "  And now? ", end="")
    chat(str(policy_folder), max_tokens=8)
    first = generated(theirs, waiting("What?"))
    second = generated(theirs, waiting("What?", first, "And now?"))
    out, err = capfd.readouterr()
    assert out == f"{first}\n{second}\n"
    assert err == ""
    assert first != second


def test_retry_asks_the_last_message_again(policy_folder, theirs, pipe, capfd):
    pipe("/retry", "What?", "/retry", "Why?")
    chat(str(policy_folder), max_tokens=8)
    first = generated(theirs, waiting("What?"))
    # The retried exchange stands once in what the model reads next.
    last = generated(theirs, waiting("What?", first, "Why?"))
    out, err = capfd.readouterr()
    assert out == f"{first}\n{first}\n{last}\n"
    assert err == "There is nothing to ask again.\n"


def test_a_retry_at_a_temperature_draws_anew(policy_folder, pipe, capfd):
    pipe("What?", "/retry")
    chat(str(policy_folder), max_tokens=12, temperature=2.0)
    first, second = capfd.readouterr().out.splitlines()[:2]
    assert first != second


def test_new_forgets_the_conversation(policy_folder, theirs, pipe, capfd):
    pipe("What?", "/new", "What?")
    chat(str(policy_folder), max_tokens=8)
    first = generated(theirs, waiting("What?"))
    out, err = capfd.readouterr()
    assert out == f"{first}\n{first}\n"
    assert err == "A new conversation.\n"


def test_quit_leaves_what_follows_unread(policy_folder, pipe, capfd):
    pipe("/quit", "What?")
    chat(str(policy_folder), max_tokens=8)
    assert capfd.readouterr().out == ""


def test_an_unknown_command_is_named_and_not_sent_to_the_model(policy_folder, pipe, capfd):
    pipe("/rtry now", "/help")
    chat(str(policy_folder), max_tokens=8)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[0].startswith("unknown command /rtry. Type a message; /retry")
    assert err.splitlines()[1].startswith("Type a message")


def test_the_pieces_of_a_reply_are_its_text_and_are_remembered(policy_folder, theirs):
    talk = session(policy_folder)
    pieces = list(talk.reply("What?"))
    assert "".join(pieces) == generated(theirs, waiting("What?"))
    assert len(pieces) > 2
    assert [(m.role, m.content) for m in talk.messages] == [
        ("user", "What?"),
        ("assistant", "".join(pieces)),
    ]


def test_no_piece_cuts_a_character(policy_folder, monkeypatch):
    talk = session(policy_folder)
    answer = " \u4f60\u597d \U0001f600 \u00e9!"
    ids = talk._local.codec.tokenizer.encode_text(answer)
    assert len(ids) > len(answer) + 5
    monkeypatch.setattr(TorchEngine, "stream", lambda self, request: iter(ids))
    pieces = list(talk.reply("hi"))
    assert "".join(pieces) == answer.removeprefix(" ")
    assert not any("\ufffd" in piece for piece in pieces)
    assert "\U0001f600" in "".join(pieces[:-1])


def test_a_full_context_forgets_whole_exchanges_and_says_so_on_stderr(tmp_path, capfd):
    folder = tiny_policy_folder(tmp_path / "model", max_length=128)
    talk = session(folder)
    asked = ["number one, please", "number two, please", "number three, please", "and the last"]
    for text in asked:
        "".join(talk.reply(text))
    contents = [message.content for message in talk.messages]
    assert [message.role for message in talk.messages] == ["user", "assistant"] * (
        len(contents) // 2
    )
    users = contents[::2]
    assert len(users) < len(asked)
    assert users == asked[-len(users) :]
    out, err = capfd.readouterr()
    assert "[forgetting the first 2 messages: the context is full]\n" in err
    assert out == ""


def test_an_answer_takes_at_most_half_of_a_small_context(tmp_path):
    folder = tiny_policy_folder(tmp_path / "model", max_length=64)
    small = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answer = "".join(session(folder, max_tokens=1000).reply("hi"))
    assert answer == generated(small, waiting("hi"), max_tokens=32)
    assert answer != generated(small, waiting("hi"), max_tokens=31)


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(
    policy_folder, pipe, capfd, monkeypatch
):
    original = TorchEngine.stream

    def interrupted(self, request):
        monkeypatch.setattr(TorchEngine, "stream", original)
        yield next(original(self, request))
        raise KeyboardInterrupt

    monkeypatch.setattr(TorchEngine, "stream", interrupted)
    pipe("What?", "/retry", "What?")
    chat(str(policy_folder), max_tokens=8)
    out, err = capfd.readouterr()
    assert len(out.splitlines()) >= 2
    # The interrupted exchange was not remembered.
    assert err == "There is nothing to ask again.\n"


def test_a_message_longer_than_the_context_does_not_end_a_session(tmp_path, monkeypatch, capfd):
    folder = tiny_policy_folder(tmp_path / "model", max_length=64)
    small = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    lines = iter(["word " * 100, "What?"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, "/quit"))
    chat(str(folder), max_tokens=8)
    out, err = capfd.readouterr()
    assert out == generated(small, waiting("What?")) + "\n"
    assert "do not fit the model's 64 positions" in err


def test_a_negative_temperature_is_refused_before_anything_is_loaded():
    with pytest.raises(InputError, match="the temperature is -1"):
        chat("no such model", temperature=-1)


def make_run(folder, policy, *stages):
    for stage in stages:
        shutil.copytree(policy, folder / stage / "model")
    return folder


def test_a_run_folder_stands_for_its_newest_model(policy_folder, tmp_path):
    both = make_run(tmp_path / "both", policy_folder, "sft", "ppo")
    assert resolve_model(str(both)) == (str(both / "ppo" / "model"), [])
    one = make_run(tmp_path / "one", policy_folder, "sft")
    assert resolve_model(str(one)) == (str(one / "sft" / "model"), [])


def test_a_model_folder_and_a_hub_id_stand_for_themselves(policy_folder):
    assert resolve_model(str(policy_folder)) == (str(policy_folder), [])
    assert resolve_model("openchat/openchat-3.5-0106") == ("openchat/openchat-3.5-0106", [])


def test_a_folder_that_holds_no_model_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(DataError, match="starling demo"):
        resolve_model(str(tmp_path))


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="absent"):
        chat(str(tmp_path / "absent"), once="hi")


def test_a_run_offers_its_first_questions_of_three_categories(policy_folder, tmp_path):
    run = make_run(tmp_path / "run", policy_folder, "sft")
    rows = [
        {"turn": turn, "category": category, "messages": [{"role": "user", "content": content}]}
        for turn, category, content in [
            (2, "sums", "a second turn"),
            (1, "sums", "first sum"),
            (1, "sums", "second sum"),
            (1, "rhymes", "a rhyme"),
            (1, "lists", "a list"),
            (1, "colours", "a colour"),
        ]
    ]
    (run / "bench").mkdir()
    (run / "bench" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert resolve_model(str(run))[1] == ["first sum", "a rhyme", "a list"]


def test_in_a_terminal_it_greets_offers_prompts_and_ends_with_the_input(
    policy_folder, theirs, monkeypatch, capfd
):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    lines = iter(["What?"])

    def typed(prompt):
        assert prompt == "> "
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(
        chat_module, "resolve_model", lambda reference: (reference, ["Try to rhyme."])
    )
    chat(str(policy_folder), max_tokens=8)
    out, err = capfd.readouterr()
    assert out == generated(theirs, waiting("What?")) + "\n"
    assert "at temperature 0" in err
    assert "  try: Try to rhyme.\n" in err

"""Chat in the terminal: stdout is what transformers would generate, the rest goes to stderr."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import starling
from starling.base.errors import DataError, InputError
from starling.models.torch_engine import TorchEngine
from starling.serve.chat import COMMANDS, chat, note, suggestions
from starling.serve.session import Chat
from starling.serve.tokens import read_file
from tiny import tiny_policy_folder

GREEDY = "[temperature 0, as Starling's model card advises; /temperature 1 samples]"
TIMED = r"\[(cut at )?\d+ tokens.*\]"


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


def say(folder, **settings):
    """Chat on the standard input that the test has set."""
    chat(Chat(str(folder), **{"max_tokens": 8} | settings))


def told(err):
    """What was said on stderr beside the opening line and the note after each answer."""
    lines = err.replace("> ", "").splitlines()
    return [line for line in lines if line != GREEDY and not re.fullmatch(TIMED, line)]


def test_once_answers_the_one_message_and_leaves(policy_folder, theirs, capfd):
    chat(Chat(str(policy_folder), max_tokens=8), once="/help is no command here")
    out, err = capfd.readouterr()
    assert out == generated(theirs, waiting("/help is no command here")) + "\n"
    greedy, timed = err.splitlines()
    assert greedy == GREEDY
    assert re.fullmatch(r"\[.*8 tokens.*, [\d.]+ tokens/s\]", timed)


def test_on_a_pipe_each_line_is_a_message_of_one_conversation(policy_folder, theirs, pipe, capfd):
    pipe("What?", "", "  And now? ", end="")
    say(policy_folder)
    first = generated(theirs, waiting("What?"))
    second = generated(theirs, waiting("What?", first, "And now?"))
    out, err = capfd.readouterr()
    assert out == f"{first}\n{second}\n"
    assert told(err) == []
    assert first != second


def test_a_sampled_chat_does_not_speak_of_the_model_cards_advice(policy_folder, pipe, capfd):
    pipe("/help")
    say(policy_folder, temperature=0.5)
    assert GREEDY not in capfd.readouterr().err


def test_an_answer_that_was_cut_says_so_and_how_to_get_more(policy_folder, theirs, pipe, capfd):
    pipe("What?", "/max-tokens 16", "/retry")
    say(policy_folder)
    out, err = capfd.readouterr()
    assert "[cut at 8 tokens: /max-tokens 16, then /retry, " in err
    longer = generated(theirs, waiting("What?"), max_tokens=16)
    assert out.removeprefix(generated(theirs, waiting("What?")) + "\n") == longer + "\n"


def test_retry_asks_the_last_message_again(policy_folder, theirs, type_in, capfd):
    type_in("/retry", "What?", "/retry", "Why?")
    say(policy_folder)
    first = generated(theirs, waiting("What?"))
    # The retried exchange stands once in what the model reads next.
    last = generated(theirs, waiting("What?", first, "Why?"))
    out, err = capfd.readouterr()
    assert out == f"{first}\n{first}\n{last}\n"
    assert told(err)[1:] == [
        "there is nothing to ask again",
        "[at temperature 0 an answer stays the same; /temperature 1 draws another]",
    ]


def test_a_retry_at_a_temperature_draws_anew(policy_folder, pipe, capfd):
    pipe("/temperature 2", "What?", "/retry")
    say(policy_folder, max_tokens=12)
    out, err = capfd.readouterr()
    first, second = out.splitlines()[:2]
    assert first != second
    assert told(err) == ["temperature 2"]


def test_undo_takes_back_the_last_exchange(policy_folder, theirs, type_in, capfd):
    type_in("/undo", "What?", "Why?", "/undo", "How?")
    say(policy_folder)
    first = generated(theirs, waiting("What?"))
    out, err = capfd.readouterr()
    assert out.endswith(generated(theirs, waiting("What?", first, "How?")) + "\n")
    assert told(err)[1:] == ["there is nothing to take back", "took back 'Why?' and its answer"]


def test_new_forgets_the_conversation(policy_folder, theirs, pipe, capfd):
    pipe("What?", "/new", "What?")
    say(policy_folder)
    first = generated(theirs, waiting("What?"))
    out, err = capfd.readouterr()
    assert out == f"{first}\n{first}\n"
    assert told(err) == ["A new conversation."]


@pytest.mark.parametrize(
    ("typed", "name"),
    [("code", "Code"), ("MATH", "Math Correct"), ("gpt4", "GPT4 Correct"), ("c", "Code")],
)
def test_a_mode_is_named_by_its_beginning(policy_folder, theirs, pipe, capfd, typed, name):
    pipe(f"/mode {typed}", "What?")
    say(policy_folder)
    written = waiting("What?").replace("GPT4 Correct", name)
    out, err = capfd.readouterr()
    assert out == generated(theirs, written) + "\n"
    assert told(err) == [f"mode {name}; there are GPT4 Correct, Code, Math Correct"]


def test_the_default_mode_comes_back(policy_folder, theirs, pipe, capfd):
    pipe("/mode code", "/mode default", "What?")
    say(policy_folder)
    assert capfd.readouterr().out == generated(theirs, waiting("What?")) + "\n"


def test_a_system_message_stands_first_until_it_is_cleared(policy_folder, theirs, pipe, capfd):
    pipe("/system  Be brief.", "What?", "/new", "/system", "What?")
    say(policy_folder)
    # OpenChat's training format: a system message has no prefix.
    briefly = generated(theirs, "Be brief.<|end_of_turn|>" + waiting("What?"))
    out, _ = capfd.readouterr()
    assert out == f"{briefly}\n{generated(theirs, waiting('What?'))}\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/mode cod3", "unknown mode 'cod3'; openchat has GPT4 Correct, Code, Math Correct"),
        ("/temperature warm", "found 'warm'"),
        ("/temperature", "found ''"),
        ("/temperature -1", "the temperature is -1.0; it must be 0 (greedy) or above"),
        ("/temperature nan", "the temperature is nan"),
        ("/max-tokens 0", "max_tokens is 0; it must be at least 1"),
        ("/max-tokens 2.5", "found '2.5'"),
        ("/best-of 8", "best-of needs a reward model"),
        ("/best-of 0", "best_of is 0"),
        ("/save", "name a file"),
        ("/rtry now", "unknown command /rtry; /help lists all"),
        ("/", "unknown command /;"),
    ],
)
def test_a_wrong_command_is_told_and_nothing_is_lost(
    policy_folder, theirs, type_in, pipe, capfd, line, said
):
    type_in("What?\n", line + "\n", "Why?\n")
    say(policy_folder)
    out, err = capfd.readouterr()
    first = generated(theirs, waiting("What?"))
    assert out == f"{first}\n{generated(theirs, waiting('What?', first, 'Why?'))}\n"
    [_greeting, note] = told(err)
    assert said in note
    # On a pipe nobody reads the note: what follows would be answered as if it had worked.
    pipe("What?", line, "Why?")
    with pytest.raises(InputError, match=re.escape(said)):
        say(policy_folder)
    assert capfd.readouterr().out == f"{first}\n"


def test_help_names_every_command(policy_folder, pipe, capfd):
    pipe("/help")
    say(policy_folder)
    out, err = capfd.readouterr()
    assert out == ""
    assert all(f"\n  /{name} " in err for name in COMMANDS)


def test_a_line_that_begins_with_a_space_is_a_message(policy_folder, theirs, pipe, capfd):
    pipe(" /retry is what?")
    say(policy_folder)
    assert capfd.readouterr().out == generated(theirs, waiting("/retry is what?")) + "\n"


def test_quit_leaves_what_follows_unread(policy_folder, pipe, capfd):
    pipe("/quit", "What?")
    say(policy_folder)
    assert capfd.readouterr().out == ""


def test_a_saved_conversation_is_what_starling_tokens_reads(
    policy_folder, type_in, capfd, tmp_path
):
    path = tmp_path / "new" / "said.json"
    type_in("/system Be brief.", f"/save {path}", "What?", f"/save {path}", "Why?", f"/save {path}")
    say(policy_folder)
    out, err = capfd.readouterr()
    first, second = out.splitlines()[0], "\n".join(out.splitlines()[1:])
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": second},
    ]
    assert [message.content for message in read_file(str(path))][1::2] == ["What?", "Why?"]
    assert "there is nothing to save" in told(err)


def test_a_file_of_another_is_not_overwritten(policy_folder, type_in, capfd, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("mine", encoding="utf-8")
    type_in("What?", f"/save {path}", f"/save {tmp_path}", f"/save {path}/below")
    say(policy_folder)
    assert path.read_text(encoding="utf-8") == "mine"
    _greeting, *taken, below = told(capfd.readouterr().err)
    assert [line.endswith("is there already; name another file") for line in taken] == [True] * 2
    assert below.startswith(f"could not write {path}/below")


def test_best_of_picks_and_says_what_with_and_how_it_samples(
    policy_folder, reward_folder, pipe, capfd
):
    pipe("/best-of 3", "What?", "/temperature 0.5", "/best-of 2", "/best-of 1", "/temperature 0")
    say(policy_folder, reward_model=str(reward_folder))
    out, err = capfd.readouterr()
    lines = told(err)
    assert lines[0] == (
        f"the best of 3 by {reward_folder}, sampled at temperature 1 (at 0 all are alike)"
    )
    assert lines[1] == "[3 answers, of which the reward model picks one]"
    assert f"the best of 2 by {reward_folder}, sampled at temperature 0.5" in lines
    assert out.endswith("\n")
    assert re.search(r"the best of 3, [\d.]+ s\]", err)


def test_an_error_ends_a_pipe(tmp_path, pipe):
    folder = tiny_policy_folder(tmp_path / "model", max_length=64)
    pipe("word " * 100)
    with pytest.raises(DataError, match="do not fit the model's 64 positions"):
        say(folder)


class Typed(io.StringIO):
    """A standard input that claims to be a terminal; an exception among its lines is raised."""

    def __init__(self, *lines):
        super().__init__()
        self._lines = iter(lines)

    def isatty(self):
        return True

    def readline(self, *_):
        line = next(self._lines, "")
        if isinstance(line, type):
            raise line
        return line


@pytest.fixture
def type_in(monkeypatch):
    return lambda *lines: monkeypatch.setattr("sys.stdin", Typed(*lines))


def test_a_message_longer_than_the_context_does_not_end_a_session(tmp_path, type_in, capfd):
    folder = tiny_policy_folder(tmp_path / "model", max_length=64)
    small = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    type_in("word " * 100, "What?")
    say(folder)
    out, err = capfd.readouterr()
    assert out == generated(small, waiting("What?")) + "\n"
    assert "do not fit the model's 64 positions" in err


@pytest.fixture
def interrupt_after(monkeypatch):
    """Press Ctrl-C after so many tokens of the first answer."""
    original = TorchEngine.stream

    def press(count):
        def stream(self, request):
            monkeypatch.setattr(TorchEngine, "stream", original)
            tokens = original(self, request)
            yield from (next(tokens) for _ in range(count))
            raise KeyboardInterrupt

        monkeypatch.setattr(TorchEngine, "stream", stream)

    return press


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    policy_folder, theirs, type_in, capfd, interrupt_after
):
    interrupt_after(4)
    type_in("What?", "Why?", "/undo", "/retry")
    say(policy_folder)
    out, err = capfd.readouterr()
    cut, second, again = out.splitlines()
    whole = generated(theirs, waiting("What?"))
    assert whole.startswith(cut)
    assert 0 < len(cut) < len(whole)
    assert "[stopped: /retry asks again, /undo takes it back]" in told(err)
    assert second == generated(theirs, waiting("What?", cut, "Why?"))
    assert again == whole


def test_ctrl_c_before_the_first_word_leaves_the_conversation_as_it_was(
    policy_folder, type_in, capfd, interrupt_after
):
    interrupt_after(0)
    type_in("What?", "/retry")
    say(policy_folder)
    out, err = capfd.readouterr()
    assert out == ""
    assert "there is nothing to ask again" in told(err)


def test_a_retry_that_is_stopped_at_once_keeps_the_earlier_answer(
    policy_folder, theirs, type_in, capfd, interrupt_after, monkeypatch
):
    original = TorchEngine.stream
    calls = []

    def stream(self, request):
        calls.append(request)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, request)

    monkeypatch.setattr(TorchEngine, "stream", stream)
    type_in("What?", "/retry", "Why?")
    say(policy_folder)
    first, second = capfd.readouterr().out.splitlines()
    assert second == generated(theirs, waiting("What?", first, "Why?"))


def test_ctrl_c_twice_at_the_prompt_leaves_and_once_does_not(policy_folder, type_in, capfd):
    type_in(KeyboardInterrupt, "/new", KeyboardInterrupt, KeyboardInterrupt, "What?")
    say(policy_folder)
    out, err = capfd.readouterr()
    assert out == ""
    assert "A new conversation." in told(err)


def test_ctrl_c_ends_a_pipe(policy_folder, pipe, interrupt_after):
    interrupt_after(2)
    pipe("What?", "Why?")
    with pytest.raises(KeyboardInterrupt):
        say(policy_folder)


def test_in_a_terminal_it_greets_offers_prompts_and_ends_with_the_input(
    policy_folder, theirs, type_in, capfd
):
    type_in("What?")
    say(policy_folder)
    out, err = capfd.readouterr()
    # The prompt is no part of an answer that goes to a file.
    assert out == generated(theirs, waiting("What?")) + "\n"
    assert f"Chatting with {policy_folder}. /help lists the commands, /quit leaves." in err
    assert err.count("> ") == 2


def test_a_run_offers_its_first_questions_of_three_categories(tmp_path):
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
    (tmp_path / "bench").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "bench" / "answers.jsonl").write_text(text)
    assert suggestions(tmp_path) == ["first sum", "a rhyme", "a list"]


def test_a_negative_temperature_is_refused_before_anything_is_loaded():
    with pytest.raises(InputError, match="the temperature is -1"):
        Chat("no such model", temperature=-1)


# A real process, as a shell starts it; with `SLOW`, every token takes a while.
PROGRAM = """
import os, sys, time
from starling.cli import main
if os.environ.get("SLOW"):
    from starling.models.torch_engine import TorchEngine
    fast = TorchEngine.stream
    def slow(self, request):
        tokens = fast(self, request)
        while True:
            try:
                token = next(tokens)
            except StopIteration as end:
                return end.value
            yield token
            time.sleep(0.1)
    TorchEngine.stream = slow
sys.exit(main(["chat", *sys.argv[1:]]))
"""


def environment(**extra):
    path = os.pathsep.join([str(Path(starling.__file__).parents[1])])
    return {**os.environ, "PYTHONPATH": path, **extra}


def run_chat(*arguments, stdin=b"", **extra):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env=environment(**extra),
        timeout=120,
        check=False,
    )


def test_a_real_pipe_gets_only_answers_and_bad_bytes_do_not_end_it(policy_folder, theirs):
    done = run_chat(
        policy_folder,
        "--max-tokens",
        "8",
        stdin=b"\xff\n/mode code\nhi\n",
        PYTHONIOENCODING="utf-8",
    )
    assert done.returncode == 0, done.stderr
    first = generated(theirs, waiting("\ufffd"))
    assert done.stdout.decode().startswith(first + "\n")
    assert b"Traceback" not in done.stderr


def test_a_real_once_answers_and_an_error_has_exit_status_2(policy_folder, theirs, tmp_path):
    done = run_chat(policy_folder, "--max-tokens", "8", "--once", "hi")
    assert (done.returncode, done.stdout.decode()) == (0, generated(theirs, waiting("hi")) + "\n")
    done = run_chat(tmp_path / "absent", "--once", "hi")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"error: there is no folder")


class Screen:
    """A program on a pseudo-terminal: type, press Ctrl-C, wait for what it shows."""

    def __init__(self, *arguments):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
            os.execve(sys.executable, command, environment(SLOW="1", TERM="dumb"))
        self.shown = ""

    def type(self, text):
        os.write(self.terminal, text.encode())

    def wait_for(self, text, seconds=60):
        """Read until `text` stands in what was shown since the last wait, and return that."""
        self._read_until(lambda shown: text in shown, seconds)
        assert text in self.shown, self.shown
        before, _, self.shown = self.shown.partition(text)
        return before

    def wait_for_more(self, seconds=60):
        """Read until anything but the ends of lines was shown since the last wait."""
        self._read_until(lambda shown: shown.strip(), seconds)
        assert self.shown.strip(), "nothing was shown"

    def _read_until(self, is_enough, seconds):
        ends = time.monotonic() + seconds
        while not is_enough(self.shown) and time.monotonic() < ends:
            if not select.select([self.terminal], [], [], 1.0)[0]:
                continue
            try:
                self.shown += os.read(self.terminal, 4096).decode(errors="replace")
            except OSError:
                break

    def press_ctrl_c(self):
        """At a prompt: a press between the prompt and the wait for input would go unnoticed."""
        time.sleep(0.5)
        self.type("\x03")

    def leave(self, seconds=60):
        """The exit status; a program that stays is ended, and fails the test."""
        for _ in range(10 * seconds):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.1)
        os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_ctrl_c_on_a_real_terminal_stops_the_answer_and_not_the_program(policy_folder):
    screen = Screen(policy_folder, "--max-tokens", "150")
    try:
        screen.wait_for("> ")
        screen.type("What?\n")
        screen.wait_for("What?")
        screen.wait_for_more()
        screen.type("\x03")
        screen.wait_for("[stopped: ")
        screen.wait_for("> ")
        screen.type("/undo\n")
        screen.wait_for("took back 'What?'")
        screen.wait_for("> ")
        screen.press_ctrl_c()
        screen.wait_for("[Ctrl-C again, or /quit, leaves]")
        screen.wait_for("> ")
        screen.press_ctrl_c()
        assert screen.leave() == 0
    finally:
        os.close(screen.terminal)


def test_ctrl_c_at_once_has_exit_status_130(policy_folder):
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(policy_folder), "--once", "What?"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(SLOW="1"),
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_ctrl_c_while_a_command_works_leaves_the_program_and_its_settings_as_they_were(
    policy_folder, reward_folder, type_in, capfd, monkeypatch
):
    def interrupted(*_args, **_keywords):
        raise KeyboardInterrupt

    talk = Chat(str(policy_folder), max_tokens=8, reward_model=str(reward_folder))
    monkeypatch.setattr("starling.models.reward_model.RewardModel.load", interrupted)
    type_in("/best-of 8", "What?")
    chat(talk)
    out, err = capfd.readouterr()
    assert talk.best_of == 1
    assert "[Ctrl-C again, or /quit, leaves]" in err
    assert out.strip()


def test_an_answer_that_filled_the_context_says_that(tmp_path, type_in, capfd):
    folder = tiny_policy_folder(tmp_path / "model", max_length=32)
    type_in("What?")
    say(folder, max_tokens=512)
    assert re.search(r"\[cut at \d+ tokens: the context is full; /new", capfd.readouterr().err)


def test_what_a_stopped_bench_left_half_written_is_passed_over(tmp_path):
    rows = [{"turn": 1, "category": "math", "messages": [{"content": "2 + 2?"}]}, {"turn": 1}, 3]
    path = tmp_path / "bench" / "answers.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"turn": 1, "cat', encoding="utf-8")
    assert suggestions(tmp_path) == ["2 + 2?"]


def test_notes_do_not_obey_what_a_file_or_a_server_wrote(capfd):
    note("a\x1b]0;owned\x07\n\tb")
    assert capfd.readouterr().err == "a\\x1b]0;owned\\x07\n\tb\n"

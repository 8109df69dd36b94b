"""The interactive chat: through a real terminal, and its parts."""

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire.cli import chat as chat_module
from quire.cli.chat import Chat, read_text
from quire.cli.local import LocalEngine
from quire.config.parse import build_options
from quire.errors import UsageError

from .tools import DUMMY, environment

PROMPT = ">>> "


class Typist:
    """A chat on a pseudo-terminal. `expect` reads until a text comes."""

    def __init__(self, home: Path, *argv: str):
        self.seen = ""
        command = [sys.executable, "-m", "quire.cli.main", "run", *argv]
        variables = environment(HOME=str(home), TERM="xterm")
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            # As a shell at a terminal has it; ignored where this was started in the background.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execve(command[0], command, variables)

    def expect(self, text: str, seconds: float = 40.0) -> str:
        end = time.monotonic() + seconds
        while text not in self.seen:
            left = end - time.monotonic()
            assert left > 0, f"no {text!r} in {self.seen!r}"
            if select.select([self.terminal], [], [], left)[0]:
                try:
                    self.seen += os.read(self.terminal, 65536).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"ended without {text!r}: {self.seen!r}") from None
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, once readline waits: before, Python sees it only with the next key."""
        time.sleep(0.5)
        self.type("\x03")

    def ask(self, text: str) -> str:
        """Type a line; returns what came until the next prompt."""
        self.type(text + "\n")
        return self.expect(PROMPT)

    def exit_code(self) -> int:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if select.select([self.terminal], [], [], 0.05)[0]:
                try:
                    self.seen += os.read(self.terminal, 65536).decode(errors="replace")
                except OSError:
                    continue
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"the chat did not end: {self.seen!r}")


def test_a_conversation_in_a_terminal(chat_model: str, tmp_path: Path) -> None:
    user = Typist(tmp_path, chat_model, *DUMMY, "--max-tokens", "40", "--ignore-eos")
    assert "/help" in user.expect(PROMPT)
    assert "temperature 0.5" in user.ask("/set temperature 0.5")
    assert "from 0 to 100" in user.ask("/set temperature 500")
    assert "'temperature'" in user.ask("/set tempreture 1")
    assert "/help lists them" in user.ask("/sett x")
    first = user.ask("hello, this is more than two blocks of tokens")
    assert "40 tokens" in first and "TTFT" in first and "tok/s" in first
    assert "(0 cached)" in first and "finish length" in first
    second = user.ask('"""two\nlines"""')
    # Whole blocks of the history; the random answer's bytes are no text that comes back alike.
    assert re.search(r"\((32|48) cached\)", second), second
    assert "max_tokens 30000" in user.ask("/set max_tokens 30000")
    user.type("go on\n")
    user.expect("go on\r\n")
    user.interrupt()
    assert "finish abort" in user.expect(PROMPT)
    user.interrupt()  # the second in a row leaves
    assert user.exit_code() == 130
    assert "Traceback" not in user.seen
    saved = (tmp_path / ".cache/quire/chat_history").read_text()
    assert "/set temperature 0.5" in saved


def test_the_end_of_input_leaves(chat_model: str, tmp_path: Path) -> None:
    user = Typist(tmp_path, chat_model, *DUMMY)
    user.expect(PROMPT)
    user.interrupt()
    user.expect("again leaves")
    user.expect(PROMPT)  # before it the terminal still reads lines: there the key is lost
    user.type("\x04")
    assert user.exit_code() == 0


@pytest.fixture(scope="module")
def engine(chat_model: str) -> LocalEngine:
    options = build_options({"model": chat_model, "load_format": "dummy"})
    return LocalEngine(options, lambda phase, fraction: None)


@pytest.fixture
def talk(engine: LocalEngine) -> Iterator[Chat]:
    yield Chat(engine, {"max_tokens": 8, "ignore_eos": True, "temperature": 0.0})
    assert engine.engine.core.idle, "the engine is left empty"


def test_the_history_grows_by_turns_and_is_cleared(talk: Chat) -> None:
    talk.take("one")
    talk.take("two")
    assert [m["role"] for m in talk.history] == ["user", "assistant"] * 2
    assert [m["content"] for m in talk.history[::2]] == ["one", "two"]
    talk.take("/clear")
    assert talk.history == []


def test_the_system_message_is_part_of_the_prompt(
    talk: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.take("/system be brief")
    assert "be brief" in capsys.readouterr().out
    talk.take("x")
    # <system>be brief</s><user>x</s><assistant>
    assert "prompt 14 " in capsys.readouterr().err
    talk.take("/system none")
    assert talk.system is None


def test_a_stopped_answer_stays_in_the_history(
    talk: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stops(chat_module.Interrupts):
        asked = 0

        @property
        def hit(self) -> bool:  # type: ignore[override]
            self.asked += 1
            return self.asked > 5

        @hit.setter
        def hit(self, value: bool) -> None: ...

    monkeypatch.setattr(chat_module, "Interrupts", Stops)
    talk.take("/set max_tokens 10000")
    talk.take("count")
    assert len(talk.history) == 2
    err = capsys.readouterr().err
    assert "finish abort" in err and "[5 tokens" in err


def test_a_message_that_does_not_fit_leaves_the_history_alone(talk: Chat) -> None:
    talk.take("one")
    before = list(talk.history)
    with pytest.raises(UsageError):
        talk.take("x" * 40000)
    assert talk.history == before


def test_set_refuses_and_unset_restores(talk: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("/set n 2", "/set top_p 0", "/set max_tokens many", "/set nonsense 1"):
        with pytest.raises(UsageError):
            talk.take(wrong)
    with pytest.raises(UsageError, match="vocabulary"):
        talk.take("/set allowed_token_ids [100000]")
    talk.take("/set top_p 0.5")
    assert talk.fields["top_p"] == 0.5
    talk.take("/unset top_p")
    assert "top_p" not in talk.fields
    capsys.readouterr()
    talk.take("/set")
    assert "temperature 0.0" in capsys.readouterr().out
    talk.take("/set temperature")
    assert "from 0 to 100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["one"], "one"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""one', "", 'two"""'], "one\n\ntwo"),
        (['"""', "one", '"""'], "one"),
        (['"""one"""'], "one"),
    ],
)
def test_messages_of_several_lines(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], text: str
) -> None:
    rest = iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt: next(rest))
    assert read_text() == text
    assert next(rest, None) is None

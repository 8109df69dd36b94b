"""The interactive chat of `quire run`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from quire.cli.local import Interrupts, LocalEngine, Message
from quire.cli.report import EXIT_INTERRUPTED
from quire.cli.sampling import check_settable, make_params, parse_value, settable
from quire.cli.terminal import dim, printable
from quire.errors import QuireError
from quire.params import LIMITS

HELP = """\
/set NAME VALUE   change a sampling parameter, like /set temperature 0.2; /set alone lists them
/unset NAME       back to the model's default
/system TEXT      set the system message; /system alone shows it, /system none removes it
/clear            forget the conversation
/help             this
/exit             leave (so do Ctrl-D, and Ctrl-C twice)
A line that ends in \\ goes on in the next; \"\"\" begins and ends a text of several lines.
Ctrl-C stops an answer; what was said of it stays in the conversation."""
QUOTES = '"""'
HISTORY_FILE = "~/.cache/quire/chat_history"
HISTORY_LINES = 1000


class Chat:
    """A conversation. `fields` are the sampling parameters that the user chose."""

    def __init__(self, engine: LocalEngine, fields: dict[str, Any], system: str | None = None):
        self.engine = engine
        self.fields = dict(fields)
        self.system = system
        self.history: list[Message] = []
        self._interrupted = False

    def run(self) -> int:
        """Talk until the user leaves; returns the exit code."""
        history = _open_history()
        print(dim("/help lists commands, /exit leaves", sys.stderr), file=sys.stderr)
        try:
            while True:
                try:
                    text = read_text()
                except EOFError:
                    print()
                    return 0
                except KeyboardInterrupt:
                    if self._interrupted:
                        print()
                        return EXIT_INTERRUPTED
                    self._interrupted = True
                    print("\n(Ctrl-C again leaves)")
                    continue
                self._interrupted = False
                if text.strip() == "/exit":
                    return 0
                try:
                    self.take(text)
                except QuireError as error:
                    print(f"error: {error}", file=sys.stderr)
        finally:
            _save_history(history)

    def take(self, text: str) -> None:
        """A command or a message of the user. Raises QuireError."""
        if not text.strip():
            return
        word, _, rest = text.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/set": self._set,
            "/unset": self._unset,
            "/system": self._system,
            "/clear": self._clear,
            "/help": lambda _: print(HELP),
        }
        if word.strip() in commands:
            commands[word.strip()](rest.strip())
        elif word.startswith("/") and word[1:].isalpha():
            print(f"unknown command {word}; /help lists them", file=sys.stderr)
        else:
            self._ask(text)

    def _ask(self, text: str) -> None:
        """Answer a message; one that cannot be answered leaves the history as it was."""
        params = make_params(self.engine.info.default_params, self.fields)
        asked = [*self.history, {"role": "user", "content": text}]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        prompt = self.engine.encode([*system, *asked])
        with Interrupts() as interrupts:
            answer = self.engine.answer(prompt, params, _show, lambda: interrupts.hit)
        self._interrupted = interrupts.hit
        print(flush=True)
        print(dim(f"[{answer.statistics()}]", sys.stderr), file=sys.stderr, flush=True)
        self.history = [*asked, {"role": "assistant", "content": answer.text}]

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        name = name.replace("-", "_")
        params = make_params(self.engine.info.default_params, self.fields)
        if not name:
            for known in settable():
                print(f"{known} {json.dumps(getattr(params, known))}")
            return
        wanted = parse_value(name, value.strip())
        if not value:
            allowed = LIMITS[name].describe()
            print(f"{name} {json.dumps(getattr(params, name))} (allowed: {allowed})")
            return
        check_settable(name)
        fields = {**self.fields, name: wanted}
        params = make_params(self.engine.info.default_params, fields)
        params.check_vocabulary(self.engine.info.vocab_size)
        self.fields = fields
        print(f"{name} {json.dumps(getattr(params, name))}")

    def _unset(self, rest: str) -> None:
        name = rest.replace("-", "_")
        parse_value(name, "")  # a wrong name is told
        self.fields.pop(name, None)
        params = make_params(self.engine.info.default_params, self.fields)
        print(f"{name} {json.dumps(getattr(params, name))}")

    def _system(self, rest: str) -> None:
        if rest:
            self.system = None if rest == "none" else rest
        print(f"system: {self.system if self.system is not None else '(the template decides)'}")

    def _clear(self, rest: str) -> None:
        self.history = []
        print("the conversation is forgotten")


def read_text() -> str:
    """One message: a line, lines joined by backslashes, or a block in triple quotes.

    Raises EOFError, and KeyboardInterrupt for Ctrl-C.
    """
    line = input(">>> ")
    if line.lstrip().startswith(QUOTES):
        text = line.lstrip()[len(QUOTES) :]
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + input("... ")
        return text.rstrip()[: -len(QUOTES)].strip("\n")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input("... ")
    return line


def _show(text: str) -> None:
    sys.stdout.write(printable(text, sys.stdout))
    sys.stdout.flush()


def _open_history() -> Path | None:
    """Line editing with the lines of earlier chats, where this Python has readline."""
    try:
        import readline
    except ImportError:
        return None
    path = Path(HISTORY_FILE).expanduser()
    with suppress(OSError):  # the first chat, or a home that cannot be read: no earlier lines
        readline.read_history_file(path)
    return path


def _save_history(path: Path | None) -> None:
    if path is None:
        return
    import readline

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.set_history_length(HISTORY_LINES)
        readline.write_history_file(path)
        path.chmod(0o600)
    except OSError as error:
        print(f"the chat's input lines were not saved: {error}", file=sys.stderr)

"""Entry point of the `quire` command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import sys
from dataclasses import dataclass
from typing import NoReturn

import quire
from quire.cli.flags import CommandLineError, Invocation, Parser
from quire.cli.report import report
from quire.errors import suggest
from quire.settings import settings


@dataclass(frozen=True)
class Command:
    """A command: its words besides flags, and the module with `add_flags` and `run`."""

    name: str
    words: tuple[str, ...]
    about: str
    module: str


COMMANDS = [
    Command(
        "run",
        ("MODEL", "PROMPT"),
        "answer PROMPT (- reads it from stdin), or chat without one",
        "quire.cli.run",
    ),
    Command("serve", ("MODEL",), "serve an OpenAI-compatible API", "quire.cli.serve"),
    Command("plan", ("MODEL",), "show what would run where, and why, unloaded", "quire.cli.plan"),
    Command("bench offline", ("MODEL",), "measure the engine", "quire.cli.bench_offline"),
    Command(
        "bench quality",
        ("MODEL",),
        "compare a model's probabilities with a baseline's",
        "quire.cli.bench_quality",
    ),
    Command("bench serve", (), "measure a running server", "quire.cli.bench_serve"),
    Command("bench tiers", ("MODEL",), "measure the KV tiers", "quire.cli.bench_tiers"),
    Command("version", (), "show versions", "quire.cli.version"),
]


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` (sys.argv[1:]) names; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character still works
            stream.reconfigure(errors="backslashreplace")
    debug = False
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(usage())
            return 0
        if argv[0] == "--version":
            argv = ["version", *argv[1:]]
        command, rest = find_command(argv)
        parser = Parser(command.name, "".join(f"[{w}] " for w in command.words), command.about)
        module = importlib.import_module(command.module)
        module.add_flags(parser)
        flags, words = parser.parse_words(rest, len(command.words))
        level = getattr(flags, "log_level", settings().options.get("log_level", ""))
        debug = level == "debug"
        invocation = Invocation(f"quire {shlex.join(argv)}", flags, words)
        code: int = module.run(invocation)
        sys.stdout.flush()
        return code
    except BaseException as error:
        if isinstance(error, SystemExit):  # argparse's --help
            return int(error.code or 0)
        if isinstance(error, BrokenPipeError):
            # What is left in the buffer cannot be written either; keep the interpreter's exit
            # from trying.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return report(error, "--json" in argv, debug)


def find_command(argv: list[str]) -> tuple[Command, list[str]]:
    """The command at the head of `argv` and the rest. Raises CommandLineError."""
    for size in (2, 1):
        name = " ".join(argv[:size])
        for command in COMMANDS:
            if command.name == name and len(argv) >= size:
                return command, argv[size:]
    groups = [c.name for c in COMMANDS if c.name.startswith(f"{argv[0]} ")]
    if groups:
        if set(argv[1:]) & {"-h", "--help"}:
            print(usage())
            raise SystemExit(0)
        given = argv[1] if len(argv) > 1 else ""
        what = f"unknown command {argv[0]} {given}" if given else f"{argv[0]} needs a command"
        raise CommandLineError("unknown_command", what, fix=f"use {' or '.join(groups)}")
    names = [c.name for c in COMMANDS]
    fix = suggest(argv[0], [n.split()[0] for n in names]) or f"commands: {', '.join(names)}"
    if argv[0].startswith("-"):
        raise CommandLineError("unknown_flag", f"unknown flag {argv[0]!r}", fix=fix)
    raise CommandLineError("unknown_command", f"unknown command {argv[0]!r}", fix=fix)


def usage() -> str:
    """The text of `quire --help`."""
    rows = [(" ".join([c.name, *(f"[{w}]" for w in c.words)]), c.about) for c in COMMANDS]
    width = max(len(left) for left, _ in rows) + 2
    lines = [
        f"Quire {quire.__version__}: an LLM inference and serving engine",
        "",
        "usage: quire COMMAND [words] [options]",
        "",
        *(f"  {left:{width}}{right}" for left, right in rows),
        "",
        "MODEL: a directory, a .gguf file, a Hugging Face id, or the alias smollm2 (the default).",
        "quire COMMAND --help lists a command's options; docs/options.md has them all.",
    ]
    return "\n".join(lines)


def set_up_logging(level: str) -> None:
    """Logs go to stderr."""
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s")


def entry() -> NoReturn:
    """`python -m quire.cli.main`."""
    sys.exit(main())


if __name__ == "__main__":
    entry()

"""Flags of a command, generated from quire.config.options, and what a command line gave."""

from __future__ import annotations

import argparse
import re
from dataclasses import Field, dataclass
from typing import Any, NoReturn

from quire.config.options import Options, all_options
from quire.config.parse import base_type, build_options, describe
from quire.errors import UsageError, suggest
from quire.settings import settings

# Where a flag of another engine or of habit has a home under another form.
HINTS = {
    "--model": "the model is the first argument of the command, without a flag",
    "--prompt": "the prompt is the second argument of `quire run`, without a flag",
}


class CommandLineError(UsageError):
    """The command line, an environment variable or the config file is wrong: exit code 2."""


class Parser(argparse.ArgumentParser):
    """Parses the flags of one command; words that are no flags are left to `parse_words`."""

    def __init__(self, command: str, words: str, about: str):
        super().__init__(
            prog=f"quire {command}",
            usage=f"quire {command} {words}[options]",
            description=about,
            allow_abbrev=False,
            add_help=False,
        )
        general = self.add_argument_group("general")
        general.add_argument("-h", "--help", action="help", help="show this and exit")
        general.add_argument("--json", action="store_true", help="machine-readable output")
        general.add_argument("--config", metavar="FILE", help="options from a TOML file")
        add_option(general, "log_level", all_options()["log_level"][1])

    def error(self, message: str) -> NoReturn:
        """Raise CommandLineError instead of leaving."""
        raise CommandLineError("usage", f"{self.prog}: {message}", fix=f"see {self.prog} --help")

    def add_sections(self, *sections: str) -> None:
        """Flags of all options of these sections that the command has not described itself; the
        model is a word, not a flag."""
        for section in sections:
            group = self.add_argument_group(f"{section} options")
            for name, (_, item) in all_options(section).items():
                if name != "model" and _flag(name) not in self._option_string_actions:
                    add_option(group, name, item)

    def parse_words(self, argv: list[str], most: int) -> tuple[argparse.Namespace, list[str]]:
        """The flags, and at most `most` words that are no flags, wherever they stand.

        Raises CommandLineError.
        """
        flags, rest = self.parse_known_args(argv)
        words = []
        for i, word in enumerate(rest):
            if word == "--":
                words += rest[i + 1 :]
                break
            if word.startswith("-") and word != "-" and not re.match(r"-[\d.\s]", word):
                raise self._unknown_flag(word.split("=")[0])
            words.append(word)
        if len(words) > most:
            raise CommandLineError(
                "usage",
                f"{self.prog}: unexpected argument {words[most]!r}",
                why=f"it takes at most {most} besides flags" if most else "it takes only flags",
                fix="put a text of several words in quotes" if most > 1 else "",
            )
        return flags, words

    def _unknown_flag(self, flag: str) -> CommandLineError:
        known = [s for action in self._actions for s in action.option_strings]
        fix = HINTS.get(flag) or suggest(flag.replace("_", "-"), known)
        return CommandLineError(
            "unknown_flag",
            f"{self.prog}: unknown flag {flag}",
            fix=fix or f"see {self.prog} --help",
            field=flag,
        )


def add_option(group: argparse._ArgumentGroup, name: str, item: Field[Any]) -> None:
    """The flag of one option. It is absent from the namespace unless it was given."""
    flag = _flag(name)
    text = describe(item).replace("%", "%%")
    if item.default not in (None, False):
        text += f" [{'yes' if item.default is True else item.default}]"
    if base_type(item) == "bool":
        action = argparse.BooleanOptionalAction
        group.add_argument(flag, action=action, default=argparse.SUPPRESS, help=text)
        return
    metavar = {"int": "N", "float": "X"}.get(base_type(item), "TEXT")
    if item.metadata["size"]:
        metavar = "SIZE"
    group.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=text)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Invocation:
    """One command with its flags and words. `command` is as typed, for a benchmark's record."""

    command: str
    flags: argparse.Namespace
    words: list[str]

    @property
    def json(self) -> bool:
        return bool(self.flags.json)

    def given(self) -> dict[str, Any]:
        """The options that this command line names."""
        known = all_options()
        return {name: value for name, value in vars(self.flags).items() if name in known}

    def options(self, model: str | None = None) -> Options:
        """Options from the command line, the environment and the config file.

        `model`: the word that names the model. Raises CommandLineError.
        """
        given = self.given() | ({} if model is None else {"model": model})
        try:
            return build_options(given, settings().options, self.flags.config)
        except UsageError as error:
            raise CommandLineError(
                error.code, error.what, error.why, error.fix, error.field
            ) from error

"""Fixtures of the CLI tests: tiny models, and commands run in this process."""

import os
from collections.abc import Iterator

import pytest

from quire.cli.main import main
from quire.settings import settings

from .tools import TEMPLATE, Quire, Ran, write_model


@pytest.fixture(scope="session")
def ids_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without tokenizer: prompts are token ids."""
    return write_model(tmp_path_factory.mktemp("models") / "ids")


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a byte tokenizer and a chat template; long enough to be interrupted."""
    path = tmp_path_factory.mktemp("models") / "chat"
    return write_model(path, text=True, template=TEMPLATE, max_position_embeddings=32768)


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a tokenizer and no chat template."""
    return write_model(tmp_path_factory.mktemp("models") / "text", text=True)


@pytest.fixture
def quire(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Quire]:
    """Runs a command in this process; `environment` are variables for it."""

    def run(*argv: str, environment: dict[str, str] | None = None) -> Ran:
        for name in [n for n in os.environ if n.startswith("QUIRE_")]:
            monkeypatch.delenv(name)
        for name, value in (environment or {}).items():
            monkeypatch.setenv(name, value)
        settings.cache_clear()
        capsys.readouterr()
        code = main(list(argv))
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    yield run
    settings.cache_clear()

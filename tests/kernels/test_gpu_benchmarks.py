"""benchmarks/gpu: every command is listed, and says without a GPU that it needs one."""

import runpy
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import harness

ROOT = Path(harness.__file__).parent.parent
NAMES = [path.stem for path in sorted(ROOT.glob("gpu/*.py")) if "__main__" in path.read_text()]
TIMED = [name for name in NAMES if name != "steps"]  # its own test: tests/runner/test_gpu_steps.py


def test_the_readme_lists_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert NAMES
    assert not [name for name in NAMES if f"`python -m benchmarks.gpu.{name}" not in text]


@pytest.mark.parametrize("name", TIMED)
def test_without_a_gpu_a_command_says_so_before_it_computes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "find_gpu", lambda: (None, "it was taken out"))
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.gpu.{name}", run_name="__main__")
    assert ended.value.code == 1
    assert "why: it was taken out" in capsys.readouterr().err


def test_a_word_is_one_of_its_choices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "find_gpu", lambda: (object(), ""))
    monkeypatch.setattr(sys, "argv", ["program", "few"])
    assert harness.command("about", mode=["few", "many"], shape=[]) == ["few", ""]
    monkeypatch.setattr(sys, "argv", ["program", "all"])
    with pytest.raises(SystemExit):
        harness.command("about", mode=["few", "many"])
    assert "'few', 'many'" in capsys.readouterr().err

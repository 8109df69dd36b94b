"""The command line itself: help, flags, suggestions, exit codes, error forms, start-up time."""

import json
import re
import resource
import subprocess
import sys

import pytest

from quire.cli import main as cli
from quire.cli.sampling import FLAGS
from quire.config.options import all_options
from quire.params import LIMITS

from .tools import IDS, Quire, environment, spawn

HEAVY = ("torch", "transformers", "starlette", "uvicorn", "numpy", "rich", "tokenizers", "msgspec")


@pytest.mark.parametrize("argv", [["--help"], ["version"], ["nonsense"]])
def test_light_commands_import_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys, quire.cli.main as m; m.main(sys.argv[1:]); "
        f"print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", [c.name for c in cli.COMMANDS])
def test_help_of_every_command_imports_no_torch(command: str) -> None:
    code = (
        "import sys, quire.cli.main as m; code = m.main(sys.argv[1:]); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    argv = [sys.executable, "-c", code, *command.split(), "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert f"usage: quire {command}" in done.stdout
    assert "--json" in done.stdout


def test_help_takes_under_300_ms() -> None:
    """Processor time, so that a busy machine does not decide."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        spawn("--help").communicate()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.3


def test_help_names_every_command(quire: Quire) -> None:
    ran = quire("--help")
    assert ran.code == 0
    assert all(command.name in ran.out for command in cli.COMMANDS)


def test_every_option_is_a_flag_of_serve_and_every_sampling_flag_a_parameter(
    quire: Quire,
) -> None:
    flags = set(re.findall(r"--[a-z-]+", quire("serve", "--help").out))
    wanted = {f"--{name.replace('_', '-')}" for name in all_options() if name != "model"}
    assert wanted <= flags
    assert set(FLAGS) <= set(LIMITS)


@pytest.mark.parametrize(
    ("argv", "suggestion"),
    [
        (["srve"], "'serve'"),
        (["--helpp"], "help"),
        (["bench"], "bench offline or bench quality or bench serve"),
        (["bench", "onlne"], "bench offline or bench quality or bench serve"),
        (["run", "m", "--temprature", "1"], "'--temperature'"),
        (["serve", "--max_model_len", "1"], "'--max-model-len'"),
        (["serve", "--prot=1"], "'--port'"),
        (["serve", "--model", "m"], "first argument"),
        (["serve", "a", "b"], "unexpected argument 'b'"),
        (["run", "m", "what", "is", "this"], "quotes"),
        (["serve", "--port"], "expected one argument"),
        (["serve", "--port", "http"], "whole number"),
        (["serve", "--strict=yes"], "--strict"),
        (["plan", "--dtype", "fp8"], "one of auto, float32, bfloat16"),
        (["plan", "--config", "/nowhere.toml"], "/nowhere.toml"),
        (["bench", "offline", "--scenarios", "b32,offlin64"], "'offline64'"),
        (["bench", "offline", "--repeat", "0"], "from 1 to 100"),
        (["bench", "offline", "--scale", "nan"], "from 0.0001 to 1"),
        (["bench", "serve", "--extra", "[]"], "JSON object"),
    ],
)
def test_a_wrong_command_line_is_explained_and_exits_2(
    quire: Quire, argv: list[str], suggestion: str
) -> None:
    ran = quire(*argv)
    assert ran.code == 2
    assert ran.out == ""
    assert suggestion in ran.err
    assert ran.err.startswith("error: ")
    assert "Traceback" not in ran.err


def test_wrong_environment_exits_2_with_a_suggestion(quire: Quire) -> None:
    ran = quire("plan", environment={"QUIRE_MAX_QUEU": "1"})
    assert ran.code == 2
    assert "max_queue" in ran.err and "environment" in ran.err


def test_errors_are_json_with_json(quire: Quire) -> None:
    ran = quire("plan", "--json", "--dtpe", "x")
    error = json.loads(ran.err)["error"]
    assert ran.code == 2
    assert error["code"] == "unknown_flag" and error["field"] == "--dtpe"
    assert "--dtype" in error["fix"]
    ran = quire("plan", "/no/such/model", "--json")
    assert ran.code == 1
    assert json.loads(ran.err)["error"]["code"] == "model_not_found"


def test_a_known_error_has_a_trace_only_for_debugging(quire: Quire) -> None:
    assert "Traceback" not in quire("plan", "/no/such/model").err
    ran = quire("plan", "/no/such/model", "--log-level", "debug")
    assert "Traceback" in ran.err
    assert (
        ran.err.rstrip().splitlines()[-1] == "error: there is no file or directory /no/such/model"
    )


def test_an_unexpected_exception_is_called_our_bug(
    quire: Quire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(invocation: object) -> int:
        raise RuntimeError("lost")

    monkeypatch.setattr("quire.cli.version.run", broken)
    ran = quire("version")
    assert ran.code == 70
    assert "our bug" in ran.err.splitlines()[0]
    assert ran.err.rstrip().endswith("RuntimeError: lost")
    ran = quire("version", "--json")
    assert json.loads(ran.err)["error"]["code"] == "internal_error"


def test_ctrl_c_exits_130(quire: Quire, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(invocation: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("quire.cli.version.run", interrupted)
    ran = quire("version")
    assert ran.code == 130
    assert "Traceback" not in ran.err


def test_a_closed_pipe_is_quiet() -> None:
    child = spawn("serve", "--help")
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    error = child.stderr.read()
    assert child.wait() in (0, 141)
    assert "Traceback" not in error and "Exception ignored" not in error
    child.stderr.close()
    assert child.stdin is not None
    child.stdin.close()


def test_words_may_stand_anywhere_and_flags_end_at_two_dashes(quire: Quire, ids_model: str) -> None:
    made = ["--max-tokens", "2", "--json", *IDS]
    ran = quire("run", "--seed", "1", ids_model, *made, "1 2")
    assert ran.code == 0 and json.loads(ran.out)["usage"]["prompt_tokens"] == 2
    ran = quire("run", *made, ids_model, "--", "1 2 3")
    assert ran.code == 0 and json.loads(ran.out)["usage"]["prompt_tokens"] == 3


def test_versions(quire: Quire) -> None:
    assert quire("version").out.startswith("quire ")
    found = json.loads(quire("--version", "--json").out)
    assert set(found) >= {"quire", "python", "torch"}

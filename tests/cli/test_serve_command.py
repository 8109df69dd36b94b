"""`quire serve` and `quire bench serve` against each other, in real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from quire.cli.serve import engine_options, find_files, load_chat, ready_lines
from quire.config.parse import build_options
from quire.dialects.renderer import DeepSeekV4Renderer
from quire.errors import UsageError

from .tools import DUMMY, IDS, TEMPLATE, Quire, environment, spawn, write_model


def test_the_server_process_imports_no_torch() -> None:
    code = (
        "import sys, quire.cli.serve, quire.server.serve, quire.engine.client; "
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.strip() == "False"


def test_serve_is_ready_answers_its_curl_line_and_is_measured(
    quire: Quire, chat_model: str, tmp_path: Path
) -> None:
    child = spawn("serve", chat_model, *DUMMY, "--port", "0", "--json", "--max-model-len", "2048")
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line, child.communicate()[1]
        ready = json.loads(line)
        assert ready["event"] == "ready" and ready["url"].startswith("http://127.0.0.1:")
        assert ready["api_key"] is False and set(ready["plan"]) >= {"weights", "context"}
        assert "chat/completions" in ready["curl"]
        if shutil.which("curl"):
            done = subprocess.run(["bash", "-c", ready["curl"]], capture_output=True, text=True)
            answer = json.loads(done.stdout)
            assert answer["object"] == "chat.completion"
            assert answer["usage"]["completion_tokens"] >= 1
        record = tmp_path / "record.json"
        load = ["--requests", "6", "--concurrency", "3", "--input-len", "200", "--repeat", "2"]
        load += ["--output-len", "5", "--shared-prefix", "100", "--output", str(record)]
        letters = json.dumps({"allowed_token_ids": list(range(32, 90))})  # text comes every step
        load += ["--extra", letters]
        ran = quire("bench", "serve", "--base-url", ready["url"], *load, "--json")
        assert ran.code == 0, ran.err
        found = json.loads(ran.out)
        assert json.loads(record.read_text()) == found
        for repetition in found["repetitions"]:
            assert repetition["errors"] == 0, repetition["first_error"]
            assert repetition["output_tokens"] == 6 * 5
            # words are not cut: a prompt is as long as asked to within a few tokens
            assert abs(repetition["prompt_tokens"] / 6 - 200) < 20
            assert repetition["ttft_p50_ms"] > 0
        workload = tmp_path / "w.json"
        workload.write_text(json.dumps({"short": [{"text": "hi", "max_tokens": 2}]}))
        spec = f"{workload}:short"
        argv = ["--workload", spec, "--endpoint", "completions", "--requests", "2"]
        argv += ["--extra", letters]
        ran = quire("bench", "serve", "--base-url", ready["url"], *argv)
        assert ran.code == 0 and "output_tok_s" in ran.out
        ran = quire("bench", "serve", "--base-url", ready["url"], "--model", "other")
        assert ran.code == 1 and "other" in ran.err
    finally:
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=30)
    assert child.returncode == 0, error
    assert "Traceback" not in error


def test_sigterm_to_the_whole_process_group_lets_a_stream_complete(ids_model: str) -> None:
    """As `kill -- -PID`, systemd and a terminal that closes send it."""
    child = spawn("serve", ids_model, *IDS, "--port", "0", "--json", start_new_session=True)
    try:
        assert child.stdout is not None
        url = json.loads(child.stdout.readline())["url"]
        body = {"prompt": [5, 6, 7], "max_tokens": 500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            pieces = answer.iter_text()
            text = next(pieces)
            os.killpg(child.pid, signal.SIGTERM)
            text += "".join(pieces)
    finally:
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=30)
    assert text.endswith("[DONE]\n\n"), error
    assert child.returncode == 0 and "Traceback" not in error


def test_a_server_that_cannot_start_says_why_once(tmp_path: Path, ids_model: str) -> None:
    missing = spawn("serve", str(tmp_path / "none.gguf"), "--port", "0")
    _, error = missing.communicate(timeout=60)
    assert missing.returncode == 1
    assert error.count("error: ") == 1 and "no file or directory" in error
    assert "Traceback" not in error
    impossible = spawn("serve", ids_model, *IDS, "--port", "0", "--max-model-len", "99999")
    out, error = impossible.communicate(timeout=60)
    assert impossible.returncode == 1 and out == ""
    assert "--max-model-len 99999" in error and "Traceback" not in error


def test_an_open_address_without_key_is_refused(quire: Quire, ids_model: str) -> None:
    ran = quire("serve", ids_model, *IDS, "--host", "0.0.0.0", "--port", "0")
    assert ran.code == 1 and "--api-key" in ran.err


def test_keys_stay_out_of_the_engine_process(ids_model: str) -> None:
    options = build_options({"model": ids_model, "api_key": "hunter2", "seed": 3})
    flat = engine_options(options, find_files(options))
    assert "hunter2" not in str(flat)
    assert build_options(flat).model == options.model
    assert build_options(flat).engine == options.engine


def test_parsers_follow_from_the_models_files_and_the_options(tmp_path: Path) -> None:
    calls = '{% if tools %}<tool_call>\n{"name": "f", "arguments": {}}</tool_call>{% endif %}'
    model = write_model(tmp_path / "m", text=True, template=TEMPLATE + calls + "</think>")
    options = build_options({"model": model})
    _, renderer, dialect = load_chat(options, find_files(options))
    assert renderer is not None and renderer.knows("tools")
    assert (dialect.tools, dialect.reasoning) == ("hermes", "qwen3")
    options = build_options({"model": model, "tool_call_parser": "none"})
    assert load_chat(options, find_files(options))[2].tools == "none"
    plain = write_model(tmp_path / "p", text=True, template=TEMPLATE)
    options = build_options({"model": plain, "tool_call_parser": "hermes"})
    with pytest.raises(UsageError, match="nothing to parse"):
        load_chat(options, find_files(options))
    encoder = write_model(tmp_path / "e", text=True, architectures=["DeepseekV4ForCausalLM"])
    options = build_options({"model": encoder})
    _, renderer, dialect = load_chat(options, find_files(options))
    assert isinstance(renderer, DeepSeekV4Renderer) and dialect.tools == "deepseek_v4"


def test_the_ready_block_tells_the_key_state() -> None:
    chat = {"tool_calls": {"parser": "hermes", "reason": "why"}}
    facts = {"url": "u", "model": "m", "device": "d", "plan": {"weights": "1 B"}, "curl": "curl"}
    facts["chat"] = chat
    assert "  tools   hermes: why" in ready_lines(facts | {"api_key": False}, 1.0)
    assert any("not set" in line for line in ready_lines(facts | {"api_key": False}, 1.0))
    assert any("needed" in line for line in ready_lines(facts | {"api_key": True}, 1.0))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://a:b"])
def test_a_server_that_is_not_there_is_told(quire: Quire, url: str) -> None:
    ran = quire("bench", "serve", "--base-url", url)
    assert ran.code == 1 and url in ran.err and "quire serve" in ran.err

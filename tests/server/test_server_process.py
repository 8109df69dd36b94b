"""The server as a process: start, ports, drain, signals, the engine's death. Nothing is left."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time

import httpx
import psutil
from server_harness import process, wait_until

STREAM = {"prompt": "abcdefgh", "max_tokens": 40, "stream": True}


def end(child: subprocess.Popen[str], seconds: float = 15) -> dict:
    """Its last line, once it has ended by itself without children."""
    children = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
    out, err = child.communicate(timeout=seconds)
    assert "Traceback" not in err, err
    assert not [c for c in children if c.is_running()]
    return json.loads(out.splitlines()[-1])


class Streaming(threading.Thread):
    """Reads one stream to its end."""

    def __init__(self, url: str, body: dict):
        super().__init__()
        self.url, self.body, self.text, self.error = url, body, "", ""
        self.first = threading.Event()
        self.start()
        assert self.first.wait(10)

    def run(self) -> None:
        with httpx.Client(base_url=self.url, trust_env=False, timeout=20) as http:
            try:
                with http.stream("POST", "/v1/completions", json=self.body) as answer:
                    for piece in answer.iter_text():
                        self.text += piece
                        self.first.set()
            except httpx.HTTPError as error:
                self.error = repr(error)
                self.first.set()


def test_sigterm_drains_refuses_new_work_and_exits_0() -> None:
    with process("--delay", "0.03") as (child, url):
        streams = [Streaming(url, STREAM) for _ in range(4)]
        with httpx.Client(base_url=url, trust_env=False) as http:
            child.send_signal(signal.SIGTERM)
            assert wait_until(lambda: http.get("/ready").status_code == 503, 2)
            answer = http.post("/v1/completions", json={"prompt": "a"})
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "draining"
            assert http.get("/health").json() == {"status": "draining"}
        for stream in streams:
            stream.join(10)
            assert stream.text.endswith("[DONE]\n\n") and not stream.error
        last = end(child)
        assert child.returncode == 0
        assert last == {"closed": True, "finished": 4, "aborted": 0, "torch": False}


def test_drain_ends_at_its_deadline() -> None:
    with process("--delay", "1", "--drain-timeout", "0.3") as (child, url):
        stream = Streaming(url, STREAM)
        start = time.perf_counter()
        child.send_signal(signal.SIGTERM)
        last = end(child)
        assert time.perf_counter() - start < 5
        assert child.returncode == 0 and last["aborted"] == 1
        stream.join(5)
        assert json.loads(stream.text.split("data: ")[-1])["error"]["code"] == "shutdown"
        assert not stream.error


def test_a_second_signal_stops_at_once() -> None:
    for second in (signal.SIGTERM, signal.SIGINT):
        with process("--delay", "1") as (child, url):
            stream = Streaming(url, STREAM)
            start = time.perf_counter()
            child.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert child.poll() is None
            child.send_signal(second)
            last = end(child)
            assert time.perf_counter() - start < 3 and last["closed"] and last["aborted"] == 1
            stream.join(5)


def test_a_busy_port_is_one_clear_error() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with process("--port", str(port), ready=False) as (child, _):
            last = end(child)
            assert child.returncode == 1 and last["error"] == "port_in_use"
            assert str(port) in last["what"] and "--port" in last["what"]


def test_while_loading_health_is_ok_ready_is_503_and_sigterm_ends() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with process("--load", "30", "--port", str(port), ready=False) as (child, _):
        assert json.loads(child.stdout.readline()) == {"loading": True}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            assert http.get("/health").json()["phase"] == "loading weights 50%"
            ready = http.get("/ready")
            assert ready.status_code == 503 and "loading weights" in ready.text
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
                body = {"prompt": "a", "messages": [], "tokens": [1]}
                assert http.post(path, json=body).status_code in (400, 503), path
            assert http.get("/v1/models").status_code == 503
            assert http.get("/metrics").status_code == 200
        child.send_signal(signal.SIGTERM)
        end(child, 5)
        assert child.returncode == 0


def test_the_engines_death_ends_the_server_with_its_cause() -> None:
    with process("--die", "0.2", "--delay", "0.02") as (child, url):
        stream = Streaming(url, {**STREAM, "max_tokens": 2000})
        stream.join(10)
        assert "engine_dead" in stream.text.split("data: ")[-1]
        last = end(child)
        assert child.returncode == 1 and last["error"] == "engine_dead"
        assert "boom" in last["what"]

"""The event loop stays free: hostile templates, long texts, slow readers, hostile bodies."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import psutil
import pytest
from fake_engine import FakeTokenizer
from server_harness import RunningServer, options, post, process, running, wait_until

from quire.server.state import PREPARED
from quire.tokenization.chat_template import TemplateRenderer

# The design asks for 50 ms; the machine is shared by several test runs at once.
WORST_SECONDS = 0.25
TYPICAL_SECONDS = 0.05


@contextmanager
def health_latency(server: RunningServer) -> Iterator[list[float]]:
    """Seconds each /health took meanwhile."""
    seconds: list[float] = []
    stop = threading.Event()

    def poll() -> None:
        with server.client() as http:
            while not stop.is_set():
                start = time.perf_counter()
                assert http.get("/health").status_code == 200
                seconds.append(time.perf_counter() - start)
                time.sleep(0.005)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield seconds
    finally:
        stop.set()
        thread.join(10)


def assert_free(seconds: list[float]) -> None:
    assert len(seconds) > 5
    assert max(seconds) < WORST_SECONDS and median(seconds) < TYPICAL_SECONDS, max(seconds)


def test_hostile_templates_are_ended_and_block_nobody() -> None:
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    renderer = TemplateRenderer(template, deadline=0.3)
    with running(renderer=renderer) as server, health_latency(server) as seconds:
        body = {"messages": [{"role": "user", "content": "x"}]}
        with server.client() as http:
            for path in ("/v1/chat/completions", "/tokenize"):
                answer = http.post(path, json=body)
                assert answer.status_code == 400, answer.text
                assert answer.json()["error"]["code"].startswith("template_")
    assert_free(seconds)


def test_long_texts_are_tokenized_beside_the_loop_and_longer_ones_refused() -> None:
    """With the real tokenizer: a stand-in could sleep without the interpreter's lock where the
    library computes with it."""
    body = post("/tokenize", json.dumps({"prompt": "ab" * 50_000}).encode())
    with process("--tokenizer", "smollm2") as (_, url):
        server = RunningServer(url, None, None)
        with health_latency(server) as seconds:
            socks = [server.connect() for _ in range(16)]
            for sock in socks:
                sock.sendall(body)
            assert all(sock.recv(12) == b"HTTP/1.1 200" for sock in socks)
        for sock in socks:
            sock.close()
        with server.client() as http:
            start = time.perf_counter()
            assert http.post("/tokenize", json={"prompt": "a" * 1_000_000}).status_code == 400
            assert time.perf_counter() - start < 0.4
    assert_free(seconds)


class SlowTokenizer(FakeTokenizer):
    """Takes half a second for a long text."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > 100_000:
            time.sleep(0.5)
        return super().encode(text, add_special_tokens)


def test_too_many_waiting_texts_are_a_503() -> None:
    opts = options()
    with running(opts, tokenizer=SlowTokenizer()) as server, server.client() as http:
        limit = opts.engine.max_queue + PREPARED
        body = post("/tokenize", json.dumps({"prompt": "a" * 101_000}).encode())
        socks = [server.connect() for _ in range(limit + 10)]
        for sock in socks:
            sock.sendall(body)
        answers = []
        for sock in reversed(socks):  # the last ones are refused at once
            if len(answers) < 5:
                answers.append(sock.recv(4096))
            sock.close()
        assert all(a.startswith(b"HTTP/1.1 503") and b"retry-after" in a for a in answers)
        assert http.get("/health").is_success


@pytest.mark.parametrize("extra", [{"prompt_logprobs": 100}, {"logprobs": 100, "echo": True}])
def test_large_answers_are_encoded_beside_the_loop(extra: dict[str, Any]) -> None:
    body = {"prompt": [[i % 256 for i in range(2000)]] * 8, "max_tokens": 1, **extra}
    with process() as (_, url):
        server = RunningServer(url, None, None)
        with server.client() as http:
            http.post("/v1/completions", json=body)  # the fake engine makes its positions once
            with health_latency(server) as seconds:
                for stream in (False, "echo" in body):
                    answer = http.post("/v1/completions", json={**body, "stream": stream})
                    assert len(answer.content) > 10 * 2**20
    assert_free(seconds)


def reads_slowly(port: int) -> socket.socket:
    """A client with a small receive buffer, so that its stream soon stands still."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", port))
    body = {"prompt": "abcdefgh", "max_tokens": 2000, "stream": True, "logprobs": 100}
    sock.sendall(post("/v1/completions", json.dumps(body).encode()))
    return sock


def stands_still(pid: int) -> bool:
    """Whether a process uses next to no processor time."""
    return psutil.Process(pid).cpu_percent(0.3) < 10


def test_200_slow_readers_leave_memory_flat_and_others_unhindered() -> None:
    quick = {"prompt": "abc", "max_tokens": 50, "stream": True}
    with process() as (child, url):
        server = RunningServer(url, None, None)
        memory = psutil.Process(child.pid).memory_info
        with server.client() as http:
            http.post("/v1/completions", json=quick)
            before = memory().rss
            socks = [reads_slowly(server.port) for _ in range(200)]
            for _ in range(3):
                assert all(sock.recv(1) for sock in socks)
            assert wait_until(lambda: stands_still(child.pid), 20)
            start = time.perf_counter()
            assert http.post("/v1/completions", json=quick).text.endswith("[DONE]\n\n")
            assert time.perf_counter() - start < 1
            assert "quire:requests_running 200.0" in http.get("/metrics").text
            assert memory().rss - before < 64 * 2**20
            for sock in socks:
                sock.close()
            assert wait_until(lambda: "quire:requests_running 0.0" in http.get("/metrics").text)


def test_a_reader_that_stands_still_is_cut_off_after_the_request_timeout() -> None:
    with running(options(request_timeout=0.5)) as server, server.client() as http:
        sock = reads_slowly(server.port)
        assert wait_until(lambda: 'reason="stalled"} 1.0' in http.get("/metrics").text)
        assert wait_until(lambda: not server.engine.running)
        sock.close()


MESSAGE = b'{"role":"user","content":"a"}'
CALL = b'{"id":"","function":{"name":"f","arguments":"%b"}}'
LISTS = b'{\\"a\\":[' + b"[]," * 80_000 + b"[]]}"
CALLS = b'{"messages": [{"role":"assistant","tool_calls":[%b]}]}'


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": [' + b"5," * 4_000_000 + b"5]}",
        b'{"messages": [' + (MESSAGE + b",") * 250_000 + MESSAGE + b"]}",
        b'{"prompt": "a", "allowed_token_ids": [' + b"5," * 4_000_000 + b"5]}",
        b"{" + b",".join(b'"%06d":1' % i for i in range(700_000)) + b"}",
        CALLS % b",".join([CALL % b"{}"] * 150_000),
        CALLS % b",".join([CALL % LISTS] * 30 + [CALL % b"[]"]),
        b'{"messages": [%b], "tools": [' % MESSAGE + b"[" * 8_000_000,
    ],
    ids=["prompt", "messages", "ids", "names", "calls", "arguments", "tools"],
)
def test_large_hostile_bodies_hold_the_loop_only_for_a_moment(body: bytes) -> None:
    with running() as server, health_latency(server) as seconds, server.client() as http:
        path = "/v1/chat/completions" if b"messages" in body[:12] else "/v1/completions"
        headers = {"content-type": "application/json"}
        for _ in range(3):
            assert http.post(path, content=body, headers=headers).status_code == 400
    assert max(seconds) < 2 * WORST_SECONDS, max(seconds)

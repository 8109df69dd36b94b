"""A client that leaves aborts its request, at every phase; nothing keeps running."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
from server_harness import RunningServer, post, read_all, running, wait_until

BODIES = {
    "single": {"prompt": "abcdef", "max_tokens": 2000},
    "fan-out": {"prompt": ["abc", "def", "ghi"], "max_tokens": 2000, "n": 2},
    "chat": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1900},
}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running() as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(server: RunningServer) -> Iterator[None]:
    yield
    assert wait_until(lambda: not server.engine.running)
    server.engine.delay = server.engine.first_delay = 0.0


def start(server: RunningServer, name: str, stream: bool) -> tuple[object, int]:
    path = "/v1/chat/completions" if name == "chat" else "/v1/completions"
    sock = server.connect()
    sock.sendall(post(path, json.dumps({**BODIES[name], "stream": stream}).encode()))
    prompts = 3 if name == "fan-out" else 1
    assert wait_until(lambda: len(server.engine.running) == prompts)
    return sock, prompts


@pytest.mark.parametrize("name", list(BODIES))
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["before the first token", "in the middle"])
def test_leaving_aborts(server: RunningServer, name: str, stream: bool, phase: str) -> None:
    engine = server.engine
    if phase == "in the middle":
        engine.delay = 0.01
    else:
        engine.first_delay = 30.0
    before = len(engine.aborted)
    sock, prompts = start(server, name, stream)
    if phase == "in the middle" and stream:
        data = b""
        while data.count(b"data: ") < 5:
            data += sock.recv(65536)
    sock.close()
    assert wait_until(lambda: len(engine.aborted) == before + prompts, 3)


def test_leaving_with_half_a_body_starts_nothing(server: RunningServer) -> None:
    before = len(server.engine.requests)
    sock = server.connect()
    sock.sendall(post("/v1/completions", b'{"prompt": "a"}')[:-3])
    sock.close()
    with server.client() as http:
        assert http.get("/v1/models").is_success
    assert len(server.engine.requests) == before


def test_an_error_of_one_prompt_aborts_its_siblings(server: RunningServer) -> None:
    engine = server.engine
    engine.delay, engine.fail_after, before = 0.005, 5, len(engine.aborted)
    try:
        with server.client() as http:
            answer = http.post("/v1/completions", json=BODIES["fan-out"])
        assert answer.status_code == 500
        assert wait_until(lambda: len(engine.aborted) == before + 3)
    finally:
        engine.fail_after = None


def test_the_engines_death_reaches_every_stream_and_health() -> None:
    with running() as server, server.connect() as sock, server.client() as http:
        server.engine.delay = 0.01
        body = {"prompt": "abc", "stream": True, "max_tokens": 2000}
        sock.sendall(post("/v1/completions", json.dumps(body).encode(), "Connection: close"))
        assert wait_until(lambda: len(server.engine.running) == 1)
        server.engine.dead = True
        answer = http.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_dead"
        assert "secret" not in answer.text and "retry-after" in answer.headers
        assert http.get("/health").status_code == 503
        assert http.get("/ready").status_code == 503
        assert http.get("/metrics").status_code == 200
        last = read_all(sock).rstrip(b"\r\n0").split(b"data: ")[-1]
        assert json.loads(last)["error"]["code"] == "engine_dead"


def test_a_stuck_engine_is_unhealthy(server: RunningServer) -> None:
    with server.client() as http:
        for step_age, silence, status in (
            (31, 31, 503),
            (29, 29, 200),
            (500, 1, 200),
            (601, 1, 503),
        ):
            server.engine.step_age, server.engine.silence = float(step_age), float(silence)
            assert http.get("/health").status_code == status, (step_age, silence)


def test_the_standard_event_loop_serves_too() -> None:
    with running(loop_factory=asyncio.new_event_loop) as server:
        server.engine.delay = 0.01
        sock, _ = start(server, "chat", True)
        sock.close()
        assert wait_until(lambda: len(server.engine.aborted) == 1, 3)

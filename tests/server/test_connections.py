"""Limits of connections: slow, endless, malformed and too many, over raw sockets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from server_harness import RunningServer, options, post, read_all, running, wait_until

GOOD = post("/tokenize", b'{"prompt": "a"}')
CLOSING = post("/tokenize", b'{"prompt": "a"}', "Connection: close")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    limits = {
        "header_timeout": 0.4,
        "body_timeout": 0.4,
        "idle_timeout": 0.4,
        "max_header_bytes": 4096,
        "max_connections": 20,
        "max_body_bytes": 65536,
    }
    with running(options(**limits)) as made:
        yield made


@pytest.fixture(autouse=True)
def works_afterwards(server: RunningServer) -> Iterator[None]:
    yield
    with server.connect() as sock:
        sock.sendall(CLOSING)
        assert read_all(sock).startswith(b"HTTP/1.1 200")


def exchange(server: RunningServer, data: bytes) -> tuple[bytes, float]:
    """The answer until the server closes, and the seconds it took."""
    start = time.perf_counter()
    with server.connect() as sock:
        with suppress(ConnectionError):  # refused while we still send; the answer may be there
            sock.sendall(data)
        return read_all(sock), time.perf_counter() - start


def refused_count(server: RunningServer, reason: str) -> int:
    with server.client() as http:
        lines = http.get("/metrics").text.splitlines()
    found = [x for x in lines if x.startswith("quire:connections_refused") and reason in x]
    return int(float(found[0].split()[-1])) if found else 0


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\nHost: x\r\nA: ", b"\r\n\r\n"])
def test_a_head_that_does_not_come_closes_the_connection(
    server: RunningServer, sent: bytes
) -> None:
    before = refused_count(server, "head_timeout")
    answer, seconds = exchange(server, sent)
    assert 0.3 < seconds < 3
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408")
    assert bool(answer) == (sent.startswith(b"G"))
    assert refused_count(server, "head_timeout") > before


def test_slowloris_does_not_extend_the_head_timeout(server: RunningServer) -> None:
    start = time.perf_counter()
    with server.connect() as sock:
        try:
            while time.perf_counter() - start < 3:
                sock.sendall(b"GET" if time.perf_counter() - start < 0.01 else b" ")
                time.sleep(0.05)
        except ConnectionError:
            pass
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("idle", [b"\r\n", b""])
def test_an_idle_connection_is_closed_even_if_it_sends_empty_lines(
    server: RunningServer, idle: bytes
) -> None:
    start = time.perf_counter()
    with server.connect() as sock:
        sock.sendall(GOOD)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        sock.settimeout(0.05)
        while time.perf_counter() - start < 3:
            try:
                sock.sendall(idle)
                if sock.recv(100) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
    assert 0.3 < time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 5000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 10_000_000,
        b"GET /" + b"a" * 10_000_000,
    ],
)
def test_a_large_head_is_a_431(server: RunningServer, head: bytes) -> None:
    answer, seconds = exchange(server, head)
    assert answer.startswith(b"HTTP/1.1 431") or (answer == b"" and len(head) > 10**6)
    assert seconds < 2
    if answer:
        assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"] == "head_size"


CHUNKED = (
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


@pytest.mark.parametrize(
    "tail",
    [
        b"1\r\n5\r\n0\r\nTrailer: " + b"a" * 1_000_000,
        b"1\r\n5\r\n0\r\n" + b"T: a\r\n" * 100_000,
        b"1;" + b"x" * 1_000_000,
    ],
)
def test_endless_trailers_and_chunk_extensions_are_cut(server: RunningServer, tail: bytes) -> None:
    answer, seconds = exchange(server, CHUNKED + tail)
    assert answer == b"" or answer[9:12] in (b"431", b"400"), answer[:100]
    assert seconds < 2


def test_one_byte_chunks_are_a_legitimate_body(server: RunningServer) -> None:
    body = b"".join(b"1\r\n%c\r\n" % c for c in b'{"prompt": "' + b"a" * 8000 + b'"}')
    with server.connect() as sock:
        sock.sendall(CHUNKED + body + b"0\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01" + b"\x00" * 100, b"GET\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
     b"POST /tokenize HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
     b"POST /tokenize HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
     b"POST /tokenize HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
     b"CONNECT x:1 HTTP/1.1\r\n\r\n", bytes(range(256)) * 100],
)  # fmt: skip
def test_malformed_requests_are_refused(server: RunningServer, data: bytes) -> None:
    answer, seconds = exchange(server, data)
    assert answer[9:12] in (b"400", b"401", b"404", b"408", b"431", b""), answer[:100]
    assert seconds < 3


def test_a_slow_body_is_a_408(server: RunningServer) -> None:
    start = time.perf_counter()
    with server.connect() as sock:
        sock.sendall(GOOD[:-10])
        for byte in GOOD[-10:-5]:
            sock.sendall(bytes([byte]))
            time.sleep(0.06)
        assert read_all(sock).startswith(b"HTTP/1.1 408")
    assert time.perf_counter() - start < 3


def test_connections_beyond_the_cap_get_503_and_others_go_on(server: RunningServer) -> None:
    idle = [server.connect() for _ in range(20)]
    try:
        assert wait_until(lambda: exchange(server, GOOD)[0].startswith(b"HTTP/1.1 503"), 2)
        answer, _ = exchange(server, GOOD)
        if answer.startswith(b"HTTP/1.1 503"):  # the idle ones may have timed out by now
            assert b"retry-after: 1" in answer and b"too many open connections" in answer
    finally:
        for sock in idle:
            sock.close()
    assert wait_until(lambda: exchange(server, CLOSING)[0].startswith(b"HTTP/1.1 200"), 5)


def test_a_refused_body_is_discarded_only_for_so_long(server: RunningServer) -> None:
    start = time.perf_counter()
    with server.connect() as sock:
        sock.sendall(post("/tokenize", b"")[:-5] + b"1000000000\r\n\r\n")
        sock.settimeout(0.05)
        answer = b""
        try:
            while time.perf_counter() - start < 5:
                sock.sendall(b"a" * 1000)
                try:
                    answer += sock.recv(65536)
                except TimeoutError:
                    continue
        except ConnectionError:
            pass
    assert answer.startswith(b"HTTP/1.1 413")
    assert time.perf_counter() - start < 3


def test_pipelined_requests_are_answered_in_order(server: RunningServer) -> None:
    with server.connect() as sock:
        sock.sendall(GOOD + post("/tokenize", b'{"prompt": "abc"}', "Connection: close"))
        answer = read_all(sock)
    counts = [json.loads(p.split(b"HTTP")[0])["count"] for p in answer.split(b"\r\n\r\n")[1:]]
    assert counts == [1, 3]


def test_a_pipelining_client_that_leaves_aborts_what_runs(server: RunningServer) -> None:
    engine = server.engine
    engine.delay, before = 0.02, len(engine.aborted)
    try:
        with server.connect() as sock:
            stream = {"prompt": "abc", "stream": True, "max_tokens": 2000}
            sock.sendall(post("/v1/completions", json.dumps(stream).encode()) + GOOD)
            assert wait_until(lambda: len(engine.running) == 1)
        assert wait_until(lambda: len(engine.aborted) == before + 1, 3)
    finally:
        engine.delay = 0.0

"""Wrong input: a field outside its limits is a quick 4xx that names it, and the server lives."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest
from fake_engine import CONTEXT, VOCABULARY
from server_harness import RunningServer, options, post, process, read_all, running

from quire.params import LIMITS, Limit

NESTED = "[" * 10_000 + "]" * 10_000
QUICK_SECONDS = 1.0  # generous: the machine is shared


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(options(body_timeout=0.5)) as made:
        yield made


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def refused(http: httpx.Client, path: str, body: str | bytes, status: int = 400) -> dict:
    """Post raw JSON; check the refusal's form, time, and that the next request works."""
    start = time.perf_counter()
    answer = http.post(path, content=body, headers={"content-type": "application/json"})
    assert time.perf_counter() - start < QUICK_SECONDS + len(body) / 20e6
    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 2000
    after = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
    assert after.status_code == 200
    return error


def bad_values(limit: Limit) -> list[str]:
    """JSON texts outside a limit, made from the limit itself."""
    bad = ['"\\u0416\\ud83d\\ude00"', "{}", '{"a": 1}', NESTED, "[[]]", "[{}]", "[null]"]
    if limit.kind in ("int", "float"):
        bad += ["true", '""', "[]", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "9" * 5000]
        bad += ["0.5"] if limit.kind == "int" else []
        step = 1 if limit.kind == "int" else 0.001
        bad += [json.dumps(limit.low - (0 if limit.exclusive_low else step))]
        bad += [json.dumps(limit.high + step)]
    elif limit.kind == "bool":
        bad += ["0", "1", '"true"', "[]"]
    elif limit.kind == "strings":
        bad = [b for b in bad if not b.startswith('"')]
        bad += ["5", '""', '[""]', "[1]", json.dumps(["a"] * (limit.items + 1))]
        bad += [json.dumps(["a" * (limit.characters + 1)]), json.dumps(["a"] * 10_000)]
    elif limit.kind == "ids":
        bad += ["5", "[-1]", "[2147483648]", '["1"]', "[1.5]", "[true]", f"[{VOCABULARY}]"]
        bad += [json.dumps([1] * (limit.items + 1))]
    else:
        bad = [b for b in bad if b != "{}"]
        bad += ["5", "[]", '{"1": 101}', '{"1": "x"}', '{"-1": 0}', '{"1": 1e999}']
        bad += [f'{{"{VOCABULARY}": 1}}', json.dumps({str(i): 0 for i in range(limit.items + 1)})]
    return bad


@pytest.mark.parametrize("name", list(LIMITS))
def test_every_sampling_field_refuses_values_outside_its_limit(
    http: httpx.Client, name: str
) -> None:
    for value in bad_values(LIMITS[name]):
        error = refused(http, "/v1/completions", f'{{"prompt": "ab", "{name}": {value}}}')
        if value not in ("NaN", "Infinity", "-Infinity", NESTED):  # not JSON: no field to name
            assert error["param"] == name, (value[:50], error)
            assert name in error["message"]


@pytest.mark.parametrize("name", list(LIMITS))
def test_every_sampling_field_takes_null_as_not_given(http: httpx.Client, name: str) -> None:
    assert http.post("/v1/completions", json={"prompt": "a", name: None}).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", '""'), ("prompt", "[]"), ("prompt", "[[]]"), ("prompt", '[""]'),
        ("prompt", "5"), ("prompt", "null"), ("prompt", "{}"), ("prompt", '["a", 1]'),
        ("prompt", "[-1]"), ("prompt", f"[{VOCABULARY}]"), ("prompt", "[1.5]"),
        ("prompt", "[true]"), ("prompt", "[[[1]]]"), ("prompt", "[99999999999999999999]"),
        ("prompt", json.dumps("a" * CONTEXT)), ("prompt", json.dumps([5] * CONTEXT)),
        ("prompt", json.dumps("a" * (CONTEXT * 128 + 1))), ("prompt", json.dumps(["a"] * 257)),
        ("max_tokens", str(CONTEXT)), ("min_tokens", str(CONTEXT)), ("n", "257"),
        ("model", '""'), ("model", "5"), ("stream", "1"), ("stream", '"yes"'), ("echo", "2"),
        ("stream_options", '{"x": 1}'), ("stream_options", "[]"),
        ("priority", "1.5"), ("priority", "99999999999"),
        ("cache_salt", '""'), ("cache_salt", json.dumps("s" * 257)), ("cache_salt", "1"),
        ("add_special_tokens", '"x"'), ("detokenize", "0"), ("suffix", '"x"'),
    ],
)  # fmt: skip
def test_other_completion_fields_are_checked(http: httpx.Client, field: str, value: str) -> None:
    fields = {"prompt": '"ab"', field: value}
    body = ", ".join(f'"{name}": {text}' for name, text in fields.items())
    assert refused(http, "/v1/completions", f"{{{body}}}")["param"] == field


@pytest.mark.parametrize(
    "messages",
    [
        "null", "[]", "5", '"hi"', "[5]", "[{}]", '[{"role": "user"}]', NESTED,
        '[{"role": "alien", "content": "x"}]', '[{"role": 5, "content": "x"}]',
        '[{"role": "user", "content": 5}]', '[{"role": "user", "content": [{}]}]',
        '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]',
        '[{"role": "user", "content": [{"type": "text", "text": 5}]}]',
        '[{"role": "user", "content": "x", "extra": 1}]',
        '[{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]',
        json.dumps([{"role": "user", "content": "x"}] * 4097),
        json.dumps([{"role": "user", "content": "x" * CONTEXT}]),
    ],
)  # fmt: skip
def test_messages_are_checked(http: httpx.Client, messages: str) -> None:
    error = refused(http, "/v1/chat/completions", f'{{"messages": {messages}}}')
    assert error["param"] == "messages" or messages == NESTED


@pytest.mark.parametrize(
    "kwargs",
    ["5", "[]", '{"a b": 1}', '{"tokenize": true}', '{"_x": 1}', NESTED,
     json.dumps({f"k{i}": 1 for i in range(33)}), json.dumps({"a": "x" * 20000})],
)  # fmt: skip
def test_template_arguments_are_checked(http: httpx.Client, kwargs: str) -> None:
    messages = '[{"role": "user", "content": "x"}]'
    for path in ("/v1/chat/completions", "/tokenize"):
        refused(http, path, f'{{"messages": {messages}, "chat_template_kwargs": {kwargs}}}')


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"5", b'{"prompt": }', b'{"prompt": "a"} x', b"\xff\xfe{}",
     b"\xef\xbb\xbf{}", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"prompt": "a', b"{}",
     b'{"prompt": "a", "prompt": 5}', b"\x00" * 100, NESTED.encode(), b'{"a":' * 5000,
     '{"prompt": "a", "\u0416\u0416": 1}'.encode()],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(http: httpx.Client, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        refused(http, path, body)


@pytest.mark.parametrize("tokens", ["null", "[-1]", f"[{VOCABULARY}]", '"x"', "[[1]]", "[1.5]"])
def test_detokenize_checks_ids(http: httpx.Client, tokens: str) -> None:
    assert refused(http, "/detokenize", f'{{"tokens": {tokens}}}')["param"] == "tokens"


def test_an_unknown_model_is_a_404(http: httpx.Client) -> None:
    error = refused(http, "/v1/completions", '{"prompt": "a", "model": "gpt-9"}', 404)
    assert error["code"] == "model_not_found" and error["param"] == "model"


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16",
     "multipart/form-data; boundary=x", "application/jsonx", ""],
)  # fmt: skip
def test_other_content_types_are_a_415(http: httpx.Client, content_type: str) -> None:
    headers = {"content-type": content_type}
    answer = http.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert answer.status_code == 415
    headers = {"content-type": "application/json; charset=UTF-8"}
    assert http.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers).is_success


def test_compressed_bodies_are_refused(http: httpx.Client) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert http.post("/tokenize", content=b"x", headers=headers).status_code == 415


def test_wrong_methods_and_paths_answer_in_json(http: httpx.Client) -> None:
    assert http.get("/v1/completions").json()["error"]["code"] == "method_not_allowed"
    assert http.get("/nothing").json()["error"]["code"] == "not_found"
    assert http.get("/health/").status_code == 404  # no redirect built from Host


def test_a_body_that_does_not_come_is_a_408(server: RunningServer) -> None:
    with server.connect() as sock:
        sock.sendall(post("/tokenize", b'{"prompt": "a"}')[:-4])
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 408") and b"body_timeout" in answer


def chunked(pieces: Iterator[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        yield b"%x\r\n%b\r\n" % (len(piece), piece)


def test_100_mb_bodies_are_refused_with_flat_memory() -> None:
    with process() as (child, url):
        memory = psutil.Process(child.pid).memory_info
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as http:
            http.post("/v1/completions", json={"prompt": "a"})
            before = memory().rss
            huge = b'{"prompt": "' + b"a" * 100_000_000 + b'"}'
            refused(http, "/v1/completions", huge, 413)
        port = int(url.rsplit(":", 1)[1])
        for _ in range(3):
            answer, sent = send_endless_chunks(port)
            assert answer.startswith(b"HTTP/1.1 413") and sent < 64 * 2**20
        assert memory().rss - before < 64 * 2**20


def send_endless_chunks(port: int) -> tuple[bytes, int]:
    """A chunked body of up to 100 MB; the answer, and how much was sent before it."""
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        sock.setblocking(False)
        sent, frame = 0, b"100000\r\n" + b"a" * 2**20 + b"\r\n"
        pending = memoryview(frame)
        while sent < 100 * 2**20:
            try:
                pending = pending[sock.send(pending) :]
            except BlockingIOError:
                time.sleep(0.001)
            if not pending:
                sent, pending = sent + 2**20, memoryview(frame)
            try:
                return sock.recv(65536), sent
            except BlockingIOError:
                continue
    return b"", sent


def test_hostile_bodies_within_the_size_limit_keep_memory_flat() -> None:
    size = 8 * 2**20 - 100
    hostile = [
        b'{"prompt": [' + b"[]," * (size // 3) + b"[]]}",
        b'{"prompt": [' + b'"",' * (size // 3) + b'""]}',
        b'{"prompt": [' + b"5," * (size // 2) + b"5]}",
        b'{"stop": [' + b'"ab",' * (size // 5) + b'"a"]}',
        b'{"logit_bias": {' + b'"1":1,' * (size // 6) + b'"1":1}}',
        b'{"messages": [' + b"{}," * (size // 3) + b"{}]}",
        b'{"x": ' + b"[" * size,
        b'{"x": [' + b"{}," * (size // 3) + b"{}]}",
    ]
    with process() as (child, url), httpx.Client(base_url=url, trust_env=False) as http:
        http.post("/v1/completions", json={"prompt": "a"})
        before = psutil.Process(child.pid).memory_info().rss
        for body in hostile:
            path = "/v1/chat/completions" if b"messages" in body[:20] else "/v1/completions"
            headers = {"content-type": "application/json"}
            answer = http.post(path, content=body, headers=headers, timeout=30)
            assert answer.status_code == 400, (body[:20], answer.text[:200])
        assert psutil.Process(child.pid).memory_info().rss - before < 128 * 2**20
        assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 200

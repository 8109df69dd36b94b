"""Who may ask: every route but health and readiness needs a key, however a request looks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, FakeRenderer, FakeTokenizer
from server_harness import RunningServer, options, read_all, running
from starlette.routing import Route

from quire.config.options import ServerOptions
from quire.errors import UsageError
from quire.server.app import build_app
from quire.server.auth import PUBLIC_PATHS, KeyRing, check_binding, is_loopback, load_keys
from quire.server.state import Service

KEY = "sk-test-1234"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"# keys\nalice:{KEY}\n\nbob:sk-bob\nsk-nameless\n")
    with running(options(api_key_file=str(path))) as made:
        yield made


def all_routes() -> list[tuple[str, str]]:
    """(method, path) of every route of the real application."""
    app = build_app(Service(FakeEngine(), FakeTokenizer(), FakeRenderer()), options())
    found = []
    for route in app.routes:
        assert isinstance(route, Route), "only plain routes, so that the guard sees them all"
        found += [(m, route.path.replace("{id:path}", "x")) for m in route.methods or ()]
    return found


def test_every_route_needs_a_key_unless_listed_as_public(server: RunningServer) -> None:
    with server.client() as http:
        for method, path in all_routes():
            expected = path in PUBLIC_PATHS
            bare = http.request(method, path, json={} if method == "POST" else None)
            assert (bare.status_code != 401) == expected, path
            headers = {"Authorization": f"Bearer {KEY}"}
            keyed = http.request(method, path, headers=headers)
            assert keyed.status_code != 401
    assert {"/health", "/ready"} == PUBLIC_PATHS


def test_the_key_names_the_tenant(server: RunningServer) -> None:
    tenants = {KEY: "alice", "sk-bob": "bob"}
    for key, tenant in tenants.items():
        with server.client(headers={"authorization": f"bearer {key}"}) as http:
            assert http.post("/v1/completions", json={"prompt": "a"}).is_success
        assert server.engine.requests[-1].tenant == tenant
    with server.client(headers={"authorization": "Bearer sk-nameless"}) as http:
        assert http.post("/v1/completions", json={"prompt": "a"}).is_success
    assert server.engine.requests[-1].tenant.startswith("key-")


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}",
     "Bearer alice", f"Bearer alice:{KEY}", f"Bearer {KEY.upper()}", "Bearer \xff\xfe",
     f"Bearer {KEY}, Bearer {KEY}", "Bearer " + "x" * 20_000],
)  # fmt: skip
def test_wrong_keys_are_a_401_with_openais_body(server: RunningServer, header: str) -> None:
    with server.client() as http:
        headers = [(b"authorization", header.encode("latin-1"))]
        answer = http.get("/v1/models", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        twice = [*headers, (b"authorization", f"Bearer {KEY}".encode())]
        assert http.get("/v1/models", headers=twice).status_code == 401


HOSTS = ["x", "x/health", "x/health?", "x#/health", "localhost/ready", "/health", "", "a@b", "[::1"]
TARGETS = [
    "/v1/models", "//v1/models", "/v1/models?/health", "/health/../v1/models", "/v1/models#/health",
    "/health/", "/health%2f", "/%68ealth/../v1/models", "/v1/../metrics", "/HEALTH", "/health;x",
    "/v1/models/%2e%2e/health", "http://x/v1/models", "http://health/metrics", "/health%00",
    "/ready/../metrics", "*", "//health", "/v1/models/x/../../../health", "/metrics?path=/health",
]  # fmt: skip


def test_no_host_or_path_spelling_passes_the_guard(server: RunningServer) -> None:
    for host, target in itertools.product(HOSTS, TARGETS):
        with server.connect() as sock:
            head = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nX-Forwarded-Prefix: /health\r\n"
            sock.sendall(head.encode() + b"X-Original-URL: /health\r\nConnection: close\r\n\r\n")
            answer = read_all(sock)
        assert answer[9:12] in (b"401", b"400"), (host, target, answer[:200])
        assert b"echo/tiny" not in answer and b"quire:" not in answer


def test_health_and_ready_are_public(server: RunningServer) -> None:
    with server.client() as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").is_success


def test_keys_are_loaded_from_flag_environment_and_file(tmp_path: Path) -> None:
    assert load_keys(ServerOptions(api_key="a"), "env").tenant("a") == "default"
    assert load_keys(ServerOptions(api_key="a"), "env").tenant("env") is None
    assert load_keys(ServerOptions(), "env").tenant("env") == "default"
    assert not load_keys(ServerOptions(), None)
    for text in ("", "# only a comment\n", "a:x\nb:x\n", "a:\n", "a:k y\n", "a:\xe9\n"):
        path = tmp_path / "keys"
        path.write_text(text)
        with pytest.raises(UsageError):
            load_keys(ServerOptions(api_key_file=str(path)), None)
    with pytest.raises(UsageError, match="cannot read"):
        load_keys(ServerOptions(api_key_file=str(tmp_path / "none")), None)


def test_every_stored_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    real, compared = hmac.compare_digest, []

    def spy(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    ring = KeyRing([(f"t{i}", f"key{i}") for i in range(5)])
    assert ring.tenant("key0") == "t0"
    assert compared == [(32, 32)] * 5
    assert ring.tenant("") is None and ring.tenant("x" * 1000) is None
    assert compared == [(32, 32)] * 15


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True),
     ("[::1]", True), ("0.0.0.0", False), ("::", False), ("", False), ("10.0.0.1", False),
     ("example.com", False), ("localhost.evil.com", False)],
)  # fmt: skip
def test_binding_off_loopback_needs_keys_or_consent(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
    none, some = KeyRing([]), KeyRing([("a", "k")])
    check_binding(ServerOptions(host=host), some)
    check_binding(ServerOptions(host=host, allow_unauthenticated=True), none)
    if loopback:
        check_binding(ServerOptions(host=host), none)
    else:
        with pytest.raises(UsageError, match="without an API key"):
            check_binding(ServerOptions(host=host), none)

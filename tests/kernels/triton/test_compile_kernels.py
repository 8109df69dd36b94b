"""Kernels compiled by processes: the same kernels, and nothing waits for or outlives a bad one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime.driver import driver

from quire.kernels.triton import compile_kernels as compiling
from quire.kernels.triton import compile_worker
from quire.kernels.triton.compile_kernels import Workers
from quire.kernels.triton.launch import launch, wanted_kernels
from quire.kernels.triton.norm.rms_norm import rms_norm_kernel
from quire.kernels.triton.step.keep_drafts import keep_drafts_kernel

ROOT = Path(__file__).parents[3]
# The real thing, but for what a job does: `crash`, `hang`, `refuse`, or nothing.
OBEYING = """
import os, sys, time
from quire.kernels.triton import compile_worker
def answer(line):
    if line == b"crash\\n": os._exit(1)
    if line == b"hang\\n": time.sleep(60)
    return {"error": "no"} if line == b"refuse\\n" else {}
compile_worker.answer, compile_worker.SECONDS = answer, 1
compile_worker.main(sys.argv[1:])
"""
SILENT = "import time; time.sleep(60)"
BABBLING = """
import os, sys, time
os.write(int(sys.argv[1].split(":")[1]), b"[]\\n")
time.sleep(60)
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    found, popen = list[subprocess.Popen[bytes]](), subprocess.Popen

    def start(*args: Any, **given: Any) -> subprocess.Popen[bytes]:
        found.append(popen(*args, **given))
        return found[-1]

    monkeypatch.setattr(compiling.subprocess, "Popen", start)
    monkeypatch.setattr(compiling, "END_SECONDS", 0.3)
    return found


def workers(count: int, script: str) -> Callable[[], Workers]:
    return partial(Workers, count, (sys.executable, "-c", script))


def check_ended(process: subprocess.Popen[bytes]) -> None:
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_process_that_fails_takes_no_other_kernel_with_it(
    started: list[subprocess.Popen[bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    compiling.END_SECONDS = 30  # they end by themselves
    jobs = [b"a", b"crash", b"refuse", b"b", b"hang", b"c", b"d"]
    assert compiling.compile_in_processes(jobs, workers(3, OBEYING)) == 4
    assert "3 of 7 kernels compiled without processes" in caplog.text
    assert started[0].returncode == 0
    check_ended(started[0])


@pytest.mark.parametrize("script", [SILENT, BABBLING, "raise SystemExit(1)"])
def test_processes_that_are_of_no_use_are_ended(
    script: str, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "SECONDS", 0.3)
    begin = time.monotonic()
    assert compiling.compile_in_processes([b"a", b"b", b"c"], workers(1, script)) == 0
    assert time.monotonic() - begin < 10
    check_ended(started[0])


def test_without_processes_there_is_only_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    none = partial(Workers, 2, ("/nowhere/python",))
    assert compiling.compile_in_processes([b"a", b"b"], none) == 0
    assert "2 of 2 kernels compiled without processes: [Errno 2]" in caplog.text


@pytest.mark.parametrize("wrong", [[b"bytes"], [None]])
def test_a_start_that_fails_leaves_no_descriptors(
    wrong: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(sys, "path", wrong)
    with pytest.raises(compiling.NO_WORKERS):
        Workers(3)
    assert set(os.listdir("/proc/self/fd")) == before


def test_an_idle_process_ends_at_last(started: list[subprocess.Popen[bytes]]) -> None:
    idle = OBEYING.replace(
        "compile_worker.main", "compile_worker.IDLE_SECONDS = 1; compile_worker.main"
    )
    held = workers(2, idle)()
    assert held._process.wait(30) == 0
    held.close()


def test_an_interrupted_start_leaves_no_process(
    started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiling, "_ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiling.compile_in_processes([b"a", b"b"], workers(2, SILENT))
    check_ended(started[0])


def test_processes_begin_early_where_the_cache_is_empty(
    started: list[subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "Workers", lambda count: workers(count, SILENT)())
    with compiling.early_workers(8) as early:
        assert early is None  # in the interpreter
    monkeypatch.setattr(compiling, "INTERPRETED", False)
    with compiling.early_workers(1) as early:
        assert early is None
    with pytest.raises(KeyError), compiling.early_workers(8) as early:
        assert early is not None and len(early.pipes) == 8
        raise KeyError
    check_ended(started[0])
    for name in range(compiling.FEW_CACHED):
        (tmp_path / "cache" / str(name)).mkdir(parents=True)
    with compiling.early_workers(8) as early:
        assert early is None
    assert len(started) == 1


def test_launchers_are_made_one_at_a_time() -> None:
    inside, most = [0], [0]

    def slow(kernel: int, metadata: str) -> tuple[int, str]:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        inside[0] -= 1
        return kernel, metadata

    gpu = SimpleNamespace(launcher_cls=slow)
    for _ in range(2):  # the second finds it done
        compiling.one_launcher_at_a_time(gpu)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(gpu.launcher_cls, range(8), "abcdefgh")) == list(
            zip(range(8), "abcdefgh", strict=True)
        )
    assert most == [1]


@pytest.mark.gpu
def test_threads_get_the_launchers_of_their_kernels() -> None:
    x, ids = torch.zeros(4, 64, device="cuda"), torch.zeros(64, dtype=torch.int32, device="cuda")
    with wanted_kernels() as wanted:
        norm = {"X_STRIDE": 64, "OUT_STRIDE": 64, "H": 64, "ROWS": 4, "BLOCK_H": 64}
        launch(rms_norm_kernel, (1,), x.device, x, x[0], x, 3, 1e-6, **norm)
        kept = {"RECORD": 48, "HISTORY": 32, "num_warps": 1}
        launch(keep_drafts_kernel, (1,), x.device, *[ids] * 6, 3, **kept)
    kernels: list[Any] = [compile_one() for compile_one in wanted.values()]

    def takes(kernel: Any) -> str:
        """How many arguments, as its launcher says."""
        launcher = driver.active.launcher_cls(kernel.src, kernel.metadata)
        with pytest.raises(TypeError) as said:
            launcher.launch()
        return str(said.value)

    one, other = map(takes, kernels)
    compiling.compile_kernels(wanted, 2)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(takes, kernels * 1000)) == [one, other] * 1000
    finally:
        sys.setswitchinterval(before)


VALUES = [None, True, 1, 1.0, float("inf"), float("nan"), "fp32", "", tl.float32, tl.float8e4nv]


@pytest.mark.parametrize("value", [*VALUES, (1, ("x", None)), tl.constexpr(2)])
def test_constants_come_back_as_they_were(value: Any) -> None:
    got = compile_worker._meant(json.loads(json.dumps(compile_worker._said(value))))
    assert type(got) is type(value) and str(got) == str(value)


@pytest.mark.parametrize("value", [[1], {"dtype": "fp32"}, tl.sum, tl.float32.to_ir])
def test_a_constant_of_another_kind_is_not_told(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be told"):
        compile_worker._said((value,))


@pytest.mark.parametrize(
    "module, name, why",
    [
        ("os", "system", "os is not below quire.kernels.triton."),
        ("quire.kernels.tritonish", "f", "is not below"),
        ("quire.kernels.triton.launch", "launch", "has no kernel launch"),
        ("quire.kernels.triton.nothing", "f", "ModuleNotFoundError"),
    ],
)
def test_a_process_compiles_nothing_but_kernels(module: str, name: str, why: str) -> None:
    job = {"module": module, "name": name, "signature": {}, "constants": [], "attributes": []}
    said = compile_worker.answer(json.dumps(job).encode())
    assert why in said["error"]
    assert "JSONDecodeError" in compile_worker.answer(b"nonsense")["error"]


@pytest.mark.parametrize(
    "target", ["cuda 90 32", pytest.param("hip gfx942 64", marks=pytest.mark.full)]
)
def test_what_processes_compiled_is_found_in_the_cache(target: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.cold_start", *target.split()],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    cold, warm = map(json.loads, done.stdout.splitlines())
    names = ["keep_drafts_kernel", "rms_norm_kernel"]
    assert cold == {"given": names, "compiled": 2, "here": [], "loaded": names}
    assert warm == {"given": [], "compiled": 0, "here": [], "loaded": names}

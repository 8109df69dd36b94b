"""Every kernel compiles for every supported GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from quire.kernels.capabilities import ARCHITECTURES
from tests.kernels.triton.aot import TARGETS

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
AREAS = sorted(p.stem.removeprefix("aot_") for p in HERE.glob("aot_*.py"))
Compiled = dict[tuple[str, str], "Future[subprocess.CompletedProcess[str]]"]


def compile_area(area: str, width: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since this one has chosen the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache / area)
    return subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.aot", area, width],
        capture_output=True,
        text=True,
        timeout=800,
        env=env,
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Compiled]:
    """What the tests of this module need, compiled on all cores at once."""
    mine = [item for item in request.session.items if item.path == Path(__file__)]
    wanted = [item.callspec.params for item in mine if "area" in item.fixturenames]
    cache = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            (p["area"], p["width"]): pool.submit(compile_area, p["area"], p["width"], cache)
            for p in wanted
        }


@pytest.mark.parametrize("area", AREAS)
@pytest.mark.parametrize("width", ["", pytest.param("full", marks=pytest.mark.full)])
def test_all_kernels_compile_for_all_targets(area: str, width: str, compiled: Compiled) -> None:
    done = compiled[area, width].result()
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_area_has_cases() -> None:
    kernels = ROOT / "quire/kernels/triton"
    imported = "".join((HERE / f"aot_{area}.py").read_text() for area in AREAS)
    areas = {p.name for p in kernels.iterdir() if (p / "__init__.py").exists()}
    assert areas == set(re.findall(r"quire\.kernels\.triton\.(\w+)\.", imported))


def test_the_table_of_architectures_is_what_kernels_are_compiled_for() -> None:
    assert {name for name, (device, *_) in ARCHITECTURES.items() if device == "GPU"} == set(TARGETS)

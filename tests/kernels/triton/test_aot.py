"""Every kernel compiles for every supported GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
AREAS = sorted(p.stem.removeprefix("aot_") for p in HERE.glob("aot_*.py"))


@pytest.mark.parametrize("area", AREAS)
@pytest.mark.parametrize("width", ["", pytest.param("full", marks=pytest.mark.full)])
def test_all_kernels_compile_for_all_targets(area: str, width: str, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.aot", area, width],
        capture_output=True,
        text=True,
        timeout=600,
        env=env,
        cwd=HERE.parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_area_has_cases() -> None:
    areas = {p.name for p in Path("quire/kernels/triton").iterdir() if (p / "__init__.py").exists()}
    assert areas == set(AREAS)

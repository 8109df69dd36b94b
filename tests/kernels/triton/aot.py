"""Compiling kernels ahead of time for every supported GPU, without having one.

    python -m tests.kernels.triton.aot norm        # one area; exit status 1 where one fails
    python -m tests.kernels.triton.aot norm full   # every case for every target

Without `full`, the first case of each kernel is compiled for all targets, the others for sm_90,
which is what their tile sizes are for, and those marked `only_full` are left out.

Each area has a module `tests/kernels/triton/aot_<area>.py` with a list CASES. This runs in a
process of its own, since the tests' process has chosen the interpreter.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Case:
    """A kernel with the types of its arguments ("*bf16", "i32", "fp32", ...) by name, and values
    of its constexprs (PDL is set by target). Pointers, and the integers in `aligned`, are taken
    to be multiples of 16. `one_instruction`: on sm_90 its products are all wgmma's, or all by
    the instruction that is named, whatever the tile, so that tiles of other sizes give the same
    bits."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    targets: tuple[str, ...] = tuple(TARGETS)
    options: dict[str, Any] = field(default_factory=dict)
    only_full: bool = False
    one_instruction: bool | str = False


# Bytes of shared memory that one program can have.
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}


def instructions(target: str) -> dict[str, bool]:
    """PACKED and CAST as quire.kernels.triton.quantized.operands has them for a GPU."""
    return {"PACKED": target != "gfx942", "CAST": target not in ("gfx942", "sm_80")}


def compile_case(case: Case, target: str) -> Any:
    """Compile; raises where that fails or takes more shared memory than the target has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    constants = dict(case.constants)
    if "PDL" in names:
        constants["PDL"] = target in ("sm_90", "sm_100", "sm_120")
    signature = {n: "constexpr" if n in constants else case.types[n] for n in names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n in case.aligned or signature[n].startswith("*")
    }
    source = ASTSource(case.kernel, signature, constants, attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    options |= {"enable_fp_fusion": True, **case.options}
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    shared = compiled.metadata.shared
    assert shared <= SHARED[target], f"{shared} bytes of shared memory, {SHARED[target]} allowed"
    if case.one_instruction and target == "sm_90":
        ptx = compiled.asm["ptx"]
        products = set(re.findall(r"\b(?:wgmma\.mma_async|mma)\.[.\w]+", ptx))
        wanted = "wgmma." if case.one_instruction is True else case.one_instruction
        others = {name for name in products if not name.startswith(wanted)}
        assert products and not others, f"other matrix instructions: {others or 'none'}"
    return compiled


def planned(cases: list[Case], full: bool) -> list[tuple[Case, tuple[str, ...]]]:
    """Each case with the targets it is compiled for."""
    found, seen = [], set()
    for case in cases:
        if case.only_full and not full:
            continue
        first = case.kernel not in seen
        seen.add(case.kernel)
        few = tuple(t for t in case.targets if t == "sm_90") or case.targets
        found.append((case, case.targets if full or first else few))
    return found


def main(area: str, full: bool) -> int:
    """Compile the cases of an area; the number of failures."""
    failures = 0
    for case, targets in planned(import_module(f"tests.kernels.triton.aot_{area}").CASES, full):
        for target in targets:
            start = time.perf_counter()
            try:
                compiled = compile_case(case, target)
            except Exception:
                failures += 1
                print(f"FAILED {case.name} for {target}", flush=True)
                traceback.print_exc()
            else:
                took = time.perf_counter() - start
                print(f"{case.name} {target} {compiled.metadata.shared} B shared {took:.1f} s")
    return failures


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1], "full" in sys.argv[2:]) else 0)

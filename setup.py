"""Build of the optional native kernels; everything else is declared in pyproject.toml."""

import sys

from setuptools import Extension, setup

ABI = 0x030B0000  # the stable ABI of Python 3.11: one wheel for every later version

if sys.platform == "win32":
    flags, link = ["/O2", "/std:c++17", "/fp:precise"], []
else:
    # Contraction off: a compiler that fuses a*b+c where it likes would break bit-invariance.
    # Instruction sets are chosen inside the sources (isa_*.cpp) and at run time, never here.
    flags = [
        "-O3",
        "-std=c++17",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-pthread",
    ]
    link = ["-pthread"]

native = Extension(
    "quire.kernels.native._native",
    sources=[
        f"quire/kernels/native/{name}.cpp"
        for name in ("module", "pool", "pack", "noise", "isa_avx512", "isa_avx2", "isa_portable")
    ],
    depends=[
        f"quire/kernels/native/{name}.h"
        for name in (
            "pool",
            "formats",
            "kernels",
            "linear",
            "attention",
            "rows",
            "vector_math",
            "lanes_avx512",
            "lanes_avx2",
            "lanes_portable",
        )
    ],
    define_macros=[("Py_LIMITED_API", hex(ABI))],
    py_limited_api=True,
    extra_compile_args=flags,
    extra_link_args=link,
    optional=True,  # without a compiler the torch references are used, and say so
)

setup(ext_modules=[native], options={"bdist_wheel": {"py_limited_api": "cp311"}})

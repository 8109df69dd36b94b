"""Build of the optional native kernels; everything else is declared in pyproject.toml."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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
        "-g0",
        "-Wno-psabi",
        "-pthread",
    ]
    link = ["-pthread"]

native = Extension(
    "quire.kernels.native._native",
    sources=[
        f"quire/kernels/native/{name}.cpp"
        for name in ("isa_avx512", "isa_portable", "isa_avx2", "module", "pool", "pack")
    ],
    depends=[
        f"quire/kernels/native/{name}.h"
        for name in (
            "pool",
            "formats",
            "kernels",
            "linear",
            "attention",
            "latent",
            "noise",
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


class ParallelBuild(build_ext):
    """Compiles the sources side by side: they are few, large, and independent."""

    def build_extension(self, ext):
        compile_all = self.compiler.compile

        def compile_each(sources, *args, **kwargs):
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                jobs = [threads.submit(compile_all, [s], *args, **kwargs) for s in sources]
                return [path for job in jobs for path in job.result()]

        self.compiler.compile = compile_each
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_all


setup(
    ext_modules=[native],
    cmdclass={"build_ext": ParallelBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

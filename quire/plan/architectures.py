"""What is known of the kernels on each GPU architecture: one table.

Every kernel compiles for every architecture that is listed (tests/kernels/triton/test_aot.py does
it), so each operation has its Triton kernel on all of them and none has to fall to its torch
reference. A kernel that still does not compile where it is started is an error that names it
(quire/kernels/triton/launch.py). One that is known not to would become a downgrade here.
"""

from __future__ import annotations

from quire.plan.plan import Choice

MEASURED = "kernels are tested and measured on it"
COMPILED = "kernels are compiled for it in the tests, and have never run on one"
ARCHITECTURES = {
    "sm_80": COMPILED,
    "sm_90": MEASURED,
    "sm_100": COMPILED,
    "sm_120": COMPILED,
    "gfx942": COMPILED,
}
UNKNOWN = "no test compiles kernels for it; Triton does so here, or says which it cannot"


def describe(architecture: str) -> Choice:
    """What the plan says of a GPU's architecture."""
    return Choice("architecture", architecture, ARCHITECTURES.get(architecture, UNKNOWN))

"""What is known of the kernels on a GPU's architecture (quire/kernels/capabilities.py).

Every kernel compiles for every architecture that is listed (tests/kernels/triton/test_aot.py does
it), so each operation has its Triton kernel on all of them and none has to fall to its torch
reference. A kernel that still does not compile where it is started is an error that names it
(quire/kernels/triton/launch.py). One that is known not to would become a downgrade here.
"""

from __future__ import annotations

from quire.kernels.capabilities import ARCHITECTURES
from quire.plan.plan import Choice

UNKNOWN = "no test compiles kernels for it; Triton does so here, or says which it cannot"


def describe(architecture: str) -> Choice:
    """What the plan says of a GPU's architecture."""
    if architecture not in ARCHITECTURES:
        return Choice("architecture", architecture, UNKNOWN)
    return Choice("architecture", architecture, f"kernels are {ARCHITECTURES[architecture][2]}")

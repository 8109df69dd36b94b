import pytest
from models.harness import KERNELS


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> str:
    """Each kernel set of this machine, by the name of its option."""
    return str(request.param)

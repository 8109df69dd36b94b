from collections.abc import Iterator

import pytest
import torch

from models.harness import CASES, KERNELS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are fastest on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> str:
    """Each kernel set of this machine, by the name of its option."""
    return str(request.param)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """FamilyTests run with the cases of their family."""
    for argument, attribute in CASES.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, list(getattr(metafunc.cls.family, attribute)))

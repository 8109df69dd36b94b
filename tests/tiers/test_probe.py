from pathlib import Path

import pytest
import torch

from quire.tiers.probe import disk_rates, link_rates, memory_rate


def test_rates_of_memory_and_disk_are_of_some_size(tmp_path: Path) -> None:
    assert memory_rate() > 1e8
    assert min(disk_rates(str(tmp_path))) > 1e5
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no link")
def test_a_gpus_link_is_faster_than_a_disk() -> None:
    assert min(link_rates()) > 2e9

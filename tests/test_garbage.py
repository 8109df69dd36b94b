"""Python's collector of garbage is back where it was once the last thread is out."""

from __future__ import annotations

import gc
import threading

import pytest

from quire.garbage import uncollected


@pytest.mark.parametrize("collecting", [True, False])
def test_the_last_one_out_lets_it_go_on(collecting: bool) -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with uncollected():
            inside.set()
            leave.wait(10)

    before = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        thread = threading.Thread(target=other)
        with pytest.raises(KeyError), uncollected():
            assert not gc.isenabled()
            thread.start()
            assert inside.wait(10)
            raise KeyError
        assert not gc.isenabled()
        leave.set()
        thread.join(10)
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if before else gc.disable)()

"""What each tier has done: counters for metrics, and rates for the cost model."""

from __future__ import annotations

import msgspec


class TierStats(msgspec.Struct):
    """One tier since the engine's start. Hits, misses and pages count pages (a block of one KV
    group); `loaded` is on the way to the device, `stored` away from it. Seconds are those of the
    threads or streams that copied, so several at once count several times. `errors` by kind.
    `dropped`: pages that were not stored because the tier was behind. `state` is "on", or while
    faults keep it from being used "loads only", "stores only" or "off"."""

    name: str
    capacity_bytes: int = 0
    used_bytes: int = 0
    pages: int = 0
    hits: int = 0
    misses: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    stored_bytes: int = 0
    store_seconds: float = 0.0
    evictions: int = 0
    dropped: int = 0
    errors: dict[str, int] = {}
    state: str = "on"

    def error(self, kind: str) -> None:
        """Count an error."""
        self.errors[kind] = self.errors.get(kind, 0) + 1


class Rate:
    """A rate per second as it was lately. `start`: what is assumed before anything was measured.

    Amounts and seconds are summed, older ones fading, so many short measurements count no more
    than a few long ones. Who refuses because the rate is low says so with `doubt`: a rate that
    nobody measures any more drifts back to its start, so one slow minute is not remembered for
    ever.
    """

    FADING = 0.8
    DOUBT = 0.05
    FIRST_SECONDS = 1e-3  # the weight of the start

    def __init__(self, start: float):
        self.start = start
        self._amount, self._seconds = start * self.FIRST_SECONDS, self.FIRST_SECONDS

    @property
    def value(self) -> float:
        return self._amount / self._seconds

    def observe(self, amount: float, seconds: float) -> None:
        """`amount` took `seconds`."""
        self._amount = self.FADING * self._amount + amount
        self._seconds = self.FADING * self._seconds + seconds

    def doubt(self) -> None:
        """Nothing was measured, because of this rate."""
        self._amount += self.DOUBT * (self.start * self._seconds - self._amount)

    def seconds(self, amount: float) -> float:
        """What `amount` would take."""
        return amount / self.value

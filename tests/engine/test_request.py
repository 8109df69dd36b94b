"""The ledger of a request: known, computed and in-flight tokens."""

import pytest

from quire.engine.request import Request, State
from quire.engine.wire import Add
from quire.params import SamplingParams


def request(prompt: int = 10, max_tokens: int = 3, arrival: int = 1, priority: int = 0) -> Request:
    add = Add("r", list(range(prompt)), SamplingParams(max_tokens=max_tokens, min_tokens=2), seed=0)
    return Request(add, arrival, priority, frozenset(), max_tokens)


def test_a_new_request_has_its_prompt_to_compute() -> None:
    r = request()
    assert (r.num_prompt, r.num_output, r.scheduled, r.gap) == (10, 0, 0, 10)
    assert (r.longest, r.earliest_end) == (13, 12)
    assert r.state is State.WAITING
    r.check_integrity()


def test_the_gap_closes_by_what_is_in_flight() -> None:
    r = request()
    r.scheduled, r.inflight_steps = 4, 1
    assert (r.inflight, r.gap) == (4, 6)
    r.computed, r.scheduled = 4, 10
    assert (r.inflight, r.gap) == (6, 0)
    r.promised = 11
    assert (r.inflight_samples, r.gap) == (1, 1)


def test_nothing_is_left_to_do_once_all_output_is_on_its_way() -> None:
    r = request(max_tokens=2)
    r.tokens.append(5)
    r.computed, r.scheduled, r.inflight_steps, r.promised = 10, 11, 1, 12
    assert (r.inflight_samples, r.gap) == (1, 0)
    r.tokens.append(6)
    r.computed, r.inflight_steps = 11, 0
    assert (r.inflight_samples, r.gap) == (0, 0)
    r.check_integrity()


def test_the_prompt_is_copied_so_that_output_never_reaches_the_message() -> None:
    r = request()
    r.tokens.append(5)
    assert len(r.add.prompt_token_ids) == 10


def test_priority_comes_before_arrival() -> None:
    a, b, c = request(arrival=2), request(arrival=1, priority=1), request(arrival=3)
    assert sorted([a, b, c], key=lambda r: r.order) == [a, c, b]


@pytest.mark.parametrize(
    "damage",
    [
        {"state": State.RUNNING},
        {"slot": 0},
        {"computed": 11, "scheduled": 11},
        {"computed": 6, "scheduled": 5},
        {"scheduled": 11, "inflight_steps": 1},
        {"computed": -1},
        {"scheduled": 1},
        {"promised": 11},
        {"tokens": list(range(14))},
    ],
)
def test_damage_is_noticed(damage: dict[str, object]) -> None:
    r = request()
    for name, value in damage.items():
        setattr(r, name, value)
    with pytest.raises(AssertionError):
        r.check_integrity()

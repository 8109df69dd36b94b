"""Adding up what is new in a choice."""

from __future__ import annotations

from quire.outputs import ChoiceDelta, CompletionOutput, Logprob


def test_deltas_add_up_to_the_whole_choice() -> None:
    choice = CompletionOutput(0)
    first = ChoiceDelta(0, "ab", [1, 2], [{1: Logprob(-0.5, 1)}, {2: Logprob(-1.0, 3)}])
    second = ChoiceDelta(0, "c", [3], [{9: Logprob(-0.1, 1), 3: Logprob(-2.0, 7)}], "stop", 3)
    choice.extend(first)
    assert (choice.text, choice.finish_reason) == ("ab", None)
    choice.extend(second)
    assert (choice.text, choice.token_ids) == ("abc", [1, 2, 3])
    assert (choice.finish_reason, choice.stop_reason) == ("stop", 3)
    assert choice.logprobs == [*(first.logprobs or []), *(second.logprobs or [])]
    assert choice.cumulative_logprob == -3.5, "of the chosen tokens only"


def test_deltas_stay_as_they_are_and_no_logprobs_stay_none() -> None:
    choice, delta = CompletionOutput(0), ChoiceDelta(0, "a", [1])
    choice.extend(delta)
    choice.extend(ChoiceDelta(0, "b", [2]))
    assert delta == ChoiceDelta(0, "a", [1])
    assert (choice.logprobs, choice.cumulative_logprob) == (None, None)

"""Stop strings: the stream against a naive search of the whole text."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import UsageError
from quire.tokenization.stop import StopChecker, StopStrings

letters = st.text("ab", max_size=24)
stops = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)
cuts = st.lists(st.integers(0, 24))


def naive(text: str, stop: list[str], include: bool, exempt: int = 0) -> tuple[str, str | None]:
    """Tries every prefix: the first that ends with a stop string, the longest such string."""
    for end in range(exempt + 1, len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def pieces_of(text: str, at: list[int]) -> list[str]:
    places = sorted({0, len(text), *[cut for cut in at if cut < len(text)]})
    return [text[a:b] for a, b in pairwise(places)]


@given(letters, stops, cuts, st.booleans())
def test_any_chunking_gives_what_a_search_of_the_whole_text_gives(
    text: str, stop: list[str], at: list[int], include: bool
) -> None:
    checker = StopChecker(StopStrings(stop), include)
    shown = "".join([checker.push(piece) for piece in pieces_of(text, at)])
    matched = checker.matched
    shown += checker.finish()
    assert (shown, matched) == naive(text, stop, include)


@given(letters, stops, cuts)
def test_nothing_shown_could_still_be_part_of_a_stop_string(
    text: str, stop: list[str], at: list[int]
) -> None:
    checker, shown, seen = StopChecker(StopStrings(stop)), "", ""
    for piece in pieces_of(text, at):
        shown += checker.push(piece)
        seen += piece
        if checker.matched is not None:
            break
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        # What is held is the beginning of a stop string, and nothing longer would be.
        candidates = [seen[cut:] for cut in range(len(seen) + 1)]
        longest = next(c for c in candidates if any(s.startswith(c) for s in [*stop, ""]))
        assert held == longest


@given(st.lists(st.text("ab", max_size=3), max_size=12), stops, st.integers(0, 8), st.booleans())
def test_matches_inside_the_first_min_tokens_do_not_count(
    tokens: list[str], stop: list[str], min_tokens: int, include: bool
) -> None:
    checker = StopChecker(StopStrings(stop), include, min_tokens)
    shown = "".join([checker.push(token) for token in tokens])
    matched = checker.matched
    shown += checker.finish()
    exempt = len("".join(tokens[:min_tokens]))
    assert (shown, matched) == naive("".join(tokens), stop, include, exempt)


def test_text_is_cut_before_the_match_or_after_it() -> None:
    for include, expected in ((False, "one "), (True, "one STOP")):
        checker = StopChecker(StopStrings(["STOP"]), include)
        shown = [checker.push(piece) for piece in ("one S", "TO", "P two", "three")]
        assert "".join(shown) == expected
        assert checker.matched == "STOP"
        assert checker.finish() == ""


def test_the_string_that_completes_first_wins_and_of_two_the_longer() -> None:
    checker = StopChecker(StopStrings(["abcd", "bc", "c"]))
    assert checker.push("xabcd") == "xa"
    assert checker.matched == "bc"


def test_held_text_comes_out_at_the_end() -> None:
    checker = StopChecker(StopStrings(["</answer>"]))
    assert checker.push("42 </ans") == "42 "
    assert checker.finish() == "</ans"


def test_without_stop_strings_text_passes_through() -> None:
    checker = StopChecker(StopStrings([]))
    assert (checker.push("anything"), checker.finish(), checker.matched) == ("anything", "", None)


def test_misuse_is_refused() -> None:
    with pytest.raises(UsageError):
        StopStrings(["ok", ""])
    with pytest.raises(ValueError, match="min_tokens"):
        StopChecker(StopStrings(["a"]), min_tokens=3).push("abcd", tokens=5)

"""Shapes of steps: padding, which get a graph, and what is prepared and compiled first."""

from __future__ import annotations

from dataclasses import replace

from quire.runner.shapes import Guessing, Reading, Sampling, Shape, Shapes, ends

SHAPES = Shapes(300, 6, 8, decode=(1, 2, 4, 8), mixed=(16, 64), drafting=True)


def test_a_step_is_padded_to_the_next_size_that_has_a_graph() -> None:
    assert SHAPES.of(3, 3) == Shape(4, 4)
    assert SHAPES.of(9, 9) == Shape(9, 9)  # more than any
    assert SHAPES.of(3, 2) == Shape(16, 6)
    assert SHAPES.of(16, 15) == Shape(16, 6)
    assert SHAPES.of(16, 16) == Shape(16, 16)
    assert SHAPES.of(65, 2) == Shape(65, 2)


def test_steps_of_other_sizes_get_no_graph() -> None:
    captured = [Shape(4, 4), Shape(64, 6), Reading(16, 6), Sampling(3, "full", True)]
    assert all(map(SHAPES.gets_graph, [*captured, Guessing(5, "greedy")]))
    assert not any(map(SHAPES.gets_graph, [Shape(65, 2), Shape(16, 16), Reading(306, 6)]))


def test_the_largest_steps_are_prepared_first_and_all_that_have_a_graph() -> None:
    planned = SHAPES.planned()
    mixed = [key for key in planned if isinstance(key, Shape) and key.tokens > key.rows]
    assert mixed == [Shape(300, 6), Shape(150, 6), Shape(75, 6), Shape(64, 6), Shape(16, 6)]
    for rows in SHAPES.decode:
        wanted = {
            Shape(rows, rows),
            Sampling(rows, "greedy", False),
            Sampling(rows, "plain", False),
        }
        assert wanted <= set(planned)
    assert Reading(306, 6) in planned and Guessing(8, "full") in planned
    assert len(planned) == len(set(planned))
    without = Shapes(300, 6, 8, (1, 2, 4, 8), (16, 64), drafting=False).planned()
    assert without == [key for key in planned if isinstance(key, Shape | Sampling)]


def test_few_short_contexts_have_shapes_of_their_own() -> None:
    shapes = replace(SHAPES, short_rows=3, short_context=512)
    assert shapes.of(1, 1, 512) == Shape(1, 1, short=True)
    assert shapes.of(1, 1, 513) == Shape(1, 1)
    assert shapes.of(2, 2, 512) == Shape(2, 2, short=True)
    assert shapes.of(3, 3, 100) == Shape(4, 4)
    assert shapes.of(3, 2, 100) == Shape(16, 6)
    assert shapes.gets_graph(Shape(2, 2, short=True))
    more = set(shapes.planned()) - set(SHAPES.planned())
    assert more == {Shape(1, 1, short=True), Shape(2, 2, short=True)}
    assert len(shapes.planned()) == len(set(shapes.planned()))


def test_ends_are_the_first_and_the_last_of_each_kind() -> None:
    found = ends(SHAPES.planned())
    assert found[:4] == [Shape(300, 6), Shape(16, 6), Shape(8, 8), Shape(1, 1)]
    assert set(found[4:]) == {
        Sampling(8, "greedy", False), Sampling(1, "greedy", False), Sampling(8, "plain", False),
        Sampling(1, "plain", False), Sampling(8, "full", False), Sampling(8, "greedy", True),
        Sampling(8, "full", True),
    }  # fmt: skip


def test_steps_of_short_contexts_take_nothing_from_the_ends_of_others() -> None:
    found = ends(replace(SHAPES, short_rows=2, short_context=512).planned())
    assert {Shape(8, 8), Shape(1, 1), Shape(2, 2, True), Shape(1, 1, True)} <= set(found)

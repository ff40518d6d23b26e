from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasplat import at_least, at_most, maximise, minimise
from nasplat.errors import InvalidInputError
from nasplat.objectives import (
    Constraint,
    Objective,
    constrained_dominates,
    crowding,
    dominates,
    front,
    ranks,
)

tables = st.integers(1, 3).flatmap(
    lambda width: st.lists(
        st.tuples(*[st.integers(0, 4).map(float) | st.floats(-1e6, 1e6)] * width), max_size=14
    )
)  # fmt: skip


@given(tables)
def test_the_front_is_what_nothing_dominates(rows):
    brute = [
        i
        for i, row in enumerate(rows)
        if not any(
            all(a <= b for a, b in zip(other, row, strict=True)) and any(a < b for a, b in zip(other, row, strict=True))
            for other in rows
        )
    ]
    assert front(rows) == brute


@given(tables)
def test_dominance_is_a_strict_order(rows):
    for a in rows:
        assert not dominates(a, a)
        for b in rows:
            assert not (dominates(a, b) and dominates(b, a))
            for c in rows[:5]:
                if dominates(a, b) and dominates(b, c):
                    assert dominates(a, c)


def test_equal_rows_stay_and_no_rows_have_no_front():
    assert front([(1.0, 2.0), (1.0, 2.0), (2.0, 1.0), (2.0, 2.0)]) == [0, 1, 2]
    assert front([]) == []


def test_an_objective_turns_its_sign_so_that_smaller_is_better():
    assert maximise("a").loss({"a": 3.0}) == -3.0
    assert minimise("a").loss({"a": 3.0}) == 3.0
    assert (str(maximise("a")), str(minimise("b"))) == ("maximise a", "minimise b")


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_a_limit_is_violated_by_its_excess(bound, value):
    assert at_most("a", bound).violation({"a": value}) == max(0.0, value - bound)
    assert at_least("a", bound).violation({"a": value}) == max(0.0, bound - value)
    assert at_most("a", bound).violation({"a": bound}) == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Objective("a", "max"),  # type: ignore[arg-type]
        lambda: Constraint("a", 1.0, "below"),  # type: ignore[arg-type]
        lambda: at_most("a", math.nan),
        lambda: at_least("a", math.inf),
    ],
)
def test_what_is_not_legal_is_refused(make):
    with pytest.raises(InvalidInputError):
        make()


def test_a_limit_reads_well():
    assert str(at_most("params", 1e6)) == "params at most 1e+06"
    assert str(at_least("val_accuracy", 0.5)) == "val_accuracy at least 0.5"


limited = st.lists(
    st.tuples(st.integers(0, 3).map(float), st.integers(0, 3).map(float), st.sampled_from([0.0, 0.0, 0.0, 0.5, 1.0])),
    max_size=12,
)


def peeled(rows, violations):
    """Ranks by the definition: take away the front, again and again."""
    left, found, rank = set(range(len(rows))), [0] * len(rows), 0
    while left:
        best = {
            i
            for i in left
            if not any(constrained_dominates(rows[j], rows[i], violations[j], violations[i]) for j in left)
        }
        for i in best:
            found[i] = rank
        left, rank = left - best, rank + 1
    return found


@given(limited)
def test_ranks_are_fronts_of_what_is_left(table):
    rows, violations = [row[:2] for row in table], [row[2] for row in table]
    assert ranks(rows, violations) == peeled(rows, violations)


@given(tables)
def test_the_first_rank_is_the_front_for_any_number_of_objectives(rows):
    found = ranks(rows)
    assert [i for i, rank in enumerate(found) if rank == 0] == front(rows)
    assert found == peeled(rows, [0.0] * len(rows))


def test_feasible_beats_infeasible_then_the_smaller_violation():
    good, bad = (0.0, 0.0), (9.0, 9.0)
    assert constrained_dominates(bad, good, 0.0, 0.1)
    assert constrained_dominates(bad, good, 0.1, 0.2)
    assert not constrained_dominates(good, bad, 0.2, 0.1)
    assert not constrained_dominates(good, bad, 0.2, 0.2)
    assert constrained_dominates(good, bad)
    # Losses of what breaks a limit need not be known.
    assert ranks([bad, (), good, ()], [0.0, 0.2, 0.0, 0.1]) == [1, 3, 0, 2]
    assert ranks([(), ()], [math.inf, 1.0]) == [1, 0]


def test_violations_are_one_for_each_row():
    with pytest.raises(InvalidInputError, match="1 violations for 2 rows"):
        ranks([(0.0,), (1.0,)], [0.0])


def zdt1(x):
    """Two objectives of variables in [0, 1] (Zitzler, Deb, Thiele 2000); the front is at x[1:] = 0."""
    g = 1 + 9 * sum(x[1:]) / (len(x) - 1)
    return x[0], g * (1 - math.sqrt(x[0] / g))


def test_the_front_of_zdt1_on_a_grid():
    grid = [(a / 10, b / 4, c / 4) for a in range(11) for b in range(5) for c in range(5)]
    losses = [zdt1(x) for x in grid]
    best = {x for x, rank in zip(grid, ranks(losses), strict=True) if rank == 0}
    assert best == {(a / 10, 0.0, 0.0) for a in range(11)}
    # Behind it lie those at the next larger g, and there the two variables stand for each other.
    second = {x for x, rank in zip(grid, ranks(losses), strict=True) if rank == 1}
    assert {(a / 10, 0.25, 0.0) for a in range(1, 11)} | {(a / 10, 0.0, 0.25) for a in range(1, 11)} <= second


def test_crowding_by_hand():
    # Ranges 4 and 8; the neighbours of (1, 4) are (0, 8) and (2, 2), those of (2, 2) are (1, 4) and (4, 0).
    rows = [(0.0, 8.0), (1.0, 4.0), (2.0, 2.0), (4.0, 0.0)]
    assert crowding(rows) == [math.inf, 2 / 4 + 6 / 8, 3 / 4 + 4 / 8, math.inf]
    assert crowding([]) == []
    assert crowding([(1.0, 2.0)]) == [math.inf]


def test_equal_rows_share_their_crowding_and_count_once():
    rows = [(0.0, 2.0), (1.0, 1.0), (1.0, 1.0), (2.0, 0.0)]
    assert crowding(rows) == [math.inf, 2.0, 2.0, math.inf]
    assert crowding([(1.0, 1.0)] * 4) == [math.inf] * 4


def test_an_objective_in_which_all_are_equal_adds_nothing():
    with_one_more = [(*row, 5.0) for row in [(0.0, 2.0), (1.0, 1.0), (2.0, 0.0)]]
    assert crowding(with_one_more) == [math.inf, 2.0, math.inf]


@given(tables, st.randoms(use_true_random=False))
def test_neither_ranks_nor_crowding_depend_on_the_order(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = [rows[i] for i in order]
    assert ranks(shuffled) == [ranks(rows)[i] for i in order]
    assert crowding(shuffled) == pytest.approx([crowding(rows)[i] for i in order])


@given(tables.filter(lambda rows: len(rows) > 2))
def test_the_ends_of_each_objective_are_infinitely_far(rows):
    found = crowding(rows)
    for column in range(len(rows[0])):
        values = [row[column] for row in rows]
        if min(values) < max(values):
            assert any(found[i] == math.inf for i, value in enumerate(values) if value == min(values))
            assert any(found[i] == math.inf for i, value in enumerate(values) if value == max(values))

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasplat import at_least, at_most, maximise, minimise
from nasplat.errors import InvalidInputError
from nasplat.objectives import Constraint, Objective, dominates, front

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

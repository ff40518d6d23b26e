from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import zeros
from torch.utils.data import DataLoader, TensorDataset

from nasplat import Result, Study, Task, at_most, maximise, minimise
from nasplat.errors import InvalidInputError
from nasplat.front_figure import draw
from nasplat.objectives import dominates, front
from nasplat.strategy import Evaluate, History, Trial
from nasplat.testing.landscapes import Levels
from nasplat.uncertainty import (
    SUSPECT,
    TEST_RETEST,
    binomial_error,
    estimate,
    front_probability,
    median_error,
    probability_better,
    probability_dominates,
    tie_groups,
    tied,
    uncertain_front,
    validation_examples,
)
from strategies import RandomSearch

numbers = st.integers(0, 3).map(float) | st.floats(-1e6, 1e6)
deviations = st.sampled_from([0.0, 0.0, 0.5]) | st.floats(0, 1e3)
tables = st.integers(1, 3).flatmap(
    lambda width: st.lists(st.tuples(*[st.tuples(numbers, deviations)] * width), max_size=8)
)
pairs = st.integers(1, 3).flatmap(
    lambda width: st.lists(st.tuples(numbers, numbers, deviations, deviations), min_size=width, max_size=width)
)


def split(rows: Any) -> tuple[list[list[float]], list[list[float]]]:
    return [[value for value, _ in row] for row in rows], [[error for _, error in row] for row in rows]


# Two candidates.


def test_probabilities_by_hand() -> None:
    # The difference is one standard deviation, hypot(3, 4) = 5, of a normal distribution: its table says 0.8413.
    assert probability_better(10.0, 15.0, 3.0, 4.0) == pytest.approx(0.841345, abs=1e-6)
    assert probability_better(15.0, 10.0, 3.0, 4.0) == pytest.approx(1 - 0.841345, abs=1e-6)
    assert probability_better(1.0, 1.0, 0.1, 0.2) == 0.5
    assert probability_better(1.0, 1.0) == 0.5
    assert probability_better(1.0, 2.0) == 1.0
    # Better in one with 0.8413, and no worse for sure in an exact one.
    assert probability_dominates([10.0, 7.0], [15.0, 7.0], [3.0, 0.0], [4.0, 0.0]) == pytest.approx(0.841345, abs=1e-6)
    assert probability_dominates([10.0, 8.0], [15.0, 7.0], [3.0, 0.0], [4.0, 0.0]) == 0.0
    assert probability_dominates([10.0, 0.0], [15.0, 0.0], [3.0, 1.0], [4.0, 1.0]) == pytest.approx(0.420672, abs=1e-6)
    assert probability_dominates([1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]) == 0.0


@given(numbers, numbers, deviations, deviations)
def test_one_of_two_is_better(a: float, b: float, error_a: float, error_b: float) -> None:
    one, other = probability_better(a, b, error_a, error_b), probability_better(b, a, error_b, error_a)
    assert one + other == pytest.approx(1.0)
    assert 0 <= one <= 1
    if a < b:
        assert one >= 0.5


@given(pairs)
def test_dominance_is_no_likelier_than_being_no_worse_anywhere(rows: Any) -> None:
    a, b, errors_a, errors_b = (list(column) for column in zip(*rows, strict=True))
    one = probability_dominates(a, b, errors_a, errors_b)
    other = probability_dominates(b, a, errors_b, errors_a)
    assert -1e-12 <= one <= 1 and one + other <= 1 + 1e-12
    turned = [list(reversed(part)) for part in (a, b, errors_a, errors_b)]
    assert probability_dominates(*turned) == pytest.approx(one, abs=1e-12)
    none = [0.0] * len(a)
    assert probability_dominates(a, b, none, none) == float(dominates(a, b))


def test_dominance_is_what_simulation_says() -> None:
    rng = np.random.default_rng(7)
    draws = 200_000
    for _ in range(5):
        a, b = rng.normal(size=(2, 3))
        a[2] = b[2] = 1.0
        errors_a, errors_b = rng.uniform(0.2, 1.5, size=(2, 3))
        errors_a[2] = errors_b[2] = 0.0
        x = a + errors_a * rng.standard_normal((draws, 3))
        y = b + errors_b * rng.standard_normal((draws, 3))
        simulated = ((x <= y).all(axis=1) & (x < y).any(axis=1)).mean()
        exact = probability_dominates(a, b, errors_a, errors_b)
        assert exact == pytest.approx(simulated, abs=5 * math.sqrt(0.25 / draws))


# Many candidates.


@given(tables)
@settings(max_examples=60)
def test_without_errors_it_is_the_front(rows: Any) -> None:
    losses, _ = split(rows)
    found = front_probability(losses, [[0.0] * len(row) for row in losses], draws=3)
    assert np.flatnonzero(found == 1).tolist() == front(losses)
    assert set(found.tolist()) <= {0.0, 1.0}


@given(tables, st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_the_order_does_not_matter(rows: Any, random: Any) -> None:
    losses, errors = split(rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    found = front_probability(losses, errors, draws=200)
    shuffled = front_probability([losses[i] for i in order], [errors[i] for i in order], draws=200)
    assert shuffled.tolist() == [found[i] for i in order]
    assert ((found >= 0) & (found <= 1)).all()
    if len(rows):
        assert found.sum() >= 1 - 1e-9  # in each draw there is a front


def simulated(losses: Any, errors: Any, draws: int) -> list[float]:
    """The share of draws in which nothing dominates a candidate, by the definition of a front."""
    rng = np.random.default_rng(11)
    hits = np.zeros(len(losses))
    for _ in range(draws):
        hits[front((np.asarray(losses) + np.asarray(errors) * rng.standard_normal(np.shape(losses))).tolist())] += 1
    return list(hits / draws)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_many_are_what_simulation_says(width: int) -> None:
    rng = np.random.default_rng(width)
    losses, errors = rng.normal(size=(9, width)), rng.uniform(0, 0.8, size=(9, width))
    losses[3], errors[3] = losses[5], errors[5]
    errors[0] = 0.0
    losses[7] = losses.max(axis=0) + 50  # surely dominated
    found = front_probability(losses, errors)
    assert found == pytest.approx(simulated(losses, errors, 2000), abs=5 * math.sqrt(0.25 / 2000))
    assert found[3] == found[5] and found[7] == 0


def test_two_candidates_are_what_the_formula_says() -> None:
    losses, errors = [[1.0, 5.0], [1.2, 5.5]], [[0.2, 0.3], [0.1, 0.4]]
    found = front_probability(losses, errors)
    assert found[1] == pytest.approx(1 - probability_dominates(losses[0], losses[1], *errors), abs=0.025)
    assert found[0] == pytest.approx(1 - probability_dominates(losses[1], losses[0], *errors[::-1]), abs=0.025)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=9))
def test_exact_and_equal_values_in_one_objective(rows: Any) -> None:
    """The sort for two objectives, where many are equal, against the definition."""
    losses = [[float(a), float(b)] for a, b in rows]
    three = [[*row, 0.0] for row in losses]
    none = np.zeros_like(losses)
    assert front_probability(losses, none, draws=1).tolist() == front_probability(
        three, np.zeros_like(three), draws=1
    ).tolist()  # fmt: skip


def test_what_is_not_legal_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="shape"):
        front_probability([[1.0]], [[1.0, 2.0]])
    with pytest.raises(InvalidInputError, match="at least 0"):
        front_probability([[1.0]], [[-1.0]])
    with pytest.raises(InvalidInputError, match="finite"):
        front_probability([[math.nan]], [[1.0]])
    with pytest.raises(InvalidInputError, match="one length"):
        probability_dominates([1.0], [1.0, 2.0], [0.0], [0.0])
    with pytest.raises(InvalidInputError, match="confidence"):
        tied(1.0, 2.0, 0.0, 0.0, confidence=95)
    assert front_probability([], []).tolist() == []


# Ties.


def test_ties_by_hand() -> None:
    # 1.96 standard deviations of the difference, hypot(3, 4) = 5: 9.8.
    assert tied(10.0, 19.7, 3.0, 4.0) and not tied(10.0, 19.9, 3.0, 4.0)
    assert tied(10.0, 19.9, 3.0, 4.0, confidence=0.99)
    assert tied(1.0, 1.0, 0.0, 0.0) and not tied(1.0, 1.0000001, 0.0, 0.0)
    # 1, 2, 3 with errors of 0.6: bound 1.96 * 0.849 = 1.66. Neighbours are tied, the ends are not.
    assert tie_groups([3.0, 1.0, 2.0, 9.0], [0.6] * 4) == [(1, 2), (2, 0)]
    assert tie_groups([1.0, 1.0, 2.0], [0.0] * 3) == [(0, 1)]
    assert tie_groups([], []) == []


@given(st.lists(st.tuples(numbers, deviations), max_size=9))
def test_in_a_group_all_are_tied_with_all(rows: Any) -> None:
    values, errors = [value for value, _ in rows], [error for _, error in rows]
    groups = tie_groups(values, errors)
    for group in groups:
        assert len(group) > 1
        assert all(tied(values[a], values[b], errors[a], errors[b]) for a in group for b in group)
    assert not any(set(one) < set(other) for one in groups for other in groups)
    order = sorted(range(len(rows)), key=lambda index: (values[index], index))
    for a, b in pairwise(order):
        if tied(values[a], values[b], errors[a], errors[b]):
            assert any({a, b} <= set(group) for group in groups)


# What was recorded.


SPACE = Levels(length=3, levels=4)


def none(trial: Trial) -> Mapping[str, Any]:
    return {}


def trial(number: int = 0, gene: int | None = None, **metrics: float) -> Trial:
    genes = {"x0": (number if gene is None else gene) % 4, "x1": (number if gene is None else gene) // 4, "x2": 0}
    return Trial(number, Evaluate(SPACE.architecture(genes)), state="complete", metrics=metrics, finished=1.0)


def test_an_accuracy_has_the_error_of_its_examples() -> None:
    # (800 + 2) / 1004 = 0.79880..., and sqrt(0.7988 * 0.2012 / 1004) = 0.012652.
    found = estimate("val_accuracy", [trial(val_accuracy=0.8)], none, 1000)
    assert (found.value, found.origin) == (0.8, "examples")
    assert found.error == pytest.approx(0.012652, abs=1e-6)
    assert binomial_error(1.0, 100) > 0  # all of 100 right does not mean always right
    assert estimate("val_accuracy", [trial(val_accuracy=0.8)], none, None).error is None


def test_counted_costs_are_exact() -> None:
    found = estimate("params", [trial(params=1234.0)], none, 1000)
    assert (found.error, found.origin) == (0.0, "exact")


def test_a_latency_has_the_error_of_its_blocks() -> None:
    medians = [1.0, 1.1, 0.9, 1.3, 0.7, 1.0]
    readings = [reading for median in medians for reading in (median - 0.01, median, median + 0.01)]
    samples = {"latency_ms": readings, "latency_ms_block": [float(i) for i in range(6) for _ in range(3)]}
    measured = trial(latency_ms=1.0, latency_ms_block_sd=0.2)
    found = estimate("latency_ms", [measured], lambda _: samples, 1000)
    # Deviations 0, .1, -.1, .3, -.3, 0: variance 0.2 / 5 = 0.04; sqrt(pi / 12 * 0.04) = 0.10233.
    assert found.error == pytest.approx(0.10233, abs=1e-5) and found.origin == "blocks"
    assert median_error(medians) == found.error
    # Without the readings the number of blocks is not known.
    assert estimate("latency_ms", [measured], none, None).error == 0.2
    quiet = trial(latency_ms=2.0, latency_ms_block_sd=1e-6)
    assert estimate("latency_ms", [quiet], none, None).error == pytest.approx(2.0 * TEST_RETEST)
    suspect = trial(latency_ms=2.0, latency_ms_block_sd=1e-6, latency_ms_suspect=1.0)
    assert estimate("latency_ms", [suspect], none, None).error == pytest.approx(2.0 * SUSPECT)


def test_a_speed_up_has_the_errors_of_both_times() -> None:
    samples = {
        name: values
        for metric in ("latency_ms", "latency_ms_fp32")
        for name, values in ((metric, [1.0, 1.0]), (f"{metric}_block", [0.0, 1.0]))
    }
    measured = trial(latency_ms=1.0, latency_ms_fp32=3.0, latency_ms_speedup_fp32=3.0, latency_ms_block_sd=0.0)
    twin = estimate("latency_ms_fp32", [measured], lambda _: samples, None)
    assert twin.error == pytest.approx(3.0 * TEST_RETEST)
    found = estimate("latency_ms_speedup_fp32", [measured], lambda _: samples, None)
    assert found.error == pytest.approx(3.0 * math.sqrt(2) * TEST_RETEST)
    assert estimate("latency_ms_speedup_fp32", [measured], none, None).error is None


def test_a_prediction_has_the_error_of_its_table() -> None:
    predicted = trial(latency_ms=2.0, latency_ms_mad=0.1, latency_ms_predicted=2.0)
    found = estimate("latency_ms", [predicted], none, None)
    assert (found.origin, found.error) == ("prediction", pytest.approx(0.14826))
    checked = {"latency_ms_predicted": 2.1, "latency_ms_prediction_error": 0.05, "latency_ms_block_sd": 0.0}
    found = estimate("latency_ms", [trial(latency_ms=2.0, latency_ms_mad=0.1, **checked)], none, None)
    assert (found.origin, found.error) == ("blocks", pytest.approx(0.02))


def test_replicates_give_mean_and_standard_error() -> None:
    scores = [0.7, 0.8, 0.9]
    same = [trial(number, gene=0, score=score, params=5.0) for number, score in enumerate(scores)]
    found = estimate("score", same, none, None)
    assert found.value == pytest.approx(0.8) and found.origin == "replicates"
    assert found.error == pytest.approx(statistics.stdev(scores) / math.sqrt(3))
    assert estimate("params", same, none, None) == estimate("params", same[:1], none, None)
    # Replicates answer the same examples, so that part stays whole.
    answered = [trial(number, gene=0, val_accuracy=score) for number, score in enumerate(scores)]
    both = estimate("val_accuracy", answered, none, 100)
    assert both.error == pytest.approx(math.hypot(0.1 / math.sqrt(3), binomial_error(0.8, 100)))
    # Two that agree by chance are no better than two measurements.
    timed = [trial(number, gene=0, latency_ms=2.0, latency_ms_block_sd=0.0) for number in range(2)]
    assert estimate("latency_ms", timed, none, None).error == pytest.approx(2.0 * TEST_RETEST / math.sqrt(2))


def history_of(*trials: Trial) -> History:
    history = History(SPACE, [maximise("val_accuracy"), minimise("latency_ms")], [at_most("params", 1000)])
    for given_trial in trials:
        history.start(Trial(given_trial.number, given_trial.proposal))
        history.finish(given_trial.number, state="complete", metrics=given_trial.metrics, finished=1.0)
    return history


def timed(number: int, accuracy: float, latency: float, gene: int | None = None, params: float = 10.0) -> Trial:
    return trial(
        number, gene, val_accuracy=accuracy, latency_ms=latency, latency_ms_block_sd=0.0, params=params
    )  # fmt: skip


def test_widths_that_take_the_same_time_are_tied_and_may_all_be_on_the_front() -> None:
    """The latencies of widths 36, 40, 44 and 48, which one block of channels makes equal."""
    rows = [timed(0, 0.80, 0.618), timed(1, 0.803, 0.618), timed(2, 0.804, 0.618), timed(3, 0.801, 0.617)]
    rows += [timed(4, 0.70, 0.294), timed(5, 0.60, 5.0), timed(6, 0.99, 0.1, params=2000.0)]
    found = uncertain_front(history_of(*rows), none, 1000)
    assert [member.number for member in found.members if member.on_front] == [2, 3, 4]
    assert {member.number for member in found.members} == {0, 1, 2, 3, 4}  # 5 is surely dominated, 6 breaks a limit
    assert [trial.number for trial in found.others] == [5]
    by_number = {member.number: member for member in found.members}
    assert set(by_number[2].ties["latency_ms"]) == {0, 1, 3}
    assert by_number[4].ties == {} and by_number[4].probability == 1.0
    assert found.groups("latency_ms") == [(3, 2, 1, 0)] or set(found.groups("latency_ms")[0]) == {0, 1, 2, 3}
    assert sorted(found.groups("val_accuracy")[0]) == [0, 1, 2, 3]
    assert 0.05 < by_number[0].probability < 0.95


def test_replicates_are_one_candidate() -> None:
    rows = [timed(0, 0.9, 1.0), timed(1, 0.7, 1.0, gene=0), timed(2, 0.85, 1.0, gene=2)]
    found = uncertain_front(history_of(*rows), none, 1000)
    assert [member.number for member in found.members if member.on_front] == [2]  # the mean of the others is 0.8
    twice = next(member for member in found.members if member.number == 0)
    assert twice.replicates == (0, 1) and twice.trial.metrics["val_accuracy"] == pytest.approx(0.8)
    assert twice.estimates["val_accuracy"].error == pytest.approx(math.hypot(0.1, binomial_error(0.8, 1000)))


def test_without_errors_the_front_is_the_plain_one() -> None:
    rows = [trial(number, val_accuracy=a, latency_ms=b, params=1.0) for number, (a, b) in enumerate([(1, 2), (2, 3)])]
    rows += [trial(2, val_accuracy=0.5, latency_ms=9.0, params=1.0)]
    history = history_of(*rows)
    found = uncertain_front(history, none, None)
    assert [member.number for member in found.members] == [trial.number for trial in history.front()]
    assert [member.probability for member in found.members] == [1.0, 1.0] and not found.uncertain
    assert uncertain_front(history_of(), none, None).members == ()


def test_how_many_examples_a_task_validates_on() -> None:
    assert validation_examples(Task.digits()) == 287
    assert validation_examples(Task.from_function(lambda architecture, budget, seed: {})) is None
    assert validation_examples(None) is None
    data = TensorDataset(zeros(10, 2), zeros(10))
    assert validation_examples(Task.from_datasets(data, data, name="ten")) == 10
    loader: Any = DataLoader(data, batch_size=4)
    assert validation_examples(Task.from_loaders(loader, loader, name="ten")) == 10
    assert (
        validation_examples(Task.from_loaders([(zeros(1, 2), zeros(1))], [(zeros(1, 2), zeros(1))], name="l")) is None
    )


# A study's result.


def result_of(folder: Path, *trials: Trial) -> Result:
    return Result(folder, SPACE, None, history_of(*trials))


WIDTHS = (timed(0, 0.80, 0.618), timed(1, 0.803, 0.6181), timed(2, 0.70, 0.294), timed(3, 0.6, 3.0))


def test_the_table_of_a_front_with_errors(tmp_path: Path) -> None:
    result = result_of(tmp_path, *WIDTHS, timed(4, 0.69, 0.294, gene=2))
    assert result.front().index.tolist() == [1, 0, 2]  # without errors as ever
    assert "on_front" not in result.front()
    table = result.front(0.95, examples=1000)
    assert table.index.tolist() == [1, 0, 2]
    assert table.loc[1, "tied_latency_ms"] == "0" and table.loc[2, "tied_latency_ms"] == ""
    assert table.loc[2, "replicates"] == "2 4" and table.loc[2, "val_accuracy"] == pytest.approx(0.695)
    assert table.loc[1, "latency_ms_se"] == pytest.approx(0.006181)
    assert table.loc[1, "val_accuracy_se"] == pytest.approx(binomial_error(0.803, 1000))
    # How many examples there are is not known: only replicates tell.
    assert result.front(0.95)["val_accuracy_se"].isna().tolist() == [True, True, False]
    assert table.loc[2, "front_probability"] == 1.0
    with pytest.raises(InvalidInputError, match="confidence"):
        result.front(95)


def test_readings_of_a_trial_come_from_its_folder(tmp_path: Path) -> None:
    result = result_of(tmp_path, *WIDTHS)
    assert result.samples(0) == {}
    readings = {"latency_ms": [0.5, 0.7, 0.5, 0.7], "latency_ms_block": [0.0, 1.0, 2.0, 3.0]}
    (tmp_path / "trials" / "00000").mkdir(parents=True)
    (tmp_path / "trials" / "00000" / "samples.json").write_text(json.dumps(readings))
    assert result.samples(0) == readings
    assert result.front(0.95).loc[0, "latency_ms_se"] == pytest.approx(median_error([0.5, 0.7, 0.5, 0.7]))


def test_a_front_is_drawn_and_saved(tmp_path: Path) -> None:
    result = result_of(tmp_path, *WIDTHS)
    first, second = result.plot_front(tmp_path / "new" / "a.svg"), result.plot_front(tmp_path / "b.png")
    text = first.read_text()
    assert text.startswith("<?xml") and second.read_bytes().startswith(b"\x89PNG")
    figure = draw(result.uncertain_front(examples=1000))
    (axes,) = figure.axes
    assert {label for label in axes.get_legend_handles_labels()[1]} == {
        "dominated", "on the front", "tied in latency_ms", "tied in val_accuracy"
    }  # fmt: skip
    assert axes.get_xlabel().startswith("latency [ms]") and axes.get_ylabel().startswith("val_accuracy")
    assert {note.get_text() for note in axes.texts} == {"#0", "#1", "#2"}
    assert [path.name for path in result.save_front(tmp_path)] == ["front.csv", "front.png"]
    assert (tmp_path / "front.csv").read_text().splitlines()[1].startswith("1,evaluate,complete")
    with pytest.raises(InvalidInputError, match=r"\.svg, \.png or \.pdf"):
        result.plot_front(tmp_path / "a.gif")
    empty = result_of(tmp_path / "empty")
    assert empty.save_front(tmp_path) == []
    with pytest.raises(InvalidInputError, match="no front to draw"):
        empty.plot_front(tmp_path / "a.png")


def test_one_objective_and_three_are_drawn(tmp_path: Path) -> None:
    three = [maximise("val_accuracy"), minimise("latency_ms"), minimise("params")]
    for wishes, panels in ((three[:1], 1), (three, 2)):
        history = History(SPACE, wishes)
        for given_trial in WIDTHS:
            history.start(Trial(given_trial.number, given_trial.proposal))
            history.finish(given_trial.number, state="complete", metrics=given_trial.metrics, finished=1.0)
        result = Result(tmp_path, SPACE, None, history)
        assert len(draw(result.uncertain_front()).axes) == panels
        assert result.plot_front(tmp_path / "front.pdf").read_bytes().startswith(b"%PDF")


def test_the_front_goes_to_the_record_at_the_end(tmp_path: Path) -> None:
    @dataclass
    class Kept:
        files: dict[str, bytes] = field(default_factory=dict)

        def start(self, study: Any) -> set[int]:
            return set()

        def log(self, trial: Trial) -> None: ...
        def end(self, state: str) -> None: ...

        def artifact(self, path: Path, folder: str = "") -> None:
            self.files[path.name] = path.read_bytes()

        def where(self, study: Any) -> str:
            return ""

    def evaluate(architecture: Any, budget: float, seed: int) -> dict[str, float]:
        return {"val_accuracy": architecture.genes["x0"] / 10, "size": 1.0 + architecture.genes["x0"]}

    kept = Kept()
    wishes = [maximise("val_accuracy"), minimise("size")]
    task = Task.from_function(evaluate)
    Study(SPACE, RandomSearch(), task, wishes, folder=tmp_path / "a", tracker=kept, progress=False).run(4)
    assert set(kept.files) == {"front.csv", "front.png"}
    assert b"front_probability" in kept.files["front.csv"].splitlines()[0]

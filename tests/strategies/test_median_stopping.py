import json
from dataclasses import dataclass, replace

import pytest
from torch import nn

from nasplat.errors import InvalidInputError
from nasplat.objectives import maximise, minimise
from nasplat.space import space_from
from nasplat.strategy import Evaluate, Explore, History, Report, Trial
from nasplat.study import Study
from nasplat.task import Task
from nasplat.testing.drive import drive, replay
from nasplat.testing.landscapes import Levels, one_max, short_training
from nasplat.testing.strategy_contract import StrategyContract
from strategies import OptunaSearch, RandomSearch, RegularizedEvolution
from strategies.hyperband import Hyperband
from strategies.median_stopping import MedianStopping


class TestMedianStoppingContract(StrategyContract):
    trials = 25

    @pytest.fixture
    def strategy(self):
        return MedianStopping(RegularizedEvolution(population=8, sample=3))

    @pytest.mark.slow
    @pytest.mark.parametrize("known", ["separable", "groups"])
    def test_beats_random_search(self, strategy, known):
        """As the strategy inside does, whose proposals these are."""
        super().test_beats_random_search(strategy, known)


def history_of(*curves, objectives=None, states=None):
    """Trials that reported these values, epoch by epoch; the last one still runs."""
    history = History(Levels(5, 4), objectives or [maximise("value")])
    for number, curve in enumerate(curves):
        genes = {f"x{index}": (number // 4**index) % 4 for index in range(5)}
        history.start(Trial(number, Evaluate(history.space.architecture(genes))))
        for step, values in enumerate(curve, 1):
            metrics = values if isinstance(values, dict) else {"value": values}
            history.report(number, Report(step, metrics))
        if number < len(curves) - 1:
            state = (states or {}).get(number, "complete")
            last = dict(history.trials[number].reports[-1])
            history.finish(number, state=state, metrics=last)
    return history


def keeps(history, **arguments):
    strategy = MedianStopping(RandomSearch(), **{"min_trials": 1, **arguments})
    return strategy.keep(history.trials[-1], history)


def test_the_best_so_far_against_the_median_of_the_running_means():
    # Means over the first two epochs: 0.2, 0.4, 0.6; the third epochs do not count.
    others = ([0.1, 0.3, 0.9], [0.3, 0.5, 0.9], [0.5, 0.7, 0.9])
    assert not keeps(history_of(*others, [0.39, 0.1]))
    assert keeps(history_of(*others, [0.4, 0.1]))  # equal is not worse, and the best counts, not the last
    assert keeps(history_of(*others, [0.1, 0.41]))


def test_a_minimised_objective():
    others = ([0.2, 0.2], [0.4, 0.4], [0.6, 0.6])
    history = history_of(*others, [0.5, 0.41], objectives=(minimise("value"),))
    assert not keeps(history)
    assert keeps(history_of(*others, [0.5, 0.4], objectives=(minimise("value"),)))


def test_only_complete_trials_with_as_many_epochs_are_compared_with():
    bad = [0.1, 0.1]
    assert not keeps(history_of([0.9, 0.9], bad))
    assert keeps(history_of([0.9], bad))
    assert keeps(history_of([0.9, 0.9], bad, states={0: "stopped"}))
    assert keeps(history_of([0.9, 0.9], bad, states={0: "failed"}))


def test_min_steps_and_min_trials():
    history = history_of([0.9, 0.9], [0.9, 0.9], [0.1, 0.1])
    assert not keeps(history, min_trials=2)
    assert keeps(history, min_trials=3)
    assert not keeps(history, min_steps=2)
    assert keeps(history, min_steps=3)


def test_with_several_objectives_worse_in_each_that_is_reported():
    objectives = (maximise("value"), minimise("loss"), minimise("params"))
    other = [{"value": 0.9, "loss": 0.1, "params": 5.0}]
    assert not keeps(history_of(other, [{"value": 0.1, "loss": 0.9}], objectives=objectives))
    assert keeps(history_of(other, [{"value": 0.1, "loss": 0.05}], objectives=objectives))
    assert keeps(history_of(other, [{"accuracy": 0.1}], objectives=objectives))  # nothing to judge by


def test_trainings_that_go_on_count_the_epochs_before():
    history = history_of([0.2, 0.2, 0.9, 0.9], [0.1, 0.1])
    first = history.trials[1]
    history.finish(1, state="complete", metrics={"value": 0.1})
    history.start(Trial(2, Evaluate(first.architecture, weights_of=1)))
    history.report(2, Report(1, {"value": 0.4}))
    # Its third epoch: worse than the mean of 0.2, 0.2, 0.9.
    assert not keeps(history)
    history.report(2, Report(1, {"value": 0.45}))
    assert keeps(history)


def test_a_training_that_went_on_is_compared_with_once():
    history = history_of([0.9], [0.3], [0.4])  # the last one runs
    first = history.trials[0].architecture
    history.start(Trial(3, Evaluate(first, weights_of=0)))
    history.report(3, Report(1, {"value": 0.9}))
    history.finish(3, state="complete", metrics={"value": 0.9})
    # Two trainings: 0.9 and 0.3, median 0.6. Counted twice, the first would raise the median to 0.9.
    others = MedianStopping(RandomSearch(), min_trials=3)
    assert others.keep(history.trials[2], history)
    assert not MedianStopping(RandomSearch(), min_trials=2).keep(history.trials[2], history)


def test_explorations_are_never_stopped():
    history = history_of([0.9], [0.9], [0.1])
    history.start(Trial(3, Explore(None)))
    history.report(3, Report(1, {"value": 0.0}))
    assert keeps(history)


@dataclass(frozen=True)
class Keeping:
    answer: bool

    def propose(self, history, rng):
        return None

    def keep(self, trial, history):
        return self.answer


def test_the_strategy_inside_must_agree():
    good, bad = history_of([0.5], [0.9]), history_of([0.5], [0.1])
    for history, own in ((good, True), (bad, False)):
        for inner in (True, False):
            strategy = MedianStopping(Keeping(inner), min_trials=1)
            assert strategy.keep(history.trials[-1], history) is (own and inner)


def test_proposes_what_the_strategy_inside_does():
    inner = RegularizedEvolution(population=5)
    plain, wrapped = (drive(strategy, one_max(), 30) for strategy in (inner, MedianStopping(inner)))
    assert plain.proposals == wrapped.proposals


@pytest.mark.parametrize(
    "inner", [RandomSearch(), RegularizedEvolution(population=8), OptunaSearch("tpe"), Hyperband(min_budget=1 / 3)]
)
def test_stops_bad_trials_and_saves_epochs(inner):
    landscape = short_training(one_max(), noise=0.02)
    run = drive(MedianStopping(inner), landscape, 60, epochs=6, in_flight=2)
    stopped = [trial for trial in run.history.trials if trial.state == "stopped"]
    assert 4 <= len(stopped) <= 45
    assert all(len(trial.reports) < 6 for trial in stopped)
    complete = [trial for trial in run.history.scored() if trial.full]
    worth = landscape.score
    assert sum(worth(t.architecture)["value"] for t in stopped) / len(stopped) < sum(
        t.metrics["value"] for t in complete
    ) / len(complete)
    assert all(trial.state == "complete" for trial in run.history.front())


def test_keep_is_pure():
    run = drive(MedianStopping(RandomSearch()), short_training(one_max()), 30, epochs=4, in_flight=3)
    answers = {False: 0, True: 0}
    for index, (kind, what, _) in enumerate(run.events):
        if kind == "report":
            history = replay(one_max(), run.events[: index + 1]).history
            kept = MedianStopping(RandomSearch()).keep(history.trials[what], history)
            last = len(history.trials[what].reports) == 4
            stopped = run.events[index + 1][1:] == (what, run.events[index + 1][2]) and (
                run.events[index + 1][2].get("state") == "stopped"
            )
            assert stopped is (not kept and not last)
            answers[kept] += 1
    assert min(answers.values()) > 5


@pytest.mark.parametrize(
    "arguments", [{"strategy": RandomSearch}, {"strategy": None}, {"min_steps": 0}, {"min_trials": 0.5}]
)
def test_refuses(arguments):
    with pytest.raises(InvalidInputError):
        MedianStopping(**{"strategy": RandomSearch(), **arguments})


class Blind(nn.Module):
    """Sees nothing of the image, so it cannot learn."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 10)

    def forward(self, x):
        return self.head(x.flatten(1)[:, :1] * 0)


def build(genes):
    return Blind() if genes["sees"] == "no" else nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


def study(folder):
    return Study(
        space=space_from(build, {"sees": ("a", "b", "c", "no")}),
        strategy=MedianStopping(RandomSearch(), min_steps=2, min_trials=2),
        task=Task.digits(epochs=5, limit=200),
        objectives=[maximise("val_accuracy")],
        folder=folder,
        tracker=None,
        progress=False,
    )


def test_in_a_study_a_bad_candidate_is_stopped_and_a_resume_repeats_it(tmp_path):
    made = study(tmp_path / "whole")
    for sees in ("a", "b", "no", "c"):
        made.enqueue(made.space.architecture({"sees": sees}))
    trials = made.run(max_trials=4).history.trials
    assert [trial.state for trial in trials] == ["complete", "complete", "stopped", "complete"]
    bad = trials[2]
    assert len(bad.reports) == 2
    assert bad.metrics["val_accuracy"] == bad.reports[-1]["val_accuracy"]
    assert "ended early" in bad.reason
    assert len(trials[3].reports) == 5

    # Killed between the report that ends it and its end: the resume trains it again, and ends it there again.
    folder = tmp_path / "killed"
    folder.mkdir()
    lines = (tmp_path / "whole" / "history.jsonl").read_text().splitlines(keepends=True)
    events = [json.loads(line) for line in lines]
    end = next(i for i, event in enumerate(events) if event["event"] == "finish" and event["trial"] == 2)
    assert events[end - 1]["event"] == "report"
    (folder / "history.jsonl").write_text("".join(lines[:end]))
    again = study(folder).run(max_trials=4).history.trials
    assert [trial.state for trial in again] == [trial.state for trial in trials]
    assert [trial.reports for trial in again] == [trial.reports for trial in trials]
    assert replace(again[2], facts={}, metrics={}, started=0.0, finished=None) == replace(
        bad, facts={}, metrics={}, started=0.0, finished=None
    )

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import nasplat
from nasplat import Study, Task, at_most, maximise, minimise
from nasplat.errors import InvalidInputError
from nasplat.search import Assignment
from nasplat.strategy import Evaluate, Explore, History, Report, Trial
from nasplat.testing.drive import drive, trial_rng
from nasplat.testing.landscapes import Landscape, Levels, TinyCell, one_max, one_max_edges, tiny, trade_off
from nasplat.testing.strategy_contract import StrategyContract
from nasplat.worker import Worker
from strategies import BatsSearch, Darts, DrNas, OneShot, PcDarts, RandomSearch, RegularizedEvolution
from strategies.uniform_paths import UniformPaths


@dataclass(frozen=True)
class Guess:
    count: int = 3

    def explore(self, space, task, rng, context):
        yield Report(1, {})
        return [space.sample(rng) for _ in range(self.count)]


class TestOneShotContract(StrategyContract):
    random = False

    @pytest.fixture
    def strategy(self):
        return OneShot(Guess())


class TestSearchedOneShotContract(StrategyContract):
    @pytest.fixture
    def strategy(self):
        return OneShot(Guess(1), search=RegularizedEvolution(8, sample=3), n_search=30, n_retrain=4)


def guess(explorer, space, rng):
    return [space.sample(rng) for _ in range(explorer.count)]


def test_explores_then_trains_each_find_in_full_then_ends():
    run = drive(OneShot(Guess(3)), one_max(), 50, find=guess, in_flight=4)
    first, *rest = run.history.trials
    assert first.proposal == Explore(Guess(3))
    assert [trial.proposal for trial in rest] == [Evaluate(architecture) for architecture in first.found]
    assert run.asked[-1][2] is None


def test_waits_while_the_exploration_runs():
    history = one_max().history()
    found = history.space.sample(trial_rng(0, 0))
    history.start(Trial(0, Explore(Guess())))
    assert OneShot(Guess()).propose(history, trial_rng(0, 1)) is None
    history.finish(0, state="complete", found=(found,))
    assert OneShot(Guess()).propose(history, trial_rng(0, 1)) == Evaluate(found)


def test_ends_when_the_exploration_failed():
    run = drive(OneShot(Guess()), one_max(), 50, fails=lambda number: number == 0)
    assert len(run.history) == 1


def test_the_same_find_is_trained_once():
    run = drive(OneShot(Guess()), one_max(), 50, find=lambda explorer, space, rng: [space.sample(rng)] * 3)
    assert len(run.history) == 2


@pytest.mark.parametrize("explorer", [None, "darts", Darts])
def test_needs_an_explorer(explorer):
    with pytest.raises(InvalidInputError, match="explore"):
        OneShot(explorer)


# Searching the paths.

SEARCHED = OneShot(Guess(1), search=RegularizedEvolution(6, sample=3), n_search=20, n_retrain=3, recalibrate=7)


def stages(run):
    """The trials of the inner search, and those after it."""
    inherited = [t for t in run.history.trials if t.architecture is not None and not t.full]
    return inherited, [t for t in run.history.trials if t.full]


@pytest.mark.parametrize("in_flight", [1, 4])
def test_searches_inherited_weights_and_trains_the_best(in_flight):
    run = drive(SEARCHED, one_max(), 100, find=guess, in_flight=in_flight)
    inherited, retrained = stages(run)
    assert run.history.trials[0].proposal == Explore(Guess(1))
    assert len(inherited) == 20 and len(retrained) == 3 and len(run.history) == 24
    for trial in inherited:
        assert (trial.proposal.budget, trial.proposal.weights_of, trial.proposal.recalibrate) == (0.0, 0, 7)
    # From scratch, with nothing of the supernet, best first.
    ranked = sorted(inherited, key=lambda trial: (run.history.losses(trial), trial.number))
    assert [t.proposal for t in retrained] == [Evaluate(trial.architecture) for trial in ranked[:3]]
    assert min(t.number for t in retrained) > max(t.number for t in inherited)


def test_the_inner_strategy_is_used_unchanged():
    """One at a time, it proposes what it would have proposed alone, given the same generators and scores."""
    run = drive(SEARCHED, one_max(), 21, find=guess)
    history = one_max().history()
    for trial in stages(run)[0]:
        proposal = SEARCHED.search.propose(history, trial_rng(0, trial.number))
        assert proposal.architecture == trial.architecture
        history.start(Trial(len(history), proposal))
        history.finish(len(history) - 1, state="complete", metrics=trial.metrics)


def test_waits_for_the_last_inherited_score_before_it_trains():
    space = Levels(3, 3)
    strategy = OneShot(Guess(), search=RandomSearch(), n_search=2, n_retrain=1)
    history = History(space, [maximise("value")])
    history.start(Trial(0, strategy.propose(history, trial_rng(0, 0))))
    history.finish(0, state="complete", found=(space.sample(trial_rng(9, 9)),))
    for number in (1, 2):
        history.start(Trial(number, strategy.propose(history, trial_rng(0, number))))
    history.finish(1, state="complete", metrics={"value": 0.1})
    assert strategy.propose(history, trial_rng(0, 3)) is None
    history.finish(2, state="complete", metrics={"value": 0.2})
    assert strategy.propose(history, trial_rng(0, 3)) == Evaluate(history.trials[2].architecture)


def test_an_exhausted_space_ends_the_search_and_still_trains():
    run = drive(OneShot(Guess(), search=RandomSearch(), n_search=500), tiny(), 600, find=guess, in_flight=3)
    inherited, retrained = stages(run)
    assert len(inherited) == 16 and len(retrained) == 3
    assert run.history.best().metrics["value"] == 1.0


@dataclass(frozen=True)
class InTurn:
    """All architectures of a space, in order."""

    def propose(self, history, rng):
        for index, architecture in enumerate(history.space.enumerate()):
            if index == len(history):
                return Evaluate(architecture)
        return None


def chosen(objectives, metrics, n_retrain, constraints=(), cheap=()):
    """Values of the one choice that are retrained, in order, where value x has ``metrics[x]``."""
    landscape = Landscape(
        Levels(1, len(metrics)), lambda a: metrics[a.genes["x0"]], tuple(objectives), tuple(constraints)
    )
    strategy = OneShot(Guess(), search=InTurn(), n_search=len(metrics), n_retrain=n_retrain)
    run = drive(strategy, landscape, 100, find=guess, cheap=cheap)
    return [t.architecture.genes["x0"] for t in stages(run)[1]]


def test_with_several_objectives_the_front_comes_first_and_its_loneliest_members():
    a, b = maximise("a"), minimise("b")
    points = [(1, 1), (2, 2), (2.1, 2.1), (5, 4), (0.5, 1.5), (6, 6)]
    metrics = [{"a": float(x), "b": float(y)} for x, y in points]
    # Dominated: (0.5, 1.5) by (1, 1). Ends of the front 0 and 5, of which 5 has the better first objective. Then by
    # room: 3 has (6 - 2.1) / 5 + (6 - 2.1) / 5, 2 has (5 - 2) / 5 + (4 - 2) / 5, 1 has 1.1 / 5 + 1.1 / 5.
    assert chosen([a, b], metrics, 6) == [5, 0, 3, 2, 1, 4]


def test_limits_come_before_objectives():
    metrics = [{"a": 5.0, "c": 3.0}, {"a": 4.0, "c": 1.0}, {"a": 3.0, "c": 0.5}, {"a": 9.0, "c": 2.0}]
    assert chosen([maximise("a")], metrics, 3, [at_most("c", 1.0)]) == [1, 2, 3]


def test_candidates_refused_for_a_cheap_cost_do_not_count():
    strategy = OneShot(Guess(), search=RandomSearch(), n_search=10, n_retrain=2)
    run = drive(strategy, trade_off(limit=0.4), 200, find=guess, cheap=("cost",))
    inherited, retrained = stages(run)
    assert sum(t.state == "infeasible" for t in inherited) > 0
    assert sum(t.state == "complete" for t in inherited) == 10 and len(retrained) == 2
    nothing = drive(strategy, trade_off(limit=-1.0), 1000, find=guess, cheap=("cost",))
    # Then what the explorer found, though it will be refused too.
    assert len(nothing.history) == 1 + 10 * 10 + 100 + len(nothing.history.trials[0].found)


def test_failed_paths_are_not_trained():
    run = drive(SEARCHED, one_max_edges(), 100, find=guess, fails=lambda number: number % 2 == 0 and number > 0)
    inherited, retrained = stages(run)
    assert len(retrained) == 3
    complete = {t.architecture for t in inherited if t.state == "complete"}
    assert all(t.architecture in complete for t in retrained)


@pytest.mark.parametrize(
    "wrong",
    [{"n_search": 0}, {"n_search": 1.0}, {"n_retrain": 0}, {"recalibrate": -1}, {"search": RandomSearch},
     {"search": "evolution"}],
)  # fmt: skip
def test_wrong_values_are_refused(wrong):
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        OneShot(Guess(), **{"search": RandomSearch(), **wrong})


# In a study, with a real supernet.

REAL = OneShot(
    UniformPaths(epochs=3, batch_size=32, candidates=2, recalibrate=2),
    search=RegularizedEvolution(4, sample=2), n_search=8, n_retrain=2, recalibrate=3,
)  # fmt: skip


def study(folder, **kwargs):
    values: dict[str, Any] = {
        "objectives": [maximise("val_accuracy"), minimise("params")], "seed": 3, "tracker": None, "progress": False,
    }  # fmt: skip
    return Study(TinyCell(), REAL, Task.digits(epochs=2, limit=200), folder=folder, **{**values, **kwargs})


def untimed(table):
    return table[[name for name in table.columns if "seconds" not in name]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return study(tmp_path_factory.mktemp("whole") / "study").run(max_trials=30)


def test_end_to_end_on_digits(whole):
    table = whole.table()
    assert table.state.tolist() == ["complete"] * 11, table.reason.tolist()
    assert table.kind.tolist() == ["explore"] + ["evaluate"] * 10
    assert table.budget.tolist()[1:] == [0.0] * 8 + [1.0] * 2
    assert set(whole.front().index) <= {9, 10} and whole.best.trial.number in (9, 10)
    kept = {int(path.parent.name) for path in whole.folder.glob("trials/*/weights.safetensors")}
    assert kept == {0} | set(whole.front().index)  # the supernet's, and no path's
    parameters = {t.architecture: t.metrics["params"] for t in whole.trials[1:9]}
    assert all(parameters[t.architecture] == t.metrics["params"] for t in whole.trials[9:])


@pytest.mark.parametrize("trials", [1, 4, 9, 10])
def test_interrupted_and_resumed_is_uninterrupted(whole, trials, tmp_path):
    study(tmp_path / "study").run(max_trials=trials)
    result = study(tmp_path / "study").run(max_trials=30)
    nasplat_table = untimed(nasplat.load(tmp_path / "study", space=TinyCell()).table())
    np.testing.assert_array_equal(untimed(result.table()).to_numpy(str), untimed(whole.table()).to_numpy(str))
    np.testing.assert_array_equal(nasplat_table.to_numpy(str), untimed(whole.table()).to_numpy(str))


@pytest.mark.parametrize("events", [2, 3, 5, 9, 15])
def test_killed_at_any_event_and_resumed_is_uninterrupted(whole, events, tmp_path, monkeypatch):
    import nasplat.journal

    original, count = nasplat.journal.Journal.append, [0]

    def append(self, event, **kwargs):
        count[0] += "at" in event
        if count[0] == events:
            count[0] += 1000
            raise KeyboardInterrupt
        original(self, event, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nasplat.journal.Journal, "append", append)
        study(tmp_path / "study").run(max_trials=30)
    result = study(tmp_path / "study").run(max_trials=30)
    np.testing.assert_array_equal(untimed(result.table()).to_numpy(str), untimed(whole.table()).to_numpy(str))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Starting Ray")
def test_two_at_a_time_on_ray(tmp_path):
    result = study(tmp_path / "study").run(max_trials=30, workers=2)
    assert [trial.state for trial in result.trials] == ["complete"] * 11, result.table().reason.tolist()
    assert [trial.full for trial in result.trials[1:]] == [False] * 8 + [True] * 2
    # A path's score depends on its seed and its architecture, not on the process that it was scored in.
    local = Worker(TinyCell(), result.task, result.folder)
    for trial in result.trials[1:9]:
        seed = int(np.random.SeedSequence([3, trial.number, 1]).generate_state(1)[0])
        *_, outcome = local.run(Assignment(trial.number, trial.proposal, seed))
        assert outcome.metrics["val_loss"] == trial.metrics["val_loss"]


@pytest.mark.parametrize("explorer", [PcDarts(), BatsSearch(), DrNas()])
def test_paths_of_a_part_of_a_supernet_are_refused_beforehand(explorer):
    OneShot(explorer)
    with pytest.raises(InvalidInputError, match="search=None"):
        OneShot(explorer, search=RandomSearch())


def test_where_no_path_can_be_scored_what_was_found_is_trained():
    strategy = OneShot(Guess(2), search=RandomSearch(), n_search=5)
    run = drive(strategy, one_max(), 50, find=guess, fails=lambda number: 1 <= number <= 5)
    assert [t.architecture for t in run.history.trials[6:]] == list(run.history.trials[0].found)
    assert run.history.best() is not None

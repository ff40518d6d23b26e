from dataclasses import dataclass, replace

import pytest

from nasplat.errors import InvalidInputError
from nasplat.objectives import maximise, minimise
from nasplat.strategy import Evaluate, History, Trial
from nasplat.testing.drive import drive, trial_rng
from nasplat.testing.landscapes import Landscape, Levels, one_max, trade_off
from nasplat.testing.strategy_contract import StrategyContract
from strategies.local_search import LocalSearch


class TestLocalSearchContract(StrategyContract):
    evaluations = 40

    @pytest.fixture
    def strategy(self):
        return LocalSearch(initial=3)


class TestBestMoveContract(StrategyContract):
    trials = 25
    evaluations = 200

    @pytest.fixture
    def strategy(self):
        return LocalSearch(initial=3, move="best")

    @pytest.mark.slow
    @pytest.mark.parametrize("known", ["separable", "groups"])
    def test_beats_random_search(self, strategy, known):
        """Whole neighbourhoods take their time."""
        super().test_beats_random_search(strategy, known)


@dataclass(frozen=True)
class Levels2(Levels):
    """Two choices of seven levels, whose neighbours are all changes of one choice."""

    length: int = 2
    levels: int = 7


def line(values):
    """One choice of as many levels as there are values, which are looked up; every level is every other's neighbour."""
    return Landscape(Levels(1, len(values)), lambda a: {"value": values[a.genes["x0"]]})


def levels(trial):
    return tuple(trial.architecture.genes.values())


def of_walk(run, walk):
    return [trial for trial in run.history.trials if trial.proposal.notes["walk"] == walk]


def test_a_walk_is_random_starts_then_new_neighbours_of_the_best_so_far():
    run = drive(LocalSearch(initial=5), one_max(), 60)
    best = None
    for trial in of_walk(run, 0):
        notes = trial.proposal.notes
        if trial.number < 5:
            assert notes == {"walk": 0}
        else:
            assert notes["centre"] == best.number
            assert trial.architecture in run.history.space.neighbours(best.architecture)
        if best is None or trial.metrics["value"] > best.metrics["value"]:
            best = trial
    assert run.history.distinct == 60


def test_the_best_move_evaluates_the_whole_neighbourhood_first():
    run = drive(LocalSearch(initial=2, move="best"), one_max(length=4), 60)
    trials = of_walk(run, 0)
    centres = list(dict.fromkeys(t.proposal.notes["centre"] for t in trials if "centre" in t.proposal.notes))
    assert len(centres) >= 2
    for number, following in zip(centres, [*centres[1:], None], strict=True):
        centre = run.history.trials[number]
        near = [run.history.of(architecture)[0] for architecture in run.history.space.neighbours(centre.architecture)]
        assert len(near) == 12
        top = max(near, key=lambda trial: trial.metrics["value"])
        if following is None:
            assert top.metrics["value"] <= centre.metrics["value"]
        else:
            assert run.history.trials[following].metrics["value"] == top.metrics["value"]


@pytest.mark.parametrize("move", ["first", "best"])
def test_restarts_at_a_local_optimum(move):
    # Two coordinates: (1, 1) is best among its row and column, and so is (5, 5), the highest.
    height = {(1, 1): 0.5, (5, 5): 1.0}

    def score(architecture):
        x, y = architecture.genes.values()
        return {"value": max(h - 0.1 * (abs(x - a) + abs(y - b)) for (a, b), h in height.items())}

    run = drive(LocalSearch(initial=1, move=move), Landscape(Levels2(), score), 49)
    walks = {trial.proposal.notes["walk"] for trial in run.history.trials}
    assert len(walks) > 1
    for walk in walks - {max(walks)}:
        trials = of_walk(run, walk)
        top = max(trials, key=lambda trial: trial.metrics["value"])
        near = run.history.space.neighbours(top.architecture)
        before = max(trial.number for trial in trials)
        # The whole neighbourhood was known when the walk ended, and nothing in it that the walk saw was better.
        assert all(run.history.of(a) and run.history.of(a)[0].number <= before for a in near)
    assert len(run.history) == 49 and run.history.best().metrics["value"] == 1.0


def test_a_plateau_ends_a_walk():
    flat = Landscape(Levels(3, 3), lambda architecture: {"value": 1.0})
    run = drive(LocalSearch(initial=1), flat, 8)
    # One start with its six neighbours, none of which is better; then another start.
    assert [trial.proposal.notes for trial in run.history.trials] == [
        {"walk": 0},
        *[{"walk": 0, "centre": 0}] * 6,
        {"walk": 1},
    ]


def test_a_walk_goes_on_over_what_an_earlier_one_evaluated():
    history = History(Levels(2, 3), [maximise("value")])
    worth = {(0, 0): 0.1, (0, 1): 0.5, (0, 2): 0.0, (1, 0): 0.0, (2, 0): 0.0}
    # The first walk knew (0, 1) as a start of its own. The second begins at (0, 0), all of whose neighbours are known.
    for number, (genes, walk) in enumerate({(0, 1): 0, (0, 2): 0, (1, 0): 0, (2, 0): 0, (0, 0): 1}.items()):
        history.start(
            Trial(
                number,
                Evaluate(history.space.architecture(dict(zip(("x0", "x1"), genes, strict=True))), notes={"walk": walk}),
            )
        )
        history.finish(number, state="complete", metrics={"value": worth[genes]})
    proposal = LocalSearch(initial=1)._step(history, [history.trials[4]], 1, trial_rng(0, 5))
    assert proposal.notes == {"walk": 1, "centre": 0}
    assert proposal.architecture.genes["x1"] == 1


def test_climbs_to_the_limits_first():
    landscape = replace(trade_off(length=12, limit=0.15), objectives=(maximise("value"),))
    run = drive(LocalSearch(initial=3), landscape, 80, cheap=("cost",))
    violations = [run.history.violation(trial) for trial in run.history.trials]
    assert min(violations[:3]) > 0 == min(violations)
    for trial in run.history.trials[3:]:
        if "centre" in trial.proposal.notes:
            centre = run.history.trials[trial.proposal.notes["centre"]]
            walk = [t for t in of_walk(run, trial.proposal.notes["walk"]) if t.number < trial.number]
            assert run.history.violation(centre) == min(run.history.violation(t) for t in walk)


def test_pareto_local_search_evaluates_the_neighbours_of_each_undominated_trial():
    landscape = Landscape(
        Levels(2, 4),
        lambda a: {"value": sum(a.genes.values()), "cost": a.genes["x0"] ** 2 + 2 * a.genes["x1"]},
        (maximise("value"), minimise("cost")),
    )
    run = drive(LocalSearch(initial=1), landscape, 16)
    values = {levels(trial): run.history.losses(trial) for trial in run.history.trials}
    assert len(values) == 16  # the front is connected, so one walk or the next finds everything
    centres = {trial.proposal.notes["centre"] for trial in run.history.trials if "centre" in trial.proposal.notes}
    assert len(centres) > 2
    for trial in run.history.trials:
        if "centre" in trial.proposal.notes:
            centre = run.history.trials[trial.proposal.notes["centre"]]
            seen = [t for t in of_walk(run, trial.proposal.notes["walk"]) if t.number < trial.number]
            assert not any(
                all(a <= b for a, b in zip(run.history.losses(t), run.history.losses(centre), strict=True))
                and run.history.losses(t) != run.history.losses(centre)
                for t in seen
            )


def test_free_workers_draw_the_next_start_and_then_wait():
    run = drive(LocalSearch(initial=2, move="best"), line([0.0, 0.1, 0.2, 0.3]), 4, in_flight=4)
    assert [trial.proposal.notes["walk"] for trial in run.history.trials] == [0, 0, 1, 1]
    history = History(Levels(4, 4), [maximise("value")])
    for number in range(4):
        history.start(Trial(number, LocalSearch(initial=2).propose(history, trial_rng(0, number))))
    assert LocalSearch(initial=2).propose(history, trial_rng(0, 4)) is None


def test_failed_starts_are_replaced():
    run = drive(LocalSearch(initial=3), one_max(), 10, fails=lambda number: number < 4)
    assert [("centre" in trial.proposal.notes) for trial in run.history.trials] == [False] * 7 + [True] * 3


def test_enqueued_architectures_are_starts():
    landscape = one_max()
    history = landscape.history()
    best = history.space.architecture({f"x{i}": (7 * i + 2) % 4 for i in range(10)})
    history.start(Trial(0, Evaluate(best, notes={"enqueued": True})))
    history.finish(0, state="complete", metrics=dict(landscape.score(best)))
    assert LocalSearch(initial=1).propose(history, trial_rng(0, 1)).notes == {"walk": 0, "centre": 0}


@pytest.mark.parametrize("arguments", [{"initial": 0}, {"initial": 1.5}, {"move": "worst"}])
def test_refuses(arguments):
    with pytest.raises(InvalidInputError):
        LocalSearch(**arguments)

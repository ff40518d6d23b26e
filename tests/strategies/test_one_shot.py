from dataclasses import dataclass

import pytest

from nasplat.errors import InvalidInputError
from nasplat.strategy import Evaluate, Explore, Report, Trial
from nasplat.testing.drive import drive, trial_rng
from nasplat.testing.landscapes import one_max
from nasplat.testing.strategy_contract import StrategyContract
from strategies import Darts, OneShot


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

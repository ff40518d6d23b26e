import gc
import weakref
from dataclasses import dataclass

import numpy as np
import pytest

from nasplat import nested
from nasplat.errors import InvalidInputError
from nasplat.objectives import minimise
from nasplat.strategy import Evaluate, Explore, Trial
from nasplat.testing.drive import drive, replay, trial_rng
from nasplat.testing.landscapes import one_max, tiny, trade_off
from nasplat.testing.strategy_contract import StrategyContract
from strategies import OptunaSearch, RandomSearch, RegularizedEvolution


@dataclass(frozen=True)
class Alternating:
    """Every other trial is one of the inner strategy's, at half the budget; the others are random search."""

    inner: object

    def propose(self, history, rng):
        if len(history) % 2 == 0:
            proposal = nested.propose(self.inner, history, rng, "odd one", budget=0.5, notes={"mine": 1})
            if proposal is not None and not history.of(proposal.architecture):
                return proposal
        architecture = history.draw_new(rng)
        return None if architecture is None else Evaluate(architecture)


class TestContract(StrategyContract):
    """A strategy that nests another is as pure, resumable and valid as the inner one."""

    trials = 24
    beats_random = False

    @pytest.fixture
    def strategy(self):
        return Alternating(RegularizedEvolution(population=4, sample=2))


def shown(history):
    return [(t.architecture, t.state, dict(t.metrics), dict(t.proposal.notes)) for t in history.trials]


def test_the_inner_strategy_sees_full_evaluations_of_its_own_numbered_from_0():
    run = drive(Alternating(RandomSearch()), one_max(), 20, in_flight=3, fails=lambda number: number == 4)
    inner = nested.nested(run.history, "odd one")
    outer = [trial for trial in run.history.trials if trial.proposal.notes.get("by") == "odd one"]
    assert [trial.number for trial in inner.trials] == list(range(10))
    assert [trial.architecture for trial in inner.trials] == [trial.architecture for trial in outer]
    assert [trial.state for trial in inner.trials] == [trial.state for trial in outer]
    assert {trial.state for trial in inner.trials} == {"complete", "failed"}
    assert all(trial.full and not outer[trial.number].full for trial in inner.trials)
    assert inner.best() is not None and run.history.best().proposal.budget == 1.0
    assert all(trial.proposal.notes["mine"] == 1 for trial in outer)
    assert not any("mine" in trial.proposal.notes for trial in inner.trials)


def test_trials_keep_the_order_of_ending():
    run = drive(Alternating(RandomSearch()), one_max(), 40, in_flight=8)
    inner = nested.nested(run.history, "odd one")
    ended = [t.architecture for t in run.history.finished() if t.proposal.notes.get("by") == "odd one"]
    assert [trial.architecture for trial in inner.finished()] == ended
    assert ended != [trial.architecture for trial in inner.trials]


def test_following_step_by_step_shows_what_a_fresh_look_shows():
    run = drive(Alternating(RegularizedEvolution(population=4)), one_max(), 30, in_flight=4)
    followed = replay(one_max(), [])
    for event in run.events:
        kind, what, outcome = event
        if kind == "start":
            followed.history.start(what)
        else:
            followed.history.finish(what, **outcome)
        inner = nested.nested(followed.history, "odd one")
        assert len(inner.running) == sum("by" in t.proposal.notes for t in followed.history.running)
    fresh = nested.nested(replay(one_max(), run.events).history, "odd one")
    assert shown(inner) == shown(fresh)
    assert [t.number for t in inner.finished()] == [t.number for t in fresh.finished()]
    assert nested.nested(followed.history, "odd one") is inner


def test_the_inner_notes_come_back_to_the_inner_strategy_alone():
    run = drive(Alternating(OptunaSearch("nsga2", {"population_size": 3})), one_max(), 20)
    inner = nested.nested(run.history, "odd one")
    generations = [trial.proposal.notes["optuna"]["NSGAIISampler:generation"] for trial in inner.trials]
    assert generations == sorted(generations) and generations[-1] >= 2
    # The same trials, known by another name: notes of another search are none of its own.
    other = nested.nested(run.history, "all", belongs=lambda trial: True)
    assert len(other) == 20
    assert not any(trial.proposal.notes for trial in other.trials)


def test_other_objectives():
    run = drive(Alternating(RandomSearch()), trade_off(limit=None), 20)
    inner = nested.nested(run.history, "cheapest", objectives=[minimise("cost")], belongs=lambda trial: True)
    assert inner.best().metrics["cost"] == min(trial.metrics["cost"] for trial in run.history.trials)
    # Asked for something else by the same name: a search of its own.
    again = nested.nested(run.history, "cheapest", belongs=lambda trial: True)
    assert again is not inner and again.objectives == run.history.objectives


def test_copies_of_trials_that_are_not_shown_count_as_evaluations():
    history = tiny().history()
    architecture = history.space.sample(trial_rng(0, 0))
    history.start(Trial(0, Evaluate(architecture)))
    history.finish(0, state="complete", metrics={"value": 0.5})
    for number in (1, 2):
        history.start(Trial(number, Evaluate(architecture, notes={"by": "it"})))
        history.finish(number, state="complete", metrics={"value": 0.5}, copy_of=number - 1)
    assert [trial.copy_of for trial in nested.nested(history, "it").trials] == [None, 0]


def test_further_fields_go_into_the_proposal():
    history = one_max().history()
    history.start(Trial(0, Explore(None)))
    proposal = nested.propose(
        RandomSearch(), history, trial_rng(0, 1), "paths", budget=0.0, weights_of=0, recalibrate=3
    )
    assert (proposal.budget, proposal.weights_of, proposal.recalibrate) == (0.0, 0, 3)
    assert proposal.notes == {"by": "paths"}


def test_an_inner_strategy_that_has_nothing_more_says_none():
    history = drive(RandomSearch(), tiny(), 16).history
    assert nested.propose(RandomSearch(), history, trial_rng(0, 16), "all", belongs=lambda trial: True) is None


def test_an_inner_exploration_is_refused():
    @dataclass(frozen=True)
    class Explores:
        def propose(self, history, rng):
            return Explore(None)

    with pytest.raises(InvalidInputError, match="must evaluate"):
        nested.propose(Explores(), one_max().history(), np.random.default_rng(0), "x")


def test_histories_are_let_go():
    run = drive(Alternating(OptunaSearch("tpe")), one_max(), 6)
    inner, outer = weakref.ref(nested.nested(run.history, "odd one")), weakref.ref(run.history)
    del run
    gc.collect()
    assert inner() is None and outer() is None


@dataclass(frozen=True)
class Partial:
    """Proposes a share of the training, or to go on."""

    budget: float = 1.0
    weights_of: int | None = None

    def propose(self, history, rng):
        return Evaluate(history.space.sample(rng), self.budget, self.weights_of)


@pytest.mark.parametrize("inner", [Partial(budget=0.5), Partial(weights_of=0)])
def test_an_inner_strategy_that_decides_on_the_training_is_refused(inner):
    history = drive(RandomSearch(), one_max(), 3).history
    with pytest.raises(InvalidInputError, match="outermost"):
        nested.propose(inner, history, trial_rng(0, 3), "inner")


@dataclass(frozen=True)
class Keeping(RandomSearch):
    def keep(self, trial, history):
        return True


@pytest.mark.parametrize("inner", [Keeping(), RandomSearch, None])
def test_what_cannot_be_inside_is_refused(inner):
    nested.check_inner("search", RandomSearch())
    with pytest.raises(InvalidInputError, match="search is"):
        nested.check_inner("search", inner)

from dataclasses import dataclass, replace

import numpy as np
import pytest

from nasplat import Study, Task, maximise, minimise
from nasplat.errors import InvalidInputError, UnknownMetricError
from nasplat.identity import canonical, describe, restore, type_name
from nasplat.objectives import Objective
from nasplat.strategy import Evaluate, Explore, Trial
from nasplat.testing.drive import drive, replay, trial_rng
from nasplat.testing.landscapes import Levels, one_max, tiny, trade_off
from nasplat.testing.strategy_contract import StrategyContract
from strategies import OptunaSearch, RandomSearch, RegularizedEvolution
from strategies.filtered import Filtered
from tests.helpers import Conv

VALUE = maximise("value")


class TestFilteredContract(StrategyContract):
    @pytest.fixture
    def strategy(self):
        return Filtered(RegularizedEvolution(population=6, sample=3), VALUE, share=0.5)


def test_strategies_with_notes_of_their_own_resume_inside():
    strategy = Filtered(OptunaSearch(sampler="tpe"), VALUE, share=0.3)
    whole = drive(strategy, one_max(), 24, in_flight=2)
    resumed = replay(one_max(), whole.events[: len(whole.events) // 2])
    assert drive(strategy, one_max(), 24, in_flight=2, run=resumed).proposals == whole.proposals


def scored_before(noise=0.0):
    """A landscape that shows a score at budget 0, and the value and nothing else after training."""

    def short(architecture, budget):
        assert budget == 0.0
        drawn = np.random.default_rng(int(architecture.id, 16)).standard_normal()
        return {"score": landscape.score(architecture)["value"] + noise * float(drawn)}

    landscape = one_max()
    return replace(landscape, short=short)


def split(run):
    scored = [trial for trial in run.history.trials if trial.proposal.budget == 0]
    return scored, [trial for trial in run.history.trials if trial.proposal.budget == 1]


@dataclass(frozen=True)
class Listed:
    """Proposes what it is told, in order; what it saw last is kept for the test."""

    levels: tuple = ()
    budgets: tuple = ()
    sources: tuple = ()

    def propose(self, history, rng):
        SEEN[:] = history.trials
        number = len(history)
        if number == len(self.levels):
            return None
        architecture = history.space.architecture({"x0": self.levels[number], "x1": 0})
        budget = self.budgets[number] if self.budgets else 1.0
        return Evaluate(architecture, budget, self.sources[number] if self.sources else None, {"mine": number})


SEEN: list[Trial] = []


def by_level(scores):
    """The score of an architecture is looked up by its first level."""
    landscape = tiny()
    return replace(
        landscape,
        score=lambda architecture: {"value": 10.0 + architecture.genes["x0"]},
        short=lambda architecture, budget: (
            {"score": scores[architecture.genes["x0"]]} if budget == 0 else {"value": 1.0}
        ),
    )


def test_trains_those_in_the_top_share_of_the_scores_so_far():
    # Ranks when scored: 1st of 1, 2nd of 2, 1st of 3, 4th of 4. Of the better half: fewer than n / 2 are better.
    run = drive(Filtered(Listed((0, 1, 2, 3)), maximise("score"), share=0.5), by_level([2.0, 1.0, 3.0, 0.5]), 50)
    assert [(t.architecture.genes["x0"], t.proposal.budget) for t in run.history.trials] == [
        (0, 0.0), (0, 1.0), (1, 0.0), (2, 0.0), (2, 1.0), (3, 0.0),
    ]  # fmt: skip
    run = drive(Filtered(Listed((0, 1, 2, 3)), minimise("score"), share=0.5), by_level([2.0, 1.0, 3.0, 0.5]), 50)
    assert [t.architecture.genes["x0"] for t in split(run)[1]] == [0, 1, 3]
    run = drive(Filtered(Listed((0, 1, 2, 3)), maximise("score"), share=1.0), by_level([2.0, 1.0, 3.0, 0.5]), 50)
    assert len(split(run)[1]) == 4


def test_equal_scores_all_pass():
    run = drive(Filtered(RandomSearch(), maximise("score"), share=0.1), by_level([1.0] * 4), 60)
    assert len(split(run)[0]) == len(split(run)[1]) == 16


@pytest.mark.parametrize("in_flight", [1, 4])
def test_the_share_is_kept_in_the_long_run(in_flight):
    run = drive(Filtered(RandomSearch(), maximise("score"), share=0.25), scored_before(), 400, in_flight=in_flight)
    scored, trained = split(run)
    assert 0.2 < len(trained) / len(scored) < 0.35
    better = np.mean([t.metrics["value"] for t in trained]) - np.mean([t.metrics["score"] for t in scored])
    assert better > 0.05


def test_decisions_stand_in_the_order_of_ending():
    history = by_level([1.0, 2.0, 3.0, 0.0]).history()
    strategy = Filtered(Listed((0, 1, 2)), maximise("score"), share=0.5)
    for number in range(3):
        history.start(Trial(number, strategy.propose(history, trial_rng(0, number))))
    # The best ends first, so that no other is in the better half.
    for number in (2, 1, 0):
        history.finish(number, state="complete", metrics={"score": float(number)})
    proposal = strategy.propose(history, trial_rng(0, 3))
    assert proposal.architecture == history.trials[2].architecture and proposal.budget == 1.0
    history.start(Trial(3, proposal))
    assert strategy.propose(history, trial_rng(0, 4)) is None
    assert [trial.state for trial in SEEN] == ["failed", "failed", "running"]


def test_the_strategy_sees_one_trial_for_each_proposal():
    run = drive(Filtered(Listed((0, 1, 2)), maximise("score"), share=0.5), by_level([2.0, 1.0, 3.0]), 50)
    assert run.asked[-1][2] is None
    assert [(t.number, t.state, dict(t.proposal.notes), t.proposal.budget) for t in SEEN] == [
        (0, "complete", {"mine": 0}, 1.0),
        (1, "failed", {"mine": 1}, 1.0),
        (2, "complete", {"mine": 2}, 1.0),
    ]
    assert SEEN[0].metrics == {"value": 10.0} and SEEN[1].metrics == {"score": 1.0}
    assert SEEN[1].reason == "1 of 2 scores are better: score is 1"


def test_a_failed_training_is_a_failed_trial_of_the_strategy():
    run = drive(Filtered(Listed((0, 1)), maximise("score")), by_level([1.0, 2.0]), 50, fails=lambda number: number == 1)
    assert [trial.state for trial in SEEN] == ["failed", "complete"]
    assert run.history.best().architecture.genes["x0"] == 1


def test_limits_on_cheap_costs_reach_the_strategy():
    run = drive(Filtered(RandomSearch(), VALUE), trade_off(limit=0.4), 60, cheap=("cost",))
    scored, trained = split(run)
    assert any(trial.state == "infeasible" for trial in scored)
    assert trained and all(trial.state == "complete" for trial in trained)


def test_budgets_and_weights_are_the_strategys_own():
    """Levels 0 and 1 for a tenth, then the first goes on to the end: that is not scored again."""
    strategy = Filtered(Listed((0, 1, 0), (0.1, 0.1, 1.0), (None, 0, 0)), maximise("score"), share=1.0)
    run = drive(strategy, by_level([1.0, 1.0]), 50)
    proposals = [t.proposal for t in run.history.trials]
    assert [(p.budget, p.weights_of) for p in proposals] == [(0, None), (0.1, None), (0, None), (0.1, 1), (1.0, 1)]
    assert [(t.proposal.budget, t.proposal.weights_of) for t in SEEN] == [(0.1, None), (0.1, 0), (1.0, 0)]
    assert [t.state for t in SEEN] == ["complete"] * 3 and SEEN[2].metrics == {"value": 10.0}


def test_what_is_refused_is_not_proposed_again():
    run = drive(Filtered(RandomSearch(), maximise("score"), share=0.5), by_level([0.0, 1.0, 2.0, 3.0]), 300)
    scored, trained = split(run)
    assert len(scored) == 16 and len(trained) < 16
    assert run.asked[-1][2] is None


def test_helps_evolution_for_the_same_training():
    """With a tenth of the trials trained, the best of the trained beats a search with as many trainings."""
    wins = 0
    for seed in range(8):
        filtered = Filtered(RandomSearch(), maximise("score"), share=0.1)
        run = drive(filtered, scored_before(0.02), 150, seed=seed)
        trained = len(split(run)[1])
        assert trained < 40
        wins += run.best() < drive(RandomSearch(), one_max(), trained, seed=seed).best()
    assert wins >= 7


def test_a_score_that_only_training_gives_is_refused_by_name():
    with pytest.raises(InvalidInputError, match="value is not known before training; known are score"):
        drive(Filtered(RandomSearch(), VALUE), scored_before(), 10)


@pytest.mark.parametrize(
    "wrong",
    [{"strategy": RandomSearch}, {"strategy": None}, {"score": "synflow"}, {"share": 0.0}, {"share": float("nan")}],
)
def test_refuses(wrong):
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        Filtered(**{"strategy": RandomSearch(), "score": VALUE, **wrong})


def test_a_strategy_that_explores_is_refused():
    class Exploring:
        def propose(self, history, rng):
            return Explore(None)

    with pytest.raises(InvalidInputError, match="filter is for evaluations"):
        Filtered(Exploring(), VALUE).propose(one_max().history(), trial_rng(0, 0))


def test_two_filters_may_look_at_one_history():
    landscape = one_max()
    loose, strict = (Filtered(RandomSearch(), VALUE, share) for share in (1.0, 0.01))
    history = drive(loose, landscape, 21).history
    assert strict.propose(history, trial_rng(0, 21)) == Filtered(RandomSearch(), VALUE, 0.01).propose(
        history, trial_rng(0, 21)
    )


def test_its_description_makes_it_again():
    strategy = Filtered(RegularizedEvolution(population=7), minimise("ops"), 0.3)
    kinds = (Filtered, RegularizedEvolution, Objective)
    again = restore(describe(strategy), {type_name(kind): kind for kind in kinds})
    assert again == strategy and canonical(describe(again)) == canonical(describe(strategy))


def test_a_study_measures_the_score_by_itself(tmp_path):
    def study(score):
        return Study(
            space=Conv(),
            strategy=Filtered(RandomSearch(), score),
            task=Task.digits(epochs=1, limit=96),
            objectives=[maximise("val_accuracy")],
            folder=tmp_path / "study",
            tracker=None,
            progress=False,
        )

    trials = study(maximise("synflow")).run(max_trials=30).trials
    scored = [trial for trial in trials if trial.proposal.budget == 0]
    trained = [trial for trial in trials if trial.proposal.budget == 1]
    assert len(scored) == 6 and 1 <= len(trained) < 6
    assert all("synflow" in trial.metrics for trial in scored)
    assert all("val_accuracy" in trial.metrics for trial in trained)
    with pytest.raises(UnknownMetricError, match="'synflaw'"):
        study(maximise("synflaw"))


def test_needs_no_more_than_levels():
    assert len(drive(Filtered(RandomSearch(), VALUE), replace(tiny(), space=Levels(1, 2)), 10).history) >= 3

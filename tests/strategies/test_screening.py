import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import wilcoxon

from nasplat import Study, Task, at_least, at_most, maximise, minimise
from nasplat.errors import InvalidInputError, UnknownMetricError
from nasplat.identity import canonical, describe, restore, type_name
from nasplat.objectives import Objective
from nasplat.strategy import Evaluate, Trial
from nasplat.testing.drive import drive, replay, trial_rng
from nasplat.testing.landscapes import Landscape, Levels, one_max, trade_off
from nasplat.testing.strategy_contract import StrategyContract
from strategies import OneShot, OptunaSearch, RandomSearch, RegularizedEvolution
from strategies.screening import Screening
from tests.helpers import Conv

VALUE = maximise("value")


class TestScreeningContract(StrategyContract):
    @pytest.fixture
    def strategy(self):
        evolution = RegularizedEvolution(population=6, sample=3)
        return Screening(VALUE, evolution, n_search=20, n_train=5, then=evolution)


class TestNothingAfterwardsContract(StrategyContract):
    @pytest.fixture
    def strategy(self):
        return Screening([VALUE], RandomSearch(), n_search=30, n_train=3)


def test_strategies_with_notes_of_their_own_resume_inside():
    search, then = OptunaSearch(sampler="random"), OptunaSearch(sampler="tpe")
    strategy = Screening(VALUE, search, n_search=10, n_train=4, then=then)
    whole = drive(strategy, one_max(), 24, in_flight=2)
    resumed = replay(one_max(), whole.events[: len(whole.events) // 2])
    assert drive(strategy, one_max(), 24, in_flight=2, run=resumed).proposals == whole.proposals
    assert budgets(whole) == [0.0] * 10 + [1.0] * 14


def scored_before(noise=0.0, length=10):
    """A landscape that shows a score at budget 0, and the value and nothing else after training."""

    def short(architecture, budget):
        assert budget == 0.0
        value = landscape.score(architecture)["value"]
        drawn = np.random.default_rng(int(architecture.id, 16)).standard_normal()
        return {"score": value + noise * float(drawn), "ops": float(sum(architecture.genes.values()))}

    landscape = one_max(length)
    return replace(landscape, short=short)


def budgets(run):
    return [trial.proposal.budget for trial in run.history.trials]


def test_scores_then_trains_the_best_in_full_then_ends():
    strategy = Screening(maximise("score"), RandomSearch(), n_search=30, n_train=4)
    run = drive(strategy, scored_before(), 100)
    assert budgets(run) == [0.0] * 30 + [1.0] * 4
    scored, trained = run.history.trials[:30], run.history.trials[30:]
    best = sorted(scored, key=lambda trial: (-trial.metrics["score"], trial.number))[:4]
    assert [trial.architecture for trial in trained] == [trial.architecture for trial in best]
    assert all(trial.proposal.weights_of is None and trial.copy_of is None for trial in trained)
    assert run.asked[-1][2] is None
    assert run.history.best().number in range(30, 34)


def test_the_search_sees_the_score_as_its_objective():
    """Evolution at budget 0 climbs the score, though the study's objective is never measured there."""
    strategy = Screening(maximise("score"), RegularizedEvolution(population=20, sample=10), n_search=150, n_train=1)
    ours = [drive(strategy, scored_before(), 151, seed=seed).best() for seed in range(8)]
    random = replace(strategy, search=RandomSearch())
    theirs = [drive(random, scored_before(), 151, seed=seed).best() for seed in range(8)]
    assert wilcoxon(ours, theirs, alternative="less").pvalue < 0.01


def test_several_scores_train_the_front_first():
    strategy = Screening([maximise("score"), minimise("ops")], RandomSearch(), n_search=40, n_train=5)
    run = drive(strategy, scored_before(), 100)
    rows = [(-t.metrics["score"], t.metrics["ops"], t.architecture) for t in run.history.trials[:40]]

    def dominated(row):
        return any(a <= row[0] and b <= row[1] and (a, b) != row[:2] for a, b, _ in rows)

    front = {architecture for *_, architecture in (row for row in rows if not dominated(row))}
    assert len(front) >= 3
    trained = [trial.architecture for trial in run.history.trials[40:]]
    assert set(trained[: len(front)]) <= front and len(set(trained)) == 5


def test_waits_for_the_last_score():
    landscape = scored_before()
    history = landscape.history()
    strategy = Screening(maximise("score"), RandomSearch(), n_search=2, n_train=1)
    for number in range(2):
        history.start(Trial(number, strategy.propose(history, trial_rng(0, number))))
    history.finish(0, state="complete", metrics={"score": 0.5})
    assert strategy.propose(history, trial_rng(0, 2)) is None
    history.finish(1, state="complete", metrics={"score": 0.7})
    proposal = strategy.propose(history, trial_rng(0, 2))
    assert proposal.budget == 1.0 and proposal.architecture == history.trials[1].architecture


def test_what_follows_starts_from_what_was_trained():
    then = RegularizedEvolution(population=6, sample=3)
    strategy = Screening(maximise("score"), RandomSearch(), n_search=20, n_train=6, then=then)
    run = drive(strategy, scored_before(), 60)
    assert budgets(run) == [0.0] * 20 + [1.0] * 40
    # Its own numbering: trial 20 of the study is its trial 0. From the first proposal on, parents are trained ones.
    trained = run.history.trials[20:]
    children = [trial.proposal.notes["inner"] for trial in trained[6:] if "inner" in trial.proposal.notes]
    assert len(children) > 25
    first = trained[6]
    (parent,) = first.proposal.notes["inner"]["parents"]
    genes = trained[parent].architecture.genes
    assert parent < 6 and sum(first.architecture.genes[name] != genes[name] for name in genes) == 1


def test_a_good_score_finds_better_networks_for_the_same_training():
    """A score that agrees roughly with the value, and a blind one that does not: what it should and cannot do."""
    seeds = range(10)

    def best(noise):
        strategy = Screening(maximise("score"), RandomSearch(), n_search=100, n_train=5)
        return [drive(strategy, scored_before(noise), 105, seed=seed).best() for seed in seeds]

    random = [drive(RandomSearch(), one_max(), 5, seed=seed).best() for seed in seeds]
    assert wilcoxon(best(0.1), random, alternative="less").pvalue < 0.01
    assert wilcoxon(best(1e6), random, alternative="less").pvalue > 0.01


def test_limits_on_what_is_unknown_before_training_do_not_stop_the_search_of_the_score():
    landscape = replace(scored_before(), constraints=(at_least("value", 0.1), at_most("ops", 14)))
    strategy = Screening(maximise("score"), RegularizedEvolution(population=20, sample=10), n_search=120, n_train=3)
    run = drive(strategy, landscape, 200)
    scores = [trial.metrics["score"] for trial in run.history.trials[:120]]
    assert np.mean(scores[80:]) > np.mean(scores[:20]) + 0.05
    trained = run.history.trials[120:]
    assert len(trained) == 3
    measured = {trial.architecture: trial.metrics["ops"] for trial in run.history.trials[:120]}
    assert all(measured[trial.architecture] <= 14 for trial in trained)


def test_failed_and_refused_ones_are_not_trained():
    strategy = Screening(maximise("value"), RandomSearch(), n_search=20, n_train=20)
    run = drive(strategy, trade_off(limit=0.4), 200, cheap=("cost",), fails=lambda number: number % 5 == 0)
    complete = [t for t in run.history.trials if t.proposal.budget == 0 and t.state == "complete"]
    trained = [t for t in run.history.trials if t.proposal.budget == 1]
    assert 0 < len(complete) < 20
    assert {t.architecture for t in trained} == {t.architecture for t in complete}


def test_nothing_worked_goes_on_with_what_follows():
    strategy = Screening(VALUE, RandomSearch(), n_search=5, n_train=2, then=RandomSearch())
    run = drive(strategy, one_max(), 8, fails=lambda number: number < 5)
    assert budgets(run) == [0.0] * 5 + [1.0] * 3


def test_a_score_that_only_training_gives_is_refused_by_name():
    landscape = replace(one_max(), short=lambda architecture, budget: {"ops": 1.0})
    with pytest.raises(InvalidInputError, match="value is not known before training; known are ops"):
        drive(Screening(VALUE, RandomSearch(), n_search=3), landscape, 10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"score": "naswot"},
        {"score": []},
        {"score": [VALUE, "ops"]},
        {"search": None},
        {"search": RandomSearch},
        {"then": RandomSearch},
        {"n_search": 0},
        {"n_train": 0},
        {"n_train": 2.0},
    ],
)
def test_refuses(wrong):
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        Screening(**{"score": VALUE, "search": RandomSearch(), **wrong})


def test_a_search_that_explores_is_refused():
    class Guess:
        def explore(self, space, task, rng, context):
            raise NotImplementedError

    with pytest.raises(InvalidInputError, match="it must evaluate"):
        drive(Screening(VALUE, OneShot(Guess())), one_max(), 5)


def test_its_description_makes_it_again():
    strategy = Screening([VALUE, minimise("ops")], RegularizedEvolution(population=7), n_search=9, then=RandomSearch())
    kinds = (Screening, RegularizedEvolution, RandomSearch, Objective)
    again = restore(describe(strategy), {type_name(kind): kind for kind in kinds})
    assert again == strategy and canonical(describe(again)) == canonical(describe(strategy))


def test_a_study_measures_the_score_by_itself_and_continues(tmp_path):
    def study():
        return Study(
            space=Conv(),
            strategy=Screening(maximise("naswot"), RandomSearch(), n_search=4, n_train=2),
            task=Task.digits(epochs=1, limit=96),
            objectives=[maximise("val_accuracy")],
            folder=tmp_path / "study",
            tracker=None,
            progress=False,
        )

    assert study().run(max_trials=3).worked == 3
    trials = study().run(max_trials=20).trials
    assert [trial.proposal.budget for trial in trials] == [0.0] * 4 + [1.0] * 2
    assert all("naswot" in trial.metrics for trial in trials)
    assert ["val_accuracy" in trial.metrics for trial in trials] == [False] * 4 + [True] * 2
    best = sorted(trials[:4], key=lambda trial: -trial.metrics["naswot"])[:2]
    assert [trial.architecture for trial in trials[4:]] == [trial.architecture for trial in best]


def test_the_command_line_names_the_score_and_both_strategies():
    from nasplat.cli import values

    legal = {field.name: values.hints_of(Screening)[field.name] for field in dataclasses.fields(Screening)}
    given = {
        "score": "max:naswot",
        "search": "regularized_evolution",
        "search.population": "7",
        "then": "random_search",
    }
    made = Screening(**values.values_of(given, legal, "screening"))
    assert made == Screening(maximise("naswot"), RegularizedEvolution(population=7), then=RandomSearch())
    made = Screening(**values.values_of({**given, "score": "max:naswot,min:ops"}, legal, "screening"))
    assert made.score == (maximise("naswot"), minimise("ops"))
    with pytest.raises(InvalidInputError, match="score"):
        Screening(**values.values_of({**given, "score": "naswot"}, legal, "screening"))


def test_a_study_refuses_a_score_that_nothing_measures(tmp_path):
    with pytest.raises(UnknownMetricError, match=r"nothing in this study provides 'naswott'; .* on demand: .*naswot"):
        Study(
            space=Conv(),
            strategy=Screening(maximise("naswott"), RandomSearch()),
            task=Task.digits(),
            objectives=[maximise("val_accuracy")],
            folder=tmp_path / "study",
        )


def test_looks_at_an_enqueued_trial_as_none_of_its_own():
    landscape = Landscape(Levels(4, 4), lambda architecture: {"value": 1.0})
    history = landscape.history()
    history.start(Trial(0, Evaluate(history.space.sample(trial_rng(0, 0)), notes={"enqueued": True})))
    history.finish(0, state="complete", metrics={"value": 1.0})
    assert Screening(VALUE, RandomSearch()).propose(history, trial_rng(0, 1)).budget == 0.0

import logging
import pickle
from dataclasses import replace

import optuna
import pytest
from scipy.stats import wilcoxon

from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.objectives import maximise
from nasplat.space import Group
from nasplat.strategy import Evaluate, Explore, History, Trial, proposal_to_json
from nasplat.testing.drive import drive, replay, trial_rng
from nasplat.testing.landscapes import Edges, Landscape, Levels, one_max, one_max_edges, tiny, trade_off
from nasplat.testing.strategy_contract import StrategyContract
from strategies import OptunaSearch, RandomSearch
from strategies.optuna_search import _Encoding, _Mirror


class TestTpeContract(StrategyContract):
    trials = 25

    @pytest.fixture
    def strategy(self):
        return OptunaSearch("tpe", {"n_startup_trials": 6})


class TestNsga2Contract(StrategyContract):
    trials = 30

    @pytest.fixture
    def strategy(self):
        return OptunaSearch("nsga2", {"population_size": 6})


@pytest.mark.slow
class TestNsga3Contract(StrategyContract):
    trials = 30

    @pytest.fixture
    def strategy(self):
        return OptunaSearch("nsga3", {"population_size": 6})


@pytest.mark.slow
class TestGpContract(StrategyContract):
    trials = 12

    @pytest.fixture
    def strategy(self):
        return OptunaSearch("gp", {"n_startup_trials": 6})


@pytest.mark.slow
class TestQmcContract(StrategyContract):
    trials = 20

    @pytest.fixture
    def strategy(self):
        return OptunaSearch("qmc", {"scramble": True})


class TestRandomSamplerContract(StrategyContract):
    trials = 10

    @pytest.fixture
    def strategy(self):
        return OptunaSearch(optuna.samplers.RandomSampler)


@pytest.mark.parametrize("sampler", ["gp", "nsga3", "qmc", "brute_force"])
def test_every_sampler_is_pure(sampler):
    landscape = one_max_edges(nodes=1)
    strategy = OptunaSearch(sampler, {"n_startup_trials": 4} if sampler == "gp" else {})
    run = drive(strategy, landscape, 8, in_flight=2)
    for events, number, proposal in run.asked:
        again = pickle.loads(pickle.dumps(strategy)).propose(
            replay(landscape, run.events[:events]).history, trial_rng(0, number)
        )
        assert proposal_to_json(again) == proposal_to_json(proposal)


class TestEncoding:
    @pytest.mark.parametrize("space", [Levels(3, 4), Edges(2)])
    def test_round_trip(self, space):
        encoding = _Encoding(space)
        for seed in range(100):
            architecture = space.sample(trial_rng(seed, 0))
            params = encoding.params(architecture.genes)
            assert list(params) == list(encoding.distributions)
            assert space.architecture(encoding.genes(params)) == architecture

    def test_every_suggestion_is_legal_and_no_parameter_is_conditional(self):
        space = Edges(2)
        encoding = _Encoding(space)
        assert len(encoding.distributions) == 2 * (1 + 2 + 1)  # combination, two slots, activation
        sampler = optuna.samplers.RandomSampler(seed=0)
        found = set()
        for _ in range(500):
            params = {
                name: sampler.sample_independent(None, None, name, distribution)
                for name, distribution in encoding.distributions.items()
            }
            found.add(space.architecture(encoding.genes(params)))
        assert len(found) > 400

    def test_all_of_a_group_may_be_on(self):
        class Both(Edges):
            @property
            def choice_groups(self):
                return {"all": Group(("node0/from0", "node0/from1"), 2, "zero")}

        space = Both(1)
        for seed in range(20):
            architecture = space.sample(trial_rng(seed, 0))
            encoding = _Encoding(space)
            assert "all:on" not in encoding.distributions  # there is nothing to choose
            assert encoding.genes(encoding.params(architecture.genes)) == architecture.genes

    def test_too_many_combinations(self):
        class Wide(Levels):
            @property
            def choice_groups(self):
                return {"all": Group(tuple(self.choices), 20, 0)}

        with pytest.raises(UnsupportedError, match="137846528820"):
            OptunaSearch().propose(Landscape(Wide(40, 2), dict).history(), trial_rng(0, 0))


def frozen(history):
    mirror = _Mirror(history)
    mirror.update(history)
    return mirror._trials


def test_what_optuna_is_told():
    landscape = trade_off(limit=0.5)
    history = landscape.history()
    rng = trial_rng(0, 0)
    for number in range(6):
        history.start(Trial(number, Evaluate(history.space.sample(rng))))
    history.start(Trial(6, Explore(None)))
    history.finish(0, state="complete", metrics={"value": 0.5, "cost": 0.25})
    history.finish(1, state="complete", metrics={"value": 0.75, "cost": 0.75})
    history.finish(2, state="infeasible", metrics={"cost": 1.0})
    history.finish(3, state="failed")
    history.finish(4, state="stopped")
    history.finish(6, state="complete", found=(history.space.sample(rng),))
    states = [trial.state.name for trial in frozen(history)]
    assert states == ["COMPLETE", "COMPLETE", "PRUNED", "FAIL", "FAIL", "RUNNING", "FAIL"]
    assert [trial.values for trial in frozen(history)[:2]] == [[0.5, 0.25], [0.75, 0.75]]
    limits = [list(trial.constraints.values()) for trial in frozen(history)]
    assert limits == [[-0.5], [0.5], [1.0], [], [], [], []]


def test_a_stopped_trial_is_pruned_with_its_epochs():
    history = one_max().history()
    history.start(Trial(0, Evaluate(history.space.sample(trial_rng(0, 0)))))
    history._trials[0] = Trial(0, history.trials[0].proposal, reports=({"value": 0.25}, {"loss": 1.0}, {"value": 0.5}))
    history.finish(0, state="stopped")
    (trial,) = frozen(history)
    assert trial.state.name == "PRUNED"
    assert trial.intermediate_values == {1: 0.25, 3: 0.5}


def test_running_trials_keep_the_sampler_away():
    """The constant liar: what runs counts as bad until it is known, so it is not proposed again and again."""
    landscape = one_max(length=6)
    run = drive(OptunaSearch("tpe", {"n_startup_trials": 10}), landscape, 30)
    asked = []
    for start in (False, True):
        history = replay(landscape, run.events).history
        proposals = []
        for number in range(30, 38):
            proposal = OptunaSearch("tpe", {"n_startup_trials": 10}).propose(history, trial_rng(1, 30))
            proposals.append(proposal.architecture)
            if start:
                history.start(Trial(number, proposal))
        asked.append(proposals)
    assert len(set(asked[0])) == 1
    assert len(set(asked[1])) == 8


def test_only_what_changed_is_brought_over(monkeypatch):
    frozen_numbers = []
    original = _Mirror._freeze

    def counted(self, trial, history):
        frozen_numbers.append(trial.number)
        return original(self, trial, history)

    monkeypatch.setattr(_Mirror, "_freeze", counted)
    drive(OptunaSearch(), one_max(), 30)
    # Each trial once as running, at most, and once as ended.
    assert len(frozen_numbers) <= 60
    assert sorted(set(frozen_numbers)) == list(range(29))


def test_a_history_is_let_go():
    import gc
    import weakref

    run = drive(OptunaSearch(), one_max(), 3)
    history = weakref.ref(run.history)
    del run
    gc.collect()
    assert history() is None


@pytest.mark.parametrize("verbosity", [logging.INFO, logging.ERROR])
def test_optuna_is_quiet_and_its_verbosity_left_alone(capfd, verbosity):
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(verbosity)
    try:
        drive(OptunaSearch("nsga3"), one_max(), 5)
        assert optuna.logging.get_verbosity() == verbosity
    finally:
        optuna.logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("error")
def test_no_warnings():
    for sampler in ("tpe", "nsga3", "qmc"):
        drive(OptunaSearch(sampler), trade_off(), 5)


def test_invalid_genes_are_not_proposed():
    class Sparse(Levels):
        def is_valid(self, genes):
            return sum(genes.values()) % 5 == 0

    space = Sparse(4, 4)
    history = drive(OptunaSearch(), Landscape(space, one_max().score), 40).history
    assert len(history) == 40
    assert all(space.is_valid(trial.architecture.genes) for trial in history.trials)


def test_ends_where_is_valid_makes_the_size_an_upper_bound():
    class OnlyEven(Levels):
        def is_valid(self, genes):
            return sum(genes.values()) % 2 == 0

    run = drive(OptunaSearch(), Landscape(OnlyEven(2, 4), tiny().score), 200)
    assert run.history.distinct == 8
    assert run.asked[-1][2] is None


def test_generations_of_nsga2_are_in_the_notes():
    run = drive(OptunaSearch("nsga2", {"population_size": 5}), trade_off(), 30)
    generations = [t.proposal.notes["optuna"]["NSGAIISampler:generation"] for t in run.history.trials]
    assert generations == sorted(generations)
    assert generations[-1] >= 4


def test_constraints_are_heeded():
    landscapes = [replace(trade_off(limit=limit), objectives=(maximise("value"),)) for limit in (0.3, None)]
    strict, loose = (drive(OptunaSearch(), landscape, 80).history for landscape in landscapes)
    cheap = [sum(trial.metrics["cost"] <= 0.3 for trial in history.trials[40:]) for history in (strict, loose)]
    assert cheap[0] > cheap[1] + 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tpee",), "tpe, gp"),
        (("cmaes",), "categorical"),
        ((optuna.samplers.CmaEsSampler,), "categorical"),
        ((optuna.samplers.TPESampler(),), r"OptunaSearch\(TPESampler"),
        ((int,), "BaseSampler"),
        (("tpe", {"population_size": 5}), "n_startup_trials"),
        (("tpe", {"seed": 5}), "seed"),
        ((optuna.samplers.PartialFixedSampler,), "seed"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        OptunaSearch(*arguments)


def test_explorations_in_the_history_are_ignored():
    history = History(Levels(3, 4), [maximise("value")])
    history.start(Trial(0, Explore(None)))
    history.finish(0, state="complete")
    assert isinstance(OptunaSearch().propose(history, trial_rng(0, 1)), Evaluate)


@pytest.mark.slow
@pytest.mark.parametrize("make", [one_max, one_max_edges])
@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_beats_random_search(sampler, make):
    seeds = range(20)
    # A genetic algorithm needs its generations: 20 of them.
    strategy, trials = OptunaSearch(), 100
    if sampler == "nsga2":
        strategy, trials = OptunaSearch("nsga2", {"population_size": 10}), 200
    ours = [drive(strategy, make(), trials, seed=seed).best() for seed in seeds]
    random = [drive(RandomSearch(), make(), trials, seed=seed).best() for seed in seeds]
    assert wilcoxon(ours, random, alternative="less").pvalue < 1e-3

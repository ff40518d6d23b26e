import json
import logging
import math
import pickle
from dataclasses import replace

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.objectives import maximise
from nasplat.ranges import Float, Int
from nasplat.space import Group, space_from
from nasplat.strategy import Evaluate, Explore, History, Trial, proposal_to_json
from nasplat.testing.drive import drive, replay, trial_rng
from nasplat.testing.landscapes import Edges, Landscape, Levels, one_max, one_max_edges, tiny, trade_off
from nasplat.testing.strategy_contract import StrategyContract
from strategies import OptunaSearch, RandomSearch
from strategies.optuna_search import CmaEs, _Encoding, _Mirror


class TestTpeContract(StrategyContract):
    trials = 25

    @pytest.fixture
    def strategy(self):
        return OptunaSearch("tpe", {"n_startup_trials": 6})

    @pytest.mark.slow
    @pytest.mark.parametrize("known", ["separable", "groups"])
    def test_beats_random_search(self, strategy, known):
        """Proposals take milliseconds each."""
        super().test_beats_random_search(strategy, known)


class TestNsga2Contract(StrategyContract):
    trials = 30
    evaluations = 200  # a genetic algorithm needs its generations

    @pytest.fixture
    def strategy(self):
        return OptunaSearch("nsga2", {"population_size": 6})

    @pytest.mark.slow
    @pytest.mark.parametrize("known", ["separable", "groups"])
    def test_beats_random_search(self, strategy, known):
        """Proposals take milliseconds each."""
        super().test_beats_random_search(strategy, known)


@pytest.mark.slow
class TestNsga3Contract(StrategyContract):
    trials = 30
    evaluations = 200

    @pytest.fixture
    def strategy(self):
        return OptunaSearch("nsga3", {"population_size": 6})


@pytest.mark.slow
class TestGpContract(StrategyContract):
    trials = 12
    evaluations = 40

    @pytest.fixture
    def strategy(self):
        return OptunaSearch("gp", {"n_startup_trials": 6})


@pytest.mark.slow
class TestQmcContract(StrategyContract):
    trials = 20
    beats_random = False

    @pytest.fixture
    def strategy(self):
        return OptunaSearch("qmc", {"scramble": True})


class TestRandomSamplerContract(StrategyContract):
    trials = 10
    beats_random = False

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


# Ranges.


def train(genes):
    raise AssertionError("a landscape is scored, not built")


RANGES = space_from(
    train,
    {
        "lr": Float(1e-4, 1e-1, log=True),
        "momentum": Float(0.0, 0.9, steps=10),
        "width": Int(16, 256, log=True),
        "depth": Int(2, 20, step=3),
        "batch": (32, 64, 128),
    },
)
"""Numbers in order only."""

MIXED = space_from(train, {**RANGES.choices, "kind": ("a", "b", "c"), "flag": (False, True)})


def bowl(space):
    """Best at lr 0.003, width 64, depth 11, batch 64, and kind b where there is one."""

    def score(architecture):
        genes = architecture.genes
        miss = (math.log10(genes["lr"] / 0.003) / 3) ** 2 + (math.log2(genes["width"] / 64) / 4) ** 2
        miss += ((genes["depth"] - 11) / 18) ** 2 + (math.log2(genes["batch"] / 64) / 4) ** 2
        return {"value": 1 - miss - 0.1 * (genes.get("kind", "b") != "b")}

    return Landscape(space, score)


class TestRanges:
    def test_what_a_range_is_to_optuna(self):
        distributions = _Encoding(MIXED).distributions
        assert distributions["lr"] == FloatDistribution(1e-4, 1e-1, log=True)
        assert distributions["momentum"] == FloatDistribution(0.0, 0.9)
        assert distributions["width"] == IntDistribution(16, 256, log=True)
        assert distributions["depth"] == IntDistribution(2, 20, step=3)
        assert isinstance(distributions["batch"], CategoricalDistribution)
        assert distributions["batch"].choices == (32, 64, 128)
        assert distributions["kind"].choices == ("a", "b", "c")
        # Optuna has no logarithmic steps: a real number, taken to the nearest.
        steps = _Encoding(space_from(train, {"x": Int(1, 100, log=True, step=9)}))
        assert steps.distributions["x"] == FloatDistribution(1, 100, log=True)
        assert steps.genes({"x": 12.0}) == {"x": 10}

    def test_suggestions_are_taken_to_the_grid(self):
        params = {"lr": 0.0031, "momentum": 0.44, "width": 99, "depth": 8, "batch": 64, "kind": "a", "flag": True}
        genes = _Encoding(MIXED).genes(params)
        assert genes["lr"] == Float(1e-4, 1e-1, log=True).nearest(0.0031) != 0.0031
        assert genes["momentum"] == 0.4
        assert MIXED.architecture(genes).genes == genes

    @pytest.mark.parametrize("form", ["value", "ordered", "index"])
    def test_round_trip(self, form):
        space = RANGES if form == "ordered" else MIXED
        encoding = _Encoding(space, form)
        for seed in range(60):
            architecture = space.sample(trial_rng(seed, 0))
            params = encoding.params(architecture.genes)
            for name, value in params.items():
                assert encoding.distributions[name]._contains(encoding.distributions[name].to_internal_repr(value))
            assert encoding.genes(params) == architecture.genes

    def test_a_range_of_one_value_is_no_parameter(self):
        encoding = _Encoding(space_from(train, {"x": Int(3, 3), "y": Int(1, 2)}))
        assert list(encoding.distributions) == ["y"]
        assert encoding.genes({"y": 2}) == {"x": 3, "y": 2}

    @pytest.mark.parametrize("sampler", ["tpe", "nsga2", "qmc", "random", "brute_force"])
    def test_every_sampler_searches_ranges(self, sampler):
        run = drive(OptunaSearch(sampler), bowl(MIXED), 20, in_flight=2)
        for trial in run.history.trials:
            assert MIXED.architecture(trial.architecture.genes) == trial.architecture
        assert run.history.distinct == 20

    def test_brute_force_lists_a_range(self):
        space = space_from(train, {"x": Float(0, 1, steps=4), "y": Int(1, 3)})
        landscape = Landscape(space, lambda architecture: {"value": architecture.genes["x"]})
        run = drive(OptunaSearch("brute_force"), landscape, 30)
        assert run.history.distinct == 12
        assert run.asked[-1][2] is None

    def test_options_reach_the_sampler(self):
        run = drive(OptunaSearch("tpe", {"multivariate": False, "n_startup_trials": 3}), bowl(RANGES), 10)
        plain = drive(OptunaSearch("tpe", {"n_startup_trials": 3}), bowl(RANGES), 10)
        assert run.proposals[:3] == plain.proposals[:3]
        assert run.proposals != plain.proposals

    def test_tpe_makes_use_of_the_order(self):
        ours = [drive(OptunaSearch(), bowl(MIXED), 40, seed=seed).best() for seed in range(4)]
        random = [drive(RandomSearch(), bowl(MIXED), 40, seed=seed).best() for seed in range(4)]
        assert sum(ours) < sum(random)


class TestCmaEs:
    @pytest.mark.parametrize(
        ("landscape", "message"),
        [
            (bowl(MIXED), "kind, flag are neither"),
            (one_max_edges(), "groups node0"),
            (Landscape(space_from(train, {"x": (1, 2), "y": Int(1, 9)}), dict), "x is neither"),
            (Landscape(space_from(train, {"x": (1, 3, 2), "y": Int(1, 9)}), dict), "x is neither"),
            (replace(bowl(RANGES), objectives=(maximise("value"), maximise("other"))), "one objective"),
        ],
    )
    def test_refuses_what_it_cannot_search_by_name(self, landscape, message, monkeypatch):
        monkeypatch.setattr("strategies.optuna_search.find_spec", lambda name: object())
        with pytest.raises(UnsupportedError, match=message):
            OptunaSearch("cmaes").propose(landscape.history(), trial_rng(0, 0))

    def test_says_that_the_package_is_missing(self, monkeypatch):
        monkeypatch.setattr("strategies.optuna_search.find_spec", lambda name: None)
        with pytest.raises(UnsupportedError, match="pip install cmaes"):
            OptunaSearch("cmaes").propose(bowl(RANGES).history(), trial_rng(0, 0))

    @pytest.mark.parametrize("sampler", ["cmaes", optuna.samplers.CmaEsSampler])
    def test_is_pure_and_goes_on_from_notes(self, sampler):
        strategy = OptunaSearch(sampler, {"popsize": 5})
        run = drive(strategy, bowl(RANGES), 40, in_flight=2)
        for events, number, proposal in run.asked:
            fresh = pickle.loads(pickle.dumps(strategy))
            again = fresh.propose(replay(bowl(RANGES), run.events[:events]).history, trial_rng(0, number))
            assert proposal_to_json(again) == proposal_to_json(proposal)
        generations = [t.proposal.notes.get("optuna", {}).get("cma:generation", 0) for t in run.history.trials]
        assert max(generations) >= 4

    def test_no_pickle_in_the_notes(self):
        run = drive(OptunaSearch("cmaes", {"popsize": 5}), bowl(RANGES), 25)
        states = [
            text
            for trial in run.history.trials
            for key, text in trial.proposal.notes.get("optuna", {}).items()
            if key.startswith("cma:optimizer")
        ]
        assert states
        for text in states:
            assert {"_mean", "_sigma", "_c_1d"} <= set(json.loads(text))

    def test_agrees_with_optunas_own(self):
        """The state as JSON is the state: the suggestions are those of a study that Optuna keeps itself."""
        encoding, landscape = _Encoding(RANGES, "ordered"), bowl(RANGES)
        asked = []
        for kind in (optuna.samplers.CmaEsSampler, CmaEs):
            study = optuna.create_study(direction="maximize")
            params = []
            for seed in range(30):
                study.sampler = kind(seed=seed, popsize=5)
                trial = study.ask(encoding.distributions)
                architecture = RANGES.architecture(encoding.genes(trial.params))
                study.tell(trial, landscape.score(architecture)["value"])
                params.append(trial.params)
            asked.append(params)
        assert asked[0] == asked[1]

    def test_a_state_of_another_version_is_refused_by_name(self):
        run = drive(OptunaSearch("cmaes", {"popsize": 5}), bowl(RANGES), 25)
        history = bowl(RANGES).history()
        for kind, what, outcome in run.events:
            if kind == "finish":
                history.finish(what, **outcome)
                continue
            notes = json.loads(json.dumps(what.proposal.notes).replace("_mu_eff", "_mu_new"))
            history.start(replace(what, proposal=replace(what.proposal, notes=notes)))
        with pytest.raises(InvalidInputError, match="_mu_new"):
            OptunaSearch("cmaes", {"popsize": 5}).propose(history, trial_rng(0, 25))

    def test_beats_random_search(self):
        ours = [drive(OptunaSearch("cmaes"), bowl(RANGES), 80, seed=seed).best() for seed in range(6)]
        random = [drive(RandomSearch(), bowl(RANGES), 80, seed=seed).best() for seed in range(6)]
        assert sum(a < b for a, b in zip(ours, random, strict=True)) == 6


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
        (("tpee",), "tpe, gp, nsga2, nsga3, cmaes, random, qmc, brute_force"),
        (("cmaes", {"independent_sampler": optuna.samplers.TPESampler}), "independent_sampler"),
        (("cmaes", {"with_margin": True}), "with_margin"),
        ((type("Mine", (optuna.samplers.CmaEsSampler,), {}),), "pickle"),
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

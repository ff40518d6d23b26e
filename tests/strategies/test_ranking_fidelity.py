from collections import Counter
from dataclasses import dataclass

import pytest

from nasplat import Study, Task, maximise
from nasplat.errors import InvalidInputError
from nasplat.strategy import Explore, Report
from nasplat.testing.drive import drive
from nasplat.testing.landscapes import TinyCell, one_max, tiny, trade_off
from nasplat.testing.strategy_contract import StrategyContract
from nasplat.weight_sharing.fidelity import INHERITED, NETWORK, OWN, RECALIBRATED, WEIGHTS, ranking_fidelity
from strategies.ranking_fidelity import RankingFidelity
from strategies.uniform_paths import UniformPaths


@dataclass(frozen=True)
class Guess:
    def explore(self, space, task, rng, context):
        yield Report(1, {})
        return [space.sample(rng)]


class TestRankingFidelityContract(StrategyContract):
    @pytest.fixture
    def strategy(self):
        return RankingFidelity(Guess(), networks=10)


@pytest.mark.parametrize("in_flight", [1, 4])
def test_each_network_is_evaluated_three_ways(in_flight):
    run = drive(RankingFidelity(Guess(), networks=5, recalibrate=9), one_max(), 100, in_flight=in_flight)
    first, *rest = run.history.trials
    assert first.proposal == Explore(Guess()) and len(rest) == 15
    networks: dict = {}
    for trial in rest:
        proposal = trial.proposal
        networks.setdefault(proposal.notes[NETWORK], []).append(trial.architecture)
        expected = {INHERITED: (0.0, 0, 0), RECALIBRATED: (0.0, 0, 9), OWN: (1.0, None, 0)}
        assert (proposal.budget, proposal.weights_of, proposal.recalibrate) == expected[proposal.notes[WEIGHTS]]
    assert sorted(networks) == [0, 1, 2, 3, 4]
    assert all(len(same) == 3 and len(set(same)) == 1 for same in networks.values())
    assert len({same[0] for same in networks.values()}) == 5
    report = ranking_fidelity(run)
    assert report.inherited.n == 5 and report.inherited.tau == 1.0  # a landscape knows no weights


def test_without_recalibration_each_is_evaluated_two_ways():
    run = drive(RankingFidelity(Guess(), networks=4, recalibrate=0), one_max(), 100)
    kinds = Counter(trial.proposal.notes.get(WEIGHTS) for trial in run.history.trials)
    assert kinds == {None: 1, INHERITED: 4, OWN: 4}


def test_networks_over_a_cheap_limit_are_replaced():
    run = drive(RankingFidelity(Guess(), networks=6), trade_off(limit=0.4), 500, cheap=("cost",))
    states = Counter((t.proposal.notes.get(WEIGHTS), t.state) for t in run.history.trials)
    assert states[INHERITED, "infeasible"] > 0
    assert [states[kind, "complete"] for kind in (INHERITED, RECALIBRATED, OWN)] == [6, 6, 6]
    nothing = drive(RankingFidelity(Guess(), networks=3), trade_off(limit=-1.0), 1000, cheap=("cost",))
    assert len(nothing.history) == 1 + 130


def test_a_small_space_and_failures_leave_fewer():
    run = drive(RankingFidelity(Guess(), networks=30), tiny(), 500, fails=lambda number: number in (2, 20))
    kinds = Counter(t.proposal.notes.get(WEIGHTS) for t in run.history.trials)
    assert kinds == {None: 1, INHERITED: 16, RECALIBRATED: 15, OWN: 15}
    assert len(drive(RankingFidelity(Guess()), one_max(), 50, fails=lambda number: number == 0).history) == 1


@pytest.mark.parametrize("wrong", [{"networks": 2}, {"networks": 5.0}, {"recalibrate": -1}])
def test_wrong_values_are_refused(wrong):
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        RankingFidelity(Guess(), **wrong)
    with pytest.raises(InvalidInputError, match="explorer"):
        RankingFidelity(UniformPaths)


def test_a_study_resumed_in_the_middle_reports_the_same(tmp_path):
    strategy = RankingFidelity(UniformPaths(epochs=2, batch_size=32, candidates=1), networks=3, recalibrate=2)

    def run(folder, trials):
        study = Study(
            TinyCell(), strategy, Task.digits(epochs=1, limit=100), [maximise("val_accuracy")], folder=folder,
            tracker=None, progress=False,
        )  # fmt: skip
        return study.run(max_trials=trials)

    whole = ranking_fidelity(run(tmp_path / "whole", 10), "val_loss")
    run(tmp_path / "resumed", 5)
    resumed = run(tmp_path / "resumed", 10)
    assert [trial.state for trial in resumed.trials] == ["complete"] * 10
    assert ranking_fidelity(resumed, "val_loss").table.equals(whole.table)
    assert (whole.table.inherited != whole.table.recalibrated).all()

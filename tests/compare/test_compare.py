"""Real studies, run, killed, gone on with and compared."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import Mlp
from torch import nn
from typer.testing import CliRunner

from nasplat import Evaluate, Result, Study, Task, at_most, journal, load, maximise, minimise
from nasplat.cli import app
from nasplat.compare import Budget, Comparison, charged, compare, evaluations, hours
from nasplat.compare.existing import names_of, studies_in
from nasplat.compare.run import _makers, _with_random, run_study
from nasplat.compare.trace import trace_of
from nasplat.cost import Count
from nasplat.errors import FolderError, FolderMismatchError, InvalidInputError, NasplatWarning
from nasplat.objectives import Objective
from nasplat.space import space_from
from nasplat.testing.landscapes import Levels
from strategies.random_search import RandomSearch
from strategies.regularized_evolution import RegularizedEvolution

SPACE = Levels(4, 4)


def levels(architecture, budget, seed):
    total = sum(architecture.genes.values()) / 12
    return {"value": total, "cost": total**2, "test_value": total - 0.1, "train_seconds": 10.0}


def free(architecture, budget, seed):
    return {"value": 1.0, "train_seconds": 0.0}


TASK = Task.from_function(levels, metrics=["value", "cost", "test_value"])


@dataclass(frozen=True)
class Climb:
    """The highest architecture first, then downwards: better than random from the first trial on."""

    def propose(self, history, rng):
        order = sorted(SPACE.enumerate(), key=lambda a: (-sum(a.genes.values()), a.id))
        return Evaluate(order[len(history)]) if len(history) < len(order) else None


@dataclass(frozen=True)
class Same:
    """One architecture, over and over."""

    def propose(self, history, rng):
        return Evaluate(next(iter(SPACE.enumerate())))


@dataclass(frozen=True)
class Scores:
    """Asks for a meter by an objective of its own."""

    by: Objective

    def propose(self, history, rng):
        return None


@dataclass(frozen=True)
class Three:
    """Three random architectures and no more; the first in part."""

    def propose(self, history, rng):
        if len(history) == 3:
            return None
        return Evaluate(history.draw_new(rng), budget=0.5 if len(history) == 0 else 1.0)


@dataclass(frozen=True)
class Fails:
    """Raises in its third proposal with seeds above zero."""

    def propose(self, history, rng):
        if len(history) == 2 and int(rng.integers(1 << 30)) != int(np.random.default_rng([0, 2]).integers(1 << 30)):
            raise RuntimeError("no third proposal")
        return Evaluate(history.draw_new(rng))


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Drawing takes most of the time of a small comparison; two tests and the module's own comparison do draw."""
    if "climbed" not in request.fixturenames:
        monkeypatch.setattr(Comparison, "_save_figure", lambda self, folder: None)


def run(arms, folder: Path, **changes) -> Comparison:
    given = {
        "space": SPACE,
        "task": TASK,
        "objectives": [maximise("value")],
        "budget": 4,
        "seeds": range(6),
        "tracker": None,
        "progress": False,
    }
    return compare(arms, folder=folder, **{**given, **changes})


def one(folder: Path, strategy, seed: int = 0, trials: int = 4, **changes) -> Result:
    given = {"objectives": [maximise("value")], "tracker": None, "progress": False}
    return Study(SPACE, strategy, TASK, seed=seed, folder=folder, **{**given, **changes}).run(trials)


@pytest.fixture(scope="module")
def climbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    folder = tmp_path_factory.mktemp("climb") / "runs"
    return run({"climb": Climb()}, folder), folder


# Running.


def test_random_joins_by_itself_and_the_better_arm_is_found(climbed: tuple[Comparison, Path]) -> None:
    comparison, folder = climbed
    assert list(comparison.traces) == ["climb", "random"]
    assert comparison.baseline == "random"
    assert comparison.verdict.best == "climb"
    assert comparison.per_seed()["climb"].tolist() == [1.0] * 6
    for seed in range(6):
        best = load(folder / f"random-seed-{seed:04d}").best.metrics["value"]
        assert comparison.per_seed().loc[seed, "random"] == best
    assert journal.read(folder / "random-seed-0003")[0][0]["seed"] == 3
    text = str(comparison)
    assert text.startswith("2 arms, 6 seeds, 4 evaluations for each study; maximise value")
    assert "climb is better in value than random (p = 0.031, 6 seeds)" in text
    assert max(map(len, text.split("\n\n")[2].splitlines())) <= 100


def test_an_arm_that_is_random_search_is_the_baseline(tmp_path: Path) -> None:
    comparison = run({"climb": Climb(), "chance": RandomSearch()}, tmp_path, seeds=[0], budget=2)
    assert list(comparison.traces) == ["climb", "chance"]
    assert comparison.baseline == "chance"
    assert "Too few seeds" in comparison.verdict.overall


def test_studies_and_functions_as_arms(tmp_path: Path) -> None:
    template = Study(
        SPACE, Climb(), TASK, [maximise("value")], seed=77, folder=tmp_path / "unused", tracker=None, progress=False
    )

    def made(seed: int) -> Study:
        return Study(
            SPACE, Three(), TASK, [maximise("value")], seed=seed, folder=tmp_path / f"mine{seed}", tracker=None,
            progress=False,
        )  # fmt: skip

    comparison = compare(
        {"template": template, "made": made}, budget=3, seeds=[4, 2], folder=tmp_path / "all", tracker=None,
        progress=False,
    )  # fmt: skip
    assert comparison.seeds == (2, 4)
    assert not (tmp_path / "unused").exists()
    assert (tmp_path / "mine2" / journal.FILE).exists()
    assert (tmp_path / "all" / "random-seed-0002" / journal.FILE).exists()


def test_called_again_nothing_runs_and_more_seeds_and_budget_are_added(tmp_path: Path) -> None:
    first = run({"climb": Climb()}, tmp_path, seeds=[0, 1])
    files = {path: path.read_bytes() for path in tmp_path.glob(f"*/{journal.FILE}")}
    again = run({"climb": Climb()}, tmp_path, seeds=[0, 1])
    assert {path: path.read_bytes() for path in files} == files
    assert str(again).partition("arm  ")[0] == str(first).partition("arm  ")[0]
    assert again.id == first.id
    more = run({"climb": Climb()}, tmp_path, seeds=[0, 1, 2], budget=6)
    assert more.seeds == (0, 1, 2)
    assert set(more.costs()["evaluations"]) == {18}
    # Adding to a study changes nothing of what it had found before.
    results = {name: [load(tmp_path / f"{name}-seed-{seed:04d}") for seed in (0, 1)] for name in ("climb", "random")}
    before = Comparison.from_results(results, budget=evaluations(4)).per_seed()
    pd.testing.assert_frame_equal(before, first.per_seed())


def test_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A module, so that the task is the same one in both processes.
    (tmp_path / "killed.py").write_text(
        textwrap.dedent("""
        import time
        from nasplat import Task, maximise
        from nasplat.compare import compare
        from nasplat.testing.landscapes import Levels
        from strategies.regularized_evolution import RegularizedEvolution

        nap = 0.0

        def slow(architecture, budget, seed):
            time.sleep(nap)
            return {"value": sum(architecture.genes.values())}

        def main(folder):
            return compare(
                {"evolution": RegularizedEvolution(population=3, sample=2)}, space=Levels(4, 4),
                task=Task.from_function(slow), objectives=[maximise("value")], budget=5, seeds=range(3),
                folder=folder, tracker=None, progress=False)
        """)
    )
    runs = tmp_path / "runs"
    code = f"import killed; killed.nap = 0.1; killed.main({str(runs)!r})"
    first = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True)
    begun = runs / "random-seed-0001" / journal.FILE  # the third of six studies
    end = time.monotonic() + 120
    while time.monotonic() < end and not (begun.exists() and b'"finish"' in begun.read_bytes()):
        assert first.poll() is None
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = (runs / "evolution-seed-0000" / journal.FILE).read_bytes()
    assert not (runs / "comparison.json").exists()
    assert len(list(runs.iterdir())) < 6

    monkeypatch.syspath_prepend(tmp_path)
    import killed

    comparison = killed.main(runs)
    assert set(comparison.costs()["evaluations"]) == {15}
    assert not comparison.per_seed().isna().any(axis=None)
    assert (runs / "evolution-seed-0000" / journal.FILE).read_bytes() == done
    assert killed.main(tmp_path / "whole").per_seed().equals(comparison.per_seed())


def test_another_strategy_under_an_old_name_is_refused(climbed: tuple[Comparison, Path]) -> None:
    with pytest.raises(FolderMismatchError, match="another strategy"):
        run({"climb": Three()}, climbed[1])


def test_other_objectives_or_constraints_in_an_old_folder_are_refused(tmp_path: Path) -> None:
    run({"climb": Climb()}, tmp_path, seeds=[0, 1], budget=1)
    for new, changes, said in (
        (2, {"objectives": [maximise("cost")]}, "other objectives. There: maximise value. Here: maximise cost."),
        (3, {"constraints": [at_most("cost", 0.5)]}, "other constraints. There: none. Here: cost at most 0.5."),
    ):
        # The first seed is new, and runs: what is wrong is said all the same, not taken for a seed that failed.
        with pytest.raises(FolderMismatchError, match=said):
            run({"climb": Climb()}, tmp_path, seeds=[new, 0], budget=1, **changes)


def test_the_random_arm_has_the_given_meters_only(tmp_path: Path) -> None:
    shared = {
        "space": Mlp(classes=10, inputs=64),
        "task": Task.digits(epochs=1),
        "objectives": [maximise("val_accuracy")],
    }
    makers = _makers({"scores": Scores(maximise("synflow"))}, shared, {"tracker": None}, tmp_path)
    made = {"scores": makers["scores"](0)}
    assert "synflow" in {name for meter in made["scores"].meters for name in meter.metrics}
    random = makers[_with_random(makers, made, tmp_path)](0)
    assert "synflow" not in {name for meter in random.meters for name in meter.metrics}
    assert "params" in {name for meter in random.meters for name in meter.metrics}


# Budgets.


def test_equal_charged_cost(tmp_path: Path) -> None:
    comparison = run({"climb": Climb()}, tmp_path, seeds=[0, 1], budget=charged(45, "train_seconds"))
    # Each trial is charged 10: the fifth ends past 45, and does not count.
    assert set(comparison.costs()["evaluations"]) == {8}
    assert set(comparison.costs()["training"]) == {80.0}
    assert comparison.costs()["simulated"].all()
    assert any("a table's, not this machine's" in note for note in comparison.notes())
    assert len(load(tmp_path / "climb-seed-0000").trials) == 5


def test_a_cost_that_no_trial_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="has train_seconds, which the budget charges"):
        run({"climb": Climb()}, tmp_path, task=Task.from_function(free), budget=charged(1, "train_seconds"))


@dataclass(frozen=True)
class Looks:
    """Five architectures at no training, then all."""

    def propose(self, history, rng):
        return Evaluate(history.draw_new(rng), budget=0.0 if len(history) < 5 else 1.0)


def test_trials_that_cost_nothing_may_come_first(tmp_path: Path) -> None:
    task = Task.from_function(lambda architecture, budget, seed: {"value": 1.0, "train_seconds": 10 * budget})
    comparison = run({"looks": Looks()}, tmp_path, seeds=[0], task=task, budget=charged(45, "train_seconds"))
    (trace,) = comparison.traces["looks"]
    assert trace.complete(comparison.budget)
    assert trace.within(comparison.budget)["charged"].tolist() == [0.0] * 5 + [10.0, 20.0, 30.0, 40.0]


def strict(architecture, budget, seed):
    return {"value": sum(architecture.genes.values()) / 12, "train_seconds": 1.0}


@pytest.mark.parametrize("budget", [charged(4, "train_seconds"), evaluations(4)], ids=str)
def test_candidates_refused_for_a_cheap_cost_do_not_end_a_study_early(budget: Budget, tmp_path: Path) -> None:
    """One in five meets the limit, so a limit on proposals that fits fewer evaluations is reached at once."""
    task = Task.from_function(strict, metrics=["value"], example=torch.zeros(1, 1))
    space = space_from(
        lambda genes: nn.Linear(1, 1 + sum(genes.values())), {f"g{k}": tuple(range(6)) for k in range(8)}
    )
    study = Study(
        space, RandomSearch(), task, [maximise("value")], [at_most("params", 32)], folder=tmp_path / "a", tracker=None,
        progress=False, meters=[Count()],
    )  # fmt: skip
    short = study.run(4, max_proposals=6)
    assert short.over.startswith("max_proposals")
    assert not trace_of(short).exhausted
    assert not trace_of(short).complete(budget)
    trace = trace_of(run_study(study, budget), metrics=budget.metrics)
    assert trace.evaluations == 4
    assert trace.used(budget)


def test_the_limit_on_proposals_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["nasplat.compare.budget"], "PROPOSED", 2)
    comparison = run({"same": Same()}, tmp_path, seeds=[0], budget=5)
    (trace,) = comparison.traces["same"]
    assert (len(trace.trials), trace.evaluations, trace.exhausted) == (30, 1, False)
    assert trace.complete(evaluations(5))
    assert not trace.complete(evaluations(6))
    assert not comparison.per_seed().isna().any(axis=None)
    notes = "\n".join(comparison.notes())
    assert "same: 1 of 1 studies (seeds 0) did not use the budget up with 30 candidates, and count with the 1 " in notes
    assert "ended by themselves" not in notes


def test_equal_wall_clock(tmp_path: Path) -> None:
    comparison = run({"climb": Climb()}, tmp_path, seeds=[0], budget=hours(0.5 / 3600))
    for name in ("climb", "random"):
        (trace,) = comparison.traces[name]
        assert trace.complete(comparison.budget)
        assert not trace.complete(hours(1)) or trace.exhausted
        rows = trace.within(comparison.budget)
        assert 0 < len(rows) <= len(trace.trials)
        assert rows["ended"].max() <= 0.5
    lasted = comparison.costs()["wall"]
    assert (lasted <= 0.5).all()
    assert set(comparison.curves("seconds")) == {"climb", "random"}


def test_a_search_that_ends_by_itself_is_complete(tmp_path: Path) -> None:
    comparison = run({"three": Three()}, tmp_path, seeds=[0], budget=10)
    (trace,) = comparison.traces["three"]
    assert (trace.evaluations, trace.exhausted) == (3, True)
    assert not comparison.per_seed().isna().any(axis=None)
    # Its first trial was trained in part and is no pick.
    assert math.isnan(trace.trials["objective.value"].iloc[0])
    notes = "\n".join(comparison.notes())
    assert "three: 1 studies ended by themselves: the strategy has nothing more to propose" in notes
    assert "three: 33% of its trials train in part" in notes


@pytest.mark.parametrize("budget", [0, -1, 2.5, True, "100", None])
def test_wrong_budgets(budget: object, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"evaluations"):
        run({"climb": Climb()}, tmp_path, budget=budget)
    for maker in (hours, charged):
        with pytest.raises(InvalidInputError, match="above 0"):
            maker(0)


# What may go wrong.


def test_a_seed_that_fails_is_missing_and_said(tmp_path: Path) -> None:
    with pytest.warns(NasplatWarning, match=r"fails: seed 1 failed and is missing \(RuntimeError: no third proposal\)"):
        comparison = run({"fails": Fails()}, tmp_path, seeds=[0, 1], budget=3)
    assert comparison.per_seed()["fails"].isna().tolist() == [False, True]
    assert comparison.statistics.arms["fails"].missing == 1
    assert "seed 1 failed and is missing" in str(comparison)
    with pytest.raises(RuntimeError, match="no third proposal"):  # an arm that never worked
        run({"fails": Fails()}, tmp_path / "other", seeds=[1], budget=3)


def test_seeds_without_anything_feasible_rank_as_worst(tmp_path: Path) -> None:
    comparison = run({"climb": Climb()}, tmp_path, seeds=[0, 1], constraints=[at_most("value", 0.7)])
    assert comparison.per_seed()["climb"].tolist() == [-math.inf, -math.inf]
    assert comparison.statistics.arms["climb"].found_nothing == 2
    assert comparison.statistics.pair("climb", "random").losses == 2
    assert np.isnan(comparison.curves()["climb"].centre).all()
    comparison.figure()


@pytest.mark.parametrize(
    ("arms", "changes", "said"),
    [
        ({}, {}, "a mapping of names"),
        ({"a/b": Climb()}, {}, "an arm is named 'a/b'"),
        ({"climb": Climb}, {}, r"make one: Climb\(\)"),
        ({"climb": 3}, {}, "a strategy, a Study, or a function"),
        ({"climb": lambda seed: seed}, {"space": None, "task": None, "objectives": None}, "a Study is needed"),
        ({"climb": Climb()}, {"space": None}, "needs space"),
        ({"climb": Climb()}, {"seeds": [0, 0]}, "each once"),
        ({"climb": Climb()}, {"seeds": []}, "at least one"),
        ({"climb": Climb()}, {"seeds": 3}, r"range\(10\)"),
        ({"random": Climb()}, {}, "random search is added under that name"),
        ({"climb": Climb()}, {"report": "test_accuracy"}, r"give maximise\('test_accuracy'\) or minimise"),
        ({"climb": Climb()}, {"reference": [0.0]}, "there is one objective"),
    ],
)
def test_wrong_calls(arms: dict[str, object], changes: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=said):
        run(arms, tmp_path, **{"seeds": [0], "budget": 1, **changes})


def test_arms_that_differ_in_their_terms_are_refused_before_anything_runs(tmp_path: Path) -> None:
    def study(name: str, **changes) -> Callable[[int], Study]:
        given = {"objectives": [maximise("value")], "tracker": None, **changes}
        return lambda seed: Study(SPACE, Climb(), TASK, seed=seed, folder=tmp_path / f"{name}{seed}", **given)

    with pytest.raises(InvalidInputError, match="'a' and 'b' cannot be compared, since they differ in constraints"):
        compare({"a": study("a"), "b": study("b", constraints=[at_most("cost", 1)])}, budget=1, folder=tmp_path / "all")
    assert not list(tmp_path.iterdir())


# Finished studies.


def test_from_results_counts_what_all_have(tmp_path: Path) -> None:
    long = one(tmp_path / "long", RandomSearch(), seed=0, trials=6)
    short = one(tmp_path / "short", Climb(), seed=0, trials=4)
    comparison = Comparison.from_results({"random": [long], "climb": [short]})
    assert comparison.budget == evaluations(4)
    assert set(comparison.costs()["evaluations"]) == {4}
    wide = Comparison.from_results({"random": [long], "climb": [short]}, budget=evaluations(6))
    assert math.isnan(wide.per_seed().loc[0, "climb"])
    assert "climb: 1 of 1 studies did not use the budget up and are left out (seeds 0)." in wide.notes()
    with pytest.raises(InvalidInputError, match="seed 0 twice"):
        Comparison.from_results({"random": [long, long]})
    with pytest.raises(InvalidInputError, match=r"at least one nasplat\.Result"):
        Comparison.from_results({"random": []})


def test_accounts_add_up(tmp_path: Path) -> None:
    def napping(architecture, budget, seed):
        time.sleep(0.02)
        return {"value": 1.0}

    result = Study(
        SPACE, RandomSearch(), Task.from_function(napping), [maximise("value")], folder=tmp_path / "a", tracker=None,
        progress=False,
    ).run(4)  # fmt: skip
    trace = trace_of(result)
    account = trace.account(evaluations(4))
    assert account.training >= 0.08
    assert account.idle == 0.0
    assert account.wall == result.trials[-1].finished
    assert account.training + account.measuring + account.scheduling == pytest.approx(account.wall)
    assert not account.simulated
    # The same trials on two workers: each ran half of the time.
    rows = trace.trials.copy()
    rows["ended"] = [0.3, 0.3, 0.6, 0.6]
    rows["busy"], rows["training"], rows["measuring"] = 0.25, 0.15, 0.05
    two = type(trace)(trace.seed, trace.study, trace.folder, 2, trace.over, rows).account(evaluations(4))
    assert (two.training, two.measuring, two.wall) == pytest.approx((0.6, 0.2, 0.6))
    assert two.scheduling == pytest.approx(4 * 0.25 - 0.8)
    assert two.idle == pytest.approx(2 * 0.6 - 1.0)
    assert two.training + two.measuring + two.scheduling + two.idle == pytest.approx(2 * two.wall)


def test_a_stopped_trial_is_not_one_in_full(tmp_path: Path) -> None:
    one(tmp_path / "a", RandomSearch(), trials=2)
    file = tmp_path / "a" / journal.FILE
    lines = file.read_text().splitlines()
    events = [json.loads(line) for line in lines]
    at = next(k for k, event in enumerate(events) if event["event"] == "finish")
    assert events[at]["state"] == "complete"
    file.write_text("\n".join([*lines[:at], json.dumps({**events[at], "state": "stopped"}), *lines[at + 1 :]]) + "\n")
    trace = trace_of(load(tmp_path / "a"))
    assert trace.trials["whole"].tolist() == [False, True]
    notes = "\n".join(Comparison.from_results({"random": [load(tmp_path / "a")]}).notes())
    assert "random: 50% of its trials train in part" in notes


def test_held_out_is_that_of_the_pick(tmp_path: Path) -> None:
    comparison = run({"climb": Climb()}, tmp_path, report="test_value")
    table = comparison.held_out_per_seed()
    assert table["climb"].tolist() == [0.9] * 6
    np.testing.assert_allclose(table["random"], comparison.per_seed()["random"] - 0.1)
    assert comparison.held_out is not None
    assert comparison.held_out.pair("climb", "random").outcome == "better"
    assert "The picks by test_value: climb is better in test_value than random" in str(comparison)
    assert (tmp_path / "held_out.csv").exists()


@pytest.mark.slow
def test_test_accuracy_of_the_pick_s_weights(tmp_path: Path) -> None:
    task = Task.digits(epochs=1, limit=64)
    comparison = compare(
        {"evolution": RegularizedEvolution(population=2, sample=2)}, space=Mlp(classes=10, inputs=64), task=task,
        objectives=[maximise("val_accuracy")], budget=2, seeds=[0], folder=tmp_path, tracker=None, progress=False,
        report="test_accuracy",
    )  # fmt: skip
    expected = load(tmp_path / "random-seed-0000", space=Mlp(classes=10, inputs=64)).best.test()["test_accuracy"]
    assert comparison.held_out_per_seed().loc[0, "random"] == expected


def test_several_objectives_are_compared_by_hypervolume(tmp_path: Path) -> None:
    objectives = [maximise("value"), minimise("cost")]
    comparison = run({"climb": Climb()}, tmp_path, objectives=objectives, seeds=[0], reference=(0.0, 1.0))
    assert comparison.metric == "hypervolume"
    # Climb: (1, 1), which is on the border, then four of (11/12, 121/144): the box from there to (0, 1).
    assert comparison.per_seed().loc[0, "climb"] == pytest.approx(11 / 12 * (1 - 121 / 144))
    assert "up to the reference point value 0, cost 1" in "\n".join(comparison.notes())
    assert comparison.curves()["climb"].centre[0] == 0.0
    own = Comparison.from_results(
        {name: [load(tmp_path / f"{name}-seed-0000")] for name in ("climb", "random")}, budget=evaluations(4)
    )
    rows = pd.concat([own.traces[name][0].trials for name in own.traces])
    assert own.reference == (rows["objective.value"].min(), rows["objective.cost"].max())
    with pytest.raises(InvalidInputError, match="one number for each of maximise value, minimise cost"):
        run({"climb": Climb()}, tmp_path, objectives=objectives, seeds=[0], reference=(1.0,))


def test_speed_up_of_finished_studies(climbed: tuple[Comparison, Path]) -> None:
    up = climbed[0].speed_ups()["climb"]
    assert up.at == 1.0
    assert up.target == pytest.approx(climbed[0].per_seed()["random"].mean())
    assert climbed[0].table().loc["climb", "reaches_baseline_at"] == 1.0


# Keeping.


def test_save_and_load(climbed: tuple[Comparison, Path], tmp_path: Path) -> None:
    comparison, folder = climbed
    again = Comparison.load(folder)
    assert str(again) == str(comparison)
    assert again.statistics == comparison.statistics
    pd.testing.assert_frame_equal(again.curves_table("seconds"), comparison.curves_table("seconds"))
    written = {path.name for path in comparison.save(tmp_path / "kept").iterdir()}
    assert written == {
        "comparison.json", "arms.csv", "pairs.csv", "seeds.csv", "costs.csv", "curves.csv", "curves_seconds.csv",
        "verdict.txt", "figure.svg", "figure.png",
    }  # fmt: skip
    assert pd.read_csv(tmp_path / "kept" / "seeds.csv", index_col="seed")["climb"].tolist() == [1.0] * 6
    assert (tmp_path / "kept" / "figure.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "kept" / "comparison.json").read_text())
    (tmp_path / "kept" / "comparison.json").write_text(json.dumps({**record, "schema": 99}))
    with pytest.raises(FolderError, match="schema 99"):
        Comparison.load(tmp_path / "kept")
    with pytest.raises(FolderError, match="no comparison in"):
        Comparison.load(tmp_path)


def test_the_figure_leaves_matplotlib_alone(climbed: tuple[Comparison, Path]) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot

    before, figures = dict(mpl.rcParams), pyplot.get_fignums()
    figure = climbed[0].figure()
    assert [axes.get_xlabel() for axes in figure.axes][:2] == ["evaluations", "train_seconds + measure_seconds, summed"]
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == figures


def test_mlflow_record(climbed: tuple[Comparison, Path], tmp_path: Path) -> None:
    from mlflow import MlflowClient

    from nasplat import MlflowTracker
    from nasplat.compare.run import record

    tracker = MlflowTracker(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    folder = tmp_path / "runs"
    studies = {
        name: [one(folder / f"{name}-seed-0000", strategy, trials=2, tracker=tracker)]
        for name, strategy in (("random", RandomSearch()), ("climb", Climb()))
    }
    comparison = Comparison.from_results(studies)
    comparison.save(folder)
    record(comparison, folder, tracker)
    run_id = record(comparison, folder, tracker)
    client = MlflowClient(tracking_uri=tracker.uri)
    experiment = client.get_experiment_by_name("nasplat").experiment_id
    (found,) = client.search_runs([experiment], "tags.`nasplat.comparison` LIKE '%'")
    assert found.info.run_id == run_id
    assert found.info.status == "FINISHED"
    assert found.data.tags["nasplat.verdict"].startswith("Too few seeds")
    assert found.data.metrics["climb/mean"] == 1.0
    assert found.data.params["budget"] == "2 evaluations"
    files = {file.path for file in client.list_artifacts(run_id)}
    assert {"comparison.json", "arms.csv", "verdict.txt", "figure.svg"} <= files
    linked = client.search_runs([experiment], f"tags.`nasplat.comparison.{comparison.id[:8]}` = '{run_id}'")
    assert {run.data.tags["nasplat.study"] for run in linked} == {
        trace.study for traces in comparison.traces.values() for trace in traces
    }


# The command.


def test_command(climbed: tuple[Comparison, Path], tmp_path: Path) -> None:
    _, folder = climbed
    done = CliRunner().invoke(app, ["compare", str(folder), "--trials", "4", "--to", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "Climb is better in value than RandomSearch (p = 0.031, 6 seeds)" in done.output
    assert Comparison.load(tmp_path / "out").baseline == "RandomSearch"
    only = CliRunner().invoke(app, ["compare", *map(str, folder.glob("climb-*"))])
    assert only.exit_code == 0, only.output
    assert "There is only one arm, Climb: nothing to compare." in only.output


def test_command_refuses_what_cannot_be_compared(climbed: tuple[Comparison, Path], tmp_path: Path) -> None:
    one(tmp_path / "other", RandomSearch(), trials=1, constraints=[at_most("cost", 0.5)])
    done = CliRunner().invoke(app, ["compare", str(climbed[1]), str(tmp_path / "other")])
    assert done.exit_code == 1
    assert "cannot be compared, since they differ in constraints" in done.stderr
    nothing = CliRunner().invoke(app, ["compare", str(tmp_path / "nothing")])
    assert nothing.exit_code == 1
    assert "no study in" in nothing.stderr
    twice = CliRunner().invoke(app, ["compare", str(tmp_path), "--trials", "3", "--hours", "1"])
    assert twice.exit_code == 2


def test_arms_are_named_by_what_they_differ_in() -> None:
    def described(kind: str, **fields: object) -> dict[str, object]:
        return {"type": f"strategies.x:{kind}", "fields": fields}

    names = names_of({
        "a": described("Evolution", population=10, sample=3),
        "b": described("Evolution", population=20, sample=3),
        "c": described("Random"),
    })  # fmt: skip
    assert names == {"a": "Evolution(population=10)", "b": "Evolution(population=20)", "c": "Random"}


def test_arms_that_read_the_same_are_numbered() -> None:
    names = names_of({
        "a": {"type": "m1:Evolution", "fields": {"p": 1}},
        "b": {"type": "m2:Evolution", "fields": {"p": 1}},
        "c": {"type": "m:Other", "fields": {"p": "1"}},
        "d": {"type": "m:Other", "fields": {"p": 1}},
    })  # fmt: skip
    assert names == {"a": "Evolution (1)", "b": "Evolution (2)", "c": "Other(p=1) (1)", "d": "Other(p=1) (2)"}


def test_studies_below_a_folder_count_once(climbed: tuple[Comparison, Path]) -> None:
    folder = climbed[1]
    assert len(studies_in([folder, folder / "climb-seed-0000"])) == 12

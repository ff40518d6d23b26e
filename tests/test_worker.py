from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Conv, Ladder, Mlp, climb, equal_states
from safetensors.torch import load_file
from torch import nn

from nasplat import Architecture, Count, Evaluate, Explore, Report, SearchSpace, Task, at_most, space_from
from nasplat import worker as module
from nasplat.cost import Bench, Measurement
from nasplat.errors import InvalidInputError
from nasplat.nn import set_binarisation
from nasplat.search import Assignment, Outcome
from nasplat.strategy import proposal_to_json
from nasplat.testing.landscapes import TinyCell
from nasplat.weight_sharing import inherited
from nasplat.worker import Worker, load_checkpoint, save_checkpoint, save_weights, trial_folder
from search_spaces import Bats, MetaKernel

SPACE = Mlp()
SMALL = SPACE.architecture({"width": 4, "depth": 1, "act": "relu", "norm": True})
LARGE = SPACE.architecture({"width": 16, "depth": 2, "act": "relu", "norm": True})


def assignment(number=0, architecture=SMALL, source=None, seed=7, **proposal):
    return Assignment(number, Evaluate(architecture, **proposal), seed, source)


def run(worker, given, stop_after=None):
    """Reports and the outcome."""
    steps = worker.run(given)
    reports = []
    event = next(steps)
    while not isinstance(event, Outcome):
        reports.append(event)
        event = steps.send(False if len(reports) == stop_after else None)
    with pytest.raises(StopIteration):
        next(steps)
    return reports, event


@pytest.fixture
def worker(blobs, tmp_path):
    return Worker(SPACE, blobs, tmp_path, meters=(Count(),), bench=Bench(tmp_path / "bench"))


def without_seconds(metrics):
    return {name: value for name, value in metrics.items() if not name.endswith("_seconds")}


def test_an_evaluation_reports_each_epoch_and_ends_complete(worker):
    reports, outcome = run(worker, assignment())
    assert [report.step for report in reports] == [1, 2]
    assert outcome.state == "complete" and outcome.reason == ""
    assert without_seconds(outcome.metrics) == {
        **reports[-1].metrics, "params": 43.0, "macs": 28.0, "bops": 0.0, "flops": outcome.metrics["flops"],
        "ops": outcome.metrics["ops"], "model_bytes": outcome.metrics["model_bytes"],
        "uncounted_ops": 0.0,
    }  # fmt: skip
    assert outcome.metrics["train_seconds"] > 0 and outcome.metrics["measure_seconds"] > 0
    state = load_file(trial_folder(worker.folder, 0) / "weights.safetensors")
    model = SPACE.build(SMALL)
    model.load_state_dict(state)
    held = worker.task.load().validation
    scores = worker.task.score(model.eval()(held.x).detach(), held.y, "val")
    assert scores["val_accuracy"] == outcome.metrics["val_accuracy"]


def test_the_same_assignment_gives_the_same_and_the_seed_decides(worker, tmp_path):
    results = []
    for number, seed in ((0, 7), (1, 7), (2, 8)):
        torch.manual_seed(number)  # what was there before does not matter
        results.append(run(worker, assignment(number, seed=seed))[1])
    assert without_seconds(results[0].metrics) == without_seconds(results[1].metrics)
    assert without_seconds(results[0].metrics) != without_seconds(results[2].metrics)


@dataclass(frozen=True)
class Weighs:
    """A meter that notes what it saw. ``log`` is shared by the meters of a test."""

    log: list = field(default_factory=list, compare=False)
    trained: bool = False
    value: Any = 1.0

    @property
    def metrics(self):
        return (f"weight_{self.trained}",)

    def measure(self, model, example, bench):
        weight = next(model.parameters()).detach().clone()
        self.log.append((self.trained, model.training, weight))
        return Measurement({self.metrics[0]: self.value}, {"w": [1.0, 2.0]}, {"of": "w"})


class Watched(SearchSpace):
    """The small space with a log of what happens, and with ways to go wrong."""

    def __init__(self, log, fault=None):
        self.log, self.fault = log, fault

    choices = Mlp.choices

    def describe(self):
        return {}

    def build(self, architecture):
        self.log.append("build")
        model = Mlp().build(architecture)

        def before(network, _):
            self.log.append("train" if network.training else "eval")
            if self.fault is not None and network.training:
                self.fault()

        model.register_forward_pre_hook(before)
        return model


def test_cheap_meters_come_before_training_and_the_others_after(worker):
    log: list = []
    cheap, dear = Weighs(log), Weighs(log, trained=True)
    space = Watched(log)
    given = assignment(architecture=space.architecture(dict(SMALL.genes)))
    _, outcome = run(replace(worker, space=space, meters=(dear, cheap)), given)
    assert outcome.state == "complete", outcome.traceback
    kinds = [entry if isinstance(entry, str) else f"meter {entry[0]}" for entry in log]
    assert kinds[:3] == ["build", "meter False", "train"]
    assert kinds[-1] == "meter True" and kinds.count("build") == 1
    measured = [entry for entry in log if not isinstance(entry, str)]
    assert not torch.equal(measured[0][2], measured[1][2])  # the second saw trained weights
    assert measured[1][1] is False  # in evaluation mode
    assert outcome.facts == {"of": "w"}
    assert (trial_folder(worker.folder, 0) / "samples.json").exists()


def test_a_broken_limit_costs_no_epoch(worker):
    log: list = []
    space = Watched(log)
    limited = replace(worker, space=space, constraints=(at_most("params", 10), at_most("val_loss", 1e-9)))
    reports, outcome = run(limited, assignment(architecture=space.architecture(dict(SMALL.genes))))
    assert (reports, outcome.state) == ([], "infeasible")
    assert outcome.reason == "params is 43, must be params at most 10"
    assert outcome.metrics["params"] == 43 and "val_loss" not in outcome.metrics
    assert "train" not in log
    assert not trial_folder(worker.folder, 0).exists()


def test_a_broken_limit_spares_the_meters_that_come_after(worker):
    log: list = []
    limited = replace(worker, meters=(Count(), Weighs(log)), constraints=(at_most("params", 10),))
    _, outcome = run(limited, assignment())
    assert outcome.state == "infeasible" and log == []


def test_a_limit_known_only_after_training_does_not_make_it_infeasible(worker):
    _, outcome = run(replace(worker, constraints=(at_most("val_loss", 1e-9),)), assignment())
    assert outcome.state == "complete"


def raises(error):
    def fault():
        raise error

    return fault


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("bad gene\nand more"), "ValueError: bad gene"),
        (MemoryError("17 GB"), "out of memory: 17 GB"),
        (torch.OutOfMemoryError("CUDA out"), "out of memory: CUDA out"),
        (RuntimeError("[enforce] DefaultCPUAllocator: not enough memory: you tried"), "out of memory: [enforce]"),
        (AssertionError(), "AssertionError: "),
        (RecursionError("deep"), "RecursionError: deep"),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_a_candidate_that_raises_fails_with_its_reason(worker, error, reason):
    space = Watched([], raises(error))
    _, outcome = run(replace(worker, space=space), assignment(architecture=space.architecture(dict(SMALL.genes))))
    assert outcome.state == "failed" and outcome.reason.startswith(reason)
    assert "Traceback" in outcome.traceback and "fault" in outcome.traceback


def test_ctrl_c_is_no_failure_of_the_candidate(worker):
    space = Watched([], raises(KeyboardInterrupt()))
    steps = replace(worker, space=space).run(assignment(architecture=space.architecture(dict(SMALL.genes))))
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    assert torch.equal(torch.get_rng_state(), before)


def broken_build(genes):
    raise ValueError("cannot be built")


def nan_net(genes):
    return nn.Sequential(nn.Linear(4, 3), nn.Threshold(float("inf"), float("nan")))


@pytest.mark.parametrize(("function", "reason"), [(broken_build, "cannot be built"), (nan_net, "training loss is nan")])
def test_building_and_nan_fail(worker, function, reason):
    space = space_from(function, {"a": (1, 2)})
    _, outcome = run(replace(worker, space=space, meters=()), assignment(architecture=space.architecture({"a": 1})))
    assert outcome.state == "failed" and reason in outcome.reason


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "fast", None])
def test_a_meter_that_gives_no_number_fails_the_trial(worker, value):
    _, outcome = run(replace(worker, meters=(Weighs(value=value),)), assignment())
    assert outcome.state == "failed" and "weight_False" in outcome.reason


def test_the_time_limit_holds_at_steps(worker):
    reports, outcome = run(replace(worker, time_limit_s=1e-9), assignment())
    assert reports == [] and outcome.state == "failed"
    assert outcome.reason.startswith("past its time limit")
    assert run(replace(worker, time_limit_s=1000.0), assignment())[1].state == "complete"


def test_globals_are_as_before(worker):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    threads = torch.get_num_threads()
    for given in (assignment(), assignment(architecture=Architecture("other", {}))):
        run(replace(worker, threads=2), given)
        steps = worker.run(given)  # given up half-way
        next(steps)
        steps.close()
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.get_num_threads() == threads


def test_measure_only(worker):
    meters = (Count(), Weighs(trained=True))
    reports, outcome = run(replace(worker, meters=meters), assignment(budget=0.0))
    assert reports == [] and outcome.state == "complete"
    assert {"params", "weight_True"} <= set(outcome.metrics)
    assert not {"val_accuracy", "train_seconds"} & set(outcome.metrics)


def test_a_report_answered_with_false_ends_the_trial(worker):
    task = replace(worker.task, recipe=replace(worker.task.recipe, epochs=4))
    worker = replace(worker, task=task)
    reports, outcome = run(worker, assignment(), stop_after=2)
    assert outcome.state == "stopped" and len(reports) == 2
    assert outcome.metrics["val_loss"] == reports[-1].metrics["val_loss"]
    assert (trial_folder(worker.folder, 0) / "checkpoint.pt").exists()  # it may go on
    reports, outcome = run(worker, assignment(1), stop_after=4)
    assert outcome.state == "complete"  # nothing was left to end


def test_a_trial_that_was_stopped_and_killed_before_it_said_so_is_stopped_again(worker):
    patient = replace(worker, task=replace(worker.task, recipe=replace(worker.task.recipe, epochs=4)))
    _, told = run(patient, assignment(), stop_after=2)
    reports, again = run(patient, assignment())
    assert reports == [] and again.state == told.state == "stopped"
    assert without_seconds(again.metrics) == without_seconds(told.metrics)
    # What goes on from it, goes on.
    _, on = run(patient, assignment(1, source=SMALL, weights_of=0))
    assert on.state == "complete"


def test_training_time_is_that_of_all_runs_of_a_trial(worker, monkeypatch):
    """Each look at the clock is a second: what passes between two epochs, while nobody trains, is not counted."""
    patient = replace(worker, task=replace(worker.task, recipe=replace(worker.task.recipe, epochs=4)), meters=())
    seconds = iter(range(10_000))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    _, whole = run(patient, assignment(0))
    steps = patient.run(assignment(1))
    for _ in range(3):
        next(steps)
    steps.close()  # killed in the third epoch's report: two are saved
    _, resumed = run(patient, assignment(1))
    assert resumed.metrics["train_seconds"] == whole.metrics["train_seconds"]


def test_measuring_alone_leaves_no_weights(worker):
    _, outcome = run(worker, assignment(budget=0.0))
    assert outcome.state == "complete"
    assert not list(worker.folder.glob("trials/*/*.safetensors")) and not list(worker.folder.glob("trials/*/*.pt"))


def test_a_share_of_the_epochs_and_on_from_there_is_one_training(blobs, worker, tmp_path):
    """Budget continuation through ``weights_of``: the network has no randomness beside its data's order."""
    task = replace(blobs, recipe=replace(blobs.recipe, epochs=4))
    worker = replace(worker, task=task)
    reports, half = run(worker, assignment(0, budget=0.5))
    assert [report.step for report in reports] == [1, 2] and half.state == "complete"
    later, full = run(worker, assignment(1, budget=1.0, weights_of=0, source=SMALL, seed=99))
    assert [report.step for report in later] == [1, 2]  # its own epochs, counted from 1
    whole, once = run(worker, assignment(2, budget=1.0))
    assert [r.metrics for r in reports + later] == [r.metrics for r in whole]
    assert without_seconds(full.metrics) == without_seconds(once.metrics)
    states = [load_file(trial_folder(tmp_path, number) / "weights.safetensors") for number in (1, 2)]
    assert equal_states(*states)


def test_the_same_budget_again_scores_what_it_goes_on_from(worker):
    _, first = run(worker, assignment(0, budget=0.5))
    reports, again = run(worker, assignment(1, budget=0.5, weights_of=0, source=SMALL))
    assert reports == [] and again.state == "complete", again.traceback
    assert again.metrics["val_loss"] == first.metrics["val_loss"]
    _, only = run(worker, assignment(2, budget=0.0, weights_of=0, source=SMALL))
    assert only.metrics["val_loss"] == first.metrics["val_loss"]


def test_weights_of_another_architecture_are_inherited_or_refused(worker):
    run(worker, assignment(0))
    twin = replace(SPACE, inputs=4).architecture({**SMALL.genes, "act": "tanh"})
    _, outcome = run(worker, assignment(1, architecture=twin, weights_of=0, source=SMALL))
    assert outcome.state == "complete"
    _, outcome = run(worker, assignment(2, architecture=LARGE, weights_of=0, source=SMALL))
    assert outcome.state == "failed" and "cannot inherit" in outcome.reason
    _, outcome = run(worker, assignment(3, weights_of=77, source=SMALL))
    assert outcome.state == "failed" and "trial 77 kept no weights" in outcome.reason


@pytest.fixture
def saving(monkeypatch):
    """Save after every epoch."""
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", -1.0)


@pytest.mark.parametrize("epochs_before_the_kill", [1, 2, 3, 4])
@pytest.mark.parametrize("goes_on", [False, True])
def test_an_interrupted_trial_goes_on_from_its_checkpoint(worker, saving, epochs_before_the_kill, goes_on):
    task = replace(worker.task, recipe=replace(worker.task.recipe, epochs=8 if goes_on else 4))
    worker = replace(worker, task=task)
    changes: dict = {}
    if goes_on:
        run(worker, assignment(9, budget=0.5))
        changes = {"weights_of": 9, "source": SMALL}
    expected, whole = run(worker, assignment(0, **changes))
    steps = worker.run(assignment(1, **changes))
    seen = [next(steps) for _ in range(epochs_before_the_kill)]
    if epochs_before_the_kill == 4:  # killed after the last epoch's checkpoint, while it is measured
        with pytest.raises(RuntimeError):
            killed = replace(worker, meters=(Count(), Dies(trained=True)))
            steps.close()
            steps = killed.run(assignment(2, **changes))
            seen = [next(steps) for _ in range(4)]
            raise_at_end(steps)
        number = 2
    else:
        steps.send(True)  # the checkpoint is written after the report was answered
        steps.close()
        number = 1
    reports, outcome = run(worker, assignment(number, **changes))
    assert [r.step for r in reports] == list(range(epochs_before_the_kill + 1, 5))
    assert [r.metrics for r in seen + reports] == [r.metrics for r in expected]
    assert without_seconds(outcome.metrics) == without_seconds(whole.metrics)
    states = [load_file(trial_folder(worker.folder, n) / "weights.safetensors") for n in (0, number)]
    assert equal_states(*states)


class Killed(BaseException):
    pass


@dataclass(frozen=True)
class Dies(Weighs):
    def measure(self, model, example, bench):
        raise Killed


def raise_at_end(steps):
    try:
        next(steps)
    except Killed:
        raise RuntimeError("killed") from None


def test_checkpoints_hold_tensors_and_plain_values_only(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("loaded",))

    path = tmp_path / "a" / "checkpoint.pt"
    save_checkpoint({"x": torch.ones(2), "n": [1, "a", None]}, path)
    assert torch.equal(load_checkpoint(path)["x"], torch.ones(2))
    torch.save({"evil": Evil()}, path)
    with pytest.raises(Exception, match="Weights only"):
        load_checkpoint(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint.pt"]


# Functions.


@pytest.fixture
def ladder(tmp_path):
    return Worker(Ladder(), Task.from_function(climb), tmp_path)


FIVE = Ladder().architecture({"x": 5})


def test_a_function_is_called_and_nothing_built(ladder):
    reports, outcome = run(ladder, assignment(architecture=FIVE))
    assert reports == [] and outcome.state == "complete"
    assert without_seconds(outcome.metrics) == {"val_accuracy": 0.05, "size": 5.0}
    assert not list(ladder.folder.rglob("*"))


def test_a_function_gets_architecture_budget_and_seed(ladder):
    seen = []

    def evaluate(architecture, budget, seed):
        seen.append((architecture, budget, seed, torch.rand(1).item()))
        return {"val_accuracy": np.float32(0.5), "train_seconds": 3}

    worker = replace(ladder, task=Task.from_function(evaluate))
    for _ in range(2):
        _, outcome = run(worker, assignment(architecture=FIVE, budget=0.25, seed=11))
    assert seen[0][:3] == (FIVE, 0.25, 11) and seen[0] == seen[1]
    assert outcome.metrics == {"val_accuracy": 0.5, "train_seconds": 3.0}
    assert all(type(value) is float for value in outcome.metrics.values())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (0.93, "returned 0.93; a mapping"),
        ({"val_accuracy": float("nan")}, "val_accuracy is nan"),
        ({"val_accuracy": "high"}, "a number is needed"),
        ({"val_accuracy": torch.ones(2)}, "val_accuracy"),
    ],
)
def test_a_function_that_answers_wrongly_fails_the_trial(ladder, answer, reason):
    worker = replace(ladder, task=Task.from_function(lambda a, b, s: answer))
    _, outcome = run(worker, assignment(architecture=FIVE))
    assert outcome.state == "failed" and reason in outcome.reason


def test_a_function_with_a_meter_builds_and_measures_first(tmp_path):
    called = []

    def evaluate(architecture: Architecture, budget: float, seed: int) -> Mapping[str, float]:
        called.append(architecture)
        return {"val_accuracy": 0.5}

    task = Task.from_function(evaluate, example=torch.zeros(1, 4))
    worker = Worker(SPACE, task, tmp_path, meters=(Count(),), constraints=(at_most("params", 100),))
    assert run(worker, assignment(architecture=SMALL))[1].metrics["params"] == 43
    _, outcome = run(worker, assignment(architecture=LARGE))
    assert outcome.state == "infeasible" and called == [SMALL]


# Explorations.


@dataclass(frozen=True)
class Finds:
    epochs: int = 3
    found: tuple = (SMALL,)
    metrics: Mapping[str, Any] = field(default_factory=lambda: {"train_loss": np.float32(0.5)})
    first: int = 1

    def explore(self, space, task, rng, context):
        state = context.load() or {"epoch": self.first - 1}
        for epoch in range(state["epoch"] + 1, self.epochs + 1):
            with context.step():
                pass
            go_on = yield Report(epoch, self.metrics)
            context.save({"epoch": epoch})
            if not go_on:
                break
        return list(self.found)


def explore(worker, explorer, stop_after=None, number=0):
    return run(worker, Assignment(number, Explore(explorer), 7), stop_after)


def test_an_exploration_reports_and_finds(worker):
    reports, outcome = explore(worker, Finds())
    assert [r.step for r in reports] == [1, 2, 3]
    assert all(type(value) is float for r in reports for value in r.metrics.values())
    assert outcome.state == "complete" and outcome.found == (SMALL,)
    assert outcome.metrics["train_loss"] == 0.5
    assert not (trial_folder(worker.folder, 0) / "checkpoint.pt").exists()


def test_an_exploration_stops_when_asked_and_goes_on_after_a_kill(worker):
    reports, outcome = explore(worker, Finds(), stop_after=2)
    assert len(reports) == 2 and outcome.found == (SMALL,)
    steps = worker.run(Assignment(1, Explore(Finds()), 7))
    next(steps)
    steps.send(True)
    steps.close()
    reports, outcome = explore(worker, Finds(), number=1)
    assert [r.step for r in reports] == [2, 3] and outcome.state == "complete"


@dataclass(frozen=True)
class KilledAtTheEnd:
    """Ends as if killed after the report and the save of its last epoch, the first time."""

    def explore(self, space, task, rng, context):
        if context.load() is None:
            yield Report(1, {"train_loss": 0.25})
            context.save({})
            raise KeyboardInterrupt
        return [SMALL]


def test_an_exploration_killed_after_its_last_epoch_keeps_its_metrics(worker):
    with pytest.raises(KeyboardInterrupt):
        explore(worker, KilledAtTheEnd())
    reports, outcome = explore(worker, KilledAtTheEnd())
    assert reports == [] and without_seconds(outcome.metrics) == {"train_loss": 0.25}


@pytest.mark.parametrize(
    ("explorer", "reason"),
    [
        (Finds(found=()), "found no architecture"),
        (Finds(found=(FIVE,)), "is not of"),
        (Finds(found=(Architecture(SPACE.identity, {"width": 3}),)), "missing: depth"),
        (Finds(metrics={"train_loss": float("nan")}), "train_loss is nan"),
        (Finds(first=2), "reports step 2 after 0"),
        (Finds(first=0), "reports step 0 after 0"),
    ],
)
def test_an_exploration_that_goes_wrong_fails(worker, explorer, reason):
    _, outcome = explore(worker, explorer)
    assert outcome.state == "failed" and reason in outcome.reason
    assert not (trial_folder(worker.folder, 0) / "checkpoint.pt").exists()


def test_lazy_layers_are_made_before_anything_is_measured(tmp_path):
    space = Conv()
    worker = Worker(space, Task.digits(epochs=1, limit=40), tmp_path, meters=(Count(),))
    _, outcome = run(worker, assignment(architecture=space.architecture({"channels": 4, "kernel": 3})))
    assert outcome.state == "complete", outcome.traceback
    assert outcome.metrics["params"] == 4 * 9 + 8 + 4 * 16 * 10 + 10


# Paths of an explored supernet.


CELL = TinyCell()


@dataclass(frozen=True)
class Warm:
    """Keeps a supernet whose batch norm has seen shifted data; or weights that are no whole supernet's."""

    drop: str = ""

    def explore(self, space, task, rng, context):
        supernet = space.supernet().train()
        relaxed = {name: torch.full((len(options),), 1 / len(options)) for name, options in space.choices.items()}
        for _ in range(20):
            supernet(torch.randn(32, 1, 8, 8) + 2, relaxed)
        yield Report(1, {"train_loss": 1.0})
        context.keep({name: value for name, value in supernet.state_dict().items() if name != self.drop})
        return [space.sample(rng)]


@pytest.fixture
def explored(tmp_path):
    """A worker with an explored supernet of TinyCell as trial 0."""
    worker = Worker(CELL, Task.digits(limit=100, batch_size=32), tmp_path, meters=(Count(),))
    assert explore(worker, Warm())[1].state == "complete"
    return worker


def on_path(worker, number, seed=0, **proposal):
    architecture = CELL.sample(np.random.default_rng(seed))
    reports, outcome = run(worker, assignment(number, architecture, budget=0.0, weights_of=0, **proposal))
    assert reports == []
    return without_seconds(outcome.metrics) if outcome.state == "complete" else outcome


def test_inherited_weights_are_scored_as_the_path_of_the_supernet(explored):
    architecture = CELL.sample(np.random.default_rng(0))
    metrics = on_path(explored, 1)
    supernet = CELL.supernet()
    supernet.load_state_dict(load_file(trial_folder(explored.folder, 0) / "weights.safetensors"))
    held = explored.task.load().validation
    with torch.no_grad():
        logits = supernet.eval()(held.x, CELL.relax(architecture))
    scores = explored.task.score(logits, held.y, "val")
    assert metrics["val_loss"] == pytest.approx(scores["val_loss"], rel=1e-5)
    assert metrics["val_accuracy"] == scores["val_accuracy"]
    # Costs are the built network's; nothing of a path is kept.
    assert metrics["params"] == sum(p.numel() for p in CELL.build(architecture).parameters())
    assert not trial_folder(explored.folder, 1).exists()


def test_recalibration_changes_the_score_and_leaves_the_supernet_alone(explored):
    plain = on_path(explored, 1)
    recalibrated = on_path(explored, 2, recalibrate=3)
    assert recalibrated["val_loss"] < plain["val_loss"]  # its statistics were of shifted data
    assert on_path(explored, 3) == plain
    assert on_path(explored, 4, recalibrate=3) == recalibrated  # by the seed, not by what was scored before
    fewer = on_path(explored, 5, recalibrate=1)
    assert fewer["val_loss"] not in (plain["val_loss"], recalibrated["val_loss"])


def test_the_last_supernet_is_loaded_once_and_a_new_one_instead_of_it(explored, monkeypatch):
    made = []
    original = TinyCell.supernet
    monkeypatch.setattr(TinyCell, "supernet", lambda self: made.append(1) or original(self))
    scores = [on_path(explored, number)["val_loss"] for number in (1, 2)]
    assert len(made) == 1 and scores[0] == scores[1]
    file = trial_folder(explored.folder, 0) / "weights.safetensors"
    state = load_file(file)
    save_weights({**state, "head.bias": state["head.bias"] + torch.arange(10.0)}, file)
    assert on_path(explored, 3)["val_loss"] != scores[0]
    assert len(made) == 2


def test_the_score_of_a_path_is_that_of_a_fresh_process(explored, monkeypatch):
    warm = [on_path(explored, number, number, recalibrate=2) for number in (1, 2)]
    monkeypatch.setattr(inherited, "_LAST", [])
    assert on_path(explored, 3, 2, recalibrate=2) == warm[1]


def test_weights_that_are_not_of_the_whole_supernet_are_refused_in_words(explored):
    assert explore(explored, Warm(drop="head.bias"))[1].state == "complete"
    outcome = on_path(explored, 1)
    assert outcome.state == "failed"
    assert "1 tensors differ, first: head.bias is missing" in outcome.reason
    assert "training what it found from scratch" in outcome.reason
    (trial_folder(explored.folder, 0) / "weights.safetensors").unlink()
    assert "kept no weights" in on_path(explored, 2).reason


def test_a_cheap_limit_ends_a_path_before_it_is_scored(explored):
    limited = replace(explored, constraints=(at_most("params", 10),))
    outcome = on_path(limited, 1)
    assert outcome.state == "infeasible" and "val_loss" not in outcome.metrics


@dataclass(frozen=True)
class Weight:
    """A meter that needs trained weights."""

    metrics = ("weight",)
    trained = True

    def measure(self, model, example, bench):
        return Measurement({"weight": float(model.stem.norm.running_mean.sum())}, {"weight": [1.0]})


@dataclass(frozen=True)
class Reading:
    """A meter with a single reading."""

    metrics = ("reading",)
    trained = False

    def measure(self, model, example, bench):
        return Measurement({"reading": 1.0}, {"reading": [1.0]})


def test_readings_are_kept_of_functions_and_of_what_breaks_a_limit(tmp_path):
    space = MetaKernel.small(stages=((8, 1, 2),), head_channels=8)
    given = assignment(0, space.sample(np.random.default_rng(0)))
    for name, limit, state in (("a", 2, "complete"), ("b", 0, "infeasible")):
        task = Task.from_function(lambda architecture, budget, seed: {"score": 1.0}, example=Task.digits().example())
        for part, judged in (("function", task), ("data", Task.digits(limit=64, epochs=1))):
            folder = tmp_path / name / part
            worker = Worker(space, judged, folder, (Reading(),), (at_most("reading", limit),))
            outcome = run(worker, given)[-1]
            assert outcome.state == state, outcome.traceback
            assert (trial_folder(folder, 0) / "samples.json").read_text() == '{"reading": [1.0]}'


def test_meters_that_need_weights_get_the_inherited_ones(tmp_path):
    space = MetaKernel.small(stages=((8, 1, 2),), head_channels=8)
    worker = Worker(space, Task.digits(limit=64), tmp_path, meters=(Weight(),))
    explore(worker, Warm())
    given = assignment(1, space.sample(np.random.default_rng(0)), budget=0.0, weights_of=0)
    _, outcome = run(worker, given)
    assert outcome.state == "complete", outcome.traceback
    state = load_file(trial_folder(tmp_path, 0) / "weights.safetensors")
    assert outcome.metrics["weight"] == pytest.approx(float(state["stem.norm.running_mean"].sum()))
    assert (trial_folder(tmp_path, 1) / "samples.json").exists()


@pytest.mark.parametrize(
    "space",
    [
        MetaKernel.small(stages=((8, 1, 2),), head_channels=8),
        Bats(cells=2, channels=4, groups=2, in_channels=1, stem_stride=2),
    ],
    ids=["meta_kernel", "bats"],
)
def test_a_path_scores_as_the_built_network_that_inherits(space, tmp_path):
    worker = Worker(space, Task.digits(limit=64, size=16), tmp_path)
    explore(worker, Warm())
    state = load_file(trial_folder(tmp_path, 0) / "weights.safetensors")
    held = worker.task.load().validation
    for number in range(1, 4):
        architecture = space.sample(np.random.default_rng(number))
        _, outcome = run(worker, assignment(number, architecture, budget=0.0, weights_of=0))
        model = space.inherit(space.build(architecture), None, state)
        set_binarisation(model, weights=False)  # as in the supernet
        with torch.no_grad():
            scores = worker.task.score(model.eval()(held.x), held.y, "val")
        assert outcome.metrics["val_loss"] == pytest.approx(scores["val_loss"], rel=1e-3)


def test_a_built_network_can_be_recalibrated_too(worker):
    run(worker, assignment(0))
    plain, recalibrated = (
        run(worker, assignment(number, source=SMALL, budget=0.0, weights_of=0, recalibrate=count))[1].metrics
        for number, count in ((1, 0), (2, 4))
    )
    assert plain["val_loss"] != recalibrated["val_loss"]
    model = SPACE.build(SMALL)
    model.load_state_dict(load_file(trial_folder(worker.folder, 0) / "weights.safetensors"))
    module.recalibrate(model, module.calibration_batches(worker.task, 4, 7, torch.device("cpu")))
    held = worker.task.load().validation
    scores = worker.task.score(model.eval()(held.x).detach(), held.y, "val")
    assert recalibrated["val_loss"] == pytest.approx(scores["val_loss"])
    trained = run(worker, assignment(3, recalibrate=4))
    assert trained[1].metrics["val_loss"] != trained[0][-1].metrics["val_loss"]
    assert trained[1].metrics["train_loss"] == trained[0][-1].metrics["train_loss"]


@pytest.mark.parametrize(
    "wrong", [{"recalibrate": -1}, {"recalibrate": 1.0}, {"recalibrate": True}, {"budget": 0.0, "recalibrate": 2}]
)
def test_a_wrong_recalibration_is_refused(wrong):
    with pytest.raises(InvalidInputError, match="recalibrate"):
        Evaluate(SMALL, **wrong)


def test_recalibration_is_in_the_record_where_it_is_asked_for():
    assert proposal_to_json(Evaluate(SMALL, 0.0, 3, recalibrate=5))["recalibrate"] == 5
    assert "recalibrate" not in proposal_to_json(Evaluate(SMALL))

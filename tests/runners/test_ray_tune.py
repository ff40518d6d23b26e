"""One Ray for the whole module: two processors, no dashboard. Starting it takes longer than most of the tests."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from helpers import Drawn, InOrder, Ladder, Mlp, assert_same, climb, python

import nasplat
from nasplat import Latency, Study, Task, maximise, minimise, space_from
from nasplat.cost import Measurement
from nasplat.cost.bench import OWNED
from nasplat.cost.timing import Schedule
from nasplat.errors import InvalidInputError, NasplatError, UnsupportedError


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, resources={"board": 1})
    # Workers cannot import test modules; a user's script, which is __main__, travels in this way by itself.
    for name in (__name__, "helpers"):
        ray.cloudpickle.register_pickle_by_value(sys.modules[name])
    yield
    ray.shutdown()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "study"


def ladder(folder, function=climb, **changes):
    given = dict(
        space=Ladder(), strategy=InOrder(), task=Task.from_function(function), objectives=[maximise("val_accuracy")],
        folder=folder, tracker=None, progress=False,
    )  # fmt: skip
    return Study(**{**given, **changes})


def fails_at_one(genes):
    from torch import nn

    if genes["width"] == 1:
        raise ValueError("too narrow")
    return nn.Linear(4, genes["width"] + 3)


def trained(folder, task, **changes):
    given = dict(
        space=Mlp(), strategy=Drawn(), task=task, objectives=[maximise("val_accuracy"), minimise("params")],
        folder=folder, tracker=None, progress=False, seed=3,
    )  # fmt: skip
    return Study(**{**given, **changes})


@dataclass(frozen=True)
class Impatient(Drawn):
    def keep(self, trial, history):
        return len(trial.reports) < 1 or trial.number % 2 == 0


def test_one_worker_repeats_the_local_run_and_a_candidate_that_raises_fails(folder, blobs):
    space = space_from(fails_at_one, {"width": (1, 2, 3), "other": (1, 2, 3, 4)})
    given = dict(space=space, strategy=Impatient(), seed=2)
    local = trained(folder.with_name("local"), blobs, **given).run(max_trials=6).table()
    remote = trained(folder, blobs, **given).run(max_trials=6, workers=1).table()
    assert {"failed", "stopped", "complete"} == set(local.state)
    assert_same(remote, local)
    assert (remote[remote.state == "failed"].reason == "ValueError: too narrow").all()
    # Begun on Ray, continued here.
    more = trained(folder, blobs, **given).run(max_trials=8).table()
    assert_same(more, trained(folder.with_name("local"), blobs, **given).run(max_trials=8).table())
    assert not (folder / "ray").exists()


def test_two_workers_work_at_the_same_time_and_complete(folder):
    meeting = folder.with_name("meeting")
    meeting.mkdir()

    def meets(architecture, budget, seed):
        """Waits for another trial to run; alone, it would wait in vain."""
        (meeting / str(architecture.genes["x"])).touch()
        until = time.monotonic() + 60
        while len(list(meeting.iterdir())) < 2:
            if time.monotonic() > until:
                raise TimeoutError("alone")
            time.sleep(0.01)
        return {"val_accuracy": architecture.genes["x"] / 100}

    result = ladder(folder, meets).run(max_trials=6, workers=2)
    assert result.table().state.tolist() == ["complete"] * 6
    assert result.best.trial.number == 5
    assert nasplat.load(folder).table().val_accuracy.tolist() == [x / 100 for x in range(6)]


def counted(path: Path, name: object) -> int:
    """How often this was called with the name, this time included."""
    with (path / f"{name}").open("a") as file:
        file.write("x")
    return (path / f"{name}").stat().st_size


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_trial_one_retry(folder):
    calls = folder.with_name("calls")
    calls.mkdir()

    def dies(architecture, budget, seed):
        x = architecture.genes["x"]
        call = counted(calls, x)
        if x == 1 and call == 1:
            os._exit(1)
        if x == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"val_accuracy": x / 100}

    table = ladder(folder, dies, time_limit_s=300).run(max_trials=4, workers=1).table()
    assert table.state.tolist() == ["complete", "complete", "failed", "complete"]
    assert "worker died twice" in table.reason[2]
    assert {path.name: path.stat().st_size for path in calls.iterdir()} == {"0": 1, "1": 2, "2": 2, "3": 1}


@pytest.mark.slow
def test_a_hang_past_the_limit_is_killed_and_said(folder):
    calls = folder.with_name("calls")
    calls.mkdir()

    def hangs(architecture, budget, seed):
        x = architecture.genes["x"]
        counted(calls, x)
        if x == 0:
            time.sleep(600)
        if x == 1:
            pow(3, 10**9)  # in C, and does not let the interpreter go
        return {"val_accuracy": x / 100}

    table = ladder(folder, hangs, time_limit_s=2.0).run(max_trials=3, workers=2).table()
    assert table.state.tolist() == ["failed", "failed", "complete"]
    for number in (0, 1):
        assert table.reason[number] == "past its time limit of 2 s; its worker was killed"
    assert all(path.stat().st_size == 1 for path in calls.iterdir())  # not tried again
    assert "hangs" in nasplat.load(folder).trials[0].traceback


@dataclass(frozen=True)
class Breaks(InOrder):
    def propose(self, history, rng):
        if len(history) == 2:
            raise ZeroDivisionError("the strategy's own")
        return super().propose(history, rng)


@pytest.mark.slow
def test_an_error_of_the_strategy_reaches_the_user(folder):
    with pytest.raises(ZeroDivisionError, match="the strategy's own"):
        ladder(folder, strategy=Breaks()).run(max_trials=5, workers=1)
    assert nasplat.load(folder).table().state.tolist() == ["complete", "complete"]


def test_what_can_never_be_placed_is_refused_at_once(folder):
    with pytest.raises(NasplatError, match=r"Ray has 2 CPUs and 0 GPUs in all; ask for less"):
        ladder(folder).run(max_trials=2, workers=1, cpus_per_trial=64)


# The bench.

PROCESSORS = sorted(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Noting:
    """Measures as a meter of time does, and notes when and where in a file."""

    log: str
    label: str
    on: str | None = None
    trained = False

    @property
    def metrics(self):
        return (f"noted_{self.label}",)

    def measure(self, model, example, bench):
        def job(bench):
            def note(what):
                os.write(log, f"{what} {os.getpid()}\n".encode())

            log = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with bench.measuring() as processors:
                note("[")
                time.sleep(0.05)
                note("]")
            os.close(log)
            return processors

        processors = bench.run(job, self.on)
        facts = {"trains": sorted(os.sched_getaffinity(0)), "measures": list(processors), "worker": os.getpid()}
        return Measurement({f"noted_{self.label}": 1.0}, {}, {self.label: facts})


@pytest.mark.slow
def test_workers_measure_in_turn_on_one_bench_for_each_machine_and_train_beside_it(folder, blobs, monkeypatch):
    monkeypatch.setenv(OWNED, str(PROCESSORS[-1]) if len(PROCESSORS) > 1 else "")
    log = folder.with_name("log")
    meters = [Noting(str(log), "here"), Noting(str(log), "board", on="board")]
    result = trained(folder, blobs, meters=meters, retrain_duplicates=True).run(max_trials=4, workers=2)
    assert result.table().state.tolist() == ["complete"] * 4
    lines = [line.split() for line in log.read_text().splitlines()]
    assert [what for what, _ in lines] == ["[", "]"] * 8  # never within another, of the other machine's name neither
    assert all(begin == end for (_, begin), (_, end) in zip(lines[::2], lines[1::2], strict=True))
    facts = [trial.facts[label] for trial in result.trials for label in ("here", "board")]
    benches = {int(process) for _, process in lines}
    assert len(benches) == 2 and benches.isdisjoint(fact["worker"] for fact in facts)
    if len(PROCESSORS) > 1:
        assert all(fact["measures"] == PROCESSORS[-1:] and fact["trains"] == PROCESSORS[:-1] for fact in facts)
    until = time.monotonic() + 30
    while any(Path(f"/proc/{process}").exists() for process in benches) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{process}").exists() for process in benches)  # the run took them with it


def test_a_machine_that_no_node_has_is_refused_before_any_trial(folder, blobs):
    meters = [Noting(str(folder.with_name("log")), "there", on="rpi5")]
    with pytest.raises(
        InvalidInputError, match=r"on='rpi5'.*there are: CPU, board\. .*ray start --address.*\{\"rpi5\": 1\}"
    ):
        trained(folder, blobs, meters=meters).run(max_trials=1, workers=1)
    assert nasplat.load(folder).table().empty


@dataclass(frozen=True)
class Hard:
    """Measures the number of outputs; some do not go well."""

    calls: str
    metrics = ("outputs",)
    trained = False

    def measure(self, model, example, bench):
        outputs = model(example).shape[1]

        def job(bench):
            call = counted(Path(self.calls), outputs)
            with bench.measuring():
                if outputs == 4:
                    raise UnsupportedError("four is too many")
                if outputs == 5 and call == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                if outputs == 6:
                    os._exit(1)
                if outputs == 7:
                    pow(3, 10**9)  # in C, and does not let the interpreter go
            return outputs

        return Measurement({"outputs": float(bench.run(job))})


def outputs(genes):
    from torch import nn

    return nn.Linear(4, genes["outputs"])


@dataclass(frozen=True)
class Counting:
    """Proposes every architecture of a space of one choice, in order."""

    def propose(self, history, rng):
        space = history.space
        ((name, options),) = space.choices.items()
        return nasplat.Evaluate(space.architecture({name: options[len(history)]}))


def hard(folder, blobs, options, **changes):
    calls = folder.with_name("calls")
    calls.mkdir()
    space = space_from(outputs, {"outputs": options})
    study = trained(folder, blobs, space=space, strategy=Counting(), meters=[Hard(str(calls))], **changes)
    return study.run(max_trials=len(options), workers=1), calls


@pytest.mark.slow
def test_what_a_measurement_raises_arrives_as_it_was(folder, blobs):
    result, calls = hard(folder, blobs, (4, 3))
    table = result.table()
    assert table.state.tolist() == ["failed", "complete"]
    assert table.reason[0] == "UnsupportedError: four is too many"
    assert "On the bench, " in result.trials[0].traceback and "in job" in result.trials[0].traceback
    assert table.outputs[1] == 3
    assert {path.name: path.stat().st_size for path in calls.iterdir()} == {"4": 1, "3": 1}


@pytest.mark.slow
def test_a_bench_that_dies_measures_again_once_and_one_that_hangs_is_not_kept(folder, blobs):
    result, calls = hard(folder, blobs, (5, 6, 7, 3), time_limit_s=60.0)
    table = result.table()
    assert table.state.tolist() == ["complete", "failed", "failed", "complete"]
    assert table.reason[1].startswith("NasplatError: the bench died twice while it measured")
    assert table.reason[2] == "past its time limit of 60 s; its worker was killed"
    assert {name: (calls / name).stat().st_size for name in "563"} == {"5": 2, "6": 2, "3": 1}


def test_a_study_that_minimises_latency(folder, blobs):
    meter = Latency(schedule=Schedule(blocks=2, seconds=0.0, patience_s=0.05))
    given = dict(meters=[meter], objectives=[maximise("val_accuracy"), minimise("latency_ms")])
    result = trained(folder, blobs, **given).run(max_trials=3, workers=2)
    table = result.table()
    assert table.state.tolist() == ["complete"] * 3 and (table.latency_ms > 0).all()
    assert all(trial.facts["latency_ms"]["machine"] for trial in result.trials)


SCRIPT = """
import os, signal, sys, threading, time
from helpers import InOrder, Ladder
from nasplat import SearchInterrupted, Study, Task, maximise

marker = sys.argv[1] + ".at2"

def slow(architecture, budget, seed):
    x = architecture.genes["x"]
    if x == 2:
        open(marker, "w").close()
        time.sleep(600)
    return {"val_accuracy": x / 100}

def interrupt():
    while not os.path.exists(marker):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
study = Study(Ladder(), InOrder(), Task.from_function(slow), [maximise("val_accuracy")], folder=sys.argv[1],
              tracker=None, progress=False)
try:
    study.run(max_trials=4, workers=1)
except SearchInterrupted as error:
    print("interrupted:", error, flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_ends_the_run_and_the_folder_goes_on(folder):
    process = python(SCRIPT, folder)  # with a Ray of its own
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "interrupted: interrupted; 2 trials are in" in out
    table = nasplat.load(folder).table()
    assert table.state.tolist() == ["complete", "complete", "running"]


def test_an_address_where_nothing_answers_is_refused_at_once():
    from nasplat.runners.ray_tune import _check_reachable

    with pytest.raises(NasplatError, match=r"nothing answers at RAY_ADDRESS=127\.0\.0\.1:9"):
        _check_reachable("127.0.0.1:9")
    _check_reachable("auto")


CLUSTER = """
import os, sys
from dataclasses import dataclass
import ray
from ray.cluster_utils import Cluster
from helpers import Drawn, Mlp
from nasplat import Study, Task, maximise, space_from
from nasplat.cost import Measurement
from strategies import RandomSearch
import torch

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1, resources={"bench": 1})
board = cluster.add_node(num_cpus=0, resources={"rpi5": 1})
os.environ["RAY_ADDRESS"] = cluster.address
space = space_from(lambda genes: None, {"width": tuple(range(8))})


def evaluate(architecture, budget, seed):
    return {"val_accuracy": architecture.genes["width"] / 10}


study = Study(space, RandomSearch(), Task.from_function(evaluate), [maximise("val_accuracy")],
              folder=sys.argv[1], tracker=None, progress=False)
print(len(study.run(6, workers=2).history.scored()), "trials")


@dataclass(frozen=True)
class Node:
    on: str | None = None
    trained = False

    @property
    def metrics(self):
        return (f"node_{self.on}",)

    def measure(self, model, example, bench):
        def job(bench):
            return [node["Resources"] for node in ray.nodes()
                    if node["NodeID"] == ray.get_runtime_context().get_node_id()][0]
        resources = bench.run(job, self.on)
        return Measurement({f"node_{self.on}": 1.0}, {}, {f"node_{self.on}": sorted(resources)})


task = Task.from_tensors(torch.randn(60, 4), torch.arange(60) % 3, epochs=1, batch_size=32, name="noise")
study = Study(Mlp(), Drawn(), task, [maximise("val_accuracy")], meters=[Node(), Node("rpi5")],
              folder=sys.argv[1] + "-measured", tracker=None, progress=False)
for trial in study.run(2, workers=2).trials:
    print("rpi5" in trial.facts["node_rpi5"], "bench" in trial.facts["node_None"])
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_cluster_of_two_nodes_through_its_address(tmp_path):
    process = python(CLUSTER, tmp_path / "cluster")
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert out.splitlines() == ["6 trials", "True True", "True True"]

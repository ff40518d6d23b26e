"""Limits that are a percentage of a baseline network."""

from __future__ import annotations

import json
import signal
import time
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers import Drawn, Ladder, Mlp, climb, python
from torch import nn

import nasplat
from nasplat import Count, NasplatWarning, Study, Task, at_least, at_most, journal, maximise
from nasplat.cost.meter import Measurement
from nasplat.errors import ArchitectureError, InvalidInputError, UnsupportedError
from nasplat.objectives import Constraint, RelativeConstraint, constraint_from_json

WIDEST = {"width": 16, "depth": 2, "act": "relu", "norm": False}
"""4 x 16 + 16, 16 x 16 + 16, 16 x 3 + 3: 403 parameters."""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "study"


def study(folder, task, **changes):
    given = dict(
        space=Mlp(), strategy=Drawn(), task=task, objectives=[maximise("val_accuracy")],
        constraints=[at_most("params", "60%")], baselines={"reference": WIDEST}, folder=folder, tracker=None,
        progress=False,
    )  # fmt: skip
    return Study(**{**given, **changes})


def reference():
    """A network of no space: 4 x 100 + 100 parameters in its first layer, and 100 x 3 + 3."""
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 3))


@dataclass(frozen=True)
class Drifting:
    """Each reading is another one; ``calls`` counts them."""

    suspect: tuple[float, ...] = (0.0,)

    metrics = ("effort_ms", "effort_ms_suspect")
    trained = False
    calls: ClassVar[list[float]] = []

    def measure(self, model, example, bench):
        number = len(self.calls)
        value = 10.0 - number
        self.calls.append(value)
        return Measurement({"effort_ms": value, "effort_ms_suspect": self.suspect[min(number, len(self.suspect) - 1)]})


@pytest.fixture(autouse=True)
def no_calls():
    Drifting.calls.clear()


def lines(folder, kind):
    return [event for event in journal.read(folder)[0] if event["event"] == kind]


# In words.


@pytest.mark.parametrize(("text", "share"), [("60%", 0.6), ("60 %", 0.6), (" 120.5% ", 1.205), (".5%", 0.005)])
def test_a_percentage_is_a_share(text, share):
    limit = at_most("latency_ms", text, of="reference")
    assert limit == RelativeConstraint("latency_ms", share, "at_most", "reference")
    assert limit.resolved(2.0).bound == share * 2.0


@pytest.mark.parametrize("text", ["60", "%", "-5%", "0%", "nan%", "60%%", "a%", "60% of it", "", "1e999%"])
def test_what_is_no_percentage_is_refused(text):
    with pytest.raises(InvalidInputError, match=r"legal: a number in the metric's unit"):
        at_least("params", text)


def test_a_number_has_no_baseline():
    with pytest.raises(InvalidInputError, match="written as text: '60%'"):
        at_most("params", 0.6, of="reference")  # type: ignore[call-overload]


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_no_share_of_a_negative_value(value):
    with pytest.raises(InvalidInputError, match="no share can be taken"):
        at_most("score", "60%", of="reference").resolved(value)


def test_a_relative_limit_reads_well_and_travels_as_json():
    limit = at_most("latency_ms", "60%", of="reference")
    assert str(limit) == "latency_ms at most 60% of reference"
    found = limit.resolved(2.05)
    assert str(found) == "latency_ms at most 60% of reference (1.23 ms)"
    assert str(at_least("params", "28%", of="a").resolved(1000.0)) == "params at least 28% of a (280)"
    assert found.wish == limit and at_most("params", 3).wish == at_most("params", 3)
    for wish in (limit, found, at_most("params", 3)):
        assert constraint_from_json(json.loads(json.dumps(wish.to_json()))) == wish
    assert at_most("params", 3).to_json() == {"metric": "params", "bound": 3.0, "sense": "at_most"}


# What is refused.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"baselines": None}, r"say which one with of='...'; there are: none. Study\(baselines="),
        ({"baselines": {"a": WIDEST, "b": WIDEST}}, "there are: 'a', 'b'"),
        ({"constraints": [at_most("params", "60%", of="b")]}, "no baseline 'b'; there are: 'reference'"),
        ({"constraints": [at_least("val_accuracy", "90%")]}, "known without training; there are: params"),
        ({"constraints": [at_most("train_seconds", "90%")]}, "known without training"),
        ({"baselines": {"reference": reference()}}, "give a function without arguments that makes it"),
        ({"baselines": {"reference": 3}}, "an architecture of the space, its genes, or a function"),
        ({"baselines": {"": WIDEST}}, "a text is needed"),
        ({"baselines": [WIDEST]}, "networks by name are needed"),
        ({"baselines": {"reference": Ladder().architecture({"x": 1})}}, "this study searches Mlp"),
    ],
)
def test_wrong_baselines_are_refused_before_anything_is_written(folder, blobs, changes, says):
    with pytest.raises(InvalidInputError, match=says):
        study(folder, blobs, **changes)
    assert not folder.exists()


def test_genes_of_no_architecture_are_refused(folder, blobs):
    with pytest.raises(ArchitectureError):
        study(folder, blobs, baselines={"reference": {"width": 3}})


def test_a_function_task_without_meters_has_no_relative_limits(folder):
    with pytest.raises(InvalidInputError, match="there are: none"):
        study(
            folder, Task.from_function(climb), space=Ladder(), constraints=[at_most("size", "60%")],
            baselines={"reference": {"x": 5}},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("network", "says"),
    [(lambda: 3, "gives 3; a torch.nn.Module is needed"), (lambda: 1 / 0, "ZeroDivisionError: division by zero")],
)
def test_a_baseline_that_cannot_be_built_ends_the_run_before_the_first_trial(folder, blobs, network, says):
    with pytest.raises(UnsupportedError, match=f"the baseline 'reference' .*{says}"):
        study(folder, blobs, baselines={"reference": network}).run(max_trials=2)
    assert not lines(folder, "start") and not lines(folder, "session")


# What holds.


@pytest.mark.parametrize(("network", "params"), [(WIDEST, 403), (Mlp().architecture(WIDEST), 403), (reference, 803)])
def test_the_limit_is_that_share_of_the_baseline_from_the_first_trial_on(folder, blobs, network, params):
    result = study(folder, blobs, baselines={"reference": network}).run(max_trials=4)
    (limit,) = result.history.constraints
    assert limit == Constraint("params", 0.6 * params, "at_most", 0.6, "reference")
    table = result.table()
    assert ((table.params <= 0.6 * params) == (table.state != "infeasible")).all()
    assert nasplat.load(folder, space=Mlp()).history.constraints == (limit,)
    (event,) = lines(folder, "baseline")
    assert event["metrics"]["params"] == params and event["name"] == "reference"
    assert [session["constraints"] for session in lines(folder, "session")] == [[limit.to_json()]]
    order = [event["event"] for event in journal.read(folder)[0]]
    assert order[:4] == ["study", "baseline", "session", "start"]


def test_measuring_a_baseline_leaves_the_trials_and_the_generators_alone(folder, tmp_path, blobs):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a = study(folder, blobs).run(max_trials=3).table()
    assert torch.equal(before, torch.get_rng_state())
    b = study(tmp_path / "b", blobs, baselines=None, constraints=[at_most("params", 0.6 * 403)]).run(max_trials=3)
    assert a.val_accuracy.equals(b.table().val_accuracy)


def test_a_resumed_study_measures_nothing_again_and_has_the_same_bound(folder, blobs):
    given = {"meters": [Count(), Drifting()], "constraints": [at_most("effort_ms", "90%")]}
    first = study(folder, blobs, **given).run(max_trials=1)
    assert first.history.constraints[0].bound == 0.9 * 10.0
    calls = len(Drifting.calls)
    again = study(folder, blobs, **given).run(max_trials=1)
    assert len(Drifting.calls) == calls
    assert again.history.constraints == first.history.constraints
    assert len(lines(folder, "baseline")) == 1
    # Another share of the same baseline, also under another name: from the record.
    other = {**given, "constraints": [at_least("effort_ms", "5%")], "baselines": {"other": WIDEST}}
    assert study(folder, blobs, **other).run(max_trials=1).history.constraints[0].bound == 0.05 * 10.0
    assert len(Drifting.calls) == calls
    # Another network is another baseline.
    study(folder, blobs, **{**given, "baselines": {"reference": {**WIDEST, "width": 8}}}).run(max_trials=1)
    assert len(Drifting.calls) == calls + 1 and len(lines(folder, "baseline")) == 2


def test_another_meter_measures_again(folder, blobs):
    study(folder, blobs, meters=[Drifting()], constraints=[at_most("effort_ms", "90%")]).run(max_trials=0)
    study(folder, blobs, meters=[Drifting((0.0, 0.0))], constraints=[at_most("effort_ms", "90%")]).run(max_trials=0)
    assert [event["metrics"]["effort_ms"] for event in lines(folder, "baseline")] == [10.0, 9.0]


def test_a_suspect_measurement_is_repeated(folder, blobs):
    given = {"constraints": [at_most("effort_ms", "100%")], "meters": [Count(), Drifting((1.0, 1.0, 0.0))]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", NasplatWarning)
        result = study(folder, blobs, **given).run(max_trials=0)
    assert result.history.constraints[0].bound == 8.0


def test_a_baseline_that_stays_suspect_warns(folder, blobs):
    given = {"constraints": [at_most("effort_ms", "100%")], "meters": [Count(), Drifting((1.0,))]}
    with pytest.warns(NasplatWarning, match="'reference' was measured 3 times on a disturbed machine"):
        result = study(folder, blobs, **given).run(max_trials=0)
    assert result.history.constraints[0].bound == 8.0 and len(Drifting.calls) == 3


def test_a_limit_without_its_script_goes_on_from_the_record(folder, blobs):
    study(folder, blobs, baselines={"reference": reference}).run(max_trials=1)
    description = lines(folder, "session")[-1]["baselines"]["reference"]
    again = nasplat.baselines.from_description(description)
    limits = study(folder, blobs, baselines={"reference": again}).limits()
    assert limits == ([at_most("params", "60%", of="reference").resolved(803)], [])
    with pytest.raises(UnsupportedError, match="lives in the script"):
        again()


def test_evaluate_and_enqueue_know_the_limit(folder, blobs):
    own = study(folder, blobs)
    own.enqueue(Mlp().architecture(WIDEST))
    assert not lines(folder, "baseline")
    small = Mlp().architecture({**WIDEST, "width": 2})
    assert own.evaluate(small).state == "complete"
    assert [trial.state for trial in own.result().trials] == ["infeasible", "complete"]


def test_a_tracker_is_told_the_bound(folder, blobs):
    class Told:
        """Keeps what it is told of the study."""

        constraints = ""

        def start(self, study):
            self.constraints = study.parameters["constraints"]
            return set()

        def log(self, trial):
            """Nothing."""

        def artifact(self, path, folder=""):
            """Nothing."""

        def end(self, state):
            """Nothing."""

        def where(self, study):
            return ""

    tracker = Told()
    study(folder, blobs, tracker=tracker).run(max_trials=0)
    assert tracker.constraints == "params at most 60% of reference (241.8)"


SCRIPT = """
import sys
from dataclasses import dataclass
import torch
from helpers import Drawn, Mlp
from nasplat import Study, Task, at_most, maximise
from nasplat.cost.meter import Measurement

@dataclass(frozen=True)
class Clock:
    metrics = ("clock_ms",)
    trained = False
    def measure(self, model, example, bench):
        import time
        return Measurement({"clock_ms": time.time() % 1e6})

generator = torch.Generator().manual_seed(0)
y = torch.arange(200) % 3
x = torch.randn(200, 4, generator=generator)
task = Task.from_tensors(x, y, epochs=2, batch_size=32, name="blobs")
study = Study(
    space=Mlp(), strategy=Drawn(), task=task, objectives=[maximise("val_accuracy")], meters=[Clock()],
    constraints=[at_most("clock_ms", "150%")], baselines={"reference": {"width": 16, "depth": 2, "act": "relu",
    "norm": False}}, folder=sys.argv[1], tracker=None, progress=False,
)
print(repr(study.run(max_trials=int(sys.argv[2])).history.constraints[0].bound))
"""


@pytest.mark.parametrize("kept", [2, 3, 4, 6])
def test_from_any_line_of_the_journal_on_the_bound_is_the_same(folder, blobs, kept):
    given = {"meters": [Count(), Drifting()], "constraints": [at_most("effort_ms", "90%")]}
    bound = study(folder, blobs, **given).run(max_trials=2).history.constraints[0].bound
    path = folder / journal.FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))  # what a kill there leaves
    result = study(folder, blobs, **given).run(max_trials=2)
    assert result.history.constraints[0].bound == bound == 9.0
    assert len(lines(folder, "baseline")) == 1


@pytest.mark.slow
def test_a_killed_study_goes_on_with_the_same_bound(folder):
    process = python(SCRIPT, folder, 10**4)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (folder.exists() and len(lines(folder, "finish")) >= 2):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close(), process.stderr.close()
    (event,) = lines(folder, "baseline")
    again = python(SCRIPT, folder, 1)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert float(out) == 1.5 * event["metrics"]["clock_ms"]
    assert len(lines(folder, "baseline")) == 1
    bounds = {session["constraints"][0]["bound"] for session in lines(folder, "session")}
    assert bounds == {1.5 * event["metrics"]["clock_ms"]}


def test_arms_of_a_comparison_are_held_to_one_limit(folder, blobs):
    with pytest.raises(UnsupportedError, match="Give all of them one limit in numbers"):
        nasplat.compare(
            {"a": Drawn()}, space=Mlp(), task=blobs, objectives=[maximise("val_accuracy")], seeds=[0], budget=2,
            folder=folder, constraints=[at_most("params", "60%")], baselines={"reference": WIDEST}, tracker=None,
            progress=False,
        )  # fmt: skip

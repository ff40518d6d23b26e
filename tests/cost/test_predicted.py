"""Predicted costs: accuracy, step tables, the meter, and the command that makes tables."""

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from nasplat import Latency, Study, Task, cli, maximise
from nasplat.cost import (
    Accuracy,
    Bench,
    CostTable,
    Measurement,
    Predicted,
    Resource,
    StepTable,
    load_table,
    prediction_quality,
)
from nasplat.cost import predicted as predicted_module
from nasplat.cost.readings import Readings
from nasplat.cost.step_estimates import StepEstimates
from nasplat.cost.timing import Schedule
from nasplat.errors import InvalidInputError, NasplatWarning, UnsupportedError
from nasplat.identity import describe, restore
from nasplat.nn import BinaryBlock
from nasplat.packed import pack
from nasplat.packed.steps import step_keys, step_kind, timed_steps
from nasplat.restorable import restorable
from nasplat.space import SearchSpace, space_from
from nasplat.testing.strategy_contract import RecordingContext, explore
from search_spaces import MetaKernel
from strategies import Darts, RandomSearch

QUICK = Schedule(blocks=2, seconds=0.0, patience_s=0.05)
X = torch.zeros(1, 1, 8, 8)


# Accuracy.


def test_accuracy_of_a_known_case():
    measured = [1.0, 2.0, 4.0, 8.0]
    accuracy = Accuracy.of([2.0, 4.0, 8.0, 16.0], measured)
    assert (accuracy.n, accuracy.kendall_tau, accuracy.spearman) == (4, pytest.approx(1), pytest.approx(1))
    assert accuracy.median_relative_error == pytest.approx(1.0) and accuracy.bias == pytest.approx(1.0)
    assert accuracy.calibration == pytest.approx(0.5)
    swapped = Accuracy.of([1.0, 2.0, 8.0, 4.0], measured)
    assert swapped.kendall_tau == pytest.approx(2 / 3) and swapped.spearman == pytest.approx(0.8)
    assert swapped.median_relative_error == pytest.approx(0.25)
    # Sorted relative errors 0, 0, 0.5, 1: nine tenths of the way to the last.
    assert swapped.p90_relative_error == pytest.approx(0.5 + 0.7 * 0.5)
    flat = Accuracy.of([1.0, 1.0], [1.0, 3.0])
    assert (flat.kendall_tau, flat.spearman, flat.calibration) == (0, 0, 1)
    assert accuracy.metrics("latency_ms")["prediction/latency_ms/calibration"] == pytest.approx(0.5)
    for wrong in (([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, float("nan")], [1.0, 2.0])):
        with pytest.raises(InvalidInputError, match="two or more finite"):
            Accuracy.of(*wrong)


# Tables of choices that are measured.


def linear(genes):
    layers = [nn.Flatten(), nn.Linear(64, genes["width"]), nn.Linear(genes["width"], 4)]
    return nn.Sequential(*layers, *(nn.Linear(4, 4) for _ in range(genes["depth"])))


SPACE = space_from(linear, {"width": (2, 5, 9), "depth": (0, 1, 3)})


@dataclass(frozen=True)
class Counting:
    """Milliseconds that are parameters, times a factor. Counts its calls in a list that it does not own."""

    factor: float = 1.0

    trained = False
    metrics = ("latency_ms", "latency_ms_mad")

    def measure(self, model, example, bench):
        CALLS.append(1)
        value = self.factor * (10.0 + sum(p.numel() for p in model.parameters()))
        return Measurement(
            {"latency_ms": value, "latency_ms_mad": 0.5},
            facts={"latency_ms": {"runtime": "count", "threads": 1, "load": 3.0, "processors": [0, 1]}},
        )


CALLS: list[int] = []


@pytest.fixture(scope="module")
def choices():
    return CostTable.measured(SPACE, X, Counting(), bench=Bench())


def test_a_measured_table_says_how_it_was_made(choices, tmp_path):
    assert choices.accuracy.n == 20 and choices.accuracy.spearman == pytest.approx(1)
    assert choices.facts["runtime"] == "count" and choices.facts["input"] == "1x8x8"
    assert choices.facts["build_seconds"] >= 0 and choices.facts["candidates"] >= 25
    assert "load" not in choices.facts and "processors" not in choices.facts
    again = load_table(choices.save(tmp_path / "table.json"))
    assert again == choices and hash(again) == hash(choices)
    assert restore(json.loads(json.dumps(describe(choices))), restorable()) == choices


def test_tables_of_the_first_version_are_read(choices, tmp_path):
    record = json.loads(choices.save(tmp_path / "table.json").read_text())
    record["nasplat_cost_table"] = 1
    del record["accuracy"], record["facts"]
    (tmp_path / "old.json").write_text(json.dumps(record))
    old = CostTable.load(tmp_path / "old.json")
    assert old.accuracy is None and old.terms == choices.terms
    assert Predicted(Counting(), old).error == old.error


def test_an_interrupted_building_goes_on_where_it_was(choices, tmp_path, monkeypatch):
    file = tmp_path / "readings.jsonl"
    meter, measured = Counting(), Counting.measure

    def interrupted(self, *given):
        if len(CALLS) == 10:
            raise KeyboardInterrupt
        return measured(self, *given)

    CALLS.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Counting, "measure", interrupted)
        CostTable.measured(SPACE, X, meter, readings=file)
    assert sum("value" in json.loads(line) for line in file.read_text().splitlines()) == 10
    with file.open("a") as torn:
        torn.write('{"name": "a", "val')
    with pytest.raises(InvalidInputError, match="holds readings of"):
        CostTable.measured(SPACE, X, Counting(factor=2.0), readings=file)
    CALLS.clear()
    table = CostTable.measured(SPACE, X, meter, readings=file)
    assert len(CALLS) == table.facts["candidates"] - 10
    assert table.terms == choices.terms and table.facts["runtime"] == "count"


def test_held_out_is_checked():
    with pytest.raises(InvalidInputError, match="held_out is 19; legal: an integer from 20 up"):
        CostTable.measured(SPACE, X, Counting(), held_out=19)
    with pytest.raises(InvalidInputError, match="held_out is 5"):
        StepTable.measured(SPACE, X, Counting(), held_out=5)


def test_readings_keep_every_number(tmp_path):
    file = tmp_path / "sub" / "r.jsonl"
    first = Readings(file, {"space": "a"})
    first.describe({"runtime": "x"})
    first.add("k", 1.5)
    first.add("k", 2.5)
    again = Readings(file, {"space": "a"})
    assert again["k"] == [1.5, 2.5] and again["other"] == [] and again.facts == {"runtime": "x"} and len(again) == 2
    assert again.seconds >= 0
    with pytest.raises(InvalidInputError, match="holds readings of"):
        Readings(file, {"space": "b"})
    file.write_text(file.read_text() + "nonsense\n")
    with pytest.raises(InvalidInputError, match="line 5, is no reading"):
        Readings(file, {"space": "a"})


# Tables of steps.


@dataclass(frozen=True)
class Blocks(SearchSpace):
    """Up to two binary blocks of one kernel; the second reads what the first one does, and shares its bits."""

    widths: tuple[int, ...] = (4, 8)

    @property
    def choices(self):
        return {"width": self.widths, "kernel": (1, 3), "twice": (False, True)}

    def build(self, architecture):
        return BlocksNetwork(**architecture.genes)


class BlocksNetwork(nn.Module):
    def __init__(self, width, kernel, twice):
        super().__init__()
        self.kernel = kernel
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(BinaryBlock(width, width, kernel) for _ in range(1 + twice))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(sum(block(x) for block in self.blocks).mean((2, 3)))


def packed(**genes):
    return pack(BlocksNetwork(**genes).eval(), X)


def test_steps_of_one_key_do_the_same_work():
    torch.manual_seed(0)
    one, other = (step_keys(packed(width=8, kernel=3, twice=True)) for _ in range(2))
    assert one == other  # other weights
    kinds = [step_kind(key) for key in one]
    assert sum(kind.startswith("CONV") for kind in kinds) == 3
    single = step_keys(packed(width=8, kernel=3, twice=False))
    # The second block comes with a sum fused into it, and no packing of its own.
    assert set(single) < set(one) and len(one) == len(single) + 1
    assert not set(step_keys(packed(width=4, kernel=3, twice=False))) & {k for k in single if "CONV" in k}
    assert set(step_keys(packed(width=8, kernel=1, twice=False))) != set(single)


def test_all_steps_of_a_program_are_timed():
    program = packed(width=8, kernel=3, twice=True)
    timed = timed_steps(program)
    assert timed.keys() == set(step_keys(program)) and all(0 <= value < 1000 for value in timed.values())
    assert sum(timed.values()) > 0


@dataclass(frozen=True)
class Work:
    """Milliseconds that are the bit-operations and the steps of the packed program: a sum over its steps."""

    trained = False
    metrics = ("latency_ms",)

    def measure(self, model, example, bench):
        return Measurement({"latency_ms": work(model)}, facts={"latency_ms": {"runtime": "packed"}})


def work(model):
    return _work(model.head.in_features, model.kernel, len(model.blocks))


@cache
def _work(width, kernel, blocks):
    return 1e-4 + sum(map(cost_of, step_keys(packed(width=width, kernel=kernel, twice=blocks == 2))))


def cost_of(key):
    numbers = [int(number) for number in re.findall(r"=(\d+)", key)]
    return 1e-6 * sum(numbers)


def costs_of_steps(program):
    return {key: cost_of(key) for key in step_keys(program)}


@pytest.fixture(scope="module")
def steps():
    """A table whose times are those of ``cost_of``, so that nothing depends on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nasplat.cost.steps.timed_steps", costs_of_steps)
        return StepTable.measured(Blocks(), X, Work(), fitted=8)


def test_what_is_a_sum_over_steps_is_predicted(steps):
    assert steps.accuracy.n == 20 and steps.facts["covered"] == 1 and steps.facts["steps"] == len(steps.steps)
    assert steps.accuracy.median_relative_error < 0.01
    for architecture in Blocks().enumerate():
        model = Blocks().build(architecture).eval()
        assert steps.predict(architecture, model, X) == pytest.approx(work(model), rel=0.01)


def test_the_network_is_left_as_it_was(steps):
    architecture = next(iter(Blocks().enumerate()))
    model = Blocks().build(architecture).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert steps.predict(architecture, model, X) is not None
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_scales_are_found_where_steps_take_longer_among_others(steps):
    """The times of single steps are three times too short: the whole networks say so."""

    class Thrice(Work):
        def measure(self, model, example, bench):
            return Measurement({"latency_ms": 3 * work(model)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nasplat.cost.steps.timed_steps", costs_of_steps)
        table = StepTable.measured(Blocks(), X, Thrice(), fitted=8)
    assert table.accuracy.median_relative_error < 0.01
    assert dict(table.scales)["CONV real"] == pytest.approx(3, rel=0.2)


def test_the_additive_table_of_a_step_table(steps):
    additive = steps.table(Blocks(), X)
    assert additive.metric == "latency_ms" and additive.facts["of"] == "step table"
    assert additive.accuracy.spearman > 0.9
    # Kernel and second block multiply, which a sum over choices cannot say, and steps can.
    assert additive.accuracy.median_relative_error > steps.accuracy.median_relative_error
    relaxed = Blocks().relax(next(iter(Blocks().enumerate())))
    assert torch.isfinite(Resource(additive, 0.001).loss(relaxed))
    with pytest.raises(InvalidInputError, match="has no times for"):
        steps.table(Blocks(widths=(4, 16)), X)


def test_a_network_of_unknown_steps_is_not_predicted(steps):
    architecture = next(iter(Blocks().enumerate()))
    other = BlocksNetwork(width=16, kernel=3, twice=False).eval()
    assert steps.predict(architecture, other, X) is None
    with pytest.raises(InvalidInputError, match=r"made for inputs 1x8x8; this one is 1x16x16"):
        steps.predict(architecture, other, torch.zeros(1, 1, 16, 16))
    with pytest.raises(InvalidInputError, match="has no times for"):
        steps.predict(next(iter(Blocks(widths=(4, 16)).enumerate())), other, X)


def test_unknown_steps_are_estimated_if_they_are_less_than_half(steps):
    architecture = next(one for one in Blocks().enumerate() if list(one.genes.values()) == [8, 3, True])
    model = Blocks().build(architecture).eval()
    keys = step_keys(pack(model, X))
    packing, *convolutions = (
        next(key for key in keys if key.startswith(kind)) for kind in ("PACK lookup", "CONV lookup", "CONV real")
    )

    def without(*lacking):
        return replace(steps, steps=tuple(pair for pair in steps.steps if pair[0] not in lacking))

    given = without(packing).predict(architecture, model, X)
    assert given == pytest.approx(work(model), rel=0.03) and given != steps.predict(architecture, model, X)
    assert sum(map(cost_of, convolutions)) > 0.5 * work(model)
    assert without(*convolutions).predict(architecture, model, X) is None


def test_a_step_is_estimated_from_those_of_its_kind_by_its_sizes():
    def key(channels, size):
        return f"CONV lookup channels={channels} height={size} width={size} with=pick"

    times = {key(c, s): 1e-6 * c * s**2 for c in (8, 16, 32, 64) for s in (4, 8, 16)}
    estimates = StepEstimates({**times, "POOL height=4": 3e-6, "POOL height=8": 0.0})
    assert estimates(key(24, 8)) == pytest.approx(1e-6 * 24 * 64, rel=0.1)
    assert estimates(key(48, 12)) == pytest.approx(1e-6 * 48 * 144, rel=0.1)
    assert estimates(key(10**6, 10**6)) == pytest.approx(2 * max(times.values()))  # no further than that
    assert estimates("CONV popcount channels=8") == max(times.values())  # of a kind that was never timed
    assert estimates("POOL height=6") == 3e-6  # of too few to learn from


def test_step_tables_come_back_equal(steps, tmp_path):
    file = steps.save(tmp_path / "steps.json")
    assert StepTable.load(file) == load_table(file) == steps
    assert restore(json.loads(json.dumps(describe(steps))), restorable()) == steps
    assert len(repr(steps)) < 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a cost table"),
        ("{", "not a table of costs"),
        ('{"nasplat_step_table": 7}', "version 7; legal: 1"),
        ('{"nasplat_step_table": 1, "metric": "x"}', "not a step table"),
    ],
)
def test_bad_files_say_so(tmp_path, text, message):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(InvalidInputError, match=message):
        load_table(tmp_path / "t.json")
    with pytest.raises(InvalidInputError, match="no table of costs at"):
        load_table(tmp_path / "absent.json")


def test_bad_step_tables_say_so(steps):
    with pytest.raises(InvalidInputError, match="must be finite"):
        replace(steps, constant=float("nan"))
    with pytest.raises(InvalidInputError, match="no scale for"):
        replace(steps, scales=steps.scales[1:])
    with pytest.raises(InvalidInputError, match="fitted is 3"):
        StepTable.measured(Blocks(), X, Work(), fitted=3)
    with pytest.raises(InvalidInputError, match="does not give 'speed'"):
        StepTable.measured(Blocks(), X, Work(), "speed")
    with pytest.raises(UnsupportedError, match="no binary layer"):
        StepTable.measured(SPACE, X, Counting())


def test_a_measured_table_pulls_the_search_of_meta_kernels_down():
    space = MetaKernel.small(
        stages=((4, 1, 1), (8, 1, 2)), stem_channels=4, first_channels=4, head_channels=8, expansions=(2, 3)
    )
    table = CostTable.measured(space, X, Counting())
    expected = {}
    for weight in (0.0, 10.0):
        reports = []
        resource = Resource(table, table.constant, weight=weight)
        explorer = Darts(epochs=2, batch_size=16, alpha_lr=0.2, resource=resource)
        explore(explorer, space, Task.digits(limit=64), RecordingContext(), reports)
        expected[weight] = reports[-1].metrics["expected_latency_ms"]
    assert expected[10.0] < expected[0.0]


# The meter.


def measure(meter, architecture):
    return meter.measure_architecture(architecture, SPACE.build(architecture).eval(), X, Bench())


def test_predicts_and_checks_a_fixed_share(choices):
    meter = Predicted(Counting(factor=2.0), choices, tolerance=0.1, checked=0.5)
    checked = 0
    for architecture in SPACE.enumerate():
        CALLS.clear()
        found = measure(meter, architecture)
        parameters = 10 + sum(p.numel() for p in SPACE.build(architecture).parameters())
        assert found.values["latency_ms_predicted"] == pytest.approx(parameters)
        if meter.is_checked(architecture):
            checked += 1
            assert len(CALLS) == 1 and found.values["latency_ms"] == pytest.approx(2 * parameters)
            assert found.values["latency_ms_prediction_error"] == pytest.approx(-0.5)
            assert found.values["latency_ms_mad"] == 0.5
            assert found.facts["latency_ms"]["measured_because"] == "checked"
        else:
            assert not CALLS and found.values["latency_ms"] == pytest.approx(parameters)
            assert "latency_ms_prediction_error" not in found.values
            assert found.facts["latency_ms"]["predicted"] is True
        assert set(meter.metrics) <= found.values.keys()
        assert all(replace(meter, checked=1.0).is_checked(a) for a in [architecture])
        assert not replace(meter, checked=0.0).is_checked(architecture)
    assert 0 < checked < 9


def test_measures_where_the_table_is_too_inaccurate(choices):
    doubtful = replace(choices, accuracy=replace(choices.accuracy, median_relative_error=0.2))
    architecture = next(iter(SPACE.enumerate()))
    meter = Predicted(Counting(), doubtful, tolerance=0.1, checked=0.0)
    found = measure(meter, architecture)
    assert found.facts["latency_ms"]["measured_because"] == "error above tolerance"
    assert found.values["latency_ms_prediction_error"] == pytest.approx(0)
    with pytest.warns(NasplatWarning, match=r"median relative error of 20.0%, above the tolerance of 10.0%"):
        meter.check_space(SPACE)
    accepted = measure(replace(meter, tolerance=0.2), architecture)
    assert accepted.values["latency_ms_mad"] == pytest.approx(0.2 * accepted.values["latency_ms"])


def test_measures_what_has_unknown_steps_and_what_is_of_no_space(steps):
    meter = Predicted(Work(), steps, checked=0.0)
    architecture = next(iter(Blocks().enumerate()))
    other = BlocksNetwork(width=16, kernel=3, twice=False).eval()
    for of in (architecture, None):
        found = meter.measure_architecture(of, other, X, Bench())
        assert found.values["latency_ms"] == pytest.approx(work(other))
        assert "latency_ms_predicted" not in found.values
        assert found.facts["latency_ms"]["measured_because"] == "unknown"


def test_another_machine_is_warned_of(choices):
    moved = replace(choices, facts={**choices.facts, "processor": "Another 3000"})
    with pytest.warns(NasplatWarning, match="measured on Another 3000"):
        Predicted(Counting(), moved).check_space(SPACE)


def test_the_meter_is_known_by_what_its_table_holds(choices, tmp_path):
    paths = [choices.save(tmp_path / name) for name in ("a.json", "b.json")]
    one, other = (Predicted(Counting(), path) for path in paths)
    assert one == other == Predicted(Counting(), choices) and describe(one) == describe(other)
    latency = Predicted(Latency("torch"), replace(choices, facts={}))
    assert restore(json.loads(json.dumps(describe(latency))), restorable()) == latency


def test_bad_use_of_the_meter(choices):
    cases = [
        (lambda: Predicted(Counting(), 3), "table is 3"),
        (lambda: Predicted(Counting, choices), "legal: one that measures"),
        (lambda: Predicted(Counting(), replace(choices, metric="speed")), "does not give"),
        (lambda: Predicted(Counting(), choices, checked=1.5), "checked is 1.5; legal: a number from 0 up to 1"),
        (lambda: Predicted(Counting(), choices, tolerance=-1), "tolerance is -1"),
        (lambda: Predicted(Latency("torch"), choices), r"measured with runtime count \(the meter's: torch\)"),
        (
            lambda: Predicted(Latency(threads=2), replace(choices, facts={"threads": 1})),
            r"measured with threads 1 \(the meter's: 2\)",
        ),
    ]
    for make, message in cases:
        with pytest.raises(InvalidInputError, match=message):
            make()


def test_quality_over_trials():
    def trial(**metrics):
        return SimpleNamespace(copy_of=None, metrics=metrics)

    both = [
        trial(latency_ms=float(i), latency_ms_predicted=1.1 * i, latency_ms_prediction_error=0.1) for i in range(1, 5)
    ]
    predicted = [trial(latency_ms=9.0, latency_ms_predicted=9.0), trial(val_accuracy=0.5)]
    quality = prediction_quality([*both, *predicted])
    assert quality.n == 4 and quality.median_relative_error == pytest.approx(0.1)
    assert quality.kendall_tau == pytest.approx(1)
    assert prediction_quality(predicted) is None and prediction_quality(both[:1]) is None


def test_a_study_predicts_and_a_table_of_another_space_is_refused(choices, tmp_path):
    x = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    task = Task.from_tensors(x, torch.arange(40) % 4, epochs=1, batch_size=20, name="squares")
    given = {"strategy": RandomSearch(), "task": task, "objectives": [maximise("val_accuracy")], "progress": False}
    meter = Predicted(Counting(), choices, checked=0.5)
    study = Study(space=SPACE, folder=tmp_path / "s", meters=[meter], tracker=None, **given)
    trials = study.run(8).trials
    done = [trial for trial in trials if trial.copy_of is None]
    assert done and all(trial.state == "complete" for trial in done), done
    for trial in done:
        assert trial.metrics["latency_ms"] == pytest.approx(choices.cost(trial.proposal.architecture))
        is_checked = meter.is_checked(trial.proposal.architecture)
        assert ("latency_ms_prediction_error" in trial.metrics) is is_checked
    other = space_from(linear, {"width": (2, 5, 9), "depth": (0, 1)})
    with pytest.raises(InvalidInputError, match=r"the table of latency_ms is of .*; the study's is"):
        Study(space=other, folder=tmp_path / "o", meters=[meter], tracker=None, **given)
    assert not (tmp_path / "o").exists()


# The command.


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_profile_space_of_choices(tmp_path):
    out = tmp_path / "params.json"
    done = call(
        "profile-space", "--space", "bats:small", "-s", "cells=1", "-s", "channels=4", "--input", "1x8x8",
        "--metric", "params", "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert f"{out}: params of Bats" in done.stdout and "Spearman 1.000" in done.stdout
    assert "building" in done.stdout and "Predicted(Count(" in done.stdout and "networks:" in done.stderr
    assert load_table(out).error < 1e-6 and not list(tmp_path.glob("*.jsonl"))


@pytest.mark.slow
def test_profile_space_of_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(cli.profile_space, "plugin_of", lambda *given: Blocks())
    quick = Latency("packed", twins=False, schedule=QUICK)
    monkeypatch.setattr(cli.profile_space, "_meter", lambda *given: quick)
    out = tmp_path / "steps.json"
    command = [
        "profile-space", "--space", "blocks", "--runtime", "packed", "--input", "1x8x8", "--samples", "8", "--out", out,
    ]  # fmt: skip
    measured = Latency.measure
    left = [4]

    def interrupted(self, *given):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return measured(self, *given)

    monkeypatch.setattr(Latency, "measure", interrupted)
    stopped = call(*command)
    assert stopped.exit_code == 130 and "the same command goes on from there" in stopped.stderr, stopped.output
    assert not out.exists()
    left[0] = 2 * 28 - 4  # all but those that were measured before
    done = call(*command)
    assert done.exit_code == 0, done.output
    assert left[0] == 0
    assert "Going on from" in done.stderr and "steps of packed programs" in done.stdout and "on packed" in done.stdout
    table = load_table(out)
    assert isinstance(table, StepTable) and table.accuracy.n == 20 and table.facts["runtime"] == "packed"
    assert not list(tmp_path.glob("*.jsonl"))


def test_profile_space_says_what_is_wrong(tmp_path):
    out = tmp_path / "t.json"
    for arguments, message in [
        (["--input", "1x8x8", "--task", "digits"], "one of --task NAME and --input CxHxW is needed"),
        (["--input", "1x8x8", "--out", tmp_path / "nowhere" / "t.json"], "which is no folder"),
        (["--input", "3x"], "sizes as in 3x32x32 are needed"),
        (["--input", "1x8x8", "--metric", "speed"], "no meter gives 'speed'; there are: latency_ms"),
        (["--input", "1x8x8", "--runtime", "abacus"], "abacus"),
    ]:
        failed = call("profile-space", "--space", "bats", "--out", out, *arguments)
        assert failed.exit_code in (1, 2) and message in re.sub(r"[│\n ]+", " ", failed.stderr), failed.stderr
    assert not out.exists()


def test_warnings_are_said_once(choices):
    moved = replace(choices, facts={**choices.facts, "processor": "Another 4000"})
    with pytest.warns(NasplatWarning):
        Predicted(Counting(), moved).check_space(SPACE)
    Predicted(Counting(), moved).check_space(SPACE)  # would be an error here
    predicted_module._said.cache_clear()


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    CostTable.measured(SPACE, X, Counting())
    assert torch.equal(torch.get_rng_state(), state)

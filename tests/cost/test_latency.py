"""Latency as a meter. How the time is found is tested in ``test_timing``."""

from __future__ import annotations

import fcntl
import gc
import json
import math
import os
import pickle
import random
import re
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import Conv
from torch import nn

from nasplat import Latency, Study, Task, maximise, minimise, plugins
from nasplat.cost import Bench, CostMeter, timing
from nasplat.cost.timing import Schedule
from nasplat.errors import InvalidInputError, UnknownPluginError, UnsupportedError
from nasplat.identity import canonical, describe, restore
from nasplat.nn import BinaryBlock, BinaryConv2d
from nasplat.nn.binary import is_binary
from nasplat.restorable import restorable
from nasplat.runtimes import OnnxRuntime, Session, TorchEager
from strategies import RandomSearch

QUICK = Schedule(blocks=2, seconds=0.0, patience_s=0.05)
TORCH = Latency("torch", schedule=QUICK)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


@pytest.fixture(autouse=True)
def no_calibration(monkeypatch):
    """What a machine can do at its best matters to ``test_timing``; here it would take half a second a test."""
    monkeypatch.setattr(timing, "CALIBRATION_SECONDS", 0.0)


def network():
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 3)]
    return nn.Sequential(*layers)


def binary_network():
    layers = [nn.Conv2d(1, 8, 3, stride=2, padding=1), BinaryBlock(8, 8, 3), nn.AvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


# Runtimes whose runs take a given time, and which see what they are given.


@dataclass(frozen=True)
class Clockwork:
    """Every run of a network takes so many seconds. The anchor takes a millisecond."""

    label: str
    seconds: float
    seen: list

    @property
    def name(self):
        return self.label

    def export(self, model, example):
        binary = [module.is_binary for module in model.modules() if isinstance(module, BinaryConv2d)]
        self.seen.append({"binary": binary, "training": model.training, "shape": tuple(example.shape)})
        return repr(self.seconds).encode()

    def load(self, file, example, threads):
        return Ticking(float(file))

    def facts(self) -> Mapping[str, str | int]:
        return {"clockwork": 1}

    def describe(self):
        return {"clockwork": self.label}

    def __hash__(self):
        return id(self.seen)


class Ticking(Session):
    def __init__(self, seconds):
        self._seconds = seconds

    def run(self):
        pass

    def seconds(self):
        return self._seconds

    def output(self):
        return torch.zeros(1, 1)


@pytest.fixture
def clockworks(monkeypatch):
    """In place of the installed runtimes: ``clockworks(packed=0.001, ...)``. Gives what each was asked to export."""

    def install(**seconds):
        made = {name: Clockwork(name, time, []) for name, time in seconds.items()}
        real = plugins.load

        def load(group, name):
            return (lambda: made[name]) if group == plugins.RUNTIMES and name in made else real(group, name)

        monkeypatch.setattr(plugins, "load", load)
        return {name: runtime.seen for name, runtime in made.items()}

    return install


# Values.


@pytest.mark.parametrize("label", ["", "phone", "batch_8"])
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_values_samples_and_facts_belong_together(bench, runtime, label):
    meter = Latency(runtime, label=label, schedule=replace(QUICK, blocks=4))
    name = f"latency_ms_{label}" if label else "latency_ms"
    assert meter.metric == name
    measurement = meter.measure(network(), torch.zeros(1, 1, 8, 8), bench)
    values, samples, facts = measurement.values, measurement.samples, measurement.facts[name]
    assert tuple(values) == meter.metrics
    assert all(math.isfinite(value) and value >= 0 for value in values.values())
    assert all(key == name or key.startswith(f"{name}_") for key in [*values, *samples, *measurement.facts])

    runs, numbers = samples[name], samples[f"{name}_block"]
    assert values[name] == statistics.median(runs)
    assert values[f"{name}_mad"] == statistics.median(abs(run - values[name]) for run in runs)
    assert values[f"{name}_samples"] == len(runs) == len(numbers)
    assert sum(run <= values[f"{name}_p95"] for run in runs) >= math.floor(0.95 * len(runs))
    blocks = [[run for run, n in zip(runs, numbers, strict=True) if n == number] for number in sorted(set(numbers))]
    assert numbers == sorted(numbers)
    deviation = statistics.stdev(map(statistics.median, blocks)) if len(blocks) > 1 else 0.0
    assert values[f"{name}_block_sd"] == pytest.approx(deviation)
    assert len(samples[f"{name}_anchor"]) >= 2 * len(blocks)  # of blocks, too, of which no run counts
    assert values[f"{name}_suspect"] == float("suspect" in facts)

    assert json.loads(json.dumps(dict(measurement.facts))) == measurement.facts
    assert json.loads(json.dumps(dict(samples))) == samples
    assert facts["runtime"] == runtime and facts[runtime]
    assert facts["threads"] == 1 and facts["batch"] == 1 and facts["processor"] and len(facts["processors"]) == 1
    assert facts["load"] >= 0 and facts["governor"] and facts["machine"] and facts["anchor_ms"] > 0
    assert re.fullmatch("[0-9a-f]{64}", facts["file_sha256"]) and facts["file_bytes"] > 0


def test_the_hash_is_that_of_the_weights_measured(bench):
    model, x = network().eval(), torch.zeros(1, 1, 8, 8)
    meter = Latency("onnxruntime", schedule=QUICK)

    def digest():
        return meter.measure(model, x, bench).facts["latency_ms"]["file_sha256"]

    first = digest()
    assert digest() == first
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert digest() != first


def test_a_doubtful_value_is_given_and_says_so(bench, clockworks):
    clockworks(torch=0.001)
    TORCH.measure(nn.Linear(3, 3), torch.zeros(1, 3), bench)
    for path in bench.folder.glob("*.json"):  # what the anchor took before: half of what it takes now
        held = json.loads(path.read_text())
        path.write_text(json.dumps({key: [value / 2 for value in values] for key, values in held.items()}))
    measurement = TORCH.measure(nn.Linear(3, 3), torch.zeros(1, 3), bench)
    assert measurement.values["latency_ms"] == pytest.approx(1.0)
    assert measurement.values["latency_ms_suspect"] == 1
    facts = measurement.facts["latency_ms"]
    assert "disturbed" in facts["suspect"] and facts["anchor_drift"] == pytest.approx(1.0)


# How it is measured.


class Spy(nn.Module):
    seen: ClassVar[list] = []

    def forward(self, x):
        self.seen.append(
            (self.training, len(os.sched_getaffinity(0)), torch.get_num_threads(), tuple(x.shape),
             torch.is_grad_enabled(), gc.isenabled(), x.device.type)
        )  # fmt: skip
        return x


def test_in_evaluation_mode_on_one_processor_a_thread_with_the_batch_asked_for(bench):
    Spy.seen.clear()
    TORCH.measure(Spy(), torch.zeros(1, 3), bench)
    assert set(Spy.seen) == {(False, 1, 1, (1, 3), False, False, "cpu")}
    Spy.seen.clear()
    replace(TORCH, threads=2, batch=4).measure(Spy(), torch.zeros(1, 3), bench)
    assert {(entry[2], entry[3]) for entry in Spy.seen} == {(2, (4, 3))}


def state_of_process():
    return (
        torch.get_num_threads(), os.sched_getaffinity(0), gc.isenabled(), torch.is_grad_enabled(),
        torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()),  # noqa: NPY002
    )  # fmt: skip


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
@pytest.mark.parametrize("grad", [True, False])
def test_model_and_process_are_left_as_they_were(bench, runtime, grad):
    model, x = network(), torch.randn(1, 1, 8, 8)
    model.train()
    model[1].eval()  # a frozen batch norm stays frozen
    model[0].weight.grad = torch.ones_like(model[0].weight)
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = x.clone()
    torch.set_num_threads(2)
    try:
        with torch.set_grad_enabled(grad):
            before = state_of_process()
            Latency(runtime, schedule=QUICK).measure(model, x, bench)
            assert state_of_process() == before
    finally:
        torch.set_num_threads(1)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(x, kept)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(parameter.requires_grad for parameter in model.parameters())


def is_held(bench):
    with (bench.folder / "gate").open("a") as gate:
        try:
            fcntl.flock(gate, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


class Probe(nn.Module):
    """Notes whether the bench is held, and fails at its n-th run."""

    folder = None
    held: ClassVar[list] = []
    fails_at = 0

    def forward(self, x):
        self.held.append(is_held(Bench(self.folder)))
        if len(self.held) == self.fails_at:
            raise RuntimeError("no")
        return x


@pytest.mark.parametrize("fails_at", [1, 5])
def test_the_bench_is_held_and_all_is_given_back_when_the_model_fails(bench, monkeypatch, fails_at):
    monkeypatch.setattr(Probe, "folder", bench.folder)
    monkeypatch.setattr(Probe, "fails_at", fails_at)
    Probe.held.clear()
    model = Probe()
    before = state_of_process()
    with pytest.raises(RuntimeError, match="no"):
        TORCH.measure(model, torch.zeros(1, 3), bench)
    assert Probe.held == [True] * fails_at and not is_held(bench)
    assert model.training and state_of_process() == before


def test_a_network_that_cannot_be_exported_leaves_the_bench_free(bench):
    class Unpicklable(nn.Module):
        def __init__(self):
            super().__init__()
            self.stream = iter(())

        def forward(self, x):
            return x

        def __deepcopy__(self, memo):
            return self

        def __reduce_ex__(self, protocol):
            raise TypeError("never")

    before = state_of_process()
    with pytest.raises(UnsupportedError, match="Unpicklable"):
        TORCH.measure(Unpicklable(), torch.zeros(1, 3), bench)
    assert state_of_process() == before and not is_held(bench)


def test_where_it_is_measured_is_the_benchs_business(bench):
    with pytest.raises(InvalidInputError, match="rpi5"):
        replace(TORCH, on="rpi5").measure(nn.Linear(3, 3), torch.zeros(1, 3), bench)

    class Far(Bench):
        jobs: ClassVar[list] = []

        def run(self, job, on=None):
            self.jobs.append(on)
            return pickle.loads(pickle.dumps(job))(self)  # it travels

    far = Far(bench.folder)
    values = replace(TORCH, on="rpi5").measure(network(), torch.zeros(1, 1, 8, 8), far).values
    assert Far.jobs == ["rpi5"] and values["latency_ms"] > 0


# Runtimes.


def test_a_runtime_by_name_and_as_an_object_is_one(bench):
    x = torch.zeros(1, 1, 8, 8)
    for meter in (Latency("torch", schedule=QUICK), Latency(TorchEager(), schedule=QUICK)):
        assert meter.measure(network(), x, bench).facts["latency_ms"]["runtime"] == "torch"


def test_auto_is_onnxruntime_for_a_plain_network_and_packed_for_a_binary_one(bench, clockworks):
    seen = clockworks(packed=0.001, onnxruntime=0.002, onnxruntime_int8=0.002)
    plain = Latency(schedule=QUICK).measure(network(), torch.zeros(1, 1, 8, 8), bench)
    assert plain.facts["latency_ms"]["runtime"] == "onnxruntime" and not seen["packed"]
    assert set(plain.values) == set(Latency().metrics)
    binary = Latency(schedule=QUICK, twins=False).measure(binary_network(), torch.zeros(1, 1, 8, 8), bench)
    assert binary.facts["latency_ms"]["runtime"] == "packed"
    assert seen["packed"] and set(binary.values) == set(Latency().metrics)


def test_without_numba_a_binary_network_is_refused_with_the_cure_and_another_is_measured(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(UnsupportedError, match=r"Numba.*pip install 'nasplat\[packed\]'"):
        Latency(schedule=QUICK).measure(binary_network(), x, bench)
    assert Latency(schedule=QUICK).measure(network(), x, bench).values["latency_ms"] > 0
    simulated = Latency("onnxruntime", schedule=QUICK).measure(binary_network(), x, bench)
    assert simulated.facts["latency_ms"]["runtime"] == "onnxruntime"


# Twins.


def clockwork_twins(bench, clockworks, model, **seconds):
    seen = clockworks(**seconds)
    meter = Latency(schedule=QUICK, label="arm")
    return meter.measure(model, torch.zeros(1, 1, 8, 8), bench), seen


@pytest.mark.parametrize(
    "packed, fp32, int8, not_faster",
    [(0.001, 0.004, 0.002, 0), (0.001, 0.004, 0.0005, 1), (0.002, 0.001, 0.004, 1), (0.004, 0.001, 0.001, 1),
     (0.001, 0.001, 0.002, 1)],
)  # fmt: skip
def test_a_binary_network_is_recorded_beside_its_twins(bench, clockworks, packed, fp32, int8, not_faster):
    model = binary_network()
    measurement, seen = clockwork_twins(
        bench, clockworks, model, packed=packed, onnxruntime=fp32, onnxruntime_int8=int8
    )
    values, name = measurement.values, "latency_ms_arm"
    assert values[name] == pytest.approx(packed * 1e3)
    assert values[f"{name}_fp32"] == pytest.approx(fp32 * 1e3)
    assert values[f"{name}_int8"] == pytest.approx(int8 * 1e3)
    assert values[f"{name}_speedup_fp32"] == pytest.approx(fp32 / packed)
    assert values[f"{name}_speedup_int8"] == pytest.approx(int8 / packed)
    assert values[f"{name}_not_faster"] == not_faster
    for twin, runtime in (("", "packed"), ("_fp32", "onnxruntime"), ("_int8", "onnxruntime_int8")):
        assert measurement.facts[name + twin]["runtime"] == runtime
        assert statistics.median(measurement.samples[name + twin]) == values[name + twin]
    assert json.loads(json.dumps(dict(measurement.facts))) == measurement.facts
    # The twins are the same network, real; the model itself stays binary.
    networks = {name: [entry for entry in entries if entry["shape"][1:] == (1, 8, 8)] for name, entries in seen.items()}
    assert [entry["binary"] for entry in networks["packed"]] == [[True]]
    assert [entry["binary"] for entry in networks["onnxruntime"]] == [[False]]
    assert [entry["binary"] for entry in networks["onnxruntime_int8"]] == [[False]]
    assert not any(entry["training"] for entries in networks.values() for entry in entries)
    assert is_binary(model) and model.training


def test_a_doubtful_twin_is_told_apart(bench, clockworks):
    """Speed-ups of a disturbed twin are as doubtful as it is."""
    clockworks(packed=0.001, onnxruntime=0.004, onnxruntime_int8=0.002)
    meter, x = Latency(schedule=QUICK), torch.zeros(1, 1, 8, 8)
    meter.measure(binary_network(), x, bench)
    for path in bench.folder.glob("*.json"):
        held = json.loads(path.read_text())
        halved = {
            key: [value / 2 for value in values] if '"onnxruntime_int8"' in key else values
            for key, values in held.items()
        }
        assert halved != held
        path.write_text(json.dumps(halved))
    measurement = meter.measure(binary_network(), x, bench)
    assert measurement.values["latency_ms_suspect"] == 0
    assert "suspect" in measurement.facts["latency_ms_int8"] and "suspect" not in measurement.facts["latency_ms_fp32"]
    assert measurement.values["latency_ms_int8_suspect"] == 1 and measurement.values["latency_ms_fp32_suspect"] == 0


def test_no_twins_for_a_plain_network_nor_where_they_are_not_wanted_nor_off_the_packed_runtime(bench, clockworks):
    clockworks(packed=0.001, onnxruntime=0.002, onnxruntime_int8=0.002)
    x = torch.zeros(1, 1, 8, 8)
    for meter, model in (
        (Latency(schedule=QUICK), network()),
        (Latency(schedule=QUICK, twins=False), binary_network()),
        (Latency("onnxruntime", schedule=QUICK), binary_network()),
    ):
        assert set(meter.measure(model, x, bench).values) == set(meter.metrics)


@pytest.mark.skipif(
    "onnxruntime_int8" not in plugins.installed(plugins.RUNTIMES) or find_spec("numba") is None,
    reason="needs the runtimes packed and onnxruntime_int8",
)
def test_a_real_binary_network_end_to_end(bench):
    torch.manual_seed(0)
    model, x = binary_network(), torch.randn(1, 1, 8, 8)
    measurement = Latency(schedule=QUICK).measure(model, x, bench)
    values = measurement.values
    for twin in ("fp32", "int8"):
        assert values[f"latency_ms_{twin}"] > 0
        assert values[f"latency_ms_speedup_{twin}"] == values[f"latency_ms_{twin}"] / values["latency_ms"]
    slowest = min(values["latency_ms_speedup_fp32"], values["latency_ms_speedup_int8"])
    assert values["latency_ms_not_faster"] == float(slowest <= 1)
    digests = {facts["file_sha256"] for facts in measurement.facts.values()}
    assert len(digests) == 3 and is_binary(model)


# A meter is plain data.


def test_it_is_a_meter_and_refuses_nonsense():
    assert isinstance(TORCH, CostMeter) and TORCH.trained is False
    for wrong in (
        {"threads": 0}, {"threads": 1.5}, {"threads": True}, {"batch": 0}, {"batch": "1"}, {"on": ""},
        {"runtime": 7}, {"runtime": TorchEager}, {"runtime": None},
    ):  # fmt: skip
        with pytest.raises(InvalidInputError):
            Latency(**wrong)
    with pytest.raises(UnknownPluginError, match="onnxruntime"):
        Latency("tensorrt")


@pytest.mark.parametrize("label", ["a b!", "ä", "x=1", "a,b", "\n"])
def test_a_label_that_is_no_name_of_a_metric_is_refused(label):
    with pytest.raises(InvalidInputError, match="label"):
        Latency(label=label)


@pytest.mark.parametrize("label", ["mad", "suspect", "fp32", "block", "p95", "samples"])
def test_a_label_that_is_taken_is_refused(label):
    """``latency_ms_mad`` is the deviation of ``latency_ms``."""
    with pytest.raises(InvalidInputError, match="label"):
        Latency(label=label)


@pytest.mark.parametrize(
    "wrong",
    [{"blocks": 0}, {"blocks": 2.5}, {"seconds": -1.0}, {"seconds": math.nan}, {"patience_s": -1.0},
     {"patience_s": math.inf}, {"tolerance": 0.0}, {"tolerance": math.nan}],
    ids=str,
)  # fmt: skip
def test_a_schedule_that_cannot_be_kept_is_refused(wrong):
    with pytest.raises(InvalidInputError):
        Schedule(**wrong)


@pytest.mark.parametrize("label", ["", "arm"])
def test_names_are_legal_in_mlflow(label):
    for name in Latency(label=label).metrics:
        assert re.fullmatch(r"[A-Za-z0-9_\-. /]+", name)
        assert name.startswith("latency_ms")


@pytest.mark.parametrize(
    "meter",
    [Latency(), Latency("torch", label="cpu", threads=2), Latency(OnnxRuntime(), on="rpi5"),
     Latency(TorchEager(), schedule=Schedule(blocks=3), twins=False)],
    ids=repr,
)  # fmt: skip
def test_a_folder_can_name_it_and_a_process_send_it(meter):
    description = json.loads(json.dumps(describe(meter)))
    assert restore(description, restorable()) == meter
    assert pickle.loads(pickle.dumps(meter)) == meter
    assert hash(meter) == hash(pickle.loads(pickle.dumps(meter)))
    assert canonical(describe(meter)) != canonical(describe(replace(meter, batch=7)))


# In a study.


def test_two_latencies_of_one_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meters = [Latency("torch", schedule=QUICK), Latency("onnxruntime", label="onnx", schedule=QUICK)]
    task = Task.digits(epochs=1, limit=64)
    objectives = [maximise("val_accuracy"), minimise("latency_ms_onnx")]
    study = Study(Conv(), RandomSearch(), task, objectives, meters=meters, folder="both", tracker=None)
    table = study.run(max_trials=1).table()
    for name in (*meters[0].metrics, *meters[1].metrics):
        assert table[name].notna().all() and np.isfinite(table[name]).all()
    (path,) = (tmp_path / "both").rglob("samples.json")
    samples = json.loads(path.read_text())
    assert statistics.median(samples["latency_ms_onnx"]) == table["latency_ms_onnx"].iloc[0]
    assert statistics.median(samples["latency_ms"]) == table["latency_ms"].iloc[0]


def test_two_latencies_of_one_name_are_refused(tmp_path):
    meters = [Latency("torch"), Latency("onnxruntime")]
    task = Task.digits(epochs=1, limit=64)
    with pytest.raises(InvalidInputError, match="latency_ms"):
        Study(Conv(), RandomSearch(), task, [minimise("latency_ms")], meters=meters, folder=tmp_path / "study")

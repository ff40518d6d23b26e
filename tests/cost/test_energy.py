"""Energy, on counters of the tests' own: a folder such as Linux has, and a module such as NVML's."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass

import pytest
import torch
from helpers import Conv
from torch import nn

from nasplat import Study, Task, at_most, maximise, minimise
from nasplat.cost import Bench, CostMeter, Energy, energy, power
from nasplat.errors import InvalidInputError, UnknownMetricError, UnsupportedError
from nasplat.identity import describe, restore
from nasplat.restorable import restorable
from nasplat.runtimes import Session, TorchEager
from strategies import RandomSearch

RANGE = 10_000_000


class Machine:
    """A machine whose clock and counters move only when it computes or sleeps.

    It uses 4 W when idle and 10 W when it computes; a pass takes 0.125 s.
    """

    def __init__(self, folder):
        self.seconds = 0.0
        self.zones = {}
        self.folder = folder
        for number, (name, first) in enumerate([("package-0", RANGE - 1_500_000), ("package-1", 0), ("psys", 7)]):
            self.zones[number] = zone = folder / f"intel-rapl:{number}"
            (zone / f"intel-rapl:{number}:0").mkdir(parents=True)
            (zone / "name").write_text(f"{name}\n")
            (zone / "energy_uj").write_text(f"{first}\n")
            (zone / "max_energy_range_uj").write_text(f"{RANGE}\n")

    def use(self, seconds, watts):
        self.seconds += seconds
        # A quarter is the second package's.
        for number, share in ((0, 0.75), (1, 0.25)):
            file = self.zones[number] / "energy_uj"
            file.write_text(f"{(int(file.read_text()) + round(seconds * watts * share * 1e6)) % RANGE}\n")


@dataclass(frozen=True)
class Simulated(TorchEager):
    """Runs on the simulated machine."""

    def load(self, file, example, threads):
        return _Simulated()


class _Simulated(Session):
    machine = None

    def run(self):
        self.machine.use(0.125, 10)

    def output(self):
        return torch.zeros(1)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    found = Machine(tmp_path / "powercap")
    monkeypatch.setattr(power, "POWERCAP", found.folder)
    monkeypatch.setattr(energy.time, "perf_counter", lambda: found.seconds)
    monkeypatch.setattr(energy.time, "sleep", lambda seconds: found.use(seconds, 4))
    monkeypatch.setattr(_Simulated, "machine", found)
    return found


def measure(meter, tmp_path):
    return meter.measure(nn.Linear(4, 2), torch.zeros(1, 4), Bench(tmp_path / "bench"))


def test_energy_of_an_example_from_a_counter_that_goes_round(machine, tmp_path):
    meter = Energy(Simulated(), batch=2, blocks=6, seconds=0.5, idle_s=2.0)
    found = measure(meter, tmp_path)
    assert isinstance(meter, CostMeter)
    # 10 W for 0.125 s a pass of two examples. Package 0 counts 7.5 W, and goes round after 10 J.
    assert found.values == {"energy_mj": pytest.approx(625)}
    assert found.samples["energy_mj"] == pytest.approx([625] * 6)
    facts = found.facts["energy_mj"]
    assert facts["domains"] == ["package-0", "package-1"]
    assert (facts["watts"], facts["idle_watts"], facts["idle_share"]) == pytest.approx((10, 4, 0.4))
    assert machine.seconds * 7.5 > RANGE / 1e6


def test_without_a_counter_there_is_no_value_and_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(power, "POWERCAP", tmp_path / "nowhere")
    found = measure(Energy("torch"), tmp_path)
    assert (found.values, found.samples) == ({}, {})
    assert "no RAPL counter" in found.facts["energy_mj"]["absent"]


def test_a_counter_that_is_kept_for_root_says_how_to_open_it(machine, monkeypatch, tmp_path):
    real = type(tmp_path).read_text

    def read(path, *arguments, **named):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **named)

    monkeypatch.setattr(type(tmp_path), "read_text", read)
    found = measure(Energy(Simulated()), tmp_path)
    assert found.values == {}
    assert "sudo chmod a+r" in found.facts["energy_mj"]["absent"]


def test_a_counter_that_stands_still_is_no_zero(machine, monkeypatch, tmp_path):
    def stand_still(seconds, watts):
        machine.seconds += seconds

    monkeypatch.setattr(machine, "use", stand_still)
    found = measure(Energy(Simulated(), seconds=0.5), tmp_path)
    assert found.values == {}
    assert "stood still" in found.facts["energy_mj"]["absent"]


def test_training_pauses_on_cores_that_the_bench_does_not_own(machine, monkeypatch, tmp_path):
    asked = []
    real = Bench.measuring

    def measuring(bench, threads=1):
        asked.append(threads)
        return real(bench, threads)

    monkeypatch.setattr(Bench, "measuring", measuring)
    monkeypatch.setattr(energy, "owned_cores", lambda: ((0,), (1,), (2,)))
    measure(Energy(Simulated(), seconds=0.5), tmp_path)
    assert asked == [4]


class TestStudy:
    def study(self, folder, **named):
        given = {"objectives": [maximise("val_accuracy"), minimise("energy_mj")]} | named
        task = Task.digits(epochs=1, limit=60)
        return Study(Conv(), RandomSearch(), task, folder=folder, tracker=None, **given)

    def test_that_wants_energy_is_refused_where_there_is_no_counter(self, monkeypatch, tmp_path):
        monkeypatch.setattr(power, "POWERCAP", tmp_path / "nowhere")
        with pytest.raises(UnknownMetricError, match=r"energy_mj cannot be measured here: .* no RAPL counter"):
            self.study(tmp_path / "study")
        with pytest.raises(UnknownMetricError, match="no RAPL counter"):
            limits = [at_most("energy_mj", 5)]
            self.study(tmp_path / "study", objectives=[maximise("val_accuracy")], constraints=limits)
        assert not (tmp_path / "study").exists()

    def test_that_just_measures_it_is_not(self, monkeypatch, tmp_path):
        monkeypatch.setattr(power, "POWERCAP", tmp_path / "nowhere")
        self.study(tmp_path / "study", objectives=[maximise("val_accuracy")], meters=[Energy()])

    def test_meters_join_on_demand(self, machine, tmp_path):
        wanted = ["energy_mj", "peak_memory_bytes", "throughput_b8_per_s"]
        study = self.study(tmp_path / "study", objectives=[minimise(name) for name in wanted])
        assert set(wanted) <= {name for meter in study.meters for name in meter.metrics}

    def test_another_machine_is_not_judged_from_here(self, monkeypatch, tmp_path):
        monkeypatch.setattr(power, "POWERCAP", tmp_path / "nowhere")
        assert Energy("torch", on="board").unavailable() == ""
        assert Energy("torch").unavailable() != ""


class TestNvml:
    @pytest.fixture
    def nvml(self, monkeypatch):
        module = types.ModuleType("pynvml")
        module.NVMLError = type("NVMLError", (Exception,), {})
        module.millijoules = 5_000
        module.nvmlInit = lambda: None
        module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
        module.nvmlDeviceGetTotalEnergyConsumption = lambda handle: module.millijoules
        monkeypatch.setitem(sys.modules, "pynvml", module)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        properties = types.SimpleNamespace(name="a GPU", uuid="1-2")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return module

    def test_counts_from_when_it_was_made(self, nvml):
        counter = power.counter_of("cuda:0")
        nvml.millijoules += 2_500
        assert counter.joules() == 2.5
        assert counter.domains == ("a GPU",)

    def test_says_what_is_missing(self, nvml, monkeypatch):
        def fails(handle):
            raise nvml.NVMLError("Not Supported")

        monkeypatch.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", fails)
        with pytest.raises(UnsupportedError, match="a GPU: Not Supported"):
            power.counter_of("cuda")
        monkeypatch.setitem(sys.modules, "pynvml", None)
        assert "pip install nvidia-ml-py" in power.unreadable("cuda")
        assert "pip install nvidia-ml-py" in Energy("auto").unavailable("cuda")


@pytest.mark.parametrize("wrong", [{"blocks": 0}, {"seconds": 0.0}, {"idle_s": -1}, {"threads": 1.5}, {"runtime": 3}])
def test_what_is_not_legal_is_refused(wrong):
    with pytest.raises(InvalidInputError):
        Energy(**wrong)


def test_a_folder_may_name_it():
    meter = Energy("torch", label="board", seconds=1.0)
    assert meter.metrics == ("energy_mj_board",)
    assert restore(describe(meter), restorable()) == meter

from __future__ import annotations

import gc
import math
import os

import pytest
import torch
from torch import nn

from nasplat import Latency
from nasplat.cost import Bench, CostMeter
from nasplat.errors import InvalidInputError

QUICK = Latency(repeats=5, seconds=0.0)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def network():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(3))


def test_values_are_finite_with_units_and_the_spread_is_recorded(bench):
    measurement = Latency(repeats=20, seconds=0.0).measure(network(), torch.zeros(1, 1, 8, 8), bench)
    values, samples = measurement.values, measurement.samples["latency_ms"]
    assert tuple(values) == QUICK.metrics
    assert all(name.startswith("latency_ms") for name in values)
    assert all(math.isfinite(value) and value >= 0 for value in values.values())
    assert len(samples) == values["latency_ms_samples"] == 20
    assert min(samples) <= values["latency_ms"] <= values["latency_ms_p95"] <= max(samples)
    assert 0 <= values["latency_ms_mad"] <= max(samples) - min(samples)
    facts = measurement.facts["latency"]
    assert facts["threads"] == 1 and facts["batch"] == 1 and facts["processor"]
    assert facts["runtime"].startswith("torch ")


def test_the_model_and_the_process_are_left_as_they_were(bench):
    model = network()
    x = torch.randn(1, 1, 8, 8)
    model.eval()(x)
    model.train()
    model[1].eval()  # a frozen batch norm stays frozen
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.set_num_threads(2)
    try:
        generator, affinity = torch.get_rng_state(), os.sched_getaffinity(0)
        QUICK.measure(model, x, bench)
        assert torch.get_num_threads() == 2
        assert os.sched_getaffinity(0) == affinity
        assert torch.equal(torch.get_rng_state(), generator)
        assert gc.isenabled()
    finally:
        torch.set_num_threads(1)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_measures_in_evaluation_mode_one_processor_and_the_threads_asked_for(bench):
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append((self.training, len(os.sched_getaffinity(0)), torch.get_num_threads(), tuple(x.shape),
                         torch.is_grad_enabled(), gc.isenabled()))  # fmt: skip
            return x

    QUICK.measure(Spy(), torch.zeros(1, 3), bench)
    assert set(seen) == {(False, 1, 1, (1, 3), False, False)}
    seen.clear()
    Latency(threads=2, batch=4, repeats=5, seconds=0.0).measure(Spy(), torch.zeros(1, 3), bench)
    assert {(entry[2], entry[3]) for entry in seen} == {(2, (4, 3))}


def test_it_holds_the_bench_and_lets_go_when_the_model_fails(bench):
    held = []

    class Probe(nn.Module):
        def forward(self, x):
            held.append(bench_is_held(bench))
            raise RuntimeError("no")

    model = Probe()
    with pytest.raises(RuntimeError, match="no"):
        QUICK.measure(model, torch.zeros(1, 3), bench)
    assert held == [True] and not bench_is_held(bench)
    assert model.training and gc.isenabled()


def bench_is_held(bench):
    import fcntl

    with (bench.folder / "gate").open("a") as gate:
        try:
            fcntl.flock(gate, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_a_network_of_a_hundred_times_the_work_takes_longer(bench):
    small, large = nn.Linear(16, 16), nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(10)])
    fast = QUICK.measure(small, torch.zeros(1, 16), bench).values["latency_ms"]
    slow = QUICK.measure(large, torch.zeros(1, 1024), bench).values["latency_ms"]
    assert slow > fast


def test_it_is_a_meter_and_refuses_nonsense():
    assert isinstance(QUICK, CostMeter) and QUICK.trained is False
    for wrong in ({"threads": 0}, {"batch": 0}, {"repeats": 0}, {"seconds": -1.0}, {"seconds": float("nan")}):
        with pytest.raises(InvalidInputError):
            Latency(**wrong)

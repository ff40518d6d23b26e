from __future__ import annotations

import statistics
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from nasplat.cost import Bench, CostMeter, Throughput, timing
from nasplat.cost.timing import Schedule
from nasplat.errors import InvalidInputError
from nasplat.identity import describe, restore
from nasplat.restorable import restorable
from nasplat.runtimes import TorchEager

QUICK = Schedule(blocks=2, seconds=0.0, patience_s=0.05)


@pytest.fixture(autouse=True)
def no_calibration(monkeypatch):
    monkeypatch.setattr(timing, "CALIBRATION_SECONDS", 0.0, raising=False)


def network():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))


def test_examples_a_second_at_each_batch_size(tmp_path):
    meter = Throughput("torch", batches=(1, 4), schedule=QUICK)
    found = meter.measure(network(), torch.randn(1, 1, 8, 8), Bench(tmp_path))
    assert isinstance(meter, CostMeter)
    assert set(found.values) == set(meter.metrics)
    for batch in (1, 4):
        name = f"throughput_b{batch}_per_s"
        samples, facts = found.samples[name], found.facts[name]
        assert facts["batch"] == batch
        # The median pass: the harmonic middle of two where their number is even.
        passes = statistics.median(batch / sample for sample in samples)
        assert found.values[name] == pytest.approx(batch / passes)
        assert found.values[f"{name}_suspect"] == float("suspect" in facts)


def test_each_batch_size_is_a_file_of_that_shape(tmp_path):
    seen = []

    @dataclass(frozen=True)
    class Watched(TorchEager):
        def export(self, model, example):
            seen.append((tuple(example.shape), model.training))
            return super().export(model, example)

    model = network().train()
    Throughput(Watched(), batches=(2, 5), schedule=QUICK).measure(model, torch.randn(1, 1, 8, 8), Bench(tmp_path))
    assert model.training
    assert [one for one in seen if one[0][1:] == (1, 8, 8)] == [((2, 1, 8, 8), False), ((5, 1, 8, 8), False)]


def test_names_carry_batch_and_label():
    meter = Throughput("torch", batches=[16], label="server")
    assert meter.metrics == ("throughput_b16_per_s_server", "throughput_b16_per_s_server_suspect")
    assert restore(describe(meter), restorable()) == meter


@pytest.mark.parametrize(
    "wrong",
    [{"batches": ()}, {"batches": (0,)}, {"batches": (1, 1)}, {"batches": 8}, {"threads": 0}, {"runtime": "none"}],
)
def test_what_is_not_legal_is_refused(wrong):
    with pytest.raises(InvalidInputError):
        Throughput(**wrong)

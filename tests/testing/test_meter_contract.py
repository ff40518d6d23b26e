"""The contract passes on sound meters, nasplat's own among them, and fails on one that breaks just one rule."""

from __future__ import annotations

import gc
import math
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Conv
from torch import nn

from nasplat import cost
from nasplat.cost import Bench, CostMeter, Measurement, timing
from nasplat.cost.timing import Schedule
from nasplat.testing.meter_contract import check_meter, small_network

QUICK = Schedule(blocks=2, seconds=0.0, patience_s=0.05)


# nasplat's own meters.


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "CALIBRATION_SECONDS", 0.0)


SPACE, INPUT = Conv(), torch.zeros(1, 1, 8, 8)


def table():
    return replace(cost.CostTable.counted(SPACE, INPUT, "macs"), error=0.0)


def network():
    """One of the space, built, so that its lazy layer has its weights."""
    architecture = SPACE.sample(np.random.default_rng(0))
    model = SPACE.build(architecture)
    model(INPUT)
    return {"model": model, "example": INPUT, "architecture": architecture}


CASES: Mapping[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "Count": lambda: (cost.Count(), {}),
    "ZeroCost": lambda: (
        cost.ZeroCost("synflow", "naswot", "jacob_cov", "grad_norm", "snip", batch_size=8),
        {"unitless": ("synflow", "naswot", "jacob_cov", "grad_norm", "snip")},
    ),
    "Latency": lambda: (cost.Latency("torch", schedule=QUICK), {"tolerance": math.inf}),
    "PeakMemory": lambda: (cost.PeakMemory("torch"), {"tolerance": math.inf}),
    "Throughput": lambda: (cost.Throughput("torch", batches=(1, 2), schedule=QUICK), {"tolerance": math.inf}),
    "Energy": lambda: (cost.Energy("torch", blocks=2, seconds=0.05, idle_s=0.05), {"tolerance": math.inf}),
    "Predicted": lambda: (cost.Predicted(cost.Count(), table(), checked=0.0), network()),
}
"""How to make each meter that is a class of ``nasplat.cost``, and what it promises."""

PROTOCOLS = {"CostMeter", "BatchMeter", "ArchitectureMeter"}


def meters() -> list[str]:
    """Names of all meters of ``nasplat.cost``."""
    verbs = ("measure", "measure_batch", "measure_architecture")
    named = {name: getattr(cost, name) for name in cost.__all__}
    classes = {name: kind for name, kind in named.items() if isinstance(kind, type) and name not in PROTOCOLS}
    return sorted(name for name, kind in classes.items() if any(hasattr(kind, verb) for verb in verbs))


SLOW = {"PeakMemory"}
"""Starts several processes, each for seconds."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in meters()]
)
def test_nasplats_own_meters_keep_the_contract(name, quick):
    assert name in CASES, f"say in CASES how to make {name}"
    meter, promises = CASES[name]()
    check_meter(meter, **promises)


@pytest.mark.parametrize("meter", [cost.Count(elementwise=2), cost.Latency("onnxruntime", label="x", schedule=QUICK)])
def test_other_settings_keep_it_too(meter, quick):
    tolerance = 0.0 if isinstance(meter, cost.Count) else math.inf
    check_meter(meter, tolerance=tolerance)


# Meters that keep it, and meters that break one rule.


@dataclass(frozen=True)
class Good:
    """Number of weights, and the mean time of nothing at all."""

    scale: float = 1.0

    metrics = ("weight_bytes",)
    trained = False

    def measure(self, model, example, bench):
        value = self.scale * 4 * sum(parameter.numel() for parameter in model.parameters())
        return Measurement({"weight_bytes": value}, {"weight_bytes": [value, value]}, {"weight_bytes": {"dtype": "f4"}})


def test_a_sound_meter_passes_and_its_measurement_comes_back():
    measurement = check_meter(Good(), restorable=False)
    model, _ = small_network()
    assert measurement.values["weight_bytes"] == 4 * sum(p.numel() for p in model.parameters())
    assert isinstance(Good(), CostMeter)


def test_a_model_of_ones_own():
    model = nn.Linear(4, 2)
    assert check_meter(Good(), model=model, example=torch.zeros(1, 4), restorable=False).values["weight_bytes"] == 40


def bad(change: Callable[..., Any]) -> Any:
    """``Good``, but what it gives, or does, is changed."""

    @dataclass(frozen=True)
    class Bad(Good):
        def measure(self, model, example, bench):
            measurement = super().measure(model, example, bench)
            changed = change(model=model, example=example, bench=bench, given=measurement)
            return changed if isinstance(changed, Measurement) else measurement

    return register(Bad)


def register(kind):
    """Picklable: known by its name in this module."""
    kind.__module__, kind.__qualname__ = __name__, "Registered"
    globals()["Registered"] = kind
    return kind()


COUNTER = iter(range(10**6))
KEPT: list[Any] = []


def first_weight(model):
    return next(iter(model.parameters()))


def doubled(model):
    with torch.no_grad():
        first_weight(model).mul_(2)


def hold(bench):
    lock = bench.measuring()
    lock.__enter__()
    KEPT.append(lock)


def value(**values):
    return lambda given, **_: replace(given, values=values)


BROKEN: Mapping[str, tuple[Callable[..., Any], str]] = {
    "not a measurement": (lambda given, **_: Measurement.__new__(Measurement), "values"),
    "not finite": (value(weight_bytes=math.nan), "no finite number"),
    "infinite": (value(weight_bytes=math.inf), "no finite number"),
    "no number": (value(weight_bytes="4"), "no finite number"),
    "listed but not given": (value(), "listed but not given"),
    "given but not listed": (value(weight_bytes=4.0, other_bytes=4.0), "begins with none"),
    "outside its samples": (value(weight_bytes=1.0), "outside its samples"),
    "samples not finite": (lambda given, **_: replace(given, samples={"weight_bytes_x": [math.nan]}), "no JSON"),
    "samples of nothing": (lambda given, **_: replace(given, samples={"x_bytes": [1.0]}), "begin with none"),
    "no samples": (lambda given, **_: replace(given, samples={"weight_bytes": []}), "no samples"),
    "facts that are no JSON": (lambda given, **_: replace(given, facts={"x": torch.zeros(1)}), "no JSON"),
    "facts that change": (lambda given, **_: replace(given, facts={"x": (1, 2)}), "change in JSON"),
    "given and absent": (
        lambda given, **_: replace(given, facts={"weight_bytes": {"absent": "no"}}), "said to be absent",
    ),
    "absent without a reason": (
        lambda given, **_: replace(given, values={}, samples={}, facts={"weight_bytes": {"absent": ""}}), "no reason",
    ),
    "not repeatable": (
        lambda given, **_: replace(given, values={"weight_bytes": float(next(COUNTER))}, samples={}), "measured again",
    ),
    "other weights": (lambda model, **_: doubled(model), "weights"),
    "other modes": (lambda model, **_: model.eval(), "modes"),
    "mode of a part": (lambda model, **_: model[1].train() if len(list(model.children())) else None, "modes"),
    "no gradients": (lambda model, **_: model.zero_grad(), "gradients"),
    "frozen": (lambda model, **_: model.requires_grad_(False), "requires_grad"),
    "other type": (lambda model, **_: model.double(), "weights"),
    "a hook": (lambda model, **_: model.register_forward_hook(lambda *_: None) and None, "hooks"),
    "a switch": (lambda model, **_: setattr(model, "fast", True), "switches"),
    "a part of it": (lambda model, **_: model.append(nn.ReLU()) if hasattr(model, "append") else None, "modules"),
    "other example": (lambda example, **_: example.add_(1), "example"),
    "threads": (lambda **_: torch.set_num_threads(torch.get_num_threads() + 1), "threads"),
    "grad mode": (lambda **_: torch.set_grad_enabled(False) and None, "grad mode"),
    "torch's generator": (lambda **_: torch.rand(1), "torch's generator"),
    "NumPy's generator": (lambda **_: np.random.rand(), "NumPy's generator"),  # noqa: NPY002
    "Python's generator": (lambda **_: random.random(), "Python's generator"),
    "garbage collection": (lambda **_: gc.disable(), "garbage collection"),
    "the bench": (lambda bench, **_: hold(bench), "bench is still held"),
}  # fmt: skip


@pytest.fixture
def undone():
    """What a bad meter does to the process is undone."""
    threads, state = torch.get_num_threads(), (torch.get_rng_state(), np.random.get_state(), random.getstate())  # noqa: NPY002
    affinity = os.sched_getaffinity(0)
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    random.setstate(state[2])
    gc.enable()
    os.sched_setaffinity(0, affinity)
    while KEPT:
        KEPT.pop().__exit__(None, None, None)


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_is_checked(rule, undone):
    change, message = BROKEN[rule]
    once = {"the bench"}  # it cannot be held twice by one process
    if rule in once:
        real, change = change, lambda **given: None if KEPT else real(**given)
    with pytest.raises((AssertionError, AttributeError), match=message):
        check_meter(bad(change), restorable=False)


def test_an_absent_value_with_a_reason_is_fine():
    absent = {"weight_bytes": {"absent": "this machine has no scales"}}
    meter = bad(lambda given, **_: replace(given, values={}, samples={}, facts=absent))
    assert check_meter(meter, restorable=False).values == {}


def test_tolerance_is_relative_and_by_name():
    def drifting(given, **_):
        return replace(given, values={"weight_bytes": 100.0 + next(COUNTER) % 2}, samples={})

    check_meter(bad(drifting), restorable=False, tolerance=0.02)
    check_meter(bad(drifting), restorable=False, tolerance={"weight_bytes": 0.02})
    check_meter(bad(drifting), restorable=False, tolerance=math.inf)
    for tolerance in (0.005, {"weight_bytes": 0.005}, {"other": 1.0}):
        with pytest.raises(AssertionError, match="measured again"):
            check_meter(bad(drifting), restorable=False, tolerance=tolerance)


def test_a_failing_network_must_not_leave_the_process_changed(undone):
    def careless(model, **_):
        if not list(model.parameters()):  # the network that cannot run
            gc.disable()
            raise RuntimeError("no")

    with pytest.raises(AssertionError, match=r"network that fails.*garbage collection"):
        check_meter(bad(careless), restorable=False)


def test_names_units_and_plain_data():
    @dataclass(frozen=True)
    class Named(Good):
        names: tuple[str, ...] = ("weight_bytes",)

        @property
        def metrics(self):  # type: ignore[override]
            return self.names

        def measure(self, model, example, bench):
            return Measurement(dict.fromkeys(self.names, 1.0))

    register(Named)
    legal = ("time_ms", "throughput_b8_per_s", "macs", "layers/1/params", "peak_memory_bytes_phone")
    check_meter(Named(names=legal), restorable=False)
    check_meter(Named(names=("score",)), restorable=False, unitless=("score",))
    for names, message in (
        ((), "no metric"), (("time",), "unit"), (("time_ms", "time_ms"), "twice"), (("time ms",), "letters"),
        (("zeit_\N{MICRO SIGN}s",), "letters"), (("comms",), "unit"),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match=message):
            check_meter(Named(names=names), restorable=False)

    @dataclass
    class Thawed(Good.__mro__[1]):
        metrics = ("weight_bytes",)
        trained = False
        measure = Good.measure
        scale: float = 1.0

    with pytest.raises(AssertionError, match="frozen"):
        check_meter(register(Thawed), restorable=False)

    class NoData:
        metrics, trained = ("weight_bytes",), False
        measure = Good.measure

    with pytest.raises(AssertionError, match="dataclass"):
        check_meter(register(NoData), restorable=False)
    with pytest.raises(AssertionError, match="no meter"):
        check_meter(object(), restorable=False)


def test_what_a_pickle_loses_is_seen():
    @dataclass(frozen=True)
    class Forgetful(Good):
        def __reduce__(self):
            return type(self), (self.scale + 1,)

    with pytest.raises(AssertionError, match="pickled"):
        check_meter(register(Forgetful), restorable=False)


def test_a_meter_that_no_folder_brings_back_is_refused_unless_said_so():
    from nasplat.errors import UnsupportedError

    with pytest.raises((AssertionError, UnsupportedError)):
        check_meter(Good())


def test_a_batch_meter_is_held_to_it_too():
    @dataclass(frozen=True)
    class Batched:
        metrics = ("examples_seen_calls",)
        trained = False
        examples = 5

        def measure_batch(self, model, x, y, loss, bench: Bench):
            assert x.shape == (5, 1, 8, 8) and y.shape == (5,)
            return Measurement({"examples_seen_calls": float(len(x))})

    check_meter(register(Batched), restorable=False)

"""What every meter must keep to: call :func:`check_meter` in a test.

::

    def test_my_meter_is_a_meter():
        check_meter(MyMeter(), tolerance=0.0)
"""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import gc
import json
import math
import os
import pickle
import random
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.cost.bench import Bench
from nasplat.cost.meter import ArchitectureMeter, BatchMeter, CostMeter, Measurement, Meter
from nasplat.identity import canonical, describe, restore
from nasplat.restorable import restorable as nasplats_own

UNITS = frozenset(
    {"s", "ms", "us", "ns", "seconds", "bytes", "kib", "mib", "j", "mj", "uj", "w", "mw", "hz", "mhz", "percent"}
)
"""Parts of a name that are units. A rate ends in ``per`` and a unit of time: ``throughput_b8_per_s``."""

COUNTS = frozenset({"params", "macs", "bops", "flops", "ops", "samples", "layers", "calls", "misses"})
"""Parts of a name that say what is counted."""

_LEGAL = re.compile(r"[A-Za-z0-9_\-./]+")


class _Broken(nn.Module):
    """A network that cannot run."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("this network cannot run")


def small_network() -> tuple[nn.Module, Tensor]:
    """A small convolutional network of mixed state, and its input ``(1, 1, 8, 8)``.

    It is training, but for a frozen batch normalisation; one parameter is frozen, another has a gradient.
    """
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(6 * 16, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[-1].weight.grad = torch.ones_like(model[-1].weight)  # type: ignore[arg-type]
    return model, torch.randn(1, 1, 8, 8, generator=generator)


def check_meter(
    meter: Meter,
    *,
    model: nn.Module | None = None,
    example: Tensor | None = None,
    architecture: Architecture | None = None,
    unitless: Collection[str] = (),
    tolerance: float | Mapping[str, float] = 0.0,
    restorable: bool = True,
    bench: Bench | None = None,
) -> Measurement:
    """Hold a meter to what a study relies on.

    It is plain data that a folder can name and a process can send. It gives the values it lists, finite, the unit in
    the name, or the reason why one is absent. It measures the same again. It leaves model, input, generators, threads
    and the bench as they were, also where the network fails.

    Args:
        meter: The meter under test.
        model: A network; None takes :func:`small_network`.
        example: One input ``(1, ...)`` of it. Needed where a model is given.
        architecture: The model's, for an ``ArchitectureMeter`` that looks at it.
        unitless: Names, and beginnings of names, of values that are pure numbers: scores, ratios.
        tolerance: How much a second measurement may differ, relative to the larger of the two; for all values, or by
            name, where a name that is missing has 0. ``math.inf`` where nothing is promised: on a machine that others
            use, times may differ by any amount.
        restorable: Whether a folder can bring the meter back: nasplat's own, and those of modules with a plug-in. A
            folder cannot bring back one of a user's script.
        bench: Where it measures; None takes one of its own in a temporary folder.

    Returns:
        The first measurement, for tests of what is in it.

    Raises:
        AssertionError: It breaks a rule; the message says which.
    """
    if model is None:
        model, example = small_network()
    assert example is not None, "an example is needed with a model"
    _check_plain(meter, restorable)
    _check_names(meter, unitless)
    with tempfile.TemporaryDirectory() as folder:
        bench = bench or Bench(Path(folder))
        before, kept, process = _state_of(model), example.clone(), _state_of_process()
        first, second = (_measure(meter, architecture, model, example, bench) for _ in range(2))
        _check_unchanged("the model", before, _state_of(model))
        assert torch.equal(example, kept), "the example has changed"
        _check_unchanged("the process", process, _state_of_process())
        assert _is_free(bench), "the bench is still held after a measurement"
        for measurement in (first, second):
            _check_measurement(meter, measurement, unitless)
        _check_repeated(first, second, tolerance)
        _check_failure(meter, architecture, example, bench)
    return first


def _check_plain(meter: Meter, restorable: bool) -> None:
    assert isinstance(meter, CostMeter | BatchMeter | ArchitectureMeter), f"{meter!r} is no meter"
    kinds = [isinstance(meter, kind) for kind in (CostMeter, BatchMeter, ArchitectureMeter)]
    assert sum(kinds) == 1, f"{meter!r} has more than one of measure, measure_batch and measure_architecture"
    assert type(meter.trained) is bool, f"trained is {meter.trained!r}, not True or False"
    assert dataclasses.is_dataclass(meter) and not isinstance(meter, type), f"{meter!r} is no dataclass"
    assert type(meter).__dataclass_params__.frozen, f"{type(meter).__name__} is not frozen"
    again = pickle.loads(pickle.dumps(meter))
    assert again == meter, "a pickled meter is another one"
    assert tuple(again.metrics) == tuple(meter.metrics), "a pickled meter lists other metrics"
    description = json.loads(canonical(describe(meter)))
    assert canonical(describe(again)) == canonical(description), "a pickled meter has another description"
    if restorable:
        restored = restore(description, nasplats_own())
        assert restored == meter, f"a folder brings {meter!r} back as {restored!r}"


def _check_names(meter: Meter, unitless: Collection[str]) -> None:
    names = tuple(meter.metrics)
    assert names, "it lists no metric"
    assert len(set(names)) == len(names), f"a metric is listed twice: {names}"
    assert tuple(meter.metrics) == names, "the listed metrics change"
    for name in names:
        _check_name(name, unitless)


def _check_name(name: Any, unitless: Collection[str]) -> None:
    assert isinstance(name, str) and _LEGAL.fullmatch(name), f"{name!r}: letters, digits and _ - . / only"
    parts = set(re.split(r"[_\-./]", name.lower()))
    pure = any(name.startswith(start) for start in unitless)
    assert pure or parts & (UNITS | COUNTS), (
        f"{name!r} names no unit ({', '.join(sorted(UNITS))}) and nothing that is counted "
        f"({', '.join(sorted(COUNTS))}); a pure number is listed in `unitless`"
    )


def _check_measurement(meter: Meter, measurement: Measurement, unitless: Collection[str]) -> None:
    assert isinstance(measurement, Measurement), f"{measurement!r} is no Measurement"
    listed, values = tuple(meter.metrics), measurement.values
    for name, value in values.items():
        number = isinstance(value, float | int) and not isinstance(value, bool)
        assert number and math.isfinite(value), f"{name} is {value!r}, no finite number"
        _check_name(name, unitless)
        assert any(name.startswith(one) for one in listed), f"{name} is given, but begins with none of {listed}"
    facts = _check_json("facts", measurement.facts)
    for name in listed:
        reason = facts.get(name, {}).get("absent") if isinstance(facts.get(name, {}), dict) else None
        if name in values:
            assert not reason, f"{name} is given and said to be absent"
        else:
            assert isinstance(reason, str) and reason, (
                f"{name} is listed but not given, and facts[{name!r}]['absent'] gives no reason"
            )
    samples = _check_json("samples", {name: list(held) for name, held in measurement.samples.items()})
    for name, held in samples.items():
        assert all(type(one) in (float, int) and math.isfinite(one) for one in held), f"samples of {name}: not finite"
        assert any(name.startswith(one) for one in listed), f"samples {name} begin with none of {listed}"
        if name in values:
            assert held, f"{name} has a value but no samples"
            assert min(held) <= values[name] <= max(held), f"{name} is {values[name]}, outside its samples"


def _check_json(what: str, value: Any) -> Any:
    try:
        text = json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{what} are no JSON: {error}") from error
    back = json.loads(text)
    assert back == dict(value), f"{what} change in JSON: {value} and {back}"
    return back


def _check_repeated(first: Measurement, second: Measurement, tolerance: float | Mapping[str, float]) -> None:
    assert set(first.values) == set(second.values), "a second measurement gives other values"
    for name, value in first.values.items():
        allowed = tolerance.get(name, 0.0) if isinstance(tolerance, Mapping) else tolerance
        again = second.values[name]
        assert abs(value - again) <= allowed * max(abs(value), abs(again)) or math.isinf(allowed), (
            f"{name} was {value}, and {again} when measured again; the stated tolerance is {allowed}"
        )


def _check_failure(meter: Meter, architecture: Architecture | None, example: Tensor, bench: Bench) -> None:
    model, process = _Broken(), _state_of_process()
    try:
        measurement = _measure(meter, architecture, model, example, bench)
    except Exception:
        pass
    else:
        # A meter that need not run the network may measure it all the same.
        assert isinstance(measurement, Measurement), f"{measurement!r} is no Measurement"
    assert model.training, "a network that failed is left in another mode"
    _check_unchanged("the process, after a network that fails,", process, _state_of_process())
    assert _is_free(bench), "the bench is still held after a network that failed"


def _measure(
    meter: Meter, architecture: Architecture | None, model: nn.Module, example: Tensor, bench: Bench
) -> Measurement:
    if isinstance(meter, BatchMeter):
        generator = torch.Generator().manual_seed(1)
        n = meter.examples
        x = torch.randn(n, *example.shape[1:], generator=generator, dtype=example.dtype)
        y = torch.randint(2, (n,), generator=generator)
        return meter.measure_batch(model, x, y, nn.functional.cross_entropy, bench)
    if isinstance(meter, ArchitectureMeter):
        return meter.measure_architecture(architecture, model, example, bench)
    return meter.measure(model, example, bench)


def _state_of(model: nn.Module) -> dict[str, Any]:
    """All that a meter could change: weights, gradients, modes, switches, hooks, structure."""
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    plain = (bool, int, float, str, type(None))
    return {
        "weights and buffers": {name: copy.deepcopy(value) for name, value in model.state_dict().items()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "identities of parameters": {name: id(p) for name, p in parameters.items()},
        "devices and types": {name: (str(p.device), str(p.dtype)) for name, p in parameters.items()},
        "modules": {name: id(module) for name, module in modules.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "switches": {
            name: {key: value for key, value in vars(module).items() if isinstance(value, plain)}
            for name, module in modules.items()
        },
        "hooks": {
            name: {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
            for name, module in modules.items()
        },
        "methods": {name: sorted(key for key in vars(module) if key == "forward") for name, module in modules.items()},
    }


def _state_of_process() -> dict[str, Any]:
    return {
        "torch's threads": torch.get_num_threads(),
        "processors": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "garbage collection": gc.isenabled(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's generator": torch.get_rng_state(),
        "NumPy's generator": pickle.dumps(np.random.get_state(legacy=False)),  # noqa: NPY002
        "Python's generator": random.getstate(),
    }


def _check_unchanged(whose: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for what, value in before.items():
        assert _same(value, after[what]), f"{whose} has other {what} after a measurement"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    return bool(a == b)


def _is_free(bench: Bench) -> bool:
    """Whether nobody holds one of the bench's locks."""
    if not bench.folder.exists():
        return True
    for path in bench.folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
    return True

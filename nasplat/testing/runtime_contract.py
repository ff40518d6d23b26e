"""What every runtime must keep to, as one call.

Example::

    from nasplat.testing.runtime_contract import check_runtime

    def test_mine():
        check_runtime(Mine())
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import io
import json
import logging
import math
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from nasplat.errors import UnsupportedError
from nasplat.nn import BinaryConv2d
from nasplat.runtimes.runtime import Runtime, Session

TOLERANCE = 1e-3
"""Largest difference from the model, in standard deviations of its outputs, of a runtime that computes in float32."""


def check_runtime(
    runtime: Runtime,
    model: nn.Module | None = None,
    example: Tensor | None = None,
    *,
    tolerance: float = TOLERANCE,
    deterministic: bool = True,
    unsupported: nn.Module | None = None,
) -> None:
    """Check that a runtime does what nasplat relies on.

    It computes what the model computes, for batches of several and of one, on one thread and on two, here and in
    another process that has nothing but the file; a run repeats; nothing else changes, neither the model nor the
    process, and nothing is printed; what it cannot do it refuses with UnsupportedError; it is plain data.

    Args:
        runtime: The runtime, on a machine where it can run.
        model: In evaluation mode; None takes :func:`network`.
        example: Inputs ``(n, ...)``, ``n >= 2``; None takes :func:`images`.
        tolerance: Largest difference from the model, in standard deviations of the model's outputs.
        deterministic: Whether the same model gives the same file, to the last byte.
        unsupported: A model that it cannot run, on the same example; None takes one that few can. Where a runtime can
            run it after all, its results must be right.

    Raises:
        AssertionError: It does not; the message says in what.
    """
    model = network() if model is None else model
    example = images() if example is None else example
    assert len(example) >= 2, "an example of at least two inputs is needed"
    assert not model.training, "a model in evaluation mode is needed"
    _is_plain_data(runtime)
    with torch.no_grad():
        reference = model(example).clone()
    with _alone("export", model, example, threads=False):
        file = runtime.export(model, example)
    assert isinstance(file, bytes) and file, f"export gave {type(file).__name__}; bytes are needed"
    if deterministic:
        assert runtime.export(model, example) == file, "the same model was written as another file"
    _session_is_right(runtime, file, model, example, reference, tolerance)
    with torch.no_grad():
        one = example[:1].clone()
        alone = _load(runtime, runtime.export(model, one), one)
        alone.run()
        _same(alone.output(), model(one), reference, tolerance, "of a batch of one")
    _same(elsewhere(runtime, file, example), reference, reference, tolerance, "computed in another process")
    _refuses(runtime, _Odd().eval() if unsupported is None else unsupported, example, tolerance)


def network(*, binary: bool = False) -> nn.Module:
    """A small network for :func:`images` with plain and grouped convolutions, trained a little, in evaluation mode.

    Args:
        binary: Whether its inner convolutions are binary, for runtimes that run no others.
    """
    conv: Callable[..., nn.Module] = BinaryConv2d if binary else _convolution
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)]
        for groups in (1, 4):
            layers += [conv(16, 16, 3, padding=1, groups=groups), nn.BatchNorm2d(16), nn.ReLU()]
        layers += [nn.MaxPool2d(2), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
        model = nn.Sequential(*layers)
        for _ in range(3):
            model(torch.randn(8, 3, 16, 16) + 0.5)
    return model.eval()


def images() -> Tensor:
    """Four random images, ``(4, 3, 16, 16)``."""
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) + 0.5


def _convolution(*args: Any, **options: Any) -> nn.Module:
    return nn.Conv2d(*args, bias=False, **options)  # type: ignore[misc]


def elsewhere(runtime: Runtime, file: bytes, example: Tensor) -> Tensor:
    """What a file computes in another process, which is given runtime, file and example and nothing else.

    Raises:
        AssertionError: It cannot be loaded or run there.
    """
    child = _child()
    assert child.stdin is not None
    assert child.stdout is not None
    _send(child.stdin, pickle.dumps((runtime, file, example.numpy())))
    worked, answer = pickle.loads(_receive(child.stdout))
    assert worked, f"in another process, the file could not be run: {answer}"
    return torch.from_numpy(answer)


def serve() -> None:
    """Answer :func:`elsewhere`: the whole life of the other process."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a runtime prints is no answer
    while True:
        try:
            request = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            runtime, file, x = pickle.loads(request)
            session = runtime.load(file, torch.from_numpy(x), 1)
            session.run()
            answer = True, session.output().numpy()
        except Exception as error:  # of any kind: it is told to the other side
            answer = False, f"{type(error).__name__}: {error}"
        _send(answers, pickle.dumps(answer))


@lru_cache(maxsize=1)
def _child() -> subprocess.Popen[bytes]:
    """The other process, for all checks of this one: it takes seconds to start."""
    path = os.pathsep.join(entry or "." for entry in sys.path)
    child = subprocess.Popen(
        [sys.executable, "-c", "from nasplat.testing.runtime_contract import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    atexit.register(child.kill)
    return child


def _send(stream: Any, message: bytes) -> None:
    stream.write(struct.pack("<Q", len(message)) + message)
    stream.flush()


def _receive(stream: Any) -> bytes:
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError("the other process has ended")
    message: bytes = stream.read(struct.unpack("<Q", header)[0])
    return message


def _is_plain_data(runtime: Runtime) -> None:
    kind = type(runtime)
    assert dataclasses.is_dataclass(runtime), f"{kind.__name__} is no dataclass"
    assert kind.__dataclass_params__.frozen, f"{kind.__name__} is not frozen"
    assert isinstance(runtime, Runtime), f"{kind.__name__} lacks name, export, load or facts"
    assert pickle.loads(pickle.dumps(runtime)) == runtime, "pickled, it is another runtime"
    assert re.fullmatch(r"[a-z0-9_]+", runtime.name), f"name is {runtime.name!r}; small letters, digits and _ only"
    with _alone("facts", None, None, threads=False):
        facts = dict(runtime.facts())
    _are_facts(facts, "facts")
    assert facts, "facts are empty; versions at least are needed"
    assert dict(runtime.facts()) == facts, "facts change from one call to the next"


def _are_facts(facts: Mapping[str, Any], what: str) -> None:
    for name, value in facts.items():
        assert isinstance(name, str) and _is_plain(value), f"{what}: {name!r} is {value!r}; text or an integer"
    json.dumps(dict(facts))


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _session_is_right(
    runtime: Runtime, file: bytes, model: nn.Module, example: Tensor, reference: Tensor, tolerance: float
) -> None:
    with _alone("load", model, example, threads=True):
        session = _load(runtime, file, example)
    with _alone("run", model, example, threads=False):
        session.run()
        first = session.output()
        took = session.seconds()
        again = session.output()
    _same(first, reference, reference, tolerance, "")
    assert isinstance(took, float) and 0 < took < math.inf, f"seconds() gave {took!r}"
    assert torch.equal(first, again), "another run gave another result"
    with torch.inference_mode():  # where the result may have been made
        again.zero_()
    assert torch.equal(session.output(), first), "output() gives the session's own memory, not a copy"
    _are_facts(session.facts(), "facts of a session")
    other = _load(runtime, file, example, threads=2)
    other.run()
    _same(other.output(), reference, reference, tolerance, "on two threads")
    session.run()
    assert torch.equal(session.output(), first), "another session changed what this one computes"


def _load(runtime: Runtime, file: bytes, example: Tensor, threads: int = 1) -> Session:
    before = torch.get_num_threads()
    try:
        session = runtime.load(file, example, threads)
    finally:
        torch.set_num_threads(before)
    assert isinstance(session, Session), f"load gave {type(session).__name__}; a Session is needed"
    return session


def _same(output: Tensor, expected: Tensor, scale: Tensor, tolerance: float, where: str) -> None:
    assert isinstance(output, Tensor), f"output() gave {type(output).__name__}; a tensor is needed"
    assert output.dtype == torch.float32, f"output() is {output.dtype}; float32 is needed"
    assert output.device.type == "cpu", f"output() is on {output.device}; it must be on the CPU"
    assert output.shape == expected.shape, f"output() has shape {tuple(output.shape)}, not {tuple(expected.shape)}"
    difference = float((output - expected).abs().max() / scale.std())
    assert difference <= tolerance, (
        f"the result {where + ' ' if where else ''}differs from the model's by {difference:.2g} standard deviations; "
        f"{tolerance:g} at most is legal"
    )


def _refuses(runtime: Runtime, model: nn.Module, example: Tensor, tolerance: float) -> None:
    with torch.no_grad():
        expected = model(example)
    try:
        session = _load(runtime, runtime.export(model, example), example)
        session.run()
    except UnsupportedError as error:
        assert str(error).strip(), "UnsupportedError does not say what is missing"
        return
    except Exception as error:
        raise AssertionError(
            f"a model that it cannot run was refused with {type(error).__name__}, not UnsupportedError: {error}"
        ) from error
    _same(session.output(), expected, expected, tolerance, "of a model that few can run")


class _Odd(nn.Module):
    """It cannot be pickled (a lock), traced for all inputs (a branch on values) or written as ONNX (eigenvalues)."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            sign = 1.0 if float(x.sum()) > 0 else -1.0
        values = torch.linalg.eigvals(x.mean(1))
        return torch.as_tensor(sign * values.abs().sum(-1, keepdim=True), dtype=torch.float32)


@contextmanager
def _alone(step: str, model: nn.Module | None, example: Tensor | None, *, threads: bool) -> Iterator[None]:
    """Nothing but what is asked for happens: no change of model, input or process, no print, no warning.

    Args:
        step: For the message.
        model: Must stay as it is.
        example: Likewise.
        threads: Whether torch's number of threads may change.
    """
    count, before = torch.get_num_threads(), _process()
    held = None if model is None else _state(model)
    x = None if example is None else example.clone()
    with warnings.catch_warnings(record=True) as told, _printed() as printed:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        yield
        same_filters = list(warnings.filters) == filters
    now, after = torch.get_num_threads(), _process()
    torch.set_num_threads(count)
    for name, value in before.items():
        assert after[name] == value, f"{step} changed {name}"
    assert threads or now == count, f"{step} changed torch's number of threads"
    assert same_filters, f"{step} changed the filters of warnings"
    assert not told, f"{step} warned: {told[0].message}"
    assert not printed[0], f"{step} printed: {printed[0][:200]}"
    if model is not None and held is not None:
        for name, value in _state(model).items():
            old = held.pop(name, None)
            kept = torch.equal(value, old) if isinstance(value, Tensor) and isinstance(old, Tensor) else value == old
            assert kept, f"{step} changed the model: {name}"
        assert not held, f"{step} changed the model: {', '.join(held)}"
    if example is not None and x is not None:
        assert torch.equal(example, x), f"{step} changed the example"


def _process() -> dict[str, Any]:
    loggers = {name: held for name, held in logging.root.manager.loggerDict.items() if isinstance(held, logging.Logger)}
    return {
        "Python's random generator": random.getstate(),
        "NumPy's random generator": pickle.dumps(np.random.get_state(legacy=False)),  # noqa: NPY002
        "torch's random generator": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the root logger": (list(logging.root.handlers), list(logging.root.filters), logging.root.level),
        "the level that logging is disabled below": logging.root.manager.disable,
        "the current folder": Path.cwd(),
        "whether garbage is collected": gc.isenabled(),
        "levels of loggers": {name: loggers[name].level for name in ("nasplat", "torch", "ray") if name in loggers},
    }


def _state(model: nn.Module) -> dict[str, Any]:
    held: dict[str, Any] = {f"tensor {name}": tensor.clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        held[f"identity of {name}"] = (id(parameter), parameter.requires_grad, parameter.grad is None)
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        held[f"module {name or 'itself'}"] = (id(module), module.training, hooks, sorted(vars(module)))
    return held


@contextmanager
def _printed() -> Iterator[list[str]]:
    """Everything written to the process's standard output and error while it lasts, by C++ too."""
    found = [""]
    sys.stdout.flush()
    sys.stderr.flush()
    python = io.StringIO()
    kept = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as file:
        handle: BinaryIO = file
        try:
            for number in (1, 2):
                os.dup2(handle.fileno(), number)
            with redirect_stdout(python), redirect_stderr(python):
                yield found
        finally:
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
        handle.seek(0)
        found[0] = python.getvalue() + handle.read().decode(errors="replace")

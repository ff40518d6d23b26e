"""Every installed runtime keeps the contract, and the contract finds runtimes that do not."""

import logging
import os
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from nasplat import plugins
from nasplat.errors import UnsupportedError
from nasplat.runtimes import Cuda, OnnxRuntimeInt8, PackedBits, Session, TorchCompiled, TorchEager, TorchExported, named
from nasplat.runtimes import onnx_runtime as traced
from nasplat.testing.runtime_contract import check_runtime, network

OWN = {
    "cuda": Cuda(),
    "onnxruntime": traced.OnnxRuntime(),
    "onnxruntime_int8": OnnxRuntimeInt8(),
    "packed": PackedBits(),
    "torch": TorchEager(),
    "torch_compile": TorchCompiled(),
    "torch_export": TorchExported(),
}

SLOW = ("torch_compile", "torch_export")
"""They take tens of seconds and some seconds."""


def options(name: str) -> dict[str, Any]:
    if name == "packed":
        return {"model": network(binary=True)}
    # Eight bits round to some hundredths of a standard deviation; a GPU multiplies with TF32.
    return {"tolerance": {"onnxruntime_int8": 0.15, "cuda": 0.02}.get(name, 1e-3)}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in OWN])
def test_own_runtime_keeps_the_contract(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU; test_cuda.py tests the refusal")
    if name.startswith("onnx"):
        # For the model that must be refused, the exporter that steps in takes seconds; it has a test of its own.
        monkeypatch.setattr(traced, "_exported", _unknown)
    check_runtime(OWN[name], **options(name))


def _unknown(*_: object) -> bytes:
    raise RuntimeError("an operator is unknown")


@pytest.mark.parametrize("name", plugins.installed(plugins.RUNTIMES))
def test_entry_points_lead_to_runtimes_of_that_name(name: str) -> None:
    runtime = named(name)
    assert runtime.name == name
    if name in OWN:
        assert runtime == OWN[name]


class _Wrong(Session):
    """A session that does one thing wrong."""

    def __init__(self, session: Session, fault: str) -> None:
        self._session, self._fault, self._runs = session, fault, 0

    def run(self) -> None:
        self._session.run()
        self._runs += 1

    def output(self) -> torch.Tensor:
        y = self._session.output()
        match self._fault:
            case "wrong":
                return y * 1.01
            case "runs differ":
                return y + 1e-6 * self._runs
            case "double":
                return y.double()
            case "shape":
                return y[:1]
            case "own memory":
                return self._session._y  # type: ignore[attr-defined, no-any-return]
        return y

    def seconds(self) -> float:
        taken = super().seconds()
        return 0.0 if self._fault == "no time" else taken


_EXPORTS = 0


@dataclass(frozen=True)
class Faulty:
    """Torch with one fault."""

    fault: str = ""
    name: str = "faulty"
    home: int = field(default_factory=os.getpid)

    def export(self, model: torch.nn.Module, example: torch.Tensor) -> bytes:
        global _EXPORTS
        _EXPORTS += 1
        match self.fault:
            case "trains":
                model.train()
            case "moves weights":
                next(model.parameters()).data.add_(1e-9)
            case "changes the example":
                example.add_(1)
            case "draws":
                random.random()
            case "draws torch":
                torch.rand(1)
            case "prints":
                os.write(1, b"hello")
            case "warns":
                warnings.warn("take care", stacklevel=2)
            case "logs":
                logging.getLogger().addHandler(logging.NullHandler())
            case "threads":
                torch.set_num_threads(torch.get_num_threads() + 1)
            case "keeps filters":
                warnings.simplefilter("ignore")
            case "another error" if not isinstance(model, torch.nn.Sequential):
                raise ValueError("no")
        file = TorchEager().export(model, example)
        if self.fault == "another file":
            return file + bytes([_EXPORTS % 256])
        return "text" if self.fault == "no bytes" else file  # type: ignore[return-value]

    def load(self, file: bytes, example: torch.Tensor, threads: int) -> Session:
        if self.fault == "here only" and os.getpid() != self.home:
            raise RuntimeError("it was left behind")
        if self.fault == "grad mode":
            torch.set_grad_enabled(False)
        return _Wrong(TorchEager().load(file, example, threads), self.fault)

    def facts(self) -> Mapping[str, Any]:
        match self.fault:
            case "no facts":
                return {}
            case "odd facts":
                return {"speed": 1.5}
        return {"torch": torch.__version__}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wrong", "differs from the model's"),
        ("runs differ", "another run gave another result"),
        ("double", "float64"),
        ("shape", "has shape"),
        ("own memory", "not a copy"),
        ("no time", r"seconds\(\) gave 0.0"),
        ("trains", "export changed the model"),
        ("moves weights", "export changed the model: tensor"),
        ("changes the example", "export changed the example"),
        ("draws", "Python's random generator"),
        ("draws torch", "torch's random generator"),
        ("prints", "export printed: hello"),
        ("warns", "export warned: take care"),
        ("logs", "the root logger"),
        ("threads", "number of threads"),
        ("keeps filters", "filters of warnings"),
        ("grad mode", "load changed grad mode"),
        ("another file", "written as another file"),
        ("no bytes", "bytes are needed"),
        ("no facts", "facts are empty"),
        ("odd facts", "text or an integer"),
        ("another error", "not UnsupportedError"),
        ("here only", "in another process, the file could not be run: RuntimeError: it was left behind"),
    ],
)
def test_faults_are_found(fault: str, message: str) -> None:
    handlers = list(logging.root.handlers)
    try:
        with pytest.raises(AssertionError, match=message):
            check_runtime(Faulty(fault))
    finally:
        logging.root.handlers[:] = handlers
        torch.set_grad_enabled(True)


def test_sound_runtime_passes() -> None:
    check_runtime(Faulty())


@dataclass
class _Loose:
    name: str = "loose"


def test_runtime_must_be_plain_data() -> None:
    with pytest.raises(AssertionError, match="not frozen"):
        check_runtime(_Loose())  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="no dataclass"):
        check_runtime(object())  # type: ignore[arg-type]


def test_what_it_can_run_after_all_must_be_right() -> None:
    """A runtime need not refuse, but then it must compute."""
    model = network(binary=True)
    check_runtime(TorchEager(), unsupported=model)


def test_refusal_names_the_reason() -> None:
    with pytest.raises(UnsupportedError, match="cannot be pickled"):
        TorchEager().export(torch.nn.Sequential(_Open()), torch.zeros(1))


class _Open(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stream = (number for number in range(3))

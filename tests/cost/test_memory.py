"""Peak memory. Each real measurement is a process of its own, so there are few."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
from dataclasses import dataclass

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn

from nasplat.cost import Bench, CostMeter, PeakMemory, memory, resident
from nasplat.errors import CandidateError, InvalidInputError, TimeLimitError, UnsupportedError
from nasplat.identity import describe, restore
from nasplat.restorable import restorable
from nasplat.runtimes import Session

MIB = 1 << 20


@pytest.fixture(autouse=True)
def sent_with_its_code(request):
    """The tests' runtimes live in a module that the fresh process cannot import."""
    cloudpickle.register_pickle_by_value(request.module)
    yield
    cloudpickle.unregister_pickle_by_value(request.module)


@dataclass(frozen=True)
class Known:
    """Takes a known amount of memory for the weights, while it loads, and while it runs."""

    name: str = "known"
    weights: int = 24
    loading: int = 64
    running: int = 40

    def export(self, model, example):
        return b"anchor" if example.shape[1] == 3 else bytes(MIB)

    def load(self, file, example, threads):
        return _Known(self, len(file) == MIB)

    def facts(self):
        return {"known": 1}


class _Known(Session):
    def __init__(self, sizes, real):
        self.sizes, self.real = sizes, real
        if real:
            np.ones(sizes.loading * MIB, np.uint8)
        # The warm-up leaves nothing behind, however much it takes.
        self.weights = np.ones((sizes.weights if real else 200) * MIB, np.uint8)

    def run(self):
        np.ones((self.sizes.running if self.real else 1) * MIB, np.uint8)

    def output(self):
        return torch.zeros(1)


@dataclass(frozen=True)
class Failing(Known):
    how: str = ""

    def load(self, file, example, threads):
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "unsupported":
            raise UnsupportedError("this needs a unicorn")
        raise ValueError("broken file")


def measure(meter, tmp_path):
    return meter.measure(nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 8, 8), Bench(tmp_path))


def test_known_amounts_are_found(tmp_path):
    meter = PeakMemory(Known())
    found = measure(meter, tmp_path)
    assert isinstance(meter, CostMeter)
    assert set(found.values) == set(meter.metrics)
    assert found.values["peak_memory_bytes"] == pytest.approx((24 + 40) * MIB, rel=0.02)
    # Loading came before the weights, with the file's mebibyte; running needs less than both.
    assert found.values["peak_memory_load_bytes"] == pytest.approx((64 + 1) * MIB, rel=0.02)
    facts = found.facts["peak_memory_bytes"]
    assert (facts["runtime"], facts["known"], facts["memory"]) == ("known", 1, "host")
    assert facts["file_bytes"] == MIB
    assert facts["resident_loaded_bytes"] == pytest.approx(24 * MIB, rel=0.02)


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        pytest.param("killed", CandidateError, "was killed, as the system does", marks=pytest.mark.slow),
        pytest.param("unsupported", UnsupportedError, "this needs a unicorn", marks=pytest.mark.slow),
        pytest.param("broken", CandidateError, "ValueError: broken file", marks=pytest.mark.slow),
    ],
)
def test_what_ends_the_process_is_said(how, kind, text, tmp_path):
    with pytest.raises(kind, match=text):
        measure(PeakMemory(Failing(how=how)), tmp_path)


@pytest.mark.parametrize(
    ("code", "text"),
    [(-9, "was killed, as the system does when memory runs out"), (-11, "was ended by SIGSEGV"), (2, "code 2: last")],
)
def test_how_a_process_ended_is_said_in_words(code, text, monkeypatch, tmp_path):
    done = subprocess.CompletedProcess([], code, b"", b"first\nlast\n")
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(CandidateError, match=text):
        measure(PeakMemory(Known()), tmp_path)


def test_a_process_that_takes_too_long_is_ended(tmp_path):
    with pytest.raises(TimeLimitError, match=r"more than 0\.05 s"):
        measure(PeakMemory(Known(), timeout_s=0.05), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "torch", "packed"])
def test_memory_of_runtimes_repeats_and_holds_the_activations(runtime, tmp_path):
    if runtime == "packed":
        pytest.importorskip("numba")
    from nasplat.nn import BinaryBlock

    layers = [nn.Conv2d(1, 64, 3, padding=1), BinaryBlock(64, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(64, 3)).eval()
    small, large = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 128, 128)
    found = PeakMemory(runtime, repeats=3).measure(model, small, Bench(tmp_path))
    samples = found.samples["peak_memory_bytes"]
    assert max(samples) - min(samples) < max(0.1 * min(samples), 512 * 1024)
    more = PeakMemory(runtime).measure(model, large, Bench(tmp_path))
    # At least one activation of 64 channels more, at four times the places.
    grown = more.values["peak_memory_bytes"] - found.values["peak_memory_bytes"]
    assert grown > 0.9 * 4 * 64 * (128**2 - 64**2)


@pytest.mark.parametrize("method", ["VmHWM", "ru_maxrss"])
def test_marks_see_what_was_freed_again(method, monkeypatch):
    if method == "ru_maxrss":
        monkeypatch.setattr(resident, "_restarted", lambda: False)
    marks = resident.Marks()
    if marks.method != method:
        pytest.skip("this kernel does not let a process take its mark back")
    before = marks.restart()
    with mmap.mmap(-1, 32 * MIB) as held:  # not what an allocator may have kept
        for page in range(0, 32 * MIB, mmap.PAGESIZE):
            held[page] = 1
    assert marks.highest() - before == pytest.approx(32 * MIB, rel=0.05)
    again = marks.restart()
    assert marks.highest() - again < 2 * MIB


def test_the_median_of_several_processes_counts(monkeypatch, tmp_path):
    answers = iter([7, 30, 8])

    def answer(job, question):
        peak = next(answers)
        more = {"before": 1, "loaded": 2, "memory": "host", "method": "VmHWM", "facts": {}}
        return {"peak": peak, "load": 2 * peak, **more}

    monkeypatch.setattr(memory.MemoryJob, "_answer", answer)
    found = measure(PeakMemory(Known(), repeats=3, label="board"), tmp_path)
    assert found.values == {"peak_memory_bytes_board": 8, "peak_memory_load_bytes_board": 16}
    assert found.samples["peak_memory_bytes_board"] == [7, 30, 8]
    assert found.facts["peak_memory_bytes_board"]["spread_bytes"] == 23


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"batch": 0}, {"timeout_s": 0}, {"runtime": "no such"}])
def test_what_is_not_legal_is_refused(wrong):
    with pytest.raises(InvalidInputError):
        PeakMemory(**wrong)


def test_a_folder_may_name_it():
    meter = PeakMemory("torch", repeats=3)
    assert restore(describe(meter), restorable()) == meter


def test_a_mark_that_never_moves_is_not_relied_on(monkeypatch):
    monkeypatch.setattr(resident, "_restarted", lambda: True)
    monkeypatch.setattr(resident, "_status", lambda name: 5 * MIB)  # as in a sandbox
    assert resident.Marks().method == "ru_maxrss"

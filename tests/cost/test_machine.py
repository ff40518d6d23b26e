from __future__ import annotations

import gc
import os
import threading

import pytest
import torch

from nasplat.cost.machine import governor, processor, steady

PROCESSORS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
ABSENT = 10**4
"""No machine has that many."""


def state():
    return torch.get_num_threads(), os.sched_getaffinity(0), gc.isenabled()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("collecting", [True, False])
def test_it_holds_and_gives_back(threads, collecting):
    if not collecting:
        gc.disable()
    try:
        before = state()
        with steady(threads, PROCESSORS[-1:]):
            assert state() == (threads, {PROCESSORS[-1]}, False)
        assert state() == before
        with pytest.raises(ZeroDivisionError), steady(threads, PROCESSORS[-1:]):
            _ = 1 / 0
        assert state() == before
    finally:
        gc.enable()


def test_without_processors_any_may_compute():
    with steady(1, ()):
        assert os.sched_getaffinity(0) == set(PROCESSORS) and not gc.isenabled()
    assert gc.isenabled()


def test_nested_ones_give_back_what_each_found():
    before = state()
    with steady(2, PROCESSORS[-1:]):
        with steady(1, PROCESSORS[:1]):
            assert state() == (1, {PROCESSORS[0]}, False)
        assert state() == (2, {PROCESSORS[-1]}, False)
    assert state() == before


def test_a_processor_that_is_not_there_changes_nothing():
    before = state()
    with pytest.raises(OSError), steady(2, [ABSENT]):
        pass
    assert state() == before


def test_other_threads_of_the_process_stay_where_they_are():
    seen, go, done = {}, threading.Event(), threading.Event()

    def other():
        go.wait()
        seen["affinity"] = os.sched_getaffinity(0)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with steady(1, PROCESSORS[-1:]):
        go.set()
        done.wait()
    thread.join()
    assert seen["affinity"] == set(PROCESSORS)


@pytest.mark.skipif(len(PROCESSORS) < 2, reason="one processor: nothing to be left on it")
def test_threads_that_begin_meanwhile_are_not_left_on_the_bench():
    """What a runtime starts while it is held (pools of threads) serves training afterwards."""
    stop, started = threading.Event(), threading.Event()

    def pool():
        started.set()
        stop.wait()

    thread = threading.Thread(target=pool)
    try:
        with steady(1, PROCESSORS[-1:]):
            thread.start()
            started.wait()
        assert os.sched_getaffinity(thread.native_id) == set(PROCESSORS)
    finally:
        stop.set()
        thread.join()


def test_the_processor_and_its_governor_have_names():
    assert torch.backends.cpu.get_cpu_capability() in processor() and len(processor()) > 8
    assert governor(PROCESSORS[:1]) and governor(()) and "\n" not in governor(())
    assert governor([ABSENT]) == "unknown"

"""The laws of timing, on a machine with a scripted clock: see :mod:`scripted`."""

from __future__ import annotations

import gc
import json
import math
import os
import pickle
import statistics
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ANCHOR_S, Machine, Scripted, timed

from nasplat.cost import Bench
from nasplat.cost.machine import own_cache_bytes
from nasplat.cost.timing import Schedule, Timing, TimingJob
from nasplat.errors import InvalidInputError
from nasplat.runtimes import TorchEager

SECONDS = (0.00005, 0.001, 0.01, 0.06)
"""Runs of small to large networks."""


@pytest.fixture(autouse=True, scope="module")
def patient():
    """The clock is scripted: waiting takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NASPLAT_BENCH_PATIENCE")
        yield


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A bench with a record of the machine when it was quiet."""
    bench = Bench(tmp_path_factory.mktemp("known"))
    for seed in range(5):
        timed(bench, Machine(seed), 0.001)
    return bench


def error(timing: Timing, seconds: float) -> float:
    return timing.median_ms / (seconds * 1e3) - 1


# What is measured.


@pytest.mark.parametrize("seconds", [1e-6, *SECONDS, 0.5])
def test_on_a_quiet_machine_the_median_is_the_time_of_a_run(bench, seconds):
    machine = Machine(jitter=0.005)
    timing = timed(bench, machine, seconds)
    assert abs(error(timing, seconds)) < 0.02
    assert timing.suspect == ""
    assert abs(timing.anchor_drift) < 0.05
    assert abs(timing.reference_ms / (ANCHOR_S * 1e3) - 1) < 0.02


@pytest.mark.parametrize("seconds", [*SECONDS, 0.5])
def test_as_many_blocks_and_seconds_as_the_schedule_asks_for(bench, seconds):
    timing = timed(bench, Machine(), seconds, Schedule(blocks=7, seconds=0.05))
    assert len(timing.blocks) == (7 if seconds < 0.005 else 5 if seconds == 0.01 else 4)  # never less than 4
    assert len(timing.anchor_ms) == len(timing.blocks)
    assert len({len(block) for block in timing.blocks}) == 1
    assert timing.samples == [sample for block in timing.blocks for sample in block]


def test_disturbed_blocks_are_left_out_and_kept_beside(known):
    """A disturbance that begins within a block."""
    for begin in np.linspace(0.1, 0.11, 7):
        timing = timed(known, Machine(phases=[(begin, 1.0), (0.05, 2.0), (10.0, 1.0)]), 0.005)
        assert timing.suspect == "" and abs(error(timing, 0.005)) < 0.03
        assert len(timing.disturbed) <= 15
        if any(sample > 1.3 * 5.0 for sample in timing.samples):
            pytest.fail(f"disturbed runs count: {max(timing.samples)}")
        if timing.disturbed:
            return
    pytest.fail("no block was disturbed")


def test_spikes_move_neither_the_median_nor_the_flag(known):
    for seed in range(10):
        timing = timed(known, Machine(seed, spikes=0.02), 0.001)
        assert timing.suspect == "" and abs(error(timing, 0.001)) < 0.03


def test_a_network_that_a_short_disturbance_hits_between_quiet_anchors_shows_it_itself(known):
    """Quiet anchors before and after, slow runs in between."""

    class Sly(Machine):
        def work(self, seconds):
            slow = seconds > 2 * ANCHOR_S and self._rng.random() < 0.4
            return super().work(seconds * 1.6 if slow else seconds)

    for seed in range(10):
        timing = timed(known, Sly(seed), 0.004)
        assert abs(error(timing, 0.004)) < 0.05 and timing.disturbed


# What is doubtful.


@pytest.mark.parametrize("seconds", SECONDS)
def test_a_machine_that_stays_disturbed_is_flagged_with_the_reason(known, seconds):
    timing = timed(known, Machine(quiet_share=0.0, factor=(1.7, 1.7)), seconds)
    assert "disturbed" in timing.suspect and "%" in timing.suspect
    assert 0.6 < timing.anchor_drift < 0.8
    assert abs(timing.reference_ms / (ANCHOR_S * 1e3) - 1) < 0.02
    assert timing.blocks and len(timing.anchor_ms) == len(timing.blocks)
    assert math.isfinite(timing.median_ms)


def test_a_machine_that_slows_down_for_good_is_flagged(known):
    """By 30 % a second: throttling while it is measured."""
    timing = timed(known, Machine(drift=0.3), 0.02, Schedule(seconds=2.0))
    assert timing.suspect or abs(error(timing, 0.02)) < 0.1


@pytest.mark.parametrize("patience", [0.1, 1.0])
def test_patience_is_kept_whatever_happens(known, patience):
    for seconds in (0.00005, 0.001):
        machine = Machine(quiet_share=0.0)
        timed(known, machine, seconds, Schedule(blocks=4, seconds=0.0, patience_s=patience))
        # Patience begins after the warm-up of both networks.
        assert patience <= machine.now < patience + 1.0


def test_without_patience_a_value_is_given_all_the_same(known):
    timing = timed(known, Machine(), 0.001, Schedule(blocks=1, seconds=0.0, patience_s=0.0))
    assert len(timing.blocks) == 1 and timing.suspect == "" and timing.block_sd_ms == 0


def test_a_slow_network_gets_more_patience_but_an_end(known):
    machine = Machine(quiet_share=0.0)
    timing = timed(known, machine, 0.5, Schedule(blocks=2, seconds=0.0, patience_s=0.1))
    assert timing.suspect and machine.now < 30


def test_quiet_seconds_after_a_long_disturbance_are_waited_for(known):
    timing = timed(known, Machine(phases=[(1.0, 1.8), (60.0, 1.0)]), 0.001)
    assert timing.suspect == "" and abs(error(timing, 0.001)) < 0.03


# No silent outlier.


def outcomes(bench_of, share, seconds, scripts):
    """How measurements end on machines that are quiet for a share of the time."""
    found = Counter()
    for seed in range(scripts):
        timing = timed(bench_of(seed), Machine(seed, quiet_share=share, spikes=0.002), seconds)
        off = abs(error(timing, seconds))
        if off > 0.1:
            found["flagged" if timing.suspect else "silent outlier"] += 1
        else:
            found["false flag" if timing.suspect and off < 0.03 else "right"] += 1
    return found


SHARES = (0.15, 0.3, 0.5, 0.7, 0.9)


def check_outcomes(found, seconds, scripts):
    assert not found["silent outlier"], dict(found)
    if seconds < 0.02:  # a longer run hardly ever fits into a quiet phase of 20 to 100 ms
        assert found["right"] >= 0.75 * scripts, dict(found)


@pytest.mark.parametrize("share", [0.15, 0.3, 0.7])
@pytest.mark.parametrize("seconds", SECONDS)
def test_no_silent_outlier_on_a_machine_that_is_known(known, share, seconds):
    """Phases of 20 to 100 ms, 1.5 to 2 times slower."""
    check_outcomes(outcomes(lambda seed: known, share, seconds, 4), seconds, 4)


@pytest.mark.parametrize("share", [0.15, 0.5])
@pytest.mark.parametrize("seconds", SECONDS[:3])
def test_no_silent_outlier_of_the_first_measurement_on_a_machine(tmp_path, share, seconds):
    """Nothing is known of it, so that disturbed phases could be taken for what it can do."""
    check_outcomes(outcomes(lambda seed: Bench(tmp_path / str(seed)), share, seconds, 4), seconds, 4)


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("seconds", SECONDS)
def test_no_silent_outlier_in_hundreds_of_scripts(known, tmp_path, share, seconds):
    check_outcomes(outcomes(lambda seed: known, share, seconds, 100), seconds, 100)
    check_outcomes(outcomes(lambda seed: Bench(tmp_path / str(seed)), share, seconds, 100), seconds, 100)


@given(
    seed=st.integers(0, 10**6), share=st.floats(0.15, 0.9), factor=st.floats(1.5, 2.0),
    shortest=st.floats(0.02, 0.06), seconds=st.floats(math.log(0.00002), math.log(0.015)).map(math.exp),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_the_median_is_that_of_undisturbed_runs(known, seed, share, factor, shortest, seconds):
    machine = Machine(seed, quiet_share=share, factor=(factor, factor), dwell=(shortest, 0.1))
    timing = timed(known, machine, seconds)
    assert timing.suspect or abs(error(timing, seconds)) < 0.04


# Values.


def by_hand() -> Timing:
    return Timing(
        blocks=((2.0, 2.02, 2.04), (2.3, 2.01, 8.0, 2.01), (2.5, 2.06)), disturbed=((9.0,),),
        anchor_ms=((1.0, 1.1), (1.2, 1.0), (1.0, 1.0)), reference_ms=1.0, suspect="",
    )  # fmt: skip


def test_values_by_hand():
    timing = by_hand()
    # The quickest tenth of the runs takes 2.00, so that runs of up to 2.08 count.
    assert timing.samples == [2.0, 2.02, 2.04, 2.01, 2.01, 2.06]
    assert timing.slow == [2.3, 8.0, 2.5]
    assert timing.median_ms == pytest.approx(2.015)
    assert timing.mad_ms == pytest.approx(0.01)  # of 0.015 0.005 0.025 0.005 0.005 0.045
    assert timing.p95_ms == 8
    assert timing.block_sd_ms == pytest.approx(statistics.stdev([2.02, 2.01, 2.06]))
    assert timing.anchor_drift == pytest.approx(0.1)  # the median of 1.1, 1.2 and 1.0
    assert pickle.loads(pickle.dumps(timing)) == timing


@given(samples=st.lists(st.floats(0.001, 1e6), min_size=1, max_size=200))
@settings(max_examples=100, deadline=None)
def test_p95_is_a_run_that_19_of_20_keep(samples):
    timing = Timing((tuple(samples),), (), ((1.0, 1.0),), 1.0, "")
    assert timing.p95_ms in samples
    assert sum(sample <= timing.p95_ms for sample in samples) >= math.floor(0.95 * len(samples))
    assert min(samples) <= timing.median_ms <= max(samples) and timing.mad_ms >= 0


# What the anchor took before.


def test_a_load_that_lasts_is_seen_by_what_the_anchor_took_before(bench):
    timed(bench, Machine(), 0.001)
    timing = timed(bench, Machine(quiet_share=0.0), 0.001)
    assert timing.suspect


def test_quicker_than_the_record_is_the_new_truth(bench):
    """A first measurement under a load that lasts cannot be known to be one; the next one, without, is right."""
    loaded = timed(bench, Machine(quiet_share=0.0, factor=(1.8, 1.8)), 0.001)
    assert abs(error(loaded, 0.001) - 0.8) < 0.05
    for seed in range(3):
        timing = timed(bench, Machine(seed), 0.001)
        assert timing.suspect == "" and abs(error(timing, 0.001)) < 0.03
    # From here on, the load is seen, however often it has been.
    assert timed(bench, Machine(quiet_share=0.0, factor=(1.8, 1.8)), 0.001).suspect


def test_a_machine_that_is_slower_for_good_is_suspect_at_first_and_believed_in_the_end(bench):
    for seed in range(5):
        timed(bench, Machine(seed), 0.001)
    slower = Machine(quiet_share=0.0, factor=(1.3, 1.3))
    suspects = [
        bool(timed(bench, slower, 0.001, Schedule(blocks=4, seconds=0.0, patience_s=0.02)).suspect) for _ in range(130)
    ]
    assert all(suspects[:10])
    assert not any(suspects[-10:])
    assert suspects == sorted(suspects, reverse=True)


def test_runtimes_threads_and_versions_have_records_of_their_own(bench):
    """What is slow on one of them is not taken for a disturbance of another."""
    timed(bench, Machine(), 0.001)
    assert timed(bench, Machine(), 0.001, anchor=3 * ANCHOR_S, version="2").suspect == ""
    if len(os.sched_getaffinity(0)) > 1:
        assert timed(bench, Machine(), 0.001, anchor=3 * ANCHOR_S, threads=2).suspect == ""
    assert timed(bench, Machine(), 0.001, anchor=3 * ANCHOR_S).suspect


# On the clock of this machine.


def test_facts_say_what_was_measured_and_where(bench):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten()).eval()
    runtime, x = TorchEager(), torch.zeros(2, 1, 6, 6)
    file = runtime.export(model, x)
    job = TimingJob(runtime, file, x, 1, Schedule(blocks=2, seconds=0.0, patience_s=0.05))
    timing = pickle.loads(pickle.dumps(job))(bench)
    facts = timing.facts
    assert json.loads(json.dumps(facts)) == dict(facts)
    assert facts["runtime"] == "torch" and facts["torch"] == torch.__version__
    assert facts["threads"] == 1 and facts["batch"] == 2 and facts["file_bytes"] == len(file)
    assert len(facts["processors"]) == 1 and facts["processor"] and facts["governor"]
    assert facts["file_sha256"] == TimingJob(runtime, file, x, 1, job.schedule)(bench).facts["file_sha256"]
    assert all(sample > 0 for sample in timing.samples)
    assert np.isfinite([timing.median_ms, timing.mad_ms, timing.p95_ms, timing.block_sd_ms, timing.anchor_drift]).all()


def test_the_bench_is_free_again_when_a_network_fails(bench):
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    threads, affinity = torch.get_num_threads(), os.sched_getaffinity(0)
    runtime, x = TorchEager(), torch.zeros(1, 3)
    with pytest.raises(RuntimeError, match="no"):
        TimingJob(runtime, runtime.export(Broken(), x), x, 1)(bench)
    assert torch.get_num_threads() == threads and os.sched_getaffinity(0) == affinity and gc.isenabled()
    fine = TimingJob(runtime, runtime.export(torch.nn.ReLU(), x), x, 1, Schedule(blocks=1, seconds=0.0, patience_s=0.0))
    assert fine(bench).blocks


# Memory that all cores share.


def test_networks_that_need_the_shared_caches_are_flagged_while_others_use_them(bench, monkeypatch):
    read = [1e-4]
    monkeypatch.setattr("nasplat.cost.timing.read_seconds", lambda: read[0])
    monkeypatch.setattr("nasplat.cost.timing.own_cache_bytes", lambda: 3)  # the file has 5: "0.001"
    quiet = timed(bench, Machine(), 0.001)
    assert quiet.suspect == "" and quiet.facts["memory_slower"] == 0
    read[0] *= 1.3
    pressed = timed(bench, Machine(), 0.001)
    assert "reading it took 30% longer than undisturbed" in pressed.suspect
    assert pressed.facts["memory_slower"] == pytest.approx(0.3)
    with monkeypatch.context() as patch:
        patch.setattr("nasplat.cost.timing.own_cache_bytes", lambda: 5)
        fits = timed(bench, Machine(), 0.001)
        assert fits.suspect == "" and fits.facts["memory_slower"] == pytest.approx(0.3)
    with monkeypatch.context() as patch:
        patch.setattr(Scripted, "spares_memory", True, raising=False)
        assert timed(bench, Machine(), 0.001).suspect == ""
    read[0] = 1.04e-4
    assert timed(bench, Machine(), 0.001).suspect == ""


def test_few_quick_runs_are_enough_for_networks_that_fit_a_core_only(bench, monkeypatch):
    """Of the network's runs one in 13 is undisturbed; the others take up to twice as long, by any factor."""

    class Smeared(Machine):
        runs = 0

        def work(self, seconds):
            if seconds != 0.001:
                return super().work(seconds)
            self.runs += 1
            return super().work(seconds * (1 if self.runs % 13 == 0 else 1.1 + self.runs * 0.618 % 0.9))

    schedule = Schedule(blocks=200, patience_s=60.0)
    for fits in (True, False):
        monkeypatch.setattr("nasplat.cost.timing.own_cache_bytes", lambda fits=fits: 5 if fits else 3)
        timing = timed(bench, Smeared(quiet_share=0.5), 0.001, schedule)
        assert ("runs are within 3% of the quickest" in timing.suspect) is not fits
        assert timing.median_ms == pytest.approx(1.0, rel=0.02)


def test_a_core_has_a_cache_of_its_own():
    assert 1 << 15 <= own_cache_bytes() <= 1 << 28


def test_the_environment_bounds_the_patience(bench, monkeypatch):
    busy = {"quiet_share": 0.0, "factor": (1.7, 1.8)}
    for seed in range(5):
        timed(bench, Machine(seed), 0.001)
    machine = Machine(1, **busy)
    timed(bench, machine, 0.001, Schedule(patience_s=4.0))
    assert machine.now > 4
    monkeypatch.setenv("NASPLAT_BENCH_PATIENCE", "0.5")
    machine = Machine(1, **busy)
    assert timed(bench, machine, 0.001, Schedule(patience_s=4.0)).suspect and 0.5 < machine.now < 2
    for wrong in ("soon", "-1", "inf"):
        monkeypatch.setenv("NASPLAT_BENCH_PATIENCE", wrong)
        with pytest.raises(InvalidInputError, match=f"NASPLAT_BENCH_PATIENCE is '{wrong}'; legal: seconds"):
            bench.check()

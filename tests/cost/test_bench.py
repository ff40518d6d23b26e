from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from nasplat.cost.bench import Bench

# Loaded by its path: a process that needs only the locks starts in a moment, without torch.
START = f"""
import importlib.util, os, random, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("bench", {str(ROOT / "nasplat" / "cost" / "bench.py")!r})
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
bench = module.Bench(Path(sys.argv[1]))
log = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
def say(what):
    os.write(log, f"{{what}} {{os.getpid()}}\\n".encode())  # one write to an appended file: a total order
"""

TRAIN = (
    START
    + """
print("ready", flush=True)
while not Path(sys.argv[3]).exists():
    with bench.training():
        say("(")
        end = time.perf_counter() + 0.002
        while time.perf_counter() < end: pass
        say(")")
"""
)

MEASURE = (
    START
    + """
print("ready", flush=True)
for _ in range(int(sys.argv[3])):
    with bench.measuring():
        say("[")
        time.sleep(0.002)
        say("]")
    time.sleep(random.random() * 0.005)
"""
)

HOLD = (
    START
    + """
with (bench.training() if sys.argv[3] == "training" else bench.measuring()):
    print("held", flush=True)
    time.sleep(600)
"""
)


def process(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_measurement_never_overlaps_a_step_nor_another_and_is_not_starved(tmp_path):
    log, stop = tmp_path / "log", tmp_path / "stop"
    log.touch()
    trainers = [process(TRAIN, tmp_path / "bench", log, stop) for _ in range(2)]
    meters = []
    try:
        for one in trainers:
            assert one.stdout.readline() == "ready\n"
        meters = [process(MEASURE, tmp_path / "bench", log, 40) for _ in range(2)]
        for one in meters:  # the trainers stop only after: starved measurements would never end
            assert one.wait(timeout=120) == 0
    finally:
        stop.touch()
        for one in (*trainers, *meters):
            one.wait(timeout=60)
            one.stdout.close()
    lines = [line.split() for line in log.read_text().splitlines()]
    inside: set[str] = set()
    alone = ""
    steps = 0
    together = 0
    for what, who in lines:
        if what == "(":
            assert not alone, "a step began within a measurement"
            inside.add(who)
            together = max(together, len(inside))
        elif what == ")":
            inside.remove(who)
            steps += 1
        elif what == "[":
            assert not alone and not inside, "a measurement began within another, or within a step"
            alone = who
        else:
            assert alone == who
            alone = ""
    assert sum(what == "[" for what, _ in lines) == 80
    assert steps > 10  # and training is not starved either
    assert together == 2  # steps of several trainers do go on side by side


@pytest.mark.parametrize("kind", ["training", "measuring"])
def test_a_killed_process_lets_go(tmp_path, kind):
    log = tmp_path / "log"
    log.touch()
    holder = process(HOLD, tmp_path / "bench", log, kind)
    assert holder.stdout.readline() == "held\n"
    waiting = process(MEASURE, tmp_path / "bench", log, 1)
    try:
        assert waiting.stdout.readline() == "ready\n"
        time.sleep(0.2)
        assert waiting.poll() is None and log.read_text() == ""
        os.kill(holder.pid, signal.SIGKILL)
        assert waiting.wait(timeout=60) == 0
    finally:
        for one in (holder, waiting):
            one.kill()
            one.wait(timeout=60)
            one.stdout.close()


def test_the_locks_are_let_go_on_an_error_and_can_be_taken_again(tmp_path):
    bench, other = Bench(tmp_path), Bench(tmp_path)
    for place in (bench.training, bench.measuring):
        with pytest.raises(ZeroDivisionError), place():
            1 / 0  # noqa: B018
        with other.measuring():
            pass
    with bench.training(), other.training():
        pass


def test_it_travels_without_its_open_files(tmp_path):
    bench = Bench(tmp_path)
    with bench.training():
        copy = pickle.loads(pickle.dumps(bench))
    assert copy.folder == bench.folder
    with copy.measuring():
        pass


def test_a_forked_child_takes_its_own_turn(tmp_path):
    bench = Bench(tmp_path)
    with bench.training():
        pass
    reader, writer = os.pipe()
    with bench.measuring():
        child = os.fork()
        if child == 0:
            with bench.training():
                os.write(writer, b"c")
            os._exit(0)
        time.sleep(0.1)
        os.write(writer, b"p")
    os.waitpid(child, 0)
    assert os.read(reader, 2) == b"pc"


def test_the_default_place_needs_no_user_name(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert str(os.getuid()) in Bench().folder.name

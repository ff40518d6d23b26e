from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import ROOT, Drawn, Mlp

from nasplat import Study, maximise
from nasplat.cost import Measurement
from nasplat.cost import bench as benches
from nasplat.cost.bench import OWNED, Bench, leaving_owned_cores, owned_cores, physical_cores, pinned
from nasplat.errors import InvalidInputError

PROCESSORS = sorted(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def no_core_of_its_own(monkeypatch):
    """Training pauses, however many cores the machine has, unless a test says otherwise."""
    monkeypatch.setenv(OWNED, "")


several = pytest.mark.skipif(len(PROCESSORS) < 2, reason="needs two processors")

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
    monkeypatch.delenv("NASPLAT_BENCH_FOLDER")
    assert str(os.getuid()) in Bench().folder.name


def test_the_place_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("NASPLAT_BENCH_FOLDER", str(tmp_path / "common"))
    with Bench().measuring():
        assert (tmp_path / "common" / "bench").exists()


class Thread(threading.Thread):
    """Ends with what the call gave, or raises what it raised."""

    def __init__(self, call):
        super().__init__(daemon=True)
        self.call, self.result, self.error = call, None, None
        self.start()

    def run(self):
        try:
            self.result = self.call()
        except BaseException as error:
            self.error = error

    def get(self, timeout=60.0):
        self.join(timeout)
        assert not self.is_alive(), "it waits"
        if self.error is not None:
            raise self.error
        return self.result


def test_threads_of_one_process_take_turns(tmp_path):
    bench = Bench(tmp_path)
    inside = []

    def measure():
        for _ in range(20):
            with bench.measuring():
                inside.append("measuring")
                assert inside == ["measuring"]
                time.sleep(0.001)
                inside.pop()

    def train():
        for _ in range(100):
            with bench.training():
                inside.append("training")
                assert "measuring" not in inside
                time.sleep(0.0002)
                inside.remove("training")

    for thread in [Thread(measure), Thread(measure), Thread(train), Thread(train)]:
        thread.get()


def test_a_child_that_lives_on_does_not_keep_the_locks_that_its_parent_held(tmp_path):
    bench = Bench(tmp_path)
    for place in (bench.training, bench.measuring):
        with place():
            child = os.fork()  # as a loader of data does
            if child == 0:
                time.sleep(600)
                os._exit(0)
        try:
            Thread(lambda: bench.measuring().__enter__()).get()
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_a_step_within_a_step_does_not_wait_for_the_measurement_that_waits_for_it(tmp_path):
    bench = Bench(tmp_path)

    def measure():
        with bench.measuring(), bench.training():
            return "measured"

    with bench.training():
        waiting = Thread(measure)
        time.sleep(0.1)  # it holds the gate by now
        with bench.training():
            assert waiting.is_alive()
        with pytest.raises(RuntimeError, match="within a step of training"), bench.measuring():
            pass
    assert waiting.get() == "measured"
    with bench.measuring(), pytest.raises(RuntimeError, match="within another measurement"), bench.measuring():
        pass


def test_a_default_place_is_that_of_the_machine_that_asks(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # one for each job of a batch system
    assert tmp_path not in Bench().folder.parents
    assert str(Bench().folder).encode() not in pickle.dumps(Bench())


# The processors that the bench owns.


@pytest.mark.parametrize("value", ["x", "1;2", "-1", "1,", "3-", "100000", "0,99999", "1.5"])
def test_a_value_that_names_no_processors_is_refused_with_what_is_legal(monkeypatch, value, tmp_path):
    monkeypatch.setenv(OWNED, value)
    with pytest.raises(InvalidInputError, match=rf"{OWNED} is '{value}'.*legal: numbers of processors"):
        Bench(tmp_path).check()
    assert os.sched_getaffinity(0) == set(PROCESSORS)


def test_a_study_says_so_at_its_start(monkeypatch, tmp_path, blobs):
    study = Study(
        Mlp(), Drawn(), blobs, [maximise("val_accuracy")], folder=tmp_path / "s", tracker=None, progress=False
    )
    monkeypatch.setenv(OWNED, ",".join(map(str, PROCESSORS)))
    with pytest.raises(InvalidInputError, match="leaves this process no other to train on"):
        study.run(1)
    monkeypatch.setenv(OWNED, "x")
    with pytest.raises(InvalidInputError, match="legal: numbers of processors"):
        study.run(1)


def test_an_empty_value_owns_none_and_ranges_are_read(monkeypatch):
    monkeypatch.setenv(OWNED, " ")
    assert owned_cores() == ()
    first, last = PROCESSORS[0], PROCESSORS[-1]
    monkeypatch.setenv(OWNED, f"{first},{last}-{last}")
    assert {processor for core in owned_cores() for processor in core} == {first, last}


def machine(folder, monkeypatch, siblings, speeds, quota=float("inf")):
    """A machine of these cores: files as of Linux."""
    for core in siblings:
        for number in core:
            place = folder / f"cpu{number}"
            (place / "topology").mkdir(parents=True)
            (place / "topology" / "thread_siblings_list").write_text(",".join(map(str, core)) + "\n")
            (place / "cpufreq").mkdir()
            (place / "cpufreq" / "cpuinfo_max_freq").write_text(f"{speeds[number]}\n")
    monkeypatch.setattr(benches, "_PROCESSORS", folder)
    monkeypatch.setattr(benches, "_quota", lambda: quota)
    numbers = {number for core in siblings for number in core}
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: set(numbers))
    monkeypatch.delenv(OWNED, raising=False)
    benches._owned.cache_clear()
    return numbers


def test_from_four_cores_on_it_owns_the_last_of_the_fastest_with_both_its_threads(tmp_path, monkeypatch):
    speeds = {0: 5, 1: 5, 2: 5, 4: 5, 5: 5, 6: 5, 8: 3, 9: 3}  # two slow cores last, as some processors have
    numbers = machine(tmp_path, monkeypatch, [(0, 4), (1, 5), (2, 6), (8,), (9,)], speeds)
    assert physical_cores() == ((8,), (9,), (0, 4), (1, 5), (2, 6))
    assert owned_cores() == ((2, 6),)
    assert os.environ[OWNED] == "2,6"  # for children
    assert benches._processors(2) == (1, 2)
    # A child, whose affinity leaves them out, and a process that may use fewer cores.
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: numbers - {2, 6})
    monkeypatch.setattr(benches, "_may_use", lambda number: True)
    benches._owned.cache_clear()
    assert owned_cores() == ((2, 6),)
    assert benches._processors(2) == (1, 2)
    monkeypatch.delenv(OWNED)
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: {0, 4, 1, 5, 2, 6})
    assert owned_cores() == ()  # three cores
    benches._owned.cache_clear()


def test_it_owns_none_where_training_beside_would_use_up_the_time_of_the_container(tmp_path, monkeypatch):
    cores = [(number,) for number in range(8)]
    machine(tmp_path, monkeypatch, cores, dict.fromkeys(range(8), 1), quota=4.0)
    assert owned_cores() == ()


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "200000 100000\n"}, 2.0),
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu.cfs_quota_us": "150000\n", "cpu.cfs_period_us": "100000\n"}, 1.5),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_the_limit_of_a_control_group(tmp_path, files, limit):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert benches._quota_of(tmp_path) == limit


@several
def test_a_bench_with_a_core_measures_while_others_train_and_with_more_threads_waits_for_them(tmp_path, monkeypatch):
    last = PROCESSORS[-1]
    monkeypatch.setenv(OWNED, str(last))
    bench = Bench(tmp_path)
    with leaving_owned_cores():
        with bench.training():

            def measure(threads):
                with bench.measuring(threads) as processors, pinned(processors):
                    return processors, os.sched_getaffinity(0)

            assert Thread(lambda: measure(1)).get() == ((last,), {last})
            waiting = Thread(lambda: measure(2))
            time.sleep(0.1)
            assert waiting.is_alive()
        processors, affinity = waiting.get()
        assert len(processors) == 2 and last in processors and affinity == set(processors)


@several
def test_trainers_leave_the_bench_alone_with_all_their_threads_and_come_back(monkeypatch):
    last = PROCESSORS[-1]
    rest = set(PROCESSORS) - {last}
    monkeypatch.setenv(OWNED, str(last))
    end, go = threading.Event(), threading.Event()
    seen = {}

    def work(name):
        seen[name, "native"] = threading.get_native_id()
        end.wait(60)

    earlier = Thread(lambda: work("earlier"))
    other = Thread(lambda: None)
    other.get()

    def another_study():
        with leaving_owned_cores():
            seen["other began"] = True
            go.wait(60)

    with leaving_owned_cores():
        later = Thread(lambda: work("later"))
        beside = Thread(another_study)
        while len(seen) < 3:
            time.sleep(0.001)
        assert os.sched_getaffinity(0) == rest
        for name in ("earlier", "later"):
            assert os.sched_getaffinity(seen[name, "native"]) == rest
        child = subprocess.run(
            [sys.executable, "-c", f"import os; print(os.sched_getaffinity(0), os.environ[{OWNED!r}])"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert child.stdout == f"{rest} {last}\n"
        with pinned([last]):
            assert os.sched_getaffinity(0) == {last}
        assert os.sched_getaffinity(0) == rest
    assert os.sched_getaffinity(0) == rest  # the other study still trains
    go.set()
    beside.get()
    for thread in (0, seen["earlier", "native"], seen["later", "native"]):
        assert os.sched_getaffinity(thread) == set(PROCESSORS)
    end.set()
    earlier.get()
    later.get()


@several
def test_a_pool_that_was_started_while_measuring_is_not_left_on_those_processors():
    end, native = threading.Event(), []

    def work():
        native.append(threading.get_native_id())
        end.wait(60)

    with pinned(PROCESSORS[-1:]):
        pool = Thread(work)
        while not native:
            time.sleep(0.001)
        assert os.sched_getaffinity(native[0]) == {PROCESSORS[-1]}
    assert os.sched_getaffinity(native[0]) == set(PROCESSORS)
    end.set()
    pool.get()


@dataclass(frozen=True)
class Where:
    """Notes where its trial runs and where it measures."""

    log: str
    on: str | None = None
    metrics = ("processors",)
    trained = False

    def measure(self, model, example, bench):
        def job(bench):
            with bench.measuring() as processors, pinned(processors):
                return sorted(os.sched_getaffinity(0))

        measured = bench.run(job, self.on)
        with Path(self.log).open("a") as file:
            file.write(f"{sorted(os.sched_getaffinity(0))} {measured}\n")
        return Measurement({"processors": float(len(measured))})


@several
def test_a_study_in_one_process_trains_beside_the_bench_and_measures_on_it(tmp_path, monkeypatch, blobs):
    monkeypatch.setenv(OWNED, str(PROCESSORS[-1]))
    study = Study(
        Mlp(), Drawn(), blobs, [maximise("val_accuracy")], meters=[Where(str(tmp_path / "log"))],
        folder=tmp_path / "study", tracker=None, progress=False,
    )  # fmt: skip
    assert study.run(2).table().state.tolist() == ["complete"] * 2
    assert (tmp_path / "log").read_text().splitlines() == [f"{PROCESSORS[:-1]} {PROCESSORS[-1:]}"] * 2
    assert os.sched_getaffinity(0) == set(PROCESSORS)


def test_another_machine_is_refused_in_one_process_before_any_trial(tmp_path, blobs):
    study = Study(
        Mlp(), Drawn(), blobs, [maximise("val_accuracy")], meters=[Where(str(tmp_path / "log"), on="rpi5")],
        folder=tmp_path / "study", tracker=None, progress=False,
    )  # fmt: skip
    with pytest.raises(InvalidInputError, match=r"'rpi5'.*a machine of a Ray cluster.*workers=1 or more"):
        study.run(1)
    for call in (lambda: Bench().run(lambda bench: None, on="rpi5"), lambda: Bench().check(["rpi5"])):
        with pytest.raises(InvalidInputError, match="workers=1 or more"):
            call()

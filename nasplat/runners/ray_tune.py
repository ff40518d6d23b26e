"""Runs a search on Ray Tune. The only module that imports ray.

Tune schedules, places and retries; what it knows is disposable. The journal holds the truth, and the search hands out
trials through Tune's searcher interface: ``None`` for "nothing now", ``FINISHED`` when it is over. The proposals
themselves travel through a small actor, so that Tune's configurations, which it keeps for ever, stay one number long.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import math
import os
import platform
import shutil
import socket
import traceback
import uuid
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import ray
from ray import tune
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nasplat.cost.bench import OWNED, Bench
from nasplat.errors import InvalidInputError, NasplatError
from nasplat.search import Assignment, Outcome, Search
from nasplat.strategy import Report
from nasplat.worker import Worker, trial_folder

T = TypeVar("T")

EVENT = "nasplat"
"""Key of the report or outcome in Tune's results."""

BENCH = "bench"
"""Resource of the node that measures, where no other is named."""

SHARE = 0.001
"""Of the resource, for one study: its bench stays for the whole run, and other studies' benches have room beside it.

What keeps their measurements apart are the locks of the machine.
"""

PATIENCE_S = 120.0
"""Seconds that a bench may take to start, or to answer."""

PRESENCE = "presence"
"""Ray's concurrency group in which a bench says that it is there."""

ASK_S = 30.0
"""Seconds of waiting for a measurement after which the bench is asked whether it still is there."""


@contextlib.contextmanager
def connected(
    *,
    workers: int,
    cpus: float = 1.0,
    gpus: float = 0.0,
    machines: Collection[str] = (),
    time_limit_s: float | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Iterator[RayBench]:
    """A connection to Ray, and the bench that measures for all its workers.

    Uses the Ray that this process is connected to; else the cluster of ``RAY_ADDRESS``; else a local Ray, which is
    shut down at the end.

    Args:
        workers: Trials at a time.
        cpus: Processors set aside for a trial; may be a fraction.
        gpus: GPUs, likewise.
        machines: Resources of the nodes that will be measured on, besides the study's own bench.
        time_limit_s: Seconds that a measurement may take; past it the bench is started anew. None is no limit.
        say: Takes lines for the user.

    Raises:
        NasplatError: The cluster can never place a trial of this size.
        InvalidInputError: No node has the resource of one of the machines.
    """
    Bench().check()  # and has the processors chosen before processes of our own inherit the choice
    if not ray.is_initialized():
        say(
            "Starting Ray" if not os.environ.get("RAY_ADDRESS") else f"Connecting to Ray at {os.environ['RAY_ADDRESS']}"
        )
    with _ray(workers, cpus, gpus):
        _check_resources(workers, cpus, gpus, say)
        for name in machines:
            _check_machine(name)
        if BENCH not in ray.cluster_resources() and sum(node["Alive"] for node in ray.nodes()) > 1:
            say(f"no node of Ray has the resource {BENCH!r}: what is measured is measured here, on {platform.node()}")
        node = ray.get_runtime_context().get_node_id()
        processors = os.environ.get(OWNED)
        mailbox = ray.remote(num_cpus=0)(Mailbox).remote(node, processors, time_limit_s)
        try:
            yield RayBench(mailbox, node, processors)
        finally:
            ray.kill(mailbox)  # and what it made, the benches, ends with it


def run(search: Search, worker: Worker, *, workers: int, cpus: float = 1.0, gpus: float = 0.0) -> None:
    """Work until the search hands out nothing more. Only within :func:`connected`.

    Args:
        search: What hands out trials; stays in this process.
        worker: What runs them; copied to each worker. Its bench is that of the connection.
        workers: Trials at a time.
        cpus: Processors set aside for a trial; may be a fraction.
        gpus: GPUs, likewise.
    """
    with _quiet_tune():
        assert isinstance(worker.bench, RayBench)
        mailbox = worker.bench.mailbox
        storage = worker.folder / "ray"
        searcher = _TuneSearcher(search, workers, mailbox)
        trainable = tune.with_resources(
            tune.with_parameters(_Trainable, worker=worker, mailbox=mailbox), {"cpu": cpus, "gpu": gpus}
        )
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(search_alg=searcher, num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(storage),
                verbose=0,
                # A candidate's own errors are caught on the worker; what fails here is a worker that died.
                failure_config=tune.FailureConfig(max_failures=1),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        try:
            tuner.fit()
        except Exception as error:
            # Tune wraps what its searcher raises; the user should see the search's own error.
            raise searcher.error or error from None
        finally:
            shutil.rmtree(storage, ignore_errors=True)
        if searcher.error is not None:
            raise searcher.error


class Mailbox:
    """An actor between driver and workers: proposals one way, a request to stop early the other.

    It also makes the benches when they are first asked for: whoever asks, there is one on each machine, and none where
    nothing is measured. They end with it.
    """

    def __init__(self, node: str, processors: str | None, time_limit_s: float | None) -> None:
        """Remember what a bench is made from.

        Args:
            node: Ray's name of the driver's node.
            processors: What the bench owns there (:data:`nasplat.cost.bench.OWNED`).
            time_limit_s: Seconds that a measurement may take.
        """
        self._node, self._processors, self._time_limit_s = node, processors, time_limit_s
        self._benches: dict[str | None, Any] = {}
        self._measurements: dict[str, int] = {}
        self._assignments: dict[int, Assignment] = {}
        self._begun: dict[int, int] = {}
        self._stop: set[int] = set()

    def put(self, assignment: Assignment) -> None:
        """Leave an assignment for the worker that will get its number."""
        self._assignments[assignment.number] = assignment
        self._begun[assignment.number] = 0

    def begin(self, number: int) -> tuple[Assignment, int]:
        """Take an assignment up: it, and the number of workers that had taken it up and died."""
        earlier = self._begun[number]
        self._begun[number] += 1
        return self._assignments[number], earlier

    def stop(self, number: int) -> None:
        """Ask the worker to end a trial after its last report."""
        self._stop.add(number)

    def may_go_on(self, number: int) -> bool:
        """Whether nobody asked to end the trial."""
        return number not in self._stop

    def drop(self, number: int) -> None:
        """Forget a finished trial."""
        self._assignments.pop(number, None)
        self._begun.pop(number, None)
        self._stop.discard(number)

    def bench(self, on: str | None) -> Any:
        """The bench on a machine, None the study's own; made when it is first asked for. Gives None for no machine."""
        if on not in self._benches:
            have = ray.cluster_resources()
            if on is not None and on not in have:
                return None
            place: dict[str, Any] = {"resources": {on or BENCH: SHARE}}
            if on is None and BENCH not in have:
                place = {"scheduling_strategy": NodeAffinitySchedulingStrategy(self._node, soft=False)}
            # No CPU: two trials of one CPU each could else wait for ever for a bench to measure on.
            maker = ray.remote(num_cpus=0, max_restarts=-1, concurrency_groups={PRESENCE: 1})(_BenchActor)
            mailbox = ray.get_runtime_context().current_actor
            self._benches[on] = maker.options(**place).remote(mailbox, self._node, self._processors, self._time_limit_s)
        return self._benches[on]

    def begin_measurement(self, name: str) -> None:
        """Note that a bench begins a measurement."""
        self._measurements[name] = self._measurements.get(name, 0) + 1

    def begun(self, name: str) -> int:
        """How often a measurement was begun."""
        return self._measurements.get(name, 0)

    def drop_measurement(self, name: str) -> None:
        """Forget a measurement that is over."""
        self._measurements.pop(name, None)


class _BenchActor:
    """Measures on one machine, one job after another."""

    def __init__(self, mailbox: Any, node: str, processors: str | None, time_limit_s: float | None) -> None:
        self._mailbox = mailbox
        self._time_limit_s = time_limit_s
        _choose_as(node, processors)

    def run(self, name: str, job: Callable[[Bench], Any]) -> tuple[bool, Any]:
        """Do a job: whether it came to an end, and its result, or else what it raised."""
        ray.get(self._mailbox.begin_measurement.remote(name))
        if self._time_limit_s is not None:
            # As for a trial that hangs: only ending the process ends what native code does.
            faulthandler.dump_traceback_later(self._time_limit_s + _grace(self._time_limit_s), exit=True)
        try:
            return True, job(Bench())
        except (Exception, SystemExit) as error:
            return False, _travelling(error)
        finally:
            if self._time_limit_s is not None:
                faulthandler.cancel_dump_traceback_later()

    def present(self) -> None:
        """Answer, in the middle of a job too where it is called in a group of its own."""


class RayBench(Bench):
    """The bench of a run on Ray: jobs go to one process a machine, where they wait for their turn.

    What a meter times by itself, in ``with bench.measuring():``, is timed where its trial runs, and the locks are those
    of that machine.
    """

    def __init__(self, mailbox: Any, node: str, processors: str | None) -> None:
        """Join the mailbox of a connection.

        Args:
            mailbox: Knows the benches.
            node: Ray's name of the driver's node.
            processors: What the bench owns there (:data:`nasplat.cost.bench.OWNED`).
        """
        super().__init__()
        self.mailbox = mailbox
        self._node, self._processors = node, processors

    def choose_processors(self) -> None:
        """Have the bench own the same processors here as in the driver, where this is its machine."""
        _choose_as(self._node, self._processors)

    def run(self, job: Callable[[Bench], T], on: str | None = None) -> T:
        """Do a job of measuring on the bench of the study, or on another machine of the cluster.

        A bench that dies during the job is started anew, and the job is done once more.

        Args:
            job: Gets the bench of the machine that it runs on. Travels there, and its result back.
            on: Name of a resource that a node was started with; None is the study's own bench.

        Raises:
            InvalidInputError: No node has this resource.
            NasplatError: The bench died twice during the job, or is gone.
            Exception: What the job raised, as it raised it.
        """
        bench = ray.get(self.mailbox.bench.remote(on))
        if bench is None:
            _check_machine(str(on))
            return self.run(job, on)  # the node joined in this moment
        where = f"the bench on {on}" if on else "the bench"
        name = uuid.uuid4().hex
        try:
            while True:
                try:
                    done, result = self._answer(bench, name, job, where)
                except RayActorError as error:
                    # Where the bench died of another's job, that job's count went up, and this one is asked for again.
                    if ray.get(self.mailbox.begun.remote(name)) > 1:
                        raise NasplatError(
                            f"{where} died twice while it measured (killed, out of memory, past the time limit, or a "
                            "crash in native code)"
                        ) from error
                except RayError as error:
                    text = str(error).strip().splitlines()
                    raise NasplatError(
                        f"{where} cannot take the measurement up; are nasplat and its libraries installed there, in "
                        f"the same versions? {text[-1] if text else error!r}"
                    ) from error
                else:
                    break
        finally:
            self.mailbox.drop_measurement.remote(name)
        if not done:
            raise result
        return cast(T, result)

    def _answer(self, bench: Any, name: str, job: Callable[[Bench], Any], where: str) -> tuple[bool, Any]:
        """What the bench answers, as long as it is there."""
        self._await(bench, where)
        answer = bench.run.remote(name, job)
        while not ray.wait([answer], timeout=ASK_S)[0]:
            self._await(bench, where)
        return cast(tuple[bool, Any], ray.get(answer))

    def _await(self, bench: Any, where: str) -> None:
        """Wait until the bench is there, which may have to be started (anew)."""
        try:
            call = bench.present.options(concurrency_group=PRESENCE, max_task_retries=-1)
            ray.get(call.remote(), timeout=PATIENCE_S)
        except (GetTimeoutError, RayActorError) as error:
            why = (
                f"has not answered for {PATIENCE_S:g} s: its machine is gone, or busy with something else"
                if isinstance(error, GetTimeoutError)
                else f"cannot be started: {str(error).strip().splitlines()[-1]}"
            )
            raise NasplatError(f"{where} {why}") from error


def _choose_as(node: str, processors: str | None) -> None:
    """Choose the bench's processors as the driver did, on its node."""
    if processors is not None and ray.get_runtime_context().get_node_id() == node:
        os.environ[OWNED] = processors


def _travelling(error: BaseException) -> BaseException:
    """An error that can be pickled, with a note of where it was raised, which pickling forgets."""
    text = "".join(traceback.format_exception(error))
    error.add_note(f"On the bench, {platform.node()}:\n{text}")
    try:
        ray.cloudpickle.loads(ray.cloudpickle.dumps(error))
    except Exception:  # what an error holds is anybody's guess
        return NasplatError(f"the measurement failed: {type(error).__name__}: {error}\n{text}")
    return error


class _TuneSearcher(Searcher):
    """The search, as Tune sees a searcher. No metric is named: a supernet's trial reports no objective."""

    def __init__(self, search: Search, workers: int, mailbox: Any) -> None:
        super().__init__()
        self.error: BaseException | None = None
        self._search = search
        self._workers = workers
        self._mailbox = mailbox
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The number of the next trial."""
        if self.error is not None:
            return str(Searcher.FINISHED)
        if len(self._numbers) >= self._workers:
            return None
        with self._noting():
            assignment = self._search.next()
            if assignment is not None:
                ray.get(self._mailbox.put.remote(assignment))
                self._numbers[trial_id] = assignment.number
                return {"trial": assignment.number}
        over = self.error is not None or (self._search.over and not self._numbers)
        return str(Searcher.FINISHED) if over else None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Book one epoch."""
        number = self._numbers[trial_id]
        with self._noting():
            if not self._search.report(number, result[EVENT]):
                ray.get(self._mailbox.stop.remote(number))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Book the end."""
        number = self._numbers.pop(trial_id)
        outcome = result.get(EVENT) if result and not error else None
        if not isinstance(outcome, Outcome):
            outcome = Outcome(
                "failed", reason="its worker died twice (killed, out of memory, or a crash in native code)"
            )
        with self._noting():
            self._search.finish(number, outcome)
        self._mailbox.drop.remote(number)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Keep the search's own error: Tune would swallow or wrap it."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    # The journal keeps the search; Tune has nothing of it to save.

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class _Trainable(tune.Trainable):
    """One trial at a time on a worker: a Tune step is an epoch, or the outcome."""

    def setup(self, config: dict[str, Any], worker: Worker, mailbox: Any) -> None:
        """Take up the first trial."""
        self._worker = worker
        self._mailbox = mailbox
        assert isinstance(worker.bench, RayBench)
        worker.bench.choose_processors()
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take up another trial with the same process."""
        self.config = new_config
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._number = config["trial"]
        self._steps: Generator[Report | Outcome, bool | None, None] | None = None
        self._first = True
        assignment, earlier = ray.get(self._mailbox.begin.remote(self._number))
        self._failed = self._past_limit(earlier)
        if self._failed is None:
            self._steps = self._worker.run(assignment)
            self._watch()

    def _hung(self) -> Path:
        return trial_folder(self._worker.folder, self._number) / "hung.txt"

    def _watch(self) -> None:
        """Have the process end itself when a trial hangs past its limit between two steps.

        The timer is the interpreter's own: it works while native code holds the interpreter.
        """
        limit = self._worker.time_limit_s
        if limit is None:
            return
        path = self._hung()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._dump = path.open("w")
        faulthandler.dump_traceback_later(limit + _grace(limit), exit=True, file=self._dump)

    def _past_limit(self, earlier: int) -> Outcome | None:
        """The failure of a trial whose worker ended itself at the time limit: it wrote down where it hung."""
        limit = self._worker.time_limit_s
        if limit is None or not earlier:
            return None
        path = self._hung()
        where = path.read_text() if path.exists() else ""
        if not where:
            return None
        return Outcome("failed", reason=f"past its time limit of {limit:g} s; its worker was killed", traceback=where)

    def step(self) -> dict[str, Any]:
        """One epoch, or the outcome."""
        event: Report | Outcome
        if self._failed is not None:
            event = self._failed
        else:
            assert self._steps is not None
            if self._first:
                event = next(self._steps)
            else:
                event = self._steps.send(ray.get(self._mailbox.may_go_on.remote(self._number)))
            self._first = False
        done = isinstance(event, Outcome)
        if done:
            self._end()
        return {EVENT: event, "done": done}

    def _end(self) -> None:
        if self._steps is not None:
            self._steps.close()
        if self._worker.time_limit_s is not None and self._failed is None:
            faulthandler.cancel_dump_traceback_later()
            self._dump.close()
            self._hung().unlink(missing_ok=True)

    def cleanup(self) -> None:
        """Let go of an unfinished trial."""
        if self._steps is not None:
            self._steps.close()

    # Without these Tune fails a class that reuses actors; the journal needs nothing from them.

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing to load."""


def _grace(limit_s: float) -> float:
    """Seconds past a limit after which the process is ended: before, the work may end by itself."""
    return max(2.0, 0.1 * limit_s)


def _check_machine(name: str) -> None:
    """Refuse the name of a machine that no node has as a resource."""
    have = ray.cluster_resources()
    if name not in have:
        own = sorted(
            resource
            for resource in have
            if resource not in ("memory", "object_store_memory") and not resource.startswith("node:")
        )
        raise InvalidInputError(
            f"on={name!r} names a machine that measures, but no node of Ray has such a resource; there are: "
            f"{', '.join(own)}. Start that machine's node with: ray start --address=<head>:6379 "
            f"--resources='{{\"{name}\": 1}}'"
            + ("" if os.environ.get("RAY_ADDRESS") else ", and set RAY_ADDRESS=<head>:6379 here")
        )


def _check_resources(workers: int, cpus: float, gpus: float, say: Callable[[str], None]) -> None:
    have = ray.cluster_resources()
    if have.get("CPU", 0) < cpus or have.get("GPU", 0) < gpus:
        raise NasplatError(
            f"no trial of {cpus:g} CPUs and {gpus:g} GPUs can be placed: Ray has {have.get('CPU', 0):g} CPUs and "
            f"{have.get('GPU', 0):g} GPUs in all; ask for less per trial"
        )
    fit = min(
        math.floor(have.get("CPU", 0) / cpus) if cpus else workers,
        math.floor(have.get("GPU", 0) / gpus) if gpus else workers,
    )
    if fit < workers:
        say(f"Ray has room for {fit} trials at a time, not {workers}; the others wait their turn")


@contextlib.contextmanager
def _ray(workers: int, cpus: float, gpus: float) -> Iterator[None]:
    """A connection to Ray: the present one, a cluster, or a local one of our own."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    # "local", or Ray would join whatever cluster it finds on this machine.
    where: dict[str, Any] = (
        {"address": address}
        if address
        else {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, math.ceil(workers * cpus)),
            "resources": {BENCH: 1},
            "include_dashboard": False,
        }
    )
    if address:
        _check_reachable(address)
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **where)
    except Exception as error:
        at = f"reach Ray at RAY_ADDRESS={address}" if address else "start a local Ray"
        raise NasplatError(f"cannot {at}: {(str(error) or repr(error)).splitlines()[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuse an address where nothing answers: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host or not port.isdigit():
        return  # "auto", or a URL: Ray's own to judge
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError as error:
        raise NasplatError(f"nothing answers at RAY_ADDRESS={address} ({error}); unset it for a local Ray") from error


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune without its own loggers, signal handler, console and frequent snapshots, for the time of the search."""
    settings = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": str(10**9),
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    before = {name: os.environ.get(name) for name in settings}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(settings)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

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
import shutil
import socket
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from nasplat.cost.bench import Bench
from nasplat.errors import NasplatError
from nasplat.search import Assignment, Outcome, Search
from nasplat.strategy import Report
from nasplat.worker import Worker, trial_folder

EVENT = "nasplat"
"""Key of the report or outcome in Tune's results."""


@contextlib.contextmanager
def connected(
    *,
    workers: int,
    cpus: float = 1.0,
    gpus: float = 0.0,
    say: Callable[[str], None] = lambda message: None,
) -> Iterator[Bench]:
    """A connection to Ray, and the bench that measures for all its workers.

    Uses the Ray that this process is connected to; else the cluster of ``RAY_ADDRESS``; else a local Ray, which is
    shut down at the end.

    Args:
        workers: Trials at a time.
        cpus: Processors set aside for a trial; may be a fraction.
        gpus: GPUs, likewise.
        say: Takes lines for the user.

    Raises:
        NasplatError: The cluster can never place a trial of this size.
    """
    if not ray.is_initialized():
        say(
            "Starting Ray" if not os.environ.get("RAY_ADDRESS") else f"Connecting to Ray at {os.environ['RAY_ADDRESS']}"
        )
    with _ray(workers, cpus, gpus):
        _check_resources(workers, cpus, gpus, say)
        yield Bench()


def run(search: Search, worker: Worker, *, workers: int, cpus: float = 1.0, gpus: float = 0.0) -> None:
    """Work until the search hands out nothing more. Only within :func:`connected`.

    Args:
        search: What hands out trials; stays in this process.
        worker: What runs them; copied to each worker.
        workers: Trials at a time.
        cpus: Processors set aside for a trial; may be a fraction.
        gpus: GPUs, likewise.
    """
    with _quiet_tune():
        mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
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
            ray.kill(mailbox)
            shutil.rmtree(storage, ignore_errors=True)
        if searcher.error is not None:
            raise searcher.error


class Mailbox:
    """An actor between driver and workers: proposals one way, a request to stop early the other."""

    def __init__(self) -> None:
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
        faulthandler.dump_traceback_later(limit + max(2.0, 0.1 * limit), exit=True, file=self._dump)

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

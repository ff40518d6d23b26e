"""Refuses meters that cannot measure anything, before a study begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from nasplat.cost.anchor import anchor_network
from nasplat.cost.bench import Bench
from nasplat.cost.meter import Meter
from nasplat.errors import InvalidInputError, NasplatError, UnsupportedError
from nasplat.identity import canonical, describe
from nasplat.runtimes.choose import choose
from nasplat.runtimes.runtime import Runtime
from nasplat.train import place
from nasplat.worker import Worker

TRIED = 4
"""Networks that are built until one can be: a candidate may fail."""


def check_reachable(meters: Sequence[Meter], workers: int) -> None:
    """Refuse meters on other machines where there is no Ray that reaches them.

    Args:
        meters: Of a study.
        workers: Trials at a time, on Ray; 0 is none.

    Raises:
        InvalidInputError: There is such a meter.
    """
    away = [meter for meter in meters if getattr(meter, "on", None) is not None]
    if away and workers == 0:
        name = getattr(away[0], "on", None)
        raise InvalidInputError(
            f"{away[0]!r} measures on {name!r}, a machine of a Ray cluster (a node started with "
            f"--resources='{{\"{name}\": 1}}'); this run stays in one process. Give workers=1 or more"
        )


def check_runtimes(worker: Worker, seed: int) -> None:
    """Refuse a meter whose runtime does not work where it is measured: it could measure no network at all.

    Args:
        worker: Of the study; its meters are checked on its bench.
        seed: Of the network that a runtime is chosen for.

    Raises:
        NasplatError: Of the type that the runtime raised.
        UnsupportedError: It raised something else.
    """
    done: set[str] = set()
    for meter in worker.meters:
        if getattr(meter, "runtime", None) is None or not hasattr(meter, "threads") or not hasattr(meter, "on"):
            continue
        asked: Any = meter
        try:
            with worker.prepared(seed):
                runtime = choose(asked.runtime, *_any_network(worker, seed))
                key = canonical([describe(runtime), asked.threads, asked.on])
                if key not in done:
                    worker.bench.run(_Works(runtime, asked.threads), asked.on)
                done.add(key)
        except NasplatError as error:
            raise type(error)(f"{meter!r} cannot measure anything: {error}") from error
        except Exception as error:
            raise UnsupportedError(f"{meter!r} cannot measure anything: {type(error).__name__}: {error}") from error


def _any_network(worker: Worker, seed: int) -> tuple[nn.Module, torch.Tensor]:
    """A network of the space as a meter gets it, and its input."""
    example = place(worker.task.example(), torch.device(worker.device))
    rng = np.random.default_rng(seed)
    for left in reversed(range(TRIED)):
        try:
            return worker.settle(worker.space.build(worker.space.sample(rng)), example), example
        except Exception:
            if not left:
                raise
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class _Works:
    """A job for a bench: has the runtime load and run its smallest network, as every measurement does."""

    runtime: Runtime
    threads: int

    def __call__(self, bench: Bench) -> None:
        model, example = anchor_network()
        with bench.training():
            self.runtime.load(self.runtime.export(model, example), example, self.threads).run()

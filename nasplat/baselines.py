"""Baseline networks, which limits may be relative to: what they are, how they are known again, what they cost.

A baseline is measured once, before the search, with the study's own meters where the study measures. What it has goes
into the journal, and later runs take it from there: a limit does not move while a study goes on.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn

from nasplat.architecture import Architecture
from nasplat.cost.meter import Meter
from nasplat.errors import InvalidInputError, NasplatError, NasplatWarning, UnsupportedError
from nasplat.identity import canonical, describe
from nasplat.objectives import Constraint, RelativeConstraint
from nasplat.space import SearchSpace
from nasplat.train import place
from nasplat.worker import Worker

ATTEMPTS = 3
"""Measurements of a baseline at most, where the machine was disturbed."""

SEED = 0
"""Of a baseline's random weights."""

Network: TypeAlias = Architecture | Mapping[str, Any] | Callable[[], nn.Module]
"""An architecture of the space, its genes, or a function (or class) without arguments that makes the network."""


@dataclass(frozen=True)
class RecordedNetwork:
    """Stands for a baseline that only the script that made the study can build: known, not built."""

    recorded: Any

    def describe(self) -> Any:
        """The description that the folder has."""
        return self.recorded

    def __call__(self) -> nn.Module:
        """Refused."""
        raise UnsupportedError(
            f"the baseline {self.recorded} lives in the script that made the study: run that script again with the "
            "same folder, or give baselines={...}"
        )


def checked(given: Any, space: SearchSpace) -> dict[str, Architecture | Callable[[], nn.Module]]:
    """Baselines by name, genes turned into architectures.

    Raises:
        InvalidInputError: A name or a network is not what it should be.
        ArchitectureError: Genes do not name an architecture of the space.
    """
    if not isinstance(given, Mapping):
        raise InvalidInputError(f"baselines is {given!r}; networks by name are needed: {{'reference': architecture}}")
    found: dict[str, Architecture | Callable[[], nn.Module]] = {}
    for name, network in given.items():
        if not isinstance(name, str) or not name:
            raise InvalidInputError(f"a baseline has the name {name!r}; a text is needed")
        if isinstance(network, nn.Module):
            raise InvalidInputError(
                f"the baseline {name!r} is a {type(network).__name__}, which cannot be known again in a later process; "
                "give a function without arguments that makes it"
            )
        if isinstance(network, Mapping):
            network = space.architecture(network)
        if isinstance(network, Architecture):
            if not space.owns(network):
                raise InvalidInputError(
                    f"the baseline {name!r} is of the space {network.space}; this study searches {space.identity}. A "
                    "network of another space is given as a function that builds it"
                )
            network = space.architecture(network.genes)
        elif not callable(network):
            raise InvalidInputError(
                f"the baseline {name!r} is {network!r}; an architecture of the space, its genes, or a function without "
                "arguments that makes the network is needed"
            )
        description_of(network)  # what cannot be known again is refused now
        found[name] = network
    return found


def description_of(network: Any) -> Any:
    """What a baseline is known by, as JSON values: its genes, or the function's qualified name."""
    if isinstance(network, Architecture):
        return {"space": network.space, "genes": dict(network.genes)}
    return describe(network)


def from_description(description: Any) -> Architecture | RecordedNetwork:
    """The baseline that a folder names. A function is not looked up: a folder is untrusted input."""
    if isinstance(description, Mapping) and set(description) == {"space", "genes"}:
        return Architecture(description["space"], description["genes"])
    return RecordedNetwork(description)


def named(
    limits: Iterable[Constraint | RelativeConstraint], baselines: Mapping[str, Any], meters: Sequence[Meter]
) -> list[Constraint | RelativeConstraint]:
    """The limits, each relative one with the name of its baseline.

    Raises:
        InvalidInputError: There is no such baseline, or its metric is not known without training.
    """
    found: list[Constraint | RelativeConstraint] = []
    known = [name for meter in meters if not meter.trained for name in meter.metrics]
    for limit in limits:
        if isinstance(limit, RelativeConstraint):
            if not limit.of and len(baselines) == 1:
                limit = replace(limit, of=next(iter(baselines)))
            if limit.of not in baselines:
                there = ", ".join(map(repr, baselines)) or "none"
                raise InvalidInputError(
                    f"{limit}: "
                    + (f"there is no baseline {limit.of!r}; " if limit.of else "say which one with of='...'; ")
                    + f"there are: {there}. Study(baselines={{'reference': architecture}}) gives one, "
                    "on the command line --baseline NAME=FILE"
                )
            if limit.metric not in known:
                raise InvalidInputError(
                    f"{limit}: a baseline is built and measured, not trained, so a relative limit needs a metric that "
                    f"is known without training; there are: {', '.join(known) or 'none'}"
                )
        found.append(limit)
    return found


def resolved(
    limits: Iterable[Constraint | RelativeConstraint],
    baselines: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    meters: Sequence[Meter],
    device: str,
) -> tuple[list[Constraint], list[RelativeConstraint]]:
    """The limits as numbers, as far as the journal knows the baselines, and those that wait for a measurement."""
    ready: list[Constraint] = []
    waiting: list[RelativeConstraint] = []
    for limit in limits:
        if isinstance(limit, Constraint):
            ready.append(limit)
            continue
        value = _recorded(limit, baselines[limit.of], events, meters, device)
        if value is None:
            waiting.append(limit)
        else:
            ready.append(limit.resolved(value))
    return ready, waiting


def _recorded(
    limit: RelativeConstraint, network: Any, events: Sequence[Mapping[str, Any]], meters: Sequence[Meter], device: str
) -> float | None:
    """What the journal says that a baseline has: the same network, by the same meter, on the same device."""
    wanted = canonical(description_of(network))
    meter = canonical(describe(_meter_of(limit.metric, meters)))
    for event in reversed(events):
        if (
            event["event"] == "baseline"
            and limit.metric in event["metrics"]
            and canonical(event["network"]) == wanted
            and event["device"] == device
            and meter in map(canonical, event["meters"])
        ):
            return float(event["metrics"][limit.metric])
    return None


def _meter_of(metric: str, meters: Sequence[Meter]) -> Meter:
    return next(meter for meter in meters if metric in meter.metrics)


def measured(
    waiting: Sequence[RelativeConstraint], baselines: Mapping[str, Any], worker: Worker
) -> list[dict[str, Any]]:
    """Build and measure baselines: an event for the journal for each.

    A measurement that says of itself that the machine was disturbed (``latency_ms_suspect``) is done again, up to
    :data:`ATTEMPTS` times; the least value counts then, since a disturbance only adds time.

    Args:
        waiting: Limits whose baselines are not measured yet.
        baselines: Networks by name.
        worker: Measures; its limits do not matter.

    Raises:
        UnsupportedError: A baseline cannot be built or measured.
    """
    events = []
    for name in dict.fromkeys(limit.of for limit in waiting):
        wanted = [limit.metric for limit in waiting if limit.of == name]
        try:
            events.append(_measured(name, baselines[name], wanted, worker))
        except NasplatError as error:
            raise UnsupportedError(f"the baseline {name!r} cannot be measured: {error}") from error
        except Exception as error:
            raise UnsupportedError(
                f"the baseline {name!r} cannot be built or measured: {type(error).__name__}: {error}"
            ) from error
    return events


def _measured(name: str, network: Any, wanted: Sequence[str], worker: Worker) -> dict[str, Any]:
    own = list(dict.fromkeys(_meter_of(metric, worker.meters) for metric in wanted))
    with worker.prepared(SEED):
        example = place(worker.task.example(), torch.device(worker.device))
        model = worker.space.build(network) if isinstance(network, Architecture) else network()
        if not isinstance(model, nn.Module):
            raise InvalidInputError(f"it gives {model!r}; a torch.nn.Module is needed")
        model = worker.settle(model, example)
        own_architecture = network if isinstance(network, Architecture) else None
        metrics: dict[str, float] = {}
        facts: dict[str, Any] = {}
        for meter in own:
            alone = replace(worker, meters=(meter,))
            best = alone.costs(model, example, own_architecture)
            attempts = 1
            while (doubtful := _doubtful(best.values, wanted)) and attempts < ATTEMPTS:
                again = alone.costs(model, example, own_architecture)
                attempts += 1
                metric = doubtful[0]
                # What disturbs adds time, so the quicker one is nearer to the truth.
                sign = -1 if "_per_s" in metric else 1
                quicker = sign * again.values[metric] < sign * best.values[metric]
                if not _doubtful(again.values, wanted) or quicker:
                    best = again
            if doubtful:
                warnings.warn(
                    f"the baseline {name!r} was measured {attempts} times on a disturbed machine, so that "
                    + ", ".join(f"{metric} {best.values[metric]:.4g}" for metric in doubtful)
                    + " may show it slower than it is, and limits relative to it are too wide then. A new folder on a "
                    "quiet machine measures it again",
                    NasplatWarning,
                    stacklevel=2,
                )
            metrics |= {key: value for key, value in best.values.items() if key != "measure_seconds"}
            facts |= best.facts
    return {
        "event": "baseline",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "name": name,
        "network": description_of(network),
        "meters": [describe(meter) for meter in own],
        "device": worker.device,
        "metrics": metrics,
        "facts": facts,
    }


def _doubtful(values: Mapping[str, float], wanted: Sequence[str]) -> list[str]:
    """The wanted metrics of which the measurement says that the machine was disturbed."""
    return [metric for metric in wanted if metric in values and values.get(f"{metric}_suspect", 0.0) > 0]

"""Any of Optuna's samplers as a strategy.

Optuna keeps a study; here the history is the truth, and what a sampler reads is a mirror of it. What a sampler writes
of its own (the generation of a trial, a generation's parents) goes into the proposal's notes, so that a mirror made
from the history alone, in another process, is equal to one that was kept.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import combinations
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, CmaEsSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.space import Group, Option, SearchSpace
from nasplat.strategy import Evaluate, History, Trial

SAMPLERS: Mapping[str, type[BaseSampler]] = {
    "tpe": optuna.samplers.TPESampler,
    "gp": optuna.samplers.GPSampler,
    "nsga2": optuna.samplers.NSGAIISampler,
    "nsga3": optuna.samplers.NSGAIIISampler,
    "random": optuna.samplers.RandomSampler,
    "qmc": optuna.samplers.QMCSampler,
    "brute_force": optuna.samplers.BruteForceSampler,
}
"""Short names of samplers."""

MAX_COMBINATIONS = 10_000
"""Ways to pick the members of one group, above which they are too many for one categorical parameter."""

TRIES = 3
"""Suggestions tried for a valid one that was not proposed before."""


@dataclass(frozen=True)
class OptunaSearch:
    """Search with one of Optuna's samplers, with one or more objectives and with constraints.

    Every choice is a categorical parameter. A group (``pick`` of its members are on) is one categorical parameter
    over the combinations of members, and one for the option of each picked member, so every suggestion is legal and
    no parameter depends on another.

    Optuna is told what runs (samplers such as TPE and GP keep away from it), what failed (ignored), what was stopped
    or broke a cheap limit (pruned, with its violations), and by how much each trial breaks or keeps each limit.

    Attributes:
        sampler: ``tpe``, ``gp``, ``nsga2``, ``nsga3``, ``random``, ``qmc``, ``brute_force``; or a sampler class, of
            Optuna or one's own, that takes a ``seed``. A class, not an object: only then is the strategy plain data.
        options: Arguments of the sampler but its seed: ``{"n_startup_trials": 20}``. JSON values, so that they name
            the study.
    """

    sampler: str | type[BaseSampler] = "tpe"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        kind: Any = self.sampler
        if isinstance(kind, BaseSampler):
            raise InvalidInputError(
                f"sampler is an object; pass its class and its arguments: "
                f"OptunaSearch({type(kind).__name__}, {{...}}), so that each proposal can seed its own"
            )
        if isinstance(kind, str):
            kind = CmaEsSampler if kind == "cmaes" else SAMPLERS.get(kind)
        if not (isinstance(kind, type) and issubclass(kind, BaseSampler)):
            raise InvalidInputError(
                f"sampler is {self.sampler!r}; legal: {', '.join(SAMPLERS)}, or a subclass of optuna's BaseSampler"
            )
        if issubclass(kind, CmaEsSampler):
            raise InvalidInputError(
                "CMA-ES hands categorical parameters to random sampling, and every choice of a space is one: it would "
                f"be random search by another name; legal: {', '.join(SAMPLERS)}, or another sampler class"
            )
        arguments = inspect.signature(kind).parameters
        if "seed" not in arguments:
            raise InvalidInputError(f"{kind.__name__} takes no seed, so its proposals could not be repeated")
        anything = any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments.values())
        legal = [name for name in arguments if name != "seed"]
        unknown = [name for name in self.options if name == "seed" or (name not in legal and not anything)]
        if unknown:
            raise InvalidInputError(
                f"options of {kind.__name__} have {', '.join(unknown)}; legal: {', '.join(legal)} "
                "(the seed is the study's)"
            )
        object.__setattr__(self, "options", dict(self.options))

    def _make(self, seed: int) -> BaseSampler:
        kind: Any = SAMPLERS[self.sampler] if isinstance(self.sampler, str) else self.sampler
        made: BaseSampler = kind(**self.options, seed=seed)
        return made

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        """What the sampler suggests; None when the space is exhausted.

        A suggestion that was proposed before is asked for again a few times, then an architecture drawn at random
        takes its place.

        Args:
            history: All trials so far.
            rng: The only source of randomness; the sampler is made anew with a seed drawn from it.

        Raises:
            UnsupportedError: A group has too many combinations to be one parameter.
        """
        space = history.space
        if history.distinct >= space.size():
            return None
        mirror = _MIRRORS.get(history)
        if mirror is None:
            mirror = _MIRRORS[history] = _Mirror(history)
        mirror.update(history)

        notes: dict[str, Any] = {}
        for _ in range(TRIES):
            with _quiet():
                params, notes = mirror.ask(self._make(int(rng.integers(2**32))))
            genes = mirror.encoding.genes(params)
            if not space.is_valid(genes):
                continue
            proposal = Evaluate(space.architecture(genes), notes=notes)
            if not history.of(proposal.architecture):
                return proposal
        architecture = history.draw_new(rng)
        return None if architecture is None else Evaluate(architecture, notes=notes)


class _Categorical(CategoricalDistribution):
    """A categorical distribution that knows itself at once.

    Samplers compare the distributions of all trials, option by option: most of a proposal's time at 1,000 trials.
    """

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)

    __hash__ = CategoricalDistribution.__hash__


class _Encoding:
    """Architectures as independent categorical parameters, and back."""

    def __init__(self, space: SearchSpace) -> None:
        self._choices = {name: tuple(options) for name, options in space.choices.items()}
        self._groups = dict(space.choice_groups)
        self._combinations: dict[str, dict[str, tuple[str, ...]]] = {}
        self._slots: dict[str, tuple[Option, ...]] = {}
        values: dict[str, tuple[Option, ...]] = dict(self._choices)
        for key, group in self._groups.items():
            ways = math.comb(len(group.names), group.pick)
            if ways > MAX_COMBINATIONS:
                raise UnsupportedError(
                    f"{space.name}: {key} has {ways} ways to pick {group.pick} of {len(group.names)}; Optuna search "
                    f"takes up to {MAX_COMBINATIONS}. Evolution and random search have no such limit"
                )
            self._combinations[key] = {"+".join(on): on for on in combinations(group.names, group.pick)}
            # Members may offer different options: a slot has those of all members, in order of appearance.
            self._slots[key] = tuple(dict.fromkeys(option for name in group.names for option in self._on(name, group)))
            for name in group.names:
                del values[name]
            # A colon is in no choice's name, so these cannot collide with one.
            values[f"{key}:on"] = tuple(self._combinations[key])
            values.update({f"{key}:{slot}": self._slots[key] for slot in range(group.pick)})
        self.distributions: dict[str, BaseDistribution] = {
            name: _Categorical(options) for name, options in values.items() if len(options) > 1
        }
        self._single = {name: options[0] for name, options in values.items() if len(options) == 1}

    def _on(self, name: str, group: Group) -> tuple[Option, ...]:
        return tuple(option for option in self._choices[name] if option != group.off)

    def params(self, genes: Mapping[str, Any]) -> dict[str, Any]:
        values = dict(genes)
        for key, group in self._groups.items():
            on = [name for name in group.names if genes[name] != group.off]
            values[f"{key}:on"] = "+".join(on)
            values.update({f"{key}:{slot}": genes[name] for slot, name in enumerate(on)})
        return {name: values[name] for name in self.distributions}

    def genes(self, params: Mapping[str, Any]) -> dict[str, Option]:
        values = {**self._single, **params}
        genes = {name: values[name] for name in self._choices if name in values}
        for key, group in self._groups.items():
            genes.update(dict.fromkeys(group.names, group.off))
            for slot, name in enumerate(self._combinations[key][values[f"{key}:on"]]):
                option, offered = values[f"{key}:{slot}"], self._on(name, group)
                if option not in offered:
                    option = offered[self._slots[key].index(option) % len(offered)]
                genes[name] = option
        return {name: genes[name] for name in self._choices}


class _Storage(InMemoryStorage):
    """Optuna's storage in memory, for the one trial that is asked for (number 0), behind the mirrored ones (from 1)."""

    def __init__(self, past: list[FrozenTrial]) -> None:
        super().__init__()
        self._past = past

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._past[trial_id - 1] if trial_id > 0 else super().get_trial(trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        past = [trial for trial in self._past if states is None or trial.state in states]
        return (copy.deepcopy(past) if deepcopy else past) + super().get_all_trials(study_id, deepcopy, states)


class _Mirror:
    """A history as Optuna sees it. Only what changed is brought over; the rest stays."""

    def __init__(self, history: History) -> None:
        self.encoding = _Encoding(history.space)
        self._directions = [
            StudyDirection.MAXIMIZE if objective.direction == "maximise" else StudyDirection.MINIMIZE
            for objective in history.objectives
        ]
        self._revision = -1
        self._trials: list[FrozenTrial] = []
        self._running: list[int] = []
        self._study_attributes: dict[str, Any] = {}

    def update(self, history: History) -> None:
        if history.revision == self._revision:
            return
        # A trial that ended never changes again.
        for number in self._running:
            self._trials[number] = self._freeze(history.trials[number], history)
        for trial in history.trials[len(self._trials) :]:
            self._trials.append(self._freeze(trial, history))
            self._study_attributes.update(trial.proposal.notes.get("optuna_study", {}))
        self._running = [trial.number for trial in history.running]
        self._revision = history.revision

    def ask(self, sampler: BaseSampler) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parameters that the sampler suggests, and the notes by which a later sampler goes on."""
        storage = _Storage(self._trials)
        study = optuna.create_study(storage=storage, sampler=sampler, directions=self._directions)
        identity = storage.get_study_id_from_name(study.study_name)
        for key, value in self._study_attributes.items():
            storage.set_study_system_attr(identity, key, value)
        asked = study.ask(self.encoding.distributions)
        # Parameters shared ahead of their suggestion are for processes that see half a trial; here it is whole.
        attributes = {k: v for k, v in storage.get_trial(0).system_attrs.items() if "relative_params" not in k}
        known = self._study_attributes
        made = {k: v for k, v in storage.get_study_system_attrs(identity).items() if k not in known or known[k] != v}
        notes: dict[str, Any] = {}
        if attributes:
            notes["optuna"] = attributes
        if made:
            notes["optuna_study"] = made
        return asked.params, json.loads(json.dumps(notes))

    def _freeze(self, trial: Trial, history: History) -> FrozenTrial:
        state, values, reports = TrialState.FAIL, None, {}
        limits = _limits(trial, history)
        if trial.state == "running":
            state = TrialState.RUNNING
        elif trial.state == "complete" and all(o.metric in trial.metrics for o in history.objectives):
            state, values = TrialState.COMPLETE, [trial.metrics[o.metric] for o in history.objectives]
            # As History.violation has it: a limit on something that was not measured is broken.
            limits = {str(limit): limits.get(str(limit), math.inf) for limit in history.constraints}
        elif trial.state == "infeasible" and any(excess > 0 for excess in limits.values()):
            state = TrialState.PRUNED
        elif trial.state == "stopped" and len(history.objectives) == 1:  # Optuna prunes with one objective only
            state, metric = TrialState.PRUNED, history.objectives[0].metric
            reports = {step: r[metric] for step, r in enumerate(trial.reports, 1) if metric in r}
        architecture = trial.architecture
        if architecture is None:  # an exploration is none of Optuna's business
            state, values, reports = TrialState.FAIL, None, {}
        frozen = FrozenTrial(
            number=trial.number + 1,
            trial_id=trial.number + 1,
            state=state,
            value=None,
            values=values,
            datetime_start=_NO_TIME,
            datetime_complete=_NO_TIME if state.is_finished() else None,
            params={} if architecture is None else self.encoding.params(architecture.genes),
            distributions={} if architecture is None else self.encoding.distributions,
            user_attrs={},
            system_attrs=dict(trial.proposal.notes.get("optuna", {})),
            intermediate_values=reports,
        )
        if state in (TrialState.COMPLETE, TrialState.PRUNED):
            for name, excess in limits.items():
                frozen.set_constraint(name, excess)
        return frozen


def _limits(trial: Trial, history: History) -> dict[str, float]:
    """Per limit that was measured the relative excess over it; negative where it is kept with room to spare."""
    excesses = {}
    for limit in history.constraints:
        if limit.metric in trial.metrics:
            excess = trial.metrics[limit.metric] - limit.bound
            excesses[str(limit)] = (excess if limit.sense == "at_most" else -excess) / max(abs(limit.bound), 1e-12)
    return excesses


_MIRRORS: WeakKeyDictionary[History, _Mirror] = WeakKeyDictionary()
_NO_TIME = datetime(1970, 1, 1)  # samplers do not look at it


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna announces each study it creates, and that parts of it are experimental; not here."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)

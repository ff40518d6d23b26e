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
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from importlib import import_module
from importlib.util import find_spec
from itertools import combinations, pairwise
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, CmaEsSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nasplat.checks import is_number
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.ranges import Int, Range
from nasplat.space import Group, Option, SearchSpace
from nasplat.strategy import Evaluate, History, Trial


class CmaEs(CmaEsSampler):
    """Optuna's CMA-ES, with its state between generations as JSON.

    Optuna pickles the state into a trial's attributes. Here these come back out of a study's folder, and nothing in a
    folder is ever unpickled.
    """

    _optimiser: Any = None

    def _init_optimizer(self, *arguments: Any) -> Any:
        self._optimiser = super()._init_optimizer(*arguments)
        # cmaes leaves it as the memory was, which would get into the notes: written before it is read, in any case.
        self._optimiser._funhist_values.fill(0.0)
        return self._optimiser

    def _split_optimizer_str(self, optimizer_str: str) -> dict[str, str]:
        state = {key: _plain(value) for key, value in self._optimiser.__getstate__().items()}
        return {self._attr_key_optimizer: json.dumps(state, sort_keys=True)}

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        cmaes: Any = import_module("cmaes")
        for trial in reversed(completed_trials):
            if self._attr_key_optimizer not in trial.system_attrs:
                continue
            recorded = json.loads(trial.system_attrs[self._attr_key_optimizer])
            state = {key: np.array(value) if isinstance(value, list) else value for key, value in recorded.items()}
            size = len(state["_mean"])
            self._optimiser = cmaes.CMA(mean=np.zeros(size), sigma=1.0, lr_adapt=bool(state.get("_lr_adapt")))
            unknown = set(state) ^ set(self._optimiser.__getstate__())
            if unknown:
                raise InvalidInputError(
                    f"trial {trial.number - 1} holds a state of CMA-ES that this version of cmaes does not read: "
                    f"{', '.join(sorted(unknown))}"
                )
            self._optimiser.__setstate__(state)
            return self._optimiser
        return None


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


SAMPLERS: Mapping[str, type[BaseSampler]] = {
    "tpe": optuna.samplers.TPESampler,
    "gp": optuna.samplers.GPSampler,
    "nsga2": optuna.samplers.NSGAIISampler,
    "nsga3": optuna.samplers.NSGAIIISampler,
    "cmaes": CmaEs,
    "random": optuna.samplers.RandomSampler,
    "qmc": optuna.samplers.QMCSampler,
    "brute_force": optuna.samplers.BruteForceSampler,
}
"""Short names of samplers."""

NOT_JSON = ("independent_sampler", "source_trials", "use_separable_cma", "with_margin")
"""Options of CMA-ES that are objects, or give it a state that has no form in JSON here."""

MAX_COMBINATIONS = 10_000
"""Ways to pick the members of one group, above which they are too many for one categorical parameter."""

SEQUENCE = "nasplat:sequence_seed"
"""The attribute of a study that holds the seed of its quasi-random sequence."""

TRIES = 3
"""Suggestions tried for a valid one that was not proposed before."""


@dataclass(frozen=True)
class OptunaSearch:
    """Search with one of Optuna's samplers, with one or more objectives and with constraints.

    A range (``nasplat.ranges``) is a real or whole parameter, linear or logarithmic, whose suggestions are taken to the
    nearest value of the range. Every other choice is a categorical parameter.

    A group (``pick`` of its members are on) is one categorical parameter
    over the combinations of members, and one for the option of each picked member, so every suggestion is legal and
    no parameter depends on another.

    Optuna is told what runs (samplers such as TPE and GP keep away from it), what failed (ignored), what was stopped
    or broke a cheap limit (pruned, with its violations), and by how much each trial breaks or keeps each limit.

    ``random``, ``qmc`` and ``brute_force`` learn nothing from results, so they are not to be expected to beat random
    search.

    Attributes:
        sampler: ``tpe``, ``gp``, ``nsga2``, ``nsga3``, ``cmaes``, ``random``, ``qmc``, ``brute_force``; or a sampler
            class, of Optuna or one's own, that takes a ``seed``. A class, not an object: only then is the strategy
            plain data. ``cmaes`` needs the package of that name, one objective, and choices of numbers in order:
            ranges, or three options or more that rise or fall, of which it sees the index. It knows no limits.
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
            kind = SAMPLERS.get(kind)
        if not (isinstance(kind, type) and issubclass(kind, BaseSampler)):
            raise InvalidInputError(
                f"sampler is {self.sampler!r}; legal: {', '.join(SAMPLERS)}, or a subclass of optuna's BaseSampler"
            )
        if issubclass(kind, CmaEsSampler):
            if kind not in (CmaEs, CmaEsSampler):
                raise InvalidInputError(
                    f"{kind.__name__} keeps its state as a pickle, which a study's folder must not hold; legal: "
                    "'cmaes', or a sampler that is no CmaEsSampler"
                )
            for name in NOT_JSON:
                if self.options.get(name):
                    raise InvalidInputError(f"options of cmaes have {name}, which is not supported here; leave it out")
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

    @property
    def _kind(self) -> Any:
        kind = SAMPLERS[self.sampler] if isinstance(self.sampler, str) else self.sampler
        return CmaEs if kind is CmaEsSampler else kind

    @property
    def _is_sequence(self) -> bool:
        return issubclass(self._kind, optuna.samplers.QMCSampler)

    def _make(self, seed: int) -> BaseSampler:
        kind = self._kind
        # Unscrambled, every study would begin with the same points, and most of those would be alike.
        options = {"scramble": True, **self.options} if self._is_sequence else self.options
        made: BaseSampler = kind(**options, seed=seed)
        return made

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        """What the sampler suggests; None when the space is exhausted.

        A suggestion that was proposed before is asked for again a few times, then an architecture drawn at random
        takes its place.

        Args:
            history: All trials so far.
            rng: The only source of randomness; the sampler is made anew with a seed drawn from it.

        Raises:
            UnsupportedError: A group has too many combinations to be one parameter; or the sampler is ``cmaes``, and
                the package is missing, there are several objectives, or a choice is not one of numbers in order.
        """
        space = history.space
        if history.distinct >= space.size():
            return None
        form: Form = "value"
        if self._kind is CmaEs:
            _check_cmaes(history)
            form = "ordered"
        elif issubclass(self._kind, optuna.samplers.BruteForceSampler):
            form = "index"
        mirrors = _MIRRORS.setdefault(history, {})
        if form not in mirrors:
            mirrors[form] = _Mirror(history, form)
        mirror = mirrors[form]
        mirror.update(history)

        notes: dict[str, Any] = {}
        for _ in range(TRIES):
            seed = int(rng.integers(2**32))
            if self._is_sequence:  # one sequence for the whole study: its first trial notes the seed
                seed = mirror.attributes.get(SEQUENCE, seed)
            with _quiet():
                params, notes = mirror.ask(self._make(seed))
            if self._is_sequence and SEQUENCE not in mirror.attributes:
                notes["optuna_study"] = {**notes.get("optuna_study", {}), SEQUENCE: seed}
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


Form: TypeAlias = Literal["value", "ordered", "index"]
"""What a sampler gets of numbers in order.

``value``: of a range its values, and options of a tuple as categories. ``ordered``: of a range its values, of options
that rise or fall their index. ``index``: of a range its index, and options of a tuple as categories.
"""


class _Encoding:
    """Architectures as independent parameters, and back."""

    def __init__(self, space: SearchSpace, form: Form = "value") -> None:
        self._choices = {
            name: options if isinstance(options, Range) else tuple(options) for name, options in space.choices.items()
        }
        self._groups = dict(space.choice_groups)
        self._combinations: dict[str, dict[str, tuple[str, ...]]] = {}
        self._slots: dict[str, tuple[Option, ...]] = {}
        values: dict[str, Sequence[Option]] = dict(self._choices)
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
        self.distributions: dict[str, BaseDistribution] = {}
        self._indexed: dict[str, Sequence[Option]] = {}
        for name, options in values.items():
            if len(options) == 1:
                continue
            if (form == "index" and isinstance(options, Range)) or (form == "ordered" and _in_order(options)):
                self._indexed[name] = options
                self.distributions[name] = IntDistribution(0, len(options) - 1)
            else:
                self.distributions[name] = _distribution(options)
        self._single = {name: options[0] for name, options in values.items() if len(options) == 1}

    def _on(self, name: str, group: Group) -> tuple[Option, ...]:
        return tuple(option for option in self._choices[name] if option != group.off)

    def params(self, genes: Mapping[str, Any]) -> dict[str, Any]:
        values = dict(genes)
        for key, group in self._groups.items():
            on = [name for name in group.names if genes[name] != group.off]
            values[f"{key}:on"] = "+".join(on)
            values.update({f"{key}:{slot}": genes[name] for slot, name in enumerate(on)})
        indexed = self._indexed
        return {
            name: indexed[name].index(values[name]) if name in indexed else values[name] for name in self.distributions
        }

    def genes(self, params: Mapping[str, Any]) -> dict[str, Option]:
        values = {**self._single, **params}
        values.update({name: options[int(params[name])] for name, options in self._indexed.items()})
        genes: dict[str, Option] = {}
        for name, options in self._choices.items():
            if name in values:
                genes[name] = options.nearest(values[name]) if isinstance(options, Range) else values[name]
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

    def __init__(self, history: History, form: Form = "value") -> None:
        self.encoding = _Encoding(history.space, form)
        self._directions = [
            StudyDirection.MAXIMIZE if objective.direction == "maximise" else StudyDirection.MINIMIZE
            for objective in history.objectives
        ]
        self._revision = -1
        self._trials: list[FrozenTrial] = []
        self._running: list[int] = []
        self.attributes: dict[str, Any] = {}

    def update(self, history: History) -> None:
        if history.revision == self._revision:
            return
        # A trial that ended never changes again.
        for number in self._running:
            self._trials[number] = self._freeze(history.trials[number], history)
        for trial in history.trials[len(self._trials) :]:
            self._trials.append(self._freeze(trial, history))
            self.attributes.update(trial.proposal.notes.get("optuna_study", {}))
        self._running = [trial.number for trial in history.running]
        self._revision = history.revision

    def ask(self, sampler: BaseSampler) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parameters that the sampler suggests, and the notes by which a later sampler goes on."""
        storage = _Storage(self._trials)
        study = optuna.create_study(storage=storage, sampler=sampler, directions=self._directions)
        identity = storage.get_study_id_from_name(study.study_name)
        for key, value in self.attributes.items():
            storage.set_study_system_attr(identity, key, value)
        asked = study.ask(self.encoding.distributions)
        # Parameters shared ahead of their suggestion are for processes that see half a trial; here it is whole.
        attributes = {k: v for k, v in storage.get_trial(0).system_attrs.items() if "relative_params" not in k}
        known = self.attributes
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


def _distribution(options: Sequence[Option]) -> BaseDistribution:
    """The parameter of a choice: real or whole for a range, else categorical."""
    if not isinstance(options, Range):
        return _Categorical(tuple(options))
    low, high = options[0], options[-1]
    if isinstance(options, Int) and not (options.log and options.step > 1):
        return IntDistribution(low, high, log=options.log, step=options.step)
    return FloatDistribution(low, high, log=options.log)


def _in_order(options: Sequence[Option]) -> bool:
    """Whether these are options of a tuple, three numbers or more, that rise or fall."""
    if isinstance(options, Range) or len(options) < 3 or not all(is_number(option) for option in options):
        return False
    pairs = list(pairwise(options))
    return all(a < b for a, b in pairs) or all(a > b for a, b in pairs)  # type: ignore[operator]


def _check_cmaes(history: History) -> None:
    """Refuse what CMA-ES would do by random sampling, without a word, or not at all."""
    space = history.space
    if find_spec("cmaes") is None:
        raise UnsupportedError("the sampler cmaes needs the package cmaes, which is not installed: pip install cmaes")
    if len(history.objectives) > 1:
        names = ", ".join(map(str, history.objectives))
        raise UnsupportedError(f"CMA-ES has one objective; this search has {names}. nsga2, nsga3, tpe and gp take more")
    if space.choice_groups:
        raise UnsupportedError(
            f"CMA-ES moves along numbers in order; {space.name} has the groups {', '.join(space.choice_groups)}, of "
            f"which some members are picked. Legal for it: {', '.join(name for name in SAMPLERS if name != 'cmaes')}"
        )
    wrong = [
        name
        for name, options in space.choices.items()
        if len(options) > 1 and not isinstance(options, Range) and not _in_order(options)
    ]
    if wrong:
        raise UnsupportedError(
            f"CMA-ES moves along numbers in order: ranges, or three options or more that rise or fall. In {space.name} "
            f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} neither, and would be drawn at random. Legal: "
            f"{', '.join(name for name in SAMPLERS if name != 'cmaes')}"
        )


_MIRRORS: WeakKeyDictionary[History, dict[Form, _Mirror]] = WeakKeyDictionary()
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

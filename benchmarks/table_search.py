"""Searches of a table of NAS-Bench-201, by nasplat's strategies and by other libraries, each as arrays of what it did.

A search here takes no training: results come from the table, and time is charged as the table has it. nasplat's
strategies go through nasplat's own ``Search`` and ``History``; the others through their own ask and tell. All see the
validation accuracy of one training, drawn anew for each evaluation from the table's seeds; none sees a test accuracy.
"""

from __future__ import annotations

import importlib
import logging
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from nasplat.architecture import Architecture
from nasplat.objectives import Objective, maximise, minimise
from nasplat.search import Limits, Outcome, Search
from nasplat.strategy import Evaluate, History, Strategy
from search_spaces.nasbench201 import EDGES, OPERATIONS, NasBench201, edge_name
from search_spaces.nasbench201_table import NasBench201Table

SPACE = NasBench201()
GENES = tuple(edge_name(source, node) for source, node in EDGES)


@dataclass(frozen=True)
class Goal:
    """What is searched for, and for how long.

    Attributes:
        evaluations: Full evaluations to make, at least.
        seconds: Charged seconds of training to spend, at least; 0 asks for the evaluations alone.
        cost: A second objective, to be minimised; "" is validation accuracy alone.
    """

    evaluations: int
    seconds: float = 0.0
    cost: str = ""

    @property
    def objectives(self) -> list[Objective]:
        """For nasplat's history."""
        return [maximise("val_accuracy"), *([minimise(self.cost)] if self.cost else [])]


@dataclass
class Run:
    """What one search did, an entry per evaluation in the order of ending.

    Attributes:
        seconds: Charged, all so far.
        epochs: Of the training.
        observed: Validation accuracy of the one training, a share.
        truth: The cell's mean test accuracy, a share; where the table has none, its mean validation accuracy.
        cost: Of the second objective; 0 without one.
        cpu_seconds: Of the search itself, over all evaluations: proposing and bookkeeping.
    """

    seconds: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    observed: list[float] = field(default_factory=list)
    truth: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0

    def add(
        self, table: NasBench201Table, goal: Goal, architecture: Architecture, budget: float, seed: int
    ) -> Mapping[str, float]:
        """Look an evaluation up and book it."""
        metrics = table(architecture, budget, seed)
        self.seconds.append((self.seconds[-1] if self.seconds else 0.0) + metrics["train_seconds"])
        self.epochs.append(round(200 * budget))
        self.observed.append(metrics["val_accuracy"])
        self.truth.append(truth(table, architecture))
        self.cost.append(metrics[goal.cost] if goal.cost else 0.0)
        return metrics

    def done(self, goal: Goal) -> bool:
        """Whether the goal is reached."""
        if goal.seconds and (not self.seconds or self.seconds[-1] < goal.seconds):
            return False
        # A search with short trainings spends its time otherwise: it is done by time alone.
        return bool(goal.seconds and min(self.epochs) < 200) or len(self.seconds) >= goal.evaluations

    def picks(self) -> list[float]:
        """Per evaluation the truth of the best observed full training so far; NaN before there is one."""
        found, best, pick = [], -1.0, float("nan")
        for epochs, observed, value in zip(self.epochs, self.observed, self.truth, strict=True):
            if epochs == 200 and observed > best:
                best, pick = observed, value
            found.append(pick)
        return found


def truth(table: NasBench201Table, architecture: Architecture) -> float:
    """What a cell is worth, with as little noise as the table allows: a share that no search sees."""
    if "test_accuracy" in table.metrics:
        return table.test_accuracy(architecture)
    return table.mean_val_accuracy(architecture)


Searcher = Callable[[NasBench201Table, Goal, int], Run]
"""``search(table, goal, seed)``."""


@dataclass(frozen=True)
class Arm:
    """One way to search.

    Attributes:
        name: In tables and files.
        label: In words.
        kind: ``full``: full trainings alone; ``short``: with the short trainings as the low rung; ``two``: two
            objectives.
        make: ``module:Class`` of a nasplat strategy, or ``optuna:Sampler``, or ``neps:algorithm``.
        options: Its arguments; a value ``{"make": ..., "options": ...}`` is a strategy.
        seeds: At most so many seeds, for the slow ones; 0 is no limit.
        needs: What to install where it is missing.
    """

    name: str
    label: str
    kind: str
    make: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    seeds: int = 0
    needs: str = "not part of this version of nasplat"

    def missing(self) -> str:
        """Why it cannot run here, "" where it can."""
        if self.make.startswith("neps:"):
            try:
                importlib.import_module("neps")
            except ImportError:
                return self.needs
            return ""
        if self.make.startswith("optuna:"):
            return ""
        try:
            self.strategy()
        except (ImportError, AttributeError) as error:
            return f"{self.needs} ({error})"
        return ""

    def strategy(self) -> Strategy:
        """The nasplat strategy."""
        made: Strategy = _make(self.make, self.options)
        return made

    @cached_property
    def search(self) -> Searcher:
        """What runs it."""
        library, _, name = self.make.partition(":")
        if library == "optuna":
            return lambda table, goal, seed: search_optuna(name, self.options, table, goal, seed)
        if library == "neps":
            return lambda table, goal, seed: search_neps(name, self.options, table, goal, seed)
        return lambda table, goal, seed: search_nasplat(self.strategy(), table, goal, seed)


def _make(what: str, options: Mapping[str, Any]) -> Any:
    module, _, name = what.partition(":")
    arguments = {
        key: _make(value["make"], value.get("options", {})) if isinstance(value, Mapping) and "make" in value else value
        for key, value in options.items()
    }
    return getattr(importlib.import_module(module), name)(**arguments)


def search_nasplat(strategy: Strategy, table: NasBench201Table, goal: Goal, seed: int) -> Run:
    """Search with a nasplat strategy, through nasplat's search and history, one trial at a time, in memory."""
    run, began = Run(), time.process_time()
    history = History(SPACE, goal.objectives)
    search = Search(strategy, history, seed)
    search.begin(Limits(max_trials=10**9))
    names = [objective.metric for objective in goal.objectives]
    while not run.done(goal):
        assignment = search.next()
        if assignment is None:
            break  # nothing more to propose
        assert isinstance(assignment.proposal, Evaluate)
        proposal = assignment.proposal
        metrics = run.add(table, goal, proposal.architecture, proposal.budget, assignment.seed)
        kept = {name: metrics[name] for name in (*names, "train_seconds")}
        search.finish(assignment.number, Outcome("complete", kept))
    run.cpu_seconds = time.process_time() - began
    return run


def _trial_seed(seed: int, number: int) -> int:
    """As nasplat's search seeds its trials."""
    return int(np.random.SeedSequence([seed, number, 1]).generate_state(1)[0])


def search_optuna(sampler: str, options: Mapping[str, Any], table: NasBench201Table, goal: Goal, seed: int) -> Run:
    """Search with Optuna alone, as its documentation has it: ask, evaluate, tell. Repeats are evaluated again."""
    import optuna

    run, began = Run(), time.process_time()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(
            directions=["maximize", *(["minimize"] if goal.cost else [])],
            sampler=getattr(optuna.samplers, sampler)(seed=seed, **options),
        )
        while not run.done(goal):
            trial = study.ask()
            genes = {name: trial.suggest_categorical(name, OPERATIONS) for name in GENES}
            metrics = run.add(table, goal, SPACE.architecture(genes), 1.0, _trial_seed(seed, len(run.truth)))
            study.tell(trial, [metrics["val_accuracy"], *([metrics[goal.cost]] if goal.cost else [])])
    run.cpu_seconds = time.process_time() - began
    return run


def search_neps(algorithm: str, options: Mapping[str, Any], table: NasBench201Table, goal: Goal, seed: int) -> Run:
    """Search with NePS, through its ask and tell. It draws from the global generators, which are seeded."""
    import neps
    import torch
    from neps.optimizers.ask_and_tell import AskAndTell

    run, began = Run(), time.process_time()
    # Names of parameters are attributes there.
    space = type(
        "Cell", (neps.PipelineSpace,), {f"edge{i}": neps.Categorical(choices=OPERATIONS) for i in range(len(GENES))}
    )
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    with _silent():
        optimizer = AskAndTell(getattr(neps.algorithms, algorithm)(space(), **options))
        while not run.done(goal):
            trial = optimizer.ask()
            genes = {}
            for key, value in trial.config.items():
                if found := re.search(r"\bedge(\d)\b", key):
                    genes[GENES[int(found[1])]] = OPERATIONS[value] if isinstance(value, int) else value
            metrics = run.add(table, goal, SPACE.architecture(genes), 1.0, _trial_seed(seed, len(run.truth)))
            optimizer.tell(trial, 1.0 - metrics["val_accuracy"])
    run.cpu_seconds = time.process_time() - began
    return run


@contextmanager
def _silent() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


_SHORT: Mapping[str, Any] = {"min_budget": 1 / 17, "eta": 17, "carry": False}
"""The one low rung that the table has: 12 of 200 epochs, 1/17."""

_RS, _OPTUNA = "strategies.random_search:RandomSearch", "strategies.optuna_search:OptunaSearch"
_EVOLUTION = "strategies.regularized_evolution:RegularizedEvolution"
_NEPS = "needs NePS: pip install neural-pipeline-search"

ARMS: Sequence[Arm] = (
    Arm("random", "random search", "full", _RS),
    Arm("evolution", "regularised evolution", "full", _EVOLUTION),
    Arm("local", "local search", "full", "strategies.local_search:LocalSearch"),
    Arm("nsga2", "NSGA-II, one objective", "full", "strategies.nsga2:Nsga2"),
    Arm("tpe", "Optuna's TPE in nasplat", "full", _OPTUNA, {"sampler": "tpe"}, seeds=100),
    Arm("qmc", "Optuna's QMC in nasplat", "full", _OPTUNA, {"sampler": "qmc"}, seeds=40),
    Arm("gp", "Optuna's GP in nasplat", "full", _OPTUNA, {"sampler": "gp"}, seeds=10),
    Arm("predictor", "predictor search", "full", "strategies.predictor_search:PredictorSearch"),
    Arm("optuna-tpe", "bare Optuna, TPE", "full", "optuna:TPESampler"),
    Arm("neps", "NePS, its regularised evolution", "full", "neps:neps_regularized_evolution", needs=_NEPS),
    Arm("halving", "successive halving", "short", "strategies.successive_halving:SuccessiveHalving",
        {**_SHORT, "candidates": 17}, seeds=100),
    Arm("hyperband", "Hyperband", "short", "strategies.hyperband:Hyperband", _SHORT, seeds=100),
    Arm("asha", "asynchronous halving", "short", "strategies.asha:AsyncSuccessiveHalving", _SHORT, seeds=40),
    Arm("asha-evolution", "asynchronous halving of evolution", "short", "strategies.asha:AsyncSuccessiveHalving",
        {**_SHORT, "newcomers": {"make": _EVOLUTION}}, seeds=40),
    Arm("two-random", "random search", "two", _RS),
    Arm("two-evolution", "regularised evolution", "two", _EVOLUTION),
    Arm("two-local", "Pareto local search", "two", "strategies.local_search:LocalSearch", seeds=100),
    Arm("two-nsga2", "NSGA-II", "two", "strategies.nsga2:Nsga2"),
    Arm("two-predictor", "predictor search", "two", "strategies.predictor_search:PredictorSearch", seeds=20),
    Arm("two-tpe", "Optuna's TPE in nasplat", "two", _OPTUNA, {"sampler": "tpe"}, seeds=20),
    Arm("two-optuna-nsga2", "bare Optuna, NSGA-II", "two", "optuna:NSGAIISampler"),
)  # fmt: skip
"""All that can be compared. The first of each kind is the baseline."""

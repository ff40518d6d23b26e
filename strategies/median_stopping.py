"""The median stopping rule of Google Vizier: Golovin et al. 2017, KDD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from nasplat.checks import is_whole
from nasplat.errors import InvalidInputError
from nasplat.objectives import Objective
from nasplat.strategy import Evaluate, History, Proposal, Strategy, Trial


@dataclass(frozen=True)
class MedianStopping:
    """Ends a training that is worse than most others were after as many epochs. What is proposed, another decides.

    After an epoch s a trial is stopped if its best value so far is worse than the median of the other trials' means
    over their epochs 1 to s. The others are the complete trials with at least s epochs; trainings that go on from an
    earlier trial of the same architecture (rungs) count the epochs of both. An exploration is never stopped.

    The value is that of the first objective where an epoch reports it (``val_accuracy``; parameters or latency are
    not). With several objectives that epochs report, a trial is stopped only if it is worse in each of them. An
    objective that no epoch reports cannot be weighed, so a small network may be stopped for its accuracy although its
    size would have put it on the front: wrap no strategy so whose front is to reach far down.

    A stopped trial is recorded as ``stopped``, with the metrics of its last epoch, and is in neither front nor ranking.
    Optuna's samplers are told of it (pruned, with its epochs); evolution, NSGA-II and local search take no parent from
    it, since it was worse than the median; successive halving does not promote it.

    On rungs (successive halving and its kin) what climbs is compared with what climbed before, so that most of
    it is stopped: rungs need no second rule.

    Where the strategy inside ends trials too (it has ``keep``), a trial goes on only if both want it.

    Attributes:
        strategy: What proposes.
        min_steps: Epochs that every trial may train, at least 1.
        min_trials: Others to compare with, at least 1; with fewer nothing is stopped.
    """

    strategy: Strategy
    min_steps: int = 1
    min_trials: int = 5

    def __post_init__(self) -> None:
        if isinstance(self.strategy, type) or not isinstance(self.strategy, Strategy):
            raise InvalidInputError(f"strategy is {self.strategy!r}; a strategy such as RegularizedEvolution()")
        for name in ("min_steps", "min_trials"):
            if not is_whole(getattr(self, name)):
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; an integer from 1 up")

    def propose(self, history: History, rng: np.random.Generator) -> Proposal | None:
        """What the strategy inside proposes.

        Args:
            history: All trials so far.
            rng: Handed on.
        """
        return self.strategy.propose(history, rng)

    def keep(self, trial: Trial, history: History) -> bool:
        """Whether a running trial goes on after the epoch that it reported last.

        Args:
            trial: It, with its reports.
            history: All trials so far.
        """
        inner: Any = getattr(self.strategy, "keep", None)
        return (inner is None or bool(inner(trial, history))) and not self._behind(trial, history)

    def _behind(self, trial: Trial, history: History) -> bool:
        if trial.architecture is None:
            return False
        curve = _curve(trial, history)
        if len(curve) < self.min_steps:
            return False
        scored = [other for other in history.scored() if other.number != trial.number and other.copy_of is None]
        # A training that went on in another trial is a part of that one's curve.
        gone_on = {_source(other, history) for other in [*scored, trial]}
        others = [_curve(other, history) for other in scored if other.number not in gone_on]
        verdicts = []
        for objective in history.objectives:
            own = _losses(curve, objective)
            means = [
                sum(losses) / len(losses)
                for other in others
                if (losses := _losses(other[: len(curve)], objective)) and len(other) >= len(curve)
            ]
            if own and len(means) >= self.min_trials:
                verdicts.append(min(own) > median(means))
        return bool(verdicts) and all(verdicts)


def _curve(trial: Trial, history: History) -> list[Mapping[str, float]]:
    """The reports of a training from its first epoch on: those of the trials that it goes on from come first."""
    parts: list[Sequence[Mapping[str, float]]] = [trial.reports]
    source = _source(trial, history)
    while source is not None:
        parts.append(history.trials[source].reports)
        source = _source(history.trials[source], history)
    return [report for part in reversed(parts) for report in part]


def _source(trial: Trial, history: History) -> int | None:
    """The trial of the same architecture whose training this one goes on with."""
    proposal = trial.proposal
    source = proposal.weights_of if isinstance(proposal, Evaluate) else None
    return source if source is not None and history.trials[source].architecture == trial.architecture else None


def _losses(curve: Sequence[Mapping[str, float]], objective: Objective) -> list[float]:
    return [objective.loss(report) for report in curve if objective.metric in report]

"""One-shot search: train one supernet, search its paths, then train the best of them from scratch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nasplat.architecture import Architecture
from nasplat.checks import is_whole
from nasplat.errors import InvalidInputError
from nasplat.nested import check_inner, propose, proposed_by
from nasplat.strategy import Evaluate, Explore, Explorer, History, Proposal, Strategy, Trial

INHERITED = "inherited"
"""The name of the inner search."""


@dataclass(frozen=True)
class OneShot:
    """Lets an explorer train a supernet, searches its paths by another strategy, and trains the best ones in full.

    Without ``search`` the architectures that the explorer itself found are trained from scratch, all of them. With it::

        OneShot(UniformPaths(epochs=120), search=RegularizedEvolution(50), n_search=1000, n_retrain=3)

    1,000 architectures are scored as paths of the supernet, each with its own batch-norm statistics and its costs
    measured on the built network; evolution chooses them, and cannot tell that nothing was trained. The study needs
    ``max_trials`` of at least ``1 + n_search + n_retrain``.

    The best are those that keep the limits (then those that break them least), by non-dominated rank, and within a rank
    those with the most room around them (crowding distance), or of one objective simply the best. Limits and objectives
    hold for the inherited scores as they stand.

    Where no path could be scored, what the explorer found is trained.

    Attributes:
        explorer: Trains the supernet: ``Darts(epochs=50)``, ``UniformPaths(epochs=120)``.
        search: Any strategy that proposes evaluations, unchanged; None trains what the explorer found.
        n_search: Paths scored, at least 1. Those that a cheap limit refuses do not count, up to ``10 * n_search + 100``
            in all.
        n_retrain: Architectures trained in full at the end, at least 1.
        recalibrate: Training batches from which the batch-norm statistics of each path are estimated anew; 0 takes
            those of the supernet's training.
    """

    explorer: Explorer
    search: Strategy | None = None
    n_search: int = 1000
    n_retrain: int = 3
    recalibrate: int = 20

    def __post_init__(self) -> None:
        if isinstance(self.explorer, type) or not isinstance(self.explorer, Explorer):
            raise InvalidInputError(
                f"explorer is {self.explorer!r}; an object with explore(space, task, rng, context), "
                "such as Darts(epochs=50)"
            )
        if self.search is not None:
            check_inner("search", self.search)
            if not getattr(self.explorer, "keeps_whole_supernet", True):
                raise InvalidInputError(
                    f"search is given, and {self.explorer!r} ends with a part of the supernet (stages, or a part of "
                    "the channels), whose paths cannot be scored; search=None trains what the explorer found"
                )
        for name, least in (("n_search", 1), ("n_retrain", 1), ("recalibrate", 0)):
            if not is_whole(getattr(self, name), least):
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; an integer from {least} up is needed")

    def propose(self, history: History, rng: np.random.Generator) -> Proposal | None:
        """The exploration; then paths of its supernet; then the best of them in full; None while one waits for another.

        Args:
            history: All trials so far.
            rng: The inner strategy's; the explorer has its own.
        """
        exploration = next((trial for trial in history.trials if isinstance(trial.proposal, Explore)), None)
        if exploration is None:
            return Explore(self.explorer)
        if exploration.state in ("running", "failed"):
            return None
        if self.search is None:
            for architecture in exploration.found:
                if not history.of(architecture):
                    return Evaluate(architecture)
            return None
        belongs = proposed_by(INHERITED)
        trials = [trial for trial in history.trials if belongs(trial)]
        worked = sum(trial.state != "infeasible" for trial in trials)
        if worked < self.n_search and len(trials) < 10 * self.n_search + 100:
            proposal = propose(
                self.search,
                history,
                rng,
                INHERITED,
                budget=0.0,
                weights_of=exploration.number,
                recalibrate=self.recalibrate,
            )
            if proposal is not None:
                return proposal
        if any(trial.state == "running" for trial in trials):
            return None
        for architecture in self._best(history, trials) or exploration.found:
            if not any(trial.full for trial in history.of(architecture)):
                return Evaluate(architecture)
        return None

    def _best(self, history: History, trials: list[Trial]) -> list[Architecture]:
        """The architectures to train, best first."""
        first: dict[Architecture, Trial] = {}
        for trial in trials:
            known = all(objective.metric in trial.metrics for objective in history.objectives)
            if trial.architecture is not None and trial.state == "complete" and known:
                first.setdefault(trial.architecture, trial)
        scored = list(first.values())
        standing = history.standing(scored)
        order = sorted(range(len(scored)), key=lambda index: (standing[index], history.losses(scored[index]), index))
        return [list(first)[index] for index in order[: self.n_retrain]]

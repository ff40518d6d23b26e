"""Growth: from a small network up, a step at a time, each the one that gains most for what it costs.

Bulat, Martinez, Tzimiropoulos 2021 (arXiv:2010.03558) grow a binary network so by hand, and judge a step by a short
training, because networks rank after it as they do after the full one. The rule by which a step is chosen here, and
the end, are this project's own: the paper gives neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from nasplat.architecture import Architecture
from nasplat.checks import is_number, is_whole
from nasplat.errors import InvalidInputError
from nasplat.strategy import Evaluate, History, Trial


@dataclass(frozen=True)
class GreedyGrowth:
    """Tries all growth moves of a network, keeps the best gain per cost, and goes on until none gains.

    The moves are ``space.growth(architecture)``. A round evaluates the network and all its moves, as many at a time as
    there are workers. The next round starts from the move with the greatest ratio of gain in the first objective to
    gain in cost; a move that gains and costs nothing more beats all that cost more, and among such the greatest gain
    wins. Ties go to the first. Failed trials and such as break a limit are never kept. When no move gains, the network
    is trained in full, if it was not yet, and the search is over.

    It is for spaces with a small start and few moves. Where the moves are all neighbours of a random start, a round
    costs as many trainings as there are neighbours, and it is not to be expected to beat random search.

    Attributes:
        start: Where to start; None is the space's own ``start()`` where it has one, else a random architecture.
        cost: The metric that a gain is set against; None takes the greatest gain whatever it costs.
        budget: Share of the full training that judges a move, in [0, 1]. Below 1, only the training in full at the end
            makes a result (``Result.best``), so the study needs trials enough to get there, or a limit to ``rounds``.
        rounds: Steps at most; None grows until no move gains.
    """

    start: Architecture | None = None
    cost: str | None = "ops"
    budget: float = 1.0
    rounds: int | None = None

    def __post_init__(self) -> None:
        if self.start is not None and not isinstance(self.start, Architecture):
            raise InvalidInputError(f"start is {self.start!r}; None, or an architecture of the space")
        if self.cost is not None and not isinstance(self.cost, str):
            raise InvalidInputError(f"cost is {self.cost!r}; None, or the name of a metric")
        if not is_number(self.budget) or not 0.0 <= self.budget <= 1.0:
            raise InvalidInputError(f"budget is {self.budget!r}; a share of the full training, in [0, 1]")
        if self.rounds is not None and not is_whole(self.rounds, 0):
            raise InvalidInputError(f"rounds is {self.rounds!r}; None, or an integer from 0 up")

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        """The next move of this round; None while a round's last trials run, and at the end.

        Args:
            history: All trials so far.
            rng: Draws the start, where neither the strategy nor the space names one.

        Raises:
            InvalidInputError: ``start`` is not of the space, or a trial lacks the metric ``cost``.
        """
        current = self._start(history)
        if current is None:
            return Evaluate(history.space.sample(rng), self.budget, notes={"start": True})
        done = 0
        while self.rounds is None or done < self.rounds:
            round_ = [current, *history.space.growth(current)]
            judged = [self._judged(history, architecture) for architecture in round_]
            trials = [trial for trial in judged if trial is not None]
            for trial in trials:
                # Not only when the round is over: that would be a whole round of training for nothing.
                self._require_cost(trial)
            if None in judged:
                return Evaluate(round_[judged.index(None)], self.budget, notes={"round": done})
            if any(trial.state == "running" for trial in trials):
                return None
            best = self._best(history, trials[0], trials[1:])
            if best is None:
                break
            current = best
            done += 1
        return self._in_full(history, current, done)

    def _start(self, history: History) -> Architecture | None:
        """Where the search started, or starts; None where it is yet to be drawn."""
        if self.start is not None:
            if not history.space.owns(self.start):
                raise InvalidInputError(f"start is an architecture of {self.start.space}, not of {history.space.name}")
            return self.start
        own: Any = getattr(history.space, "start", None)
        if callable(own):
            start: Architecture = own()
            return start
        # Drawn for an earlier trial: the history remembers it.
        return next((trial.architecture for trial in history.trials if trial.proposal.notes.get("start")), None)

    def _judged(self, history: History, architecture: Architecture) -> Trial | None:
        """The trial that judges an architecture: of the same training as all others."""
        trials = [
            trial
            for trial in history.of(architecture)
            if isinstance(trial.proposal, Evaluate) and trial.proposal.budget == self.budget
        ]
        # A failure that was evaluated again counts no more.
        return next((trial for trial in trials if trial.state == "complete"), trials[-1] if trials else None)

    def _best(self, history: History, current: Trial, moves: Sequence[Trial]) -> Architecture | None:
        """The move with the best gain per cost; None where none gains."""
        loss, cost = self._measured(history, current)
        best: tuple[tuple[float, float], Architecture] | None = None
        for trial in moves:
            new_loss, new_cost = self._measured(history, trial)
            # From a network without a result anything that has one is a gain.
            if not new_loss < loss or trial.architecture is None:
                continue
            gain = loss - new_loss
            more = new_cost - cost if self.cost is not None else 1.0
            key = (gain / more if more > 0 else inf, -new_loss)
            if best is None or key > best[0]:
                best = (key, trial.architecture)
        return None if best is None else best[1]

    def _require_cost(self, trial: Trial) -> None:
        if trial.state == "complete" and self.cost is not None and self.cost not in trial.metrics:
            raise InvalidInputError(
                f"GreedyGrowth: cost is {self.cost!r}, which trial {trial.number} does not have; "
                f"legal: None, {', '.join(sorted(trial.metrics))}"
            )

    def _measured(self, history: History, trial: Trial) -> tuple[float, float]:
        """Loss and cost of a trial; an infinite loss where it failed or breaks a limit."""
        objective = history.objectives[0]
        if trial.state != "complete" or objective.metric not in trial.metrics or history.violation(trial) > 0:
            return inf, 0.0
        self._require_cost(trial)
        return objective.loss(trial.metrics), trial.metrics[self.cost] if self.cost is not None else 0.0

    def _in_full(self, history: History, architecture: Architecture, done: int) -> Evaluate | None:
        """Train the network that growth ended with; None where that was asked for, or where it has nothing to show."""
        judged = self._judged(history, architecture)
        shown = judged is None or self._measured(history, judged)[0] < inf
        if not shown or any(trial.full for trial in history.of(architecture)):
            return None
        return Evaluate(architecture, notes={"round": done, "final": True})

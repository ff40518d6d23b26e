"""A filter before training: what a strategy proposes is scored first, and trained if the score is good enough."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from nasplat.checks import is_number
from nasplat.errors import InvalidInputError
from nasplat.nested import NOTES, book_end, check_inner
from nasplat.objectives import Objective
from nasplat.strategy import Evaluate, History, Strategy, Trial

SCORED = "scored"
"""The note of a trial at budget 0: the wrapped strategy's proposal, its budget and weights as trials of the study."""

TRAINED = "trains"
"""The note of a trial that trains: the number of the trial that scored it; None where it was not scored."""


@dataclass(frozen=True)
class Filtered:
    """Measures each proposal of a strategy at budget 0, and trains those among the best ``share`` of all so far.

    ``Filtered(RegularizedEvolution(), score=maximise("synflow"), share=0.5)`` spends training on the better half by
    score. Any metric that is known before training can be the score. The share is that of the scores known when the
    trial's own becomes known, itself among them, and an architecture that is scored twice counts once: with n scores,
    fewer than ``share * n`` of them must be better. So the first is always trained, and at the start a little more than
    the share is.

    The wrapped strategy sees one trial for each proposal: running until it is refused or trained. One that is refused
    has failed, for all that it sees, and is not proposed again by a strategy that avoids what it knows. It keeps its
    own budgets and ``weights_of``; a proposal that trains the architecture of ``weights_of`` further was let through
    before and is not scored again.

    Networks are trained from another random initialisation than the one that was scored. Trials that score count
    against ``max_trials``. It is an outermost strategy: inside another one, its trials at budget 0 would be trained.

    Attributes:
        strategy: What proposes; it must propose evaluations.
        score: What is measured first.
        share: How much is trained, of what is scored, in (0, 1].
    """

    strategy: Strategy
    score: Objective
    share: float = 0.5

    def __post_init__(self) -> None:
        check_inner("strategy", self.strategy)
        if not isinstance(self.score, Objective):
            raise InvalidInputError(f"score is {self.score!r}; maximise('...') or minimise('...') is needed")
        if not is_number(self.share) or not 0.0 < self.share <= 1.0:
            raise InvalidInputError(f"share is {self.share!r}; a share, in (0, 1]")

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        """The training of what passed; else the strategy's next proposal, at budget 0; None where it has none.

        Args:
            history: All trials so far.
            rng: The only source of randomness.

        Raises:
            InvalidInputError: The score is not known before training, or the strategy proposes an exploration.
        """
        view = self._view(history)
        for number in view.passed:
            scoring = history.trials[number]
            asked = scoring.proposal.notes[SCORED]
            assert scoring.architecture is not None
            return Evaluate(scoring.architecture, asked["budget"], asked["weights_of"], {TRAINED: number})
        inner = self.strategy.propose(view.history, rng)
        if inner is None:
            return None
        if not isinstance(inner, Evaluate):
            raise InvalidInputError(f"{self.strategy!r} proposes an exploration; a filter is for evaluations")
        if inner.budget == 0.0:
            raise InvalidInputError(
                f"{self.strategy!r} proposes to measure without training, which is what a filter does; put it outermost"
            )
        notes: dict[str, Any] = {NOTES: dict(inner.notes)} if inner.notes else {}
        source = None if inner.weights_of is None else view.trained_by[inner.weights_of]
        if inner.weights_of is not None and view.history.trials[inner.weights_of].architecture == inner.architecture:
            return Evaluate(inner.architecture, inner.budget, source, {**notes, TRAINED: None})
        asked = {"budget": inner.budget, "weights_of": source}
        return Evaluate(inner.architecture, 0.0, None, {**notes, SCORED: asked})

    def _view(self, history: History) -> _View:
        views = _VIEWS.setdefault(history, {})
        key = (self.score, self.share)
        if key not in views:
            views[key] = _View(history, self.score, self.share)
        views[key].follow(history)
        return views[key]


class _View:
    """What the wrapped strategy sees, brought up to date step by step.

    Attributes:
        history: One trial for each of its proposals.
        passed: Numbers of the trials that scored what is to be trained next, in the order in which they passed.
        trained_by: The study's trial that trains, or that scored what is not trained, by the number in ``history``.
    """

    def __init__(self, whole: History, score: Objective, share: float) -> None:
        self.history = History(whole.space, whole.objectives, whole.constraints)
        self.passed: dict[int, None] = {}
        self.trained_by: dict[int, int] = {}
        self._score = score
        self._share = share
        self._losses: list[float] = []
        self._numbers: dict[int, int] = {}
        self._begun: set[int] = set()
        self._seen = 0
        self._ended = 0

    def follow(self, whole: History) -> None:
        for trial in whole.trials[self._seen :]:
            notes = trial.proposal.notes
            if SCORED in notes or (TRAINED in notes and notes[TRAINED] is None):
                self._start(trial, notes)
            elif TRAINED in notes:
                number = self._numbers[trial.number] = self._numbers[notes[TRAINED]]
                self.trained_by[number] = trial.number
                self.passed.pop(notes[TRAINED], None)
                self._begun.add(notes[TRAINED])
        self._seen = len(whole)
        ended = len(whole) - len(whole.running)
        for trial in whole.finished(last=ended - self._ended):
            if trial.number in self._numbers:
                self._end(trial)
        self._ended = ended

    def _start(self, trial: Trial, notes: Mapping[str, Any]) -> None:
        assert isinstance(trial.proposal, Evaluate)
        number = self._numbers[trial.number] = len(self.history)
        self.trained_by[number] = trial.number
        asked = notes.get(SCORED) or {"budget": trial.proposal.budget, "weights_of": trial.proposal.weights_of}
        source = asked["weights_of"]
        inner = Evaluate(
            trial.proposal.architecture,
            asked["budget"],
            None if source is None else self._numbers[source],
            notes.get(NOTES, {}),
        )
        self.history.start(Trial(number, inner, started=trial.started))

    def _end(self, trial: Trial) -> None:
        number = self._numbers[trial.number]
        if SCORED in trial.proposal.notes and trial.state == "complete":
            reason = self._refusal(trial)
            if trial.number in self._begun:
                return
            if not reason:
                self.passed[trial.number] = None
            else:
                self.history.finish(
                    number, state="failed", metrics=trial.metrics, reason=reason, finished=trial.finished
                )
            return
        book_end(self.history, number, trial, self._numbers)

    def _refusal(self, trial: Trial) -> str:
        """Why a scored trial is not trained; "" where it is. Enters its score."""
        metric = self._score.metric
        if metric not in trial.metrics:
            raise InvalidInputError(
                f"{metric} is not known before training; known are {', '.join(trial.metrics)}. Give the study a meter "
                "that measures it"
            )
        loss = self._score.loss(trial.metrics)
        if trial.copy_of is None:
            insort(self._losses, loss)
        better = bisect_left(self._losses, loss)
        if better < self._share * len(self._losses):
            return ""
        return f"{better} of {len(self._losses)} scores are better: {metric} is {trial.metrics[metric]:g}"


_Key: TypeAlias = tuple[Objective, float]
_VIEWS: WeakKeyDictionary[History, dict[_Key, _View]] = WeakKeyDictionary()

"""A strategy inside another: the trials that concern the inner one, as a history of its own.

One-shot search lets any strategy look for paths of a trained supernet; Hyperband lets any strategy draw its newcomers;
a zero-cost score is searched before anything is trained. The inner strategy needs to know nothing of this: it sees a
history of full evaluations numbered from 0, with its own notes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from nasplat.errors import InvalidInputError
from nasplat.objectives import Constraint, Objective
from nasplat.strategy import Evaluate, History, Strategy, Trial

BY = "by"
"""The note that names the inner search a trial was proposed by."""

NOTES = "inner"
"""The note that holds the inner strategy's own notes."""

Belongs: TypeAlias = Callable[[Trial], bool]
"""Whether a trial is part of an inner search: a matter of its proposal alone, so that it never changes."""


def proposed_by(name: str) -> Belongs:
    """Trials that :func:`propose` made under this name."""
    return lambda trial: trial.proposal.notes.get(BY) == name


def check_inner(role: str, strategy: object) -> None:
    """Refuse what cannot be a strategy inside another one.

    Args:
        role: The parameter's name, for the message.
        strategy: What was given.

    Raises:
        InvalidInputError: It is no strategy, or it ends trainings early, which nobody would ask it for.
    """
    if isinstance(strategy, type) or not isinstance(strategy, Strategy):
        raise InvalidInputError(f"{role} is {strategy!r}; a strategy is needed, such as RandomSearch()")
    if hasattr(strategy, "keep"):
        raise InvalidInputError(
            f"{role} is {strategy!r}, which ends trainings early (it has keep), and is not asked inside another "
            f"strategy; put it outermost: {type(strategy).__name__}(...) around the others"
        )


def nested(
    history: History,
    name: str,
    *,
    objectives: Sequence[Objective] | None = None,
    constraints: Sequence[Constraint] | None = None,
    belongs: Belongs | None = None,
) -> History:
    """The history of an inner search.

    Each trial is shown as a full evaluation from scratch, since that is what it is for the inner search, whatever its
    budget or the weights that it goes on from. Trials keep their order, of starting and of ending. Their notes are
    those of the inner strategy, where it is the one that proposed them. Reports of running trials are not shown.

    Args:
        history: Of the whole study.
        name: Of the inner search. One history must not know two inner searches by one name.
        objectives: What the inner search looks for; None takes the study's.
        constraints: Its limits; None takes the study's. A limit on what its trials are never measured on would make
            all of them infeasible.
        belongs: Which trials; None takes those that :func:`propose` made under this name.

    Returns:
        Not to be changed. It is the same object for every call, as long as objectives and constraints are, and follows
        the outer history.
    """
    parts = _PARTS.setdefault(history, {})
    wanted = tuple(objectives or history.objectives)
    part = parts.get(name)
    limits = history.constraints if constraints is None else tuple(constraints)
    if part is None or (part.history.objectives, part.history.constraints) != (wanted, limits):
        part = parts[name] = _Part(name, History(history.space, wanted, limits))
    part.follow(history, belongs or proposed_by(name))
    return part.history


def propose(
    strategy: Strategy,
    history: History,
    rng: np.random.Generator,
    name: str,
    *,
    objectives: Sequence[Objective] | None = None,
    constraints: Sequence[Constraint] | None = None,
    belongs: Belongs | None = None,
    budget: float = 1.0,
    weights_of: int | None = None,
    notes: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Evaluate | None:
    """What the inner strategy proposes, as a proposal of the outer one.

    Args:
        strategy: The inner one.
        history: Of the whole study.
        rng: The only source of randomness.
        name: Of the inner search.
        objectives: As in :func:`nested`.
        constraints: As in :func:`nested`.
        belongs: As in :func:`nested`.
        budget: Of the proposal.
        weights_of: Of the proposal.
        notes: The outer strategy's own marks on the proposal, under names other than ``by`` and ``inner``.
        changes: Further fields of the proposal.

    Raises:
        InvalidInputError: The inner strategy proposes something other than an evaluation in full and from scratch.
    """
    inner = strategy.propose(
        nested(history, name, objectives=objectives, constraints=constraints, belongs=belongs), rng
    )
    if inner is None:
        return None
    if not isinstance(inner, Evaluate):
        raise InvalidInputError(f"{strategy!r} proposes an exploration; inside another strategy it must evaluate")
    if inner.budget != 1.0 or inner.weights_of is not None:
        raise InvalidInputError(
            f"{strategy!r} proposes a share of the training, or to go on from a trial; inside another strategy, which "
            "decides on that, it must propose trainings in full. Put it outermost"
        )
    marks: dict[str, Any] = {**(notes or {}), BY: name}
    if inner.notes:
        marks[NOTES] = dict(inner.notes)
    return Evaluate(inner.architecture, budget, weights_of, marks, **changes)


def book_end(part: History, number: int, trial: Trial, numbers: Mapping[int, int]) -> None:
    """Book the end of a study's trial in the history that an inner strategy sees.

    Args:
        part: That history.
        number: The trial's number there.
        trial: As the study has it.
        numbers: Numbers there by those of the study.
    """
    part.finish(
        number,
        state=trial.state,
        metrics=trial.metrics,
        reports=trial.reports,
        reason=trial.reason,
        traceback=trial.traceback,
        copy_of=None if trial.copy_of is None else numbers.get(trial.copy_of),
        facts=trial.facts,
        finished=trial.finished,
    )


class _Part:
    """A part of a history, brought up to date step by step."""

    def __init__(self, name: str, history: History) -> None:
        self.name = name
        self.history = history
        self._seen = 0
        self._ended = 0
        self._numbers: dict[int, int] = {}

    def follow(self, whole: History, belongs: Belongs) -> None:
        for trial in whole.trials[self._seen :]:
            if belongs(trial) and trial.architecture is not None:
                number = self._numbers[trial.number] = len(self.history)
                # Notes of another inner search count the trials otherwise.
                own = trial.proposal.notes.get(BY) == self.name
                notes = trial.proposal.notes.get(NOTES, {}) if own else {}
                self.history.start(Trial(number, Evaluate(trial.architecture, notes=notes), started=trial.started))
        self._seen = len(whole)
        ended = len(whole) - len(whole.running)
        for trial in whole.finished(last=ended - self._ended):
            number = self._numbers.get(trial.number, -1)
            if number >= 0:
                book_end(self.history, number, trial, self._numbers)
        self._ended = ended


_PARTS: WeakKeyDictionary[History, dict[str, _Part]] = WeakKeyDictionary()

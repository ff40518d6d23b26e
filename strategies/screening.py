"""Search what is cheap first: a score that needs no training decides what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nasplat.architecture import Architecture
from nasplat.checks import is_whole
from nasplat.errors import InvalidInputError
from nasplat.nested import BY, check_inner, nested, propose, proposed_by
from nasplat.objectives import Constraint, Objective
from nasplat.strategy import Evaluate, History, Strategy, Trial

SCORED = "score"
"""The search of the score."""

TRAINED = "train"
"""The best of it, which are trained."""

THEN = "then"
"""The search that goes on from those."""


@dataclass(frozen=True)
class Screening:
    """Searches a score at budget 0, trains the best in full, then lets another strategy go on from those.

    ``Screening(score=maximise("naswot"), search=RegularizedEvolution(), n_search=1000, n_train=10)`` is the warm start
    by a zero-cost proxy of Abdelfattah et al. 2021 (arXiv:2101.08134). Any metric that is known before training can be
    the score: a zero-cost score, ``ops``, ``latency_ms``; or several, of which the best are the non-dominated.

    Limits of the study on such metrics hold while the score is searched; limits on others do when it comes to training.
    What is trained begins when all scores are known. If ``search`` has nothing more to propose, that is earlier. The
    trials of all parts count against ``max_trials``: ``n_search + n_train`` and those of ``then``.

    Networks are trained from another random initialisation than the one that was scored. It is an outermost strategy:
    inside another one its trials would be trained.

    Attributes:
        score: What to search for, one objective or several; kept as a tuple.
        search: Searches it, by evaluations. It sees the scored trials alone, with ``score`` as objective.
        n_search: Architectures to score, those that fail or are scored twice included. Those that a cheap limit
            refuses do not count, up to ``10 * n_search + 100`` in all.
        n_train: How many of the best are trained in full; of those with equal scores, the earlier.
        then: What goes on, by evaluations in full, with the study's objectives. It sees the trials that were trained
            as if it had begun with them: a population is filled with them. None ends there.
    """

    score: Objective | Sequence[Objective]
    search: Strategy
    n_search: int = 200
    n_train: int = 10
    then: Strategy | None = None

    def __post_init__(self) -> None:
        given = (self.score,) if isinstance(self.score, Objective) else self.score
        if not isinstance(given, list | tuple) or not given or not all(isinstance(s, Objective) for s in given):
            raise InvalidInputError(
                f"score is {self.score!r}; maximise('...') or minimise('...'), or a list of them, is needed"
            )
        object.__setattr__(self, "score", tuple(given))
        for name, value in (("search", self.search), ("then", self.then)):
            if name == "then" and value is None:
                continue
            check_inner(name, value)
        for name, count in (("n_search", self.n_search), ("n_train", self.n_train)):
            if not is_whole(count):
                raise InvalidInputError(f"{name} is {count!r}; a whole number from 1 up")

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        """The next one to score, to train, or of the strategy that goes on; None while a part waits, and at the end.

        Args:
            history: All trials so far.
            rng: The only source of randomness.

        Raises:
            InvalidInputError: A score is not known before training.
        """
        scores = self._objectives
        limits = _known_limits(history)
        scored = nested(history, SCORED, objectives=scores, constraints=limits)
        trained = nested(history, THEN, belongs=_was_trained)
        if not len(trained):
            worked = sum(trial.state != "infeasible" for trial in scored.trials)
            if worked < self.n_search and len(scored) < 10 * self.n_search + 100:
                proposal = propose(self.search, history, rng, SCORED, objectives=scores, constraints=limits, budget=0.0)
                if proposal is not None:
                    return proposal
            if scored.running:
                return None
        if len(trained) < self.n_train:
            for architecture in self._best(scored):
                if not trained.of(architecture):
                    return Evaluate(architecture, notes={BY: TRAINED})
        if self.then is None:
            return None
        return propose(self.then, history, rng, THEN, belongs=_was_trained)

    @property
    def _objectives(self) -> tuple[Objective, ...]:
        assert isinstance(self.score, tuple)
        return self.score

    def _best(self, scored: History) -> list[Architecture]:
        """The architectures to train, best first."""
        trials = [t for t in scored.scored() if t.copy_of is None and scored.violation(t) == 0.0]
        if not trials and any(t.state == "complete" for t in scored.finished()):
            _refuse(scored, self._objectives)
        # A single score needs no crowding within ranks.
        standing = scored.standing(trials) if len(self._objectives) > 1 else [scored.losses(t) for t in trials]
        order = sorted(range(len(trials)), key=lambda index: (standing[index], trials[index].number))
        found = (trials[index].architecture for index in order)
        return [architecture for architecture in found if architecture is not None][: self.n_train]


def _was_trained(trial: Trial) -> bool:
    return trial.proposal.notes.get(BY) in (TRAINED, THEN)


def _known_limits(history: History) -> list[Constraint]:
    """The study's limits on what is known before training, as far as trials have shown."""
    scored = proposed_by(SCORED)
    known: set[str] = set()
    for trial in history.finished():
        if scored(trial):
            known.update(trial.metrics)
            if trial.state == "complete":
                break
    return [limit for limit in history.constraints if limit.metric in known]


def _refuse(scored: History, scores: Sequence[Objective]) -> None:
    first = next(trial for trial in scored.finished() if trial.state == "complete")
    missing = [score.metric for score in scores if score.metric not in first.metrics]
    if missing:
        raise InvalidInputError(
            f"{', '.join(missing)} is not known before training; known are {', '.join(first.metrics)}. Give the study "
            "a meter that measures it"
        )

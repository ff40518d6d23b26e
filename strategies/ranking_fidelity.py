"""A study of a supernet's ranking: the same networks with inherited weights and trained by themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nasplat.checks import is_whole
from nasplat.errors import InvalidInputError
from nasplat.strategy import Evaluate, Explore, Explorer, History, Proposal, Trial
from nasplat.weight_sharing.fidelity import INHERITED, NETWORK, OWN, RECALIBRATED, WEIGHTS


@dataclass(frozen=True)
class RankingFidelity:
    """Trains a supernet, then evaluates random networks with its weights, and each of them trained from scratch.

    ``nasplat.weight_sharing.fidelity.ranking_fidelity(result)`` reads the answer. The study needs ``max_trials`` of
    ``1 + 3 * networks`` (``1 + 2 * networks`` without recalibration).

    Attributes:
        explorer: Trains the supernet, with every option alive at the end: ``UniformPaths(epochs=120)``.
        networks: Networks to compare, at least 3. Those that a cheap limit refuses are replaced by others.
        recalibrate: Training batches from which batch-norm statistics are estimated anew in a second evaluation with
            inherited weights; 0 leaves it out.
    """

    explorer: Explorer
    networks: int = 30
    recalibrate: int = 20

    def __post_init__(self) -> None:
        if isinstance(self.explorer, type) or not isinstance(self.explorer, Explorer):
            raise InvalidInputError(
                f"explorer is {self.explorer!r}; an object with explore(space, task, rng, context), "
                "such as UniformPaths(epochs=120)"
            )
        for name, least in (("networks", 3), ("recalibrate", 0)):
            if not is_whole(getattr(self, name), least):
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; an integer from {least} up is needed")

    def propose(self, history: History, rng: np.random.Generator) -> Proposal | None:
        """The exploration; then networks with inherited weights; then each recalibrated, and in full.

        Args:
            history: All trials so far.
            rng: Draws the networks.
        """
        exploration = next((trial for trial in history.trials if isinstance(trial.proposal, Explore)), None)
        if exploration is None:
            return Explore(self.explorer)
        if exploration.state in ("running", "failed"):
            return None
        source = exploration.number
        done: dict[tuple[int, str], Trial] = {}
        for trial in history.trials:
            notes = trial.proposal.notes
            if NETWORK in notes:
                done[notes[NETWORK], notes[WEIGHTS]] = trial
        drawn = [trial for (_, weights), trial in done.items() if weights == INHERITED]
        kept = [trial for trial in drawn if trial.state != "infeasible"]
        if len(kept) < self.networks and len(drawn) < 10 * self.networks + 100:
            architecture = history.draw_new(rng)
            if architecture is not None:
                return Evaluate(architecture, 0.0, source, {NETWORK: len(drawn), WEIGHTS: INHERITED})
        for trial in kept:
            if trial.state != "complete" or trial.architecture is None:
                continue
            number = trial.proposal.notes[NETWORK]
            if self.recalibrate and (number, RECALIBRATED) not in done:
                notes = {NETWORK: number, WEIGHTS: RECALIBRATED}
                return Evaluate(trial.architecture, 0.0, source, notes, recalibrate=self.recalibrate)
            if (number, OWN) not in done:
                return Evaluate(trial.architecture, notes={NETWORK: number, WEIGHTS: OWN})
        return None

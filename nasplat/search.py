"""The loop's bookkeeping: hands out trials and books their results. The only writer of the history; does no I/O.

Every change is first an event (a JSON object), handed to ``record`` and then applied to the history, so that a journal
of the events, applied again in order, gives the same history.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from nasplat.architecture import Architecture
from nasplat.checks import is_whole
from nasplat.errors import InvalidInputError, JournalError
from nasplat.strategy import (
    FINAL,
    Evaluate,
    Explore,
    History,
    Proposal,
    Report,
    State,
    Strategy,
    Trial,
    proposal_to_json,
)

Event: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Assignment:
    """What a worker is asked to do.

    Attributes:
        number: The trial's number.
        proposal: What to do.
        seed: Seed of everything random in it, in [0, 2**32).
        source: Architecture of the trial whose weights it goes on from; None for a supernet's, or for none.
    """

    number: int
    proposal: Proposal
    seed: int
    source: Architecture | None = None


@dataclass(frozen=True)
class Outcome:
    """How a trial ended, as the worker saw it. Fields as in :class:`~nasplat.strategy.Trial`."""

    state: State
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    traceback: str = ""
    found: tuple[Architecture, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """When a search is over, besides when its strategy has nothing more to propose.

    Attributes:
        max_trials: Trials that were worked on, over all runs of the study. Candidates refused for a cheap cost, and
            copies of what had been evaluated, do not count.
        max_proposals: All trials, whatever became of them. None is ``10 * max_trials + 100``.
        max_hours: Hours of searching, over all runs of the study.
    """

    max_trials: int
    max_proposals: int | None = None
    max_hours: float | None = None

    def __post_init__(self) -> None:
        check_whole("max_trials", self.max_trials, least=0)
        if self.max_proposals is not None:
            check_whole("max_proposals", self.max_proposals, least=0)
        if self.max_hours is not None and not (isinstance(self.max_hours, int | float) and self.max_hours > 0):
            raise InvalidInputError(f"max_hours is {self.max_hours!r}; it must be positive, or None for no limit")

    @property
    def proposals(self) -> int:
        """The limit on proposals."""
        return 10 * self.max_trials + 100 if self.max_proposals is None else self.max_proposals


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse what is not a whole number from ``least`` on.

    Raises:
        InvalidInputError: The message says what was given and what is legal.
    """
    if not is_whole(value, least):
        raise InvalidInputError(f"{name} is {value!r}; a whole number from {least} on is needed")


class Search:
    """A search under way.

    Attributes:
        history: All trials.
        over: Why no trial will be handed out any more, "" while the search goes on.
    """

    def __init__(
        self,
        strategy: Strategy,
        history: History,
        seed: int,
        *,
        retrain_duplicates: bool = False,
        record: Callable[[Event], None] = lambda event: None,
        booked: Callable[[Event], None] = lambda event: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with an empty history; :meth:`replay` brings it to where a journal ends.

        Args:
            strategy: What proposes.
            history: Fresh; this object writes it from now on.
            seed: The study's seed.
            retrain_duplicates: Evaluate an architecture again that has been, instead of copying its result.
            record: Takes each event before it is applied (a journal).
            booked: Takes each event after it was applied (a tracker, a display).
            clock: Seconds; only differences are used.
        """
        self.strategy = strategy
        self.history = history
        self.seed = seed
        self.over = ""
        self._retrain = retrain_duplicates
        self._record = record
        self._booked = booked
        self._clock = clock
        self._limits = Limits(max_trials=0)
        self._queue: deque[Architecture] = deque()
        self._again: deque[int] = deque()
        self._worked = 0
        self._before = 0.0
        self._begun: float | None = None
        self._keep = getattr(strategy, "keep", None)

    # Time.

    @property
    def elapsed(self) -> float:
        """Seconds of searching so far, over all runs of the study."""
        return self._before + (0.0 if self._begun is None else self._clock() - self._begun)

    # Replay.

    def replay(self, events: Iterable[Event], *, to_go_on: bool = True) -> None:
        """Apply a journal's events to the fresh history.

        Trials that were running when the journal ends are handed out again first, with their number and seed.

        Args:
            events: In order; those without a time are none of the history's.
            to_go_on: Whether the search goes on from there; False only reads.

        Raises:
            JournalError: An event does not follow from those before it, or a proposal of the strategy that must be
                made again comes out otherwise (the strategy changed, or is not a pure function of the history).
        """
        trials = [event for event in events if "at" in event]
        ended = {event.get("trial") for event in trials if event["event"] == "finish"}
        for event in trials:
            made: Proposal | None = None
            try:
                if event["event"] == "start" and event["proposal"]["kind"] == "explore":
                    made = self._explore_again(event, to_go_on and event["trial"] not in ended)
                self._apply(event, made)
                self._before = max(self._before, event["at"])
            except (LookupError, TypeError, AttributeError, InvalidInputError) as error:
                what = f"{event['event']} of trial {event.get('trial')}" if "trial" in event else f"{event['event']}"
                raise JournalError(
                    f"the journal's {what}, at {event['at']} s, does not follow from the events before it: {error!r}"
                ) from error
        self._again.extend(trial.number for trial in self.history.running)

    def _explore_again(self, event: Event, unfinished: bool) -> Proposal | None:
        """The explorer of a journal's event: proposed again where it must run on, a mere note of it otherwise."""
        if not unfinished:
            return None
        proposal = self.strategy.propose(self.history, self._rng(event["trial"]))
        if proposal is None or proposal_to_json(proposal) != event["proposal"]:
            raise JournalError(
                f"trial {event['trial']} was proposed as {event['proposal']}, and {self.strategy!r} now proposes "
                f"{proposal!r}: a strategy must be a pure function of (history, rng)"
            )
        return proposal

    # Handing out.

    def begin(self, limits: Limits) -> None:
        """Start the clock of one run of the study."""
        self._limits = limits
        self._begun = self._clock()
        self.over = ""

    def end(self) -> None:
        """Stop the clock."""
        self._before, self._begun = self.elapsed, None

    def enqueue(self, architecture: Architecture) -> None:
        """Have this architecture evaluated before the strategy is asked again."""
        self._check(Evaluate(architecture))
        self._emit({"event": "enqueue", "genes": dict(architecture.genes), "at": self.elapsed})

    @property
    def worked(self) -> int:
        """Trials that count against ``max_trials``: all but the refused and the copied."""
        return self._worked

    def next(self, *, ask: bool = True) -> Assignment | None:
        """The next trial to work on; None for "nothing now" (see :attr:`over` for whether there will be more).

        Args:
            ask: Whether the strategy is asked once nothing unfinished or enqueued is left.
        """
        self.over = ""
        if self._again:
            number = self._again.popleft()
            proposal = self.history.trials[number].proposal
            twin = self._twin(proposal, before=number)
            if twin is None or twin.state == "running":
                return self._assignment(number, proposal)
            # Killed between the two events of a copy.
            self._copy(number, twin)
            return self.next(ask=ask)
        while True:
            reason = self._limit_reached()
            if reason:
                self.over = reason
                return None
            number = len(self.history)
            asked: Proposal | None = None
            if self._queue:
                asked = Evaluate(self._queue[0], notes={"enqueued": True})
            elif ask:
                asked = self.strategy.propose(self.history, self._rng(number))
            if asked is None:
                if ask and not self.history.running:
                    self.over = "the strategy has nothing more to propose"
                return None
            self._check(asked)
            twin = self._twin(asked, before=number)
            if twin is not None and twin.state == "running":
                return None
            record = json.loads(json.dumps(proposal_to_json(asked), allow_nan=False))
            asked = replace(asked, notes=record.get("notes", {}))
            self._emit({"event": "start", "trial": number, "proposal": record, "at": self.elapsed}, asked)
            if twin is None:
                return self._assignment(number, asked)
            self._copy(number, twin)

    def has_work(self) -> bool:
        """Whether a trial waits to be finished, or no limit keeps the strategy from being asked."""
        return bool(self._again) or not self._limit_reached()

    def _limit_reached(self) -> str:
        limits = self._limits
        if self.worked >= limits.max_trials:
            return f"{self.worked} of {limits.max_trials} trials are done"
        if len(self.history) >= limits.proposals:
            return f"max_proposals: {len(self.history)} candidates were proposed, {self.worked} of them worked on"
        if limits.max_hours is not None and self.elapsed >= limits.max_hours * 3600:
            return f"max_hours: {self.elapsed / 3600:.2f} of {limits.max_hours:g} hours are used"
        return ""

    def _twin(self, proposal: Proposal, before: int) -> Trial | None:
        """An earlier trial whose result this would repeat: one that gave a result or, failing that, one under way."""
        if self._retrain or not isinstance(proposal, Evaluate) or proposal.weights_of is not None:
            return None
        twins = [
            trial
            for trial in self.history.of(proposal.architecture)
            if trial.number < before
            and isinstance(trial.proposal, Evaluate)
            and trial.proposal.weights_of is None
            and trial.proposal.budget == proposal.budget
            and trial.proposal.recalibrate == proposal.recalibrate
            and (trial.state in ("complete", "running") or (trial.state == "infeasible" and self._refused(trial)))
            and trial.copy_of is None
        ]
        return min(twins, key=lambda trial: trial.state == "running", default=None)

    def _refused(self, trial: Trial) -> bool:
        """Whether what is known of a trial breaks a limit that holds now: a resumed study may have relaxed it."""
        return any(
            limit.metric in trial.metrics and limit.violation(trial.metrics) > 0 for limit in self.history.constraints
        )

    def _copy(self, number: int, twin: Trial) -> None:
        self._finish(number, Outcome(twin.state, twin.metrics, twin.reason), copy_of=twin.number)

    def _check(self, proposal: Proposal) -> None:
        if isinstance(proposal, Explore):
            return
        if not isinstance(proposal, Evaluate):
            raise InvalidInputError(f"{proposal!r} was proposed; an Evaluate, an Explore or None is needed")
        space = self.history.space
        if not space.owns(proposal.architecture):
            raise InvalidInputError(
                f"an architecture of {proposal.architecture.space} was proposed; this study searches {space.identity}"
            )
        space.architecture(proposal.architecture.genes)
        source = proposal.weights_of
        if source is not None and not (0 <= source < len(self.history)):
            raise InvalidInputError(f"weights_of is {source}; there are trials 0 to {len(self.history) - 1}")

    def _assignment(self, number: int, proposal: Proposal) -> Assignment:
        seed = int(np.random.SeedSequence([self.seed, number, 1]).generate_state(1)[0])
        source = None
        if isinstance(proposal, Evaluate) and proposal.weights_of is not None:
            source = self.history.trials[proposal.weights_of].architecture
        return Assignment(number, proposal, seed, source)

    def _rng(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, number])

    # Booking.

    def report(self, number: int, report: Report) -> bool:
        """Book one epoch. False: the strategy ends the trial here; finish it as ``stopped``."""
        # Before it is recorded: an event that cannot be applied would make the journal unreadable.
        self.history.check_step(number, report.step)
        self._emit(
            {
                "event": "report",
                "trial": number,
                "step": report.step,
                "metrics": dict(report.metrics),
                "at": self.elapsed,
            }
        )
        if self._keep is None:
            return True
        return bool(self._keep(self.history.trials[number], self.history))

    def finish(self, number: int, outcome: Outcome) -> Trial:
        """Book a trial's end."""
        return self._finish(number, outcome, copy_of=None)

    def _finish(self, number: int, outcome: Outcome, copy_of: int | None) -> Trial:
        # Before it is recorded: an event that cannot be applied would make the journal unreadable.
        if self.history.trials[number].state != "running" or outcome.state not in FINAL:
            raise InvalidInputError(
                f"trial {number}, {self.history.trials[number].state}, cannot end as {outcome.state!r}; "
                f"a running trial can, as {', '.join(FINAL)}"
            )
        for architecture in outcome.found:
            self._check(Evaluate(architecture))
        event: Event = {
            "event": "finish",
            "trial": number,
            "state": outcome.state,
            "metrics": dict(outcome.metrics),
            "at": self.elapsed,
        }
        if outcome.reason:
            event["reason"] = outcome.reason
        if outcome.traceback:
            event["traceback"] = outcome.traceback
        if outcome.found:
            event["found"] = [dict(architecture.genes) for architecture in outcome.found]
        if outcome.facts:
            event["facts"] = dict(outcome.facts)
        if copy_of is not None:
            event["copy_of"] = copy_of
        self._emit(event)
        return self.history.trials[number]

    def _emit(self, event: Event, proposal: Proposal | None = None) -> None:
        # Through JSON, so that the history now is the one that a resume will read (lists, not tuples).
        event = json.loads(json.dumps(event, allow_nan=False))
        self._record(event)
        self._apply(event, proposal)
        self._booked(event)

    def _apply(self, event: Event, proposal: Proposal | None = None) -> None:
        """The one place where the history changes."""
        history = self.history
        kind = event["event"]
        if kind == "enqueue":
            self._queue.append(history.space.architecture(event["genes"]))
        elif kind == "start":
            if proposal is None:
                proposal = self._from_json(event["proposal"])
            if isinstance(proposal, Evaluate) and self._queue and proposal.notes.get("enqueued"):
                self._queue.popleft()
            history.start(Trial(event["trial"], proposal, started=event["at"]))
            self._worked += 1
        elif kind == "report":
            history.report(event["trial"], Report(event["step"], event["metrics"]))
        elif kind == "finish":
            trial = history.finish(
                event["trial"],
                state=event["state"],
                metrics=event["metrics"],
                reason=event.get("reason", ""),
                traceback=event.get("traceback", ""),
                found=tuple(history.space.architecture(genes) for genes in event.get("found", ())),
                copy_of=event.get("copy_of"),
                facts=event.get("facts", {}),
                finished=event["at"],
            )
            if trial.state == "infeasible" or trial.copy_of is not None:
                self._worked -= 1
        else:
            raise JournalError(f"unknown event {kind!r}")

    def _from_json(self, record: Mapping[str, Any]) -> Proposal:
        notes = record.get("notes", {})
        if record["kind"] == "explore":
            return Explore(PastExplorer(record["explorer"]), notes)
        architecture = self.history.space.architecture(record["genes"])
        return Evaluate(
            architecture,
            record["budget"],
            record.get("weights_of"),
            notes,
            recalibrate=record.get("recalibrate", 0),
        )


@dataclass(frozen=True)
class PastExplorer:
    """Stands for the explorer of a trial that ended in an earlier run: its description, which cannot explore again."""

    description: Any

    def describe(self) -> Any:
        """The explorer's description."""
        return self.description

    def explore(self, *_: Any) -> Any:
        """Never called: only unfinished trials run again, and those are proposed again by the strategy."""
        raise AssertionError("a finished exploration is not run again")

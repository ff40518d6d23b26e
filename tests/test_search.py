from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from helpers import Drawn, InOrder, Ladder, Mlp
from hypothesis import given, settings
from hypothesis import strategies as st

from nasplat import Architecture, Evaluate, Explore, History, Report, at_most, maximise
from nasplat.errors import ArchitectureError, InvalidInputError, JournalError
from nasplat.search import Limits, Outcome, Search
from nasplat.strategy import proposal_to_json

SPACE = Ladder()


@dataclass
class Run:
    """A search with a journal in memory and a clock that goes on by one each time it is read."""

    strategy: Any
    space: Any = SPACE
    constraints: tuple = ()
    seed: int = 0
    options: dict = field(default_factory=dict)
    events: list = field(default_factory=list)
    time: float = 0.0

    def __post_init__(self):
        self.history = History(self.space, [maximise("acc")], self.constraints)
        self.search = Search(
            self.strategy, self.history, self.seed, record=self._record, clock=self._clock, **self.options
        )
        self.search.replay(json.loads(json.dumps(self.events)))

    def _record(self, event):
        self.events.append(json.loads(json.dumps(event, allow_nan=False)))

    def _clock(self):
        self.time += 1.0
        return self.time

    def again(self, **changes):
        """The same search in a later process: from the journal alone."""
        given = dict(strategy=self.strategy, space=self.space, constraints=self.constraints, seed=self.seed)
        return Run(**{**given, "options": self.options, "events": list(self.events), **changes})

    def begin(self, *args, **kwargs):
        self.search.begin(Limits(*args, **kwargs))
        return self

    def all(self, outcome=lambda a: Outcome("complete", {"acc": score(a)})):
        """Work one by one until nothing more is handed out; the numbers handed out."""
        numbers = []
        while (assignment := self.search.next()) is not None:
            numbers.append(assignment.number)
            self.search.finish(assignment.number, outcome(assignment))
        return numbers


def score(assignment):
    return assignment.proposal.architecture.genes["x"] / 100


def snapshot(history: History) -> list[tuple]:
    """Everything of a history, as plain values."""
    return [
        (t.number, proposal_to_json(t.proposal), t.state, dict(t.metrics), [dict(r) for r in t.reports], t.reason,
         t.traceback, t.found, t.copy_of, dict(t.facts), t.started, t.finished)
        for t in history.trials
    ] + [
        ([t.number for t in history.running], [t.number for t in history.finished()],
         [t.number for t in history.scored()], history.distinct)
    ]  # fmt: skip


# Limits.


def test_it_ends_at_max_trials_and_goes_on_with_a_larger_one():
    run = Run(InOrder()).begin(3)
    assert run.all() == [0, 1, 2]
    assert run.search.over == "3 of 3 trials are done"
    assert run.again().begin(3).all() == []
    assert run.again().begin(5).all() == [3, 4]


def test_no_trials_at_all():
    run = Run(InOrder()).begin(0)
    assert run.all() == []
    assert run.search.over


def test_infeasible_trials_and_copies_do_not_count_but_failed_and_stopped_do():
    states = ["infeasible", "failed", "stopped", "infeasible", "complete"]
    run = Run(InOrder((0, 1, 2, 3, 4, 4, 5))).begin(5)

    def outcome(assignment):
        return Outcome([*states, "complete", "complete"][assignment.number], {"acc": 0.0})  # type: ignore[arg-type]

    assert run.all(outcome) == [0, 1, 2, 3, 4, 6]
    assert run.search.worked == 4
    assert [t.copy_of for t in run.history.trials] == [None] * 5 + [4, None]
    assert run.again().search.worked == 4
    assert run.search.over == "the strategy has nothing more to propose"


def test_max_proposals_ends_a_strategy_that_only_repeats_itself():
    run = Run(InOrder((7,) * 100)).begin(5, max_proposals=12)
    assert run.all() == [0]
    assert len(run.history) == 12
    assert run.search.over.startswith("max_proposals: 12 candidates were proposed, 1 of them")
    assert Limits(4).proposals == 140


def test_max_hours_is_cumulative_over_runs():
    run = Run(InOrder()).begin(1000, max_hours=20 / 3600)
    first = run.all()
    run.search.end()
    assert 1 < len(first) < 20
    assert run.search.over.startswith("max_hours")
    assert run.again().begin(1000, max_hours=20 / 3600).all() == []
    again = run.again().begin(1000, max_hours=40 / 3600)
    more = again.all()
    again.search.end()
    assert abs(len(more) - len(first)) <= 1
    assert 40 <= again.search.elapsed < 50


def test_time_outside_of_runs_does_not_count():
    run = Run(InOrder()).begin(1)
    run.all()
    run.search.end()
    before = run.search.elapsed
    run.time += 1000
    assert run.search.elapsed == before


WRONG = [{"max_trials": -1}, {"max_trials": 1, "max_hours": 0.0}, {"max_trials": 1, "max_proposals": -1}]


@pytest.mark.parametrize("wrong", WRONG)
def test_limits_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InvalidInputError):
        Limits(**wrong)


# Twins.


def test_a_duplicate_is_copied_with_metrics_and_reason_but_not_twice_through():
    run = Run(InOrder((3, 3, 3))).begin(2)
    assert run.all() == [0]
    first, second, third = run.history.trials
    assert (second.copy_of, third.copy_of) == (0, 0)
    assert second.metrics == first.metrics and second.state == "complete"
    assert run.history.front() == [first]
    assert [t.number for t in run.history.scored()] == [0, 1, 2]


def test_duplicates_are_trained_again_where_asked_and_after_a_failure():
    run = Run(InOrder((3, 3)), options={"retrain_duplicates": True}).begin(9)
    assert run.all() == [0, 1]
    run = Run(InOrder((3, 3))).begin(9)
    assert run.all(lambda a: Outcome("failed", reason="no")) == [0, 1]


@dataclass(frozen=True)
class Budgets:
    def propose(self, history, rng):
        asked = [{"budget": 0.5}, {"budget": 1.0}, {"budget": 1.0, "weights_of": 0}, {"budget": 0.5}, {"weights_of": 0}]
        number = len(history)
        return Evaluate(history.space.architecture({"x": 5}), **asked[number]) if number < len(asked) else None


def test_another_budget_and_other_weights_are_no_duplicate():
    run = Run(Budgets()).begin(9)
    assert run.all() == [0, 1, 2, 4]
    assert [t.copy_of for t in run.history.trials] == [None, None, None, 0, None]
    assert [t.full for t in run.history.trials] == [False, True, True, False, True]


def test_the_source_of_weights_is_named_in_the_assignment():
    search = Run(Budgets()).begin(9).search
    given = []
    while (assignment := search.next()) is not None:
        given.append(assignment)
        search.finish(assignment.number, Outcome("complete", {"acc": 1.0}))
    five = SPACE.architecture({"x": 5})
    assert [a.source for a in given] == [None, None, five, five]


def test_a_twin_that_runs_is_waited_for():
    search = Run(InOrder((1, 1, 2))).begin(9).search
    assert search.next().number == 0
    assert search.next() is None and search.next() is None
    assert search.over == ""
    search.finish(0, Outcome("complete", {"acc": 1.0}))
    assert search.next().number == 2
    assert search.history.trials[1].copy_of == 0


def test_a_twin_that_ran_and_failed_is_tried_again():
    search = Run(InOrder((1, 1))).begin(9).search
    search.next()
    search.finish(0, Outcome("failed"))
    assert search.next().number == 1


def test_a_candidate_refused_by_a_limit_is_worked_on_once_the_limit_is_relaxed():
    def outcome(assignment):
        return Outcome("infeasible", {"size": 10.0}, "size is 10")

    run = Run(InOrder((1, 1)), constraints=(at_most("size", 5.0),)).begin(9)
    assert run.all(outcome) == [0]
    again = run.again(constraints=(at_most("size", 20.0),), strategy=InOrder((1, 1, 1))).begin(9)
    assert again.all() == [2]


# The queue.


def test_enqueued_ones_come_first_in_order_and_survive_a_resume():
    run = Run(InOrder()).begin(9)
    for x in (50, 60, 50):
        run.search.enqueue(SPACE.architecture({"x": x}))
    assert run.search.next().proposal == Evaluate(SPACE.architecture({"x": 50}), notes={"enqueued": True})
    again = run.again().begin(5)
    assert again.search.next().number == 0
    again.search.finish(0, Outcome("complete", {"acc": 0.5}))
    assert again.all() == [1, 3, 4, 5]
    assert [t.architecture.genes["x"] for t in again.history.trials] == [50, 60, 50, 3, 4, 5]
    assert again.history.trials[2].copy_of == 0


def test_without_asking_only_what_is_unfinished_or_enqueued_is_handed_out():
    run = Run(InOrder()).begin(9)
    run.search.next()
    again = run.again().begin(9)
    again.search.enqueue(SPACE.architecture({"x": 70}))
    assert again.search.next(ask=False).number == 0
    again.search.finish(0, Outcome("complete", {"acc": 0.5}))
    assert again.search.next(ask=False).number == 1
    again.search.finish(1, Outcome("complete", {"acc": 0.5}))
    assert again.search.next(ask=False) is None
    assert len(again.history) == 2


def test_what_is_enqueued_must_be_of_the_space():
    run = Run(InOrder())
    for wrong in (Ladder(3).architecture({"x": 1}), Architecture(SPACE.identity, {"x": 100})):
        with pytest.raises(InvalidInputError):
            run.search.enqueue(wrong)
    assert run.events == []


# Wrong strategies.


@dataclass(frozen=True)
class Says:
    answer: Any

    def propose(self, history, rng):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (Evaluate(Ladder(3).architecture({"x": 1})), InvalidInputError, "this study searches"),
        (Evaluate(Architecture(SPACE.identity, {"x": 100})), ArchitectureError, "x is 100; legal"),
        (Evaluate(Architecture(SPACE.identity, {"x": np.int64(1)})), ArchitectureError, "x is"),
        (Evaluate(SPACE.architecture({"x": 1}), weights_of=0), InvalidInputError, "weights_of is 0"),
        (SPACE.architecture({"x": 1}), InvalidInputError, "an Evaluate, an Explore or None"),
        ({"x": 1}, InvalidInputError, "an Evaluate, an Explore or None"),
        (Evaluate(SPACE.architecture({"x": 1}), notes={"loss": float("nan")}), ValueError, "JSON"),
        (Evaluate(SPACE.architecture({"x": 1}), notes={"of": {1, 2}}), TypeError, "JSON"),
        (RuntimeError("the strategy's own"), RuntimeError, "the strategy's own"),
    ],
)
def test_a_wrong_proposal_reaches_the_user_and_is_not_recorded(answer, error, says):
    run = Run(Says(answer)).begin(9)
    with pytest.raises(error, match=says):
        run.search.next()
    assert run.events == [] and len(run.history) == 0


def test_notes_are_the_same_now_and_after_a_resume():
    run = Run(Says(Evaluate(SPACE.architecture({"x": 1}), notes={"parents": (1, 2), "by": {3: "three"}}))).begin(1)
    run.search.next()
    assert run.history.trials[0].proposal.notes == {"parents": [1, 2], "by": {"3": "three"}}
    assert snapshot(run.again().history) == snapshot(run.history)


# Wrong workers must not make the journal unreadable.


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s: s.report(0, Report(2, {})),
        lambda s: s.report(0, Report(0, {})),
        lambda s: s.report(1, Report(1, {})),
        lambda s: s.report(0, Report(1, {"a": float("nan")})),
        lambda s: s.finish(0, Outcome("running")),
        lambda s: s.finish(0, Outcome("done")),  # type: ignore[arg-type]
        lambda s: s.finish(0, Outcome("complete", {"acc": float("inf")})),
        lambda s: s.finish(0, Outcome("complete", found=(Ladder(3).architecture({"x": 1}),))),
        lambda s: s.finish(1, Outcome("complete")),
    ],
)
def test_what_cannot_be_booked_is_not_recorded(wrong):
    run = Run(InOrder()).begin(9)
    run.search.next()
    run.search.next()
    run.search.finish(1, Outcome("failed"))
    before, events = snapshot(run.history), list(run.events)
    with pytest.raises((InvalidInputError, ValueError)):
        wrong(run.search)
    assert run.events == events
    assert snapshot(run.history) == before
    assert snapshot(run.again().history) == before


def test_a_journal_that_does_not_follow_is_refused():
    run = Run(InOrder()).begin(1)
    run.all()
    start, finish = run.events
    for events in ([finish], [start, start], [start, {**finish, "state": "no"}], [start, {**start, "event": "new"}],
                   [{**start, "proposal": {"kind": "evaluate", "genes": {"x": -1}, "budget": 1.0}}],
                   [{**start, "proposal": {"kind": "evaluate"}}]):  # fmt: skip
        with pytest.raises(JournalError):
            Run(InOrder(), events=events)


# Resuming.


def test_running_trials_are_handed_out_again_with_number_and_seed():
    run = Run(InOrder(), seed=5).begin(9)
    before = [run.search.next() for _ in range(3)]
    run.search.report(1, Report(1, {"a": 1.0}))
    run.search.finish(0, Outcome("complete", {"acc": 1.0}))
    again = run.again().begin(9)
    assert [again.search.next() for _ in range(2)] == before[1:]
    assert again.search.next().number == 3
    assert again.search.report(1, Report(1, {"a": 2.0}))  # it begins anew: its old epochs are replaced
    assert again.history.trials[1].reports == ({"a": 2.0},)


def test_unfinished_trials_are_finished_even_where_the_limit_is_reached():
    run = Run(InOrder()).begin(9)
    run.search.next()
    again = run.again().begin(0)
    assert again.all() == [0]


def test_seeds_differ_by_trial_and_by_study():
    seeds = set()
    for seed in range(4):
        search = Run(InOrder(), seed=seed).begin(9).search
        seeds |= {search.next().seed for _ in range(4)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_kill_between_the_two_events_of_a_copy():
    run = Run(InOrder((3, 3, 4))).begin(9)
    run.all()
    cut = next(i for i, e in enumerate(run.events) if e["event"] == "finish" and e["trial"] == 1)
    again = run.again(events=run.events[:cut]).begin(9)
    assert again.all() == [2]
    assert again.history.trials[1].copy_of == 0
    assert again.search.worked == 2


@dataclass(frozen=True)
class Looks:
    """An explorer that is never run here."""

    epochs: int = 3

    def explore(self, space, task, rng, context):
        raise NotImplementedError
        yield


@dataclass(frozen=True)
class ExploreFirst:
    epochs: int = 3

    def propose(self, history, rng):
        return Explore(Looks(self.epochs)) if len(history) == 0 else InOrder().propose(history, rng)


def test_an_unfinished_exploration_gets_its_explorer_back():
    run = Run(ExploreFirst()).begin(9)
    run.search.next()
    again = run.again().begin(9)
    assert again.search.next().proposal == Explore(Looks())
    with pytest.raises(JournalError, match="pure function"):
        run.again(strategy=ExploreFirst(epochs=4))
    again.search.finish(0, Outcome("complete", found=(SPACE.architecture({"x": 9}),)))
    later = again.again(strategy=ExploreFirst(epochs=4))  # a finished one need not be proposed again
    assert later.history.trials[0].found == (SPACE.architecture({"x": 9}),)
    assert snapshot(later.history) == snapshot(again.history)


def test_keep_ends_a_trial():
    @dataclass(frozen=True)
    class Keeps(InOrder):
        def keep(self, trial, history):
            return trial.reports[-1]["a"] > 0.5

    run = Run(Keeps()).begin(9)
    run.search.next()
    assert run.search.report(0, Report(1, {"a": 0.6})) is True
    assert run.search.report(0, Report(2, {"a": 0.4})) is False


# The law: a journal's prefix, replayed, is the history at that moment.


@dataclass(frozen=True)
class Curious:
    """Proposes by everything that it sees, so that a difference anywhere in the history shows."""

    def propose(self, history, rng):
        if rng.random() < 0.1 and history.running:
            return None
        text = json.dumps([history.revision, [list(map(str, row)) for row in snapshot(history)]])
        genes = {"x": (sum(text.encode()) + int(rng.integers(3))) % 7}
        done = history.finished()
        if done and rng.random() < 0.3:
            source = done[int(rng.integers(len(done)))]
            return Evaluate(history.space.architecture(genes), weights_of=source.number, notes={"t": (1, 2)})
        return Evaluate(history.space.architecture(genes), budget=float(rng.choice([0.5, 1.0])))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(0, 3), st.integers(1, 4))
def test_a_journal_replays_exactly_at_every_prefix(data, seed, in_flight):
    run = Run(Curious(), space=Ladder(7), seed=seed, constraints=(at_most("size", 4.0),)).begin(12)
    steps: dict[int, int] = {}
    states: list[tuple] = [snapshot(run.history)]
    run.search._booked = lambda event: states.append(snapshot(run.history))  # after each event
    for _ in range(data.draw(st.integers(1, 40))):
        move = data.draw(st.sampled_from(["next", "next", "report", "finish", "finish", "enqueue"]))
        running = [t.number for t in run.history.running]
        if move == "next" and len(running) < in_flight:
            run.search.next()
        elif move == "enqueue":
            run.search.enqueue(run.space.architecture({"x": data.draw(st.integers(0, 6))}))
        elif running:
            number = data.draw(st.sampled_from(running))
            if move == "report":
                steps[number] = steps.get(number, 0) + 1
                run.search.report(number, Report(steps[number], {"acc": data.draw(st.floats(0, 1))}))
            elif move == "finish":
                state = data.draw(st.sampled_from(["complete", "complete", "failed", "infeasible", "stopped"]))
                metrics = {"acc": data.draw(st.floats(0, 1)), "size": data.draw(st.floats(0, 8))}
                run.search.finish(number, Outcome(state, metrics, "why", facts={"cores": (0, 1)}))
    assert len(states) == len(run.events) + 1
    for length, state in enumerate(states):
        again = run.again(events=run.events[:length])
        assert snapshot(again.history) == state
    # And what would come next is the same, too.
    unfinished = [t.number for t in run.history.running]
    again = run.again().begin(12)
    for number in unfinished:
        handed = again.search.next()
        twin = handed is not None and handed.number == number
        assert twin or again.history.trials[number].copy_of is not None
    live, replayed = run.search.next(), again.search.next()
    if live is None or replayed is None:
        assert live is replayed
    else:
        assert (live.number, live.seed, live.source) == (replayed.number, replayed.seed, replayed.source)
        assert proposal_to_json(live.proposal) == proposal_to_json(replayed.proposal)


def test_one_in_flight_a_search_cut_anywhere_ends_as_the_whole_one():
    def outcome(assignment):
        genes = assignment.proposal.architecture.genes
        return Outcome("failed" if genes["width"] == 2 else "complete", {"acc": genes["width"] / (1 + assignment.seed)})

    whole = Run(Drawn(), space=Mlp(), seed=1).begin(12)
    whole.all(outcome)
    for length in range(len(whole.events)):
        again = whole.again(events=whole.events[:length]).begin(12)
        again.all(outcome)
        assert [e[:-2] for e in snapshot(again.history)[:-1]] == [e[:-2] for e in snapshot(whole.history)[:-1]]
        assert snapshot(again.history)[-1] == snapshot(whole.history)[-1]

"""Runs a search in this process, one trial at a time: for a debugger, and the reference for every other runner."""

from __future__ import annotations

from nasplat.search import Assignment, Outcome, Search
from nasplat.strategy import Trial
from nasplat.worker import Worker


def run(search: Search, worker: Worker) -> None:
    """Work until the search hands out nothing more."""
    while (assignment := search.next()) is not None:
        run_one(search, worker, assignment)


def run_one(search: Search, worker: Worker, assignment: Assignment) -> Trial:
    """Work on one trial and book it."""
    steps = worker.run(assignment)
    try:
        event = next(steps)
        while not isinstance(event, Outcome):
            event = steps.send(search.report(assignment.number, event))
        return search.finish(assignment.number, event)
    finally:
        steps.close()

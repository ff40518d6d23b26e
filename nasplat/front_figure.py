"""The picture of a front with its errors and ties, on a figure of its own: matplotlib's global state stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy.special import ndtri

from nasplat.errors import InvalidInputError
from nasplat.figures import check_picture, save_figure
from nasplat.objectives import Objective
from nasplat.quantities import unit_of
from nasplat.strategy import Trial
from nasplat.uncertainty import Member, UncertainFront

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRONT, OTHERS = "#0072b2", "#bbbbbb"
TIES = ("#e69f00", "#009e73")
"""Of ties in the horizontal and in the vertical objective: with the front's blue told apart with any colour vision."""

LOGARITHMIC = 30.0
"""An axis whose largest value is more than so many times its least is logarithmic."""

LABELLED = 40
"""Of more members than these only some have their numbers written beside them."""


def save(front: UncertainFront, path: str | Path) -> Path:
    """Draw a front into a file, in the format that the name ends with.

    Args:
        front: What to draw.
        path: Ends in ``.svg``, ``.png`` or ``.pdf``; folders that it lies in are made.

    Returns:
        The file.

    Raises:
        InvalidInputError: The name ends otherwise, or there is nothing to draw.
    """
    path = check_picture(path)
    if not front.members:
        raise InvalidInputError("there is no front to draw: no candidate was trained in full and keeps the limits")
    return save_figure(draw(front), path)


def draw(front: UncertainFront) -> Figure:
    """The first objective against each other one, a panel each; against the trials' numbers where it is the only one.

    Bars are intervals of the front's confidence. Filled: on the front by the values as measured. Hollow: may be on it.
    Lines along the upper and the right edge span what is tied in that objective.
    """
    from matplotlib.figure import Figure

    first, others = front.objectives[0], front.objectives[1:]
    columns: Sequence[Objective | None] = others or (None,)
    figure = Figure(figsize=(1.2 + 5.4 * len(columns), 4.8), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for axes, other in zip(panels, columns, strict=True):
        _panel(axes, front, other, first)
    panels[0].set_ylabel(_label(first))
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    bars = f"; bars: {front.confidence:.0%} intervals" if front.uncertain else ""
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper left",
        ncols=3 * len(columns),
        frameon=False,
        fontsize="small",
    )
    figure.supxlabel(
        f"{len(front.members) + len(front.others)} candidates{bars}", fontsize="x-small", color="#555555"
    )  # fmt: skip
    return figure


def _panel(axes: Any, front: UncertainFront, x: Objective | None, y: Objective) -> None:
    if front.others:
        places = [[_place(trial, x), trial.metrics[y.metric]] for trial in front.others]
        axes.scatter(*zip(*places, strict=True), s=9, color=OTHERS, linewidths=0, label="dominated", zorder=1)
    on_front = [member for member in front.members if member.on_front]
    if x is not None and len(front.objectives) == 2:
        step = sorted([_place(member.trial, x), member.trial.metrics[y.metric]] for member in on_front)
        # What a front reaches: the step goes on at the value of the better neighbour that costs less.
        where = "steps-post" if x.direction == "minimise" else "steps-pre"
        axes.plot(*zip(*step, strict=True), drawstyle=where, color=FRONT, linewidth=1.0, alpha=0.6, zorder=3)
    maybe = [member for member in front.members if not member.on_front]
    _bars(axes, on_front, front, x, y, filled=True)
    _bars(axes, maybe, front, x, y, filled=False)
    every = -(-len(front.members) // LABELLED)
    for member in front.members[::every]:
        axes.annotate(
            f"#{member.number}",
            (_place(member.trial, x), member.trial.metrics[y.metric]),
            xytext=(4, 4), textcoords="offset points", fontsize="x-small", zorder=5,
        )  # fmt: skip
    for objective, axis in ((x, "x"), (y, "y")):
        if objective is not None:
            if axis == "x" or x in (None, front.objectives[-1]):  # the panels share the vertical objective
                _ties(axes, front, objective, axis)
            if _is_wide(front, objective):
                axes.set(**{f"{axis}scale": "log"})
    axes.set_xlabel("trial" if x is None else _label(x))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _bars(
    axes: Any, members: Sequence[Member], front: UncertainFront, x: Objective | None, y: Objective, *, filled: bool
) -> None:
    if not members:
        return
    wide = float(ndtri((1 + front.confidence) / 2))
    spreads = [
        None if objective is None else [wide * (member.estimates[objective.metric].error or 0.0) for member in members]
        for objective in (x, y)
    ]
    axes.errorbar(
        [_place(member.trial, x) for member in members],
        [member.trial.metrics[y.metric] for member in members],
        xerr=spreads[0],
        yerr=spreads[1],
        fmt="o", markersize=5, color=FRONT, markerfacecolor=FRONT if filled else "white", elinewidth=0.9, capsize=2,
        label="on the front" if filled else "may be on it", zorder=4,
    )  # fmt: skip


def _ties(axes: Any, front: UncertainFront, objective: Objective, axis: str) -> None:
    """A line along the edge of the panel for each group of tied members, from the least to the largest value."""
    value_of = {member.number: member.estimates[objective.metric].value for member in front.members}
    ends: list[float] = []  # the largest value in each row of lines so far
    groups = [sorted(value_of[number] for number in group) for group in front.groups(objective.metric)]
    for at, values in enumerate(sorted(groups)):
        row = next((row for row, end in enumerate(ends) if end < values[0]), len(ends))
        ends[row : row + 1] = [values[-1]]
        along, across = [values[0], values[-1]], [1.015 + 0.018 * row] * 2
        axes.plot(
            *((along, across) if axis == "x" else (across, along)),
            transform=axes.get_xaxis_transform() if axis == "x" else axes.get_yaxis_transform(),
            color=TIES[axis == "y"], linewidth=3.5, solid_capstyle="round", clip_on=False,
            label=None if at else f"tied in {objective.metric}",
        )  # fmt: skip


def _place(trial: Trial, x: Objective | None) -> float:
    return float(trial.number) if x is None else trial.metrics[x.metric]


def _is_wide(front: UncertainFront, objective: Objective) -> bool:
    trials = [*(member.trial for member in front.members), *front.others]
    values = [trial.metrics[objective.metric] for trial in trials]
    return min(values) > 0 and max(values) > LOGARITHMIC * min(values)


def _label(objective: Objective) -> str:
    unit = unit_of(objective.metric)
    name = objective.metric.rpartition("_")[0] if unit else objective.metric
    better = "→ better" if objective.direction == "maximise" else "← better"
    return f"{name} [{unit}]  ({better})" if unit else f"{name}  ({better})"

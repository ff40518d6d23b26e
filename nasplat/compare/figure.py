"""The picture of a comparison. Draws on a figure of its own; matplotlib's global state stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nasplat.compare.comparison import Comparison

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#f0e442")
"""Okabe and Ito's palette, told apart with any colour vision; the baseline is grey."""

BASELINE = "#555555"
DASHES = ("solid", "dashed", "dashdot", "dotted")


def draw(comparison: Comparison) -> Figure:
    """Anytime curves with their bands, against evaluations and seconds, and a dot a seed at the end of the budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    styles = _styles(comparison)
    _curves(left, comparison, "evaluations", styles)
    _curves(middle, comparison, "seconds", styles)
    metrics = " + ".join(comparison.budget.metrics)
    left.set_xlabel("evaluations")
    middle.set_xlabel("wall-clock [s]" if comparison.budget.kind == "hours" else f"{metrics}, summed")
    left.set_ylabel(f"{comparison.centre} {comparison.metric}, best so far")
    if comparison.reference is not None:
        left.set_ylabel(f"{comparison.centre} hypervolume so far")
    if left.get_legend_handles_labels()[0]:
        left.legend(frameon=False, fontsize="small")
    _dots(right, comparison, styles)
    return figure


def _styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    for name in comparison.traces:
        if name == comparison.baseline:
            styles[name] = {"color": BASELINE, "linestyle": "solid"}
        else:
            place = len([other for other in styles if other != comparison.baseline])
            dash = DASHES[place // len(COLOURS) % len(DASHES)]
            styles[name] = {"color": COLOURS[place % len(COLOURS)], "linestyle": dash}
    return styles


def _curves(axes: Any, comparison: Comparison, against: Any, styles: dict[str, dict[str, Any]]) -> None:
    for name, found in comparison.curves(against).items():
        axes.plot(found.x, found.centre, drawstyle="steps-post", label=name, linewidth=1.6, **styles[name])
        axes.fill_between(
            found.x, found.low, found.high, step="post", alpha=0.18, linewidth=0, color=styles[name]["color"]
        )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _dots(axes: Any, comparison: Comparison, styles: dict[str, dict[str, Any]]) -> None:
    """One dot a seed, lines between the dots of a seed: what the paired tests see."""
    table = comparison.per_seed().replace([np.inf, -np.inf], np.nan)
    places = np.arange(len(table.columns))
    for _, row in table.iterrows():
        axes.plot(places, row.to_numpy(dtype=float), color="#bbbbbb", linewidth=0.6, zorder=1)
    for place, name in zip(places, table.columns, strict=True):
        values = table[name].to_numpy(dtype=float)
        axes.scatter(np.full(len(values), place), values, s=16, color=styles[name]["color"], zorder=2)
    axes.set_xticks(places, table.columns, rotation=30, ha="right")
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_ylabel(f"{comparison.metric} by seed, {comparison.budget}", fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)

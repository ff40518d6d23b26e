"""The picture of a breakdown. Draws on a figure of its own; matplotlib's global state stays as it is."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nasplat.cost.breakdown import Breakdown, Part

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#f0e442")
"""Okabe and Ito's palette, told apart with any colour vision."""

OTHER = "#999999"
REST = "#555555"

LONGEST = 60
"""Letters of a name at most; the middle of a longer one is left out."""


def draw(found: Breakdown, most: int) -> Figure:
    """Horizontal bars, the first part on top."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    kinds = [kind for kind in found.by_kind().index if any(part.kind == kind for part in found.parts)]
    colour = {kind: COLOURS[place] if place < len(COLOURS) else OTHER for place, kind in enumerate(kinds)}
    shown = sorted(range(len(found.parts)), key=lambda index: -found.parts[index].ms)[:most]
    left_out = sorted(set(range(len(found.parts))).difference(shown))
    parts_of = Counter(part.module for part in found.parts)
    bars = [
        (_label(part, parts_of), part.ms, colour[part.kind]) for part in (found.parts[index] for index in sorted(shown))
    ]
    if left_out:
        together = sum(found.parts[index].ms for index in left_out)
        bars.append((f"({len(left_out)} shorter parts)", together, OTHER))
    bars.append((found.table()["name"].iloc[-1], found.rest_ms, REST))

    figure = Figure(figsize=(9.0, 1.7 + 0.19 * len(bars)), layout="constrained")
    axes = figure.subplots()
    places = range(len(bars))
    longest = max((part.ms for part in found.parts), default=found.ms)
    low, high = 1.1 * min(0.0, max(found.rest_ms, -longest / 4)), 1.15 * longest
    inside = 0.92 * high  # the label of a longer bar lies on it
    axes.barh(places, [ms for _, ms, _ in bars], color=[shade for _, _, shade in bars], height=0.8)
    axes.set_xlim(low, high)
    axes.set_yticks(places, [_short(name) for name, _, _ in bars], fontsize=7)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    for place, (_, ms, _) in enumerate(bars):
        axes.annotate(
            # A bar longer than the picture is wide goes to its edge.
            f"{ms / found.ms:.1%}" + (" →" if ms > high else " ←" if ms < low else ""),
            (min(max(ms, 0.0), inside), place), xytext=(3, 0), textcoords="offset points", va="center",
            fontsize=6, color="white" if ms > inside else "#333333",
        )  # fmt: skip
    axes.axvline(0, color="#333333", linewidth=0.6)
    axes.set_xlabel("ms")
    axes.set_title(f"{found.ms:.3f} ms a pass on {found.runtime}", loc="left", fontsize=10)
    total = found.by_kind()
    labels = [f"{kind} {total[kind] / found.ms:.0%}" for kind in kinds[: len(COLOURS)]]
    handles = [Patch(color=colour[kind], label=label) for kind, label in zip(kinds, labels, strict=False)]
    if more := kinds[len(COLOURS) :]:
        share = sum(total[kind] for kind in more) / found.ms
        handles.append(Patch(color=OTHER, label=f"{len(more)} other kinds {share:.0%}"))
    figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _label(part: Part, parts_of: Counter[str]) -> str:
    """The module that it is of, with the part's own name where there are several; else the part's own name."""
    if not part.module:
        return part.name
    return part.module if parts_of[part.module] == 1 else f"{part.module} ({part.name.rpartition('/')[2]})"


def _short(name: str) -> str:
    half = LONGEST // 2 - 1
    return name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}"

"""Metrics as people read them: the unit in a metric's name, and values with it."""

from __future__ import annotations

UNITS = {"ms": "ms", "us": "us", "seconds": "s", "s": "s", "bytes": "B", "mj": "mJ", "joules": "J", "watts": "W"}
"""Units by the last part of a metric's name."""

DIMENSIONLESS = ("_suspect", "_samples", "_speedup_", "_not_faster", "_prediction_error")
"""Parts of names that stand for numbers without a unit, whatever else is in the name."""

_POWERS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def unit_of(metric: str) -> str:
    """The unit in a metric's name (``ms`` of ``latency_ms`` and of ``latency_ms_phone``); "" where there is none."""
    if any(part in metric for part in DIMENSIONLESS):
        return ""
    if "_per_s" in metric:
        return "/s"
    parts = metric.lower().split("_")[1:]
    return next((UNITS[part] for part in reversed(parts) if part in UNITS), "")


def quantity(metric: str, value: float) -> str:
    """A metric's value to three digits, with its unit: ``1.23 ms``, ``4.50 MB``, ``12.3 k``."""
    unit = unit_of(metric)
    if unit in ("", "B"):
        for power, prefix in _POWERS:
            if abs(value) >= power * 0.9995:
                return f"{_three(value / power)} {prefix}{unit}"
    return f"{_three(value)} {unit}".rstrip()


def duration(seconds: float) -> str:
    """A time as people say it: ``42 s``, ``3.5 min``, ``2.1 h``, ``3.2 days``."""
    for length, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * length:
            return f"{_three(seconds / length)} {name}"
    return f"{_three(seconds)} s" if seconds >= 1 or seconds == 0 else f"{_three(seconds * 1e3)} ms"


def _three(value: float) -> str:
    if float(value).is_integer() and abs(value) < 1000:
        return str(int(value))
    text = f"{value:.3g}"
    return f"{float(text):.0f}" if "e+" in text and abs(value) < 1e6 else text

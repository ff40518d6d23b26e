"""Whether two tables of logits are the same, up to what rounding explains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from nasplat.errors import InvalidInputError

Verdict: TypeAlias = Literal["equal", "close", "different"]

ROUNDING = 1e-4
"""Largest difference, relative to the logits' standard deviation, that summing in another order explains. Seen: about
2e-6; a single flipped sign makes 1e-2 and more."""

MIN_AGREEMENT = 0.99
"""Share of rows that must keep their class. A hundredth of accuracy is as much as the standard error of an accuracy
around 0.9 that was measured on 1,000 examples, so what is below this cannot be told from noise; a wrong file is far
above."""

MAX_ERROR = 0.1
"""Largest root mean square difference relative to the logits' standard deviation: the file then explains at least
``1 - 0.1 ** 2 = 0.99`` of the logits' variance. It catches wrong logits that keep their order, such as doubled ones."""


@dataclass(frozen=True)
class Comparison:
    """How far logits are from those of the model.

    Attributes:
        rows: How many rows of logits were compared.
        max_difference: Largest absolute difference of a logit.
        relative_difference: The same in standard deviations of the model's logits.
        relative_rms: Root mean square difference, in the same unit.
        rows_beyond_rounding: Rows with a difference above ``ROUNDING`` standard deviations. In a network with signs or
            other steps, rounding next to a threshold makes some.
        argmax_agreement: Share of rows with the same largest logit, in [0, 1].
        verdict: ``equal``: every value. ``close``: all rows within rounding, or at least ``MIN_AGREEMENT`` of the rows
            keep their class and the rms is at most ``MAX_ERROR``. ``different``: anything else, NaN included.
    """

    rows: int
    max_difference: float
    relative_difference: float
    relative_rms: float
    rows_beyond_rounding: int
    argmax_agreement: float
    verdict: Verdict


def compare(logits: Tensor, reference: Tensor) -> Comparison:
    """Compare logits with those of the model.

    Args:
        logits: ``(n, classes)``.
        reference: The model's own, ``(n, classes)``, finite.

    Raises:
        InvalidInputError: The shapes differ.
    """
    if logits.shape != reference.shape:
        raise InvalidInputError(f"logits have shape {tuple(logits.shape)}; the model's have {tuple(reference.shape)}")
    difference = (logits.double() - reference.double()).abs()
    # Logits that are all the same have no scale of their own.
    scale = float(reference.double().std(correction=0)) or 1.0
    largest = float(difference.max())
    rms = float(difference.square().mean().sqrt()) / scale
    # Written so that NaN, which compares as false, counts as beyond.
    beyond = int((~(difference.amax(dim=1) <= ROUNDING * scale)).sum())
    agreement = float((logits.argmax(dim=1) == reference.argmax(dim=1)).double().mean())
    verdict: Verdict = "different"
    if torch.equal(logits, reference):
        verdict = "equal"
    elif beyond == 0 or (agreement >= MIN_AGREEMENT and rms <= MAX_ERROR):
        verdict = "close"
    return Comparison(len(reference), largest, largest / scale, rms, beyond, agreement, verdict)

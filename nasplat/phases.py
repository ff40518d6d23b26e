"""Phases of a training: what is binary, which experts learn, and for how long; and the published sequences of them.

A binary network learns better when it is made binary step by step: first the activations, then the weights, each
phase going on from the weights of the one before (arXiv:1904.05868, arXiv:2003.11535).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

from torch import nn

from nasplat.checks import is_number
from nasplat.errors import InvalidInputError
from nasplat.nn import set_binarisation
from nasplat.nn.expert import set_experts


@dataclass(frozen=True)
class Phase:
    """A share of the epochs, with an optimiser and a learning rate schedule of its own.

    Networks without binary layers, or without experts, are trained as they are.

    Attributes:
        share: Of the recipe's epochs, in [0.001, 1]; those of all phases sum to 1.
        binary_activations: Whether binary convolutions see signs of their inputs; ``"tanh"``: real ones, with the
            hyperbolic tangent in place of the sign.
        binary_weights: Whether the weights of binary convolutions are replaced by their signs.
        experts: ``one`` trains the first expert of each layer alone, as does every phase without binary activations,
            whose layers use no other. The first phase of all experts after that begins with copies of the one
            (arXiv:2010.03558, section on the optimisation policy).
        lr: Learning rate at the start; None takes the recipe's.
        weight_decay: L2 coefficient; None takes the recipe's.
    """

    share: float
    binary_activations: bool | Literal["tanh"] = True
    binary_weights: bool = True
    experts: Literal["all", "one"] = "all"
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if not is_number(self.share) or not 0.001 <= self.share <= 1:
            raise InvalidInputError(f"a phase's share is {self.share!r}; legal: a number in [0.001, 1]")
        legal = {
            "binary_activations": (True, False, "tanh"),
            "binary_weights": (True, False),
            "experts": ("all", "one"),
        }
        for name, options in legal.items():
            value = getattr(self, name)
            # 1 equals True, but is not taken for it everywhere.
            if not any(value == option and type(value) is type(option) for option in options):
                shown = ", ".join(map(repr, options))
                raise InvalidInputError(f"a phase's {name} is {value!r}; legal: {shown}")
        if self.lr is not None and not (is_number(self.lr) and self.lr > 0):
            raise InvalidInputError(f"a phase's lr is {self.lr!r}; legal: a positive number, or None for the recipe's")
        if self.weight_decay is not None and not (is_number(self.weight_decay) and self.weight_decay >= 0):
            raise InvalidInputError(
                f"a phase's weight_decay is {self.weight_decay!r}; legal: a number from 0 up, or None for the recipe's"
            )

    def enter(self, model: nn.Module) -> None:
        """Switch a model's binary layers and experts to this phase, in place."""
        set_binarisation(model, activations=self.binary_activations, weights=self.binary_weights)
        set_experts(model, single=self.experts == "one" or self.binary_activations is not True)


TWO_STEP = (Phase(1 / 2, binary_weights=False), Phase(1 / 2))
"""Binary activations with real weights, then all binary (BATS, arXiv:2003.01711, section on training)."""

EXPERT = (
    Phase(1 / 3, binary_weights=False, experts="one", weight_decay=1e-5),
    Phase(1 / 3, binary_weights=False, weight_decay=1e-5),
    Phase(1 / 3, weight_decay=0.0),
)
"""One expert, then copies of it as all experts, then binary weights too (arXiv:2010.03558)."""

PROGRESSIVE = (
    Phase(1 / 3, binary_activations="tanh", binary_weights=False, weight_decay=1e-5),
    Phase(1 / 3, binary_weights=False, weight_decay=1e-5),
    Phase(1 / 3, weight_decay=0.0),
)
"""A real network with tanh in place of the sign, then binary activations, then all binary: each the teacher of the
next, where the recipe has a teacher (arXiv:2003.11535)."""

PROGRESSIVE_EXPERT = (
    Phase(1 / 3, binary_activations=False, binary_weights=False, weight_decay=1e-5),
    Phase(1 / 3, binary_weights=False, experts="one", weight_decay=1e-5),
    Phase(1 / 3, weight_decay=0.0),
)
"""As arXiv:2010.03558 trains with teachers: a real network, then binary activations, both with one expert, then all
experts and all binary."""

PolicyName: TypeAlias = Literal["two_step", "expert", "progressive", "progressive_expert"]

POLICIES: Mapping[str, tuple[Phase, ...]] = MappingProxyType(
    {"two_step": TWO_STEP, "expert": EXPERT, "progressive": PROGRESSIVE, "progressive_expert": PROGRESSIVE_EXPERT}
)
"""The published sequences by the names that a recipe takes."""


class Span(NamedTuple):
    """The epochs of a phase, counted from 0: ``begin`` is its first, ``end`` the first after it."""

    begin: int
    end: int
    phase: Phase | None


def phases_of(given: Sequence[Phase] | str) -> tuple[Phase, ...]:
    """Checked phases, of a sequence of them or of the name of a policy.

    Raises:
        InvalidInputError: No such policy, something else than phases, or shares that do not sum to 1.
    """
    named = POLICIES.get(given) if isinstance(given, str) else given
    if not isinstance(named, Sequence) or not all(isinstance(phase, Phase) for phase in named):
        raise InvalidInputError(
            f"phases is {given!r}; legal: a sequence of nasplat.Phase, or one of {', '.join(POLICIES)}"
        )
    total = math.fsum(phase.share for phase in named)
    if named and not math.isclose(total, 1, abs_tol=1e-6):
        raise InvalidInputError(f"the shares of the {len(named)} phases sum to {total:g}; they must sum to 1")
    return tuple(named)


def spans(phases: Sequence[Phase], epochs: int) -> tuple[Span, ...]:
    """Which epochs each phase has: a boundary between epochs is rounded down to the whole epoch.

    Args:
        phases: Shares sum to 1. Without any, one span of no phase covers all epochs.
        epochs: At least 1.

    Raises:
        InvalidInputError: A phase would get no epoch.
    """
    if not phases:
        return (Span(0, epochs, None),)
    edges = _edges(phases, epochs)
    if not _all_rise(edges):
        least = next(count for count in itertools.count(epochs + 1) if _all_rise(_edges(phases, count)))
        shares = ", ".join(f"{phase.share:g}" for phase in phases)
        raise InvalidInputError(f"epochs is {epochs}; phases with shares {shares} need at least {least}")
    return tuple(Span(*span) for span in zip(edges, edges[1:], phases, strict=False))


def _edges(phases: Sequence[Phase], epochs: int) -> list[int]:
    shares = itertools.accumulate(phase.share for phase in phases[:-1])
    # 0.7 + 0.1 is a little less than 0.8.
    return [0, *(math.floor(share * epochs + 1e-6) for share in shares), epochs]


def _all_rise(edges: Sequence[int]) -> bool:
    return all(begin < end for begin, end in itertools.pairwise(edges))

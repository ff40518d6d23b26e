"""Columns of the table that the executor runs: one row an operation, 64-bit integers.

Columns that end in ``_AT`` are offsets in bytes: of constants, or of the arena. The table is always made by
:mod:`nasplat.packed.plan` from a validated program, and never read from a file.
"""

from __future__ import annotations

from enum import IntEnum


class Opcode(IntEnum):
    """What a row does."""

    PACK = 0
    """Binarise or copy a value into planes with borders."""
    CONV = 1
    """Convolution of packed planes, binary or real, with everything after it."""
    POOL = 2
    """Maximum or average over windows."""
    MAP = 3
    """A scale, shift and PReLU per channel, a permutation of channels, a sum: whatever goes number by number."""
    LINEAR = 4
    """Matrix times vector."""
    MEAN = 5
    """Mean over height and width."""
    ARGMAX = 6
    """Number of the largest."""


(
    OP,
    CHANNELS,
    HEIGHT,
    WIDTH,
    OUT_CHANNELS,
    OUT_HEIGHT,
    OUT_WIDTH,
    X_AT,
    OUT_AT,
    RESIDUALS,
    RESIDUAL1_AT,
    RESIDUAL2_AT,
    KIND,
    STRIDE,
    GROUPS,
    PLANES,
    PLANE_CHANNELS,
    PLANE_BYTES,
    PITCH,
    PHASES,
    PHASES_AT,
    STEPS,
    CHUNK,
    OFFSETS_AT,
    BLOCKS,
    BLOCKS_AT,
    STRIP,
    SUMS_AT,
    SUMS_STRIDE,
    WEIGHT_AT,
    WEIGHT_STRIDE,
    TABLES_AT,
    CONSTANT,
    BASE_AT,
    BASE_STRIDE,
    BASE_ROWS,
    BASE_CLASSES_AT,
    THRESHOLD_AT,
    SCALE_AT,
    SHIFT_AT,
    SLOPE_AT,
    CHANNEL_TO_AT,
    PICK_AT,
    FACTOR_AT,
    KERNEL_HEIGHT,
    KERNEL_WIDTH,
    PAD_TOP,
    PAD_LEFT,
    PADDED_HEIGHT,
    MODE,
    ROWS_AT,
    COLUMNS_AT,
) = range(52)

COLUMNS = COLUMNS_AT + 1
"""How many there are."""

KINDS = ("lookup", "popcount", "real")
"""How a convolution multiplies, by its number in the column KIND."""

ACTIVATIONS = ("none", "relu", "sigmoid")
"""Activations of LINEAR, by their number in the column MODE."""

NOWHERE = -1
"""Offset that stands for an absent array."""

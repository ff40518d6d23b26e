"""Strict fairness: in each step every option is trained equally often (Chu et al. 2021, arXiv:1907.01845)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nasplat.architecture import Architecture
from nasplat.checks import is_whole
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.space import Group, Option, SearchSpace
from nasplat.weight_sharing.paths import PathTraining

TRIES = 1_000
"""Blocks drawn before a space that refuses a path of each is said not to be trainable in this way."""


@dataclass(frozen=True)
class FairPaths(PathTraining):
    """Explorer: trains a supernet on balanced blocks of paths, in which the options of a choice occur equally often.

    Where all choices have ``m`` options, a block is the paper's: ``m`` paths, of which each choice takes each option
    once, in random order. In general, a block is the shortest in which

    - each option of a choice that is in no group occurs equally often,
    - each member of a group (of which ``pick`` of ``n`` are on) is on equally often,
    - and, when it is on, takes each of its other options equally often.

    So choices of 2 and 3 options make a block of 6 paths, and a DARTS cell, with nodes that pick 2 of 2, 3, 4 and 5
    edges with 7 operations each, one of 210. Within a block counts differ by at most one at any time, for the options
    of a free choice and for the members of a group.

    Attributes:
        paths: Paths a step, whose gradients are summed; a divisor of the block's length. None is the whole block:
            strict fairness, in which every single step is balanced. With fewer, a block takes several steps, and what
            is left of the last block of an epoch is dropped.

    Further attributes are those of :class:`~nasplat.weight_sharing.paths.PathTraining`.
    """

    paths: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paths is not None and not is_whole(self.paths):
            raise InvalidInputError(f"paths is {self.paths!r}; None, or an integer from 1 up is needed")

    def steps(self, space: SearchSpace, rng: np.random.Generator) -> Iterator[Sequence[Architecture]]:
        """Blocks, cut into steps.

        Args:
            space: Where paths are drawn.
            rng: The only source of randomness.

        Raises:
            InvalidInputError: ``paths`` does not divide the length of a block.
            UnsupportedError: ``is_valid`` of the space refuses a path of each of 1,000 blocks.
        """
        length = block_length(space)
        if self.paths is not None and length % self.paths:
            legal = [count for count in range(1, length + 1) if length % count == 0]
            raise InvalidInputError(
                f"paths is {self.paths}; a balanced block of {space.name} has {length} paths, so that legal are None "
                f"and {', '.join(map(str, legal[:12]))}{', ...' if len(legal) > 12 else ''}"
            )
        each = self.paths or length
        while True:
            block = balanced_block(space, rng)
            for begin in range(0, length, each):
                yield block[begin : begin + each]


def block_length(space: SearchSpace) -> int:
    """The number of paths of the shortest balanced block (see :class:`FairPaths`)."""
    free, groups = _parts(space)
    return math.lcm(*(len(space.choices[name]) for name in free), *(_group_length(space, group) for group in groups))


def balanced_block(space: SearchSpace, rng: np.random.Generator) -> list[Architecture]:
    """A random balanced block.

    Args:
        space: Where paths are drawn.
        rng: The only source of randomness.

    Returns:
        As many architectures as :func:`block_length` says.

    Raises:
        UnsupportedError: ``is_valid`` refuses a path of each of 1,000 blocks.
    """
    length = block_length(space)
    free, groups = _parts(space)
    for _ in range(TRIES):
        columns: dict[str, list[Option]] = {}
        for name in free:
            options = space.choices[name]
            rounds = length // len(options)
            columns[name] = [options[int(index)] for _ in range(rounds) for index in rng.permutation(len(options))]
        for group in groups:
            drawn: dict[str, list[Option]] = {name: [] for name in group.names}
            for _ in range(length // _group_length(space, group)):
                for name, column in _group_block(space, group, rng).items():
                    drawn[name] += column
            columns.update(drawn)
        rows = [{name: columns[name][row] for name in space.choices} for row in range(length)]
        if all(space.is_valid(genes) for genes in rows):
            return [space.architecture(genes) for genes in rows]
    raise UnsupportedError(
        f"{space.name} refuses a path of each of {TRIES} balanced blocks of {length} paths: where options cannot be "
        "combined freely, they cannot be trained equally often. UniformPaths can train this space"
    )


def _parts(space: SearchSpace) -> tuple[list[str], list[Group]]:
    """The choices that are in no group, and the groups."""
    groups = list(space.choice_groups.values())
    grouped = {name for group in groups for name in group.names}
    return [name for name in space.choices if name not in grouped], groups


def _on(space: SearchSpace, name: str, group: Group) -> list[Option]:
    return [option for option in space.choices[name] if option != group.off]


def _group_length(space: SearchSpace, group: Group) -> int:
    # In m paths a member is on m * pick / n times, which must be a multiple of its number of options.
    options = math.lcm(*(len(_on(space, name, group)) for name in group.names))
    whole = len(group.names) * options
    return whole // math.gcd(whole, group.pick)


def _group_block(space: SearchSpace, group: Group, rng: np.random.Generator) -> dict[str, list[Option]]:
    """A balanced block of one group: per member its option in each path."""
    length = _group_length(space, group)
    each = length * group.pick // len(group.names)
    waiting: dict[str, list[Option]] = {}
    for name in group.names:
        options = _on(space, name, group)
        rounds = each // len(options)
        waiting[name] = [options[int(index)] for _ in range(rounds) for index in rng.permutation(len(options))]
    columns: dict[str, list[Option]] = {name: [] for name in group.names}
    for _ in range(length):
        # Those that have waited longest, ties at random: any other rule could leave too few members for the last paths.
        ties = dict(zip(group.names, rng.random(len(group.names)), strict=True))
        first = sorted(group.names, key=lambda name: (-len(waiting[name]), ties[name]))[: group.pick]
        for name in group.names:
            columns[name].append(waiting[name].pop() if name in first else group.off)
    return columns

"""A space whose answer is known, for explorers: one edge of three carries the image, the others noise and zeros."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from nasplat.space import Group, SearchSpace, Supernet
from nasplat.weight_sharing.bilevel import Moment


@dataclass(frozen=True)
class Experts(SearchSpace):
    """Edges into a classifier of 8x8 images. One is on; ``edge1`` alone offers the image."""

    @property
    def choices(self):
        return {
            "edge0": ("off", "noise", "zeros"),
            "edge1": ("off", "noise", "image"),
            "edge2": ("off", "zeros", "noise"),
        }

    @property
    def choice_groups(self):
        return {"node": Group(("edge0", "edge1", "edge2"), 1, "off")}

    def build(self, architecture):
        raise NotImplementedError

    def supernet(self, keep=None, partial=1):
        return ExpertsSupernet(self, self.alive(keep), partial)


class ExpertsSupernet(Supernet):
    """Records its arguments, and per forward pass the weights it was given."""

    made: ClassVar[list["ExpertsSupernet"]] = []

    def __init__(self, space, alive, partial):
        super().__init__()
        self.space, self.alive, self.partial = space, alive, partial
        self.head = torch.nn.Linear(64, 10)
        self.seen = []
        self.made.append(self)

    def forward(self, x, relaxed):
        self.seen.append({name: weights.detach().clone() for name, weights in relaxed.items()})
        total = torch.zeros(len(x), 64)
        for name, used in self.space.used(relaxed, self.alive).items():
            for index in used:
                match self.space.choices[name][index]:
                    case "noise":
                        total = total + relaxed[name][index] * torch.randn(len(x), 64)
                    case "image":
                        total = total + relaxed[name][index] * x.flatten(1)
        return self.head(total)


def moment(space, epoch=1, epochs=1, keep=None):
    return Moment(space, space.alive(keep), epoch, epochs)


def alphas(**values):
    return {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}

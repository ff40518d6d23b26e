"""A frozen network that teaches another one: attention maps inside, logits at the end.

In a training of several phases the teacher of a phase is the network as the phase before left it: progressive teachers
(Martinez et al. 2020, arXiv:2003.11535; with experts, arXiv:2010.03558).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nasplat.checks import is_number
from nasplat.errors import InvalidInputError


@dataclass(frozen=True)
class Teacher:
    """How a network is taught by another, beside the task's own loss.

    The first phase has no teacher, unless ``network`` is given. Each later one is taught by the network as the phase
    before left it. The last phase matches logits only, as in arXiv:2003.11535.

    Attributes:
        attention: Weight of attention matching, at least 0: at each transfer point the map of mean squared
            activations over the channels, scaled to length 1, is drawn to the teacher's. 1e3 with the ``squared``
            distance is the released training of arXiv:2010.03558. The network names its points, see
            :func:`transfer_points`; 0 needs none.
        logits: Weight of the divergence from the teacher's softmax to the network's, at least 0; a mean over the
            examples. 1 with temperature 1 is about that of arXiv:2010.03558, whose 1e3 is of a mean over the 1000
            classes as well.
        temperature: Divides both networks' logits before the softmax; the divergence is multiplied by its square, so
            that the size of the gradient stays (Hinton et al. 2015, arXiv:1503.02531).
        distance: Between two attention maps: ``squared``, the mean squared difference over positions and examples; or
            ``norm``, the length of the difference, a mean over examples, as arXiv:2003.11535 writes it. The squared
            one is what ``attention``'s default belongs to, and its gradient fades as the maps come close, where that
            of the length keeps its size.
        last: What the last phase matches: ``logits``, or ``all``.
        labels: Whether a taught network learns from the labels too.
        network: Makes the teacher of the first phase, with its weights loaded: a function without arguments that
            returns an equal network each time. None: the first phase has no teacher.
    """

    attention: float = 1e3
    logits: float = 1.0
    temperature: float = 1.0
    distance: Literal["squared", "norm"] = "squared"
    last: Literal["logits", "all"] = "logits"
    labels: bool = True
    network: Callable[[], nn.Module] | None = None

    def __post_init__(self) -> None:
        for name in ("attention", "logits"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise InvalidInputError(f"a teacher's {name} is {value!r}; legal: a number from 0 up")
        if not (self.attention or self.logits):
            raise InvalidInputError("a teacher's attention and logits are both 0, so it teaches nothing")
        if not is_number(self.temperature) or self.temperature <= 0:
            raise InvalidInputError(f"a teacher's temperature is {self.temperature!r}; legal: a positive number")
        for name, options in {"distance": ("squared", "norm"), "last": ("logits", "all")}.items():
            if getattr(self, name) not in options:
                shown = ", ".join(options)
                raise InvalidInputError(f"a teacher's {name} is {getattr(self, name)!r}; legal: {shown}")
        if self.network is not None and (isinstance(self.network, nn.Module) or not callable(self.network)):
            raise InvalidInputError(
                f"a teacher's network is {type(self.network).__name__}; a function that makes one is needed"
            )

    def weights(self, phase: int, phases: int) -> tuple[float, float]:
        """The weights of attention and of logits in one phase; both 0 where it has no teacher.

        Args:
            phase: Its index, from 0.
            phases: How many there are.
        """
        if phase == 0 and self.network is None:
            return 0.0, 0.0
        attention = self.attention if self.last == "all" or phase < phases - 1 else 0.0
        return attention, self.logits


def frozen(network: nn.Module) -> nn.Module:
    """A copy that no training changes: in evaluation mode, its parameters without gradients."""
    return copy.deepcopy(network).eval().requires_grad_(False)


def transfer_points(network: nn.Module) -> tuple[str, ...]:
    """Names of the modules, as in ``named_modules``, at whose outputs ``(n, c, h, w)`` attention is matched.

    A network has them in its attribute ``transfer_points``, in order of the forward pass. Those of network and teacher
    are matched in that order, and have equal heights and widths.

    Raises:
        InvalidInputError: It has no such attribute, or one that names no modules of it.
    """
    points = getattr(network, "transfer_points", None)
    name = type(network).__name__
    if not points:
        raise InvalidInputError(
            f"{name} has no transfer points to match attention at: give it an attribute transfer_points, the names of "
            'modules whose outputs are (n, c, h, w), such as ("stage1", "stage2"); or ask for Teacher(attention=0)'
        )
    unknown = sorted(set(points) - {module for module, _ in network.named_modules() if module})
    if unknown:
        raise InvalidInputError(f"the transfer points of {name} name no modules of it: {', '.join(unknown)}")
    return tuple(points)


def attention_map(x: Tensor) -> Tensor:
    """Where a layer is active: mean squared activations over the channels, scaled to length 1.

    Args:
        x: ``(n, c, h, w)``.

    Returns:
        ``(n, h * w)``.
    """
    return functional.normalize(x.square().mean(dim=1).flatten(1), dim=1)


@contextmanager
def attention_maps(network: nn.Module, points: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Fills a mapping with the attention map of each point while the network runs; no hook is left behind."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.ndim < 3:
                shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise InvalidInputError(f"the transfer point {name} gives {shown}; a tensor (n, c, h, w) is needed")
            # At once: a later layer may change the output in place.
            found[name] = attention_map(output)

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in points]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in points if name not in found]
    if silent:
        raise InvalidInputError(f"{type(network).__name__} does not run its transfer points {', '.join(silent)}")


class Lesson:
    """A teacher at work in one phase.

    Attributes:
        network: The teacher, frozen.
        teacher: How it teaches.
    """

    def __init__(self, teacher: Teacher, network: nn.Module, student: nn.Module, attention: float, logits: float):
        """Put a network in front of another.

        Args:
            teacher: Temperature and distance.
            network: The teacher, frozen, on the student's device.
            student: The network to be taught.
            attention: Weight of attention matching in this phase.
            logits: Weight of logits in this phase.

        Raises:
            InvalidInputError: Attention is to be matched, and the transfer points of the two do not pair.
        """
        self.network = network
        self.teacher = teacher
        self._attention = attention
        self._logits = logits
        self._own: tuple[str, ...] = ()
        self._shown: tuple[str, ...] = ()
        if attention:
            self._own, self._shown = transfer_points(student), transfer_points(network)
            if len(self._own) != len(self._shown):
                raise InvalidInputError(
                    f"{len(self._own)} transfer points of {type(student).__name__} and {len(self._shown)} of its "
                    f"teacher {type(network).__name__}; equally many are needed, or Teacher(attention=0)"
                )

    def __call__(self, student: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The student's output for a batch, and what the teacher adds to the loss, a scalar.

        Raises:
            InvalidInputError: Outputs, or attention maps, of the two differ in shape.
        """
        with torch.no_grad(), attention_maps(self.network, self._shown) as shown:
            target = self.network(x)
        with attention_maps(student, self._own) as own:
            outputs = student(x)
        loss = outputs.new_zeros(())
        for a, b in zip(self._own, self._shown, strict=True):
            if own[a].shape != shown[b].shape:
                raise InvalidInputError(
                    f"the transfer point {a} has {own[a].shape[1]} positions, the teacher's {b} has "
                    f"{shown[b].shape[1]}; equal heights and widths are needed"
                )
            loss = loss + self._attention * self._distance(own[a], shown[b])
        if self._logits:
            loss = loss + self._logits * divergence(outputs, target, self.teacher.temperature)
        return outputs, loss

    def _distance(self, own: Tensor, shown: Tensor) -> Tensor:
        if self.teacher.distance == "squared":
            return functional.mse_loss(own, shown)
        lengths: Tensor = torch.linalg.vector_norm(own - shown, dim=1)
        return lengths.mean()


def divergence(outputs: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Mean Kullback-Leibler divergence from the targets' softmax to the outputs', times the temperature squared.

    Args:
        outputs: Logits ``(n, classes)``.
        targets: The teacher's, of the same shape.
        temperature: Divides both.

    Raises:
        InvalidInputError: They are no logits of one shape.
    """
    if outputs.ndim != 2 or outputs.shape != targets.shape:
        raise InvalidInputError(
            f"outputs {tuple(outputs.shape)} and the teacher's {tuple(targets.shape)}: to match logits, both must be "
            "(n, classes); or ask for Teacher(logits=0)"
        )
    own, wanted = (functional.log_softmax(logits / temperature, dim=1) for logits in (outputs, targets))
    return functional.kl_div(own, wanted, reduction="batchmean", log_target=True) * temperature**2

"""Zero-cost proxies: scores of an untrained network, from one batch of data and at most two backward passes.

The scores are those of the zero-cost NAS study (Abdelfattah, Mehrotra, Dudziak, Lane 2021, arXiv:2101.08134, and its
reference code) and of "Neural Architecture Search without Training" (Mellor, Turner, Storkey, Crowley 2021,
arXiv:2006.04647v3, and its reference code). Larger is better for all of them. *Weights* are the parameters of two or
more dimensions: kernels and matrices, neither biases nor normalisations.

Where the sources say nothing, because their networks have no such layers:

* A binary layer (:class:`nasplat.nn.BinaryConv2d`) has as weights the signs that it computes with, not the latent real
  ones; their gradient is that of the straight-through estimator before it is clipped.
* In ``synflow``, the sign of an activation is the identity, as every other activation is on positive numbers, and
  ReLU6 does not clip. An expert layer then uses its first expert alone, as many weights as an example uses.
* Codes of ``naswot`` come from ReLU, LeakyReLU, PReLU, RReLU, ReLU6 (positive or not), and signs (as they are), be they
  modules or function calls, as far as the network's output depends on them.
* Auxiliary classifiers, which a network has in training only, count for nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nasplat.checks import is_whole
from nasplat.cost.bench import Bench
from nasplat.cost.meter import Loss, Measurement
from nasplat.errors import InvalidInputError, NonFiniteError, UnsupportedError
from nasplat.nn.binary import BinaryConv2d, sign
from nasplat.seeding import seeded

SCORES = ("synflow", "naswot", "jacob_cov", "grad_norm", "snip")
"""The scores there are."""

EIGENVALUE_OFFSET = 1e-5
"""Added to the eigenvalues of ``jacob_cov`` (reference code of arXiv:2101.08134)."""

_RELUS = frozenset({"relu", "leaky_relu", "_prelu_kernel", "rrelu_with_noise"})
"""Names of torch operators that are linear on either side of zero."""

_OF_SHAPE = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
"""Names of torch operators that look at the shape of what they are given, not at its values."""


@dataclass(frozen=True, init=False)
class ZeroCost:
    """Scores of the network as built, before training: ``ZeroCost("synflow", "naswot")``.

    ``synflow``
        ``sum |w * dR/dw|`` over all weights, where R is the sum of the outputs for an input of ones, with every
        parameter and buffer replaced by its absolute value and without BatchNorm (Tanaka, Kunin, Yamins, Ganguli 2020,
        arXiv:2006.05467, as in arXiv:2101.08134). In float64, in evaluation mode. Needs no data: it depends on the
        shape of an input alone.
    ``naswot``
        ``log |det K|``, where ``K_ij`` is the number of activations that have the same binary code for examples i and
        j (arXiv:2006.04647v3). Where K is singular, because two examples have one code or there are too few
        activations, the limit is minus infinity; each eigenvalue that is zero within rounding is replaced by the
        smallest one that would not be, so that networks still rank by how many examples they tell apart. The
        measurement's facts have the rank.
    ``jacob_cov``
        ``-sum(log(v + k) + 1 / (v + k))``, ``k = 1e-5``, over the eigenvalues v of the correlations between the
        examples' gradients of the summed outputs with respect to the input (arXiv:2006.04647v1, as in
        arXiv:2101.08134). Undefined where such a gradient is constant, as for an output that does not depend on the
        input: the trial then fails, and its reason says so.
    ``grad_norm``
        The Euclidean norm of the loss's gradient, weight by weight, summed (arXiv:2101.08134).
    ``snip``
        ``sum |w * dL/dw|`` over all weights, where L is the loss (Lee, Ajanthan, Torr 2019, arXiv:1810.02340, as in
        arXiv:2101.08134).

    All but ``synflow`` are taken in training mode, so BatchNorm normalises with the batch. The model itself is copied
    and stays as it was. Layers that draw random numbers (dropout) draw the same ones for every candidate.

    Attributes:
        scores: Any of ``SCORES``, each once.
        batch_size: Examples of the batch, at least 2.
    """

    scores: tuple[str, ...]
    batch_size: int = 64

    trained = False

    def __init__(self, *names: str, scores: Sequence[str] = (), batch_size: int = 64) -> None:
        """Say which scores, by position or as ``scores``.

        Args:
            names: Any of ``SCORES``.
            scores: More of them.
            batch_size: Examples of the batch, at least 2.
        """
        wanted = (*names, *scores)
        unknown = [name for name in wanted if name not in SCORES]
        if unknown or not wanted or len(set(wanted)) < len(wanted):
            raise InvalidInputError(f"scores are {wanted!r}; legal: one or more of {', '.join(SCORES)}, each once")
        if not is_whole(batch_size, 2):
            raise InvalidInputError(f"batch_size is {batch_size!r}; a whole number from 2 up")
        object.__setattr__(self, "scores", wanted)
        object.__setattr__(self, "batch_size", batch_size)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the values: the scores."""
        return self.scores

    @property
    def examples(self) -> int:
        """Examples that it needs."""
        return self.batch_size

    def measure_batch(self, model: nn.Module, x: Tensor, y: Tensor, loss: Loss, bench: Bench) -> Measurement:
        """Score a network.

        Args:
            model: The built network, on the device of the batch.
            x: Inputs ``(n, ...)``.
            y: Targets ``(n, ...)``.
            loss: ``loss(outputs, y)``, a scalar; for ``grad_norm`` and ``snip``.
            bench: Waits while a measurement runs.

        Raises:
            InvalidInputError: There are fewer than 2 examples.
            NonFiniteError: A score is undefined or overflows.
            UnsupportedError: The model cannot be copied; or it has nothing that the score looks at.
        """
        if len(x) < 2:
            raise InvalidInputError(f"{self!r} got {len(x)} examples; at least 2 are needed")
        values: dict[str, float] = {}
        facts: dict[str, Any] = {}
        with bench.training():
            gradients: list[tuple[Tensor, Tensor]] | None = None
            for name in self.scores:
                facts[name] = {"examples": len(x)}
                if name == "synflow":
                    values[name] = _synflow(model, x)
                elif name == "naswot":
                    values[name], facts[name]["rank"] = _naswot(model, x)
                elif name == "jacob_cov":
                    values[name] = _jacob_cov(model, x)
                else:
                    gradients = gradients or _gradients(model, x, y, loss)
                    of_weights = torch.linalg.vector_norm if name == "grad_norm" else None
                    values[name] = sum(
                        float((w * g).abs().double().sum()) if of_weights is None else float(of_weights(g))
                        for w, g in gradients
                    )
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"{name} is {value}")
        return Measurement(values, facts=facts)


# The network that is scored.


def _own_copy(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy to change at will: lazy layers made, binary weights replaced by their signs, weights with a gradient."""
    try:
        model = copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be scored, because copy.deepcopy fails on it: {error}"
        ) from error
    if any(is_lazy(parameter) for parameter in model.parameters()):
        with torch.no_grad():
            model.eval()(x[:1])
    for layer in model.modules():
        if isinstance(layer, BinaryConv2d) and layer.binary_weights:
            layer.weight = nn.Parameter(sign(layer.weight.detach()))
            layer.binary_weights = False
    for weight in _weights(model):
        weight.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    return model.train()


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """Kernels and matrices."""
    return [parameter for parameter in model.parameters() if parameter.ndim >= 2]


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """All floating-point tensors of what a network returns."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping):
        for part in outputs.values():
            yield from _tensors(part)
    elif isinstance(outputs, list | tuple):
        for part in outputs:
            yield from _tensors(part)


def _summed(outputs: Any) -> Tensor:
    return torch.stack([part.sum() for part in _tensors(outputs)]).sum()


# The scores.


def _gradients(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> list[tuple[Tensor, Tensor]]:
    """Each weight that the loss depends on, and its gradient."""
    with seeded(0), torch.enable_grad():
        model = _own_copy(model, x)
        weights = _weights(model)
        value = loss(model(x), y)
        if not weights or not value.requires_grad:
            raise UnsupportedError(f"{type(model).__name__} has no weights that its loss depends on")
        found = torch.autograd.grad(value, weights, allow_unused=True)
    return [(w.detach(), g) for w, g in zip(weights, found, strict=True) if g is not None]


def _synflow(model: nn.Module, x: Tensor) -> float:
    with seeded(0), torch.enable_grad():
        model = _own_copy(model, x).eval().double()
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.abs_()
        for layer in model.modules():
            if isinstance(layer, BinaryConv2d):
                layer.binary_activations = layer.tanh_activations = False
            elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.forward = _unchanged  # type: ignore[method-assign]
        with _Unclipped():
            total = _summed(model(torch.ones_like(x[:1], dtype=torch.float64)))
        weights = _weights(model)
        if not weights or not total.requires_grad:
            raise UnsupportedError(f"{type(model).__name__} has no weights that its output depends on")
        found = torch.autograd.grad(total, weights, allow_unused=True)
    return sum(float((w.detach() * g).abs().sum()) for w, g in zip(weights, found, strict=True) if g is not None)


def _unchanged(input: Tensor) -> Tensor:
    return input


class _Unclipped(TorchFunctionMode):
    """ReLU in place of ReLU6: the flow of positive numbers is linear."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.relu6:
            return functional.relu(args[0])
        if func is functional.hardtanh and kwargs.get("min_val", args[1] if len(args) > 1 else -1.0) == 0:
            return functional.relu(args[0])
        return func(*args, **kwargs)


def _jacob_cov(model: nn.Module, x: Tensor) -> float:
    with seeded(0), torch.enable_grad():
        x = x.detach().clone().requires_grad_(True)
        total = _summed(_own_copy(model, x.detach())(x))
        (jacobian,) = torch.autograd.grad(total, x, allow_unused=True) if total.requires_grad else (None,)
    rows = np.zeros((len(x), 1)) if jacobian is None else jacobian.flatten(1).double().cpu().numpy()
    rows = rows - rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(rows).all() or not (norms > 0).all():
        raise NonFiniteError(
            f"jacob_cov is undefined: for {int((~(norms > 0)).sum())} of {len(x)} examples, the gradient of the output "
            "with respect to the input is constant or not finite"
        )
    rows /= norms
    shifted = np.linalg.eigvalsh(rows @ rows.T) + EIGENVALUE_OFFSET
    return -float(np.sum(np.log(shifted) + 1.0 / shifted))


def _naswot(model: nn.Module, x: Tensor) -> tuple[float, int]:
    with seeded(0), torch.no_grad():
        model = _own_copy(model, x)
        with _Codes(x) as codes:
            outputs = model(x)
    kernel = codes.kernel(outputs)
    if not kernel.any():
        raise UnsupportedError(
            f"naswot: the output of {type(model).__name__} depends on no ReLU, PReLU or sign of anything computed "
            "from its input"
        )
    values = np.linalg.eigvalsh(kernel)
    floor = len(x) * np.finfo(np.float64).eps * values[-1]
    return float(np.sum(np.log(np.maximum(values, floor)))), int((values > floor).sum())


class _Codes(TorchDispatchMode):
    """Sees every operator that runs while it is active: takes the binary codes, and what depends on which.

    What a tensor depends on is a set of bits for its storage: bit 0 is the input, each further one an activation.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._examples = len(x)
        self._depends: dict[int, int] = {_storage(x): 1}
        self._signs: set[int] = set()
        self._kernels: list[NDArray[np.float64]] = []

    def kernel(self, outputs: Any) -> NDArray[np.float64]:
        """``(n, n)``: for each two examples, the activations with the same code on which the outputs depend."""
        reached = 0
        for output in _tensors(outputs):
            reached |= self._depends.get(_storage(output), 0)
        total = np.zeros((self._examples, self._examples))
        for index, kernel in enumerate(self._kernels):
            if reached >> (index + 1) & 1:
                total += kernel
        return total

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2].removesuffix("_")
        read = {_storage(tensor) for tensor in _all_tensors((args, kwargs))}
        depends = 0
        for storage in () if name in _OF_SHAPE else read:
            depends |= self._depends.get(storage, 0)
        if depends & 1 and (code := self._code(name, args)) is not None:
            self._kernels.append(_agreements(code))
            depends |= 1 << len(self._kernels)
        output = func(*args, **kwargs)
        for tensor in _all_tensors(output):
            storage = _storage(tensor)
            if storage in read:  # a view of what was read, or changed in place
                self._depends[storage] = self._depends.get(storage, 0) | depends
            else:  # new: whatever had this storage before is gone
                self._depends[storage] = depends
                self._signs.discard(storage)
            if name == "sign":
                self._signs.add(storage)
        return output

    def _code(self, name: str, args: Sequence[Any]) -> Tensor | None:
        """``(n, bits)``, the code that an operator gives each example; None for all but activations."""
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.ndim < 2 or len(x) != self._examples:
            return None
        if name in _RELUS or (name == "hardtanh" and len(args) > 1 and args[1] == 0):
            return x.flatten(1) > 0
        if name == "sign" and _storage(x) not in self._signs:  # not the second one of nasplat.nn.sign
            return x.flatten(1) >= 0
        return None


def _agreements(code: Tensor) -> NDArray[np.float64]:
    """``(n, n)``: the number of bits that two rows of ``(n, bits)`` have in common."""
    signs = code.float().mul_(2).sub_(1)
    products: NDArray[np.float64] = (signs @ signs.T).double().cpu().numpy()
    return (products + code.shape[1]) / 2


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _all_tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _all_tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _all_tensors(value)

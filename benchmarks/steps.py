"""Time, activation memory and multiply-accumulates of training steps, side by side in one process.

A step is forward, backward and SGD with momentum, of weights and mixture weights at once. Its time is the processor's:
with one thread, that of the clock on a quiet machine, and on a busy one without what others take. Activation memory is
what autograd saves for the backward pass: the bytes of all different storages that it holds, parameters excluded
(``torch.autograd.graph.saved_tensors_hooks``). It is counted, not sampled, and so repeats exactly.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nasplat.cost.count import count


@dataclass(frozen=True)
class Cost:
    """What a step costs.

    Attributes:
        seconds: Of each repetition, of the processor.
        activation_bytes: Saved for the backward pass.
        macs: Multiply-accumulates of the forward pass, for one example.
    """

    seconds: tuple[float, ...]
    activation_bytes: int
    macs: int

    @property
    def median(self) -> float:
        """Seconds of the median repetition."""
        return statistics.median(self.seconds)


def activation_bytes(forward: Callable[[], Tensor], parameters: Sequence[Tensor]) -> int:
    """Bytes of the different storages that autograd saves in ``forward``, without those of ``parameters``."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            # Alive until the end, so that no address is used twice.
            held.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(saved.values())


def measure(modules: Mapping[str, nn.Module], x: Tensor, repeats: int) -> dict[str, Cost]:
    """The cost of a training step of each module, repetitions interleaved, after one that does not count.

    Args:
        modules: Each takes ``x`` alone; mixture weights are parameters of its own.
        x: A batch; it gets a gradient, as in the middle of a network.
        repeats: Steps of each.
    """
    x = x.requires_grad_()
    steps: dict[str, Callable[[], None]] = {}
    costs: dict[str, tuple[int, int]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    for name, module in modules.items():
        parameters = list(module.parameters())
        with torch.no_grad():
            target = torch.randn_like(module(x))
        optimiser = torch.optim.SGD(parameters, 1e-3, momentum=0.9, weight_decay=1e-4, foreach=True)

        def step(module: nn.Module = module, target: Tensor = target, optimiser: torch.optim.SGD = optimiser) -> None:
            optimiser.zero_grad()
            x.grad = None
            (module(x) * target).mean().backward()
            optimiser.step()

        steps[name] = step
        costs[name] = (
            activation_bytes(lambda module=module: module(x), parameters),
            count(module, x[:1].detach()).macs,
        )
        step()
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return {name: Cost(tuple(seconds[name]), *costs[name]) for name in modules}


def show(title: str, costs: Mapping[str, Cost], baseline: str) -> None:
    """Print a table: medians with the range of the repetitions, and ratios to the named baseline.

    A ratio of times is the median over repetitions of the ratio to the baseline's step of the same repetition, so that
    a machine that slows down for a while slows both.
    """
    base = costs[baseline]
    width = max(map(len, costs))
    print(f"\n{title}\nratios: to {baseline}, in this run")
    print(f"{'':{width}}  {'CPU ms (min-max)':>24}  ratio  {'activations MB':>14}  ratio  {'MMACs/example':>13}  ratio")
    for name, cost in costs.items():
        low, high = min(cost.seconds), max(cost.seconds)
        cells = (
            f"{1e3 * cost.median:.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})".rjust(24),
            f"{statistics.median(a / b for a, b in zip(cost.seconds, base.seconds, strict=True)):5.2f}",
            f"{cost.activation_bytes / 1e6:14.2f}",
            f"{cost.activation_bytes / base.activation_bytes:5.2f}",
            f"{cost.macs / 1e6:13.2f}",
            f"{cost.macs / base.macs:5.2f}",
        )
        print("  ".join((name.ljust(width), *cells)))

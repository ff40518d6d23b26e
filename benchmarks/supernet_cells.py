"""One search step of a supernet of cells, beside the usual way to write it: parts of ``supernet.py``.

A search step is what ``strategies.Darts`` does for a batch: a loss on one batch and a step of the alphas, then a loss
on another batch and a step of the weights. The reference has the same operations, the same weights and the same maths,
written as the public DARTS code does it: a Python loop over the operations of each edge, each with a BatchNorm and a
PReLU of its own (PyTorch's), and a sum; the alphas' gradient comes from ``loss.backward()``. The operation that is
nothing is left out of it, in its favour. It runs in both memory formats; the faster is the baseline.

One thread. Steps are interleaved. A ratio is the median over rounds of the ratio within a round; CPU time is that of
the process, which other processes of a busy machine disturb less than they do wall time.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from steps import activation_bytes
from torch import Tensor, nn
from torch.nn import functional

from nasplat.cell_space import CellSpace, edge_name
from nasplat.nn.cell import KINDS, NODES
from nasplat.space import Relaxed
from search_spaces import Bats, DartsCell

EDGES = [(node, source) for node in NODES for source in range(node)]


class MixedOperation(nn.ModuleDict):
    """All operations of one edge, one after the other."""

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """The sum of the operations on ``x``, each times its weight; ``weights`` starts with the one for nothing."""
        return sum(weight * operation(x) for weight, operation in zip(weights[1:], self.values(), strict=True))


class ReferenceCell(nn.Module):
    """The cell of the public code, with the names of ours."""

    def __init__(self, preprocess0: nn.Module, preprocess1: nn.Module, edges: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.preprocess0 = preprocess0
        self.preprocess1 = preprocess1
        self.edges = nn.ModuleDict(edges)

    def forward(self, older: Tensor, newer: Tensor, weights: Tensor) -> Tensor:
        """From both inputs and ``(14, operations)`` weights to the concatenated nodes."""
        states = [self.preprocess0(older), self.preprocess1(newer)]
        offset = 0
        for node in NODES:
            terms = [
                self.edges[f"node{node}_from{source}"](state, weights[offset + source])
                for source, state in enumerate(states)
            ]
            states.append(sum(terms))
            offset += node
        return torch.cat(states[2:], dim=1)


class Reference(nn.Module):
    """The supernet of the public code: one network, two tables of weights."""

    def __init__(self, space: CellSpace) -> None:
        super().__init__()
        channels, width = space.channels, 3 * space.channels
        self.stem0 = nn.Sequential(
            nn.Conv2d(space.in_channels, width, 3, stride=space.stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            space.stem_activation(),
        )
        self.cells = nn.ModuleList()
        self.kinds: list[str] = []
        widths, halve = (width, width), False
        for index in range(space.cells):
            kind = "reduction" if index in space.reductions() else "normal"
            channels *= 2 if kind == "reduction" else 1
            edges = {}
            for node, source in EDGES:
                stride = 2 if kind == "reduction" and source < 2 else 1
                edges[f"node{node}_from{source}"] = MixedOperation(
                    {
                        name: space.operation(name, channels, stride, search=True)
                        for name in space.choices[edge_name(kind, node, source)][1:]
                    }
                )
            self.cells.append(
                ReferenceCell(
                    space.preprocess(widths[0], channels, halve=halve, search=True),
                    space.preprocess(widths[1], channels, halve=False, search=True),
                    edges,
                )
            )
            self.kinds.append(kind)
            widths, halve = (widths[1], len(NODES) * channels), kind == "reduction"
        self.classifier = nn.Linear(widths[1], space.classes)
        for module in list(self.modules()):
            if isinstance(getattr(module, "activation", None), nn.PReLU):
                module.activation = nn.PReLU(module.activation.num_parameters)

    def forward(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Logits; ``weights`` has a table per kind of cell."""
        older = newer = self.stem0(x)
        for cell, kind in zip(self.cells, self.kinds, strict=True):
            older, newer = newer, cell(older, newer, weights[kind])
        return self.classifier(newer.mean((2, 3)))


Batch = tuple[Tensor, Tensor]


@dataclass
class Searcher:
    """A supernet, its alphas and their optimisers.

    Attributes:
        supernet: Takes images and the mixture's weights.
        alphas: By edge, or by kind of cell.
        temperature: By the same names.
        alone: Whether the alphas' step computes the gradients of the alphas alone.
        layout: Memory format of images and kernels.
    """

    supernet: nn.Module
    alphas: dict[str, Tensor]
    temperature: Mapping[str, float]
    alone: bool
    layout: torch.memory_format = torch.channels_last
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.supernet.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.supernet.train()
        self.weights = list(self.supernet.parameters())
        self.optimiser = torch.optim.SGD(self.weights, 0.025, momentum=0.9, weight_decay=3e-4, foreach=True)
        self.alpha_optimiser = torch.optim.Adam(list(self.alphas.values()), 3e-4, weight_decay=1e-3, foreach=True)

    def relax(self) -> dict[str, Tensor]:
        """The mixture's weights."""
        return {name: torch.softmax(a / self.temperature.get(name, 1.0), dim=-1) for name, a in self.alphas.items()}

    def loss(self, batch: Batch, relaxed: Relaxed) -> Tensor:
        """Of one batch."""
        x, y = batch
        return functional.cross_entropy(self.supernet(x.contiguous(memory_format=self.layout), relaxed), y)

    def step(self, alpha_batch: Batch, batch: Batch) -> None:
        """One search step."""
        alphas = list(self.alphas.values())
        self.alpha_optimiser.zero_grad()
        loss = self.loss(alpha_batch, self.relax())
        if self.alone:
            for alpha, gradient in zip(alphas, torch.autograd.grad(loss, alphas), strict=True):
                alpha.grad = gradient
        else:
            loss.backward()
        self.alpha_optimiser.step()
        self.optimiser.zero_grad()
        relaxed = {name: weight.detach() for name, weight in self.relax().items()}
        self.loss(batch, relaxed).backward()
        nn.utils.clip_grad_norm_(self.weights, 5.0, foreach=True)
        self.optimiser.step()

    def time(self, alpha_batch: Batch, batch: Batch) -> None:
        """One search step, timed."""
        start, cpu_start = time.perf_counter(), time.process_time()
        self.step(alpha_batch, batch)
        self.cpu_seconds.append(time.process_time() - cpu_start)
        self.seconds.append(time.perf_counter() - start)


def ours(space: CellSpace, state: Mapping[str, Tensor] | None = None) -> Searcher:
    """The platform's supernet, with small random alphas."""
    torch.manual_seed(0)
    supernet = space.supernet()
    if state is not None:
        supernet.load_state_dict(state)
    alphas = {name: (1e-3 * torch.randn(len(o))).requires_grad_() for name, o in space.choices.items()}
    return Searcher(supernet, alphas, space.temperatures(), alone=True)


def reference(
    space: CellSpace, model: Searcher, *, alone: bool = False, layout: torch.memory_format = torch.channels_last
) -> Searcher:
    """The reference, with the weights and alphas of a searcher of ours."""
    supernet = Reference(space)
    supernet.load_state_dict(model.supernet.state_dict())
    alphas, temperature = {}, {}
    for kind in KINDS:
        names = [edge_name(kind, *edge) for edge in EDGES if edge_name(kind, *edge) in model.alphas]
        if names:
            alphas[kind] = torch.stack([model.alphas[name].detach() for name in names]).requires_grad_()
            temperature[kind] = model.temperature.get(names[0], 1.0)
    return Searcher(supernet, alphas, temperature, alone, layout)


def gradients(searcher: Searcher, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss, and the gradients of weights and alphas, alphas in the order of edges."""
    searcher.supernet.zero_grad()
    loss = searcher.loss(batch, searcher.relax())
    loss.backward()
    weights = {name: p.grad for name, p in searcher.supernet.named_parameters() if p.grad is not None}
    alphas = torch.cat([alpha.grad.reshape(-1, alpha.shape[-1]) for alpha in searcher.alphas.values()])
    return loss.detach(), weights, alphas


def double(searcher: Searcher) -> Searcher:
    """A copy in float64: there no sign of an activation hangs on the order of a sum."""
    twin = copy.deepcopy(searcher)
    return replace(
        twin,
        supernet=twin.supernet.double(),
        alphas={name: alpha.detach().double().requires_grad_() for name, alpha in twin.alphas.items()},
    )


def show_difference(a: Searcher, b: Searcher, batch: Batch) -> None:
    """Print how far apart two searchers' losses and gradients are, in float64."""
    batch = (batch[0].double(), batch[1])
    (loss, weights, alphas), (loss_b, weights_b, alphas_b) = (gradients(double(s), batch) for s in (a, b))
    assert weights.keys() == weights_b.keys()
    apart = max(
        float((gradient - weights_b[name]).abs().max() / weights_b[name].abs().max().clamp_min(1e-6))
        for name, gradient in weights.items()
    )
    print(
        f"float64, train mode, largest difference: loss {float((loss - loss_b).abs()):.1e}, "
        f"alphas' gradients {float((alphas - alphas_b).abs().max() / alphas_b.abs().max()):.1e} of the largest, "
        f"weights' gradients {apart:.1e} of the largest of each tensor"
    )


def measure(searchers: Mapping[str, Searcher], batches: tuple[Batch, Batch], repeats: int) -> None:
    """Steps of all searchers, interleaved, after one of each that does not count."""
    for searcher in searchers.values():
        searcher.step(*batches)
    for _ in range(repeats):
        for searcher in searchers.values():
            searcher.time(*batches)


def show(searchers: Mapping[str, Searcher], batch: Batch, baseline: str) -> None:
    """Print times, ratios to the named baseline (above 1: faster), and bytes saved for the backward pass."""
    base = searchers[baseline]
    saved = {
        name: activation_bytes(lambda s=searcher: s.loss(batch, s.relax()), searcher.weights)
        for name, searcher in searchers.items()
    }
    width = max(map(len, searchers))
    print(f"{'':{width}}  {'step ms (min-max)':>24}  CPU ms  faster  faster(CPU)  saved MB  ratio")
    for name, searcher in searchers.items():
        low, high = min(searcher.seconds), max(searcher.seconds)
        cells = (
            f"{1e3 * statistics.median(searcher.seconds):.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})".rjust(24),
            f"{1e3 * statistics.median(searcher.cpu_seconds):6.1f}",
            f"{_ratio(base.seconds, searcher.seconds):6.2f}",
            f"{_ratio(base.cpu_seconds, searcher.cpu_seconds):11.2f}",
            f"{saved[name] / 1e6:8.1f}",
            f"{saved[name] / saved[baseline]:5.2f}",
        )
        print("  ".join((name.ljust(width), *cells)))


def _ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def draw(space: CellSpace, side: int, batch: int) -> tuple[Batch, Batch]:
    """Two batches of noise."""
    generator = torch.Generator().manual_seed(1)
    first, second = (
        (
            torch.randn(batch, space.in_channels, side, side, generator=generator),
            torch.randint(space.classes, (batch,), generator=generator),
        )
        for _ in range(2)
    )
    return first, second


CELLS: Mapping[str, tuple[CellSpace, int, int]] = {
    "BATS, 3 cells of 8 channels in 2 groups, 64 images of 16x16": (Bats.small(), 16, 64),
    "BATS, 3 cells of 24 channels in 12 groups, 32 images of 16x16": (
        Bats(cells=3, channels=24, groups=12, in_channels=1),
        16,
        32,
    ),
    "DARTS cell, 3 cells of 8 channels, 64 images of 16x16": (DartsCell.small(), 16, 64),
    "DARTS cell, 3 cells of 16 channels, 32 images of 16x16": (DartsCell(cells=3, channels=16, in_channels=1), 16, 32),
}
"""Space, side of the images, images a batch."""


def cells(repeats: int) -> None:
    """BATS and the DARTS cell against the reference."""
    for title, (space, side, size) in CELLS.items():
        _against_reference(title, space, side, size, repeats)


def paper(repeats: int) -> None:
    """The DARTS cell at the size that its paper searches with, with fewer images a batch."""
    title = "DARTS cell, 8 cells of 16 channels, 16 images of 32x32"
    _against_reference(title, DartsCell.search(), 32, 16, repeats)


def _against_reference(title: str, space: CellSpace, side: int, size: int, repeats: int) -> None:
    print(f"\ncells: {title}")
    batches = draw(space, side, size)
    model = ours(space)
    show_difference(model, reference(space, model), (batches[0][0][:8], batches[0][1][:8]))
    searchers = {
        "nasplat": model,
        "reference, contiguous": reference(space, model, layout=torch.contiguous_format),
        "reference, channels-last": reference(space, model),
    }
    alone = {
        f"{name}, alphas' gradients alone": reference(space, model, alone=True, layout=searchers[name].layout)
        for name in list(searchers)[1:]
    }
    searchers |= alone
    measure(searchers, batches, repeats)
    usual = list(searchers)[1:3]
    show(searchers, batches[0], min(usual, key=lambda name: statistics.median(searchers[name].seconds)))


def bridge(repeats: int) -> None:
    """The merged form of BATS against the paper's."""
    for title, (space, side, size) in CELLS.items():
        if isinstance(space, Bats):
            print(f"\nbridge: {title}")
            batches = draw(space, side, size)
            searchers = {"paper": ours(space), "merged": ours(replace(space, supernet_form="merged"))}
            measure(searchers, batches, repeats)
            show(searchers, batches[0], "paper")

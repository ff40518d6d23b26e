from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nasplat.nn import BinaryBlock, BinaryFactorisedReduce, set_binarisation
from nasplat.nn.binary_mix import mix_binary
from nasplat.nn.cell import Use, mix
from search_spaces import Bats
from search_spaces.bats import OPERATIONS

FORMATS = (torch.contiguous_format, torch.channels_last)
NODES = (2, 3, 5)


def _edges(stride: int, shuffle: int = 1, *, merged: bool = False) -> nn.ModuleDict:
    """All operations of three edges that leave a state of four channels, with drawn scales and slopes."""
    space = Bats(channels=4, groups=2, shuffle=shuffle, supernet_form="merged" if merged else "paper")
    torch.manual_seed(0)
    edges = nn.ModuleDict(
        {
            str(node): nn.ModuleDict({name: space.operation(name, 4, stride, search=True) for name in OPERATIONS[1:]})
            for node in NODES
        }
    ).double()
    for edge in edges.values():
        space.tie_edge(list(edge.values()))
    space.tie([operation for edge in edges.values() for operation in edge.values()])
    with torch.no_grad():
        for name, parameter in edges.named_parameters():
            if name.endswith(("scale", "activation.weight")):
                parameter.normal_()
    return edges


def _uses(edges: nn.ModuleDict, weights: Tensor) -> dict[int, list[Use]]:
    return {
        node: [
            Use(name, edges[str(node)][name], weight)
            for name, weight in zip(OPERATIONS[1:], row.unbind(), strict=True)
            if weight != 0
        ]
        for node, row in zip(NODES, weights, strict=True)
    }


def _state(side: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, side, side, dtype=torch.float64, generator=generator).contiguous(memory_format=layout)


def _mixtures() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(4)
    full = torch.randn(3, 7, dtype=torch.float64, generator=generator)
    yield full
    # Edges differ in what they hold.
    yield full * (torch.rand(3, 7, generator=generator) < 0.5)
    # One operation an edge: two blocks and a pool; three blocks; no block; two blocks that are alike.
    for path in ((3, 4, 0), (3, 5, 6), (2, 2, 1), (5, 5, 3)):
        yield torch.eye(7, dtype=torch.float64)[list(path)]


def _check(edges: nn.ModuleDict, x: Tensor, weights: Tensor, *, expected_by: object, merged: bool = False) -> None:
    results = []
    for compute in (lambda x, uses: mix_binary(x, uses, merged=merged), expected_by):
        edges.zero_grad()
        given, table = x.clone().requires_grad_(), weights.clone().requires_grad_()
        for norm in edges.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_running_stats()
        mixed = compute(given, _uses(edges, table))
        sum((y * y).sum() for y in mixed.values()).backward()
        seen = [(name, p.grad) for name, p in edges.named_parameters() if p.grad is not None]
        results.append((dict(mixed), dict(seen), given.grad, table.grad))
    ours, theirs = results
    assert ours[0].keys() == theirs[0].keys() == set(NODES)
    assert ours[1].keys() == theirs[1].keys()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("stride", "shuffle", "side"), [(1, 1, 5), (2, 1, 5), (2, 2, 4), (1, 2, 5)])
def test_mixes_as_the_plain_way(stride: int, shuffle: int, side: int, layout: torch.memory_format) -> None:
    edges = _edges(stride, shuffle)
    for weights in _mixtures():
        _check(edges, _state(side, layout), weights, expected_by=mix)


def test_modules_that_share_nothing() -> None:
    edges = nn.ModuleDict(
        {
            str(node): nn.ModuleDict(
                {n: Bats(channels=4, groups=2).operation(n, 4, 1, search=True) for n in OPERATIONS[1:]}
            )
            for node in NODES
        }
    ).double()
    _check(edges, _state(5), next(_mixtures()), expected_by=mix)


@pytest.mark.parametrize("activations", ["tanh", False])
def test_follows_what_is_binary(activations: Any) -> None:
    edges = _edges(2)
    set_binarisation(edges, activations=activations)
    _check(edges, _state(5), next(_mixtures()), expected_by=mix)


@pytest.mark.parametrize("merged", [False, True])
def test_values_with_binary_weights(merged: bool) -> None:
    edges = _edges(2, merged=merged)
    set_binarisation(edges, weights=True)
    uses = _uses(edges, next(_mixtures()))
    expected = (_merged_plainly if merged else mix)(_state(5), uses)
    torch.testing.assert_close(mix_binary(_state(5), uses, merged=merged), expected)


def test_evaluation_takes_the_running_statistics() -> None:
    edges = _edges(1)
    x = _state(5)
    uses = _uses(edges, next(_mixtures()))
    with torch.no_grad():
        mix_binary(x, uses)
        norms = {m for m in edges.modules() if isinstance(m, nn.BatchNorm2d)}
        (norm,) = norms
        torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))
        assert int(norm.num_batches_tracked) == 1
        edges.eval()
        torch.testing.assert_close(mix_binary(x, uses), mix(x, uses))


def _merged_plainly(x: Tensor, uses: dict[int, list[Use]]) -> dict[int, Tensor]:
    """The merged form, convolution by convolution: one PReLU after the sum of an edge."""
    mixed = {}
    for node, listed in uses.items():
        y: Tensor | float = 0.0
        blocks = [(use.operation, use.weight) for use in listed if isinstance(use.operation, BinaryBlock)]
        if blocks:
            first = blocks[0][0]
            linear = sum(weight * block.conv(block.norm(x)) for block, weight in blocks)
            y = first.shuffle(functional.prelu(linear, first.activation.weight))
            y = y + sum(weight for _, weight in blocks) * x if first.shortcut else y
        for _, operation, weight in listed:
            if not isinstance(operation, BinaryBlock):
                y = y + weight * operation(x)
        mixed[node] = y
    return mixed


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("stride", "shuffle", "side"), [(1, 1, 5), (2, 2, 5)])
def test_merged_kernels_are_exact(stride: int, shuffle: int, side: int, layout: torch.memory_format) -> None:
    edges = _edges(stride, shuffle, merged=True)
    for weights in _mixtures():
        _check(edges, _state(side, layout), weights, expected_by=_merged_plainly, merged=True)


def test_merged_is_the_mixture_at_one_operation_per_edge_only() -> None:
    edges = _edges(1, merged=True)
    x = _state(5)
    full, _, *paths = _mixtures()
    for weights in paths:
        uses = _uses(edges, weights)
        torch.testing.assert_close(mix_binary(x, uses, merged=True), mix(x, uses))
    uses = _uses(edges, full)
    assert not torch.allclose(mix_binary(x, uses, merged=True)[2], mix(x, uses)[2])


def test_computes_what_it_must_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    conv2d = functional.conv2d
    monkeypatch.setattr(
        functional, "conv2d", lambda x, w, *rest, **named: calls.append(w.shape) or conv2d(x, w, *rest, **named)
    )

    def count(edges: nn.ModuleDict, weights: Tensor, *, merged: bool = False) -> int:
        calls.clear()
        mix_binary(_state(5), _uses(edges, weights), merged=merged)
        return len(calls)

    full, _, *paths = _mixtures()
    # A convolution per form of kernel, for all three edges; the factorised reduces are two more.
    assert count(_edges(1), full) == 4
    assert calls[0] == (3 * 4, 2, 3, 3)
    assert count(_edges(2), full) == 6
    # 3x3, 5x5 and dilated 3x3 in one, dilated 5x5 apart.
    assert count(_edges(1, merged=True), full, merged=True) == 2
    assert [count(_edges(1), path) for path in paths] == [2, 3, 0, 2]


def test_factorised_reduce_of_odd_sides_is_padded() -> None:
    edges = _edges(2)
    assert isinstance(edges["2"]["identity"], BinaryFactorisedReduce)
    uses = {2: [Use("identity", edges["2"]["identity"], torch.tensor(1.0, dtype=torch.float64))]}
    for side in (4, 5):
        assert mix_binary(_state(side), uses)[2].shape[-1] == (side + 1) // 2

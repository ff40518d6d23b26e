import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nasplat.nn.cell import NODES, AuxiliaryHead, Cell, MixedCell, Mixture, Use, mix

EDGES = [(node, source) for node in NODES for source in range(node)]


class _Scaled(nn.Module):
    """Its input times a parameter, every other pixel at stride 2; counts its calls."""

    def __init__(self, factor: float, stride: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))
        self.stride = stride
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.factor * x[:, :, :: self.stride, :: self.stride]


def _operations(kind: str = "normal") -> dict[tuple[int, int], dict[str, nn.Module]]:
    """Two operations an edge, with factors that are all different."""
    return {
        (node, source): {
            name: _Scaled(node + source / 10 + sign / 100, 2 if kind == "reduction" and source < 2 else 1)
            for name, sign in (("a", 1), ("b", -1))
        }
        for node, source in EDGES
    }


def _mixture() -> dict[tuple[int, int], list[tuple[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    return {edge: [(name, torch.rand((), dtype=torch.float64, generator=generator)) for name in "ab"] for edge in EDGES}


def _inputs(channels: int = 4, side: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    older, newer = torch.randn(2, 2, channels, side, side, dtype=torch.float64, generator=generator)
    return older, newer


def _mixed_cell(kind: str = "normal", **settings: object) -> MixedCell:
    return MixedCell(kind, nn.Identity(), nn.Identity(), _operations(kind), **settings)  # type: ignore[arg-type]


def test_plain_mix() -> None:
    x = torch.randn(2, 3, 4, 4)
    half, third = torch.tensor(0.5), torch.tensor(1 / 3)
    mixed = mix(x, {2: [Use("a", nn.Identity(), half), Use("b", nn.ReLU(), third)], 5: [Use("b", nn.ReLU(), half)]})
    torch.testing.assert_close(mixed, {2: 0.5 * x + x.relu() / 3, 5: 0.5 * x.relu()})


@pytest.mark.parametrize("kind", ["normal", "reduction"])
def test_mixed_cell_sums_edges_by_weight(kind: str) -> None:
    cell, mixture = _mixed_cell(kind), _mixture()
    states = list(_inputs())
    for node in NODES:
        total = torch.zeros(())
        for source in range(node):
            operations = cell.edges[f"node{node}_from{source}"]
            total = total + sum(weight * operations[name](states[source]) for name, weight in mixture[node, source])
        states.append(total)
    torch.testing.assert_close(cell(*states[:2], mixture), torch.cat(states[2:], dim=1))


def test_operations_that_are_not_in_the_mixture_are_not_computed() -> None:
    cell = _mixed_cell()
    mixture = {edge: listed[:1] if edge[1] else [] for edge, listed in _mixture().items()}
    cell(*_inputs(), mixture)
    calls = {name: module.calls for name, module in cell.named_modules() if isinstance(module, _Scaled)}
    assert {name for name, count in calls.items() if count} == {
        f"edges.node{node}_from{source}.a" for node, source in EDGES if source
    }
    assert max(calls.values()) == 1


@pytest.mark.parametrize("kind", ["normal", "reduction"])
def test_node_without_edges_is_zero(kind: str) -> None:
    cell = _mixed_cell(kind)
    mixture: Mixture = {edge: listed if edge[0] in (3, 5) else [] for edge, listed in _mixture().items()}
    nodes = cell(*_inputs(), mixture).chunk(4, dim=1)
    assert [bool(node.any()) for node in nodes] == [False, True, False, True]
    assert {tuple(node.shape[2:]) for node in nodes} == {(4, 4) if kind == "normal" else (2, 2)}


def test_cell_is_a_mixed_cell_of_one_operation_an_edge() -> None:
    on = {(2, 0), (2, 1), (3, 0), (3, 2), (4, 1), (4, 3), (5, 2), (5, 4)}
    operations = _operations()
    cell = Cell(
        "normal",
        nn.Identity(),
        nn.Identity(),
        {edge: {"b": operations[edge]["b"]} if edge in on else {} for edge in EDGES},
    )
    mixed = MixedCell("normal", nn.Identity(), nn.Identity(), operations)
    one = torch.ones((), dtype=torch.float64)
    mixture = {edge: [("b", one)] if edge in on else [] for edge in EDGES}
    torch.testing.assert_close(cell(*_inputs()), mixed(*_inputs(), mixture))
    assert set(cell.state_dict()) == {f"edges.node{node}_from{source}.b.factor" for node, source in on}
    assert set(cell.state_dict()) <= set(mixed.state_dict())


def test_mix_gets_each_state_once_with_all_that_leaves_it() -> None:
    seen: list[dict[int, list[str]]] = []

    def record(x: Tensor, uses: dict[int, list[Use]]) -> dict[int, Tensor]:
        seen.append({node: [use.name for use in listed] for node, listed in uses.items()})
        return mix(x, uses)

    mixture = _mixture()
    mixture[4, 1] = []
    mixture[5, 3] = mixture[5, 3][1:]
    _mixed_cell(mix=record)(*_inputs(), mixture)
    both = ["a", "b"]
    assert seen == [
        {2: both, 3: both, 4: both, 5: both},
        {2: both, 3: both, 5: both},
        {3: both, 4: both, 5: both},
        {4: both, 5: ["b"]},
        {5: both},
    ]


@pytest.mark.parametrize(("kind", "side"), [("normal", 4), ("reduction", 4), ("reduction", 5)])
def test_partial_channels_pass_by(kind: str, side: int) -> None:
    cell, mixture = _mixed_cell(kind, partial=2), _mixture()
    states = list(_inputs(channels=4, side=side))
    for node in NODES:
        total = torch.zeros(())
        for source in range(node):
            operations, x = cell.edges[f"node{node}_from{source}"], states[source]
            mixed = sum(weight * operations[name](x[:, :2]) for name, weight in mixture[node, source])
            halves = kind == "reduction" and source < 2
            passed = functional.max_pool2d(x[:, 2:], 2, ceil_mode=True) if halves else x[:, 2:]
            passed = passed * sum(weight for _, weight in mixture[node, source])
            # Shuffled by hand: one channel that was mixed, one that passed by, and so on.
            total = total + torch.stack([mixed[:, 0], passed[:, 0], mixed[:, 1], passed[:, 1]], dim=1)
        states.append(total)
    torch.testing.assert_close(cell(*states[:2], mixture), torch.cat(states[2:], dim=1))


def test_auxiliary_head() -> None:
    head = AuxiliaryHead(4, 3).eval()
    for side in (2, 7):
        assert head(torch.randn(2, 4, side, side)).shape == (2, 3)

import numpy as np
import pytest

from nasplat.errors import InvalidInputError
from nasplat.objectives import hypervolume


@pytest.mark.parametrize(
    ("losses", "reference", "volume"),
    [
        ([[1.0]], [3.0], 2.0),
        ([[1.0, 1.0]], [3.0, 2.0], 2.0),
        # A staircase: 1 x 3 + 1 x 2 + 1 x 1.
        ([[0, 2], [1, 1], [2, 0]], [3, 3], 6.0),
        ([[2, 0], [0, 2], [1, 1], [1, 1], [2, 2]], [3, 3], 6.0),
        # Outside, and on the border: nothing.
        ([[3, 0], [4, -1]], [3, 3], 0.0),
        ([], [1, 1], 0.0),
        # Two boxes of 1 x 1 x 2 and 2 x 1 x 1 that share a unit cube: 2 + 2 - 1.
        ([[1, 1, 0], [0, 1, 1]], [2, 2, 2], 3.0),
        ([[0, 0, 0, 0]], [1, 2, 3, 4], 24.0),
    ],
)
def test_known_volumes(losses: list[list[float]], reference: list[float], volume: float) -> None:
    assert hypervolume(losses, reference) == pytest.approx(volume)


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_against_counting_cells(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    for _ in range(5):
        points = rng.integers(0, 6, size=(8, objectives))
        cells = np.stack(np.meshgrid(*[np.arange(5)] * objectives, indexing="ij"), axis=-1).reshape(-1, objectives)
        dominated = (points[:, None] <= cells[None]).all(axis=-1).any(axis=0).sum()
        assert hypervolume(points.tolist(), [5] * objectives) == pytest.approx(dominated)


def test_wrong_reference() -> None:
    with pytest.raises(InvalidInputError):
        hypervolume([[1.0, 2.0]], [3.0])
    with pytest.raises(InvalidInputError):
        hypervolume([[1.0]], [float("inf")])

import torch

from nasplat.nn.weighted_sums import weighted_sums

PAIRS = [(0, 7), (1, 7), (0, 4), (2, 7), (2, 5)]


def test_sums() -> None:
    terms = [torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    a, b, c = terms
    sums = weighted_sums(terms, PAIRS, weights)
    assert list(sums) == [7, 4, 5]
    torch.testing.assert_close(sums[7], 0.5 * a - b)
    torch.testing.assert_close(sums[4], 2.0 * a)
    torch.testing.assert_close(sums[5], 3.0 * c)

    def compute(weights: torch.Tensor, *terms: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(weighted_sums(terms, PAIRS, weights).values())

    assert torch.autograd.gradcheck(compute, (weights, *terms))
    assert torch.autograd.gradcheck(compute, (weights.detach(), a, b.detach(), c))
    # Of the sums, the loss sees one.
    assert torch.autograd.gradcheck(lambda *given: compute(*given)[1], (weights, *terms))


def test_sums_do_not_touch_their_terms() -> None:
    terms = [torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)]
    weighted_sums(terms, [(0, 0), (1, 0)], torch.tensor([2.0, 3.0]))
    assert all(torch.equal(term, torch.ones(1, 1, 2, 2)) for term in terms)

"""Weighted sums of the same feature maps, in few passes over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def weighted_sums(terms: Sequence[Tensor], pairs: Sequence[tuple[int, int]], weights: Tensor) -> dict[int, Tensor]:
    """Several sums over the same terms: ``sum over pairs (j, t) of weights[pair] * terms[j]``, for each t.

    Nothing is saved for the backward pass but the terms and the weights.

    Args:
        terms: Feature maps of one shape.
        pairs: Which term goes into which sum.
        weights: Per pair, ``(pairs,)``.

    Returns:
        The sums by ``t``, of the terms' shape.
    """
    sums: tuple[Tensor, ...] = _WeightedSums.apply(weights, tuple(pairs), *terms)  # type: ignore[no-untyped-call]
    return dict(zip(_targets(pairs), sums, strict=True))


def _targets(pairs: Sequence[tuple[int, int]]) -> list[int]:
    return list(dict.fromkeys(target for _, target in pairs))


class _WeightedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, pairs: tuple[tuple[int, int], ...], *terms: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weights, *terms)
        ctx.pairs = pairs
        sums: dict[int, Tensor] = {}
        for (term, target), weight in zip(pairs, weights.unbind(), strict=True):
            _add(sums, target, terms[term], weight)
        return tuple(sums[target] for target in _targets(pairs))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weights, *terms = ctx.saved_tensors
        of_target = dict(zip(_targets(ctx.pairs), gradients, strict=True))
        by_terms: dict[int, Tensor] = {}
        for (term, target), weight in zip(ctx.pairs, weights.unbind(), strict=True):
            if ctx.needs_input_grad[2 + term]:
                _add(by_terms, term, of_target[target], weight)
        by_weights = None
        if ctx.needs_input_grad[0]:
            scratch = torch.empty_like(terms[0])
            by_weights = torch.stack(
                [torch.mul(terms[term], of_target[target], out=scratch).sum() for term, target in ctx.pairs]
            )
        return by_weights, None, *(by_terms.get(term) for term in range(len(terms)))


def _add(sums: dict[int, Tensor], key: int, x: Tensor, weight: Tensor) -> None:
    if key in sums:
        sums[key].addcmul_(x, weight)
    else:
        sums[key] = x * weight

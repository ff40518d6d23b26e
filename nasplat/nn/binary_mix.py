"""All binary operations that leave one state of a supernet's cell, computed together.

Mixed one by one, each operation of each edge costs a normalisation, a sign, a small grouped convolution, a PReLU and
several passes over memory. Together (see :func:`mix_binary`), operations share what they have in common, and the small
convolutions of all edges become a few large ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from nasplat.nn.binary import BinaryBlock, BinaryConv2d, BinaryFactorisedReduce, sign
from nasplat.nn.cell import Use
from nasplat.nn.embedding import Kernel, LayerShape, sum_centred
from nasplat.nn.prelu import prelu_sums
from nasplat.nn.weighted_sums import weighted_sums

_EMBED_UP_TO = 5
"""Extent of the largest kernel that merged kernels are written into. A dilated 5x5 one would make it 9x9, and all that
for 25 taps; beside a 5x5 kernel, a convolution of its own takes as long or less, and less memory."""

_Operation = TypeVar("_Operation", bound=nn.Module)


class _Term(NamedTuple, Generic[_Operation]):
    """An operation, the node that it leads to, and the place of its weight among all weights."""

    node: int
    operation: _Operation
    place: int


class _Activated(NamedTuple):
    """A feature map for ``prelu_sums``: the T nodes that its parts lead to, and groups of a shuffle that follows.

    ``slopes`` is ``(c, T)``, ``weights`` is ``(T,)``.
    """

    x: Tensor
    slopes: Tensor
    weights: Tensor
    nodes: tuple[int, ...]
    shuffle: int


def mix_binary(x: Tensor, uses: Mapping[int, Sequence[Use]], *, merged: bool = False) -> dict[int, Tensor]:
    """The same as ``nasplat.nn.cell.mix``, faster, for operations of a binary space.

    - Operations with one BatchNorm (``CellSpace.tie``) share the normalised input and its sign.
    - Equal convolutions of several edges are one grouped convolution; the learned scale is part of its kernel.
    - PReLU, mixture weight and sum are one function with a backward pass of its own (``prelu_sums``).
    - An operation without parameters, a pool, is computed once.
    - The shortcuts of an edge and its identity are one multiple of ``x``.

    Values and gradients are the same but for rounding. (With binary weights a convolution can be exactly 0; with the
    scale in its kernel it may be a rounding error off, where the PReLU has its other slope. A supernet's are real.)

    Operations are told by their class: ``BinaryBlock``, ``BinaryFactorisedReduce``, ``nn.Identity``; any other must
    have neither parameters nor buffers, and compute the same wherever it has the same name.

    Args:
        x: See :class:`nasplat.nn.cell.Mix`.
        uses: Likewise.
        merged: Sum the kernels of an edge's blocks, each times its weight, and let one PReLU follow the sum. The blocks
            of an edge must have one activation module. This is another function than the mixture, but where one block
            of an edge has weight 1 and the others 0.
    """
    blocks: list[_Term[BinaryBlock]] = []
    reduces: list[_Term[BinaryFactorisedReduce]] = []
    maps: dict[str, Tensor] = {}
    multiples: dict[tuple[int, str], list[int]] = {}
    listed = [(node, use) for node, of_node in uses.items() for use in of_node]
    for index, (node, (name, operation, _)) in enumerate(listed):
        if isinstance(operation, BinaryFactorisedReduce):
            reduces.append(_Term(node, operation, index))
            continue
        if isinstance(operation, BinaryBlock):
            blocks.append(_Term(node, operation, index))
            if not operation.shortcut:
                continue
        key = "x" if isinstance(operation, BinaryBlock | nn.Identity) else name
        if key not in maps:
            maps[key] = x if key == "x" else operation(x)
        multiples.setdefault((node, key), []).append(index)

    weights = torch.stack([use.weight for _, use in listed])
    see = _Inputs(x)
    activated = [
        *(
            (_merge if merged else _convolve)(see, alike, weights)
            for alike in _alike(blocks, _input_form if merged else _form)
        ),
        *(_reduce(see, alike, weights) for alike in _alike(reduces, lambda reduce: reduce.norm)),
    ]
    mixed = _sum_multiples(maps, multiples, weights)
    for alike in _grouped(activated, lambda part: (part.nodes, part.shuffle)):
        sums = prelu_sums(
            [part.x for part in alike],
            torch.stack([part.slopes for part in alike]),
            torch.stack([part.weights for part in alike]),
        )
        for node, y in zip(alike[0].nodes, sums, strict=True):
            if alike[0].shuffle > 1:
                y = functional.channel_shuffle(y, alike[0].shuffle)
            mixed[node] = mixed[node] + y if node in mixed else y
    return mixed


class _Inputs:
    """The state as convolutions see it: normalised once per BatchNorm, and squashed once per way to do so."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._normed: dict[nn.Module, Tensor] = {}
        self._squashed: dict[tuple[nn.Module, bool, bool], Tensor] = {}

    def __call__(self, norm: nn.Module, conv: BinaryConv2d) -> Tensor:
        key = (norm, conv.binary_activations, conv.tanh_activations)
        if key not in self._squashed:
            if norm not in self._normed:
                self._normed[norm] = norm(self._x)
            self._squashed[key] = conv.squash(self._normed[norm])
        return self._squashed[key]


def _input_form(block: BinaryBlock) -> Hashable:
    """Blocks that agree in this can be parts of one kernel."""
    conv = block.conv
    return block.norm, conv.stride, conv.groups, conv.binary_activations, conv.tanh_activations, _shuffle(block)


def _form(block: BinaryBlock) -> Hashable:
    """Blocks that agree in this can be parts of one convolution."""
    return _input_form(block), block.conv.kernel_size, block.conv.dilation, block.conv.binary_weights


def _shuffle(block: BinaryBlock) -> int:
    return block.shuffle.groups if isinstance(block.shuffle, nn.ChannelShuffle) else 1


_Item = TypeVar("_Item")


def _grouped(items: Iterable[_Item], key: Callable[[_Item], Hashable]) -> list[list[_Item]]:
    groups: dict[Hashable, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _alike(terms: Iterable[_Term[_Operation]], key: Callable[[_Operation], Hashable]) -> list[list[_Term[_Operation]]]:
    return _grouped(terms, lambda term: key(term.operation))


def _kernels(convs: Sequence[BinaryConv2d]) -> Tensor:
    """``(out_channels, T, in_channels / groups, k, k)``: kernels of equal shape, each times its scale."""
    kernels = torch.stack([conv.weight for conv in convs], dim=1)
    if convs[0].binary_weights:
        kernels = sign(kernels)
    return kernels * torch.stack([conv.scale for conv in convs], dim=1)[..., None, None, None]


def _slopes(activations: Iterable[nn.PReLU]) -> Tensor:
    return torch.stack([activation.weight for activation in activations], dim=1)


def _weights(terms: Sequence[_Term[_Operation]], weights: Tensor) -> Tensor:
    return weights[[term.place for term in terms]]


def _convolve(see: _Inputs, blocks: Sequence[_Term[BinaryBlock]], weights: Tensor) -> _Activated:
    """Blocks that differ in their weights alone."""
    first = blocks[0].operation
    conv = first.conv
    x = functional.conv2d(
        see(first.norm, conv),
        _kernels([block.operation.conv for block in blocks]).flatten(0, 1),
        None,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
    )
    return _Activated(
        x,
        _slopes(block.operation.activation for block in blocks),
        _weights(blocks, weights),
        tuple(block.node for block in blocks),
        _shuffle(first),
    )


def _reduce(see: _Inputs, reduces: Sequence[_Term[BinaryFactorisedReduce]], weights: Tensor) -> _Activated:
    """Factorised reduces: even and odd pixels make the first and the second half of the channels."""
    first = reduces[0].operation
    x = see(first.norm, first.conv_even)
    even = functional.conv2d(x, _kernels([r.operation.conv_even for r in reduces]).flatten(0, 1), stride=2)
    x = see(first.norm, first.conv_odd)
    odd = functional.conv2d(x[:, :, 1:, 1:], _kernels([r.operation.conv_odd for r in reduces]).flatten(0, 1), stride=2)
    height, width = x.shape[2] % 2, x.shape[3] % 2
    if height or width:
        odd = functional.pad(odd, (0, width, 0, height))
    return _Activated(
        torch.cat([even, odd], dim=1),
        _slopes(reduce.operation.activation for reduce in reduces),
        _weights(reduces, weights),
        tuple(reduce.node for reduce in reduces),
        1,
    )


def _merge(see: _Inputs, blocks: Sequence[_Term[BinaryBlock]], weights: Tensor) -> _Activated:
    """Blocks of one form of input: a kernel per edge up to 5x5, and a dilated one for what is larger."""
    first = blocks[0].operation
    of_node = {block.node: block.operation.activation for block in blocks}
    nodes = tuple(of_node)
    shape = LayerShape(
        first.conv.in_channels, first.conv.out_channels * len(nodes), first.conv.stride[0], first.conv.groups
    )
    embedded: list[Tensor] = []
    convolved: list[Tensor] = []
    x = see(first.norm, first.conv)
    for alike in _alike(blocks, _form):
        conv = alike[0].operation.conv
        kernels = _kernels([block.operation.conv for block in alike])
        kernels = kernels * _weights(alike, weights)[:, None, None, None]
        if len(alike) < len(nodes):
            places = torch.tensor([nodes.index(block.node) for block in alike], device=x.device)
            everywhere = kernels.new_zeros(kernels.shape[0], len(nodes), *kernels.shape[2:])
            kernels = everywhere.index_copy(1, places, kernels)
        kernel = Kernel((conv.kernel_size[0], conv.kernel_size[1]), conv.dilation[0])
        if kernel.extent[0] <= _EMBED_UP_TO:
            embedded.append(shape.embed(kernel, kernels.new_ones(1, 1, 1, 1), kernels.flatten(0, 1)))
        else:
            convolved.append(
                functional.conv2d(x, kernels.flatten(0, 1), None, conv.stride, conv.padding, conv.dilation, conv.groups)
            )
    if embedded:
        kernel_sum = sum_centred(embedded)
        convolved.append(
            functional.conv2d(x, kernel_sum, None, first.conv.stride, kernel_sum.shape[-1] // 2, 1, first.conv.groups)
        )
    return _Activated(
        sum(convolved[1:], convolved[0]),
        _slopes(of_node.values()),
        weights.new_ones(len(nodes)),
        nodes,
        _shuffle(first),
    )


def _sum_multiples(
    maps: Mapping[str, Tensor], multiples: Mapping[tuple[int, str], Sequence[int]], weights: Tensor
) -> dict[int, Tensor]:
    """Per node the sum of maps, each times the sum of the weights at its indices."""
    if not maps:
        return {}
    places = {name: place for place, name in enumerate(maps)}
    owners = [pair for pair, indices in enumerate(multiples.values()) for _ in indices]
    indices = [index for of_pair in multiples.values() for index in of_pair]
    summed = weights.new_zeros(len(multiples)).index_add(
        0, torch.tensor(owners, device=weights.device), weights[indices]
    )
    return weighted_sums(list(maps.values()), [(places[name], node) for node, name in multiples], summed)

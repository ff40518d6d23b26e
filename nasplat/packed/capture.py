"""From a model to a packed program: each call of its traced graph becomes operations, or is refused by name.

A BatchNorm in front of a binary convolution becomes thresholds; one behind a real convolution becomes its scale and
shift. Activations join the operation before them. What an operation is named after, and so what it computes, is the
last module or call that it stands for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional

from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.nn import BinaryConv2d, BinaryFactorisedReduce, ExpertBinaryConv2d
from nasplat.nn.prelu import PReLU
from nasplat.packed.graph import (
    Activation,
    Add,
    Affine,
    Argmax,
    BinaryConv,
    Concat,
    Conv,
    Linear,
    Mean,
    Operation,
    Pool,
    Program,
    Shape,
    Shuffle,
    Window,
    check_input,
    check_program,
    check_step,
)
from nasplat.packed.threshold import check_norm, threshold
from nasplat.packed.traced import BINARY, Traced, argument, refusal

Reals: TypeAlias = NDArray[np.float32]
Thresholds: TypeAlias = tuple[Reals, NDArray[np.bool_]]


def capture(model: nn.Module, example: Tensor) -> Program:
    """The packed program of a model.

    Binary convolutions are those of :mod:`nasplat.nn`. Around them there may be real convolutions, BatchNorms, ReLUs,
    PReLUs, pools, sums, concatenations, channel shuffles and linear layers.

    Args:
        model: In evaluation mode. It is not changed.
        example: ``(n, channels, height, width)``, float32. Only its shape matters, and ``n`` may be any from 1 up.

    Returns:
        The program for inputs of this channels, height and width.

    Raises:
        InvalidInputError: ``example`` is of another type or shape, the model does not take it, or a value is larger
            than a program may have (see :mod:`.graph`).
        UnsupportedError: Something in the model has no packed operation; the message names it.
    """
    if not isinstance(example, Tensor) or example.ndim != 4 or example.dtype != torch.float32 or len(example) == 0:
        got = f"{example.dtype} {tuple(example.shape)}" if isinstance(example, Tensor) else type(example).__name__
        raise InvalidInputError(f"example is {got}; legal: a float32 tensor (n, channels, height, width), n >= 1")
    channels, height, width = example.shape[1:]
    traced = Traced(model, (channels, height, width))
    return _Lowering(traced, (channels, height, width)).program()


class _Lowering:
    """The operations that a traced model becomes, made one node after another."""

    def __init__(self, traced: Traced, input_shape: Shape) -> None:
        self.traced = traced
        self.input_shape = input_shape
        self.shapes = check_input(input_shape)
        self.operations: list[Operation] = []
        self.values: dict[fx.Node, str] = {}
        """Names of the values of nodes. A node that an operation computes on its way has none."""
        self.normalised: dict[fx.Node, tuple[str, nn.BatchNorm2d]] = {}
        """BatchNorms that no operation before has swallowed: the value that they read, and the module."""
        self.swallowed: set[fx.Node] = set()
        """Nodes that are part of an operation made before."""

    def program(self) -> Program:
        """Lower every node."""
        for node in self.traced.graph.nodes:
            if node in self.swallowed or node.op == "output":
                continue
            if node.op == "placeholder":
                self.values[node] = self.traced.names[node]
                continue
            self._lower(node)
        output = self.traced.output
        program = Program(
            self.input_shape, tuple(self.operations), self.values[output], flat=len(self.traced.sizes[output]) == 2
        )
        check_program(program)
        return program

    def _lower(self, node: fx.Node) -> None:
        if node.op == "call_module":
            module = self.traced.module(node)
            of_module = _MODULES.get(type(module))
            if of_module is None:
                raise refusal(self.traced, node, "no packed operation for it", _legal())
            of_module(self, node, module)
            return
        found = _FUNCTIONS.get(node.target) if node.op == "call_function" else _METHODS.get(str(node.target))
        if found is None or node.op not in ("call_function", "call_method"):
            raise refusal(self.traced, node, "no packed operation for it", _legal())
        found(self, node)

    # What nodes read and make.

    def refuse(self, node: fx.Node, why: str, legal: str) -> UnsupportedError:
        """The error for a node."""
        return refusal(self.traced, node, why, legal)

    def source(self, node: fx.Node) -> fx.Node:
        """The one node that a node reads."""
        if len(node.all_input_nodes) != 1:
            raise self.refuse(node, f"it reads {len(node.all_input_nodes)} values", "one")
        return node.all_input_nodes[0]

    def x(self, node: fx.Node) -> str:
        """Name of the value of the one node that a node reads."""
        return self.values[self.source(node)]

    def add(self, operation: Operation, *nodes: fx.Node) -> str:
        """Append an operation.

        Args:
            operation: What to append.
            nodes: What it stands for, in order; the last one's value is the operation's. None for a part of a layer.

        Returns:
            Its name.
        """
        shape = check_step(operation, self.shapes)
        self.shapes[operation.name] = shape
        self.operations.append(operation)
        if nodes:
            self.swallowed.update(nodes)
            self.values[nodes[-1]] = operation.name
            size = self.traced.sizes[nodes[-1]][1:]
            if size != shape[: len(size)] or shape[len(size) :] not in ((), (1, 1)):
                raise self.refuse(nodes[-1], f"its value is {size}, and the packed operation's {shape}", "equal shapes")
        return operation.name

    def only_user(self, node: fx.Node) -> fx.Node | None:
        """The one node that reads a node; None with several, or where the model returns it."""
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0].op != "output" else None

    def called(self, node: fx.Node | None) -> nn.Module | None:
        """The module that a node calls; None for a call of anything else."""
        return self.traced.module(node) if node is not None and node.op == "call_module" else None

    def activation(self, node: fx.Node, channels: int) -> tuple[Reals | None, fx.Node]:
        """The slopes of the activation that alone reads a node, and its node; None and the node itself without one."""
        user = self.only_user(node)
        if user is None or not self.is_activation(user):
            return None, node
        return self.slope(user, channels), user

    def is_activation(self, node: fx.Node) -> bool:
        """Whether it is a ReLU or one with a slope."""
        if node.op == "call_module":
            return type(self.traced.module(node)) in _SLOPED
        return (node.op == "call_function" and node.target in _RELUS) or (node.op, node.target) == (
            "call_method",
            "relu",
        )

    def slope(self, node: fx.Node, channels: int) -> Reals:
        """Of an activation, per channel."""
        return self.slopes(node, self.called(node), channels)

    def slopes(self, node: fx.Node, module: nn.Module | None, channels: int) -> Reals:
        """Of an activation's module, or of a ReLU that is none."""
        if isinstance(module, nn.PReLU):
            return np.ascontiguousarray(np.broadcast_to(self.reals(node, "slope", module.weight), channels))
        return np.full(channels, module.negative_slope if isinstance(module, nn.LeakyReLU) else 0, np.float32)

    def reals(self, node: fx.Node, what: str, tensor: Tensor | None) -> Reals:
        """The numbers of a parameter, a copy."""
        assert tensor is not None
        array: Reals = tensor.detach().numpy().astype(np.float32, order="C", copy=True)
        if not np.isfinite(array).all():
            raise self.refuse(node, f"{what} holds numbers that are not finite", "finite ones")
        return array

    def factor_and_shift(self, node: fx.Node, norm: nn.BatchNorm2d) -> tuple[Reals, Reals]:
        """What a BatchNorm multiplies by and adds."""
        try:
            check_norm(norm)
        except UnsupportedError as error:
            raise UnsupportedError(f"module {node.target!r}: {error}") from error
        mean, variance = cast("Tensor", norm.running_mean).double(), cast("Tensor", norm.running_var).double()
        factor = (variance + norm.eps).rsqrt()
        if norm.affine:
            factor = factor * norm.weight.detach().double()
        shift = -mean * factor
        if norm.affine:
            shift = shift + norm.bias.detach().double()
        return self.reals(node, "the factor", factor.float()), self.reals(node, "the shift", shift.float())

    # Binary layers.

    def binary_conv(self, node: fx.Node, layer: nn.Module) -> None:
        """A binary convolution with one kernel, the normalisation before it and the activation after it."""
        assert isinstance(layer, BinaryConv2d)
        x, norm_node, norm = self.before_sign(node)
        thresholds = self.thresholds(node if norm_node is None else norm_node, norm, layer.in_channels)
        slope, last = self.activation(node, layer.out_channels)
        self.add(
            self.bits(node, self.traced.names[last], x, layer, layer.weight[None], thresholds, slope=slope),
            *self.chain(node, last),
        )

    def expert_conv(self, node: fx.Node, layer: nn.Module) -> None:
        """The same with experts: gate and squeeze-and-excitation come first."""
        assert isinstance(layer, ExpertBinaryConv2d)
        x, norm_node, norm = self.before_sign(node)
        thresholds = self.thresholds(node if norm_node is None else norm_node, norm, layer.in_channels)
        slope, last = self.activation(node, layer.out_channels)
        name = self.traced.names[node]
        gate = None if layer.single else layer.gate
        means = "" if gate is None and layer.excite is None else self.means(name, x, norm_node, norm)
        pick = factor = None
        if gate is not None:
            logits = self.linear_of(node, f"{name}.gate", means, "gate", gate)
            pick = self.add(Argmax(name=f"{name}.pick", x=logits))
        if layer.excite is not None:
            parts = [type(part) for part in layer.excite]
            if parts != [nn.Linear, nn.ReLU, nn.Linear, nn.Sigmoid]:
                found = ", ".join(part.__qualname__ for part in parts)
                raise self.refuse(node, f"excite is {found}", "Linear, ReLU, Linear, Sigmoid")
            hidden = self.linear_of(node, f"{name}.excite.1", means, "excite.0", layer.excite[0], "relu")
            factor = self.linear_of(node, f"{name}.excite", hidden, "excite.2", layer.excite[2], "sigmoid")
        weight = layer.weight[:1] if gate is None else layer.weight
        conv = self.bits(node, self.traced.names[last], x, layer, weight, thresholds, slope=slope)
        self.add(replace(conv, pick=pick, factor=factor), *self.chain(node, last))

    def factorised_reduce(self, node: fx.Node, layer: nn.Module) -> None:
        """Two binary 1x1 convolutions of stride 2, the second one from pixel 1 on, side by side."""
        assert isinstance(layer, BinaryFactorisedReduce)
        if not isinstance(layer.activation, nn.PReLU) or type(layer.activation) not in _SLOPED:
            raise self.refuse(node, f"activation is a {type(layer.activation).__qualname__}", "PReLU")
        x, name, at = self.x(node), self.traced.names[node], layer.conv_even.out_channels
        thresholds = self.thresholds(node, layer.norm, layer.conv_even.in_channels)
        slope = self.slopes(node, layer.activation, at + layer.conv_odd.out_channels)
        even = self.bits(
            node, f"{name}.even", x, layer.conv_even, layer.conv_even.weight[None], thresholds, slope=slope[:at]
        )
        odd = self.bits(
            node, f"{name}.odd", x, layer.conv_odd, layer.conv_odd.weight[None], thresholds, slope=slope[at:]
        )
        odd = replace(odd, window=odd.window._replace(padding=(-1, -1)))
        self.add(Concat(name=name, parts=(self.add(even), self.add(odd))), node)

    def bits(
        self,
        node: fx.Node,
        name: str,
        x: str,
        layer: BinaryConv2d,
        weight: Tensor,
        thresholds: Thresholds,
        *,
        slope: Reals | None,
    ) -> BinaryConv:
        """A binary convolution with kernels ``(k, out, in / groups, h, w)``, without pick and factor."""
        for switch in ("binary_activations", "binary_weights"):
            if not getattr(layer, switch):
                raise self.refuse(node, f"{switch} is False, so that it is not binary", "True, by set_binarisation")
        self.check_padding(node, layer)
        array = weight.detach().numpy()
        if np.isnan(array).any():
            raise self.refuse(node, "weight holds NaN", "numbers")
        kernels, channels, depth = array.shape[:3]
        threshold_of, flip = thresholds
        # Where the comparison of an input channel is turned round, so are the weights that meet it.
        flipped = np.repeat(flip.reshape(layer.groups, depth), channels // layer.groups, axis=0)
        signs = (array >= 0) ^ flipped[None, :, :, None, None]
        rows = signs.transpose(0, 1, 3, 4, 2).reshape(kernels * channels, -1)
        return BinaryConv(
            name=name,
            x=x,
            channels=channels,
            groups=layer.groups,
            window=self.window(node, layer, self.traced.sizes[node]),
            experts=kernels,
            threshold=threshold_of,
            weight=np.packbits(rows, axis=1, bitorder="little"),
            scale=self.reals(node, "scale", layer.scale),
            slope=slope,
        )

    def thresholds(self, node: fx.Node, norm: nn.Module | None, channels: int) -> Thresholds:
        """Of a normalisation, at its node, or of none."""
        try:
            return threshold(norm, channels)
        except UnsupportedError as error:
            raise UnsupportedError(f"module {node.target!r}: {error}") from error

    def means(self, name: str, x: str, norm_node: fx.Node | None, norm: nn.BatchNorm2d | None) -> str:
        """Channel means of a normalised value; the normalisation is linear, so it comes after the mean."""
        if norm is None or norm_node is None:
            return self.add(Mean(name=f"{name}.means", x=x))
        pooled = self.add(Mean(name=f"{name}.pooled", x=x))
        scale, shift = self.factor_and_shift(norm_node, norm)
        return self.add(Affine(name=f"{name}.means", x=pooled, scale=scale, shift=shift))

    def before_sign(self, node: fx.Node) -> tuple[str, fx.Node | None, nn.BatchNorm2d | None]:
        """What a binary layer reads: a value, and the normalisation between them, if any."""
        source = self.source(node)
        if source in self.normalised:
            x, norm = self.normalised[source]
            return x, source, norm
        return self.values[source], None, None

    # Real layers.

    def batch_norm(self, node: fx.Node, norm: nn.Module) -> None:
        """A normalisation that is not part of a real convolution: thresholds of binary layers, or an affine map."""
        assert isinstance(norm, nn.BatchNorm2d)
        x = self.x(node)
        self.normalised[node] = x, norm
        if self.only_for_signs(node):
            return
        scale, shift = self.factor_and_shift(node, norm)
        slope, last = self.activation(node, len(scale))
        self.add(
            Affine(name=self.traced.names[last], x=x, scale=scale, shift=shift, slope=slope), *self.chain(node, last)
        )

    def only_for_signs(self, node: fx.Node) -> bool:
        """Whether only binary layers read a value."""
        return all(isinstance(self.called(user), BINARY) for user in node.users)

    def conv(self, node: fx.Node, layer: nn.Module) -> None:
        """A real convolution, the normalisation and the activation after it."""
        assert isinstance(layer, nn.Conv2d)
        self.check_padding(node, layer)
        window = self.window(node, layer, self.traced.sizes[node])
        scale, shift = None, None if layer.bias is None else self.reals(node, "bias", layer.bias)
        nodes, user = [node], self.only_user(node)
        if user is not None and type(norm := self.called(user)) is nn.BatchNorm2d and not self.only_for_signs(user):
            scale, added = self.factor_and_shift(user, norm)
            if shift is not None:
                added = self.reals(user, "the shift", torch.from_numpy(added + scale.astype(np.float64) * shift))
            shift = added
            nodes.append(user)
        slope, last = self.activation(nodes[-1], layer.out_channels)
        if last is not nodes[-1]:
            nodes.append(last)
        self.add(
            Conv(
                name=self.traced.names[last],
                x=self.x(node),
                channels=layer.out_channels,
                groups=layer.groups,
                window=window,
                weight=self.reals(node, "weight", layer.weight),
                scale=scale,
                shift=shift,
                slope=slope,
            ),
            *nodes,
        )

    def linear(self, node: fx.Node, layer: nn.Module) -> None:
        """A linear layer of vectors, and the ReLU or sigmoid after it."""
        self.check_rank(node, 2)
        user = self.only_user(node)
        activation: Activation = "none"
        if user is not None and isinstance(self.called(user), nn.Sigmoid):
            activation = "sigmoid"
        elif user is not None and self.is_activation(user) and not isinstance(self.called(user), _WITH_SLOPE):
            activation = "relu"
        last = node if user is None or activation == "none" else user
        self.linear_of(node, self.traced.names[last], self.x(node), "", layer, activation, *self.chain(node, last))

    def linear_of(
        self,
        node: fx.Node,
        name: str,
        x: str,
        path: str,
        layer: nn.Module,
        activation: Activation = "none",
        *nodes: fx.Node,
    ) -> str:
        """A linear layer that is a node, or part of one under a path."""
        if type(layer) is not nn.Linear:
            raise self.refuse(node, f"{path} is a {type(layer).__qualname__}", "torch.nn.Linear")
        within = f"{path}." if path else ""
        return self.add(
            Linear(
                name=name,
                x=x,
                channels=layer.out_features,
                activation=activation,
                weight=self.reals(node, f"{within}weight", layer.weight),
                shift=None if layer.bias is None else self.reals(node, f"{within}bias", layer.bias),
            ),
            *nodes,
        )

    def apply_activation(self, node: fx.Node, module: nn.Module | None = None) -> None:
        """An activation by itself."""
        x = self.x(node)
        self.add(Affine(name=self.traced.names[node], x=x, slope=self.slope(node, self.shapes[x][0])), node)

    # Pools and means.

    def max_pool(self, node: fx.Node, pool: nn.Module) -> None:
        """A maximum."""
        assert isinstance(pool, nn.MaxPool2d)
        if pool.return_indices:
            raise self.refuse(node, "it returns indices", "return_indices=False")
        if _pair(pool.dilation) != (1, 1):
            raise self.refuse(node, f"dilation is {pool.dilation}", "1")
        self.pool(node, "max", pool.kernel_size, pool.stride, pool.padding, count=False)

    def average_pool(self, node: fx.Node, pool: nn.Module) -> None:
        """An average."""
        assert isinstance(pool, nn.AvgPool2d)
        if pool.divisor_override is not None:
            raise self.refuse(node, f"divisor_override is {pool.divisor_override}", "None")
        padding, count = _pair(pool.padding), pool.count_include_pad
        if padding == (0, 0):
            # What ceil_mode lets stand out is not counted either way.
            count = False
        source = self.traced.sizes[self.source(node)][2:]
        for side, out, kernel, stride, pad in zip(
            source,
            self.traced.sizes[node][2:],
            _pair(pool.kernel_size),
            _pair(pool.stride),
            padding,
            strict=True,
        ):
            if count and (out - 1) * stride + kernel > side + 2 * pad:
                raise self.refuse(
                    node,
                    "with ceil_mode, a window stands out over its padding, of which some counts and some does not",
                    "count_include_pad=False, or ceil_mode=False",
                )
        self.pool(node, "average", pool.kernel_size, pool.stride, padding, count=count)

    def pool(
        self, node: fx.Node, mode: Literal["max", "average"], kernel: Any, stride: Any, padding: Any, *, count: bool
    ) -> None:
        """A pool of either kind."""
        self.check_rank(node, 4)
        window = Window(
            _pair(kernel), _size(self.traced.sizes[node]), self.one(node, "stride", stride), 1, _pair(padding)
        )
        self.add(
            Pool(name=self.traced.names[node], x=self.x(node), mode=mode, window=window, count_padding=count), node
        )

    def global_average(self, node: fx.Node, pool: nn.Module) -> None:
        """An average over all pixels, by the pool that is told so."""
        assert isinstance(pool, nn.AdaptiveAvgPool2d)
        self.adaptive(node, pool.output_size)

    def adaptive_function(self, node: fx.Node) -> None:
        """The same as a function."""
        self.adaptive(node, argument(node, 1, "output_size", None))

    def adaptive(self, node: fx.Node, output_size: Any) -> None:
        """The same, told an output size."""
        self.check_rank(node, 4)
        if output_size not in (1, (1, 1), [1, 1]):
            raise self.refuse(node, f"output_size is {output_size}", "1")
        self.add(Mean(name=self.traced.names[node], x=self.x(node)), node)

    def mean(self, node: fx.Node) -> None:
        """A mean over height and width."""
        self.check_rank(node, 4)
        dims = argument(node, 1, ("dim", "axis"), None)
        given = dims if isinstance(dims, (tuple, list)) else (dims,)
        if any(not isinstance(dim, int) for dim in given) or sorted(dim % 4 for dim in given) != [2, 3]:
            raise self.refuse(node, f"dim is {dims}", "(2, 3)")
        self.add(Mean(name=self.traced.names[node], x=self.x(node)), node)

    # Sums and moves.

    def sum(self, node: fx.Node) -> None:
        """Two values of one shape."""
        terms = [argument(node, 0, "input", None), argument(node, 1, "other", None)]
        if len(node.args) > 2 or argument(node, 2, "alpha", 1) != 1:
            raise self.refuse(node, "alpha is not 1", "alpha=1")
        if not all(isinstance(term, fx.Node) for term in terms):
            number = next(term for term in terms if not isinstance(term, fx.Node))
            raise self.refuse(node, f"it adds {number!r}", "two tensors of equal shape")
        sizes = [self.traced.sizes[term] for term in terms]
        if sizes[0] != sizes[1]:
            raise self.refuse(node, f"it adds tensors {sizes[0]} and {sizes[1]}", "equal shapes")
        x, y = (self.values[term] for term in terms)
        self.add(Add(name=self.traced.names[node], x=x, y=y), node)

    def concat(self, node: fx.Node) -> None:
        """Along the channels."""
        parts, dim = argument(node, 0, "tensors", ()), argument(node, 1, ("dim", "axis"), 0)
        sizes = [self.traced.sizes[part] for part in parts]
        if len({len(size) for size in sizes}) != 1 or dim % len(sizes[0]) != 1:
            raise self.refuse(
                node, f"it joins tensors {', '.join(map(str, sizes))} along dimension {dim}", "dimension 1"
            )
        self.add(Concat(name=self.traced.names[node], parts=tuple(self.values[part] for part in parts)), node)

    def flatten(self, node: fx.Node, module: nn.Module | None = None) -> None:
        """Of one pixel, which changes nothing."""
        if isinstance(module, nn.Flatten):
            ends: tuple[Any, Any] = module.start_dim, module.end_dim
        else:
            ends = argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
        size = self.traced.sizes[self.source(node)]
        if self.traced.sizes[node] != size[:2] or ends[0] != 1:
            raise self.refuse(
                node,
                f"it flattens {size} from dimension {ends[0]} to {ends[1]}",
                "(n, channels, 1, 1) from dimension 1 on",
            )
        self.values[node] = self.x(node)

    def shuffle(self, node: fx.Node, module: nn.Module | None = None) -> None:
        """Of channels."""
        self.check_rank(node, 4)
        groups = module.groups if isinstance(module, nn.ChannelShuffle) else argument(node, 1, "groups", None)
        self.add(Shuffle(name=self.traced.names[node], x=self.x(node), groups=int(groups)), node)

    # What several need.

    def chain(self, node: fx.Node, last: fx.Node) -> tuple[fx.Node, ...]:
        """A node and the one that follows it, if it is another."""
        return (node,) if last is node else (node, last)

    def check_rank(self, node: fx.Node, rank: int) -> None:
        """Refuse tensors of another number of dimensions."""
        size = self.traced.sizes[self.source(node)]
        if len(size) != rank:
            raise self.refuse(node, f"its input is {size}", f"{rank} dimensions")

    def check_padding(self, node: fx.Node, layer: nn.Conv2d) -> None:
        """Refuse padding with anything but zeros."""
        if layer.padding_mode != "zeros":
            raise self.refuse(node, f"padding_mode is {layer.padding_mode!r}", "'zeros'")

    def window(self, node: fx.Node, layer: nn.Conv2d, size: tuple[int, ...]) -> Window:
        """Where a convolution looks."""
        self.check_rank(node, 4)
        kernel, dilation = _pair(layer.kernel_size), _pair(layer.dilation)
        # A side of one tap has no dilation.
        dilated = {step for side, step in zip(kernel, dilation, strict=True) if side > 1} or {1}
        if len(dilated) > 1:
            raise self.refuse(node, f"dilation is {dilation}", "one for both directions")
        if layer.padding == "same":
            padding = tuple((side - 1) * step // 2 for side, step in zip(kernel, dilation, strict=True))
        else:
            padding = (0, 0) if layer.padding == "valid" else _pair(layer.padding)
        return Window(
            kernel, _size(size), self.one(node, "stride", layer.stride), dilated.pop(), cast("tuple[int, int]", padding)
        )

    def one(self, node: fx.Node, name: str, values: Any) -> int:
        """What is the same in both directions."""
        pair = _pair(values)
        if pair[0] != pair[1]:
            raise self.refuse(node, f"{name} is {pair}", "one for both directions")
        return pair[0]


def _pair(values: Any) -> tuple[int, int]:
    if isinstance(values, int):
        return values, values
    first, second = values
    return int(first), int(second)


def _size(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[2], shape[3]


_RELUS = (functional.relu, torch.relu)
_WITH_SLOPE = (nn.PReLU, nn.LeakyReLU)
_SLOPED = (nn.ReLU, nn.PReLU, PReLU, nn.LeakyReLU)

_MODULES: Mapping[type[nn.Module], Callable[[_Lowering, fx.Node, nn.Module], None]] = {
    BinaryConv2d: _Lowering.binary_conv,
    ExpertBinaryConv2d: _Lowering.expert_conv,
    BinaryFactorisedReduce: _Lowering.factorised_reduce,
    nn.BatchNorm2d: _Lowering.batch_norm,
    nn.Conv2d: _Lowering.conv,
    nn.Linear: _Lowering.linear,
    nn.MaxPool2d: _Lowering.max_pool,
    nn.AvgPool2d: _Lowering.average_pool,
    nn.AdaptiveAvgPool2d: _Lowering.global_average,
    nn.Flatten: _Lowering.flatten,
    nn.ChannelShuffle: _Lowering.shuffle,
    **dict.fromkeys(_SLOPED, _Lowering.apply_activation),
}

_FUNCTIONS: Mapping[Any, Callable[[_Lowering, fx.Node], None]] = {
    operator.add: _Lowering.sum,
    torch.add: _Lowering.sum,
    **dict.fromkeys(_RELUS, _Lowering.apply_activation),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _Lowering.concat),
    torch.flatten: _Lowering.flatten,
    torch.mean: _Lowering.mean,
    torch.channel_shuffle: _Lowering.shuffle,
    functional.channel_shuffle: _Lowering.shuffle,
    functional.adaptive_avg_pool2d: _Lowering.adaptive_function,
}

_METHODS: Mapping[str, Callable[[_Lowering, fx.Node], None]] = {
    "add": _Lowering.sum,
    "relu": _Lowering.apply_activation,
    "flatten": _Lowering.flatten,
    "mean": _Lowering.mean,
}


def _legal() -> list[str]:
    modules = [kind.__name__ for kind in _MODULES]
    calls = ["+", "cat", "flatten", "mean", "relu", "channel_shuffle", "adaptive_avg_pool2d"]
    return [*dict.fromkeys(modules), "Identity", "Dropout", "Sigmoid after Linear", *calls]

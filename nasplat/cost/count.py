"""Counts what one forward pass computes, and what a network weighs, without measuring anything.

One example runs through a copy of the network, and every operator that torch executes is seen, whether a module or a
function called it. Conventions (those of the binary literature, arXiv:2003.01711):

* one MAC is one multiply-accumulate of a convolution or a matrix product; a bias is not counted;
* a binary MAC (BOP) is one of a convolution between signs, and 64 of them weigh as much as one other operation;
* FLOPs are real MACs, not twice their number, plus element-wise operations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.nn.binary import BinaryConv2d

if TYPE_CHECKING:
    import pandas as pd

BOPS_PER_OP = 64
"""Binary multiply-accumulates that count as one operation: the bits of a machine word."""

MODULE_COLUMNS = (
    "module", "type", "output", "calls", "params", "macs", "bops", "conv_macs_real", "flops", "ops", "model_bytes",
    "uncounted",
)  # fmt: skip
"""Of :func:`count_modules`."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names of torch operators, without the underscore that marks the in-place variant.
_FREE = _names(
    """
    alias arange argmax argmin as_strided bernoulli bitwise_and bitwise_not bitwise_or cat channel_shuffle clone
    constant_pad_nd contiguous copy detach detach_copy embedding empty empty_like empty_permuted empty_strided eq
    exponential fill flip full full_like gather ge gt index index_put index_select isfinite isinf isnan le
    lift_fresh lift_fresh_copy logical_and logical_not logical_or lt masked_fill native_dropout ne new_empty
    new_empty_strided new_full new_ones new_zeros nonzero normal one_hot ones ones_like pixel_shuffle
    pixel_unshuffle rand rand_like randint randn randn_like randperm reflection_pad1d reflection_pad2d
    reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d resize roll
    scalar_tensor set sign slice_scatter split_with_sizes_copy stack _to_copy tril triu uniform unsafe_chunk
    unsafe_split unsafe_split_with_sizes _unsafe_view upsample_nearest1d upsample_nearest2d upsample_nearest3d
    where zero zeros zeros_like
    """
)
_ARITHMETIC = _names(
    """
    abs add addcdiv addcmul clamp div lerp maximum minimum mul neg rsub sub
    """
)
_NORM_OR_ACTIVATION = _names(
    """
    batch_norm _batch_norm_no_update _batch_norm_with_update cudnn_batch_norm elu _fused_rms_norm gelu glu
    hardswish hardtanh leaky_relu _log_softmax miopen_batch_norm native_batch_norm _native_batch_norm_legit
    _native_batch_norm_legit_no_training native_group_norm native_layer_norm _prelu_kernel relu silu _softmax
    softplus
    """
)
_POOL = _names(
    """
    avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices
    max_pool3d max_pool3d_with_indices mkldnn_max_pool2d mkldnn_max_pool3d
    """
)
_REDUCTION = _names(
    """
    adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d amax
    amin cumsum linalg_vector_norm logsumexp max mean min norm prod std std_mean sum var var_mean
    """
)


@dataclass(frozen=True)
class Counts:
    """What one example costs. All integers are exact under the conventions above.

    Attributes:
        params: Number of parameters.
        macs: Multiply-accumulates of convolutions and matrix products, real and binary.
        bops: Those of convolutions with binary activations and binary weights.
        conv_macs_real: The others: real convolutions, linear layers, matrix products.
        flops: ``conv_macs_real`` plus element-wise operations.
        ops: ``flops + bops / 64``.
        model_bytes: Binary weights at one bit each, rounded up per tensor; parameters and buffers otherwise as stored.
        uncounted: Operators that this module has no rule for, as ``module.path: operator``. Empty means that nothing
            was left out.
    """

    params: int
    macs: int
    bops: int
    conv_macs_real: int
    flops: int
    ops: float
    model_bytes: int
    uncounted: tuple[str, ...] = ()


def count(model: nn.Module, example: Tensor, *, elementwise: int = 1) -> Counts:
    """Count the operations of one example, in evaluation mode, and the size of the model.

    The model is copied first, and stays as it was. Shapes are all that matters: on the ``meta`` device nothing is
    computed.

    Element-wise work, per element of the output: a sum, product or scale is 1 operation; a normalisation or an
    activation ``elementwise``; a pool the size of its window. A reduction is 1 per element of its input. Comparisons,
    signs, padding, indexing and copies are free. Integer tensors are not counted.

    Args:
        model: Takes ``example``. A binary convolution counts as binary while both of its flags are on.
        example: Shape ``(1, ...)``, on the model's device.
        elementwise: Operations per element of a normalisation or activation, from 0 up. Authors differ: 1 or 2.

    Raises:
        InvalidInputError: ``example`` is not one example, or ``elementwise`` is negative.
        UnsupportedError: The model cannot be copied.
    """
    own, counter = _counted(model, example, elementwise)
    tallies = counter.tallies.values()
    bops, real_macs = sum(one.bops for one in tallies), sum(one.real_macs for one in tallies)
    flops = real_macs + sum(one.elements for one in tallies)
    return Counts(
        params=sum(parameter.numel() for parameter in own.parameters()),
        macs=bops + real_macs,
        bops=bops,
        conv_macs_real=real_macs,
        flops=flops,
        ops=flops + bops / BOPS_PER_OP,
        model_bytes=_model_bytes(own),
        uncounted=tuple(counter.uncounted),
    )


def count_modules(model: nn.Module, example: Tensor, *, elementwise: int = 1) -> pd.DataFrame:
    """Count as :func:`count` does, module by module: what each does itself, without the modules that it holds.

    So the columns add up to what :func:`count` gives. A module that is called several times, under whatever names, is
    one row. A parameter that several modules share belongs to the first of them.

    Args:
        model: As of :func:`count`.
        example: As of :func:`count`.
        elementwise: As of :func:`count`.

    Returns:
        A row for each module that holds or computes something, and for each called one that holds no other, in the
        order of ``named_modules``. Columns: ``module`` (its path; empty for the network itself), ``type``, ``output``
        (shape of its last result; empty where it gave no tensor), ``calls``, ``params``, ``macs``, ``bops``,
        ``conv_macs_real``, ``flops``, ``ops``, ``model_bytes``, ``uncounted`` (operators without a rule, separated by
        blanks).

    Raises:
        InvalidInputError: As of :func:`count`.
        UnsupportedError: As of :func:`count`.
    """
    import pandas as pd

    own, counter = _counted(model, example, elementwise)
    params = dict.fromkeys(counter.tallies, 0)
    for name, parameter in own.named_parameters():
        params[_owner(name, params)] += parameter.numel()
    sizes = dict.fromkeys(counter.tallies, 0)
    one_bit = _one_bit(own)
    names = {id(tensor): name for name, tensor in reversed(own.state_dict(keep_vars=True).items())}
    for key, tensor in _stored(own).items():
        sizes[_owner(names[key], sizes)] += _stored_bytes(tensor, one_bit)
    rows = []
    for name, module in own.named_modules():
        tally = counter.tallies[name]
        flops = tally.real_macs + tally.elements
        leaf = next(module.children(), None) is None
        if not (params[name] or sizes[name] or tally.bops or flops or tally.uncounted or (leaf and tally.calls)):
            continue
        rows.append(
            {
                "module": name,
                "type": type(module).__name__,
                "output": tally.output,
                "calls": tally.calls,
                "params": params[name],
                "macs": tally.bops + tally.real_macs,
                "bops": tally.bops,
                "conv_macs_real": tally.real_macs,
                "flops": flops,
                "ops": flops + tally.bops / BOPS_PER_OP,
                "model_bytes": sizes[name],
                "uncounted": " ".join(tally.uncounted),
            }
        )
    return pd.DataFrame(rows, columns=MODULE_COLUMNS)


def _owner(name: str, modules: Mapping[str, Any]) -> str:
    """The module that a name of the state dict belongs to."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def _counted(model: nn.Module, example: Tensor, elementwise: int) -> tuple[nn.Module, _Counter]:
    """A copy of the model, and what it did with the example."""
    if example.ndim == 0 or example.shape[0] != 1:
        raise InvalidInputError(f"count takes one example: got shape {tuple(example.shape)}; legal: (1, ...)")
    if elementwise < 0:
        raise InvalidInputError(f"elementwise is {elementwise}; legal: an integer from 0 up")
    try:
        model = copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be counted, because copy.deepcopy fails on it: {error}"
        ) from error
    model.eval()
    counter = _Counter(model, elementwise)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # The fused attention layer is one operator without a rule; its parts have rules.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        devices = [example.device] if example.is_cuda else []
        with torch.random.fork_rng(devices), torch.no_grad(), counter:
            model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return model, counter


def _model_bytes(model: nn.Module) -> int:
    one_bit = _one_bit(model)
    return sum(_stored_bytes(tensor, one_bit) for tensor in _stored(model).values())


def _one_bit(model: nn.Module) -> set[int]:
    """Identities of the weights that are stored as one bit each."""
    return {id(layer.weight) for layer in model.modules() if isinstance(layer, BinaryConv2d) and layer.binary_weights}


def _stored(model: nn.Module) -> dict[int, Tensor]:
    """Tensors of the state dict by identity: shared ones have several names there and are stored once."""
    return {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor)}


def _stored_bytes(tensor: Tensor, one_bit: Set[int]) -> int:
    return -(-tensor.numel() // 8) if id(tensor) in one_bit else tensor.numel() * tensor.element_size()


@dataclass
class _Tally:
    """What one module did itself."""

    bops: int = 0
    real_macs: int = 0
    elements: int = 0
    calls: int = 0
    output: tuple[int, ...] = ()
    uncounted: dict[str, None] = field(default_factory=dict)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator that runs while it is active, and in which module of ``model``."""

    def __init__(self, model: nn.Module, elementwise: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elementwise = elementwise
        self.tallies: dict[str, _Tally] = {name: _Tally() for name, _ in model.named_modules()}
        self.uncounted: dict[str, None] = {}
        self._sign: Tensor | None = None
        self._running: list[tuple[str, nn.Module]] = [("", model)]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._enter(name, module), prepend=True)
            module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, name: str, module: nn.Module) -> Callable[..., None]:
        return lambda *_: self._running.append((name, module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        tally = self.tallies[self._running.pop()[0]]
        tally.calls += 1
        made = _first_tensor([output])
        tally.output = () if made is None else tuple(made.shape)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self._count(func, args, kwargs or {}, output)
        return output

    def _count(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        module_name, module = self._running[-1]
        tally = self.tallies[module_name]
        namespace, _, name = func._schema.name.partition("::")
        name = name.removesuffix("_")
        if func._overloadpacket in flop_registry:
            # Torch counts two operations for each multiply-accumulate.
            macs = flop_registry[func._overloadpacket](*args, **kwargs, out_val=output) // 2
            if isinstance(module, BinaryConv2d) and module.is_binary:
                tally.bops += macs
            else:
                tally.real_macs += macs
            return
        if name.startswith("_scaled_dot_product") and namespace == "aten":
            flops = sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)  # type: ignore[no-untyped-call]
            tally.real_macs += flops // 2
            return
        made = _first_tensor([output])
        if func is torch.ops.aten.add_.Tensor and args[0] is self._sign:
            # How nasplat.nn.sign makes zero positive. A sign is one bit, and free.
            return
        if name == "sign":
            self._sign = made
        if namespace == "prim" or made is None or func.is_view or name in _FREE or not _is_real(made):
            return
        if name in _ARITHMETIC:
            tally.elements += made.numel()
        elif name in _POOL:
            tally.elements += made.numel() * _window(name, args)
        elif name in _REDUCTION:
            read = _first_tensor(args)
            assert read is not None
            tally.elements += read.numel()
        elif name in _NORM_OR_ACTIVATION or torch.Tag.pointwise in func.tags:
            tally.elements += made.numel() * self.elementwise
        else:
            tally.uncounted[f"{namespace}.{name}"] = None
            self.uncounted[f"{module_name or type(module).__name__}: {namespace}.{name}"] = None


def _first_tensor(values: Iterable[Any]) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, list | tuple) and (inner := _first_tensor(value)) is not None:
            return inner
    return None


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _window(name: str, args: Sequence[Any]) -> int:
    sides = args[1] if isinstance(args[1], list | tuple) else [args[1]]
    dimensions = int(name[name.index("pool") + len("pool")])
    return math.prod(sides) if len(sides) == dimensions else int(sides[0]) ** dimensions

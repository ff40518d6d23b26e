"""A model as a graph of calls whose values have names: what packing reads, and what a packed program is compared with.

Both use one traced graph, so that a name means the same value on both sides.
"""

from __future__ import annotations

import copy
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.nn import BinaryConv2d, BinaryFactorisedReduce, ExpertBinaryConv2d
from nasplat.nn.prelu import PReLU
from nasplat.packed.graph import INPUT

BINARY = (BinaryConv2d, ExpertBinaryConv2d)
"""Layers that take the sign of their input."""

_LEAVES = (BinaryConv2d, BinaryFactorisedReduce, PReLU)
"""Modules that the graph calls whole, subclasses and all of torch.nn besides."""

_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)
"""Modules that, in evaluation, hand on what they get."""


class Traced:
    """A copy of a model, the graph of its calls, and a name for each value.

    The name of what a module makes is the module's path. What a function or method makes has fx's name of the node
    (``add_3``). A module's second call has ``#2`` after its path, and so on. Identities are taken out.

    Within a layer that becomes several operations, a value is named after the layer, here ``L``:

    - expert convolution: ``L.pooled`` and ``L.means``, the channel means before and after the normalisation in front of
      it (without one, only the latter); ``L.gate`` and ``L.pick``, the gate's logits and the expert picked;
      ``L.excite.1`` and ``L.excite``, the hidden layer and the factors of squeeze-and-excitation;
    - factorised reduce: ``L.even`` and ``L.odd``, the two parts of its output.

    Attributes:
        graph: Of calls, in order.
        names: Of the values of its nodes.
        sizes: Shapes of those values for a batch of 1.
        output: The node whose value the model returns.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        """Trace a model.

        Args:
            model: In evaluation mode. It is copied, and not changed.
            shape: Of one example, ``(channels, height, width)``.

        Raises:
            InvalidInputError: The model does not take such an example.
            UnsupportedError: It is in training mode, has hooks or numbers of another type than float32, cannot be
                traced, or computes something else than its trace.
        """
        _check_model(model)
        root = copy.deepcopy(model).cpu()
        if _is_leaf(root):
            root = nn.Sequential(OrderedDict(model=root))
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        expected = _computed(root, x)
        self._module = _trace(root)
        self.graph = self._module.graph
        self._simplify()
        self.names = self._name()
        self.output = self._output()
        self.sizes: dict[fx.Node, tuple[int, ...]] = {}
        recorder = _Recorder(self)
        with torch.no_grad():
            found = recorder.run(x)
        for node, value in recorder.of_nodes.items():
            if not isinstance(value, Tensor) or value.dtype != torch.float32:
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise refusal(self, node, f"its value is {kind}", "a float32 tensor")
            self.sizes[node] = tuple(value.shape)
        if not _same(found, expected):
            raise UnsupportedError(
                f"{type(model).__name__} computes something else than the calls that tracing it shows; legal: a "
                "forward() that depends on the input's values only through the layers, and changes nothing in place "
                "that is used again"
            )

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self._module.get_submodule(str(node.target))

    def run(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute every value that has a name.

        Args:
            x: A batch ``(n, channels, height, width)``, float32, on the CPU.

        Returns:
            What the model returns, and values by name, :data:`INPUT` included: ``(n, c, h, w)``, where the model has
            ``(n, c)`` as ``(n, c, 1, 1)``; picks are integers ``(n,)``.
        """
        recorder = _Recorder(self)
        with torch.no_grad():
            y: Tensor = recorder.run(x)
        values = {self.names[node]: value for node, value in recorder.of_nodes.items()} | recorder.within
        return y, {name: value[:, :, None, None] if value.ndim == 2 else value for name, value in values.items()}

    def _simplify(self) -> None:
        """Take out what hands on its input, and make what works in place not do so."""
        position = {node: index for index, node in enumerate(self.graph.nodes)}
        for node in list(self.graph.nodes):
            source = self._handed_on(node)
            if source is not None:
                node.replace_all_uses_with(source)
                self.graph.erase_node(node)
            elif self._in_place(node):
                changed = next(iter(node.all_input_nodes), None)
                while changed is not None:
                    if any(position[user] > position[node] for user in changed.users):
                        raise refusal(self, node, "it changes in place what is used again later", "inplace=False")
                    changed = changed.all_input_nodes[0] if _is_view(self, changed) else None
                self._set_pure(node)
        self.graph.eliminate_dead_code()
        self._module.recompile()

    def _handed_on(self, node: fx.Node) -> fx.Node | None:
        """The input of a node that does nothing; None for any other node."""
        first = node.args[0] if node.args else None
        if node.op == "call_module" and type(self.module(node)) in _NOTHING:
            (source,) = node.all_input_nodes
            return source
        if not isinstance(first, fx.Node):
            # sum() of a list begins with 0.
            adds_nothing = node.op == "call_function" and node.target is operator.add and first in (0,)
            return node.all_input_nodes[0] if adds_nothing and node.all_input_nodes else None
        if node.op == "call_function" and node.target is functional.dropout:
            return first if argument(node, 2, "training", True) is False else None
        return first if node.op == "call_method" and node.target == "contiguous" else None

    def _in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.module(node), "inplace", False))
        return node.kwargs.get("inplace") is True or (node.op, node.target) == ("call_function", operator.iadd)

    def _set_pure(self, node: fx.Node) -> None:
        if node.op == "call_module":
            cast("Any", self.module(node)).inplace = False
        elif node.target is operator.iadd:
            node.target = operator.add
        else:
            node.update_kwarg("inplace", False)

    def _name(self) -> dict[fx.Node, str]:
        names: dict[fx.Node, str] = {}
        taken: set[str] = set()
        for node in self.graph.nodes:
            if node.op == "output":
                continue
            plain = INPUT if node.op == "placeholder" else str(node.target) if node.op == "call_module" else node.name
            name, calls = plain, 1
            while name in taken:
                calls += 1
                name = f"{plain}#{calls}"
            names[node] = name
            taken.add(name)
        return names

    def _output(self) -> fx.Node:
        (result,) = (node for node in self.graph.nodes if node.op == "output")
        (value,) = result.args
        if not isinstance(value, fx.Node):
            raise UnsupportedError(f"the model returns a {type(value).__name__}; legal: one tensor")
        return value


class _Recorder(fx.Interpreter):
    """Runs the graph and keeps its values."""

    def __init__(self, traced: Traced) -> None:
        super().__init__(traced._module)
        self.traced = traced
        self.of_nodes: dict[fx.Node, Any] = {}
        self.within: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        layer = self.traced.module(n) if n.op == "call_module" else None
        if isinstance(layer, ExpertBinaryConv2d):
            with self._watch(n, layer):
                value = super().run_node(n)
        else:
            value = super().run_node(n)
        if n.op != "output":
            self.of_nodes[n] = value
        if isinstance(layer, BinaryFactorisedReduce):
            parts = value.tensor_split([layer.conv_even.out_channels], dim=1)
            for part, of_part in zip(("even", "odd"), parts, strict=True):
                self.within[f"{self.traced.names[n]}.{part}"] = of_part
        return value

    @contextmanager
    def _watch(self, node: fx.Node, layer: ExpertBinaryConv2d) -> Iterator[None]:
        name = self.traced.names[node]

        def keep_means(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.within[f"{name}.means"] = args[0]
            (norm,) = node.all_input_nodes
            if norm.op == "call_module" and isinstance(self.traced.module(norm), nn.BatchNorm2d):
                before = self.of_nodes[norm.all_input_nodes[0]]
                self.within[f"{name}.pooled"] = before.mean(dim=(2, 3))

        def keep(part: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], value: Tensor) -> None:
                self.within[f"{name}.{part}"] = value
                if part == "gate":
                    self.within[f"{name}.pick"] = value.argmax(dim=1)

            return hook

        watched: Mapping[str, nn.Module | None] = {
            "gate": layer.gate,
            "excite": layer.excite,
            "excite.1": layer.excite[1] if layer.excite is not None else None,
        }
        handles = [module.register_forward_hook(keep(part)) for part, module in watched.items() if module is not None]
        handles += [
            module.register_forward_pre_hook(keep_means) for module in (layer.gate, layer.excite) if module is not None
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def refusal(traced: Traced, node: fx.Node, why: str, legal: str | Sequence[str]) -> UnsupportedError:
    """The error that names a node.

    Args:
        traced: The graph.
        node: What is refused.
        why: What is wrong with it.
        legal: What would do instead.
    """
    if node.op == "call_module":
        kind = type(traced.module(node))
        what = f"module {node.target!r} ({kind.__module__}.{kind.__qualname__})"
    elif node.op == "call_method":
        what = f"call of the method {node.target!r} (fx node {node.name!r})"
    elif node.op == "call_function":
        module = getattr(node.target, "__module__", None) or getattr(node.target, "__class__", type(None)).__module__
        what = f"call of the function {module}.{getattr(node.target, '__name__', node.target)} (fx node {node.name!r})"
    else:
        what = f"{node.op} {node.target!r}"
    listed = legal if isinstance(legal, str) else ", ".join(legal)
    return UnsupportedError(f"{what}: {why}; legal: {listed}")


def argument(node: fx.Node, place: int, names: str | tuple[str, ...], default: Any) -> Any:
    """An argument of a call, by its place or by one of its names."""
    if len(node.args) > place:
        return node.args[place]
    for name in (names,) if isinstance(names, str) else names:
        if name in node.kwargs:
            return node.kwargs[name]
    return default


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, _LEAVES) or fx.Tracer().is_leaf_module(module, "")


def _is_view(traced: Traced, node: fx.Node) -> bool:
    """Whether a value can be the memory of its input under another shape."""
    if node.op == "call_module":
        return type(traced.module(node)) is nn.Flatten
    return node.target in ("flatten", torch.flatten)


_TRACING = threading.Lock()
"""While it traces, torch.fx replaces ``nn.Module.__call__`` in the whole process; two at once would never undo it."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m)

    @cached_property
    def _own(self) -> set[int]:
        return {id(module) for module in self.root.modules()}

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if id(m) not in self._own:
            # A module of another thread, which runs as ever.
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _computed(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        try:
            return model(x.clone())
        except Exception as error:
            raise InvalidInputError(
                f"the model does not take an example of shape {tuple(x.shape[1:])}: {type(error).__name__}: {error}"
            ) from error


def _trace(root: nn.Module) -> fx.GraphModule:
    try:
        with _TRACING:
            graph = _Tracer().trace(root)
    except Exception as error:
        # A model's forward() may fail in any way on the stand-in that tracing gives it.
        raise UnsupportedError(
            f"{type(root).__name__} cannot be traced by torch.fx: {type(error).__name__}: {error}; legal: a forward() "
            "of calls, without control flow that depends on the input"
        ) from error
    inputs = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise UnsupportedError(
            f"{type(root).__name__}.forward takes {', '.join(inputs) or 'nothing'}; legal: one tensor"
        )
    return fx.GraphModule(root, graph)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model is a {type(model).__name__}; legal: a torch.nn.Module")
    for path, module in model.named_modules():
        what = f"module {path!r} ({type(module).__qualname__})" if path else f"the model ({type(module).__qualname__})"
        if module.training:
            raise UnsupportedError(f"{what} is in training mode; legal: evaluation, by model.eval()")
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedError(f"{what} has forward hooks, which may change what it computes; legal: no hooks")
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in tensors:
            if tensor.dtype != torch.float32 and (tensor.is_floating_point() or tensor.is_complex()):
                raise UnsupportedError(f"{name} of {what} is {tensor.dtype}; legal: torch.float32")


def _same(found: Any, expected: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)

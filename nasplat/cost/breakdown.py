"""Where the time of one pass goes, part by part, on the runtime that a network is deployed on."""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasplat.checks import is_whole
from nasplat.cost.bench import Bench
from nasplat.cost.deployed import deployed
from nasplat.cost.machine import processor, steady
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.figures import check_picture, save_figure
from nasplat.packed import PackedProgram
from nasplat.packed.steps import step_seconds
from nasplat.runtimes.choose import AUTO, check_runtime, choose
from nasplat.runtimes.onnx_runtime import OPSET, input_names
from nasplat.runtimes.runtime import Runtime

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

REST = "(between parts)"
"""The row of the time of the whole that is in no part, or, where it is negative, that measuring the parts added."""

NO_MODULE = "(no one module)"
"""The row of parts that belong to no module: sums of several, what a runtime puts between layers."""

IR_VERSION = 9
"""Of ONNX files with that opset: what is read by versions of ONNX Runtime older than the onnx package."""


@dataclass(frozen=True)
class Part:
    """One part of a pass.

    Attributes:
        name: The runtime's own.
        kind: What it does: the operator, or the type of the module.
        module: Path of the module that it comes from, as far as its name tells; empty: none, or several.
        ms: Its time.
    """

    name: str
    kind: str
    module: str
    ms: float


@dataclass(frozen=True)
class Breakdown:
    """Where the time of one pass goes, in milliseconds.

    Attributes:
        runtime: Name of the runtime.
        parts: In the order in which they run.
        ms: The whole pass, measured without looking at its parts.
        facts: How and where it was measured.
    """

    runtime: str
    parts: tuple[Part, ...]
    ms: float
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rest_ms(self) -> float:
        """The whole without its parts: calls between parts, and what no part contains.

        Negative where the parts took longer one by one than together: looking at them takes time as well.
        """
        return self.ms - sum(part.ms for part in self.parts)

    def table(self) -> pd.DataFrame:
        """One row a part, and the rest last: ``name``, ``kind``, ``module``, ``ms``, ``share`` of the whole."""
        import pandas as pd

        rows = [(part.name, part.kind, part.module, part.ms) for part in self.parts]
        rows.append((REST, "", "", self.rest_ms))
        table = pd.DataFrame(rows, columns=["name", "kind", "module", "ms"])
        return table.assign(share=table["ms"] / self.ms)

    def by_kind(self) -> pd.Series:
        """Milliseconds by kind, the largest first, and the rest last."""
        import pandas as pd

        total: dict[str, float] = {}
        for part in self.parts:
            total[part.kind] = total.get(part.kind, 0.0) + part.ms
        ordered = sorted(total.items(), key=lambda item: -item[1])
        return pd.Series(dict([*ordered, (REST, self.rest_ms)]), name="ms", dtype=float)

    def with_counts(self, counts: pd.DataFrame) -> pd.DataFrame:
        """What was counted and the time, module by module.

        A runtime fuses: the time of a normalisation is then with the convolution before it, and its own is missing.

        Args:
            counts: Of :func:`~nasplat.cost.count.count_modules`.

        Returns:
            The table of counts with the columns ``ms`` (missing where no part is known to be of the module) and
            ``share`` of the whole, and with two more rows: parts that belong to no one module, and the rest.
        """
        import pandas as pd

        total: dict[str, float] = {}
        known = set(counts["module"])
        for part in self.parts:
            module = part.module if part.module in known and part.module else NO_MODULE
            total[module] = total.get(module, 0.0) + part.ms
        table = counts.assign(ms=[total.get(module, math.nan) if module else math.nan for module in counts["module"]])
        last = pd.DataFrame({"module": [NO_MODULE, REST], "ms": [total.get(NO_MODULE, 0.0), self.rest_ms]})
        table = pd.concat([table, last.reindex(columns=table.columns)], ignore_index=True)
        return table.assign(share=table["ms"] / self.ms)

    def figure(self, most: int = 40) -> Figure:
        """Horizontal bars, one a part in the order in which they run, and one for the rest; colours by kind.

        Args:
            most: Bars at most: the shortest parts beyond are one bar together.
        """
        from nasplat.cost.breakdown_figure import draw

        return draw(self, most)

    def save(self, path: str | Path, most: int = 40) -> Path:
        """Write the picture.

        Args:
            path: A name in .svg, .png or .pdf.
            most: As of :meth:`figure`.

        Raises:
            InvalidInputError: The name ends otherwise.
        """
        return save_figure(self.figure(most), check_picture(path))

    def __str__(self) -> str:
        """The parts and the kinds as text."""
        rows = [
            (row["name"], row["kind"], f"{row['ms']:.4f}", f"{row['share']:.1%}") for _, row in self.table().iterrows()
        ]
        widths = [max(len(row[column]) for row in [("part", "kind", "ms", "share"), *rows]) for column in range(4)]
        lines = [
            f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {ms:>{widths[2]}}  {share:>{widths[3]}}"
            for name, kind, ms, share in [("part", "kind", "ms", "share"), *rows]
        ]
        return "\n".join([*lines, "", self.summary()])

    def summary(self) -> str:
        """The whole, and the share of each kind, in one line."""
        kinds = ", ".join(f"{kind} {ms / self.ms:.0%}" for kind, ms in self.by_kind().items())
        return f"{self.ms:.3f} ms a pass on {self.runtime}: {kinds}"


def breakdown(
    model: nn.Module,
    example: Tensor,
    runtime: Runtime | str = AUTO,
    *,
    threads: int = 1,
    runs: int = 30,
    bench: Bench | None = None,
) -> Breakdown:
    """Measure where the time of one pass goes.

    * On ``packed``: step by step, with a clock in between.
    * On ``onnxruntime`` and its int8 form: its own profiler, node by node. What the profiler itself takes at a node,
      some microseconds, is measured on nodes that do nothing, and taken off.
    * On ``torch``: each module that holds no other is timed while the network runs.

    The least of several runs counts, for each part and for the whole, which is measured apart. How it differs from
    the sum of the parts has a row of its own. What a network takes is told by
    :class:`~nasplat.cost.latency.Latency`; this tells where it goes.

    Args:
        model: Stays as it was.
        example: Shape ``(n, ...)``, on the model's device.
        runtime: A runtime, the name of one, or ``auto`` as of :class:`~nasplat.cost.latency.Latency`.
        threads: Threads that compute; on ``packed`` always 1.
        runs: Runs of the whole; the parts are looked at in twice as many.
        bench: Where measuring is exclusive; None: this machine's.

    Raises:
        InvalidInputError: ``threads`` or ``runs`` is no integer from 1 up, or ``runtime`` names no runtime.
        UnsupportedError: The runtime cannot run the network, or does not tell where its time goes.
    """
    if not is_whole(threads) or not is_whole(runs):
        raise InvalidInputError(f"threads is {threads!r}, runs is {runs!r}; legal: integers from 1 up")
    check_runtime(runtime)
    bench = Bench() if bench is None else bench
    chosen = choose(runtime, model, example)
    way = "onnxruntime" if chosen.name.startswith("onnxruntime") else chosen.name
    measure = _WAYS.get(way)
    if measure is None:
        raise UnsupportedError(
            f"the runtime {chosen.name} does not tell where its time goes; legal: packed, onnxruntime, "
            "onnxruntime_int8, torch"
        )
    file = b"" if chosen.name == "torch" else deployed(chosen, model, example, 1, bench)[1]
    own = copy.deepcopy(model).cpu().eval()
    threads = 1 if chosen.name == "packed" else threads
    with bench.measuring(threads) as processors, steady(threads, processors):
        parts, ms = measure(own, file, example.detach().cpu(), threads, runs)
    facts = {"runtime": chosen.name, **chosen.facts(), "threads": threads, "processor": processor()}
    return Breakdown(chosen.name, tuple(parts), ms, facts)


# The three ways.

_Measured = tuple[Sequence[Part], float]


def _packed(model: nn.Module, file: bytes, example: Tensor, threads: int, runs: int) -> _Measured:
    program = PackedProgram.from_bytes(file)
    engine, x = program.engine, example[:1].numpy()
    times: list[NDArray[np.float64]] = []
    whole = _least(lambda: engine.run(x), runs, lambda: times.append(step_seconds(program, x, 1)))
    modules = {name.replace(".", "_"): name for name, _ in model.named_modules() if name}
    parts = []
    for step, seconds in zip(engine.steps, np.concatenate(times).min(0).tolist(), strict=True):
        module = next(filter(None, (_module(name, modules) for name in (step.name, *step.operations))), "")
        parts.append(Part(step.name, step.kind, module, seconds * 1e3))
    return parts, whole


def _module(name: str, modules: Mapping[str, str]) -> str:
    """The module that a value is named after: the longest path that its name begins with."""
    flat = name.replace(".", "_")
    fitting = [key for key in modules if flat == key or flat.startswith(key + "_")]
    return modules[max(fitting, key=len)] if fitting else ""


def _onnx(model: nn.Module, file: bytes, example: Tensor, threads: int, runs: int) -> _Measured:
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "profile")
        plain, looked_at = _session(file, threads), _session(file, threads, prefix)
        given = dict.fromkeys(input_names(plain), example.numpy())
        whole = _least(lambda: plain.run(None, given), runs, lambda: looked_at.run(None, given))
        times = _node_times(looked_at)
        own = _profiler_ms(prefix, runs)
    modules = {name for name, _ in model.named_modules() if name}
    return [Part(name, kind, _scope(name, modules), max(0.0, ms - own)) for (name, kind), ms in times.items()], whole


def _session(file: bytes, threads: int, prefix: str | None = None, *, optimise: bool = True) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = prefix
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _node_times(session: Any) -> dict[tuple[str, str], float]:
    """Least milliseconds by name and operator of a node, as the session's profiler saw them."""
    times: dict[tuple[str, str], float] = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
            times[key] = min(times.get(key, float("inf")), event["dur"] / 1e3)
    return times


def _profiler_ms(prefix: str, runs: int) -> float:
    """What the profiler itself takes at a node: the time of nodes that do nothing."""
    from onnx import TensorProto, helper

    names = [f"value{index}" for index in range(9)]
    nodes = [helper.make_node("Identity", [a], [b], name=f"node_{b}") for a, b in pairwise(names)]
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in (names[0], names[-1]))
    graph = helper.make_graph(nodes, "nothing", [given], [made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    session = _session(model.SerializeToString(), 1, prefix, optimise=False)
    for _ in range(2 * runs):
        session.run(None, {names[0]: np.zeros(1, np.float32)})
    return min(_node_times(session).values())


def _scope(name: str, modules: Iterable[str]) -> str:
    """The module that a node is named after: ``/cells.0/norm/BatchNormalization`` is ``cells.0.norm``'s."""
    path = ""
    for piece in name.strip("/").split("/"):
        # A module in a list, or a list in it, is named with the list: layers/layers.0/layers.0.1
        held = path.split(".") if path else []
        joined = [".".join([*held[:length], piece]) for length in range(len(held), -1, -1)]
        found = [one for one in joined if one in modules and (not path or one.startswith(f"{path}."))]
        if not found:
            break
        path = found[0]
    return path


def _torch(model: nn.Module, file: bytes, example: Tensor, threads: int, runs: int) -> _Measured:
    x = example.contiguous(memory_format=torch.channels_last) if example.ndim == 4 else example
    looked_at = copy.deepcopy(model)
    began: list[float] = []
    spent: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    kinds = {name: type(one).__name__ for name, one in model.named_modules() if next(one.children(), None) is None}

    def leave(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began.pop()

        return hook

    for name, module in looked_at.named_modules():
        if name in kinds:
            module.register_forward_hook(leave(name), always_call=True)
            module.register_forward_pre_hook(lambda *_: began.append(time.perf_counter()))

    def look() -> None:
        spent.clear()
        looked_at(x)
        for name, seconds in spent.items():
            times.setdefault(name, []).append(seconds * 1e3)

    with torch.inference_mode():
        whole = _least(lambda: model(x), runs, look)
    return [Part(name, kinds[name], name, min(values)) for name, values in times.items()], whole


_WAYS: Mapping[str, Callable[[nn.Module, bytes, Tensor, int, int], _Measured]] = {
    "packed": _packed,
    "onnxruntime": _onnx,
    "torch": _torch,
}


def _least(run: Callable[[], Any], runs: int, between: Callable[[], Any]) -> float:
    """Milliseconds of the quickest run, with runs of something else in between: both see the machine as it is."""
    times = []
    for _ in range(runs):
        # The second of two finds its data in the caches.
        between()
        between()
        run()
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    return min(times)
